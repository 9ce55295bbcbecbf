"""One rule per kind of operation: what it does to labels. What has no rule blocks what it touches: default deny.

Data movement is executed on the labels, so that its index maps are right by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tying.channels.attention import product, scaled_dot_product_attention
from tying.channels.einsum import einsum
from tying.channels.graph import Call
from tying.channels.labels import Value, Weight, squash, unique, varies
from tying.channels.moves import move, shuffle
from tying.channels.norms import channelwise_norm, coupled_norm, group_norm, mean_square
from tying.channels.operations import (
    CHANNELWISE_NORMS,
    CONVOLUTIONS,
    COUPLED,
    COUPLED_NORMS,
    CUTS,
    ELEMENTWISE,
    IDENTITIES,
    MOVES,
    PRODUCTS,
    REDUCTIONS,
    WINDOWS,
    meets_border,
)
from tying.channels.tracer import Read, Tracer, first_output, narrow, spread, values_in

Rule = Callable[[Tracer, Call], Any]


def apply(tracer: Tracer, call: Call) -> Any:
    """Return the labels of the call's outputs, a value or a list of values, and check that none got lost."""
    if call.name.startswith("_assert"):
        return None
    before = len(tracer.ledger.reads)
    try:
        result = rule_for(call)(tracer, call)
    except Exception as error:  # an operation used as no rule expects it: default deny
        result = tracer.deny(call, f"{call} is beyond the rule for it ({type(error).__name__})")
    inside = [v for v in values_in(list(call.arguments.values())) if isinstance(v, Tensor)]
    outside = [v for v in values_in([result]) if isinstance(v, Tensor)]
    known = {id(v) for v in inside}
    for value in outside:
        if id(value) not in known:
            tracer.ledger.require_whole(value, f"{call} leaves it scattered over several axes")
    kept = {id(v) for v in outside}
    lost = [unique(v) for v in inside if id(v) not in kept]
    if lost and call.name != "getitem":
        after = [unique(v) for v in outside] + tracer.ledger.reads[before:]
        tracer.ledger.require_kept(_joined(lost), _joined(after), f"{call} takes it in and does not give it back")
    return result


def rule_for(call: Call) -> Rule:
    """Return the rule of the operation."""
    if isinstance(call["other"], Tensor | Weight) and call.name in ("max", "min"):
        return pointwise
    if call.name in RULES:
        return RULES[call.name]
    if CONVOLUTIONS.fullmatch(call.name):
        return convolution
    if WINDOWS.fullmatch(call.name):
        return window
    if call.pointwise:
        return pointwise
    return Tracer.deny


def identity(tracer: Tracer, call: Call) -> Value:
    """Give back what came in."""
    return next(iter(values_in(list(call.arguments.values()))))


def getitem(tracer: Tracer, call: Call) -> Any:
    """Take one of several outputs."""
    return call["0"][call["1"]]


def expand(tracer: Tracer, call: Call) -> Any:
    """Data movement; but copies of what belongs to no channel must not weld together the channels they meet."""
    value = call["self"]
    if isinstance(value, Tensor) and value.numel() and bool((squash(value)[0] >= tracer.ledger.named).all()):
        return tracer.ledger.anonymous(call.shape, f"{call} spreads it over other channels")
    return move(tracer, call)


def cut(tracer: Tracer, call: Call) -> Any:
    """Execute the operation; channels along the cut axis must keep their positions."""
    value = call["self"]
    result = move(tracer, call)
    layers = [value] if isinstance(value, Tensor) else list(value.axes)
    if not layers:
        return result
    axis = int(call["dim"] or 0) % layers[0].ndim
    if call.name in ("slice", "narrow") and tuple(layers[0].shape) == call.shape:
        return result
    pieces, reason = _pieces(call, axis, layers[0].shape[axis]), f"{call} cuts it at positions written in forward"
    literal = not (call.is_chunk and len(set(pieces)) == 1)
    for labels in layers:
        tracer.ledger.require_fixed(labels, axis, pieces, literal, reason)
    return result


