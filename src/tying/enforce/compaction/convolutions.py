"""A convolution in the place of a layer whose ties make it one; the same again for a network that is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from tying.enforce.held import not_alone, places_of
from tying.errors import CompactError, PlanError
from tying.groups import Groups
from tying.nn import FlatConv, LocallyConnected1d, LocallyConnected2d
from tying.plan import Partition, Tie, TiePlan, qualified
from tying.wiring.recognise import recognise, spells
from tying.wiring.wiring import PlainConv, Wiring

LOCAL = (LocallyConnected1d, LocallyConnected2d)
Geometry: TypeAlias = Wiring | None
"""Of a dense layer; None for a locally connected one, which has its own."""


@dataclass(frozen=True)
class Convolutions:
    """Which layers a plan makes convolutions of, by module name, and the ties that say something else."""

    layers: Mapping[str, Geometry]
    others: TiePlan


def convolutions_in(model: nn.Module, plan: TiePlan) -> Convolutions:
    """Find the ties that make convolutions of linear and locally connected layers.

    The geometry is the one that the plan's provenance records, else found from the labels; in both cases all labels
    are compared.

    Raises:
        CompactError: If the ties over elements of a linear layer, or over positions, are not those of a convolution.
    """
    mine: dict[str, dict[str, Tie]] = {}
    for tie in plan:
        path, leaf, module = _layer_of(model, tie)
        kind = tie.members[0].groups.kind if len(tie.members) == 1 else None
        if (isinstance(module, nn.Linear) and kind == "elements") or (isinstance(module, LOCAL) and kind):
            mine.setdefault(path, {})[leaf] = tie
    layers = {path: _geometry(path, model.get_submodule(path), ties, plan) for path, ties in mine.items()}
    taken = {tie for ties in mine.values() for tie in ties.values()}
    return Convolutions(layers, TiePlan([tie for tie in plan if tie not in taken], plan.provenance))


def place_convolutions(model: nn.Module, layers: Mapping[str, Geometry]) -> nn.Module:
    """Put a convolution in the place of each layer, under all its names; its kernel is the mean of what is tied.

    Args:
        model: Written to, unless it is itself the layer.
        layers: Of `convolutions_in`.

    Returns:
        The model, or the convolution that took its place.

    Raises:
        CompactError: If a layer shares its weight with another or has hooks. Nothing is written then.
    """
    built = {name: _built(model, name, geometry) for name, geometry in layers.items()}
    return _with_layers(model, built)


def rebuild_convolutions(model: nn.Module, description: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Put uninitialised convolutions where a description has them and the model has the layers they were made of.

    Args:
        model: Of the architecture before compacting; written to.
        description: Of `tying.enforce.compaction.description.describe`.

    Raises:
        PlanError: If a recorded geometry is malformed.
    """
    modules, built = dict(model.named_modules()), dict[str, nn.Module]()
    for name, entry in description.items():
        module = modules.get(name)
        if entry["type"] == FlatConv.__name__ and isinstance(module, nn.Linear):
            wiring = Wiring.from_text(str(entry["wiring"]))
            conv = wiring.conv(bias=True, device=module.weight.device, dtype=module.weight.dtype)
            built[name] = FlatConv(_as(conv, module), wiring.windows.input_size)
        elif isinstance(module, LOCAL) and entry["type"] == module.plain.__name__:
            if list(module.kernel_size) != entry["tensors"]["weight"][2:]:
                continue  # refused later, as a layer of another type
            built[name] = _as(module.empty_conv(), module)
    return _with_layers(model, built)


def _layer_of(model: nn.Module, tie: Tie) -> tuple[str, str, nn.Module]:
    """The layer that a tie's first parameter belongs to: its name, the parameter's name in it, the layer."""
    path, _, leaf = tie.members[0].parameter.rpartition(".")
    return path, leaf, model.get_submodule(path)


