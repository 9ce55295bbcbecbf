"""The penalties: what training pays for weights that are large, or that differ.

Each acts on a `(G, D)` matrix that `Groups.read` gives: Lasso, Ridge and OWL on all its entries, GroupLasso and GrOWL
on the l2 norms of its groups. All are frozen values, computed in float64, not differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from tying.penalties.arrays import Vector
from tying.penalties.certificate import Certificate, certify_ridge, certify_sorted
from tying.penalties.derivative import solve
from tying.penalties.prox import owl_norm, shrink_groups
from tying.penalties.sequences import Ramp, SequenceLike, as_sequence, check_not_negative, check_product, weights
from tying.penalties.tensors import (
    TRAINED,
    check_matrix,
    check_numbers,
    finite_norms,
    from_vector,
    rescale_groups,
    to_vector,
)

P = TypeVar("P", bound="_Strength")


@runtime_checkable
class Penalty(Protocol):
    """What `proximal` asks of a penalty Ω."""

    @property
    def strength(self) -> float:
        """The factor in front."""
        ...

    def value(self, matrix: Tensor) -> Tensor:
        """Return Ω of a `(G, D)` matrix, a float64 scalar."""
        ...

    def prox(self, matrix: Tensor, step: float) -> Tensor:
        """Return argmin_X ½‖X − matrix‖² + step · Ω(X): a new `(G, D)` tensor of the same dtype."""
        ...

    def certify(self, matrix: Tensor, prox_of_matrix: Tensor, step: float) -> Certificate:
        """Return by how much `prox_of_matrix` misses optimality, without computing a prox."""
        ...

    def scaled(self, factor: float) -> Penalty:
        """Return the same penalty with `strength` × factor."""
        ...


@runtime_checkable
class OnNorms(Penalty, Protocol):
    """A penalty Σ_i t_i ‖X‖_[i] on the sorted norms of the groups: its prox takes no more than the norms."""

    def thresholds(self, count: int, step: float) -> Vector:
        """Return the t of G groups, times the step: `(G,)` float64, largest first."""
        ...


def acts_on_norms(penalty: Penalty) -> bool:
    """Whether a penalty's thresholds say all about its prox: a subclass may have a prox of its own."""
    if not isinstance(penalty, OnNorms):
        return False
    classes = type(penalty).__mro__
    own = {
        name: next((i for i, each in enumerate(classes) if name in vars(each)), -1) for name in ("prox", "thresholds")
    }
    return own["prox"] >= own["thresholds"]


@dataclass(frozen=True)
class _Strength:
    strength: float

    def __post_init__(self) -> None:
        check_not_negative(f"{type(self).__name__}.strength", self.strength)

    def scaled(self: P, factor: float) -> P:
        """Return the same penalty with `strength` × factor.

        Raises:
            PenaltyError: If the factor is not a finite number ≥ 0.
        """
        return replace(self, strength=self.strength * check_not_negative("factor", factor))

    def _threshold(self, step: float) -> float:
        return check_not_negative("step", step) * self.strength


@dataclass(frozen=True)
class Lasso(_Strength):
    """Ω(X) = strength · Σ |x_ij|: single numbers become zero. Tibshirani, doi:10.1111/j.2517-6161.1996.tb02080.x.

    Example:
        >>> Lasso(1.0).prox(torch.tensor([[3.0, -0.5]]), step=0.5)
        tensor([[2.5000, 0.0000]])
    """

    def value(self, matrix: Tensor) -> Tensor:
        """Return Ω, a float64 scalar."""
        return _scalar(self.strength * np.abs(to_vector(matrix)).sum())

    def prox(self, matrix: Tensor, step: float) -> Tensor:
        """Return every number moved toward zero by step · strength, same shape and dtype.

        Raises:
            PenaltyError: If the matrix is not finite.
        """
        values = to_vector(matrix)
        shrunk = np.maximum(np.abs(values) - self._threshold(step), 0.0)
        return from_vector(np.copysign(shrunk, values), matrix)

    def certify(self, matrix: Tensor, prox_of_matrix: Tensor, step: float) -> Certificate:
        """Return by how much `prox_of_matrix` misses optimality: see `certify_sorted`, every number a group."""
        thresholds = np.full(matrix.numel(), self._threshold(step))
        return certify_sorted(matrix.reshape(-1, 1), prox_of_matrix.reshape(-1, 1), thresholds)


@dataclass(frozen=True)
class Ridge(_Strength):
    """Ω(X) = ½ · strength · Σ x_ij²: weight decay, as the others are written. Hoerl & Kennard, doi:10.2307/1267351.

    Example:
        >>> Ridge(1.0).prox(torch.tensor([[3.0, -0.5]]), step=1.0)
        tensor([[ 1.5000, -0.2500]])
    """

    def value(self, matrix: Tensor) -> Tensor:
        """Return Ω, a float64 scalar."""
        return _scalar(0.5 * self.strength * np.square(to_vector(matrix)).sum())

    def prox(self, matrix: Tensor, step: float) -> Tensor:
        """Return matrix ÷ (1 + step · strength), same shape and dtype.

        Raises:
            PenaltyError: If the matrix is not finite.
        """
        return from_vector(to_vector(matrix) / (1.0 + self._threshold(step)), matrix)

    def certify(self, matrix: Tensor, prox_of_matrix: Tensor, step: float) -> Certificate:
        """Return by how much `prox_of_matrix` misses optimality: see `certify_ridge`."""
        return certify_ridge(matrix, prox_of_matrix, self._threshold(step))


