"""The hidden units of several models, made to face each other: what may move, where to, and all of it proven first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from tying.channels.find import channels_of
from tying.channels.graph import export
from tying.errors import CompactError, PlanError
from tying.find.align import by_activations, by_weights
from tying.find.permute import Order, Reference, Space, permuted, spaces_of, tensors_of, write
from tying.plan import Tie, TiePlan, qualified

By: TypeAlias = Literal["weights", "activations"]


@dataclass(frozen=True)
class Aligned:
    """Units of a model that were permuted, or why they stay."""

    model: str
    units: str
    """What makes them first, as "fc1.weight[axis 0]", a name inside the model."""
    count: int
    order: tuple[int, ...] | None
    """Position k holds the unit that was at `order[k]`; None where the units stay."""
    reason: str | None
    """Why they stay, or None."""

    @property
    def moved(self) -> int:
        """How many units have another place than before."""
        return sum(k != unit for k, unit in enumerate(self.order or ()))


@dataclass(frozen=True)
class _Partner:
    """What a tensor shall come near to."""

    model: str
    name: str
    """Inside the model."""
    target: Tensor
    turned: bool

    @property
    def full(self) -> str:
        """The name with its model's."""
        return qualified(self.model, self.name)


def align_units(
    models: Mapping[str, nn.Module], plan: TiePlan, inputs: Mapping[str, tuple[Tensor, ...]], by: By
) -> list[Aligned]:
    """Permute the units of all models but the first towards the weights that the plan pairs them with, in place.

    All is computed and verified first, then all is written, or nothing: `tying.match` says what is guaranteed.

    Raises:
        PlanError: Names a model that can't be followed, copied or run in float64, or whose function would change.
    """
    aligner = _Aligner(models, plan, inputs, by)
    told = [each for name in list(models)[1:] for each in aligner.align(name)]
    write(aligner.changes)
    return told


class _Aligner:
    """Aligns one model after the other, and keeps what is to be written."""

    def __init__(
        self, models: Mapping[str, nn.Module], plan: TiePlan, inputs: Mapping[str, tuple[Tensor, ...]], by: By
    ) -> None:
        self.models, self.plan, self.inputs, self.by = models, plan, inputs, by
        self.tensors = {name: tensors_of(model) for name, model in models.items()}
        self.now = {qualified(name, local): t for name, mine in self.tensors.items() for local, t in mine.items()}
        self.shared = _sharing(self.tensors)
        self.references: dict[str, Reference] = {}
        self.changes: list[tuple[Tensor, Tensor]] = []

    def align(self, name: str) -> list[Aligned]:
        """Find where the units of one model go, and prove that it computes the same then."""
        partners = _partners(self.plan, name, self.tensors, self.now)
        spaces, unused = _spaces(name, self.models[name], self.inputs[name])
        reasons = self._reasons(name, spaces, unused, partners)
        orders = iter(self._orders(name, [s for s, r in zip(spaces, reasons, strict=True) if r is None], partners))
        told: list[Aligned] = []
        moves: list[tuple[Space, Order]] = []
        for space, reason in zip(spaces, reasons, strict=True):
            order = next(orders) if reason is None else None
            if order is not None and (order != np.arange(space.units)).any():
                moves.append((space, order))
            stays = reason or (None if order is not None else "no layer's output shows them in both models")
            places = None if order is None else tuple(order.tolist())
            told.append(Aligned(name, str(space), space.units, places, stays))
        if moves:
            self._reference(name).check(moves)
            self._note(name, moves)
        return told

    def _reasons(
        self, name: str, spaces: Sequence[Space], unused: Sequence[str], partners: Mapping[str, _Partner]
    ) -> list[str | None]:
        """Return why the units of each space stay, None where they may move."""
        named = {member.parameter for tie in self.plan for member in tie.members}
        in_part = {local for local in self.tensors[name] if qualified(name, local) in named}
        reasons = [_fixed(space, self.tensors[name], partners, in_part, self.shared) for space in spaces]
        free = [space for space, reason in zip(spaces, reasons, strict=True) if reason is None]
        if free:
            _refuse_unused(name, unused)
        tried = iter(self._reference(name).reasons(free) if free else ())
        return [reason or next(tried) for reason in reasons]

    def _orders(self, name: str, spaces: Sequence[Space], partners: Mapping[str, _Partner]) -> list[Order | None]:
        for local, partner in partners.items():
            for full, value in ((f"{name}.{local}", self.tensors[name][local]), (partner.full, partner.target)):
                if not bool(value.isfinite().all()):
                    raise PlanError(f"{full}: expected finite weights to align, got NaN or infinity; mend it first")
        if self.by == "weights":
            return by_weights(spaces, self.tensors[name], {local: p.target for local, p in partners.items()})
        facing = [partner for partner in partners.values() if not partner.turned]
        if not spaces or not facing:
            return [None] * len(spaces)
        other, _ = Counter(partner.model for partner in facing).most_common(1)[0]  # the one that most partners are in
        names = {mine: p.name for mine, p in partners.items() if p.model == other and not p.turned}
        return by_activations(spaces, self._reference(name), self._reference(other), names)

    def _note(self, name: str, moves: Sequence[tuple[Space, Order]]) -> None:
        mine = self.tensors[name]
        gradients = {local: t.grad for local, t in mine.items() if t.is_leaf and t.grad is not None}
        new = permuted(mine, moves)
        self.changes += [(mine[local], value) for local, value in new.items()]
        self.changes += [(gradients[local], value) for local, value in permuted(gradients, moves).items()]
        moved = {id(mine[local]): value for local, value in new.items()}
        self.now |= {full: moved[id(t)] for full, t in self.now.items() if id(t) in moved}

    def _reference(self, name: str) -> Reference:
        if name not in self.references:
            self.references[name] = Reference(name, self.models[name], self.inputs[name])
        return self.references[name]


