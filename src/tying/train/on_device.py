"""Penalties on norms, solved on the accelerator where the weights are: nothing waits for the host.

What is wrong can't be told at once then. Where a norm is not finite, all factors are 1; which targets that were is on
its way to the host, and is read, and told, at the next prox.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import cast

import numpy as np
import torch
from torch import Tensor

from tying.errors import PenaltyError
from tying.penalties.norms import OnNorms
from tying.penalties.segmented import shrink_segmented
from tying.train.rules import Target
from tying.train.scattered import Weights


class OnDevice:
    """Targets whose parameters are plain tensors on one device."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = targets
        self._weights = Weights([place for target in targets for place in target.places])
        self._thresholds = {target.key: _thresholds(target) for target in targets}
        self._joins = {target.key: _Join(target) for target in targets if target.places[0].labels is not None}
        self._solved: dict[Target, float] = {}
        self._factors = torch.empty(0)
        self._bad: _OnItsWay | None = None

    def solve(self, steps: dict[str, float]) -> None:
        """Find what every group is multiplied by.

        Raises:
            PenaltyError: Names the parameter that had NaN or infinity in it at the last prox: see `settle`.
        """
        self.settle(steps)
        self._solved = {target: steps[target.key] for target in self._targets if steps[target.key] > 0}
        if not self._solved:
            return
        norms = torch.cat([self._squares(target) for target in self._solved]).sqrt()
        thresholds = torch.cat([self._thresholds[target.key] * step for target, step in self._solved.items()])
        wrong = (~norms.isfinite()).cumsum(0)
        counts = tuple(target.count for target in self._solved)
        self._bad = _OnItsWay(torch.diff(wrong[_lasts(counts, norms.device)], prepend=wrong.new_zeros(1)) > 0)
        safe = torch.where(wrong[-1] > 0, 0.0, norms)
        shrunk = shrink_segmented(safe, thresholds, counts)
        ratios = torch.where(shrunk > 0, shrunk / safe, 0.0)
        self._factors = torch.where(wrong[-1] > 0, 1.0, ratios)

    def write_(self) -> dict[str, Tensor]:
        """Multiply the weights; which groups are zero is not told."""
        if self._solved:
            self._weights.multiply_([*self._solved], self._factors)
        return {}

    def settle(self, steps: dict[str, float]) -> None:
        """Take notice of how the last prox went, which waits for it.

        Raises:
            PenaltyError: Names a parameter that had NaN or infinity in it then. Its step, and those of all others on
                this device, were left out, and are added to `steps` again.
        """
        bad, self._bad = self._bad.read() if self._bad is not None else [], None
        if not any(bad):
            return
        for target, step in self._solved.items():
            steps[target.key] += step
        first = [*self._solved][bad.index(True)]
        raise PenaltyError(
            f"{first.key}: expected finite weights at the last prox, got NaN or infinity, and "
            "left it out; training has diverged: lower the learning rate, or start again from a checkpoint"
        )

    def _squares(self, target: Target) -> Tensor:
        """Return the squared norms of a target's groups, formed in float64: to look whether to would be to wait."""
        sums = [self._weights.squares(place, precise=True) for place in target.places]
        return self._joins[target.key](torch.cat(sums)) if target.key in self._joins else sums[0]


class _Join:
    """Sums at positions, summed by group: sorted first, for to scatter sums onto groups gives other bits every time."""

    def __init__(self, target: Target) -> None:
        device = target.places[0].parameter.device
        labels = np.concatenate([cast("np.ndarray", place.labels) for place in target.places])
        order = np.argsort(labels, kind="stable")[np.count_nonzero(labels < 0) :]
        self._order = torch.from_numpy(order).to(device)
        self._lengths = torch.from_numpy(np.bincount(labels[order], minlength=target.count)).to(device)

    def __call__(self, sums: Tensor) -> Tensor:
        return torch.segment_reduce(sums[self._order], "sum", lengths=self._lengths, unsafe=True)


class _OnItsWay:
    """A few numbers of a device, copied to the host behind all that is queued there."""

    def __init__(self, values: Tensor) -> None:
        self._arrived: torch.Event | None = None
        self._values = values
        if values.device.type != "cpu":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.Event(values.device)
            self._arrived.record()

    def read(self) -> list[bool]:
        """Return them, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


@lru_cache(maxsize=16)
def _lasts(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the index of the last group of every target: sent once."""
    return torch.from_numpy(np.cumsum(counts) - 1).to(device)


def _thresholds(target: Target) -> Tensor:
    values = cast(OnNorms, target.penalty).thresholds(target.count, 1.0)
    return torch.from_numpy(values).to(target.places[0].parameter.device)
