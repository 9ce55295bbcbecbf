"""Layers that compute with tied weights: the inputs of each label are summed once, then one small product.

For a weight whose input groups are equal wherever their labels are, `W x = Σ_k w_k · (Σ_{i: label(i)=k} x_i)`. Where
summing does not pay, `way` makes a layer read its inputs as the dense one does; what it stores stays the same. For its
gradient a layer keeps its input, and its weight where the input needs a gradient, as the dense one does, and makes the
sums anew (`tying.nn.product`).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, TypeAlias, TypeVar, cast

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from tying.errors import PlanError
from tying.groups import Groups
from tying.nn.parts import in_parts
from tying.nn.product import Convolve, Multiply, Product, Reading, Way, tied_product
from tying.nn.sums import runs_at_once
from tying.plan import Partition
from tying.wiring.plain import check_plain
from tying.wiring.windows import Size, per_dimension

WAYS: tuple[Way, ...] = ("sum", "select", "dense")
PlainConv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
Conv = TypeVar("Conv", bound="_TiedConv")


class _TiedInputs(nn.Module):
    """What the tied layers share: the labels of the inputs, and the sum of the inputs of each label."""

    labels: Tensor
    """`(G,)` int64: one label per input, −1 = not read. A buffer: saved, moved and loaded with the weight."""
    weight: nn.Parameter
    bias: nn.Parameter | None
    _way: Way = "sum"
    _kept: Tensor
    _targets: Tensor

    def __init__(
        self,
        labels: ArrayLike | Tensor,
        out: int,
        kernel: tuple[int, ...],
        bias: bool,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        partition = _partition(labels)
        if not partition.classes:
            raise PlanError(
                f"labels: expected at least one input that is read, got {len(partition)} labels, all −1 (pruned); "
                "keep an input, or replace the layer by its bias"
            )
        self.weight = nn.Parameter(torch.empty((out, partition.classes, *kernel), device=device, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.empty(out, device=device, dtype=dtype)) if bias else None)
        self.register_buffer("labels", torch.as_tensor(partition.labels.copy(), device=device))
        kept, targets = _sorted_indices(partition, self.labels.device)
        self.register_buffer("_kept", kept, persistent=False)
        self.register_buffer("_targets", targets, persistent=False)
        self.register_load_state_dict_post_hook(_refresh)
        self.reset_parameters()

    @property
    def way(self) -> Way:
        """How it computes, a matter of speed: see `tying.nn.product.Way`; anything else raises a PlanError."""
        return self._way

    @way.setter
    def way(self, way: Way) -> None:
        if way not in WAYS:
            raise PlanError(f"way: expected one of {', '.join(WAYS)}, got {way!r}; sum is the usual one")
        self._way = way

    @property
    def partition(self) -> Partition:
        """The labels as a `Partition`."""
        return Partition(self.labels.cpu().numpy())

    @property
    def classes(self) -> int:
        """K, the number of distinct labels: the inputs of the small product."""
        return self.weight.shape[1]

    def reset_parameters(self) -> None:
        """Draw weight and bias as torch.nn does, from U(−b, b), b = 1/√(numbers one output of the dense twin reads)."""
        bound = 1 / math.sqrt(len(self._kept) * math.prod(self.weight.shape[2:]))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def _product(self, x: Tensor, dim: int, product: Product) -> Tensor:
        reading = self._reading("sum" if torch.compiler.is_exporting() else self.way, dim)
        return tied_product(x, self.weight, self.bias, reading, product)

    def _reading(self, way: Way, dim: int) -> Reading:
        return Reading(way, dim, self._kept, self._targets)

    def _misfit(self, x: Tensor, expected: str) -> RuntimeError:
        return RuntimeError(
            f"{type(self).__name__}: expected an input of shape {expected}, got {tuple(x.shape)}; pass what the dense "
            "layer takes"
        )

    def _dense_weight(self) -> Tensor:
        """Give every input its label's weight, zero where it is not read: `(out, K, …)` → `(out, G, …)`."""
        full = self.partition.expand(Groups.inputs().read(self.weight.detach()))
        return Groups.inputs().write(full, (self.weight.shape[0], len(self.labels), *self.weight.shape[2:]))

    def _tied_repr(self) -> str:
        kind = "" if self.way == "sum" else f", way={self.way}"
        return f"read={len(self._kept)}, classes={self.classes}, bias={self.bias is not None}{kind}"


