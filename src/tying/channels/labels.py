"""Every element of every value carries a label, the channel it belongs to; labels that must go together are united.

A label is an integer. Each index of each axis of each parameter has one ("named" labels), and so has each element of
the model's inputs and of whatever comes from an unknown operation ("anonymous" labels, all of them blocked).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.int64]


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer, or what data movement made of it.

    `axes[a]` has the shape of the value; it holds, for every element, the label of its slice along axis `a` of the
    parameter.
    """

    name: str
    axes: tuple[Tensor, ...]
    is_buffer: bool
    moved: bool = False

    def along(self, dim: int) -> Tensor | None:
        """Return the labels of the slices that one dimension of the value runs through, or None if they are mixed."""
        if not self.axes:
            return None
        dim %= self.axes[0].ndim
        if not self.moved:
            return _line(self.axes[dim], dim)
        if self.axes[0].shape[dim] == 1:
            single = [labels for labels in self.axes if not any(varies(labels, d) for d in range(labels.ndim))]
            return _line(single[0], dim) if len(single) == 1 else None
        found = [labels for labels in self.axes if varies(labels, dim)]
        if len(found) != 1 or any(varies(found[0], d) for d in range(found[0].ndim) if d != dim):
            return None
        return _line(found[0], dim)


Value = Tensor | Weight
"""What the rules pass on: the labels of an activation, in its own shape, or a parameter."""


@dataclass(frozen=True)
class Settled:
    """What is known of channels once all labels are united."""

    classes: Array
    """The channel of every label."""
    blocked: list[str | None]
    """Why each channel can't be removed, if so."""
    lost: list[str | None]
    """Why what depends on it is not known in full, if so."""
    unless: dict[int, set[int]]
    """The RMSNorms that block a channel, and nothing else, by channel."""
    felt: frozenset[int]
    """The channels that more than their readers may feel."""


