"""The networks of several benchmarks: those that are trained, weights of large ones, and small ones with a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu


class LeNet5(nn.Sequential):
    """Caffe's LeNet-5, with ReLU after the convolutions too: 431,080 parameters."""

    def __init__(self, channels: int = 20, more: int = 50, units: int = 500) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 5)
        self.rest1 = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
        self.conv2 = nn.Conv2d(channels, more, 5)
        self.rest2 = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        self.fc1 = nn.Linear(16 * more, units)
        self.rest3 = nn.ReLU()
        self.fc2 = nn.Linear(units, 10)


class Block(nn.Module):
    """Two convolutions with BatchNorm, added to what went in."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if (inputs, stride) != (outputs, 1):
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, inputs, H, W)` to `(N, outputs, H ÷ stride, W ÷ stride)`."""
        hidden = relu(self.first_norm(self.first(x)))
        return relu(self.second_norm(self.second(hidden)) + self.shortcut(x))


class ResNet20(nn.Sequential):
    """He et al., section 4.2 (arXiv 1512.03385), with projections for shortcuts."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(
            *(Block(width, width, 1) for _ in range(3)),
            *(Block(width * (1 if i == 0 else 2), width * 2, 2 if i == 0 else 1) for i in range(3)),
            *(Block(width * (2 if i == 0 else 4), width * 4, 2 if i == 0 else 1) for i in range(3)),
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width * 4, 10)


def resnet50() -> dict[str, tuple[int, ...]]:
    """The weights of its convolutions and of its head: 25.5 million numbers."""
    shapes: dict[str, tuple[int, ...]] = {"stem": (64, 3, 7, 7)}
    inputs = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            shapes |= {
                f"{stage}.{block}.reduce": (width, inputs, 1, 1),
                f"{stage}.{block}.mix": (width, width, 3, 3),
                f"{stage}.{block}.expand": (4 * width, width, 1, 1),
            }
            if block == 0:
                shapes[f"{stage}.shortcut"] = (4 * width, inputs, 1, 1)
            inputs = 4 * width
    return {**shapes, "head": (1000, 2048)}


def vit_small() -> dict[str, tuple[int, ...]]:
    """The weights of ViT-S/16: 21.9 million numbers."""
    return {"patches": (384, 3, 16, 16), **_blocks(12, 384), "head": (1000, 384)}


def gpt2() -> dict[str, tuple[int, ...]]:
    """The weights of GPT-2's blocks, embeddings and head (tied): 124 million numbers."""
    return {"tokens": (50257, 768), "positions": (1024, 768), **_blocks(12, 768)}


def small_layers(width: int) -> dict[str, tuple[int, ...]]:
    """Fifty linear layers."""
    return {str(layer): (width, width) for layer in range(50)}


def weights(shapes: dict[str, tuple[int, ...]]) -> nn.ParameterDict:
    """Return parameters of these shapes, drawn at random."""
    return nn.ParameterDict({name.replace(".", "_"): nn.Parameter(0.02 * torch.randn(s)) for name, s in shapes.items()})


def _blocks(count: int, width: int) -> dict[str, tuple[int, ...]]:
    one = {"qkv": (3 * width, width), "out": (width, width), "up": (4 * width, width), "down": (width, 4 * width)}
    return {f"{block}.{name}": shape for block in range(count) for name, shape in one.items()}


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    """784-300-10, with a batch of 128 and its labels."""
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10))
    return model, torch.randn(128, 784), torch.randint(10, (128,))


def resnet20_bare_shortcuts() -> tuple[nn.Module, Tensor, Tensor]:
    """`ResNet20` but for the projections, which have no BatchNorm behind them; with a batch of 128 and its labels.

    The kept figures of `align`, `bundle` and `prox` are of this one: sizes and draws depend on its tensors.
    """
    blocks = [
        _BareBlock(*sizes) for sizes in [(16, 16)] * 3 + [(16, 32)] + [(32, 32)] * 2 + [(32, 64)] + [(64, 64)] * 2
    ]
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return model, torch.randn(128, 3, 32, 32), torch.randint(10, (128,))


def transformer() -> tuple[nn.Module, Tensor, Tensor]:
    """6 layers of width 384 over 8 sequences of 64, with a label for each."""
    layer = nn.TransformerEncoderLayer(384, 6, 1536, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.Sequential(
        nn.TransformerEncoder(layer, 6, enable_nested_tensor=False), nn.Flatten(), nn.Linear(64 * 384, 10)
    )
    return model, torch.randn(8, 64, 384), torch.randint(10, (8,))


class _BareBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = outputs // inputs
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)])
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = relu(self.norms[0](self.first(x)))
        return relu(self.norms[1](self.second(hidden)) + self.shortcut(x))
