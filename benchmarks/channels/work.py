"""Pieces of the work, done in several processes and kept as files: a later call goes on where this one was.

A module of its own, because processes can't import a `__main__`.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.channels import oracle, peer
from benchmarks.channels.draws import try_one
from benchmarks.channels.fixtures import ARCHITECTURES, TESTS, Stream
from benchmarks.channels.graphs import try_graph
from benchmarks.data import DataUnavailableError
from benchmarks.training import kept

Task = tuple[str, str, range]
"""What ("streams", "draws", "peer" or "graphs"), of which network, and the seeds."""


@dataclass(frozen=True)
class Answer:
    """What came of a piece: one of the three."""

    found: Any = None
    """What JSON holds."""
    unavailable: str = ""
    failed: str = ""
    seconds: float = 0


def fingerprint() -> str:
    """Return what tells the code that the answers depend on from its earlier versions, whose answers don't count."""
    root, tests = Path(__file__).parents[2], Path(TESTS)
    made_of = [*(root / "src/tying").rglob("*.py"), *Path(__file__).parent.glob("*.py")]
    networks = ("architectures", "attentions", "families", "fuzzer", "fuzzer_steps", "llama", "networks", "streams")
    made_of += [tests / f"{name}.py" for name in networks]
    digest = hashlib.sha256(f"{torch.__version__} {peer.package()}".encode())
    for path in sorted(made_of):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def answered(
    tasks: Sequence[Task], jobs: int, folder: Path, work: Callable[[Task, Path], Answer] | None = None
) -> Iterator[tuple[Task, Answer]]:
    """Go through the tasks in several processes, or in this one if there are to be none.

    A piece whose process dies is tried again, alone; when it dies twice there, it has failed. Close the iterator to
    stop.
    """
    work = work or answer
    if not jobs:
        for task in tasks:
            yield task, work(task, folder)
        return
    left = deque(tasks)
    while left:
        for task in (yield from _in_processes(left, jobs, folder, work)):
            for _ in range(2):  # once is not enough: another piece may have ended the pool before this one began
                if not (yield from _in_processes(deque([task]), 1, folder, work)):
                    break
            else:
                yield task, Answer(failed="its process died, alone too, twice")


def _in_processes(
    left: deque[Task], jobs: int, folder: Path, work: Callable[[Task, Path], Answer]
) -> Generator[tuple[Task, Answer], None, list[Task]]:
    """Take what is left, until it is done or a process dies; return what was under way then."""
    running: dict[Future[Answer], Task] = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin) as pool:
        try:
            while left or running:
                while left and len(running) < jobs:
                    running[pool.submit(work, left[0], folder)] = left[0]
                    left.popleft()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    found = future.result()
                    yield running.pop(future), found
        except BrokenProcessPool:
            return list(running.values())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return []


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, and says nothing
    torch.set_num_threads(1)


def answer(task: Task, folder: Path) -> Answer:
    """Do one piece of work, or return what an earlier call kept of it."""
    what, name, seeds = task

    def make() -> dict[str, Any]:
        begun = time.perf_counter()
        found = done(task)
        return {"found": found, "seconds": time.perf_counter() - begun}

    try:
        return Answer(**kept(folder / f"{what}-{name or 'drawn'}-{seeds.start}-{seeds.stop}.json", make))
    except DataUnavailableError as error:
        return Answer(unavailable=str(error))
    except Exception as error:
        return Answer(failed=f"{type(error).__name__}: {error}"[:400])


def done(task: Task) -> Any:
    """Do one piece of work; returns what JSON can hold."""
    what, name, seeds = task
    if what == "graphs":
        return [try_graph(seed).as_dict() for seed in seeds]
    model, inputs, streams = _made(name)
    architecture = ARCHITECTURES[name]
    if what == "streams":
        return {"count": len(streams), "wrong": oracle.wrong_streams(model, inputs, streams)}
    if what == "peer":
        return sum((peer.try_peer(architecture, model, streams, seed) for seed in seeds), Counter[str]())
    return [try_one(architecture, model, streams, seed)[0].as_dict() for seed in seeds]


@functools.lru_cache(maxsize=1)
def _made(name: str) -> tuple[nn.Module, tuple[Tensor, ...], list[Stream]]:
    model, inputs = ARCHITECTURES[name].make()
    return model, inputs, ARCHITECTURES[name].streams(model)