def _pieces(call: Call, axis: int, length: int) -> list[int]:
    """The lengths into which an operation cuts an axis; [] if it does something else."""
    if call.name in ("slice", "narrow"):
        if call.name == "slice":
            start, stop, step = slice(call["start"], call["end"], call["step"]).indices(length)
        else:
            start, step = int(call["start"]) % length, 1
            stop = start + int(call["length"])
        return [n for n in (start, stop - start, length - stop) if n] if step == 1 and start < stop else []
    outputs = [tuple(out.shape) for out in call.outputs]
    return [shape[axis] for shape in outputs] if "split" in call.name or "chunk" in call.name else []


def pointwise(tracer: Tracer, call: Call) -> Any:
    """Unite the operands, element by element; what is broadcast over several channels belongs to none of them."""
    ledger, values = tracer.ledger, values_in(list(call.arguments.values()))
    shape = call.shape
    like = next((v for v in values if isinstance(v, Tensor) and tuple(v.shape) == shape), None)
    operands = [tracer.labels(value, call, like=like) for value in values]
    padded = [labels.reshape([1] * (len(shape) - labels.ndim) + list(labels.shape)) for labels in operands]
    kept: list[Tensor] = []
    for labels, original in zip(padded, operands, strict=True):
        wide = [d for d, n in enumerate(shape) if n > 1 and labels.shape[d] == 1]
        others = [other for other in padded if other is not labels]
        differ = varies if bool((squash(labels)[0] >= ledger.named).all()) else ledger.splits
        over = [other for other in others if any(differ(other, d) for d in wide)]
        if over:
            ledger.spread(labels, over, f"{call} spreads it over other channels")
        else:
            kept.append(original if tuple(original.shape) == shape else labels)
    if not kept:
        return tracer.deny(call)
    result = kept[0] if tuple(kept[0].shape) == shape else kept[0].expand(shape)
    for labels in kept[1:]:
        ledger.unite(result, labels)
    return result


