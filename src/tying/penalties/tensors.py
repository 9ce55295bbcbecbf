"""Tensors as checked NumPy numbers, and back: what the proxes and norms compute with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tying.errors import PenaltyError
from tying.groups import group_norms
from tying.penalties.arrays import Vector


def to_vector(tensor: Tensor) -> Vector:
    """Return a tensor's entries as `(n,)` float64.

    Raises:
        PenaltyError: If they are not real floating numbers, or not finite.
    """
    check_floating(tensor)
    values = tensor.detach().reshape(-1).to("cpu", torch.float64).numpy()
    check_finite(values, "entry")
    return values


def from_vector(values: Vector, like: Tensor) -> Tensor:
    """Return `(n,)` new values as a tensor of the shape, dtype and device of another one."""
    return one_zero(torch.from_numpy(values).reshape(like.shape).to(like.device, like.dtype))


def to_array(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor as an array of its shape, C-contiguous: float64 from float64, float32 from all shorter ones.

    Raises:
        PenaltyError: If they are not real floating numbers. Whether they are finite is not looked at.
    """
    check_floating(tensor)
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to("cpu", dtype).resolve_neg().contiguous().numpy()


def finite_norms(matrix: Tensor) -> Vector:
    """Return the norms of the groups of a `(G, D)` matrix as `(G,)` float64.

    Raises:
        PenaltyError: If it is not a matrix of real floating numbers, or not finite.
    """
    check_matrix(matrix)
    norms = group_norms(matrix).cpu().numpy()
    check_finite(norms, "group")
    return norms


def rescale_groups(matrix: Tensor, norms: Vector, wanted: Vector) -> Tensor:
    """Return the matrix with every group's norm changed from `norms` to `wanted`, both `(G,)`; 0 ÷ 0 is 0."""
    factors = np.divide(wanted, norms, out=np.zeros_like(norms), where=norms > 0)
    precise = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    factor = torch.from_numpy(factors).to(matrix.device, precise)
    return one_zero((matrix.detach() * factor[:, None]).to(matrix.dtype))


def one_zero(fresh: Tensor) -> Tensor:
    """Make every −0.0 of a tensor of one's own 0.0, in place, so that equal numbers are equal bit for bit."""
    return fresh.add_(0.0)


def check_floating(tensor: Tensor) -> None:
    """Raise `PenaltyError` if a tensor's numbers are not real floating ones."""
    if not tensor.dtype.is_floating_point:
        raise PenaltyError(
            f"matrix: expected real floating-point weights, got {tensor.dtype}; leave this parameter without a penalty"
        )


def check_matrix(tensor: Tensor) -> None:
    """Raise `PenaltyError` if a tensor is not a matrix of real floating numbers."""
    check_floating(tensor)
    if tensor.dim() != 2:
        raise PenaltyError(f"matrix: expected shape (G, D), got {tuple(tensor.shape)}; read it through Groups")


def check_finite(values: NDArray[Any], what: str) -> None:
    """Raise `PenaltyError` if one of `(n,)` numbers is not finite; `what` says what each stands for."""
    if not np.isfinite(values).all():
        where = np.flatnonzero(~np.isfinite(values))
        raise PenaltyError(
            f"matrix: expected finite weights, got NaN or infinity in {len(where)} of {len(values)}, first at {what} "
            f"{where[0]}; training has diverged: lower the learning rate, or start again from a checkpoint"
        )
