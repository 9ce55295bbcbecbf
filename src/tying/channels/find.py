"""A model read as channels: what disappears with each, who reads it, and why one can't go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.fx import Node

from tying.channels.graph import Graph, Source, export, modules_of
from tying.channels.labels import Ledger, Weight, unique
from tying.channels.memory import overlapping
from tying.channels.rules import apply
from tying.channels.tracer import Tracer, values_in


@dataclass(frozen=True, slots=True)
class Slice:
    """Some indices of one axis of a parameter or of a BatchNorm statistic.

    Example:
        >>> print(Slice("conv.weight", 0, (3,)))
        conv.weight[axis 0: 3]
    """

    parameter: str
    """The first name under which the tensor stands in `model.state_dict()`."""
    axis: int
    indices: tuple[int, ...]
    """Ascending. The readers of a flattened convolution channel are its H·W inputs of the linear layer, in the
    order of the positions."""
    aliases: tuple[str, ...] = ()
    """The other names of the very same tensor, for ties and for modules with two names."""

    def __str__(self) -> str:
        return f"{self.parameter}[axis {self.axis}: {', '.join(map(str, self.indices))}]"


@dataclass(frozen=True)
class Channel:
    """A unit's output with all its readers: it can go, or be regularised, only as one.

    Guaranteed when `blocked` is None: with the slices of `readers` set to zero, the outputs of the model do not
    depend on the slices of `makers`; and the model without `slices` (every tensor cut, sizes adapted) computes
    the same. A literal size in `forward` (`view(-1, 256)`) is beyond what the graph can tell: compare afterwards.

    A blocked channel can't be cut, but its readers are still all of its readers, unless it was `lost`. What else may
    feel it are the channels that it is normalised with, by their common mean and scale, and the model's outputs.
    """

    makers: tuple[Slice, ...]
    """What makes it: output slices of the producers' weights and biases, BatchNorm entries, scales. Several
    producers where they are added up. Empty for an input of the model."""
    readers: tuple[Slice, ...]
    """Input slices of the weights that read it (axis 1 of `nn.Linear.weight` and `nn.ConvNd.weight`, axis 0 of
    `nn.ConvTransposeNd.weight`). Empty: nobody reads it."""
    blocked: str | None
    """Why it can't be removed, in words that name the operation and the module, or None."""
    lost: str | None = None
    """Why more than `readers` may depend on it, or None: an operation without a rule takes it, say. Then it is blocked,
    too."""
    norms: tuple[int, ...] = ()
    """The RMSNorms (numbers in `Channels.norms`) that block it, if nothing else does: where it is zero, it can go."""
    output: bool = False
    """Whether its numbers are an output of the model: then it has a place there that others rely on, whatever else
    blocks it."""
    only_read: bool = False
    """Whether nothing but what `readers` reads of it is felt, blocked or not: where they are zero, whatever makes it
    may change. It may have a place that can't go, as beside an input of the model that it is added to."""

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """All that disappears with the channel: `makers` and `readers`, each (parameter, axis) once."""
        merged: dict[tuple[str, int], Slice] = {}
        for part in (*self.makers, *self.readers):
            known = merged.get((part.parameter, part.axis))
            if known is not None:
                indices = tuple(sorted({*known.indices, *part.indices}))
                part = Slice(part.parameter, part.axis, indices, part.aliases)
            merged[part.parameter, part.axis] = part
        return tuple(merged.values())


@dataclass(frozen=True)
class Counted:
    """What the forward of a module counts, heads or groups: when some go, its sizes may have to change."""

    modules: tuple[str, ...]
    """The modules in whose forward the operation stands, from the inside out; "" is the model."""
    channels: tuple[Channel | None, ...]
    """Of each head or group, in order. Several heads of queries may share one. None: no channel that could go."""


