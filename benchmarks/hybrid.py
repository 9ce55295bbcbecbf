"""What an unsupervised twin is worth: accuracy from independent to shared, in two studies with paired seeds.

Points: the hybrid of Lasserre, Bishop & Minka (CVPR 2006), against α, for classes more and more elongated, which the
model takes for round. Each fit is the best of several starts. α is chosen on one half of the seeds and measured on the
other; so is the penalty of the control that only shrinks, a logistic regression.
Digits: a classifier tied to an autoencoder, or to k-means, against the strength, with its controls. Strengths are
chosen on validation, seed by seed, the weakest of equals. All have the same steps of Adam, with the tie as a loss term:
two models under a strength of 10 move slowly then, and are not yet what the hard tie beside them is.

Both do what examples/hybrid.py does, with many networks at once; that they agree is part of the result.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from examples import hybrid as example
from examples.hybrid import HARD, Curves, mean_and_error
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import hybrid_digits, hybrid_points
from benchmarks.hybrid_digits import Score, label
from benchmarks.record import command_of, record

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9, 1.0)
ELONGATIONS = (1.0, 1.5, 1.75, 2.0, 3.0)
POINT_LABELS = (2, 5, 20)
DIGIT_LABELS = (10, 30, 100)
STRENGTHS = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, HARD)
DECAYS = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
BATCH = 100
"""Samples that are fitted at once."""
TIED = ("autoencoder", "k-means")
BASELINE, DECAY, LABELLED_ONLY = "pixels, logistic regression", "weight decay", "k-means of the labelled only"
RIVALS = (BASELINE, DECAY, LABELLED_ONLY, "autoencoder alone, read-out", "k-means, read-out")

ENDS = {"strength 0": "0", "hard": "hard"}
SHOWN = (*ENDS, DECAY, BASELINE)

Pair = list[float | None]
"""Mean and standard error, in percent; of a single seed there is no error."""
Line = dict[str, Any]
Say = Callable[[], None]


def percent(values: Sequence[float]) -> Pair:
    return [None if math.isnan(figure) else round(100 * figure, 3) for figure in mean_and_error(values)]


def gain(values: Sequence[float], base: Sequence[float]) -> Pair:
    """Return mean and standard error of the paired differences."""
    return percent([a - b for a, b in zip(values, base, strict=True)])


# --- Points ---------------------------------------------------------------------------------------------------------


def points(elongation: float, labels: int, seeds: int, say: Say) -> tuple[Line, dict[float, list[float]]]:
    """Return what is kept of one setting, and its accuracies by α and seed."""
    found: dict[float, list[float]] = {alpha: [] for alpha in ALPHAS}
    shrunk: dict[float, list[float]] = {penalty: [] for penalty in hybrid_points.PENALTIES}
    counts = {
        "not stationary": [0] * len(ALPHAS),
        "starts disagree": [0] * len(ALPHAS),
        "first start beaten": [0] * len(ALPHAS),
    }
    for first in range(0, seeds, BATCH):
        drawn = [example.draw_points(elongation, labels, seed) for seed in range(first, min(first + BATCH, seeds))]
        samples = hybrid_points.Samples.of(drawn)
        for place, (alpha, best) in enumerate(hybrid_points.fit_all(samples, ALPHAS).items()):
            found[alpha] += hybrid_points.accuracies(best.z, drawn)
            counts["not stationary"][place] += int((best.slope > hybrid_points.TOLERANCE).sum())
            counts["starts disagree"][place] += best.disagree()
            counts["first start beaten"][place] += best.first_is_not_best()
        say()
        for penalty, values in shrunk.items():
            values += [hybrid_points.logistic_regression(own, penalty) for own in drawn]
    line = {
        "elongation": elongation,
        "labels per class": labels,
        "seeds": seeds,
        "alpha": list(ALPHAS),
        "accuracy": [percent(found[alpha]) for alpha in ALPHAS],
        "gain on alpha 1": [gain(found[alpha], found[1.0]) for alpha in ALPHAS],
        "gain on alpha 0": [gain(found[alpha], found[0.0]) for alpha in ALPHAS],
        "chosen": _chosen_alpha(found, shrunk),
        "fits": counts,
    }
    return line, found


def _chosen_alpha(found: Mapping[float, Sequence[float]], shrunk: Mapping[float, Sequence[float]]) -> Line:
    """Choose the best α inside on the even seeds, measure it on the odd ones; so with the control's penalty.

    All that stands beside it is of the odd seeds, too.
    """

    def best(by: Mapping[float, Sequence[float]], among: Sequence[float]) -> float:
        return max(among, key=lambda knob: mean_and_error(by[knob][::2])[0])

    alpha, penalty = best(found, ALPHAS[1:-1]), best(shrunk, list(shrunk))
    here, control = found[alpha][1::2], shrunk[penalty][1::2]
    return {
        "alpha": alpha,
        "accuracy": percent(here),
        "accuracy at alpha 0": percent(found[0.0][1::2]),
        "accuracy at alpha 1": percent(found[1.0][1::2]),
        "gain on alpha 1": gain(here, found[1.0][1::2]),
        "gain on alpha 0": gain(here, found[0.0][1::2]),
        "logistic regression": {"C": penalty, "accuracy": percent(control)},
        "gain on logistic regression": gain(here, control),
    }


# --- Digits ---------------------------------------------------------------------------------------------------------

Found = dict[str, dict[str, list[Score]]]
"""Name → strength, or "" → scores, seed by seed."""


def digits(labels: int, seeds: int, say: Say) -> Found:
    """Return all scores with so many labels of each digit."""
    found: Found = {}
    for seed in range(seeds):
        for name, scores in hybrid_digits.run(labels, seed, list(STRENGTHS), list(DECAYS)):
            for strength, score in scores.items():
                found.setdefault(name, {}).setdefault(strength, []).append(score)
        say()
    return found


def digits_line(labels: int, found: Found) -> Line:
    """Return what is kept: test accuracies by strength, and with the strength chosen on validation."""
    chosen = {name: _chosen_on_validation(by) for name, by in found.items()}
    line: Line = {"labels per digit": labels, "seeds": len(chosen[BASELINE][0]), "methods": {}}
    for name, by in found.items():
        own = _tests(by)
        kept: Line = {"test": {strength: percent(values) for strength, values in own.items()}}
        if "" not in by:
            rivals = {end_name: own[end] for end_name, end in ENDS.items() if end in own}
            rivals |= {rival: chosen[rival][0] for rival in RIVALS if rival != name}
            kept["gain on strength 0"] = {s: gain(values, own["0"]) for s, values in own.items() if s != "0"}
            kept["chosen"] = {
                "test": percent(chosen[name][0]),
                "strengths": {s: chosen[name][1].count(s) for s in own},
                "gain on": {rival: gain(chosen[name][0], values) for rival, values in rivals.items()},
            }
        line["methods"][name] = kept
    return line


def _tests(by: Mapping[str, Sequence[Score]]) -> dict[str, list[float]]:
    return {strength: [test for _, test in scores] for strength, scores in by.items()}


def _chosen_on_validation(by: Mapping[str, Sequence[Score]]) -> tuple[list[float], list[str]]:
    """Return the test accuracy of every seed's own choice, and the choices."""
    seeds = len(next(iter(by.values())))
    choices = [max(by, key=lambda strength: by[strength][seed][0]) for seed in range(seeds)]
    return [by[strength][seed][1] for seed, strength in enumerate(choices)], choices


