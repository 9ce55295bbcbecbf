"""Stage one in your own loop: GrOWL on the inputs of a small network for handwritten digits (8 × 8 pixels).

Pixels that carry nothing lose all their weights; the others are drawn toward each other. Runs in seconds on a CPU.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import tying
from tying import Groups, GrOWL

torch.manual_seed(0)
digits = load_digits()
split = train_test_split(digits.data / 16, digits.target, test_size=0.25, random_state=0, stratify=digits.target)
pixels, test_pixels, labels, test_labels = (torch.as_tensor(part) for part in split)
loader = DataLoader(TensorDataset(pixels.float(), labels), batch_size=32, shuffle=True)

model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

handle = tying.proximal(optimizer, model, {"0.weight": GrOWL(strength=2e-2)}, every="epoch")
for epoch in range(60):
    for x, y in loader:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    handle.epoch_end()
    if epoch % 20 == 19:
        norms = Groups.inputs().norms(model[0].weight)
        kept = norms > 0.05 * norms.max()
        accuracy = (model(test_pixels.float()).argmax(dim=1) == test_labels).float().mean()
        print(f"epoch {epoch + 1:2}   pixels left {int(kept.sum()):2} of 64   test accuracy {accuracy:.1%}")
handle.remove()

print("\nnorm of each pixel's weights, in tenths of the largest (· is zero):")
for line in (10 * norms / norms.max()).reshape(8, 8).tolist():
    print("   ", " ".join("·" if value == 0 else f"{min(value, 9):.0f}" for value in line))
