"""The product of a tied layer: what it reads is a function of its input, so that only the input waits for its gradient.

Autograd would keep the sums of the inputs (and what was added up) or the widened weight from the forward pass to the
backward pass, beside an input that whoever made it keeps as a rule (ReLU does). Here both are made anew from the input
and the stored weight, which are what the dense layer keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import functional

from tying.nn.sums import nothing_transforms, select, spread, sum_by_label

Way: TypeAlias = Literal["sum", "select", "dense"]
Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]
Wanted: TypeAlias = tuple[bool, bool, bool]


class Product(Protocol):
    """A product of what is read with a weight that has a column for each, and its gradients."""

    def __call__(self, read: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product."""
        ...

    def gradients(self, gradient: Tensor, read: Tensor, columns: Tensor, wanted: Wanted) -> Gradients:
        """Return the gradients that are wanted."""
        ...


@dataclass(frozen=True)
class Reading:
    """Which inputs a layer reads and how: `dim` is their axis, `kept` and `targets` as `sum_by_label` takes them."""

    way: Way
    dim: int
    kept: Tensor
    targets: Tensor

    def operands(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What the product takes: the inputs as the way has it, and the weight with as many columns."""
        if self.way == "sum":
            return self.sums(x, weight.shape[1]), weight
        if self._selects(x.shape[self.dim]):
            return select(x, self.dim, self.kept), weight.index_select(1, self.targets)
        return x, spread(weight, 1, self.kept, self.targets, x.shape[self.dim])

    def sums(self, x: Tensor, classes: int) -> Tensor:
        """Sum the inputs of each of so many labels: `(…, G, …)` → `(…, K, …)`."""
        if classes == self.kept.shape[0]:
            return x if classes == x.shape[self.dim] else select(x, self.dim, self.kept)
        return sum_by_label(x, self.dim, self.kept, self.targets, classes)

    def back_to_inputs(self, gradient: Tensor, inputs: int) -> Tensor:
        """The gradient of x from that of what was read."""
        if self.way == "sum":
            return spread(gradient, self.dim, self.kept, self.targets, inputs)
        each = torch.arange(len(self.kept), device=self.kept.device)
        return spread(gradient, self.dim, self.kept, each, inputs) if self._selects(inputs) else gradient

    def back_to_weight(self, gradient: Tensor, classes: int, inputs: int) -> Tensor:
        """The gradient of the stored weight from that of the product's."""
        if self.way == "sum":
            return gradient
        each = torch.arange(len(self.kept), device=self.kept.device)
        return sum_by_label(gradient, 1, each if self._selects(inputs) else self.kept, self.targets, classes)

    def _selects(self, inputs: int) -> bool:
        return self.way == "select" and len(self.kept) < inputs


@dataclass(frozen=True)
class Multiply:
    """`torch.nn.functional.linear`."""

    def __call__(self, read: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
        """Return `read · columnsᵀ + bias`."""
        return functional.linear(read, columns, bias)

    def gradients(self, gradient: Tensor, read: Tensor, columns: Tensor, wanted: Wanted) -> Gradients:
        """Return the gradients that are wanted, of read, columns and bias."""
        rows = gradient.reshape(-1, columns.shape[0])
        return (
            gradient @ columns if wanted[0] else None,
            rows.t() @ read.reshape(-1, columns.shape[1]) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )


@dataclass(frozen=True)
class Convolve:
    """`torch.nn.functional.conv1d`, `conv2d` or `conv3d`, whichever the weight is for."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]

    def __call__(self, read: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve what is read, with a batch or without."""
        convolve = cast("Any", (functional.conv1d, functional.conv2d, functional.conv3d)[columns.dim() - 3])
        return convolve(read, columns, bias, self.stride, self.padding, self.dilation)

    def gradients(self, gradient: Tensor, read: Tensor, columns: Tensor, wanted: Wanted) -> Gradients:
        """Return the gradients that are wanted, of read, columns and bias."""
        batched = read.dim() == columns.dim()
        padding, ends = self._padding(columns.shape[2:])
        padded = functional.pad(read, ends) if any(ends) else read
        found = torch.ops.aten.convolution_backward(
            gradient if batched else gradient.unsqueeze(0),
            padded if batched else padded.unsqueeze(0),
            columns,
            [columns.shape[0]],
            self.stride,
            padding,
            self.dilation,
            False,
            [0] * len(padding),
            1,
            wanted,
        )
        by_read, by_columns, by_bias = cast("Gradients", found)
        if by_read is not None and wanted[0]:
            by_read = by_read if batched else by_read.squeeze(0)
            by_read = functional.pad(by_read, [-end for end in ends]) if any(ends) else by_read
        return by_read, by_columns, by_bias

    def _padding(self, kernel: torch.Size) -> tuple[tuple[int, ...], list[int]]:
        """Zeros at both ends of each dimension, and what comes on top as `functional.pad` takes it, last one first."""
        if not isinstance(self.padding, str):
            return self.padding, []
        if self.padding == "valid":
            return (0,) * len(kernel), []
        whole = [dilation * (size - 1) for dilation, size in zip(self.dilation, kernel, strict=True)]
        return tuple(each // 2 for each in whole), [end for each in reversed(whole) for end in (0, each % 2)]


def tied_product(x: Tensor, weight: Tensor, bias: Tensor | None, reading: Reading, product: Product) -> Tensor:
    """Return the product of what is read of x with the stored weight, `(out, K, …)`.

    Where gradients are recorded, x and the stored weight are all that is kept for them, in every way of reading; so
    neither may be changed in place before, which PyTorch checks as it does for the dense layer. Compiled, exported,
    traced or transformed by `torch.func` it is the plain operations, whose compiler decides on what is kept.
    """
    if torch.is_grad_enabled() and nothing_transforms() and not x.is_inference():
        apply = cast("Callable[..., Tensor]", _KeepsInput.apply)
        return apply(x, weight, bias, reading, product)
    return product(*reading.operands(x, weight), bias)


class _KeepsInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, reading: Reading, product: Product) -> Tensor:
        ctx.reading, ctx.product, ctx.shape = reading, product, x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        # Detached: autocast keeps its 16-bit copies of trained leaves for others, and these record no gradients.
        read, columns = reading.operands(x.detach(), weight.detach())
        return product(read, columns, None if bias is None else bias.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [gradient] = gradients
        reading, wanted = cast("Reading", ctx.reading), cast("Wanted", ctx.needs_input_grad[:3])
        x, weight = cast("tuple[Tensor | None, Tensor]", ctx.saved_tensors)
        if x is None:  # the weight is not trained: of what was read only the shape counts
            x = gradient.new_zeros(()).expand(ctx.shape)
        inputs = x.shape[reading.dim]
        read, columns = reading.operands(x, weight)
        operands = read.to(gradient.dtype), columns.to(gradient.dtype)
        by_read, by_columns, by_bias = cast("Product", ctx.product).gradients(gradient, *operands, wanted)
        return (
            reading.back_to_inputs(by_read, inputs) if by_read is not None and wanted[0] else None,
            reading.back_to_weight(by_columns, weight.shape[1], inputs)
            if by_columns is not None and wanted[1]
            else None,
            by_bias if wanted[2] else None,
            None,
            None,
        )
