"""One tie, laid out: which groups of which weights are drawn to each other, to zero, or to an anchor."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from tying.errors import PenaltyError, PlanError
from tying.groups import Groups
from tying.models import Models, by_name, parameters_of
from tying.penalties.distances import Distance, Stack, stacked
from tying.penalties.tensors import Argument, check_floating
from tying.plan import Member, Partition, Tie, TiePlan
from tying.train.shards import is_sharded

_PIECE = 1 << 14
"""Numbers of a float64 piece of a weight: what is computed on the way to its prox stays in the cache."""

To: TypeAlias = Literal["pairs", "centre", "anchor"]


class Drawn:
    """A tie, and to what its groups are drawn.

    Labels with the same number of groups make one stack `(n, K, D)`: most plans have one. Where every member has every
    label once and in the same order, the members are the stack as they are.
    """

    def __init__(self, tie: Tie, to: To, anchors: Mapping[str, Tensor] | None) -> None:
        self.tie, self.to = tie, to
        self._anchors = {} if anchors is None else _anchors(tie, anchors)
        members, labels = len(tie.members), tie.partition.labels
        self._in_order = members > 1 and np.array_equal(labels, np.tile(np.arange(tie.partition.classes), members))
        self._stacks = () if to == "anchor" else _stacks(tie.partition)
        self._pruned = torch.from_numpy(np.flatnonzero(labels < 0))
        self._elsewhere: dict[tuple[int, torch.device], Tensor] = {}

    def value(self, weights: Mapping[str, Tensor], distance: Distance) -> Tensor:
        """Return Ω at strength 1, a differentiable scalar; in float32 at least."""
        tensors = [weights[member.parameter] for member in self.tie.members]
        tensors = [tensor.to(_common(tensors)) for tensor in tensors]
        reads = self._read(tensors, distance)
        if self.to == "anchor":
            anchors = self._read([each.to(reads[0].dtype) for each in self._anchors_of(tensors)], distance)
            return _sum([distance.between(mine, anchor) for mine, anchor in zip(reads, anchors, strict=True)])
        if self._side_by_side(reads):
            if len(reads[0]) == 1:
                reads = [tensor.reshape(-1) for tensor in tensors]  # one group: one sum less, there and back
            return _sum([self._apart(reads, distance)])
        matrix = torch.cat(reads)
        terms = [self._apart(_take(matrix, self._at(index, matrix)), distance) for index in self._stacks]
        if len(self._pruned):
            pruned = _take(matrix, self._at(self._pruned, matrix))
            terms.append(distance.between(pruned, torch.zeros_like(pruned)))
        return _sum(terms) if terms else nothing(tensors)

    def prox(self, weights: Mapping[str, Tensor], distance: Distance, step: float) -> dict[str, Tensor]:
        """Return argmin_X ½‖X − weights‖² + step · Ω(X), by name: computed in float64, in the weights' dtypes.

        Raises:
            PenaltyError: If the distance has no prox for so many members.
        """
        names = [member.parameter for member in self.tie.members]
        tensors = [weights[name].detach() for name in names]
        reads = self._read(tensors, distance)
        piece = _PIECE if distance.elementwise else max(1, *(read.shape[1] for read in reads))
        if self.to == "anchor":
            anchors = self._read(self._anchors_of(tensors), distance)
            toward = functools.partial(_toward, distance=distance, step=step)
            drawn = [
                _by_pieces(toward, [mine, anchor], 1, piece)[0] for mine, anchor in zip(reads, anchors, strict=True)
            ]
        elif self._side_by_side(reads):
            together = functools.partial(self._together, distance=distance, step=step)
            drawn = _by_pieces(together, reads, len(reads), piece)
        else:
            matrix = torch.cat([read.double() for read in reads])
            drawn = self._prox_of_matrix(matrix, distance, step).split([len(read) for read in reads])
        groups = self._groups(tensors, distance)
        return {
            name: each.write(new, tensor.shape).to(tensor.dtype)
            for name, each, new, tensor in zip(names, groups, drawn, tensors, strict=True)
        }

    def _prox_of_matrix(self, matrix: Tensor, distance: Distance, step: float) -> Tensor:
        result = matrix.clone()
        for index in (self._at(each, matrix) for each in self._stacks):
            result[index] = stacked(self._together(_take(matrix, index), distance, step))
        if len(self._pruned):
            pruned = self._at(self._pruned, matrix)
            result[pruned] = distance.shrink(_take(matrix, pruned), step)
        return result

    def _apart(self, stack: Stack, distance: Distance) -> Tensor:
        return distance.all_pairs(stack) if self.to == "pairs" else distance.to_mean(stack)

    def _together(self, stack: Stack, distance: Distance, step: float) -> Stack:
        return distance.prox_all_pairs(stack, step) if self.to == "pairs" else distance.prox_to_mean(stack, step)

    def _groups(self, tensors: Sequence[Tensor], distance: Distance) -> list[Groups]:
        """How to read each member: as a whole, without a copy, where its groups make no difference to the distance."""
        groups = [member.groups for member in self.tie.members]
        alike = len(set(groups)) == 1 and len({tensor.shape for tensor in tensors}) == 1
        if distance.elementwise and (self.to == "anchor" or (self._in_order and alike)):
            return [Groups.whole()] * len(groups)
        return groups

    def _read(self, tensors: Sequence[Tensor], distance: Distance) -> list[Tensor]:
        return [each.read(tensor) for each, tensor in zip(self._groups(tensors, distance), tensors, strict=True)]

    def _side_by_side(self, reads: Sequence[Tensor]) -> bool:
        """Whether the members are the stack: equal labels in equal order, and as many groups each."""
        if self._in_order and len({len(read) for read in reads}) == 1:
            return True
        if is_sharded(reads[0]):
            raise PlanError(
                f"{self.tie}: expected plain parameters where groups of several sizes or orders are tied, got sharded "
                "ones; tie whole tensors, or leave it out of the plan"
            )
        return False

    def _anchors_of(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return the anchors of the members, where the weights are.

        Raises:
            PlanError: Names the parameter whose anchor has another shape.
        """
        names = [member.parameter for member in self.tie.members]
        for name, weight in zip(names, weights, strict=True):
            if self._anchors[name].shape != weight.shape:
                raise PlanError(
                    f"to[{name!r}]: expected an anchor of the shape {tuple(weight.shape)} that {name} has, got "
                    f"{tuple(self._anchors[name].shape)}; give the tensor that this parameter is drawn to"
                )
        return [self._at(self._anchors[name], weight) for name, weight in zip(names, weights, strict=True)]

    def _at(self, mine: Tensor, weight: Tensor) -> Tensor:
        """Return what is laid out here where a weight is: moved once per device, while the original stays."""
        if mine.device == weight.device:
            return mine
        key = id(mine), weight.device
        moved = self._elsewhere.get(key)
        if moved is None:
            moved = mine.to(weight.device)
            if type(moved) is Tensor and not moved.is_meta:
                self._elsewhere[key] = moved
        return moved

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_elsewhere": {}}


