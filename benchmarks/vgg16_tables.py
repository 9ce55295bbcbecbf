"""The table of the paper's VGG-16 on CIFAR-10, beside what is reported of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

Results = Mapping[str, Any]


def vgg16(results: Results) -> Iterator[str]:
    """What was trained in the paper's setting: accuracy and sizes, and the lines that collapsed."""
    settings = results["settings"]
    one, two = (settings[stage]["epochs"] for stage in ("one", "two"))
    yield "### VGG-16 in the paper's setting"
    yield ""
    if results["smoke"]:
        yield f"**A smoke test of {settings['images']} images and {one} + {two} epochs: its figures mean nothing.**"
        yield ""
    yield (
        f"VGG-16 on CIFAR-10 ({results['weights']:,} weights), {one} + {two} epochs with the paper's strengths, test "
        "accuracy in per cent at the last epoch, mean ± standard deviation over seeds, nothing chosen. Sparsity, "
        "sharing and compression are the paper's, which counts no labels; stored and file have them. In brackets what "
        "is commonly reported of the paper's own runs:"
    )
    yield ""
    yield "| stage one, then tied and retrained | seeds | test | sparsity | sharing | compression | stored | file |"
    yield "|---|---|---|---|---|---|---|---|"
    for line in results["lines"]:
        yield f"| {line['method']} | {_seeds(line)} | " + " | ".join(_cells(line)) + " |"


def _cells(line: Results) -> list[str]:
    paper = line["paper"]
    measures = [run["papers_measures"] for run in line["runs"] if "collapsed" not in run]
    if not measures:
        return [f"– ({paper['test']:.1f})", "–", "–", f"– ({paper['compression']:.1f}×)", "–", "–"]
    sparsity, sharing = (statistics.mean(each[name] for each in measures) for name in ("sparsity", "sharing"))
    spread = "" if line["test_spread"] is None else f" ± {line['test_spread']:.2f}"
    return [
        f"{line['test_mean']:.2f}{spread} ({paper['test']:.1f})",
        f"{sparsity:.1%}",
        f"{sharing:.2f}",
        f"{line['compression']:.1f}× ({paper['compression']:.1f}×)",
        f"{line['stored']:.1f}×",
        f"{line['file']:.1f}×",
    ]


def _seeds(line: Results) -> str:
    """Return how many there were, and how many of them lost a layer, and which."""
    seeds = len(line["runs"])
    if not line["collapsed"]:
        return str(seeds)
    lost = dict.fromkeys(name.removesuffix(".weight") for run in line["runs"] for name in run.get("collapsed", []))
    return f"{seeds}, {line['collapsed']} of them collapsed ({', '.join(lost)})"
