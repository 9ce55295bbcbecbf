"""The derivatives of the proxes: what `torch.autograd` and `torch.func` ask for, in both directions and any order.

The prox of the sorted-L1 norm is piecewise linear. Around a vector at which it is differentiable it averages, with
signs, within the blocks that are pooled, and is constant where the result is zero: a symmetric matrix J. So one product
serves the backward and the forward mode, and the second derivative with respect to the vector is zero. At a kink (two
blocks about to be pooled, a block about to vanish) it is one of the limits of J from nearby. J is found anew from the
vector when a derivative is asked for, so nothing is kept and the prox alone costs nothing more.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import Function

from tying.penalties.arrays import Vector
from tying.penalties.sorted_l1 import NotFiniteError, pooled, shrink_vectors
from tying.penalties.tensors import Argument, check_finite, finite_norms, one_zero, to_array

Dims = tuple[int | None, ...]


def prox(v: Tensor, thresholds: Vector, argument: Argument) -> Tensor:
    """Return the prox of every vector of `(…, n)`, differentiable with respect to v.

    Raises:
        PenaltyError: If v, called as the argument says, is not finite.
    """
    return cast(Tensor, _Prox.apply(v, thresholds, argument))


def norms(matrix: Tensor, argument: Argument) -> Tensor:
    """Return the norms of every matrix of `(…, G, D)`, float64, differentiable; at a zero group the derivative is zero.

    Raises:
        PenaltyError: If the matrix, called as the argument says, is not finite.
    """
    return cast(Tensor, _Norms.apply(matrix, argument))


def numbers(x: Tensor, argument: Argument) -> Tensor:
    """Return a copy in float64 on the CPU, differentiable.

    Raises:
        PenaltyError: If x, called as the argument says, is not finite.
    """
    return cast(Tensor, _Numbers.apply(x, argument))


@np.errstate(all="ignore")  # what underflows is 0
def solve(v: Tensor, thresholds: Vector, argument: Argument) -> Tensor:
    """Return the prox of every vector of `(…, n)`, a new tensor of the same dtype and device, not differentiable.

    Raises:
        PenaltyError: If v, called as the argument says, is not finite.
    """
    values = to_array(v)
    try:
        shrunk = shrink_vectors(values, thresholds)
    except NotFiniteError:
        check_finite(values.reshape(-1), "entry", argument)
        raise
    return one_zero(torch.from_numpy(shrunk).to(v.device, v.dtype))


class _Prox(Function):
    @staticmethod
    def forward(v: Tensor, thresholds: Vector, argument: Argument) -> Tensor:
        return solve(v, thresholds, argument)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.thresholds = inputs[1]
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Product.apply(ctx.saved_tensors[0], grads[0], ctx.thresholds), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Product.apply(ctx.saved_tensors[0], tangents[0], ctx.thresholds)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Any, int]:
        return _Prox.apply(_batched(args[0], in_dims[0], info.batch_size), *args[1:]), 0


class _Product(Function):
    """J · u, J being that of the prox at v."""

    @staticmethod
    def forward(v: Tensor, u: Tensor, thresholds: Vector) -> Tensor:
        vectors, factors = to_array(v), to_array(u).astype(np.float64)
        products = np.empty_like(factors)
        for index in np.ndindex(vectors.shape[:-1]):
            products[index] = _product(vectors[index], factors[index], thresholds)
        return torch.from_numpy(products).to(u.device, u.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.thresholds = inputs[2]
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, _Product.apply(ctx.saved_tensors[0], grads[0], ctx.thresholds), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Product.apply(ctx.saved_tensors[0], tangents[1], ctx.thresholds)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Any, int]:
        batched = [_batched(args[i], in_dims[i], info.batch_size) for i in (0, 1)]
        return _Product.apply(*batched, args[2]), 0


class _Norms(Function):
    @staticmethod
    def forward(matrix: Tensor, argument: Argument) -> Tensor:
        flat = matrix.detach().reshape(matrix.shape[:-1].numel(), matrix.shape[-1])
        return torch.from_numpy(finite_norms(flat, argument)).to(matrix.device).reshape(matrix.shape[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.argument = inputs[1]
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        matrix = ctx.saved_tensors[0]
        return (_directions(matrix, ctx.argument) * grads[0][..., None]).to(matrix.dtype), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return (_directions(ctx.saved_tensors[0], ctx.argument) * tangents[0]).sum(dim=-1)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Any, int]:
        return _Norms.apply(_batched(args[0], in_dims[0], info.batch_size), args[1]), 0


class _Numbers(Function):
    @staticmethod
    def forward(x: Tensor, argument: Argument) -> Tensor:
        found = x.detach().to("cpu", torch.float64, copy=True)
        check_finite(found.reshape(-1).numpy(), "entry", argument)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.device, ctx.dtype = inputs[0].device, inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].to(ctx.device, ctx.dtype), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[0].to("cpu", torch.float64, copy=True)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Any, int]:
        return _Numbers.apply(_batched(args[0], in_dims[0], info.batch_size), args[1]), 0


def _product(vector: NDArray[Any], factor: Vector, thresholds: Vector) -> Vector:
    labels, signs = pooled(vector, thresholds)
    signed = signs * factor
    means = np.bincount(labels, signed) / np.bincount(labels)
    return signs * means[labels] if len(labels) else signed


def _directions(matrix: Tensor, argument: Argument) -> Tensor:
    """Return every group ÷ its norm, float64, 0 where that is 0; differentiable."""
    lengths = norms(matrix, argument)[..., None]
    return matrix.double() / torch.where(lengths > 0, lengths, 1.0)


def _batched(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Return a tensor of a batch with the batch in front; one that is the same for all, expanded."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