@dataclass(frozen=True)
class GroupLasso(_Strength):
    """Ω(X) = strength · Σ_g ‖X_g‖₂: whole groups become zero. Yuan & Lin, doi:10.1111/j.1467-9868.2005.00532.x.

    Example:
        >>> GroupLasso(1.0).prox(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), step=2.0)
        tensor([[1.8000, 2.4000],
                [0.0000, 0.0000]])
    """

    def value(self, matrix: Tensor) -> Tensor:
        """Return Ω, a float64 scalar."""
        return _scalar(self.strength * finite_norms(matrix).sum())

    def prox(self, matrix: Tensor, step: float) -> Tensor:
        """Return every group's norm lowered by step · strength, same shape and dtype.

        Raises:
            PenaltyError: If the matrix is not finite.
        """
        norms = finite_norms(matrix)
        return rescale_groups(matrix, norms, np.maximum(norms - self._threshold(step), 0.0))

    def thresholds(self, count: int, step: float) -> Vector:
        """Return step · strength, G times: see `OnNorms`."""
        return np.full(count, self._threshold(step))

    def certify(self, matrix: Tensor, prox_of_matrix: Tensor, step: float) -> Certificate:
        """Return by how much `prox_of_matrix` misses optimality: see `certify_sorted`."""
        return certify_sorted(matrix, prox_of_matrix, self.thresholds(len(matrix), step))


@dataclass(frozen=True)
class _Sorted(_Strength):
    sequence: SequenceLike = field(default=Ramp(3.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sequence", as_sequence(self.sequence))

    def _weights(self, count: int, step: float = 1.0) -> Vector:
        numbers = weights(self.sequence, count)
        factor = self._threshold(step)
        check_product(factor, numbers)
        return factor * numbers


@dataclass(frozen=True)
class OWL(_Sorted):
    """Ω(X) = strength · Σ_i λ_i |x|_[i], all numbers sorted: similar magnitudes become equal, small ones zero.

    Bogdan et al., arXiv 1407.3824 (SLOPE); Zeng & Figueiredo, arXiv 1409.4271.

    Attributes:
        strength: ≥ 0.
        sequence: The λ: a sequence (see `tying.penalties.sequences`), or G · D numbers, largest first.

    Example:
        >>> OWL(1.0, [2.0, 1.0, 0.0]).prox(torch.tensor([[-4.0, 1.0, 3.5]]), step=1.0)
        tensor([[-2.2500,  1.0000,  2.2500]])
    """

    def value(self, matrix: Tensor) -> Tensor:
        """Return Ω, a float64 scalar."""
        return owl_norm(torch.from_numpy(to_vector(matrix)), self._weights(matrix.numel()))

    def prox(self, matrix: Tensor, step: float) -> Tensor:
        """Return `prox_owl` of all numbers, same shape and dtype.

        Raises:
            PenaltyError: If the matrix is not finite, or explicit weights are not as many as its numbers.
        """
        check_numbers(matrix)
        flat = matrix.detach().reshape(-1)  # all numbers are sorted together
        return solve(flat, self._weights(len(flat), step), TRAINED).reshape(matrix.shape)

    def certify(self, matrix: Tensor, prox_of_matrix: Tensor, step: float) -> Certificate:
        """Return by how much `prox_of_matrix` misses optimality: see `certify_sorted`, every number a group."""
        thresholds = self._weights(matrix.numel(), step)
        return certify_sorted(matrix.reshape(-1, 1), prox_of_matrix.reshape(-1, 1), thresholds)


@dataclass(frozen=True)
class GrOWL(_Sorted):
    """Ω(X) = strength · Σ_i λ_i ‖X‖_[i], the norms of the groups sorted: norms become equal, small groups zero.

    Oswal et al., ICML 2016; Zhang et al., ICLR 2018, openreview rypT3fb0b. The norms are what becomes equal; the
    directions of correlated groups come out nearly equal, so finding the ties takes a clustering.

    Attributes:
        strength: ≥ 0.
        sequence: The λ: a sequence (see `tying.penalties.sequences`), or G numbers, largest first.

    Example:
        >>> GrOWL(1.0, [2.0, 0.0]).prox(torch.tensor([[3.0, 4.0], [0.0, 4.0]]), step=1.0)
        tensor([[2.1000, 2.8000],
                [0.0000, 3.5000]])
    """

    def value(self, matrix: Tensor) -> Tensor:
        """Return Ω, a float64 scalar."""
        return owl_norm(torch.from_numpy(finite_norms(matrix)), self.thresholds(len(matrix), 1.0))

    def prox(self, matrix: Tensor, step: float) -> Tensor:
        """Return `prox_growl`, same shape and dtype.

        Raises:
            PenaltyError: If the matrix is not finite, or explicit weights are not as many as its groups.
        """
        check_matrix(matrix)
        return shrink_groups(matrix.detach(), self.thresholds(len(matrix), step), TRAINED)

    def thresholds(self, count: int, step: float) -> Vector:
        """Return step · strength · λ: see `OnNorms`."""
        return self._weights(count, step)

    def certify(self, matrix: Tensor, prox_of_matrix: Tensor, step: float) -> Certificate:
        """Return by how much `prox_of_matrix` misses optimality: see `certify_sorted`."""
        return certify_sorted(matrix, prox_of_matrix, self.thresholds(len(matrix), step))


def _scalar(value: np.floating) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64)
