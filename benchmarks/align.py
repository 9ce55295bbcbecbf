"""How well `match(align=True)` finds permuted units again, how long it takes, and what it does for two trained nets.

Recovery: a network is copied, the units of every space are permuted at random, noise is added to each parameter (a
share of its standard deviation), and the units that find their places again are counted. Barrier: two perceptrons
trained on scikit-learn's digits from different seeds are averaged, as they are and with the second one aligned.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import networks
from benchmarks.record import command_of, record
from benchmarks.timing import spread
from tying.channels.find import find_channels
from tying.find.match import match
from tying.find.permute import Reference, permuted, spaces_of, tensors_of, write

NOISE = (0.0, 0.05)
BY = ("weights", "activations")


@dataclass(frozen=True)
class Case:
    """A network, what it takes, and how many samples activations are looked at on."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    samples: int
    """For activations; two are enough for weights."""
    large: bool = False


def cnn() -> nn.Module:
    """Three convolutions with BatchNorm and a hidden layer, for 28 × 28."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((1, 32, 64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(128 * 9, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 10)
    )


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3, 1 × 1, each with BatchNorm, beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        sizes = ((inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _, _ in sizes)
        project = stride > 1 or inputs != 4 * width
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
            if project
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        hidden = x
        for conv, norm in zip(self.convs, self.norms, strict=True):
            hidden = norm(conv(x if hidden is x else torch.relu(hidden)))
        return torch.relu(hidden + self.shortcut(x))


def resnet50() -> nn.Module:
    """He et al. 2016 (arXiv 1512.03385), table 1."""
    blocks: list[nn.Module] = []
    inputs = 64
    for stage, (width, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(count):
            blocks.append(Bottleneck(inputs, width, 2 if stage and not block else 1))
            inputs = 4 * width
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


class Patches(nn.Module):
    """Patches of 16 × 16 as tokens, with learned positions."""

    def __init__(self, features: int, count: int) -> None:
        super().__init__()
        self.conv, self.places = nn.Conv2d(3, features, 16, 16), nn.Parameter(0.02 * torch.randn(1, count, features))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.conv(x).flatten(2).transpose(1, 2) + self.places


class Mean(nn.Module):
    """Over the tokens."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x.mean(1)


