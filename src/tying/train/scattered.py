"""Parameters on accelerators, or sharded over ranks: the norms of their groups travel, their weights don't."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tying.axes import broadcast, in_memory_order, multiply_, scaled, squares, squares_anywhere
from tying.penalties.arrays import Vector
from tying.train.rules import Place, Target
from tying.train.shards import Message, is_sharded, local, piece_of
from tying.train.shrink import Steps, check, factors, join, starts


class Scattered:
    """Penalties on norms, of parameters anywhere: one copy of the norms from each accelerator, one sum over ranks."""

    def __init__(self, targets: Sequence[Target], watched: Sequence[Place]) -> None:
        self._targets = targets
        # Of the watched only this rank's numbers are known here, but every rank must refuse what one refuses.
        self._watched = [replace(place, axes=()) for place in watched]
        self._weights = Weights([*(place for target in targets for place in target.places), *self._watched])
        self._message = Message(list(self._weights.pieces.values()))
        self._solved: list[Target] = []
        self._factors: Vector = np.empty(0)

    def solve(self, steps: Steps) -> None:
        """Find what every group is multiplied by.

        Raises:
            PenaltyError: Names the parameter that has NaN or infinity in it: on every rank, if one of them has.
        """
        self._solved = [target for target in self._targets if steps[target.key] > 0]
        sums = self._sums([place for target in self._solved for place in target.places])
        check(self._watched, [sums[place] for place in self._watched])

        def again(target: Target) -> list[Vector]:
            plain = [place for place in target.places if not is_sharded(place.parameter)]
            precise = _on_host([squares_anywhere(place.parameter, place.axes) for place in plain])
            return [{**sums, **dict(zip(plain, precise, strict=True))}[place] for place in target.places]

        if self._solved:
            found = np.concatenate([join(target, [sums[place] for place in target.places]) for target in self._solved])
            self._factors = factors(found, self._solved, steps, again)

    def write_(self) -> dict[str, Tensor]:
        """Multiply the weights; return which groups are zero, by the key of their target."""
        if not self._solved:
            return {}
        factors = torch.from_numpy(self._factors)
        self._weights.multiply_(self._solved, factors, some_are_zero=not self._factors.all())
        return {
            t.key: factors[at : at + t.count] == 0 for at, t in zip(starts(self._solved), self._solved, strict=True)
        }

    def _sums(self, places: Sequence[Place]) -> dict[Place, Vector]:
        """Return Σ w² at every position of the axes of each place, over all ranks that have shards of it."""
        known = [*places, *self._watched]
        sums = dict(zip(known, _on_host([self._weights.squares(place) for place in known]), strict=True))
        sharded = self._weights.pieces
        return sums | dict(zip(sharded, self._message([sums.get(place) for place in sharded]), strict=True))


class Weights:
    """The parameters at places, as far as this rank has them; they may get other memory at any time."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.pieces = {p: piece_of(p.name, p.parameter, p.axes) for p in places if is_sharded(p.parameter)}
        self._known: dict[Place, tuple[object, Tensor | None]] = {}
        self._groups: dict[tuple[Place, torch.device], Tensor] = {}

    def squares(self, place: Place, *, precise: bool = False) -> Tensor:
        """Return Σ w² at every position of the place's axes that is here, `(n,)` float64."""
        view = None if is_sharded(place.parameter) else self._view(place)
        if view is None:
            return squares_anywhere(local(place.parameter), place.axes)
        return squares(view, precise=precise)

    def multiply_(self, targets: Sequence[Target], factors: Tensor, *, some_are_zero: bool = True) -> None:
        """Multiply every group by its factor, `(n,)` float64 on any device, target after target."""
        pairs = self._pairs(targets, factors)
        multiply_([view for view, _ in pairs], [own for _, own in pairs], some_are_zero=some_are_zero)

    def make_zero_(self, targets: Sequence[Target], dead: Tensor) -> None:
        """Make groups zero, whatever is in them: `(n,)` bool on any device, target after target."""
        for view, mask in self._pairs(targets, dead):
            view.masked_fill_(mask, 0.0)

    def _pairs(self, targets: Sequence[Target], values: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return views of the parameters that are not frozen, and what belongs to their groups, to be broadcast."""
        pairs: list[tuple[Tensor, Tensor]] = []
        there = {values.device: values}  # sent once to each device, whole
        for at, target in zip(starts(targets), targets, strict=True):
            for place in target.places:
                if not place.parameter.requires_grad:
                    continue
                parameter = local(place.parameter)
                if parameter.device not in there:
                    there[parameter.device] = values.to(parameter.device)
                mine = self._at_positions(place, there[parameter.device][at : at + target.count])
                if mine.is_floating_point():
                    mine = mine.to(torch.float64 if parameter.dtype == torch.float64 else torch.float32)
                view = self._view(place)
                pairs.append(broadcast(parameter, place.axes, mine) if view is None else scaled(view, mine))
        return pairs

    def _at_positions(self, place: Place, values: Tensor) -> Tensor:
        """Return what belongs to every position of a place that is here; to those in no group, 1 or False."""
        if place.labels is None and place not in self.pieces:
            return values
        if (place, values.device) not in self._groups:
            labels = np.arange(len(values)) if place.labels is None else place.labels
            here = labels[self.pieces[place].positions] if place in self.pieces else labels
            self._groups[place, values.device] = torch.from_numpy(here).to(values.device)
        none = values.new_full((1,), values.is_floating_point())
        return torch.cat([values, none])[self._groups[place, values.device]]

    def _view(self, place: Place) -> Tensor | None:
        """Return a view of a parameter in the order of its memory, made anew where it has got other memory."""
        parameter = local(place.parameter)
        memory = (parameter.data_ptr(), parameter.stride(), parameter.dtype)
        known, view = self._known.get(place, (None, None))
        if known != memory:
            with torch.inference_mode(False):  # a view made in inference mode can't be written to outside of it
                view = in_memory_order(parameter, place.axes)
            self._known[place] = memory, view
        return view


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
