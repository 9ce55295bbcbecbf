"""`python -m benchmarks.channels`: 200 draws of each of eleven networks, 2,000 drawn networks, torch-pruning beside.

About 100 minutes of processor time; goes on where it was after Ctrl-C, as long as the sources are the same. The exit
status is 1 when anything was silently wrong, crashed or failed, or a stream is not as it was written down by hand.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks.channels import peer, summary
from benchmarks.channels.draws import Verdict
from benchmarks.channels.fixtures import ARCHITECTURES
from benchmarks.channels.graphs import Graph
from benchmarks.channels.work import Answer, Task, answered, fingerprint
from benchmarks.data import CACHE
from benchmarks.record import record

OUT = Path(__file__).parents[1] / "results" / "channels.json"
COUNTS = {"draws": 200, "graphs": 2000, "peer": 50}
QUICK = {"draws": 2, "graphs": 20, "peer": 1}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    given = parsed(arguments)
    counts = {what: getattr(given, what) for what in COUNTS}
    tasks = tasks_for(given.only, **{**counts, "peer": counts["peer"] if peer.is_here() else 0})
    answers: list[tuple[Task, Answer]] = []
    begun, stopped = time.perf_counter(), False
    try:
        with closing(answered(tasks, given.jobs, given.runs / fingerprint())) as coming:
            for each in coming:
                answers.append(each)
                progress(tasks, answers, max(given.jobs, 1), time.perf_counter() - begun)
    except KeyboardInterrupt:
        stopped = True
    print(file=sys.stderr)
    results = collected(answers)
    complete = not stopped and not results["failed"]
    whole = complete and is_whole(given.only, counts) and not any(answer.unavailable for _, answer in answers)
    print(summary.table(results))
    place = given.out or (OUT if whole else CACHE / "channels-part.json")
    made = ["python -m benchmarks.channels", *(sys.argv[1:] if arguments is None else arguments)]
    record(place, " ".join(made), {**results, "complete": complete})
    print(f"kept in {place}")
    wrong = summary.problems(results)
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
    return 130 if stopped else int(bool(wrong))


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.channels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=COUNTS["draws"], help="plants per architecture")
    parser.add_argument("--graphs", type=int, default=COUNTS["graphs"], help="drawn networks")
    parser.add_argument("--peer", type=int, default=COUNTS["peer"], help="plants of each that torch-pruning gets, too")
    parser.add_argument("--only", nargs="*", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help=", ".join(f"{n} {what}" for what, n in QUICK.items()))
    parser.add_argument("--out", type=Path, help=f"default: {OUT.name}, or what is in part: .data/channels-part.json")
    parser.add_argument("--runs", type=Path, default=CACHE / "channels-runs", help="finished pieces, to go on from")
    given = parser.parse_args(arguments)
    if given.quick:
        vars(given).update(QUICK)
    return given


def is_whole(names: Iterable[str], counts: Mapping[str, int]) -> bool:
    """Whether it is all that the result in the repository is made of: what is in part does not take its place."""
    return set(names) == set(ARCHITECTURES) and counts == COUNTS and peer.is_here()


def tasks_for(names: Sequence[str], draws: int, graphs: int, peer: int) -> list[Task]:
    """Return the work in pieces of a minute or so, some of every network first: it tells how long the rest takes."""
    by_name: list[list[Task]] = [[("graphs", "", piece) for piece in _pieces(graphs, 50)]]
    for name in names:
        mine: list[Task] = [("streams", name, range(1))]
        mine += [("draws", name, piece) for piece in _pieces(draws, 20)]
        mine += [("peer", name, piece) for piece in _pieces(peer, 5)]
        by_name.append(mine)
    return [task for turn in zip_longest(*by_name) for task in turn if task is not None]


def collected(answers: Iterable[tuple[Task, Answer]]) -> dict[str, Any]:
    """Return the results as they are kept."""
    verdicts: dict[str, list[Verdict]] = {}
    graphs: list[Graph] = []
    tried: dict[str, dict[str, Any]] = {}
    peers: dict[str, Counter[str]] = {}
    missing: dict[str, Any] = {}
    failed: list[dict[str, Any]] = []
    seconds = 0.0
    for (what, name, seeds), answer in answers:
        seconds += answer.seconds
        if answer.failed:
            failed.append({"what": what, "of": name, "seeds": [seeds.start, seeds.stop], "said": answer.failed})
        elif answer.unavailable:
            missing[name] = {"unavailable": answer.unavailable}
        elif what == "graphs":
            graphs += [Graph(**each) for each in answer.found]
        elif what == "streams":
            tried[name] = {"streams": answer.found["count"], "streams_not_as_written_down": answer.found["wrong"]}
        elif what == "peer":
            peers.setdefault(name, Counter()).update(answer.found)
        else:
            verdicts.setdefault(name, []).extend(Verdict(**each) for each in answer.found)
    known = [name for name in ARCHITECTURES if name in verdicts or name in missing or name in tried]
    return {
        "architectures": {
            name: missing.get(name) or {**tried.get(name, {}), **summary.of_draws(_in_order(verdicts.get(name, [])))}
            for name in known
        },
        "graphs": summary.of_graphs(_in_order(graphs)),
        "peer": {
            "package": peer.package(),
            "architectures": {name: dict(peers[name].most_common()) for name in ARCHITECTURES if name in peers},
            "all": dict(sum(peers.values(), Counter[str]()).most_common()),
        },
        "failed": sorted(failed, key=lambda each: (each["what"], each["of"], each["seeds"])),
        "seconds": seconds,
    }


def _in_order(found: list[Any]) -> list[Any]:
    return sorted(found, key=lambda each: each.seed)


def progress(tasks: Sequence[Task], answers: Sequence[tuple[Task, Answer]], jobs: int, seconds: float) -> None:
    """Say how far it is, and how long the rest will take if pieces take as long as those of their kind did."""
    taken: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (what, name, seeds), answer in answers:
        taken[what, name].append(answer.seconds / max(len(seeds), 1))
    per_seed = {kind: sum(each) / len(each) for kind, each in taken.items()}
    usual = sum(per_seed.values()) / len(per_seed)
    done = {task for task, _ in answers}
    left = sum(len(t[2]) * per_seed.get(t[:2], usual) for t in tasks if t not in done) / jobs
    what, name, _ = answers[-1][0]
    line = f"{len(done)}/{len(tasks)}  {seconds / 60:.1f} min, about {left / 60:.0f} more  ({what} {name})"
    print(f"\r{line:<79}", end="", file=sys.stderr, flush=True)


def _pieces(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


if __name__ == "__main__":
    raise SystemExit(main())
