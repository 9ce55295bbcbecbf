"""What can go from a projected network: channels that nobody reads, constants that a bias can take over.

Pure bookkeeping over float64 copies of the tensors: which indices of which axis live, what is folded into which bias,
which labels the inputs that stay have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tying.channels.constants import Constants
from tying.channels.find import Channel, Channels, Slice
from tying.enforce.compaction.adapt import Attributes, Change
from tying.enforce.compaction.live import READERS, Network, everything_pruned
from tying.enforce.compaction.norms import zero_or_why
from tying.enforce.compaction.sizes import changed_sizes, last_ones, scale_norms
from tying.enforce.compaction.surgery import check_has_tied_twin
from tying.enforce.compaction.unfelt import unfelt
from tying.enforce.held import names_of
from tying.errors import CompactError
from tying.plan import Tie, TiePlan


@dataclass(frozen=True)
class Kept:
    """Something pruned, or that nobody reads, which stays as zeros."""

    what: str
    """The slice of a parameter, as `conv.weight[axis 0: 3]`."""
    reason: str

    def __str__(self) -> str:
        return f"{self.what} stays: {self.reason}"


@dataclass(frozen=True)
class Compaction:
    """What `compact` does to a model, and what it can't do, with the reasons. `print` shows it."""

    removed: tuple[Channel, ...]
    """The channels that go."""
    folded: int
    """How many of them were constants that the biases of their readers take over."""
    labels: Mapping[str, list[int]]
    """By module name: one label per input that stays, −1 = not read. These modules become tied layers."""
    kept: tuple[Kept, ...]
    """What could have gone and stays, as zeros."""
    tensors: Mapping[str, Tensor] = field(repr=False)
    """The tensors that change, by first name, float64, of their new size."""
    attributes: Attributes = field(default_factory=dict[str, dict[str, Any]])
    """By module name: the attributes that change, as the number of heads."""
    changes: Mapping[int, tuple[Change, ...]] = field(default_factory=dict[int, "tuple[Change, ...]"], repr=False)
    """Of the channels that go (by number), those with which sizes change that a forward may have written down."""

    def __str__(self) -> str:
        removed = f"{len(self.removed)} channel{'' if len(self.removed) == 1 else 's'}"
        lines = [f"Compaction: {removed} removed, {self.folded} of them folded into biases"]
        for name, attributes in self.attributes.items():
            lines.append(f"  {name}: {', '.join(f'{key}={value}' for key, value in attributes.items())}")
        for name, labels in self.labels.items():
            read = [label for label in labels if label >= 0]
            lines.append(f"  {name}: {len(labels)} inputs, {len(read)} read, {len(set(read))} values")
        return "\n".join([*lines, *(f"  {kept}" for kept in self.kept)])


def reduce(
    reference: nn.Module,
    plan: TiePlan,
    channels: Channels,
    constants: Constants,
    refused: Mapping[int, str] | None = None,
) -> Compaction:
    """Decide what goes from a network.

    Args:
        reference: The model projected on the plan, float64. Not written to.
        plan: Ties of one member, over inputs or outputs, that fit the model.
        channels: Of the reference.
        constants: Of the reference.
        refused: Why channels, by number, must stay.

    Raises:
        CompactError: If the plan leaves a layer without units or inputs, or ties inputs of one with no tied twin.
    """
    network = Network(reference)
    whole, refused = channels, refused or {}
    channels = _decided(reference, channels, constants, refused)
    folded, reasons = _fold(network, channels, constants)
    removed = _remove_unread(network, channels)
    if last := last_ones(channels, {id(channel) for channel in removed}):
        return reduce(reference, plan, whole, constants, {**refused, **last})
    if last := _last_of_layers(network, plan, channels, removed):
        return reduce(reference, plan, whole, constants, {**refused, **last})
    attributes = scale_norms(network, channels)
    gone = {id(channel) for channel in removed}
    turned = {s.parameter for c in channels for s in c.makers if s.axis == 1}
    labels, unselected = _labels(network, plan, channels.elsewhere | turned)
    stranded = [
        Kept(str(c.makers[0]), reason) for c, reason in _stranded(network, plan, channels, reasons, gone, refused)
    ]
    return Compaction(
        removed=tuple(removed),
        folded=sum(id(channel) in gone for channel in folded),
        labels=labels,
        kept=(*stranded, *unselected),
        tensors=network.changed(plan),
        attributes=attributes,
        changes=changed_sizes(network, channels, gone),
    )


