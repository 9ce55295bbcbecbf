"""A layer over a batch in parts, so that what it needs in between stays in the cache."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

PART = 4 << 20
"""Bytes of output per part: a convolution on NCHW needs as much again in a layout of its own, and asking the system
for large blocks at every call takes about as long as the products of a small layer."""


def in_parts(layer: Callable[[Tensor], Tensor], batch: Tensor, size: int) -> Tensor:
    """Return `layer(batch)`, computed in parts of at most `PART` bytes of output: `(N, …)` → `(N, …)`, no gradients.

    In ⌈size ÷ PART⌉ parts, at least one and at most N, which differ by one sample at most; any dtype, that of the
    layer's outputs is returned.

    Args:
        layer: Computes each sample by itself.
        batch: N samples.
        size: Bytes of output, about.

    Example:
        >>> import torch
        >>> with torch.no_grad():
        ...     in_parts(torch.relu, torch.tensor([[-1.0], [2.0], [3.0]]), 2 * PART)
        tensor([[0.],
                [2.],
                [3.]])
    """
    parts = batch.tensor_split(max(1, min(len(batch), -(-size // PART))))
    first = layer(parts[0])
    if len(parts) == 1:
        return first
    whole = first.new_empty((len(batch), *first.shape[1:]))
    at = len(first)
    whole[:at] = first
    for part in parts[1:]:
        whole[at : at + len(part)] = layer(part)
        at += len(part)
    return whole
