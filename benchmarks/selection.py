"""Which covariates does a penalty select, and does it select them again? Lasso, group lasso, OWL and GrOWL.

    python -m benchmarks.selection [--seeds 10] [--resamples 10] [--out benchmarks/results/selection.json]

Near copies: the design of Figueiredo & Nowak (AISTATS 2016). Correlated groups: ten of ten covariates, ρ = .8, .95 and
.99. Spectra: Tecator. In the last two everything is repeated on bootstrap samples: each goes through a path of
strengths, and one is chosen by the same rule for all methods: the least validation error of the fit; the least
validation error after the selected covariates are refitted, tied where they came out equal; or the number selected that
is nearest to the number that is right. The test split is looked at for what was chosen. Controls: (group) elastic net,
ridge on all covariates.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import selection_data as data
from benchmarks.record import command_of, record
from benchmarks.selection_data import Data
from benchmarks.selection_figures import equal_norms, equality, refit, relative_error, stability, ties
from benchmarks.selection_solver import Penalised, Problems, Solution, largest_strength, solve
from tying.penalties import Constant, Oscar, Pld, Ramp

Array = NDArray[np.float64]
Say = Callable[[str], None]
Line = dict[str, Any]

FLAT, OSCAR, PLD = Constant(), Ramp(3.0), Pld(1.0, 3.0 / (data.P // 2), 0.5)
GROUPED = {
    "lasso": Penalised(FLAT, "numbers"),
    "group lasso": Penalised(FLAT),
    "group elastic net": Penalised(FLAT, ridge=1.0),
    "GrOWL, OSCAR": Penalised(OSCAR),
    "GrOWL, PLD": Penalised(PLD),
}
SINGLE = {
    "lasso": Penalised(FLAT, "numbers"),
    "elastic net": Penalised(FLAT, "numbers", ridge=1.0),
    "OWL, OSCAR": Penalised(OSCAR, "numbers"),
    "OWL, PLD": Penalised(PLD, "numbers"),
}
RULES = ("validation", "refit", "number")
RESPONSES = 5
DELTA, BASE = 1e-3, 0.05
SPECTRA_NUMBER = 10


@dataclass(frozen=True)
class Setting:
    """A design, made anew for every seed, and what is run on it."""

    labels: Mapping[str, Any]
    make: Callable[[int], Data]
    methods: Mapping[str, Penalised]
    strengths: Array
    """As shares of the largest, falling."""
    number: int
    """How many covariates are right."""


def settings() -> Iterator[Setting]:
    """Yield what is run under bootstrap."""
    path = np.geomspace(0.9, 0.02, 20)
    for truth, responses in (("alike", RESPONSES), ("one", RESPONSES), ("alike", 1)):
        for rho in (0.8, 0.95, 0.99):
            yield Setting(
                {"design": "groups", "rho": rho, "truth": truth, "responses": responses},
                lambda seed, rho=rho, truth=truth, responses=responses: data.correlated_groups(
                    rho, truth, responses, seed
                ),
                GROUPED if responses > 1 else SINGLE,
                path,
                data.ACTIVE_GROUPS * (data.GROUP if truth == "alike" else 1),
            )
    yield Setting(
        {"design": "spectra", "rho": None, "truth": None, "responses": 3},
        data.spectra,
        GROUPED,
        np.geomspace(0.9, 1e-3, 14),
        SPECTRA_NUMBER,
    )


@dataclass(frozen=True)
class Sample:
    """One bootstrap sample with the other splits centred as it is."""

    gram: Array
    moment: Array
    validation: tuple[Array, Array]
    test: tuple[Array, Array]


@dataclass(frozen=True)
class Candidate:
    """One strength on one sample."""

    X: Array
    selected: int
    error: float
    """On the validation split."""
    refitted: Array
    refitted_error: float
    """On the validation split."""


def bootstrap(split: Data, resamples: int, seed: int) -> tuple[Problems, list[Sample]]:
    """Draw with replacement as many as there are, `resamples` times."""
    A, Y = split.train
    rows = torch.from_numpy(np.random.default_rng([seed, 4]).integers(0, len(A), (resamples, len(A))))
    means = A[rows].mean(dim=1), Y[rows].mean(dim=1)
    problems = Problems.of(A[rows] - means[0][:, None], Y[rows] - means[1][:, None])
    samples = []
    for b in range(resamples):
        validation, test = (
            ((X - means[0][b]).numpy(), (T - means[1][b]).numpy()) for X, T in (split.validation, split.test)
        )
        samples.append(Sample(problems.gram[b].numpy(), problems.moment[b].numpy(), validation, test))
    return problems, samples


def walk(problems: Problems, method: Penalised, shares: Array, tolerance: float = 1e-6) -> Iterator[Solution]:
    """Solve from large strengths to small, each from the one before."""
    largest, solution = largest_strength(problems, method), None
    for share in shares:
        solution = solve(problems, method, float(share) * largest, solution, tolerance=tolerance)
        yield solution


def candidate(X: Array, sample: Sample) -> Candidate:
    refitted, error = refit(ties(X), sample.gram, sample.moment, sample.validation)
    selected = int(np.count_nonzero(X.any(axis=1)))
    return Candidate(X, selected, relative_error(X, sample.validation), refitted, error)


def choose(candidates: Sequence[Candidate], rule: str, number: int) -> Candidate:
    """Choose by a rule; the first of equals, which has the largest strength."""
    if rule == "validation":
        return min(candidates, key=lambda c: c.error)
    if rule == "refit":
        return min(candidates, key=lambda c: c.refitted_error)
    return min(candidates, key=lambda c: (abs(c.selected - number), c.error))


def figures(chosen: Sequence[Candidate], samples: Sequence[Sample], split: Data) -> dict[str, float | None]:
    """Count what was chosen on each sample, and take the means."""
    each = [_one(c, sample, split) for c, sample in zip(chosen, samples, strict=True)]
    return {**_means(each), **stability([c.X.any(axis=1) for c in chosen])}


def _one(chosen: Candidate, sample: Sample, split: Data) -> dict[str, float | None]:
    norms = np.linalg.norm(chosen.X, axis=1)
    selected = norms > 0
    untied, _ = refit(np.eye(len(norms))[:, selected], sample.gram, sample.moment, sample.validation)
    found: dict[str, float | None] = {
        "selected": float(selected.sum()),
        "distinct": float(sum(1 for _ in equal_norms(norms))),
        **equality(norms, split.groups),
        "error": relative_error(chosen.X, sample.test),
        "error refitted": relative_error(chosen.refitted, sample.test),
        "error refitted untied": relative_error(untied, sample.test),
    }
    if split.active is not None:
        right = np.count_nonzero(selected & split.active)
        found["found"] = float(right / split.active.sum())
        found["right"] = float(right / selected.sum()) if selected.any() else None
    return found


def run(setting: Setting, seed: int, resamples: int, say: Say) -> Iterator[Line]:
    """Yield a line per method and rule."""
    split = setting.make(seed)
    problems, samples = bootstrap(split, resamples, seed)
    for name, method in setting.methods.items():
        say(name)
        candidates: list[list[Candidate]] = [[] for _ in samples]
        gaps = []
        for solution in walk(problems, method, setting.strengths):
            gaps.append(solution.gap.numpy())
            for own, X, sample in zip(candidates, solution.X.numpy(), samples, strict=True):
                own.append(candidate(X, sample))
        for rule in RULES:
            chosen = [choose(own, rule, setting.number) for own in candidates]
            found = figures(chosen, samples, split)
            found["gap, median"], found["gap, worst"] = float(np.median(gaps)), float(np.max(gaps))
            yield {**setting.labels, "method": name, "rule": rule, **found}
    yield {**setting.labels, "method": "ridge", "rule": "validation", **_ridge(samples), "floor": split.floor}


def _ridge(samples: Sequence[Sample]) -> dict[str, float | None]:
    """Return the control that selects nothing: all covariates, shrunk."""
    fits = [refit(np.eye(len(s.gram)), s.gram, s.moment, s.validation)[0] for s in samples]
    return {"error": float(np.mean([relative_error(X, s.test) for X, s in zip(fits, samples, strict=True)]))}


def near_copies(seeds: int, strengths: int = 30) -> list[Line]:
    """Run the design of two blocks of near copies; "best λ" knows the truth, as no user does."""
    A, y, truth = (torch.stack(parts) for parts in zip(*map(data.near_copies, range(seeds)), strict=True))
    problems = Problems.of(A, y)
    oscar = Oscar(BASE, DELTA)
    shape = Penalised(oscar, "numbers")
    owl = {
        "lasso": FLAT(data.P) * BASE,
        "lasso, mean λ of OSCAR": FLAT(data.P) * oscar(data.P).mean(),
        "OSCAR": oscar(data.P),
        "PLD": Pld(BASE, DELTA, 0.5)(data.P),
    }
    lines = []
    for name, weights in owl.items():
        ones = torch.ones(seeds, dtype=torch.float64)
        solution = solve(problems, Penalised(weights, "numbers"), ones, tolerance=1e-9)
        lines += _near_copies_lines(name, solution.X, solution.gap, truth)
    for name, method in {"lasso": SINGLE["lasso"], "elastic net": SINGLE["elastic net"], "OSCAR": shape}.items():
        fits = list(walk(problems, method, np.geomspace(0.9, 1e-3, strengths), 1e-9))
        errors = torch.stack([_distance(fit.X, truth) for fit in fits])
        best, seed = errors.argmin(dim=0), torch.arange(seeds)
        X, gap = (torch.stack([getattr(fit, part) for fit in fits])[best, seed] for part in ("X", "gap"))
        lines += _near_copies_lines(f"{name}, best λ", X, gap, truth)
    return lines


def _near_copies_lines(name: str, X: torch.Tensor, gap: torch.Tensor, truth: torch.Tensor) -> Iterator[Line]:
    inside = [list(block) for block in data.near_copies_blocks()]
    for x, error, certified in zip(X.numpy()[:, :, 0], _distance(X, truth).tolist(), gap.tolist(), strict=True):
        parts = [np.abs(x[block]) for block in inside]
        yield {
            "design": "near copies",
            "method": name,
            "selected in block 1": float(np.count_nonzero(parts[0])),
            "selected in block 2": float(np.count_nonzero(parts[1])),
            "distinct in block 1": float(sum(1 for _ in equal_norms(parts[0]))),
            "distinct in block 2": float(sum(1 for _ in equal_norms(parts[1]))),
            "selected elsewhere": float(np.count_nonzero(x) - sum(np.count_nonzero(part) for part in parts)),
            "error of coefficients": error,
            "gap, worst": certified,
        }


def _distance(X: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return (X - truth).norm(dim=(1, 2)) / truth.norm(dim=(1, 2))


def _means(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    found = {}
    for key in rows[0]:
        known = [value for row in rows if (value := row[key]) is not None]
        found[key] = float(np.mean(known)) if known else None
    return found


def summarise(lines: Sequence[Line]) -> list[Line]:
    """Join the lines of all seeds: `[mean, standard deviation]` of every figure, the worst of the gaps."""
    joined: dict[tuple[Any, ...], list[Line]] = {}
    labels = ("design", "rho", "truth", "responses", "method", "rule")
    for line in lines:
        joined.setdefault(tuple(line.get(label) for label in labels), []).append(line)
    summary = []
    for key, own in joined.items():
        found: Line = {label: value for label, value in zip(labels, key, strict=True) if value is not None}
        for name in [name for name in own[0] if name not in labels]:
            known = [line[name] for line in own if line[name] is not None]
            if known and name.startswith("gap"):
                found[name] = _rounded(np.median(known) if name == "gap, median" else max(known))
            elif known:
                found[name] = [_rounded(np.mean(known)), _rounded(np.std(known, ddof=1)) if len(known) > 1 else None]
        summary.append(found)
    return summary


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def show(lines: Sequence[Line], console: Console) -> None:
    """Print a table per design and rule."""
    for design, rule in dict.fromkeys((line["design"], line.get("rule")) for line in lines):
        own = [line for line in lines if (line["design"], line.get("rule")) == (design, rule)]
        keys = list(dict.fromkeys(key for line in own for key in line if key not in ("design", "rule")))
        table = Table(*keys, title=f"{design}, chosen by {rule}" if rule else design)
        for line in own:
            table.add_row(*(_cell(line.get(key)) for key in keys))
        console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return f"{value[0]:.3g}" if value[1] is None else f"{value[0]:.3g} ± {value[1]:.2g}"
    return "" if value is None else f"{value:.2g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="of each design under bootstrap")
    parser.add_argument("--copies", type=int, default=50, help="seeds of the design of near copies")
    parser.add_argument("--resamples", type=int, default=10)
    parser.add_argument("--out", default="benchmarks/results/selection.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data.read_spectra()
    lines = near_copies(options.copies)
    todo = [(setting, seed) for setting in settings() for seed in range(options.seeds)]
    console = Console(stderr=True, highlight=False)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("", total=sum(len(setting.methods) for setting, _ in todo))
        for setting, seed in todo:
            words = ", ".join(str(value) for value in setting.labels.values() if value is not None)

            def say(method: str, words: str = words, seed: int = seed) -> None:
                bar.update(task, advance=1, description=f"{words}, seed {seed}: {method}")

            lines += run(setting, seed, options.resamples, say)
            if seed == options.seeds - 1:
                console.print(f"done: {words}")
    summary = summarise(lines)
    show(summary, Console(file=sys.stdout, width=250, highlight=False))
    counts = {"seeds": options.seeds, "resamples": options.resamples, "seeds_near_copies": options.copies}
    record(options.out, command_of("selection", options), {**counts, "responses": RESPONSES, "lines": summary})


if __name__ == "__main__":
    main()
