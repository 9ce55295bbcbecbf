"""How far a layer's output moves along with its input: measured, in the interior and at the border, shift by shift."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import ceil, floor
from typing import TypeAlias

import torch
from torch import Tensor, fx, nn

from tying.explain.calls import Watched, check_finite, copies, watching
from tying.explain.marks.dependence import Dependence
from tying.explain.marks.marks import zeros
from tying.explain.planes import crossed, is_pool, is_spatial, kind_of, places
from tying.explain.scales import Grid, Scale, find_scales

CallOf: TypeAlias = "tuple[str, int]"
"""The name of a module, and which of its calls, from 1 on."""
NOISE = "for noise as bright as the example, which is shifted; shifts=0 measures none"


@dataclass(frozen=True)
class Shift:
    """One shift of the input along each spatial dimension in turn, to and fro, zeros moving in; the worst of them.

    Differences are relative to the largest output. A unit is in the interior if nothing that it sees is padding.
    """

    by: int
    whole: bool
    """Whether the outputs should move by a whole number of places; if not, the two whole numbers around it are tried,
    and the one is kept by which the outputs match better."""
    interior: float | None
    """The largest difference between the shifted output and the output of the shifted input; None: no unit there."""
    border: float | None
    """The same over the units that see padding."""
    inside: float
    """The part of the compared units that are in the interior."""


@dataclass(frozen=True)
class Equivariance:
    """How far one layer is equivariant to translation, by itself and from the input of the network on."""

    name: str
    kind: str
    call: int
    """Which of the calls of the module, from 1 on."""
    stride: tuple[float, ...]
    """Of the layer, by dimension; below 1 where it has more places than its input."""
    alone: tuple[Shift, ...]
    """The layer's own input is shifted."""
    period: tuple[int, ...]
    """By how many places the input of the network has to move for all layers so far to move by whole strides."""
    through: tuple[Shift, ...]
    """The input of the network is shifted."""
    broken_by: tuple[str, ...]
    """What breaks it in the layer alone: "stride 2", "pooling by 2", "resampling by 0.5", "padding", "border"
    (where resampling repeats it), or "weights of its own at each place"."""


@dataclass(frozen=True)
class _Run:
    """A layer's output on the input as it is, and which places of it see padding."""

    output: Tensor
    padded: Tensor


