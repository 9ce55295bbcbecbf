"""Isotonic regression: the best non-decreasing fit of a sequence, by SciPy's routine for pooling adjacent violators."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from tying.penalties.workspace import borrow

Vector: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.intp]
Routine: TypeAlias = Callable[[Vector, Vector, Indices], tuple[Vector, Vector, Indices, int]]

_ONES = np.ones(1 << 10)


def pool(values: Vector) -> Indices:
    """Turn `(n,)` values into their non-decreasing fit, the nearest in the sum of squares, in place.

    Args:
        values: `(n,)`, n ≥ 1, C-contiguous.

    Returns:
        The edges of the blocks: block k is `values[edges[k] : edges[k + 1]]`, the same number bit for bit. They hold
        until the next call in this thread.

    Example:
        >>> values = np.array([1.0, 3.0, 2.0])
        >>> pool(values)
        array([0, 1, 3])
        >>> values
        array([1. , 2.5, 2.5])
    """
    count = len(values)
    if count <= len(_ONES):
        ones, edges = _ONES[:count].copy(), np.empty(count + 1, np.intp)
    else:
        ones, edges = borrow("ones", count, np.float64), borrow("edges", count + 1, np.intp)
        ones.fill(1.0)
    _, _, edges, blocks = _routine()(values, ones, edges)
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
