"""Weighted means, as attention takes them: of what is the same everywhere they are that, whatever the weights are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tying.channels.facts import Fact
from tying.channels.graph import Call

_KEEPING = frozenset({"clone", "alias", "detach", "contiguous", "to", "_to_copy"})
_RESHAPING = frozenset({"view", "reshape", "_unsafe_view", "expand"})


def attended(call: Call, facts: Sequence[Fact]) -> list[Tensor]:
    """Return where `softmax(q kᵀ) v` may vary: where the values differ along the positions.

    With a mask, which may leave a query nothing to attend to, where they may be other than zero.
    """
    value, query = call["value"], call["query"]
    mask = differing(value) if call["attn_mask"] is None else value.present.amax(-2, keepdim=True)
    if call["enable_gqa"] and value.value.ndim > 2:
        mask = mask.repeat_interleave(query.value.shape[-3] // mask.shape[-3], -3)
    return [mask]


def differing(fact: Fact) -> Tensor:
    """Return 1 where a weighted mean along the last axis but one may vary with its weights, or with the input."""
    value = fact.value
    return (fact.varies | (value != value[..., :1, :])).any(-2, keepdim=True).double()


def are_shares(node: Any) -> bool:
    """Whether the numbers along the last axis of a node's value are shares, which add up to one: a softmax gives them.

    Dropout that is on would scale them.
    """
    while isinstance(node, fx.Node) and node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        name = "" if schema is None else str(schema.name).removeprefix("aten::")
        dims = _shape(node)
        if name in ("softmax", "_softmax"):
            return bool(dims) and node.args[1] in (-1, len(dims) - 1)
        before = _shape(node.args[0]) if node.args else ()
        off = name == "dropout" and node.args[2:3] == (False,)
        if not (off or name in _KEEPING or (name in _RESHAPING and before and dims and before[-1] == dims[-1])):
            return False
        node = node.args[0]
    return False


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(int(n) for n in value.shape) if isinstance(value, torch.Tensor) else ()