def weights_of(plan: TiePlan, models: Models) -> dict[str, Tensor]:
    """Return the weights that a plan names, by name: parameters, or what a parametrization computes.

    Raises:
        PlanError: Names what is not there or does not fit, or ties that lie on several devices or hold integers.
    """
    modules = by_name(models)
    found: dict[str, Tensor] = {}
    for tie in plan:
        for member in tie.members:
            if member.parameter not in found:
                weight = _weight(modules, member.parameter)
                if weight is None:
                    member.shape(parameters_of(models))  # says what there is
                    raise PlanError(f"{member}: expected a parameter, got something else; leave it out of the plan")
                found[member.parameter] = weight
        _check(tie, found)
    return found


def check_trained(plan: TiePlan, weights: Mapping[str, Tensor]) -> None:
    """Raise `PlanError` unless every weight can be written to: `prox_` is all or nothing."""
    for name, weight in weights.items():
        if not isinstance(weight, nn.Parameter):
            raise PlanError(
                f"{name}: expected a parameter, got a weight that is computed; use the value in the loss, or remove "
                "the parametrization"
            )
        if not weight.requires_grad:
            raise PlanError(
                f"{name}: expected a parameter in training, got a frozen one; unfreeze it, or draw each other one to "
                f"it by a tie of its own: SoftTie(TiePlan([Tie.of(other, Groups.whole(), [0])]), strength, to={{other: "
                f"value of {name}}})"
            )
        if is_sharded(weight):
            raise PlanError(f"{name}: expected a plain parameter, got a sharded one; use the value in the loss")
        if weight.is_meta:
            raise PlanError(f"{name}: expected numbers, got a parameter on the meta device; load the model first")
    over: dict[int, dict[Tie, str]] = {}
    for tie in plan:
        _check_distinct(tie, weights)
        for member in tie.members:
            over.setdefault(id(weights[member.parameter]), {})[tie] = str(member)
    for ties in over.values():
        kinds = sorted(m.rpartition("[")[2] for m in ties.values())
        if len(ties) > 1 and kinds != ["inputs]", "outputs]"]:
            raise PlanError(
                f"{next(iter(ties.values()))}: expected one tie, or one over its inputs and one over its outputs, got "
                f"{' and '.join(f'({tie})' for tie in ties)}, which undo each other; merge their labels into one tie, "
                "or use the value in the loss"
            )


