"""Which groups of which parameters face each other: by name and shape, or as said by a map with patterns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from tying.errors import PlanError
from tying.groups import Groups
from tying.models import Models, by_name, parameters_of
from tying.plan import Member, Partition, Tie, qualified

Side: TypeAlias = str | tuple[str, Groups] | tuple[str, Groups, range | slice]
"""A name or pattern (`"a.encoder.*.weight"`), how it is read, and which of its groups (a slice is no key of a
dictionary before Python 3.12, a range is)."""

Pairs: TypeAlias = Mapping[Side, Side | Sequence[Side]]


@dataclass(frozen=True)
class Unpaired:
    """A parameter that no tie has."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Parameters:
    """The parameters of the models by all their names, each known by its model and itself."""

    named: Mapping[str, nn.Parameter]
    model: Mapping[str, str]
    """Full name → the name of its model."""

    @staticmethod
    def of(models: Models) -> Parameters:
        """Read the models."""
        model: dict[str, str] = {}
        for prefix, module in by_name(models).items():
            for name, _ in module.named_parameters(remove_duplicate=False):
                model[qualified(prefix, name)] = prefix
        return Parameters(parameters_of(models), model)

    def key(self, name: str) -> tuple[str, int]:
        """Return the same for all names of one parameter in one model."""
        return self.model[name], id(self.named[name])

    def local(self, name: str) -> str:
        """Return the name inside its model."""
        return name.removeprefix(f"{self.model[name]}.") if self.model[name] else name

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape."""
        return tuple(self.named[name].shape)

    def distinct(self) -> Iterator[str]:
        """Go through the first names of the parameters, model by model."""
        seen: set[tuple[str, int]] = set()
        for name in self.named:
            if self.key(name) not in seen:
                seen.add(self.key(name))
                yield name


def unpaired_of(parameters: Parameters, ties: Sequence[Tie], reasons: Mapping[str, str], other: str) -> list[Unpaired]:
    """List the parameters that no tie has, with the reason that is known for them, or another."""
    tied = {parameters.key(member.parameter) for tie in ties for member in tie.members}
    return [
        Unpaired(name, parameters.shape(name), reasons.get(name, other))
        for name in parameters.distinct()
        if parameters.key(name) not in tied
    ]


# ---------------------------------------------------------------- by name and shape


def by_name_and_shape(parameters: Parameters) -> tuple[list[Tie], list[Unpaired]]:
    """Tie what has the same name and shape in several models; what is one parameter in one of them is one tie."""
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name in parameters.named:
        alike.setdefault((parameters.local(name), parameters.shape(name)), []).append(name)
    joined: dict[int, list[str]] = {id(p): [] for p in parameters.named.values()}
    for names in alike.values():
        first = joined[id(parameters.named[names[0]])]
        for name in names:
            mine = joined[id(parameters.named[name])]
            first.append(name)
            if mine is not first:
                first += mine
                joined.update({id(parameters.named[moved]): first for moved in (*mine, name)})
    place = {name: i for i, name in enumerate(parameters.distinct())}
    ties: list[Tie] = []
    for names in {id(names): names for names in joined.values()}.values():
        members = [Member(name, Groups.whole()) for name in sorted({*names} & {*place}, key=place.__getitem__)]
        if len(members) > 1:
            ties.append(Tie(tuple(members), Partition([0] * len(members))))
    return ties, unpaired_of(parameters, ties, dict(_missing(parameters)), "no such name elsewhere")


def _missing(parameters: Parameters) -> Iterator[tuple[str, str]]:
    """Say of every parameter why it would have no partner."""
    models = dict.fromkeys(parameters.model.values())
    for name in parameters.named:
        others = [qualified(model, parameters.local(name)) for model in models if model != parameters.model[name]]
        found = [f"{other} has {parameters.shape(other)}" for other in others if other in parameters.named]
        missing = ", ".join(model for model in models if model != parameters.model[name])
        yield name, f"other shape: {', '.join(found)}" if found else f"no such name in {missing}"


# ---------------------------------------------------------------- by a map


@dataclass(frozen=True)
class _Selector:
    pattern: str
    groups: Groups | None = None
    part: range | slice | None = None

    @staticmethod
    def of(given: object) -> _Selector:
        parts: tuple[Any, ...] = cast("tuple[Any, ...]", given) if isinstance(given, tuple) else (given,)
        kinds = (str, Groups, (range, slice))
        if len(parts) not in (1, 2, 3) or not all(isinstance(p, k) for p, k in zip(parts, kinds, strict=False)):
            raise PlanError(
                f"pairs: expected a name, (name, Groups) or (name, Groups, range), got {given!r}; write for instance "
                '("a.fc1.weight", Groups.outputs(), range(0, 8))'
            )
        return _Selector(*parts)


@dataclass(frozen=True)
class _Facing:
    """Some groups of a parameter, which face as many of others."""

    name: str
    groups: Groups
    grid: NDArray[np.int64]
    """The chosen groups, along the axes by which they are counted."""
    strict: bool
    """Whether they were chosen by a slice, and all have to be paired."""

    def __str__(self) -> str:
        return f"{self.name}[{self.groups}]"


def by_map(parameters: Parameters, pairs: Pairs) -> tuple[list[Tie], list[Unpaired]]:
    """Tie what the map says.

    Raises:
        PlanError: A pattern without a match, parameters or groups that don't compare, a group that is paired twice.
    """
    if not isinstance(pairs, Mapping) or not pairs:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError(
            f'pairs: expected a map with at least one entry, got {pairs!r}; write {{"a.*.weight": "b.*.weight"}}'
        )
    table, reasons = _Table(parameters), dict[str, str]()
    for left, right in pairs.items():
        rights = right if isinstance(right, (list, tuple)) and not _is_selector(right) else (right,)
        selectors = [_Selector.of(left), *map(_Selector.of, rights)]
        if len(selectors) < 2:
            raise PlanError(f"pairs: expected a partner for {selectors[0].pattern}, got none; name one")
        seen: set[tuple[tuple[str, int], ...]] = set()
        for names in _resolved(parameters, selectors, reasons):
            keys = tuple(map(parameters.key, names))
            if keys not in seen:  # a pattern that finds a parameter by another of its names
                seen.add(keys)
                table.face(_facing(parameters, names, selectors))
    ties = table.ties()
    return ties, unpaired_of(parameters, ties, reasons, "no pair names it")


def _is_selector(given: Sequence[object]) -> bool:
    return isinstance(given, tuple) and any(isinstance(part, Groups) for part in given)


def _resolved(
    parameters: Parameters, selectors: Sequence[_Selector], reasons: dict[str, str]
) -> Iterator[tuple[str, ...]]:
    """Go through the names that face each other; where a pattern finds no partner, note the reason."""
    left, *rights = selectors
    stars = left.pattern.count("*")
    for right in rights:
        if right.pattern.count("*") not in (0, stars):
            raise PlanError(
                f"pairs: expected as many stars in {right.pattern!r} as in {left.pattern!r}, or none, got "
                f"{right.pattern.count('*')} and {stars}; what a star stands for on the left is put in on the right"
            )
    regex = re.compile("(.*)".join(map(re.escape, left.pattern.split("*"))))
    matched = [(name, found.groups()) for name in parameters.named if (found := regex.fullmatch(name))]
    if left.pattern in parameters.named:
        matched = [(left.pattern, ())]
    if not matched:
        raise PlanError(_no_such(left.pattern, parameters))
    whole = all(selector.groups is None for selector in selectors)
    complete, first_problem = 0, ""
    for name, parts in matched:
        names = (name, *(_filled(right.pattern, parts) for right in rights))
        reason, problem = _problem(parameters, names, whole)
        if not reason:
            complete += 1
            yield names
        elif not stars or all("*" not in right.pattern for right in rights):
            raise PlanError(problem)
        else:
            reasons.update({each: reason for each in names if each in parameters.named})
            first_problem = first_problem or problem
    if not complete:
        raise PlanError(
            f"pairs: expected {left.pattern!r} to find a partner, got none: {first_problem}; "
            "correct the pattern on the right"
        )


def _filled(pattern: str, parts: Sequence[str]) -> str:
    first, *rest = pattern.split("*")
    return first + "".join(part + text for part, text in zip(parts, rest, strict=False))


def _problem(parameters: Parameters, names: Sequence[str], whole: bool) -> tuple[str, str]:
    """Return why the names can't face each other, in a few words and as a message; or nothing."""
    for name in names:
        if name not in parameters.named:
            return f"no {name}", _no_such(name, parameters)
    shapes = [parameters.shape(name) for name in names]
    if whole and len(set(shapes)) > 1:
        return f"other shape: {', '.join(f'{n} has {s}' for n, s in zip(names, shapes, strict=True))}", (
            f"{' ~ '.join(names)}: expected parameters of one shape, got {shapes}; to pair some of their groups, or a "
            "transpose, give Groups: (name, Groups.outputs())"
        )
    return "", ""


