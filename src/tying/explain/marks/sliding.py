"""How marks spread through what slides over places: convolutions, pools, resampling; and what of it sees padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from tying.channels.graph import Call
from tying.channels.operations import WINDOWS
from tying.explain.marks.marks import (
    Known,
    Marks,
    Rule,
    Spread,
    each,
    everywhere,
    known_in,
    ones,
    present,
    run_on_marks,
    zeros,
)


def convolution(call: Call) -> Rule:
    """Every output depends on what the kernel covers, where it is not zero."""
    value, weight = call["input"], call["weight"]
    if not isinstance(value, Known) or isinstance(weight, Known):
        return Rule(everywhere(call, known_in(list(call.arguments.values()))), exact=False)
    dims = int(call.name[-2])
    lines = (slice(None),) * (value.value.ndim - dims - 1)
    taps = present(weight)
    spread = _all_channels(call, value, weight) if bool(taps.all()) else _of_weights(call, {"weight": taps})
    line = {id(value): ones(*value.value.shape)[(*lines, slice(0, 1))]}
    kernel = {"weight": torch.ones_like(taps[:1, :1]), "groups": 1, "bias": None}
    counted = run_on_marks(call, line, **kernel)
    return Rule(lambda marks: spread(marks), edge=_edge(call, counted, line[id(value)], kernel, dims))


def _of_weights(call: Call, changed: dict[str, Any]) -> Spread:
    return lambda marks: run_on_marks(call, marks, bias=None, **changed)


def _all_channels(call: Call, value: Known, weight: Tensor) -> Spread:
    """A kernel without zeros treats all channels of a group alike: sum them, convolve one, and give it to all."""
    groups, axis = int(call["groups"] or 1), value.value.ndim - int(call.name[-2]) - 1
    kernel = ones(groups, 1, *weight.shape[2:])
    shape = call.shape

    def spread(marks: Marks) -> Tensor:
        summed = marks[id(value)].unflatten(axis, (groups, -1)).sum(axis + 1)
        made = run_on_marks(call, {id(value): summed}, weight=kernel, bias=None)
        return made.repeat_interleave(shape[axis] // groups, axis)

    return spread


def _edge(call: Call, counted: Tensor, line: Tensor, kernel: dict[str, Any], dims: int) -> Tensor:
    """Where fewer products are summed than would be if the input went on beyond its border."""
    if "transpose" not in call.name:
        full = math.prod(kernel["weight"].shape[2:])
        return (counted < full).float()
    strides, dilations = (each(call[name], dims, 1) for name in ("stride", "dilation"))
    sizes = kernel["weight"].shape[2:]
    more = [(k - 1) * d // s + 2 for k, d, s in zip(sizes, dilations, strides, strict=True)]
    wide = functional.pad(line, [n for m in reversed(more) for n in (m, m)], value=1)
    result = run_on_marks(call, {}, **{**kernel, "input": wide})
    for axis, (m, s) in enumerate(zip(more, strides, strict=True)):
        place = line.ndim - dims + axis
        result = result.narrow(place, m * s, counted.shape[place])
    return (counted < result).float()


def window(call: Call) -> Rule:
    """Every output of a pool depends on what is in its window."""
    value = call["self"] if call["self"] is not None else call["input"]
    dims = int(WINDOWS.sub(r"\1", call.name))
    if not isinstance(value, Known):
        return Rule(everywhere(call, known_in(list(call.arguments.values()))), exact=False)
    if "pool" not in call.name:
        return _resampling(call, value, dims)
    several = isinstance(call.node.meta.get("val"), list | tuple)
    if "adaptive" in call.name:
        pool = (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d)
        size = cast(Any, call.shape[-dims:])

        def adaptive(marks: Marks) -> Any:
            made = pool[dims - 1](marks[id(value)], size)
            return [made, made] if several else made

        return Rule(adaptive)
    sum_windows = _summing(call, dims)

    def pooled(marks: Marks) -> Any:
        made = sum_windows(marks[id(value)], 0.0)
        return [made, made] if several else made

    one = ones(*value.value.shape)
    edge = (sum_windows(one, 0.0) < sum_windows(one, 1.0)).float()
    return Rule(pooled, edge=edge)


def _resampling(call: Call, value: Known, dims: int) -> Rule:
    """Every output depends on the places around its own; at the border, some of these would lie outside."""
    edge: Tensor | None = None
    if "nearest" not in call.name and not call["align_corners"]:
        factors = call["scale_factors"]
        edge = zeros(*call.shape[-dims:])
        for axis, (before, after) in enumerate(zip(value.value.shape[-dims:], call.shape[-dims:], strict=True)):
            step = 1 / factors[axis] if factors else before / after
            at = (torch.arange(after, dtype=torch.float64) + 0.5) * step - 0.5
            # a whole number of places reads one place; between two, linear kernels read both, cubic ones one more
            reads = 1 if "cubic" in call.name else 0
            whole = (at - at.round()).abs() < 1e-6
            outside = (at.floor() < reads) | (at.ceil() > before - 1 - reads)
            outside = torch.where(whole, (at.round() < 0) | (at.round() > before - 1), outside)
            lines = [1] * axis + [after] + [1] * (dims - axis - 1)
            edge = torch.maximum(edge, outside.float().reshape(lines))
    if "bicubic" in call.name:
        return Rule(everywhere(call, [value]), edge=edge, exact=False)
    return Rule(lambda marks: run_on_marks(call, marks), edge=edge)


def _summing(call: Call, dims: int) -> Callable[[Tensor, float], Tensor]:
    """Sum what a window of a pool sees; what lies in its padding counts as given."""
    kernel = each(call["kernel_size"], dims, 1)
    strides = kernel if call["stride"] in (None, []) else each(call["stride"], dims, 1)
    padding, dilations = each(call["padding"], dims, 0), each(call["dilation"], dims, 1)
    outputs = call.shape[-dims:]
    convolve = cast(Any, (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1])

    def windows(marks: Tensor, outside: float) -> Tensor:
        around: list[int] = []
        for axis in reversed(range(dims)):
            needed = (outputs[axis] - 1) * strides[axis] + (kernel[axis] - 1) * dilations[axis] + 1
            around += [padding[axis], needed - marks.shape[axis - dims] - padding[axis]]
        padded = functional.pad(marks, around, value=outside)
        lines = padded.reshape(-1, 1, *padded.shape[-dims:])
        made = convolve(lines, ones(1, 1, *kernel), stride=strides, dilation=dilations)
        return made.reshape(*marks.shape[:-dims], *outputs)

    return windows
