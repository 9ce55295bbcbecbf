"""Locally connected layers: sparse as a convolution is, and not shared: a kernel of its own at every position.

`y[n, o, p] = b[p, o] + Σ_{c, k} W[p, o, c, k] · x[n, c, reads[p, k]]`: a convolution is the one with equal positions.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tying.errors import PlanError
from tying.wiring.plain import check_plain
from tying.wiring.windows import PAD, Size, Windows, whole

Local = TypeVar("Local", bound="_LocallyConnected")


class _LocallyConnected(nn.Module):
    """What the locally connected layers share."""

    plain: ClassVar[type[nn.Conv1d] | type[nn.Conv2d]]
    dimensions: ClassVar[int]
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        input_size: Size,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_channels, out_channels = whole("in_channels", in_channels, 1), whole("out_channels", out_channels, 1)
        groups = whole("groups", groups, 1)
        if in_channels % groups or out_channels % groups:
            raise PlanError(
                f"groups: expected a divisor of {in_channels} inputs and {out_channels} outputs, got {groups}; "
                "1 connects all channels"
            )
        self.windows = Windows.of(
            input_size, kernel_size, stride, padding, dilation, padding_mode, dimensions=self.dimensions
        )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.input_size, self.kernel_size = self.windows.input_size, self.windows.kernel_size
        self.stride, self.dilation = self.windows.stride, self.windows.dilation
        self.padding = padding if isinstance(padding, str) else tuple(low for low, _ in self.windows.padding)
        self.padding_mode = padding_mode
        shape = (self.windows.positions, out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        offset = nn.Parameter(torch.empty(shape[:2], device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", offset)
        self.reset_parameters()

    @property
    def output_size(self) -> tuple[int, ...]:
        """How many positions there are in each dimension of the output."""
        return self.windows.output_size

    def reset_parameters(self) -> None:
        """Draw weight and bias as a convolution does: from U(−b, b), b = 1/√(numbers that one output reads)."""
        bound = 1 / math.sqrt(math.prod(self.weight.shape[2:]))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_conv(cls: type[Local], conv: nn.Conv1d | nn.Conv2d, input_size: Size) -> Local:
        """Return the layer that computes what a convolution does on inputs of this size, its kernel at every position.

        Args:
            conv: `nn.Conv1d` or `nn.Conv2d`, any stride, padding, dilation, groups and padding mode.
            input_size: Of one channel.

        Raises:
            PlanError: If it is another kind of layer, has a forward of its own, or the input is smaller than the
                kernel.
        """
        if not isinstance(conv, cls.plain) or isinstance(conv.weight, nn.UninitializedParameter):
            raise PlanError(f"conv: expected {cls.plain.__name__} with a weight, got {conv}; pass one")
        check_plain(conv, [cls.plain])
        weight, bias = conv.weight, cast("nn.Parameter | None", conv.bias)
        local = cls(
            conv.in_channels,
            conv.out_channels,
            input_size,
            conv.kernel_size,
            conv.stride,
            cast("Size | str", conv.padding),
            conv.dilation,
            conv.groups,
            bias is not None,
            padding_mode=conv.padding_mode,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            local.weight.copy_(weight.expand_as(local.weight))
            if local.bias is not None and bias is not None:
                local.bias.copy_(bias.expand_as(local.bias))
                local.bias.requires_grad_(bias.requires_grad)
        local.weight.requires_grad_(weight.requires_grad)
        return local.train(conv.training)

    def to_conv(self, *, tolerance: float = 1e-6) -> nn.Conv1d | nn.Conv2d:
        """Return the convolution with the same outputs, whose kernel is the mean over the positions.

        A tap that reads a padded zero counts neither in the mean nor in the comparison: its weight changes nothing.

        Args:
            tolerance: How far a position may be from the mean, relative to the largest weight of the mean;
                `math.inf` gives the nearest convolution whatever its distance.

        Raises:
            PlanError: If the positions differ by more, or the layer is on the meta device, where there are
                no values to compare.
        """
        if self.weight.is_meta:
            raise PlanError(
                "weight: expected values to compare, got a layer on the meta device; load it first, or take "
                "empty_conv()"
            )
        weight, apart = self._mean(self.weight, self._connected())
        limit = tolerance * max(float(weight.abs().max()), torch.finfo(torch.float64).tiny)
        bias, bias_apart = (None, 0.0) if self.bias is None else self._mean(self.bias, None)
        if bias is not None:
            limit = max(limit, tolerance * float(bias.abs().max()))
        if not max(apart, bias_apart) <= limit:
            raise PlanError(
                f"weight: expected positions that agree to {limit:.3g}, got a difference of "
                f"{max(apart, bias_apart):.3g}; draw them together with a tying penalty first, or pass tolerance="
            )
        conv = self.empty_conv()
        with torch.no_grad():
            conv.weight.copy_(weight)
            if bias is not None and self.bias is not None:
                conv.bias.copy_(bias)  # pyright: ignore[reportOptionalMemberAccess]
                conv.bias.requires_grad_(self.bias.requires_grad)  # pyright: ignore[reportOptionalMemberAccess]
        conv.weight.requires_grad_(self.weight.requires_grad)
        return conv.train(self.training)

    def empty_conv(self) -> nn.Conv1d | nn.Conv2d:
        """Return a convolution of this geometry with fresh weights."""
        return self.plain(
            self.in_channels,
            self.out_channels,
            cast(Any, self.kernel_size),
            cast(Any, self.stride),
            cast(Any, self.padding),
            cast(Any, self.dilation),
            self.groups,
            self.bias is not None,
            cast(Any, self.padding_mode),
            device=self.weight.device,
            dtype=self.weight.dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, in_channels, *input_size)` to `(N, out_channels, *output_size)`; N may be left out.

        Raises:
            RuntimeError: If the input has other channels or another size.
        """
        expected = (self.in_channels, *self.input_size)
        if tuple(x.shape[-self.dimensions - 1 :]) != expected or x.dim() not in (len(expected), len(expected) + 1):
            raise RuntimeError(
                f"{type(self).__name__}: expected an input of shape (N, {', '.join(map(str, expected))}), got "
                f"{tuple(x.shape)}; the kernels belong to positions, so the size is fixed"
            )
        if x.dim() == len(expected):
            return self._batched(x.unsqueeze(0)).squeeze(0)
        return self._batched(x)

    def _batched(self, x: Tensor) -> Tensor:
        if any(self.windows.pads):
            x = functional.pad(x, self.windows.pads, mode=PAD[self.padding_mode])
        batch, products = x.shape[0], self.windows.positions * self.groups
        terms = math.prod(self.weight.shape[2:])  # not −1: an empty batch has no numbers to find it from
        weight = self.weight.reshape(products, self.out_channels // self.groups, terms)
        offset = None if self.bias is None else self.bias.reshape(products, -1, 1)
        if batch == 1:  # a product with one vector is faster from the other side
            read = self._windows_of_one(x).reshape(products, 1, terms)
            weight = weight.transpose(1, 2)
            made = torch.bmm(read, weight) if offset is None else torch.baddbmm(offset.transpose(1, 2), read, weight)
        else:
            read = self._windows(x).reshape(products, terms, batch)
            made = torch.bmm(weight, read) if offset is None else torch.baddbmm(offset, weight, read)
        made = made.reshape(self.windows.positions, self.out_channels, batch).permute(2, 1, 0)
        return made.contiguous().reshape(batch, self.out_channels, *self.output_size)

    def _windows(self, x: Tensor) -> Tensor:
        """What each tap reads, `(*output_size, in_channels, K, N)`: one strided copy per tap, the batch innermost."""
        x = x.permute(*range(2, x.dim()), 1, 0).contiguous()
        taps: list[Tensor] = []
        for tap in itertools.product(*map(range, self.kernel_size)):
            read = x
            for axis, at in enumerate(tap):
                start, step = at * self.dilation[axis], self.stride[axis]
                read = read.narrow(axis, start, (self.output_size[axis] - 1) * step + 1)
                read = read[(slice(None),) * axis + (slice(None, None, step),)]
            taps.append(read)
        return torch.stack(taps, self.dimensions + 1)

    def _windows_of_one(self, x: Tensor) -> Tensor:
        """What each tap reads, `(*output_size, 1, in_channels, *kernel_size)`: a view."""
        read = self.windows.unfold(x)
        axes = range(2, 2 + self.dimensions)
        return read.permute(*axes, 0, 1, *(axis + self.dimensions for axis in axes))

    def _connected(self) -> Tensor:
        """Which taps read an input at each position, float64, to be multiplied with the weight."""
        reads = torch.as_tensor(self.windows.reads() >= 0, dtype=torch.float64, device=self.weight.device)
        return reads.reshape(self.windows.positions, 1, 1, *self.kernel_size)

    @staticmethod
    def _mean(tensor: Tensor, counts: Tensor | None) -> tuple[Tensor, float]:
        """The mean over the positions that count, float64, and the largest distance of one of them from it."""
        wide = tensor.detach().double()
        counts = torch.ones_like(wide[:, :1]) if counts is None else counts
        mean = (wide * counts).sum(0) / counts.sum(0).clamp(min=1)
        return mean, float(((wide - mean) * counts).abs().max())

    def extra_repr(self) -> str:
        """What `print` shows: as a convolution, with the size of the input."""
        return (
            f"{self.in_channels}, {self.out_channels}, input_size={self.input_size}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"bias={self.bias is not None}, padding_mode={self.padding_mode!r}"
        )


class LocallyConnected1d(_LocallyConnected):
    """`torch.nn.Conv1d` with a kernel of its own at every position.

    Shapes: input `(N, in_channels, L)` or `(in_channels, L)`, output `(N, out_channels, P)`, `weight (P, out_channels,
    in_channels / groups, kernel)`, `bias (P, out_channels)`; any floating-point dtype.
    `y[n, o, p] = bias[p, o] + Σ_{c, k} weight[p, o, c, k] · x[n, c, stride·p + dilation·k − padding]`.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        input_size: L of the inputs; no other length can be passed.
        kernel_size: As for `torch.nn.Conv1d`; so are the following.
        stride: Step between two positions.
        padding: A number, "same" or "valid".
        dilation: Step between two taps.
        groups: Of channels that see each other.
        bias: Whether to add a learned bias, per position and channel.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device: Where the tensors live.
        dtype: Of weight and bias.

    Raises:
        PlanError: If a size is no integer or out of its range, or the kernel does not fit into the input.

    Example:
        >>> LocallyConnected1d(3, 4, 8, kernel_size=3, padding=1)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 4, 8])
    """

    plain = nn.Conv1d
    dimensions = 1


class LocallyConnected2d(_LocallyConnected):
    """`torch.nn.Conv2d` with a kernel of its own at every position: sparse, not shared.

    The honest control for a convolution: the same connections, P times as many weights. Shapes: input
    `(N, in_channels, H, W)` or `(in_channels, H, W)`, output `(N, out_channels, H′, W′)`,
    `weight (P, out_channels, in_channels / groups, *kernel)`, `bias (P, out_channels)`, P = H′·W′; any floating-point
    dtype. `Groups.positions()` reads the weight as one group per position: its ties make it a convolution.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        input_size: H and W of the inputs, an integer for both; no other size can be passed.
        kernel_size: As for `torch.nn.Conv2d`; so are the following.
        stride: Step between two positions.
        padding: Numbers, "same" or "valid".
        dilation: Step between two taps.
        groups: Of channels that see each other.
        bias: Whether to add a learned bias, per position and channel.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device: Where the tensors live.
        dtype: Of weight and bias.

    Raises:
        PlanError: If the sizes are malformed, or the kernel does not fit into the input.

    Example:
        >>> conv = torch.nn.Conv2d(3, 8, 5, stride=2, padding=2)
        >>> local = LocallyConnected2d.from_conv(conv, input_size=28)
        >>> local.weight.shape
        torch.Size([196, 8, 3, 5, 5])
        >>> x = torch.randn(2, 3, 28, 28)
        >>> torch.allclose(local(x), conv(x), atol=1e-6)
        True
        >>> torch.equal(local.to_conv().weight, conv.weight)
        True
    """

    plain = nn.Conv2d
    dimensions = 2
