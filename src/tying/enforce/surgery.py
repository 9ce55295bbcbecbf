"""Tensors of another size written into a network, under all their names, and the sizes that its modules keep."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]
from torch.nn.utils import parametrize

from tying.enforce.adapt import attributes_of, restore_attributes_
from tying.enforce.convolutions import rebuild_convolutions
from tying.errors import CompactError, PlanError
from tying.nn import FlatConv, TiedConv1d, TiedConv2d, TiedConv3d, TiedLinear
from tying.nn.tied import WAYS, Way
from tying.plan import qualified

Description: TypeAlias = dict[str, dict[str, Any]]
TiedLayer: TypeAlias = TiedLinear | TiedConv1d | TiedConv2d | TiedConv3d


def _linear(module: Any) -> dict[str, int]:
    return {"in_features": module.weight.shape[1], "out_features": module.weight.shape[0]}


def _bilinear(module: Any) -> dict[str, int]:
    return dict(zip(("out_features", "in1_features", "in2_features"), module.weight.shape, strict=True))


def _convolution(module: Any) -> dict[str, int]:
    makes, reads = module.weight.shape[:2]
    groups = _groups(module, makes, module.out_channels)
    return {"in_channels": reads * groups, "out_channels": makes, "groups": groups}


def _transposed(module: Any) -> dict[str, int]:
    reads, makes = module.weight.shape[:2]
    groups = _groups(module, reads, module.in_channels)
    return {"in_channels": reads, "out_channels": makes * groups, "groups": groups}


def _groups(module: Any, length: int, before: int) -> int:
    """The groups left of a convolution, from the length of its weight now and before: a group goes as a whole."""
    return 1 if module.groups == 1 else length // (before // module.groups)


def _norm(module: Any) -> dict[str, int]:
    held = module.weight if module.weight is not None else module.running_mean
    return {"num_features": module.num_features if held is None else held.shape[0]}


def _embedding(module: Any) -> dict[str, int]:
    return {"num_embeddings": module.weight.shape[0], "embedding_dim": module.weight.shape[1]}


def _tied_linear(module: Any) -> dict[str, int]:
    return {"in_features": module.labels.shape[0], "out_features": module.weight.shape[0]}


def _tied_convolution(module: Any) -> dict[str, int]:
    return {"in_channels": module.labels.shape[0], "out_channels": module.weight.shape[0]}


SIZES: dict[type[nn.Module], Callable[[Any], dict[str, int]]] = {
    nn.Linear: _linear,
    nn.Bilinear: _bilinear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.ConvTranspose1d: _transposed,
    nn.ConvTranspose2d: _transposed,
    nn.ConvTranspose3d: _transposed,
    _NormBase: _norm,
    nn.PReLU: lambda module: {"num_parameters": module.weight.shape[0]},
    nn.GroupNorm: lambda module: {} if module.weight is None else {"num_channels": module.weight.shape[0]},
    nn.Embedding: _embedding,
    nn.EmbeddingBag: _embedding,
    TiedLinear: _tied_linear,
    TiedConv1d: _tied_convolution,
    TiedConv2d: _tied_convolution,
    TiedConv3d: _tied_convolution,
}
"""The one table: module type (or a base of it) → the size attributes that its tensors' shapes imply."""

TIED: dict[type[nn.Module], type[TiedLayer]] = {
    nn.Linear: TiedLinear,
    nn.Conv1d: TiedConv1d,
    nn.Conv2d: TiedConv2d,
    nn.Conv3d: TiedConv3d,
}
"""Which layer takes the place of a plain one whose inputs are tied."""


def sizes_of(module: nn.Module) -> dict[str, int]:
    """Return the size attributes that a module should have, from the shapes of its tensors; {} for types without."""
    for base in type(module).__mro__:
        if base in SIZES:
            return SIZES[base](module)
    return {}


