"""Measure what a network takes, beside the one it stands for: parameters, bytes, operations, latency, accuracy."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from safetensors.torch import save as encode_plainly
from torch import Tensor, nn

from tying import words
from tying.errors import FileError, PlanError, TyingError
from tying.evaluation import evaluating
from tying.figures import BATCHES, Figures, Latency, Report
from tying.groups import Groups
from tying.plan import Partition, Tie, TiePlan
from tying.store import encode
from tying.store.state import collect
from tying.store.unique import unique_set

Inputs = Tensor | tuple[Tensor, ...]
_LEAST, _ROUNDS, _SECONDS_A_ROUND, _SECONDS = 3, 9, 0.05, 2.0


@dataclass(frozen=True)
class Sharing:
    """The paper's three measures of one weight; None where the divisor is 0."""

    sparsity: float
    """Zeros ÷ all numbers."""
    sharing: float | None
    """Non-zero ÷ unique non-zero numbers."""
    compression: float | None
    """All ÷ unique non-zero numbers, labels not counted; sharing ÷ (1 − sparsity)."""


def measure(
    model: nn.Module,
    *,
    like: nn.Module | None = None,
    example_inputs: Inputs | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    plan: TiePlan | None = None,
    latency: bool = True,
    path: str | Path | None = None,
) -> Report:
    """Measure a network, beside the one it stands for: see `Report` for what each figure means.

    Args:
        model: The network, as `compact` gave it, or tied by `tie_`, or with its ties in its values only (see `plan`).
        like: The network it stands for, usually the dense one.
        example_inputs: A tensor, or the tuple of tensors that the networks take, the batch first; repeated or cut to
            batches of 1 and 256. Without it operations and latency are unknown.
        evaluate: Gives a network's accuracy, in [0, 1]; the network is in evaluation mode when it is called.
        plan: For a network that is tied in its values and stored dense, W = PW bit for bit: which values are one.
            A network whose layers keep the ties needs none.
        latency: Whether to time the networks: in turn, on one thread, about two seconds for each batch size (a network
            that takes longer than 0.1 s: nine passes or more).
        path: The file that `save` wrote of the model, where it is written already.

    Returns:
        The figures. Training modes, the number of threads and torch's random state are as before.

    Raises:
        PlanError: If the plan does not fit the model, or its weights don't obey it.
        FileError: If there is no file at `path`, or the network holds what a file can't.
        TyingError: If the example inputs have no common batch, or `evaluate` gives something else than an accuracy.

    Example:
        >>> from tying.nn import TiedLinear
        >>> dense = nn.Sequential(nn.Linear(6, 2, bias=False))
        >>> report = measure(nn.Sequential(TiedLinear([0, 0, 0, 1, 1, -1], 2, bias=False)), like=dense)
        >>> report.parameters, report.values, report.unique
        (12, 4, 3.0)
    """
    inputs = None if example_inputs is None else _checked(example_inputs)
    networks = [model] if like is None else [model, like]
    figures = [_sizes(model, plan, path), *([_sizes(like, None, None)] if like is not None else [])]
    with _undisturbed(networks):
        if inputs is not None:
            figures = [replace(f, operations=_operations(n, inputs)) for f, n in zip(figures, networks, strict=True)]
        if inputs is not None and latency:
            timed = [_latencies(networks, inputs, batch) for batch in BATCHES]
            figures = [replace(f, latency=each) for f, each in zip(figures, zip(*timed, strict=True), strict=True)]
        if evaluate is not None:
            figures = [replace(f, accuracy=_accuracy(evaluate, n)) for f, n in zip(figures, networks, strict=True)]
    bits = sum(p.numel() * p.element_size() * 8 for p in networks[-1].parameters())
    return Report(figures[0], figures[1] if like is not None else None, bits)