def _decided(model: nn.Module, channels: Channels, constants: Constants, refused: Mapping[int, str]) -> Channels:
    """Block the channels that are refused, and let go those that are zero where an RMSNorm takes their mean."""
    decided: dict[int, Channel] = {}
    for number, channel in enumerate(channels):
        blocked, only_read = refused.get(number) or channel.blocked, channel.only_read
        if channel.norms and number not in refused:
            blocked = zero_or_why(model, channels, constants, channel)
            only_read = blocked is None and bool(channel.readers)  # the norm feels it no more, once it goes
        same = (blocked, only_read) == (channel.blocked, channel.only_read)
        decided[id(channel)] = channel if same else replace(channel, blocked=blocked, only_read=only_read)
    counted = [
        replace(each, channels=tuple(None if c is None else decided[id(c)] for c in each.channels))
        for each in channels.counted
    ]
    return replace(channels, channels=tuple(decided.values()), counted=tuple(counted))


def _fold(network: Network, channels: Channels, constants: Constants) -> tuple[list[Channel], dict[int, str]]:
    """Give every constant channel to its readers' biases. Returns those, and why others can't be, by id.

    One that has to stay, too, where nothing else feels it: what it is made of may go then.
    """
    folded: list[Channel] = []
    reasons: dict[int, str] = {}
    for channel in channels:
        if (channel.blocked and not channel.only_read) or not channel.readers or network.unread(channel):
            continue
        found = _foldable(network, channel, constants)
        if isinstance(found, str):
            reasons[id(channel)] = found
            continue
        for part, index, value in found:
            _give_to_bias(network, part, index, value)
        folded.append(channel)
    return folded, reasons


def _foldable(network: Network, channel: Channel, constants: Constants) -> list[tuple[Slice, int, float]] | str:
    """The constants that the channel's readers see, or why one can't be folded."""
    found: list[tuple[Slice, int, float]] = []
    for part in channel.readers:
        zero = network.zero(part.parameter, part.axis)
        for index in part.indices:
            if bool(zero[index]):
                continue
            value = constants.foldable(part.parameter, part.axis, index)
            if value is None:
                reading = constants.readings.get((part.parameter, part.axis, index))
                if reading is None:
                    return f"what {part.parameter} reads of it can vary with the input"
                return (
                    f"its constant {reading.value:.4g} is read with zero padding by {part.parameter}"
                    f"{_what_else_to_prune(network, channel)}"
                )
            if value and (reason := _no_bias(network, part)):
                return f"its constant {value:.4g} is read by {part.parameter}, and {reason}"
            found.append((part, index, value))
    return found


def _what_else_to_prune(network: Network, channel: Channel) -> str:
    """Which vectors (biases, BatchNorm's) make the constant."""
    trained = dict(network.model.named_parameters())
    vectors = [s.parameter for s in channel.makers if s.parameter in trained and trained[s.parameter].dim() == 1]
    standing = [name for name in vectors if not bool(network.zero(name, 0)[_index(channel, name)].all())]
    return f"; prune {', '.join(standing)} there as well" if standing else ""


def _index(channel: Channel, name: str) -> list[int]:
    return [index for s in channel.makers if s.parameter == name for index in s.indices]


def _no_bias(network: Network, part: Slice) -> str | None:
    """Why the readers of a slice have no bias that could take a constant over, or None."""
    readers = network.holders(part.parameter)
    if not readers or part.axis != 1:
        return "no linear or convolution layer reads it there, whose bias could take it over"
    known = {id(module) for module in readers}
    for module in readers:
        bias = cast("nn.Parameter | None", module.bias)
        names = [] if bias is None else network.names(bias)
        if not {id(network.model.get_submodule(name.rpartition(".")[0])) for name in names} <= known:
            return f"the bias that would take it over is shared: {', '.join(names)}"
    return None


def _give_to_bias(network: Network, part: Slice, index: int, value: float) -> None:
    if value:
        weight = network.values[part.parameter]
        amount = weight[:, index].reshape(weight.shape[0], -1).sum(1) * value
        modules = network.holders(part.parameter)
        held = [(module, cast("nn.Parameter | None", module.bias)) for module in modules]
        biases = {id(module if bias is None else bias): module for module, bias in held}
        for module in biases.values():
            network.add_to_bias(module, amount)
    network.stop_reading(part, index)


def _remove_unread(network: Network, channels: Channels) -> list[Channel]:
    """Remove the channels that nothing feels: not the outputs, nor a unit that an output feels."""
    removed = [c for c in unfelt(network, channels) if c.readers and not c.blocked]
    network.remove(part for channel in removed for part in channel.slices)
    return removed


