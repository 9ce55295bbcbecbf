"""The kernel: the prox of the sorted-L1 norm, of many layers at once, exact, in float64 on the CPU.

x = argmin ½‖x − m‖² + Σ_i t_i |x|_[i] is: the magnitudes sorted, less the thresholds, made monotone by averaging
neighbours (an isotonic regression), clipped at zero, put back in their places. One sort and one regression serve many
layers: between two layers stands a step that no averaging crosses. Everything runs from the smallest to the largest, as
sorts do. Source: Bogdan et al., arXiv 1407.3824.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tying.penalties.arrays import Indices, Vector
from tying.penalties.isotonic import pool, pool_segments
from tying.penalties.order import FEW, ascending, ascending_in_segments

_TOGETHER = 64
"""Segments in one sort: their labels take the six bits that magnitudes leave."""

_ALONE = 4096
"""A segment as long gains nothing from company."""

_LONG = 1024
"""The mean of a longer block is taken anew: added up one by one, so many numbers are off by 512 eps at worst."""

_PART = 1 << 13

_ZERO = {4: np.zeros((), np.float32), 8: np.zeros(())}
"""By item size: an array of no dimension costs a tenth of a microsecond, a Python number three."""

HUGE = 1e290
"""Sums of numbers as large may overflow: they are made smaller first."""

DOWN, _UP = 2.0**-64, 2.0**64


class NotFiniteError(Exception):
    """A number is NaN or infinite: for whoever knows what it is called to say so."""


def shrink_sorted(magnitudes: Vector, thresholds: Vector, lengths: Sequence[int] | None = None) -> Vector:
    """Return the prox of the sorted-L1 norm, segment by segment.

    Equal magnitudes of a segment come out equal bit for bit. What is described below is the caller's part to check.

    Args:
        magnitudes: `(n,)`, finite, ≥ 0, in any order.
        thresholds: `(n,)`, step · strength · λ: finite, ≥ 0, non-increasing inside each segment.
        lengths: The sizes of consecutive segments, 0 allowed, together n; each is solved on its own. None: one segment.

    Returns:
        The new magnitudes, `(n,)`, ≥ 0, each where its magnitude was.

    Raises:
        NotFiniteError: If a number or a threshold is infinite, and it is noticed.

    Example:
        >>> shrink_sorted(np.array([4.0, 1.0, 3.5]), np.array([2.0, 1.0, 0.0]))
        array([2.25, 1.  , 2.25])
        >>> shrink_sorted(np.array([4.0, 1.0, 3.5]), np.array([1.0, 1.0, 0.5]), lengths=[1, 2])
        array([3. , 0.5, 2.5])
    """
    sizes = np.array([len(magnitudes)] if lengths is None else lengths, dtype=np.intp)
    sizes = sizes[sizes > 0]
    ends = np.cumsum(sizes)
    largest = thresholds[ends - sizes]
    if (largest == thresholds[ends - 1]).all():  # flat: the order doesn't matter
        return np.maximum(magnitudes - thresholds, 0.0)
    if largest.max() > HUGE or magnitudes.max() > HUGE:
        if not max(largest.max(), magnitudes.max()) < np.inf:
            raise NotFiniteError
        return shrink_sorted(magnitudes * DOWN, thresholds * DOWN, lengths) * _UP
    if len(sizes) == 1:
        return _shrunk(magnitudes, thresholds)
    results: list[Vector] = []
    start = 0
    for some in _sets(sizes):
        span = slice(start, start := start + int(sizes[some].sum()))
        results.append(_solve(magnitudes[span], thresholds[span], sizes[some]))
    return results[0] if len(results) == 1 else np.concatenate(results)


def shrink_vectors(values: NDArray[Any], weights: Vector, step: float = 1.0) -> NDArray[Any]:
    """Return the prox of the sorted-L1 norm at vectors of numbers of either sign, each on its own.

    Equal magnitudes of a vector come out equal bit for bit, and no −0.0 comes out.

    Args:
        values: `(…, n)`, float32 or float64, C-contiguous, in any order.
        weights: `(n,)` float64: finite, ≥ 0, non-increasing.
        step: ≥ 0: what the weights are multiplied by.

    Returns:
        `(…, n)`, rounded once from float64 to the dtype of the values.

    Raises:
        NotFiniteError: If a value is NaN or infinite, or step · weights exceeds float64.

    Example:
        >>> shrink_vectors(np.array([-4.0, 1.0, 3.5]), np.array([2.0, 1.0, 0.0]))
        array([-2.25,  1.  ,  2.25])
    """
    if values.ndim == 1:
        result = _shrunk(values, weights, step)
    elif not values.size:
        return np.empty_like(values)
    elif (size := len(weights)) >= _ALONE:
        result = np.stack([_shrunk(row, weights, step) for row in values.reshape(-1, size)]).reshape(values.shape)
    else:
        magnitudes = np.abs(values, dtype=np.float64).reshape(-1)
        if not (magnitudes.max() < np.inf and step * weights.item(0) < np.inf):
            raise NotFiniteError
        count = len(magnitudes) // size
        shrunk = shrink_sorted(magnitudes, np.tile(step * weights, count), [size] * count)
        result = shrunk.astype(values.dtype, copy=False).reshape(values.shape)
    np.copysign(result, values, out=result)
    np.add(result, _ZERO[result.itemsize], out=result)  # −0.0 is 0.0 then
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
    lowered = ordered - limits
    fit = lowered.copy()
    pool(fit)
    joined = fit[1:] == fit[:-1]
    if joined.any():
        # Numbers that are equal before anything is averaged, of a lasso say, are not held together by the prox.
        starts = np.flatnonzero(np.concatenate([[True], ~joined]))
        level = np.maximum.reduceat(lowered, starts) == np.minimum.reduceat(lowered, starts)
        joined &= ~np.repeat(level, np.diff(starts, append=len(fit)))[1:]
    alive = fit > 0
    # Zeros that meet no threshold move freely, unless something else is at zero, or below: that would draw them along.
    alive |= (alive | ((ordered == 0) & (limits == 0))).all()
    labels, signs = np.empty(len(fit), np.intp), np.empty(len(fit))
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


def _solve(magnitudes: Vector, thresholds: Vector, sizes: Indices) -> Vector:
    if len(sizes) == 1:
        return _shrunk(magnitudes, thresholds)
    # The last segment first: the thresholds, largest first in each, then only need to be read backwards.
    order, ordered = ascending_in_segments(magnitudes, sizes)
    thresholds, sizes = thresholds[::-1], sizes[::-1]
    ends = np.cumsum(sizes)
    lowered = ordered - thresholds
    fit = lowered.copy()
    for start, end, edges in pool_segments(fit, ends, least=_LONG + 1):
        _refine_(fit[start:end], edges, lowered[start:end].__getitem__)
    np.maximum(fit, 0.0, out=fit)
    equal = ordered[1:] == ordered[:-1]
    equal[ends[:-1] - 1] = False
    _equalise(fit, equal)
    result = np.empty_like(fit)
    result[order] = fit
    return result


def _shrunk(values: NDArray[Any], weights: Vector, step: float = 1.0) -> NDArray[Any]:
    """Return what becomes of the magnitudes of one segment, signs left out, in the dtype of the values."""
    count = len(values)
    if not count:
        return np.empty(0, values.dtype)
    largest = weights.item(0)
    if step * largest > HUGE:
        return _shrunk_huge(values, weights, step)
    if largest == weights.item(-1):
        return _shrunk_by(step * largest, values)
    if count < FEW:
        return _few(values, weights, step)
    order, ordered = ascending(values)
    if not ordered.item(-1) < HUGE:  # NaN would be last, too
        return _shrunk_huge(values, weights, step)
    equal = ordered[1:] == ordered[:-1]
    limits = weights[::-1]
    positive = _lower_(ordered, limits, step)
    result = np.zeros(count, values.dtype)
    if positive == count:
        return result
    fit = ordered
    if positive:  # what comes before becomes zero, and is pooled with nothing that does not
        order, fit, limits, equal = order[positive:], fit[positive:], limits[positive:], equal[positive:]
    edges = pool(fit)
    if len(fit) - len(edges) + 2 > _LONG:
        _refine_(fit, edges, lambda part: np.abs(values[order[part]], dtype=np.float64) - step * limits[part])
    if fit[0] < 0.0:
        np.maximum(fit, _ZERO[8], out=fit)
    if np.count_nonzero(equal):
        _equalise(fit, equal)
    for part in _parts(len(fit)):
        result[order[part]] = fit[part].astype(values.dtype)  # narrowed in order: cheaper than in places
    return result


def _lower_(ordered: Vector, limits: Vector, step: float) -> int:
    """Take step · limits from magnitudes in place; return up to where none stays positive, or 0 if that is not far."""
    count = len(ordered)
    for part in _parts(count):
        lowered = ordered[part]
        lowered -= step * limits[part]
    if ordered[count >> 3] > 0.0:
        return 0
    for part in _parts(count):
        positive = ordered[part] > _ZERO[8]
        first = int(positive.argmax())
        if positive[first]:
            return part.start + first
    return count


def _parts(count: int) -> Iterator[slice]:
    """Cut n numbers into parts that stay in cache, and whose copies cost no new pages."""
    return (slice(at, at + _PART) for at in range(0, count, _PART))


def _few(values: NDArray[Any], weights: Vector, step: float) -> NDArray[Any]:
    """Do what `_shrunk` does where every call of a function counts: no parts, no long blocks."""
    magnitudes = np.abs(values)
    order = magnitudes.argsort()
    ordered = magnitudes[order]
    if not ordered.item(-1) < HUGE:
        return _shrunk_huge(values, weights, step)
    fit = ordered - step * weights[::-1]
    pool(fit)
    if fit[0] < 0.0:
        np.maximum(fit, _ZERO[8], out=fit)
    equal = ordered[1:] == ordered[:-1]
    if np.count_nonzero(equal):
        _equalise(fit, equal)
    result = np.empty(len(values), values.dtype)
    result[order] = fit.astype(values.dtype)
    return result


def _shrunk_by(threshold: float, values: NDArray[Any]) -> NDArray[Any]:
    """Return what becomes of magnitudes that all have the same threshold: the order doesn't matter."""
    magnitudes = np.abs(values, dtype=np.float64)
    if not magnitudes.max() < np.inf:
        raise NotFiniteError
    magnitudes -= threshold
    np.maximum(magnitudes, 0.0, out=magnitudes)
    return magnitudes.astype(values.dtype, copy=False)


