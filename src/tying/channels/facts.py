"""Values on example inputs, with what may vary; and tables, of which a part says nothing about the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tying.channels.graph import Call

TABLES = frozenset({"slice", "select", "narrow", "index", "index_select"})
"""What reads a part of its operand, at numbers that may come from the sizes of the input."""


@dataclass(frozen=True)
class Fact:
    """A value on the example inputs, float64, and for each element whether it may vary with them."""

    value: Tensor
    varies: Tensor
    sized: bool = False
    """Whether it has sizes of the input: what is summed up along them depends on how long they are."""

    @property
    def present(self) -> Tensor:
        """1 where the value may be other than zero, else 0; float64."""
        return ((self.value != 0) | self.varies).double()


def run(call: Call, pick: Callable[[Fact], Tensor], **changed: Any) -> list[Tensor]:
    """Run the operation with a tensor in the place of every fact."""
    result = call.run(lambda item: pick(item) if isinstance(item, Fact) else item, **changed)
    return list(result) if isinstance(result, list | tuple) else [result]


def read_in_part(call: Call, facts: Sequence[Fact]) -> list[Tensor] | None:
    """A part of a table, as of positions: constant where the whole table is, along the axes that are cut.

    Which part it is may depend on the sizes of the input, which the graph has as numbers. None if it is no table: of
    what varies itself, channels are cut.
    """
    table = call["self"]
    if not isinstance(table, Fact) or bool(table.varies.any()) or tuple(table.value.shape) == call.shape:
        return None
    dims = [call["dim"] or 0]
    if call.name == "index":
        dims = [d for d, index in enumerate(call["indices"]) if index is not None]
        if not any(bool(fact.varies.any()) for fact in facts):  # by what is stored: the same at any size
            return None
    differs = torch.zeros_like(table.value, dtype=torch.bool)
    for dim in dims:
        differs |= (table.value != table.value.narrow(dim, 0, 1)).any(dim, keepdim=True)
    return run(call, lambda fact: differs.double() if fact is table else fact.value)
