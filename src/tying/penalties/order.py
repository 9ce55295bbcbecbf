"""The order of magnitudes, smallest first: a sort of integers that hold the magnitude above and the place below.

Magnitudes, as floating-point bits, are in the order of their numbers. Sorting integers is several times faster than
sorting indices by what they point at, and the places come out with them.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.intp]

_SMALL = 512
"""Below so many numbers, what surrounds the sort costs more than the sort."""

_HIGH = 1 if sys.byteorder == "little" else 0
"""Which half of a 64-bit integer weighs more."""


def ascending(values: NDArray[Any]) -> tuple[Indices, NDArray[Any]]:
    """Return the order in which the magnitudes of some values don't decrease, and the magnitudes in that order.

    Exact, by all bits of the numbers. NaN comes last, above infinity, so one look at the end tells whether all are
    finite.

    Args:
        values: `(n,)`, float32 or float64, C-contiguous.

    Returns:
        `(n,)` indices, and `(n,)` `abs(values)` in that order, of the dtype of the values.

    Example:
        >>> ascending(np.array([-4.0, 1.0, 3.5]))
        (array([1, 2, 0]), array([1. , 3.5, 4. ]))
    """
    if len(values) < _SMALL or len(values) > 1 << 32 or np.intp(0).itemsize != 8:
        magnitudes = np.abs(values)
        order = np.argsort(magnitudes)
        return order, magnitudes[order]
    return _ascending_single(values) if values.dtype == np.float32 else _ascending_double(values)


def _ascending_single(values: NDArray[np.float32]) -> tuple[Indices, NDArray[np.float32]]:
    """The 31 bits of a magnitude fit above the place."""
    keys = np.arange(len(values), dtype=np.uint64)
    upper = keys.view(np.uint32)[_HIGH::2]
    np.bitwise_and(values.view(np.uint32), np.uint32(0x7FFFFFFF), out=upper)
    keys.sort()
    magnitudes = upper.view(np.float32).copy()
    upper.fill(0)
    return keys.view(np.intp), magnitudes


def _ascending_double(values: NDArray[np.float64]) -> tuple[Indices, NDArray[np.float64]]:
    """The 63 bits of a magnitude don't: the lowest make room, and the few that they told apart are sorted once more."""
    room = _room(values)
    keys = np.arange(len(values), dtype=np.uint64)
    keys |= values.view(np.uint64) & np.uint64(0x7FFFFFFFFFFFFFFF & ~room)
    keys.sort()
    keys &= np.uint64(room)
    order = keys.view(np.intp)
    magnitudes = values[order]
    np.abs(magnitudes, out=magnitudes)
    if (magnitudes[1:] < magnitudes[:-1]).any():
        mended = np.argsort(magnitudes, kind="stable")  # nearly sorted: cheap
        return order[mended], magnitudes[mended]
    return order, magnitudes


def ascending_by_label(magnitudes: NDArray[np.float64], labels: NDArray[np.uint8]) -> Indices:
    """Return the order by labels first, by magnitudes where labels are equal.

    Args:
        magnitudes: `(n,)` float64, ≥ 0, C-contiguous.
        labels: `(n,)`, below 64.

    Example:
        >>> ascending_by_label(np.array([4.0, 1.0, 3.5]), np.array([1, 1, 0], dtype=np.uint8))
        array([2, 1, 0])
    """
    if len(magnitudes) < _SMALL or len(magnitudes) > 1 << 32 or np.intp(0).itemsize != 8:
        return np.lexsort((magnitudes, labels))
    room = _room(magnitudes)
    keys = labels.astype(np.uint64)
    keys <<= np.uint64(58)
    bits = magnitudes.view(np.uint64) >> np.uint64(5)
    bits &= np.uint64(~room & 0xFFFFFFFFFFFFFFFF)
    keys |= bits
    keys |= np.arange(len(magnitudes), dtype=np.uint64)
    keys.sort()
    keys &= np.uint64(room)
    order = keys.view(np.intp)
    ordered = magnitudes[order]
    labelled = labels[order]
    if ((ordered[1:] < ordered[:-1]) & (labelled[1:] == labelled[:-1])).any():
        return np.lexsort((magnitudes, labels))
    return order


def _room(values: NDArray[Any]) -> int:
    """Return the bits that places take, set."""
    return (1 << (len(values) - 1).bit_length()) - 1
