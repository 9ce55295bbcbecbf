"""ResNet-20 on CIFAR-10 at a quarter of its stored values or less, and the controls at equal size and epochs.

    python -m benchmarks.resnet20 [--seeds 3] [--jobs 1] [--out benchmarks/results/resnet20.json]

Split 45,000 / 5,000 / 10,000; images padded by 4, cropped and flipped; bfloat16 in autocast. Every network is trained
for EPOCHS_ONE epochs and then, as it is, compacted or tied, for EPOCHS_TWO more, from a learning rate that each method
chooses for seed 0 by validation accuracy (what lost much needs a high one, what lost little a low one); or the dense
network of both stages is tied at last, and trained no more. The test split is looked at by finished networks, and
nothing is chosen by it.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.optim import SGD

import tying
from benchmarks.data import CACHE, Images, cifar10
from benchmarks.networks import ResNet20
from benchmarks.record import command_of, record
from benchmarks.training import (
    BATCH,
    accuracy,
    cropped_and_flipped,
    fingerprint,
    fit,
    kept,
    said,
    summarise,
    trained_once,
    wait,
)
from tying import Groups, GrOWL, TiePlan

INPUTS = Groups.inputs()
EPOCHS_ONE, EPOCHS_TWO = 10, 4
RATE_ONE, RATES_TWO = 0.2, (0.02, 0.2)
DECAY = 5e-4
STRENGTH = 5e-4
RATIO = 4.0
VALUES = 64
DENSE, NARROW, PRUNED, TIED = "dense", "narrow dense", "pruned only", "tied, GrOWL before"
SINGLE, SINGLE_AT_LAST = "single weights tied", "single weights tied at last"
CONTROLS = (TIED, "tied, no penalty before", PRUNED, NARROW, SINGLE)
"""Beside the single weights tied at last: what ties or prunes channels, is narrow, or trains single weights on."""
METHODS = (DENSE, SINGLE_AT_LAST, *CONTROLS)
TRAINED = tuple(method for method in METHODS if method != SINGLE_AT_LAST)
"""Of two stages; what is tied at last is the dense network of both."""
SETTINGS = {
    "epochs": [EPOCHS_ONE, EPOCHS_TWO],
    "batch": BATCH,
    "rates": [RATE_ONE, *RATES_TWO],
    "decay": DECAY,
    "strength": STRENGTH,
    "ratio": RATIO,
    "values of single weights": VALUES,
}
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).reshape(3, 1, 1)
DEVIATION = torch.tensor([0.2470, 0.2435, 0.2616]).reshape(3, 1, 1)


PARAMETERS = sum(p.numel() for p in ResNet20().parameters())


@cache
def data() -> Images:
    return cifar10()


def standardised(images: Tensor) -> Tensor:
    """Bring `(n, 3, 32, 32)` uint8 to float32 of mean 0 and deviation 1."""
    return (images.float() / 255 - MEAN) / DEVIATION


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pad by 4, crop 32 × 32 and flip, each image at random."""
    return cropped_and_flipped(standardised(images), 4, generator)


def train(model: nn.Module, epochs: int, rate: float, seed: int, name: str, strength: float = 0.0) -> nn.Module:
    """One stage: SGD, the prox of GrOWL over the inputs of every block's convolutions once an epoch."""
    optimizer = SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=DECAY)
    rules = {(f"blocks.*.{conv}.weight", INPUTS): GrOWL(strength) for conv in ("first", "second")}
    handle = tying.proximal(optimizer, model, rules, every="epoch") if strength else None
    fit(model, optimizer, data().train, epochs=epochs, seed=seed, prepare=augmented, handle=handle, name=name)
    if handle is not None:
        handle.remove()
    return model


def plan_at(model: nn.Module, share: float, *, tied: bool) -> TiePlan:
    """Leave a share of every block's inner channels and tie what is read; or reach the same size by pruning alone.

    The first convolution of a block reads a stream that other blocks read too: its inputs can only be tied. The
    second's can be pruned, and then their makers go.
    """
    keep: dict[str, int] = {}
    clusters: dict[str, int] = {}
    for i, block in enumerate(model.blocks):
        inner = block.second.in_channels
        if tied:
            clusters[f"blocks.{i}.first.weight"] = math.ceil(share * block.first.in_channels)
            clusters[f"blocks.{i}.second.weight"] = math.ceil(share**2 * inner)
        keep[f"blocks.{i}.second.weight"] = math.ceil((share if tied else share**2) * inner)
    groups = dict.fromkeys({**keep, **clusters}, INPUTS)
    return tying.discover(model, groups, keep=keep, clusters=clusters, support=0.0)


