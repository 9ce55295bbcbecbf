"""Ten digits from two sources, few labels for B: the example at length, with more seeds, strengths and controls.

python -m benchmarks.two_domains [--seeds 20] [--labels 5 10 30 100] [--out benchmarks/results/two_domains.json]

A quarter of an hour on one thread; goes on where it was after Ctrl-C. Writes a picture beside the results.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from sklearn.svm import SVC

from benchmarks.data import CACHE, SOURCES, ensure
from benchmarks.record import record
from tying.files.atomic import write_atomically

STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1, 1.0)
DECAYS = (0.03, 0.1, 0.3, 1.0, 3.0)
TUNING_SEEDS = range(1000, 1005)
MORE_LABELS, KERNEL = "independent, with the validation digits", "support vector machine on B"


def _example() -> ModuleType:
    """The example's functions: the loop, the ties and the splits are its own."""
    path = Path(__file__).parent.parent / "examples" / "two_domains.py"
    spec = importlib.util.spec_from_file_location("two_domains_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


example = _example()


def tasks() -> dict[str, tuple[Any, Any]]:
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


def run(a: Any, b: Any, labels: int, seed: int) -> dict[str, Any]:
    """Compare as the example does, and beside it what B's digits alone give otherwise: test accuracies."""
    part = example.split(b, seed, labels)
    more = tuple(map(torch.cat, zip(part.train, part.validation, strict=True)))
    model = {"b": example.beginning(a, b, seed)["b"]}
    example.train(model, {"b": more}, seed)
    machine = SVC(C=10).fit(*(each.numpy() for each in part.train))
    return {
        "lines": example.compare(a, b, labels, seed, STRENGTHS),
        "controls": {
            MORE_LABELS: example.accuracy(model["b"], part.test),
            KERNEL: 100 * float(machine.score(*(each.numpy() for each in part.test))),
        },
    }


def tuning(a: Any, b: Any, labels: int) -> dict[str, float]:
    """Return the mean validation accuracy of independent on B by weight decay, on seeds of their own."""
    found: dict[str, float] = {}
    for decay in DECAYS:
        scores: list[float] = []
        for seed in TUNING_SEEDS:
            part = example.split(b, seed, labels)
            model = {"b": example.beginning(a, b, seed)["b"]}
            example.train(model, {"b": part.train}, seed, decay=decay)
            scores.append(example.accuracy(model["b"], part.validation))
        found[f"{decay:g}"] = statistics.mean(scores)
    return found


def summarised(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return by method the means over the seeds, and each seed's test accuracy on B in the order of the seeds."""
    lines = [line for each in runs for line in each["lines"]]
    means = example.summary(lines)
    lines += example.chosen(lines, example.SOFT) + example.chosen(lines, example.FINE_TUNED)
    for method, mean in means.items():
        mean["test_b_by_seed"] = [round(line["test_b"], 3) for line in lines if line["method"] == method]
    apart = means[example.INDEPENDENT]["test_b_by_seed"]
    for control in (MORE_LABELS, KERNEL):
        scores = [each["controls"][control] for each in runs]
        gains = [score - without for score, without in zip(scores, apart, strict=True)]
        means[control] = {
            "seeds": len(scores),
            "test_b": statistics.mean(scores),
            "gain": statistics.mean(gains),
            "gain_error": example.standard_error(gains),
        }
    return means


def kept(folder: Path, name: str, work: Callable[[], Any]) -> Any:
    """Return what was found for these settings before, or find it and keep it."""
    settings = [example.STEPS, example.BATCH, example.RATE, example.DECAY, example.FINE_TUNING, STRENGTHS, name]
    path = folder / f"{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]}.json"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--labels", type=int, nargs="+", default=[5, 10, 30, 100], help="of each digit, for B")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/two_domains.json"))
    parser.add_argument("--runs", type=Path, default=CACHE / "two-domains-runs", help="finished runs, to go on from")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs = tasks()
    fewest = min(options.labels)
    decays = {
        name: kept(options.runs, f"{name}, {fewest}, tuning", partial(tuning, *pair, fewest))
        for name, pair in pairs.items()
    }
    runs: dict[str, dict[int, list[dict[str, Any]]]] = {name: {n: [] for n in options.labels} for name in pairs}
    jobs = list(each_run(pairs, options.labels, options.seeds))
    begun = time.monotonic()
    for done, (name, labels, seed) in enumerate(jobs, 1):
        found = kept(options.runs, f"{name}, {labels}, {seed}", partial(run, *pairs[name], labels, seed))
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
            print(example.table(f"{name}; {labels} labels per digit, {options.seeds} seeds", compared))
            for control in (MORE_LABELS, KERNEL):
                print(f"{control}: {methods[control]['test_b']:.1f}")
            print()
    example.picture(means, options.out.with_suffix(".png"))
    sizes = {name: [list(digits[0].shape) for digits in pair] for name, pair in pairs.items()}
    settings = {key: getattr(example, key) for key in ("STEPS", "BATCH", "RATE", "DECAY", "VALIDATION")}
    results = {"settings": settings, "strengths": STRENGTHS, "digits": sizes, "decays": decays, "means": means}
    record(options.out, f"make bench-two-domains (--seeds {options.seeds})", results)


if __name__ == "__main__":
    main()
