"""Products of two activations: what attention is made of. A head is one channel, and goes as a whole.

A product sums over one axis and leaves the batch axes as they are. Where the channels of a factor lie along a batch
axis, all that one index of it holds, in both factors and in the product, belongs together: one head. Where one factor
holds no channels at all, it mixes positions, and the channels of the other pass through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tying.channels.graph import Call
from tying.channels.labels import squash, varies
from tying.channels.tracer import Tracer, narrow


def product(tracer: Tracer, call: Call, left: str, right: str) -> Any:
    """`out[…, m, n] = Σ_k left[…, m, k] right[…, k, n]` of two activations."""
    one, two = tracer.labels(call[left], call), tracer.labels(call[right], call)
    if min(one.ndim, two.ndim) < 2:
        return tracer.deny(call)
    return multiply(tracer, call, one, two, call.shape)


def scaled_dot_product_attention(tracer: Tracer, call: Call) -> Any:
    """`softmax(q kᵀ + mask) v`, head by head; with `enable_gqa`, several heads of q share one of k and v."""
    q, k, v = (tracer.labels(call[name], call) for name in ("query", "key", "value"))
    if min(q.ndim, k.ndim, v.ndim) < 2:
        return tracer.deny(call)
    if call["enable_gqa"] and q.ndim > 2 and k.shape[-3] > 1:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    batch = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    scores = multiply(tracer, call, q, k.mT, (*batch, q.shape[-2], k.shape[-2]))
    if call["attn_mask"] is not None:
        mask = tracer.labels(call["attn_mask"], call, like=scores).expand(scores.shape)
        if _crosses(tracer, mask, scores):
            tracer.ledger.unite(mask, scores)
        else:
            tracer.ledger.spread(mask, [scores], f"{call} spreads it over other channels")
    return multiply(tracer, call, scores, v, call.shape)


def multiply(tracer: Tracer, call: Call, left: Tensor, right: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the labels of a product, from those of its factors; blocks what it can't follow."""
    batch = tuple(shape[:-2])
    left = left.expand(*batch, *left.shape[-2:])
    right = right.expand(*batch, *right.shape[-2:])
    for through, other, inner in ((right, left, -2), (left, right, -1)):
        if _is_anonymous(tracer, other) and not _crosses(tracer, other, through):
            passed = None if _is_anonymous(tracer, through) else narrow(tracer, through, [through.ndim + inner])
            if passed is not None:
                tracer.ledger.spread(other, [through], f"{call} spreads it over other channels")
                return passed.expand(tuple(shape))
    heads = _heads(tracer, left, len(batch)) or _heads(tracer, right, len(batch))
    if not heads:
        for labels in (left, right):
            tracer.ledger.lose(labels, f"{call} multiplies it with other channels, and in one head only")
        return tracer.ledger.anonymous(shape, f"made by {call}")
    held: list[Tensor] = []
    for labels, other in ((left, right), (right, left)):
        if _heads(tracer, labels, len(batch)) or _crosses(tracer, labels, other):
            first = labels[..., :1, :1]
            tracer.ledger.unite(labels, first)
            held.append(first)
        else:
            tracer.ledger.spread(labels, [other], f"{call} spreads it over other heads")
    for labels in held[1:]:
        tracer.ledger.unite(held[0], labels)
    tracer.note_counted(call, held[0], cut=True)
    return held[0].expand(tuple(shape))


def _heads(tracer: Tracer, labels: Tensor, batch: int) -> bool:
    """Whether channels lie along a batch axis."""
    return any(tracer.ledger.splits(labels, d) for d in range(batch))


def _crosses(tracer: Tracer, labels: Tensor, other: Tensor) -> bool:
    """Whether the labels vary along a batch axis along which the other's channels lie."""
    return any(varies(labels, d) and tracer.ledger.splits(other, d) for d in range(labels.ndim - 2))


def _is_anonymous(tracer: Tracer, labels: Tensor) -> bool:
    return bool((squash(labels)[0] >= tracer.ledger.named).all())
