"""One draw: plant, compact, hold the result to the planted network and to what the plant implies."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.channels import oracle
from benchmarks.channels.fixtures import Architecture, Stream, tensors_of
from benchmarks.channels.plant import Plant, draw, planted
from tying.enforce.compaction.compact import compact
from tying.errors import TyingError


@dataclass
class Verdict:
    """What came of one draw."""

    seed: int
    outcome: str
    """"equal", "refused" (by name), "differs" (a silent error) or "crashed"."""
    said: str
    difference: float | None
    before: int
    after: int | None
    implied: int
    planted: int
    exact: int
    removed: int
    """Of the planted channels that can be removed exactly, at least so many; those of a refused network are not."""
    heads_exact: int
    heads_removed: int
    beyond: dict[str, int]
    """By stream: how many more channels went than can."""
    missed: dict[str, int]
    """By kind of plant: how many could have gone and stayed."""
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self)


def try_one(
    architecture: Architecture, model: nn.Module, streams: list[Stream], seed: int
) -> tuple[Verdict, Plant, nn.Module]:
    """Plant and compact. Returns the verdict, the plant, and the planted network."""
    inputs = architecture.inputs(seed)
    plant = draw(model, streams, seed)
    given, wanted = planted(model, plant)
    truth = oracle.find(wanted, inputs, plant, streams, trained=architecture.trained)
    implied = oracle.implied(wanted, plant, truth, streams)
    outcome, said, small, worst = "equal", "", None, None
    start = time.process_time()
    try:
        small = compact(given, plant.plan, inputs)
    except TyingError as error:
        outcome, said = "refused", str(error)
    except Exception as error:
        outcome, said = "crashed", f"{type(error).__name__}: {error}"
    seconds = time.process_time() - start
    if small is not None:
        others = (architecture.inputs(seed + 1, 3), architecture.inputs(seed + 2, 1, larger=True))
        worst = max(_difference(wanted, small, other) for other in others)
        outcome = "equal" if worst <= oracle.SAME else "differs"
    verdict = _count(model, small, plant, truth)
    return (
        Verdict(
            seed, outcome, said[:400], worst, before=_parameters(model), implied=implied, seconds=seconds, **verdict
        ),
        plant,
        wanted,
    )


def _difference(wanted: nn.Module, small: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    with torch.no_grad():
        try:
            return oracle.unlike(wanted(*inputs), small(*inputs))
        except Exception:  # a network that does not run is as wrong as can be
            return float("inf")


def _count(model: nn.Module, small: nn.Module | None, plant: Plant, truth: oracle.Truth) -> dict[str, Any]:
    """What went, by stream, read off the shapes."""
    before, after = tensors_of(model), {} if small is None else tensors_of(small)
    total = {"planted": 0, "exact": 0, "removed": 0, "heads_exact": 0, "heads_removed": 0}
    beyond: dict[str, int] = {}
    missed: dict[str, int] = {}
    for part in plant.parts:
        span = part.stream.makers[0]
        gone = 0
        if span.tensor in after:
            gone = (before[span.tensor].shape[span.axis] - after[span.tensor].shape[span.axis]) // span.width
        exact = len(truth.exact.get(part.stream.name, ()))
        # what was dead before may have gone in the place of what was planted: counted as if it had
        removed = max(0, min(exact, gone - len(truth.alone.get(part.stream.name, ()))))
        total["planted"] += len(part.channels)
        total["exact"] += exact
        total["removed"] += removed
        if part.stream.head:
            total["heads_exact"] += exact
            total["heads_removed"] += removed
        if gone > (can := len(truth.gone(part.stream.name))):
            beyond[part.stream.name] = gone - can
        if small is not None and removed < exact:
            kind = (
                f"{part.kind}{' head' if part.stream.head else ''}{' ' + part.stream.norm if part.stream.norm else ''}"
            )
            missed[kind] = missed.get(kind, 0) + exact - removed
    left = None if small is None else _parameters(small)
    return {**total, "beyond": beyond, "missed": missed, "after": left}


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
