"""LeNet-5 (20-50-500-10) on MNIST and Fashion-MNIST at 24× and 100×: tied and pruned, and the controls at equal size.

    python -m benchmarks.lenet [--seeds 5] [--jobs 2] [--out benchmarks/results/lenet.json]

Split 55,000 / 5,000 / 10,000, no augmentation; bfloat16 in autocast. Every network is trained for EPOCHS_ONE epochs
and then, as it is or compacted, for EPOCHS_TWO more. Strengths and shapes are chosen for seed 0 by validation accuracy;
the test split is looked at by networks after their last epoch, and nothing is chosen by it. "24×" = all parameters of
the network ÷ numbers stored after compaction; labels are not in that figure, they are in the bytes of the file.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import tying
from benchmarks.data import CACHE, Images, load
from benchmarks.networks import LeNet5
from benchmarks.record import command_of, record
from benchmarks.training import BATCH, accuracy, fingerprint, fit, kept, said, summarise, trained_once, wait
from tying import GroupLasso, Groups, GrOWL, TiePlan

INPUTS, UNITS = Groups.inputs(), Groups.outputs()
GROUPS = {"conv1.weight": (UNITS,), "conv2.weight": (UNITS, INPUTS), "fc1.weight": (UNITS, INPUTS)}
DATA = ("mnist", "fashion-mnist")
SIZES = (24, 100)
STRENGTHS = (1e-3, 4e-3)
EPOCHS_ONE, EPOCHS_TWO = 8, 10
GENTLER = 3
"""The convolutions hold 6 % of the values: they give up share³ of their energy where fc1 gives up a share."""
TIED = "tied, GrOWL before"
CONTROLS = ("tied, no penalty before", "pruned only", "narrow dense")
NARROW = {24: ((4, 10, 98), (10, 24, 28)), 100: ((2, 5, 43), (5, 10, 16))}
"""Channels, channels, units: all shrunk alike, or less in the convolutions."""
SETTINGS = {
    "epochs": [EPOCHS_ONE, EPOCHS_TWO],
    "batch": BATCH,
    "split": [55_000, 5_000, 10_000],
    "strengths": STRENGTHS,
    "gentler": GENTLER,
}
Choice = float | tuple[int, ...]
"""A strength, or the shape of a narrow network."""


def values_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


PARAMETERS = values_of(LeNet5())


@cache
def data(name: str) -> Images:
    return load(name)


def as_images(x: Tensor, _: object = None) -> Tensor:
    return x.reshape(-1, 1, 28, 28)


def stage_one(model: nn.Module, dataset: str, strength: float, seed: int, name: str) -> None:
    """SGD; GrOWL draws inputs together and group lasso removes units, once an epoch; or weight decay alone."""
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.0 if strength else 5e-4)
    rules: dict[Any, Any] = {}
    for weight in ("conv2.weight", "fc1.weight"):
        rules[weight, INPUTS] = GrOWL(strength)
        rules[weight, UNITS] = GroupLasso(2.5 * strength)
    handle = tying.proximal(optimizer, model, rules, every="epoch") if strength else None
    split = data(dataset).train
    fit(model, optimizer, split, epochs=EPOCHS_ONE, seed=seed, prepare=as_images, handle=handle, name=name)
    if handle is not None:
        handle.remove()


def stage_two(model: nn.Module, dataset: str, seed: int, name: str) -> None:
    optimizer = AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    fit(model, optimizer, data(dataset).train, epochs=EPOCHS_TWO, seed=seed + 1000, prepare=as_images, name=name)


def plan_at(model: nn.Module, share: float) -> TiePlan:
    """Let the groups of fc1 give up a share of their energy, and those of the small convolutions share^GENTLER."""
    convolutions = {name: groups for name, groups in GROUPS.items() if name.startswith("conv")}
    ties = [
        *tying.discover(model, convolutions, distortion=share**GENTLER),
        *tying.discover(model, {"fc1.weight": GROUPS["fc1.weight"]}, distortion=share),
    ]
    return TiePlan(ties)


def compacted(model: nn.Module, size: int, example: Tensor, *, tied: bool) -> nn.Module:
    """Return a network of at most that size and hardly less: by ties and pruning, or by pruning alone."""
    low, high = 0.0, 1.0
    best = model
    for _ in range(9):
        middle = (low + high) / 2
        plan = plan_at(model, middle)
        small = tying.compact(model, plan if tied else pruned_only(model, plan), example)
        if values_of(small) * size <= PARAMETERS:
            best, high = small, middle
        else:
            low = middle
    if best is model:
        raise RuntimeError(f"expected a network {size:g} times smaller, got none; weaken the penalty")
    return best


def pruned_only(model: nn.Module, plan: TiePlan) -> TiePlan:
    """Keep as many groups as the plan keeps values, those of largest norm, and tie none."""
    keep = {(tie.members[0].parameter, tie.members[0].groups): tie.partition.classes for tie in plan}
    return tying.discover(model, GROUPS, keep=keep)


def run(dataset: str, method: str, size: int, choice: Choice, seed: int, folder: Path) -> dict[str, Any]:
    """Train one network by both stages, or read what an earlier call left."""
    torch.set_num_threads(1)
    shape, strength = (choice, 0.0) if isinstance(choice, tuple) else ((), choice)
    chosen = "-".join(map(str, shape)) or f"{strength:g}"
    name = f"{dataset}-{method}-{size}-{chosen}-{seed}".replace(" ", "-").replace(",", "")

    def make() -> dict[str, Any]:
        split, example = data(dataset), as_images(data(dataset).train[0][:2])
        torch.manual_seed(seed)
        model = LeNet5(*shape)
        first = folder / f"stage-one-{dataset}-{'-'.join(map(str, shape)) or 'full'}-{strength:g}-{seed}.pt"
        trained_once(first, model, lambda: stage_one(model, dataset, strength, seed, f"{name}, stage one"))
        model.to(memory_format=torch.contiguous_format).eval()
        if "dense" not in method:
            model = compacted(model, size, example, tied=method != "pruned only")
        stage_two(model, dataset, seed, f"{name}, stage two")
        model.to(memory_format=torch.contiguous_format).eval()
        path = folder / f"{name}.safetensors"
        tying.save(model, path)
        return {
            "dataset": dataset,
            "method": method,
            "size": size,
            "choice": list(shape) or strength,
            "seed": seed,
            "shapes": [list(p.shape) for p in model.parameters()],
            "values": values_of(model),
            "operations": tying.measure(model, example_inputs=example, latency=False).model.operations,
            "file_bytes": path.stat().st_size,
            "validation": accuracy(model, split.validation, as_images),
            "test": accuracy(model, split.test, as_images),
        }

    return kept(folder / f"{name}.json", make)


def beside(mine: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a line says of LeNet-5 beside the accuracies."""
    operations = statistics.mean(run["operations"] for run in mine)
    return {"choice": mine[0]["choice"], "operations": operations, "shapes": mine[0]["shapes"]}


