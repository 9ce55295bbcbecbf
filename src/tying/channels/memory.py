"""Tensors that lie in one memory without being one tensor."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def overlapping(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the tensors that overlap in memory with another one, and one with which they do.

    What lies between a tensor's first and last number counts as its own, also where it steps over some. Tensors side
    by side in one storage, as after `torch.nn.utils.vector_to_parameters`, don't overlap.

    Args:
        tensors: Different ones. Empty ones and those on the meta device have no memory.

    Example:
        >>> import torch
        >>> memory = torch.zeros(6)
        >>> overlapping({"left": memory[:3], "right": memory[3:]})
        {}
        >>> overlapping({"all": memory, "right": memory[3:]})
        {'right': 'all', 'all': 'right'}
    """
    spans: dict[tuple[str, int], list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        if tensor.numel() and not tensor.is_meta:
            reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = int(tensor.storage_offset()) * tensor.element_size()
            end = start + int(reach + 1) * tensor.element_size()
            storage = str(tensor.device), tensor.untyped_storage().data_ptr()
            spans.setdefault(storage, []).append((start, end, name))
    found: dict[str, str] = {}
    for together in spans.values():
        together.sort()
        farthest, reaching = 0, ""
        for start, end, name in together:
            if start < farthest:
                found.setdefault(name, reaching)
                found.setdefault(reaching, name)
            if end > farthest:
                farthest, reaching = end, name
    return found