def _spaces(name: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[list[Space], list[str]]:
    """Return the spaces of a model, and the parameters that its forward does not use."""
    try:
        graph = export(model, inputs)
    except CompactError as error:
        raise PlanError(f"{name}: expected a model whose units can be found, got {error}") from error
    return spaces_of(channels_of(graph)), graph.unused()


def _refuse_unused(model: str, unused: Sequence[str]) -> None:
    """Raise `PlanError` where parameters may read units that nothing shows that they do."""
    if unused:
        shown = ", ".join(f"{model}.{name}" for name in unused[:4]) + (", …" if len(unused) > 4 else "")
        raise PlanError(
            f"{shown}: expected parameters that the forward uses in evaluation mode, got some that it does not: they "
            "may read units that move, in training or in another method; align the parts without them, give a module "
            "whose forward uses them, or leave out align=True"
        )


def _partners(
    plan: TiePlan, model: str, tensors: Mapping[str, Mapping[str, Tensor]], now: Mapping[str, Tensor]
) -> dict[str, _Partner]:
    """Return, by the names that `find_channels` uses, what each tensor of the model is paired with in full."""
    mine = {qualified(model, local): t for local, t in tensors[model].items()}
    earlier = [*tensors][: [*tensors].index(model)]
    owners = {qualified(name, local): (name, local) for name in earlier for local in tensors[name]}
    found: dict[int, _Partner] = {}
    for tie in plan:
        offset = 0
        for at, member in enumerate(tie.members):
            offset += member.shape(now)[0]
            if member.parameter not in mine or id(mine[member.parameter]) in found:
                continue
            for other in (each for each in tie.members if each.parameter in owners):
                if _same_labels(tie, at, tie.members.index(other), now):
                    shape = mine[member.parameter].shape
                    target = member.groups.write(other.groups.read(now[other.parameter].detach()), shape)
                    turned = other.groups != member.groups
                    found[id(mine[member.parameter])] = _Partner(*owners[other.parameter], target, turned)
                    break
    return {local: found[id(t)] for local, t in tensors[model].items() if id(t) in found}


def _same_labels(tie: Tie, one: int, other: int, now: Mapping[str, Tensor]) -> bool:
    counts = [member.shape(now)[0] for member in tie.members]
    parts = np.split(tie.partition.labels, np.cumsum(counts)[:-1])
    return np.array_equal(parts[one], parts[other])


def _fixed(
    space: Space,
    tensors: Mapping[str, Tensor],
    partners: Mapping[str, _Partner],
    in_part: Set[str],
    shared: Mapping[int, str],
) -> str | None:
    """Return why the units of a space stay, if that is known without trying.

    Args:
        space: The units.
        tensors: The model's, by name.
        partners: What those are paired with that are paired in full.
        in_part: The names of all that are paired.
        shared: What else a tensor is.
    """
    for side in space.sides:
        if id(tensors[side.name]) in shared:
            return f"{side.name} is also {shared[id(tensors[side.name])]}"
    if not any(side.name in partners for side in space.sides):
        some = any(name in in_part for side in space.sides for name in (side.name, *side.aliases))
        return "only some of their groups are paired" if some else "no parameter of theirs is paired"
    return space.lost


def _sharing(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[int, str]:
    """Return, for every tensor that shares its memory with another or stands in another model, what it is there."""
    names: dict[tuple[torch.device, int], list[tuple[str, Tensor]]] = {}
    for model, mine in tensors.items():
        for local, tensor in mine.items():
            if tensor.numel():
                memory = tensor.device, tensor.untyped_storage().data_ptr()
                names.setdefault(memory, []).append((f"{model}.{local}", tensor))
    found: dict[int, str] = {}
    for each in names.values():
        for full, tensor in each:
            model = full.partition(".")[0]
            others = [other for other, t in each if t is not tensor or other.partition(".")[0] != model]
            if others:
                found[id(tensor)] = others[0]
    return found
