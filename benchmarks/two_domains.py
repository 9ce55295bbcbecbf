"""Ten digits from two sources, few labels for B: the example at length, with more seeds, strengths and controls.

python -m benchmarks.two_domains [--seeds 20] [--labels 5 10 30 100] [--out benchmarks/results/two_domains.json]

The weight decay is chosen for each pair, for independent on B, on a part of B's digits that no run sees; all methods
have it. A quarter of an hour on one thread; goes on where it was after Ctrl-C. Writes a picture beside the results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from examples import two_domains as example
from examples.two_domains import Digits
from sklearn.svm import SVC

from benchmarks.data import CACHE, SOURCES, ensure
from benchmarks.record import record
from tying.files.atomic import write_atomically

STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1, 1.0)
DECAYS = (0.03, 0.1, 0.3, 1.0, 3.0)
HELD_OUT, TUNING_SEEDS, TUNING_LABELS = 200, range(10), 5
KERNEL = "support vector machine on B"


def tasks() -> dict[str, tuple[Digits, Digits]]:
    """Return A and B of each comparison, by what they are.

    Raises:
        DataUnavailableError: If their digits are neither in the cache nor to be fetched.
    """
    digits = example.scikit_learn_digits()
    writers = example.other_writers((ensure(SOURCES["optdigits"]) / "optdigits.dat").read_bytes())
    maps = (ensure(SOURCES["mfeat"]) / "mfeat-pix.csv").read_bytes()
    small, whole = example.map_digits(maps), example.map_digits(maps, size=16)
    return {
        "near: digits → other writers": (digits, writers),
        "far: digits → maps": (digits, small),
        "far: maps → digits": (small, digits),
        "other pixels: digits → maps, 16 × 15": (digits, whole),
    }


def held_out(b: Digits) -> tuple[Digits, Digits]:
    """Return the digits of B to choose a weight decay on, and the others: all that any run sees."""
    order = torch.randperm(len(b[1]), generator=torch.Generator().manual_seed(0))
    few, others = order[:HELD_OUT], order[HELD_OUT:]
    return (b[0][few], b[1][few]), (b[0][others], b[1][others])


def tuning(a: Digits, held: Digits) -> dict[str, float]:
    """Return the mean accuracy of independent on B by weight decay, few labels of what is held out to learn from."""
    found: dict[str, list[float]] = {f"{decay:g}": [] for decay in DECAYS}
    for seed in TUNING_SEEDS:
        part = example.split(held, seed, TUNING_LABELS)
        for decay, scores in found.items():
            model = {"b": example.beginning(a, held, seed)["b"]}
            example.train(model, {"b": part.train}, seed, decay=float(decay))
            scores.append(example.accuracy(model["b"], example.joined(part.validation, part.test)))
    return {decay: statistics.mean(scores) for decay, scores in found.items()}


def run(a: Digits, b: Digits, labels: int, seed: int, decay: float) -> dict[str, Any]:
    """Compare as the example does; beside it the test accuracy of what networks have nothing to do with."""
    part = example.split(b, seed, labels)
    machine = SVC(C=10).fit(*(each.numpy() for each in part.train))
    return {
        "lines": example.compare(a, b, labels, seed, STRENGTHS, decay=decay),
        KERNEL: 100 * float(machine.score(*(each.numpy() for each in part.test))),
    }


def summarised(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return by method the means over the seeds, and each seed's test accuracy on B in the order of the seeds."""
    lines = [line for each in runs for line in each["lines"]]
    means = example.summary(lines)
    lines += example.chosen(lines, example.SOFT) + example.chosen(lines, example.FINE_TUNED)
    for method, mean in means.items():
        mean["test_b_by_seed"] = [round(line["test_b"], 3) for line in lines if line["method"] == method]
    apart = means[example.INDEPENDENT]["test_b_by_seed"]
    scores = [each[KERNEL] for each in runs]
    gains = [score - without for score, without in zip(scores, apart, strict=True)]
    means[KERNEL] = {
        "seeds": len(scores),
        "test_b": statistics.mean(scores),
        "gain": statistics.mean(gains),
        "gain_error": example.standard_error(gains),
    }
    return means


def kept(folder: Path, name: str, work: Callable[[], Any]) -> Any:
    """Return what this code found before, or find it and keep it."""
    sources = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in (example, sys.modules[__name__])]
    path = folder / f"{hashlib.sha256(json.dumps([*sources, name]).encode()).hexdigest()[:16]}.json"
    if not path.exists():
        found = work()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(found).encode())
    return json.loads(path.read_text(encoding="utf-8"))


def each_run(names: Iterable[str], labels: Sequence[int], seeds: int) -> Iterator[tuple[str, int, int]]:
    """Seed after seed, so that what was found so far is worth something at any time."""
    for seed in range(seeds):
        for name in names:
            for count in labels:
                yield name, count, seed


def without_nan(value: Any) -> Any:
    """Return it with None for the error of a single seed."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--labels", type=int, nargs="+", default=[5, 10, 30, 100], help="of each digit, for B")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/two_domains.json"))
    parser.add_argument("--runs", type=Path, default=CACHE / "two-domains-runs", help="finished runs, to go on from")
    options = parser.parse_args()
    torch.set_num_threads(1)
    example.train({"a": example.network(64)}, {"a": example.scikit_learn_digits()}, 0)  # the first seconds are longer
    held = {name: (a, *held_out(b)) for name, (a, b) in tasks().items()}
    tuned = {name: kept(options.runs, f"{name}, tuning", partial(tuning, a, few)) for name, (a, few, _) in held.items()}
    decays = {name: float(max(scores, key=lambda decay: scores[decay])) for name, scores in tuned.items()}
    pairs = {name: (a, b) for name, (a, _, b) in held.items()}
    runs: dict[str, dict[int, list[dict[str, Any]]]] = {name: {n: [] for n in options.labels} for name in pairs}
    jobs = list(each_run(pairs, options.labels, options.seeds))
    begun = time.monotonic()
    for done, (name, labels, seed) in enumerate(jobs, 1):
        found = kept(options.runs, f"{name}, {labels}, {seed}", partial(run, *pairs[name], labels, seed, decays[name]))
        runs[name][labels].append(found)
        left = (time.monotonic() - begun) / done * (len(jobs) - done)
        print(f"\r{done} of {len(jobs)}, {left / 60:.0f} minutes left ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    means = {
        name: {labels: summarised(of_labels) for labels, of_labels in by_labels.items()}
        for name, by_labels in runs.items()
    }
    for name, by_labels in means.items():
        for labels, methods in by_labels.items():
            compared = {method: mean for method, mean in methods.items() if "bytes" in mean}
            title = f"{name}; {labels} labels per digit, {options.seeds} seeds, weight decay {decays[name]:g}"
            print(example.table(title, compared))
            print(f"{KERNEL}: {methods[KERNEL]['test_b']:.1f}\n")
    example.picture(means, options.out.with_suffix(".png"))
    sizes = {name: [list(digits[0].shape) for digits in pair] for name, pair in pairs.items()}
    settings = {key: getattr(example, key) for key in ("STEPS", "BATCH", "RATE", "VALIDATION")} | {"HELD_OUT": HELD_OUT}
    results = {"settings": settings, "strengths": STRENGTHS, "digits": sizes, "decays": decays, "tuning": tuned}
    results["means"] = without_nan(means)
    record(options.out, f"make bench-two-domains (--seeds {options.seeds})", results)


if __name__ == "__main__":
    main()