# --- Both -----------------------------------------------------------------------------------------------------------


def agreement(samples: int = 3) -> dict[str, float]:
    """Return the largest differences in accuracy between the example and what is done here."""
    drawn = [example.draw_points(1.5, 5, seed) for seed in range(samples)]
    apart = [0.0]
    fits = hybrid_points.fit_all(hybrid_points.Samples.of(drawn), (0.0, 0.3, 0.5, 0.8, 1.0))
    predicting = [example.fit_hybrid(own, list(fits)) for own in drawn]
    for alpha in fits:
        ours = hybrid_points.accuracies(fits[alpha].z, drawn)
        theirs = [example.accuracy_of(by[alpha], own.elongation) for by, own in zip(predicting, drawn, strict=True)]
        apart += [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    images = [0.0]
    for seed in range(samples):
        sample = example.draw_digits(10, seed)
        found = dict(hybrid_digits.run(10, seed, list(STRENGTHS), list(DECAYS)))
        ways = {"autoencoder": example.with_autoencoder, "k-means": example.with_kmeans}
        for strength in (0.0, 0.1, HARD):
            images += [
                abs(found[name][label(strength)][1] - example.share_right(way(sample, strength, seed), *sample.test))
                for name, way in ways.items()
            ]
    return {"points": max(apart), "digits": max(images)}


def curves_of(found: Found) -> tuple[Curves, dict[str, list[float]]]:
    """Return the curves of a panel, and the level that has no strength."""
    names = (*TIED, LABELLED_ONLY, DECAY)
    curves = {
        name: {HARD if s == "hard" else float(s): values for s, values in _tests(found[name]).items()} for name in names
    }
    return curves, {BASELINE: _tests(found[BASELINE])[""]}


def show_points(lines: Sequence[Line], console: Console) -> None:
    heads = (
        "elongation",
        "labels",
        "α = 0",
        "best inside",
        "α = 1",
        "its α",
        "− α = 0",
        "− α = 1",
        "− log. regression",
    )
    table = Table(*heads, "starts disagree, %", title="points")
    for line in lines:
        chosen, counts = line["chosen"], line["fits"]["starts disagree"]
        disagree = sum(counts) / len(counts) / line["seeds"]
        table.add_row(
            f"{line['elongation']:g}", str(line["labels per class"]), _cell(chosen["accuracy at alpha 0"]),
            _cell(chosen["accuracy"]), _cell(chosen["accuracy at alpha 1"]), f"{chosen['alpha']:g}",
            _cell(chosen["gain on alpha 0"], signed=True), _cell(chosen["gain on alpha 1"], signed=True),
            _cell(chosen["gain on logistic regression"], signed=True), f"{100 * disagree:.1f}",
        )  # fmt: skip
    console.print(table)


def show_digits(lines: Sequence[Line], console: Console) -> None:
    for line in lines:
        title = f"{line['labels per digit']} labels per digit, {line['seeds']} seeds"
        table = Table("", *map(label, STRENGTHS), "chosen", *(f"− {rival}" for rival in SHOWN), title=title)
        for name, kept in line["methods"].items():
            chosen = kept.get("chosen", {"test": kept["test"].get(""), "gain on": {}})
            cells = [_cell(kept["test"].get(label(s))) for s in STRENGTHS]
            rivals = [_cell(chosen["gain on"].get(rival), signed=True) for rival in SHOWN]
            table.add_row(name, *cells, _cell(chosen["test"]), *rivals)
        console.print(table)


def _cell(pair: Pair | None, *, signed: bool = False) -> str:
    if pair is None:
        return ""
    digits = 2 if signed else 1
    mean, error = (f"{figure:.{digits}f}" if figure is not None else "–" for figure in pair)
    return f"{mean if mean.startswith('-') or not signed else '+' + mean} ± {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=300, help="seeds of each setting of the points")
    parser.add_argument("--digits", type=int, default=40, help="seeds of each setting of the digits")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="a folder: data and two pictures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(stderr=True, highlight=False)
    results: dict[str, Any] = {"points": [], "digits": []}
    command = command_of("hybrid", options)
    panels: dict[str, Any] = {}
    levels: dict[str, dict[str, list[float]]] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        "of which left:",
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        for line, title, found in _all_points(options.points, bar):
            results["points"].append(line)
            panels.setdefault(title, {})[f"{line['labels per class']} labels per class"] = found
            record(options.out / "hybrid.json", command, results)
            example.picture(panels, "α", options.out / "hybrid_points.png")
        panels = {}
        for labels, found in _all_digits(options.digits, bar):
            results["digits"].append(digits_line(labels, found))
            title = f"{labels} labels per digit"
            panels[title], levels[title] = curves_of(found)
            record(options.out / "hybrid.json", command, results)
            example.picture(panels, "strength", options.out / "hybrid_digits.png", levels)
        results["largest difference to the example"] = agreement()
        record(options.out / "hybrid.json", command, results)
    out = Console(file=sys.stdout, width=240, highlight=False)
    show_points(results["points"], out)
    show_digits(results["digits"], out)
    out.print(f"largest difference to the example: {results['largest difference to the example']}")


def _all_points(seeds: int, bar: Progress) -> Iterator[tuple[Line, str, dict[float, list[float]]]]:
    batches = math.ceil(seeds / BATCH)
    task = bar.add_task("points", total=batches * len(ELONGATIONS) * len(POINT_LABELS))
    for elongation in ELONGATIONS:
        for labels in POINT_LABELS:
            line, found = points(elongation, labels, seeds, lambda: bar.advance(task))
            yield line, f"elongation {elongation:g}", found


def _all_digits(seeds: int, bar: Progress) -> Iterator[tuple[int, Found]]:
    task = bar.add_task("digits", total=seeds * len(DIGIT_LABELS))
    for labels in DIGIT_LABELS:
        yield labels, digits(labels, seeds, lambda: bar.advance(task))


if __name__ == "__main__":
    main()
