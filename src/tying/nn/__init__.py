"""Layers, as torch.nn has them."""

from tying.nn.flat import FlatConv
from tying.nn.local import LocallyConnected1d, LocallyConnected2d
from tying.nn.tied import TiedConv1d, TiedConv2d, TiedConv3d, TiedLinear

__all__ = [
    "FlatConv",
    "LocallyConnected1d",
    "LocallyConnected2d",
    "TiedConv1d",
    "TiedConv2d",
    "TiedConv3d",
    "TiedLinear",
]
