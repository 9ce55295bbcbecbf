"""A tensor read along some of its axes, in the order of its memory: groups squared, summed and scaled without a copy.

`torch.linalg.vector_norm(weight, dim=0)` is some 40 times slower on a CPU than `dim=1`: it strides through memory.
Here a dense tensor becomes `(before, kept, after)`, whatever its memory format; what lies before is summed as it comes,
what lies after is a dot product. Both run at the speed of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Squares = NDArray[np.float64]
Numbers = NDArray[np.floating]

SAFE = (1e-24, 1e30)
"""Between these lies the largest of some squares if forming them in float32 has lost nothing that counts."""
_ADDED = (8, 10, 9, 7, 6, 5)
"""So many squares are added up in float32, the first number that divides; the sums of those in float64. Norms are 1e-7
off at most."""
_HELD = 1 << 16
"""Sums in float32 that are held at once."""
_DOT = 1024
"""Length of a dot product in float32; BLAS keeps some 64 partial sums."""
_CONVERTED = 1 << 16
"""Numbers converted to a wider dtype at once: they stay in cache."""
_FEW = 32
"""Groups that lie in memory in pieces shorter than this are read number by number, so that loops stay long."""


def in_memory_order(tensor: Tensor, kept: tuple[int, ...]) -> Tensor | None:
    """Return a view `(A, n, B)` of a tensor: n counts the positions along the kept axes, A and B are the rest.

    None where there is no such view: gaps in memory, or kept axes that are not neighbours there.
    """
    wide = [axis for axis in range(tensor.dim()) if tensor.shape[axis] != 1]
    order = sorted(wide, key=lambda axis: -tensor.stride(axis))
    inside = [place for place, axis in enumerate(order) if axis in kept]
    first, last = (inside[0], inside[-1] + 1) if inside else (0, 0)
    if [axis for axis in wide if axis in kept] != order[first:last]:
        return None
    ones = [axis for axis in range(tensor.dim()) if tensor.shape[axis] == 1]
    ordered = tensor.permute(ones + order)
    if not ordered.is_contiguous():
        return None
    sizes = [tensor.shape[axis] for axis in order]
    return ordered.view(prod(sizes[:first]), prod(sizes[first:last]), prod(sizes[last:]))


def squares(view: Tensor, *, precise: bool = False) -> Tensor:
    """Return Σ w² at each of the n positions of an `(A, n, B)` view that is not empty, over A and B.

    Equal groups give equal sums, bit for bit, wherever they stand: every position is summed in the same order.

    Args:
        view: As `in_memory_order` gives it, any real floating dtype, any device.
        precise: Whether squares are formed in float64, slowly. Without, those of float32 and of 16-bit numbers are
            formed in float32: 1e-19 and less count as 0, 1e19 and more overflow. So do 1e-154 and 1e154 in float64.

    Returns:
        `(n,)` float64 on the same device; the square roots are within 1e-7 of exact ones (float64: 1e-14).

    Example:
        >>> squares(torch.tensor([[[3.0], [0.0]], [[4.0], [2.0]]]))
        tensor([25.,  4.], dtype=torch.float64)
    """
    if view.device.type != "cpu":
        dtype = torch.float64 if precise or view.dtype == torch.float64 else torch.float32
        return torch.linalg.vector_norm(view, dim=(0, 2), dtype=dtype).double().square_()
    with quiet():
        return torch.from_numpy(_squares_in(torch.float64, view) if precise else adder(view)())


def adder(view: Tensor) -> Callable[[], Squares]:
    """Return `squares` of an `(A, n, B)` view on the CPU as a function to call again and again, inside of `quiet`."""
    before, count, after = view.shape
    if view.dtype not in (torch.float32, torch.float64):
        return partial(_squares_in, torch.float32, view)
    if not view.numel():
        return partial(np.zeros, count)
    array = view.numpy()
    if before == 1:
        return partial(_sum_pieces, *_in_pieces(array[0]))
    blocks = _in_blocks(array.reshape(before, count * after))
    return partial(_sum_blocks, *blocks) if after == 1 else partial(_sum_both, after, *blocks)


def quiet() -> np.errstate:
    """Overflow is no warning here: what is not finite is told by name, or squared again in float64."""
    return np.errstate(over="ignore", invalid="ignore")


def squares_anywhere(tensor: Tensor, kept: tuple[int, ...]) -> Tensor:
    """Return `squares` along the kept axes of any tensor: empty, with gaps in memory, tiny or huge.

    Example:
        >>> squares_anywhere(torch.tensor([[3e-30, 0.0], [4e-30, 0.0]]), kept=(1,))
        tensor([2.5000e-59, 0.0000e+00], dtype=torch.float64)
    """
    tensor = tensor.detach()
    count = prod(tensor.shape[axis] for axis in kept)
    if not tensor.numel():
        return torch.zeros(count, dtype=torch.float64, device=tensor.device)
    view = in_memory_order(tensor, kept)
    if view is None:
        view = tensor.movedim(kept, tuple(range(len(kept)))).reshape(1, count, -1)
    total = squares(view)
    return total if SAFE[0] < float(total.max()) < SAFE[1] else squares(view, precise=True)


def _squares_in(dtype: torch.dtype, view: Tensor) -> Squares:
    """Return `squares` of a view converted to a wider dtype, piece by piece."""
    before, count, after = view.shape
    if before == 1 and count > 1:
        pieces = view.split(max(1, _CONVERTED // max(1, after)), dim=1)
        return np.concatenate([adder(piece.to(dtype))() for piece in pieces])
    rows = view.reshape(-1, 1, 1) if count == 1 else view
    total = np.zeros(count)
    for piece in rows.split(max(1, _CONVERTED // max(1, rows.stride(0)))):
        total += adder(piece.to(dtype))()
    return total


def finer(view: Tensor) -> tuple[Tensor, int]:
    """Return an `(A, n, B)` view as `(A, n · B, 1)`, and B, where B is so small that loops over it would be short."""
    before, count, after = view.shape
    if before > 1 and 1 < after < _FEW:
        return view.view(before, count * after, 1), after
    return view, 1


def scaled(view: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of an `(A, n, B)` tensor and of its `(n,)` factors that multiply fast; first make it `finer`."""
    if len(view) == 1:
        return view[0], factors[:, None]
    return (view[:, :, 0], factors) if view.shape[2] == 1 else (view, factors[:, None])