def _geometry(path: str, module: nn.Module, ties: Mapping[str, Tie], plan: TiePlan) -> Geometry:
    """The geometry of the convolution that a layer's ties make of it.

    Raises:
        CompactError: If they don't.
    """
    weight, bias = ties.get("weight"), ties.get("bias")
    if isinstance(module, LOCAL):
        for tie in ties.values():
            if tie.members[0].groups != Groups.positions() or tie.partition.classes != 1 or tie.partition.pruned:
                raise CompactError(
                    f"{tie}: expected one label for all positions, which makes a convolution, got another tie of a "
                    "locally connected layer; enforce it with tie_ instead"
                )
    if weight is None:
        raise CompactError(
            f"{bias}: expected a tie of the weight beside it, which makes a convolution, or groups of inputs or "
            f"outputs, got {next(iter(ties.values())).members[0].groups}; enforce it with tie_ instead"
        )
    if (bias is None) != (cast("Tensor | None", module.bias) is None):
        raise CompactError(
            f"{qualified(path, 'bias')}: expected ties of weight and bias together, got none of it; tie both as "
            "tying.find.convolution.hardwired does, or enforce the plan with tie_ instead"
        )
    if isinstance(module, LOCAL):
        return None
    shape = cast("tuple[int, int]", tuple(cast(Tensor, module.weight).shape))
    found = _found(shape, weight.partition, None if bias is None else bias.partition, plan)
    if found is None:
        raise CompactError(
            f"{weight}: expected the labels of a convolution, got others; make them with "
            "tying.find.convolution.hardwired, or enforce the plan with tie_ instead"
        )
    return found


def _found(shape: tuple[int, int], weight: Partition, bias: Partition | None, plan: TiePlan) -> Wiring | None:
    for key, text in plan.provenance.items():
        if key.startswith("convolution of "):
            try:
                wiring = Wiring.from_text(text)
            except PlanError:  # somebody else's words
                continue
            if spells(wiring, shape, weight, bias):
                return wiring
    return recognise(shape, weight, bias)


def _built(model: nn.Module, name: str, geometry: Geometry) -> nn.Module:
    layer = cast(Any, model.get_submodule(name))
    weight = qualified(name, "weight")
    if reason := not_alone(model, name, whole=True):
        raise CompactError(f"{weight}: expected a layer of its own, to make a convolution of, got {layer}: {reason}")
    if geometry is None:
        conv = cast("PlainConv", layer.empty_conv())
        kernel, offset = _mean(layer.weight), None if layer.bias is None else _mean(layer.bias)
    else:
        conv = geometry.conv(bias=layer.bias is not None, device=layer.weight.device, dtype=layer.weight.dtype)
        kernel = geometry.kernel(layer.weight)
        offset = None if layer.bias is None else _mean(layer.bias.reshape(geometry.out_channels, -1).T)
    with torch.no_grad():
        conv.weight.copy_(kernel)
        if offset is not None:
            cast(Tensor, conv.bias).copy_(offset)
    conv = _as(conv, layer)
    return conv if geometry is None else FlatConv(conv, geometry.windows.input_size).train(layer.training)


def _mean(positions: Tensor) -> Tensor:
    return positions.detach().double().mean(0)


def _as(conv: PlainConv, layer: Any) -> PlainConv:
    """The convolution, with a bias if the layer has one, trained as the layer is."""
    if layer.bias is None:
        conv.bias = None
    else:
        cast(Tensor, conv.bias).requires_grad_(layer.bias.requires_grad)
    conv.weight.requires_grad_(layer.weight.requires_grad)
    return conv.train(layer.training)


def _with_layers(model: nn.Module, built: Mapping[str, nn.Module]) -> nn.Module:
    """The model with new layers under all the names that those they replace have; or the new one, if it is all."""
    places = places_of(model)
    wanted = [(place, new) for name, new in built.items() for place in places[id(model.get_submodule(name))]]
    for place, new in wanted:
        if place:
            model.set_submodule(place, new)
    return built.get("", model)
