"""One step of the penalties over all parameters: results are computed and checked before weights are written.

A penalty on the norms of groups never needs a matrix: squares are summed at the speed of memory, the norms of many
targets are shrunk in one call, and the weights are multiplied in place. Beside the norms nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tying.axes import squares_anywhere
from tying.penalties.norms import acts_on_norms
from tying.penalties.tensors import Vector
from tying.train.on_device import OnDevice
from tying.train.on_numbers import OnNumbers
from tying.train.resident import Resident
from tying.train.rules import Target
from tying.train.scattered import Scattered, Weights
from tying.train.shards import is_sharded
from tying.train.shrink import Steps, factors

Zeros = dict[str, Tensor]
"""Which groups are zero after a prox, by the key of their target: `(G,)` bool, or `_UNTOLD`."""

_UNTOLD = torch.empty(0, dtype=torch.bool)
_CPU = torch.device("cpu")

_CACHED = 8 << 20
"""Bytes of weights that are read and then written while they are still in the processor's cache."""


class Sweep:
    """The targets of a handle in rounds: within one, every number of a parameter is in one group."""

    def __init__(self, targets: Sequence[Target], *, tell_zeros: bool, asynchronous: bool = False) -> None:
        self.targets = targets
        self._weights = Weights([place for target in targets for place in target.places])
        self._rounds = [_Round(some, tell_zeros, asynchronous) for some in _in_rounds(targets)]

    def step_(self, steps: dict[str, float]) -> Iterator[Zeros]:
        """Apply the proxes; yield what is zero in the targets whose step has been taken, and is 0 in `steps` now.

        Plain parameters on the CPU come in sets of 8 MB, so that each is read from memory once.

        Raises:
            PenaltyError: Names the parameter that has NaN or infinity in it. Neither its set nor what comes after has
                changed then; the steps of the sets before it are taken.
        """
        for some in self._rounds:
            for done in some.step_(steps):
                steps.update(dict.fromkeys(done, 0.0))
                yield done

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
        # Sharded first: once their message is sent, what is wrong on one rank is told on all of them.
        watched = [target.places[0] for target in numbers]
        self._fixed = Scattered(sharded, watched), OnNumbers(numbers, tell_zeros)
        self._plain = [target for target in norms if target not in sharded]
        self._parameters = [place.parameter for target in self._plain for place in target.places]
        self._on_device: list[OnDevice] = []
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
        self._elsewhere = Scattered([target for some in by_device.values() for target in some], ())
        self._sets = [_Set(some, self._tell_zeros) for some in _cached(here)]

    def step_(self, steps: dict[str, float]) -> Iterator[Zeros]:
        """Apply the proxes; yield what is zero in the targets whose step is taken."""
        if [parameter.device for parameter in self._parameters] != self._devices:  # the model was moved
            self.settle(steps)
            self._plan()
        others = *self._fixed, self._elsewhere
        for kind in (*others, *self._on_device):
            kind.solve(steps)
        for some in self._sets:
            yield some.step_(steps)
        for kind in others:
            yield kind.write_()
        for kind in self._on_device:
            yield dict.fromkeys(kind.write_(), _UNTOLD)

    def settle(self, steps: dict[str, float]) -> None:
        for kind in self._on_device:
            kind.settle(steps)


class _Set:
    """Plain parameters that stay in the cache between being read and being written."""

    def __init__(self, targets: Sequence[Target], tell_zeros: bool) -> None:
        self._targets, self._tell_zeros = targets, tell_zeros
        self._stepped: list[Target] = []
        self._resident = Resident(())

    def step_(self, steps: Steps) -> Zeros:
        stepped = [target for target in self._targets if steps[target.key] > 0]
        if not stepped:
            return {}
        if stepped != self._stepped:
            self._stepped, self._resident = stepped, Resident(stepped)
        found = factors(self._resident.squares(), stepped, steps, _again)
        self._resident.multiply_(found)
        if not self._tell_zeros:
            return {target.key: _UNTOLD for target in stepped}
        zero = torch.from_numpy(found == 0).split([target.count for target in stepped])
        return {target.key: part for target, part in zip(stepped, zero, strict=True)}


def _again(target: Target) -> list[Vector]:
    return [squares_anywhere(place.parameter, place.axes).numpy() for place in target.places]


def _device(target: Target) -> torch.device | None:
    """Return where a target's weights are; None for several devices."""
    devices = {place.parameter.device for place in target.places}
    return devices.pop() if len(devices) == 1 else None


def _cached(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """Yield neighbouring targets whose weights stay in the cache together."""
    some: list[Target] = []
    held = 0
    for target in targets:
        size = sum(place.parameter.numel() * place.parameter.element_size() for place in target.places)
        if some and held + size > _CACHED:
            yield some
            some, held = [], 0
        some.append(target)
        held += size
    if some:
        yield some


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
