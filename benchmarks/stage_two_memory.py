"""Peak memory of stage two on the compacted network against the dense one's training: does it fall as the values do?

    python -m benchmarks.stage_two_memory [--quick] [--out benchmarks/results/stage_two_memory.json]

AdamW, 128 or 16 images a step, four steps in fresh processes, resident memory above PyTorch and the batch. How much it
is does not depend on what the weights are, so the plans are drawn at random: for r times fewer values a layer keeps
r^-0.4 of its units, and ties the inputs that are left into r^-0.6 of as many. Parameters, gradients and the optimizer's
state fall as the values do; what the forward pass keeps for the backward pass (what BatchNorm, ReLU and pooling were
given or gave, per unit) falls as the units do, and is counted beside it. Ten minutes on a quiet machine; Linux only;
right to about a quarter of a megabyte. Writes a picture beside the results.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import tying
from benchmarks.memory import peak_of_training
from benchmarks.networks import LeNet5, ResNet20
from benchmarks.pictures import draw
from benchmarks.record import command_of, record
from tying import Groups, Tie, TiePlan
from tying.report.pictures.style import LIGHT

OUT = Path("benchmarks/results/stage_two_memory.json")
RATIOS = (2, 4, 8, 16, 32)
BATCHES = (128, 16)
MEASURES = ("values", "peak_bytes", "state_bytes", "kept_bytes")
POWER_OF_UNITS, POWER_OF_INPUTS = 0.4, 0.6
"""r^-0.4 of the units, r^-0.6 of the inputs: 1 / r of a layer's values."""


