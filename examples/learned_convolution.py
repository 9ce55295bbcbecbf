"""Does a layer find out by itself that it should be a convolution? Handwritten digits, 8 × 8 pixels, 300 to learn from.

A locally connected layer has a convolution's connections and a kernel of its own at each of 36 positions. A soft tie
draws the kernels together while it learns; `how_close` says how far it came, `discover` which kernels are left. Where
one is left, `compact` puts an `nn.Conv2d` in its place, which is trained further. Under a minute on a CPU.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy

import tying
from tying import Groups
from tying.find.convolution import hardwired, how_close
from tying.nn import LocallyConnected2d

digits = load_digits()
images, labels = torch.as_tensor(digits.images / 16).float()[:, None], torch.as_tensor(digits.target)
SEEDS, DRAWN, FURTHER = 2, 20, 20  # epochs with the kernels drawn together, and after looking at them


def network(first: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 10))


def fit(model: nn.Module, train: torch.Tensor, soft: tying.SoftTie | None, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train))].split(30):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            if soft is not None:
                soft.prox_(model, step=1e-2)  # after the optimizer's step: any strength is stable


def accuracy(model: nn.Module, test: torch.Tensor, shift: int = 0) -> float:
    with torch.no_grad():
        return (model(images[test].roll(shift, 3)).argmax(1) == labels[test]).float().mean().item()


def row(strength: float | None) -> tuple[float, ...]:
    """Averages over the seeds: test accuracy, the same one pixel aside, energy explained, kernels, numbers stored."""
    figures: list[tuple[float, ...]] = []
    for seed in range(SEEDS):
        parts = train_test_split(range(len(labels)), train_size=300, random_state=seed, stratify=labels)
        train, test = (torch.as_tensor(part) for part in parts)
        torch.manual_seed(seed)
        first = nn.Conv2d(1, 8, 3) if strength is None else LocallyConnected2d(1, 8, 8, 3)
        model = network(first)
        soft = None if not strength else tying.SoftTie(hardwired(model[0], name="0"), strength, to="centre")
        fit(model, train, soft, DRAWN)
        explained, kernels = 1.0, 1
        if strength is not None:
            plan = tying.discover(model, {"0.weight": Groups.positions()}, distortion=0.1)
            close = how_close(model[0], plan, name="0")
            explained, kernels = close.explained, close.kernels
            if kernels == 1:
                model, soft = tying.compact(model, hardwired(model[0], name="0"), images[:2]), None
        fit(model, train, soft, FURTHER)
        stored = sum(p.numel() for p in model[0].parameters())
        figures.append((accuracy(model, test), accuracy(model, test, 1), explained, kernels, stored))
    return tuple(sum(each) / SEEDS for each in zip(*figures, strict=True))


print(f"mean of {SEEDS} seeds; by chance one kernel explains {how_close(LocallyConnected2d(1, 8, 8, 3)).by_chance:.1%}")
print("\nfirst layer                 test   1 px aside   one kernel explains   kernels   numbers stored")
for name, strength in (
    ("locally connected", 0.0),
    ("  soft tie 0.1", 0.1),
    ("  soft tie 1", 1.0),
    ("  soft tie 10", 10.0),
    ("  soft tie 100", 100.0),
    ("nn.Conv2d", None),
):
    test, aside, explained, kernels, stored = row(strength)
    print(f"{name:<24} {test:7.1%}   {aside:10.1%}   {explained:19.1%}   {kernels:7.1f}   {stored:14,.0f}", flush=True)
