"""The tables of what concerns convolutions and real networks: trained, compacted, timed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

Results = Mapping[str, Any]


def lenet(results: Results) -> Iterator[str]:
    """LeNet-5 at two sizes, with its controls."""
    one, two = results["settings"]["epochs"]
    seeds = len(results["lines"][0]["seeds"])
    yield (
        f"LeNet-5 (20-50-500-10, {results['parameters']:,} parameters), test accuracy in per cent, mean ± standard "
        f"deviation over {seeds} seeds, {one} + {two} epochs, no augmentation; strengths and shapes "
        "chosen on validation. 24× = all parameters ÷ numbers stored; labels come on top and are in the bytes."
    )
    yield ""
    sizes = sorted({line["size"] for line in results["lines"]} - {1})
    columns = [(data, size) for data in ("mnist", "fashion-mnist") for size in (1, *sizes)]
    yield (
        "| | "
        + " | ".join(f"{_NAMES[data]}, {'dense' if size == 1 else f'{size:g}×'}" for data, size in columns)
        + " |"
    )
    yield "|---|" + "---|" * len(columns)
    lines = {(line["method"], line["dataset"], line["size"]): line for line in results["lines"]}
    for method in dict.fromkeys(line["method"] for line in results["lines"]):
        cells = [_accuracy(lines[key]) if (key := (method, *column)) in lines else "" for column in columns]
        yield f"| {_LABELS.get(method, method)} | " + " | ".join(cells) + " |"
    files = [lines.get((_TIED if size > 1 else "dense", data, size)) for data, size in columns]
    yield "| bytes on disk, labels included | " + " | ".join(_kilobytes(line) for line in files) + " |"
    operations = [f"{line['operations'] / 1e6:.2f} M" if line else "" for line in files]
    yield "| multiply-adds | " + " | ".join(operations) + " |"


def resnet20(results: Results) -> Iterator[str]:
    """ResNet-20 at a quarter of its values, with its controls."""
    one, two = results["settings"]["epochs"]
    seeds = len(results["lines"][0]["seeds"])
    yield (
        f"ResNet-20 on CIFAR-10 ({results['parameters']:,} parameters), {one} + {two} epochs (far from converged: what "
        f"two cores allow), {seeds} seeds, test accuracy at the last epoch:"
    )
    yield ""
    yield "| | stored values | test accuracy | below dense | multiply-adds | file |"
    yield "|---|---|---|---|---|---|"
    for line in results["lines"]:
        yield (
            f"| {_LABELS.get(line['method'], line['method'])} | {line['ratio']:.1f}× fewer | {_accuracy(line)} | "
            f"{line['below_dense']:.2f} | {line['operations'] / 1e6:.1f} M | {_kilobytes(line)} |"
        )


_NAMES = {"mnist": "MNIST", "fashion-mnist": "Fashion"}
_TIED = "tied, GrOWL before"
_LABELS = {
    _TIED: "**tied and pruned, GrOWL before**",
    "tied, no penalty before": "control: tied and pruned, no penalty before",
    "pruned only": "control: pruned only",
    "pruned only, GrOWL before": "control: pruned only",
    "narrow dense": "control: narrow dense",
}


def _accuracy(line: Results) -> str:
    spread = "" if line["test_spread"] is None else f" ± {line['test_spread']:.2f}"
    return f"{line['test_mean']:.2f}{spread}"


def _kilobytes(line: Results | None) -> str:
    return f"{statistics.mean(line['file_bytes']) / 1000:.1f} kB" if line else ""
