"""Penalties on norms, solved on the accelerator where the weights are: nothing waits for the host.

What is wrong can't be told at once then. Where a norm is not finite, all factors are 1 and a mark is set; the next step
reads the mark, which is there by then, and raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from tying.axes import squares_anywhere
from tying.errors import PenaltyError
from tying.penalties.norms import OnNorms
from tying.penalties.segmented import shrink_segmented
from tying.train.rules import Target
from tying.train.scattered import Weights
from tying.train.shrink import Steps, check


class OnDevice:
    """Targets whose parameters are plain tensors on one device."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = targets
        self._weights = Weights([place for target in targets for place in target.places])
        self._thresholds = {target.key: _thresholds(target) for target in targets}
        self._positions = {target.key: _positions(target) for target in targets}
        self._solved: list[Target] = []
        self._factors = torch.empty(0)
        self._bad: Tensor | None = None

    def solve(self, steps: Steps) -> None:
        """Find what every group is multiplied by.

        Raises:
            PenaltyError: Names the parameter that had NaN or infinity in it at the last step.
        """
        self.settle()
        self._solved = [target for target in self._targets if steps[target.key] > 0]
        if not self._solved:
            return
        norms = torch.cat([self._squares(target) for target in self._solved]).sqrt()
        thresholds = torch.cat([self._thresholds[target.key] * steps[target.key] for target in self._solved])
        self._bad = ~norms.isfinite().all()
        safe = torch.where(self._bad, 0.0, norms)
        shrunk = shrink_segmented(safe, thresholds, [target.count for target in self._solved])
        ratio = torch.where(shrunk > 0, shrunk / safe, 0.0)
        self._factors = torch.where(self._bad, 1.0, ratio)

    def write_(self) -> dict[str, Tensor]:
        """Multiply the weights; return which groups are zero, by the key of their target."""
        if not self._solved:
            return {}
        self._weights.multiply_(self._solved, self._factors)
        zero = (self._factors == 0).split([target.count for target in self._solved])
        return {target.key: part for target, part in zip(self._solved, zero, strict=True)}

    def settle(self) -> None:
        """Raise `PenaltyError` if a parameter had NaN or infinity in it at the last step; waits for that step."""
        if self._bad is None or not bool(self._bad):
            return
        self._bad = None
        for target in self._solved:
            sums = [squares_anywhere(place.parameter, place.axes).cpu().numpy() for place in target.places]
            check(target.places, sums)
        raise PenaltyError(
            f"{self._solved[0].name}: expected finite weights at the last step, got NaN or infinity in some that are "
            "finite again; the penalties left that step out: call prox_() for it"
        )

    def _squares(self, target: Target) -> Tensor:
        """Return the squared norms of a target's groups, formed in float64: to look whether to would be to wait."""
        sums = [self._weights.squares(place, precise=True) for place in target.places]
        positions = self._positions[target.key]
        if positions is None:
            return sums[0]
        # Gathered and then summed: to scatter sums onto groups gives other bits at every run.
        return torch.cat([*sums, sums[0].new_zeros(1)])[positions].sum(dim=1)


def _thresholds(target: Target) -> Tensor:
    values = cast(OnNorms, target.penalty).thresholds(target.count, 1.0)
    return torch.from_numpy(values).to(target.places[0].parameter.device)


def _positions(target: Target) -> Tensor | None:
    """Return the positions of every group, `(G, most)`, all places counted through; padded with the number of all."""
    if target.places[0].labels is None:
        return None
    labels = torch.cat([torch.as_tensor(place.labels) for place in target.places])
    members = [(labels == group).nonzero()[:, 0] for group in range(target.count)]
    padded = torch.nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=len(labels))
    return padded.to(target.places[0].parameter.device)
