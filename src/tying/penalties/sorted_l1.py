"""The kernel: the prox of the sorted-L1 norm on magnitudes, of many layers at once, exact, in float64 on the CPU.

x = argmin ½‖x − m‖² + Σ_i t_i |x|_[i] is: the magnitudes sorted, less the thresholds, made non-increasing by averaging
neighbours (an isotonic regression), clipped at zero, put back in their places. One sort and one regression serve all
layers: between two layers stands a step that no averaging crosses. Source: Bogdan et al., arXiv 1407.3824.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Indices = NDArray[np.intp]

_TOGETHER = 64
"""Segments in one regression. Each is offset by 2.5 from the last, so the furthest is rounded to 80 eps."""


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
    starts = ends - sizes
    if np.array_equal(thresholds[starts], thresholds[ends - 1]):  # flat: the order doesn't matter
        return np.maximum(magnitudes - thresholds, 0.0)
    order = _descending(magnitudes, sizes)
    ordered = magnitudes[order]
    lowered = ordered - thresholds
    fitted = np.empty_like(lowered)
    for first in range(0, len(sizes), _TOGETHER):
        some = slice(first, first + _TOGETHER)
        span = slice(starts[some][0], ends[some][-1])
        peaks = np.maximum(ordered[starts[some]], thresholds[starts[some]])
        fitted[span] = _averaged(lowered[span], peaks, sizes[some])
    _equalise(ordered, fitted, starts)
    result = np.empty_like(fitted)
    result[order] = fitted
    return result


def _descending(magnitudes: Vector, sizes: Indices) -> Indices:
    """Return the order in which every segment is non-increasing, segments staying where they are."""
    order = np.argsort(magnitudes)[::-1]
    if len(sizes) == 1:
        return order
    labels = np.repeat(np.arange(len(sizes), dtype=np.min_scalar_type(len(sizes))), sizes)
    return order[np.argsort(labels[order], kind="stable")]  # of integers: a radix sort


def _averaged(lowered: Vector, peaks: Vector, sizes: Indices) -> Vector:
    """Return the best non-increasing fit of every segment, clipped at zero; `peaks` bound the segments' magnitudes."""
    if len(sizes) == 1:
        return np.maximum(_regression(lowered).x, 0.0)
    units = np.where(peaks > 0, peaks, 1.0)
    steps = 2.5 * (len(sizes) / 2 - np.arange(len(sizes)))
    blocks = _regression(lowered / np.repeat(units, sizes) + np.repeat(steps, sizes)).blocks
    counts = blocks[1:] - blocks[:-1]
    means = np.add.reduceat(lowered, blocks[:-1]) / counts  # what is averaged was decided with offsets, not the average
    return np.repeat(np.maximum(means, 0.0), counts)


def _regression(values: Vector) -> Any:
    from scipy.optimize import isotonic_regression

    return cast(Any, isotonic_regression(values, increasing=False))


def _equalise(ordered: Vector, fitted: Vector, starts: Indices) -> None:
    """Give magnitudes that are equal the fit of the first of them, in place: rounding may have told them apart."""
    equal = ordered[1:] == ordered[:-1]
    equal[starts[1:] - 1] = False  # neighbours of two segments
    if (equal & (fitted[1:] != fitted[:-1])).any():
        firsts = np.flatnonzero(np.concatenate([[True], ~equal]))
        fitted[:] = np.repeat(fitted[firsts], np.diff(firsts, append=len(fitted)))