def owned(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by name, each under all its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def names_of(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of every parameter and buffer by the tensor's id, the first name first."""
    names: dict[int, list[str]] = {}
    for name, tensor in owned(model).items():
        names.setdefault(id(tensor), []).append(name)
    return names


def holders(model: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """Return the modules that hold the tensor of this name, each once, with the attribute it is there."""
    return _holders(model, names_of(model)[id(owned(model)[name])])


def _holders(model: nn.Module, names: Sequence[str]) -> list[tuple[nn.Module, str]]:
    found = [(model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in names]
    return list({(id(module), leaf): (module, leaf) for module, leaf in found}.values())


def replace_(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write tensors of other sizes into the model, then bring the size attributes of its modules up to date.

    A tensor is written under all the names of the one it replaces, with that one's dtype, device and `requires_grad`:
    what was tied stays tied. A parameter that is None (a bias) is made like its module's weight.

    Args:
        model: Written to.
        values: By any one name, any floating-point dtype; copied.

    Raises:
        CompactError: If a module that holds the tensor has a parametrization. Nothing is written then.
    """
    present, names = owned(model), names_of(model)
    written: list[tuple[nn.Module, str, Tensor]] = []
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        places = _holders(model, names[id(present[name])]) if name in present else [(model.get_submodule(path), leaf)]
        like = present[name] if name in present else cast(Tensor, places[0][0].weight)
        new = _like(like, value)
        for module, attribute in places:
            _refuse_parametrized(name, module)
            written.append((module, attribute, new))
    for module, attribute, new in written:
        setattr(module, attribute, new)
    for module, _, _ in written:
        for attribute, size in sizes_of(module).items():
            setattr(module, attribute, size)


def place_tied_(model: nn.Module, labels: Mapping[str, Sequence[int]]) -> None:
    """Put a tied layer in the place of each plain one, under all its names; the bias stays the same parameter.

    Args:
        model: Written to.
        labels: One label per input, by module name.

    Raises:
        CompactError: If a module is not a plain layer that has a tied twin, has hooks, or shares its weight with
            another module. Nothing is written then.
        PlanError: If the labels do not fit.
    """
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    built: list[tuple[str, nn.Module]] = []
    for name, each in labels.items():
        layer = model.get_submodule(name)
        check_has_tied_twin(model, name)
        tied = _tied_twin(layer, each)
        tied.bias = cast("nn.Parameter | None", layer.bias)
        built += [(place, tied) for place in places[id(layer)]]
    for place, tied in built:
        model.set_submodule(place, tied)


def has_hooks(layer: nn.Module) -> bool:
    """Whether something else runs with a layer's forward or backward."""
    return any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks))  # pyright: ignore[reportPrivateUsage]


def check_has_tied_twin(model: nn.Module, name: str) -> None:
    """Raise unless the module of this name can be replaced by a tied layer.

    Raises:
        CompactError: Names the module, and what stands in the way.
    """
    layer, weight = model.get_submodule(name), qualified(name, "weight")
    _refuse_parametrized(weight, layer)
    reason = None
    if not name:
        reason = "the layer is the whole model; wrap it in nn.Sequential"
    elif type(layer) not in TIED:
        reason = f"{type(layer).__name__} has no tied twin"
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and (layer.groups > 1 or layer.padding_mode != "zeros"):
        reason = f"it has groups={layer.groups} and padding_mode={layer.padding_mode!r}"
    elif has_hooks(layer):
        reason = "it has hooks, which would be lost; remove them"
    elif len(shared := holders(model, weight)) > 1:
        reason = f"its weight is shared by {len(shared)} modules"
    if reason:
        raise CompactError(
            f"{weight}: expected a plain linear or convolution layer of its own, to tie its inputs, got "
            f"{layer}: {reason}; leave it out of the plan, or tie it with tie_"
        )


def describe(model: nn.Module) -> Description:
    """Record the architecture: by module name, its type, its sizes, and the shapes of its own tensors.

    Only what JSON can hold. Modules without tensors of their own are left out. The labels of a tied layer are a
    buffer like any other: its shape is recorded here, its values belong to the state dict.

    Example:
        >>> describe(nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU()))
        {'0': {'type': 'Linear', 'in_features': 3, 'out_features': 2, 'tensors': {'weight': [2, 3], 'bias': None}}}
    """
    result: Description = {}
    ways = ways_of(model)
    for name, module in model.named_modules():
        tensors = {leaf: None if held is None else list(held.shape) for leaf, held in _own(module).items()}
        adapted = {"attributes": attributes} if (attributes := attributes_of(module)) else {}
        if tensors or adapted:
            way = {"way": ways[name]} if name in ways else {}
            result[name] = {"type": type(module).__name__, **sizes_of(module), **way, **adapted, "tensors": tensors}
        elif isinstance(module, FlatConv):
            result[name] = {"type": type(module).__name__, "wiring": module.wiring.to_text(), "tensors": {}}
    return result


def rebuild(model: nn.Module, description: Description) -> nn.Module:
    """Return a copy of a freshly built original architecture, brought to the one that `describe` recorded.

    Tensors whose shape changed are uninitialised, and the tied layers, which stand where recorded, have placeholders
    for labels: fill both with `load_state_dict`.

    Args:
        model: Of the architecture that was compacted; any device, `meta` too. Not written to.
        description: From `describe`.

    Raises:
        PlanError: If the description is not one of a network made from this architecture; names the module.
        CompactError: If a layer that has to change has a parametrization or hooks.
    """
    result = rebuild_convolutions(copy.deepcopy(model), description)
    _restore_attributes_(result, description)
    tied = _newly_tied(result, description)
    shapes: dict[str, list[int]] = {}
    for name, entry in description.items():
        for leaf, shape in entry["tensors"].items():
            if name in tied and leaf == "labels":
                continue
            if name in tied and leaf == "weight":
                shape = [shape[0], len(tied[name]), *shape[2:]]  # of the plain layer, which is then tied
            held = _own(result.get_submodule(name))[leaf]
            if shape is not None and (held is None or list(held.shape) != shape):
                shapes[qualified(name, leaf)] = shape
    replace_(result, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    place_tied_(result, tied)
    set_ways_(result, {name: way for name, entry in description.items() for way in WAYS if entry.get("way") == way})
    rebuilt = describe(result)
    for name, entry in description.items():
        if rebuilt.get(name) != entry:
            raise _unlike(name, entry, rebuilt.get(name))
    return result


def _restore_attributes_(model: nn.Module, description: Description) -> None:
    """Set the attributes that changed with what was cut, as the number of heads.

    Raises:
        PlanError: If a module has no such attribute.
    """
    modules = dict(model.named_modules())
    for name, entry in description.items():
        if "attributes" in entry:
            try:
                restore_attributes_(modules[name], entry["attributes"])
            except (KeyError, ValueError) as error:
                raise _unlike(name, entry, None) from error


def _newly_tied(model: nn.Module, description: Description) -> dict[str, list[int]]:
    """Labels, as many as recorded, of the modules that are plain in the model and tied in the description.

    Raises:
        PlanError: If the two have other modules, other types or other tensors.
    """
    present, tied = describe(model), dict[str, list[int]]()
    for name in sorted({*present, *description}):
        recorded, held = description.get(name), present.get(name)
        if recorded is None or held is None:
            raise _unlike(name, recorded, held)
        tensors, twin = set(recorded["tensors"]), TIED.get(type(model.get_submodule(name)))
        if twin is not None and recorded["type"] == twin.__name__:
            inputs, classes = recorded["tensors"]["labels"][0], recorded["tensors"]["weight"][1]
            tied[name] = [min(i, classes - 1) for i in range(inputs)]
            tensors.discard("labels")
        elif recorded["type"] != held["type"]:
            raise _unlike(name, recorded, held)
        if tensors != set(held["tensors"]):
            raise _unlike(name, recorded, held)
    return tied


def _unlike(name: str, recorded: Mapping[str, Any] | None, held: Mapping[str, Any] | None) -> PlanError:
    def say(entry: Mapping[str, Any] | None) -> str:
        return "none of that name" if entry is None else ", ".join(f"{k}={v}" for k, v in entry.items())

    if recorded is None and held is not None:
        expected, got = "no module of that name with tensors (the saved model has none)", held["type"]
    else:
        expected, got = f"a module with {say(recorded)}", say(held)
    return PlanError(f"{name}: expected {expected}, got {got}; build the model as it was before compacting")


def ways_of(model: nn.Module) -> dict[str, Way]:
    """Return by name the ways of the tied layers that compute in another one than the usual "sum"."""
    tied = ((name, module) for name, module in model.named_modules() if isinstance(module, tuple(TIED.values())))
    return {name: layer.way for name, layer in tied if layer.way != "sum"}


def set_ways_(model: nn.Module, ways: Mapping[str, Way]) -> None:
    """Let the tied layers compute in these ways, and all others sum."""
    for name, module in model.named_modules():
        if isinstance(module, tuple(TIED.values())):
            module.way = ways.get(name, "sum")


def _own(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own parameters and buffers; the indices that a tied layer derives from its labels left out."""
    parameters = module._parameters  # pyright: ignore[reportPrivateUsage]
    buffers = module._buffers  # pyright: ignore[reportPrivateUsage]
    if isinstance(module, tuple(TIED.values())):
        buffers = {"labels": buffers["labels"]}
    return {**parameters, **buffers}


def _tied_twin(layer: nn.Module, labels: Sequence[int]) -> TiedLayer:
    twin = cast(Any, TIED[type(layer)])
    return (twin.from_linear if isinstance(layer, nn.Linear) else twin.from_conv)(layer, labels)


def _like(old: Tensor, value: Tensor) -> Tensor:
    """The value in its own memory, as the old tensor is: dtype, device, parameter or buffer, trained or not."""
    if value.is_meta:
        new = torch.empty(value.shape, dtype=old.dtype, device=old.device)
    else:
        new = value.detach().to(old.device, old.dtype, copy=True).contiguous()
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _refuse_parametrized(name: str, module: nn.Module) -> None:
    if parametrize.is_parametrized(module):
        raise CompactError(
            f"{name}: expected a plain parameter, got a module with a parametrization; call untie_ first, or "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