def vit_small() -> nn.Module:
    """ViT-S/16 for 64 × 64, with the mean of the tokens read out; attention heads can't move."""
    layers = [
        nn.TransformerEncoderLayer(384, 6, 1536, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(12)
    ]
    return nn.Sequential(Patches(384, 16), *layers, nn.LayerNorm(384), Mean(), nn.Linear(384, 1000))


CASES = {
    "mlp 784-300-10": Case(lambda: networks.mlp()[0], (784,), 200),
    "cnn with batchnorm": Case(cnn, (1, 28, 28), 32),
    "resnet20": Case(lambda: networks.resnet20_bare_shortcuts()[0], (3, 32, 32), 16),
    "resnet50": Case(resnet50, (3, 64, 64), 16, large=True),
    "vit small": Case(vit_small, (3, 64, 64), 16, large=True),
}


def recover(case: Case, by: Any, noise: float, seed: int) -> dict[str, float]:
    """Permute a copy, disturb it, align it: units in their places, all units, whether all bits are back, seconds."""
    torch.manual_seed(seed)
    model = case.build().eval()
    other = copy.deepcopy(model)
    x = torch.randn(2 if by == "weights" else case.samples, *case.shape)
    spaces = spaces_of(find_channels(other, x[:2]))
    reasons = Reference("b", other, (x[:2],)).reasons(spaces)
    free = [space for space, reason in zip(spaces, reasons, strict=True) if reason is None]
    random = np.random.default_rng(seed)
    planted = [(space, random.permutation(space.units)) for space in free]
    tensors = tensors_of(other)
    write([(tensors[name], value) for name, value in permuted(tensors, planted).items()])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += noise * parameter.std(correction=0) * torch.randn_like(parameter)
    start = time.perf_counter()
    result = match({"a": model, "b": other}, align=True, example_inputs=x, by=by)
    seconds = time.perf_counter() - start
    found = [each.order for each in result.aligned if each.order is not None]
    right = sum(int((np.argsort(order) == np.array(got)).sum()) for (_, order), got in zip(planted, found, strict=True))
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return {
        "right": right,
        "units": sum(space.units for space in free),
        "exact": all(torch.equal(one, two) for one, two in pairs),
        "seconds": seconds,
    }


def recovery(name: str, case: Case, seeds: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for by in BY:
        for noise in NOISE:
            runs = [recover(case, by, noise, seed) for seed in range(seeds)]
            shares = [run["right"] / run["units"] for run in runs]
            rows.append(
                {
                    "network": name,
                    "by": by,
                    "noise": noise,
                    "seeds": seeds,
                    "units": runs[0]["units"],
                    "exact": sum(run["exact"] for run in runs),
                    "share": {"least": min(shares), "median": median(shares)},
                    "seconds": spread(np.array([run["seconds"] for run in runs])),
                }
            )
            print(
                f"{name}, by {by}, noise {noise:.0%}: units right {100 * min(shares):.2f} % at least, "
                f"exact {rows[-1]['exact']} of {seeds}, {rows[-1]['seconds']['median']:.2f} s"
            )
    return rows


# ---------------------------------------------------------------- two trained networks


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scikit-learn's digits: 1,257 to train and 540 to test, `(n, 64)` in [0, 1]."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.3, random_state=0, stratify=labels)
    return tuple(torch.tensor(p, dtype=torch.float32 if p.ndim == 2 else torch.int64) for p in parts)  # pyright: ignore


def trained(seed: int, data: tuple[Tensor, ...], epochs: int) -> nn.Module:
    torch.manual_seed(seed)
    train, _, labels, _ = data
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(train)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


def averaged(a: nn.Module, b: nn.Module) -> nn.Module:
    middle = copy.deepcopy(a)
    with torch.no_grad():
        for one, two in zip(middle.parameters(), b.parameters(), strict=True):
            one.lerp_(two, 0.5)
    return middle


def barrier(seed: int, data: tuple[Tensor, ...], epochs: int) -> dict[str, Any]:
    """Train two, average them: accuracy of each and of the mean, and how the weights agree, as they are and aligned."""
    train, test, _, labels = data
    a, b = (trained(2 * seed + i, data, epochs) for i in range(2))
    result: dict[str, Any] = {"alone": [accuracy(model, test, labels) for model in (a, b)]}
    for way in ("as they are", *BY):
        other = copy.deepcopy(b)
        options: dict[str, Any] = {} if way == "as they are" else {"align": True, "by": way, "example_inputs": train}
        told = match({"a": a, "b": other}, **options)
        assert accuracy(other, test, labels) == result["alone"][1]
        result[way] = {
            "average": accuracy(averaged(a, other), test, labels),
            "cosine": {pair.members[0].parameter: pair.cosine for pair in told.pairs},
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--large-seeds", type=int, default=3, help="for ResNet-50 and ViT-S")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "align.json")
    arguments = parser.parse_args()
    rows = [
        row
        for name, case in CASES.items()
        for row in recovery(name, case, arguments.large_seeds if case.large else arguments.seeds)
    ]
    data = digits()
    barriers = [barrier(seed, data, arguments.epochs) for seed in range(arguments.seeds)]
    print(f"digits, alone: {100 * np.mean([each['alone'] for each in barriers]):.2f} %")
    for way in ("as they are", *BY):
        values = [100 * each[way]["average"] for each in barriers]
        cosines = [np.mean(list(each[way]["cosine"].values())) for each in barriers]
        print(f"the average, {way}: {np.mean(values):.2f} ± {np.std(values):.2f} %, cosine {np.mean(cosines):.3f}")
    results = {"recovery": rows, "digits": {"epochs": arguments.epochs, "pairs": barriers}}
    record(arguments.out, command_of("align", arguments), results)


if __name__ == "__main__":
    main()
