"""What of a network both stages work on, and how large it is once a plan is compacted."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tying.channels.find import Channel, Channels
from tying.enforce.compaction.surgery import check_has_tied_twin
from tying.errors import CompactError, TaskError
from tying.find.budget import label_bits
from tying.groups import Groups
from tying.plan import Member, Tie, TiePlan, qualified

FEWEST_INPUTS = 8
"""A layer of fewer inputs (the colours of an image) has nothing worth tying."""

Targets = Mapping[str, tuple[Groups, ...]]
Labels = Mapping[Member, NDArray[np.int64]]


def find_targets(model: nn.Module, channels: Channels) -> Targets:
    """Choose the weights and how each is read: inputs to be tied, outputs to be pruned where channels can go.

    The layers that make the model's output are left alone, as in the papers, unless there is no other.

    Raises:
        TaskError: If the network has no linear or convolution layer to work on.
    """
    alone = _unshared(model)
    layers = {
        weight: module
        for name, module in model.named_modules()
        if (weight := qualified(name, "weight")) in alone
        and type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        and getattr(module, "groups", 1) == 1
    }
    hidden = {name: m for name, m in layers.items() if any(c.readers for c in channels.made_by(name))} or layers
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    targets = {name: (*_prunable(name, shapes, channels), *_tieable(name, model, channels)) for name in hidden}
    found = {name: groups for name, groups in targets.items() if groups}
    if not found:
        raise TaskError(
            f"model(): expected a linear or convolution layer with at least {FEWEST_INPUTS} inputs or with units that "
            f"can go, got {type(model).__name__} without one inside; tie it by hand with tying.declare and tying.tie_"
        )
    return found


@dataclass(frozen=True)
class Size:
    """What a compacted network stores."""

    values: int
    label_bytes: int


def silenced(plan: TiePlan, model: nn.Module, channels: Channels) -> TiePlan:
    """Prune also what else makes a pruned unit (biases, scales), where its readers could not take its constant over.

    A pruned unit still puts out a constant, its activated bias. `compact` folds it into its readers' biases, but not
    into a convolution that pads with zeros, and a reader without a bias would get one. Such a unit is made zero.
    """
    labels = {tie.members[0]: tie.partition.labels for tie in plan}
    parameters = dict(model.named_parameters())
    silent: dict[str, set[int]] = defaultdict(set)
    for channel in channels:
        if channel.blocked is None and _made_zero(channel, labels, parameters):
            if all(_takes_constants(model.get_submodule(s.parameter.rpartition(".")[0])) for s in channel.readers):
                continue
            for part in channel.makers:
                if part.parameter in parameters and parameters[part.parameter].ndim == 1:
                    silent[part.parameter].update(part.indices)
    ties: list[Tie] = []
    for name, indices in silent.items():
        alone = np.arange(len(parameters[name]))
        alone[sorted(indices)] = -1
        ties.append(Tie.of(name, Groups.outputs(), alone))
    return plan + TiePlan(ties)


def compacted_size(plan: TiePlan, model: nn.Module, channels: Channels) -> Size:
    """Count what `compact` leaves of a `silenced` plan, from the channels alone: no network is built.

    Exact where the activations keep zero zero (ReLU, GELU, tanh); too little by what stays or is added to the readers'
    biases where they don't (sigmoid).
    """
    labels = {tie.members[0]: tie.partition.labels for tie in plan}
    parameters = dict(model.named_parameters())
    removed: dict[tuple[str, int], set[int]] = defaultdict(set)
    for channel in channels:
        unused = _made_zero(channel, labels, parameters) or _unread(channel, labels)
        if channel.blocked is None and channel.readers and unused:
            for part in channel.slices:
                removed[part.parameter, part.axis].update(part.indices)
    values, bits = 0, 0
    for name, parameter in parameters.items():
        shape = [size - len(removed[name, axis]) for axis, size in enumerate(parameter.shape)]
        if Member(name, Groups.inputs()) in labels:
            alive = np.delete(labels[Member(name, Groups.inputs())], sorted(removed[name, 1]))
            tie = Tie.of(name, Groups.inputs(), alive)
            shape[1], bits = tie.partition.classes, bits + label_bits(tie)
        values += math.prod(shape)
    return Size(values, (bits + 7) // 8)


def _unshared(model: nn.Module) -> set[str]:
    """The names of the parameters that stand in one place: what several layers share, they would have to tie alike."""
    names = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    places = Counter(identity for _, identity in names)
    return {name for name, identity in names if places[identity] == 1}


def _made_zero(channel: Channel, labels: Labels, parameters: Mapping[str, Tensor]) -> bool:
    """Whether every weight that makes the channel is pruned there."""
    weights = [s for s in channel.makers if s.parameter in parameters and parameters[s.parameter].ndim > 1]
    members = [(Member(s.parameter, Groups.outputs()), s) for s in weights]
    return bool(members) and all(
        m in labels and s.axis == 0 and (labels[m][list(s.indices)] < 0).all() for m, s in members
    )


def _takes_constants(reader: nn.Module) -> bool:
    padded = any(reader.padding) if isinstance(reader, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else False
    return getattr(reader, "bias", None) is not None and not padded


def _unread(channel: Channel, labels: Labels) -> bool:
    members = [(Member(s.parameter, Groups.inputs()), s) for s in channel.readers]
    return all(m in labels and s.axis == 1 and (labels[m][list(s.indices)] < 0).all() for m, s in members)


def _prunable(name: str, shapes: Mapping[str, torch.Size], channels: Channels) -> tuple[Groups, ...]:
    made = channels.made_by(name)
    # A channel that several weights make (a residual sum) goes only if all of them prune it: left whole here.
    alone = all(len(shapes[s.parameter]) == 1 or s.parameter == name for c in made for s in c.makers)
    prunable = alone and len(made) == shapes[name][0] > 1 and all(c.blocked is None for c in made)
    return (Groups.outputs(),) if prunable else ()


def _tieable(name: str, model: nn.Module, channels: Channels) -> tuple[Groups, ...]:
    transposed = any(s.parameter == name and s.axis == 1 for c in channels for s in c.makers)
    if transposed or model.get_parameter(name).shape[1] < FEWEST_INPUTS:
        return ()
    try:
        check_has_tied_twin(model, name.rpartition(".")[0])
    except CompactError:
        return ()
    return (Groups.inputs(),)
