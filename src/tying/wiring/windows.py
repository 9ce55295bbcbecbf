"""The geometry of a convolution on inputs of one size: which input each tap of the kernel reads at each position."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from tying.errors import PlanError

Size: TypeAlias = int | Sequence[int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
PAD: dict[str, str] = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
"""What `torch.nn.functional.pad` calls the padding modes of `torch.nn.Conv`."""


@dataclass(frozen=True)
class Windows:
    """A kernel that slides over inputs of one size, in one, two or three dimensions.

    Attributes:
        input_size: Of one channel: `(L,)`, `(H, W)` or `(D, H, W)`.
        kernel_size: Taps per dimension.
        stride: Step between two positions.
        dilation: Step between two taps.
        padding: By dimension, how much is added before and after.
        padding_mode: With what, as `torch.nn.Conv2d` says it.

    Raises:
        PlanError: If a number is out of its range, or the kernel does not fit into the padded input.

    Example:
        >>> windows = Windows((4,), (3,), (1,), (1,), ((1, 1),))
        >>> windows.output_size
        (4,)
        >>> windows.reads()  # one line per position: the input of each tap, −1 where it reads a padded zero
        array([[-1,  0,  1],
               [ 0,  1,  2],
               [ 1,  2,  3],
               [ 2,  3, -1]])
    """

    input_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    padding_mode: PaddingMode = "zeros"

    def __post_init__(self) -> None:
        if not _are_whole(self.input_size, least=1) or not 1 <= self.dimensions <= 3:
            raise PlanError(f"input_size: expected one to three whole numbers ≥ 1, got {self.input_size!r}; see Conv2d")
        for name in ("kernel_size", "stride", "dilation"):
            sizes = getattr(self, name)
            if not _are_whole(sizes, least=1) or len(sizes) != self.dimensions:
                raise PlanError(f"{name}: expected {self.dimensions} whole numbers ≥ 1, got {sizes!r}; give one each")
        pairs: Any = self.padding
        paired = isinstance(pairs, tuple) and all(
            _are_whole(pair, least=0) and len(pair) == 2 for pair in cast("tuple[Any, ...]", pairs)
        )
        if not paired or len(self.padding) != self.dimensions:
            raise PlanError(f"padding: expected {self.dimensions} pairs of numbers ≥ 0, got {pairs!r}; see Conv2d")
        if self.padding_mode not in get_args(PaddingMode):
            raise PlanError(
                f"padding_mode: expected one of {get_args(PaddingMode)}, got {self.padding_mode!r}; pick one of them"
            )
        most = {"reflect": -1, "circular": 0}.get(self.padding_mode)
        if most is not None and any(max(p) > s + most for p, s in zip(self.padding, self.input_size, strict=True)):
            raise PlanError(
                f"padding: expected {self.padding_mode} padding within the input {self.input_size}, got {self.padding};"
                " pad less"
            )
        if min(self.output_size) < 1:
            raise PlanError(
                f"input_size: expected an input that the kernel fits into, got {self.input_size} for a kernel of "
                f"{self.kernel_size} with dilation {self.dilation} and padding {self.padding}; give the size without "
                "the channels"
            )

    @staticmethod
    def of(
        input_size: Size,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        *,
        dimensions: int,
    ) -> Windows:
        """Build from the arguments of `torch.nn.Conv1d` to `Conv3d`, and the size of an input without its channels.

        Raises:
            PlanError: As the class, or if a size is not an integer or one integer per dimension.
        """
        kernel = per_dimension("kernel_size", kernel_size, dimensions)
        steps = per_dimension("stride", stride, dimensions)
        dilations = per_dimension("dilation", dilation, dimensions)
        if padding == "same":
            if max(steps) > 1:
                raise PlanError(f"padding: expected numbers with a stride of {steps}, got 'same'; give the numbers")
            pairs = _same(kernel, dilations)
        elif isinstance(padding, str):
            if padding != "valid":
                raise PlanError(f"padding: expected numbers, 'same' or 'valid', got {padding!r}; pick one of them")
            pairs = ((0, 0),) * dimensions
        else:
            pairs = tuple((p, p) for p in per_dimension("padding", padding, dimensions))
        size = per_dimension("input_size", input_size, dimensions)
        return Windows(size, kernel, steps, dilations, pairs, cast("PaddingMode", padding_mode))

    @staticmethod
    def of_conv(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, input_size: Size) -> Windows:
        """Build from a convolution and the size of its inputs without the channels.

        Raises:
            PlanError: As the class.

        Example:
            >>> Windows.of_conv(nn.Conv2d(3, 8, 5, stride=2, padding=2), 28).output_size
            (14, 14)
        """
        return Windows.of(
            input_size,
            conv.kernel_size,
            conv.stride,
            cast("Size | str", conv.padding),
            conv.dilation,
            conv.padding_mode,
            dimensions=len(conv.kernel_size),
        )

    @property
    def dimensions(self) -> int:
        """How many dimensions the kernel slides over."""
        return len(self.input_size)

    @property
    def output_size(self) -> tuple[int, ...]:
        """How many positions there are in each dimension."""
        return tuple(
            positions(size + sum(pads), kernel, stride, dilation)
            for size, pads, kernel, stride, dilation in zip(
                self.input_size, self.padding, self.kernel_size, self.stride, self.dilation, strict=True
            )
        )

    @property
    def positions(self) -> int:
        """P, how many positions the kernel takes."""
        return math.prod(self.output_size)

    @property
    def taps(self) -> int:
        """K, how many numbers the kernel has for one input channel."""
        return math.prod(self.kernel_size)

    @property
    def inputs(self) -> int:
        """S, how many numbers one channel of the input has."""
        return math.prod(self.input_size)

    @property
    def pads(self) -> list[int]:
        """The padding as `torch.nn.functional.pad` takes it: the last dimension first."""
        return [amount for pair in reversed(self.padding) for amount in pair]

    @property
    def padding_argument(self) -> str | tuple[int, ...]:
        """The padding as `torch.nn.Conv` takes it: numbers, or "same" where the two sides of an input differ.

        Raises:
            PlanError: If no convolution of torch pads so.
        """
        if all(low == high for low, high in self.padding):
            return tuple(low for low, _ in self.padding)
        if set(self.stride) == {1} and self.padding == _same(self.kernel_size, self.dilation):
            return "same"
        raise PlanError(f"padding: expected the same on both sides, got {self.padding}; torch.nn.Conv has no other")

    def reads(self) -> NDArray[np.int64]:
        """Return `(P, K)`: which of a channel's S numbers each tap reads at each position; −1: a padded zero.

        Found by moving the numbers 0 … S − 1 as the convolution moves its inputs.
        """
        numbers = torch.arange(1.0, self.inputs + 1, dtype=torch.float64, device="cpu").reshape(1, 1, *self.input_size)
        padded = functional.pad(numbers, self.pads, mode=PAD[self.padding_mode])[0, 0]
        return self.unfold(padded).reshape(self.positions, self.taps).numpy().astype(np.int64) - 1

    def unfold(self, padded: Tensor) -> Tensor:
        """Return what each tap reads at each position, a view.

        Args:
            padded: `(…, *size)` with the padding added, any dtype.

        Returns:
            `(…, *output_size, *kernel_size)`.
        """
        first = padded.dim() - self.dimensions
        for axis, (kernel, stride, dilation) in enumerate(
            zip(self.kernel_size, self.stride, self.dilation, strict=True), first
        ):
            padded = padded.unfold(axis, span(kernel, dilation), stride)[..., ::dilation]
        return padded


def span(kernel: int, dilation: int) -> int:
    """Return how many inputs there are from the first tap of a kernel to its last, both counted."""
    return dilation * (kernel - 1) + 1


def positions(padded: int, kernel: int, stride: int, dilation: int) -> int:
    """Return how many positions a kernel takes along one dimension of so many inputs; < 1 if it does not fit.

    Example:
        >>> positions(7, 3, 2, 1)
        3
    """
    return (padded - span(kernel, dilation)) // stride + 1


def _are_whole(sizes: Any, *, least: int) -> bool:
    """Whether these are a tuple of integers that are not less."""
    try:
        for each in cast("tuple[Any, ...]", sizes):
            whole("size", each, least)
    except (PlanError, TypeError):
        return False
    return isinstance(sizes, tuple)


def _same(kernel_size: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    totals = [span(k, d) - 1 for k, d in zip(kernel_size, dilation, strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)


def per_dimension(name: str, size: Size, dimensions: int) -> tuple[int, ...]:
    """Return one integer per dimension.

    Raises:
        PlanError: If there are more or fewer, or one is no integer.

    Example:
        >>> per_dimension("stride", 2, 2), per_dimension("stride", np.array([1, 3]), 2)
        ((2, 2), (1, 3))
    """
    given: list[Any] = list(cast("Sequence[Any]", size)) if isinstance(size, Iterable) else [size] * dimensions
    try:
        if len(given) == dimensions and not isinstance(size, str):
            return tuple(whole(name, each) for each in given)
    except PlanError:
        pass
    raise PlanError(f"{name}: expected an integer or {dimensions} of them, got {size!r}; pass one of the two")


def whole(name: str, value: Any, least: int | None = None) -> int:
    """Return an integer, numpy's too, as Python's.

    Raises:
        PlanError: If it is none, is True or False, or is less than the least.
    """
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        wanted = "an integer" if least is None else f"an integer ≥ {least}"
        raise PlanError(f"{name}: expected {wanted}, got {value!r}; pass one")
    return number
