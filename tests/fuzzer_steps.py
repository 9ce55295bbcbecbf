"""More steps for the fuzzer: norms, attention, products by name, shared layers, recurrences, layers already tied."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as f

from attentions import LAYOUTS, Heads
from fuzzer import MAPS, Drawn, Step, activate, channels, size
from tying.nn import TiedConv2d


def as_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).mT


def on_tokens(net: Drawn, at: int, module: nn.Module, *, residual: bool = False) -> int:
    """Let a module work on the positions of a map, `(batch, length, channels)`."""
    index, shape = net.part(module), net.values[at].shape[2:]

    def step(m: Drawn, v: list[Tensor]) -> Tensor:
        y = m.parts[index](as_tokens(v[at])).mT.unflatten(2, shape)
        return v[at] + y if residual else y

    return net.add(step, type(module).__name__)


def normalise_together(net: Drawn, at: int) -> int:
    c = channels(net, at)
    groups = net.draw.choice([g for g in (1, 2, 3, c) if c % g == 0])
    if net.draw.random() < 0.4:
        return net.module(nn.GroupNorm(groups, c, affine=net.draw.random() < 0.7), at)
    kinds = (nn.RMSNorm(c, eps=1e-6), nn.RMSNorm(c, elementwise_affine=False), nn.LayerNorm(c), HandMadeRMSNorm(c))
    return on_tokens(net, at, net.draw.choice(kinds))


class HandMadeRMSNorm(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def heads(net: Drawn, at: int) -> int:
    d = net.draw
    module = Heads(
        channels(net, at), d.choice(LAYOUTS), heads=d.choice((2, 4)), size=d.choice((2, 4)),
        counted=d.random() < 0.5, by_hand=d.random() < 0.5, turned=d.random() < 0.3, bias=d.random() < 0.7,
    )  # fmt: skip
    return on_tokens(net, at, module, residual=d.random() < 0.6)


class GatedPerceptron(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(features, 6), nn.Linear(features, 6), nn.Linear(6, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(f.silu(self.gate(x)) * self.up(x))


def gated(net: Drawn, at: int) -> int:
    return on_tokens(net, at, GatedPerceptron(channels(net, at)), residual=True)


def named_product(net: Drawn, at: int) -> int:
    out = net.draw.randint(2, 5)
    index = net.part(nn.Linear(channels(net, at), out, bias=False))
    steps: list[tuple[Step, str]] = [
        (lambda m, v: torch.einsum("bchw,oc->bohw", v[at], m.parts[index].weight), "einsum"),
        (lambda m, v: torch.einsum("oc,bchw->bhwo", m.parts[index].weight, v[at]).movedim(-1, 1), "einsum, turned"),
        (lambda m, v: torch.tensordot(v[at], m.parts[index].weight, ([1], [1])).movedim(-1, 1), "tensordot"),
        (lambda m, v: (m.parts[index].weight @ v[at].flatten(2)).unflatten(2, v[at].shape[2:]), "matmul"),
    ]
    return net.add(*net.draw.choice(steps))


def transpose(net: Drawn, at: int) -> int:
    c = channels(net, at)
    if size(net, at) > 4:
        return activate(net, at)
    groups = net.draw.choice([g for g in (1, 1, 2, c) if c % g == 0])
    stride = net.draw.choice((1, 2))
    return net.module(nn.ConvTranspose2d(c, 2 * groups, 2, stride, groups=groups, bias=net.draw.random() < 0.7), at)


def rearrange(net: Drawn, at: int) -> int:
    c = channels(net, at)
    steps: list[tuple[Step, str]] = [
        (lambda m, v: torch.stack(v[at].unbind(1)[::-1], 1), "unbind, stack"),
        (lambda m, v: torch.stack(v[at].unbind(2), 2), "unbind, stack"),
        (lambda m, v: v[at].roll(1, 2), "roll"),
        (lambda m, v: v[at].roll((1, -1), (1, 3)), "roll"),
        (lambda m, v: torch.cat(v[at].split(1, 1)[::-1], 1), "split, cat"),
        (lambda m, v: torch.where(v[at] > 0, v[at], v[at] * 0.1), "where"),
        (lambda m, v: v[at].clamp(-1, 1).masked_fill(v[at] > 0.5, 0.0), "masked_fill"),
        (lambda m, v: v[at].flatten(1).reshape(v[at].shape), "flatten, reshape"),
    ]
    if c % 2 == 0:
        steps.append((lambda m, v: f.channel_shuffle(v[at], 2), "channel_shuffle"))
    if c % 4 == 0:
        steps.append((lambda m, v: f.pixel_shuffle(v[at], 2)[:, :, ::2, ::2], "pixel_shuffle"))
    return net.add(*net.draw.choice(steps))


def shortcut_without_weights(net: Drawn, at: int) -> int:
    """ResNet's option A: every second position, channels padded with zeros."""
    c, more = channels(net, at), net.draw.randint(1, 3)
    body = net.module(nn.Conv2d(c, c + more, 3, 2, 1), at)
    left = net.draw.randint(0, more)
    return net.add(
        lambda m, v: v[body] + f.pad(v[at][:, :, ::2, ::2], (0, 0, 0, 0, left, more - left)), "padded shortcut"
    )


