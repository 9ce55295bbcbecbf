"""Layers, as torch.nn has them."""

from tying.nn.tied import TiedConv1d, TiedConv2d, TiedConv3d, TiedLinear

__all__ = ["TiedConv1d", "TiedConv2d", "TiedConv3d", "TiedLinear"]
