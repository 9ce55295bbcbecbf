"""Normalisation: channel by channel, in groups that go as a whole, or of all channels together."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from tying.channels.graph import Call
from tying.channels.tracer import NormLabels, Tracer, first_output, spread


def channelwise_norm(tracer: Tracer, call: Call) -> Any:
    """Every channel by itself: its entries of weight, bias and running statistics go with it."""
    labels = tracer.labels(call["input"], call)
    names = ("weight", "bias", "running_mean", "running_var")
    tracer.attach(labels, 1, [call[name] for name in names], call)
    return first_output(tracer, call, labels)


def group_norm(tracer: Tracer, call: Call) -> Any:
    """The channels of a group are normalised together, and go together."""
    labels = tracer.labels(call["input"], call)
    groups = int(call["num_groups"])
    line = tracer.line(labels, 1, f"{call} works along another axis")
    if groups == 1 or line is None:
        return coupled_norm(tracer, call)
    parts = line.reshape(groups, -1)
    tracer.ledger.unite(parts[:, :1], parts)
    result = spread(parts[:, :1].expand(parts.shape).reshape(-1), 1, labels.ndim).expand(labels.shape)
    tracer.attach(result, 1, [call[name] for name in ("weight", "bias")], call)
    tracer.note_counted(call, parts[:, 0], cut=False)
    return result


def coupled_norm(tracer: Tracer, call: Call) -> Any:
    """All channels together: they stay what they are, but none can go without changing the others.

    Unless it is zero, and the norm is an RMSNorm: its mean of squares is then that of the others times their share.
    """
    labels = tracer.labels(call["input"], call)
    shape = call["normalized_shape"]
    axes = [1] if shape is None else list(range(labels.ndim - len(shape), labels.ndim))
    affine = [call[name] for name in ("weight", "bias") if call[name] is not None]
    reason = f"{call} normalises it together with others"
    if len(axes) == 1:
        tracer.attach(labels, axes[0], affine, call)
    else:
        for weight in affine:
            tracer.block(weight, reason)
    scaled = _rms_norm(tracer, call, labels) if call.name == "rms_norm" and len(axes) == 1 else None
    tracer.ledger.block(labels, reason, unless=scaled)
    return labels


def _rms_norm(tracer: Tracer, call: Call, labels: Tensor) -> int | None:
    args = {**dict(enumerate(call.node.args)), **call.node.kwargs}
    return _note(tracer, call, "input", labels, (call.node, call.node), args.get(2, args.get("weight")), call["eps"])


def mean_square(tracer: Tracer, call: Call, labels: Tensor) -> int | None:
    """Return the number of the norm if a mean is that of an RMSNorm by hand: `weight · (x · rsqrt(mean(x²) + eps))`."""
    dims = [call["dim"]] if isinstance(call["dim"], int) else list(call["dim"] or ())
    if call.name != "mean" or dims not in ([-1], [labels.ndim - 1]) or not call["keepdim"]:
        return None
    x = _squared(call.node.args[0])
    total = _only_user(call.node, "add")
    eps = _other(total, call.node)
    root = _only_user(total, "rsqrt")
    product = _only_user(root, "mul")
    if x is None or total is None or not isinstance(eps, float) or product is None or _other(product, root) is not x:
        return None
    while (moved := _only_user(product, "to", "_to_copy", "type_as")) is not None:
        product = moved
    scaled = _only_user(product, "mul")
    return (
        None if scaled is None else _note(tracer, call, "self", labels, (total, scaled), _other(scaled, product), eps)
    )


def _note(
    tracer: Tracer,
    call: Call,
    operand: str,
    labels: Tensor,
    ends: tuple[fx.Node, fx.Node],
    weight: Any,
    eps: float | None,
) -> int | None:
    """Note an RMSNorm whose scale is a parameter of one dimension; `ends`: where its eps is, and its weight."""
    if not isinstance(weight, fx.Node) or weight.op != "placeholder" or len(weight.meta["val"].shape) != 1:
        return None
    line = tracer.line(labels, labels.ndim - 1, f"{call} works along another axis")
    if line is None or len(line) != weight.meta["val"].shape[0]:
        return None
    tracer.norms.append(NormLabels(call, operand, line, *ends, weight, eps))
    return len(tracer.norms) - 1


def _squared(node: Any) -> fx.Node | None:
    """What a node is the square of."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return None
    name, args = _name(node), node.args
    if (name == "pow" and args[1] == 2) or name == "square" or (name == "mul" and args[0] is args[1]):
        return args[0] if isinstance(args[0], fx.Node) else None
    return None


def _only_user(node: fx.Node | None, *names: str) -> fx.Node | None:
    if node is None or len(node.users) != 1:
        return None
    (user,) = node.users
    return user if _name(user) in names else None


def _other(node: fx.Node | None, one: fx.Node | None) -> Any:
    """The operand beside one of two."""
    if node is None or len(node.args) != 2 or node.kwargs:
        return None
    return node.args[1] if node.args[0] is one else node.args[0]


def _name(node: fx.Node) -> str:
    if node.op != "call_function" or node.target is operator.getitem:
        return ""
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).removeprefix("aten::") if schema is not None else ""