class TiedLinear(_TiedInputs):
    """A linear layer with tied input groups: `y = W s + b`, `s_k = Σ_{i: labels[i]=k} x_i`.

    Shapes: input `(*, G)`, output `(*, out_features)`, any number of leading dimensions; `weight (out, K)`,
    `bias (out,)`, float64, float32 or a 16-bit type (which also sums the inputs in that type). The gradient of a
    weight is the sum of the gradients of the dense weights it stands for.

    Args:
        labels: `(G,)` integers, one per input: same label = same weights, −1 = not read.
        out_features: Number of outputs.
        bias: Whether to add a learned bias.
        device: Where the tensors live.
        dtype: Of weight and bias.

    Raises:
        PlanError: If the labels are malformed, or no input is read.

    Example:
        >>> dense = torch.nn.Linear(5, 2)
        >>> tied = TiedLinear.from_linear(dense, [0, 0, -1, 1, 0])
        >>> tied
        TiedLinear(in_features=5, out_features=2, read=4, classes=2, bias=True)
        >>> x = torch.randn(3, 5)
        >>> torch.allclose(tied(x), tied.to_linear()(x), atol=1e-6)
        True
    """

    def __init__(
        self,
        labels: ArrayLike | Tensor,
        out_features: int,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(labels, out_features, (), bias, device, dtype)
        self.in_features = len(self.labels)
        self.out_features = out_features

    @classmethod
    def from_linear(cls, linear: nn.Linear, labels: ArrayLike | Tensor) -> TiedLinear:
        """Tie a linear layer's inputs: each small weight is the mean of its label's input groups, the bias is copied.

        Raises:
            PlanError: If the labels are not one per input, no input is read, or the layer has a forward of its own.
        """
        check_plain(linear, [nn.Linear], name="linear")
        weight, bias = linear.weight, cast("nn.Parameter | None", linear.bias)
        tied = cls(labels, linear.out_features, bias is not None, device=weight.device, dtype=weight.dtype)
        return _fill(tied, _small_weight(weight, _partition(labels)), linear)

    def to_linear(self) -> nn.Linear:
        """Return the dense layer with the same outputs."""
        weight = self.weight
        sizes = (self.in_features, self.out_features, self.bias is not None)
        linear = nn.Linear(*sizes, device=weight.device, dtype=weight.dtype)
        return _fill(linear, self._dense_weight(), self)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(*, G)` to `(*, out_features)`.

        Raises:
            RuntimeError: If the input is of another shape.
        """
        inputs = self.labels.shape[0]
        if x.dim() == 0 or x.shape[-1] != inputs:
            raise self._misfit(x, f"(*, {inputs})")
        return self._product(x, x.dim() - 1, Multiply())

    def extra_repr(self) -> str:
        """What `print` shows: sizes, how many inputs are read, and to how many values they are tied."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._tied_repr()}"


class _TiedConv(_TiedInputs):
    """A convolution whose input channels are tied."""

    plain: ClassVar[type[PlainConv]]
    dimensions: ClassVar[int]

    def __init__(
        self,
        labels: ArrayLike | Tensor,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        bias: bool = True,
        *,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if padding_mode != "zeros":
            raise PlanError(
                f"padding_mode: expected 'zeros', got {padding_mode!r}; keep the plain layer, or tie it with tie_"
            )
        kernel = self._per_dimension("kernel_size", kernel_size)
        super().__init__(labels, out_channels, kernel, bias, device, dtype)
        self.in_channels = len(self.labels)
        self.out_channels = out_channels
        self.kernel_size = kernel
        self.stride = self._per_dimension("stride", stride)
        self.dilation = self._per_dimension("dilation", dilation)
        self.padding = padding if isinstance(padding, str) else self._per_dimension("padding", padding)

    @classmethod
    def from_conv(cls: type[Conv], conv: PlainConv, labels: ArrayLike | Tensor) -> Conv:
        """Tie a convolution's input channels: each small kernel is the mean of its label's, the bias is copied.

        Raises:
            PlanError: If the labels are not one per input channel, none is read, or the layer has groups, a padding
                mode other than zeros, or a forward of its own.
        """
        if not isinstance(conv, cls.plain) or conv.groups != 1:
            raise PlanError(
                f"conv: expected {cls.plain.__name__} with groups=1, got {conv}; keep the plain layer, or tie its "
                "weight with tie_"
            )
        check_plain(conv, [cls.plain])
        weight, bias = conv.weight, cast("nn.Parameter | None", conv.bias)
        tied = cls(
            labels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            bias is not None,
            padding_mode=conv.padding_mode,
            device=weight.device,
            dtype=weight.dtype,
        )
        return _fill(tied, _small_weight(weight, _partition(labels)), conv)

    def to_conv(self) -> PlainConv:
        """Return the dense convolution with the same outputs."""
        plain = cast("type[Any]", self.plain)
        conv = plain(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        return _fill(cast("PlainConv", conv), self._dense_weight(), self)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, G, …)` or `(G, …)` to `(N, out_channels, …)` or `(out_channels, …)`.

        Raises:
            RuntimeError: If the input is of another shape.
        """
        inputs, batched = self.labels.shape[0], self.dimensions + 2
        if x.dim() not in (batched - 1, batched) or x.shape[-1 - self.dimensions] != inputs:
            sample = ", ".join([str(inputs), *("L", "HW", "DHW")[self.dimensions - 1]])
            raise self._misfit(x, f"(N, {sample}) or ({sample})")
        if x.dim() == batched and x.is_contiguous() and runs_at_once(x):
            makes = self.out_channels * x[:, 0].numel() // math.prod(self.stride)
            return in_parts(self._convolve, x, makes * x.element_size())
        return self._convolve(x)

    def _convolve(self, x: Tensor) -> Tensor:
        return self._product(x, x.dim() - 1 - self.dimensions, Convolve(self.stride, self.padding, self.dilation))

    def extra_repr(self) -> str:
        """What `print` shows: sizes, how many channels are read, and to how many values they are tied."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, {self._tied_repr()}"
        )

    def _per_dimension(self, name: str, size: Size) -> tuple[int, ...]:
        return per_dimension(name, size, self.dimensions)