def _no_such(name: str, parameters: Parameters) -> str:
    listed = list(parameters.named)
    shown = ", ".join(listed[:8]) + (", …" if len(listed) > 8 else "")
    return f"pairs: expected {name!r} to name a parameter, got none of that name; there are {shown}: name one of them"


def _facing(parameters: Parameters, names: Sequence[str], selectors: Sequence[_Selector]) -> list[_Facing]:
    """Return the groups of each, equally many: the first of each axis where one has more."""
    given = next((selector.groups for selector in selectors if selector.groups is not None), Groups.whole())
    sides = [_chosen(parameters, name, selector, given) for name, selector in zip(names, selectors, strict=True)]
    title = " ~ ".join(map(str, sides))
    shapes = [(parameters.shape(side.name), side.groups.shape(parameters.shape(side.name))[1]) for side in sides]
    if len({length for _, length in shapes}) > 1:
        told = ", ".join(f"{length} in {shape}" for shape, length in shapes)
        raise PlanError(
            f"{title}: expected groups of one length, got {told}; where layers differ in both sizes pair "
            "Groups.filters(), or Groups.elements()"
        )
    if len({side.grid.ndim for side in sides}) > 1:
        raise PlanError(
            f"{title}: expected groups that are counted along as many axes, got {[s.grid.ndim for s in sides]}; "
            "choose the Groups of each so that they compare"
        )
    block = tuple(min(lengths) for lengths in zip(*(side.grid.shape for side in sides), strict=True))
    for side in sides:
        if side.grid.size == 0 and not side.strict:
            raise PlanError(
                f"{title}: expected groups to pair, got none in {side.name}, whose shape is "
                f"{parameters.shape(side.name)}; leave it out"
            )
        if side.grid.size == 0 or (side.strict and side.grid.shape != block):
            raise PlanError(
                f"{title}: expected the range of {side.name} to choose as many groups as it is paired with, got "
                f"{side.grid.shape} beside {block}; adapt the range"
            )
    corner = tuple(slice(length) for length in block)
    return [_Facing(side.name, side.groups, side.grid[corner], side.strict) for side in sides]


