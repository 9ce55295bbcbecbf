"""How far apart two neighbouring units of a layer look at the input: the product of the strides on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeAlias, cast

from torch import Tensor, fx, nn

from tying.channels.graph import Call
from tying.channels.operations import CONVOLUTIONS, WINDOWS
from tying.explain.dependence import Dependence, Step
from tying.nn import LocallyConnected1d, LocallyConnected2d

Scale: TypeAlias = "tuple[Fraction, ...]"
"""By spatial dimension."""


def find_scales(model: nn.Module, dependence: Dependence, dimensions: int) -> Mapping[fx.Node, Scale]:
    """Return how many places of the input lie between two neighbouring places, by node; none for what has no places.

    Args:
        model: The model.
        dependence: As traced.
        dimensions: Of the places of the input, its last ones: 2 for images.

    Example:
        >>> import torch
        >>> from tying.explain.dependence import find_dependence
        >>> model = nn.Sequential(nn.Conv1d(1, 1, 3, stride=2), nn.MaxPool1d(3))
        >>> [scale for (scale,) in find_scales(model, find_dependence(model, torch.zeros(1, 1, 20)), 1).values()]
        [Fraction(1, 1), Fraction(2, 1), Fraction(6, 1)]
    """
    local = _ends_of_local_layers(model, dependence)
    scales: dict[fx.Node, Scale] = {dependence.source: (Fraction(1),) * dimensions}
    for step in dependence.steps:
        if step.node in local:
            first, steps = local[step.node]
            before = scales.get(first)
        else:
            first = step.operands[0]
            before, steps = scales.get(first), _steps(step, dependence, dimensions)
        if before is not None and steps is not None:
            scales[step.node] = tuple(a * b for a, b in zip(before, steps, strict=True))
    return scales


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
        strides = tuple(map(Fraction, each(call["stride"], dimensions)))
        return tuple(1 / s for s in strides) if "transpose" in call.name else strides
    if WINDOWS.fullmatch(call.name) and "pool" in call.name and "adaptive" not in call.name:
        return tuple(map(Fraction, each(call["stride"] or call["kernel_size"], dimensions)))
    if WINDOWS.fullmatch(call.name):
        return tuple(map(Fraction, inside[-dimensions:], outside[-dimensions:]))
    same = tuple(inside[-dimensions:]) == tuple(outside[-dimensions:])
    return one if same or "pad" in call.name or _is_cut(call) else None


def _is_cut(call: Call) -> bool:
    return call.name == "slice" and call["step"] in (None, 1)


def each(given: Any, dimensions: int) -> list[int]:
    """Return one number per dimension of what is one number, or one for each."""
    listed = list(cast("Sequence[int]", given)) if isinstance(given, list | tuple) else [int(given)]
    return listed * dimensions if len(listed) == 1 else listed


def _ends_of_local_layers(model: nn.Module, dependence: Dependence) -> dict[fx.Node, tuple[fx.Node, Scale]]:
    """The outputs of locally connected layers, which are several operations; with their input and their stride."""
    operands = {step.node: step.operands for step in dependence.steps}
    ends: dict[fx.Node, tuple[fx.Node, Scale]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LocallyConnected1d | LocallyConnected2d):
            for call in dependence.modules.get(name, ()):
                inside = [node for node in call if node in operands]
                if inside:
                    ends[inside[-1]] = operands[inside[0]][0], tuple(map(Fraction, module.stride))
    return ends
