"""The guard of a tied model: a tie that broke is mended where the values agree, and told where they don't."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from tying.enforce.ties.bonds import Bond, Bonds, Place, chain_at
from tying.enforce.ties.checkpoints import prepare
from tying.enforce.ties.mend import mend
from tying.enforce.ties.steps import released, watch
from tying.errors import TieError
from tying.models import Models, by_name
from tying.plan import qualified

Check = tuple[dict[str, Any], str, object]
"""A dictionary of a module, a key, and the object that should stand there."""


class Guard:
    """Looks at every forward of a model whether all its ties hold, by identity: no value is compared while they do.

    It belongs to the model: a copy of the model has a copy of it. It also looks at every `load_state_dict`, and is
    asked by optimizers (see `tying.enforce.ties.steps`).
    """

    def __init__(self, bonds: Bonds, prefix: str, root: nn.Module) -> None:
        self.bonds, self.prefix = bonds, prefix
        self._join(root)

    def attach(self, root: nn.Module) -> None:
        """Hang the guard on the model."""
        root.register_forward_pre_hook(self)
        root.register_load_state_dict_pre_hook(self.before_load)
        root.register_load_state_dict_post_hook(self.after_load)

    def detach(self) -> None:
        """Take the guard off the model."""
        root = self.bonds.root(self.prefix)
        for hooks in ("_forward_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"):
            held = cast("dict[int, Any]", getattr(root, hooks, {}))
            for key, hook in list(held.items()):
                if _owner(hook) is self:
                    del held[key]

    def __call__(self, module: nn.Module, inputs: object) -> None:
        """Before a forward.

        Raises:
            TieError: If a tie is broken and its values differ.
        """
        if self.bonds.root(self.prefix) is None:
            self._join(module)  # a shallow copy has outlived its original
        if not self.intact():
            # comparing and mending are not to be traced; a plain decorator would import the compiler, which takes long
            (cast(Any, torch.compiler).disable(self.examine) if "torch._dynamo" in sys.modules else self.examine)()
        elif self._alone and torch.is_grad_enabled():
            self.refuse_training()

    def intact(self) -> bool:
        """Whether everything stands where it stood when it was last examined."""
        if torch.compiler.is_compiling():  # which can't trace the short cut, nor other models
            return all(held.get(key) is expected for held, key, expected in self._own)
        for other in self._others:
            if other() is None:
                return False
        for held, children in self._containers:
            if list(held.values()) != children:  # modules are equal only to themselves
                return False
        for held, key, expected in self._slots:  # noqa: SIM110
            if held.get(key) is not expected:  # a generator takes half as long again
                return False
        return True

    def examine(self) -> None:
        """Look closely, mend what can be mended, and remember how everything stands now.

        Raises:
            TieError: If a tie is broken and its values differ, or if this copy is to be trained alone.
        """
        if not mend(self.bonds):
            self.remember()
        if self._alone and torch.is_grad_enabled():
            self.refuse_training()

    def before_load(
        self, module: nn.Module, state: dict[str, Tensor], prefix: str, local: dict[str, Any], *rest: object
    ) -> None:
        """Refuse a state dict that contradicts a tie, before anything of this model is loaded.

        Raises:
            TieError: If it has different values for what is one value.
        """
        assign = bool(local.get("assign_to_params_buffers", False))
        self._arriving = prepare(self.bonds, self.prefix, state, prefix, assign=assign)
        self._replaced = dict(module.named_parameters()) if assign else {}

    def after_load(self, module: nn.Module, incompatible: object) -> None:
        """Mend what `assign=True` took apart; an optimizer with the former parameters would train none of the new."""
        mend(self.bonds, loaded=self.prefix)
        self.remember()
        for bond, models in self._arriving:
            bond.loaded = (models, bond.stored._version)
        there = {id(parameter) for parameter in module.parameters()}
        for name, parameter in self._replaced.items():
            if id(parameter) not in there:
                released(parameter, qualified(self.prefix, name))
        self._arriving, self._replaced = [], {}

    def __getstate__(self) -> dict[str, Any]:
        return {"bonds": self.bonds, "prefix": self.prefix, "root": self.bonds.root(self.prefix)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.bonds, self.prefix = state["bonds"], state["prefix"]
        if state["root"] is not None:
            self._join(state["root"])

    def _join(self, root: nn.Module) -> None:
        self.bonds.roots[self.prefix] = weakref.ref(root)
        self._own: list[Check] = [({}, "", self)]  # which fails: the model may not be whole yet
        self._slots, self._containers = self._own, list[tuple[dict[str, Any], list[Any]]]()
        self._others: tuple[weakref.ref[nn.Module], ...] = ()
        self._alone: tuple[str, ...] = ()
        self._arriving: list[tuple[Bond, frozenset[str]]] = []
        self._replaced: dict[str, nn.Parameter] = {}
        watch(self)

    def remember(self) -> None:
        """Take what stands in all places of all models now for what should stand there."""
        checks: dict[tuple[int, str], Check] = {}
        self._own = []
        for place in (place for bond in self.bonds.bonds for place in self.bonds.present(bond)):
            found = list(_checks_of(cast(nn.Module, self.bonds.root(place.prefix)), place))
            checks.update({(id(held), key): (held, key, expected) for held, key, expected in found})
            self._own += found if place.prefix == self.prefix else []
        self._slots, self._containers = _condensed(list(checks.values()))
        self._others = tuple(root for prefix, root in self.bonds.roots.items() if prefix != self.prefix and root())
        self._alone = tuple(self.bonds.absent)

    def refuse_training(self) -> None:
        """Raise `TieError` if this is a copy of one of several tied models alone: it computes, and is not trained."""
        for bond in self.bonds.bonds if self._alone else ():
            there = [place.name for place in bond.places if place.prefix == self.prefix]
            away = [place.name for place in bond.places if place.prefix in self._alone]
            if there and away and bond.stored.requires_grad:
                raise TieError(
                    f"{there[0]}: expected to be trained together with {away[0]}, to which it is tied, got a copy of "
                    f"{self.prefix!r} alone; copy the models together (copy.deepcopy of the dict of models), run this "
                    "copy under torch.no_grad(), or untie_ it"
                )


def guards_of(models: Models) -> list[Guard]:
    """Return the guards that hang on the models or on parts of them."""
    found: dict[int, Guard] = {}
    for root in by_name(models).values():
        for module in root.modules():
            for hook in module._forward_pre_hooks.values():  # pyright: ignore[reportPrivateUsage]
                if isinstance(hook, Guard):
                    found[id(hook)] = hook
    return list(found.values())


def bonds_of(models: Models) -> list[Bonds]:
    """Return the ties in force on the models, by the calls of `tie_` that made them."""
    return list({id(guard.bonds): guard.bonds for guard in guards_of(models)}.values())


def _checks_of(root: nn.Module, place: Place) -> Iterator[Check]:
    module = root
    for name in place.path.split(".") if place.path else ():
        yield module._modules, name, module._modules.get(name)  # pyright: ignore[reportPrivateUsage]
        module = module.get_submodule(name)
    if not place.expanded:
        yield module._parameters, place.leaf, module._parameters.get(place.leaf)  # pyright: ignore[reportPrivateUsage]
        return
    chain = chain_at(module, place.leaf)
    yield cast("nn.ModuleDict", module.parametrizations)._modules, place.leaf, chain  # pyright: ignore[reportPrivateUsage]
    yield chain._parameters, "original", chain.original
    yield chain._modules, "1", None  # another parametrization on top


def _condensed(checks: list[Check]) -> tuple[list[Check], list[tuple[dict[str, Any], list[Any]]]]:
    """Modules in one container are looked at together, which takes a fifth of the time; the rest one by one."""
    by_container: dict[int, list[Check]] = {}
    for check in checks:
        by_container.setdefault(id(check[0]) if isinstance(check[2], nn.Module) else -1, []).append(check)
    slots = by_container.pop(-1, [])
    several = [each for each in by_container.values() if len(each) > 2]
    slots += [check for each in by_container.values() if len(each) <= 2 for check in each]
    return slots, [(each[0][0], list(each[0][0].values())) for each in several]


def _owner(hook: Any) -> object:
    """The guard behind a hook, as torch keeps it."""
    hook = getattr(hook, "hook", hook)
    return getattr(hook, "__self__", hook)
