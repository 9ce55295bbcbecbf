"""Marks: non-negative numbers in the place of values, and what an operation does to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from tying.channels.graph import Call


@dataclass(frozen=True, eq=False)
class Known:
    """A value that may vary with the input: what it is on the example, and which elements may vary."""

    value: Tensor
    varies: Tensor

    @property
    def present(self) -> Tensor:
        """1 where it may be something else than zero, as marks."""
        return ((self.value != 0) | self.varies).float()


@dataclass(frozen=True, eq=False)
class Several:
    """What an operation with several outputs gives."""

    parts: tuple[Known, ...]


Marks: TypeAlias = "dict[int, Any]"
"""By the `id` of the `Known` or `Several` that they belong to."""
Spread = Callable[[Marks], Any]
"""From the marks of the operands to those of the output, or of each output."""


@dataclass(frozen=True)
class Rule:
    """What one call does to marks."""

    spread: Spread
    edge: Tensor | None = None
    """Which elements of the output read padding, as marks that broadcast; None: none does."""
    exact: bool = True
    """False where marks spread everywhere because the operation has no rule."""


def zeros(*shape: int) -> Tensor:
    """Return no marks: always float32 on the CPU, whatever the defaults of torch are."""
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


def ones(*shape: int) -> Tensor:
    """Return marks on everything."""
    return torch.ones(shape, dtype=torch.float32, device="cpu")


def each(given: Any, dimensions: int, default: int) -> list[int]:
    """Return one number per dimension of what is one number, one for each, or left out."""
    if given is None or given == []:
        return [default] * dimensions
    listed = [int(n) for n in cast("list[int]", given)] if isinstance(given, list | tuple) else [int(given)]
    return listed * dimensions if len(listed) == 1 else listed


def names(text: str) -> frozenset[str]:
    """Return the names in a text."""
    return frozenset(text.split())


def known_in(nested: Any) -> list[Known]:
    """Return the values that vary in nested arguments, each once, in order."""
    if isinstance(nested, Known):
        return [nested]
    if isinstance(nested, list | tuple):
        found = [value for item in cast("list[Any]", nested) for value in known_in(item)]
        return list({id(value): value for value in found}.values())
    return []


def run_on_marks(call: Call, marks: Marks, **changed: Any) -> Any:
    """Run the operation with marks for what varies, and zeros for every other number that is moved beside it."""
    given = {id(each) for each in changed.values()}

    def swap(item: Any) -> Any:
        if isinstance(item, Known):
            return marks[id(item)]
        if isinstance(item, Tensor) and item.is_floating_point() and id(item) not in given:
            return torch.zeros_like(item, dtype=torch.float32)
        return item

    if "dtype" in call.arguments:
        changed["dtype"] = None
    result = call.run(swap, **changed)
    return list(result) if isinstance(result, list | tuple) else result


def everywhere(call: Call, operands: Sequence[Known]) -> Spread:
    """Let every mark spread to all of the output: right for what nothing is known of, and seldom exact."""
    shapes = [[int(n) for n in out.shape] for out in call.outputs if isinstance(out, Tensor)]

    def spread(marks: Marks) -> Any:
        total = sum((_total(marks[id(each)]) for each in operands), zeros())
        outputs = [total.expand(shape) for shape in shapes]
        return outputs if isinstance(call.node.meta.get("val"), list | tuple) else outputs[0]

    return spread


def _total(marks: Tensor | list[Tensor]) -> Tensor:
    return sum((each.sum() for each in marks), zeros()) if isinstance(marks, list) else marks.sum()


def present(value: Tensor | Known) -> Tensor:
    """Return 1 where a value or a weight may be something else than zero, as marks."""
    return value.present if isinstance(value, Known) else (value != 0).float()
