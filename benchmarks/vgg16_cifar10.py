"""The paper's VGG-16 on CIFAR-10, in full: five lines of its table, stage one and stage two.

    python -m benchmarks.vgg16_cifar10 [--seeds 1] [--method "GrOWL + l2"] [--out benchmarks/results/vgg16_cifar10.json]
    python -m benchmarks.vgg16_cifar10 --smoke

Zhang, Wang, Figueiredo, Balzano, *Learning to Share*, ICLR 2018 (openreview rypT3fb0b), with the strengths, the
schedule and the measures of the authors' code. 150 + 50 epochs of all 50,000 training images; nothing is chosen, so
there is no validation split, and the test split is looked at after the last epoch of each stage (by the paper's code
after every epoch). Runs on a GPU where there is one; goes on after the last full epoch when it was stopped. `--smoke`:
256 images, 1 + 1 epochs, a minute on a CPU; its figures mean nothing, and are not kept unless `--out` says where.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

import tying
from benchmarks.data import CACHE, cifar10
from benchmarks.record import command_of, record
from benchmarks.training import Split, accuracy, tested
from benchmarks.vgg16 import WEIGHTS, WIDTHS, Vgg16, augmented, layers, regularised, standardised
from tying import GroupLasso, Groups, GrOWL, Tie, TiePlan
from tying.penalties.sequences import Pld

INPUTS = Groups.inputs()
STRENGTHS = (
    *((4.5, 0.1), (11, 0.1), (11, 0.1), (11, 0.1), (10, 0.1), (9, 0.1), (7.5, 0.1), (7, 0.1)),
    *((6.5, 0.07), (5.5, 0.05), (5.5, 0.1), (3.5, 0.1), (3.5, 0.1)),
)
"""Λ1 and Λ2 of layers 2 to 14: all but the first convolution and the last linear layer."""
RAMP, PREFERENCE, MOST_CLUSTERS = 0.1, 0.8, 0.95
LEAST = 4
"""With fewer groups that are not zero a layer has collapsed, and the paper's code gives the run up."""
METHODS = {
    "weight decay": ("none", 2e-3),
    "group lasso": ("group lasso", 0.0),
    "group lasso + l2": ("group lasso", 2e-3),
    "GrOWL": ("GrOWL", 0.0),
    "GrOWL + l2": ("GrOWL", 2e-3),
}
"""The penalty, and the weight decay that goes with it."""
PAPER = {
    "weight decay": (1.0, 93.1),
    "group lasso": (11.1, 92.1),
    "group lasso + l2": (14.5, 92.7),
    "GrOWL": (11.4, 92.2),
    "GrOWL + l2": (14.5, 92.7),
}
"""Compression and test accuracy as commonly reported."""


@dataclass(frozen=True)
class Stage:
    """Epochs under SGD with momentum 0.9, the learning rate a tenth after every so many of them."""

    epochs: int
    rate: float
    decay_every: int


@dataclass(frozen=True)
class Setting:
    """What differs between the paper's setting and a smoke test."""

    one: Stage = Stage(150, 1e-2, 60)
    two: Stage = Stage(50, 1e-3, 20)
    batch: int = 128
    images: int | None = None
    """Of each split; None: all."""
    widths: tuple[int, ...] = WIDTHS


SMOKE = Setting(one=Stage(1, 1e-2, 60), two=Stage(1, 1e-3, 20), batch=64, images=256)


def rules(model: nn.Module, penalty: str, steps_per_epoch: int) -> dict[tuple[str, Groups], Any]:
    """Return the penalties of layers 2 to 14.

    The paper's code takes one prox per epoch with the learning rate as the step; ours has the sum of the epoch's
    learning rates, so the strength is divided by the steps. Its group lasso has GrOWL's first, largest weight.
    """
    found: dict[tuple[str, Groups], Any] = {}
    for name, (base, slope) in zip(regularised(model), STRENGTHS, strict=True):
        sequence = Pld(base, slope, RAMP, variant="vgg")
        count = INPUTS.shape(model.get_parameter(name).shape)[0]
        if penalty == "GrOWL":
            found[name, INPUTS] = GrOWL(1 / steps_per_epoch, sequence)
        elif penalty == "group lasso":
            found[name, INPUTS] = GroupLasso(float(sequence(count)[0]) / steps_per_epoch)
    return found


