"""Numbers that a module's forward takes from its attributes, brought to what is left: found by trial, never believed.

`self.num_heads`, `self.all_head_size`, a list of sizes for `split`: nothing says which of a module's integers counts
what was cut. Those that equal a size from before may be set to the size after; the network is run and compared, and
what it computes the same without stays as it was. Modules of one class read their attributes in one way: what an
attribute is the size of is chosen for all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from tying.errors import CompactError

Attributes: TypeAlias = Mapping[str, Mapping[str, Any]]
"""By module name, then by the attribute's name."""

TRIALS = 48
"""So many ways to set the attributes are tried: half of them with those of the innermost modules alone."""
MARK = "_tying_attributes"
"""Where a module keeps the names of the attributes that were set, for the record of a file."""


class Kind(Enum):
    """What a size is the size of."""

    HEADS = auto()
    """How many heads, or groups, there are."""
    KEYS = auto()
    """How many heads of keys, each of which several of queries may share."""
    KEY_FEATURES = auto()
    """The features of all heads of keys."""
    TENSOR = auto()
    """The length of an axis of a tensor."""


@dataclass(frozen=True)
class Size:
    """A size, before and after the cut."""

    kind: Kind
    before: int
    after: int
    tensor: str = ""
    """Its name in the module."""
    axis: int = 0

    @property
    def of(self) -> tuple[Kind, str, int]:
        """What it is the size of."""
        return self.kind, self.tensor, self.axis


@dataclass(frozen=True)
class Change:
    """What changed for a module."""

    modules: tuple[str, ...]
    """The modules whose attributes may say its sizes, from the inside out."""
    sizes: tuple[Size, ...]


@dataclass(frozen=True)
class Epsilon:
    """So many times the eps that PyTorch takes where none is given, for the dtype that a module's weight has."""

    ratio: float

    def of(self, weight: Tensor) -> float:
        """Return the eps; that of float32 for what is shorter, since PyTorch computes in float32 there."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.finfo(dtype).eps * self.ratio


def set_attributes_(model: nn.Module, attributes: Attributes) -> None:
    """Set attributes of modules, and note that it was done.

    Raises:
        CompactError: If a module does not let its attribute be set.
    """
    for path, values in attributes.items():
        module = model.get_submodule(path)
        for name, value in values.items():
            if isinstance(value, Epsilon):
                value = value.of(cast(Tensor, module.weight))
            try:
                setattr(module, name, value)
            except Exception as error:
                raise CompactError(
                    f"{path or 'model'}: expected an attribute {name!r} that can be set to {value}, as its layers are "
                    f"cut, got {type(error).__name__}: {error}; tie the model with tie_ instead"
                ) from error
        module.__dict__[MARK] = sorted({*module.__dict__.get(MARK, ()), *values})


@contextmanager
def attributes_kept(model: nn.Module) -> Generator[None, None, None]:
    """Give all modules the attributes back that they have now, whatever a forward or a setter does to them."""
    before = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]  # pyright: ignore[reportPrivateUsage]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            for held, kept in ((module.__dict__, attributes), (module._buffers, buffers)):  # pyright: ignore[reportPrivateUsage]
                held.clear()
                held.update(kept)


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
        setattr(module, name, type(present)(value) if isinstance(present, tuple) else value)
    module.__dict__[MARK] = sorted({*module.__dict__.get(MARK, ()), *recorded})


def fitting(
    model: nn.Module, changes: Sequence[Change], fits: Callable[[Attributes], None], known: Attributes
) -> Attributes:
    """Return the attributes with which the cut network fits: none that it fits without.

    Args:
        model: As it was before cutting. Not written to.
        changes: By the modules concerned.
        fits: Raises CompactError where the network with these attributes does not compute the same.
        known: Attributes that need no trial.

    Raises:
        CompactError: That of the first trial, if none fits.
    """
    first: CompactError | None = None
    for attributes in _trials(model, changes, known):
        error = _misfit(attributes, fits)
        if error is None:
            return _needed(attributes, fits)
        first = first or error
    assert first is not None
    raise first


def _misfit(attributes: Attributes, fits: Callable[[Attributes], None]) -> CompactError | None:
    try:
        fits(attributes)
    except CompactError as error:
        return error
    return None


def _needed(attributes: Attributes, fits: Callable[[Attributes], None]) -> Attributes:
    """What is left of attributes that fit once all that can be dropped is: by name, then module by module."""
    left = {path: dict(values) for path, values in attributes.items()}
    for name in dict.fromkeys(name for values in attributes.values() for name in values):
        holding = [path for path, values in left.items() if name in values]
        for paths in [holding, *([path] for path in holding if len(holding) > 1)]:
            fewer = {
                path: kept
                for path, values in left.items()
                if (kept := {n: v for n, v in values.items() if n != name or path not in paths})
            }
            if fewer != left and _misfit(fewer, fits) is None:
                left = fewer
    return left


def _trials(model: nn.Module, changes: Sequence[Change], known: Attributes) -> Iterator[Attributes]:
    """Yield ways to set the attributes, each once: none, those of the innermost modules that have any, then of all."""
    seen: list[Attributes] = [{}]
    yield {}
    for every, limit in ((False, TRIALS // 2), (True, TRIALS)):
        options = list(_options(model, changes, known, every).values())
        for chosen in _choices([len(values) for values in options]):
            attributes: dict[str, dict[str, Any]] = {}
            for values, choice in zip(options, chosen, strict=True):
                for (path, name), value in values[choice - 1].items() if choice else ():
                    attributes.setdefault(path, {})[name] = value
            if attributes in seen:
                continue
            if len(seen) >= limit:
                break
            seen.append(attributes)
            yield attributes


def _choices(counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield choices of one option each, 0 = none: all first ones, none at all, then what differs from these ever more.

    Example:
        >>> list(_choices([1, 2]))[:6]
        [(1, 1), (0, 0), (0, 1), (1, 0), (1, 2), (1, 0)]
    """
    for far in range(len(counts) + 1):
        for usual in (1, 0):
            for places in itertools.combinations(range(len(counts)), far):
                others = [[n for n in range(counts[place] + 1) if n != usual] for place in places]
                for values in itertools.product(*others):
                    changed = dict(zip(places, values, strict=True))
                    yield tuple(changed.get(place, usual) for place in range(len(counts)))


