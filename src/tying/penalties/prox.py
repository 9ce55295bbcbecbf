"""The sorted-L1 (OWL, SLOPE) norm, its dual norm and its prox, on vectors and on groups: for solvers of one's own.

Ω(x) = Σ_i λ_i |x|_[i], with |x|_[1] ≥ |x|_[2] ≥ … and λ_1 ≥ … ≥ λ_n ≥ 0. Everything is computed in float64 on the CPU,
outside of what `torch.compile` compiles. Sources: Bogdan et al., arXiv 1407.3824; Zeng & Figueiredo, arXiv 1409.4271;
on groups: Oswal et al., ICML 2016.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tying.errors import PenaltyError
from tying.penalties import derivative
from tying.penalties.arrays import Vector
from tying.penalties.sequences import SequenceLike, check_not_negative, check_product
from tying.penalties.sequences import weights as weights_of
from tying.penalties.sorted_l1 import DOWN, HUGE, NotFiniteError, shrink_sorted, shrink_vectors
from tying.penalties.tensors import (
    Argument,
    check_finite,
    check_matrix,
    check_numbers,
    finite_norms,
    passed,
    rescale_groups,
    to_array,
)

_is_compiling = torch.compiler.is_compiling
_uncompiled: Any = torch.compiler.disable
_PLAIN, _STRIDED = (torch.float32, torch.float64), torch.strided
_V, _MATRIX, _X, _U = passed("v"), passed("matrix"), passed("x"), passed("u")


def prox_owl(v: Tensor, weights: SequenceLike, step: float = 1.0) -> Tensor:
    """Return argmin_x ½‖x − v‖² + step · Σ_i λ_i |x|_[i], of one vector or of each of a batch.

    Entries of equal magnitude come out with equal magnitude, bit for bit, and so do entries pooled together.

    Differentiable with respect to `v`, by `backward`, twice, and under `torch.func`: around v the prox averages, with
    signs, within the blocks that are pooled, and is constant where the result is zero; at a kink the derivative is one
    of the limits from nearby. Not differentiable with respect to weights and step, which are numbers.

    Args:
        v: `(n,)`, or `(…, n)`: a batch of vectors, each with its own prox. Any real floating dtype.
        weights: The λ: a sequence, or n numbers, largest first.
        step: ≥ 0.

    Returns:
        A new tensor: shape, dtype and device of `v`, rounded once from float64.

    Raises:
        PenaltyError: If `v` is not a plain tensor, not finite or has no dimension, or the weights or the step are not
            as described, or their product exceeds float64.

    Example:
        >>> prox_owl(torch.tensor([-4.0, 1.0, 3.5]), [2.0, 1.0, 0.0])
        tensor([-2.2500,  1.0000,  2.2500])
        >>> v = torch.tensor([-4.0, 1.0, 3.5], requires_grad=True)
        >>> prox_owl(v, [2.0, 1.0, 0.0])[2].backward()
        >>> v.grad
        tensor([-0.5000,  0.0000,  0.5000])
    """
    if _is_compiling():
        return _uncompiled(prox_owl)(v, weights, step)
    # What is usual is found out at once: at a hundred numbers, every look counts.
    usual = type(v) is Tensor and v.dtype in _PLAIN and v.is_cpu and v.layout is _STRIDED
    if not (usual and v.dim()):
        _check_vectors(v, _V)
    if type(step) is not float or not 0.0 <= step < math.inf:
        step = check_not_negative("step", step)
    numbers = weights_of(weights, v.shape[-1], "weights")
    if usual and v.is_contiguous() and not v.is_neg() and not _may_need_derivative(v):
        try:
            return torch.from_numpy(shrink_vectors((v.detach() if v.requires_grad else v).numpy(), numbers, step))
        except (NotFiniteError, FloatingPointError):  # the second: NumPy was told to raise where something underflows
            pass  # what is wrong is told below, and what is not solved
    check_product(step, numbers)
    return derivative.prox(v, step * numbers, _V)


def prox_growl(matrix: Tensor, weights: SequenceLike, step: float = 1.0) -> Tensor:
    """Return argmin_X ½‖X − V‖² + step · Σ_i λ_i ‖X‖_[i], the norms of the groups sorted, largest first.

    The norms r of the groups become q = prox_owl(r), and group g becomes V_g · q_g / r_g (0 where r_g = 0). Equal
    groups come out equal bit for bit; the norms of groups pooled together are equal to the rounding of the dtype.

    Differentiable with respect to `matrix`, as `prox_owl` is with respect to `v`.

    Args:
        matrix: V, `(G, D)`, any real floating dtype.
        weights: The λ: a sequence, or G numbers, largest first.
        step: ≥ 0.

    Returns:
        A new tensor: shape, dtype, device and memory layout of `matrix`.

    Raises:
        PenaltyError: If the matrix is not a plain tensor or not finite, or one of its norms exceeds float64, or the
            weights or the step are not as `prox_owl` wants them.

    Example:
        >>> prox_growl(torch.tensor([[3.0, 4.0], [0.0, 4.0]]), [2.0, 0.0])
        tensor([[2.1000, 2.8000],
                [0.0000, 3.5000]])
    """
    if _is_compiling():
        return _uncompiled(prox_growl)(matrix, weights, step)
    check_matrix(matrix, _MATRIX)
    step, numbers = check_not_negative("step", step), weights_of(weights, len(matrix), "weights")
    check_product(step, numbers)
    shrink = _differentiable_growl if _may_need_derivative(matrix) else shrink_groups
    return shrink(matrix, step * numbers, _MATRIX)


@np.errstate(all="ignore")  # what underflows is 0
def shrink_groups(matrix: Tensor, thresholds: Vector, argument: Argument) -> Tensor:
    """Return what `prox_growl` does, not differentiable.

    Args:
        matrix: `(G, D)`.
        thresholds: `(G,)`, step · λ: finite, ≥ 0, non-increasing.
        argument: What messages call the matrix.

    Raises:
        PenaltyError: If the matrix is not one of real floating numbers, or not finite, or a norm exceeds float64.
    """
    norms = finite_norms(matrix, argument)
    return rescale_groups(matrix, norms, shrink_sorted(norms, thresholds))


def _differentiable_growl(matrix: Tensor, thresholds: Vector, argument: Argument) -> Tensor:
    norms = derivative.norms(matrix, argument)
    zero = norms == 0
    wanted = derivative.prox(norms, thresholds, argument)
    factors = wanted / torch.where(zero, 1.0, norms)
    # Around zero groups that meet no threshold the prox is the identity, unless another group becomes zero: it would
    # draw them along.
    free = zero.sum() <= int(np.count_nonzero(thresholds == 0))
    spared = zero & free & ((wanted == 0).sum() == zero.sum())
    precise = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    factors = torch.where(spared, 1.0, factors).to(precise)
    return (matrix * factors[:, None]).to(matrix.dtype) + 0.0


def owl_norm(x: Tensor, weights: SequenceLike) -> Tensor:
    """Return Σ_i λ_i |x|_[i]: of a vector `(n,)` a float64 scalar on the CPU, of a batch `(…, n)` one for each, `(…)`.

    Differentiable with respect to `x`: where magnitudes are equal, or zero, the derivative is a subgradient.

    Raises:
        PenaltyError: If `x` is not finite or has no dimension, or the weights are not as `prox_owl` wants them.

    Example:
        >>> owl_norm(torch.tensor([1.0, -3.0]), [2.0, 1.0])
        tensor(7., dtype=torch.float64)
    """
    if _is_compiling():
        return _uncompiled(owl_norm)(x, weights)
    _check_vectors(x, _X)
    numbers = weights_of(weights, x.shape[-1], "weights")
    return (_descending(x, _X) * torch.from_numpy(numbers.copy())).sum(dim=-1)


def owl_dual_norm(u: Tensor, weights: SequenceLike) -> Tensor:
    """Return max_k Σ_{i≤k} |u|_[i] ÷ Σ_{i≤k} λ_i: shapes and derivative as of `owl_norm`; infinite where there is no λ.

    `prox_owl(u, weights, step)` is zero if and only if this is ≤ step. So it is λ_max, the smallest strength at which
    all coefficients are zero: for a loss with gradient g at 0, `owl_dual_norm(g, weights)`; with groups (GrOWL) that of
    the norms of the gradient's groups.

    Raises:
        PenaltyError: As `owl_norm`.

    Example:
        >>> owl_dual_norm(torch.tensor([1.0, -3.0]), [2.0, 1.0])
        tensor(1.5000, dtype=torch.float64)

        The smallest strength at which ½‖Ax − y‖² + strength · Ω(x) is least at x = 0:

        >>> A, y = torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.tensor([1.0, 3.0])
        >>> critical = float(owl_dual_norm(A.T @ (A @ torch.zeros(2) - y), [2.0, 1.0]))
        >>> prox_owl(A.T @ y, [2.0, 1.0], step=1.0001 * critical)
        tensor([0., 0.])
        >>> prox_owl(A.T @ y, [2.0, 1.0], step=0.9999 * critical) > 0
        tensor([True, True])
    """
    if _is_compiling():
        return _uncompiled(owl_dual_norm)(u, weights)
    _check_vectors(u, _U)
    numbers = weights_of(weights, u.shape[-1], "weights")
    ordered = _descending(u, _U)
    if not u.shape[-1] or not numbers[0]:  # the λ are largest first: all are 0, or none of their sums is
        total = ordered.sum(dim=-1)
        return torch.where(total > 0, torch.inf, total)
    small = torch.where(ordered.detach()[..., :1] > HUGE, DOWN, 1.0)
    unit = DOWN if numbers[0] > HUGE else 1.0
    ratios = (ordered * small).cumsum(dim=-1) / torch.from_numpy(np.cumsum(numbers * unit))
    return ratios.amax(dim=-1) * (unit / small[..., 0])


def _descending(x: Tensor, argument: Argument) -> Tensor:
    """Return the magnitudes of every vector of `(…, n)`, float64 on the CPU, largest first; differentiable.

    Raises:
        PenaltyError: If they are not finite.
    """
    if _may_need_derivative(x):
        return derivative.numbers(x, argument).abs().contiguous().sort(dim=-1, descending=True).values
    values = to_array(x)
    check_finite(values.reshape(-1), "entry", argument)
    ordered = np.sort(np.abs(values), axis=-1)[..., ::-1]
    return torch.from_numpy(ordered.astype(np.float64, order="C"))


def _check_vectors(given: Tensor, argument: Argument) -> None:
    check_numbers(given, argument)
    if not given.shape:
        name = argument.name
        raise PenaltyError(
            f"{name}: expected a vector or a batch of vectors, got a single number; use {name}.reshape(1)"
        )


def _may_need_derivative(tensor: Tensor) -> bool:
    """Whether a derivative may be asked for, of which `requires_grad` doesn't tell in forward mode and transforms.

    True as well where torch keeps to itself whether one is at work: then the way that is always right is taken.
    """
    return (
        (tensor.requires_grad and torch.is_grad_enabled())
        or getattr(forward_ad, "_current_level", 0) >= 0
        or _innermost_transform is None
        or _innermost_transform() is not None
    )


_functorch: Any = getattr(cast(Any, torch)._C, "_functorch", None)
_innermost_transform: Any = getattr(_functorch, "peek_interpreter_stack", None)
