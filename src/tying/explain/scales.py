"""How far apart two neighbouring places of a layer look at the input: the product of the strides on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import TypeAlias

from torch import Tensor, fx, nn

from tying.channels.graph import Call
from tying.channels.operations import CONVOLUTIONS, WINDOWS
from tying.explain.marks.dependence import Dependence, Step
from tying.explain.marks.marks import each
from tying.explain.planes import LOCAL

Scale: TypeAlias = "tuple[Fraction, ...]"
"""By spatial dimension."""


@dataclass(frozen=True)
class Grid:
    """Where the places of a layer stand on the input of the network, by spatial dimension."""

    scale: Scale
    """How many places of the input lie between two neighbouring ones."""
    period: tuple[int, ...]
    """By how many places the input has to move for all layers on the way to move by whole strides: what was thinned
    out once, only to be blown up again later, does not come back."""


def find_scales(model: nn.Module, dependence: Dependence, dimensions: int) -> Mapping[fx.Node, Grid]:
    """Return where the places of every value stand on the input, by node; none for what has no places.

    Args:
        model: The model.
        dependence: As traced.
        dimensions: Of the places of the input, its last ones: 2 for images.

    Example:
        >>> import torch
        >>> from tying.explain.marks.dependence import find_dependence
        >>> model = nn.Sequential(nn.Conv1d(1, 1, 3, stride=2), nn.MaxPool1d(3))
        >>> [grid.period for grid in find_scales(model, find_dependence(model, torch.zeros(1, 1, 20)), 1).values()]
        [(1,), (2,), (6,)]
    """
    local = _ends_of_local_layers(model, dependence)
    grids: dict[fx.Node, Grid] = {dependence.source: Grid((Fraction(1),) * dimensions, (1,) * dimensions)}
    for step in dependence.steps:
        if step.node in local:
            first, steps = local[step.node]
        else:
            first, steps = step.operands[0], _steps(step, dependence, dimensions)
        before = grids.get(first)
        if before is None or steps is None:
            continue
        scale = tuple(a * b for a, b in zip(before.scale, steps, strict=True))
        beside = [grids[node].period for node in step.operands if node in grids]
        periods = zip(before.period, *beside, (each.numerator for each in scale), strict=True)
        grids[step.node] = Grid(scale, tuple(lcm(*each) for each in periods))
    return grids


def _steps(step: Step, dependence: Dependence, dimensions: int) -> Scale | None:
    """How much one operation stretches; None where it is not clear."""
    call, made = step.call, dependence.varies[step.node]
    given = dependence.varies[step.operands[0]]
    one = (Fraction(1),) * dimensions
    if call.name == "getitem":
        return one
    if not isinstance(given, Tensor):
        return None
    inside, outside = given.shape, (made if isinstance(made, Tensor) else made[0]).shape
    if len(inside) != len(outside) or len(inside) < dimensions + 1:
        return None
    if CONVOLUTIONS.fullmatch(call.name):
        strides = tuple(map(Fraction, each(call["stride"], dimensions, 1)))
        return tuple(1 / s for s in strides) if "transpose" in call.name else strides
    if WINDOWS.fullmatch(call.name) and "pool" in call.name and "adaptive" not in call.name:
        return tuple(map(Fraction, each(call["stride"] or call["kernel_size"], dimensions, 1)))
    if WINDOWS.fullmatch(call.name):
        return tuple(map(Fraction, inside[-dimensions:], outside[-dimensions:]))
    same = tuple(inside[-dimensions:]) == tuple(outside[-dimensions:])
    return one if same or "pad" in call.name or _is_cut(call) else None


def _is_cut(call: Call) -> bool:
    return call.name == "slice" and call["step"] in (None, 1)


def _ends_of_local_layers(model: nn.Module, dependence: Dependence) -> dict[fx.Node, tuple[fx.Node, Scale]]:
    """The outputs of locally connected layers, which are several operations; with their input and their stride."""
    operands = {step.node: step.operands for step in dependence.steps}
    ends: dict[fx.Node, tuple[fx.Node, Scale]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LOCAL):
            for inside in filter(None, dependence.calls_of(name)):
                ends[inside[-1]] = operands[inside[0]][0], tuple(map(Fraction, module.stride))
    return ends
