"""A model read as channels: what disappears with each, who reads it, and why one can't go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn


@dataclass(frozen=True)
class Slice:
    """Some indices of one axis of a parameter or of a BatchNorm statistic.

    Example:
        >>> print(Slice("conv.weight", 0, (3,)))
        conv.weight[axis 0: 3]
    """

    parameter: str
    """The first name under which the tensor stands in `model.state_dict()`."""
    axis: int
    indices: tuple[int, ...]
    """Ascending. The readers of a flattened convolution channel are its H·W inputs of the linear layer, in the
    order of the positions."""
    aliases: tuple[str, ...] = ()
    """The other names of the very same tensor, for ties and for modules with two names."""

    def __str__(self) -> str:
        return f"{self.parameter}[axis {self.axis}: {', '.join(map(str, self.indices))}]"


@dataclass(frozen=True)
class Channel:
    """A unit's output with all its readers: it can go, or be regularised, only as one.

    Guaranteed when `blocked` is None: with the slices of `readers` set to zero, the outputs of the model do not
    depend on the slices of `makers`; and the model without `slices` (every tensor cut, sizes adapted) computes
    the same. A literal size in `forward` (`view(-1, 256)`) is beyond what the graph can tell: compare afterwards.

    A blocked channel can't be cut, but its readers are still all of its readers. Exception: where it meets an
    operation without a rule, the reason names that operation, and what happens behind it is unknown.
    """

    makers: tuple[Slice, ...]
    """What makes it: output slices of the producers' weights and biases, BatchNorm entries, scales. Several
    producers where they are added up. Empty for an input of the model."""
    readers: tuple[Slice, ...]
    """Input slices of the weights that read it (axis 1 of `nn.Linear.weight` and `nn.ConvNd.weight`, axis 0 of
    `nn.ConvTransposeNd.weight`). Empty: nobody reads it."""
    blocked: str | None
    """Why it can't be removed, in words that name the operation and the module, or None."""

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """All that disappears with the channel: `makers` and `readers`, each (parameter, axis) once."""
        raise NotImplementedError


@dataclass(frozen=True)
class Channels:
    """The channels of a model, in the order of its parameters."""

    channels: tuple[Channel, ...]

    def __iter__(self) -> Iterator[Channel]:
        return iter(self.channels)

    def __len__(self) -> int:
        return len(self.channels)

    def of(self, parameter: str, axis: int, index: int) -> Channel | None:
        """Return the channel that this slice of the parameter makes or reads; any alias is a name.

        None where the slice belongs to no channel (an axis of a kernel, a parameter that the forward does not use).
        """
        raise NotImplementedError

    def made_by(self, parameter: str) -> tuple[Channel, ...]:
        """Return the channels that have the parameter among their makers."""
        raise NotImplementedError

    def read_by(self, parameter: str) -> tuple[Channel, ...]:
        """Return the channels that have the parameter among their readers."""
        raise NotImplementedError


def find_channels(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...]) -> Channels:
    """Find the channels of a model. The model is left as it is, training flags too.

    Args:
        model: Analysed in evaluation mode.
        example_inputs: As `model(*example_inputs)` takes them; a batch of 2 is enough.

    Raises:
        CompactError: If `torch.export` can't follow the forward (control flow that depends on the data).
    """
    raise NotImplementedError
