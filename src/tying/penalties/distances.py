"""Distances between groups that are drawn together: pure tensor maths, for two members or many.

A *stack* holds the n members of K labels side by side: `(n, K, D)`, or n tensors `(K, D)`; for a value of one label
also `(n, D)`. Values are differentiable
and are computed from differences, never as a difference of large sums. Proxes are exact, and are meant for float64;
a step of infinity gives the projection.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from tying.errors import PenaltyError
from tying.penalties.sequences import check_not_negative

Stack: TypeAlias = Tensor | Sequence[Tensor]

MANY = 32
"""The number of members above which a monotone fit goes column by column, in time that grows with them only."""


@dataclass(frozen=True)
class Distance(ABC):
    """A distance d(x, y) of two groups, convex in x − y unless it says otherwise."""

    elementwise: ClassVar[bool] = False
    """Whether d is a sum over single numbers, so that it does not matter how they are grouped."""
    to_zero: ClassVar[bool] = True
    """Whether d(x, 0) draws x to zero."""

    @abstractmethod
    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """Return d of every pair of groups: twice `(…, D)` → `(…)`, differentiable."""

    @abstractmethod
    def shrink(self, difference: Tensor, step: float) -> Tensor:
        """Return argmin_z ½‖z − difference‖² + step · d(z, 0): `(…, D)` → `(…, D)`; step may be infinity.

        Raises:
            PenaltyError: If this distance has none.
        """

    def all_pairs(self, stack: Stack) -> Tensor:
        """Return Σ_{i<j} d(x_i, x_j) for every label: n × `(K, D)` → `(K,)`, differentiable.

        Unless a subclass knows better, the differences of all pairs are kept for the backward pass.
        """
        if len(stack) == 2:
            return self.between(stack[0], stack[1])
        whole = stacked(stack)
        terms = [self.between(whole[offset:], whole[:-offset]).sum(0) for offset in range(1, len(whole))]
        return torch.stack(terms).sum(0)

    def to_mean(self, stack: Stack) -> Tensor:
        """Return Σ_i d(x_i, mean) for every label: n × `(K, D)` → `(K,)`, differentiable, through the mean too."""
        whole = stacked(stack)
        return self.between(whole, mean_of(whole).expand_as(whole)).sum(0)

    def prox_all_pairs(self, stack: Stack, step: float) -> Stack:
        """Return argmin_X ½‖X − stack‖² + step · Σ_{i<j} d(X_i, X_j): `(n, K, D)` → `(n, K, D)`.

        The mean of the members stays where it is.

        Raises:
            PenaltyError: If this distance has no closed form for so many members.
        """
        if len(stack) > 2:
            raise self._unsolved(f"all pairs of {len(stack)} members")
        difference = stack[0] - stack[1]
        mean, drawn = torch.add(stack[1], difference, alpha=0.5), self.shrink(difference, 2 * step)
        return torch.add(mean, drawn, alpha=0.5), torch.sub(mean, drawn, alpha=0.5)

    def prox_to_mean(self, stack: Stack, step: float) -> Stack:
        """Return argmin_X ½‖X − stack‖² + step · Σ_i d(X_i, mean of X): `(n, K, D)` → `(n, K, D)`.

        Raises:
            PenaltyError: If this distance has no closed form for so many members.
        """
        if len(stack) > 2:
            raise self._unsolved(f"{len(stack)} members and their mean")
        half = (stack[0] - stack[1]) / 2
        mean, drawn = stack[1] + half, self.shrink(half, step)
        return mean + drawn, mean - drawn

    def _unsolved(self, what: str) -> PenaltyError:
        return PenaltyError(
            f"distance: expected one with a prox for {what}, got {self}; L2 has one for all, L1 for all pairs, Huber "
            "and Norm for two members or an anchor: take one of these, or add the value to the loss"
        )


@dataclass(frozen=True)
class L2(Distance):
    """d(x, y) = ‖x − y‖², squared and without ½: Goodfellow, Bengio, Courville, *Deep Learning*, section 7.9.

    Example:
        >>> L2().between(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0]))
        tensor(25.)
    """

    elementwise: ClassVar[bool] = True

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """Return ‖x − y‖²: twice `(…, D)` → `(…)`."""
        return (first - second).square().sum(-1)

    def shrink(self, difference: Tensor, step: float) -> Tensor:
        """Return difference ÷ (1 + 2 · step)."""
        return difference / (1 + 2 * step)

    def all_pairs(self, stack: Stack) -> Tensor:
        """Return n · Σ_i ‖x_i − mean‖², which is the sum over the pairs: n × `(K, D)` → `(K,)`."""
        if len(stack) == 2:
            return self.between(stack[0], stack[1])
        _, moved = _from_mean(stacked(stack))
        return moved.square().sum((0, -1)) * len(stack)

    def to_mean(self, stack: Stack) -> Tensor:
        """Return Σ_i ‖x_i − mean‖²: n × `(K, D)` → `(K,)`."""
        return self.all_pairs(stack) / len(stack)

    def prox_all_pairs(self, stack: Stack, step: float) -> Stack:
        """Return mean + (x − mean) ÷ (1 + 2 · step · n)."""
        return self.prox_to_mean(stack, step * len(stack))

    def prox_to_mean(self, stack: Stack, step: float) -> Stack:
        """Return mean + (x − mean) ÷ (1 + 2 · step)."""
        if len(stack) == 2:
            return super().prox_to_mean(stack, step)
        mean, moved = _from_mean(stacked(stack))
        return mean + self.shrink(moved, step)


@dataclass(frozen=True)
class L1(Distance):
    """d(x, y) = Σ |x − y|: single numbers become exactly equal.

    All pairs: weight-sharing regularisation, Shakerinava et al., AISTATS 2024, arXiv 2311.03096.

    Example:
        >>> L1().prox_all_pairs(torch.tensor([[[0.0]], [[1.0]], [[9.0]]]), step=1.0).flatten()
        tensor([1.5000, 1.5000, 7.0000])
    """

    elementwise: ClassVar[bool] = True

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """Return Σ |x − y|: twice `(…, D)` → `(…)`."""
        return (first - second).abs().sum(-1)

    def shrink(self, difference: Tensor, step: float) -> Tensor:
        """Return every number moved toward zero by the step."""
        return difference - difference.clamp(-step, step)

    def all_pairs(self, stack: Stack) -> Tensor:
        """Return Σ_i c_i x_i with c_i = the members below x_i less those above, by one sort: n × `(K, D)` → `(K,)`."""
        if len(stack) == 2:
            return self.between(stack[0], stack[1])
        whole = stacked(stack)
        with torch.no_grad():
            last = whole.movedim(0, -1).contiguous()
            ordered = last.sort(-1).values
            below, upto = (torch.searchsorted(ordered, last, right=right) for right in (False, True))
            balance = (below + upto - len(whole)).movedim(-1, 0).to(whole.dtype)
        return (balance * (whole - whole[:1].detach())).sum((0, -1))  # Σ c_i = 0: from wherever they are counted

    def prox_all_pairs(self, stack: Stack, step: float) -> Stack:
        """Return the members, shifted by step · (members above − members below), and in order again: isotonic."""
        if len(stack) == 2:
            return super().prox_all_pairs(stack, step)
        count, stack = len(stack), stacked(stack)
        if step == math.inf:
            return mean_of(stack).expand_as(stack)
        ordered, order = (stack - stack[:1]).sort(0)
        width = ordered[-1:] - ordered[:1]
        rank = torch.arange(1 - count, count, 2, device=stack.device, dtype=stack.dtype).reshape(-1, 1, 1)
        # From half the width on all members are one: a longer step changes nothing, and would lose digits.
        shifted = ordered - rank * width.clamp(max=step)
        return stack[:1] + torch.empty_like(stack).scatter_(0, order, _monotone(shifted))


@dataclass(frozen=True)
class Huber(Distance):
    """d(x, y) = Σ h(x − y), h(t) = ½t² where |t| ≤ delta, else delta · (|t| − ½ delta), as `torch.nn.HuberLoss`.

    Large differences are drawn together with a force that does not grow. Huber, doi:10.1214/aoms/1177703732.

    Attributes:
        delta: > 0.

    Example:
        >>> Huber(delta=1.0).between(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.5]))
        tensor(2.6250)
    """

    delta: float = 1.0
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if check_not_negative("Huber.delta", self.delta) == 0:
            raise PenaltyError("Huber.delta: expected a number > 0, got 0; pass one, or take L1")

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """Return Σ h(x − y): twice `(…, D)` → `(…)`."""
        size = (first - second).abs()
        inner = size.clamp(max=self.delta)
        return (inner * (size - inner / 2)).sum(-1)

    def shrink(self, difference: Tensor, step: float) -> Tensor:
        """Return z ÷ (1 + step) where |z| ≤ delta · (1 + step), else z moved toward zero by step · delta."""
        if step == math.inf:
            return torch.zeros_like(difference)
        near = difference / (1 + step)
        return torch.add(near, near - near.clamp(-self.delta, self.delta), alpha=step)


@dataclass(frozen=True)
class Cosine(Distance):
    """d(x, y) = 1 − cos(x, y): directions are drawn together, lengths are free. Not convex, and without a prox.

    A group of zeros has no direction: it is 1 away from all, and not moved.

    Example:
        >>> Cosine().between(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0]))
        tensor(1.)
    """

    to_zero: ClassVar[bool] = False

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """Return 1 − cos(x, y) = ½‖x ÷ ‖x‖ − y ÷ ‖y‖‖²: twice `(…, D)` → `(…)`."""
        (mine, i_am_zero), (theirs, they_are_zero) = _direction(first), _direction(second)
        return ((mine - theirs).square().sum(-1) + i_am_zero + they_are_zero) / 2

    def shrink(self, difference: Tensor, step: float) -> Tensor:
        """Refuse.

        Raises:
            PenaltyError: Always, and says which distances have a prox.
        """
        raise self._unsolved("a difference")

    def all_pairs(self, stack: Stack) -> Tensor:
        """Return half the sum that `L2` gives for the directions: n × `(K, D)` → `(K,)`."""
        if len(stack) == 2:
            return self.between(stack[0], stack[1])
        directions, zero = _direction(stacked(stack))
        return (L2().all_pairs(directions) + (len(stack) - 1) * zero.sum(0)) / 2


@dataclass(frozen=True)
class Norm(Distance):
    """d(x, y) = ‖x − y‖, not squared: whole groups become exactly equal, as the group lasso makes them zero.

    Example:
        >>> Norm().shrink(torch.tensor([3.0, 4.0]), step=2.5)
        tensor([1.5000, 2.0000])
    """

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """Return ‖x − y‖: twice `(…, D)` → `(…)`; the gradient where x = y is 0."""
        return torch.linalg.vector_norm(first - second, dim=-1)

    def shrink(self, difference: Tensor, step: float) -> Tensor:
        """Return the difference, its norm lowered by the step, zero where it is no longer."""
        norm = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
        return torch.where(norm > step, difference * (1 - step / norm), 0.0)

    def all_pairs(self, stack: Stack) -> Tensor:
        """Return the sum of the `(n, n)` norms, of which only those are kept: n × `(K, D)` → `(K,)`."""
        if len(stack) == 2:
            return self.between(stack[0], stack[1])
        members = stacked(stack).movedim(0, -2)
        return torch.cdist(members, members, compute_mode="donot_use_mm_for_euclid_dist").sum((-2, -1)) / 2


_BY_NAME: dict[str, Distance] = {"l2": L2(), "l1": L1(), "huber": Huber(), "cosine": Cosine(), "norm": Norm()}


def as_distance(given: object) -> Distance:
    """Return a distance, or the one that a name stands for: l2, l1, huber (delta 1), cosine, norm.

    Raises:
        PenaltyError: If it is neither.

    Example:
        >>> as_distance("huber")
        Huber(delta=1.0)
    """
    if isinstance(given, Distance):
        return given
    if isinstance(given, str) and given in _BY_NAME:
        return _BY_NAME[given]
    raise PenaltyError(
        f"distance: expected one of {', '.join(map(repr, _BY_NAME))}, or a Distance, got {given!r}; pass one of them, "
        "as Huber(delta=0.1)"
    )


def stacked(stack: Stack) -> Tensor:
    """Return a stack as one tensor `(n, K, D)`."""
    return stack if isinstance(stack, Tensor) else torch.stack(list(stack))


def mean_of(stack: Tensor) -> Tensor:
    """Return the mean of the members, `(n, K, D)` → `(K, D)`: exactly their value where they are equal."""
    return stack[0] + (stack - stack[:1]).sum(0) / len(stack)


def _from_mean(stack: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean `(K, D)`, and how far from it the members are, `(n, K, D)`: counted from the first of them."""
    moved = stack - stack[:1]
    mean = moved.sum(0) / len(stack)
    return stack[0] + mean, moved - mean


