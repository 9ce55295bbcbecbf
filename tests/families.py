"""The families of networks that people train, narrow, with the joined groups that each has, written down by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as f

from networks import Net, randomised

Readers = tuple[str, int]
"""The names of all that reads a channel, without ".weight", separated by spaces; and how many such channels."""


@dataclass(frozen=True)
class Family:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    joined: tuple[Readers, ...]
    """By hand, in the order of the parameters."""
    lost: tuple[str, ...] = ()
    """Words that occur in the reasons why channels are left out."""
    tokens: int = 0
    """The inputs are indices below this number."""
    free: int = 0
    """How many channels can be removed."""

    def make(self, seed: int = 0) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(seed)
        model = randomised(self.build())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.abs_()  # few dead units
        if self.tokens:
            return model, torch.randint(0, self.tokens, self.shape)
        return model, torch.randn(self.shape, dtype=torch.float64)


FAMILIES: dict[str, Family] = {}


def family(
    *shape: int, joined: tuple[Readers, ...], lost: tuple[str, ...] = (), tokens: int = 0, free: int = 0
) -> Callable[[Callable[[], nn.Module]], None]:
    def register(build: Callable[[], nn.Module]) -> None:
        FAMILIES[build.__name__] = Family(build, shape, joined, lost, tokens, free)

    return register


# ---------------------------------------------------------------- convolutions


def conv_norm(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Basic(nn.Module):
    """Two 3 × 3 convolutions beside a shortcut, which is a 1 × 1 convolution where sizes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = conv_norm(inputs, outputs, 3, stride), conv_norm(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(torch.relu(self.a(x))) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1 × 1 down, 3 × 3 (in groups), 1 × 1 up, beside a shortcut."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.a, self.b = conv_norm(inputs, width, 1), conv_norm(width, width, 3, stride, groups)
        self.c = conv_norm(width, outputs, 1)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))) + self.shortcut(x))


