"""Ties in force: the parameter that is stored, and every place of every model that uses it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tying.enforce.ties.expansion import Expansion, Gradient, Stage
from tying.groups import Groups
from tying.plan import Member, Partition, Tie, qualified


@dataclass(frozen=True)
class Place:
    """An attribute of a module that uses what is stored: as it is, or expanded."""

    prefix: str
    """The name of the model; "" if there was but one."""
    path: str
    leaf: str
    member: int
    """Of the tie."""
    expanded: bool

    @property
    def key(self) -> str:
        """The name within its model: `fc1.weight`."""
        return qualified(self.path, self.leaf)

    @property
    def name(self) -> str:
        """The full name: `a.fc1.weight`."""
        return qualified(self.prefix, self.key)

    @property
    def state_key(self) -> str:
        """What the model's state dict calls the tensor that stands here."""
        return qualified(self.path, f"parametrizations.{self.leaf}.original") if self.expanded else self.key


@dataclass(eq=False)
class Bond:
    """One tie in force, or two over the inputs and the outputs of one parameter."""

    ties: tuple[Tie, ...]
    gradient: Gradient
    shapes: tuple[tuple[int, ...], ...]
    """Of the members' weights."""
    home: int | None
    """The member in whose shape the values are stored; None: they are stored as `(K, D)`."""
    stored: nn.Parameter
    places: tuple[Place, ...]
    shape: tuple[int, ...]
    """Of what is stored."""
    loaded: tuple[frozenset[str], int] | None = field(default=None, compare=False)
    """Whose state dicts brought the values, one after another, and the version that the parameter had then."""
    stepped: Any = field(default=None, compare=False)
    """Which optimizer has used the gradient, and which gradient; weakly. None once there is more of it."""

    watched: int = field(default=0, compare=False)
    """The id of the parameter whose gradient is watched."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stepped": None, "watched": 0}

    def values_in(self, tensor: Tensor) -> Tensor:
        """Return what is stored, or is to be, as `(K, D)`: the values that `labels` count."""
        return tensor if self.home is None else self.ties[0].members[self.home].groups.read(tensor)

    def adopt(self, parameter: nn.Parameter) -> None:
        """Take this parameter for what is stored; where no weight is computed from it, its shape may be another."""
        self.stored = parameter
        if tuple(parameter.shape) != self.shape and not self.computes:
            self.shape = tuple(parameter.shape)
            self.shapes = (self.shape,) * len(self.shapes)
            members = tuple(Member(member.parameter, Groups.whole()) for member in self.ties[0].members)
            self.ties = (Tie(members, Partition([0] * len(members))),)

    @property
    def computes(self) -> bool:
        """Whether a weight is computed from what is stored."""
        return any(place.expanded for place in self.places)

    def expansion(self, member: int, device: torch.device) -> Expansion:
        """Return what computes a member's weight from what is stored."""
        if len(self.ties) == 2:
            return self._two_stages(device)
        tie = self.ties[0]
        source = None
        if self.home is not None:
            source = (tie.members[self.home].groups, self.shapes[self.home])
        return Expansion(
            tie.members[member].parameter,
            Stage(
                tie.members[member].groups,
                self.labels(member),
                tie.partition.classes,
                self.shapes[member],
                source=source,
                sizes=tie.partition.sizes if self.gradient == "mean" else None,
                device=device,
            ),
        )

    def _two_stages(self, device: torch.device) -> Expansion:
        inputs, outputs = (tie.partition for tie in self.ties)
        (shape,) = self.shapes
        smaller = (shape[0], inputs.classes, *shape[2:])
        mean = self.gradient == "mean"
        return Expansion(
            self.ties[0].members[0].parameter,
            Stage(
                Groups.inputs(),
                inputs.labels,
                inputs.classes,
                shape,
                source=(Groups.inputs(), smaller),
                sizes=inputs.sizes if mean else None,
                device=device,
            ),
            Stage(
                Groups.outputs(),
                outputs.labels,
                outputs.classes,
                smaller,
                sizes=outputs.sizes if mean else None,
                device=device,
            ),
        )

    def labels(self, member: int) -> NDArray[np.int64]:
        """Return which stored value each group of a member takes, −1 for none."""
        each = split_labels(self.ties[0], self.shapes)
        if self.home is None:
            return each[member]
        position = np.empty(self.ties[0].partition.classes + 1, dtype=np.int64)
        position[each[self.home]] = np.arange(len(each[self.home]))
        position[-1] = -1
        return position[each[member]]


def split_labels(tie: Tie, shapes: tuple[tuple[int, ...], ...]) -> list[NDArray[np.int64]]:
    """Return the labels of each member's groups."""
    counts = [member.groups.shape(shape)[0] for member, shape in zip(tie.members, shapes, strict=True)]
    return np.split(tie.partition.labels, np.cumsum(counts)[:-1])


