"""What cannot vary with the input, proven, and its exact value as the readers see it.

Every value of the exported graph is computed in float64 on the example inputs, together with a mask: which elements
may vary with the input. Exact zeros are what stops variation, nothing else; an operation without a rule varies as a
whole as soon as anything that goes in varies.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from tying.channels import operations
from tying.channels.averages import are_shares, attended, differing
from tying.channels.facts import TABLES, Fact, read_in_part, run
from tying.channels.find import trace
from tying.channels.graph import Call, Graph, export
from tying.channels.lengths import Mask, added_up, depends, lengths_of, reaches_over, scaled_by_length, varies_at_all

SAME = 1e-12
"""Positions agree when they differ by less than this, relative to the largest: kernels may sum in another order."""


@dataclass(frozen=True)
class Reading:
    """What one input index of a weight sees, over all calls of its layer."""

    value: float
    """The constant, computed in float64: that at all positions, in all samples and calls of the example. At other sizes
    it is the same unless a number of the graph was computed from a size and does not look it, as `(h.shape[1] + 1) / 9`
    in a forward: comparing at other sizes finds that out."""
    padded: bool
    """Whether a zero-padded (or transposed) convolution reads it: then the border differs unless `value` is 0."""


@dataclass(frozen=True)
class Constants:
    """The constants that the weights of a model read."""

    readings: Mapping[tuple[str, int, int], Reading]
    """By (parameter, axis, index), every alias; only what is proven constant."""
    zeros: Mapping[int, tuple[bool, ...]] = field(default_factory=dict[int, tuple[bool, ...]])
    """Of each RMSNorm (its number in `Channels.norms`), which of its channels are proven zero."""

    def foldable(self, parameter: str, axis: int, index: int) -> float | None:
        """Return the constant c that the reader's bias can take over (`bias += weight[:, index].sum(kernel) · c`).

        None where the input may vary, or is a non-zero constant that meets zero padding.
        """
        reading = self.readings.get((parameter, axis, index))
        if reading is None or (reading.padded and reading.value != 0):
            return None
        return reading.value


def find_constants(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...]) -> Constants:
    """Find which inputs of which weights can't vary with the input of the model.

    Args:
        model: As projected: its exact zeros are what stops variation. Analysed in evaluation mode, left as it is.
        example_inputs: As `model(*example_inputs)` takes them.

    Raises:
        CompactError: If `torch.export` can't follow the forward.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with torch.no_grad():
        ...     _ = model[0].weight[1].zero_(), model[0].bias[1].fill_(0.5)
        >>> find_constants(model, torch.zeros(1, 2)).readings
        {('2.weight', 1, 1): Reading(value=0.5, padded=False)}
    """
    return constants_of(export(model, example_inputs), example_inputs)


def constants_of(graph: Graph, example_inputs: Tensor | tuple[Tensor, ...]) -> Constants:
    """Find the constants of an exported model, with the values that its tensors have now.

    `find_constants` in two steps, where the graph serves twice: for `channels_of` too, or before and after weights
    were set to zero.
    """
    tracer = trace(graph)
    reads = {read.call.node: read for read in tracer.readings}
    norms = {norm.call.node: number for number, norm in enumerate(tracer.norms)}
    found: dict[int, Reading | None] = {}
    zeros: dict[int, tuple[bool, ...]] = {}
    with torch.no_grad():
        for call in _computed(graph, tree_leaves(example_inputs)):
            if call.node in norms:
                present = call[tracer.norms[norms[call.node]].operand].present
                zeros[norms[call.node]] = tuple((present.reshape(-1, present.shape[-1]) == 0).all(0).tolist())
            if call.node in reads:
                read = reads[call.node]
                seen = _constants(call[read.operand], read.axis)
                for label, value in zip(read.labels.tolist(), seen, strict=True):
                    reading = None if value is None else Reading(value, read.padded)
                    found[label] = _agreed(found[label], reading) if label in found else reading
    axes = [(start, name, axis) for name, starts in tracer.ledger.starts.items() for axis, start in enumerate(starts)]
    proven = [(label, reading) for label in sorted(found) if (reading := found[label]) is not None]
    named = {
        (alias, axis, label - start): reading
        for label, reading in proven
        for start, name, axis in (axes[bisect_right(axes, label, key=lambda each: each[0]) - 1],)
        for alias in (name, *graph.aliases[name])
    }
    return Constants(named, zeros)


def _facts(nested: Any) -> list[Fact]:
    if isinstance(nested, Fact):
        return [nested]
    if isinstance(nested, list | tuple):
        return [fact for item in cast(list[Any], nested) for fact in _facts(item)]
    return []


def _agreed(one: Reading | None, other: Reading | None) -> Reading | None:
    """Several calls of a layer, or layers with tied weights, must read the same constant."""
    if one is None or other is None or not _same(min(one.value, other.value), max(one.value, other.value)):
        return None
    return Reading(one.value, one.padded or other.padded)


def _same(low: float, high: float) -> bool:
    return high - low <= SAME * max(abs(low), abs(high))


def _constants(fact: Fact, axis: int) -> list[float | None]:
    """Return the constant at each index of the axis, or None."""
    values = fact.value.movedim(axis, 0).flatten(1) if fact.value.ndim > 1 else fact.value[:, None]
    varies = fact.varies.movedim(axis, 0).flatten(1) if fact.varies.ndim > 1 else fact.varies[:, None]
    return [
        low + (high - low) / 2 if not free and math.isfinite(high - low) and _same(low, high) else None
        for low, high, free in zip(
            values.amin(1).tolist(), values.amax(1).tolist(), varies.any(1).tolist(), strict=True
        )
    ]


def _computed(graph: Graph, inputs: Sequence[Any]) -> Iterator[Call]:
    """Run the graph on the inputs, flat, yielding each call with the facts that it is about to use."""
    given, lengths = iter(inputs), lengths_of(inputs)
    facts: dict[Node, Any] = {}
    last = {used: node for node in graph.nodes for used in node.all_input_nodes}
    for node in graph.nodes:
        if node.op == "placeholder":
            source = graph.sources[node.name]
            tensor = next(given, None) if source.kind == "input" else source.tensor
            facts[node] = _fact(tensor, source.kind == "input")
    for call in graph.calls(facts):
        yield call
        facts[call.node] = _apply(call, lengths)
        for used in call.node.all_input_nodes:
            if last[used] is call.node:
                facts[used] = None


def _fact(tensor: Any, varies: bool) -> Any:
    if not isinstance(tensor, Tensor):
        return tensor
    return Fact(_double(tensor.detach().cpu()), torch.full(tensor.shape, varies), varies)


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _apply(call: Call, lengths: frozenset[float]) -> Any:
    if call.name == "getitem":
        return call["0"][call["1"]]
    if not any(isinstance(out, Tensor) for out in call.outputs):
        return None
    given = _facts(list(call.arguments.values()))
    sized = depends(call, given)
    try:
        values = run(call, lambda fact: fact.value)
        masks = [m | scaled_by_length(call, given, lengths) for m in _varying(call)]
        facts = [Fact(_double(v), m.expand(v.shape), sized) for v, m in zip(values, masks, strict=True)]
    except Exception:  # what can't be computed here is not proven constant: default deny
        shapes = [tuple(out.shape) for out in call.outputs]
        facts = [Fact(torch.zeros(shape), torch.ones(shape, dtype=torch.bool), sized) for shape in shapes]
    return facts if isinstance(call.node.meta.get("val"), list | tuple) else facts[0]


def _varying(call: Call) -> list[Tensor]:
    """Return which elements of the outputs may vary; broadcasts to their shapes."""
    facts = _facts(list(call.arguments.values()))
    everything = [torch.ones(1, dtype=torch.bool)] * len(call.outputs)
    if (call.random and _draws(call)) or call.name in operations.COUNTERS:
        return everything
    if call.name in TABLES and (read := read_in_part(call, facts)) is not None:
        return [mask > 0 for mask in read]
    sized = any(fact.sized for fact in facts)
    if call.name in operations.ADDING_UP and sized:
        return added_up(call, facts, MASKS[call.name]) if call.name in MASKS else everything
    if not any(bool(fact.varies.any()) for fact in facts) and (not sized or call.name in operations.FILLERS):
        return [~mask for mask in everything]
    mask = _mask_for(call)
    return everything if mask is None else [m > 0 for m in mask(call, facts)]


def _draws(call: Call) -> bool:
    """Whether an operation that can draw random numbers does so."""
    if call.name == "scaled_dot_product_attention":
        return bool(call["dropout_p"])
    return bool(call.name not in operations.IDENTITIES or call["train"] or call["training"])


def _mask_for(call: Call) -> Mask | None:
    if call.name in MASKS:
        return MASKS[call.name]
    if operations.CONVOLUTIONS.fullmatch(call.name):
        return _convolved
    if operations.WINDOWS.fullmatch(call.name) and "bicubic" not in call.name:  # bicubic weights cancel each other
        return _pooled
    return _elementwise if call.pointwise else None


def _moved(call: Call, facts: Sequence[Fact]) -> list[Tensor]:
    changed = {"value": 0} if call.name in ("pad", "constant_pad_nd") else {}
    return run(call, lambda fact: fact.varies.double(), **changed)


def _padded(call: Call, facts: Sequence[Fact]) -> list[Tensor]:
    """Nobody writes a padding of nothing: how wide it is was computed, and elsewhere a constant meets zeros there."""
    return [facts[0].present] if not any(call["pad"]) and call["mode"] in (None, "constant") else _moved(call, facts)


def _pooled(call: Call, facts: Sequence[Fact]) -> list[Tensor]:
    """Where the largest one stands varies with any of them; a mean that counts padding is another at the border."""
    if "avg" in call.name and reaches_over(call):
        present = facts[0].present.flatten(-int(call.name[-2])).amax(-1)
        return [present.reshape(*present.shape, *[1] * int(call.name[-2]))]
    values = _moved(call, facts)[0]
    return [values, *[torch.ones(1)] * (len(call.outputs) - 1)]


def _elementwise(call: Call, facts: Sequence[Fact]) -> list[Tensor]:
    return [cast(Tensor, sum(fact.varies.double() for fact in facts))]


def _convolved(call: Call, facts: Sequence[Fact]) -> list[Tensor]:
    """A channel varies everywhere if anything it reads varies anywhere: at another size, other taps meet other places.

    For the same reason a constant other than zero that meets padding is none: the border differs. Nor is one that is
    read by a computed kernel, which may be as long as the input.
    """
    value, weight = call["input"], call["weight"]
    if not isinstance(value, Fact) or not isinstance(weight, Fact) or _others_vary(value, facts):
        return [torch.ones(1)]
    dims, groups = int(call.name[-2]), int(call["groups"] or 1)
    taps = ((weight.value != 0) | weight.varies).flatten(2).any(2).double()
    if "transpose" in call.name:  # (in, out / groups) → (out, in / groups)
        taps = taps.reshape(groups, -1, taps.shape[1]).mT.reshape(-1, taps.shape[0] // groups)
    border = weight.sized or operations.meets_border(call.name, call["padding"], weight.value.shape[2:])
    seen = value.present if border else value.varies.double()
    seen = seen.flatten(-dims).amax(-1)
    made = torch.einsum("...gi,goi->...go", seen.unflatten(-1, (groups, -1)), taps.unflatten(0, (groups, -1)))
    return [made.reshape(*made.shape[:-2], -1, *[1] * dims)]


def _product(call: Call, facts: Sequence[Fact]) -> list[Tensor]:
    """A product varies where one factor does and the other is not zero; or, of shares, is not the same throughout."""
    left, right = FACTORS.get(call.name, ("input", "weight"))
    one, two = call[left], call[right]
    if not isinstance(one, Fact) or not isinstance(two, Fact):
        return _elementwise(call, facts)
    if any(bool(fact.varies.any()) for fact in facts if fact is not one and fact is not two):
        return [torch.ones(1)]
    added: dict[str, Any] = {"bias": None} if "bias" in call.arguments else {}
    if call.name == "addmm":
        added = {"self": torch.zeros(1, dtype=torch.float64), "alpha": 1, "beta": 1}
    total = torch.zeros(1, dtype=torch.float64)
    mean = call.name in ("matmul", "mm", "bmm") and two.value.ndim > 1 and are_shares(call.node.args[0])
    there = differing(two).expand(two.value.shape) if mean else two.present
    pairs = ((one.varies.double(), there), (one.present, two.varies.double()))
    if call.name != "mul" and one.sized and two.sized and not mean:  # over an axis that no parameter sizes, maybe
        pairs = ((one.present, two.present),)
    for first, second in pairs:
        if bool((first != 0).any()) and bool((second != 0).any()):
            total = total + call.run(lambda item: item, **added, **{left: first, right: second})
    return [total]


def _scaled(call: Call, facts: Sequence[Fact]) -> list[Tensor]:
    """Normalisation channel by channel: a channel whose weight is zero is its bias."""
    value, weight = call["input"], call["weight"]
    if _others_vary(value, facts):
        return [torch.ones(1)] * len(call.outputs)
    mask = value.varies.double()
    if call["training"]:  # no running statistics: all of a channel varies with any of it
        mask = mask.amax([d for d in range(mask.ndim) if d != 1], keepdim=True)
    if isinstance(weight, Fact):
        mask = mask * weight.present.reshape([-1 if d == 1 else 1 for d in range(mask.ndim)])
    return [mask, *[torch.ones(1)] * (len(call.outputs) - 1)]


def _affine(call: Call, facts: Sequence[Fact]) -> list[Tensor]:
    """Normalisation of several channels together: where the weight is zero, they are their bias."""
    value, weight = call["input"], call["weight"]
    mask = torch.full((1,), float(varies_at_all(facts)), dtype=torch.float64)
    if isinstance(weight, Fact) and not _others_vary(value, facts):
        axis = 1 if "layer_norm" not in call.name else value.value.ndim - weight.value.ndim
        mask = mask * weight.present.reshape(*weight.value.shape, *[1] * (value.value.ndim - axis - weight.value.ndim))
    return [mask, *[torch.ones(1)] * (len(call.outputs) - 1)]


def _sloped(call: Call, facts: Sequence[Fact]) -> list[Tensor]:
    value = call["self"]
    return [torch.ones(1) if _others_vary(value, facts) else value.varies]


def _normed(call: Call, facts: Sequence[Fact]) -> list[Tensor]:
    """An RMSNorm only scales: what is zero stays so, and a weight of zero makes zero."""
    value, weight = call["input"], call["weight"]
    if _others_vary(value, facts):
        return [torch.ones(1)]
    if not bool(value.varies.any()):
        return [torch.zeros(1)]
    return [value.present * (weight.present if isinstance(weight, Fact) else 1)]


def _others_vary(value: Fact, facts: Sequence[Fact]) -> bool:
    return any(bool(fact.varies.any()) for fact in facts if fact is not value)


def _reduced(call: Call, facts: Sequence[Fact]) -> list[Tensor]:
    mask, dim = call["self"].varies.double(), call["dim"]
    dims = [dim] if isinstance(dim, int) else list(dim or range(mask.ndim))
    return [mask.amax(dims).reshape(call.shape), *[torch.ones(1)] * (len(call.outputs) - 1)]  # then: where it stands


def _coupled(call: Call, facts: Sequence[Fact]) -> list[Tensor]:
    mask = call["self"].varies
    return [mask.any(call["dim"], keepdim=True) if mask.ndim else mask]


def _gated(call: Call, facts: Sequence[Fact]) -> list[Tensor]:
    value, gate = call["self"].varies.chunk(2, call["dim"])
    return [value | gate]


def _looked_up(call: Call, facts: Sequence[Fact]) -> list[Tensor]:
    """A column of an embedding that is the same for every index is constant."""
    weight, indices = call["weight"], call["indices"]
    constant = (weight.value == weight.value[:1]).all(0) & ~weight.varies.any(0)
    return [indices.varies[..., None] & ~constant]


FACTORS = {**operations.PRODUCTS, "mul": ("self", "other")}
"""The names of the two factors, where they are not `input` and `weight`."""
MASKS: dict[str, Mask] = {
    "linear": _product,
    "embedding": _looked_up,
    "glu": _gated,
    "pad": _padded,
    "constant_pad_nd": _padded,
    "expand": _moved,
    "prelu": _sloped,
    "rms_norm": _normed,
    "scaled_dot_product_attention": attended,
    **dict.fromkeys(operations.BATCH_NORMS, _scaled),
    **dict.fromkeys(operations.AFFINE_NORMS, _affine),
    **dict.fromkeys(FACTORS, _product),
    **dict.fromkeys(operations.IDENTITIES | operations.MOVES | operations.CUTS, _moved),
    **dict.fromkeys(operations.ELEMENTWISE, _elementwise),
    **dict.fromkeys(operations.REDUCTIONS, _reduced),
    **dict.fromkeys(operations.COUPLED, _coupled),
}
"""By name of the operation; each gives positive numbers where the outputs may vary."""
