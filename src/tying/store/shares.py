"""How many of a file's bytes are each tensor's: what several hold together is divided among them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from tying.store.state import State
from tying.store.unique import Step


def bytes_of_each(state: State, stored: Mapping[str, Tensor], steps: Sequence[Step]) -> dict[str, int]:
    """Return the bytes that a file holds for each tensor of its state, packed labels of ties counted.

    Args:
        state: What the file says, weights whole.
        stored: The file's own tensors.
        steps: The ties that the file stores once.
    """
    sizes = {name: tensor.nbytes for name, tensor in state.tensors.items()}
    members: dict[str, list[str]] = {}
    bits: dict[str, int] = {}
    for step in steps:
        names = [member.parameter for member in step.tie.members]
        members[names[0]] = names  # ties over inputs and outputs of one parameter are of the same member
        bits[names[0]] = bits.get(names[0], 0) + step.tie.partition.label_bits
    for first, names in members.items():
        total = stored[first].nbytes + math.ceil(bits[first] / 8)
        sizes.update(_divided(total, {name: sizes[name] for name in names}))
    inside: dict[str, dict[str, int]] = {}
    for name, view in state.views.items():
        base = state.tensors[view.base]
        inside.setdefault(view.base, {view.base: base.nbytes})[name] = math.prod(view.shape) * base.element_size()
    for base, weights in inside.items():
        sizes.update(_divided(sizes[base], weights))
    return sizes


def _divided(total: int, weights: Mapping[str, int]) -> dict[str, int]:
    """Whole numbers in proportion to the weights, whose sum is the total."""
    whole, before, parts = max(1, sum(weights.values())), 0, dict[str, int]()
    for name, weight in weights.items():
        parts[name] = total * (before + weight) // whole - total * before // whole
        before += weight
    return parts
