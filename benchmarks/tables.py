"""Writes the tables of both READMEs from the results: `python -m benchmarks.tables`. Nothing is typed in by hand."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import convolution_tables, several_tables
from benchmarks.selection_tables import selection
from benchmarks.two_domains_tables import two_domains
from benchmarks.vgg16_tables import vgg16

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:", "<!-- end of results -->"
METHODS = ("growl", "group lasso", "lasso", "none", "pruned only", "random clusters", "narrow dense")
NAMES = {
    "growl": "**GrOWL + group lasso**",
    "none": "no penalty (weight decay 5e-4)",
    "group lasso": "group lasso on both",
}


def main() -> None:
    for page, tables in {ROOT / "README.md": front, ROOT / "benchmarks" / "README.md": details}.items():
        page.write_text(updated(page.read_text(encoding="utf-8"), tables()), encoding="utf-8")


def updated(page: str, tables: Iterator[str]) -> str:
    """Return a page with the tables of the results as they are now."""
    before, rest = page.split(BEGIN, 1)
    marker, rest = rest.split("\n", 1)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}{marker}\n\n" + "\n".join(tables) + f"\n\n{END}{after}"


def front() -> Iterator[str]:
    """What the project gives, in short."""
    yield from mnist(_read("mnist"))
    yield from max_drop(_read("max_drop"))
    yield from speed(_read("compact_speed"), _read("stage_one_cost"))
    for case in _read("prox")["training"]:
        yield f"- {case['network']}: a training step with GrOWL after it takes {_ratio(case['ratio'])} × one without."
    yield from several_tables.ties_in_short(_read("ties"))
    yield from several_tables.bundle_in_short(_read("bundle"))
    yield from convolution_tables.speed_in_short(_read("conv_speed"), _read("resnet50_speed"))
    if (RESULTS / "channels.json").is_file():
        yield from convolution_tables.channels_in_short(_read("channels"))
    yield ""
    yield from convolution_tables.lenet(_read("lenet"))


def details() -> Iterator[str]:
    """What the prox costs and what it selects; what several models give; convolutions and real networks."""
    yield from prox(_read("prox"))
    yield ""
    yield from selection(_read("selection"))
    for name in ("soft", "align", "bundle"):
        yield ""
        yield from getattr(several_tables, name)(_read(name))
    yield ""
    yield from two_domains(_read("two_domains"))
    yield ""
    yield from several_tables.hybrid(_read("hybrid"))
    yield ""
    yield from several_tables.ties(_read("ties"))
    yield ""
    yield from convolution_tables.speed(_read("conv_speed"), _read("resnet50_speed"))
    for name in ("sharing", "stage_two_memory", "resnet20", "channels"):
        if (RESULTS / f"{name}.json").is_file():
            yield ""
            yield from getattr(convolution_tables, name)(_read(name))
    if (RESULTS / "vgg16_cifar10.json").is_file():
        yield ""
        yield from vgg16(_read("vgg16_cifar10"))


def mnist(results: dict[str, Any]) -> Iterator[str]:
    lines = {(line["method"], line["size"]): line for line in results["lines"]}
    sizes = sorted({size for method, size in lines if method == "growl"})
    dense = lines["none, stage one", 1]
    yield (
        f"MNIST, 784-300-10 ({results['parameters']:,} parameters), test accuracy in per cent, mean ± standard "
        f"deviation over {len(dense['seeds'])} seeds; strengths chosen on validation. 24× = parameters of the whole "
        f"network ÷ numbers stored; labels come on top and are in the bytes. Dense: {_accuracy(dense)}."
    )
    yield ""
    yield "| stage one, then tied, pruned and retrained | " + " | ".join(f"{size:g}×" for size in sizes) + " |"
    yield "|---|" + "---|" * len(sizes)
    for method in METHODS:
        prefix = "" if method in ("growl", "group lasso", "lasso") else "control: "
        cells = [_accuracy(lines[method, size]) if (method, size) in lines else "–" for size in sizes]
        yield f"| {prefix}{NAMES.get(method, method)} | " + " | ".join(cells) + " |"
    files = [f"{statistics.mean(lines['growl', size]['file_bytes']) / 1000:.1f} kB" for size in sizes]
    yield "| bytes on disk, labels included (GrOWL) | " + " | ".join(files) + " |"
    yield ""
    yield "The paper's definition (first layer only, 784 × 300 ÷ unique non-zero ones): inputs tied, dead units zeros:"
    yield ""
    yield "| clusters | sparsity | sharing | compression | test accuracy |"
    yield "|---|---|---|---|---|"
    for (method, _), line in lines.items():
        if method.startswith("first layer"):
            yield (
                f"| {method.split(', ')[1]} | {line['sparsity']:.1%} | {line['sharing']:.1f} | "
                f"{line['compression']:.1f}× | {_accuracy(line)} |"
            )
    yield ""


def max_drop(results: dict[str, Any]) -> Iterator[str]:
    yield "`compress(max_drop=0.003)`, mean over seeds:"
    yield ""
    yield "| task | promised | points lost on the test split | smaller (`unique`) | smaller (file) |"
    yield "|---|---|---|---|---|"
    for task, mean in results["means"].items():
        lost = _with_spread(mean["drop_test_points_mean"], mean["drop_test_points_spread"])
        smaller = f"{mean['unique_mean']:.1f}× | {mean['file_mean']:.1f}×"
        yield f"| {task} | {mean['promised_points']:.2f} | {lost} | {smaller} |"
    yield ""


def speed(compacted: dict[str, Any], stage_one: dict[str, Any]) -> Iterator[str]:
    for timing in compacted["timings"]:
        yield (
            f"- 4096 × 4096, 80 % of the inputs zero and the others tied 3:1, one thread, batch {timing['batch']}: "
            f"**{timing['faster']['median']:.1f}×** faster than dense (by operations: {compacted['ideal']:.0f}×)."
        )
    once, always = (stage_one["ratio"][each]["median"] for each in ("per epoch", "per step"))
    yield f"- One epoch of stage one, with a prox at its end: {once:.3f}× one without; after each step: {always:.2f}×."


def prox(results: dict[str, Any]) -> Iterator[str]:
    yield "### The prox"
    yield ""
    yield (
        "A step of GrOWL over all layers, one thread, ÷ a plain group-lasso loop (`vector_norm`, `mul_`) over the same "
        "groups, and ÷ bare memory traffic (every weight read, then read and written), median and quartiles; where the "
        "time goes; what preparing and taking a first step holds, ÷ the weights:"
    )
    yield ""
    yield "| network | groups | ÷ plain loop | ÷ traffic | reading, solving, scaling | extra memory |"
    yield "|---|---|---|---|---|---|"
    for case in results["layers"]:
        share = ", ".join(f"{case['share'][part]:.0%}" for part in ("read", "solve", "scale"))
        ratios = f"{_ratio(case['ratio'])} | {_ratio(case['ratio_to_memory_traffic'])}"
        yield f"| {case['network']} | {case['groups']} | {ratios} | {share} | {case['extra_memory']:.1%} |"
    yield ""
    vectors = results["vector"]
    missing = [name for name, version in vectors[0]["peers"].items() if version == "missing"]
    beside = ", ".join(f"{name} {version}" for name, version in vectors[0]["peers"].items() if version != "missing")
    yield (
        f"`prox_owl` of a float32 vector ÷ the time of the fastest peer, from tensor to tensor; beside it: {beside}"
        f"{'; not installed: ' + ', '.join(missing) if missing else ''}. Weights come as a sequence that was checked "
        "once, or as an array that is checked at every call:"
    )
    yield ""
    sizes = list(vectors[0]["sizes"])
    yield "| n | " + " | ".join(f"{int(size):,}" for size in sizes) + " |"
    yield "|---|" + "---|" * len(sizes)
    for vector in vectors:
        cases = [vector["sizes"][size] for size in sizes]
        for name, weights in (("tying", "a sequence"), ("tying, weights as an array", "an array")):
            cells = [f"{case['ratio'][name]['median']:.2f} ({case['fastest_peer']})" for case in cases]
            yield f"| {cases[-1]['zeros']:.0%} become zero, {weights} | " + " | ".join(cells) + " |"


def _ratio(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['quartile_1']:.2f}–{spread['quartile_3']:.2f})"


def _accuracy(line: dict[str, Any]) -> str:
    return _with_spread(line["test_mean"], line["test_spread"])


def _with_spread(mean: float, spread: float | None) -> str:
    return f"{mean:.2f}" + ("" if spread is None else f" ± {spread:.2f}")


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["results"]


if __name__ == "__main__":
    main()