def measure_equivariance(
    model: nn.Module, dependence: Dependence, inputs: tuple[Tensor, ...], shifts: int
) -> tuple[Equivariance, ...]:
    """Shift the input by 1 … `shifts` places, and compare the outputs of every spatial layer.

    Args:
        model: In evaluation mode.
        dependence: As traced on the same inputs.
        inputs: One sample; the first input is shifted, along its last dimensions.
        shifts: The farthest shift.

    Example:
        >>> from tying.explain.marks.dependence import find_dependence
        >>> model = nn.Sequential(nn.Conv1d(1, 1, 3, padding=1), nn.MaxPool1d(2))
        >>> x = torch.randn(1, 1, 16)
        >>> [layer.broken_by for layer in measure_equivariance(model, find_dependence(model, x), (x,), 2)]
        [('padding',), ('pooling by 2',)]
    """
    layers = _spatial_layers(model, dependence)
    x = inputs[0]
    alike = [module for module, start, _ in layers.values() if _ndim(dependence, start) == x.ndim]
    if not alike or not x.is_floating_point():  # the input has no places of its own: a vector that is folded, say
        return ()
    dimensions = max(len(places(module, x.ndim)) for module in alike)
    scales = find_scales(model, dependence, dimensions)
    seen = _outputs(model, inputs)
    through = _through(model, dependence, inputs, shifts, {call: end for call, (_, _, end) in layers.items()}, scales)
    found: list[Equivariance] = []
    for (name, call), (module, start, end) in layers.items():
        if (name, call) not in seen or start not in scales or end not in scales:
            continue
        stride: Scale = tuple(
            after / before for before, after in zip(scales[start].scale, scales[end].scale, strict=True)
        )
        alone, padded = _alone(module, dependence, seen[name, call], shifts, (start, end), stride)
        found.append(
            Equivariance(
                name=name,
                kind=kind_of(module),
                call=call,
                stride=tuple(map(float, stride)),
                alone=alone,
                period=scales[end].period,
                through=through.get((name, call), ()),
                broken_by=_broken_by(module, alone, stride, padded, tolerance(x.dtype)),
            )
        )
    return tuple(found)


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative difference up to which two ways to compute one number agree."""
    return 200 * torch.finfo(dtype).eps


def shifted(x: Tensor, by: int, axis: int) -> Tensor:
    """Return a tensor moved towards the end of an axis (towards its beginning if `by` < 0), with zeros moving in.

    Example:
        >>> shifted(torch.tensor([1, 2, 3]), 1, 0).tolist(), shifted(torch.tensor([1, 2, 3]), -1, 0).tolist()
        ([0, 1, 2], [2, 3, 0])
    """
    moved = torch.zeros_like(x)
    length = x.shape[axis] - abs(by)
    if length > 0:
        moved.narrow(axis, max(by, 0), length).copy_(x.narrow(axis, max(-by, 0), length))
    return moved


def _ndim(dependence: Dependence, node: fx.Node) -> int:
    mark = dependence.varies[node]
    return mark.ndim if isinstance(mark, Tensor) else mark[0].ndim


def _spatial_layers(model: nn.Module, dependence: Dependence) -> Mapping[CallOf, tuple[nn.Module, fx.Node, fx.Node]]:
    """The calls of spatial layers, in their order, with the nodes of their input and output."""
    operands = {step.node: step.operands for step in dependence.steps}
    order = {step.node: place for place, step in enumerate(dependence.steps)}
    found: dict[CallOf, tuple[nn.Module, fx.Node, fx.Node]] = {}
    for name, module in model.named_modules():
        for number, inside in enumerate(dependence.calls_of(name) if is_spatial(module) else (), 1):
            if inside:
                found[name, number] = module, operands[inside[0]][0], inside[-1]
    return dict(sorted(found.items(), key=lambda item: order[item[1][2]]))


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[CallOf, Watched]:
    """What each spatial layer takes and gives, call by call."""
    seen: dict[CallOf, Watched] = {}
    calls: Counter[str] = Counter()

    def see(name: str, module: nn.Module, call: Watched) -> None:
        if is_spatial(module):
            check_finite(name or type(module).__name__, call.made, NOISE)
            calls[name] += 1
            seen[name, calls[name]] = call

    with torch.no_grad(), watching(model, see):
        model(*copies(inputs))
    return seen


def _alone(
    module: nn.Module,
    dependence: Dependence,
    seen: Watched,
    shifts: int,
    ends: tuple[fx.Node, fx.Node],
    stride: Scale,
) -> tuple[tuple[Shift, ...], bool]:
    """Shift the layer's own input; say also whether any of its units see padding."""
    given, output = seen.given, seen.made
    start, end = ends
    first = _Run(output, _padded(dependence, start, end, given, None))
    measured: list[Shift] = []
    for by in range(1, shifts + 1):
        parts: list[_Part] = []
        for (place, axis), to in product(enumerate(places(module, output.ndim)), (by, -by)):
            with torch.no_grad():
                moved = seen.again(shifted(given, to, axis))
            check_finite(type(module).__name__, moved, NOISE)
            second = _Run(moved, _padded(dependence, start, end, given, (to, axis)))
            distance = to / stride[place]
            parts.append(_compare(first, second, axis, distance, distance.denominator == 1))
        measured.append(_worst(by, parts))
    return tuple(measured), bool(first.padded.any())


def _through(
    model: nn.Module,
    dependence: Dependence,
    inputs: tuple[Tensor, ...],
    shifts: int,
    layers: Mapping[CallOf, fx.Node],
    scales: Mapping[fx.Node, Grid],
) -> dict[CallOf, tuple[Shift, ...]]:
    """Shift the input of the network: what every layer has of it, in one pass for each shift and dimension."""
    x, *others = inputs
    dimensions = len(scales[dependence.source].scale)
    before = dependence.forward({dependence.source: zeros(*x.shape)}, edges=True)
    plain = {layer: call.made for layer, call in _outputs(model, inputs).items()}
    parts: dict[CallOf, dict[int, list[_Part]]] = {}
    for by in range(1, shifts + 1):
        for place, to in product(range(dimensions), (by, -by)):
            axis = x.ndim - dimensions + place
            after = dependence.forward({dependence.source: _entered(x, to, axis)}, edges=True)
            moved = _outputs(model, (shifted(x, to, axis), *others))
            for layer, node in layers.items():
                if node not in scales or layer not in plain or plain[layer].ndim != x.ndim:
                    continue
                outputs = plain[layer], moved[layer].made
                first, second = (_Run(o, _mark(m[node])) for o, m in zip(outputs, (before, after), strict=True))
                grid = scales[node]
                part = _compare(first, second, axis, to / grid.scale[place], to % grid.period[place] == 0)
                parts.setdefault(layer, {}).setdefault(by, []).append(part)
    return {layer: tuple(_worst(by, each) for by, each in found.items()) for layer, found in parts.items()}