def optimizer_of(model: nn.Module, rate: float, decay: float) -> SGD:
    """Momentum 0.9; weight decay for weights and biases, not for BatchNorm."""
    norms = {id(p) for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for p in m.parameters()}
    parameters = tying.unique_parameters(model)
    decayed = [p for p in parameters if id(p) not in norms]
    others = [p for p in parameters if id(p) in norms]
    return SGD([{"params": decayed, "weight_decay": decay}, {"params": others}], lr=rate, momentum=0.9)


def train(
    model: nn.Module,
    split: Split,
    stage: Stage,
    *,
    batch: int,
    decay: float,
    seed: int,
    path: Path,
    penalty: str = "none",
) -> float:
    """Train for the stage's epochs, from where the checkpoint at `path` stands if there is one; return the seconds.

    Raises:
        ValueError: If the checkpoint is of other settings, images or widths; the number of epochs may be another one.
    """
    images, labels = split
    setting = held(model, split, stage, batch, decay, seed, penalty)
    steps = len(labels) // batch
    optimizer = optimizer_of(model, stage.rate, decay)
    schedule = StepLR(optimizer, stage.decay_every, 0.1)
    handle = None
    if penalty != "none":
        handle = tying.proximal(optimizer, model, rules(model, penalty, steps), every="epoch", freeze_zeros=True)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, **({"handle": handle} if handle else {})}
    done, seconds = resume(path, parts, setting, images.device)
    for epoch in range(done, stage.epochs):
        begun = time.perf_counter()
        _epoch(model, optimizer, split, batch, torch.Generator().manual_seed(1000 * seed + epoch))
        schedule.step()
        if handle is not None:
            handle.epoch_end()
        seconds += time.perf_counter() - begun
        save(path, parts, setting, epoch + 1, seconds)
        left = seconds / (epoch + 1) * (stage.epochs - epoch - 1) / 60
        print(
            f"{path.stem}: epoch {epoch + 1} of {stage.epochs}, about {left:.0f} min left", file=sys.stderr, flush=True
        )
    if handle is not None:
        handle.remove()
    return seconds


