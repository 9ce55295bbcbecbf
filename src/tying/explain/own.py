"""Layers with a forward of their own: what they connect, if their graph is one product of what is known to be theirs.

A weight that is scaled or standardised first, padding, an activation: all that leaves the product what its geometry
says. Anything else, a crop, a shortcut, two products, is not counted.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from tying.channels.graph import Call
from tying.channels.operations import CHANNELWISE_NORMS, ELEMENTWISE, IDENTITIES
from tying.channels.operations import CONVOLUTIONS as CONVOLVING
from tying.errors import TyingError
from tying.explain.marks.dependence import Dependence, Mark, Step, find_dependence
from tying.explain.marks.marks import Known, each, run_on_marks
from tying.explain.marks.spreads import PADS


def count_connections(module: nn.Module, inputs: tuple[int, ...]) -> int | None:
    """Return how many pairs of an output and an input that it reads there are, or None if it is not one product.

    Args:
        module: A convolution or a linear layer.
        inputs: The shape of one sample.

    Example:
        >>> class Padded(nn.Conv1d):
        ...     def forward(self, input):
        ...         return super().forward(nn.functional.pad(input, (1, 0))).relu()
        >>> count_connections(Padded(1, 1, 2), (1, 5))
        9
    """
    weight = cast("Tensor", module.weight)
    try:
        sample = torch.zeros(1, *inputs, dtype=weight.dtype, device=weight.device)
        dependence = find_dependence(module, sample)
    except TyingError:
        return None
    return _counted(module, dependence)


def _counted(module: nn.Module, dependence: Dependence) -> int | None:
    source = dependence.varies[dependence.source]
    read: dict[fx.Node, Mark] = {dependence.source: source}
    made: set[fx.Node] = set()
    connections: int | None = None
    for step in dependence.steps:
        call, operands = step.call, step.operands
        if all(node in made for node in operands) and _keeps(step, dependence):
            made.add(step.node)
        elif not all(node in read for node in operands):
            return None
        elif _is_padding(call) or _keeps(step, dependence):
            read[step.node] = step.forward([read[node] for node in operands])
        elif connections is None and _is_product(module, call):
            given, weight = call.arguments["input"], call["weight"]
            ones: dict[str, Any] = {"weight": torch.ones_like(weight, dtype=torch.float64), "bias": None}
            counted = run_on_marks(call, {id(given): cast("Tensor", read[operands[0]]).double()}, **ones)
            connections = round(float(cast("Tensor", counted).sum()))
            made.add(step.node)
        else:
            return None
    ends = [step.node for step in dependence.steps if any(user.op == "output" for user in step.node.users)]
    return connections if len(ends) == 1 and ends[0] in made else None


def _keeps(step: Step, dependence: Dependence) -> bool:
    """Whether every element of the output depends on the elements of the operands in its place, and no other."""
    call = step.call
    if call["training"] or call["use_input_stats"]:
        return False
    known = call.pointwise or call.name in ELEMENTWISE or call.name in IDENTITIES or call.name in CHANNELWISE_NORMS
    made = dependence.varies[step.node]
    marks = [made, *(dependence.varies[node] for node in step.operands)]
    return known and all(isinstance(mark, Tensor) and mark.shape == cast("Tensor", made).shape for mark in marks)


def _is_padding(call: Call) -> bool:
    return call.name in PADS and call["mode"] in (None, "constant") and "value" in call.arguments


def _is_product(module: nn.Module, call: Call) -> bool:
    """Whether an operation is the product that the layer's attributes tell, with a weight of the layer's shape."""
    weight, m = call["weight"], cast("Any", module)
    if not isinstance(call["input"], Known) or not isinstance(weight, Tensor) or weight.shape != m.weight.shape:
        return False
    if isinstance(module, nn.Linear):
        return call.name == "linear"
    found = CONVOLVING.fullmatch(call.name)
    if found is None or found[1] or int(call["groups"] or 1) != m.groups:
        return False
    return all(each(call[name], int(found[2]), 1) == list(getattr(m, name)) for name in ("stride", "dilation"))
