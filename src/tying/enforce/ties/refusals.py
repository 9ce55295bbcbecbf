"""What can't be tied: refused by name, before anything is changed."""

from __future__ import annotations

import numpy as np
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from tying.enforce.ties.bonds import Bonds, split_labels
from tying.enforce.ties.guard import bonds_of
from tying.errors import PlanError
from tying.models import Models, modules_of
from tying.plan import Tie, TiePlan


def refuse_unfit(models: Models, plan: TiePlan, parameters: dict[str, nn.Parameter]) -> None:
    """Raise `PlanError` where the plan does not fit the models, or names what is no plain weight of its own."""
    _refuse_parametrized(models, plan, parameters)
    _refuse_without_shape(plan, parameters)
    plan.check_fits(parameters)
    _refuse_tied_already(models, plan, parameters)
    for tie in plan:
        _refuse_unlike(tie, parameters)


def refuse_lists(bonds: Bonds) -> None:
    """Raise `PlanError` where a module keeps references of its own to a weight that is to be computed."""
    for place in (place for bond in bonds.bonds for place in bond.places if place.expanded):
        module = bonds.module_at(place)
        if isinstance(module, nn.RNNBase):
            raise PlanError(
                f"{place.name}: expected a layer that reads its weight at every call, got {type(module).__name__}, "
                "which keeps a list of its weights; leave it out of the plan"
            )


def _refuse_parametrized(models: Models, plan: TiePlan, parameters: dict[str, nn.Parameter]) -> None:
    modules = dict(modules_of(models))
    for name in (member.parameter for tie in plan for member in tie.members if member.parameter not in parameters):
        path, _, leaf = name.rpartition(".")
        if path in modules and parametrize.is_parametrized(modules[path], leaf):
            raise PlanError(
                f"{name}: expected a plain parameter, got one with a parametrization; call untie_ first, or "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )


def _refuse_without_shape(plan: TiePlan, parameters: dict[str, nn.Parameter]) -> None:
    for name in (member.parameter for tie in plan for member in tie.members):
        if name in parameters and is_lazy(parameters[name]):
            raise PlanError(f"{name}: expected a weight with a shape, got a lazy one; run the model once first")


def _refuse_tied_already(models: Models, plan: TiePlan, parameters: dict[str, nn.Parameter]) -> None:
    stored = {
        id(bond.stored): f"tied with {', '.join(p.name for p in bond.places)}"
        for bonds in bonds_of(models)
        for bond in bonds.bonds
    }
    for tie in plan:
        for member in tie.members:
            if id(parameters[member.parameter]) in stored:
                raise PlanError(
                    f"{member.parameter}: expected a weight that is not tied yet, got one "
                    f"{stored[id(parameters[member.parameter])]}; call untie_ first, and tie all in one plan"
                )


def _refuse_unlike(tie: Tie, parameters: dict[str, nn.Parameter]) -> None:
    names = [member.parameter for member in tie.members]
    each = [parameters[name] for name in names]
    for name, parameter in zip(names, each, strict=True):
        if not (parameter.is_floating_point() or parameter.is_complex()):
            raise PlanError(
                f"{name}: expected a floating-point weight, got {parameter.dtype}; leave it out of the plan"
            )
    labels = split_labels(tie, tuple(tuple(p.shape) for p in each))
    for i, member in enumerate(tie.members):
        for j, other in enumerate(tie.members[:i]):
            if each[i] is not each[j]:
                continue
            alike = member.groups == other.groups and np.array_equal(labels[i], labels[j])
            if names[i] == names[j] or not alike:
                raise PlanError(
                    f"{other} ~ {member}: expected different parameters, got a tie of one with itself ({tie}); drop it"
                )
    traits = {
        "of one dtype": [str(p.dtype) for p in each],
        "on one device": [str(p.device) for p in each],
        "all trained or all frozen": ["trained" if p.requires_grad else "frozen" for p in each],
    }
    for what, found in traits.items():
        if len(set(found)) > 1:
            shown = ", ".join(f"{name} {trait}" for name, trait in zip(names, found, strict=True))
            raise PlanError(f"{' ~ '.join(names)}: expected weights {what}, got {shown}; make them alike first")
