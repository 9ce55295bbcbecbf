"""What a convolution hard-wires: which of its weights each number of the dense layer of the same map is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tying.errors import PlanError
from tying.wiring.plain import check_plain
from tying.wiring.windows import Size, Windows, whole

PlainConv = nn.Conv1d | nn.Conv2d
CONVOLUTIONS: dict[int, type[PlainConv]] = {1: nn.Conv1d, 2: nn.Conv2d}


@dataclass(frozen=True)
class Wiring:
    """A convolution on inputs of one size, seen as a dense layer from `C·S` flattened inputs to `O·P` outputs.

    `W[o·P + p, c·S + s] = kernel[o, c, k]` where tap k reads s at position p (`Windows.reads`) and o and c are in the
    same group, else 0; `b[o·P + p] = bias[o]`.

    Attributes:
        in_channels: C.
        out_channels: O.
        groups: Of channels that see each other.
        windows: P positions, K taps, inputs of S numbers per channel.

    Raises:
        PlanError: If a number is no integer ≥ 1, the groups do not divide the channels, or there are three dimensions.

    Example:
        >>> wiring = Wiring.of_conv(nn.Conv1d(1, 1, 2), 3)
        >>> wiring.weight_labels().reshape(2, 3)
        array([[ 0,  1, -1],
               [-1,  0,  1]])
    """

    in_channels: int
    out_channels: int
    groups: int
    windows: Windows

    def __post_init__(self) -> None:
        if self.windows.dimensions not in CONVOLUTIONS:
            raise PlanError(f"dimensions: expected 1 or 2, got {self.windows.dimensions}; flatten one of them")
        for name in ("in_channels", "out_channels", "groups"):
            whole(name, getattr(self, name), 1)
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise PlanError(
                f"groups: expected a divisor of {self.in_channels} and {self.out_channels} channels, got {self.groups}"
            )

    @staticmethod
    def of_conv(conv: PlainConv, input_size: Size) -> Wiring:
        """Build from a convolution and the size of its inputs without the channels; its weights are not read.

        Raises:
            PlanError: If it is another kind of layer, has a forward of its own, or the kernel does not fit into the
                input.
        """
        if not isinstance(conv, (nn.Conv1d, nn.Conv2d)) or conv.in_channels == 0:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(f"conv: expected an nn.Conv1d or nn.Conv2d with its sizes, got {conv}; pass one")
        check_plain(conv, CONVOLUTIONS.values())
        return Wiring(conv.in_channels, conv.out_channels, conv.groups, Windows.of_conv(conv, input_size))

    @property
    def in_features(self) -> int:
        """C·S, the inputs of the dense layer."""
        return self.in_channels * self.windows.inputs

    @property
    def out_features(self) -> int:
        """O·P, the outputs of the dense layer."""
        return self.out_channels * self.windows.positions

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape of the convolution's weight."""
        return (self.out_channels, self.in_channels // self.groups, *self.windows.kernel_size)

    @property
    def connections(self) -> int:
        """How many numbers of the dense weight are not zero by construction."""
        pairs = self.out_channels * (self.in_channels // self.groups)
        return pairs * int(np.count_nonzero(self.windows.reads() >= 0))

    @cached_property
    def _entries(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of every connection, its place in the flattened dense weight and in the flattened kernel."""
        reads = self.windows.reads()
        at, taps = np.nonzero(reads >= 0)
        share, per = self.in_channels // self.groups, self.out_channels // self.groups
        out = np.arange(self.out_channels)[:, None, None]
        seen = np.arange(share)[None, :, None]
        output = out * self.windows.positions + at
        read = (out // per * share + seen) * self.windows.inputs + reads[at, taps]
        kernel = (out * share + seen) * self.windows.taps + taps
        return (output * self.in_features + read).ravel(), kernel.ravel()

    def weight_labels(self) -> NDArray[np.int64]:
        """Return one label per number of the dense weight, `(O·P·C·S,)`: its place in the kernel, −1: no connection.

        Raises:
            PlanError: If two taps read one input at one position (as reflected borders do): their weights add up
                there, which no label can say.
        """
        places, kernel = self._entries
        labels = np.full(self.out_features * self.in_features, -1, dtype=np.int64)
        labels[places] = kernel
        if np.count_nonzero(labels >= 0) < len(places):
            raise PlanError(
                f"padding_mode: expected one input per tap, got {self.windows.padding_mode!r} padding of "
                f"{self.windows.padding}, where two taps read the same input and their weights add up; use zeros, or "
                "the locally connected layer (tying.nn.LocallyConnected2d), which has every mode"
            )
        return labels

    def bias_labels(self) -> NDArray[np.int64]:
        """Return one label per number of the dense bias, `(O·P,)`: its output channel."""
        return np.repeat(np.arange(self.out_channels), self.windows.positions)

    def dense(self, kernel: Tensor) -> Tensor:
        """Return the dense weight `(O·P, C·S)` of a kernel, its dtype and device, differentiable.

        Weights add up where two taps read one input.
        """
        places, labels = (torch.as_tensor(each, device=kernel.device) for each in self._entries)
        flat = kernel.new_zeros(self.out_features * self.in_features)
        return flat.index_add(0, places, kernel.flatten()[labels]).reshape(self.out_features, self.in_features)

    def kernel(self, dense: Tensor) -> Tensor:
        """Return the mean of the dense weight over the connections of each number of the kernel, float64.

        A tap that never reads an input is zero.
        """
        places, labels = (torch.as_tensor(each, device=dense.device) for each in self._entries)
        wide = dense.detach().double().flatten()[places]
        size = int(np.prod(self.kernel_shape))
        summed = wide.new_zeros(size).index_add(0, labels, wide)
        return (summed / torch.bincount(labels, minlength=size).clamp(min=1)).reshape(self.kernel_shape)

    def conv(self, *, bias: bool, device: Any = None, dtype: torch.dtype | None = None) -> PlainConv:
        """Return a convolution of this geometry with fresh weights, of the dtype and on the device that are given.

        Raises:
            PlanError: If no convolution of torch pads so.
        """
        windows = self.windows
        return CONVOLUTIONS[windows.dimensions](
            self.in_channels,
            self.out_channels,
            cast(Any, windows.kernel_size),
            cast(Any, windows.stride),
            cast(Any, windows.padding_argument),
            cast(Any, windows.dilation),
            self.groups,
            bias,
            windows.padding_mode,
            device=device,
            dtype=dtype,
        )

    def to_text(self) -> str:
        """Return the geometry as JSON; `from_text` is the inverse.

        Example:
            >>> wiring = Wiring.of_conv(nn.Conv2d(3, 8, 5, padding=2), 28)
            >>> Wiring.from_text(wiring.to_text()) == wiring
            True
        """
        return json.dumps({**asdict(self), "windows": asdict(self.windows)})

    @staticmethod
    def from_text(text: str) -> Wiring:
        """Build from what `to_text` returned.

        Raises:
            PlanError: If it is something else.
        """
        try:
            held = json.loads(text)
            windows = {k: _tuples(v) for k, v in held.pop("windows").items()}
            return Wiring(**held, windows=Windows(**windows))
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise PlanError(f"geometry: expected what Wiring.to_text returned, got {text!r:.80} ({error})") from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value
