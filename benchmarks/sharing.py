"""What sharing is worth: one map as dense, locally connected and convolutional layer, on Fashion-MNIST.

    python -m benchmarks.sharing [--quick] [--seeds 5] [--out benchmarks/results/sharing.json]

1 × 28 × 28 → 8 × 14 × 14, kernel 5, stride 2, then ReLU and one linear head for all. The dense layer may connect
everything, the locally connected one connects what the convolution does, the convolution shares its kernel over the
positions. Learning rate, then weight decay, are chosen for each layer and number of samples by validation accuracy,
with a seed that is not used afterwards; the test split is looked at with the chosen ones. A quarter of an hour on one
thread; goes on where it was after Ctrl-C. Writes a picture beside the results.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

import tying
from benchmarks.data import CACHE, Images, load
from benchmarks.memory import peak_of_training
from benchmarks.pictures import draw
from benchmarks.record import record
from benchmarks.timing import in_turn, spread, versus
from benchmarks.training import accuracy, kept
from tying.nn import LocallyConnected2d

Split = tuple[Tensor, Tensor]
OUT = Path("benchmarks/results/sharing.json")
BATCH = 128
STEPS = {300: 300, 1_000: 500, 3_000: 800, 10_000: 1_500, 55_000: 3_000}
"""By number of samples; three times as many gain none of the layers anything."""
RATES, DECAYS = (1e-3, 3e-3, 1e-2), (0.01, 1.0)
TUNING_SEED = 100
LARGEST = max(STEPS)
SEEDS_OF_LARGEST = 3
SHIFTS = range(7)


def dense() -> nn.Sequential:
    return _network(nn.Flatten(), nn.Linear(28 * 28, 8 * 14 * 14))


def locally_connected() -> nn.Sequential:
    return _network(LocallyConnected2d(1, 8, 28, kernel_size=5, stride=2, padding=2), nn.Flatten())


def convolution() -> nn.Sequential:
    return _network(nn.Conv2d(1, 8, kernel_size=5, stride=2, padding=2), nn.Flatten())


def _network(*layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layer, nn.ReLU(), nn.Linear(8 * 14 * 14, 10))


LAYERS: dict[str, Callable[[], nn.Sequential]] = {
    "dense": dense,
    "locally connected": locally_connected,
    "convolution": convolution,
}


@cache
def data() -> Images:
    """Fashion-MNIST as `(n, 1, 28, 28)`."""
    found = load("fashion-mnist")
    return Images(*((x.reshape(-1, 1, 28, 28), y) for x, y in (found.train, found.validation, found.test)))


def some(split: Split, samples: int, seed: int) -> Split:
    """Draw so many samples: the same ones for every layer."""
    drawn = torch.randperm(len(split[1]), generator=torch.Generator().manual_seed(seed))[:samples]
    return split[0][drawn], split[1][drawn]


def train(model: nn.Module, split: Split, *, steps: int, rate: float, decay: float, seed: int) -> nn.Module:
    """Take steps of AdamW by cross-entropy under a cosine schedule, the samples in a new order every epoch."""
    images, labels = split
    batch = min(BATCH, len(labels))
    optimizer = AdamW(model.parameters(), lr=rate, weight_decay=decay, fused=True)
    schedule = CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(labels), generator=generator)
        chosen, order = order[:batch], order[batch:]
        loss = functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def as_they_are(images: Tensor) -> Tensor:
    return images


def shifted(images: Tensor, down: int, right: int) -> Tensor:
    """Move images by so many pixels; what comes in is zero, what goes out is lost."""
    height, width = images.shape[-2:]
    padded = functional.pad(images, (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0)))
    return padded[..., max(-down, 0) :, max(-right, 0) :][..., :height, :width]


def by_shift(model: nn.Module, split: Split) -> list[float]:
    """Return the accuracy on images moved by 0 to 6 pixels: the mean of up, down, left and right."""
    sides = ((1, 0), (-1, 0), (0, 1), (0, -1))
    moved = [[(s * down, s * right) for down, right in sides] if s else [(0, 0)] for s in SHIFTS]
    return [
        statistics.mean(accuracy(model, split, partial(shifted, down=down, right=right)) for down, right in ways)
        for ways in moved
    ]


def learn(layer: str, samples: int, rate: float, decay: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = LAYERS[layer]()
    part = some(data().train, samples, seed)
    return train(model, part, steps=STEPS[samples], rate=rate, decay=decay, seed=seed)


def tune(folder: Path, layer: str, samples: int) -> list[dict[str, Any]]:
    """Return the validation accuracy of every learning rate, then of the other weight decays at the best of them."""

    def tried(rate: float, decay: float) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            model = learn(layer, samples, rate, decay, TUNING_SEED)
            return {"rate": rate, "decay": decay, "validation": accuracy(model, data().validation, as_they_are)}

        return kept(folder / f"{layer}-{samples}-{rate:g}-{decay:g}.json", work)

    found = [tried(rate, DECAYS[0]) for rate in RATES]
    rate = best(found)["rate"]
    return found + [tried(rate, decay) for decay in DECAYS[1:]]


def best(tried: list[dict[str, Any]]) -> dict[str, Any]:
    return max(tried, key=lambda each: each["validation"])


def run(folder: Path, layer: str, samples: int, chosen: dict[str, Any], seed: int, shifts: bool) -> dict[str, Any]:
    """Train one network with what was chosen and look at the test split; at moved images too where it is asked."""

    def work() -> dict[str, Any]:
        model = learn(layer, samples, chosen["rate"], chosen["decay"], seed)
        test = by_shift(model, data().test) if shifts else [accuracy(model, data().test, as_they_are)]
        return {"seed": seed, "test": test[0], "by_shift": test}

    looked = "moved" if shifts else "still"
    return kept(folder / f"{layer}-{samples}-{chosen['rate']:g}-{chosen['decay']:g}-{seed}-{looked}.json", work)


def line(layer: str, samples: int, tried: list[dict[str, Any]], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum up the runs of one layer and number of samples."""
    test = [each["test"] for each in runs]
    shifts = zip(*(each["by_shift"] for each in runs), strict=True)
    return {
        "layer": layer,
        "samples": samples,
        **{key: best(tried)[key] for key in ("rate", "decay")},
        "tried": tried,
        "seeds": [each["seed"] for each in runs],
        "test": test,
        "test_mean": statistics.mean(test),
        "test_spread": statistics.stdev(test) if len(test) > 1 else None,
        "by_shift": [[round(value, 3) for value in values] for values in shifts],
    }


