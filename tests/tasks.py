"""Tiny tasks for `compress`: a few hundred samples, a fit in a tenth of a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Optimizer

CLASSES = 4


class Corners:
    """Which of four corners a point in 12 dimensions is near to; a third of the dimensions say nothing."""

    name = "corners"
    epochs = 3
    shape: tuple[int, ...] = (12,)

    def __init__(self) -> None:
        self.stages: list[str] = []
        """The stage of every fit that was begun."""

    def data(self, split: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed({"train": 0, "validation": 1, "test": 2}[split])
        labels = torch.arange(240) % CLASSES
        points = functional.one_hot(labels, CLASSES).repeat(1, 3).float()
        points[:, 8:] = 0
        return points + 0.35 * torch.randn(points.shape, generator=generator), labels

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, CLASSES))

    def fit(
        self,
        model: nn.Module,
        *,
        epochs: int,
        on_step: Callable[[Optimizer], None],
        on_epoch: Callable[[int], None],
        stage: str,
    ) -> None:
        self.stages.append(stage)
        points, labels = self.data("train")
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        for epoch in range(epochs):
            model.train()
            for batch in torch.randperm(len(points)).split(24):
                optimizer.zero_grad()
                functional.cross_entropy(model(points[batch]), labels[batch]).backward()
                optimizer.step()
                on_step(optimizer)
            on_epoch(epoch)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> float:
        points, labels = self.data(split)
        return (model(points).argmax(1) == labels).double().mean().item()

    def example_inputs(self) -> Tensor:
        return self.data("train")[0][:2]


class Stripes(Corners):
    """Images of 8×8 with stripes of four directions: convolutions that pad, batch norm, pooling."""

    name = "stripes"
    epochs = 2

    def data(self, split: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed({"train": 0, "validation": 1, "test": 2}[split])
        labels = torch.arange(240) % CLASSES
        row, column = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
        patterns = torch.stack([row, column, row + column, row - column]) % 4 < 2
        images = patterns[labels].float()[:, None]
        return images + 0.3 * torch.randn(images.shape, generator=generator), labels

    def model(self) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
            *(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, CLASSES)),
        )


def of(task: Any, **changes: Any) -> Any:
    """The task with other functions."""
    for name, value in changes.items():
        setattr(task, name, value)
    return task
