"""Numbers that a module's forward takes from its attributes, brought to what is left: found by trial, never believed.

`self.num_heads`, `self.all_head_size`, a list of sizes for `split`: nothing says which of a module's integers counts
what was cut. Those that equal a size from before are set to the size after; then the network is run and compared.
Modules of one class read their attributes in one way: what fits is chosen for all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from tying.errors import CompactError

Attributes: TypeAlias = dict[str, dict[str, Any]]
"""By module name, then by the attribute's name."""

TRIALS = 48
"""So many ways to set the attributes are tried."""
MARK = "_tying_attributes"
"""Where a module keeps the names of the attributes that were set, for the record of a file."""


@dataclass(frozen=True)
class Change:
    """What changed for a module: sizes before and after."""

    modules: tuple[str, ...]
    """The modules whose attributes may say them, from the inside out."""
    sizes: tuple[tuple[str, int, int], ...]
    """What it is the size of, before, after."""


@dataclass(frozen=True)
class Epsilon:
    """So many times the eps of the dtype that a module's weight has."""

    ratio: float


def set_attributes_(model: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Set attributes of modules, and note that it was done."""
    for path, values in attributes.items():
        module = model.get_submodule(path)
        for name, value in values.items():
            if isinstance(value, Epsilon):
                value = torch.finfo(cast(Tensor, module.weight).dtype).eps * value.ratio
            setattr(module, name, value)
        module.__dict__[MARK] = sorted({*module.__dict__.get(MARK, ()), *values})


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that were set because of what was cut; tuples as lists, as JSON has them."""
    return {name: _listed(getattr(module, name)) for name in module.__dict__.get(MARK, ())}


def restore_attributes_(module: nn.Module, recorded: Mapping[str, Any]) -> None:
    """Set attributes as recorded.

    Raises:
        ValueError: If the module has no such attribute, or one of another kind.
    """
    for name, value in recorded.items():
        if name not in vars(module) or not _alike(vars(module)[name], value):
            raise ValueError(f"{name}={value!r}")
        present = vars(module)[name]
        setattr(module, name, tuple(value) if isinstance(present, tuple) else value)
    module.__dict__[MARK] = sorted({*module.__dict__.get(MARK, ()), *recorded})


def fitting(model: nn.Module, changes: Sequence[Change], fits: Callable[[Attributes], None]) -> Attributes:
    """Return the attributes with which the cut network fits.

    Args:
        model: As it was before cutting. Not written to.
        changes: By the modules concerned.
        fits: Raises CompactError where the network with these attributes does not compute the same.

    Raises:
        CompactError: That of the first trial, if none fits.
    """
    first: CompactError | None = None
    for tried, attributes in enumerate(_ways(model, changes)):
        if tried >= TRIALS:
            break
        try:
            fits(attributes)
        except CompactError as error:
            first = first or error
        else:
            return attributes
    assert first is not None
    raise first


def _ways(model: nn.Module, changes: Sequence[Change]) -> Iterator[Attributes]:
    """Yield ways to set the attributes, each once: the innermost modules that have any, then all of them."""
    seen: list[Attributes] = []
    for every in (False, True):
        candidates = _candidates(model, changes, every)
        for chosen in itertools.product(*(options.values() for options in candidates.values())):
            attributes: Attributes = {}
            for values in chosen:
                for path, name, value in values:
                    attributes.setdefault(path, {})[name] = value
            if attributes not in seen:
                seen.append(attributes)
                yield attributes
            if len(seen) > TRIALS:
                return


_Values: TypeAlias = tuple[tuple[str, str, Any], ...]


def _candidates(model: nn.Module, changes: Sequence[Change], every: bool) -> dict[tuple[type, str], dict[str, _Values]]:
    """Return for each attribute of each class of modules, by what it may be the size of, its values; or none at all."""
    found: dict[tuple[type, str], list[dict[str, tuple[str, str, Any]]]] = {}
    for change in changes:
        for path in change.modules:
            module = model.get_submodule(path)
            options = {
                name: {what: (path, name, new) for what, new in _options(value, change.sizes)}
                for name, value in vars(module).items()
            }
            for name, each in options.items():
                if each:
                    found.setdefault((type(module), name), []).append(each)
            if any(options.values()) and not every:
                break
    result: dict[tuple[type, str], dict[str, _Values]] = {}
    for key, modules in found.items():
        shared = [what for what in modules[0] if all(what in each for each in modules)]
        shared.sort(key=lambda what: _unlikely(key[1], what))
        ways = {what: tuple(each[what] for each in modules) for what in shared}
        if _unlikely(key[1], "") > 0:
            result[key] = {"": (), **ways}
        else:
            result[key] = {**ways, "": ()}
    return result


def _unlikely(attribute: str, what: str) -> int:
    """How little the name of an attribute sounds like what it would count: the likely ways come first."""
    if "head_dim" in attribute or ("head_size" in attribute and "all" not in attribute):
        return 2  # heads go as a whole: their own size stays
    counts = any(word in attribute for word in ("heads", "groups", "n_head", "num_"))
    return int(bool(what) and counts != what.startswith("count"))


def _options(value: Any, sizes: Sequence[tuple[str, int, int]]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        for what, before, after in sizes:
            if value == before:
                yield what, after
    elif isinstance(value, (tuple, list)) and value and all(type(item) is int for item in cast("list[Any]", value)):
        items = list(cast("Sequence[int]", value))
        after = {before: after for _, before, after in reversed(sizes)}
        if any(item in after for item in items):
            yield "each", type(value)([after.get(item, item) for item in items])


def _alike(present: Any, value: Any) -> bool:
    """Whether a recorded value can take the place of what an attribute is."""
    if present is None:
        return type(value) is float
    if isinstance(present, (tuple, list)) and isinstance(value, list):
        items = cast("list[Any]", value)
        return len(items) == len(cast("list[Any]", present)) and all(type(item) is int for item in items)
    return type(value) is type(present) and type(value) in (int, float)


def _listed(value: Any) -> Any:
    return list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value
