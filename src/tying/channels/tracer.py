"""What the rules share: the ledger, and the ways in which a value meets a parameter or nothing known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from tying.channels.graph import Call
from tying.channels.labels import Ledger, Value, Weight, squash, varies


@dataclass(frozen=True)
class Read:
    """A contraction: which value it reads, along which axis, and the weight's labels in that order."""

    call: Call
    operand: str
    """The name of the argument that is read."""
    axis: int
    labels: Tensor
    padded: bool


@dataclass(frozen=True)
class NormLabels:
    """An RMSNorm: its channels that are zero can go, if its weight and eps make up for it."""

    call: Call
    operand: str
    """The argument of the call that is zero where the channel is: what is normalised, or its square."""
    line: Tensor
    """One label per index of the last axis."""
    start: fx.Node
    """Where the eps is added."""
    end: fx.Node
    """Where the weight is multiplied with."""
    weight: fx.Node
    eps: float | None


@dataclass(frozen=True)
class CountedLabels:
    """An operation that counts what it works on: heads, groups."""

    modules: tuple[str, ...]
    """The modules in whose forward it stands, from the inside out."""
    labels: Tensor
    """One for each head or group, in their order."""
    cut: bool
    """Whether operations that cut at literal positions may cut them: the positions are sizes that may be attributes."""


class Tracer:
    """What the rules write to."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.readings: list[Read] = []
        self.norms: list[NormLabels] = []
        self.counted: list[CountedLabels] = []
        self.outputs: list[Tensor] = []

    def block(self, value: Value, reason: str) -> None:
        """Block the channels of an activation, or every slice of a parameter."""
        for labels in value.axes if isinstance(value, Weight) else [value]:
            self.ledger.block(labels, reason)

    def labels(self, value: Value, call: Call, *, like: Tensor | None = None, axis: int | None = None) -> Tensor:
        """Return a value as the labels of its elements.

        A parameter's elements belong to a slice of each of its axes: the one that counts is the only one longer than
        1, or the one along `axis`, or the one that runs as the channels of `like`.
        """
        if isinstance(value, Tensor):
            return value
        if not value.is_buffer:
            long = [labels for labels in value.axes if any(varies(labels, d) for d in range(labels.ndim))]
            if axis is not None:
                long = [labels for labels in long if varies(labels, axis)]
            elif like is not None and len(long) > 1:
                exactly = [labels for labels in long if _correspond(labels, like)]
                long = exactly or [labels for labels in long if _determines(like, labels)]
            if len(long) == 1:
                self.ledger.mark_made(long[0])
                return long[0]
        what = "the buffer" if value.is_buffer else "the parameter"
        reason = f"{call} combines it with {what} {value.name!r}, which can't be cut with it"
        self.block(value, reason)
        shape = value.axes[0].shape if value.axes else ()
        return self.ledger.anonymous(shape, reason)

    def line(self, labels: Tensor, axis: int, reason: str) -> Tensor | None:
        """Return one label per index of the axis, uniting what shares an index; None and blocked if channels cross.

        Blocked as well where different channels share an index, as in a sequence that begins with a learned token.
        """
        axis %= labels.ndim
        if any(self.ledger.splits(labels, d) for d in range(labels.ndim) if d != axis):
            self.ledger.block(labels, reason)
            index = spread(torch.arange(labels.shape[axis]), axis, labels.ndim)
            if not _determines(labels, index):
                return None
        line = labels.movedim(axis, -1).reshape(-1, labels.shape[axis])[0]
        self.ledger.unite(labels, spread(line, axis, labels.ndim))
        return line

    def attach(self, labels: Tensor, axis: int, vectors: Sequence[Any], call: Call) -> None:
        """Let vectors (weight, bias, statistics) run along the axis: they make the channels."""
        line = self.line(labels, axis, f"{call} works along another axis")
        for vector in vectors:
            if vector is None:
                continue
            along = vector.along(0) if isinstance(vector, Weight) and len(vector.axes) == 1 else None
            if line is None or along is None:
                for value in (vector, labels):
                    self.block(value, f"{call} combines it with values that can't be cut with it")
            else:
                self.ledger.unite(line, along)
                self.ledger.mark_made(along)

    def note_counted(self, call: Call, labels: Tensor, *, cut: bool) -> None:
        """Note that an operation counts these: one label each."""
        for dim in range(labels.ndim):
            if not varies(labels, dim):
                labels = labels.narrow(dim, 0, 1)
        self.counted.append(CountedLabels(call.modules, labels.reshape(-1), cut))

    def deny(self, call: Call, reason: str | None = None) -> Any:
        """Block all that goes in, and lose sight of it; what comes out belongs to nobody."""
        reason = reason or f"{call} has no rule"
        for value in values_in(list(call.arguments.values())):
            for labels in value.axes if isinstance(value, Weight) else [value]:
                self.ledger.lose(labels, reason)
        made = [
            self.ledger.anonymous([int(n) for n in out.shape], f"made by {call}") if isinstance(out, Tensor) else None
            for out in call.outputs
        ]
        return made if isinstance(call.node.meta.get("val"), (tuple, list)) else made[0]


def values_in(nested: Any) -> list[Value]:
    """Return the values in nested arguments, in order."""
    if isinstance(nested, Tensor | Weight):
        return [nested]
    if isinstance(nested, list | tuple):
        return [value for item in cast(list[Any], nested) for value in values_in(item)]
    return []


def first_output(tracer: Tracer, call: Call, labels: Tensor) -> Any:
    """Return the labels of the first of an operation's outputs; the others belong to nobody."""
    if not isinstance(call.node.meta.get("val"), list | tuple):
        return labels
    others = [tracer.ledger.anonymous([int(n) for n in out.shape], f"made by {call}") for out in call.outputs[1:]]
    return [labels, *others]


def narrow(tracer: Tracer, labels: Tensor, dims: Sequence[int]) -> Tensor | None:
    """Keep one index of these dimensions, uniting the others with it; None where channels lie along them."""
    if any(tracer.ledger.splits(labels, d) for d in dims):
        return None
    narrowed = labels
    for dim in dims:
        narrowed = narrowed.narrow(dim, 0, 1)
    tracer.ledger.unite(labels, narrowed)
    return narrowed


def spread(line: Tensor, axis: int, ndim: int) -> Tensor:
    """Return one label per index of an axis in a shape that broadcasts over the others."""
    return line.reshape([-1 if d == axis else 1 for d in range(ndim)])


def _correspond(left: Tensor, right: Tensor) -> bool:
    """Whether each label of one side always meets the same label of the other."""
    return _determines(left, right) and _determines(right, left)


def _determines(left: Tensor, right: Tensor) -> bool:
    """Whether each label of the left always meets the same label of the right."""
    a, b = (t.reshape(-1) for t in squash(left, right))
    a = a.unique(return_inverse=True)[1]
    one = torch.empty_like(b).scatter_(0, a, b)  # any of those that it meets
    return bool((one[a] == b).all())