class Inverted(nn.Module):
    """1 × 1 up, depthwise 3 × 3, 1 × 1 down without activation, beside a shortcut where sizes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int = 2) -> None:
        super().__init__()
        wide = expansion * inputs
        self.up, self.depth = conv_norm(inputs, wide, 1), conv_norm(wide, wide, 3, stride, groups=wide)
        self.down, self.residual = conv_norm(wide, outputs, 1), stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(f.relu6(self.depth(f.relu6(self.up(x)))))
        return x + y if self.residual else y


def resnet20_of(widths: tuple[int, int, int] = (16, 32, 64), classes: int = 10, inputs: int = 3) -> nn.Module:
    """He et al. 2016 (arXiv 1512.03385), section 4.2, with projections for shortcuts."""
    sizes = [widths[0], *(width for width in widths for _ in range(3))]
    strides = [1, 1, 1, 2, 1, 1, 2, 1, 1]
    blocks = (Basic(a, b, stride) for (a, b), stride in zip(pairwise(sizes), strides, strict=True))
    stem = nn.Sequential(conv_norm(inputs, widths[0]), nn.ReLU())
    return Net(
        lambda m, x: m.head(m.blocks(m.stem(x)).mean((2, 3))),
        stem=stem, blocks=nn.Sequential(*blocks), head=nn.Linear(widths[-1], classes),
    )  # fmt: skip


@family(
    2, 3, 8, 8, free=2 + 3 + 4 + 3 * (2 + 3 + 4),
    joined=(
        ("stem.0.0", 3),
        ("blocks.0.a.0 blocks.1.a.0 blocks.2.a.0 blocks.3.a.0 blocks.3.shortcut.0", 2),
        ("blocks.0.b.0", 2), ("blocks.1.b.0", 2), ("blocks.2.b.0", 2),
        ("blocks.3.b.0", 3),
        ("blocks.4.a.0 blocks.5.a.0 blocks.6.a.0 blocks.6.shortcut.0", 3),
        ("blocks.4.b.0", 3), ("blocks.5.b.0", 3),
        ("blocks.6.b.0", 4),
        ("blocks.7.a.0 blocks.8.a.0 head", 4),
        ("blocks.7.b.0", 4), ("blocks.8.b.0", 4),
    ),
)  # fmt: skip
def resnet20() -> nn.Module:
    return resnet20_of((2, 3, 4), classes=2)


@family(
    2, 3, 12, 12, free=3 + 6 + 8 + 2 * (2 + 2) + 2 * (3 + 3),
    joined=(
        ("stem.0", 3),
        ("blocks.0.a.0 blocks.0.shortcut.0", 3), ("blocks.0.b.0", 2), ("blocks.0.c.0", 2),
        ("blocks.1.a.0 blocks.2.a.0 blocks.2.shortcut.0", 6), ("blocks.1.b.0", 2), ("blocks.1.c.0", 2),
        ("blocks.2.b.0", 3), ("blocks.2.c.0", 3),
        ("blocks.3.a.0 head", 8), ("blocks.3.b.0", 3), ("blocks.3.c.0", 3),
    ),
)  # fmt: skip
def resnet50() -> nn.Module:
    """Bottlenecks, a stem with pooling, projections at the start of every stage."""
    stem = nn.Sequential(nn.Conv2d(3, 3, 5, 2, 2, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    blocks = nn.Sequential(
        Bottleneck(3, 2, 6, 1), Bottleneck(6, 2, 6, 1), Bottleneck(6, 3, 8, 2), Bottleneck(8, 3, 8, 1)
    )
    return Net(
        lambda m, x: m.head(torch.flatten(f.adaptive_avg_pool2d(m.blocks(m.stem(x)), 1), 1)),
        stem=stem, blocks=blocks, head=nn.Linear(8, 2),
    )  # fmt: skip


@family(
    2, 3, 6, 6, free=4 + 2 + 6,
    joined=(("stem.0", 3), ("block.a.0 block.shortcut.0", 4), ("block.c.0", 2), ("head", 6)),
)  # fmt: skip
def resnext() -> nn.Module:
    """Two units at a time go through the convolution in groups, and are one channel."""
    return Net(
        lambda m, x: m.head(m.block(m.stem(x)).mean((2, 3))),
        stem=conv_norm(3, 4), block=Bottleneck(4, 4, 6, 1, groups=2), head=nn.Linear(6, 2),
    )  # fmt: skip


@family(
    2, 3, 8, 8, free=3 + 6 + 4 + 8 + 5,
    joined=(
        ("stem.0", 3), ("blocks.0.up.0", 3), ("blocks.0.down.0", 6),
        ("blocks.1.up.0 last.0", 4), ("blocks.1.down.0", 8), ("head", 5),
    ),
)  # fmt: skip
def mobilenet_v2() -> nn.Module:
    return Net(
        lambda m, x: m.head(f.relu6(m.last(m.blocks(f.relu6(m.stem(x))))).mean((2, 3))),
        stem=conv_norm(3, 3, 3, 2), blocks=nn.Sequential(Inverted(3, 4, 2), Inverted(4, 4, 1)),
        last=conv_norm(4, 5, 1), head=nn.Linear(5, 2),
    )  # fmt: skip


@family(
    2, 3, 6, 6, free=4 + 3 + 2 + 3,
    joined=(("stem", 3), ("layers.0.2 layers.1.2 layers.2.2 head", 4), ("layers.1.2 layers.2.2 head", 3),
            ("layers.2.2 head", 2), ("head", 3)),
)  # fmt: skip
def densenet() -> nn.Module:
    """Every layer reads all that came before, normalised anew."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.stem(x)
        for layer in m.layers:
            x = torch.cat([x, layer(x)], 1)
        return m.head(torch.relu(m.norm(x)).mean((2, 3)))

    def layer(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))

    layers = nn.ModuleList([layer(4, 3), layer(7, 2), layer(9, 3)])
    return Net(
        forward, stem=nn.Conv2d(3, 4, 3, bias=False), layers=layers, norm=nn.BatchNorm2d(12), head=nn.Linear(12, 2)
    )


@family(
    2, 3, 8, 8, free=3 + 4 + 5 + 4 + 6,
    joined=(("0", 3), ("3", 3), ("7", 4), ("10", 5), ("15", 4), ("18", 6)),
)  # fmt: skip
def vgg() -> nn.Module:
    def layer(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *layer(3, 3), *layer(3, 4), nn.MaxPool2d(2), *layer(4, 5), *layer(5, 4), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2),
    )  # fmt: skip


