"""Optimizers that would step a tied weight twice, or a weight that is no more: stopped before the step."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from tying.enforce.ties.bonds import Bond, Bonds
from tying.errors import TieError


class Guarded(Protocol):
    """What is asked before a step."""

    bonds: Bonds
    prefix: str

    def intact(self) -> bool:
        """Whether everything stands where it stood."""
        ...

    def examine(self) -> None:
        """Mend or raise."""
        ...

    def refuse_training(self) -> None:
        """Raise if this is a copy without the models to which it is tied."""
        ...


@dataclass
class _Known:
    """What an optimizer holds, as of a generation."""

    generation: int
    parameters: tuple[int, ...]
    guards: list[weakref.ref[Guarded]] = field(default_factory=list["weakref.ref[Guarded]"])
    stepped: list[Bond] = field(default_factory=list["Bond"])


_guards: weakref.WeakSet[Guarded] = weakref.WeakSet()
_released: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_known: weakref.WeakKeyDictionary[Optimizer, _Known] = weakref.WeakKeyDictionary()
_generations = itertools.count()
_generation = next(_generations)
_hook: object = None


def watch(guard: Guarded) -> None:
    """Ask this guard before every step of an optimizer that holds a parameter of its ties."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_before_step)
    _guards.add(guard)
    changed()


def changed() -> None:
    """Tell that parameters were tied, untied or replaced: what optimizers hold is looked at anew."""
    global _generation
    _generation = next(_generations)


def released(parameter: Tensor, name: str, *, may_return: bool = False) -> None:
    """Remember a parameter that no model has any more, or that may be put into one again."""
    _released[parameter] = (name, may_return)
    changed()


def kept(parameter: Tensor) -> None:
    """Forget that a parameter was released: a model has it again."""
    _released.pop(parameter, None)


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    for reference in _look(optimizer).guards:
        guard = reference()
        if guard is not None:
            if not guard.intact():
                guard.examine()
            guard.refuse_training()
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    for bond in _look(optimizer).stepped:  # which mending may have changed
        bond.loaded = None
        _refuse_second_step(optimizer, bond, recomputed=closure is not None)


def _look(optimizer: Optimizer) -> _Known:
    """Find the guards that concern an optimizer, again only after a change.

    Raises:
        TieError: If it holds a parameter that was released, or one that is tied twice.
    """
    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    ids = tuple(map(id, parameters))
    known = _known.get(optimizer)
    if known is not None and (known.generation, known.parameters) == (_generation, ids):
        return known
    for parameter in parameters:
        if parameter not in _released:
            continue
        name, may_return = _released[parameter]
        if not (may_return and _in_use(parameter)):
            raise TieError(
                f"optimizer: expected one made after parameters were tied, untied or replaced, got a "
                f"{type(optimizer).__name__} with the former parameter of {name}; make it anew from "
                "tying.unique_parameters(models)"
            )
    held = Counter(ids)
    known = _Known(_generation, ids)
    bonds: dict[int, Bond] = {}
    for guard in list(_guards):
        if any(id(tensor) in held for tensor in _tensors(guard)):
            known.guards.append(weakref.ref(guard))
            bonds.update({id(bond): bond for bond in guard.bonds.bonds if id(bond.stored) in held})
    for bond in bonds.values():
        if held[id(bond.stored)] > 1:
            raise TieError(
                f"optimizer: expected {_names(bond)} once, as they are one parameter, got it {held[id(bond.stored)]} "
                "times; make the optimizer from tying.unique_parameters(models)"
            )
        _watch_gradient(bond)
    known.stepped = list(bonds.values())
    _known[optimizer] = known
    return known


def _in_use(parameter: Tensor) -> bool:
    """Whether a module has taken a released parameter back; slow, and asked only before an error."""
    held = (vars(each).get("_parameters", {}) for each in gc.get_objects() if issubclass(type(each), nn.Module))
    return any(p is parameter for parameters in held for p in parameters.values())


def _tensors(guard: Guarded) -> Iterable[Tensor]:
    """What the guard's ties store, and what stands in their places."""
    for bond in guard.bonds.bonds:
        yield bond.stored
        for place in bond.places:
            module = guard.bonds.module_at(place) if place.prefix == guard.prefix else None
            yield from module.parameters() if isinstance(module, nn.Module) else ()


def _watch_gradient(bond: Bond) -> None:
    """Forget who stepped as soon as another backward adds to the gradient."""
    if bond.watched == id(bond.stored) or not (bond.stored.is_leaf and bond.stored.requires_grad):
        return
    known = weakref.ref(bond)

    def accumulated(_: Tensor) -> None:
        there = known()
        if there is not None:
            there.stepped = None

    bond.stored.register_post_accumulate_grad_hook(accumulated)
    bond.watched = id(bond.stored)  # no weak reference, with which PyTorch swaps no parameter


def _refuse_second_step(optimizer: Optimizer, bond: Bond, *, recomputed: bool) -> None:
    gradient = bond.stored.grad
    if gradient is None or recomputed:
        return
    if bond.stepped is not None:
        other, seen = bond.stepped[0](), bond.stepped[1]()
        if other is not None and other is not optimizer and seen is gradient and bool(gradient.any()):
            raise TieError(
                f"optimizer: expected one step for the gradient of {_names(bond)}, which are one parameter, got a "
                f"second one, by {type(optimizer).__name__} after {type(other).__name__}; let one optimizer have it: "
                "tying.unique_parameters(models)"
            )
    bond.stepped = (weakref.ref(optimizer), TensorWeakRef(gradient))


def _names(bond: Bond) -> str:
    return " and ".join(dict.fromkeys(place.name for place in bond.places))