class TiedConv1d(_TiedConv):
    """`torch.nn.Conv1d` with tied input channels: the channels of each label are summed, then one small convolution.

    Shapes: input `(N, G, L)` or `(G, L)`; `weight (out, K, kernel)`. `groups` is 1 and padding is with zeros.

    Raises:
        PlanError: If the labels are malformed, no channel is read, or the padding mode is not zeros.

    Example:
        >>> TiedConv1d([0, 0, 1], 4, kernel_size=3, padding=1)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 4, 8])
    """

    plain = nn.Conv1d
    dimensions = 1


class TiedConv2d(_TiedConv):
    """`torch.nn.Conv2d` with tied input channels: the channels of each label are summed, then one small convolution.

    Shapes: input `(N, G, H, W)` or `(G, H, W)`; `weight (out, K, *kernel)`. `groups` is 1 and padding is with zeros.

    Raises:
        PlanError: If the labels are malformed, no channel is read, or the padding mode is not zeros.

    Example:
        >>> tied = TiedConv2d.from_conv(torch.nn.Conv2d(6, 8, 3), [0, 1, 0, -1, 1, 1])
        >>> tied.weight.shape
        torch.Size([8, 2, 3, 3])
    """

    plain = nn.Conv2d
    dimensions = 2


class TiedConv3d(_TiedConv):
    """`torch.nn.Conv3d` with tied input channels: the channels of each label are summed, then one small convolution.

    Shapes: input `(N, G, D, H, W)` or `(G, D, H, W)`; `weight (out, K, *kernel)`. `groups` is 1, padding is with zeros.

    Raises:
        PlanError: If the labels are malformed, no channel is read, or the padding mode is not zeros.

    Example:
        >>> TiedConv3d([0, 0, 1], 4, kernel_size=2)(torch.randn(1, 3, 4, 4, 4)).shape
        torch.Size([1, 4, 3, 3, 3])
    """

    plain = nn.Conv3d
    dimensions = 3


def _partition(labels: ArrayLike | Tensor) -> Partition:
    return Partition(labels.cpu().numpy() if isinstance(labels, Tensor) else labels)


def _small_weight(dense: Tensor, partition: Partition) -> Tensor:
    """Average the dense weight's input groups of each label, in float64: `(out, G, …)` → `(out, K, …)`."""
    if dense.shape[1] != len(partition):
        raise PlanError(
            f"labels: expected {dense.shape[1]} labels, one per input of the layer, got {len(partition)}; "
            "make the plan for this layer"
        )
    mean = partition.mean(Groups.inputs().read(dense.detach()))
    return Groups.inputs().write(mean, (dense.shape[0], partition.classes, *dense.shape[2:]))


def _refresh(module: nn.Module, _: object) -> None:
    """Derive the indices anew from labels that `load_state_dict` brought."""
    tied = cast(_TiedInputs, module)
    if tied.labels.is_meta:
        return
    partition = tied.partition
    if partition.classes != tied.weight.shape[1]:
        raise PlanError(
            f"labels: expected {tied.weight.shape[1]} distinct labels, as the weight has, got {partition.classes}; "
            "load the labels together with their weight"
        )
    tied._kept, tied._targets = _sorted_indices(partition, tied.labels.device)  # pyright: ignore[reportPrivateUsage]


def _sorted_indices(partition: Partition, device: torch.device) -> tuple[Tensor, Tensor]:
    """The inputs that are read, sorted by label, and the label of each."""
    kept, targets = partition.indices(device)
    targets, order = targets.sort(stable=True)
    return kept[order], targets


def _fill(layer: Any, weight: Tensor, source: Any) -> Any:
    """Give a new layer its weight, the bias, and whether each is trained, and the mode of the one it is made from."""
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(source.bias)
            layer.bias.requires_grad_(source.bias.requires_grad)
    layer.weight.requires_grad_(source.weight.requires_grad)
    return layer.train(source.training)