@family(
    2, 2, 8, 8, free=3 + 4 + 4 + 2,
    joined=(("first", 2), ("down head", 3), ("bottom", 4), ("up", 4), ("head", 2)),
)  # fmt: skip
def unet() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        fine = torch.relu(m.first(x))
        coarse = torch.relu(m.down(fine))
        return m.head(torch.cat([torch.relu(m.up(torch.relu(m.bottom(coarse)))), fine], 1))

    return Net(
        forward, first=nn.Conv2d(2, 3, 3, padding=1), down=nn.Conv2d(3, 4, 2, stride=2),
        bottom=nn.Conv2d(4, 4, 3, padding=1), up=nn.ConvTranspose2d(4, 2, 2, stride=2), head=nn.Conv2d(5, 2, 1),
    )  # fmt: skip


@family(
    2, 6, free=5 + 4 + 3 + 2,
    joined=(("trunk", 6), ("left.0 right.0 side", 5), ("left.2", 4), ("right.2", 3), ("head", 2)),
)  # fmt: skip
def branches() -> nn.Module:
    """Three layers read the trunk; the branches meet in a sum."""

    def forward(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(m.trunk(x))
        return m.head(torch.tanh(m.left(x) + m.right(x))), m.side(x)

    return Net(
        forward, trunk=nn.Linear(6, 5), left=nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)),
        right=nn.Sequential(nn.Linear(5, 3), nn.GELU(), nn.Linear(3, 2)), side=nn.Linear(5, 2), head=nn.Linear(2, 2),
    )  # fmt: skip


# ---------------------------------------------------------------- transformers


