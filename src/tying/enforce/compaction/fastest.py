"""The way in which each tied layer computes, chosen by measurement on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tying.enforce.compaction.compare import Inputs, run
from tying.enforce.compaction.refusals import check_model, checked_inputs
from tying.enforce.compaction.surgery import TiedLayer, set_ways_, tied_layers, ways_of
from tying.evaluation import evaluating
from tying.nn.tied import WAYS, Way
from tying.outputs import same_random_numbers

MARGIN = 0.95
"""Another way than summing is taken when it needs less than this share of its time, in the best round and in the
middle one: noise, which is rarely kind to both, changes nothing."""
ENOUGH_SECONDS, ROUNDS = 0.1, (5, 31)
"""How long a call of a layer is measured: as many rounds as fit into the seconds, within these numbers."""


@dataclass(frozen=True)
class Choice:
    """How long a tied layer takes in each way, and the one that was chosen."""

    layer: str
    seconds: Mapping[Way, tuple[float, float]]
    """Of the best round and of the middle one; of a layer called several times in a forward, the sums of its calls."""
    way: Way

    def __str__(self) -> str:
        times = ", ".join(f"{way} {1e3 * best:.3g} ms" for way, (best, _) in self.seconds.items())
        return f"{self.layer}: {self.way} ({times})"


def choose_fastest_(model: nn.Module, example_inputs: Inputs) -> tuple[Choice, ...]:
    """Set the `way` of every tied layer of `tying.nn` to the one that is fastest here, and say what was measured.

    Each layer is timed on the inputs that it gets from the example: batch size, layout in memory, dtype, device and the
    number of threads should be those of later use. The ways compute the same function, rounding aside; other machines
    may choose others, so a result that should repeat bit for bit elsewhere keeps the default, "sum".

    Args:
        model: Written to: the `way` of its tied layers, nothing else. Runs once in evaluation mode, without gradients.
        example_inputs: A tensor, or the tuple of tensors that the model takes; floating-point ones are cast to the
            model's dtype.

    Returns:
        One choice per tied layer that runs, in the order of `named_modules`.

    Raises:
        CompactError: If model or inputs are none that `compact` takes, or don't go together; names the module or the
            argument. Nothing is changed then.

    Example:
        >>> from tying.nn import TiedLinear
        >>> model = nn.Sequential(TiedLinear(list(range(8)) * 64, 16))
        >>> [choice] = choose_fastest_(model, torch.randn(32, 512))
        >>> model[0].way == choice.way
        True
    """
    check_model(model)
    inputs = checked_inputs(example_inputs)
    layers = tied_layers(model)
    ways = ways_of(model)
    taken: dict[str, dict[Way, tuple[float, float]]] = {}
    handles = [layer.register_forward_pre_hook(_timer(taken, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with evaluating(model), same_random_numbers(model):
            run(model, _cast(model, inputs))
    finally:
        for handle in handles:
            handle.remove()
        set_ways_(model, ways)
    choices = tuple(Choice(name, taken[name], _best(taken[name])) for name in layers if name in taken)
    set_ways_(model, {**ways, **{choice.layer: choice.way for choice in choices}})
    return choices


def _cast(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs, floating-point ones in the dtype of the model, if it has one."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if len(dtypes) != 1:
        return inputs
    dtype = dtypes.pop()
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def _timer(taken: dict[str, dict[Way, tuple[float, float]]], name: str) -> Callable[..., None]:
    """A hook that adds to `taken` what the layer of this name takes."""

    def measure(layer: TiedLayer, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        for way, (best, middle) in _seconds(layer, given, named).items():
            before = taken.setdefault(name, {}).get(way, (0.0, 0.0))
            taken[name][way] = (before[0] + best, before[1] + middle)

    return measure


def _best(seconds: Mapping[Way, tuple[float, float]]) -> Way:
    best = min(seconds, key=lambda way: seconds[way])
    clearly = all(one < MARGIN * usual for one, usual in zip(seconds[best], seconds["sum"], strict=True))
    return best if clearly else "sum"


def _seconds(layer: TiedLayer, given: tuple[Any, ...], named: dict[str, Any]) -> dict[Way, tuple[float, float]]:
    """The seconds of a call in each way; the ways take turns, so that a busy machine slows all of them."""
    taken: dict[Way, list[float]] = {way: [] for way in WAYS}
    began = time.perf_counter()
    for turn in range(-1, ROUNDS[1]):
        for way in WAYS:
            layer.way = way
            start = _now(given)
            layer.forward(*given, **named)
            if turn >= 0:
                taken[way].append(_now(given) - start)
        if turn + 1 >= ROUNDS[0] and time.perf_counter() - began > ENOUGH_SECONDS:
            break
    return {way: (min(each), statistics.median(each)) for way, each in taken.items()}


def _now(given: tuple[Any, ...]) -> float:
    if any(isinstance(x, Tensor) and x.is_cuda for x in given):
        torch.cuda.synchronize()
    return time.perf_counter()
