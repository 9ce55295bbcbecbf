"""Laws of joined groups, in float64, against what the networks do."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as f
from torch.overrides import TorchFunctionMode

from channel_laws import assert_equal, change, outputs
from tying.channels.find import Channels, Slice
from tying.groups import Joined


class Held(TorchFunctionMode):
    """Holds what channels have in common, as their mean and variance, at the values of the first run.

    Then a normalised channel feels no other, and what still depends on a channel is what reads it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []
        self.at: int | None = None

    def again(self) -> Held:
        self.at = 0
        return self

    def hold(self, value: Tensor) -> Tensor:
        if self.at is None:
            self.values.append(value)
            return value
        self.at += 1
        return self.values[self.at - 1]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is Tensor.mean and given.get("keepdim"):
            return self.hold(func(*args, **given))
        mine = {f.layer_norm: self.layer_norm, f.group_norm: self.group_norm, f.softmax: self.softmax}
        mine |= {Tensor.softmax: self.softmax}
        return mine.get(func, func)(*args, **given)

    def layer_norm(
        self, x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 0
    ) -> Tensor:
        y = self.normalised(x, tuple(range(-len(shape), 0)), eps)
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    def group_norm(
        self, x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        y = x.unflatten(1, (groups, -1))
        y = self.normalised(y, tuple(range(2, y.ndim)), eps).flatten(1, 2)
        shape = (-1, *[1] * (y.ndim - 2))
        return y if weight is None or bias is None else y * weight.reshape(shape) + bias.reshape(shape)

    def softmax(self, x: Tensor, dim: int, *others: Any, **ignored: Any) -> Tensor:
        exponentials = x.exp()
        return exponentials / self.hold(exponentials.sum(dim, keepdim=True))

    def normalised(self, x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
        mean = self.hold(x.mean(dims, keepdim=True))
        return (x - mean) / (self.hold((x - mean).square().mean(dims, keepdim=True)) + eps).sqrt()


def positions(joined: Joined, label: int) -> list[Slice]:
    """Where the numbers of one group lie."""
    return [
        Slice(part.parameter, part.axis, tuple(i for i, given in enumerate(part.labels) if given == label))
        for part in joined.parts
    ]


def check_it_vanishes(model: nn.Module, x: Tensor, channels: Channels, joined: Joined) -> int:
    """Once all of a group is zero, nothing depends on what makes its channel. Returns of how many something did."""
    held, alive = Held(), 0
    with held:
        whole = outputs(model, x)
    for label in range(joined.count):
        found = {
            id(channel): channel
            for part in positions(joined, label)
            for index in part.indices
            if (channel := channels.of(part.parameter, part.axis, index)) is not None
        }
        (channel,) = found.values()
        if channel.blocked == "an output of the model" or not channel.makers:
            continue
        silent, disturbed = copy.deepcopy(model), copy.deepcopy(model)
        change(disturbed, channel.makers, seed=1)
        with held.again():
            alive += int((outputs(disturbed, x) - whole).abs().max() > 1e-9)
        results: list[Tensor] = []
        for each in (silent, disturbed):
            change(each, positions(joined, label), seed=None)
            with held.again():
                results.append(outputs(each, x))
        assert_equal(*results, f"{joined}, group {label}")
    return alive


def check_partition(model: nn.Module, found: Sequence[Joined]) -> None:
    """No position is in two groups, and groups of one `Joined` have as many numbers in each part."""
    parameters = dict(model.named_parameters())
    taken: Counter[tuple[str, int, int]] = Counter()
    for joined in found:
        assert joined.parts
        for part in joined.parts:
            assert len(part.labels) == parameters[part.parameter].shape[part.axis], f"{part}"
            sizes = Counter(part.labels)
            del sizes[-1]
            assert sorted(sizes) == list(range(joined.count)), f"{part}"
            assert len(set(sizes.values())) == 1, f"{part}"
            taken.update((part.parameter, part.axis, i) for i, label in enumerate(part.labels) if label >= 0)
    assert set(taken.values()) <= {1}, [position for position, times in taken.items() if times > 1]


def without(joined: Joined, index: int) -> Joined:
    return replace(joined, parts=(*joined.parts[:index], *joined.parts[index + 1 :]))
