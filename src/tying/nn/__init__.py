"""Layers, as torch.nn has them."""

from tying.nn.local import LocallyConnected1d, LocallyConnected2d
from tying.nn.tied import TiedConv1d, TiedConv2d, TiedConv3d, TiedLinear

__all__ = ["LocallyConnected1d", "LocallyConnected2d", "TiedConv1d", "TiedConv2d", "TiedConv3d", "TiedLinear"]
