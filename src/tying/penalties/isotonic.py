"""Isotonic regression: the best non-decreasing fit of a sequence, by SciPy's routine for pooling adjacent violators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeAlias, cast

import numpy as np

from tying.penalties.arrays import Indices, Vector

Routine: TypeAlias = Callable[[Vector, Vector, Indices], tuple[Vector, Vector, Indices, int]]

_ONES = np.ones(1 << 10)


def pool(values: Vector) -> Indices:
    """Turn `(n,)` values into their non-decreasing fit, the nearest in the sum of squares, in place.

    Args:
        values: `(n,)`, n ≥ 1, C-contiguous, finite.

    Returns:
        The edges of the blocks: block k is `values[edges[k] : edges[k + 1]]`, the same number bit for bit.

    Example:
        >>> values = np.array([1.0, 3.0, 2.0])
        >>> pool(values)
        array([0, 1, 3])
        >>> values
        array([1. , 2.5, 2.5])
    """
    count = len(values)
    ones = _ONES[:count].copy() if count <= len(_ONES) else np.ones(count)
    _, _, edges, blocks = _routine()(values, ones, np.empty(count + 1, np.intp))
    return edges[: blocks + 1]


def pool_segments(values: Vector, ends: Indices, least: int) -> Iterator[tuple[int, int, Indices]]:
    """Do what `pool` does to each of some consecutive segments, as the iterator runs.

    Args:
        values: `(n,)`, C-contiguous, finite.
        ends: Of the segments, the last is n; none is empty.
        least: From so many numbers on, a block has to be told of.

    Yields:
        Where a segment starts and ends, and its edges, as of `pool`: of those that may have such a block.

    Example:
        >>> values = np.array([3.0, 2.0, 1.0, 0.0])
        >>> list(pool_segments(values, np.array([2, 4]), least=9))
        []
        >>> values
        array([2.5, 2.5, 0.5, 0.5])
    """
    routine = _routine()
    ones, edges, start = np.ones(len(values)), np.empty(len(values) + 1, np.intp), 0
    for end in ends.tolist():
        _, _, found, blocks = routine(values[start:end], ones[start:end], edges[start : end + 1])
        if end - start - blocks + 1 >= least:
            yield start, end, found[: blocks + 1]
        start = end


@cache
def _routine() -> Routine:
    """Return SciPy's routine bare, without the copies around it; where SciPy has changed it, by its public name."""
    try:
        from scipy.optimize._pava_pybind import pava
    except ImportError:
        return by_public_name
    return cast(Routine, pava) if _keeps_its_word(cast(Routine, pava)) else by_public_name


def _keeps_its_word(routine: Routine) -> bool:
    """Whether a routine does what `by_public_name` does, in place, on some numbers with blocks of every kind."""
    for given in ([1.0, 3.0, 2.0], [2.0], [5.0, 4.0, 3.0, 7.0, 6.0, 8.0], [1.0, 2.0, 3.0], [2.0, 2.0, 1.0, 1.0]):
        values, expected = np.array(given), np.array(given)
        edges, blocks = by_public_name(expected, np.ones(len(given)), np.empty(len(given) + 1, np.intp))[2:]
        try:
            _, _, found, count = routine(values, np.ones(len(given)), np.empty(len(given) + 1, np.intp))
            same = count == blocks and found[: count + 1].tolist() == edges[: blocks + 1].tolist()
        except Exception:  # whatever a changed routine raises
            return False
        if not same or values.tolist() != expected.tolist():
            return False
    return True


def by_public_name(values: Vector, weights: Vector, edges: Indices) -> tuple[Vector, Vector, Indices, int]:
    """Do what SciPy's bare routine does: overwrite `values` with the fit; return it, weights, edges, their number.

    Args:
        values: `(n,)`, n ≥ 1.
        weights: `(n,)`, > 0.
        edges: `(n + 1,)`: the edges of the blocks are written to its front.

    Example:
        >>> by_public_name(np.array([3.0, 1.0]), np.ones(2), np.empty(3, np.intp))[3]
        1
    """
    from scipy.optimize import isotonic_regression

    fit = cast(Any, isotonic_regression(values, weights=weights))
    values[:] = fit.x
    edges[: len(fit.blocks)] = fit.blocks
    return values, fit.weights, edges, len(fit.blocks) - 1