def held(
    model: nn.Module, split: Split, stage: Stage, batch: int, decay: float, seed: int, penalty: str
) -> dict[str, Any]:
    """Return what a checkpoint says it was made with; the number of epochs may be another one."""
    return {
        "rate": stage.rate,
        "decay_every": stage.decay_every,
        "batch": batch,
        "decay": decay,
        "seed": seed,
        "penalty": penalty,
        "strengths": [list(pair) for pair in STRENGTHS] if penalty != "none" else [],
        "images": len(split[1]),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _epoch(model: nn.Module, optimizer: SGD, split: Split, batch: int, generator: torch.Generator) -> None:
    images, labels = split
    model.train()
    order = torch.randperm(len(labels), generator=generator)
    for step in range(len(labels) // batch):
        chosen = order[step * batch : (step + 1) * batch].to(labels.device)
        loss = functional.cross_entropy(model(augmented(images[chosen], generator)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def save(path: Path, parts: Mapping[str, Any], setting: Mapping[str, Any], epoch: int, seconds: float) -> None:
    """Write what a later call goes on from, whole or not at all."""
    state: dict[str, Any] = {"setting": dict(setting), "epoch": epoch, "seconds": seconds}
    state |= {name: part.state_dict() for name, part in parts.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    torch.save(state, scratch)
    scratch.replace(path)


def resume(path: Path, parts: Mapping[str, Any], setting: Mapping[str, Any], device: torch.device) -> tuple[int, float]:
    """Bring the parts to where the checkpoint stands; return its epoch and the seconds it took: 0 without one.

    Raises:
        ValueError: If it was made with another setting.
    """
    if not path.is_file():
        return 0, 0.0
    state = torch.load(path, map_location=device, weights_only=True)
    if (held := state.get("setting")) != setting:
        unlike = [f"{name} = {(held or {}).get(name)}" for name in setting if (held or {}).get(name) != setting[name]]
        raise ValueError(
            f"{path}: expected a checkpoint with {dict(setting)}, got {', '.join(unlike)}; remove it, or give --runs "
            "another folder"
        )
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["epoch"], state["seconds"]


def plan_for(model: nn.Module) -> TiePlan:
    """Prune what is zero; tie by affinity propagation, but not where more than 95 of 100 clusters would be left.

    Raises:
        PlanError: If a layer has lost everything, as the published strengths do to other settings.
    """
    ties: list[Tie] = []
    for name in regularised(model):
        (zeros,) = tying.discover(model, {name: INPUTS}, support=0.0)
        (tied,) = tying.discover(model, {name: INPUTS}, support=0.0, method="affinity", preference=PREFERENCE)
        few = tied.partition.classes <= MOST_CLUSTERS * zeros.partition.classes
        ties.append(tied if few else zeros)
    return TiePlan(ties, {"paper": f"affinity {PREFERENCE}, at most {MOST_CLUSTERS} of the groups"})


def papers_measures(model: nn.Module, plan: TiePlan) -> dict[str, float]:
    """Return sparsity, sharing and compression over all weights, as the paper's VGG code counts them: no labels.

    A layer keeps (its groups that are not zero, or their clusters) × (its units that the next layer reads) numbers.
    """
    kept = {
        tie.members[0].parameter: (len(tie.partition) - tie.partition.pruned, tie.partition.classes) for tie in plan
    }
    shapes = {f"{name}.weight": tuple(layer.weight.shape) for name, layer in layers(model).items()}
    nonzero, clusters = ([kept.get(n, (s[1], s[1]))[i] for n, s in shapes.items()] for i in (0, 1))
    shares = [count / shape[1] for count, shape in zip(nonzero, shapes.values(), strict=True)]
    read = [*shares[1:], 1.0]
    sizes = [model.get_parameter(n).numel() / s[1] for n, s in shapes.items()]
    total = sum(model.get_parameter(name).numel() for name in shapes)
    left = sum(n * r * d for n, r, d in zip(nonzero, read, sizes, strict=True))
    unique = sum(c * r * d for c, r, d in zip(clusters, read, sizes, strict=True))
    return {"sparsity": 1 - left / total, "sharing": left / unique, "compression": total / unique}


def run(method: str, setting: Setting, seed: int, train_split: Split, test: Split, folder: Path) -> dict[str, Any]:
    """Train one line of the table in both stages, and measure what is left; or go on where an earlier call stopped."""
    penalty, decay = METHODS[method]
    name = f"{method}-{seed}".replace(" ", "-")
    torch.manual_seed(seed)
    model = Vgg16(setting.widths).to(train_split[0].device)
    common = {"batch": setting.batch, "decay": decay, "seed": seed}
    seconds = [train(model, train_split, setting.one, path=folder / f"{name}-one.pt", penalty=penalty, **common)]
    row: dict[str, Any] = {"method": method, "seed": seed, "seconds": seconds}
    row["test_after_stage_one"] = accuracy(model, test, standardised)
    if collapsed := [name for name in regularised(model) if _alive(model, name) < LEAST]:
        return {**row, "collapsed": collapsed}
    plan = plan_for(model)
    tied = copy.deepcopy(model)
    tying.tie_(tied, plan, gradient="mean")  # with SGD: the cluster's mean after every step
    seconds.append(train(tied, train_split, setting.two, path=folder / f"{name}-two.pt", **common))
    return {**row, **measured(model, tied, plan, test)}


def _alive(model: nn.Module, name: str) -> int:
    return int(torch.count_nonzero(INPUTS.norms(model.get_parameter(name))))


def measured(model: nn.Module, tied: nn.Module, plan: TiePlan, test: Split) -> dict[str, Any]:
    """Return the accuracy and the sizes, the paper's and ours, of a network after stage two; it is untied."""
    reached = accuracy(tied, test, standardised)
    tying.untie_(tied)
    small = tying.compact(tied.cpu().eval(), plan, standardised(test[0][:2].cpu()))
    report = tying.measure(small, like=model.cpu(), latency=False)
    return {
        "test": reached,
        "test_compacted": accuracy(small.to(test[0].device), test, standardised),
        "papers_measures": papers_measures(model, plan),
        "unique": report.unique,
        "stored": report.stored,
        "file": report.file,
        "file_bytes": report.model.bytes,
        "layers": {tie.members[0].parameter: _kept(tie) for tie in plan},
    }


def _kept(tie: Tie) -> dict[str, int]:
    return {"groups": len(tie.partition), "zero": tie.partition.pruned, "values": tie.partition.classes}


def data(setting: Setting, device: torch.device) -> tuple[Split, Split]:
    """Return training and test images, on the device."""
    found = cifar10(validation=0)
    both = (found.train, found.test)
    return tuple((x[: setting.images].to(device), y[: setting.images].to(device)) for x, y in both)


def lines(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sum up the seeds of each method, beside what the paper has."""
    found: list[dict[str, Any]] = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        whole = [row for row in mine if "collapsed" not in row]
        line: dict[str, Any] = {"method": method, "runs": mine, "collapsed": len(mine) - len(whole)}
        line["paper"] = dict(zip(("compression", "test"), PAPER[method], strict=True))
        if whole:
            line |= tested([row["test"] for row in whole])
            line["compression"] = statistics.mean(row["papers_measures"]["compression"] for row in whole)
            line |= {key: statistics.mean(row[key] for row in whole) for key in ("unique", "stored", "file")}
        found.append(line)
    return found


def said(line: dict[str, Any]) -> str:
    paper = line["paper"]
    if "test_mean" not in line:
        return f"{line['method']:<18} collapsed: {', '.join(line['runs'][0]['collapsed'])}"
    return (
        f"{line['method']:<18} test {line['test_mean']:5.2f} (paper {paper['test']})  the paper's compression "
        f"{line['compression']:5.1f}× (paper {paper['compression']}×)  stored with labels {line['stored']:5.1f}×  "
        f"file {line['file']:5.1f}×"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--method", choices=METHODS, nargs="+", help="these lines only")
    parser.add_argument("--smoke", action="store_true", help="few images, 1 + 1 epochs, one line")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/vgg16_cifar10.json; none for --smoke")
    parser.add_argument("--runs", type=Path, help="checkpoints, to go on from; default: .data/vgg16-runs")
    options = parser.parse_args()
    setting = SMOKE if options.smoke else Setting()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    methods = options.method or (["GrOWL + l2"] if options.smoke else list(METHODS))
    out = options.out or (None if options.smoke else Path("benchmarks/results/vgg16_cifar10.json"))
    splits = data(setting, device)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.runs or (Path(scratch) if options.smoke else CACHE / "vgg16-runs")
        for seed in range(options.seeds):
            for method in methods:
                rows.append(run(method, setting, seed, *splits, folder))
                print(said(lines(rows[-1:])[0]), flush=True)
    if out is not None:
        settings = {**asdict(setting), "strengths": STRENGTHS, "ramp": RAMP, "preference": PREFERENCE}
        results = {"settings": settings, "smoke": options.smoke, "weights": WEIGHTS, "lines": lines(rows)}
        record(out, command_of("vgg16_cifar10", options), results)


if __name__ == "__main__":
    main()
