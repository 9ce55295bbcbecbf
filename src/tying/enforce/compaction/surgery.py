"""Tensors of another size written into a network, under all their names, and the sizes that its modules keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]
from torch.nn.utils import parametrize

from tying.enforce.held import holders, names_of, not_alone, owned, places_of
from tying.errors import CompactError
from tying.nn import TiedConv1d, TiedConv2d, TiedConv3d, TiedLinear
from tying.nn.tied import Way
from tying.plan import qualified

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


def is_tied(module: nn.Module) -> TypeGuard[TiedLayer]:
    """Return whether a module is one of the tied layers of `tying.nn`."""
    return isinstance(module, tuple(TIED.values()))


def tied_layers(model: nn.Module) -> dict[str, TiedLayer]:
    """Return the tied layers of a model by name, each under its first."""
    return {name: layer for name, layer in model.named_modules() if is_tied(layer)}


def sizes_of(module: nn.Module) -> dict[str, int]:
    """Return the size attributes that a module should have, from the shapes of its tensors; {} for types without."""
    for base in type(module).__mro__:
        if base in SIZES:
            return SIZES[base](module)
    return {}


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
        places = holders(model, name, names) if name in present else [(model.get_submodule(path), leaf)]
        like = present[name] if name in present else cast(Tensor, places[0][0].weight)
        new = _like(like, value)
        for module, attribute in places:
            refuse_parametrized(name, module)
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
    places, names = places_of(model), names_of(model)
    built: list[tuple[str, nn.Module]] = []
    for name, each in labels.items():
        layer = model.get_submodule(name)
        check_has_tied_twin(model, name, names)
        tied = _tied_twin(layer, each)
        tied.weight.data = tied.weight.data.contiguous(memory_format=_layout(cast(Tensor, layer.weight)))
        tied.bias = cast("nn.Parameter | None", layer.bias)
        built += [(place, tied) for place in places[id(layer)]]
    for place, tied in built:
        model.set_submodule(place, tied)


def check_has_tied_twin(model: nn.Module, name: str, names: Mapping[int, Sequence[str]] | None = None) -> None:
    """Raise unless the module of this name can be replaced by a tied layer.

    Args:
        model: Not written to.
        name: Of the module.
        names: Those of `names_of(model)`, for who asks about many modules.

    Raises:
        CompactError: Names the module, and what stands in the way.
    """
    layer, weight = model.get_submodule(name), qualified(name, "weight")
    refuse_parametrized(weight, layer)
    if type(layer) not in TIED:
        reason = f"{type(layer).__name__} has no tied twin"
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and (layer.groups > 1 or layer.padding_mode != "zeros"):
        reason = f"it has groups={layer.groups} and padding_mode={layer.padding_mode!r}"
    else:
        reason = not_alone(model, name, names)
    if reason:
        raise CompactError(
            f"{weight}: expected a plain linear or convolution layer of its own, to tie its inputs, got "
            f"{layer}: {reason}; leave it out of the plan, or tie it with tie_"
        )


def ways_of(model: nn.Module) -> dict[str, Way]:
    """Return by name the ways of the tied layers that compute in another one than the usual "sum"."""
    return {name: layer.way for name, layer in tied_layers(model).items() if layer.way != "sum"}


def set_ways_(model: nn.Module, ways: Mapping[str, Way]) -> None:
    """Let the tied layers compute in these ways, and all others sum."""
    for name, layer in tied_layers(model).items():
        layer.way = ways.get(name, "sum")


def _tied_twin(layer: nn.Module, labels: Sequence[int]) -> TiedLayer:
    twin = cast(Any, TIED[type(layer)])
    return (twin.from_linear if isinstance(layer, nn.Linear) else twin.from_conv)(layer, labels)


def _layout(tensor: Tensor) -> torch.memory_format:
    """How the tensor lies in memory: with its channels last, or as usual."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if last is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def _like(old: Tensor, value: Tensor) -> Tensor:
    """The value in its own memory, as the old tensor is: dtype, device, parameter or buffer, trained or not."""
    layout = _layout(old) if value.dim() == old.dim() else torch.contiguous_format
    if value.is_meta:
        new = torch.empty(value.shape, dtype=old.dtype, device=old.device, memory_format=layout)
    else:
        new = value.detach().to(old.device, old.dtype, copy=True).contiguous(memory_format=layout)
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def refuse_parametrized(name: str, module: nn.Module) -> None:
    """Raise `CompactError`, which begins with the name, if a parameter of the module is computed from others."""
    if parametrize.is_parametrized(module):
        raise CompactError(
            f"{name}: expected plain parameters, got a parametrization of "
            f"{', '.join(cast('nn.ModuleDict', module.parametrizations))}; call untie_ first, or "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
