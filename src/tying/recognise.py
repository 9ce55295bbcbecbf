"""The convolution that labels of a dense weight spell, found from the labels alone and always compared with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tying.errors import PlanError
from tying.plan import Partition
from tying.windows import Windows
from tying.wiring import Wiring


def spells(wiring: Wiring, shape: tuple[int, int], weight: Partition, bias: Partition | None) -> bool:
    """Return whether these labels of a dense weight of this shape, and of its bias, are those of the convolution."""
    if (wiring.out_features, wiring.in_features) != shape:
        return False
    try:
        same = Partition(wiring.weight_labels()) == weight
    except PlanError:  # two taps on one input
        return False
    return same and (bias is None or Partition(wiring.bias_labels()) == bias)


def recognise(shape: tuple[int, int], weight: Partition, bias: Partition | None = None) -> Wiring | None:
    """Find the convolution with zero padding whose dense layer has these labels, or None if there is none.

    Channels first: a label stays inside one block of outputs and one of inputs. Then, inside one block and per
    dimension, tap k reads input `stride · position + offset_k`.

    Args:
        shape: `(outputs, inputs)` of the dense weight.
        weight: One label per number of it.
        bias: One label per output.

    Example:
        >>> from torch import nn
        >>> wiring = Wiring.of_conv(nn.Conv2d(2, 3, 3, stride=2, padding=1), (7, 5))
        >>> found = recognise((wiring.out_features, wiring.in_features), Partition(wiring.weight_labels()))
        >>> found == wiring
        True
    """
    labels = weight.labels.reshape(shape)
    row, column = np.nonzero(labels >= 0)
    if not len(row):
        return None
    entries = _Entries(row, column, labels[row, column])
    for out_channels in _blocks(entries.row, entries.label, shape[0]):
        for in_channels in _blocks(entries.column, entries.label, shape[1]):
            positions, inputs = shape[0] // out_channels, shape[1] // in_channels
            for wiring in _fitting(entries, out_channels, in_channels, positions, inputs):
                if spells(wiring, shape, weight, bias):
                    return wiring
    return None


@dataclass(frozen=True)
class _Entries:
    """The connections of a dense weight: where each stands, and its label."""

    row: NDArray[np.int64]
    column: NDArray[np.int64]
    label: NDArray[np.int64]


def _blocks(at: NDArray[np.int64], label: NDArray[np.int64], length: int) -> Iterator[int]:
    """In how many equal blocks this axis can be cut so that every label stays in one, the most first."""
    lowest = np.full(label.max() + 1, length)
    highest = np.zeros(label.max() + 1, dtype=np.int64)
    np.minimum.at(lowest, label, at)
    np.maximum.at(highest, label, at)
    for blocks in range(length, 0, -1):
        if length % blocks == 0 and np.array_equal(lowest // (length // blocks), highest // (length // blocks)):
            yield blocks


def _fitting(entries: _Entries, out_channels: int, in_channels: int, positions: int, inputs: int) -> Iterator[Wiring]:
    """The convolutions that fit the connections of the first output channel with one of its input channels."""
    first = entries.row < positions
    seen = np.unique(entries.column[first] // inputs)
    if not len(seen) or in_channels % len(seen) or out_channels % (in_channels // len(seen)):
        return
    pair = first & (entries.column // inputs == seen[0])
    row, column, label = entries.row[pair], entries.column[pair] - seen[0] * inputs, entries.label[pair]
    for input_size, output_size in [((inputs,), (positions,)), *_rectangles(inputs, positions)]:
        places = zip(np.unravel_index(row, output_size), np.unravel_index(column, input_size), strict=True)
        sizes = zip(places, input_size, output_size, strict=True)
        sliding = [_sliding(out, read, label, size, made) for (out, read), size, made in sizes]
        if all(each is not None for each in sliding):
            kernel, stride, dilation, padding = zip(*filter(None, sliding), strict=True)
            windows = Windows(input_size, kernel, stride, dilation, padding)
            yield Wiring(in_channels, out_channels, in_channels // len(seen), windows)


def _rectangles(inputs: int, positions: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    for height in range(1, inputs + 1):
        for made in range(1, positions + 1):
            if inputs % height == 0 and positions % made == 0:
                yield (height, inputs // height), (made, positions // made)


def _sliding(
    out: NDArray[np.int64], read: NDArray[np.int64], label: NDArray[np.int64], size: int, made: int
) -> tuple[int, int, int, tuple[int, int]] | None:
    """Kernel size, stride, dilation and padding along one dimension, or None where `read` is not so made."""
    stride = _stride(out, read, label)
    if stride is None:
        return None
    offset = read - stride * out
    known = np.full(label.max() + 1, np.iinfo(np.int64).min)
    known[label] = offset
    if not np.array_equal(known[label], offset):
        return None
    taps = np.unique(offset)
    dilation = math.gcd(*(int(step) for step in np.diff(taps))) or 1
    kernel, low = int(taps[-1] - taps[0]) // dilation + 1, -int(taps[0])
    spread = dilation * (kernel - 1)
    for high in (low, spread - low):
        rest = size + low + high - spread - 1
        step = max(1, rest + 1) if made == 1 else stride  # no second position: wherever it would be
        if low >= 0 and high >= 0 and rest // step + 1 == made:
            return kernel, step, dilation, (low, high)
    return None


def _stride(out: NDArray[np.int64], read: NDArray[np.int64], label: NDArray[np.int64]) -> int | None:
    """How far an input moves from one position to the next, from the connections that share a label."""
    order = np.lexsort((out, label))
    same = (np.diff(label[order]) == 0) & (np.diff(out[order]) > 0)
    if not same.any():
        return 1
    steps, moved = np.diff(out[order])[same], np.diff(read[order])[same]
    stride = int(moved[0] // steps[0])
    return stride if stride >= 1 and np.array_equal(moved, stride * steps) else None
