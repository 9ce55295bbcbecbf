"""Networks drawn by seed: what is said of their channels held to trials, then planted with structure, and compacted."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.channels.fixtures import WIDE, fuzzed, tensors_of
from benchmarks.channels.oracle import SAME, unlike
from benchmarks.channels.plant import TIABLE
from benchmarks.channels.trials import Outputs, outputs_of
from tying.channels.find import Channel, Channels, Slice, find_channels
from tying.enforce.compaction.compact import compact, plan_compaction
from tying.errors import TyingError
from tying.groups import Groups
from tying.plan import Tie, TiePlan

LEFT = "free, and yet it stays"
IN_PLACE = ("an input of the model", "nn.MultiheadAttention checks its embed_dim")
"""Why an unread output stays where its number could only be cut with what the network is given, or its module forbids
it: counted by themselves as well."""
FEATURES = ("unread", "dead", "silent", "void")


@dataclass
class Graph:
    """What came of one drawn network."""

    seed: int
    steps: list[str]
    outcome: str
    """"equal", "refused" (by name), "differs", "felt" (a channel is felt by what is said not to read it), "crashed"."""
    said: str
    free: int
    channels: int
    """Of those with makers and readers, how many there are, and how many of them are said to be free to go."""
    unread: int = 0
    constant: int = 0
    """The outputs of layers that nobody feels, and the others that are one number for every input: found by trial in
    what was planted, whatever the package says of them."""
    idle: int = 0
    """The outputs of layers with no others: they are not counted above, since a layer keeps one output at least."""
    unread_removed: int = 0
    removed: int = 0
    """Of the unread ones, so many went, where what the package says of them agrees with the numbers that are left;
    else at least so many. Of both kinds, exactly so many."""
    in_place: int = 0
    """Of the unread ones that stay, how many do for a reason in `IN_PLACE`, as the package says. They are among the
    unread ones all the same."""
    beyond: int = 0
    """How many more went than were found by trial, which disturbs one output at a time."""
    reasons: list[str] = field(default_factory=list)
    """Why the unread ones that stay do, as the package says, or "not a channel"."""
    seconds: float = 0

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self)


def try_graph(seed: int) -> Graph:
    """Draw, hold to the law, plant, compact, compare."""
    model, x = fuzzed(seed, WIDE)
    result = Graph(seed, list(model.names), "equal", "", 0, 0)
    start = time.process_time()
    try:
        channels = find_channels(model, x)
        between = [c for c in channels if c.makers and c.readers and not c.output]
        result.channels, result.free = len(between), sum(c.blocked is None for c in between)
        felt = [str(c.makers[0]) for c in between if c.only_read and moved(model, x, c) > SAME]
        result.outcome, result.said = ("felt", ", ".join(felt)) if felt else ("equal", "")
        if not felt:
            _compacted(model, x, channels, between, result)
    except Exception as error:
        result.outcome, result.said = "crashed", f"{type(error).__name__}: {error}"
    result.seconds, result.said = time.process_time() - start, result.said[:400]
    return result


def moved(model: nn.Module, x: Tensor, channel: Channel) -> float:
    """How far the outputs move when a channel that no reader reads is disturbed."""
    silent, disturbed = copy.deepcopy(model), copy.deepcopy(model)
    noise(disturbed, channel.makers)
    for each in (silent, disturbed):
        zero(each, channel.readers)
    with torch.no_grad():
        return unlike(silent(x), disturbed(x))


def zero(model: nn.Module, slices: Iterable[Slice]) -> None:
    """Set slices to zero; statistics stay."""
    tensors = tensors_of(model)
    with torch.no_grad():
        for part in slices:
            if not part.parameter.endswith(("running_mean", "running_var")):
                tensors[part.parameter].detach().index_fill_(part.axis, torch.tensor(part.indices), 0)


def noise(model: nn.Module, slices: Iterable[Slice]) -> None:
    """Set slices to numbers between 0.5 and 1.5."""
    tensors, generator = tensors_of(model), torch.Generator().manual_seed(1)
    for part in slices:
        tensor, index = tensors[part.parameter].detach(), torch.tensor(part.indices)
        new = torch.rand(tensor.index_select(part.axis, index).shape, generator=generator, dtype=tensor.dtype)
        tensor.index_copy_(part.axis, index, 0.5 + new)


def _compacted(model: nn.Module, x: Tensor, channels: Channels, between: Sequence[Channel], result: Graph) -> None:
    chance = random.Random(result.seed)
    chosen = [(c, chance.choice(FEATURES)) for c in _together(model, between, chance)]
    given = copy.deepcopy(model)
    for channel, kind in chosen:
        tensors = tensors_of(given)
        if kind != "unread":
            zero(given, (s for s in channel.makers if kind != "dead" or tensors[s.parameter].ndim > 1))
        if kind in ("unread", "void"):
            zero(given, channel.readers)
    _sow(given, chance)
    ties = _ties(given, chance)
    wanted = copy.deepcopy(given)
    for name, labels in ties.items():
        _average(tensors_of(wanted)[name].detach(), labels)
    others = [torch.randn(n, *x.shape[1:], dtype=x.dtype, generator=torch.Generator().manual_seed(n)) for n in (3, 5)]
    truth = outputs_of(wanted, [x, others[0], 10 * others[1]])  # large ones, too: what saturates is felt there
    tried = [each for each in truth.values() if not each.idle]
    result.unread = sum(len(each.unread) for each in tried)
    result.constant = sum(len(each.constant - each.unread) for each in tried)
    result.idle = sum(each.count for each in truth.values() if each.idle)
    plan = TiePlan([Tie.of(name, Groups.inputs(), labels) for name, labels in ties.items()])
    try:
        small = compact(given, plan, x)
    except TyingError as error:
        result.outcome, result.said = "refused", str(error)
        result.reasons = [_short(result.said)] * result.unread
        return
    with torch.no_grad():
        worst = max(unlike(wanted(other), small(other)) for other in others)
    result.outcome, result.said = ("equal", "") if worst <= SAME else ("differs", f"{worst:.3g}")
    gone = {
        (name, part.axis, index)
        for channel in plan_compaction(given, plan, x).removed
        for part in channel.makers
        for name in (part.parameter, *part.aliases)
        for index in part.indices
    }
    _count(wanted, small, truth, channels, gone, result)


def _count(
    wanted: nn.Module,
    small: nn.Module,
    truth: Mapping[str, Outputs],
    channels: Channels,
    said_gone: Set[tuple[str, int, int]],
    result: Graph,
) -> None:
    """Count what went, layer by layer, and why the rest did not; `said_gone`: (weight, axis, index), by the package."""
    before, after = tensors_of(wanted), tensors_of(small)
    for name, each in truth.items():
        if each.idle:
            continue
        weight = before[name].detach().movedim(each.axis, 0)
        left = weight if name not in after else after[name].detach().movedim(each.axis, 0)
        gone, can = len(weight) - len(left), len(each.unread | each.constant)
        result.removed += min(gone, can)
        result.beyond += max(0, gone - can)
        there = [i for i in range(len(weight)) if (name, each.axis, i) not in said_gone]
        if are_left(weight, left, there):
            sure, stay = len(each.unread - set(there)), each.unread & set(there)
        else:
            sure, stay = surely_gone(weight, left, each), each.unread
        result.unread_removed += sure
        said = sorted(_why(channels, truth, name, each.axis, index) for index in stay)
        said.sort(key=lambda reason: reason == LEFT)  # where it is not known which stay: rather those with a reason
        result.reasons += [_short(reason) for reason in said[: len(each.unread) - sure]]
    result.in_place = sum(reason in IN_PLACE for reason in result.reasons)


def surely_gone(weight: Tensor, left: Tensor, outputs: Outputs) -> int:
    """Return how many unread outputs went at least, outputs along axis 0 of both.

    By number: what went and is no constant. By identity: what is left of an output are some of its own numbers, which
    no other has; those of which nothing but zeros is left may be any.
    """
    by_number = len(weight) - len(left) - len(outputs.constant - outputs.unread)
    alike = _alike(weight, left) & (left.flatten(1) != 0).any(1)[:, None]  # (left, before)
    known = alike.sum(1) == 1
    there = set(alike[known].nonzero()[:, 1].tolist())
    by_identity = len(outputs.unread - there) - int((~known).sum())
    return min(len(outputs.unread), max(0, by_number, by_identity))


def are_left(weight: Tensor, left: Tensor, there: Sequence[int]) -> bool:
    """Whether these outputs may be what is left, in order: each has only numbers that it had before."""
    return len(there) == len(left) and bool(_alike(weight, left)[range(len(left)), there].all())


def _alike(weight: Tensor, left: Tensor) -> Tensor:
    """Which outputs have only numbers that another had: (left, before), bool."""
    flat, rest = weight.flatten(1), left.flatten(1)
    return ((rest[:, None, :, None] - flat[None, :, None, :]).abs() <= 1e-12).any(3).all(2)


def _why(channels: Channels, truth: Mapping[str, Outputs], name: str, axis: int, index: int) -> str:
    """Why an unread output stays, as the package says."""
    channel = channels.of(name, axis, index)
    if channel is None:
        return "not a channel"
    if channel.blocked:
        return channel.blocked
    for part in channel.makers:
        tried = truth.get(part.parameter)
        if tried and part.axis == tried.axis and not set(part.indices) <= tried.unread | tried.constant:
            return "part of a channel whose other outputs are read"
    return LEFT


def _sow(model: nn.Module, chance: random.Random) -> None:
    """Zero some inputs and outputs of layers at random, whatever channels there are said to be."""
    with torch.no_grad():
        for _, layer in model.named_modules():
            if type(layer) not in TIABLE:
                continue
            weight: Any = layer.weight
            for axis in (1, 0):
                if chance.random() < 0.25:
                    some = chance.sample(range(weight.shape[axis]), chance.randint(0, weight.shape[axis] // 2))
                    weight.index_fill_(axis, torch.tensor(some, dtype=torch.int64), 0)
                    if axis == 0 and layer.bias is not None and chance.random() < 0.5:
                        layer.bias[some] = 0


def _together(model: nn.Module, between: Sequence[Channel], chance: random.Random) -> list[Channel]:
    """A third of the channels, and never the last index of an axis."""
    left = {name: list(tensor.shape) for name, tensor in tensors_of(model).items()}
    chosen: list[Channel] = []
    for channel in chance.sample(list(between), len(between)):
        fits = all(len(part.indices) < left[part.parameter][part.axis] for part in channel.slices)
        if fits and chance.random() < 0.4:
            chosen.append(channel)
            for part in channel.slices:
                left[part.parameter][part.axis] -= len(part.indices)
    return chosen


def _ties(model: nn.Module, chance: random.Random) -> dict[str, list[int]]:
    """Ties of the inputs of some plain layers; what is zero already stays zero."""
    ties: dict[str, list[int]] = {}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    held = {name: id(tensor) for name, tensor in tensors_of(model).items()}
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        alone = sum(held[other] == id(weight) for other in names) == 1
        if type(module) not in TIABLE or not alone or chance.random() > 0.25 or weight.shape[1] < 3:
            continue
        if getattr(module, "groups", 1) > 1 or getattr(module, "padding_mode", "zeros") != "zeros":
            continue
        nonzero = (weight.detach().movedim(1, 0).flatten(1) != 0).any(1).tolist()
        labels = [chance.randrange(weight.shape[1] // 2 + 1) if counts else -1 for counts in nonzero]
        if max(labels) >= 0:
            ties[f"{name}.weight"] = labels
    return ties


def _average(weight: Tensor, labels: Sequence[int]) -> None:
    for label in {label for label in labels if label >= 0}:
        members = [i for i, each in enumerate(labels) if each == label]
        weight[:, members] = weight[:, members].mean(1, keepdim=True).expand_as(weight[:, members])


def _short(reason: str) -> str:
    """A reason without the names of modules and numbers, to be counted."""
    words = reason.split("; ")[0].split(" in '")[0].split(" in the model")[0]
    return "".join("#" if letter.isdigit() else letter for letter in words)[:90]
