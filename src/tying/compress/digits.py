"""The embedded task: scikit-learn's 1,797 digits of 8×8 pixels, and a multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from tying.compress.task import Split, Stage

BATCH = 32


class Digits:
    """64-256-10 on scikit-learn's digits: 900 to train, 450 to choose, 447 to test, split by a fixed draw."""

    name = "digits"
    epochs = 40

    @cached_property
    def _splits(self) -> dict[str, tuple[Tensor, Tensor]]:
        from sklearn.datasets import load_digits  # pyright: ignore[reportMissingTypeStubs]

        images, labels = cast("Any", load_digits)(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(images))
        x = torch.from_numpy(images[order]).float().reshape(-1, 1, 8, 8) / 16
        y = torch.from_numpy(labels[order]).long()
        parts = {"train": slice(0, 900), "validation": slice(900, 1350), "test": slice(1350, None)}
        return {split: (x[part], y[part]) for split, part in parts.items()}

    def model(self) -> nn.Module:
        """Return the untrained network."""
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    def fit(
        self,
        model: nn.Module,
        *,
        epochs: int,
        on_step: Callable[[Optimizer], None],
        on_epoch: Callable[[int], None],
        stage: Stage = "dense",
    ) -> None:
        """Train in place: SGD with momentum, and Adam in stage two."""
        images, labels = self._splits["train"]
        optimizer = Adam(model.parameters(), lr=3e-3) if stage == "two" else SGD(model.parameters(), 0.1, momentum=0.9)
        schedule = CosineAnnealingLR(optimizer, epochs * (len(images) // BATCH))
        for epoch in range(epochs):
            model.train()
            for batch in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
                loss = functional.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                on_step(optimizer)
                schedule.step()
            on_epoch(epoch)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split) -> float:
        """Return the accuracy on a split."""
        images, labels = self._splits[split]
        return (model.eval()(images).argmax(1) == labels).double().mean().item()

    def example_inputs(self) -> Tensor:
        """Return two images."""
        return self._splits["train"][0][:2]
