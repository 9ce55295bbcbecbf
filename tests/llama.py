"""A decoder of Llama's kind: RMSNorm, rotary positions, grouped-query attention, gated perceptrons, a tied head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as f


class LlamaBlock(nn.Module):
    """RMSNorm, rotary positions, two key/value heads for six query heads, a gated perceptron, no biases."""

    def __init__(self, features: int, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = heads, kv_heads, features // heads
        self.norm1, self.norm2 = (nn.RMSNorm(features, eps=1e-6) for _ in range(2))
        self.q_proj = nn.Linear(features, features, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(features, kv_heads * self.head_dim, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(features, features, bias=False)
        self.gate_proj, self.up_proj = (nn.Linear(features, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, features, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        y = self.norm1(x)
        q = self.q_proj(y).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(y).view(batch, length, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(y).view(batch, length, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        times = self.num_heads // self.num_key_value_heads
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        y = f.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))
        y = self.norm2(x)
        return x + self.down_proj(f.silu(self.gate_proj(y)) * self.up_proj(y))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat([-two, one], -1) * sin


class Llama(nn.Module):
    """A decoder of Llama's kind, as large as the smallest that tell stories; the table of words is the last layer."""

    def __init__(self, words: int = 32000, features: int = 288, hidden: int = 768, blocks: int = 6) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(words, features)
        self.layers = nn.ModuleList(LlamaBlock(features, hidden, 6, 2) for _ in range(blocks))
        self.norm = nn.RMSNorm(features, eps=1e-6)
        self.lm_head = nn.Linear(features, words, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        size = features // 6
        angles = torch.outer(torch.arange(64), 10000 ** (-torch.arange(0, size, 2) / size)).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x, length = self.embed_tokens(ids), ids.shape[1]
        for block in self.layers:
            x = block(x, self.cos[:length], self.sin[:length])
        return self.lm_head(self.norm(x))
