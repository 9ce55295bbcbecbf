"""Materialised layers, for the laws of what `explain` says."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def positive(layer: Any) -> Any:
    """Float64, all weights positive: no connection can cancel another."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 1)
    return layer.double().eval()


def matrix(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The dense matrix of an affine layer, by feeding it unit vectors: (output units, input units)."""
    units = torch.eye(int(np.prod(shape)), dtype=torch.float64).reshape(-1, *shape)
    with torch.no_grad():
        return torch.stack([(layer(u[None]) - layer(torch.zeros_like(u)[None])).flatten() for u in units], 1)


def products(layer: nn.Module, shape: tuple[int, ...]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.zeros(1, *shape, dtype=torch.float64))
    return counter.get_total_flops() // 2


def numbers(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())
