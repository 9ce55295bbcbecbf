"""Data movement, executed on the labels: index maps are right by construction."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tying.channels.graph import Call
from tying.channels.labels import Weight
from tying.channels.tracer import Tracer, spread, values_in


def move(tracer: Tracer, call: Call) -> Any:
    """Execute the operation on the labels; a parameter that moves alone stays a parameter."""
    operands = values_in(list(call.arguments.values()))
    weight = operands[0]
    if len(operands) == 1 and isinstance(weight, Weight):
        if not weight.axes:
            return tracer.labels(weight, call)
        moved = [execute(call, {id(weight): labels}) for labels in weight.axes]
        if isinstance(moved[0], Tensor):
            return Weight(weight.name, tuple(moved), weight.is_buffer, moved=True)
        parts: list[Any] = list(zip(*moved, strict=True))
        return [Weight(weight.name, part, weight.is_buffer, moved=True) for part in parts]
    return execute(call, {id(value): tracer.labels(value, call) for value in operands})


def shuffle(tracer: Tracer, call: Call) -> Any:
    """As data movement; but the number of groups, or of positions, is written in forward, so that none may go.

    What has the same place in every group, or is next to it in the larger image, goes together.
    """
    value = call["self"]
    if not isinstance(value, Tensor):
        return move(tracer, call)
    enlarged = call.name == "pixel_shuffle"
    axis = value.ndim - 3 if enlarged else 1
    line = tracer.line(value, axis, f"{call} works along another axis")
    if line is None:
        return tracer.deny(call)
    parts = line.reshape(-1, call["upscale_factor"] ** 2) if enlarged else line.reshape(call["groups"], -1).T
    tracer.ledger.unite(parts[:, :1], parts)
    first = parts[:, :1].expand(parts.shape)
    together = (first if enlarged else first.T).reshape(-1)
    return execute(call, {id(value): spread(together, axis, value.ndim).expand(value.shape)})


def execute(call: Call, replaced: dict[int, Tensor]) -> Any:
    """Run the operation with label tensors in the place of its operands."""
    result = call.run(lambda item: replaced.get(id(item), item))
    return list(result) if isinstance(result, list | tuple) else result
