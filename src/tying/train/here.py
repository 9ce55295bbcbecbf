"""Parameters in this machine's memory, prepared: beyond the arithmetic, a step costs a few microseconds for each.

What does not change between two steps (views of the weights, where their sums and their factors lie) is made once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tying.axes import adder, broadcast, finer, in_memory_order, multiply_, quiet, scaled, squares_anywhere
from tying.penalties.tensors import Vector
from tying.train.rules import Place, Target
from tying.train.shrink import Steps, factors


class Here:
    """Targets whose parameters are plain tensors on the CPU, under penalties on norms."""

    def __init__(self, targets: Sequence[Target], tell_zeros: bool) -> None:
        self._targets, self._tell_zeros = targets, tell_zeros
        self._stepped: list[Target] = []
        self._groups = GroupsHere(())
        self._factors = np.empty(0)

    def solve(self, steps: Steps) -> None:
        """Find what every group is multiplied by.

        Raises:
            PenaltyError: Names the parameter that has NaN or infinity in it.
        """
        stepped = [target for target in self._targets if steps[target.key] > 0]
        if stepped != self._stepped:
            self._stepped, self._groups = stepped, GroupsHere(stepped)
        if stepped:
            self._factors = factors(self._groups.squares(), stepped, steps, _again)

    def write_(self) -> dict[str, Tensor]:
        """Multiply the weights; return which groups are zero, by the key of their target, if that was asked for."""
        if self._stepped:
            self._groups.multiply_(self._factors)
        if not self._tell_zeros or not self._stepped:
            return {}
        zero = torch.from_numpy(self._factors == 0).split([target.count for target in self._stepped])
        return {target.key: part for target, part in zip(self._stepped, zero, strict=True)}


class GroupsHere:
    """The groups of targets, target after target, prepared."""

    def __init__(self, targets: Sequence[Target]) -> None:
        firsts = np.cumsum([0, *(target.count for target in targets)]).tolist()
        self._count = int(firsts[-1])
        self._places = [(place, firsts[turn]) for turn, target in enumerate(targets) for place in target.places]
        self._parameters = [place.parameter for place, _ in self._places]
        self._memory: object = None
        self._adders: list[tuple[slice, Callable[[], Vector]]] = []
        self._views: list[Tensor] = []
        self._factors: list[Tensor] = []
        self._positions = torch.empty(0)
        """What is multiplied by: `_factors` are views of it."""
        self._groups: Tensor | None = None
        """The group of every position; None: they are the groups."""

    def squares(self) -> Vector:
        """Return the squared norms of all groups."""
        self._prepare()
        sums = np.empty(len(self._positions))
        with quiet():
            for span, add in self._adders:
                sums[span] = add()
        if self._groups is None:
            return sums
        joined = np.bincount(self._groups.numpy(), weights=sums, minlength=self._count + 1)
        return cast(Vector, joined[: self._count])

    def multiply_(self, factors: Vector) -> None:
        """Multiply every group by its factor; of parameters that are frozen now, nothing changes."""
        self._prepare()
        given = torch.from_numpy(factors)
        if self._groups is not None:
            given = torch.cat([given, given.new_ones(1)]).index_select(0, self._groups)
        self._positions.copy_(given)
        multiply_(self._views, self._factors, some_are_zero=not factors.all())

    def _prepare(self) -> None:
        memory = [(p.data_ptr(), p.stride(), p.requires_grad) for p in self._parameters]
        if memory == self._memory:
            return
        with torch.inference_mode(False):  # views made in inference mode could not be written to outside of it
            self._prepare_views()
        self._memory = memory

    def _prepare_views(self) -> None:
        readings = [(place, *_read(place), first) for place, first in self._places]
        groups = [_groups(place, repeats, first, self._count) for place, _, repeats, first in readings]
        sizes = [len(mine) for mine in groups]
        precise = any(parameter.dtype == torch.float64 for parameter in self._parameters)
        self._positions = torch.empty(sum(sizes), dtype=torch.float64 if precise else torch.float32)
        self._adders, self._views, self._factors = [], [], []
        stop = 0
        for (place, view, _, _), own in zip(readings, self._positions.split(sizes), strict=True):
            self._adders.append((slice(stop, stop := stop + len(own)), _adder(place, view)))
            if place.parameter.requires_grad:
                pair = broadcast(place.parameter.detach(), place.axes, own) if view is None else scaled(view, own)
                self._views.append(pair[0])
                self._factors.append(pair[1])
        self._views.reverse()  # those that were read last are written first: they may still be in the cache
        self._factors.reverse()
        joined = np.concatenate(groups)
        plain = np.array_equal(joined, np.arange(self._count))
        self._groups = None if plain else torch.from_numpy(joined.astype(np.int32))


def _again(target: Target) -> list[Vector]:
    return [squares_anywhere(place.parameter, place.axes).numpy() for place in target.places]


def _read(place: Place) -> tuple[Tensor | None, int]:
    """Return a view and how many of its positions a group has at each of its own; None where there is no view."""
    view = in_memory_order(place.parameter.detach(), place.axes)
    return (None, 1) if view is None else finer(view)


def _adder(place: Place, view: Tensor | None) -> Callable[[], Vector]:
    return partial(_squares_with_gaps, place) if view is None else adder(view)


def _squares_with_gaps(place: Place) -> Vector:
    return squares_anywhere(place.parameter, place.axes).numpy()


def _groups(place: Place, repeats: int, first: int, none: int) -> NDArray[np.intp]:
    """Return the group of every position of a place: its label after `first`, or `none`."""
    count = int(np.prod([place.parameter.shape[axis] for axis in place.axes], dtype=np.intp))
    labels = np.arange(count) if place.labels is None else place.labels
    return np.repeat(np.where(labels < 0, none, labels + first), repeats)
