"""Isotonic regression: the best non-decreasing fit of a sequence, by SciPy's routine for pooling adjacent violators."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

Vector: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.intp]
Routine: TypeAlias = Callable[[Vector, Vector, Indices], tuple[Vector, Vector, Indices, int]]

_LONG = 512
"""The mean of a longer block is taken anew: added up one by one, so many numbers are off by up to 512 half eps."""


def fit_difference(larger: NDArray[Any], smaller: Vector) -> Vector:
    """Return the non-decreasing fit of `larger − smaller`, the nearest in the sum of squares.

    Args:
        larger: `(n,)`, any real floating dtype; subtracted in float64.
        smaller: `(n,)` float64.

    Returns:
        `(n,)` float64, non-decreasing; the numbers of a block are the same bit for bit.

    Example:
        >>> fit_difference(np.array([1.0, 3.5, 4.0]), np.array([0.0, 1.0, 2.0]))
        array([1.  , 2.25, 2.25])
    """
    fit = np.subtract(larger, smaller, dtype=np.float64)
    if not len(fit):
        return fit
    edges = pool(fit)
    if len(fit) > _LONG:
        long = np.flatnonzero(edges[1:] - edges[:-1] > _LONG)
        for start, stop in zip(edges[long], edges[long + 1], strict=True):
            fit[start:stop] = np.subtract(larger[start:stop], smaller[start:stop], dtype=np.float64).mean()
        if len(long):
            np.maximum.accumulate(fit, out=fit)  # neighbours may be out of order by a rounding now
    return fit


def pool(values: Vector) -> Indices:
    """Return the edges of the blocks of the non-decreasing fit: block k is `values[edges[k] : edges[k + 1]]`.

    Args:
        values: `(n,)`, n ≥ 1, C-contiguous; overwritten with the fit.

    Example:
        >>> pool(np.array([1.0, 3.0, 2.0]))
        array([0, 1, 3])
    """
    count = len(values)
    _, _, edges, blocks = _routine()(values, np.ones(count), np.empty(count + 1, dtype=np.intp))
    return edges[: blocks + 1]


@cache
def _routine() -> Routine:
    """Return SciPy's routine bare, without the copies around it; where SciPy has moved it, by its public name."""
    try:
        from scipy.optimize._pava_pybind import pava

        values = np.array([1.0, 3.0, 2.0])
        pava(values, np.ones(3), np.empty(4, dtype=np.intp))
    except (ImportError, TypeError):
        return by_public_name
    return cast(Routine, pava) if values.tolist() == [1.0, 2.5, 2.5] else by_public_name


def by_public_name(values: Vector, weights: Vector, edges: Indices) -> tuple[Vector, Vector, Indices, int]:
    """Do what SciPy's bare routine does: overwrite `values` with the fit; return it, weights, edges, their number."""
    from scipy.optimize import isotonic_regression

    fit = cast(Any, isotonic_regression(values, weights=weights))
    values[:] = fit.x
    edges[: len(fit.blocks)] = fit.blocks
    return values, fit.weights, edges, len(fit.blocks) - 1
