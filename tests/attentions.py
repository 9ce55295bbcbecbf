"""Attention as people write it: q, k and v fused or apart, heads of their own or shared, softmax by hand or not."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as f

from llama import rotated

LAYOUTS = ("reshape", "last", "chunk", "split", "apart", "grouped")


class Heads(nn.Module):
    """`(batch, length, features)` → the same shape.

    Args:
        layout: How q, k and v come about. reshape: one layer, `(3, heads, size)`; last: one layer, `(heads, 3 · size)`;
            chunk, split: one layer, cut in three; apart: three layers; grouped: two query heads share a key/value.
        counted: The forward counts the heads in an attribute; otherwise it knows their size.
        by_hand: softmax(q kᵀ) v is written out.
        turned: Rotary positions.
    """

    def __init__(
        self, features: int, layout: str, *, heads: int = 4, size: int = 2, counted: bool = True, by_hand: bool = False,
        turned: bool = False, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.layout, self.counted, self.by_hand, self.turned = layout, counted, by_hand, turned
        self.num_heads, self.head_dim, self.embed_dim = heads, size, heads * size
        self.num_kv_heads = heads // 2 if layout == "grouped" else heads
        if layout in ("apart", "grouped"):
            self.q = nn.Linear(features, self.embed_dim, bias=bias)
            self.k, self.v = (nn.Linear(features, self.num_kv_heads * size, bias=bias) for _ in range(2))
        else:
            self.qkv = nn.Linear(features, 3 * self.embed_dim, bias=bias)
        self.out = nn.Linear(self.embed_dim, features)
        self.register_buffer("angles", torch.rand(64, size // 2).repeat(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        if self.turned:
            angles = self.angles[: x.shape[1]]
            q, k = (rotated(each, angles.cos(), angles.sin()) for each in (q, k))
        if self.layout == "grouped":
            k, v = (each.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for each in (k, v))
        if self.by_hand:
            y = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1) @ v
        else:
            y = f.scaled_dot_product_attention(q, k, v, is_causal=self.turned)
        return self.out(y.transpose(1, 2).reshape(*x.shape[:2], self.embed_dim if self.counted else -1))

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v, each `(batch, heads, length, size)`."""
        batch, length, _ = x.shape
        if self.layout in ("apart", "grouped"):
            return tuple(self.split(layer(x), n) for layer, n in self.layers())
        qkv = self.qkv(x)
        if self.layout == "reshape":
            return qkv.reshape(batch, length, 3, self.heads(), self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.layout == "last":
            return self.split(qkv, self.num_heads, 3).chunk(3, -1)
        if self.layout == "chunk":
            return tuple(self.split(part, self.num_heads) for part in qkv.chunk(3, -1))
        width = self.embed_dim if self.counted else qkv.shape[-1] // 3
        return tuple(self.split(part, self.num_heads) for part in qkv.split(width, -1))

    def layers(self) -> list[tuple[nn.Linear, int]]:
        return [(self.q, self.num_heads), (self.k, self.num_kv_heads), (self.v, self.num_kv_heads)]

    def heads(self) -> int:
        return self.num_heads if self.counted else -1

    def split(self, x: Tensor, heads: int, times: int = 1) -> Tensor:
        count = heads if self.counted else -1
        return x.view(*x.shape[:2], count, times * self.head_dim).transpose(1, 2)
