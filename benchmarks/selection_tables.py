"""The tables of the selection benchmark, as the README has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def selection(results: dict[str, Any]) -> Iterator[str]:
    lines = {
        tuple(line.get(label) for label in ("design", "rho", "truth", "responses", "rule", "method")): line
        for line in results["lines"]
    }
    groups = ("groups", 0.99, "alike", results["responses"])
    methods = [key[5] for key in lines if key[:5] == (*groups, "refit")]
    yield "### What GrOWL selects"
    yield ""
    yield (
        f"What is selected, and selected again: ten groups of ten covariates, three groups active, "
        f"{results['responses']} responses, 100 samples; {results['resamples']} bootstrap samples each, mean ± "
        f"standard deviation over {results['seeds']} seeds. Strengths by validation error after refitting what was "
        "selected (tied where equal). At ρ = .99, where 30 of 100 are right:"
    )
    yield ""
    yield "| | selected | overlap (Jaccard) | by chance | members of a group equal | test error | refitted |"
    yield "|---|---|---|---|---|---|---|"
    names = ("selected", "overlap", "overlap by chance", "members equal", "error", "error refitted")
    for method in methods:
        yield f"| {method} | {' | '.join(_figure(lines[(*groups, 'refit', method)], name) for name in names)} |"
    ridge = lines[(*groups, "validation", "ridge")]
    yield f"| control: ridge, all covariates | 100 | | | | {_figure(ridge, 'error')} | |"
    yield f"| control: the truth itself | 30 | | | | {_figure(ridge, 'floor')} | |"
    yield ""
    yield "Share of the overlap that chance leaves over; last, the 215 spectra of meat (Tecator), whose |r| is ≥ 0.96:"
    yield ""
    columns = [("groups", rho, truth, results["responses"]) for truth in ("alike", "one") for rho in (0.8, 0.95, 0.99)]
    columns.append(("spectra", None, None, 3))
    titles = [f"{'one active of ten, ' if key[2] == 'one' else ''}ρ = {key[1]}" for key in columns[:-1]]
    yield "| | " + " | ".join([*titles, "spectra"]) + " |"
    yield "|---|" + "---|" * len(columns)
    for method in methods:
        cells = [_figure(lines[(*key, "refit", method)], "overlap beyond chance") for key in columns]
        yield f"| {method} | {' | '.join(cells)} |"
    yield ""
    growl, net = (
        {rule: lines[(*groups, rule, method)] for rule in ("validation", "number")}
        for method in ("GrOWL, OSCAR", "group elastic net")
    )
    selected, found, chance = (growl["validation"][name][0] for name in ("selected", "overlap", "overlap by chance"))
    yield (
        f"Chosen by the validation error of the fit itself, GrOWL selects {selected:.0f} of 100: an overlap of "
        f"{found:.2f}, where chance gives {chance:.2f}. Chosen so that as many are selected as are right, its overlap "
        f"is {growl['number']['overlap'][0]:.2f}, and the group elastic net's {net['number']['overlap'][0]:.2f}."
    )
    yield ""
    yield from _spectra(lines, methods)
    yield ""
    yield from _near_copies([line for line in results["lines"] if line["design"] == "near copies"])


def _spectra(lines: dict[Any, dict[str, Any]], methods: list[str]) -> Iterator[str]:
    spectra = ("spectra", None, None, 3)
    yield "The spectra, where tying neighbouring wavelengths costs accuracy, because their difference predicts:"
    yield ""
    yield "| | selected | test error | refitted | worst relative duality gap |"
    yield "|---|---|---|---|---|"
    for method in methods:
        line = lines[(*spectra, "refit", method)]
        cells = [_figure(line, name) for name in ("selected", "error", "error refitted")]
        yield f"| {method} | {' | '.join(cells)} | {line['gap, worst']:.0e} |"
    yield f"| control: ridge, all covariates | 100 | {_figure(lines[(*spectra, 'validation', 'ridge')], 'error')} | | |"
    yield ""


def _near_copies(lines: list[dict[str, Any]]) -> Iterator[str]:
    yield "Ten samples, 100 columns, two blocks of ten near copies (Figueiredo & Nowak 2016):"
    yield ""
    yield "| | selected of each ten | distinct values | selected elsewhere | error of the coefficients |"
    yield "|---|---|---|---|---|"
    for line in lines:
        blocks = [[line[f"{what} in block {b}"][0] for b in (1, 2)] for what in ("selected", "distinct")]
        pairs = (f"{first:.1f}, {second:.1f}" for first, second in blocks)
        rest = (_figure(line, name) for name in ("selected elsewhere", "error of coefficients"))
        yield f"| {line['method']} | {' | '.join([*pairs, *rest])} |"
    yield ""


def _figure(line: dict[str, Any], name: str) -> str:
    mean, spread = line[name]
    digits = 1 if mean >= 2 else 3 if "error" in name or name == "floor" else 2
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"
