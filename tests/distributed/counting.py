"""What is sent, as PyTorch's dispatcher sees it: all collectives of c10d and of DTensor are operations on tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Messages(TorchDispatchMode):
    """Counts the messages made inside of it, and the bytes of the tensors given to them."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back as what it is made of
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional") and "wait" not in func._opname:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.sent.append((func._opname, sum(tensor.nbytes for tensor in tensors)))
        return func(*args, **(kwargs or {}))
