"""The sizes that change with heads, groups and the channels of an RMSNorm, which a module may keep in attributes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tying.channels.find import Channels, Counted
from tying.enforce.compaction.adapt import Change, Kind, Size
from tying.enforce.compaction.live import Network
from tying.enforce.compaction.norms import adapted
from tying.plan import qualified


def scale_norms(network: Network, channels: Channels) -> dict[str, dict[str, Any]]:
    """Make up for the channels that are missing in RMSNorms. Returns the attributes of their modules."""
    attributes: dict[str, dict[str, Any]] = {}
    scaled: set[str] = set()
    for norm in channels.norms:
        live = network.live[norm.weight][0]
        before, after = len(live), int(live.sum())
        if after == before:
            continue
        if norm.weight not in scaled:
            scaled.add(norm.weight)
            network.values[norm.weight] *= (before / after) ** 0.5
        attributes[norm.modules[0]] = adapted(network.model, norm, before, after)
    return attributes


def changed_sizes(network: Network, channels: Channels, gone: set[int]) -> dict[int, tuple[Change, ...]]:
    """The sizes that change where heads, groups or channels of an RMSNorm go, by the number of each such channel."""
    numbers = {id(channel): number for number, channel in enumerate(channels)}
    found: dict[int, list[Change]] = {}
    for number, channel in enumerate(channels):
        for norm in (channels.norms[i] for i in channel.norms if id(channel) in gone):
            name = norm.weight.removeprefix(qualified(norm.modules[0], ""))
            found.setdefault(number, []).append(Change(norm.modules[:1], tuple(_lengths(network, norm.weight, name))))
    for each in channels.counted:
        missing = {id(channel) for channel in each.channels if channel is not None} & gone
        sizes = tuple(_sizes(network, each, gone)) if missing else ()
        for key in missing:
            found.setdefault(numbers[key], []).append(Change(each.modules, sizes))
    return {number: tuple(dict.fromkeys(changes)) for number, changes in found.items()}


def last_ones(channels: Channels, gone: set[int]) -> dict[int, str]:
    """Return why one head, or group, must stay wherever all would go; by the number of its channel."""
    numbers = {id(channel): number for number, channel in enumerate(channels)}
    found: dict[int, str] = {}
    for each in channels.counted:
        whole = [channel for channel in each.channels if channel is not None]
        if whole and len(whole) == len(each.channels) and all(id(channel) in gone for channel in whole):
            where = f"in {each.modules[0]!r}" if each.modules[0] else "in the model's forward"
            found[numbers[id(whole[0])]] = f"all heads or groups {where} are silent, and one must be left"
    return found


def _sizes(network: Network, counted: Counted, gone: set[int]) -> Iterator[Size]:
    """What has another size now: the heads, the heads of keys, the tensors of the module, the width of all heads."""
    distinct = {id(channel): channel for channel in counted.channels}
    heads = len(counted.channels), sum(id(channel) not in gone for channel in counted.channels)
    keys = len(distinct), sum(key not in gone for key in distinct)
    yield Size(Kind.HEADS, *heads)
    yield Size(Kind.KEYS, *keys)
    widths: dict[int, None] = {}
    for path in counted.modules:
        for name in network.live:
            if name.startswith(qualified(path, "")) or not path:
                for size in _lengths(network, name, name.removeprefix(path)):
                    yield size
                    if size.before % heads[0] == 0 and size.after * heads[0] == size.before * heads[1]:
                        widths[size.before // heads[0]] = None
        if widths:
            break
    for width in widths:
        yield Size(Kind.KEY_FEATURES, keys[0] * width, keys[1] * width)


def _lengths(network: Network, name: str, shown: str) -> Iterator[Size]:
    """The axes of a tensor that have another length now."""
    for axis, live in enumerate(network.live[name]):
        before, after = len(live), int(live.sum())
        if after < before:
            yield Size(Kind.TENSOR, before, after, shown, axis)