class RMSNorm(nn.Module):
    """As written by hand in most language models."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(features)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class ImageNorm(nn.Module):
    """LayerNorm over the channels of a map, as written by hand in ConvNeXt."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, features: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(features, features) for _ in range(3))
        self.out, self.heads, self.causal = nn.Linear(features, features), heads, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(layer(x), self.heads) for layer in (self.q, self.k, self.v))
        y = f.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class FusedAttention(nn.Module):
    """One product for q, k and v; softmax written by hand, with a mask in a buffer."""

    def __init__(self, features: int, heads: int, length: int) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(features, 3 * features), nn.Linear(features, features), heads
        self.register_buffer("mask", torch.ones(length, length, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~self.mask, -torch.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class PreNorm(nn.Module):
    def __init__(self, features: int, hidden: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(features), attention, nn.LayerNorm(features)
        self.up, self.down = nn.Linear(features, hidden), nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(f.gelu(self.up(self.norm2(x))))


class Gated(nn.Module):
    """A block of Llama's kind: RMSNorm, positions turned into q and k, a gated perceptron, no biases."""

    def __init__(self, features: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads = RMSNorm(features), RMSNorm(features), heads
        self.q, self.k, self.v, self.out = (nn.Linear(features, features, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(features, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, features, bias=False)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (split_heads(layer(y), self.heads) for layer in (self.q, self.k, self.v))
        y = f.scaled_dot_product_attention(turned(q, angle), turned(k, angle), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(f.silu(self.gate(y)) * self.up(y))


def turned(x: Tensor, angle: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-two, one], -1) * angle.sin()


SEPARATE = tuple(f"attention.{name}" for name in "qkv")


def stream(blocks: int, attention: tuple[str, ...], *others: str) -> str:
    return " ".join([*(f"blocks.{i}.{name}" for i in range(blocks) for name in (*attention, "up")), *others])


@family(
    2, 3, 5, free=2 + 6 + 2 + 6,
    joined=(
        ("embed", 5), (stream(2, SEPARATE, "head"), 4),
        ("blocks.0.attention.out", 2), ("blocks.0.down", 6), ("blocks.1.attention.out", 2), ("blocks.1.down", 6),
    ),
)  # fmt: skip
def transformer() -> nn.Module:
    blocks = nn.Sequential(*(PreNorm(4, 6, Attention(4, 2, causal=False)) for _ in range(2)))
    return Net(
        lambda m, x: m.head(m.norm(m.blocks(m.embed(x)))),
        embed=nn.Linear(5, 4), blocks=blocks, norm=nn.LayerNorm(4), head=nn.Linear(4, 2),
    )  # fmt: skip


@family(
    2, 3, 5, free=2 + 6 + 2 + 6,
    joined=(
        ("embed", 5), (stream(2, ("attention.qkv",), "head"), 4),
        ("blocks.0.attention.out", 2), ("blocks.0.down", 6), ("blocks.1.attention.out", 2), ("blocks.1.down", 6),
    ),
)  # fmt: skip
def transformer_fused() -> nn.Module:
    blocks = nn.Sequential(*(PreNorm(4, 6, FusedAttention(4, 2, 3)) for _ in range(2)))
    return Net(
        lambda m, x: m.head(m.norm(m.blocks(m.embed(x)))),
        embed=nn.Linear(5, 4), blocks=blocks, norm=nn.LayerNorm(4), head=nn.Linear(4, 2),
    )  # fmt: skip


@family(
    2, 3, tokens=7, free=2 + 6 + 2 + 6,
    joined=(
        ("table " + stream(2, SEPARATE), 4),
        ("blocks.0.attention.out", 2), ("blocks.0.down", 6), ("blocks.1.attention.out", 2), ("blocks.1.down", 6),
    ),
)  # fmt: skip
def gpt() -> nn.Module:
    """Learned positions; the table of words is also the last layer, and there it reads the stream."""

    def forward(m: nn.Module, ids: Tensor) -> Tensor:
        x = m.table(ids) + m.places(torch.arange(ids.shape[1]))
        return m.head(m.norm(m.blocks(x)))

    blocks = nn.Sequential(*(PreNorm(4, 6, Attention(4, 2, causal=True)) for _ in range(2)))
    model = Net(
        forward, table=nn.Embedding(7, 4), places=nn.Embedding(3, 4), blocks=blocks, norm=nn.LayerNorm(4),
        head=nn.Linear(4, 7, bias=False),
    )  # fmt: skip
    model.head.weight = model.table.weight
    return model


@family(
    2, 3, tokens=7, free=2 + 6,
    joined=(
        ("block.q block.k block.v block.gate block.up head", 4), ("block.out", 2), ("block.down", 6),
    ),
)  # fmt: skip
def llama() -> nn.Module:
    def forward(m: nn.Module, ids: Tensor) -> Tensor:
        return m.head(m.norm(m.block(m.table(ids), m.angle)))

    model = Net(forward, table=nn.Embedding(7, 4), block=Gated(4, 6, 2), norm=RMSNorm(4), head=nn.Linear(4, 7))
    model.register_buffer("angle", torch.rand(3, 1).repeat(1, 2))
    return model


@family(
    2, 3, 6, 6, free=2 + 6,
    joined=(("patch", 3), (stream(1, SEPARATE, "head"), 4), ("blocks.0.attention.out", 2), ("blocks.0.down", 6)),
)  # fmt: skip
def vit() -> nn.Module:
    """Patches as tokens, one more token that is learned and read out, learned positions."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        patches = m.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.token.expand(len(x), -1, -1), patches], 1) + m.places
        return m.head(m.norm(m.blocks(x))[:, 0])

    model = Net(
        forward, patch=nn.Conv2d(3, 4, 3, 3), blocks=nn.Sequential(PreNorm(4, 6, Attention(4, 2, causal=False))),
        norm=nn.LayerNorm(4), head=nn.Linear(4, 2),
    )  # fmt: skip
    model.token, model.places = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 5, 4))
    return model


@family(2, 3, 6, 6, free=6, joined=(("stem", 3), ("up head", 4), ("down", 6)))
def convnext() -> nn.Module:
    """A depthwise convolution reads the stream, and is normalised by hand; the block's output has a learned scale."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.norm(m.depth(x)).permute(0, 2, 3, 1)
        y = m.down(f.gelu(m.up(y))) * m.scale
        return m.head(m.last((x + y.permute(0, 3, 1, 2)).mean((2, 3))))

    model = Net(
        forward, stem=nn.Conv2d(3, 4, 2, 2), depth=nn.Conv2d(4, 4, 3, padding=1, groups=4), norm=ImageNorm(4),
        up=nn.Linear(4, 6), down=nn.Linear(6, 4), last=nn.LayerNorm(4), head=nn.Linear(4, 2),
    )  # fmt: skip
    model.scale = nn.Parameter(torch.rand(4))
    return model
