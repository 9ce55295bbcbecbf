"""What many draws come to, as numbers to keep and as a table to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.channels.draws import Verdict
from benchmarks.channels.graphs import Graph

EXAMPLES = 5


def of_draws(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return what the draws of one architecture come to."""
    counts = Counter(v.outcome for v in verdicts)
    equal = [v for v in verdicts if v.outcome == "equal"]
    total = {
        name: sum(getattr(v, name) for v in verdicts)
        for name in ("planted", "exact", "removed", "heads_exact", "heads_removed")
    }
    missed: Counter[str] = Counter()
    for v in verdicts:
        missed.update(v.missed)
    all_gone = [v for v in equal if v.removed == v.exact]
    return {
        "draws": len(verdicts),
        "equal": counts["equal"],
        "silently_wrong": counts["differs"],
        "refused": counts["refused"],
        "crashed": counts["crashed"],
        "largest_difference": max((v.difference for v in equal if v.difference is not None), default=None),
        **total,
        "share_removed": _share(total["removed"], total["exact"]),
        "share_of_heads_removed": _share(total["heads_removed"], total["heads_exact"]),
        "missed": dict(missed),
        "beyond": sum(sum(v.beyond.values()) for v in verdicts),
        "all_removed": len(all_gone),
        "as_counted": sum(v.after == v.implied for v in all_gone),
        "compression": _spread([v.before / v.after for v in equal if v.after]),
        "seconds": _spread([v.seconds for v in verdicts]),
        "not_equal": [
            {"seed": v.seed, "outcome": v.outcome, "said": v.said}
            for v in sorted(verdicts, key=lambda v: v.outcome == "refused")
            if v.outcome != "equal"
        ][:EXAMPLES],
        "not_as_counted": [v.seed for v in all_gone if v.after != v.implied][:EXAMPLES],
    }


def of_graphs(graphs: Sequence[Graph]) -> dict[str, Any]:
    """Return what the drawn networks come to."""
    counts = Counter(g.outcome for g in graphs)
    reasons = Counter(reason for g in graphs for reason in g.reasons)
    steps = Counter(step for g in graphs for step in set(g.steps))
    total = {
        name: sum(getattr(g, name) for g in graphs)
        for name in (
            "channels",
            "free",
            "unread",
            "unread_removed",
            "constant",
            "idle",
            "removed",
            "beyond",
            "in_place",
        )
    }
    return {
        "graphs": len(graphs),
        "equal": counts["equal"],
        "silently_wrong": counts["differs"] + counts["felt"],
        "refused": counts["refused"],
        "crashed": counts["crashed"],
        **total,
        "share_removed": _share(total["unread_removed"], total["unread"]),
        "share_removed_of_others": _share(total["unread_removed"], total["unread"] - total["in_place"]),
        "share_removed_with_constants": _share(total["removed"], total["unread"] + total["constant"]),
        "stay_because": dict(reasons.most_common(30)),
        "steps": dict(steps.most_common()),
        "seconds": _spread([g.seconds for g in graphs]),
        "not_equal": [
            {"seed": g.seed, "outcome": g.outcome, "said": g.said, "steps": g.steps}
            for g in sorted(graphs, key=lambda g: g.outcome == "refused")
            if g.outcome != "equal"
        ][: 4 * EXAMPLES],
    }


def problems(results: Mapping[str, Any]) -> list[str]:
    """Name what is wrong, a line each: silent errors, crashes, pieces that failed, streams written down wrongly."""
    lines = [
        f"failed: {each['what']} {each['of']} {each['seeds']}: {each['said']}" for each in results.get("failed", ())
    ]
    found = {**results["architectures"], "drawn networks": results.get("graphs", {})}
    for name, each in found.items():
        if wrong := each.get("streams_not_as_written_down"):
            lines.append(f"{name}: streams not as written down: {', '.join(wrong)}")
        counts = {what: each.get(what, 0) for what in ("silently_wrong", "crashed")}
        lines += [f"{name}: {count} {what.replace('_', ' ')}" for what, count in counts.items() if count]
        if any(counts.values()):
            lines += [
                f"  seed {one['seed']}: {one['outcome']} {one['said']}"
                for one in each["not_equal"]
                if one["outcome"] != "refused"
            ]
    return lines


def table(results: Mapping[str, Any]) -> str:
    """Return a line per architecture, and one for the drawn networks."""
    head = ("", "equal", "wrong", "refused", "crashed", "removed", "heads", "as counted", "smaller", "CPU s")
    rows: list[Sequence[str]] = [head]
    for name, found in results["architectures"].items():
        if "unavailable" in found:
            rows.append((name, found["unavailable"]))
            continue
        counted = f"{found['as_counted']}/{found['all_removed']}"
        smaller = f"{found['compression']['median']:.2f}×" if found["compression"] else "–"
        seconds = f"{found['seconds']['median']:.2f}" if found["seconds"] else "–"
        rows.append(
            (name, *_counts(found, "draws"), _percent(found["share_of_heads_removed"]), counted, smaller,
             seconds)
        )  # fmt: skip
    if (found := results.get("graphs")) and found["graphs"]:
        rows.append(("drawn networks", *_counts(found, "graphs"), "", "", "", f"{found['seconds']['median']:.2f}"))
    widths = [max(len(row[i]) for row in rows if len(row) == len(head)) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in rows]
    for name, counts in results.get("peer", {}).get("architectures", {}).items():
        lines.append(f"torch-pruning, {name}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    return "\n".join(lines)


def _counts(found: Mapping[str, Any], of: str) -> list[str]:
    return [
        f"{found['equal']}/{found[of]}",
        *(str(found[name]) for name in ("silently_wrong", "refused", "crashed")),
        _percent(found["share_removed"]),
    ]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    return {"least": min(values), "median": median(values), "most": max(values)} if values else None
