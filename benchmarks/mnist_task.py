"""MNIST as a task for `compress`: `tying compress benchmarks/mnist_task.py --max-drop 0.003`, from the repository."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a file, the folder above is not on the path

from benchmarks.data import Images, load

name = "mnist"
epochs = 20
BATCH = 128


@cache
def _data() -> Images:
    return load("mnist")


def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10))


def fit(
    model: nn.Module,
    *,
    epochs: int,
    on_step: Callable[[Optimizer], None],
    on_epoch: Callable[[int], None],
    stage: str = "dense",
) -> None:
    images, labels = _data().train
    optimizer = _optimizer(model, stage)
    steps = len(images) // BATCH
    schedule = CosineAnnealingLR(optimizer, epochs * steps)
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(images))
        shuffled, targets = images[order].reshape(-1, 1, 28, 28), labels[order]
        for step in range(steps):
            batch = slice(step * BATCH, (step + 1) * BATCH)
            loss = functional.cross_entropy(model(shuffled[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            on_step(optimizer)
            schedule.step()
        on_epoch(epoch)


def _optimizer(model: nn.Module, stage: str) -> Optimizer:
    if stage == "two":
        return AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    return SGD(model.parameters(), lr=0.1, momentum=0.9)


@torch.no_grad()
def evaluate(model: nn.Module, split: str) -> float:
    images, labels = getattr(_data(), split)
    return (model.eval()(images.reshape(-1, 1, 28, 28)).argmax(1) == labels).double().mean().item()


def example_inputs() -> Tensor:
    return _data().train[0][:2].reshape(-1, 1, 28, 28)
