"""Pieces of the work, done in several processes: a module of its own, because those can't import a `__main__`."""

from __future__ import annotations

import functools
import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.channels import oracle, peer
from benchmarks.channels.draws import try_one
from benchmarks.channels.fixtures import ARCHITECTURES, Stream
from benchmarks.channels.graphs import try_graph
from benchmarks.data import DataUnavailableError

Task = tuple[str, str, range]
"""What ("streams", "draws", "peer" or "graphs"), of which network, and the seeds."""


def answered(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, Any]]:
    """Go through the tasks in several processes, or in this one if there are to be none."""
    if not jobs:
        yield from map(answer, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, _begin) as pool:
        yield from pool.imap_unordered(answer, tasks)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def answer(task: Task) -> tuple[Task, Any]:
    """Do one piece of work."""
    what, name, seeds = task
    if what == "graphs":
        return task, [try_graph(seed) for seed in seeds]
    try:
        model, inputs, streams = _made(name)
    except DataUnavailableError as error:
        return task, str(error)
    architecture = ARCHITECTURES[name]
    if what == "streams":
        return task, (len(streams), oracle.wrong_streams(model, inputs, streams))
    if what == "peer":
        return task, sum((peer.try_peer(architecture, model, streams, seed) for seed in seeds), Counter())
    return task, [try_one(architecture, model, streams, seed)[0] for seed in seeds]


@functools.lru_cache(maxsize=1)
def _made(name: str) -> tuple[nn.Module, tuple[Tensor, ...], list[Stream]]:
    model, inputs = ARCHITECTURES[name].make()
    return model, inputs, ARCHITECTURES[name].streams(model)
