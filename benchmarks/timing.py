"""Functions timed in turn, so that a busy machine slows all of them; beside them the operations of a network."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def in_turn(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    before: Callable[[], object] = lambda: None,
    warm_up: int = 2,
) -> dict[str, np.ndarray]:
    """Return the seconds of every call, `(rounds,)` per function; `before` each of them is called, untimed.

    The order changes from round to round: who comes next finds the memory that the last one left.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order = random.Random(0)
    for turn in range(-warm_up, rounds):
        for name in order.sample(list(functions), len(functions)):
            function = functions[name]
            before()
            start = time.perf_counter()
            function()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(taken) for name, taken in seconds.items()}


def spread(values: np.ndarray) -> dict[str, float]:
    """Return the median and the quartiles."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return {"quartile_1": float(low), "median": float(middle), "quartile_3": float(high)}


def versus(mine: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Return the spread of the ratios, call by call."""
    return spread(mine / other)


def flops(model: nn.Module, x: Tensor) -> int:
    """Return the operations of the products, two for a multiply-add; a tied layer's as it sums."""
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()