def _direction(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the groups at length 1, `(…, D)`, and 1 for those that are zero, `(…)`, which stay zero."""
    if not groups.shape[-1]:
        return groups, torch.ones(groups.shape[:-1], dtype=groups.dtype, device=groups.device)
    largest = groups.detach().abs().amax(-1, keepdim=True)
    zero = largest == 0
    scaled = groups / torch.where(zero, 1.0, largest)  # so that no square is too large or too small for its dtype
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled * torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, norm)), zero.squeeze(-1).to(groups.dtype)


def _monotone(stack: Tensor) -> Tensor:
    """Return the nearest non-decreasing sequence along dimension 0: y_k = max_{i≤k} min_{j≥k} mean(x_i … x_j)."""
    count = len(stack)
    if count > MANY:
        from scipy.optimize import isotonic_regression

        columns = stack.detach().cpu().numpy().reshape(count, -1)
        fitted = [torch.from_numpy(isotonic_regression(column).x) for column in columns.T]
        return torch.stack(fitted, 1).reshape(stack.shape).to(stack) if fitted else stack
    sums = torch.cat([torch.zeros_like(stack[:1]), stack.cumsum(0)])
    fit = torch.full_like(stack, -math.inf)
    for start in range(count):
        sizes = torch.arange(1, count - start + 1, device=stack.device, dtype=stack.dtype).reshape(-1, 1, 1)
        means = (sums[start + 1 :] - sums[start]) / sizes
        fit[start:] = torch.maximum(fit[start:], means.flip(0).cummin(0).values.flip(0))
    return fit