def _shrunk_huge(values: NDArray[Any], weights: Vector, step: float) -> NDArray[Any]:
    """Do what `_shrunk` does, in units in which no sum overflows: a power of two, so that nothing is rounded.

    Raises:
        NotFiniteError: If a value is NaN or infinite, or a threshold exceeds float64.
    """
    if not (np.isfinite(values).all() and step * weights.item(0) < np.inf):
        raise NotFiniteError
    smaller = np.abs(values, dtype=np.float64) * DOWN
    return (_shrunk(smaller, weights * DOWN, step) * _UP).astype(values.dtype)


def _refine_(fit: Vector, edges: Indices, lowered: Callable[[slice], Vector]) -> None:
    """Take the means of long blocks anew, by pairwise summation, in place."""
    long = np.flatnonzero(edges[1:] - edges[:-1] > _LONG)
    for start, stop in zip(edges[long].tolist(), edges[long + 1].tolist(), strict=True):
        fit[start:stop] = lowered(slice(start, stop)).mean()
    if len(long):
        np.maximum.accumulate(fit, out=fit)  # neighbours may be out of order by a rounding now


def _equalise(fit: Vector, equal: NDArray[np.bool_]) -> None:
    """Give magnitudes that are equal to the one before, `(n − 1,)`, its fit, in place: rounding may tell them apart."""
    if (equal & (fit[1:] != fit[:-1])).any():
        firsts = np.flatnonzero(np.concatenate([[True], ~equal]))
        fit[:] = np.repeat(fit[firsts], np.diff(firsts, append=len(fit)))
