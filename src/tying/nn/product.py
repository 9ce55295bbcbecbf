"""The product of a tied layer: what it reads is a function of its input, so that only the input waits for its gradient.

Autograd would keep the sums of the inputs (and what was added up) or the widened weight from the forward pass to the
backward pass, beside an input that whoever made it keeps as a rule (ReLU does). Here both are made anew from the input
and the stored weight, each kept only where the other one's gradient needs it, as the dense layer does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import functional

from tying.nn.sums import expand_by_label, nothing_transforms, select, sum_by_label

Way: TypeAlias = Literal["sum", "select", "dense"]
"""How a tied layer computes: "sum" the inputs of each label; "select" those that are read, by a weight with one column
for each; "dense": take all, by the whole weight. The same function, rounding aside, of the same stored values: a matter
of speed, which `tying.enforce.compaction.fastest` measures. `torch.export` always records "sum", which keeps files
small."""
Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]
Wanted: TypeAlias = tuple[bool, bool, bool]


class Product(Protocol):
    """A product of what is read with a weight that has a column for each, and its gradients."""

    def __call__(self, read: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product."""
        ...

    def gradients(self, gradient: Tensor, read: Tensor, columns: Tensor, wanted: Wanted) -> Gradients:
        """Return the gradients that are wanted, None for the others; only they need values, the rest its shape."""
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
        return self.read(x, weight.shape[1]), self.columns(weight, x.shape[self.dim])

    def read(self, x: Tensor, classes: int) -> Tensor:
        """The inputs as the way has it: `(…, G, …)` → `(…, K, …)`, `(…, R, …)` or as they are."""
        if self.way == "sum":
            return self.sums(x, classes)
        return select(x, self.dim, self.kept) if self._selects(x.shape[self.dim]) else x

    def columns(self, weight: Tensor, inputs: int) -> Tensor:
        """The weight with a column for each that is read: `(out, K, …)` → as it is, `(out, R, …)` or `(out, G, …)`."""
        if self.way == "sum":
            return weight
        if self._selects(inputs):
            return weight.index_select(1, self.targets)
        return expand_by_label(weight, 1, self.kept, self.targets, inputs)

    def width(self, inputs: int, classes: int) -> int:
        """How many the product reads: K, R or G."""
        if self.way == "sum":
            return classes
        return len(self.kept) if self._selects(inputs) else inputs

    def sums(self, x: Tensor, classes: int) -> Tensor:
        """Sum the inputs of each of so many labels: `(…, G, …)` → `(…, K, …)`."""
        if classes == self.kept.shape[0]:
            return x if classes == x.shape[self.dim] else select(x, self.dim, self.kept)
        return sum_by_label(x, self.dim, self.kept, self.targets, classes)

    def back_to_inputs(self, gradient: Tensor, inputs: int) -> Tensor:
        """The gradient of x from that of what was read."""
        if self.way == "sum":
            return expand_by_label(gradient, self.dim, self.kept, self.targets, inputs)
        if self._selects(inputs):
            return expand_by_label(gradient, self.dim, self.kept, self._each(), inputs)
        return gradient

    def back_to_weight(self, gradient: Tensor, classes: int, inputs: int, dtype: torch.dtype) -> Tensor:
        """The gradient of the stored weight, of this dtype, from that of the product's; 16 bits are summed in 32."""
        if self.way == "sum":
            return gradient.to(dtype)
        wide = gradient.to(torch.promote_types(dtype, torch.float32))
        columns = self._each() if self._selects(inputs) else self.kept
        return sum_by_label(wide, 1, columns, self.targets, classes).to(dtype)

    def _selects(self, inputs: int) -> bool:
        return self.way == "select" and len(self.kept) < inputs

    def _each(self) -> Tensor:
        return torch.arange(len(self.kept), device=self.kept.device)