def _check_distinct(tie: Tie, weights: Mapping[str, Tensor]) -> None:
    """Raise unless the tie has every number once; or is over one parameter alone, which is equal to itself."""
    first: dict[int, Member] = {}
    again = [m for m in tie.members if first.setdefault(id(weights[m.parameter]), m) is not m]
    for member in again:
        known = first[id(weights[member.parameter])]
        if known.groups != member.groups:
            raise PlanError(
                f"{tie}: expected every number once, got {member.parameter} by {known.groups} and by "
                f"{member.groups}; use the value in the loss"
            )
    copies = np.tile(np.arange(tie.partition.classes), len(tie.members))
    if again and not (len(first) == 1 and np.array_equal(tie.partition.labels, copies)):
        raise PlanError(
            f"{tie}: expected every number once, got one parameter as {first[id(weights[again[0].parameter])]} and as "
            f"{again[0]}; name it once in the plan, or use the value in the loss"
        )


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has no NaN and no infinity in it: found by its extremes, in one pass."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return math.isfinite(low) and math.isfinite(high)


def total_of(scalars: Sequence[Tensor]) -> Tensor:
    """Return the sum of some scalars, at least one."""
    return functools.reduce(torch.add, scalars)


def nothing(tensors: Sequence[Tensor]) -> Tensor:
    """Return 0 as a sum over none of the weights, so that a backward pass finds its way."""
    return _sum([tensor.reshape(-1)[:0].to(_common(tensors)) for tensor in tensors[:1]])


def _weight(modules: Mapping[str, nn.Module], name: str) -> Tensor | None:
    prefix, _, inside = ("", "", name) if "" in modules else name.partition(".")
    path, _, leaf = inside.rpartition(".")
    try:
        owner = modules[prefix].get_submodule(path)
        weight = getattr(owner, leaf)
    except (KeyError, AttributeError):
        return None
    return weight if isinstance(weight, Tensor) and leaf not in owner._buffers else None  # pyright: ignore[reportPrivateUsage]


def _check(tie: Tie, weights: Mapping[str, Tensor]) -> None:
    each = {member.parameter: weights[member.parameter] for member in tie.members}
    for name, weight in each.items():
        if isinstance(weight, UninitializedParameter):
            raise PlanError(f"{name}: expected a parameter with a shape, got a lazy one; run the model once first")
        try:
            check_floating(weight, Argument(name, "weights", "leave it out of the plan", ""))
        except PenaltyError as error:
            raise PlanError(str(error)) from error
    tie.check_fits(weights)
    shapes = {m.parameter: tuple(weights[m.parameter].shape) for m in tie.members if m.groups.kind == "whole"}
    if len(set(shapes.values())) > 1:
        raise PlanError(
            f"{tie}: expected whole parameters of one shape, got {_by_name(shapes)}; choose Groups by which they "
            "compare, as outputs with inputs for a transposed tie"
        )
    devices = {name: weight.device for name, weight in each.items()}
    if len(set(devices.values())) > 1:
        raise PlanError(f"{tie}: expected weights on one device, got {_by_name(devices)}; move the models to one")


