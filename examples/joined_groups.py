"""Channels of a residual network that vanish as one: joined groups, against every layer by itself.

In a residual network several layers read one channel, and it can go only when all of them have lost it. Each layer by
itself loses other inputs than the next one does; joined, all that reads a channel is one group. (At equal strength four
layers by themselves are pressed twice, √4 times, as hard as joined, and still don't agree.) Handwritten digits, 8 × 8
pixels; runs in seconds on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import tying
from tying import GroupLasso, Groups

EPOCHS, WIDTH = 15, 16
digits = load_digits()
pixels, labels = torch.as_tensor(digits.images / 16).float()[:, None], torch.as_tensor(digits.target)
train, test = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).split(1200)


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """Adds to the stream what two convolutions make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = convolution(WIDTH, WIDTH), convolution(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same size."""
        return x + self.write(torch.relu(self.read(x)))


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        convolution(1, WIDTH), nn.MaxPool2d(2), Block(), Block(), Block(), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(WIDTH, 10),
    )  # fmt: skip


def fit(model: nn.Module, rules: dict[Any, GroupLasso]) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, EPOCHS * 24, cycle_momentum=False)
    handle = tying.proximal(optimizer, model, rules)
    for _ in range(EPOCHS):
        for batch in train[torch.randperm(len(train))].split(50):
            optimizer.zero_grad()
            cross_entropy(model(pixels[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    handle.remove()
    return model.eval()


(stream,) = tying.joined_groups(network(), pixels[:2], names=["*.read.0.weight", "8.weight"])
readers = [part.parameter for part in stream.parts]
print(f"{stream.count} channels, each read by {', '.join(readers)}\n")
print("strength  groups      accuracy  inputs at zero, by layer  channels removed  numbers left")
for strength in (1.5, 3.0):
    ways = {"per layer": dict.fromkeys(readers, GroupLasso(strength)), "joined": {stream: GroupLasso(strength)}}
    for name, rules in ways.items():
        model = fit(network(), rules)
        accuracy = (model(pixels[test]).argmax(dim=1) == labels[test]).float().mean()
        zeros = [int((Groups.inputs().norms(model.get_parameter(reader)) == 0).sum()) for reader in readers]
        small = tying.compact(model, tying.TiePlan([]), pixels[:2])  # no plan: what is zero goes
        removed = WIDTH - small[-1].in_features
        left = sum(parameter.numel() for parameter in small.parameters())
        print(f"{strength:8}  {name:<10} {accuracy:9.1%}  {zeros!s:<24}  {removed:16}  {left:12,}")
