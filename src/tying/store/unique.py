"""The unique set: the parameters that remain when every tie is stored once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from tying.enforce.compaction.surgery import tied_layers
from tying.enforce.ties.tie import plan_of
from tying.errors import PlanError
from tying.groups import Groups
from tying.plan import Member, Partition, Tie, TiePlan, qualified
from tying.store.state import State, same_bits


@dataclass(frozen=True)
class Step:
    """A tie whose groups were replaced by one per label: how to get the dense parameters back.

    After a tie of one member over inputs or outputs the parameter is a smaller weight, `(out, K, …)` or `(K, in, …)`,
    which a further tie can make smaller still. After any other tie it is the `(K, D)` matrix of the labels' values,
    kept under the first member's name.
    """

    tie: Tie
    shapes: tuple[tuple[int, ...], ...]
    """Of each member, before."""

    @property
    def is_one_tensor(self) -> bool:
        """Whether all members are equal as a whole."""
        partition = self.tie.partition
        whole = all(member.groups.kind == "whole" for member in self.tie.members)
        return whole and partition.classes == 1 and not partition.pruned

    def undo(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the members' parameters as they were before the step, bit for bit."""
        first = self.tie.members[0]
        small = tensors[first.parameter]
        if not self.tie.partition.classes:
            return {m.parameter: small.new_zeros(s) for m, s in zip(self.tie.members, self.shapes, strict=True)}
        values = first.groups.read(small) if _keeps_rank(self.tie) else small
        like = {m.parameter: small.new_empty(1).expand(s) for m, s in zip(self.tie.members, self.shapes, strict=True)}
        whole = self.tie.split(self.tie.partition.expand(values), like)
        return {name: part.clone() for name, part in whole.items()} if len(whole) > 1 else whole


@dataclass(frozen=True)
class UniqueSet:
    """A network's parameters with every tie stored once, and the steps that lead back, to be undone in reverse."""

    parameters: Mapping[str, Tensor]
    steps: tuple[Step, ...]
    labels: tuple[Partition, ...]
    """Of every tie in force: of the steps, of the tied layers and of `tie_`."""

    @property
    def values(self) -> int:
        """The unique non-zero numbers: the paper's count."""
        return sum(int(torch.count_nonzero(tensor)) for tensor in self.parameters.values())

    @property
    def bits(self) -> int:
        """What is stored: every number of every parameter, zeros too, and ⌈log2 K⌉ bits for every label."""
        numbers = sum(tensor.numel() * tensor.element_size() * 8 for tensor in self.parameters.values())
        return numbers + sum(partition.label_bits for partition in self.labels)


def plan_in_force(model: nn.Module) -> TiePlan:
    """Return the ties that a network's own layers keep: those of its tied layers, and those that `tie_` made.

    Example:
        >>> from tying.nn import TiedLinear
        >>> print(plan_in_force(nn.Sequential(TiedLinear([0, 0, 1], 2))))
        TiePlan (made by: the layers of the network)
          0.weight[inputs]: 3 groups → 2 values, 0 pruned
    """
    ties = [
        Tie((Member(qualified(name, "weight"), Groups.inputs()),), layer.partition)
        for name, layer in tied_layers(model).items()
    ]
    return replace(TiePlan(ties) + plan_of(model), provenance={"made by": "the layers of the network"})


def unique_set(model: nn.Module, state: State, plan: Iterable[Tie] | None = None, *, strict: bool = False) -> UniqueSet:
    """Store every tie once: those of the model's layers, and those of the plan which the weights obey bit for bit.

    Args:
        model: Not written to.
        state: What `collect(model)` gave.
        plan: Ties that are in the values only, as after `plan.project`.
        strict: Whether to refuse a tie that the weights don't obey, or to leave it.

    Raises:
        PlanError: If strict, and the plan does not fit the model or the weights don't obey it; names the tie.
    """
    names = {id(p): name for name, p in model.named_parameters() if name in state.tensors}
    held: dict[str, Tensor] = {name: state.tensors[name].detach() for name in names.values()}
    known = {name: names[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if id(p) in names}
    steps: list[Step] = []
    for tie in plan or ():
        try:
            resolved = _storable_once(tie, known, held, steps)
        except PlanError as error:
            if strict:
                raise PlanError(f"{tie}: expected weights that obey the plan, got {error}") from error
            continue
        step = Step(resolved, tuple(tuple(held[m.parameter].shape) for m in resolved.members))
        small = _reduce(resolved, held)
        if strict or _saves(step, small):
            for member in resolved.members:
                held.pop(member.parameter)
            held[resolved.members[0].parameter] = small
            steps.append(step)
    labels = [tie.partition for tie in (*plan_in_force(model), *(step.tie for step in steps))]
    return UniqueSet(held, tuple(steps), tuple(labels))


def _storable_once(tie: Tie, known: Mapping[str, str], held: Mapping[str, Tensor], steps: list[Step]) -> Tie:
    """Return the same tie by the parameters' first names.

    Raises:
        PlanError: Says what stands in the way of storing its values once.
    """
    names = [known.get(member.parameter, member.parameter) for member in tie.members]
    if len(set(names)) < len(names):
        raise PlanError("members that are one parameter; only distinct parameters can be stored as one")
    tie = replace(tie, members=tuple(replace(m, parameter=name) for m, name in zip(tie.members, names, strict=True)))
    try:
        tie.check_fits(held)
    except PlanError as error:
        raise PlanError(f"{error}; a compacted network keeps its ties in its layers and needs no plan") from error
    touched = {m.parameter: step for step in steps for m in step.tie.members}
    if any(name in touched and not (_keeps_rank(tie) and _keeps_rank(touched[name].tie)) for name in names):
        raise PlanError("a parameter that another tie holds; only ties over inputs and outputs of one combine")
    if len({(held[name].dtype, held[name].device) for name in names}) > 1:
        raise PlanError("members of different dtypes or devices; convert them to one")
    matrix = tie.matrix(held)
    if not same_bits(tie.partition.expand(_first_of_each(tie.partition, matrix)), matrix):
        raise PlanError(
            "weights that differ inside a group; set them to plan.project(dict(model.named_parameters())) first"
        )
    return tie


def _keeps_rank(tie: Tie) -> bool:
    return len(tie.members) == 1 and tie.members[0].groups.kind in ("inputs", "outputs")


def _first_of_each(partition: Partition, matrix: Tensor) -> Tensor:
    _, first = np.unique(partition.labels, return_index=True)
    kept = first[1:] if partition.pruned else first
    return matrix.index_select(0, torch.as_tensor(kept, device=matrix.device))


def _reduce(tie: Tie, held: Mapping[str, Tensor]) -> Tensor:
    """The labels' values, as a smaller weight where the tie allows it, else `(K, D)`."""
    values = _first_of_each(tie.partition, tie.matrix(held))
    if not _keeps_rank(tie):
        return values
    member = tie.members[0]
    shape = list(held[member.parameter].shape)
    shape[1 if member.groups.kind == "inputs" else 0] = tie.partition.classes
    return member.groups.write(values, tuple(shape)) if tie.partition.classes else values.new_zeros(shape)


def _saves(step: Step, small: Tensor) -> bool:
    dense = sum(int(np.prod(shape)) for shape in step.shapes)
    width = small.element_size() * 8
    return small.numel() * width + step.tie.partition.label_bits < dense * width
