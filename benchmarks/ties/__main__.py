"""What daily use does to tied weights: every operation, four kinds of tie; `tie_` beside what people write today.

python -m benchmarks.ties [--quick] [--only NAME] [--out benchmarks/results/ties.json]
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import command_of, record
from benchmarks.ties import cost as guard_cost
from benchmarks.ties import gradients as tie_gradients
from benchmarks.ties import processes
from benchmarks.ties.cases import COLUMNS, KINDS
from benchmarks.ties.libraries import LIBRARIES
from benchmarks.ties.operations import OPERATIONS
from benchmarks.ties.verdict import judge

OTHERS = {"torch_pruning": "torch-pruning", "peft": "peft", "transformers": "transformers"}
"""Packages of which nothing else in the project knows; what is missing is named and left out."""

NOTES = {
    "ours": "tying.tie_; the optimizer and the clipping get unique_parameters(models)",
    "plain": "a.weight = b.weight; transposed: nn.Parameter(a.weight.t()); inside one parameter: values made equal "
    "once, as PyTorch has no tie there; optimizer and clipping get list(a.parameters()) + list(b.parameters())",
    "plain, each once": "as plain; every parameter object once",
}
VERDICTS = {
    "kept": "the ends are equal bit for bit after training, and the update is the reference's",
    "repaired": "as kept; the guard had to mend it",
    "error": "an error before anything was trained wrongly",
    "silent": "the ends differ or the update is wrong, and nothing was said, or too late",
}


def table(quick: bool, only: str) -> dict[str, Any]:
    """The verdicts by operation, kind and column."""
    rows: dict[str, Any] = {}
    for operation in [*OPERATIONS, *LIBRARIES]:
        if only not in operation.name or (quick and operation.slow):
            continue
        cells = {kind: {column: judge(operation, kind, column).as_json() for column in COLUMNS} for kind in KINDS}
        rows[operation.name] = {"note": operation.note, "listed": operation.listed, "cells": cells}
        _tell(operation.name, rows[operation.name])
    return rows


def _tell(name: str, row: dict[str, Any]) -> None:
    for kind, cells in row["cells"].items():
        said = "   ".join(f"{column}: {cell['verdict']}" for column, cell in cells.items())
        if cells["ours"]["verdict"] != "not applicable":
            print(f"{name:58} {kind:10} {said}  {cells['ours'].get('said', '')[:90]}")


def counts(rows: dict[str, Any]) -> dict[str, dict[str, dict[str, int]]]:
    """How many cells have which verdict: what the issue lists, and what was tried beside it."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for name, listed in (("listed", True), ("beside", False)):
        for column in COLUMNS:
            cells = [cs[column] for row in rows.values() if row["listed"] is listed for cs in row["cells"].values()]
            found.setdefault(name, {})[column] = dict(Counter(map(_counted, cells)))
    return found


def _counted(cell: dict[str, Any]) -> str:
    """An error of tying's names the parameter; PyTorch's own may not."""
    return f"{cell['verdict']}, {cell['by']}'s" if cell["verdict"] == "error" else cell["verdict"]


def gradients(quick: bool) -> dict[str, Any]:
    """The relative difference of a hard tie's gradient from the sum of the untied ones, in one process."""
    ways = {"eager": tie_gradients.eager, "compile, eager": tie_gradients.compile_by("eager")}
    if not quick:
        ways["compile, inductor"] = tie_gradients.compile_by("inductor")
    return tie_gradients.table(ways)


def joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both tables' ways, by case."""
    return {case: {**ways, **other.get(case, {})} for case, ways in one.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without inductor, fewer rounds of timing")
    parser.add_argument("--only", default="", help="operations whose name has this in it, and nothing else")
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--out", default="benchmarks/results/ties.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("torch").setLevel(logging.ERROR)
    rows = table(options.quick, options.only)
    if options.only:
        return
    together = processes.run()
    for name, row in together["rows"].items():
        rows[name] = row
        _tell(name, row)
    cost = guard_cost.measure(options.rounds // 10 if options.quick else options.rounds)
    found = joined(gradients(options.quick), together["gradients"])
    results = {
        "columns": NOTES,
        "verdicts": VERDICTS,
        "packages": {name: version(name) if importlib.util.find_spec(key) else None for key, name in OTHERS.items()},
        "counts": counts(rows),
        "operations": rows,
        "gradients": found,
        "largest_gradient_difference": max(d for ways in found.values() for g in ways.values() for d in g.values()),
        "guard_cost": cost,
    }
    record(Path(options.out), command_of("ties", options), results)
    print(results["counts"])
    print("gradients differ by at most", results["largest_gradient_difference"])
    for name, entry in cost.items():
        keys = ("difference_seconds", "hook_after_forward_seconds", "hook_seconds")
        forward, after, hook = (1e6 * entry[key]["median"] for key in keys)
        print(f"{name}: {forward:.1f} µs at a forward; the hook alone {after:.1f} after a forward, {hook:.1f} in a row")


if __name__ == "__main__":
    main()
