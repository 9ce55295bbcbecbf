"""How marks spread through products: of a value and a weight, of two values, in attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tying.channels.graph import Call
from tying.channels.operations import PRODUCTS
from tying.explain.marks.marks import Known, Marks, Rule, ones, present, run_on_marks, zeros


def linear(call: Call) -> Rule:
    """Every output depends on the inputs whose weights are not zero."""
    value, weight = call["input"], call["weight"]
    if isinstance(value, Known) and isinstance(weight, Tensor) and bool((weight != 0).all()):  # the same, faster
        shape = call.shape
        return Rule(lambda marks: marks[id(value)].sum(-1, keepdim=True).expand(shape))
    return _product(call, [("input", value), ("weight", weight)], bias=None)


def matmul(call: Call) -> Rule:
    """A product of two matrices, or of many, with something added or not."""
    left, right = PRODUCTS.get(call.name, ("self", "mat2") if call.name == "bmm" else ("batch1", "batch2"))
    bias = call["self"] if call.name in ("addmm", "baddbmm") else None
    return _product(call, [(left, call[left]), (right, call[right])], bias=bias)


def _product(call: Call, factors: Sequence[tuple[str, Any]], bias: Any) -> Rule:
    """A bilinear map: the marks of one factor meet what is present in the other."""
    (first, one), (second, two) = factors
    shape = call.shape
    nothing = {} if bias is None else {"self": zeros(*shape), "alpha": 1, "beta": 1}
    if call.name in ("linear",):
        nothing = {"bias": None}

    def spread(marks: Marks) -> Tensor:
        total = zeros(*shape)
        if isinstance(one, Known):
            total = total + run_on_marks(call, {}, **{first: marks[id(one)], second: present(two)}, **nothing)
        if isinstance(two, Known):
            total = total + run_on_marks(call, {}, **{first: present(one), second: marks[id(two)]}, **nothing)
        return total + marks[id(bias)] if isinstance(bias, Known) else total

    return Rule(spread)


def einsum(call: Call) -> Rule:
    """A product of any number of factors: the marks of each meet what is present in the others."""
    tensors: list[Any] = list(call["tensors"])
    shape = call.shape

    def spread(marks: Marks) -> Tensor:
        total = zeros(*shape)
        for i, each in enumerate(tensors):
            if isinstance(each, Known):
                others = [marks[id(each)] if i == j else present(other) for j, other in enumerate(tensors)]
                total = total + torch.einsum(call["equation"], *others)
        return total

    return Rule(spread)


def attention(call: Call) -> Rule:
    """`softmax(q kᵀ) v`: a query sees all keys and values but those that are masked."""
    query, key, value = (call[name] for name in ("query", "key", "value"))
    mask = call["attn_mask"]
    mask = mask.value if isinstance(mask, Known) else mask
    seen = ones(query_length(query), query_length(key))
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
        total = zeros(*shape)
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
