"""What two tensors that should be one have different, in words."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from tying.files.sealed import bytes_of

REMEDY = "give both the same values and call retie_, or untie_ the models and tie_ them again, from the mean of all"


def difference(name: str, expected: Tensor, other: str, got: Tensor) -> str | None:
    """Say how a tensor differs from the one it is tied with, or None if every bit is the same."""
    if expected is got:
        return None
    begin = f"{other}: expected the value of {name}, with which it is tied"
    if not alike(expected, got):
        shown = [f"a {type(t).__name__} {tuple(t.shape)} {t.dtype} on {t.device}" for t in (expected, got)]
        return f"{begin}, {shown[0]}, got {shown[1]}; {REMEDY}"
    one, two = _here(expected), _here(got)
    if one.shape != two.shape:
        return f"{begin}, {tuple(one.shape)} of it here, got {tuple(two.shape)}; shard both alike"
    if expected.is_meta or torch.equal(bytes_of(one), bytes_of(two)):
        return None
    one, two = one.flatten(), two.flatten()
    largest = int((one.double() - two.double()).abs().nan_to_num(torch.inf).argmax())
    return (
        f"{begin}, {one[largest].item():.6g}, got {two[largest].item():.6g} at number {largest} of {one.numel()}, "
        f"where they differ most; {REMEDY}"
    )


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether shape, dtype and device agree, and both are sharded or neither."""
    sharded = hasattr(one, "to_local") == hasattr(other, "to_local")
    return sharded and (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _here(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that lies here."""
    local = getattr(tensor, "to_local", None)
    return cast(Tensor, tensor.detach() if local is None else local().detach())
