"""Exact to the end, where columns are nearly copies and steps of first order crawl: the proximal point, by Newton.

Each outer step is argmin_X ½‖RX − T‖² + strength · Ω(X) + ‖X − X_k‖² ÷ 2σ, solved in its dual variable U, whose
gradient is piecewise smooth: the derivative of the prox averages within ties, turns what has a norm, and is zero on
zeros. Source: Li, Sun & Toh, doi:10.1137/16M1097572 (lasso); here for sorted norms of groups.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

Array = NDArray[np.float64]
Prox = Callable[[Array, float], Array]
Factor = Callable[[Array, Array], Array]

OUTER, INNER, LARGEST = 60, 40, 1e9


def proximal_point(
    R: Array,
    T: Array,
    X: Array,
    prox: Prox,
    factor: Factor,
    gap: Callable[[Array], float],
    tolerance: float,
) -> Array:
    """Minimise ½‖RX − T‖² + Ω(X) from X on, until the gap is small or no longer falls.

    Args:
        R: `(k, p)`.
        T: `(k, r)`.
        X: `(p, r)`.
        prox: Of V and σ: argmin ½‖X − V‖² + σ · Ω(X).
        factor: Of V and its prox: what `derivative_factor` gives.
        gap: What is to become small.
        tolerance: How small.
    """
    U, best, least = R @ X - T, X, gap(X)
    sigma = 10.0 / float(np.linalg.norm(R, 2)) ** 2
    idle = 0
    for _ in range(OUTER):
        U, X = _point(R, T, X, U, sigma, prox, factor)
        now = gap(X)
        idle = 0 if now < 0.9 * least else idle + 1
        if now < least:
            best, least = X, now
        if least <= tolerance or idle > 8:
            break
        sigma = min(5 * sigma, LARGEST)
    return best


def _point(R: Array, T: Array, X: Array, U: Array, sigma: float, prox: Prox, factor: Factor) -> tuple[Array, Array]:
    def at(U: Array) -> tuple[Array, Array, float]:
        V = X - sigma * (R.T @ U)
        N = prox(V, sigma)
        return V, N, float(0.5 * np.square(U).sum() + (U * T).sum() + np.square(N).sum() / (2 * sigma))

    V, N, value = at(U)
    for _ in range(INNER):
        gradient = U + T - R @ N
        if np.linalg.norm(gradient) <= max(0.05 * np.linalg.norm(N - X) / np.sqrt(sigma), 1e-14 * np.linalg.norm(T)):
            break
        direction = _newton(R, factor(V, N), sigma, -gradient)
        slope, share = float((gradient * direction).sum()), 1.0
        while True:
            V, N, new = at(U + share * direction)
            if new <= value + 1e-4 * share * slope + 1e-13 * abs(value) or share < 1e-6:
                break
            share /= 2
        U, value = U + share * direction, new
    return U, N


def _newton(R: Array, B: Array, sigma: float, target: Array) -> Array:
    """Return (I + σ R B Bᵀ Rᵀ)⁻¹ target by whichever side is smaller."""
    flat = target.reshape(-1)
    if not len(B):
        return target
    M = (R @ B).reshape(len(B), -1)
    if len(B) < len(flat):
        small = M @ M.T
        small[np.diag_indices_from(small)] += 1 / sigma
        found = flat - M.T @ cho_solve(cho_factor(small), M @ flat)
    else:
        large = sigma * (M.T @ M)
        large[np.diag_indices_from(large)] += 1.0
        found = cho_solve(cho_factor(large), flat)
    return found.reshape(target.shape)


def derivative_factor(V: Array, N: Array, *, groups: bool, pools: bool) -> Array:
    """Return B, `(m, p, r)`: the derivative of the prox at V, whose value is N, is Σ_m B_m B_mᵀ.

    Args:
        V: `(p, r)`.
        N: `(p, r)`.
        groups: Norms of rows are shrunk, not numbers.
        pools: Equal magnitudes move as one: the weights are not flat.
    """
    shape = N.shape
    if not groups:
        V, N = V.reshape(-1, 1), N.reshape(-1, 1)
    sizes, before = np.linalg.norm(N, axis=1), np.linalg.norm(V, axis=1)
    alive = np.flatnonzero(sizes > 0)
    order = alive[np.argsort(sizes[alive])]
    steps = np.diff(sizes[order]) > 1e-11 * sizes[order][1:] if pools else np.ones(max(len(order) - 1, 0), dtype=bool)
    labels = np.concatenate([[0], np.cumsum(steps)]) if len(order) else np.zeros(0, dtype=int)
    count = int(labels[-1]) + 1 if len(order) else 0
    directions = V[order] / before[order][:, None]
    radial = np.zeros((count, *N.shape))
    radial[labels, order] = directions / np.sqrt(np.bincount(labels, minlength=count)[labels])[:, None]
    if not groups or N.shape[1] == 1:
        return radial.reshape(count, *shape)
    # Perpendicular to a row's direction it shrinks by the same factor as the row.
    _, _, bases = np.linalg.svd(directions[:, None, :])
    around = np.zeros((len(order), shape[1] - 1, *shape))
    shrunk = np.sqrt(sizes[order] / before[order])
    around[np.arange(len(order)), :, order] = bases[:, 1:] * shrunk[:, None, None]
    return np.concatenate([radial, around.reshape(-1, *shape)])
