"""784-300-10 on MNIST at 12×, 24×, 48× and 96×: the penalties of the field, and the controls, at equal size.

    python -m benchmarks.mnist [--seeds 5] [--jobs 2] [--out benchmarks/results/mnist.json]

Split 55,000 / 5,000 / 10,000. A strength is chosen per method and size by the mean validation accuracy over all seeds;
the test split is looked at for the chosen ones only. "24×" = all parameters of the network ÷ numbers stored after
compaction; labels are not in that figure, they are in `stored` and in the bytes of the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import tying
from benchmarks.data import CACHE, Images, load
from benchmarks.record import command_of, record
from benchmarks.training import said, tested, wait
from tying import GroupLasso, Groups, GrOWL, Lasso, TiePlan
from tying.measure import sharing

INPUTS, UNITS = Groups.inputs(), Groups.outputs()
WEIGHT = "fc1.weight"
SIZES = (12, 24, 48, 96)
EPOCHS_ONE, EPOCHS_TWO, BATCH = 40, 30, 128
PAPER = 24.1
STRENGTHS = {
    "growl": (5e-4, 1e-3, 2e-3),
    "group lasso": (5e-4, 1e-3, 2e-3),
    "lasso": (3e-6, 1e-5, 3e-5),
    "none": (0.0,),
}


@dataclass(frozen=True)
class Trained:
    """One network after stage two, as a row of the results."""

    method: str
    size: float
    seed: int
    strength: float
    inputs: int
    units: int
    values: int
    file_bytes: int
    validation: float
    seconds: float
    path: str


class Network(nn.Sequential):
    """784-300-10 with ReLU: 238,510 parameters."""

    def __init__(self, units: int = 300) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, units)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(units, 10)


PARAMETERS = sum(p.numel() for p in Network().parameters())


@cache
def data() -> Images:
    return load("mnist")


def rules(method: str, strength: float) -> dict[Any, Any]:
    """GrOWL draws inputs together and group lasso removes units; constant weights of the ramp's mean compare them."""
    if method == "growl":
        return {(WEIGHT, INPUTS): GrOWL(strength), (WEIGHT, UNITS): GroupLasso(2.5 * strength)}
    if method == "group lasso":
        return {(WEIGHT, INPUTS): GroupLasso(2.5 * strength), (WEIGHT, UNITS): GroupLasso(2.5 * strength)}
    if method == "lasso":
        return {WEIGHT: Lasso(strength)}
    return {}