def broadcast(tensor: Tensor, kept: tuple[int, ...], factors: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of any tensor and of its `(n,)` factors, n along the kept axes, that multiply."""
    moved = tensor.movedim(kept, tuple(range(len(kept))))
    return moved, factors.view(*moved.shape[: len(kept)], *[1] * (moved.dim() - len(kept)))


def multiply_(views: list[Tensor], factors: list[Tensor], *, some_are_zero: bool) -> None:
    """Multiply views by what `scaled` and `broadcast` gave for them, in place; zeros come out as 0.0, never as −0.0."""
    if views:
        torch._foreach_mul_(views, factors)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        if some_are_zero:
            torch._foreach_add_(views, 0.0)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


def _in_blocks(matrix: Numbers) -> tuple[list[Numbers], Numbers]:
    """Return an `(A, m)` matrix as blocks `(k, added, m)`, and what is left over of A."""
    added = next((number for number in _ADDED if len(matrix) % number == 0), _ADDED[0])
    whole = len(matrix) - len(matrix) % added
    rows = added * max(1, _HELD // matrix.shape[1])
    cut = [matrix[start : min(start + rows, whole)] for start in range(0, whole, rows)]
    return [block.reshape(-1, added, matrix.shape[1]) for block in cut], matrix[whole:]


def _sum_blocks(blocks: list[Numbers], rest: Numbers) -> Squares:
    """Return the squares of an `(A, m)` matrix summed over A."""
    total = None
    for block in blocks:
        own = np.add.reduce(np.einsum("kij,kij->kj", block, block), axis=0, dtype=np.float64)
        total = own if total is None else np.add(total, own, out=total)
    if len(rest):
        own = np.einsum("ij,ij->j", rest, rest).astype(np.float64)
        total = own if total is None else total + own
    return np.zeros(rest.shape[1]) if total is None else total


def _sum_both(after: int, blocks: list[Numbers], rest: Numbers) -> Squares:
    """Return the squares of an `(A, n · B)` matrix summed over A and B."""
    return _sum_blocks(blocks, rest).reshape(-1, after).sum(axis=1)


def _in_pieces(matrix: Numbers) -> tuple[Numbers, Numbers]:
    """Return an `(n, B)` matrix as `(n, k, L)` pieces, and what is left over of B."""
    length = _dot_length(matrix.shape[1])
    whole = matrix.shape[1] - matrix.shape[1] % max(1, length)
    return matrix[:, :whole].reshape(len(matrix), whole // max(1, length), length), matrix[:, whole:]


def _sum_pieces(pieces: Numbers, rest: Numbers) -> Squares:
    """Return the squares of an `(n, B)` matrix summed over B."""
    parts = np.vecdot(pieces, pieces)
    total = parts[:, 0].astype(np.float64)
    for part in range(1, parts.shape[1]):  # a sum over so short an axis takes ten times as long
        total += parts[:, part]
    return total + np.vecdot(rest, rest) if rest.size else total


@lru_cache
def _dot_length(size: int) -> int:
    """Return into what pieces to cut so many numbers: equal ones if possible, for then memory is read in one go."""
    if size <= _DOT:
        return size
    return next((size // parts for parts in range(-(-size // _DOT), size // 64) if size % parts == 0), _DOT)
