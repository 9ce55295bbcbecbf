"""The kernel: the prox of the sorted-L1 norm, of many layers at once, exact, in float64 on the CPU.

x = argmin ½‖x − m‖² + Σ_i t_i |x|_[i] is: the magnitudes sorted, less the thresholds, made monotone by averaging
neighbours (an isotonic regression), clipped at zero, put back in their places. One sort and one regression serve many
layers: between two layers stands a step that no averaging crosses. Everything runs from the smallest to the largest, as
sorts do. Source: Bogdan et al., arXiv 1407.3824.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tying.penalties.isotonic import Indices, Vector, fit_difference, pool
from tying.penalties.order import ascending, ascending_by_label

Floats = TypeVar("Floats", bound=NDArray[Any])

_TOGETHER = 64
"""Segments in one regression. Each is offset by 2.5 from the last, so the furthest is rounded to 80 half eps."""

_ALONE = 4096
"""A segment as long gains nothing from company."""


def shrink_sorted(magnitudes: Vector, thresholds: Vector, lengths: Sequence[int] | None = None) -> Vector:
    """Return the prox of the sorted-L1 norm, segment by segment.

    Equal magnitudes of a segment come out equal bit for bit. Nothing is checked here: that is the caller's part.

    Args:
        magnitudes: `(n,)`, finite, ≥ 0, in any order.
        thresholds: `(n,)`, step · strength · λ: finite, ≥ 0, non-increasing inside each segment.
        lengths: The sizes of consecutive segments, 0 allowed, together n; each is solved on its own. None: one segment.

    Returns:
        The new magnitudes, `(n,)`, ≥ 0, each where its magnitude was.

    Example:
        >>> shrink_sorted(np.array([4.0, 1.0, 3.5]), np.array([2.0, 1.0, 0.0]))
        array([2.25, 1.  , 2.25])
        >>> shrink_sorted(np.array([4.0, 1.0, 3.5]), np.array([1.0, 1.0, 0.5]), lengths=[1, 2])
        array([3. , 0.5, 2.5])
    """
    sizes = np.array([len(magnitudes)] if lengths is None else lengths, dtype=np.intp)
    sizes = sizes[sizes > 0]
    ends = np.cumsum(sizes)
    if (thresholds[ends - sizes] == thresholds[ends - 1]).all():  # flat: the order doesn't matter
        return np.maximum(magnitudes - thresholds, 0.0)
    result = np.empty_like(magnitudes)
    start = 0
    for some in _sets(sizes):
        span = slice(start, start := start + int(sizes[some].sum()))
        _solve(magnitudes[span], thresholds[span], sizes[some], result[span])
    return result


def shrink_vectors(values: Floats, thresholds: Vector) -> Floats:
    """Return the prox of the sorted-L1 norm at vectors of numbers of either sign, each on its own.

    Equal magnitudes of a vector come out equal bit for bit, and no −0.0 comes out.

    Args:
        values: `(…, n)`, float32 or float64, C-contiguous, in any order.
        thresholds: `(n,)` float64: finite, ≥ 0, non-increasing.

    Returns:
        `(…, n)`, rounded once from float64 to the dtype of the values.

    Raises:
        FloatingPointError: If a value is NaN or infinite.

    Example:
        >>> shrink_vectors(np.array([-4.0, 1.0, 3.5]), np.array([2.0, 1.0, 0.0]))
        array([-2.25,  1.  ,  2.25])
    """
    result = np.empty_like(values)
    size = len(thresholds)
    if values.ndim == 1:
        _shrink(values, thresholds, result)
    elif size >= _ALONE:
        for row, shrunk in zip(values.reshape(-1, size), result.reshape(-1, size), strict=True):
            _shrink(row, thresholds, shrunk)
    elif values.size:
        rows, shrunk = values.reshape(-1, size), result.reshape(-1, size)
        for first in range(0, len(rows), _TOGETHER):
            some = np.abs(rows[first : first + _TOGETHER], dtype=np.float64)
            if not some.max() < np.inf:
                raise FloatingPointError
            fit = shrink_sorted(some.reshape(-1), np.tile(thresholds, len(some)), [size] * len(some))
            shrunk[first : first + _TOGETHER] = fit.reshape(some.shape)
    np.copysign(result, values, out=result)
    result += 0.0  # −0.0 is 0.0 then
    return result


def pooled(values: NDArray[Any], thresholds: Vector) -> tuple[Indices, Vector]:
    """Return the blocks within which the prox averages around a vector: its derivative, see `penalties/derivative.py`.

    Args:
        values: `(n,)`, float32 or float64, C-contiguous, finite.
        thresholds: `(n,)` float64: finite, ≥ 0, non-increasing.

    Returns:
        The number of every entry's block, `(n,)`, and the sign of every entry, `(n,)`: 0 where the prox is constant.

    Example:
        >>> pooled(np.array([-4.0, 1.0, 3.5]), np.array([2.0, 1.0, 0.0]))
        (array([1, 0, 1]), array([-1.,  1.,  1.]))
    """
    order, ordered = ascending(values)
    limits = thresholds[::-1]
    fit = fit_difference(ordered, limits)
    lowered = np.subtract(ordered, limits, dtype=np.float64)
    joined = fit[1:] == fit[:-1]
    if joined.any():
        # Numbers that are equal before anything is averaged, of a lasso say, are not held together by the prox.
        starts = np.flatnonzero(np.concatenate([[True], ~joined]))
        level = np.maximum.reduceat(lowered, starts) == np.minimum.reduceat(lowered, starts)
        joined &= ~np.repeat(level, np.diff(starts, append=len(fit)))[1:]
    alive = (fit > 0) | ((ordered == 0) & (limits == 0))
    labels, signs = np.empty(len(fit), dtype=np.intp), np.empty(len(fit))
    labels[order] = np.cumsum(np.concatenate([[False], ~joined]))[: len(fit)]
    signs[order] = alive
    return labels, np.copysign(signs, values) * (signs != 0)


def _sets(sizes: Indices) -> Iterator[slice]:
    """Cut the segments into sets that are solved at once: up to 64 short ones, or one that is long."""
    if len(sizes) <= _TOGETHER and sizes.max(initial=0) < _ALONE:
        yield slice(0, len(sizes))
        return
    first = 0
    for last, size in enumerate(sizes.tolist()):
        if size >= _ALONE and first < last:
            yield slice(first, last)
            first = last
        if size >= _ALONE or last + 1 - first == _TOGETHER:
            yield slice(first, last + 1)
            first = last + 1
    if first < len(sizes):
        yield slice(first, len(sizes))


def _solve(magnitudes: Vector, thresholds: Vector, sizes: Indices, result: Vector) -> None:
    if len(sizes) == 1:
        order, ordered = ascending(magnitudes)
        result[order] = _fitted(ordered, thresholds)
        return
    # The last segment first: the thresholds, largest first in each, then only need to be read backwards.
    labels = np.repeat(np.arange(len(sizes) - 1, -1, -1, dtype=np.uint8), sizes)
    order = ascending_by_label(magnitudes, labels)
    ordered, thresholds, sizes = magnitudes[order], thresholds[::-1], sizes[::-1]
    lasts = np.cumsum(sizes) - 1
    units = np.maximum(ordered[lasts], thresholds[lasts])
    units[units == 0.0] = 1.0
    lowered = ordered - thresholds
    apart = lowered / np.repeat(units, sizes)
    apart += np.repeat(2.5 * (np.arange(len(sizes)) - len(sizes) / 2), sizes)
    edges = pool(apart)
    counts = edges[1:] - edges[:-1]
    # What is averaged was decided with the steps in between; the averages are taken without.
    fit = np.repeat(np.maximum(np.add.reduceat(lowered, edges[:-1]) / counts, 0.0), counts)
    equal = ordered[1:] == ordered[:-1]
    equal[lasts[:-1]] = False
    result[order] = _equalised(fit, equal)


def _shrink(values: NDArray[Any], thresholds: Vector, result: NDArray[Any]) -> None:
    if not len(values):
        return
    if thresholds[0] == thresholds[-1]:
        magnitudes = np.abs(values)
        if not magnitudes.max() < np.inf:
            raise FloatingPointError
        result[:] = np.maximum(np.subtract(magnitudes, thresholds, dtype=np.float64), 0.0)
        return
    order, ordered = ascending(values)
    if not ordered[-1] < np.inf:  # NaN would be last, too
        raise FloatingPointError
    result[order] = _fitted(ordered, thresholds)


def _fitted(ordered: NDArray[Any], thresholds: Vector) -> Vector:
    """Return what becomes of one segment's magnitudes, sorted, smallest first."""
    fit = fit_difference(ordered, thresholds[::-1])
    if len(fit) and fit[0] < 0.0:
        np.maximum(fit, 0.0, out=fit)
    return _equalised(fit, ordered[1:] == ordered[:-1])


def _equalised(fit: Vector, equal: NDArray[np.bool_]) -> Vector:
    """Give magnitudes that are equal to the one before, `(n − 1,)`, its fit: rounding may have told them apart."""
    if equal.any() and (equal & (fit[1:] != fit[:-1])).any():
        firsts = np.flatnonzero(np.concatenate([[True], ~equal]))
        return np.repeat(fit[firsts], np.diff(firsts, append=len(fit)))
    return fit
