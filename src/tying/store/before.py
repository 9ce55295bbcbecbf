"""Files of tied networks as they were written before ties across parameters: what each tie stored, not the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from tying.groups import Groups
from tying.plan import Tie, qualified
from tying.store.state import State


def weights_of(state: State, ties: Sequence[Tie], record: Mapping[str, Any]) -> State:
    """Return the state with plain weights in the place of what the ties stored."""
    over = _by_parameter(ties)
    tensors, frozen = dict(state.tensors), set(state.frozen)
    for name, each in over.items():
        path, _, leaf = name.rpartition(".")
        stored = _stored(name)
        shape = tuple(record["architecture"][path]["tensors"][leaf])
        weight = _expanded(tensors.pop(stored), sorted(each, key=lambda tie: tie.members[0].groups.kind), shape)
        labels = qualified(path, f"parametrizations.{leaf}.0.stages.")
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(labels)} | {name: weight}
        if stored in frozen:
            frozen = frozen - {stored} | {name}
    aliases = {name: source for name, source in state.aliases.items() if ".0.stages." not in name}
    return replace(state, tensors=tensors, aliases=aliases, frozen=frozenset(frozen))


def bytes_of_each(stored: Mapping[str, Tensor], ties: Sequence[Tie]) -> dict[str, int]:
    """Return the bytes that a file holds for each tied weight, packed labels counted."""
    return {
        name: stored[_stored(name)].nbytes + math.ceil(sum(tie.partition.label_bits for tie in each) / 8)
        for name, each in _by_parameter(ties).items()
    }


def _by_parameter(ties: Sequence[Tie]) -> dict[str, list[Tie]]:
    over: dict[str, list[Tie]] = {}
    for tie in ties:
        over.setdefault(tie.members[0].parameter, []).append(tie)
    return over


def _stored(name: str) -> str:
    path, _, leaf = name.rpartition(".")
    return qualified(path, f"parametrizations.{leaf}.original")


def _expanded(values: Tensor, ties: Sequence[Tie], shape: tuple[int, ...]) -> Tensor:
    """One tie, or those over inputs and outputs, in this order."""
    first, *rest = ties
    for tie in rest:
        smaller = (shape[0], first.partition.classes, *shape[2:])
        values = Groups.inputs().read(tie.partition.expand(values).reshape(smaller))
    return first.members[0].groups.write(first.partition.expand(values), shape)
