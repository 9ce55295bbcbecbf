"""`einsum` of two operands: two activations, as in attention, or an activation and one parameter."""

from __future__ import annotations

import math
from typing import Any, cast

from torch import Tensor

from tying.channels.attention import multiply
from tying.channels.graph import Call
from tying.channels.labels import Value, Weight
from tying.channels.tracer import Tracer, spread


def einsum(tracer: Tracer, call: Call) -> Any:
    """Follow a contraction written with letters; what has several readings is blocked."""
    operands: list[Value] = list(call["tensors"] or ())
    terms, out = _letters(str(call["equation"]))
    if len(operands) != 2 or len(terms) != 2 or any(len(set(term)) < len(term) for term in (*terms, out)):
        return tracer.deny(call)
    both, either = set(terms[0]) & set(terms[1]), set(terms[0]) ^ set(terms[1])
    if not either <= set(out):  # summed over one operand alone
        return tracer.deny(call)
    weights = [i for i, value in enumerate(operands) if isinstance(value, Weight) and not value.is_buffer]
    if not weights:
        one, two = (tracer.labels(value, call) for value in operands)
        return _activations(tracer, call, (one, two), terms, out)
    if len(weights) == 2:
        return tracer.deny(call)
    at, other = weights[0], 1 - weights[0]
    weight = cast(Weight, operands[at])
    result = _weighted(tracer, call, weight, terms[at], operands[other], terms[other], out, both)
    return tracer.deny(call) if result is None else result


def _letters(equation: str) -> tuple[list[str], str]:
    left, arrow, out = equation.replace(" ", "").partition("->")
    if not arrow or "." in left:
        return [], ""
    return left.split(","), out


def _activations(tracer: Tracer, call: Call, labels: tuple[Tensor, Tensor], terms: list[str], out: str) -> Any:
    """A product with batch axes: the letters that both have and that stay."""
    both = [c for c in terms[0] if c in terms[1]]
    batch, inner = [c for c in out if c in both], [c for c in both if c not in out]
    own = [[c for c in term if c not in both] for term in terms]
    sizes = dict.fromkeys(terms[0] + terms[1], 1)
    for term, each in zip(terms, labels, strict=True):
        sizes.update({c: max(n, sizes[c]) for c, n in zip(term, each.shape, strict=True)})

    def arranged(which: int, *parts: list[str]) -> Tensor:
        letters = [c for part in (batch, *parts) for c in part]
        order = [terms[which].index(c) for c in letters]
        shape = [sizes[c] for c in batch] + [math.prod(sizes[c] for c in part) for part in parts]
        return labels[which].permute(order).expand([sizes[c] for c in letters]).reshape(shape)

    left, right = arranged(0, own[0], inner), arranged(1, inner, own[1])
    result = multiply(tracer, call, left, right, (*left.shape[:-1], right.shape[-1]))
    spelled = [*batch, *own[0], *own[1]]
    return result.reshape([sizes[c] for c in spelled]).permute([spelled.index(c) for c in out])


def _weighted(
    tracer: Tracer, call: Call, weight: Weight, axes: str, other: Value, term: str, out: str, both: set[str]
) -> Tensor | None:
    """A layer: the letter along which channels lie is read, or goes on; the first new letter makes channels."""
    labels = tracer.labels(other, call)
    lying = [c for d, c in enumerate(term) if tracer.ledger.splits(labels, d)]
    if len(lying) > 1 or (lying and lying[0] not in both):
        return None
    lines = {c: weight.along(d) for d, c in enumerate(axes)}
    if any(line is None for line in lines.values()):
        return None
    inner = lying[0] if lying else next((c for c in term if c in both and c not in out), None)
    if inner is None:
        return None
    line = tracer.line(labels, term.index(inner), f"{call} reads it along another axis")
    read = lines[inner]
    if line is None or read is None:
        return None
    tracer.ledger.unite(line, read)
    new = [c for c in out if c not in term]
    makes = inner if inner in out else next(iter(new), None)
    (tracer.ledger.mark_made if makes == inner else tracer.ledger.mark_read)(read)
    for c, held in lines.items():
        if held is not None and c not in (inner, makes):
            tracer.ledger.block(held, f"{call} works along it as well, and it makes no channel")
    made = lines.get(makes or "")
    if made is None or makes is None:
        return tracer.ledger.anonymous(call.shape, f"made by {call}")
    if makes != inner:
        tracer.ledger.mark_made(made)
    return spread(made, out.index(makes), len(out)).expand(call.shape)
