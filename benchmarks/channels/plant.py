"""Structure planted in a network at random: channels that nobody reads, units without input, inputs that are equal.

Nothing here asks the package which channels there are: that is in the streams, written down by hand.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.channels.fixtures import Span, Stream, fill, tensors_of
from tying.groups import Groups
from tying.plan import Tie, TiePlan

TIABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
KINDS = {
    "": ("unread", "unread", "dead", "silent"),
    "head": ("unread", "unread", "unread", "silent"),
    "rms": ("unread", "void"),
    "layer": ("unread",),
}
"""By what the stream is: which kinds of plants it may get, as often as they stand here."""


@dataclass(frozen=True)
class Part:
    """Channels of one stream, and what is done to them.

    unread: all readers zero. dead: the weights that make them zero, so that they are constants. silent: all that
    makes them zero, so that they are 0. void: silent and unread.
    """

    stream: Stream
    channels: tuple[int, ...]
    kind: str
    planned: bool
    """Whether the plan says so; otherwise it is in the weights."""

    def zeros(self, tensors: Mapping[str, torch.Tensor]) -> list[Span]:
        """What is set to zero."""
        trained = [span for span in self.stream.makers if not _is_statistic(span.tensor)]
        made = [span for span in trained if self.kind != "dead" or tensors[span.tensor].ndim > 1]
        return [
            *(made if self.kind in ("dead", "silent", "void") else []),
            *(self.stream.readers if self.kind in ("unread", "void") else []),
        ]


@dataclass(frozen=True)
class Plant:
    """What one draw does to a network."""

    parts: tuple[Part, ...]
    ties: Mapping[str, tuple[int, ...]]
    """By weight: one label per input, −1 = zero."""
    pruned: Mapping[str, tuple[int, ...]]
    """By parameter: the outputs that the plan prunes."""

    @property
    def plan(self) -> TiePlan:
        """What `compact` is asked for."""
        return TiePlan(
            [
                *(Tie.of(name, Groups.inputs(), list(labels)) for name, labels in self.ties.items()),
                *(Tie.of(name, Groups.outputs(), list(labels)) for name, labels in self.pruned.items()),
            ]
        )


def draw(model: nn.Module, streams: Sequence[Stream], seed: int, *, often: float = 0.5, ties: float = 0.3) -> Plant:
    """Draw a plant: about `often` of the streams get some, about `ties` of the weights have their inputs tied."""
    chance = random.Random(seed)
    chosen = [stream for stream in streams if chance.random() < often]
    parts = [_part(stream, chance) for stream in chosen or [chance.choice(streams)]]
    tensors = tensors_of(model)
    zero: dict[str, set[int]] = {}
    pruned: dict[str, set[int]] = {}
    for part in parts:
        for span in part.zeros(tensors):
            reads, planned = span in part.stream.readers, part.planned
            if reads and _is_tiable(model, span):
                zero.setdefault(span.tensor, set()).update(span.all(part.channels) if planned else ())
            elif not reads and planned and span.axis == 0:
                pruned.setdefault(span.tensor, set()).update(span.all(part.channels))
    labels = {name: _ties(model, parts, name, zero.get(name, set()), chance, ties) for name in _weights(model)}
    return Plant(
        tuple(parts),
        {name: each for name, each in labels.items() if each is not None},
        {
            name: tuple(-1 if i in gone else i for i in range(len(tensors[name])))
            for name, gone in pruned.items()
        },
    )  # fmt: skip


def planted(model: nn.Module, plant: Plant) -> tuple[nn.Module, nn.Module]:
    """Return the model as `compact` gets it, and the one that the result must equal: projected by plain loops."""
    given, wanted = copy.deepcopy(model), copy.deepcopy(model)
    for part in plant.parts:
        for each in (given, wanted) if not part.planned else (wanted,):
            fill(tensors_of(each), part.zeros(tensors_of(each)), part.channels, None)
        if part.planned:  # what a plan can't say stays in the weights
            spans = [s for s in part.zeros(tensors_of(given)) if not _is_planned(s, part, plant)]
            fill(tensors_of(given), spans, part.channels, None)
    with torch.no_grad():
        for name, labels in plant.ties.items():
            weight, each = tensors_of(wanted)[name].detach(), torch.tensor(labels)
            for label in set(labels):
                members = (each == label).nonzero().flatten()
                mean = weight[:, members].mean(1, keepdim=True) if label >= 0 else torch.zeros(())
                weight[:, members] = mean.to(weight).expand_as(weight[:, members])
    return given, wanted


def _part(stream: Stream, chance: random.Random) -> Part:
    count = max(1, min(stream.count - 1, round(stream.count * chance.uniform(0.05, 0.7))))
    kind = chance.choice(KINDS[stream.norm or ("head" if stream.head else "")])
    return Part(stream, tuple(sorted(chance.sample(range(stream.count), count))), kind, chance.random() < 0.5)


def _ties(
    model: nn.Module, parts: Sequence[Part], name: str, zero: set[int], chance: random.Random, often: float
) -> tuple[int, ...] | None:
    """Labels of the inputs of a weight, −1 where the plan says zero; None where the plan says nothing about it."""
    inputs = tensors_of(model)[name].shape[1]
    tied = chance.random() < often and inputs >= 4
    if not tied:
        return tuple(-1 if i in zero else i for i in range(inputs)) if zero else None
    hidden = {
        i for part in parts if part.kind in ("unread", "void")
        for span in part.stream.readers if span.tensor == name and span.axis == 1 for i in span.all(part.channels)
    }  # fmt: skip
    if name == "0.weight":  # the inputs of the model: some are not read
        hidden |= {i for i in range(inputs) if chance.random() < 0.3}
    classes = chance.randint(max(1, inputs // 4), inputs - 1)
    labels = [-1 if i in hidden | zero else chance.randrange(classes) for i in range(inputs)]
    return tuple(labels) if max(labels) >= 0 else None


def _weights(model: nn.Module) -> list[str]:
    """The weights whose inputs can be tied."""
    held = [f"{name}.weight" for name, module in model.named_modules() if type(module) in TIABLE]
    return [name for name in held if _is_tiable(model, Span(name, 1))]


def _is_tiable(model: nn.Module, span: Span) -> bool:
    """Whether a plan can speak about the inputs that a span reads: its own plain layer's."""
    path, _, leaf = span.tensor.rpartition(".")
    module = model.get_submodule(path)
    if span.axis != 1 or leaf != "weight" or type(module) not in TIABLE:
        return False
    return getattr(module, "groups", 1) == 1 and sum(p is module.weight for p in tensors_of(model).values()) == 1


def _is_planned(span: Span, part: Part, plant: Plant) -> bool:
    if span in part.stream.readers:
        return span.tensor in plant.ties and span.axis == 1
    return span.tensor in plant.pruned and span.axis == 0


def _is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var"))
