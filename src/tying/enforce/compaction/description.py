"""Architectures on record: what `compact` made of a network, described and rebuilt from a fresh one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tying.enforce.compaction.adapt import attributes_of, restore_attributes_
from tying.enforce.compaction.convolutions import rebuild_convolutions
from tying.enforce.compaction.surgery import TIED, is_tied, place_tied_, replace_, set_ways_, sizes_of, ways_of
from tying.errors import PlanError
from tying.nn import FlatConv
from tying.nn.tied import WAYS
from tying.plan import qualified

Description: TypeAlias = dict[str, dict[str, Any]]


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


def _own(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own parameters and buffers; the indices that a tied layer derives from its labels left out."""
    parameters = module._parameters  # pyright: ignore[reportPrivateUsage]
    buffers = module._buffers  # pyright: ignore[reportPrivateUsage]
    if is_tied(module):
        buffers = {"labels": buffers["labels"]}
    return {**parameters, **buffers}
