"""How many clusters: chosen on the dendrograms of all members at once, by a budget or by a validation score."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tying.errors import PlanError
from tying.find.clusters import Dendrogram, Method
from tying.groups import Groups
from tying.packing import bits_for
from tying.plan import Member, Partition, Tie, TiePlan


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
    return total + sum((label_bits(tie.partition) + 7) // 8 for tie in plan)


def label_bits(partition: Partition) -> int:
    """Count the bits of the packed labels: one label per group, −1 a value of its own where it occurs.

    A partition that ties and prunes nothing needs no labels.
    """
    if partition.classes == len(partition):
        return 0
    return len(partition) * bits_for(partition.classes + (partition.pruned > 0))


@dataclass(frozen=True)
class Candidate:
    """The groups of one member that are left to be tied."""

    member: Member
    kept: NDArray[np.int64]
    """Indices of the groups that are not pruned."""
    count: int
    matrix: NDArray[np.float64]
    """`(len(kept), D)`: those groups."""

    @property
    def tieable(self) -> bool:
        """Whether a budget may tie these groups: outputs are only pruned, tying them is a narrower layer."""
        return self.member.groups != Groups.outputs()

    def tie(self, labels_of_kept: NDArray[np.int64] | None = None) -> Tie:
        """Label the kept groups as told (None: each its own), the others −1."""
        labels = np.full(self.count, -1, dtype=np.int64)
        labels[self.kept] = np.arange(len(self.kept)) if labels_of_kept is None else labels_of_kept
        return Tie((self.member,), Partition(labels))


class Family:
    """The plans that one common relative height cuts out of all dendrograms, from no ties to all tied."""

    def __init__(self, candidates: list[Candidate], method: Method, provenance: Mapping[str, str]) -> None:
        self.provenance = provenance
        self.members = [(c, Dendrogram.of(c.matrix, method) if c.tieable else None) for c in candidates]
        relative = [tree.heights / tree.heights[-1] for _, tree in self.members if tree is not None and _tall(tree)]
        self.heights = np.unique(np.concatenate([np.array([-1.0, 0.0]), *relative]))

    def plan(self, step: int) -> TiePlan:
        """Cut every dendrogram at the height of this step."""
        return TiePlan(
            [c.tie(tree and tree.cut(self._clusters(tree, step))) for c, tree in self.members], self.provenance
        )

    def _clusters(self, tree: Dendrogram, step: int) -> int:
        heights = tree.heights / tree.heights[-1] if _tall(tree) else np.zeros(len(tree.heights))
        return len(heights) + 1 - int(np.searchsorted(heights, self.heights[step], side="right"))

    def first_that(self, fits: Callable[[TiePlan], bool], budget: str) -> TiePlan:
        """Return the plan with the fewest ties that fits the budget."""
        low, high = 0, len(self.heights) - 1
        if not fits(self.plan(high)):
            raise PlanError(
                f"{budget}: expected a budget that one value per member meets, got less than that; "
                "ask for a larger file, or name `keep` for the outputs so that whole units go"
            )
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(self.plan(middle)) else (middle + 1, high)
        return self.plan(low)

    def smallest_within(self, validate: Callable[[TiePlan], float], max_drop: float) -> TiePlan:
        """Return the plan with the most ties whose score is within `max_drop` of the score without ties."""
        target = validate(self.plan(0)) - max_drop
        low, high = 0, len(self.heights) - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if validate(self.plan(middle)) >= target else (low, middle - 1)
        return self.plan(low)


def _tall(tree: Dendrogram) -> bool:
    return len(tree.heights) > 0 and tree.heights[-1] > 0