@dataclass(frozen=True)
class Norm:
    """An RMSNorm over `d` channels, of which those that are zero can go: `d′` are left.

    Its weight is then multiplied by √(d/d′) and its eps by d/d′: the mean of squares is d′/d of that of the others.
    """

    modules: tuple[str, ...]
    """The modules in whose forward it stands, from the inside out."""
    weight: str
    eps: float | None
    """None: that of the dtype."""
    alone: bool
    """Whether nothing else uses the weight."""
    eps_elsewhere: bool = False
    """Whether the forward of its module, or of one around it, uses a number like its eps for something else."""


@dataclass(frozen=True)
class Channels:
    """The channels of a model, in the order of its parameters."""

    channels: tuple[Channel, ...]
    counted: tuple[Counted, ...] = ()
    norms: tuple[Norm, ...] = ()
    elsewhere: frozenset[str] = frozenset()
    """The weights, by first name, that are used outside of the forward of the modules that hold them, too."""

    def __iter__(self) -> Iterator[Channel]:
        return iter(self.channels)

    def __len__(self) -> int:
        return len(self.channels)

    def of(self, parameter: str, axis: int, index: int) -> Channel | None:
        """Return the channel that this slice of the parameter makes or reads; any alias is a name.

        None where the slice belongs to no channel (an axis of a kernel, a parameter that the forward does not use).
        """
        return self._by_slice.get((parameter, axis, index))

    def made_by(self, parameter: str) -> tuple[Channel, ...]:
        """Return the channels that have the parameter among their makers."""
        return tuple(channel for channel in self if any(_names(s, parameter) for s in channel.makers))

    def read_by(self, parameter: str) -> tuple[Channel, ...]:
        """Return the channels that have the parameter among their readers."""
        return tuple(channel for channel in self if any(_names(s, parameter) for s in channel.readers))

    @cached_property
    def _by_slice(self) -> dict[tuple[str, int, int], Channel]:
        return {
            (name, part.axis, index): channel
            for channel in self
            for part in channel.slices
            for name in (part.parameter, *part.aliases)
            for index in part.indices
        }


def find_channels(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...]) -> Channels:
    """Find the channels of a model. The model is left as it is, training flags too.

    Args:
        model: Analysed in evaluation mode; any dtype and device.
        example_inputs: As `model(*example_inputs)` takes them; a batch of 2 is enough.

    Raises:
        CompactError: If `torch.export` can't follow the forward (control flow that depends on the data).

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
        >>> channel = find_channels(model, torch.zeros(2, 1, 4, 4)).of("0.weight", 0, 1)
        >>> [str(part) for part in channel.makers], [str(part) for part in channel.readers]
        (['0.weight[axis 0: 1]', '0.bias[axis 0: 1]'], ['3.weight[axis 1: 4, 5, 6, 7]'])
        >>> find_channels(model, torch.zeros(2, 1, 4, 4)).of("3.weight", 0, 1).blocked
        'an output of the model'
    """
    return channels_of(export(model, example_inputs))


def channels_of(graph: Graph) -> Channels:
    """Find the channels of an exported model: `find_channels` in two steps, where the graph serves twice."""
    tracer = trace(graph)
    ledger = tracer.ledger
    settled = ledger.settle([each.labels for each in tracer.counted if each.cut])
    classes = settled.classes
    leaving = {c for labels in tracer.outputs for c in classes[unique(labels)].tolist()}
    makers: dict[int, list[Slice]] = {}
    readers: dict[int, list[Slice]] = {}
    order: dict[int, None] = {}
    for name, starts in ledger.starts.items():
        for axis, start in enumerate(starts):
            span = slice(start, start + ledger.shapes[name][axis])
            for marked, parts in ((ledger.made[span], makers), (ledger.read[span], readers)):
                indices: dict[int, list[int]] = {}
                present = np.flatnonzero(marked)
                for index, found in zip(present.tolist(), classes[start + present].tolist(), strict=True):
                    indices.setdefault(found, []).append(index)
                for found, members in indices.items():
                    order[found] = None
                    part = Slice(name, axis, tuple(members), graph.aliases[name])
                    parts.setdefault(found, []).append(part)
    found = {
        c: Channel(
            tuple(makers.get(c, ())),
            tuple(readers.get(c, ())),
            settled.blocked[c],
            settled.lost[c],
            tuple(sorted(settled.unless.get(c, ()))),
            c in leaving,
            c not in settled.felt and c not in leaving,
        )
        for c in order
    }
    counted = [
        Counted(each.modules, tuple(found.get(c) for c in classes[each.labels.numpy()].tolist()))
        for each in tracer.counted
    ]
    return Channels(tuple(found.values()), tuple(counted), _norms(graph, tracer), _elsewhere(graph))


