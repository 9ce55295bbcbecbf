"""An autoencoder whose decoder is its encoder transposed: half the weights, stored once, trained under a guard.

`declare` says that outputs of one layer are inputs of the other, `tie_` stores their weight once. What would break such
a tie in silence, had it been made by hand, is repaired or told. Handwritten digits, 8 × 8 pixels; runs in seconds on a
CPU.
"""

from __future__ import annotations

import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import tying
from tying import Groups

HIDDEN, STEPS = 40, 600
torch.manual_seed(0)
pixels = torch.as_tensor(load_digits().data / 16).float()
order = torch.randperm(len(pixels))
train, test = pixels[order[:100]], pixels[order[1000:]]  # few pictures: fewer weights fit them less closely


class Autoencoder(nn.Module):
    """Pictures to codes, and back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder, self.decoder = nn.Linear(64, HIDDEN), nn.Linear(HIDDEN, 64)

    def forward(self, x: Tensor) -> Tensor:
        """Return pictures of the same shape."""
        return self.decoder(self.encoder(x).tanh())


def fit(model: nn.Module, steps: int = STEPS) -> None:
    optimizer = torch.optim.Adam(tying.unique_parameters(model), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        mse_loss(model(train), train).backward()
        optimizer.step()


def error(model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return mse_loss(model(x), x).item()


free, tied = Autoencoder(), Autoencoder()
transposed = [("encoder.weight", Groups.outputs()), ("decoder.weight", Groups.inputs())]
plan = tying.declare(tied, equal=[transposed])
print(plan, "\n")
tying.tie_(tied, plan)

print("decoder          numbers   error on 100 pictures   on others")
for name, model in (("free", free), ("tied", tied)):
    fit(model)
    count = sum(p.numel() for p in tying.unique_parameters(model))
    print(f"{name:<15} {count:8,} {error(model, train):23.4f} {error(model, test):11.4f}")
print("equal bit for bit:", torch.equal(tied.decoder.weight, tied.encoder.weight.T))

print("\na layer replaced by its copy:")
tied.decoder = copy.deepcopy(tied.decoder)
print(" ", tying.check(tied))
tied(test)  # every forward looks, and mends what has the same values
print("  after a forward:", tying.check(tied))

print("\na layer replaced by another one:")
mine, tied.decoder = tied.decoder, nn.Linear(HIDDEN, 64)
try:
    tied(test)
except tying.TyingError as refusal:
    print(" ", refusal)
tied.decoder = mine

tying.untie_(tied)
fit(tied, steps=1)
print("\nuntied and trained on: equal is", torch.equal(tied.decoder.weight, tied.encoder.weight.T))
