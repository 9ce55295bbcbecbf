"""RMSNorms over fewer channels: what is left of them is scaled as before.

Where `d − d′` of `d` channels are exactly zero, the mean of squares over the others is `d/d′` times that over all, so
`w √(d/d′) · x / √(mean′(x²) + ε d/d′) = w · x / √(mean(x²) + ε)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from tying.channels.constants import Constants
from tying.channels.find import Channel, Channels, Norm
from tying.enforce.compaction.adapt import Epsilon


def zero_or_why(model: nn.Module, channels: Channels, constants: Constants, channel: Channel) -> str | None:
    """Return None if a channel that only RMSNorms block is zero at each of them, and they can do without; else why."""
    for number in channel.norms:
        norm = channels.norms[number]
        zeros = constants.zeros.get(number, ())
        indices = [i for part in channel.slices if part.parameter == norm.weight for i in part.indices]
        if not indices or not all(zeros[i] for i in indices if i < len(zeros)) or max(indices) >= len(zeros):
            return channel.blocked
        if not norm.alone:
            return f"{norm.weight} scales it in an RMSNorm, and is used elsewhere as well"
        if norm.eps != 0 and len(list(_epsilons(model, norm))) != 1:
            return f"the eps of the RMSNorm in {norm.modules[0]!r} is none of its attributes, or like several"
        if norm.eps and norm.eps_elsewhere:
            return f"the forward around the RMSNorm in {norm.modules[0]!r} uses a number like its eps elsewhere as well"
    return None


def adapted(model: nn.Module, norm: Norm, before: int, after: int) -> dict[str, Any]:
    """Return what is known of an RMSNorm's attributes once `after` of `before` channels are left."""
    eps = Epsilon(before / after) if norm.eps is None else norm.eps * before / after
    values: dict[str, Any] = dict.fromkeys(_epsilons(model, norm), eps)
    if isinstance(model.get_submodule(norm.modules[0]), nn.RMSNorm):
        values["normalized_shape"] = (after,)
    return values


def _epsilons(model: nn.Module, norm: Norm) -> Iterator[str]:
    module = model.get_submodule(norm.modules[0])
    if norm.eps is None:
        yield from ["eps"] if isinstance(module, nn.RMSNorm) else []
        return
    yield from (name for name, value in vars(module).items() if type(value) is float and value == norm.eps)
