"""Ties over several processes: gradients add up, replicas stay equal, checkpoints keep them, groups can be sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from benchmarks.ties import processes
from benchmarks.ties.cases import Column, Kind, Subject
from benchmarks.ties.gradients import CASES, difference
from benchmarks.ties.processes import Spread, gathered, judge_together

from distributed.laws import expect
from tying.enforce.ties.tie import tie_

FEW = ("transposed", "whole, models")
WAYS: dict[str, Spread] = {"DDP": processes.ddp, "FSDP2": processes.fsdp_per_block}


def law_gradient(way: str, folder: Path, verb: Callable[..., None] = tie_, cases: Iterable[str] = CASES) -> None:
    """Every rank moves the weights by the sum, or the mean, of the untied gradients of the whole batch."""
    share = slice(dist.get_rank(), None, dist.get_world_size())
    found = {
        (case, gradient): difference(case, gradient, WAYS[way], folder=folder, share=share, weights=gathered, verb=verb)
        for case in cases
        for gradient in ("sum", "mean")
    }
    wrong = {name: size for name, size in found.items() if not size < 1e-12}
    expect(not wrong, wrong)


def law_kept(spread: Spread, kind: Kind, folder: Path, column: Column = "ours") -> None:
    """After training the ends are equal bit for bit, on all ranks, and the update is that of one process."""
    cell = judge_together(kind, column, spread, folder)
    expect(cell.verdict == "kept" and not cell.said, cell)


def law_refused(spread: Spread, kind: Kind, folder: Path, column: Column = "ours") -> None:
    """What can't be kept is an error before anything is trained."""
    cell = judge_together(kind, column, spread, folder)
    expect(cell.verdict == "error", cell)


def checks(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is to hold on two ranks, by name; a name that begins with "broken" is to fail."""
    for way in WAYS:
        yield f"gradient of ties: {way}", partial(law_gradient, way, folder)
        yield (
            f"broken: gradient of ties, {way}, the other one",
            partial(law_gradient, way, folder, _other_gradient, FEW),
        )
        yield f"broken: gradient of ties, {way}, ends by themselves", partial(law_gradient, way, folder, _not_tied, FEW)
    for name, (spread, kinds, _) in processes.ROWS.items():
        for kind in kinds:
            refused = kind in REFUSED.get(name, ())
            yield f"ties, {name}: {kind}", partial(law_refused if refused else law_kept, spread, kind, folder)
    for name, kind, column in BY_HAND:
        spread = processes.ROWS[name][0]
        yield f"broken: ties by hand, {name}: {kind}", partial(law_kept, spread, kind, folder, column)
    yield "broken: ties, nothing is averaged", partial(law_kept, _each_by_itself, "layers", folder)


REFUSED: dict[str, tuple[Kind, ...]] = {
    "FSDP2 per block, without shard_groups": ("layers", "transposed", "models"),
    "FSDP2, each model a group": ("models",),
}
"""A parameter belongs to one group only."""

BY_HAND: list[tuple[str, Kind, Column]] = [
    ("DDP", "inside", "plain"),
    ("DDP", "models", "plain"),
    ("FSDP2 per block", "layers", "plain, each once"),
    ("FSDP2 per block", "models", "plain, each once"),
    ("FSDP2, each model a group", "models", "plain, each once"),
    ("torch.distributed.checkpoint, FSDP2", "inside", "plain"),
    ("FSDP2 per block, without shard_groups", "layers", "ours"),
    ("FSDP2 per block, without shard_groups", "transposed", "ours"),
]


def _other_gradient(models: Any, plan: Any, *, gradient: str) -> None:
    tie_(models, plan, gradient="mean" if gradient == "sum" else "sum")


def _not_tied(models: Any, plan: Any, *, gradient: str) -> None:
    pass


def _each_by_itself(subject: Subject, folder: Path) -> None:
    """Every rank learns from its own share."""
