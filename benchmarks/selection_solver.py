"""Penalised least squares, many problems side by side, solved to a certificate: ½‖AX − Y‖² + strength · Ω(X).

ADMM with an exact linear solve over `prox_owl`, all problems at once; what it has not settled goes on alone, by
`selection_newton`. The spectra of the benchmark are why: their columns correlate by 0.96 and more, and there
accelerated proximal gradient is at a relative gap of 1e-4 after 50,000 steps. Sources: Boyd et al.,
doi:10.1561/2200000016; the gap: Fercoq, Gramfort & Salmon, ICML 2015.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.selection_newton import derivative_factor, proximal_point
from tying.penalties import owl_dual_norm, owl_norm, prox_owl
from tying.penalties.sequences import SequenceLike
from tying.penalties.sequences import weights as weights_of

RELAXATION = 1.7
CHECK_EVERY, BALANCE_EVERY = 25, 200


@dataclass(frozen=True)
class Penalised:
    """Ω(X) = Σ_i λ_i m_[i] with m the numbers of X or the norms of its rows, and ½ · ridge · ‖X‖² beside it.

    Attributes:
        weights: The λ.
        on: What is sorted and made zero.
        ridge: 1 with flat weights and standardised data is the elastic net of equal shares.
    """

    weights: SequenceLike
    on: Literal["numbers", "groups"] = "groups"
    ridge: float = 0.0

    def magnitudes(self, X: Tensor) -> Tensor:
        """Return what is sorted: `(B, p, r)` → `(B, p)` norms or `(B, p · r)` numbers."""
        return torch.linalg.vector_norm(X, dim=-1) if self.on == "groups" else X.flatten(1)

    def prox(self, V: Tensor, thresholds: Tensor) -> Tensor:
        """Return argmin ½‖X − V‖² + threshold · Ω(X), `(B, p, r)`, a threshold > 0 for each problem `(B,)`.

        The prox of t · Ω at v is t times that of Ω at v ÷ t: so one call serves all thresholds.
        """
        before = self.magnitudes(V)
        after = thresholds[:, None] * prox_owl(before / thresholds[:, None], self.weights)
        if self.on == "numbers":
            return after.reshape(V.shape)
        return V * (after / torch.where(before > 0, before, 1.0))[..., None]

    def value(self, X: Tensor) -> Tensor:
        """Return Ω without the ridge, `(B,)`."""
        return owl_norm(self.magnitudes(X), self.weights)

    def dual_norm(self, U: Tensor) -> Tensor:
        """Return the dual norm of Ω without the ridge, `(B,)`."""
        return owl_dual_norm(self.magnitudes(U), self.weights)


@dataclass(frozen=True)
class Problems:
    """B problems by their moments: AᵀA `(B, p, p)`, AᵀY `(B, p, r)`, ‖Y‖² `(B,)`, all float64."""

    gram: Tensor
    moment: Tensor
    energy: Tensor

    @classmethod
    def of(cls, A: Tensor, Y: Tensor) -> Problems:
        """Take the moments of `(B, n, p)` and `(B, n, r)`."""
        return cls(A.mT @ A, A.mT @ Y, Y.square().sum(dim=(1, 2)))

    def with_ridge(self, amounts: Tensor) -> Problems:
        """Add ½ · amount · ‖X‖² to each: as much as appending √amount · I to A and zeros to Y."""
        if not amounts.any():
            return self
        return replace(self, gram=self.gram + amounts[:, None, None] * torch.eye(self.gram.shape[-1]).double())

    def some(self, which: Tensor) -> Problems:
        """Return those of a mask or of indices."""
        chosen = Problems(self.gram[which], self.moment[which], self.energy[which])
        chosen.__dict__["spectrum"] = tuple(part[which] for part in self.spectrum)
        return chosen

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues `(B, p)` and eigenvectors of the Gram matrices."""
        values, vectors = torch.linalg.eigh(self.gram)
        return values.clamp(min=0.0), vectors

    def middle_curvature(self) -> Tensor:
        """Return the geometric mean of the largest and the middle eigenvalue, `(B,)`: a τ that suits most strengths."""
        values = self.spectrum[0]
        return (values[:, -1] * values.median(dim=1).values.clamp(min=1e-8 * values[:, -1])).sqrt()

    def inverse(self, tau: Tensor) -> Tensor:
        """Return (AᵀA + τ I)⁻¹, τ `(B,)`."""
        values, vectors = self.spectrum
        return (vectors / (values + tau[:, None])[:, None, :]) @ vectors.mT


@dataclass(frozen=True)
class Solution:
    """What came out, and proof of it.

    Attributes:
        X: `(B, p, r)`; the output of a prox: its zeros are zeros and its ties are ties.
        gap: `(B,)`: (value − a lower bound of all values) ÷ ½‖Y‖².
        multiplier: `(B, p, r)`, Aᵀ(Y − AX) in the end: to start from at the next strength.
    """

    X: Tensor
    gap: Tensor
    multiplier: Tensor


def largest_strength(problems: Problems, penalised: Penalised) -> Tensor:
    """Return the smallest strength at which X = 0 is optimal, `(B,)`."""
    return penalised.dual_norm(problems.moment)


