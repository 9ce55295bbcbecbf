"""Writes the README's tables from the results: `python -m benchmarks.tables`. Nothing is typed in by hand."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.selection_tables import selection

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
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text(encoding="utf-8")), encoding="utf-8")


def updated(readme: str) -> str:
    """Return the README with the tables of the results as they are now."""
    before, rest = readme.split(BEGIN, 1)
    marker, rest = rest.split("\n", 1)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}{marker}\n\n" + "\n".join(tables()) + f"\n\n{END}{after}"


def tables() -> Iterator[str]:
    yield from mnist(_read("mnist"))
    yield from max_drop(_read("max_drop"))
    yield from selection(_read("selection"))
    yield from speed(_read("compact_speed"), _read("stage_one_cost"))
    yield from prox(_read("prox"))


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
    yield ""
    yield (
        "A step of GrOWL over all layers, one thread, ÷ a plain group-lasso loop (`vector_norm`, `mul_`) over "
        "the same groups, median and quartiles; extra memory is what preparing and taking a step holds, ÷ the weights:"
    )
    yield ""
    yield "| network | over outputs | over inputs | extra memory |"
    yield "|---|---|---|---|"
    cases = {(case["network"], case["groups"]): case for case in results["layers"]}
    for network in dict.fromkeys(name for name, _ in cases):
        ratios = [_ratio(cases[network, kind]["ratio"]) for kind in ("outputs", "inputs")]
        memory = max(cases[network, kind]["extra_memory"] for kind in ("outputs", "inputs"))
        yield f"| {network} | {' | '.join(ratios)} | {memory:.1%} |"
    yield ""
    for case in results["training"]:
        yield f"- {case['network']}: a training step with a prox after it takes {_ratio(case['ratio'])} × one without."
    yield ""
    yield "`prox_owl` of a float32 vector ÷ the time of the fastest peer, from tensor to tensor:"
    yield ""
    sizes = list(results["vector"][0]["sizes"])
    yield "| n | " + " | ".join(f"{int(size):,}" for size in sizes) + " |"
    yield "|---|" + "---|" * len(sizes)
    for vector in results["vector"]:
        cases = [vector["sizes"][size] for size in sizes]
        cells = [f"{case['ratio']['tying']['median']:.2f} ({case['fastest_peer']})" for case in cases]
        yield f"| {cases[-1]['zeros']:.0%} become zero | " + " | ".join(cells) + " |"


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