class Bonds:
    """What one call of `tie_` put in force, known to the guards of all its models.

    A copy, deep or by pickle, knows the models that were copied with it: `absent` names those that were not.
    """

    def __init__(self, bonds: list[Bond]) -> None:
        self.bonds = bonds
        self.roots: dict[str, weakref.ref[nn.Module]] = {}
        self.gone: set[str] = set()
        """Models that were gone before this was copied: nobody misses them."""

    @property
    def absent(self) -> list[str]:
        """The models that were not copied with the others: this is a copy without them."""
        named = {place.prefix for bond in self.bonds for place in bond.places}
        return sorted(named - set(self.roots) - self.gone)

    def module_at(self, place: Place) -> nn.Module | None:
        """Return the module of a place, if its model is there and has one."""
        root = self.root(place.prefix)
        try:
            return None if root is None else root.get_submodule(place.path)
        except AttributeError:
            return None

    def root(self, prefix: str) -> nn.Module | None:
        """Return the model of this name, unless it is gone."""
        reference = self.roots.get(prefix)
        return None if reference is None else reference()

    def present(self, bond: Bond) -> list[Place]:
        """Return the places of a bond whose models are there."""
        return [place for place in bond.places if self.root(place.prefix) is not None]

    def __getstate__(self) -> dict[str, Any]:
        gone = {prefix for prefix in self.roots if self.root(prefix) is None}
        return {"bonds": self.bonds, "gone": self.gone | gone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.bonds, self.gone, self.roots = state["bonds"], state["gone"], {}


def install(module: nn.Module, place: Place, bond: Bond) -> None:
    """Let the module use what is stored, in place of the parameter it has."""
    if not place.expanded:
        setattr(module, place.leaf, bond.stored)
        return
    own = cast(nn.Parameter, getattr(module, place.leaf))
    setattr(module, place.leaf, nn.Parameter(own.detach().clone(), own.requires_grad))  # which registering writes to
    expansion = bond.expansion(place.member, bond.stored.device)
    parametrize.register_parametrization(module, place.leaf, expansion, unsafe=True)
    chain_at(module, place.leaf).original = bond.stored


def replace(module: nn.Module, leaf: str, parameter: nn.Parameter) -> None:
    """Give the module a parameter of its own again."""
    if chain_at(module, leaf) is not None:
        # A deep copy shares the class that holds the weight's property: deleting it there would break the original.
        shared: Any = type(module)
        module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
        chain_at(module, leaf).original = parameter
        parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
    else:
        setattr(module, leaf, parameter)


def chain_at(module: nn.Module | None, leaf: str) -> Any:
    """Return the list of parametrizations of a weight, or None."""
    if module is None or not parametrize.is_parametrized(module, leaf):
        return None
    return cast("nn.ModuleDict", module.parametrizations)[leaf]


def is_expansion(chain: Any) -> bool:
    """Whether a list of parametrizations begins with that of a tie."""
    return chain is not None and isinstance(chain[0], Expansion)


def same_ties(bond: Bond, bonds: Bonds) -> tuple[Tie, ...]:
    """Return the ties of a bond, with the labels that a state dict may have brought."""
    if len(bond.ties[0].members) > 1:
        return bond.ties
    chain = chain_at(bonds.module_at(bond.places[0]), bond.places[0].leaf)
    if not is_expansion(chain):
        return bond.ties
    stages = cast(Expansion, chain[0]).each_stage()
    return tuple(Tie(tie.members, stage.partition) for tie, stage in zip(bond.ties, stages, strict=True))


def renamed(tie: Tie, names: dict[str, str], shapes: tuple[tuple[int, ...], ...]) -> Tie | None:
    """Return the tie under other names, without the members that have none; None if nothing is left of it."""
    there = [i for i, member in enumerate(tie.members) if member.parameter in names]
    if not there:
        return None
    labels = split_labels(tie, shapes)
    partition = Partition(np.concatenate([labels[i] for i in there]))
    if len(there) == 1 < len(tie.members) and partition.classes == len(partition):
        return None
    members = (tie.members[i] for i in there)
    return Tie(tuple(Member(names[m.parameter], m.groups) for m in members), partition)


def places_by_parameter(roots: Mapping[str, nn.Module]) -> dict[int, list[tuple[str, str, str]]]:
    """Return where each parameter stands, by its id: the model's name, the module's path, the attribute."""
    places: dict[int, list[tuple[str, str, str]]] = {}
    for prefix, root in roots.items():
        for path, module in root.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                places.setdefault(id(parameter), []).append((prefix, path, leaf))
    return places