def _chosen(parameters: Parameters, name: str, selector: _Selector, otherwise: Groups) -> _Facing:
    groups = selector.groups or otherwise
    shape = parameters.shape(name)
    count, _ = Member(name, groups).shape(parameters.named)
    grid = np.arange(count).reshape([shape[axis] for axis in groups.axes(len(shape))])
    if selector.part is not None:
        if not grid.ndim:
            raise PlanError(
                f"{name}: expected Groups that are several, got {groups} with {selector.part}; leave it out"
            )
        for length in grid.shape:
            if isinstance(selector.part, range) and any(not 0 <= i < length for i in selector.part):
                raise PlanError(f"{name}: expected {groups} from 0 to {length - 1}, got {selector.part}; shorten it")
        grid = grid[np.ix_(*(_positions(selector.part, length) for length in grid.shape))]
    return _Facing(name, groups, grid, selector.part is not None)


def _positions(part: range | slice, length: int) -> list[int]:
    return list(range(length)[part]) if isinstance(part, slice) else list(part)


class _Table:
    """What faces what so far: labels of every member's groups, each group at most once."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.readings: dict[tuple[str, int], dict[Groups, Member]] = {}
        self.labels: dict[Member, NDArray[np.int64]] = {}
        self.tie: dict[Member, list[Member]] = {}
        self.partners: dict[Member, str] = {}
        self.next = 0

    def face(self, sides: Sequence[_Facing]) -> None:
        """Give the groups of all sides the same labels.

        Raises:
            PlanError: If one of them has a label already, or if its parameter is read in another way that overlaps.
        """
        title = " ~ ".join(map(str, sides))
        members = [self._member(side, title) for side in sides]
        fresh = np.arange(self.next, self.next + sides[0].grid.size)
        self.next += len(fresh)
        for member, side in zip(members, sides, strict=True):
            labels, chosen = self.labels[member], side.grid.reshape(-1)
            if (labels[chosen] >= 0).any():
                itself = bool((labels[chosen] >= fresh[0]).any())
                raise PlanError(
                    f"{member}: expected one partner for each group, got {title}"
                    + ("; it is one parameter: " if itself else f" and {self.partners[member]}: ")
                    + "name what is equal in one entry, as {first: (second, third)}, each once"
                )
            labels[chosen] = fresh
            self.partners.setdefault(member, title)
        self._join(members)

    def ties(self) -> list[Tie]:
        """Return the ties; groups that face none have labels of their own."""
        ties: list[Tie] = []
        for members in {id(members): members for members in self.tie.values()}.values():
            labels = np.concatenate([self.labels[member] for member in members])
            alone = labels < 0
            labels[alone] = self.next + np.arange(alone.sum())
            ties.append(Tie(tuple(members), Partition(labels)))
        return ties

    def _member(self, side: _Facing, title: str) -> Member:
        key = self.parameters.key(side.name)
        for groups, member in self.readings.get(key, {}).items():
            if groups != side.groups and {groups.kind, side.groups.kind} != {"inputs", "outputs"}:
                raise PlanError(
                    f"{side.name}: expected one way to read it, or its inputs and its outputs, got {title} and "
                    f"{self.partners.get(member, str(member))}; pair it once"
                )
        member = self.readings.setdefault(key, {}).setdefault(side.groups, Member(side.name, side.groups))
        if member not in self.labels:
            self.labels[member] = np.full(member.shape(self.parameters.named)[0], -1)
            self.tie[member] = [member]
        return member

    def _join(self, members: Sequence[Member]) -> None:
        first = self.tie[members[0]]
        for member in members:
            if self.tie[member] is not first:
                first += self.tie[member]
                for moved in self.tie[member]:
                    self.tie[moved] = first
