"""How far to go: every member gives up the same share of its energy, as much as a budget or a score asks.

What a partition gives up is its distortion, ‖W − PW‖² ÷ ‖W‖²: one number that compares layers of any size and scale,
so that inputs and outputs, wide and narrow layers stay in balance without being told how.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tying.errors import PlanError
from tying.find.clusters import Dendrogram, Method
from tying.groups import Groups
from tying.plan import Member, Partition, Tie, TiePlan

ROUNDING = 1e-12
"""Of the distortion: merging equal groups gives up nothing, but for the last bits of their mean."""


@dataclass(frozen=True)
class Candidate:
    """The groups of one member, and which of them are left to be pruned or tied further."""

    member: Member
    kept: NDArray[np.int64]
    """Indices of the groups that are not pruned."""
    matrix: NDArray[np.float64]
    """`(G, D)`: all groups."""
    fewest: int = 1
    """A budget leaves at least this many values: for inputs, the units that are left of the same parameter. Fewer
    would cost rank, min(inputs, units), that the units left are still paid for."""

    @property
    def tieable(self) -> bool:
        """Whether a budget may tie these groups: outputs are only pruned, tying them is a narrower layer."""
        return self.member.groups != Groups.outputs()

    def tie(self, labels_of_kept: NDArray[np.int64] | None = None) -> Tie:
        """Label the kept groups as told (None: each its own), the others −1."""
        labels = np.full(len(self.matrix), -1, dtype=np.int64)
        labels[self.kept] = np.arange(len(self.kept)) if labels_of_kept is None else labels_of_kept
        return Tie((self.member,), Partition(labels))


def give_up(candidate: Candidate, distortion: float, method: Method) -> Tie:
    """Tie (or, for outputs, prune) as far as the distortion ‖W − PW‖² ÷ ‖W‖² allows; one group always stays."""
    return _merge(candidate, distortion, method) if candidate.tieable else _prune(candidate, distortion)


def least(plan_at: Callable[[float], TiePlan], fits: Callable[[TiePlan], bool], budget: str) -> TiePlan:
    """Return the plan of least distortion that fits, found by bisection to 1/1024."""
    untied = plan_at(0.0)
    if fits(untied):
        return untied
    low, high, best = 0.0, 1.0, plan_at(1.0)
    if not fits(best):
        raise PlanError(
            f"{budget}: expected a budget that one value per member meets, got less than that; "
            "ask for less (a smaller ratio, a larger file), name more parameters, or also read them by Groups.outputs()"
        )
    for _ in range(10):
        middle = (low + high) / 2
        plan = plan_at(middle)
        if fits(plan):
            high, best = middle, plan
        else:
            low = middle
    return best


def smallest_within(
    plan_at: Callable[[float], TiePlan], validate: Callable[[TiePlan], float], max_drop: float
) -> TiePlan:
    """Return a plan whose score is within `max_drop` of the score at no distortion, the most distorted one found."""
    low, high, best = 0.0, 1.0, plan_at(0.0)
    target = _score(validate, best) - max_drop
    if math.isnan(target):
        raise PlanError("validate: expected a score, got NaN for the plan without ties; return a number")
    for _ in range(8):
        middle = (low + high) / 2
        plan = plan_at(middle)
        if _score(validate, plan) >= target:
            low, best = middle, plan
        else:
            high = middle
    return best


def _score(validate: Callable[[TiePlan], float], plan: TiePlan) -> float:
    score = validate(plan)
    try:
        return float(score)
    except (TypeError, ValueError) as error:
        raise PlanError(f"validate: expected a score, got {score!r}; return a number") from error


def _merge(candidate: Candidate, distortion: float, method: Method) -> Tie:
    kept = candidate.matrix[candidate.kept]
    tree = Dendrogram.of(kept, method)
    allowed = _allowed(candidate, distortion + ROUNDING)
    affordable = len(kept) - _count_within(_losses(kept, tree), allowed)
    return candidate.tie(tree.cut(max(affordable, min(candidate.fewest, len(kept)))))


def _losses(matrix: NDArray[np.float64], tree: Dendrogram) -> NDArray[np.float64]:
    """What each merge of A and B gives up: |A||B|/(|A|+|B|) · ‖mean A − mean B‖²."""
    sums, sizes, losses = list(matrix), [1] * len(matrix), np.zeros(len(tree.merges))
    for step, (left, right) in enumerate(tree.merges):
        apart = sums[left] / sizes[left] - sums[right] / sizes[right]
        losses[step] = sizes[left] * sizes[right] / (sizes[left] + sizes[right]) * (apart @ apart)
        sums.append(sums[left] + sums[right])
        sizes.append(sizes[left] + sizes[right])
    return losses


def _prune(candidate: Candidate, distortion: float) -> Tie:
    energies = np.square(candidate.matrix).sum(axis=1)
    order = candidate.kept[np.argsort(energies[candidate.kept], kind="stable")]
    pruned = min(_count_within(energies[order], _allowed(candidate, distortion)), len(order) - 1)
    return Candidate(candidate.member, np.sort(order[pruned:]), candidate.matrix).tie()


def _allowed(candidate: Candidate, distortion: float) -> float:
    """What is left to give up once the support has taken its part."""
    gone = np.delete(candidate.matrix, candidate.kept, axis=0)
    return distortion * float(np.square(candidate.matrix).sum()) - float(np.square(gone).sum())


def _count_within(losses: NDArray[np.float64], allowed: float) -> int:
    return int(np.searchsorted(np.cumsum(losses), allowed, side="right"))


def count_values(plan: TiePlan, parameters: Mapping[str, Tensor]) -> int:
    """Count the distinct numbers that the parameters named in a plan of one-member ties keep.

    Ties over inputs and over outputs of one parameter multiply: K_inputs · K_outputs · (kernel size).
    """
    kept: dict[str, float] = {}
    for tie in plan:
        (member,) = tie.members
        size = parameters[member.parameter].numel()
        share = tie.partition.classes / len(tie.partition)
        kept[member.parameter] = kept.get(member.parameter, size) * share
    return sum(round(values) for values in kept.values())


def count_bytes(plan: TiePlan, parameters: Mapping[str, Tensor]) -> int:
    """Count the bytes of the distinct numbers, in their dtype, and of the packed labels."""
    total = 0
    for name in {tie.members[0].parameter for tie in plan}:
        mine = TiePlan([tie for tie in plan if tie.members[0].parameter == name])
        total += count_values(mine, parameters) * parameters[name].element_size()
    return total + sum((label_bits(tie) + 7) // 8 for tie in plan)


def label_bits(tie: Tie) -> int:
    """Count the bits of the packed labels: one label per group, −1 a value of its own where it occurs.

    Labels that only prune, or do nothing, leave a narrower plain layer: none are stored, unless they select inputs.
    """
    partition = tie.partition
    if partition.classes == len(partition) or tie.members[0].groups == Groups.outputs():
        return 0
    return partition.label_bits