@dataclass(frozen=True)
class Subject:
    """A network, the shape of one input, and how its plan is drawn."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    cut: Callable[[nn.Module, float, np.random.Generator], TiePlan]


def perceptron(width: int, hidden: int) -> nn.Sequential:
    """784, so many hidden layers of that width, 10; with ReLU."""
    sizes = [784] + [width] * hidden
    layers = [m for pair in itertools.pairwise(sizes) for m in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def cut_chain(model: nn.Module, ratio: float, generator: np.random.Generator) -> TiePlan:
    """Cut every layer of a chain but the last one, whose units are the classes."""
    layers = [(n, m) for n, m in model.named_children() if isinstance(m, (nn.Linear, nn.Conv2d))]
    ties: list[Tie] = []
    alive = drawn(layers[0][1].weight.shape[1], POWER_OF_UNITS, ratio, generator)
    for name, layer in layers[:-1]:
        alive = np.repeat(alive, layer.weight.shape[1] // len(alive))  # a channel is many inputs of a linear layer
        ties.append(tied(f"{name}.weight", alive, ratio, generator))
        alive = drawn(layer.weight.shape[0], POWER_OF_UNITS, ratio, generator)
        ties.append(pruned(f"{name}.weight", alive))
    return TiePlan(ties)


def cut_residual(model: nn.Module, ratio: float, generator: np.random.Generator) -> TiePlan:
    """Cut what the blocks add up and what each has inside; whoever adds to a sum loses the same channels."""
    assert isinstance(model, ResNet20)
    alive = drawn(model.stem[0].out_channels, POWER_OF_UNITS, ratio, generator)
    ties = [pruned("stem.0.weight", alive)]
    for i, block in enumerate(model.blocks):
        ties.append(tied(f"blocks.{i}.first.weight", alive, ratio, generator))
        if isinstance(block.shortcut, nn.Sequential):
            ties.append(tied(f"blocks.{i}.shortcut.0.weight", alive, ratio, generator))
            alive = drawn(block.second.out_channels, POWER_OF_UNITS, ratio, generator)
            ties.append(pruned(f"blocks.{i}.shortcut.0.weight", alive))
        inner = drawn(block.first.out_channels, POWER_OF_UNITS, ratio, generator)
        ties.append(pruned(f"blocks.{i}.first.weight", inner))
        ties.append(tied(f"blocks.{i}.second.weight", inner, ratio, generator))
        ties.append(pruned(f"blocks.{i}.second.weight", alive))
    return TiePlan(ties)


def drawn(count: int, power: float, ratio: float, generator: np.random.Generator) -> np.ndarray:
    """Return which of so many units are kept, `(count,)` bool: at least one, all of a handful (pixels' channels)."""
    kept = count if count <= 3 else max(1, round(count * ratio**-power))
    return np.isin(np.arange(count), generator.permutation(count)[:kept])


def pruned(name: str, alive: np.ndarray) -> Tie:
    return Tie.of(name, Groups.outputs(), np.where(alive, np.arange(len(alive)), -1))


def tied(name: str, alive: np.ndarray, ratio: float, generator: np.random.Generator) -> Tie:
    """Tie the inputs that are left at random, into as many values as the ratio asks, every one of them used."""
    kept = int(alive.sum())
    classes = kept if len(alive) <= 3 else min(kept, max(1, round(len(alive) * ratio**-POWER_OF_INPUTS)))
    labels = np.full(len(alive), -1)
    labels[alive] = generator.permutation(np.arange(kept) % classes)
    return Tie.of(name, Groups.inputs(), labels)


SUBJECTS = {
    "784-300-10": Subject(partial(perceptron, 300, 1), (784,), cut_chain),
    "784-2048-2048-10": Subject(partial(perceptron, 2048, 2), (784,), cut_chain),
    "LeNet-5": Subject(LeNet5, (1, 28, 28), cut_chain),
    "ResNet-20": Subject(ResNet20, (3, 32, 32), cut_residual),
}


def made(subject: str, ratio: float) -> nn.Module:
    """Return the network, dense (1) or compacted; the same numbers give the same network."""
    torch.manual_seed(0)
    chosen = SUBJECTS[subject]
    model = chosen.build()
    if ratio == 1:
        return model
    plan = chosen.cut(model, ratio, np.random.default_rng(0))
    return tying.compact(model, plan, torch.randn(2, *chosen.shape))


def loaded(path: str) -> nn.Module:
    """Return a network from a file, so that what made it is not in the process."""
    return torch.load(path, weights_only=False)


def one(subject: str, ratio: float, images: int, processes: int, folder: Path) -> dict[str, Any]:
    """Measure the training of one network."""
    model = made(subject, ratio)
    path = folder / f"{subject}-{ratio:g}.pt"
    torch.save(model, path)
    batch: tuple[Tensor, Tensor] = (torch.randn(images, *SUBJECTS[subject].shape), torch.randint(10, (images,)))
    line = {"network": subject, "ratio": ratio, "batch": images, "values": sum(p.numel() for p in model.parameters())}
    return {**line, **peak_of_training(partial(loaded, str(path)), batch, processes=processes)}


def times_fewer(line: dict[str, Any], dense: dict[str, Any]) -> dict[str, float]:
    """Return what a line is times smaller than the dense network's, by every measure."""
    return {key.removesuffix("_bytes"): dense[key] / line[key] for key in MEASURES}


def against_dense(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines with what they are times smaller than the dense network's at the same batch."""
    dense = {(line["network"], line["batch"]): line for line in lines if line["ratio"] == 1}
    return [{**line, "times_fewer": times_fewer(line, dense[line["network"], line["batch"]])} for line in lines]


def picture(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw how memory falls while values fall: measured, and what the parts that are counted come to."""

    def into(figure: Figure) -> None:
        batches = list(dict.fromkeys(line["batch"] for line in lines))
        axes = figure.subplots(1, len(batches), squeeze=False, sharey=True)[0]
        for axis, batch in zip(axes, batches, strict=True):
            for network in SUBJECTS:
                mine = [line["times_fewer"] for line in lines if (line["network"], line["batch"]) == (network, batch)]
                axis.plot([t["values"] for t in mine], [t["peak"] for t in mine], "o-", label=network)
            most = max(line["times_fewer"]["values"] for line in lines)
            axis.plot([1, most], [1, most], "--", color=LIGHT.muted, linewidth=1, label="in proportion")
            axis.set(xscale="log", yscale="log", xlabel="values stored: times fewer", title=f"batch of {batch}")
            axis.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"], minor=False)
            axis.set_yticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"], minor=False)
            axis.minorticks_off()
            axis.grid(alpha=0.5)
        axes[0].set_ylabel("peak memory: times less")
        axes[0].legend()

    draw(path, (4.4 * len({line["batch"] for line in lines}), 3.8), into)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="two ratios, one batch, one process each; keeps no results"
    )
    parser.add_argument("--out", type=Path, help=f"default: {OUT}; none for --quick")
    options = parser.parse_args()
    ratios, batches, processes = ((4, 16), (128,), 1) if options.quick else (RATIOS, BATCHES, 3)
    jobs = [(subject, ratio, batch) for batch in batches for subject in SUBJECTS for ratio in (1, *ratios)]
    lines: list[dict[str, Any]] = []
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for done, (subject, ratio, batch) in enumerate(jobs, 1):
            lines.append(one(subject, ratio, batch, processes, Path(folder)))
            left = (time.perf_counter() - begun) / done * (len(jobs) - done)
            print(f"\r{done} of {len(jobs)}, about {left:.0f} s left ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    lines = against_dense(lines)
    for line in lines:
        fewer = "  ".join(f"{key} ÷ {ratio:6.2f}" for key, ratio in line["times_fewer"].items())
        print(f"{line['network']:<18} batch {line['batch']:>3}  peak {line['peak_bytes'] / 1e6:7.2f} MB   {fewer}")
    out = options.out or (None if options.quick else OUT)
    if out is None:
        return
    settings = {"optimizer": "AdamW", "processes": processes, "units": -POWER_OF_UNITS, "inputs": -POWER_OF_INPUTS}
    record(out, command_of("stage_two_memory", options), {"settings": settings, "lines": lines})
    picture(lines, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
