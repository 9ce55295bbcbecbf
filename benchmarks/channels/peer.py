"""torch-pruning on the same plants: channels that nobody reads, asked for at the layer that makes them.

Whole heads are counted apart, and asked for as its pruners have it: told how many heads there are, with `num_heads`.
"""

from __future__ import annotations

import contextlib
import copy
import signal
import warnings
from collections import Counter
from collections.abc import Generator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
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
    return find_spec("torch_pruning") is not None


def package() -> str:
    """Return its name and version."""
    try:
        return f"torch-pruning {version('torch-pruning')}"
    except PackageNotFoundError:
        return "torch-pruning is not installed"


def try_peer(architecture: Architecture, model: nn.Module, streams: list[Stream], seed: int) -> Counter[str]:
    """Count what comes of the channels of a draw that can be removed exactly: no constants, no plan, only zeros.

    Heads count as "heads: …".
    """
    inputs = architecture.inputs(seed)
    plant = draw(model, streams, seed)
    wanted = planted(model, plant)[1]
    asked = [part for part in plant.parts if part.kind == "unread" and part.stream.free][:PARTS]
    return Counter(("heads: " if part.stream.head else "") + _outcome(wanted, inputs, part) for part in asked)


def _outcome(wanted: nn.Module, inputs: tuple[Tensor, ...], part: Part) -> str:
    """One of equal, silently wrong, changes the shape of the output, does not run, raises, refuses, never returns.

    Of heads also: not offered, where several heads of queries share one of keys and values.
    """
    small = copy.deepcopy(wanted)
    try:
        with _limited(), warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            asked = _without_heads if part.stream.head else _without_channels
            if said := asked(small, inputs, part):
                return said
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


def _without_channels(small: nn.Module, inputs: tuple[Tensor, ...], part: Part) -> str:
    """Remove channels in place; returns why it does not."""
    import torch_pruning

    span = part.stream.makers[0]
    graph = torch_pruning.DependencyGraph().build_dependency(small, example_inputs=inputs)
    layer: Any = small.get_submodule(span.tensor.rpartition(".")[0])
    prune = graph.get_pruner_of_module(layer).prune_out_channels
    group = graph.get_pruning_group(layer, prune, idxs=span.all(part.channels))
    if not graph.check_pruning_group(group):
        return "refuses"
    group.prune()
    return ""


def _without_heads(small: nn.Module, inputs: tuple[Tensor, ...], part: Part) -> str:
    """Remove whole heads in place: those that are to go are of no importance, all others are."""
    import torch_pruning

    size = min(span.width for span in part.stream.makers)
    if any(span.width != size for span in part.stream.makers):
        return "not offered"
    paths = dict.fromkeys(span.tensor.rpartition(".")[0] for span in part.stream.makers)
    layers: list[Any] = [small.get_submodule(path) for path in paths]
    gone = [index for channel in part.channels for index in range(channel * size, (channel + 1) * size)]

    def importance(group: Any) -> Tensor:
        values = torch.ones(len(group[0].idxs))
        if any(each.target.module in layers for each, _ in group):
            values[gone] = 0
        return values

    pruner = torch_pruning.BasePruner(
        small, inputs, importance, pruning_ratio=0.0, num_heads=dict.fromkeys(layers, part.stream.count),
        prune_num_heads=True, prune_head_dims=False,
        pruning_ratio_dict=dict.fromkeys(layers, 0.5),  # at 0 it leaves heads alone as well
        head_pruning_ratio_dict=dict.fromkeys(layers, (len(part.channels) - 0.5) / part.stream.count),  # rounded up
    )  # fmt: skip
    before = layers[0].out_features
    pruner.step()
    for path in paths:  # what its examples leave to whoever calls it
        owner: Any = small.get_submodule(path.rpartition(".")[0])
        for name, value in (
            ("num_attention_heads", pruner.num_heads[layers[0]]),
            ("num_heads", pruner.num_heads[layers[0]]),
            ("all_head_size", layers[0].out_features),
        ):
            if hasattr(owner, name):
                setattr(owner, name, value)
    return "" if layers[0].out_features < before else "refuses"


@contextlib.contextmanager
def _limited() -> Generator[None, None, None]:
    def ring(*_: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, 1)  # again every second: the first may be swallowed
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
