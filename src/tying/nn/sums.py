"""The inputs of each label summed along one axis: four ways, each the fastest for one layout of the input in memory.

All give `s_k = Σ_{i: label(i)=k} x_i`; they differ in rounding only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

SMALLEST_SLICE = 8
"""Numbers per input, one after another in memory, from which on adding whole slices pays."""
MOST_SUMS = {torch.float32: 48, torch.bfloat16: 256, torch.float16: 256}
"""Labels up to which a product with zeros and ones is faster than adding what lies side by side, by type."""


def sum_by_label(x: Tensor, dim: int, kept: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Sum the inputs of each label along `dim`, in the way that suits the layout: `(…, G, …)` → `(…, K, …)`.

    - Inputs that lie as whole slices in memory (NCHW) on a CPU, without gradients: every sum is one pass over its
      slices (`embedding_bag`), which writes each result once. 16-bit types are summed in float32 and rounded once.
    - Inputs that lie side by side in memory (the last axis; `channels_last`) on a CPU: `gather` and `scatter_add` row
      by row, which keep the layout. Images with few labels: a 1 × 1 convolution with zeros and ones.
    - Everything else: `index_select` and `index_add`, which the compilers and the exporters know best.

    Args:
        x: Floating point.
        dim: ≥ 0; the axis of the G inputs.
        kept: `(R,)` int64, the inputs that are read, sorted by their label.
        targets: `(R,)` int64, their labels, 0 … K−1, ascending.
        classes: K.

    Example:
        >>> x = torch.arange(12.0).view(1, 4, 3)
        >>> sum_by_label(x, 1, torch.tensor([0, 3, 1]), torch.tensor([0, 0, 1]), 2)
        tensor([[[ 9., 11., 13.],
                 [ 3.,  4.,  5.]]])
    """
    if _side_by_side(x, dim):
        if x.dim() == 4 and dim == 1 and classes <= MOST_SUMS.get(x.dtype, 0):
            return _product(x, kept, targets, classes)
        read = _gathered(x, dim, kept)
        sums = read.new_zeros((*read.shape[:-1], classes)).scatter_add(-1, targets.expand_as(read), read)
        return sums.movedim(-1, dim)
    if _in_slices(x, dim):
        return _sums_of_slices(x, dim, kept, targets, classes)
    shape = list(x.shape)
    shape[dim] = classes
    return x.new_zeros(shape).index_add(dim, targets, x.index_select(dim, kept))


def select(x: Tensor, dim: int, kept: Tensor) -> Tensor:
    """Return the inputs that are read, in the layout of `x`: `(…, G, …)` → `(…, R, …)`."""
    if _side_by_side(x, dim):
        return _gathered(x, dim, kept).movedim(-1, dim)
    return x.index_select(dim, kept)


def runs_at_once(x: Tensor) -> bool:
    """Whether a plain tensor on a CPU is computed with here and now: nothing derives, compiles, traces or maps it."""
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and forward_ad._current_level < 0  # pyright: ignore[reportPrivateUsage]
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    )


def _side_by_side(x: Tensor, dim: int) -> bool:
    """Whether the axis is the one whose neighbours are neighbours in memory, and the rows are many."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and x.numel() > x.shape[dim]
        and x.shape[dim] > 1
        and x.stride(dim) == 1
        and x.movedim(dim, -1).is_contiguous()
    )


def _product(x: Tensor, kept: Tensor, targets: Tensor, classes: int) -> Tensor:
    ones = x.new_zeros((classes, x.shape[1], 1, 1))
    ones[targets, kept] = 1
    return functional.conv2d(x, ones)


def _gathered(x: Tensor, dim: int, kept: Tensor) -> Tensor:
    rows = x.movedim(dim, -1)
    return rows.gather(-1, kept.expand(*rows.shape[:-1], -1))


def _in_slices(x: Tensor, dim: int) -> bool:
    """Whether whole slices can be summed: `embedding_bag` has no forward derivative and a slow gradient."""
    return runs_at_once(x) and x.is_contiguous() and x.numel() > 0 and x.stride(dim) >= SMALLEST_SLICE


def _sums_of_slices(x: Tensor, dim: int, kept: Tensor, targets: Tensor, classes: int) -> Tensor:
    before, after = x.shape[:dim], x.shape[dim + 1 :]
    count, inputs = before.numel(), x.shape[dim]
    starts = torch.searchsorted(targets, torch.arange(classes))
    if count > 1:
        sample = torch.arange(count).unsqueeze(1)
        kept, starts = (sample * inputs + kept).flatten(), (sample * len(kept) + starts).flatten()
    sums = functional.embedding_bag(kept, x.view(count * inputs, after.numel()), starts, mode="sum")
    return sums.view(*before, classes, *after)
