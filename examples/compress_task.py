"""Both stages by budget: a network for a medical table, eight times smaller, with the controls beside it.

A task is any object with these four functions: the network, how you train it, how you judge it, and what it takes.
Runs in seconds on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, Optimizer

import tying

table = load_breast_cancer()  # 569 biopsies, 30 measurements each: benign or not
measurements, labels = torch.as_tensor(table.data).float(), torch.as_tensor(table.target)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
parts = {"train": order[:300], "validation": order[300:430], "test": order[430:]}
known = measurements[parts["train"]]
measurements = (measurements - known.mean(0)) / known.std(0)


class Biopsies:
    """The task: benign or not, 300 biopsies to train on, 130 to choose by, 139 for the end."""

    epochs = 15

    def model(self) -> nn.Module:
        """Return a fresh network."""
        return nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 2))

    def fit(
        self,
        model: nn.Module,
        *,
        epochs: int,
        on_step: Callable[[Optimizer], None],
        on_epoch: Callable[[int], None],
        stage: str,
    ) -> None:
        """Train it: SGD with momentum (Adam spoils ties in stage one), and Adam in stage two."""
        two = stage == "two"
        optimizer = Adam(model.parameters(), lr=3e-3) if two else SGD(model.parameters(), lr=0.05, momentum=0.9)
        for epoch in range(epochs):
            for batch in parts["train"][torch.randperm(300)].split(30):
                optimizer.zero_grad()
                cross_entropy(model(measurements[batch]), labels[batch]).backward()
                optimizer.step()
                on_step(optimizer)
            on_epoch(epoch)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> float:
        """Return the accuracy on one part of the table."""
        part = parts[split]
        return (model(measurements[part]).argmax(dim=1) == labels[part]).float().mean().item()

    def example_inputs(self) -> Tensor:
        """Return a batch as the network takes it."""
        return measurements[:2]


result = tying.compress(Biopsies(), ratio=8, progress=False)

print(result.model)
print(f"\n{result.report}\n")
print(f"{result.data.budget}\n")
print("on the validation split          numbers   accuracy")
for point in {point.label: point for point in result.data.curve}.values():
    print(f"{point.label:<32} {point.values:7,}   {point.accuracy:8.1%}")
