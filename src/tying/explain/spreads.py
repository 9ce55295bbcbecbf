"""How marks spread through one operation: which elements of the output depend on which elements of the inputs.

Every rule is a linear map of marks, non-negative numbers in the place of values, whose output is positive exactly where
a marked element has a say; its transpose asks the other way round. What has no rule spreads every mark everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

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
    PRODUCTS,
    REDUCTIONS,
    WINDOWS,
)


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


def names(text: str) -> frozenset[str]:
    """Return the names in a text."""
    return frozenset(text.split())


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
        return Rule(_everywhere(call, operands), exact=False)
    if call.name in TABLE:
        return TABLE[call.name](call)
    if CONVOLUTIONS.fullmatch(call.name):
        return _convolution(call)
    if WINDOWS.fullmatch(call.name):
        return _window(call)
    if call.pointwise or call.name in ELEMENTWISE or call.name in CHANNELWISE_NORMS:
        return _pointwise(call)
    return Rule(_everywhere(call, operands), exact=False)


_PLACES = ("index", "indices", "dim", "offsets")


def known_in(nested: Any) -> list[Known]:
    """Return the values that vary in nested arguments, each once, in order."""
    if isinstance(nested, Known):
        return [nested]
    if isinstance(nested, list | tuple):
        found = [value for item in cast("list[Any]", nested) for value in known_in(item)]
        return list({id(value): value for value in found}.values())
    return []


def execute(call: Call, marks: Marks, **changed: Any) -> Any:
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


def _identity(call: Call) -> Rule:
    return Rule(lambda marks: marks[id(known_in(list(call.arguments.values()))[0])])


def _run(call: Call) -> Rule:
    return Rule(lambda marks: execute(call, marks))


def _getitem(call: Call) -> Rule:
    """One of several outputs: the marks of a list."""
    return Rule(lambda marks: marks[id(call["0"])][call["1"]])


def _everywhere(call: Call, operands: Sequence[Known]) -> Spread:
    shapes = [[int(n) for n in out.shape] for out in call.outputs if isinstance(out, Tensor)]

    def spread(marks: Marks) -> Any:
        total = sum((_total(marks[id(each)]) for each in operands), torch.zeros(()))
        outputs = [total.expand(shape) for shape in shapes]
        return outputs if isinstance(call.node.meta.get("val"), list | tuple) else outputs[0]

    return spread


def _total(marks: Tensor | list[Tensor]) -> Tensor:
    return sum((each.sum() for each in marks), torch.zeros(())) if isinstance(marks, list) else marks.sum()


def _pointwise(call: Call) -> Rule:
    """Every operand, element by element; a factor that is zero for good lets nothing through."""
    shape = call.shape
    operands = known_in(list(call.arguments.values()))
    training = call.name in CHANNELWISE_NORMS and (call["training"] or call["use_input_stats"])
    if training:  # statistics of the input itself
        return _within(call, operands[0], [0, *range(2, len(shape))] if call.name == "batch_norm" else _spatial(shape))
    through = torch.ones(())
    if call.name == "mul":
        for factor in (call["self"], call["other"]):
            if isinstance(factor, Tensor):
                through = through * (factor != 0).float()
    elif call.name == "masked_fill" and isinstance(call["mask"], Tensor):
        through = (~call["mask"]).float()
    elif call.name == "where" and isinstance(call["condition"], Tensor):
        return _chosen(call, call["condition"])

    def spread(marks: Marks) -> Any:
        total = sum((marks[id(each)] * through for each in operands), torch.zeros(()))
        total = total.expand(shape)
        return [total] if isinstance(call.node.meta.get("val"), list | tuple) else total

    return Rule(spread)


def _chosen(call: Call, condition: Tensor) -> Rule:
    """`where` with a condition that is known: one of two."""
    parts = [(call["self"], condition.float()), (call["other"], (~condition).float())]
    shape = call.shape

    def spread(marks: Marks) -> Tensor:
        chosen = (marks[id(each)] * here for each, here in parts if isinstance(each, Known))
        return sum(chosen, torch.zeros(())).expand(shape)

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
        return Rule(_everywhere(call, known_in(list(call.arguments.values()))), exact=False)
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
    """All along the dimension, but what is minus infinity: it is masked, and has no say."""
    value, dim = call["self"], int(call["dim"])
    alive = (value.value > torch.finfo(value.value.dtype).min / 4).float()

    def spread(marks: Marks) -> Tensor:
        return (marks[id(value)] * alive).sum(dim, keepdim=True) * alive

    return Rule(spread)


def _reduction(call: Call) -> Rule:
    value, given = call["self"], call["dim"]
    if not isinstance(value, Known):
        return Rule(_everywhere(call, known_in(list(call.arguments.values()))), exact=False)
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
    zeros = call["mode"] in (None, "constant") and "value" in call.arguments
    inside = {id(value): torch.ones(value.value.shape)}
    changed: dict[str, Any] = {"value": 0} if zeros else {}
    if zeros:
        edge = 1 - execute(call, inside, **changed)
    else:  # what is repeated at the border: all but the middle
        pads = list(call["pad"] if call["pad"] is not None else call["padding"])
        edge = 1 - functional.pad(torch.ones(value.value.shape), pads)
    return Rule(lambda marks: execute(call, marks, **changed), edge=edge.clamp(0, 1))


def _embedding(call: Call) -> Rule:
    indices, size = call["indices"], call.shape[-1]
    if not isinstance(indices, Known) or isinstance(call["weight"], Known):
        return Rule(_everywhere(call, known_in(list(call.arguments.values()))), exact=False)
    return Rule(lambda marks: marks[id(indices)][..., None].expand(*indices.value.shape, size))


# ---------------------------------------------------------------- products


def _present(value: Tensor | Known) -> Tensor:
    return value.present if isinstance(value, Known) else (value != 0).float()


def _linear(call: Call) -> Rule:
    value, weight = call["input"], call["weight"]
    if isinstance(value, Known) and isinstance(weight, Tensor) and bool((weight != 0).all()):  # the same, faster
        shape = call.shape
        return Rule(lambda marks: marks[id(value)].sum(-1, keepdim=True).expand(shape))
    return _product(call, [("input", value), ("weight", weight)], bias=None)


def _matmul(call: Call) -> Rule:
    left, right = PRODUCTS.get(call.name, ("self", "mat2") if call.name == "bmm" else ("batch1", "batch2"))
    bias = call["self"] if call.name in ("addmm", "baddbmm") else None
    return _product(call, [(left, call[left]), (right, call[right])], bias=bias)


def _product(call: Call, factors: Sequence[tuple[str, Any]], bias: Any) -> Rule:
    """A bilinear map: the marks of one factor meet what is present in the other."""
    (first, one), (second, two) = factors
    shape = call.shape
    nothing = {} if bias is None else {"self": torch.zeros(shape), "alpha": 1, "beta": 1}
    if call.name in ("linear",):
        nothing = {"bias": None}

    def spread(marks: Marks) -> Tensor:
        total = torch.zeros(shape)
        if isinstance(one, Known):
            total = total + execute(call, {}, **{first: marks[id(one)], second: _present(two)}, **nothing)
        if isinstance(two, Known):
            total = total + execute(call, {}, **{first: _present(one), second: marks[id(two)]}, **nothing)
        return total + marks[id(bias)] if isinstance(bias, Known) else total

    return Rule(spread)


def _einsum(call: Call) -> Rule:
    tensors: list[Any] = list(call["tensors"])
    shape = call.shape

    def spread(marks: Marks) -> Tensor:
        total = torch.zeros(shape)
        for i, each in enumerate(tensors):
            if isinstance(each, Known):
                others = [marks[id(each)] if i == j else _present(other) for j, other in enumerate(tensors)]
                total = total + torch.einsum(call["equation"], *others)
        return total

    return Rule(spread)


def _attention(call: Call) -> Rule:
    """`softmax(q kᵀ) v`: a query sees all keys and values but those that are masked."""
    query, key, value = (call[name] for name in ("query", "key", "value"))
    mask = call["attn_mask"]
    mask = mask.value if isinstance(mask, Known) else mask
    seen = torch.ones(query_length(query), query_length(key))
    if call["is_causal"]:
        seen = seen.tril()
    if isinstance(mask, Tensor):
        seen = seen * (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 4).float()
    shape = call.shape

    def grouped(marks: Tensor) -> Tensor:  # grouped-query attention: one key for several query heads
        heads = shape[-3] if len(shape) > 3 else 1
        return (
            marks
            if len(shape) < 4 or marks.shape[-3] == heads
            else marks.repeat_interleave(heads // marks.shape[-3], -3)
        )

    def spread(marks: Marks) -> Tensor:
        total = torch.zeros(shape)
        if isinstance(query, Known):
            total = total + marks[id(query)].sum(-1, keepdim=True)
        if isinstance(key, Known):
            total = total + seen @ grouped(marks[id(key)].sum(-1, keepdim=True))
        if isinstance(value, Known):
            total = total + seen @ grouped(marks[id(value)])
        return total

    return Rule(spread)


def query_length(value: Tensor | Known) -> int:
    """The length of a sequence of queries or keys, `(…, L, E)`."""
    return (value.value if isinstance(value, Known) else value).shape[-2]


# ---------------------------------------------------------------- windows


def _convolution(call: Call) -> Rule:
    value, weight = call["input"], call["weight"]
    if not isinstance(value, Known) or isinstance(weight, Known):
        return Rule(_everywhere(call, known_in(list(call.arguments.values()))), exact=False)
    dims = int(call.name[-2])
    lines = (slice(None),) * (value.value.ndim - dims - 1)
    present = _present(weight)
    spread = _all_channels(call, value, weight) if bool(present.all()) else _by(call, {"weight": present})
    line = {id(value): torch.ones(value.value.shape)[(*lines, slice(0, 1))]}
    kernel = {"weight": torch.ones_like(present[:1, :1]), "groups": 1, "bias": None}
    counted = execute(call, line, **kernel)
    return Rule(lambda marks: spread(marks), edge=_edge(call, counted, line[id(value)], kernel, dims))


def _by(call: Call, changed: dict[str, Any]) -> Spread:
    return lambda marks: execute(call, marks, bias=None, **changed)


def _all_channels(call: Call, value: Known, weight: Tensor) -> Spread:
    """A kernel without zeros treats all channels of a group alike: sum them, convolve one, and give it to all."""
    groups, axis = int(call["groups"] or 1), value.value.ndim - int(call.name[-2]) - 1
    kernel = torch.ones(groups, 1, *weight.shape[2:])
    shape = call.shape

    def spread(marks: Marks) -> Tensor:
        summed = marks[id(value)].unflatten(axis, (groups, -1)).sum(axis + 1)
        made = execute(call, {id(value): summed}, weight=kernel, bias=None)
        return made.repeat_interleave(shape[axis] // groups, axis)

    return spread


def _edge(call: Call, counted: Tensor, line: Tensor, kernel: dict[str, Any], dims: int) -> Tensor:
    """Where fewer products are summed than would be if the input went on beyond its border."""
    if "transpose" not in call.name:
        full = math.prod(kernel["weight"].shape[2:])
        return (counted < full).float()
    strides, dilations = (_each(call[name], dims, 1) for name in ("stride", "dilation"))
    sizes = kernel["weight"].shape[2:]
    more = [(k - 1) * d // s + 2 for k, d, s in zip(sizes, dilations, strides, strict=True)]
    wide = functional.pad(line, [n for m in reversed(more) for n in (m, m)], value=1)
    result = execute(call, {}, **{**kernel, "input": wide})
    for axis, (m, s) in enumerate(zip(more, strides, strict=True)):
        place = line.ndim - dims + axis
        result = result.narrow(place, m * s, counted.shape[place])
    return (counted < result).float()


def _each(given: Any, dims: int, default: int) -> list[int]:
    if given is None or given == []:
        return [default] * dims
    listed = [int(n) for n in cast("list[int]", given)] if isinstance(given, list | tuple) else [int(given)]
    return listed * dims if len(listed) == 1 else listed


def _window(call: Call) -> Rule:
    value = call["self"] if call["self"] is not None else call["input"]
    dims = int(WINDOWS.sub(r"\1", call.name))
    if not isinstance(value, Known) or "bicubic" in call.name:
        return Rule(_everywhere(call, known_in(list(call.arguments.values()))), exact=False)
    several = isinstance(call.node.meta.get("val"), list | tuple)
    if "adaptive" in call.name:
        pool = (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d)
        size = cast(Any, call.shape[-dims:])

        def adaptive(marks: Marks) -> Any:
            made = pool[dims - 1](marks[id(value)], size)
            return [made, made] if several else made

        return Rule(adaptive)
    if "pool" not in call.name:
        return _run(call)
    sum_windows = _summing(call, dims)

    def pooled(marks: Marks) -> Any:
        made = sum_windows(marks[id(value)], 0.0)
        return [made, made] if several else made

    one = torch.ones(value.value.shape)
    edge = (sum_windows(one, 0.0) < sum_windows(one, 1.0)).float()
    return Rule(pooled, edge=edge)


def _summing(call: Call, dims: int) -> Callable[[Tensor, float], Tensor]:
    """Sum what a window of a pool sees; what lies in its padding counts as given."""
    kernel = _each(call["kernel_size"], dims, 1)
    strides = kernel if call["stride"] in (None, []) else _each(call["stride"], dims, 1)
    padding, dilations = _each(call["padding"], dims, 0), _each(call["dilation"], dims, 1)
    outputs = call.shape[-dims:]
    convolve = cast(Any, (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1])

    def windows(marks: Tensor, outside: float) -> Tensor:
        around: list[int] = []
        for axis in reversed(range(dims)):
            needed = (outputs[axis] - 1) * strides[axis] + (kernel[axis] - 1) * dilations[axis] + 1
            around += [padding[axis], needed - marks.shape[axis - dims] - padding[axis]]
        padded = functional.pad(marks, around, value=outside)
        lines = padded.reshape(-1, 1, *padded.shape[-dims:])
        made = convolve(lines, torch.ones(1, 1, *kernel), stride=strides, dilation=dilations)
        return made.reshape(*marks.shape[:-dims], *outputs)

    return windows


TABLE: dict[str, Callable[[Call], Rule]] = {
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(RUN, _run),
    **dict.fromkeys(IDENTITIES, _identity),
    **dict.fromkeys(PADS, _pad),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax"), _softmax),
    **dict.fromkeys(("matmul", "mm", "bmm", "addmm", "baddbmm"), _matmul),
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm),
    "where": _pointwise,
    "masked_fill": _pointwise,
    "prelu": _pointwise,
    "group_norm": _group_norm,
    "glu": _glu,
    "getitem": _getitem,
    "linear": _linear,
    "einsum": _einsum,
    "copy": lambda call: Rule(lambda marks: marks[id(call["src"])].expand(call.shape)),
    "scaled_dot_product_attention": _attention,
}
"""By name of the operation; convolutions, windows and what is pointwise are found by `rule`."""
