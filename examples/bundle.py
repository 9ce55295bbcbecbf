"""Two networks for two questions about the same pictures, one body: trained tied, kept in one file, read back apart.

Which digit is it, and is it even? `match` pairs what has the same name and shape, `tie_` stores it once, `save` writes
both networks as one bundle, from which each is read with or without the other. Runs in seconds on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import tying

digits = load_digits()
pixels, digit = torch.as_tensor(digits.data / 16).float(), torch.as_tensor(digits.target)
answers = {"digit": digit, "even": (digit + 1) % 2}
train, test = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0)).split([1000, 797])


def network(classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes))


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    return {"digit": network(10), "even": network(2)}


models = networks()
plan = tying.match(models)  # by name and shape: the heads differ, and stay apart
print(plan, "\n")
tying.tie_(models, plan)

optimizer = torch.optim.Adam(tying.unique_parameters(models), lr=3e-3)  # each value once, whatever uses it
for _ in range(100):
    optimizer.zero_grad()
    losses = [cross_entropy(model(pixels[train]), answers[name][train]) for name, model in models.items()]
    torch.stack(losses).sum().backward()
    optimizer.step()


def accuracy(name: str, model: nn.Module) -> float:
    with torch.no_grad():
        return (model(pixels[test]).argmax(1) == answers[name][test]).float().mean().item()


with TemporaryDirectory() as folder:
    bundle = Path(folder) / "bundle.safetensors"
    tying.save(models, bundle)
    for name, model in models.items():
        tying.save(model, Path(folder) / name)
    apart = sum((Path(folder) / name).stat().st_size for name in models)
    print(f"one file for both: {bundle.stat().st_size:,} bytes; two files: {apart:,} bytes\n")

    alone = tying.load(bundle, network(2), name="even")
    print(f"even alone: {accuracy('even', alone):.1%} right, as before: {accuracy('even', models['even']):.1%}")
    both = tying.load(bundle, networks())
    weights = [model.get_parameter("0.weight") for model in both.values()]
    print("together they share again:", weights[0] is weights[1], "\n")

    files = [Path(folder) / f"{name}.safetensors" for name in models]  # as two training runs leave them
    for file in files:
        save_file({key: value.clone() for key, value in models[file.stem].state_dict().items()}, file)
    print(tying.inspect(*files))  # on the command line: tying inspect digit.safetensors even.safetensors
