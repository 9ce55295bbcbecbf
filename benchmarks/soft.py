"""How far apart two networks are after training, against the strength of the soft tie; its limit; what it costs.

python -m benchmarks.soft [--seeds 5] [--epochs 20] [--rounds 200] [--out benchmarks/results/soft.json]

Two tasks: scikit-learn's digits, and the same digits turned by 90 degrees under noise. Two networks of different
architecture, 64-64-10 and 64-64-32-10, their first layers paired and equal at the start; SGD with momentum, float64.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from benchmarks.record import command_of, record
from benchmarks.timing import in_turn, spread, versus
from tying.enforce.ties.tie import tie_
from tying.enforce.ties.unique import unique_parameters
from tying.find.match import match
from tying.train.soft import SoftTie

STRENGTHS = [0.0, *(10.0**exponent for exponent in range(-4, 9))]
RATE, MOMENTUM, BATCH = 0.05, 0.9, 64
STEP = RATE / (1 - MOMENTUM)  # with it the prox comes to rest where the loss term does
PAIRS = {"a.0.*": "b.0.*"}
TRAINED, TESTED = slice(0, 900), slice(900, None)

Models = dict[str, nn.Module]


@cache
def tasks(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return images and labels of both tasks, in an order of the seed's."""
    images, labels = load_digits(return_X_y=True)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(images))
    straight = images[order] / 16
    turned = np.rot90(straight.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64) + 0.15 * generator.normal(size=(1, 64))
    noisy = turned + 0.15 * generator.normal(size=turned.shape)
    target = torch.from_numpy(labels[order])
    return {"a": (torch.from_numpy(straight), target), "b": (torch.from_numpy(noisy), target)}


def networks(seed: int) -> Models:
    torch.manual_seed(seed)
    first = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    second = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    models: Models = {"a": first.double(), "b": second.double()}
    SoftTie(match(models, pairs=PAIRS), math.inf).prox_(models, 1.0)  # both start where the hard tie does
    return models


def train(
    models: Models,
    seed: int,
    epochs: int,
    *,
    term: Callable[[], Tensor | float] = lambda: 0.0,
    after: Callable[[], None] = lambda: None,
) -> None:
    optimizer = SGD(unique_parameters(models), lr=RATE, momentum=MOMENTUM)
    order = torch.Generator().manual_seed(seed)
    data = {name: (x[TRAINED], y[TRAINED]) for name, (x, y) in tasks(seed).items()}
    for _ in range(epochs):
        for batch in torch.randperm(TRAINED.stop, generator=order).split(BATCH):
            optimizer.zero_grad()
            losses = [cross_entropy(models[name](x[batch]), y[batch]) for name, (x, y) in data.items()]
            loss = sum(losses) + term()
            if not math.isfinite(loss.item()):
                raise FloatingPointError("the loss term is too strong for this learning rate")
            loss.backward()
            optimizer.step()
            after()


@torch.no_grad()
def accuracies(models: Models, seed: int) -> list[float]:
    found = []
    for name, (x, y) in tasks(seed).items():
        found.append((models[name](x[TESTED]).argmax(1) == y[TESTED]).double().mean().item())
    return found


def soft(seed: int, epochs: int, strength: float, way: str) -> Models | None:
    """Return the trained networks; None where training diverged."""
    models = networks(seed)
    tie = SoftTie(match(models, pairs=PAIRS), strength)
    try:
        if way == "prox":
            train(models, seed, epochs, after=lambda: tie.prox_(models, STEP))
        else:
            train(models, seed, epochs, term=lambda: tie(models))
    except FloatingPointError:
        return None
    return models


def hard(seed: int, epochs: int) -> Models:
    models = networks(seed)
    tie_(models, match(models, pairs=PAIRS), gradient="mean")
    train(models, seed, epochs)
    return models


def apart(models: Models) -> float:
    found = SoftTie(match(models, pairs=PAIRS), 1.0).distances(models)
    return math.hypot(*found.values())


def largest_difference(models: Models, others: Models) -> float:
    """Over all weights of both networks, as their layers compute with them."""
    pairs = [
        (getattr(mine, leaf), getattr(theirs, leaf))
        for name in models
        for mine, theirs in zip(models[name].children(), others[name].children(), strict=True)
        if isinstance(mine, nn.Linear)
        for leaf in ("weight", "bias")
    ]
    return max(float((mine - theirs).detach().abs().max()) for mine, theirs in pairs)


