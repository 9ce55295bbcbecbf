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
        if _few_in_images(x, dim, classes):
            return functional.conv2d(x, _zeros_and_ones(x, targets, kept, classes, x.shape[1]))
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


def expand_by_label(sums: Tensor, dim: int, kept: Tensor, targets: Tensor, inputs: int) -> Tensor:
    """Give every input its label's entry, zero where it is not read: `(…, K, …)` → `(…, G, …)`, undoing no sum.

    The transpose of `sum_by_label`: its gradient, and what makes a small weight wide.

    Example:
        >>> expand_by_label(torch.tensor([[5.0, 7.0]]), 1, torch.tensor([0, 3, 1]), torch.tensor([0, 0, 1]), 4)
        tensor([[5., 7., 0., 5.]])
    """
    if _side_by_side(sums, dim) and _few_in_images(sums, dim, sums.shape[dim]):
        return functional.conv2d(sums, _zeros_and_ones(sums, kept, targets, inputs, sums.shape[1]))
    if len(kept) == inputs:
        return select(sums, dim, torch.empty_like(targets).index_copy(0, kept, targets))
    read = select(sums, dim, targets)
    shape = list(sums.shape)
    shape[dim] = inputs
    return read.new_zeros(shape).index_copy(dim, kept, read)


def nothing_transforms() -> bool:
    """Whether operations are computed here and now: nothing compiles, traces or maps them, or derives forwards."""
    return (
        forward_ad._current_level < 0  # pyright: ignore[reportPrivateUsage]
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        and not torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    )


def runs_at_once(x: Tensor) -> bool:
    """Whether a tensor on a CPU is computed with here and now, and without gradients."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and nothing_transforms()


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


def _few_in_images(x: Tensor, dim: int, classes: int) -> bool:
    return x.dim() == 4 and dim == 1 and classes <= MOST_SUMS.get(x.dtype, 0)


def _zeros_and_ones(like: Tensor, rows: Tensor, columns: Tensor, outputs: int, inputs: int) -> Tensor:
    """A 1 × 1 convolution's weight with these ones."""
    ones = like.new_zeros((outputs, inputs, 1, 1))
    ones[rows, columns] = 1
    return ones


def _gathered(x: Tensor, dim: int, kept: Tensor) -> Tensor:
    rows = x.movedim(dim, -1)
    return rows.gather(-1, kept.expand(*rows.shape[:-1], -1))


def _in_slices(x: Tensor, dim: int) -> bool:
    """Whether whole slices can be summed: `embedding_bag` has a slow gradient, and takes no complex numbers."""
    plain = runs_at_once(x) and x.is_floating_point() and x.is_contiguous()
    return plain and x.numel() > 0 and x.stride(dim) >= SMALLEST_SLICE


def _sums_of_slices(x: Tensor, dim: int, kept: Tensor, targets: Tensor, classes: int) -> Tensor:
    before, after = x.shape[:dim], x.shape[dim + 1 :]
    count, inputs = before.numel(), x.shape[dim]
    starts = torch.searchsorted(targets, torch.arange(classes))
    if count > 1:
        sample = torch.arange(count).unsqueeze(1)
        kept, starts = (sample * inputs + kept).flatten(), (sample * len(kept) + starts).flatten()
    sums = functional.embedding_bag(kept, x.view(count * inputs, after.numel()), starts, mode="sum")
    return sums.view(*before, classes, *after)
