"""The tables of `benchmarks.two_domains`, for the page of the benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

METHODS = {
    "independent": "independent",
    "soft, chosen": "soft, strength chosen",
    "shared": "shared",
    "shared head": "shared head",
    "one model, half B": "one model, half of each batch from B",
    "one pooled model": "one model, batches drawn from all",
    "A applied to B": "control: A applied to B",
    "A fine-tuned on B, chosen": "control: A fine-tuned on B, rate chosen",
    "independent, the 100 too": "control: independent, trained on those 100, too",
    "support vector machine on B": "control: support vector machine",
}
"""What is shown of what was found, in this order, and how it is called."""


def two_domains(results: Mapping[str, Any]) -> Iterator[str]:
    """What B gains, at the fewest labels by method, then by number of labels; what is stored and how long it takes."""
    means = results["means"]
    fewest = min(next(iter(means.values())), key=int)
    near = next(iter(means.values()))[fewest]
    yield "### Two domains"
    yield ""
    yield (
        "The same ten digits from two sources, plenty of labels for A, few for B (an MLP with 128 hidden units each); "
        "test accuracy on B, then what is gained over independent, in points: mean ± standard error of differences "
        f"paired by seed, {near['independent']['seeds']} seeds, in brackets the seeds that gain : lose. Strengths and "
        f"rates are chosen for each seed on {results['settings']['VALIDATION']} digits of B that are for nothing else; "
        f"the weight decay of all methods for independent on B, on {results['settings']['HELD_OUT']} digits of B that "
        f"no run sees ({', '.join(f'{name}: {decay:g}' for name, decay in results['decays'].items())}). Shared is one "
        "model that sees as many digits of A as of B in each step, and so is the first of the models trained by hand; "
        "the second draws from all digits at hand, few of them B's. "
        f"Bytes, seconds and accuracy on A: of the first column. {fewest} labels per digit:"
    )
    yield ""
    yield "| | " + " | ".join(means) + " | A, test | bytes | seconds |"
    yield "|---|" + "---|" * (len(means) + 3)
    for method, name in METHODS.items():
        cells = [_cell(method, of[fewest]) for of in means.values()]
        yield f"| {name} | " + " | ".join([*cells, *_costs(near[method])]) + " |"
    yield ""
    yield "By number of labels, and the fixed strength that is best on test (a bound, nobody could have chosen it):"
    yield ""
    labels = list(next(iter(means.values())))
    yield "| | | " + " | ".join(labels) + " |"
    yield "|---|---|" + "---|" * len(labels)
    for pair, of in means.items():
        shared = "shared" if "shared" in of[fewest] else "shared head"
        for method in ("soft, chosen", shared, "one model, half B", "one pooled model"):
            if method in of[fewest]:
                yield f"| {pair} | {METHODS[method]} | " + " | ".join(_gain(of[n][method]) for n in labels) + " |"
        yield f"| {pair} | soft, best | " + " | ".join(_best(of[n]) for n in labels) + " |"
    yield ""
    yield "[Accuracy against strength](results/two_domains.png)."


def _cell(method: str, means: Mapping[str, Any]) -> str:
    if method not in means:
        return "–"
    accuracy = f"{means[method]['test_b']:.1f}"
    return accuracy if method == "independent" else f"{accuracy}, {_gain(means[method])}"


def _gain(mean: Mapping[str, Any]) -> str:
    counted = f" ({mean['better']} : {mean['worse']})" if "better" in mean else ""
    error = "–" if mean["gain_error"] is None else f"{mean['gain_error']:.1f}"
    return f"{mean['gain']:+.1f} ± {error}{counted}"


def _best(methods: Mapping[str, Any]) -> str:
    soft = {m: mean for m, mean in methods.items() if m.startswith("soft, ") and not m.endswith("chosen")}
    best = max(soft, key=lambda method: soft[method]["gain"])
    return f"{_gain(soft[best])} at {best.removeprefix('soft, ')}"


def _costs(mean: Mapping[str, Any]) -> tuple[str, str, str]:
    if "bytes" not in mean:
        return "", "", ""
    return f"{mean['test_a']:.1f}", f"{mean['bytes']:,}", f"{mean['seconds']:.2f}"