class Ledger:
    """What the rules say about labels: united, made, read, blocked; and what is checked once all is united."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Give a label to each index of each axis of each tensor, in their order."""
        self.starts: dict[str, list[int]] = {}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.size = 0
        for name, shape in self.shapes.items():
            self.starts[name] = []
            for length in shape:
                self.starts[name].append(self.size)
                self.size += length
        self.named = self.size
        self.made = np.zeros(self.named, dtype=bool)
        self.read = np.zeros(self.named, dtype=bool)
        self.reads: list[Array] = []
        self._pairs: list[Array] = []
        self._blocks: list[tuple[Array, str]] = []
        self._felt: list[Array] = []
        self._unless: list[tuple[Array, str, int]] = []
        self._lost: list[tuple[Array, str]] = []
        self._summaries: list[tuple[Array, Array, str]] = []
        self._spreads: list[tuple[Array, Array, str]] = []
        self._whole: list[tuple[Tensor, str]] = []
        self._fixed: list[tuple[Tensor, int, Sequence[int], bool, str]] = []
        self._kept: list[tuple[Array, Array, str]] = []

    def weight(self, name: str, *, is_buffer: bool) -> Weight:
        """Return the tensor of this name as a value."""
        shape = self.shapes[name]
        axes: list[Tensor] = []
        for axis, (start, length) in enumerate(zip(self.starts[name], shape, strict=True)):
            line = torch.arange(start, start + length)
            axes.append(line.reshape([-1 if d == axis else 1 for d in range(len(shape))]).expand(shape))
        return Weight(name, tuple(axes), is_buffer)

    def anonymous(self, shape: Sequence[int], reason: str) -> Tensor:
        """Return a new, blocked label for every element."""
        count = int(np.prod(shape, dtype=np.int64))
        labels = torch.arange(self.size, self.size + count).reshape(tuple(shape))
        self.size += count
        self.block(labels, reason, felt=False)
        return labels

    def unite(self, left: Tensor, right: Tensor) -> None:
        """Unite labels element by element; the shapes broadcast."""
        a, b = (_flat(t) for t in squash(left, right))
        differ = a != b
        if differ.any():
            pairs = _distinct(a[differ] * self.size + b[differ])
            self._pairs.append(np.stack(np.divmod(pairs, self.size)))

    def block(self, labels: Tensor, reason: str, *, unless: int | None = None, felt: bool = True) -> None:
        """Say why these can't be removed; the first reason given is the one reported.

        With `unless`, the number of an RMSNorm, they can where they are zero, if nothing else blocks them. Not `felt`:
        only their place is needed, and whatever number stands there, nothing feels it but what reads them.
        """
        if felt:
            self._felt.append(unique(labels))
        if unless is None:
            self._blocks.append((unique(labels), reason))
        else:
            self._unless.append((unique(labels), reason, unless))

    def lose(self, labels: Tensor, reason: str) -> None:
        """Say why what depends on these is not known in full; they can't be removed either."""
        self.block(labels, reason)
        self._lost.append((unique(labels), reason))

    def summarise(self, labels: Tensor, summary: Tensor, reason: str, *, unless: int | None = None) -> None:
        """Say that numbers like a mean or a norm are taken over channels: these can't be removed.

        They are lost only if the summary does more than scale or shift the channels that it was taken over, as in a
        normalisation written by hand.
        """
        self.block(labels, reason, unless=unless)
        self.reads.append(unique(labels))
        self._summaries.append((unique(labels), unique(summary), reason))

    def spread(self, labels: Tensor, over: Sequence[Tensor], reason: str) -> None:
        """Say that one value meets several channels: it belongs to none of them, and is lost unless a summary."""
        self.block(labels, reason)
        self.reads.append(unique(labels))
        self._spreads.append((unique(labels), _distinct(np.concatenate([unique(o) for o in over])), reason))

    def mark_made(self, labels: Tensor) -> None:
        """Record that these slices of parameters make their channels."""
        self.made[_flat(labels)] = True

    def mark_read(self, labels: Tensor) -> None:
        """Record that these slices of parameters read their channels."""
        self.read[_flat(labels)] = True
        self.reads.append(unique(labels))

    def splits(self, labels: Tensor, dim: int) -> bool:
        """Whether different channels, at least one made by a parameter, lie along the dimension."""
        (labels,) = squash(labels)
        first = labels.narrow(dim, 0, 1)
        return bool(((labels != first) & ((labels < self.named) | (first < self.named))).any())

    def require_whole(self, labels: Tensor, reason: str) -> None:
        """Block, in the end, the channels that aren't all of some indices of one axis: they can't be cut out."""
        self._whole.append((labels, reason))

    def require_fixed(self, labels: Tensor, axis: int, pieces: Sequence[int], literal: bool, reason: str) -> None:
        """Block, in the end, the channels that are cut along an axis into pieces of these lengths.

        Those that leave every piece in proportion to its length may go, so that what is left of the axis is cut between
        the same channels as before; where the lengths are literal, heads alone, whose sizes a module's attributes may
        say. Without pieces, none.
        """
        self._fixed.append((labels, axis, pieces, literal, reason))

    def require_kept(self, before: Array, after: Array, reason: str) -> None:
        """Block, in the end, the channels that go into an operation and neither leave it nor are read by it."""
        self._kept.append((before, after, reason))

    def settle(self, counted: Sequence[Tensor] = ()) -> Settled:
        """Find the channel of every label, and for every channel why it is blocked and why it is lost, if so.

        Args:
            counted: Labels of heads, whose sizes a module's attributes may say.
        """
        classes = self._classes()
        heads = np.unique(classes[np.concatenate([_flat(labels) for labels in counted])] if counted else classes[:0])
        reasons: list[str | None] = [None] * (int(classes.max(initial=-1)) + 1)

        def block(found: Array, reason: str) -> None:
            _give(reasons, found, reason)

        for labels, reason in self._blocks:
            block(classes[labels], reason)
        for labels, reason in self._whole:
            found, slabs = _slabs(labels, classes)
            block(found[~slabs.any(1)], reason)
        for labels, axis, pieces, literal, reason in self._fixed:
            found, slabs = _slabs(labels, classes)
            even = slabs[:, axis] & _in_proportion(labels, classes, found, axis, pieces)
            free = np.delete(slabs, axis, 1).any(1) | (even & (np.isin(found, heads) | (not literal)))
            block(found[~free], reason)
        gone = [(_without(classes[before], classes[after]), reason) for before, after, reason in self._kept]
        for found, reason in gone:
            block(found, reason)
        unless: dict[int, set[int]] = {}
        free = {index for index, reason in enumerate(reasons) if reason is None}
        for labels, reason, number in self._unless:
            block(classes[labels], reason)
            for index in _distinct(classes[labels]).tolist():
                if index in free:
                    unless.setdefault(index, set()).add(number)
        losses = self._losses(classes, gone)
        felt = {index for labels in self._felt for index in classes[labels].tolist()}
        felt |= {index for index, reason in enumerate(losses) if reason is not None}
        return Settled(classes, reasons, losses, unless, frozenset(felt))

    def _losses(self, classes: Array, gone: Sequence[tuple[Array, str]]) -> list[str | None]:
        """Return, for every channel, why what depends on it is not known in full, if so."""
        losses: list[str | None] = [None] * (int(classes.max(initial=-1)) + 1)
        for labels, reason in self._lost:
            _give(losses, classes[labels], reason)
        for found, reason in gone:
            _give(losses, found, reason)
        summaries = [(classes[of], _distinct(classes[summary]), reason) for of, summary, reason in self._summaries]
        for labels, over, reason in self._spreads:
            fits = [summary for of, summary, _ in summaries if np.isin(classes[over], of).all()]
            _give(losses, _without(classes[labels], np.concatenate([*fits, classes[:0]])), reason)
        read = _distinct(classes[: self.named][self.read])
        for of, summary, reason in reversed(summaries):  # a summary of a summary comes later
            if np.isin(summary, read).any() or any(losses[index] for index in summary.tolist()):
                _give(losses, of, reason)
        return losses

    def _classes(self) -> Array:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        pairs = np.concatenate(self._pairs, axis=1) if self._pairs else np.zeros((2, 0), dtype=np.int64)
        graph: Any = coo_array((np.ones(pairs.shape[1], dtype=bool), (pairs[0], pairs[1])), shape=(self.size,) * 2)
        return connected_components(graph, directed=False)[1].astype(np.int64)