def _choice(pilot: dict[str, Any] | None) -> Choice:
    chosen = 0.0 if pilot is None else pilot["choice"]
    return tuple(chosen) if isinstance(chosen, list) else chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--controls", type=int, default=3, help="how many of the seeds for the controls")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", default="benchmarks/results/lenet.json")
    parser.add_argument("--runs", type=Path, default=CACHE / "lenet-runs", help="finished networks, to go on from")
    options = parser.parse_args()
    folder = options.runs / fingerprint(SETTINGS)
    folder.mkdir(parents=True, exist_ok=True)
    for name in DATA:
        data(name)
    with ProcessPoolExecutor(options.jobs, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        tried = [
            (dataset, method, size, choice)
            for dataset, size in product(DATA, SIZES)
            for method, choices in ((TIED, STRENGTHS), ("pruned only", STRENGTHS), ("narrow dense", NARROW[size]))
            for choice in choices
        ]
        pilots = wait([pool.submit(run, *each, 0, folder) for each in tried], "strengths and shapes")
        best: dict[Any, dict[str, Any]] = {}
        for pilot in pilots:
            key = pilot["dataset"], pilot["method"], pilot["size"]
            best[key] = max(best.get(key, pilot), pilot, key=lambda p: p["validation"])
        jobs = [
            (dataset, method, size, _choice(best.get((dataset, method, size))), seed)
            for seed, method, dataset in product(range(options.seeds), ("dense", TIED, *CONTROLS), DATA)
            for size in (SIZES if method != "dense" else (1,))
            if method not in CONTROLS or seed < options.controls
        ]
        rows = wait([pool.submit(run, *job, folder) for job in jobs], "all methods")
    rows.sort(key=lambda r: (r["dataset"] != "mnist", r["size"]))
    validated = [{k: p[k] for k in ("dataset", "method", "size", "choice", "validation")} for p in pilots]
    lines = summarise(rows, ("dataset", "method", "size"), PARAMETERS, beside)
    results = {"parameters": PARAMETERS, "settings": SETTINGS, "pilots": validated, "lines": lines}
    record(options.out, command_of("lenet", options), results)
    for line in lines:
        print(
            f"{line['dataset']:<14} {line['method']:<24} {line['ratio']:6.1f}×  {said(line)}"
            f"  file {statistics.mean(line['file_bytes']) / 1000:.1f} kB"
        )


if __name__ == "__main__":
    main()
