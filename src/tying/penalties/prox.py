"""The sorted-L1 (OWL, SLOPE) norm, its dual norm and its prox, on vectors and on groups.

Ω(x) = Σ_i λ_i |x|_[i], with |x|_[1] ≥ |x|_[2] ≥ … and λ_1 ≥ … ≥ λ_n ≥ 0. Everything is computed in float64 on the CPU.
Sources: Bogdan et al., arXiv 1407.3824; Zeng & Figueiredo, arXiv 1409.4271; on groups: Oswal et al., ICML 2016.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tying.errors import PenaltyError
from tying.groups import group_norms
from tying.penalties.sequences import SequenceLike, check_not_negative, weights

Vector = NDArray[np.float64]


def prox_owl(v: Tensor, sequence: SequenceLike, step: float = 1.0) -> Tensor:
    """Return argmin_x ½‖x − v‖² + step · Σ_i λ_i |x|_[i].

    Entries of equal magnitude come out with equal magnitude, bit for bit, and so do entries pooled together.

    Args:
        v: Any shape, any real floating dtype; not differentiated through.
        sequence: The λ: a sequence, or as many numbers as `v` has, largest first.
        step: ≥ 0.

    Returns:
        A new tensor: shape, dtype and device of `v`, rounded once from float64.

    Raises:
        PenaltyError: If `v` is not finite, or the weights or the step are not as described.

    Example:
        >>> prox_owl(torch.tensor([-4.0, 1.0, 3.5]), [2.0, 1.0, 0.0])
        tensor([-2.2500,  1.0000,  2.2500])
    """
    values = to_vector(v)
    shrunk = sorted_l1_prox(values, check_not_negative("step", step) * weights(sequence, len(values)))
    return from_vector(shrunk, v)


def prox_growl(matrix: Tensor, sequence: SequenceLike, step: float = 1.0) -> Tensor:
    """Return argmin_X ½‖X − V‖² + step · Σ_i λ_i ‖X‖_[i], the norms of the groups sorted, largest first.

    The norms r of the groups become q = prox_owl(r), and group g becomes V_g · q_g / r_g (0 where r_g = 0). Equal
    groups come out equal bit for bit; the norms of groups pooled together are equal to the rounding of the dtype.

    Args:
        matrix: V, `(G, D)`, any real floating dtype; not differentiated through.
        sequence: The λ: a sequence, or G numbers, largest first.
        step: ≥ 0.

    Returns:
        A new tensor: shape, dtype, device and memory layout of `matrix`.

    Raises:
        PenaltyError: If the matrix is not finite, or the weights or the step are not as described.

    Example:
        >>> prox_growl(torch.tensor([[3.0, 4.0], [0.0, 4.0]]), [2.0, 0.0])
        tensor([[2.1000, 2.8000],
                [0.0000, 3.5000]])
    """
    norms = finite_norms(matrix)
    shrunk = sorted_l1_prox(norms, check_not_negative("step", step) * weights(sequence, len(norms)))
    return rescale_groups(matrix, norms, shrunk)


def owl_norm(x: Tensor, sequence: SequenceLike) -> Tensor:
    """Return Σ_i λ_i |x|_[i], a float64 scalar on the CPU.

    Example:
        >>> owl_norm(torch.tensor([1.0, -3.0]), [2.0, 1.0])
        tensor(7., dtype=torch.float64)
    """
    magnitudes = np.sort(np.abs(to_vector(x)))[::-1]
    return torch.tensor(float(magnitudes @ weights(sequence, len(magnitudes))), dtype=torch.float64)


def owl_dual_norm(u: Tensor, sequence: SequenceLike) -> Tensor:
    """Return max_k Σ_{i≤k} |u|_[i] ÷ Σ_{i≤k} λ_i, a float64 scalar on the CPU; infinite where the penalty is 0.

    `prox_owl(u)` is zero if and only if this is ≤ 1.

    Example:
        >>> owl_dual_norm(torch.tensor([1.0, -3.0]), [2.0, 1.0])
        tensor(1.5000, dtype=torch.float64)
    """
    magnitudes = np.sort(np.abs(to_vector(u)))[::-1]
    loads, limits = np.cumsum(magnitudes), np.cumsum(weights(sequence, len(magnitudes)))
    ratios = np.divide(loads, limits, out=np.where(loads > 0, np.inf, 0.0), where=limits > 0)
    return torch.tensor(float(ratios.max(initial=0.0)), dtype=torch.float64)


def sorted_l1_prox(values: Vector, thresholds: Vector) -> Vector:
    """Return the prox at `(n,)` finite values for `(n,)` checked weights, step included: the kernel.

    Sorted magnitudes less the weights, made non-increasing by averaging neighbours, clipped at zero. Magnitudes that
    are equal enter the regression as one point with a multiplicity, so that rounding can't tell them apart.
    """
    from scipy.optimize import isotonic_regression

    if not len(values):
        return values.copy()
    magnitudes = np.abs(values)
    order = np.argsort(magnitudes)[::-1]
    ordered = magnitudes[order]
    edges = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
    starts, times = edges[:-1], edges[1:] - edges[:-1]
    lowered = ordered[starts] - np.add.reduceat(thresholds, starts) / times
    fitted = cast(Vector, isotonic_regression(lowered, weights=times, increasing=False).x)
    result = np.empty_like(magnitudes)
    result[order] = np.repeat(np.maximum(fitted, 0.0), times)
    return np.copysign(result, values)


def rescale_groups(matrix: Tensor, norms: Vector, wanted: Vector) -> Tensor:
    """Return the matrix with every group's norm changed from `norms` to `wanted`, both `(G,)`; 0 ÷ 0 is 0."""
    factors = np.divide(wanted, norms, out=np.zeros_like(norms), where=norms > 0)
    precise = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    factor = torch.from_numpy(factors).to(matrix.device, precise)
    return one_zero((matrix.detach() * factor[:, None]).to(matrix.dtype))