@dataclass(frozen=True)
class Multiply:
    """`torch.nn.functional.linear`."""

    def __call__(self, read: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
        """Return `read · columnsᵀ + bias`."""
        return functional.linear(read, columns, bias)

    def gradients(self, gradient: Tensor, read: Tensor, columns: Tensor, wanted: Wanted) -> Gradients:
        """Return the gradients that are wanted, of read, columns and bias, and None for the others."""
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
        """Return the gradients that are wanted, of read, columns and bias, and None for the others."""
        batched = read.dim() == columns.dim()
        padding, ends = self._padding(columns.shape[2:])
        padded = functional.pad(read, ends) if any(ends) else read
        found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
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
        # Some backends fill what is not wanted with zeros.
        by_read, by_columns, by_bias = (by if want else None for by, want in zip(found, wanted, strict=True))
        if by_read is not None:
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

    Where gradients are recorded, no more of x and the stored weight is kept for them than the dense layer keeps, in
    every way of reading: x where the weight is trained, the weight where x needs a gradient; so neither may be changed
    in place before, which PyTorch checks as it does for the dense layer. Compiled, exported, traced or transformed by
    `torch.func` it is the plain operations, whose compiler decides on what is kept; so it is for complex numbers and
    for what was made in inference mode and would have to be kept.
    """
    if torch.is_grad_enabled() and nothing_transforms() and _may_be_kept(x, weight):
        apply = cast("Callable[..., Tensor]", _KeepsInput.apply)
        return apply(x, weight, bias, reading, product)
    return product(*reading.operands(x, weight), bias)


def _may_be_kept(x: Tensor, weight: Tensor) -> bool:
    if x.is_complex() or weight.is_complex():
        return False
    return not ((x.is_inference() and weight.requires_grad) or (weight.is_inference() and x.requires_grad))


class _KeepsInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, reading: Reading, product: Product) -> Tensor:
        ctx.reading, ctx.product, ctx.shapes, ctx.dtype = reading, product, (x.shape, weight.shape), weight.dtype
        trained, passes_on = ctx.needs_input_grad[1], ctx.needs_input_grad[0]
        ctx.save_for_backward(x if trained else None, weight if passes_on else None)
        # Detached: autocast keeps its 16-bit copies of trained leaves for others, and these record no gradients.
        read, columns = reading.operands(x.detach(), weight.detach())
        return product(read, columns, None if bias is None else bias.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [gradient] = gradients
        with _no_autocast(gradient.device.type):  # wherever the backward pass is called
            return (*_gradients(ctx, gradient), None, None)


def _gradients(ctx: Any, gradient: Tensor) -> Gradients:
    reading, wanted = cast("Reading", ctx.reading), cast("Wanted", ctx.needs_input_grad[:3])
    x, weight = cast("tuple[Tensor | None, Tensor | None]", ctx.saved_tensors)
    of_x, of_weight = cast("tuple[torch.Size, torch.Size]", ctx.shapes)
    inputs, classes = of_x[reading.dim], of_weight[1]
    width = reading.width(inputs, classes)
    read, columns = _shape_only(gradient, of_x, reading.dim, width), _shape_only(gradient, of_weight, 1, width)
    if x is not None and wanted[1]:
        read = reading.read(x, classes).to(gradient.dtype)
    if weight is not None and wanted[0]:
        columns = reading.columns(weight, inputs).to(gradient.dtype)
    by_read, by_columns, by_bias = cast("Product", ctx.product).gradients(gradient, read, columns, wanted)
    return (
        None if by_read is None else reading.back_to_inputs(by_read, inputs),
        None if by_columns is None else reading.back_to_weight(by_columns, classes, inputs, ctx.dtype),
        by_bias,
    )


def _shape_only(like: Tensor, shape: Sequence[int], dim: int, width: int) -> Tensor:
    """A single zero in the shape of an operand whose values no gradient needs."""
    return like.new_zeros(()).expand(*shape[:dim], width, *shape[dim + 1 :])


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
