"""Prior knowledge as a plan: a picture and its mirror image mean the same, so mirrored pixels share their weights.

`declare` says which inputs are equal, `tie_` stores each of them once and keeps it so while you train, `untie_` gives
plain parameters back. Runs in seconds on a CPU.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import tying
from tying import Groups

torch.manual_seed(0)
digits = load_digits(n_class=4)  # 0 to 3, 8 × 8 pixels
pixels, labels = torch.as_tensor(digits.data / 16).float(), torch.as_tensor(digits.target)
mirrored = pixels.reshape(-1, 8, 8).flip(2).reshape(-1, 64)
train = torch.randperm(len(pixels))[:100]
test = torch.ones(len(pixels), dtype=torch.bool)
test[train] = False


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 4))


def fit(model: nn.Module) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)  # made after tie_: it steps what is stored
    for _ in range(100):
        optimizer.zero_grad()
        cross_entropy(model(pixels[train]), labels[train]).backward()
        optimizer.step()


def accuracy(model: nn.Module, images: torch.Tensor) -> float:
    return (model(images[test]).argmax(dim=1) == labels[test]).float().mean().item()


place = torch.arange(64).reshape(8, 8)
same = torch.minimum(place, place.flip(1)).flatten()  # the same label for a pixel and for the one it is mirrored to

free, tied = network(), network()
plan = tying.declare(tied, labels={("0.weight", Groups.inputs()): same.tolist()})
print(plan, "\n")
tying.tie_(tied, plan)

print("network   numbers   test accuracy   in the mirror")
for name, model in (("free", free), ("tied", tied)):
    fit(model)
    count = sum(p.numel() for p in tying.unique_parameters(model))
    print(f"{name:<9} {count:7,}   {accuracy(model, pixels):13.1%}   {accuracy(model, mirrored):13.1%}")

before = tied(pixels)
tying.untie_(tied)
print("\nuntied: plain parameters", [tuple(p.shape) for p in tied.parameters()])
print("        the same outputs:", torch.equal(tied(pixels), before))
