"""The VGG-16 of *Learning to Share* (openreview rypT3fb0b) for CIFAR-10, and how its images are prepared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.training import cropped_and_flipped

WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
POOLED = (1, 3, 6, 9, 12)
"""After which of the convolutions, counted from 0, comes a 2 × 2 maximum."""
WEIGHTS = 14_977_728


class Vgg16(nn.Sequential):
    """13 convolutions 3 × 3 with BatchNorm and ReLU, 512 and 10 units; drawn and normalised as in the paper's code."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        inputs = 3
        for i, width in enumerate(widths):
            self.add_module(f"conv{i + 1}", nn.Conv2d(inputs, width, 3, padding=1))
            self.add_module(f"norm{i + 1}", nn.BatchNorm2d(width, eps=1e-3, momentum=0.01))
            self.add_module(f"relu{i + 1}", nn.ReLU())
            if i in POOLED:
                self.add_module(f"pool{i + 1}", nn.MaxPool2d(2))
            inputs = width
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(inputs, inputs)
        self.norm = nn.BatchNorm1d(inputs, eps=1e-3, momentum=0.01)
        self.fc2 = nn.Linear(inputs, 10)
        for layer in layers(self).values():
            nn.init.normal_(layer.weight, 0, (2 / (layer.weight.numel() / layer.weight.shape[1])) ** 0.5)
            nn.init.constant_(layer.bias, 0.1)


def layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return the 15 layers with weights, in order."""
    return {name: m for name, m in model.named_children() if isinstance(m, (nn.Conv2d, nn.Linear))}


def regularised(model: nn.Module) -> list[str]:
    """Return the names of the weights of layers 2 to 14."""
    return [f"{name}.weight" for name in layers(model)][1:-1]


def standardised(images: Tensor) -> Tensor:
    """Bring each image to mean 0 and deviation 1; a deviation counts as 1 / √(its numbers) at least."""
    flat = images.float().flatten(1)
    deviation = flat.std(1, correction=0, keepdim=True).clamp_min(flat.shape[1] ** -0.5)
    return ((flat - flat.mean(1, keepdim=True)) / deviation).reshape(images.shape)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pad to 36 × 36 with zeros, crop 32 × 32, flip, each image at random; then standardise."""
    return standardised(cropped_and_flipped(images, 2, generator))