def again(net: Drawn, at: int) -> int:
    """A convolution with its norm, called on two values; or two layers with one weight."""
    c = channels(net, at)
    if net.draw.random() < 0.5:
        index = net.part(nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU()))
        return net.add(lambda m, v: m.parts[index](m.parts[index](v[at]) + v[at]), "called twice")
    one, two = net.part(nn.Conv2d(c, 3, 1)), net.part(nn.Conv2d(c, 3, 1))
    net.parts[two].weight = net.parts[one].weight
    return net.add(lambda m, v: m.parts[one](v[at]) * torch.sigmoid(m.parts[two](v[at])), "one weight twice")


def cube(net: Drawn, at: int) -> int:
    index = net.part(nn.Conv3d(channels(net, at), 3, (1, 2, 2), padding=(0, 1, 1)))
    return net.add(lambda m, v: torch.relu(m.parts[index](v[at].unsqueeze(2))).squeeze(2), "Conv3d")


class Positions(nn.Module):
    def __init__(self, length: int, features: int) -> None:
        super().__init__()
        self.table, self.scale = nn.Embedding(length, features), nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.table(torch.arange(x.shape[1]))) * self.scale


def positions(net: Drawn, at: int) -> int:
    length = net.values[at].shape[2:].numel()
    return on_tokens(net, at, Positions(length, channels(net, at)))


class Recurrence(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def recur(net: Drawn, at: int) -> int:
    if net.values[at].shape[2:].numel() > 12:
        return activate(net, at)
    return on_tokens(net, at, Recurrence(channels(net, at)))


def skip(net: Drawn, at: int) -> int:
    """As in a U-Net: a map made smaller, worked on, made larger again, beside what it was."""
    c, shape = channels(net, at), net.values[at].shape[2:]
    inner = net.draw.randint(2, 4)
    small = net.module(nn.Conv2d(c, inner, 3, padding=1), net.module(nn.MaxPool2d(2, ceil_mode=True), at))
    small = activate(net, small)
    ways: list[nn.Module] = [nn.ConvTranspose2d(inner, 3, 2, stride=2), nn.Upsample(scale_factor=2, mode="nearest")]
    large = net.module(net.draw.choice(ways), small)
    both = net.add(lambda m, v: torch.cat([v[at], v[large][:, :, : shape[0], : shape[1]]], 1), "skip")
    return net.module(nn.Conv2d(channels(net, both), 3, 3, padding=1), both)


class TiedHead(nn.Module):
    """A table of words that is the last layer as well."""

    def __init__(self, words: int, features: int) -> None:
        super().__init__()
        self.table, self.mixed = nn.Embedding(words, features), nn.Linear(features, features)
        self.head = nn.Linear(features, words, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        words = torch.arange(x.shape[1]) % self.table.num_embeddings
        return self.head(torch.tanh(self.mixed(self.table(words) + x)))


def tied_head(net: Drawn, at: int) -> int:
    return on_tokens(net, at, TiedHead(net.draw.randint(2, 5), channels(net, at)))


class Block(nn.Module):
    """`nn.MultiheadAttention`, whose heads stay, and a perceptron."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(features, heads, batch_first=True)
        self.up, self.down = nn.Linear(features, 6), nn.Linear(6, features)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.down(f.gelu(self.up(x)))


def multihead(net: Drawn, at: int) -> int:
    c = channels(net, at)
    return on_tokens(net, at, Block(c, net.draw.choice([n for n in (1, 2, 3) if c % n == 0])))


def tied_already(net: Drawn, at: int) -> int:
    c = channels(net, at)
    labels = [net.draw.choice((-1, 0, 1)) for _ in range(c)]
    labels[net.draw.randrange(c)] = 0
    return net.module(TiedConv2d.from_conv(nn.Conv2d(c, 3, 1), labels), at)


WIDE = (
    *MAPS,
    *(normalise_together, normalise_together, heads, heads, heads, gated, named_product, transpose, rearrange),
    *(rearrange, shortcut_without_weights, again, again, cube, positions, recur, tied_already),
    *(skip, skip, tied_head, multihead),
)
"""Everything that channels are to have a rule for, and what blocks."""
