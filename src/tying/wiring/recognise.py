"""The convolution that labels of a dense weight spell, found from the labels alone and always compared with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tying.errors import PlanError
from tying.plan import Partition
from tying.wiring.windows import Windows, positions, span
from tying.wiring.wiring import Wiring


def spells(wiring: Wiring, shape: tuple[int, int], weight: Partition, bias: Partition | None) -> bool:
    """Return whether these labels of a dense weight of this shape, and of its bias, are those of the convolution."""
    if (wiring.out_features, wiring.in_features) != shape or wiring.connections != len(weight) - weight.pruned:
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
    output, read_at = np.nonzero(labels >= 0)
    if not len(output):
        return None
    entries = _Entries(output, read_at, labels[output, read_at])
    if not (_once(entries.output, entries.label) and _once(entries.read_at, entries.label)):
        return None
    for out_channels in _blocks(entries.output, entries.label, shape[0]):
        for in_channels in _blocks(entries.read_at, entries.label, shape[1]):
            positions, inputs = shape[0] // out_channels, shape[1] // in_channels
            for wiring in _fitting(entries, out_channels, in_channels, positions, inputs):
                if spells(wiring, shape, weight, bias):
                    return wiring
    return None


@dataclass(frozen=True)
class _Entries:
    """The connections of a dense weight: where each stands, and its label."""

    output: NDArray[np.int64]
    read_at: NDArray[np.int64]
    label: NDArray[np.int64]


def _once(at: NDArray[np.int64], label: NDArray[np.int64]) -> bool:
    """Whether no label stands twice at one output, or at one input: a tap reads once, and is read once."""
    pairs = np.sort(at * (label.max() + 1) + label)
    return not (np.diff(pairs) == 0).any()


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
    first = entries.output < positions
    seen = np.unique(entries.read_at[first] // inputs)
    if not len(seen) or in_channels % len(seen) or out_channels % (in_channels // len(seen)):
        return
    pair = first & (entries.read_at // inputs == seen[0])
    output, read_at, label = entries.output[pair], entries.read_at[pair] - seen[0] * inputs, entries.label[pair]
    common = label == np.bincount(label).argmax()
    tap, whole = (output[common], read_at[common], label[common]), (output, read_at, label)
    for sizes in [((inputs,), (positions,)), *_rectangles(inputs, positions)]:
        if _sliding(*tap, *sizes) is not None and (found := _sliding(*whole, *sizes)) is not None:
            windows = _windows(found, *sizes)
            if windows is not None and windows.taps <= 4 * len(np.unique(label)):  # few taps read nothing anywhere
                yield Wiring(in_channels, out_channels, in_channels // len(seen), windows)


def _rectangles(inputs: int, positions: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    for height in (size for size in range(1, inputs + 1) if inputs % size == 0):
        for made in (size for size in range(1, positions + 1) if positions % size == 0):
            yield (height, inputs // height), (made, positions // made)


def _sliding(
    output: NDArray[np.int64],
    read_at: NDArray[np.int64],
    label: NDArray[np.int64],
    input_size: tuple[int, ...],
    output_size: tuple[int, ...],
) -> list[tuple[int, NDArray[np.int64]]] | None:
    """Per dimension, the stride and the offsets of the taps; None where a tap reads somewhere else."""
    found: list[tuple[int, NDArray[np.int64]]] = []
    places = zip(np.unravel_index(output, output_size), np.unravel_index(read_at, input_size), strict=True)
    for out, read in places:
        stride = _stride(out, read, label)
        if stride is None:
            return None
        offset = read - stride * out
        known = np.zeros(label.max() + 1, dtype=np.int64)
        known[label] = offset
        if not np.array_equal(known[label], offset):
            return None
        found.append((stride, np.unique(offset)))
    return found


def _windows(
    sliding: list[tuple[int, NDArray[np.int64]]], input_size: tuple[int, ...], output_size: tuple[int, ...]
) -> Windows | None:
    """The geometry with these strides and offsets, or None where torch has no such padding."""
    dimensions = [
        _dimension(stride, offsets, size, made)
        for (stride, offsets), size, made in zip(sliding, input_size, output_size, strict=True)
    ]
    if not all(each is not None for each in dimensions):
        return None
    kernel, stride, dilation, padding = zip(*filter(None, dimensions), strict=True)
    return Windows(input_size, kernel, stride, dilation, padding)


def _dimension(
    stride: int, offsets: NDArray[np.int64], size: int, made: int
) -> tuple[int, int, int, tuple[int, int]] | None:
    """Kernel size, stride, dilation and padding along one dimension."""
    dilation = math.gcd(*(int(step) for step in np.diff(offsets))) or 1
    kernel, low = int(offsets[-1] - offsets[0]) // dilation + 1, -int(offsets[0])
    reach = span(kernel, dilation)
    for high in (low, reach - 1 - low):
        padded = size + low + high
        step = max(1, padded - reach + 1) if made == 1 else stride  # no second position: wherever it would be
        if low >= 0 and high >= 0 and positions(padded, kernel, step, dilation) == made:
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
