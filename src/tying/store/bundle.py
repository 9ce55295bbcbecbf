"""Several networks as one, and some of them by themselves: what they share is one tensor under several names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from tying.enforce.compaction.description import Description
from tying.errors import FileError, PlanError
from tying.models import Models, by_name
from tying.plan import Member, Partition, Tie, qualified
from tying.store.state import State, views_of


class Together(nn.Module):
    """Networks side by side, under any names: `keys` and `train` too, which a module's own attributes would hide."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._modules.update(models)

    def get_submodule(self, target: str) -> nn.Module:
        """Return the module of this name; each begins with that of a network."""
        first, _, rest = target.partition(".")
        return self._part(first).get_submodule(rest)

    def _part(self, name: str) -> nn.Module:
        part = self._modules.get(name)
        if part is None:
            raise AttributeError(name)
        return part


def together(models: Models) -> nn.Module:
    """Return one module whose names are the full ones: the network itself if it is but one."""
    return models if isinstance(models, nn.Module) else Together(by_name(models))


_ONE = " (an nn.ModuleDict is saved as one network)"


def wanted(path: str | Path, models: Models, name: str | None, stored: Collection[str]) -> dict[str, nn.Module]:
    """Return the networks to read, by the names they have in the file; "" for the one of a file without names.

    Raises:
        FileError: If the file has no networks of these names; lists those it has.
        PlanError: As `by_name`; if there is a name beside models by name.
    """
    listed = ", ".join(map(repr, stored))
    if isinstance(models, nn.Module):
        if not stored and name is not None:
            raise FileError(
                f"{path}: expected a bundle, to read {name!r} of it, got a single network; leave `name` out{_ONE}"
            )
        if stored and name is None:
            raise FileError(
                f"{path}: expected a single network, got a bundle of {listed}; pass `name`, or models by name"
            )
        parts = by_name(models) if name is None else {name: models}
    else:
        parts = by_name(models)
        if name is not None:
            raise PlanError(f"name: expected none beside models by name, got {name!r}; leave it out, or pass one model")
        if not stored:
            raise FileError(
                f"{path}: expected a bundle of {', '.join(map(repr, parts))}, got a single network; "
                f"pass the model itself{_ONE}"
            )
        if not parts:
            raise FileError(f"{path}: expected models by name, got none; the bundle has {listed}")
    for missing in (part for part in parts if stored and part not in stored):
        raise FileError(
            f"{path}: expected a bundle with {missing!r} in it, got one of {listed}; pass one of these names"
        )
    return parts


def below(prefix: str, description: Description) -> Description:
    """Return the description of one network of several, by its own names."""
    inside = ((name.partition("."), entry) for name, entry in description.items())
    return {rest: entry for (first, _, rest), entry in inside if first == prefix}


def prefixed(prefix: str, description: Description) -> Description:
    """Return a network's description by full names: the inverse of `below`."""
    if not prefix:
        return description
    return {qualified(prefix, name) if name else prefix: entry for name, entry in description.items()}


def only(state: State, prefixes: Collection[str]) -> tuple[State, dict[str, str]]:
    """Return the state of some of the networks: what they hold together with others is theirs, once.

    Also returns what each tensor that is theirs is called there, by all the names it has in `state`.
    """
    source = {name: name for name in (*state.tensors, *state.views)} | dict(state.aliases)
    objects: dict[str, Tensor] = {name: view.of(state.tensors[view.base]) for name, view in state.views.items()}
    objects.update(state.tensors)
    first: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for name in (name for name in source if _of(name) in prefixes):
        if source[name] in first:
            aliases[name] = first[source[name]]
        else:
            first[source[name]] = name
    held = {name: objects[old] for old, name in first.items()}
    views = views_of(held)
    lone = {name for old, name in first.items() if old in state.views}
    left = State(
        {name: t.clone() if name in lone else t for name, t in held.items() if name not in views},
        aliases,
        views,
        frozenset(first[name] for name in state.frozen if name in first),
        _some(state.extra, prefixes),
        _some(state.transient, prefixes),
    )
    return left, {name: first[old] for name, old in source.items() if old in first}


def tie_within(tie: Tie, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> Tie | None:
    """Return what is left of a tie in some of the networks, by the names that `only` gave; None if nothing is."""
    counts = [member.groups.shape(shapes[member.parameter])[0] for member in tie.members]
    labels = np.split(tie.partition.labels, np.cumsum(counts)[:-1])
    left = [i for i, member in enumerate(tie.members) if member.parameter in names]
    partition = Partition(np.concatenate([labels[i] for i in left])) if left else Partition([])
    if partition.classes == len(partition):  # each value is there but once
        return None
    members = (tie.members[i] for i in left)
    return Tie(tuple(Member(names[m.parameter], m.groups) for m in members), partition)


def _of(name: str) -> str:
    return name.partition(".")[0]


def _some(named: Mapping[str, Any], prefixes: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if _of(name) in prefixes}