def compacted(model: nn.Module, *, tied: bool) -> nn.Module:
    """Return the largest network of at most a quarter of the values."""
    low, high = 0.0, 1.0
    best = model
    for _ in range(8):
        middle = (low + high) / 2
        small = tying.compact(model, plan_at(model, middle, tied=tied), standardised(data().train[0][:2]))
        if sum(p.numel() for p in small.parameters()) * RATIO <= PARAMETERS:
            best, low = small, middle
        else:
            high = middle
    if best is model:
        raise RuntimeError(f"expected a network with {RATIO:g} times fewer values, got none")
    return best


def single_weights_tied(model: nn.Module) -> nn.Module:
    """Leave VALUES distinct numbers in every convolution: nothing is smaller or faster but what is stored."""
    weights = {f"{name}.weight": Groups.elements() for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    plan = tying.discover(model, weights, clusters=VALUES, method="kmeans", support=0.0)
    tying.tie_(model, plan, gradient="mean")  # the sum would move a value as far as its hundreds of weights together
    return model


def row(model: nn.Module, path: Path) -> dict[str, Any]:
    """Note what a finished network is."""
    model = model.to(memory_format=torch.contiguous_format)
    tying.save(model, path)
    report = tying.measure(model, example_inputs=standardised(data().test[0][:2]), latency=False)
    return {
        "values": sum(p.numel() for p in tying.unique_parameters(model)),
        "operations": report.model.operations,
        "file_bytes": path.stat().st_size,
        "validation": accuracy(model, data().validation, standardised),
        "test": accuracy(model, data().test, standardised),
    }


def run(method: str, rate: float, seed: int, folder: Path) -> dict[str, Any]:
    """Make one network, or read what an earlier call left."""
    torch.set_num_threads(1)
    place = folder / f"{method}-{rate:g}-{seed}.json".replace(" ", "-").replace(",", "")

    def make() -> dict[str, Any]:
        if method == SINGLE_AT_LAST:
            run(DENSE, rate, seed, folder)
            model = ResNet20(16).eval()
            load_model(model, folder / f"{DENSE}-{rate:g}-{seed}.safetensors")
            single_weights_tied(model)
        else:
            model = trained(method, rate, seed, folder, place.stem)
        return {"method": method, "rate": rate, "seed": seed, **row(model, place.with_suffix(".safetensors"))}

    return kept(place, make)


def trained(method: str, rate: float, seed: int, folder: Path, name: str) -> nn.Module:
    """Train one network by both stages; the first one of each width and strength is shared by those that follow."""
    width = 8 if method == NARROW else 16
    strength = STRENGTH if method in (TIED, PRUNED) else 0.0
    torch.manual_seed(seed)
    model = ResNet20(width)
    stage_one = partial(train, model, EPOCHS_ONE, RATE_ONE, seed, f"{name}, stage one", strength)
    trained_once(folder / f"stage-one-{width}-{strength:g}-{seed}.pt", model, stage_one)
    model.to(memory_format=torch.contiguous_format)
    if method == SINGLE:
        single_weights_tied(model)
    elif method not in (DENSE, NARROW):
        model = compacted(model, tied=method != PRUNED)
    return train(model, EPOCHS_TWO, rate, seed + 1000, f"{name}, stage two")


def beside(rows: list[dict[str, Any]], mine: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a line of a method says beside the accuracies."""
    dense = {row["seed"]: row["test"] for row in rows if row["method"] == DENSE}
    below = statistics.mean(dense[run["seed"]] - run["test"] for run in mine)
    return {"rate": mine[0]["rate"], "below_dense": below, "operations": mine[0]["operations"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--controls", type=int, default=2, help="how many of the seeds for the controls")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", default="benchmarks/results/resnet20.json")
    parser.add_argument("--runs", type=Path, default=CACHE / "resnet20-runs", help="finished networks, to go on from")
    options = parser.parse_args()
    folder = options.runs / fingerprint(SETTINGS)
    folder.mkdir(parents=True, exist_ok=True)
    data()
    with ProcessPoolExecutor(options.jobs, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        pilots = wait([pool.submit(run, method, rate, 0, folder) for method in TRAINED for rate in RATES_TWO], "rates")
        rates = {
            method: max((p for p in pilots if p["method"] == method), key=lambda p: p["validation"])["rate"]
            for method in TRAINED
        }
        rates[SINGLE_AT_LAST] = rates[DENSE]
        jobs = [
            (method, rates[method], seed)
            for method in METHODS
            for seed in range(options.controls if method in CONTROLS else options.seeds)
        ]
        rows = wait([pool.submit(run, *job, folder) for job in jobs], "all methods")
    lines = summarise(rows, ("method",), PARAMETERS, partial(beside, rows))
    results = {
        "parameters": PARAMETERS,
        "settings": SETTINGS,
        "pilots": [{k: p[k] for k in ("method", "rate", "validation")} for p in pilots],
        "lines": lines,
    }
    record(options.out, command_of("resnet20", options), results)
    for line in lines:
        print(f"{line['method']:<28} {line['ratio']:4.1f}×  {said(line)}  {line['below_dense']:+.2f} below dense")


if __name__ == "__main__":
    main()
