"""Networks drawn by seed: what is said of their channels held to trials, then planted with structure, and compacted."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.channels.fixtures import WIDE, fuzzed, tensors_of
from benchmarks.channels.oracle import SAME, unlike
from benchmarks.channels.plant import TIABLE
from tying.channels.find import Channel, Channels, Slice, find_channels
from tying.enforce.compact import compact
from tying.errors import TyingError
from tying.groups import Groups
from tying.plan import Tie, TiePlan

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
    planted: int = 0
    removed: int = 0
    """The channels that were planted so that nobody feels them, and how many of them went."""
    reasons: list[str] = field(default_factory=list)
    """Why the others did not."""
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
        felt = [str(c.makers[0]) for c in between if c.blocked is None and moved(model, x, c) > SAME]
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
    ties = _ties(given, chance)
    wanted = copy.deepcopy(given)
    for name, labels in ties.items():
        _average(tensors_of(wanted)[name].detach(), labels)
    unfelt = [c for c, kind in chosen if kind in ("unread", "void") and moved(wanted, x, c) <= SAME]
    plan = TiePlan([Tie.of(name, Groups.inputs(), labels) for name, labels in ties.items()])
    result.planted = len(unfelt)
    try:
        small = compact(given, plan, x)
    except TyingError as error:
        result.outcome, result.said = "refused", str(error)
        result.reasons = [_short(result.said)] * len(unfelt)
        return
    others = [torch.randn(n, *x.shape[1:], dtype=x.dtype, generator=torch.Generator().manual_seed(n)) for n in (3, 5)]
    with torch.no_grad():
        worst = max(unlike(wanted(other), small(other)) for other in others)
    result.outcome, result.said = ("equal", "") if worst <= SAME else ("differs", f"{worst:.3g}")
    after = tensors_of(small)
    for channel in unfelt:
        first = channel.makers[0]
        before = tensors_of(model)[first.parameter].shape[first.axis]
        # what is left is shorter; which indices went can't be read off shapes, how many can
        gone = before - (after[first.parameter].shape[first.axis] if first.parameter in after else before)
        asked = sum(len(c.makers[0].indices) for c in unfelt if _same_axis(c, first))
        if gone >= asked:
            result.removed += 1
        else:
            result.reasons.append(_short(channel.blocked or "free, and yet it stays"))


def _same_axis(channel: Channel, first: Slice) -> bool:
    return (channel.makers[0].parameter, channel.makers[0].axis) == (first.parameter, first.axis)


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
