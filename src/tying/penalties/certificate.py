"""Proof that x is prox(v; step), from v and x alone: no prox is computed, so nothing can be wrong in the same way.

x minimises ½‖x − v‖² + step · Ω(x) if and only if u = (v − x) / step is a subgradient of Ω at x; for a norm: u lies in
the ball of the dual norm and Ω(x) = ⟨u, x⟩. Everything here is multiplied by the step, which may then be 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tying.errors import PenaltyError

Matrix = NDArray[np.float64]

_NEGLIGIBLE = 1e-150
"""As a unit: thresholds in smaller ones would overflow. As a fraction of the unit: the square is still not 0."""


@dataclass(frozen=True)
class Certificate:
    """By how much each condition of optimality is violated: 0 is exact, all relative to the weights' own size.

    A prox that is right up to the rounding of its result stays below 4 eps of the dtype (float32, bfloat16,
    float16), below 1e-13 in float64.

    Example:
        >>> Certificate({"alignment": 1e-16, "dual ball": 0.0}).holds(1e-13)
        True
    """

    violations: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The largest violation; NaN if one is NaN."""
        return float(np.max(list(self.violations.values())))

    def holds(self, tolerance: float) -> bool:
        """Whether no violation exceeds the tolerance (NaN does)."""
        return self.worst <= tolerance


@np.errstate(invalid="ignore")  # infinities end as NaN, which does not hold
def certify_sorted(v: Tensor, x: Tensor, thresholds: Matrix) -> Certificate:
    """Certify x = argmin ½‖x − v‖² + Σ_i t_i ‖x‖_[i] for groups: `(G, D)` both, `(G,)` thresholds t = step · λ.

    Returns:
        alignment: |Σ t_i ‖x‖_[i] − ⟨v − x, x⟩| ÷ Σ_g ‖v_g‖‖x_g‖.
        dual ball: max_k of Σ_{i≤k} (‖v − x‖_[i] − t_i) ÷ Σ_{i≤k} ‖v‖_[i], where positive.
        collinearity: max_g ‖x_g − v_g ‖x_g‖ ÷ ‖v_g‖ ‖ ÷ ‖v_g‖.

    Raises:
        PenaltyError: If the shapes differ.
    """
    before, after, unit = _comparable(v, x)
    if not before.size:
        return Certificate({"alignment": 0.0, "dual ball": 0.0, "collinearity": 0.0})
    limits, floor = thresholds / unit, _floor(v, unit) * np.sqrt(before.shape[1])
    moved = before - after
    v_norms, x_norms, u_norms = (np.sqrt(np.square(m).sum(axis=1)) for m in (before, after, moved))

    slack = np.abs(_sorted(x_norms) @ limits - (moved * after).sum())
    excess = np.cumsum(_sorted(u_norms)) - np.cumsum(limits)
    ratio = np.divide(x_norms, v_norms, out=np.zeros_like(x_norms), where=v_norms > 0)
    turned = np.sqrt(np.square(after - before * ratio[:, None]).sum(axis=1))
    return Certificate(
        {
            "alignment": _worst(slack / ((v_norms + floor) * (x_norms + floor)).sum()),
            "dual ball": _worst(excess / np.cumsum(_sorted(v_norms) + floor)),
            "collinearity": _worst(turned / (v_norms + floor)),
        }
    )


@np.errstate(invalid="ignore")
def certify_ridge(v: Tensor, x: Tensor, threshold: float) -> Certificate:
    """Certify x = argmin ½‖x − v‖² + ½ t ‖x‖², any shape.

    Returns:
        stationarity: max over the entries of |v − x − t x| ÷ |v|.

    Raises:
        PenaltyError: If the shapes differ.
    """
    before, after, unit = _comparable(v, x)
    residual = np.abs(before - after - threshold * after)
    return Certificate({"stationarity": _worst(residual / (np.abs(before) + _floor(v, unit) * (1 + threshold)))})


def _comparable(v: Tensor, x: Tensor) -> tuple[Matrix, Matrix, float]:
    """Return both in units of v's size: a power of two, so that nothing is rounded."""
    if v.shape != x.shape:
        raise PenaltyError(
            f"prox_of_matrix: expected the shape of matrix, {tuple(v.shape)}, got {tuple(x.shape)}; "
            "pass what prox returned for it"
        )
    before, after = (m.detach().to("cpu", torch.float64).numpy() for m in (v, x))
    largest = max(float(np.abs(before).max(initial=0.0)), _NEGLIGIBLE)
    unit = float(np.exp2(np.floor(np.log2(largest))))
    return before / unit, after / unit, unit


def _floor(tensor: Tensor, unit: float) -> float:
    """The dtype's smallest normal number: below it relative precision is lost, so nothing is relative to less."""
    return max(torch.finfo(tensor.dtype).tiny / unit, _NEGLIGIBLE)


def _sorted(values: Matrix) -> Matrix:
    return np.sort(values)[::-1]


def _worst(violations: Matrix | np.floating) -> float:
    return float(np.max(violations, initial=0.0))
