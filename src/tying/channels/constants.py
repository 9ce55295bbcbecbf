"""What cannot vary with the input, proven, and its exact value: the outputs of dead units, as their readers see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Reading:
    """What one input index of a weight sees, over all calls of its layer."""

    value: float
    """The constant, exact in float64: the same at every position, in every sample, in every call."""
    padded: bool
    """Whether a zero-padded (or transposed) convolution reads it: then the border differs unless `value` is 0."""


@dataclass(frozen=True)
class Constants:
    """The constants that the weights of a model read."""

    readings: Mapping[tuple[str, int, int], Reading]
    """By (parameter, axis, index), every alias; only what is proven constant."""

    def foldable(self, parameter: str, axis: int, index: int) -> float | None:
        """Return the constant c that the reader's bias can take over (`bias += weight[:, index].sum(kernel) · c`).

        None where the input may vary, or is a non-zero constant that meets zero padding.
        """
        raise NotImplementedError


def find_constants(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...]) -> Constants:
    """Find which inputs of which weights can't vary with the input of the model.

    Args:
        model: As projected: its exact zeros are what stops variation. Analysed in evaluation mode, left as it is.
        example_inputs: As `model(*example_inputs)` takes them.

    Raises:
        CompactError: If `torch.export` can't follow the forward.
    """
    raise NotImplementedError
