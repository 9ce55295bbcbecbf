"""Channels as joined groups: all that reads a channel is one group, so that a penalty makes it vanish as one."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from tying.channels.find import Channel, channels_of
from tying.channels.graph import Graph, export
from tying.channels.memory import overlapping
from tying.errors import PlanError
from tying.groups import Joined, Part


@dataclass(frozen=True)
class NotJoined:
    """Channels that are in no joined group, though something reads or makes them."""

    parameter: str
    """The first that reads them, or makes them where no reader is known."""
    axis: int
    indices: tuple[int, ...]
    reason: str

    def __str__(self) -> str:
        count = f"{len(self.indices)} {'index' if len(self.indices) == 1 else 'indices'}"
        return f"{self.parameter}[axis {self.axis}: {count}] is not joined: {self.reason}"


def joined_groups(
    model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...], names: str | Sequence[str] = "*"
) -> tuple[Joined, ...]:
    """Return the channels of a model as joined groups: what reads one channel is one group, over all its readers.

    Channels with the same readers are the groups of one `Joined`: the stream of a residual network with the
    convolutions of all its blocks, the shortcuts and the last linear layer; a layer that two branches read; one map of
    a flattened convolution with its H·W inputs. Where one layer alone reads another, they are the groups of
    `Groups.inputs()` in the same order. A channel whose group is zero has no effect left, whatever makes it: `compact`
    removes it with its makers.

    - What passes a channel on one by one (depthwise convolutions, BatchNorm, scales) makes it and does not read it:
      once the readers are zero it goes with the channel whatever it is, so shrinking it would gain nothing. A
      convolution in groups makes one channel of all that goes into and comes out of one of its groups.
    - Behind a LayerNorm, or any norm or softmax over channels, a channel can't be removed, since the common mean and
      scale feel it; its readers are known all the same, and joined. So are those of the model's inputs, and of
      channels that are outputs of the model as well.
    - Where an operation without a rule takes a channel, it may be read by what nobody knows: such channels are left
      out. `not_joined` lists them, with the reasons.
    - Every `(parameter, axis, index)` is in one group at most. A weight that is used both ways round
      (`F.linear(x, weight)` and `F.linear(h, weight.t())`) is in two `Joined`, along its two axes.

    Args:
        model: Any dtype, device and mode; left as it is.
        example_inputs: As `model(*example_inputs)` takes them; a batch of 2 is enough.
        names: Patterns of parameter names, as in `fnmatch`. Channels *all* of whose readers match one are returned: a
            part of the readers would not make the channel vanish, and what matches none is never penalised.

    Returns:
        In the order of the model's parameters. A shared parameter goes by its first name.

    Raises:
        PlanError: If a pattern matches no parameter, or no channel is read by what matches; says why.
        CompactError: If `torch.export` can't follow the forward.

    Example:
        >>> import torch
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stem, self.conv, self.head = nn.Linear(5, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        ...     def forward(self, x):
        ...         x = self.stem(x)
        ...         return self.head(x + self.conv(x).relu())
        >>> for joined in joined_groups(Block(), torch.zeros(2, 5)):
        ...     print(joined.count, "groups:", joined)
        5 groups: stem.weight[axis 1]
        3 groups: conv.weight[axis 1] + head.weight[axis 1]
    """
    patterns = (names,) if isinstance(names, str) else tuple(names)
    if not patterns:
        raise PlanError('names: expected at least one pattern, got none; "*" stands for all')
    graph = export(model, example_inputs)
    sound, lost = _readable(graph)
    found = _join(graph, sound)
    matching = [joined for joined in found if all(_matches(graph, part.parameter, patterns) for part in joined.parts)]
    for pattern in patterns:
        if not any(_matches(graph, part.parameter, (pattern,)) for joined in matching for part in joined.parts):
            raise _nothing_for(pattern, graph, found, lost)
    return tuple(matching)


def not_joined(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...]) -> tuple[NotJoined, ...]:
    """Return the channels that `joined_groups` leaves out, because more may depend on them than is known.

    Channels that nothing reads, as the outputs of the model, are not among them.

    Args:
        model: As for `joined_groups`.
        example_inputs: As for `joined_groups`.

    Raises:
        CompactError: If `torch.export` can't follow the forward.

    Example:
        >>> import torch
        >>> class Sorted(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body, self.head = nn.Linear(4, 3), nn.Linear(3, 2)
        ...     def forward(self, x):
        ...         return self.head(self.body(x).sort()[0])
        >>> for left_out in not_joined(Sorted(), torch.zeros(2, 4)):
        ...     print(left_out)
        body.weight[axis 0: 3 indices] is not joined: sort in the model's forward has no rule
        >>> [str(joined) for joined in joined_groups(Sorted(), torch.zeros(2, 4))]
        ['body.weight[axis 1]', 'head.weight[axis 1]']
    """
    _, lost = _readable(export(model, example_inputs))
    indices: dict[tuple[str, int, str], list[int]] = {}
    for channel, reason in lost:
        first = (*channel.readers, *channel.makers)[0]
        indices.setdefault((first.parameter, first.axis, reason), []).extend(first.indices)
    return tuple(NotJoined(name, axis, tuple(sorted(found)), why) for (name, axis, why), found in indices.items())


def _readable(graph: Graph) -> tuple[list[Channel], list[tuple[Channel, str]]]:
    """Return the channels whose readers are groups side by side, and the others with the reason."""
    sound: list[Channel] = []
    lost: list[tuple[Channel, str]] = []
    shared = overlapping(graph.tensors)
    for channel in channels_of(graph):
        reason = channel.lost or _overlap(channel, shared)
        if reason:
            lost.append((channel, reason))
        elif channel.readers:
            sound.append(channel)
    return sound, lost


def _overlap(channel: Channel, shared: Mapping[str, str]) -> str | None:
    """Return why the channel's group would hold a number twice, or one that another channel's group has, or None."""
    for one, other in itertools.combinations(channel.readers, 2):
        if one.parameter == other.parameter:
            return f"{one.parameter!r} reads it along axis {one.axis} and axis {other.axis}, which overlap"
    for part in channel.readers:
        if part.parameter in shared:
            return f"{part.parameter!r} shares its memory with {shared[part.parameter]!r} without being the same tensor"
    return None


def _join(graph: Graph, channels: Iterable[Channel]) -> list[Joined]:
    """Return one `Joined` for every set of readers, in the order of the parameters."""
    rank = {name: place for place, name in enumerate(graph.tensors)}
    alike: dict[tuple[tuple[str, int, int], ...], list[Channel]] = {}
    for channel in channels:
        signature = tuple((part.parameter, part.axis, len(part.indices)) for part in channel.readers)
        alike.setdefault(signature, []).append(channel)
    found: list[tuple[tuple[int, int, int], Joined]] = []
    for signature, members in alike.items():
        members.sort(key=lambda channel: channel.readers[0].indices)
        labels = {(name, axis): [-1] * graph.tensors[name].shape[axis] for name, axis, _ in signature}
        for label, channel in enumerate(members):
            for part in channel.readers:
                for index in part.indices:
                    labels[part.parameter, part.axis][index] = label
        parts = tuple(Part(name, axis, tuple(given)) for (name, axis), given in labels.items())
        first = members[0].readers[0]
        found.append(((rank[first.parameter], first.axis, first.indices[0]), Joined(parts, len(members))))
    return [joined for _, joined in sorted(found, key=lambda pair: pair[0])]


def _matches(graph: Graph, parameter: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern matches one of the parameter's names."""
    return any(fnmatchcase(name, p) for p in patterns for name in (parameter, *graph.aliases[parameter]))


def _nothing_for(pattern: str, graph: Graph, found: Iterable[Joined], lost: Iterable[tuple[Channel, str]]) -> PlanError:
    """Say why a pattern adds nothing."""
    names = [name for first in graph.tensors for name in (first, *graph.aliases[first])]
    if not any(fnmatchcase(name, pattern) for name in names):
        weights = [name for name in names if name.endswith("weight")] or names
        close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
        listed = close or weights[:10]
        more = "" if close or len(weights) <= 10 else ", …"
        return PlanError(
            f"names: expected a parameter's name or a pattern, got {pattern!r}, which matches none; "
            f"{'similar names are' if close else 'the model has'}: {', '.join(listed)}{more}"
        )
    said = f"names: expected all that reads some channel, got {pattern!r}"
    for joined in found:
        readers = [part.parameter for part in joined.parts]
        if any(_matches(graph, name, (pattern,)) for name in readers):
            others = [name for name in readers if not _matches(graph, name, (pattern,))]
            return PlanError(
                f"{said}, whose channels {', '.join(others[:5])}{', …' if len(others) > 5 else ''} "
                f"read{'s' if len(others) == 1 else ''} as well; name them too, or penalise the layer by itself "
                "with its name as the rule"
            )
    for channel, reason in lost:
        if any(_matches(graph, part.parameter, (pattern,)) for part in channel.readers):
            return PlanError(f"{said}, whose channels can't be joined: {reason}; penalise the layer by itself")
    return PlanError(f"{said}, which reads no channel; name the weights of linear or convolution layers")