def _elsewhere(graph: Graph) -> frozenset[str]:
    """The parameters that are used in the forward of a module that does not hold them."""
    found: set[str] = set()
    for node in graph.nodes:
        if node.op == "placeholder" and (source := graph.sources[node.name]).kind == "parameter":
            names = (source.name, *graph.aliases.get(source.name, ()))
            holders = {name.rpartition(".")[0] for name in names}
            known = [user for user in node.users if user.meta.get("nn_module_stack")]
            if any(modules_of(user)[0] not in holders for user in known):
                found.add(source.name)
    return frozenset(found)


def _norms(graph: Graph, tracer: Tracer) -> tuple[Norm, ...]:
    names = {node: graph.sources[node.name].name for node in graph.nodes if node.op == "placeholder"}
    users: dict[str, set[Node]] = {}
    own: dict[str, tuple[set[Node], set[Node]]] = {}
    for node, name in names.items():
        users.setdefault(name, set()).update(node.users)
    for norm in tracer.norms:
        for nodes, node in zip(own.setdefault(names[norm.weight], (set(), set())), (norm.start, norm.end), strict=True):
            nodes.add(node)
    literals = {node: modules_of(node)[0] for node in graph.nodes if node.op == "call_function"}
    result: list[Norm] = []
    for norm in tracer.norms:
        name = names[norm.weight]
        starts, ends = own[name]
        elsewhere = any(
            module in norm.call.modules and node not in starts and norm.eps in (*node.args, *node.kwargs.values())
            for node, module in literals.items()
        )
        alone = users[name] == ends and name in graph.tensors
        result.append(Norm(norm.call.modules, name, norm.eps, alone, elsewhere))
    return tuple(result)


def trace(graph: Graph) -> Tracer:
    """Push labels through the graph, once: what the rules found is in the tracer and its ledger."""
    if "trace" not in graph.known:
        graph.known["trace"] = _trace(graph)
    return graph.known["trace"]


def _trace(graph: Graph) -> Tracer:
    ledger = Ledger(graph.tensors)
    tracer = Tracer(ledger)
    values: dict[Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = _placeholder(graph.sources[node.name], node, ledger)
    _block_shared_memory(graph, ledger)
    for name in graph.unread:
        tracer.block(ledger.weight(name, is_buffer=False), "it feeds a computation whose result forward drops")
    for name, axis, reason in graph.fixed:
        ledger.block(ledger.weight(name, is_buffer=False).axes[axis], reason, felt=False)
    for call in graph.calls(values):
        values[call.node] = apply(tracer, call)
    for value in values_in([values.get(node) for node in graph.outputs()]):
        tracer.block(value, "an output of the model")
        tracer.outputs += value.axes if isinstance(value, Weight) else [value]
    return tracer


def _placeholder(source: Source, node: Node, ledger: Ledger) -> Any:
    if source.tensor is not None and source.kind in ("parameter", "buffer"):
        return ledger.weight(source.name, is_buffer=source.kind == "buffer")
    example = node.meta.get("val")
    if not isinstance(example, Tensor):
        return example
    what = "an input of the model" if source.kind == "input" else f"the constant {source.name!r}, which can't be cut"
    return ledger.anonymous(example.shape, what)


def _block_shared_memory(graph: Graph, ledger: Ledger) -> None:
    """Block tensors that overlap in memory without being one tensor: cutting them would untie them."""
    for name, other in overlapping(graph.tensors).items():
        for labels in ledger.weight(name, is_buffer=False).axes:
            ledger.block(labels, f"{name!r} shares its memory with {other!r} without being the same tensor")


def _names(part: Slice, parameter: str) -> bool:
    return parameter == part.parameter or parameter in part.aliases
