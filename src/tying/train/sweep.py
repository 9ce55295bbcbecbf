"""One step of the penalties over all parameters: results are computed and checked before weights are written.

A penalty on the norms of groups never needs a matrix: squares are summed at the speed of memory, the norms of many
targets are shrunk in one call, and the weights are multiplied in place. Beside the norms nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tying.axes import squares_anywhere
from tying.penalties.norms import OnNorms
from tying.train.on_device import OnDevice
from tying.train.on_numbers import OnNumbers
from tying.train.resident import Resident
from tying.train.rules import Target
from tying.train.scattered import Scattered, Weights
from tying.train.shards import is_sharded
from tying.train.shrink import Steps, Vector, factors

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

    def settle(self) -> None:
        """Raise what a step that nobody waited for would have raised."""
        for some in self._rounds:
            some.settle()

    def bury_(self, dead: Zeros) -> None:
        """Make groups zero."""
        buried = [target for target in self.targets if target.key in dead and dead[target.key].any()]
        if buried:
            self._weights.multiply_(buried, torch.cat([(~dead[target.key]).double() for target in buried]))


class _Round:
    def __init__(self, targets: Sequence[Target], tell_zeros: bool, asynchronous: bool) -> None:
        self._settings = targets, tell_zeros, asynchronous
        numbers = [target for target in targets if not isinstance(target.penalty, OnNorms)]
        norms = [target for target in targets if isinstance(target.penalty, OnNorms) and target.count]
        devices = {target: _device(target) for target in norms}
        here = [target for target in norms if devices[target] == _CPU and not asynchronous]
        alone = {device for device in devices.values() if device is not None and asynchronous}
        elsewhere = [target for target in norms if devices[target] is None or not (asynchronous or target in here)]
        self._here = [place.parameter for target in here for place in target.places]
        self._on_device = [OnDevice([t for t in norms if devices[t] == device]) for device in sorted(alone, key=str)]
        # Scattered first: once its message is sent, what is wrong on one rank is told on all of them.
        self._others = (
            Scattered(elsewhere, [target.places[0] for target in numbers]),
            OnNumbers(numbers, tell_zeros),
            *self._on_device,
        )
        self._sets = [_Set(some, tell_zeros) for some in _cached(here)]

    def step_(self, steps: dict[str, float]) -> Iterator[Zeros]:
        """Apply the proxes; yield what is zero in the targets whose step is taken."""
        if not all(parameter.is_cpu for parameter in self._here):  # the model was moved to an accelerator
            self.__init__(*self._settings)
        for kind in self._others:
            kind.solve(steps)
        for some in self._sets:
            yield some.step_(steps)
        for kind in self._others:
            yield kind.write_()

    def settle(self) -> None:
        for kind in self._on_device:
            kind.settle()


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
    """Return where a target's weights are; None for several devices, or ranks."""
    if any(is_sharded(place.parameter) for place in target.places):
        return None
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
