"""Penalties on every number (Lasso, OWL, Ridge, a user's own): their prox takes a matrix and gives another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from tying.groups import Groups
from tying.train.rules import Place, Target
from tying.train.shards import Message, is_sharded, local, piece_of
from tying.train.shrink import Steps, named


class OnNumbers:
    """Targets whose penalty is not one on norms; each has one place."""

    def __init__(self, targets: Sequence[Target], tell_zeros: bool) -> None:
        self._targets = targets
        places = [target.places[0] for target in targets if tell_zeros]
        self._sharded = [place for place in places if is_sharded(place.parameter)]
        self._message = Message([piece_of(p.name, p.parameter, p.axes) for p in self._sharded])
        self._solved: list[tuple[Target, Tensor]] = []

    def solve(self, steps: Steps) -> None:
        """Compute the proxes.

        Raises:
            PenaltyError: Names the parameter that has NaN or infinity in it.
        """
        self._solved = []
        for target in self._targets:
            if steps[target.key] > 0:
                with named(target.name):
                    matrix = cast(Groups, target.groups).read(local(target.places[0].parameter))
                    self._solved.append((target, target.penalty.prox(matrix, steps[target.key])))

    def write_(self) -> dict[str, Tensor]:
        """Write them; return which groups are zero, by the key of their target."""
        found: dict[Place, Tensor] = {}
        for target, matrix in self._solved:
            parameter = local(target.places[0].parameter)
            if target.places[0].parameter.requires_grad:
                parameter.copy_(cast(Groups, target.groups).write(matrix, parameter.shape))
            found[target.places[0]] = matrix.any(dim=1).cpu()
        here = [found[place].double().numpy() if place in found else None for place in self._sharded]
        counts = self._message(here)
        found |= {place: torch.from_numpy(count) for place, count in zip(self._sharded, counts, strict=True)}
        zeros = {target.key: found[target.places[0]] == 0 for target, _ in self._solved}
        self._solved = []
        return zeros
