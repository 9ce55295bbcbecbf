"""How marks spread through one operation: which elements of the output depend on which elements of the inputs.

Every rule is a linear map of marks, non-negative numbers in the place of values, whose output is positive exactly where
a marked element has a say; its transpose asks the other way round. What has no rule spreads every mark everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from tying.channels.graph import Call
from tying.channels.operations import (
    CHANNELWISE_NORMS,
    CONVOLUTIONS,
    CUTS,
    ELEMENTWISE,
    IDENTITIES,
    MOVES,
    REDUCTIONS,
    WINDOWS,
)
from tying.explain.marks.marks import Known, Marks, Rule, everywhere, known_in, names, ones, run_on_marks, zeros
from tying.explain.marks.products import attention, einsum, linear, matmul
from tying.explain.marks.sliding import convolution, window

RUN = (
    MOVES
    | CUTS
    | names("expand roll index_select diagonal select_scatter slice_scatter index_add index_copy scatter_add tril triu")
    | names("unfold im2col col2im cumsum mean sum as_strided rot90 broadcast_to narrow_copy")
)
"""Executed on the marks as they are: data movement and sums."""
PADS = names("pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d")


def rule(call: Call) -> Rule:
    """Return what the call does to marks; every argument that varies is a `Known`, every other as it is."""
    if call.name == "embedding":
        return _embedding(call)
    operands = known_in(list(call.arguments.values()))
    given = {id(each) for name in _PLACES for each in known_in([call[name]])}
    if any(id(each) in given for each in operands):  # which elements are moved depends on the input
        return Rule(everywhere(call, operands), exact=False)
    if call.name in TABLE:
        return TABLE[call.name](call)
    if CONVOLUTIONS.fullmatch(call.name):
        return convolution(call)
    if WINDOWS.fullmatch(call.name):
        return window(call)
    if call.pointwise or call.name in ELEMENTWISE or call.name in CHANNELWISE_NORMS:
        return _pointwise(call)
    return Rule(everywhere(call, operands), exact=False)


_PLACES = ("index", "indices", "dim", "offsets")


def _identity(call: Call) -> Rule:
    return Rule(lambda marks: marks[id(known_in(list(call.arguments.values()))[0])])


def _run(call: Call) -> Rule:
    return Rule(lambda marks: run_on_marks(call, marks))


def _getitem(call: Call) -> Rule:
    """One of several outputs: the marks of a list."""
    return Rule(lambda marks: marks[id(call["0"])][call["1"]])


def _pointwise(call: Call) -> Rule:
    """Every operand, element by element; a factor that is zero for good lets nothing through."""
    shape = call.shape
    operands = known_in(list(call.arguments.values()))
    training = call.name in CHANNELWISE_NORMS and (call["training"] or call["use_input_stats"])
    if training:  # statistics of the input itself
        return _within(call, operands[0], [0, *range(2, len(shape))] if call.name == "batch_norm" else _spatial(shape))
    through = ones()
    if call.name == "mul":
        for factor in (call["self"], call["other"]):
            if isinstance(factor, Tensor):
                through = through * (factor != 0).float()
    elif call.name == "masked_fill" and isinstance(call["mask"], Tensor):
        through = (~call["mask"]).float()
    elif call.name == "where" and isinstance(call["condition"], Tensor):
        return _chosen(call, call["condition"])

    def spread(marks: Marks) -> Any:
        total = sum((marks[id(each)] * through for each in operands), zeros())
        total = total.expand(shape)
        return [total] if isinstance(call.node.meta.get("val"), list | tuple) else total

    return Rule(spread)


def _chosen(call: Call, condition: Tensor) -> Rule:
    """`where` with a condition that is known: one of two."""
    parts = [(call["self"], condition.float()), (call["other"], (~condition).float())]
    shape = call.shape

    def spread(marks: Marks) -> Tensor:
        chosen = (marks[id(each)] * here for each, here in parts if isinstance(each, Known))
        return sum(chosen, zeros()).expand(shape)

    return Rule(spread)


def _spatial(shape: Sequence[int]) -> list[int]:
    return list(range(2, len(shape)))


def _within(call: Call, value: Known, dims: Sequence[int]) -> Rule:
    """Every element depends on all that lie along the dimensions with it."""

    def spread(marks: Marks) -> Any:
        total = marks[id(value)].sum(list(dims), keepdim=True).expand(value.value.shape)
        return [total] if isinstance(call.node.meta.get("val"), list | tuple) else total

    return Rule(spread)


def _norm(call: Call) -> Rule:
    value = known_in([call["input"]])
    if len(value) != 1 or len(known_in(list(call.arguments.values()))) != 1:
        return Rule(everywhere(call, known_in(list(call.arguments.values()))), exact=False)
    dims = value[0].value.ndim
    return _within(call, value[0], range(dims - len(call["normalized_shape"]), dims))


def _group_norm(call: Call) -> Rule:
    value, groups = call["input"], int(call["num_groups"])

    def spread(marks: Marks) -> Tensor:
        given = marks[id(value)]
        split = given.reshape(given.shape[0], groups, -1)
        return split.sum(-1, keepdim=True).expand_as(split).reshape(given.shape)

    return Rule(spread)


def _softmax(call: Call) -> Rule:
    """All along the dimension, but what is masked, and has no say.

    Masked is what is minus infinity, or close to the lowest number; and what does not vary and comes out as exactly
    zero, beside the others and beside a zero: a finite number filled in. One that is added varies with what it is added
    to.
    """
    value, dim = call["self"], int(call["dim"])
    given = value.value
    present = given > torch.finfo(given.dtype).min / 4
    counts = (torch.softmax(given, dim) != 0) | (given.exp() != 0)  # a zero that is outweighed here is no mask
    heard = (present & (value.varies | counts)).float()
    changes = present.float() if "log" in call.name else heard  # a logarithm moves along with the others

    def spread(marks: Marks) -> Tensor:
        return (marks[id(value)] * heard).sum(dim, keepdim=True) * changes

    return Rule(spread)


def _reduction(call: Call) -> Rule:
    value, given = call["self"], call["dim"]
    if not isinstance(value, Known):
        return Rule(everywhere(call, known_in(list(call.arguments.values()))), exact=False)
    if isinstance(call["other"], Tensor | Known):  # the larger of two
        return _pointwise(call)
    dims = [given] if isinstance(given, int) else list(given or range(value.value.ndim))
    shapes = [[int(n) for n in out.shape] for out in call.outputs]

    def spread(marks: Marks) -> Any:
        total = marks[id(value)].sum(dims)
        outputs = [total.reshape(shape) for shape in shapes]
        return outputs if isinstance(call.node.meta.get("val"), list | tuple) else outputs[0]

    return Rule(spread)


def _glu(call: Call) -> Rule:
    return Rule(lambda marks: cast(Tensor, sum(marks[id(call["self"])].chunk(2, int(call["dim"])))))


def _pad(call: Call) -> Rule:
    value = call["self"]
    constant = call["mode"] in (None, "constant") and "value" in call.arguments
    inside = {id(value): ones(*value.value.shape)}
    changed: dict[str, Any] = {"value": 0} if constant else {}
    if constant:
        edge = 1 - run_on_marks(call, inside, **changed)
    else:  # what is repeated at the border: all but the middle
        pads = list(call["pad"] if call["pad"] is not None else call["padding"])
        edge = 1 - functional.pad(ones(*value.value.shape), pads)
    return Rule(lambda marks: run_on_marks(call, marks, **changed), edge=edge.clamp(0, 1))


def _embedding(call: Call) -> Rule:
    indices, size = call["indices"], call.shape[-1]
    if not isinstance(indices, Known) or isinstance(call["weight"], Known):
        return Rule(everywhere(call, known_in(list(call.arguments.values()))), exact=False)
    return Rule(lambda marks: marks[id(indices)][..., None].expand(*indices.value.shape, size))


TABLE: dict[str, Callable[[Call], Rule]] = {
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(RUN, _run),
    **dict.fromkeys(IDENTITIES, _identity),
    **dict.fromkeys(PADS, _pad),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax"), _softmax),
    **dict.fromkeys(("matmul", "mm", "bmm", "addmm", "baddbmm"), matmul),
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm),
    "where": _pointwise,
    "masked_fill": _pointwise,
    "prelu": _pointwise,
    "group_norm": _group_norm,
    "glu": _glu,
    "getitem": _getitem,
    "linear": linear,
    "einsum": einsum,
    "copy": lambda call: Rule(lambda marks: marks[id(call["src"])].expand(call.shape)),
    "scaled_dot_product_attention": attention,
}
"""By name of the operation; convolutions, windows and what is pointwise are found by `rule`."""