def glu(tracer: Tracer, call: Call) -> Tensor:
    """One half gates the other: a channel has one index in each."""
    labels = tracer.labels(call["self"], call)
    axis = int(call["dim"]) % labels.ndim
    tracer.ledger.require_fixed(labels, axis, [labels.shape[axis] // 2] * 2, False, f"{call} cuts it in two")
    value, gate = labels.chunk(2, axis)
    tracer.ledger.unite(value, gate)
    return value


def prelu(tracer: Tracer, call: Call) -> Value:
    """One slope for all, or one per channel of axis 1."""
    labels, slope = tracer.labels(call["self"], call), call["weight"]
    if not (isinstance(slope, Weight) and slope.axes and slope.axes[0].numel() == 1):
        tracer.attach(labels, 1, [slope], call)
    return labels


def contract(
    tracer: Tracer, call: Call, operand: str, axis: int, weight: Any, dims: tuple[int, int], bias: Any, out: int
) -> Tensor:
    """Sum over `axis` of the operand times dimension `dims[0]` of the weight; `dims[1]` becomes axis `out`."""
    labels = tracer.labels(call[operand], call, axis=axis)
    inner = weight.along(dims[0]) if isinstance(weight, Weight) and not weight.is_buffer else None
    outer = weight.along(dims[1]) if isinstance(weight, Weight) and not weight.is_buffer else None
    if inner is None or outer is None:
        return tracer.deny(call, f"{call} reads it with a weight that is computed, or not read axis by axis")
    line = tracer.line(labels, axis, f"{call} reads it along another axis")
    if line is None:
        return tracer.deny(call, f"{call} reads along another axis than that of the channels")
    tracer.ledger.unite(line, inner)
    tracer.ledger.mark_read(inner)
    tracer.ledger.mark_made(outer)
    kernel = weight.axes[0].shape[2:] if isinstance(weight, Weight) else ()
    padded = bool(CONVOLUTIONS.fullmatch(call.name)) and meets_border(call.name, call["padding"], kernel)
    tracer.readings.append(Read(call, operand, axis, inner, padded))
    result = spread(outer, out, len(call.shape)).expand(call.shape)
    add_bias(tracer, call, result, bias, out)
    return result


def add_bias(tracer: Tracer, call: Call, labels: Tensor, bias: Any, axis: int) -> None:
    """Unite the labels of a result with those of the bias that is added to it along the axis."""
    if isinstance(bias, Weight) and len(bias.axes) == 1 and not bias.is_buffer:
        tracer.attach(labels, axis, [bias], call)
    elif bias is not None:
        added = tracer.labels(bias, call, like=labels)
        tracer.ledger.unite(labels, added if added.ndim != 1 else spread(added, axis, labels.ndim))


def linear(tracer: Tracer, call: Call) -> Any:
    """`out[..., o] = Σ_i input[..., i] weight[o, i] + bias[o]`."""
    last = len(call.shape) - 1
    return contract(tracer, call, "input", last, call["weight"], (1, 0), call["bias"], last)


def matmul(tracer: Tracer, call: Call) -> Any:
    """A contraction if one side is a parameter of two dimensions; else a product of two activations."""
    left, right = PRODUCTS[call.name]
    bias = call["self"] if call.name == "addmm" else None
    last = len(call.shape) - 1
    if _is_matrix(call[right]) and _ndim(call[left]) == last + 1:
        return contract(tracer, call, left, last, call[right], (0, 1), bias, last)
    if _is_matrix(call[left]) and _ndim(call[right]) == last + 1:
        axis = max(last - 1, 0)
        return contract(tracer, call, right, axis, call[left], (1, 0), bias, axis)
    if not any(isinstance(call[side], Weight) and not call[side].is_buffer for side in (left, right)):
        return product(tracer, call, left, right) if call.name != "addmm" else tracer.deny(call)
    return tracer.deny(call)


def convolution(tracer: Tracer, call: Call) -> Any:
    """Contract the channels; with groups, all channels of a group, in and out, go together."""
    axis = len(call.shape) - 1 - int(call.name[-2])
    transposed, groups = "transpose" in call.name, int(call["groups"] or 1)
    if groups == 1:
        dims = (0, 1) if transposed else (1, 0)
        return contract(tracer, call, "input", axis, call["weight"], dims, call["bias"], axis)
    weight = call["weight"]
    rows = weight.along(0) if isinstance(weight, Weight) and not weight.is_buffer else None
    line = tracer.line(tracer.labels(call["input"], call, axis=axis), axis, f"{call} reads it along another axis")
    if rows is None or line is None:
        return tracer.deny(call, f"{call} reads it with a weight that is computed, or along another axis")
    first = line.reshape(groups, -1)[:, :1]
    tracer.ledger.unite(first, line.reshape(groups, -1))
    tracer.ledger.unite(first, rows.reshape(groups, -1))
    tracer.ledger.mark_made(rows)
    made = first.expand(groups, call.shape[axis] // groups).reshape(-1)
    result = spread(made, axis, len(call.shape)).expand(call.shape)
    add_bias(tracer, call, result, call["bias"], axis)
    return result


def coupled(tracer: Tracer, call: Call) -> Any:
    """Block channels that lie along the axis; along any other axis they don't feel it.

    A softmax only scales them by what they have in common; after a cumulative sum each stands in many.
    """
    labels = tracer.labels(call["self"], call)
    if labels.ndim and varies(labels, int(call["dim"]) % labels.ndim):
        keep = tracer.ledger.block if "softmax" in call.name else tracer.ledger.lose
        keep(labels, f"{call} mixes it with others")
    return labels


def window(tracer: Tracer, call: Call) -> Any:
    """Pooling and resampling of the last dimensions: channels stay, if they don't lie along these."""
    value = call["self"] if call["self"] is not None else call["input"]
    dims = int(WINDOWS.sub(r"\1", call.name))
    labels = tracer.labels(value, call)
    narrowed = narrow(tracer, labels, list(range(labels.ndim - dims, labels.ndim)))
    if narrowed is None:
        return tracer.deny(call)
    return first_output(tracer, call, narrowed.expand(call.shape))


def reduction(tracer: Tracer, call: Call) -> Any:
    """Mean, sum, largest … over axes along which no channels lie; over channels, a summary that belongs to nobody."""
    labels = tracer.labels(call["self"], call)
    given = call["dim"]
    dims = [given] if isinstance(given, int) else list(given or range(labels.ndim))
    dims = [d % labels.ndim for d in dims]
    narrowed = narrow(tracer, labels, dims)
    if narrowed is None:
        summaries = [tracer.ledger.anonymous([int(n) for n in out.shape], f"made by {call}") for out in call.outputs]
        norm = mean_square(tracer, call, labels)
        for summary in summaries:
            tracer.ledger.summarise(labels, summary, f"{call} puts it together with others", unless=norm)
        return summaries if isinstance(call.node.meta.get("val"), list | tuple) else summaries[0]
    return first_output(tracer, call, narrowed.reshape(call.shape))


def pad(tracer: Tracer, call: Call) -> Any:
    """Padding of axes along which no channels lie; padded channels belong to nobody."""
    ledger, labels = tracer.ledger, tracer.labels(call["self"], call)
    pads: list[int] = list(call["pad"])
    zeros = call["mode"] in (None, "constant")
    for i in range(0, len(pads), 2):
        dim, before, after = labels.ndim - 1 - i // 2, pads[i], pads[i + 1]
        if not before and not after:
            continue
        if not varies(labels, dim) or not (zeros and min(before, after) >= 0):
            narrowed = narrow(tracer, labels, [dim])
            if narrowed is None:
                return tracer.deny(call)
            labels = narrowed.expand(_resized(labels, dim, labels.shape[dim] + before + after))
        else:
            sides = [ledger.anonymous(_resized(labels, dim, n), f"padded by {call}") for n in (before, after)]
            labels = torch.cat([sides[0], labels, sides[1]], dim)
    return labels


def roll(tracer: Tracer, call: Call) -> Any:
    """Execute the operation; channels along a rolled axis must keep their positions."""
    value = call["self"]
    dims = [call["dims"]] if isinstance(call["dims"], int) else list(call["dims"] or ())
    if not dims or not isinstance(value, Tensor):
        return tracer.deny(call)
    for dim in dims:
        tracer.ledger.require_fixed(value, dim % value.ndim, [], True, f"{call} moves it round to the other end")
    return move(tracer, call)


def embedding(tracer: Tracer, call: Call) -> Any:
    """`out[..., d] = weight[index, d]`, or sums of these: makes channels along axis 1 of the weight."""
    made = call["weight"].along(1) if isinstance(call["weight"], Weight) else None
    vocabulary = call["weight"].along(0) if isinstance(call["weight"], Weight) else None
    if made is None or vocabulary is None:
        return tracer.deny(call)
    tracer.ledger.block(vocabulary, f"{call} looks it up by its index")
    tracer.ledger.mark_made(made)
    scales = call["per_sample_weights"]
    if isinstance(scales, Tensor):
        tracer.ledger.spread(scales, [made], f"{call} spreads it over other channels")
    elif scales is not None:
        tracer.block(scales, f"{call} scales samples by it")
    return first_output(tracer, call, made.expand(call.shape))


RULES: dict[str, Rule] = {
    "getitem": getitem,
    "linear": linear,
    "glu": glu,
    "prelu": prelu,
    "pad": pad,
    "constant_pad_nd": pad,
    "embedding": embedding,
    "embedding_bag": embedding,
    "_embedding_bag": embedding,
    "_embedding_bag_forward_only": embedding,
    "roll": roll,
    "einsum": einsum,
    **dict.fromkeys(PRODUCTS, matmul),
    **dict.fromkeys(IDENTITIES, identity),
    **dict.fromkeys(MOVES, move),
    "expand": expand,
    "channel_shuffle": shuffle,
    "pixel_shuffle": shuffle,
    **dict.fromkeys(CUTS, cut),
    **dict.fromkeys(ELEMENTWISE, pointwise),
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(COUPLED, coupled),
    **dict.fromkeys(CHANNELWISE_NORMS, channelwise_norm),
    **dict.fromkeys(COUPLED_NORMS, coupled_norm),
    "group_norm": group_norm,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}
"""By name of the operation; convolutions, windows and what PyTorch tags as pointwise are found by `rule_for`."""


def _resized(labels: Tensor, dim: int, length: int) -> list[int]:
    return [length if d == dim else n for d, n in enumerate(labels.shape)]


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Weight) and _ndim(value) == 2


def _ndim(value: Value) -> int:
    return value.ndim if isinstance(value, Tensor) else value.axes[0].ndim if value.axes else 0


def _joined(arrays: Sequence[Any]) -> Any:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)