def learned(folder: Path, sizes: list[int], seeds: int) -> list[dict[str, Any]]:
    """Tune, train and look, for every number of samples and layer, saying how long it will take."""
    jobs = [(samples, layer) for samples in sizes for layer in LAYERS]
    cost = [
        STEPS[samples] * (9 if layer == "dense" else 3 if layer == "locally connected" else 1)
        for samples, layer in jobs
    ]
    lines: list[dict[str, Any]] = []
    begun = time.perf_counter()
    for done, (samples, layer) in enumerate(jobs, start=1):
        tried = tune(folder, layer, samples)
        count = min(seeds, SEEDS_OF_LARGEST) if samples == LARGEST else seeds
        runs = [run(folder, layer, samples, best(tried), seed, samples == sizes[-1]) for seed in range(count)]
        lines.append(line(layer, samples, tried, runs))
        left = (time.perf_counter() - begun) / sum(cost[:done]) * sum(cost[done:]) / 60
        print(f"{done} of {len(jobs)}, {_said(lines[-1])}, about {left:.0f} min left", file=sys.stderr, flush=True)
    return lines


def costs(rounds: int) -> dict[str, Any]:
    """Return by layer what it stores and multiplies, alone and with the head; time per epoch; memory at training."""
    batch = (data().train[0][:BATCH].clone(), data().train[1][:BATCH].clone())
    seconds = timed(rounds)
    found: dict[str, Any] = {}
    for name, build in LAYERS.items():
        model = build()
        whole = tying.measure(model, example_inputs=batch[0][:1], latency=False).model
        head = model[-1]
        found[name] = {
            "values": whole.parameters,
            "layer_values": whole.parameters - sum(p.numel() for p in head.parameters()),
            "operations": whole.operations,
            "layer_operations": whole.operations - head.weight.numel() if whole.operations else None,
            "file_bytes": whole.bytes,
            "epoch_seconds": spread(seconds[name]),
            "epoch_versus_convolution": versus(seconds[name], seconds["convolution"]),
            "memory": peak_of_training(build, batch),
        }
    return found


def timed(rounds: int) -> dict[str, np.ndarray]:
    """Return the seconds of an epoch of all 55,000 samples by layer and round: a tenth of one, in turn, times ten."""
    steps = LARGEST // BATCH // 10
    works = {name: partial(_steps, build(), steps) for name, build in LAYERS.items()}
    return {name: taken * (LARGEST / BATCH / steps) for name, taken in in_turn(works, rounds).items()}


def _steps(model: nn.Module, steps: int) -> None:
    train(model, data().train, steps=steps, rate=1e-3, decay=0.01, seed=0)


