"""Parameters in this machine's memory, prepared: beyond the arithmetic, a step costs a few microseconds for each.

What does not change between two steps (views of the weights, where their sums and their factors lie) is made once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tying.axes import adder, broadcast, finer, in_memory_order, multiply_, quiet, scaled, squares_anywhere
from tying.penalties.arrays import Vector
from tying.train.rules import Place, Target
from tying.train.shrink import Labels, Steps, by_label, factors, starts


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
        spans = [slice(at, at + target.count) for at, target in zip(starts(targets), targets, strict=True)]
        self._places = [(place, span) for target, span in zip(targets, spans, strict=True) for place in target.places]
        self._parameters = [place.parameter for place, _ in self._places]
        self._count = sum(target.count for target in targets)
        self._memory: object = None
        self._adders: list[tuple[slice, Callable[[], Vector], Labels | None]] = []
        self._scale = torch.empty(0)
        """Every group's factor; where groups lie in it one after the other, what multiplies is a view of it."""
        self._fills: list[Callable[[], object]] = []
        """Bring the factors to where they don't."""
        self._pairs: tuple[list[Tensor], list[Tensor]] = [], []

    def squares(self) -> Vector:
        """Return the squared norms of all groups."""
        self._prepare()
        totals = np.zeros(self._count)
        with quiet():
            for span, add, labels in self._adders:
                if labels is None:
                    totals[span] = add()
                else:
                    totals[span] += by_label(labels, add(), span.stop - span.start)
        return totals

    def multiply_(self, factors: Vector) -> None:
        """Multiply every group by its factor; `squares` comes first. Of what is frozen now, nothing changes."""
        self._scale.copy_(torch.from_numpy(factors))
        for fill in self._fills:
            fill()
        multiply_(*self._pairs, some_are_zero=not factors.all())

    def _prepare(self) -> None:
        memory = [(p.data_ptr(), p.stride(), p.requires_grad) for p in self._parameters]
        if memory == self._memory:
            return
        with torch.inference_mode(False):  # views made in inference mode could not be written to outside of it
            precise = any(parameter.dtype == torch.float64 for parameter in self._parameters)
            self._scale = torch.empty(self._count, dtype=torch.float64 if precise else torch.float32)
            self._adders, self._fills = [], []
            pairs: list[tuple[Tensor, Tensor]] = []
            for place, span in self._places:
                view = in_memory_order(place.parameter.detach(), place.axes)
                add = partial(_squares_with_gaps, place) if view is None else adder(view)
                self._adders.append((span, add, place.labels))
                if place.parameter.requires_grad:
                    pairs.append(self._pair(place, view, self._scale[span]))
        # Those that were read last are written first: they may still be in the cache.
        self._pairs = [view for view, _ in reversed(pairs)], [own for _, own in reversed(pairs)]
        self._memory = memory

    def _pair(self, place: Place, view: Tensor | None, factors: Tensor) -> tuple[Tensor, Tensor]:
        """Return a view of a parameter, and what it is multiplied by, once the fills are done."""
        if place.labels is not None:
            index = torch.from_numpy(np.where(place.labels < 0, len(factors), place.labels).astype(np.int32))
            joined, factors = factors, factors.new_empty(len(index))
            self._fills.append(partial(_gather_, factors, joined, index))
        if view is None:
            return broadcast(place.parameter.detach(), place.axes, factors)
        view, repeats = finer(view)
        if repeats > 1:
            once, factors = factors, factors.new_empty(len(factors) * repeats)
            self._fills.append(partial(factors.view(-1, repeats).copy_, once[:, None]))
        return scaled(view, factors)


def _gather_(out: Tensor, factors: Tensor, index: Tensor) -> None:
    """Write the factor at every index; 1 for the index behind the last."""
    torch.index_select(torch.cat([factors, factors.new_ones(1)]), 0, index, out=out)


def _squares_with_gaps(place: Place) -> Vector:
    return squares_anywhere(place.parameter, place.axes).numpy()


def _again(target: Target) -> list[Vector]:
    return [_squares_with_gaps(place) for place in target.places]
