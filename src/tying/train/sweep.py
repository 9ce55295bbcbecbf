"""One step of the penalties over all parameters: every result is computed, and checked, before a weight is written.

A penalty on the norms of groups never needs a matrix: squares are summed at the speed of memory, the norms of many
targets are shrunk in one call, and the weights are multiplied in place. Beside the norms nothing is allocated. The
other penalties, on every number, get their matrix.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tying.axes import broadcast, in_memory_order, scaled, squares, squares_anywhere
from tying.errors import PenaltyError
from tying.groups import Groups
from tying.penalties.norms import OnNorms
from tying.penalties.prox import check_finite
from tying.penalties.sorted_l1 import shrink_sorted
from tying.train.rules import Place, Target
from tying.train.shards import Message, is_sharded, local, piece_of

Steps = Mapping[str, float]
"""The step size of every target, by its key; at 0 it is left alone."""
Zeros = dict[str, Tensor]
"""Which groups are zero after a prox, by the key of their target: `(G,)` bool."""
Vector = NDArray[np.float64]

_SOLVED = 4096
"""Norms that are shrunk in one call, which works on a dozen copies of them."""
_SAFE = (1e-24, 1e30)
"""Where the largest square of a target is formed in float32 without losing what counts."""


class Sweep:
    """The targets of a handle in rounds: within one, every number of a parameter is in one group."""

    def __init__(self, targets: Sequence[Target], *, tell_zeros: bool) -> None:
        self._targets = targets
        self._views = _Views(targets)
        self._rounds = [(_OnNorms(some, self._views), _OnNumbers(some, tell_zeros)) for some in _in_rounds(targets)]

    def step_(self, steps: Steps) -> Zeros:
        """Apply the proxes.

        Raises:
            PenaltyError: Names the parameter that has NaN or infinity in it; no weight has changed then.
        """
        zeros: Zeros = {}
        for kinds in self._rounds:
            for kind in kinds:
                kind.solve(steps)
            for kind in kinds:
                zeros |= kind.write_()
        return zeros

    def bury_(self, dead: Zeros) -> None:
        """Make groups zero."""
        buried = [target for target in self._targets if target.key in dead and dead[target.key].any()]
        self._views.multiply_(buried, [(~dead[target.key]).double() for target in buried])


class _OnNorms:
    """Penalties on the norms of groups: of the weights, nothing is held but views."""

    def __init__(self, targets: Sequence[Target], views: _Views) -> None:
        self._targets = [target for target in targets if isinstance(target.penalty, OnNorms) and target.count]
        self._views = views
        self._sharded = [place for target in self._targets for place in target.places if is_sharded(place.parameter)]
        # Of the others only this rank's numbers are known here, but every rank must refuse what one refuses.
        others = [target.places[0] for target in targets if not isinstance(target.penalty, OnNorms)]
        self._watched = [replace(place, axes=()) for place in others if is_sharded(place.parameter)]
        self._message = Message([piece_of(p.name, p.parameter, p.axes) for p in self._sharded + self._watched])
        self._solved: list[Target] = []
        self._factors: Vector = np.empty(0)

    def solve(self, steps: Steps) -> None:
        """Find what every group is multiplied by."""
        self._solved = [target for target in self._targets if steps[target.key] > 0]
        norms = np.sqrt(self._squares())
        for some, span in _sets(self._solved):
            thresholds = [cast(OnNorms, t.penalty).thresholds(t.count, steps[t.key]) for t in some]
            shrunk = shrink_sorted(norms[span], np.concatenate(thresholds), [t.count for t in some])
            norms[span] = np.divide(shrunk, norms[span], out=np.zeros_like(shrunk), where=shrunk > 0)
        self._factors = norms

    def write_(self) -> Zeros:
        """Multiply the weights."""
        if not self._solved:
            return {}
        counts = [target.count for target in self._solved]
        self._views.multiply_(self._solved, torch.from_numpy(self._factors).split(counts))
        zero = torch.from_numpy(self._factors == 0).split(counts)
        return {target.key: part for target, part in zip(self._solved, zero, strict=True)}

    def _squares(self) -> Vector:
        """Return the squared norms of all groups, target after target."""
        sums = self._sums([place for target in self._solved for place in target.places])
        if not self._solved:
            return np.empty(0)
        totals = np.concatenate([_join(target, [sums[place] for place in target.places]) for target in self._solved])
        starts = np.cumsum([0, *(target.count for target in self._solved[:-1])])
        peaks = np.maximum.reduceat(totals, starts)
        for index in np.flatnonzero(~((peaks > _SAFE[0]) & (peaks < _SAFE[1]))):
            target = self._solved[index]
            plain = [place for place in target.places if not is_sharded(place.parameter)]
            precise = _on_host([squares_anywhere(place.parameter, place.axes) for place in plain])
            sums |= zip(plain, precise, strict=True)
            _check(target.places, sums)
            totals[starts[index] :][: target.count] = _join(target, [sums[place] for place in target.places])
        return totals

    def _sums(self, places: Sequence[Place]) -> dict[Place, Vector]:
        """Return Σ w² at every position of the axes of each place, over all ranks that have shards of it."""
        everywhere = self._sharded + self._watched
        known = [*places, *self._watched]
        sums = dict(zip(known, _on_host([self._views.squares(place) for place in known]), strict=True))
        sums |= zip(everywhere, self._message([sums.get(place) for place in everywhere]), strict=True)
        _check(self._watched, sums)
        return sums


class _OnNumbers:
    """The other penalties: their prox takes a matrix and gives a new one."""

    def __init__(self, targets: Sequence[Target], tell_zeros: bool) -> None:
        self._targets = [target for target in targets if not isinstance(target.penalty, OnNorms)]
        places = [target.places[0] for target in self._targets if tell_zeros]
        self._sharded = [place for place in places if is_sharded(place.parameter)]
        self._message = Message([piece_of(p.name, p.parameter, p.axes) for p in self._sharded])
        self._solved: list[tuple[Target, Tensor]] = []

    def solve(self, steps: Steps) -> None:
        """Compute the proxes."""
        self._solved = []
        for target in self._targets:
            if steps[target.key] > 0:
                with _named(target.name):
                    matrix = cast(Groups, target.groups).read(local(target.places[0].parameter))
                    self._solved.append((target, target.penalty.prox(matrix, steps[target.key])))

    def write_(self) -> Zeros:
        """Write them."""
        found: dict[Place, Tensor] = {}
        for target, matrix in self._solved:
            parameter = local(target.places[0].parameter)
            parameter.copy_(cast(Groups, target.groups).write(matrix, parameter.shape))
            found[target.places[0]] = matrix.any(dim=1).cpu()
        here = [found[place].double().numpy() if place in found else None for place in self._sharded]
        found |= {
            place: torch.from_numpy(count) for place, count in zip(self._sharded, self._message(here), strict=True)
        }
        zeros = {target.key: found[target.places[0]] == 0 for target, _ in self._solved}
        self._solved = []
        return zeros


class _Views:
    """Parameters as `(A, n, B)` views, made anew where a parameter has got other memory."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._known: dict[Place, tuple[object, Tensor | None]] = {}
        self._pieces = {
            place: piece_of(place.name, place.parameter, place.axes)
            for target in targets
            for place in target.places
            if is_sharded(place.parameter)
        }

    def of(self, place: Place) -> Tensor | None:
        """Return the view; None where there is none."""
        parameter = local(place.parameter)
        memory = (parameter.data_ptr(), parameter.stride(), parameter.dtype)
        known, view = self._known.get(place, (None, None))
        if known != memory:
            view = in_memory_order(parameter, place.axes)
            self._known[place] = memory, view
        return view

    def squares(self, place: Place) -> Tensor:
        """Return Σ w² at every position of the place's axes that is here, `(n,)` float64."""
        view = None if is_sharded(place.parameter) else self.of(place)
        return squares_anywhere(local(place.parameter), place.axes) if view is None else squares(view)

    def multiply_(self, targets: Sequence[Target], factors: Sequence[Tensor]) -> None:
        """Multiply every group of the targets by its factor, `(G,)` float64 each."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for target, own in zip(targets, factors, strict=True):
            for place in target.places:
                mine = own if place.labels is None else torch.cat([own, own.new_ones(1)])[place.labels]
                if place in self._pieces:
                    mine = mine[self._pieces[place].positions]
                parameter = local(place.parameter)
                mine = mine.to(parameter.device, torch.float64 if parameter.dtype == torch.float64 else torch.float32)
                view = self.of(place)
                pairs.append(broadcast(parameter, place.axes, mine) if view is None else scaled(view, mine))
        if pairs:  # backwards: those that were read last are still in the processor's cache
            views, matching = zip(*reversed(pairs), strict=True)
            torch._foreach_mul_(views, matching)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


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


def _sets(targets: Sequence[Target]) -> Iterator[tuple[list[Target], slice]]:
    """Yield neighbouring targets whose norms are shrunk in one call, and where those are."""
    some: list[Target] = []
    start = stop = 0
    for target in targets:
        if some and stop + target.count - start > _SOLVED:
            yield some, slice(start, stop)
            some, start = [], stop
        some.append(target)
        stop += target.count
    if some:
        yield some, slice(start, stop)


def _on_host(vectors: list[Tensor]) -> list[Vector]:
    """Return vectors as NumPy's: one copy from each accelerator."""
    found: dict[int, Vector] = {}
    for device in {vector.device for vector in vectors}:
        mine = [index for index, vector in enumerate(vectors) if vector.device == device]
        parts = [vectors[index] for index in mine]
        if device.type != "cpu":
            parts = torch.cat(parts).cpu().split([len(part) for part in parts])
        found |= {index: part.numpy() for index, part in zip(mine, parts, strict=True)}
    return [found[index] for index in range(len(vectors))]


def _join(target: Target, sums: Sequence[Vector]) -> Vector:
    """Return the squared norms of a target's groups, from the sums at the positions of its places."""
    if target.places[0].labels is None:
        return sums[0]
    total = np.zeros(target.count + 1)
    for place, own in zip(target.places, sums, strict=True):
        total += np.bincount(cast("NDArray[np.intp]", place.labels) + 1, weights=own, minlength=len(total))
    return total[1:]


def _check(places: Sequence[Place], sums: Mapping[Place, Vector]) -> None:
    for place in places:
        with _named(place.name):
            check_finite(sums[place], "group")


@contextmanager
def _named(name: str) -> Generator[None, None, None]:
    """Say of which parameter a penalty complains."""
    try:
        yield
    except PenaltyError as error:
        raise PenaltyError(f"{name}: {error}") from error
