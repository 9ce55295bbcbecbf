"""What of a network both stages work on, and how large it is once a plan is compacted."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tying.channels.find import Channel, Channels
from tying.errors import TaskError
from tying.find.budget import label_bits
from tying.groups import Groups
from tying.plan import Member, Tie, TiePlan

FEWEST_INPUTS = 8
"""A layer of fewer inputs (the colours of an image) has nothing worth tying."""

Targets = Mapping[str, tuple[Groups, ...]]


def find_targets(model: nn.Module, channels: Channels) -> Targets:
    """Choose the weights and how each is read: inputs to be tied, outputs to be pruned where channels can go.

    The layers that make the model's output are left alone, as in the papers, unless there is no other.

    Raises:
        TaskError: If the network has no linear or convolution layer to work on.
    """
    layers = {
        f"{name}.weight".removeprefix("."): module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) and getattr(module, "groups", 1) == 1
    }
    hidden = {name: m for name, m in layers.items() if any(c.readers for c in channels.made_by(name))} or layers
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    targets = {name: _groups(name, shapes, channels) for name in hidden}
    found = {name: groups for name, groups in targets.items() if groups}
    if not found:
        raise TaskError(
            f"model(): expected a linear or convolution layer with at least {FEWEST_INPUTS} inputs or with units that "
            f"can go, got {type(model).__name__} without one; tie it by hand with tying.declare and tying.tie_"
        )
    return found


@dataclass(frozen=True)
class Size:
    """What a compacted network stores."""

    values: int
    label_bytes: int


def compacted_size(plan: TiePlan, model: nn.Module, channels: Channels) -> Size:
    """Count what `compact` would leave, from the channels alone: no network is built."""
    labels = {tie.members[0]: tie.partition.labels for tie in plan}
    removed: dict[tuple[str, int], set[int]] = defaultdict(set)
    for channel in channels:
        if channel.blocked is None and (_made_zero(channel, labels) or _unread(channel, labels)):
            for part in channel.slices:
                removed[part.parameter, part.axis].update(part.indices)
    values, bits = 0, 0
    for name, parameter in model.named_parameters():
        shape = [size - len(removed[name, axis]) for axis, size in enumerate(parameter.shape)]
        if Member(name, Groups.inputs()) in labels:
            alive = np.delete(labels[Member(name, Groups.inputs())], sorted(removed[name, 1]))
            tie = Tie.of(name, Groups.inputs(), alive)
            shape[1], bits = tie.partition.classes, bits + label_bits(tie)
        values += math.prod(shape)
    return Size(values, (bits + 7) // 8)


def _made_zero(channel: Channel, labels: Mapping[Member, NDArray[np.int64]]) -> bool:
    weights = [
        labels[m][list(s.indices)] for s in channel.makers if (m := Member(s.parameter, Groups.outputs())) in labels
    ]
    return any((label < 0).all() for label in weights)


def _unread(channel: Channel, labels: Mapping[Member, NDArray[np.int64]]) -> bool:
    members = [(Member(s.parameter, Groups.inputs()), s) for s in channel.readers]
    return all(m in labels and s.axis == 1 and (labels[m][list(s.indices)] < 0).all() for m, s in members)


def _groups(name: str, shapes: Mapping[str, torch.Size], channels: Channels) -> tuple[Groups, ...]:
    outputs, inputs = shapes[name][:2]
    made = channels.made_by(name)
    # A channel that several weights make (a residual sum) goes only if all of them prune it: left whole here.
    alone = all(len(shapes[s.parameter]) == 1 or s.parameter == name for c in made for s in c.makers)
    prunable = alone and len(made) == outputs > 1 and all(c.blocked is None for c in made)
    return ((Groups.outputs(),) if prunable else ()) + ((Groups.inputs(),) if inputs >= FEWEST_INPUTS else ())
