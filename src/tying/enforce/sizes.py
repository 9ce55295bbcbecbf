"""The sizes that change with heads, groups and the channels of an RMSNorm, which a module may keep in attributes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tying.channels.find import Channels, Counted
from tying.enforce.adapt import Change
from tying.enforce.live import Network
from tying.enforce.norms import adapted
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


def changed_sizes(network: Network, channels: Channels, gone: set[int]) -> dict[int, Change]:
    """The sizes that change where heads, groups or channels of an RMSNorm go, by the number of each such channel."""
    numbers = {id(channel): number for number, channel in enumerate(channels)}
    found: dict[int, Change] = {}
    for number, channel in enumerate(channels):
        if channel.norms and id(channel) in gone:
            found[number] = Change(channels.norms[channel.norms[0]].modules[:1], ())
    for each in channels.counted:
        missing = [channel for channel in each.channels if channel is not None and id(channel) in gone]
        if missing:
            change = Change(each.modules, tuple(_sizes(network, each, gone)))
            found.update({numbers[id(channel)]: change for channel in missing})
    return found


def _sizes(network: Network, counted: Counted, gone: set[int]) -> Iterator[tuple[str, int, int]]:
    """What has another size now: the heads, the heads of keys, the tensors of the module, the width of all heads."""
    distinct = {id(channel): channel for channel in counted.channels}
    heads = len(counted.channels), sum(id(channel) not in gone for channel in counted.channels)
    shared = len(distinct), sum(key not in gone for key in distinct)
    yield "count", *heads
    yield "count of keys", *shared
    widths: dict[int, None] = {}
    for path in counted.modules:
        for name, axes in network.live.items():
            if name.startswith(qualified(path, "")) or not path:
                for axis, live in enumerate(axes):
                    before, after = len(live), int(live.sum())
                    if after < before:
                        yield f"{name.removeprefix(path)}[{axis}]", before, after
                        if before % heads[0] == 0 and after * heads[0] == before * heads[1]:
                            widths[before // heads[0]] = None
        if widths:
            break
    for width in widths:
        yield "keys", shared[0] * width, shared[1] * width
