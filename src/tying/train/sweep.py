"""One step of the penalties over all parameters: every result is computed, and checked, before a weight is written.

A penalty on the norms of groups never needs a matrix: squares are summed at the speed of memory, the norms of many
targets are shrunk in one call, and the weights are multiplied in place. Beside the norms nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from tying.penalties.norms import acts_on_norms
from tying.train.here import Here
from tying.train.on_device import OnDevice
from tying.train.on_numbers import OnNumbers
from tying.train.rules import Target
from tying.train.scattered import Scattered, Weights
from tying.train.shards import is_sharded

Zeros = dict[str, Tensor]
"""Which groups are zero after a prox, by the key of their target: `(G,)` bool; told where it is asked for, at least."""

Kind: TypeAlias = "Scattered | OnDevice | OnNumbers | Here"
"""Each solves for its targets first, and writes then."""

_CPU = torch.device("cpu")


class Sweep:
    """The targets of a handle in rounds: within one, every number of a parameter is in one group."""

    def __init__(self, targets: Sequence[Target], *, tell_zeros: bool, asynchronous: bool = False) -> None:
        self.targets = targets
        self._weights = Weights([place for target in targets for place in target.places])
        self._rounds = [_Round(some, tell_zeros, asynchronous) for some in _in_rounds(targets)]

    def step_(self, steps: dict[str, float]) -> Zeros:
        """Apply the proxes.

        Raises:
            PenaltyError: Names the parameter that has NaN or infinity in it; no weight has changed then.
        """
        zeros: Zeros = {}
        for some in self._rounds:
            zeros |= some.step_(steps)
        return zeros

    def settle(self, steps: dict[str, float]) -> None:
        """Raise what a prox that nobody waited for would have raised; `steps` gets back those that it left out."""
        for some in self._rounds:
            some.settle(steps)

    def bury_(self, dead: Zeros) -> None:
        """Make groups zero."""
        buried = [target for target in self.targets if target.key in dead and dead[target.key].any()]
        if buried:
            self._weights.make_zero_(buried, torch.cat([dead[target.key] for target in buried]))


class _Round:
    def __init__(self, targets: Sequence[Target], tell_zeros: bool, asynchronous: bool) -> None:
        numbers = [target for target in targets if not acts_on_norms(target.penalty)]
        norms = [target for target in targets if acts_on_norms(target.penalty) and target.count]
        sharded = [target for target in norms if any(is_sharded(place.parameter) for place in target.places)]
        self._tell_zeros, self._asynchronous = tell_zeros, asynchronous
        self._fixed: list[Kind] = []
        watched = [target.places[0] for target in numbers if is_sharded(target.places[0].parameter)]
        if sharded or watched:  # first: once their message is sent, what is wrong on one rank is told on all of them
            self._fixed.append(Scattered(sharded, watched))
        if numbers:
            self._fixed.append(OnNumbers(numbers, tell_zeros))
        self._plain = [target for target in norms if target not in sharded]
        self._parameters = [place.parameter for target in self._plain for place in target.places]
        self._plan()

    def _plan(self) -> None:
        """Divide the plain targets by where their weights are now."""
        self._devices = [parameter.device for parameter in self._parameters]
        by_device: dict[torch.device | None, list[Target]] = {}
        for target in self._plain:
            by_device.setdefault(_device(target), []).append(target)
        here = [] if self._asynchronous else by_device.pop(_CPU, [])
        alone = [device for device in by_device if device is not None and self._asynchronous]
        self._on_device = [OnDevice(by_device.pop(device)) for device in alone]
        elsewhere = [target for some in by_device.values() for target in some]
        self._kinds: list[Kind] = [*self._fixed, *self._on_device]
        if elsewhere:
            self._kinds.append(Scattered(elsewhere, ()))
        if here:
            self._kinds.append(Here(here, self._tell_zeros))

    def step_(self, steps: dict[str, float]) -> Zeros:
        if [parameter.device for parameter in self._parameters] != self._devices:  # the model was moved
            self.settle(steps)
            self._plan()
        for kind in self._kinds:
            kind.solve(steps)
        zeros: Zeros = {}
        for kind in self._kinds:
            zeros |= kind.write_()
        return zeros

    def settle(self, steps: dict[str, float]) -> None:
        for kind in self._on_device:
            kind.settle(steps)


def _device(target: Target) -> torch.device | None:
    """Return where a target's weights are; None for several devices."""
    devices = {place.parameter.device for place in target.places}
    return devices.pop() if len(devices) == 1 else None


def _in_rounds(targets: Sequence[Target]) -> list[list[Target]]:
    """Return the targets in order, a new round where a parameter's numbers are in other groups of an earlier one."""
    rounds: list[list[Target]] = []
    last: dict[int, tuple[int, tuple[int, ...]]] = {}
    for target in targets:
        turn = 0
        for place in target.places:
            before, axes = last.get(id(place.parameter), (0, place.axes))
            turn = max(turn, before + (axes != place.axes))
        for place in target.places:
            last[id(place.parameter)] = turn, place.axes
        rounds.extend([] for _ in range(turn + 1 - len(rounds)))
        rounds[turn].append(target)
    return rounds
