"""The networks that the step of the penalties is timed on: the weights of large ones, and small ones that train."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu


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


def resnet20() -> tuple[nn.Module, Tensor, Tensor]:
    """He et al.'s for CIFAR-10 (arXiv 1512.03385), with a batch of 128 and its labels."""
    blocks = [_Block(*sizes) for sizes in [(16, 16)] * 3 + [(16, 32)] + [(32, 32)] * 2 + [(32, 64)] + [(64, 64)] * 2]
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


class _Block(nn.Module):
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
