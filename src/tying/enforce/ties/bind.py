"""From the ties of a plan to bonds, and bonds put in force: all or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from tying.enforce.ties.bonds import Bond, Bonds, Place, install, replace, split_labels
from tying.enforce.ties.expansion import Gradient
from tying.enforce.ties.guard import Guard
from tying.enforce.ties.steps import kept, released
from tying.errors import PlanError
from tying.plan import Tie, TiePlan


def by_parameters(plan: TiePlan, parameters: dict[str, nn.Parameter]) -> list[tuple[Tie, ...]]:
    """The ties, those over inputs and outputs of one parameter together.

    Raises:
        PlanError: If ties overlap in any other way; names the parameter and both ties.
    """
    over: dict[int, list[Tie]] = {}
    for tie in plan:
        for member in tie.members:
            over.setdefault(id(parameters[member.parameter]), []).append(tie)
    result: dict[int, tuple[Tie, ...]] = {}
    for key, ties in over.items():
        distinct = list({id(t): t for t in ties}.values())
        kinds = sorted(tie.members[0].groups.kind for tie in distinct)
        if len(distinct) > 1 and (kinds != ["inputs", "outputs"] or any(len(tie.members) > 1 for tie in distinct)):
            shared = (m.parameter for tie in distinct for m in tie.members if id(parameters[m.parameter]) == key)
            both = " and ".join(f"({tie})" for tie in distinct)
            raise PlanError(
                f"{', '.join(dict.fromkeys(shared))}: expected one tie, or one over inputs and one over outputs of "
                f"this parameter alone, got {both}; merge their labels into one tie"
            )
        result[id(distinct[0])] = tuple(sorted(distinct, key=lambda tie: tie.members[0].groups.kind))
    return list(result.values())


def bond_of(
    ties: tuple[Tie, ...],
    parameters: dict[str, nn.Parameter],
    places: dict[int, list[tuple[str, str, str]]],
    gradient: Gradient,
) -> tuple[Bond, Tensor]:
    """Return a bond, and the values it is to store; nothing is changed."""
    tie = ties[0]
    members = [parameters[member.parameter] for member in tie.members]
    shapes = tuple(tuple(p.shape) for p in members)
    home = _home(tie, shapes) if len(members) > 1 else None
    plain = [gradient == "sum" and same for same in _as_home(tie, shapes, home)]
    stored = members[home] if home is not None and plain[home] else None
    everywhere = tuple(
        Place(*at, i, not plain[i]) for i, parameter in _first_of_each(members) for at in places[id(parameter)]
    )
    bond = Bond(ties, gradient, shapes, home, cast(nn.Parameter, stored), everywhere, ())
    values = _start(bond, parameters)
    bond.shape = tuple(values.shape)
    if stored is None:
        bond.stored = nn.Parameter(values, requires_grad=members[0].requires_grad)
    return bond, values


def _first_of_each(members: Sequence[nn.Parameter]) -> list[tuple[int, nn.Parameter]]:
    """The distinct parameters, each with the first member that is it."""
    first: dict[int, int] = {}
    for i, parameter in enumerate(members):
        first.setdefault(id(parameter), i)
    return [(i, members[i]) for i in first.values()]


def _home(tie: Tie, shapes: tuple[tuple[int, ...], ...]) -> int | None:
    """The first member that has every value exactly once: the others can be computed from it."""
    for i, labels in enumerate(split_labels(tie, shapes)):
        if len(labels) == tie.partition.classes == len(np.unique(labels)) and labels.min(initial=0) >= 0:
            return i
    return None


def _as_home(tie: Tie, shapes: tuple[tuple[int, ...], ...], home: int | None) -> list[bool]:
    """Whether each member's weight is that of the home itself."""
    if home is None:
        return [False] * len(tie.members)
    each = split_labels(tie, shapes)
    return [
        member.groups == tie.members[home].groups and shape == shapes[home] and np.array_equal(labels, each[home])
        for member, shape, labels in zip(tie.members, shapes, each, strict=True)
    ]


def _start(bond: Bond, parameters: dict[str, nn.Parameter]) -> Tensor:
    """The mean of each value's groups, as it is to be stored; summed in float64."""
    tie = bond.ties[0]
    with torch.no_grad():
        if len(bond.ties) == 2:
            weight = parameters[tie.members[0].parameter]
            wide = weight.to(torch.promote_types(weight.dtype, torch.float64))
            return bond.expansion(0, weight.device).right_inverse(wide).to(weight.dtype)
        matrix = tie.matrix(parameters)
        if bond.home is None:
            return tie.partition.mean(matrix)
        home = split_labels(tie, bond.shapes)[bond.home]
        values = tie.partition.mean(matrix)[torch.as_tensor(home.copy(), device=matrix.device)]
        return tie.members[bond.home].groups.write(values, bond.shapes[bond.home])


def put_in_force(bonds: Bonds, values: Sequence[Tensor], guards: Sequence[Guard]) -> None:
    """Install every bond and its guards; if that fails, put every module's own parameter and its values back."""
    done: list[tuple[nn.Module, Place, nn.Parameter]] = []
    before = [(bond.stored, bond.stored.detach().clone()) for bond in bonds.bonds if bond.home is not None]
    installed: set[tuple[int, str]] = set()
    try:
        for bond, start in zip(bonds.bonds, values, strict=True):
            for place in bond.places:
                module = cast(nn.Module, bonds.module_at(place))
                if (id(module), place.leaf) not in installed:
                    installed.add((id(module), place.leaf))
                    done.append((module, place, cast(nn.Parameter, getattr(module, place.leaf))))
                    install(module, place, bond)
            with torch.no_grad():
                bond.stored.copy_(start)
        for guard in guards:
            guard.attach(cast(nn.Module, bonds.root(guard.prefix)))
            guard.examine()
    except BaseException:
        for guard in guards:
            guard.detach()
        for module, place, own in done:
            if getattr(module, place.leaf, None) is not own:
                replace(module, place.leaf, own)
        for stored, value in before:
            if not torch.equal(stored, value):
                with torch.no_grad():
                    stored.copy_(value)
        raise
    stored = {id(bond.stored) for bond in bonds.bonds}
    for bond in bonds.bonds:
        kept(bond.stored)
    for _, place, own in done:
        if id(own) not in stored:
            released(own, place.name, may_return=True)