def squash(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Broadcast the tensors, then keep one index of every dimension along which none of them can vary.

    Labels of activations are mostly expanded: a convolution's output costs its channels here, not its pixels.
    """
    result = torch.broadcast_tensors(*tensors)
    for dim in range(result[0].ndim):
        if result[0].shape[dim] > 1 and all(t.stride(dim) == 0 for t in result):
            result = tuple(t.narrow(dim, 0, 1) for t in result)
    return tuple(result)


def varies(labels: Tensor, dim: int) -> bool:
    """Whether different labels lie along the dimension."""
    (labels,) = squash(labels)
    return labels.numel() > 0 and bool((labels != labels.narrow(dim, 0, 1)).any())


def unique(labels: Tensor) -> Array:
    """Return the distinct labels, ascending."""
    return _distinct(_flat(squash(labels)[0]))


def _distinct(values: Array) -> Array:
    """Return each value once, ascending: as `np.unique`, which is slow for values that are so already."""
    if len(values) < 2 or bool((values[1:] > values[:-1]).all()):
        return values
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])]


def _without(values: Array, others: Array) -> Array:
    return np.setdiff1d(_distinct(values), _distinct(others), assume_unique=True)


def _give(reasons: list[str | None], found: Array, reason: str) -> None:
    """Give the channels a reason, unless they have one."""
    for index in _distinct(found).tolist():
        reasons[index] = reasons[index] or reason


def _flat(labels: Tensor) -> Array:
    return labels.reshape(-1).numpy()


def _line(labels: Tensor, dim: int) -> Tensor:
    return labels.movedim(dim, -1).reshape(-1, labels.shape[dim])[0] if labels.numel() else labels.reshape(-1)


def _slabs(labels: Tensor, classes: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Return the channels in a value, and for each axis whether the channel is all of some indices of that axis."""
    (squashed,) = squash(labels)
    found, inverse = np.unique(classes[_flat(squashed)], return_inverse=True)
    counts = np.bincount(inverse.reshape(-1), minlength=len(found))
    slabs = np.zeros((len(found), labels.ndim), dtype=bool)
    for axis, length in enumerate(squashed.shape):
        indices = _indices(inverse.reshape(-1), squashed.shape, axis)
        width = np.bincount(indices[0], minlength=len(found))
        slabs[:, axis] = width * (squashed.numel() // max(length, 1)) == counts
    return found, slabs


def _indices(inverse: Array, shape: Sequence[int], axis: int) -> Array:
    """Return the distinct (channel, index along the axis) pairs, as two rows."""
    length = shape[axis]
    index = np.broadcast_to(np.arange(length).reshape([-1 if d == axis else 1 for d in range(len(shape))]), shape)
    pairs = _distinct(inverse * length + index.reshape(-1))
    return np.stack([pairs // length, pairs % length])


def _in_proportion(labels: Tensor, classes: Array, found: Array, axis: int, pieces: Sequence[int]) -> NDArray[np.bool_]:
    """Whether each channel has indices along the axis in every piece, in proportion to its length."""
    length = labels.shape[axis]
    if sum(pieces) != length or not length:
        return np.zeros(len(found), dtype=bool)
    inverse = np.searchsorted(found, classes[_flat(labels)])
    channel, index = _indices(inverse, labels.shape, axis)
    table = np.zeros((len(found), len(pieces)), dtype=np.int64)
    np.add.at(table, (channel, np.searchsorted(np.cumsum(pieces), index, side="right")), 1)
    return (table * length == table.sum(1, keepdims=True) * np.array(pieces)).all(1)