def one_zero(fresh: Tensor) -> Tensor:
    """Make every −0.0 of a tensor of one's own 0.0, in place, so that equal numbers are equal bit for bit."""
    return fresh.add_(0.0)


def to_vector(tensor: Tensor) -> Vector:
    """Return a tensor's entries as `(n,)` float64.

    Raises:
        PenaltyError: If they are not real floating numbers, or not finite.
    """
    _check_floating(tensor)
    values = tensor.detach().reshape(-1).to("cpu", torch.float64).numpy()
    check_finite(values, "entry")
    return values


def from_vector(values: Vector, like: Tensor) -> Tensor:
    """Return `(n,)` new values as a tensor of the shape, dtype and device of another one."""
    return one_zero(torch.from_numpy(values).reshape(like.shape).to(like.device, like.dtype))


def finite_norms(matrix: Tensor) -> Vector:
    """Return the norms of the groups of a `(G, D)` matrix as `(G,)` float64.

    Raises:
        PenaltyError: If it is not a matrix of real floating numbers, or not finite.
    """
    _check_floating(matrix)
    if matrix.dim() != 2:
        raise PenaltyError(f"matrix: expected shape (G, D), got {tuple(matrix.shape)}; read it through Groups")
    norms = group_norms(matrix).cpu().numpy()
    check_finite(norms, "group")
    return norms


def _check_floating(tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise PenaltyError(
            f"matrix: expected real floating-point weights, got {tensor.dtype}; leave this parameter without a penalty"
        )


def check_finite(values: Vector, what: str) -> None:
    """Raise `PenaltyError` if one of `(n,)` numbers is not finite; `what` says what each stands for."""
    if not np.isfinite(values).all():
        where = np.flatnonzero(~np.isfinite(values))
        raise PenaltyError(
            f"matrix: expected finite weights, got NaN or infinity in {len(where)} of {len(values)}, first at {what} "
            f"{where[0]}; training has diverged: lower the learning rate, or start again from a checkpoint"
        )