_Values: TypeAlias = dict[tuple[str, str], Any]
"""By module and attribute."""


def _options(
    model: nn.Module, changes: Sequence[Change], known: Attributes, every: bool
) -> dict[tuple[type, str], list[_Values]]:
    """Return for each attribute of each class of modules the values that it may have instead, distinct ones."""
    found: dict[tuple[type, str], dict[str, dict[Any, Any]]] = {}
    for change in changes:
        for path in change.modules:
            module = model.get_submodule(path)
            fitting_here = {
                name: options
                for name, value in vars(module).items()
                if name not in known.get(path, {}) and (options := dict(_instead(value, change.sizes)))
            }
            for name, options in fitting_here.items():
                found.setdefault((type(module), name), {}).setdefault(path, {}).update(options)
            if fitting_here and not every:
                break
    result: dict[tuple[type, str], list[_Values]] = {}
    for (kind, name), modules in found.items():
        distinct = result.setdefault((kind, name), [])
        for of in next(iter(modules.values())):
            values = {(path, name): options[of] for path, options in modules.items() if of in options}
            if len(values) == len(modules) and values not in distinct:
                distinct.append(values)
    return {key: values for key, values in result.items() if values}


def _instead(value: Any, sizes: Sequence[Size]) -> Iterator[tuple[Any, Any]]:
    """Yield what an attribute may be the size of, and what it is then; of several numbers, all or one may change.

    Only of plain numbers and sequences: not of flags, of enumerations, of sequences whose items have names.
    """
    if type(value) is int:
        for size in sizes:
            if value == size.before:
                yield size.of, size.after
    elif type(value) in (list, tuple, torch.Size):
        items = cast("Sequence[Any]", value)
        after = {size.before: size.after for size in reversed(sizes)}
        at = [i for i, item in enumerate(items) if type(item) is int and item in after]
        if not all(type(item) is int for item in items):
            return
        for places in [at, *([i] for i in at if len(at) > 1)] if at else []:
            yield tuple(places), cast(Any, type(items))([after[n] if i in places else n for i, n in enumerate(items)])


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
