"""Tensors as checked NumPy numbers, and back: what the proxes and norms compute with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tying.errors import PenaltyError
from tying.groups import group_norms
from tying.penalties.arrays import Vector

_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Argument:
    """What a message calls a tensor of somebody's: a name, what its numbers are, and what helps.

    Attributes:
        name: Of the parameter.
        numbers: What it holds.
        if_not_real: What to do where the dtype is none that a prox is known for.
        if_not_finite: What to do where a number is NaN or infinite.
    """

    name: str
    numbers: str
    if_not_real: str
    if_not_finite: str


TRAINED = Argument(
    "matrix",
    "weights",
    "leave this parameter without a penalty",
    "training has diverged: lower the learning rate, or start again from a checkpoint",
)


def passed(name: str) -> Argument:
    """Return what to call an argument of a function that people call themselves."""
    return Argument(
        name, "numbers", f"pass real numbers, as {name}.float()", "look for a step that is too long, or a division by 0"
    )


def to_vector(tensor: Tensor, argument: Argument = TRAINED) -> Vector:
    """Return a tensor's entries as `(n,)` float64.

    Raises:
        PenaltyError: If they are not real floating numbers, or not finite.
    """
    check_numbers(tensor, argument)
    values = tensor.detach().reshape(-1).to("cpu", torch.float64).numpy()
    check_finite(values, "entry", argument)
    return values


def from_vector(values: Vector, like: Tensor) -> Tensor:
    """Return `(n,)` new values as a tensor of the shape, dtype and device of another one."""
    return one_zero(torch.from_numpy(values).reshape(like.shape).to(like.device, like.dtype))


def to_array(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor as an array of its shape, C-contiguous: float64 from float64, float32 from all shorter ones.

    Nothing is checked here. The array may share the tensor's memory.
    """
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to("cpu", dtype).resolve_neg().contiguous().numpy()


def finite_norms(matrix: Tensor, argument: Argument = TRAINED) -> Vector:
    """Return the norms of the groups of a `(G, D)` matrix as `(G,)` float64.

    Raises:
        PenaltyError: If it is not a matrix of real floating numbers, or not finite, or a norm exceeds float64.
    """
    check_matrix(matrix, argument)
    norms = precise_norms(matrix).cpu().numpy()
    if not np.isfinite(norms).all():
        where = np.flatnonzero(~np.isfinite(norms))
        if matrix.detach()[torch.from_numpy(where).to(matrix.device)].isfinite().all():
            raise PenaltyError(
                f"{argument.name}: expected norms of groups below 1.8e308, got more at group {where[0]}; "
                f"divide the {argument.numbers} and the step by the same number"
            )
    check_finite(norms, "group", argument)
    return norms


def precise_norms(matrix: Tensor) -> Tensor:
    """Return `group_norms`, those of float64 numbers whose squares would overflow, or underflow, in other units.

    Example:
        >>> found = precise_norms(torch.tensor([[3e200, 4e200], [3e-200, 0.0]], dtype=torch.float64))
        >>> [f"{norm:.3g}" for norm in found.tolist()]
        ['5e+200', '3e-200']
    """
    found = group_norms(matrix)
    if matrix.dtype == torch.float64:
        for beyond, unit in ((~(found < 2.0**500), 2.0**600), (found < 2.0**-450, 2.0**-600)):
            if bool(beyond.any()):
                found[beyond] = group_norms(matrix.detach()[beyond] / unit) * unit
    return found


def rescale_groups(matrix: Tensor, norms: Vector, wanted: Vector) -> Tensor:
    """Return the matrix with every group's norm changed from `norms` to `wanted`, both `(G,)`; 0 ÷ 0 is 0."""
    factors = np.divide(wanted, norms, out=np.zeros_like(norms), where=norms > 0)
    precise = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    factor = torch.from_numpy(factors).to(matrix.device, precise)
    return one_zero((matrix.detach() * factor[:, None]).to(matrix.dtype))


def one_zero(fresh: Tensor) -> Tensor:
    """Make every −0.0 of a tensor of one's own 0.0, in place, so that equal numbers are equal bit for bit."""
    return fresh.add_(0.0)


def check_numbers(given: object, argument: Argument = TRAINED) -> None:
    """Raise `PenaltyError` if something is not a tensor that holds all its numbers, real floating ones."""
    name = argument.name
    if not isinstance(given, Tensor):
        raise PenaltyError(f"{name}: expected a tensor, got {type(given).__name__}; use torch.as_tensor")
    kind = cast("type[Any]", type(given))
    if kind.__torch_dispatch__ is not cast(Any, Tensor).__torch_dispatch__:
        raise PenaltyError(
            f"{name}: expected a plain tensor, with all its numbers, got {kind.__name__}; "
            "gather it first, a DTensor with full_tensor()"
        )
    if given.is_meta:
        raise PenaltyError(f"{name}: expected numbers, got a tensor on the meta device; load the weights first")
    if given.layout != torch.strided:
        raise PenaltyError(f"{name}: expected a dense tensor, got {given.layout}; use to_dense()")
    check_floating(given, argument)


def check_floating(tensor: Tensor, argument: Argument = TRAINED) -> None:
    """Raise `PenaltyError` if a tensor's numbers are not real floating ones of at least 16 bits."""
    if tensor.dtype not in _REAL:
        wide = " of 16 bits or more" if tensor.dtype.is_floating_point else ""
        remedy = argument.if_not_real
        if tensor.is_complex() and argument is not TRAINED:
            remedy = "pass magnitudes, or real and imaginary parts"
        raise PenaltyError(
            f"{argument.name}: expected real floating-point {argument.numbers}{wide}, got {tensor.dtype}; {remedy}"
        )


def check_matrix(tensor: object, argument: Argument = TRAINED) -> None:
    """Raise `PenaltyError` if a tensor is not a matrix of real floating numbers."""
    check_numbers(tensor, argument)
    shape = tuple(cast(Tensor, tensor).shape)
    if len(shape) != 2:
        raise PenaltyError(f"{argument.name}: expected shape (G, D), got {shape}; read it through Groups")


def check_finite(values: NDArray[Any], what: str, argument: Argument = TRAINED) -> None:
    """Raise `PenaltyError` if one of `(n,)` numbers is not finite; `what` says what each stands for."""
    if not np.isfinite(values).all():
        where = np.flatnonzero(~np.isfinite(values))
        raise PenaltyError(
            f"{argument.name}: expected finite {argument.numbers}, got NaN or infinity in {len(where)} of "
            f"{len(values)}, first at {what} {where[0]}; {argument.if_not_finite}"
        )
