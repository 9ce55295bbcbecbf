"""`python -m benchmarks.channels`: 200 draws of each of eleven networks, 2,000 drawn networks, torch-pruning beside."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.channels import peer, summary
from benchmarks.channels.draws import Verdict
from benchmarks.channels.fixtures import ARCHITECTURES
from benchmarks.channels.graphs import Graph
from benchmarks.channels.work import Task, answered
from benchmarks.data import CACHE
from benchmarks.record import record

OUT = Path(__file__).parents[1] / "results" / "channels.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.channels", description=__doc__)
    parser.add_argument("--draws", type=int, default=200, help="plants per architecture")
    parser.add_argument("--graphs", type=int, default=2000, help="drawn networks")
    parser.add_argument("--peer", type=int, default=50, help="plants per architecture that torch-pruning gets as well")
    parser.add_argument("--only", nargs="*", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="2 plants, 20 drawn networks, 1 plant for torch-pruning")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    if given.quick:
        given.draws, given.graphs, given.peer = 2, 20, 1
    tasks = tasks_for(given.only, given.draws, given.graphs, given.peer if peer.is_here() else 0)
    answers: list[tuple[Task, Any]] = []
    start, whole = time.perf_counter(), True
    try:
        for answer in answered(tasks, given.jobs):
            answers.append(answer)
            progress(tasks, [task for task, _ in answers], time.perf_counter() - start)
    except KeyboardInterrupt:
        whole = False
    print(file=sys.stderr)
    results = {**collected(answers), "complete": whole, "wall_seconds": time.perf_counter() - start}
    print(summary.table(results))
    # what is in part, or of some, does not take the place of the whole
    place = given.out if (whole and not given.quick) or given.out != OUT else CACHE / "channels-part.json"
    record(place, " ".join(["python -m benchmarks.channels", *sys.argv[1:]]), results)
    print(f"kept in {place}")
    raise SystemExit(0 if whole else 130)


def tasks_for(names: Sequence[str], draws: int, graphs: int, peers: int) -> list[Task]:
    """Return the work in pieces of a minute or so."""
    tasks: list[Task] = []
    for name in names:
        tasks.append(("streams", name, range(1)))
        tasks += [("draws", name, piece) for piece in _pieces(draws, 20)]
        tasks += [("peer", name, piece) for piece in _pieces(peers, 5)]
    return [*tasks, *(("graphs", "", piece) for piece in _pieces(graphs, 50))]


def collected(answers: Iterable[tuple[Task, Any]]) -> dict[str, Any]:
    """Return the results as they are kept."""
    verdicts: dict[str, list[Verdict]] = {}
    graphs: list[Graph] = []
    tried: dict[str, dict[str, Any]] = {}
    peers: dict[str, Counter[str]] = {}
    missing: dict[str, Any] = {}
    for (what, name, _), found in answers:
        if isinstance(found, str):
            missing[name] = {"unavailable": found}
        elif what == "graphs":
            graphs += found
        elif what == "streams":
            tried[name] = {"streams": found[0], "streams_not_as_written_down": found[1]}
        elif what == "peer":
            peers.setdefault(name, Counter()).update(found)
        else:
            verdicts.setdefault(name, []).extend(found)
    known = [name for name in ARCHITECTURES if name in verdicts or name in missing]
    return {
        "architectures": {
            name: missing.get(name) or {**tried.get(name, {}), **summary.of_draws(_in_order(verdicts[name]))}
            for name in known
        },
        "graphs": summary.of_graphs(_in_order(graphs)),
        "peer": {
            "package": f"torch-pruning {version('torch-pruning')}" if peers else "torch-pruning is not installed",
            "architectures": {name: dict(counts.most_common()) for name, counts in peers.items()},
            "all": dict(sum(peers.values(), Counter()).most_common()),
        },
    }


def _in_order(found: list[Any]) -> list[Any]:
    return sorted(found, key=lambda each: each.seed)


def progress(tasks: Sequence[Task], done: Sequence[Task], seconds: float) -> None:
    """Say how far it is, and how long the rest will take if pieces take as long as they did."""
    count, whole = (sum(len(seeds) for _, _, seeds in each) for each in (done, tasks))
    left = seconds / max(count, 1) * (whole - count)
    what, name, _ = done[-1]
    line = f"{count}/{whole}  {seconds / 60:.1f} min, about {left / 60:.0f} more  ({what} {name})"
    print(f"\r{line:<79}", end="", file=sys.stderr, flush=True)


def _pieces(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


if __name__ == "__main__":
    main()