def picture(lines: list[dict[str, Any]], measured: dict[str, Any], path: Path) -> None:
    """Draw accuracy against samples and against shifts, and what each layer takes beside the dense one."""

    def into(figure: Figure) -> None:
        axes = figure.subplots(1, 3, gridspec_kw={"width_ratios": (1, 1, 1.6)})
        largest = max(each["samples"] for each in lines)
        for layer in LAYERS:
            mine = [each for each in lines if each["layer"] == layer]
            spreads = [each["test_spread"] or 0 for each in mine]
            sizes, means = [each["samples"] for each in mine], [each["test_mean"] for each in mine]
            axes[0].errorbar(sizes, means, spreads, marker="o", capsize=2, label=layer)
            moved = mine[-1]["by_shift"]
            deviations = [statistics.stdev(values) if len(values) > 1 else 0 for values in moved]
            axes[1].errorbar(SHIFTS, [statistics.mean(v) for v in moved], deviations, marker="o", capsize=2)
        axes[0].set(xscale="log", xlabel="training samples", ylabel="test accuracy, %", title="Fewer samples")
        axes[0].set_xticks(list(STEPS), [f"{n:,}" for n in STEPS], rotation=45)
        axes[0].minorticks_off()
        axes[0].legend()
        axes[1].set(xlabel="test images moved by, pixels", title=f"Moved images ({largest:,} samples)")
        for axis in axes[:2]:
            axis.grid(alpha=0.5)
        _bars(axes[2], measured)

    draw(path, (13, 3.8), into)


def _bars(axis: Any, measured: dict[str, Any]) -> None:
    """One group of bars for each cost, relative to the dense layer."""
    kinds: dict[str, Callable[[dict[str, Any]], float]] = {
        "values of\nthe layer": lambda cost: cost["layer_values"],
        "multiply-adds\nof the layer": lambda cost: cost["layer_operations"],
        "bytes\non disk": lambda cost: cost["file_bytes"],
        "memory at\ntraining": lambda cost: cost["memory"]["peak_bytes"],
        "time per\nepoch": lambda cost: cost["epoch_seconds"]["median"],
    }
    for i, (layer, cost) in enumerate(measured.items()):
        shares = [of(cost) / of(measured["dense"]) for of in kinds.values()]
        bars = axis.bar(np.arange(len(kinds)) + 0.27 * (i - 1), shares, 0.25, label=layer)
        axis.bar_label(bars, [f"{share:.2g}" for share in shares], fontsize=7)
    axis.set_xticks(range(len(kinds)), list(kinds), fontsize=8)
    axis.set(yscale="log", ylim=(5e-5, 3), title="Cost, dense = 1")


def _said(each: dict[str, Any]) -> str:
    spread = "" if each["test_spread"] is None else f" ± {each['test_spread']:.2f}"
    moved = "".join(f" {statistics.mean(values):.1f}" for values in each["by_shift"][1:])
    return f"{each['layer']:<18} {each['samples']:>6,} samples: test {each['test_mean']:.2f}{spread}{moved}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few samples, one seed; keeps no results")
    parser.add_argument("--seeds", type=int, default=5, help=f"{SEEDS_OF_LARGEST} at most of all {LARGEST:,} samples")
    parser.add_argument("--out", type=Path, help=f"default: {OUT}; none for --quick")
    parser.add_argument("--runs", type=Path, default=CACHE / "sharing-runs", help="finished runs, to go on from")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes, seeds, rounds = ([300, 1_000], 1, 3) if options.quick else (list(STEPS), options.seeds, 9)
    lines = learned(options.runs / fingerprint(), sizes, seeds)
    measured = costs(rounds)
    for each in lines:
        print(_said(each))
    for name, cost in measured.items():
        print(
            f"{name:<18} {cost['layer_values']:>9,} values, {cost['layer_operations']:>9,} multiply-adds; with head "
            f"{cost['file_bytes'] / 1e3:.0f} kB, {cost['memory']['peak_bytes'] / 1e6:.2f} MB at training, "
            f"{cost['epoch_seconds']['median']:.2f} s an epoch"
        )
    out = options.out or (None if options.quick else OUT)
    if out is None:
        return
    settings = {"batch": BATCH, "steps": STEPS, "rates": RATES, "decays": DECAYS, "tuning_seed": TUNING_SEED}
    results = {"settings": settings, "split": [55_000, 5_000, 10_000], "lines": lines, "costs": measured}
    record(out, f"make bench-sharing (--seeds {seeds})", results)
    picture(lines, measured, out.with_suffix(".png"))


def fingerprint() -> str:
    """Return what tells this code from its earlier versions, whose runs are not gone on from."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


if __name__ == "__main__":
    main()
