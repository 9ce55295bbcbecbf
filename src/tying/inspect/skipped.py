"""The tensors of a checkpoint that are not looked at, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from tying.store.state import dtype_name

_SAME = "the same tensor as "


@dataclass(frozen=True)
class Skipped:
    """A tensor that was not looked at, and why."""

    name: str
    reason: str


def identity(tensor: Tensor) -> tuple[object, ...]:
    """Return where the numbers lie: two names of one tensor are one weight."""
    if tensor.layout is not torch.strided or not tensor.numel() or tensor.is_meta:
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def unfit(tensor: Tensor, first: str, name: str, *, dimensions: int = 0) -> str | None:
    """Say why a tensor, whose first name is given, can't be looked at, or None.

    Args:
        tensor: Of any kind.
        first: The first name under which it was seen.
        name: The name under which it is seen now.
        dimensions: How many it needs.
    """
    if not tensor.is_floating_point():
        return f"{dtype_name(tensor.dtype)} numbers"
    if tensor.dim() < dimensions:
        return f"{tensor.dim()} dimension{'' if tensor.dim() == 1 else 's'}"
    if tensor.layout is not torch.strided or tensor.is_meta:
        return "no plain dense tensor"
    if not tensor.numel():
        return "empty"
    return f"{_SAME}{first}" if first != name else None


def reasons(skipped: tuple[Skipped, ...]) -> str:
    """Return how many were not looked at for which reason: `3 × 1 dimension, 1 × int64 numbers`."""
    same = f"{_SAME}another"
    counts = Counter(same if item.reason.startswith(_SAME) else item.reason for item in skipped)
    return ", ".join(f"{count} × {reason}" for reason, count in counts.most_common())
