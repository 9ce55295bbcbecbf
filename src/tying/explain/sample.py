"""One sample of a batch: which of the inputs are batched, and which belong to all samples alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from tying.errors import TyingError
from tying.explain.calls import copies
from tying.outputs import tensors_inside

MOST = 4
"""So many inputs are tried in every combination."""


def first_sample(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the first sample, as a batch of its own: the first input is cut, and those that are batched like it.

    An input whose first dimension is as long as the batch may be so by chance, as a mask of 7 × 7 beside 7 samples: the
    model is run on the whole batch and on the cut one, and what is cut must leave the first sample's outputs; where
    numbers are drawn at random, others for other sizes, it must leave their shapes.

    Args:
        model: In evaluation mode.
        inputs: As `model(*inputs)` takes them, the batch first; they are copied, and stay as they are.

    Raises:
        TyingError: If nothing that can be cut leaves the outputs, or the model does not take the batch.

    Example:
        >>> class Masked(nn.Module):
        ...     def forward(self, x, mask):
        ...         return x @ mask
        >>> [tuple(x.shape) for x in first_sample(Masked(), (torch.rand(3, 3), torch.rand(3, 3)))]
        [(1, 3), (3, 3)]
    """
    batch, *others = inputs
    like = [bool(other.ndim) and len(other) == len(batch) for other in others]
    if len(batch) == 1 or not any(like):
        return _cut(inputs, [False] * len(others))
    whole = taking(inputs, lambda: _outputs(model, inputs))
    again = taking(inputs, lambda: _outputs(model, inputs, seed=1))
    drawn = [i >= len(again) or not _near(again[i], output) for i, output in enumerate(whole)]
    for chosen in _choices(like):
        sample = _cut(inputs, chosen)
        try:
            made = _outputs(model, sample)
        except Exception:  # a sample that the model refuses is not cut right
            continue
        if len(made) == len(whole) and all(map(partial(_is_first, len(batch)), made, whole, drawn)):
            return sample
    raise TyingError(
        "example_inputs: expected inputs of which the first sample can be taken out, got outputs that are others for "
        f"it alone, for shapes {[tuple(x.shape) for x in inputs]}; pass a batch of one sample"
    )


def taking(inputs: tuple[Tensor, ...], run: Callable[[], Any]) -> Any:
    """Run the model on the inputs.

    Raises:
        TyingError: If it does not take them.
    """
    try:
        return run()
    except TyingError:
        raise
    except Exception as error:
        raise TyingError(
            f"example_inputs: expected inputs that the model takes, got {type(error).__name__}: {error} for shapes "
            f"{[tuple(x.shape) for x in inputs]}; pass a batch, or one sample of it, as the model takes it"
        ) from error


def _choices(like: list[bool]) -> Iterator[tuple[bool, ...]]:
    """Which of the other inputs to cut: all that can be, first; of many, all or none."""
    if sum(like) > MOST:
        yield from (tuple(like), (False,) * len(like))
    else:
        yield from product(*((True, False) if can else (False,) for can in like))


def _cut(inputs: tuple[Tensor, ...], others: tuple[bool, ...] | list[bool]) -> tuple[Tensor, ...]:
    pairs = zip(inputs, (True, *others), strict=True)
    return tuple((x[:1] if cut else x).detach().clone() for x, cut in pairs)


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...], seed: int = 0) -> list[Tensor]:
    with torch.no_grad():
        torch.default_generator.manual_seed(seed)
        return [output.detach() for output in tensors_inside(model(*copies(inputs)))]


def _is_first(samples: int, made: Tensor, whole: Tensor, drawn: bool) -> bool:
    """Whether an output for one sample is that of the first of many; only in shape, where numbers are drawn for it."""
    if whole.ndim and len(whole) == samples and made.shape != whole.shape:
        whole = whole[:1]
    return made.shape == whole.shape and (drawn or _near(made, whole))


def _near(made: Tensor, whole: Tensor) -> bool:
    """Whether two outputs are equal but for rounding."""
    if made.shape != whole.shape:
        return False
    if not made.is_floating_point():
        return bool(torch.equal(made, whole))
    near = 1000 * torch.finfo(made.dtype).eps
    size = float(whole[torch.isfinite(whole)].abs().max()) if bool(torch.isfinite(whole).any()) else 1.0
    return bool(torch.allclose(made, whole, rtol=near, atol=near * (size or 1.0), equal_nan=True))
