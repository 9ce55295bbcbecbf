"""Two networks for related tasks, drawn together in your own loop: three lines more than training each for itself.

The second task has few labels: the first helps it as far as the tie is strong. Runs in seconds on a CPU.
"""

from __future__ import annotations

import math

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import tying
from tying.train.strengths import Tightening

torch.manual_seed(0)
digits = load_digits()  # 8 × 8 pixels
pixels, labels = torch.as_tensor(digits.data / 16).float(), torch.as_tensor(digits.target)
order = torch.randperm(len(pixels))
pixels, labels = pixels[order], labels[order]
faint = 0.5 * pixels + 0.15 * torch.randn_like(pixels)  # the same digits, from a worse scanner

train = {"good": (pixels[:800], labels[:800]), "faint": (faint[800:830], labels[800:830])}  # 30 labels: few
test = {"good": (pixels[850:], labels[850:]), "faint": (faint[850:], labels[850:])}


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    return {
        "good": nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        "faint": nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10)),
    }


def fit(models: dict[str, nn.Module], soft: tying.SoftTie | None) -> None:
    optimizer = torch.optim.Adam(tying.unique_parameters(models), lr=3e-3)
    for step in range(150):
        optimizer.zero_grad()
        loss = sum(cross_entropy(models[name](x), y) for name, (x, y) in train.items())
        if soft is not None:
            loss = loss + soft(models, progress=step / 150)  # the third line
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(models: dict[str, nn.Module], name: str) -> float:
    x, y = test[name]
    return (models[name].eval()(x).argmax(1) == y).float().mean().item()


print("tie            apart   good   faint")
for title, strength in (
    ("none", 0.0),
    ("1e-3", 1e-3),
    ("1e-1", 1e-1),
    ("1e-4 to 1e2", Tightening(1e-4, 1e2)),
    ("shared", math.inf),
):
    models = networks()
    plan = tying.match(models, pairs={"good.0.*": "faint.0.*", "good.2.*": "faint.3.*"})  # the first line: what pairs
    soft = tying.SoftTie(plan, strength)  # the second: how strongly
    if strength == math.inf:
        tying.tie_(models, plan)  # the end of the road: one copy
        fit(models, None)
    else:
        fit(models, soft)
    apart = math.hypot(*soft.distances(models).values())
    print(f"{title:<12} {apart:7.3f} {accuracy(models, 'good'):6.1%} {accuracy(models, 'faint'):7.1%}")