def relative_gap(problems: Problems, penalised: Penalised, strengths: Tensor, X: Tensor) -> Tensor:
    """Return the duality gap at X ÷ ½‖Y‖², `(B,)`: X is no further than that from the least value there is.

    Any U with Ω°(AᵀU) ≤ strength gives the bound ½‖Y‖² − ½‖U − Y‖²; the best multiple of the residual is taken.
    """
    GX = problems.gram @ X
    fitted, quadratic = ((X * other).sum(dim=(1, 2)) for other in (problems.moment, GX))
    residual = (problems.energy - 2 * fitted + quadratic).clamp(min=1e-300)
    value = 0.5 * residual + strengths * penalised.value(X)
    reach = strengths / penalised.dual_norm(problems.moment - GX).clamp(min=1e-300)
    scale = torch.clamp((problems.energy - fitted) / residual, -reach, reach)
    bound = scale * (problems.energy - fitted) - 0.5 * scale.square() * residual
    return (value - bound) / (0.5 * problems.energy)


def solve(
    problems: Problems,
    penalised: Penalised,
    strengths: Tensor,
    start: Solution | None = None,
    *,
    tolerance: float = 1e-6,
    most: int = 1_000,
) -> Solution:
    """Minimise ½‖AX − Y‖² + strength · (Ω(X) + ½ · ridge · ‖X‖²) for each problem.

    Args:
        problems: B of them.
        penalised: One Ω for all.
        strengths: `(B,)`, > 0.
        start: A solution at another strength.
        tolerance: Of the relative gap.
        most: Steps of ADMM.
    """
    problems = problems.with_ridge(penalised.ridge * strengths)
    X = torch.zeros_like(problems.moment) if start is None else start.X.clone()
    multiplier = torch.zeros_like(X) if start is None else start.multiplier.clone()
    tau = problems.middle_curvature()
    gap = torch.full_like(strengths, torch.inf)
    left, steps = torch.ones(len(strengths), dtype=torch.bool), 0
    while left.any() and steps < most:
        some, t = problems.some(left), tau[left]
        X[left], multiplier[left], balance = _advance(
            some, penalised, strengths[left] / t, X[left], multiplier[left], t
        )
        steps += CHECK_EVERY
        gap[left] = relative_gap(some, penalised, strengths[left], X[left])
        if steps % BALANCE_EVERY == 0:
            tau[left] = t * balance
        left &= ~(gap <= tolerance)
    for b in left.nonzero()[:, 0].tolist():
        X[b], gap[b] = _finish(problems.some(torch.tensor([b])), penalised, strengths[b : b + 1], X[b], tolerance)
        multiplier[b] = problems.moment[b] - problems.gram[b] @ X[b]
    return Solution(X, gap, multiplier)


def _finish(
    problem: Problems, penalised: Penalised, strength: Tensor, X: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Go on with one problem, by Newton, from a root R of its Gram matrix: ½‖RX − T‖² differs by a constant."""
    values, vectors = (part[0].numpy() for part in problem.spectrum)
    kept = values > 1e-13 * values[-1]
    R = np.sqrt(values[kept])[:, None] * vectors[:, kept].T
    T = vectors[:, kept].T @ problem.moment[0].numpy() / np.sqrt(values[kept])[:, None]
    ends = weights_of(penalised.weights, X.numel() if penalised.on == "numbers" else len(X))[[0, -1]]

    def prox(V: np.ndarray, sigma: float) -> np.ndarray:
        return penalised.prox(torch.from_numpy(V)[None], sigma * strength)[0].numpy()

    def factor(V: np.ndarray, N: np.ndarray) -> np.ndarray:
        return derivative_factor(V, N, groups=penalised.on == "groups", pools=ends[0] > ends[1])

    def gap(candidate: np.ndarray) -> float:
        return float(relative_gap(problem, penalised, strength, torch.from_numpy(candidate)[None]))

    found = proximal_point(R, T, X.numpy(), prox, factor, gap, tolerance)
    return torch.from_numpy(found), torch.tensor(gap(found), dtype=torch.float64)


def _advance(
    problems: Problems, penalised: Penalised, thresholds: Tensor, Z: Tensor, multiplier: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Take some steps; also return by what factor τ should change for both residuals to fall alike."""
    inverse = problems.inverse(tau)
    t = tau[:, None, None]
    constant = inverse @ problems.moment
    X, before, U = Z, Z, multiplier / t
    for _ in range(CHECK_EVERY):
        X = torch.baddbmm(constant, inverse, t * (Z - U))
        relaxed = RELAXATION * X + (1 - RELAXATION) * Z + U
        before, Z = Z, penalised.prox(relaxed, thresholds)
        U = relaxed - Z
    primal = _norm(X - Z) / torch.maximum(_norm(X), _norm(Z)).clamp(min=1e-300)
    dual = _norm(Z - before) / _norm(U).clamp(min=1e-300)
    balance = (primal.clamp(min=1e-300) / dual.clamp(min=1e-300)).sqrt().clamp(0.2, 5.0)
    return Z, U * t, balance


def _norm(X: Tensor) -> Tensor:
    return torch.linalg.vector_norm(X, dim=(1, 2))
