"""The order of magnitudes, smallest first: a sort of integers that hold the magnitude above and the place below.

Magnitudes, as floating-point bits, are in the order of their numbers. Sorting integers is several times faster than
sorting indices by what they point at, and the places come out with them.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tying.penalties.arrays import Indices, Vector

FEW = 350
"""Below so many numbers, what surrounds the sort costs more than the sort."""

_HIGH = 1 if sys.byteorder == "little" else 0
"""Which half of a 64-bit integer weighs more."""

_WIDE = np.dtype(np.intp).itemsize == 8
_MAGNITUDE = np.array(0x7FFFFFFF, dtype=np.uint32)


def ascending(values: NDArray[Any]) -> tuple[Indices, Vector]:
    """Return the order in which the magnitudes of some values don't decrease, and the magnitudes in that order.

    Exact, by all bits of the numbers. NaN comes last, above infinity, so one look at the end tells whether all are
    finite. Both results may be written to.

    Args:
        values: `(n,)`, float32 or float64, C-contiguous.

    Returns:
        `(n,)` indices, and `(n,)` `abs(values)` in that order, float64.

    Example:
        >>> ascending(np.array([-4.0, 1.0, 3.5]))
        (array([1, 2, 0]), array([1. , 3.5, 4. ]))
    """
    if len(values) < FEW or _is_unusual(values):
        magnitudes = np.abs(values, dtype=np.float64)
        order = np.argsort(magnitudes)
        return order, magnitudes[order]
    return _ascending_single(values) if values.itemsize == 4 else _ascending_double(values)


def ascending_in_segments(magnitudes: Vector, sizes: Indices) -> tuple[Indices, Vector]:
    """Return the order of magnitudes within consecutive segments, the last segment first, and them in that order.

    Args:
        magnitudes: `(n,)` float64, ≥ 0, finite, C-contiguous.
        sizes: Of the segments, up to 64 of them, each ≥ 1.

    Example:
        >>> ascending_in_segments(np.array([4.0, 1.0, 3.5]), np.array([2, 1]))
        (array([2, 1, 0]), array([3.5, 1. , 4. ]))
    """
    labels = np.arange(len(sizes) - 1, -1, -1, dtype=np.uint64)
    if len(magnitudes) < FEW or _is_unusual(magnitudes):
        order = np.lexsort((magnitudes, np.repeat(labels, sizes)))
        return order, magnitudes[order]
    labels <<= np.uint64(58)
    room = _room(magnitudes)
    keys = np.right_shift(magnitudes.view(np.uint64), np.uint64(5))
    keys &= np.uint64(0xFFFFFFFFFFFFFFFF & ~room)
    keys |= np.repeat(labels, sizes)
    order = _sorted_places(keys, room)
    ordered = magnitudes[order]
    _mend_(order, ordered, np.cumsum(sizes[::-1]))
    return order, ordered


def _ascending_single(values: NDArray[np.float32]) -> tuple[Indices, Vector]:
    """The 31 bits of a magnitude fit above the place."""
    keys = np.arange(len(values), dtype=np.uint64)
    upper = keys.view(np.uint32)[_HIGH::2]
    np.bitwise_and(values.view(np.uint32), _MAGNITUDE, out=upper)
    keys.sort()
    ordered = upper.view(np.float32).astype(np.float64)
    upper.fill(0)
    return keys.view(np.intp), ordered


def _ascending_double(values: NDArray[np.float64]) -> tuple[Indices, Vector]:
    """The 63 bits of a magnitude don't: the lowest make room, and the few that they told apart are sorted once more."""
    room = _room(values)
    keys = np.bitwise_and(values.view(np.uint64), np.uint64(0x7FFFFFFFFFFFFFFF & ~room))
    order = _sorted_places(keys, room)
    ordered = values[order]
    np.abs(ordered, out=ordered)
    _mend_(order, ordered, np.array([len(values)]))
    return order, ordered


def _mend_(order: Indices, ordered: Vector, ends: Indices) -> None:
    """Sort again, in place, the segments in which numbers fall somewhere: nearly sorted, so that is cheap."""
    falls = ordered[1:] < ordered[:-1]
    falls[ends[:-1] - 1] = False  # from one segment to the next
    if not np.count_nonzero(falls):
        return
    for segment in np.unique(np.searchsorted(ends, np.flatnonzero(falls), side="right")).tolist():
        part = slice(int(ends[segment - 1]) if segment else 0, int(ends[segment]))
        mended = np.argsort(ordered[part], kind="stable")
        order[part], ordered[part] = order[part][mended], ordered[part][mended]


def _sorted_places(keys: NDArray[np.uint64], room: int) -> Indices:
    """Return the order of `(n,)` keys whose lowest bits are free, in their place."""
    keys |= np.arange(len(keys), dtype=np.uint64)
    keys.sort()
    keys &= np.uint64(room)
    return keys.view(np.intp)


def _room(values: NDArray[Any]) -> int:
    """Return the bits that places take, set."""
    return (1 << (len(values) - 1).bit_length()) - 1


def _is_unusual(values: NDArray[Any]) -> bool:
    return not _WIDE or len(values) > 1 << 32