def _by_name(values: Mapping[str, object]) -> str:
    return " and ".join(f"{name}: {value}" for name, value in values.items())


def _anchors(tie: Tie, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of the anchors, the tie's pruned groups zero: what is pruned is drawn there."""
    for member in tie.members:
        anchor = cast(object, given.get(member.parameter))
        if not isinstance(anchor, Tensor) or not anchor.is_floating_point():
            kind = "none" if anchor is None else getattr(anchor, "dtype", type(anchor).__name__)
            raise PlanError(
                f"to[{member.parameter!r}]: expected an anchor of real numbers for every parameter of the plan, "
                f"got {kind}; the anchor has {', '.join(list(given)[:8]) or 'nothing'}"
            )
        if anchor.is_meta or not is_finite(anchor):
            raise PlanError(
                f"to[{member.parameter!r}]: expected a finite anchor, got "
                f"{'one on the meta device' if anchor.is_meta else 'NaN or infinity in it'}; give the tensor that "
                f"{member.parameter} is drawn to"
            )
    try:
        tie.check_fits(given)
    except PlanError as error:
        raise PlanError(f"to: {error}") from error
    if not tie.partition.pruned:
        return {member.parameter: given[member.parameter].detach().clone() for member in tie.members}
    matrices = [member.groups.read(given[member.parameter].detach()) for member in tie.members]
    stays = torch.from_numpy(tie.partition.labels >= 0)
    parts = zip(tie.members, matrices, stays.split([len(matrix) for matrix in matrices]), strict=True)
    return {
        member.parameter: member.groups.write(
            torch.where(kept[:, None].to(matrix.device), matrix, 0.0), given[member.parameter].shape
        )
        for member, matrix, kept in parts
    }


def _stacks(partition: Partition) -> tuple[Tensor, ...]:
    """Return the groups of the labels that several share, `(n, K)` int64 for every n: column by column a label."""
    kept = np.flatnonzero(partition.labels >= 0)
    by_label = kept[np.argsort(partition.labels[kept], kind="stable")]
    starts = np.cumsum(partition.sizes) - partition.sizes
    counts = [int(count) for count in np.unique(partition.sizes) if count > 1]
    return tuple(
        torch.from_numpy(by_label[starts[partition.sizes == count] + np.arange(count)[:, None]]) for count in counts
    )


def _take(matrix: Tensor, index: Tensor) -> Tensor:
    """Return the groups of an index of any shape: `(G, D)`, `(…)` → `(…, D)`."""
    found = matrix.index_select(0, index.reshape(-1))
    return found.reshape(*index.shape, matrix.shape[1])


def _toward(stack: Sequence[Tensor], distance: Distance, step: float) -> Stack:
    mine, anchor = stack
    return [anchor + distance.shrink(mine - anchor, step)]


def _by_pieces(function: Callable[[Sequence[Tensor]], Stack], reads: Sequence[Tensor], count: int, size: int) -> Stack:
    """Return the first `count` matrices changed, in their dtypes: in float64, so many numbers of a group at a time."""
    results = [torch.empty_like(read, memory_format=torch.contiguous_format) for read in reads[:count]]
    for start in range(0, reads[0].shape[1], size):
        part = slice(start, start + size)
        found = function([read[:, part].double() for read in reads])
        for result, each in zip(results, found, strict=True):
            result[:, part] = each
    return results


def _common(tensors: Sequence[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors], torch.float32)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = total_of([term.sum() if term.dim() else term for term in terms])
    return cast(Tensor, total.full_tensor()) if is_sharded(total) else total  # pyright: ignore[reportAttributeAccessIssue]