def sharing(weight: Tensor, groups: Groups, labels: ArrayLike | Partition, *, original: int | None = None) -> Sharing:
    """Return the three measures of Zhang et al., *Learning to Share* (ICLR 2018), of one weight.

    Args:
        weight: The dense weight, its groups equal bit for bit wherever their labels are, and zero where they are −1.
        groups: How it is read.
        labels: `(G,)` integers, or the partition.
        original: The numbers in the layer before units were cut out of it, if any were: what was cut counts as zero.

    Raises:
        PlanError: If the labels don't fit the weight, or the weight does not obey them.

    Example:
        >>> weight = torch.tensor([[1.0, 1.0, 0.0, 3.0]])
        >>> sharing(weight, Groups.inputs(), [0, 0, -1, 1])
        Sharing(sparsity=0.25, sharing=1.5, compression=2.0)
    """
    partition = labels if isinstance(labels, Partition) else Partition(labels)
    layer = nn.Module()
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    plan = TiePlan([replace(Tie.of("weight", groups, []), partition=partition)])
    unique = unique_set(layer, collect(layer), plan, strict=True).values
    total = weight.numel() if original is None else original
    if total < weight.numel():
        raise PlanError(
            f"original: expected at least the {weight.numel()} numbers of the weight, got {total}; "
            "pass the numbers in the layer before it was made smaller"
        )
    kept = int(torch.count_nonzero(weight))
    return Sharing(1 - kept / total if total else 0.0, words.ratio(kept, unique), words.ratio(total, unique))


def _sizes(network: nn.Module, plan: TiePlan | None, path: str | Path | None) -> Figures:
    state = collect(network)
    unique = unique_set(network, state, plan, strict=True)
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.tensors.items()}
    if path is not None and not Path(path).is_file():
        raise FileError(
            f"path: expected the file that tying.save wrote of the model, got none at {path}; save it first"
        )
    return Figures(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        values=unique.values,
        bits=unique.bits,
        bytes=len(encode(network, plan=plan)) if path is None else Path(path).stat().st_size,
        plain_bytes=len(encode_plainly(plain)),
    )


@contextlib.contextmanager
def _undisturbed(networks: Sequence[nn.Module]) -> Generator[None]:
    """Evaluation mode; afterwards the modes, the threads and torch's random state are as they were."""
    devices = {p.device.index for network in networks for p in network.parameters() if p.device.type == "cuda"}
    threads = torch.get_num_threads()
    with evaluating(*networks), torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _checked(example_inputs: Inputs) -> tuple[Tensor, ...]:
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    shapes = [tuple(getattr(x, "shape", ())) for x in inputs]
    if len({shape[:1] for shape in shapes}) != 1 or not all(shape and shape[0] for shape in shapes):
        raise TyingError(
            "example_inputs: expected a tensor or a tuple of tensors, with one batch size ≥ 1 in dimension 0, got "
            f"{[(type(x).__name__, shape) for x, shape in zip(inputs, shapes, strict=True)]}; "
            "pass a batch as the network takes it"
        )
    return inputs


def _batch(inputs: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
    return tuple(x[torch.arange(size, device=x.device) % x.shape[0]] for x in inputs)


def _operations(network: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*_batch(inputs, 1))
    return counter.get_total_flops() // 2


def _latencies(networks: Sequence[nn.Module], inputs: tuple[Tensor, ...], batch: int) -> list[Latency]:
    """Time the networks in turn, so that what disturbs the machine disturbs all of them."""
    from torch.utils.benchmark import Timer  # slow to import

    given = {"inputs": _batch(inputs, batch)}
    timers = [Timer("network(*inputs)", globals={"network": n, **given}, num_threads=1) for n in networks]
    rounds: list[list[float]] = [[] for _ in networks]
    with torch.inference_mode():
        once = [timer.timeit(1).mean for timer in timers]
        repeats = [max(1, math.ceil(_SECONDS_A_ROUND / max(seconds, 1e-7))) for seconds in once]
        end = time.perf_counter() + _SECONDS
        while len(rounds[0]) < _LEAST or (len(rounds[0]) < _ROUNDS and time.perf_counter() < end):
            for timer, repeat, taken in zip(timers, repeats, rounds, strict=True):
                taken.append(timer.timeit(repeat).mean)
    return [Latency(batch, *(float(np.percentile(taken, q)) for q in (50, 25, 75))) for taken in rounds]


def _accuracy(evaluate: Callable[[nn.Module], float], network: nn.Module) -> float:
    value: Any = evaluate(network)
    try:
        accuracy = float(value)
    except (TypeError, ValueError):
        accuracy = math.nan
    if not 0 <= accuracy <= 1:
        raise TyingError(
            f"evaluate: expected a function that gives an accuracy in [0, 1], got {value!r}; return the share of hits"
        )
    return accuracy
