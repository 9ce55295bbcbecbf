"""Which channels no output feels: those that are read by nobody, or only by each other.

Felt are the outputs, what is normalised together, what no rule follows; and whatever a felt channel is made of, through
a weight that is not zero: `A` is felt if `weight[b, a] ≠ 0` where the weight reads `A` at `a` and makes a felt `B` at
`b`. All others may change, or go, alone and together.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from tying.channels.find import Channel, Channels
from tying.enforce.compaction.live import Network

Index = NDArray[np.intp]


def unfelt(network: Network, channels: Channels) -> list[Channel]:
    """Return the channels that no output of the network feels, with the weights that it has now.

    Blocked ones too, which have to stay where they are. A block of a residual network that reads a channel of the
    stream and adds to no other is not felt if nothing after it reads that channel, though the block itself does.
    """
    felt = np.array([not channel.only_read for channel in channels], dtype=bool)
    owners, read = _owners(network, channels)
    makers: dict[int, set[tuple[str, int]]] = defaultdict(set)
    for name, axis in read:
        for number in np.unique(owners[name, 1 - axis]).tolist():
            makers[number].add((name, axis))
    waiting: Index = np.append(np.flatnonzero(felt), -1)  # -1: what belongs to no channel is felt
    while len(waiting):
        found: list[Index] = []
        new = np.zeros(len(felt) + 1, dtype=bool)  # the last for −1
        new[waiting] = True
        for name, axis in {key for number in waiting.tolist() for key in makers[number]}:
            present = network.presence(name).numpy()
            rows = new[owners[name, 1 - axis]]
            reached = present[rows].any(0) if axis == 1 else present[:, rows].any(1)
            found.append(owners[name, axis][reached])
        numbers = np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.intp)
        numbers = numbers[numbers >= 0]
        waiting = numbers[~felt[numbers]]
        felt[waiting] = True
    return [channel for channel, is_felt in zip(channels, felt.tolist(), strict=True) if not is_felt]


def _owners(network: Network, channels: Channels) -> tuple[dict[tuple[str, int], Index], set[tuple[str, int]]]:
    """Return the number of the channel of each index of the axes of what reads, or −1; and which axes read."""
    read = {(part.parameter, part.axis) for channel in channels for part in channel.readers}
    names = {name for name, _ in read}
    belong: dict[tuple[str, int], tuple[list[int], list[int]]] = {
        (name, axis): ([], []) for name in names for axis in (0, 1)
    }
    for number, channel in enumerate(channels):
        for part in (*channel.makers, *channel.readers):
            if (found := belong.get((part.parameter, part.axis))) is not None:
                found[0].extend(part.indices)
                found[1].extend([number] * len(part.indices))
    owners = {(name, axis): np.full(network.values[name].shape[axis], -1) for name, axis in belong}
    for key, (indices, numbers) in belong.items():
        owners[key][indices] = numbers
    return owners, read