def _entered(x: Tensor, by: int, axis: int) -> Tensor:
    """Mark what moved in."""
    marks = zeros(*x.shape)
    length = min(abs(by), x.shape[axis])
    marks.narrow(axis, 0 if by > 0 else x.shape[axis] - length, length).fill_(1)
    return marks


def _padded(
    dependence: Dependence, start: fx.Node, end: fx.Node, given: Tensor, moved: tuple[int, int] | None
) -> Tensor:
    """Which elements of a layer's output see padding, or what moved in."""
    marks = zeros(*given.shape) if moved is None else _entered(given, *moved)
    return _mark(dependence.forward({start: marks}, edges=True, until=end)[end])


def _mark(mark: Tensor | list[Tensor]) -> Tensor:
    return (mark if isinstance(mark, Tensor) else mark[0]) > 0


@dataclass(frozen=True)
class _Part:
    """One direction of a shift: as `Shift`."""

    whole: bool
    interior: float | None
    border: float | None
    inside: float


def _compare(first: _Run, second: _Run, axis: int, distance: Fraction, whole: bool) -> _Part:
    """Compare the first output, shifted by the distance or the whole numbers around it, with the second.

    Of two whole numbers, the one by which they match better, in the interior first. One by which no unit is left to
    compare is none to choose.
    """
    tried = [_at(first, second, axis, step, whole) for step in sorted({floor(distance), ceil(distance)})]
    compared = [part for part in tried if (part.interior, part.border) != (None, None)]
    return min(compared or tried, key=lambda part: (part.interior is None, part.interior or 0.0, part.border or 0.0))


def _at(first: _Run, second: _Run, axis: int, step: int, whole: bool) -> _Part:
    length = first.output.shape[axis] - abs(step)
    if length < 1:
        return _Part(whole, None, None, 0.0)
    to, of = max(step, 0), max(-step, 0)
    apart = (second.output.narrow(axis, to, length) - first.output.narrow(axis, of, length)).abs().double()
    edge = (second.padded.narrow(axis, to, length) | first.padded.narrow(axis, of, length)).to(apart.device)
    largest = float(first.output.abs().max()) or 1.0
    interior, border = (float(apart[part].max()) / largest if bool(part.any()) else None for part in (~edge, edge))
    return _Part(whole, interior, border, 1 - float(edge.double().mean()))


def _worst(by: int, parts: Sequence[_Part]) -> Shift:
    """Put the dimensions together."""
    interior = [part.interior for part in parts if part.interior is not None]
    border = [part.border for part in parts if part.border is not None]
    return Shift(
        by,
        all(part.whole for part in parts),
        max(interior, default=None),
        max(border, default=None),
        sum(part.inside for part in parts) / len(parts),
    )


def _broken_by(module: nn.Module, alone: Sequence[Shift], stride: Scale, padded: bool, most: float) -> tuple[str, ...]:
    """Name what breaks it: a shift that is no whole number of strides, padding, or weights that differ."""
    reasons: list[str] = []
    strides = crossed(f"{float(each):g}" for each in dict.fromkeys(stride) if each != 1)
    kind = "pooling by" if is_pool(module) else "resampling by" if isinstance(module, nn.Upsample) else "stride"
    if any(not shift.whole and max(shift.interior or 0, shift.border or 0) > most for shift in alone):
        reasons.append(f"{kind} {strides}")
    if any(shift.whole and (shift.interior or 0) > most for shift in alone):
        reasons.append("weights of its own at each place")
    if padded and any(shift.whole and (shift.border or 0) > most for shift in alone):
        reasons.append("border" if isinstance(module, nn.Upsample) else "padding")
    return tuple(reasons)