def curve(way: str, seeds: int, epochs: int) -> list[dict[str, object]]:
    found = []
    for strength in STRENGTHS:
        if way == "loss" and 2 * RATE * strength >= 1 + MOMENTUM:
            found.append({"strength": strength, "distance": None, "why": "a gradient step would diverge"})
            continue
        trained = [soft(seed, epochs, strength, way) for seed in range(seeds)]
        if any(models is None for models in trained):
            found.append({"strength": strength, "distance": None, "why": "it diverged"})
            continue
        distances = [apart(models) for models in trained if models is not None]
        tested = [accuracies(models, seed) for seed, models in enumerate(trained) if models is not None]
        found.append(
            {
                "strength": strength,
                "distance": distances,
                "accuracy": {name: statistics.mean(each[at] for each in tested) for at, name in enumerate("ab")},
            }
        )
        print(
            f"{way:4} {strength:8.0e}  ‖w_A − w_B‖ {statistics.mean(distances):.3e}  {found[-1]['accuracy']}",
            flush=True,
        )
    return found


def monotone(points: list[dict[str, object]]) -> int:
    """In how many seeds no distance is larger than one at a smaller strength."""
    series = zip(*(point["distance"] for point in points if point["distance"]), strict=True)
    return sum(all(later <= earlier for earlier, later in itertools.pairwise(each)) for each in series)


def limit(seeds: int, epochs: int) -> dict[str, object]:
    strength = STRENGTHS[-1]
    differences, tested = [], []
    for seed in range(seeds):
        models = soft(seed, epochs, strength, "prox")
        assert models is not None
        tied = hard(seed, epochs)
        differences.append(largest_difference(models, tied))
        tested.append(accuracies(tied, seed))
    print(f"at {strength:.0e}: the largest difference to the hard tie is {max(differences):.1e}")
    return {
        "strength": strength,
        "largest_difference_to_hard_tie": differences,
        "accuracy_of_hard_tie": {n: statistics.mean(each[at] for each in tested) for at, n in enumerate("ab")},
    }


def overhead(width: int, batch: int, rounds: int) -> dict[str, object]:
    """A training step of two networks, width-width-10 behind 784 inputs, all but the heads paired: float32."""
    torch.manual_seed(0)
    x, y = torch.rand(batch, 784), torch.randint(10, (batch,))

    def build() -> tuple[Models, SGD]:
        models: Models = {
            name: nn.Sequential(
                nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
            )
            for name in "ab"
        }
        return models, SGD(unique_parameters(models), lr=1e-3, momentum=MOMENTUM)

    def step(kind: str, distance: str) -> Callable[[], None]:
        models, optimizer = build()
        tie = SoftTie(match(models, pairs={"a.0.*": "b.0.*", "a.2.*": "b.2.*"}), 1e-3, distance)

        def run() -> None:
            optimizer.zero_grad()
            loss = sum(cross_entropy(model(x), y) for model in models.values())
            if kind == "loss":
                loss = loss + tie(models)
            loss.backward()
            optimizer.step()
            if kind == "prox":
                tie.prox_(models, 1e-2)

        return run

    functions = {"plain": step("plain", "l2")}
    functions |= {f"{d}, loss term": step("loss", d) for d in ("l2", "l1", "huber", "cosine", "norm")}
    functions |= {f"{d}, prox": step("prox", d) for d in ("l2", "l1", "huber", "norm")}
    seconds = in_turn(functions, rounds)
    plain = seconds.pop("plain")
    result = {
        "network": f"784-{width}-{width}-10, twice, batch {batch}",
        "rounds": rounds,
        "plain_seconds": spread(plain),
        "ratio": {name: versus(taken, plain) for name, taken in seconds.items()},
    }
    for name, taken in seconds.items():
        print(f"{result['network']}: {name:20} {versus(taken, plain)['median']:.3f} × the plain step", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", default="benchmarks/results/soft.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    curves = {way: curve(way, options.seeds, options.epochs) for way in ("prox", "loss")}
    results = {
        "seeds": options.seeds,
        "epochs": options.epochs,
        **curves,
        "monotone_seeds": {way: monotone(points) for way, points in curves.items()},
        "limit": limit(options.seeds, options.epochs),
        "overhead": [overhead(64, 64, options.rounds), overhead(512, 128, options.rounds)],
    }
    record(options.out, command_of("soft", options), results)


if __name__ == "__main__":
    main()