def train(model: nn.Module, optimizer: Optimizer, epochs: int, seed: int, handle: Any = None) -> float:
    """Train by cross-entropy under a cosine schedule; return the seconds."""
    images, labels = data().train
    steps = len(images) // BATCH
    schedule = CosineAnnealingLR(optimizer, epochs * steps)
    generator = torch.Generator().manual_seed(seed)
    begun = time.perf_counter()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        shuffled, targets = images[order], labels[order]
        for step in range(steps):
            batch = slice(step * BATCH, (step + 1) * BATCH)
            loss = functional.cross_entropy(model(shuffled[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if handle is not None:
            handle.epoch_end()
    return time.perf_counter() - begun


@torch.no_grad()
def accuracy(model: nn.Module, split: tuple[Tensor, Tensor]) -> float:
    return 100 * (model(split[0]).argmax(1) == split[1]).double().mean().item()


def sgd(model: nn.Module, decay: float) -> Optimizer:
    return SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=decay, fused=True)


def stage_one(method: str, strength: float, seed: int) -> Network:
    torch.manual_seed(seed)
    model = Network()
    decay = 5e-4 if method == "none" else 0.0
    optimizer = sgd(model, decay)
    handle = tying.proximal(optimizer, model, rules(method, strength), every="epoch") if method != "none" else None
    train(model, optimizer, EPOCHS_ONE, seed, handle)
    return model


def stage_two(small: nn.Module, seed: int) -> None:
    train(small, AdamW(small.parameters(), lr=2e-3, weight_decay=0.05, fused=True), EPOCHS_TWO, seed)


def stored(plan: TiePlan) -> int:
    """Count what 784-300-10 stores once the plan over fc1's units and inputs is compacted."""
    kept = {tie.members[0].groups: tie.partition.classes for tie in plan}
    units = kept.get(UNITS, 300)
    return kept[INPUTS] * units + units + 10 * units + 10


def plan_for(model: nn.Module, size: float) -> TiePlan:
    """Let inputs and units give up the same share of their energy, as little as the size asks."""
    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        plan = tying.discover(model, {WEIGHT: (UNITS, INPUTS)}, distortion=middle)
        low, high = (low, middle) if stored(plan) * size <= PARAMETERS else (middle, high)
    return tying.discover(model, {WEIGHT: (UNITS, INPUTS)}, distortion=high)


def pruned_only(model: nn.Module, plan: TiePlan) -> TiePlan:
    """Keep as many inputs and units as the plan keeps values, those of largest norm, and tie none."""
    kept = {(WEIGHT, tie.members[0].groups): tie.partition.classes for tie in plan}
    return tying.discover(model, {WEIGHT: (UNITS, INPUTS)}, keep=kept)


def random_clusters(plan: TiePlan, seed: int) -> TiePlan:
    """Shuffle which input has which label."""
    generator = np.random.default_rng(seed)
    ties = []
    for tie in plan:
        labels = tie.partition.labels.copy()
        if tie.members[0].groups == INPUTS:
            labels[labels >= 0] = generator.permutation(labels[labels >= 0])
        ties.append(tying.Tie.of(WEIGHT, tie.members[0].groups, labels))
    return TiePlan(ties)


def cut_inputs(model: nn.Module, method: str) -> TiePlan:
    """Tie the inputs of the first layer alone, as the paper does: its definition counts nothing else."""
    clusters = int(784 / PAPER) if method == "ward" else None
    return tying.discover(model, {WEIGHT: INPUTS}, method=method, clusters=clusters, preference=0.6)


class Workbench:
    """Makes rows of one seed, and keeps them and their networks in a folder: what is there already is read."""

    def __init__(self, folder: Path, job: str, seed: int) -> None:
        torch.set_num_threads(1)
        self.folder, self.seed, self.rows = folder, seed, []
        self.record = folder / f"{job}-{seed}.json".replace(" ", "-")

    def finished(self) -> list[dict[str, Any]] | None:
        """Return the rows of an earlier call, if there was one."""
        return json.loads(self.record.read_text()) if self.record.is_file() else None

    def finish(self) -> list[dict[str, Any]]:
        """Keep the rows and return them."""
        content = [asdict(row) for row in self.rows]
        self.record.write_text(json.dumps(content))
        return content

    def path(self, method: str, size: float, strength: float) -> Path:
        """Return where a network is kept."""
        name = f"{method}-{size:g}-{strength:g}-{self.seed}.safetensors"
        return self.folder / name.replace(", ", "-").replace(" ", "-")

    def add(self, method: str, size: float, strength: float, model: nn.Module, plan: TiePlan | None) -> None:
        """Retrain what the plan leaves of a network (None: take it as it is), and note what came of it."""
        begun = time.perf_counter()
        small: Any = model
        if plan is not None:
            small = tying.compact(model, plan, data().train[0][:2])
            stage_two(small, self.seed)
        path = self.path(method, size, strength)
        tying.save(small, path)
        inputs = 784 if plan is None else next(t.partition.classes for t in plan if t.members[0].groups == INPUTS)
        self.rows.append(
            Trained(
                method=method,
                size=size,
                seed=self.seed,
                strength=strength,
                inputs=inputs,
                units=small.fc2.in_features,
                values=sum(p.numel() for p in small.parameters()),
                file_bytes=path.stat().st_size,
                validation=accuracy(small, data().validation),
                seconds=time.perf_counter() - begun,
                path=path.name,
            )
        )


def run(method: str, strength: float, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Train one network in stage one, and tie it at every size; or read what an earlier call left."""
    bench = Workbench(folder, f"{method}-{strength:g}", seed)
    if (done := bench.finished()) is not None:
        return done
    if method == "narrow dense":
        for size in SIZES:
            torch.manual_seed(seed)
            narrow = Network(int((PARAMETERS / size - 10) // 795))
            train(narrow, sgd(narrow, 5e-4), EPOCHS_ONE, seed)
            stage_two(narrow, seed)  # as long as the others
            bench.add(method, size, strength, narrow, None)
        return bench.finish()
    model = stage_one(method, strength, seed)
    bench.add(f"{method}, stage one", 1, strength, model, None)
    for size in SIZES:
        bench.add(method, size, strength, model, plan_for(model, size))
    return bench.finish()


def run_controls(strengths: dict[float, float], seed: int, folder: Path) -> list[dict[str, Any]]:
    """Train what GrOWL is held against, from the same networks; `strengths`: the one that was chosen at each size."""
    bench = Workbench(folder, "controls", seed)
    if (done := bench.finished()) is not None:
        return done
    for size, strength in strengths.items():
        model = tying.load(bench.path("growl, stage one", 1, strength), Network())
        plan = plan_for(model, size)
        bench.add("pruned only", size, strength, model, pruned_only(model, plan))
        bench.add("random clusters", size, strength, model, random_clusters(plan, seed))
    strength = strengths[24]
    model = tying.load(bench.path("growl, stage one", 1, strength), Network())
    bench.add("first layer, ward", PAPER, strength, model, cut_inputs(model, "ward"))
    bench.add("first layer, affinity", 0, strength, model, cut_inputs(model, "affinity"))  # finds its own size
    return bench.finish()


def best_strength(rows: list[dict[str, Any]], method: str, size: float) -> tuple[float, dict[float, float]]:
    """Choose by mean validation accuracy over the seeds; also return that accuracy for every strength."""
    mine = [row for row in rows if (row["method"], row["size"]) == (method, size)]
    means = {
        strength: statistics.mean(row["validation"] for row in mine if row["strength"] == strength)
        for strength in dict.fromkeys(row["strength"] for row in mine)
    }
    return max(means, key=lambda strength: means[strength]), means


def summarise(rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Choose the strength by mean validation accuracy, then look at the test split: one line per method and size."""
    lines = []
    for method, size in dict.fromkeys((row["method"], row["size"]) for row in rows):
        best, means = best_strength(rows, method, size)
        mine = [r for r in rows if (r["method"], r["size"], r["strength"]) == (method, size, best)]
        chosen = sorted(mine, key=lambda row: row["seed"])
        test = [accuracy(tying.load(folder / r["path"], Network(_units(r))), data().test) for r in chosen]
        line = {
            "method": method,
            "size": size,
            "strength": best,
            "seeds": [r["seed"] for r in chosen],
            **tested(test),
            "validation_mean": means[best],
            "validation_by_strength": {f"{s:g}": v for s, v in means.items()},
            "ratio": PARAMETERS / statistics.mean(r["values"] for r in chosen),
            "values": [r["values"] for r in chosen],
            "inputs": [r["inputs"] for r in chosen],
            "units": [r["units"] for r in chosen],
            "file_bytes": [r["file_bytes"] for r in chosen],
        }
        # The paper counts the first layer's weights alone: 784 × 300 ÷ unique non-zero ones, no labels.
        first_layer = [784 * 300 / (r["inputs"] * r["units"]) for r in chosen]
        line["first_layer_compression"] = statistics.mean(first_layer)
        if method.startswith("first layer"):
            line.update(_papers_measures(chosen, folder))
        lines.append(line)
    return lines


def _units(row: dict[str, Any]) -> int:
    return row["units"] if row["method"] == "narrow dense" else 300


def _papers_measures(chosen: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    found = []
    for row in chosen:
        layer = tying.load(folder / row["path"], Network()).fc1
        found.append(sharing(layer.to_linear().weight, INPUTS, layer.labels.numpy(), original=784 * 300))
    return {
        "sparsity": statistics.mean(f.sparsity for f in found),
        "sharing": statistics.mean(f.sharing for f in found),
        "compression": statistics.mean(f.compression for f in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", default="benchmarks/results/mnist.json")
    parser.add_argument("--runs", type=Path, default=CACHE / "mnist-runs", help="finished networks, to go on from")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    data()
    jobs = [
        (method, strength, seed)
        for seed in range(options.seeds)
        for method, strengths in {**STRENGTHS, "narrow dense": (0.0,)}.items()
        for strength in strengths
    ]
    with ProcessPoolExecutor(options.jobs, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        rows = list(
            chain.from_iterable(wait([pool.submit(run, *job, options.runs) for job in jobs], "stage one, then two"))
        )
        strengths = {size: best_strength(rows, "growl", size)[0] for size in SIZES}
        seeds = range(options.seeds)
        rows += chain.from_iterable(
            wait([pool.submit(run_controls, strengths, seed, options.runs) for seed in seeds], "controls")
        )
    lines = summarise(rows, options.runs)
    settings = {"epochs": [EPOCHS_ONE, EPOCHS_TWO], "batch": BATCH, "split": [55_000, 5_000, 10_000]}
    results = {"parameters": PARAMETERS, "settings": settings, "strengths": STRENGTHS, "lines": lines}
    record(options.out, command_of("mnist", options), results)
    for line in lines:
        print(
            f"{line['method']:<24} {line['size']:>5g}×  {line['ratio']:6.1f}×  {said(line)}"
            f"  validation {line['validation_mean']:.2f}  file {statistics.mean(line['file_bytes']) / 1000:.1f} kB"
        )


if __name__ == "__main__":
    main()
