"""A convolution on flattened inputs: in the place of a linear layer."""

from __future__ import annotations

from typing import cast

from torch import nn

from tying.wiring.plain import check_plain
from tying.wiring.windows import Size, Windows, per_dimension
from tying.wiring.wiring import PlainConv, Wiring


class FlatConv(nn.Sequential):
    """`Unflatten → Conv → Flatten`: a convolution that takes and gives what the dense layer of the same map does.

    `y = flatten(conv(unflatten(x)))`.

    Shapes: input `(N, C·S)` or `(C·S,)`, output `(N, O·P)` or `(O·P,)`; `flat.conv` is the `nn.Conv1d` or `nn.Conv2d`.

    Args:
        conv: The convolution; kept, not copied.
        input_size: Of one channel.

    Raises:
        PlanError: If the convolution has a forward of its own, or the kernel does not fit into the input.

    Example:
        >>> import torch
        >>> FlatConv(nn.Conv2d(1, 8, 5, stride=2, padding=2), 28)(torch.randn(3, 784)).shape
        torch.Size([3, 1568])
    """

    def __init__(self, conv: PlainConv, input_size: Size) -> None:
        check_plain(conv, [nn.Conv1d, nn.Conv2d])
        size = per_dimension("input_size", input_size, len(conv.kernel_size))
        Windows.of_conv(conv, size)
        channels_too = (-1, *size)  # −1: channels that compact removes need no further word
        super().__init__(nn.Unflatten(-1, channels_too), conv, nn.Flatten(-1 - len(size)))
        self.input_size = size

    @property
    def conv(self) -> PlainConv:
        """The convolution."""
        return cast("PlainConv", self[1])

    @property
    def wiring(self) -> Wiring:
        """What it hard-wires into the dense layer."""
        return Wiring.of_conv(self.conv, self.input_size)
