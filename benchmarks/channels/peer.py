"""torch-pruning on the same plants: channels that nobody reads, asked for at the layer that makes them."""

from __future__ import annotations

import contextlib
import copy
import importlib
import signal
import warnings
from collections import Counter
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.channels.fixtures import Architecture, Stream
from benchmarks.channels.oracle import SAME, unlike
from benchmarks.channels.plant import Part, draw, planted

SECONDS = 60
"""Of processor time, after which it counts as never returning."""
PARTS = 3
"""How many streams of a draw it is asked about, each in a copy of its own."""


class TooLongError(Exception):
    """Its time is up."""


def is_here() -> bool:
    """Whether torch-pruning can be imported."""
    try:
        importlib.import_module("torch_pruning")
    except ImportError:
        return False
    return True


def try_peer(architecture: Architecture, model: nn.Module, streams: list[Stream], seed: int) -> Counter[str]:
    """Count what comes of the channels of a draw that can be removed exactly: no constants, no plan, only zeros."""
    inputs = architecture.inputs(seed)
    plant = draw(model, streams, seed)
    wanted = planted(model, plant)[1]
    asked = [part for part in plant.parts if part.kind == "unread" and part.stream.free][:PARTS]
    return Counter(_outcome(wanted, inputs, part) for part in asked)


def _outcome(wanted: nn.Module, inputs: tuple[Tensor, ...], part: Part) -> str:
    """One of equal, silently wrong, changes the shape of the output, does not run, raises, refuses, never returns."""
    import torch_pruning

    small = copy.deepcopy(wanted)
    span = part.stream.makers[0]
    try:
        with _limited(), warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            graph = torch_pruning.DependencyGraph().build_dependency(small, example_inputs=inputs)
            layer: Any = small.get_submodule(span.tensor.rpartition(".")[0])
            prune = graph.get_pruner_of_module(layer).prune_out_channels
            group = graph.get_pruning_group(layer, prune, idxs=span.all(part.channels))
            if not graph.check_pruning_group(group):
                return "refuses"
            group.prune()
    except TooLongError:
        return "never returns"
    except Exception:
        return "raises"
    with torch.no_grad():
        expected = wanted(*inputs)
        try:
            got = small(*inputs)
        except Exception:
            return "does not run"
    worst = unlike(expected, got)
    if worst <= SAME:
        return "equal"
    return "changes the shape of the output" if worst == float("inf") else "silently wrong"


@contextlib.contextmanager
def _limited() -> Generator[None, None, None]:
    def ring(*_: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
