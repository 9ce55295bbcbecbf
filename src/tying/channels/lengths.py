"""What depends on how many numbers there are: a constant that is added up over positions or samples is none.

The graph has the sizes of the example in it, as numbers. What no parameter sizes may be longer or shorter in the next
call: zeros add up to zero there as well, and a mean or a largest number of a constant is that constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tying.channels.facts import TABLES, Fact, run
from tying.channels.graph import Call

Mask = Callable[[Call, Sequence[Fact]], list[Tensor]]
"""Gives positive numbers where the outputs may vary."""
_SHORTEST = 4
"""Numbers below this are no lengths: a half, a third stand in many a forward."""
_SHIFTING, _SCALING = frozenset({"add", "sub", "rsub"}), frozenset({"mul", "div", "true_divide", "floor_divide"})


def depends(call: Call, facts: Sequence[Fact]) -> bool:
    """Whether an operation's result has sizes that those of the input may decide."""
    cut = call.name in TABLES and isinstance(call["self"], Fact) and tuple(call["self"].value.shape) != call.shape
    return not facts or cut or call.name in ("expand", "repeat") or any(fact.sized for fact in facts)


def varies_at_all(facts: Sequence[Fact]) -> bool:
    """Whether any element of any operand may vary."""
    return any(bool(fact.varies.any()) for fact in facts)


def added_up(call: Call, facts: Sequence[Fact], mask: Mask) -> list[Tensor]:
    """Return where a sum may vary, with how many there are: all over, but where it is one of zeros."""
    if call.name in ("std", "var"):  # zero of what is the same throughout, however long
        spread = [result != 0 for result in run(call, lambda fact: fact.value)]
        return [(found > 0) | each for found, each in zip(mask(call, facts), spread, strict=True)]
    if call.name not in ("sum", "cumsum", "linalg_vector_norm"):
        return [torch.ones(1, dtype=torch.bool)] * len(call.outputs)
    present = [replace(fact, varies=fact.present > 0) for fact in facts]
    one = {name: present[0] if isinstance(given, Fact) else given for name, given in call.arguments.items()}
    return [found > 0 for found in mask(replace(call, arguments=one), present)]


def lengths_of(inputs: Sequence[Any]) -> frozenset[float]:
    """Return the numbers that say how long the inputs are, and their inverses; batches left out."""
    found: set[float] = set()
    for x in inputs:
        if isinstance(x, Tensor):
            sizes = [*x.shape[1:], *(one * other for one, other in zip(x.shape[1:], x.shape[2:], strict=False))]
            found.update(float(n) for n in sizes if n >= _SHORTEST)
    return frozenset(found | {1 / n for n in found})


def scaled_by_length(call: Call, facts: Sequence[Fact], lengths: frozenset[float]) -> Tensor:
    """Return where a number like a length of the input makes a constant depend on it: `h / h.shape[1]`."""
    operand = call["self"]
    numbers = [n for n in (call["other"],) if isinstance(n, int | float) and float(n) in lengths]
    if not numbers or not isinstance(operand, Fact) or not any(fact.sized for fact in facts):
        return torch.zeros(1, dtype=torch.bool)
    if call.name in _SHIFTING:
        return torch.ones(1, dtype=torch.bool)
    return operand.present > 0 if call.name in _SCALING else torch.zeros(1, dtype=torch.bool)


def reaches_over(call: Call) -> bool:
    """Whether a mean over windows counts others than there are: beside the border, or by a number of its own."""
    padding = call["padding"]
    padded = any(padding) if isinstance(padding, list | tuple) else bool(padding)
    return padded or bool(call["divisor_override"])