def _last_of_layers(network: Network, plan: TiePlan, channels: Channels, removed: Sequence[Channel]) -> dict[int, str]:
    """Return why a channel must stay of every layer that would be left with none; by the number of the channel.

    Raises:
        CompactError: If it is the plan that leaves a layer nothing.
    """
    emptied = network.emptied()
    for tie in plan if emptied else ():
        name, axis = tie.members[0].parameter, int(tie.members[0].groups.kind == "inputs")
        if tie.partition.pruned == len(tie.partition) and (name, axis) in emptied and len(network.live[name]) > 1:
            raise everything_pruned(name, "inputs" if axis else "units")
    numbers = {id(channel): number for number, channel in enumerate(channels)}
    found: dict[int, str] = {}
    for name, axis in emptied:
        whole = sorted(numbers[id(c)] for c in removed if any((s.parameter, s.axis) == (name, axis) for s in c.slices))
        if found.keys().isdisjoint(whole):
            what = "units" if axis == 0 else "inputs"
            found[whole[0]] = f"all {what} of {name} could go, and one must be left"
    return found


def _labels(network: Network, plan: TiePlan, elsewhere: frozenset[str]) -> tuple[dict[str, list[int]], list[Kept]]:
    """The labels of the modules that become tied layers, and the zero inputs that stay for want of a tied twin.

    `elsewhere` are the weights that something else than the forward of their layer uses, too: a product written out in
    another forward, or one with the weight turned around.
    """
    ties: dict[str, Tie] = {}
    for tie in plan:
        parameter, groups = tie.members[0].parameter, tie.members[0].groups
        if groups.kind == "inputs" or parameter not in ties:
            ties[parameter] = tie
    labels: dict[str, list[int]] = {}
    names = names_of(network.model)
    unselected: list[Kept] = []
    for parameter, tie in ties.items():
        path, _, leaf = parameter.rpartition(".")
        if leaf != "weight" or not isinstance(network.model.get_submodule(path), READERS):
            continue
        given = _labels_left(network, parameter, tie)
        kept = [label for label in given if label >= 0]
        if not kept and tie.partition.pruned < len(tie.partition):
            given = [0, *given[1:]]  # one must be left: it is read as zero
            kept = given[:1]
        if not kept:
            raise everything_pruned(parameter, "inputs")
        shared = len(set(kept)) < len(kept)
        if not shared and len(kept) == len(given):
            continue
        try:
            check_has_tied_twin(network.model, path, names)
            if parameter in elsewhere:
                raise CompactError(
                    f"{parameter}: expected a weight that only its layer uses, to tie its inputs, got one that is used "
                    "outside of its own forward as well; leave it out of the plan, or tie it with tie_"
                )
        except CompactError as error:
            if shared:
                raise
            unselected.append(Kept(f"{parameter}[axis 1: {len(given) - len(kept)} zero inputs]", str(error)))
        else:
            labels[path] = given
    return labels, unselected


def _labels_left(network: Network, parameter: str, tie: Tie) -> list[int]:
    """One label per input that stays, −1 where its weights are zero."""
    stays = torch.nonzero(network.live[parameter][1]).flatten()
    tied = tie.members[0].groups.kind == "inputs"
    labels = torch.tensor(tie.partition.labels.tolist())[stays] if tied else stays.clone()
    labels[torch.from_numpy(network.zero(parameter, 1))[stays]] = -1
    return labels.tolist()


def _stranded(
    network: Network,
    plan: TiePlan,
    channels: Channels,
    reasons: Mapping[int, str],
    gone: set[int],
    refused: Mapping[int, str],
) -> Iterator[tuple[Channel, str]]:
    """The channels that are pruned by the plan, read by nobody, or refused, and stay; with the reason."""
    pruned: dict[str, set[int]] = {}
    for tie in plan:
        parameter, groups = tie.members[0].parameter, tie.members[0].groups
        if groups.kind == "outputs":
            zero = [i for i, label in enumerate(tie.partition.labels.tolist()) if label < 0]
            pruned.setdefault(network.first[parameter], set()).update(zero)
    for number, channel in enumerate(channels):
        if id(channel) in gone or not channel.makers:
            continue
        if any(_is_among(part, pruned) for part in (*channel.makers, *channel.readers)):
            yield channel, channel.blocked or reasons.get(id(channel), "no layer reads it")
        elif channel.blocked and channel.readers and (number in refused or network.unread(channel)):
            yield channel, channel.blocked


def _is_among(part: Slice, indices: Mapping[str, set[int]]) -> bool:
    """Whether a slice has one of these indices of axis 0, by first name."""
    return part.axis == 0 and part.parameter in indices and not indices[part.parameter].isdisjoint(part.indices)
