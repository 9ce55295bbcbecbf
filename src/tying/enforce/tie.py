"""Hard ties: each value stored once, in one layer, in several, or in several models; and independent copies again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from tying.enforce.bonds import (
    Bond,
    Bonds,
    Place,
    chain_at,
    install,
    is_expansion,
    places_by_parameter,
    renamed,
    replace,
    same_ties,
    split_labels,
)
from tying.enforce.expansion import Gradient
from tying.enforce.guard import Guard, bonds_of, guards_of
from tying.enforce.steps import changed, kept, released
from tying.errors import PlanError
from tying.models import Models, by_name, callable_parts, parameters_of
from tying.plan import Tie, TiePlan, qualified


def tie_(models: Models, plan: TiePlan, *, gradient: Gradient = "sum") -> None:
    """Make the plan hold, hard: each tied value is stored once, and every training step keeps it so.

    Whole weights of one shape become one `nn.Parameter` under all their names. Of other ties (transposes, the first
    units of a wider layer, sets of groups) one member keeps a plain parameter if it has every value, and the others
    are computed from it at every read: `model.decoder.parametrizations.weight.original is model.encoder.weight`.
    Where no member has every value, or the tie is inside one parameter, all are computed from a new parameter of
    shape `(K, D)`; with both inputs and outputs of one weight tied it is `(K of outputs, K of inputs · kernel)`.
    A value starts as the mean of its groups, in the weights' dtype.

    Make optimizers afterwards, from `unique_parameters(models)`: one that holds a parameter that was released, or a
    gradient that another one has just used, is stopped at its step. From now on a guard looks at every forward and
    `load_state_dict` of each model, and at the steps of optimizers, whether the ties hold: what broke is mended where
    the values agree, else a `TieError` says where and how. A copy of one of several tied models alone computes under
    `torch.no_grad()`, and is not trained. `check` tells how the ties are; the inverse is `untie_`.

    What the guard can't see: parts of a model that are called, loaded or copied by themselves (their next optimizer
    step it does see); `module.weight.data = …` where the weight is computed (other writes in place are told at the next
    read); modules outside of `models` that share a weight with them: name all models that share.

    Computed weights keep the dense cost of every forward; `compact` is what makes a network smaller and faster.

    Args:
        models: A model, or several by name; written to.
        plan: From `declare`, `match`, `discover` or by hand. Every parameter in one tie, or in one over its inputs and
            one over its outputs.
        gradient: Of a value stored once, from the gradients of the groups it stands for: their "sum", which is the
            gradient of the loss, or their "mean", which moves each weight as far as an untied step would on average.

    Raises:
        PlanError: If the plan does not fit the models or contradicts itself, if a weight is tied or parametrized
            already, or if members differ in dtype, device or in whether they are trained. The models stay as they were.

    Example:
        >>> models = {"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)}
        >>> from tying.find.match import match
        >>> tie_(models, match(models))
        >>> models["a"].weight is models["b"].weight
        True
        >>> from tying.enforce.unique import unique_parameters
        >>> [tuple(p.shape) for p in unique_parameters(models)]
        [(3, 4), (3,)]
        >>> untie_(models)
        >>> models["a"].weight is models["b"].weight
        False
    """
    if gradient not in get_args(Gradient):
        raise PlanError(f"gradient: expected 'sum' or 'mean', got {gradient!r}; pass one of the two")
    parameters = parameters_of(models)
    _refuse_parametrized(models, plan, parameters)
    _refuse_without_shape(plan, parameters)
    plan.check_fits(parameters)
    _refuse_tied_already(models, plan, parameters)
    roots = callable_parts(models)
    places = places_by_parameter(roots)
    built = [_built(ties, parameters, places, gradient) for ties in _by_parameters(plan, parameters)]
    if not built:
        return
    bonds = Bonds([bond for bond, _ in built])
    guards = [Guard(bonds, prefix, roots[prefix]) for prefix in sorted({p.prefix for b, _ in built for p in b.places})]
    for place in (place for bond, _ in built for place in bond.places):
        _refuse_list(place, cast(nn.Module, bonds.module_at(place)))
    _put_in_force(bonds, [values for _, values in built], guards)


def untie_(models: Models) -> None:
    """Give every weight that `tie_` tied a parameter of its own again, with the values it has.

    A tie is undone at all its ends, also in models that are not named here. Make optimizers anew afterwards.
    Parametrizations that are not `tie_`'s are left alone.

    Args:
        models: Written to; models without ties stay as they are.

    Raises:
        PlanError: If a weight got another parametrization on top of its tie. The models stay as they were.
    """
    each = bonds_of(models)
    taken = [(bonds, bond, place) for bonds in each for bond in bonds.bonds for place in bonds.present(bond)]
    for bonds, _, place in taken:
        module = bonds.module_at(place)
        chain = chain_at(module, place.leaf)
        if is_expansion(chain) and len(chain) > 1:
            raise PlanError(
                f"{place.key}: expected the tie to be its only parametrization, got others on top of it; "
                "remove them first (torch.nn.utils.parametrize.remove_parametrizations takes all, the tie with them)"
            )
    own: dict[tuple[int, int], nn.Parameter] = {}
    replaced: list[tuple[nn.Module, Place, Bond]] = []
    for bonds, bond, place in taken:
        module = bonds.module_at(place)
        if module is not None and _has_own(module, place, bond):  # else the tie is broken there already
            replaced.append((module, place, bond))
            if (id(bond), place.member) not in own:
                weight = cast(Tensor, getattr(module, place.leaf)).detach().clone()
                own[id(bond), place.member] = nn.Parameter(weight, bond.stored.requires_grad)
    for module, place, bond in replaced:
        replace(module, place.leaf, own[id(bond), place.member])
        released(bond.stored, place.name, may_return=True)
    for guard in _all_guards(each, models):
        guard.detach()
    changed()


def plan_of(models: Models) -> TiePlan:
    """Return the plan in force on the models, by the names that parameters have in them; empty if there is none."""
    paths = {id(module): path for path, module in _modules(models)}
    ties: list[Tie] = []
    for bonds in bonds_of(models):
        for bond in bonds.bonds:
            names = {
                bond.ties[0].members[place.member].parameter: qualified(path, place.key)
                for place in reversed(bonds.present(bond))
                if (path := paths.get(id(bonds.root(place.prefix)))) is not None
            }
            found = (renamed(tie, names, bond.shapes) for tie in same_ties(bond, bonds))
            ties += [tie for tie in found if tie is not None]
    return TiePlan(ties, {"made by": "tie_"})


def gradients_of(models: Models) -> dict[str, Gradient]:
    """Return how `tie_` combines the gradients of each weight it tied, by name: what `plan_of` does not say."""
    paths = {id(module): path for path, module in _modules(models)}
    return {
        qualified(paths[id(root)], place.key): bond.gradient
        for bonds in bonds_of(models)
        for bond in bonds.bonds
        for place in bonds.present(bond)
        if id(root := bonds.root(place.prefix)) in paths
    }


def _modules(models: Models) -> Iterable[tuple[str, nn.Module]]:
    for prefix, root in by_name(models).items():
        for path, module in root.named_modules():
            yield qualified(prefix, path) if path else prefix, module


def _all_guards(each: Sequence[Bonds], models: Models) -> list[Guard]:
    """The guards of all models that are tied with these."""
    roots = {id(root): root for bonds in each for prefix in bonds.roots if (root := bonds.root(prefix)) is not None}
    found = guards_of({f"m{i}": root for i, root in enumerate(roots.values())}) if roots else []
    known = {id(bonds) for bonds in each}
    return [guard for guard in found if id(guard.bonds) in known]


def _has_own(module: nn.Module, place: Place, bond: Bond) -> bool:
    """Whether a place still uses what is stored."""
    chain = chain_at(module, place.leaf)
    if place.expanded:
        return is_expansion(chain) and chain.original is bond.stored
    return getattr(module, place.leaf, None) is bond.stored


def _by_parameters(plan: TiePlan, parameters: dict[str, nn.Parameter]) -> list[tuple[Tie, ...]]:
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


def _refuse_parametrized(models: Models, plan: TiePlan, parameters: dict[str, nn.Parameter]) -> None:
    modules = dict(_modules(models))
    for name in (member.parameter for tie in plan for member in tie.members if member.parameter not in parameters):
        path, _, leaf = name.rpartition(".")
        if path in modules and parametrize.is_parametrized(modules[path], leaf):
            raise PlanError(
                f"{name}: expected a plain parameter, got one with a parametrization; call untie_ first, or "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )


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


def _built(
    ties: tuple[Tie, ...],
    parameters: dict[str, nn.Parameter],
    places: dict[int, list[tuple[str, str, str]]],
    gradient: Gradient,
) -> tuple[Bond, Tensor]:
    """Return a bond, and the values it is to store; nothing is changed."""
    tie = ties[0]
    _refuse_unlike(tie, parameters)
    members = [parameters[member.parameter] for member in tie.members]
    shapes = tuple(tuple(p.shape) for p in members)
    home = _home(tie, shapes) if len(members) > 1 else None
    plain = [gradient == "sum" and home is not None and _as_home(tie, shapes, home, i) for i in range(len(members))]
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


def _refuse_list(place: Place, module: nn.Module) -> None:
    """Raise `PlanError` where a module keeps references of its own to a weight that is to be computed."""
    if place.expanded and isinstance(module, nn.RNNBase):
        raise PlanError(
            f"{place.name}: expected a layer that reads its weight at every call, got {type(module).__name__}, which "
            "keeps a list of its weights; leave it out of the plan"
        )


def _refuse_without_shape(plan: TiePlan, parameters: dict[str, nn.Parameter]) -> None:
    for name in (member.parameter for tie in plan for member in tie.members):
        if name in parameters and is_lazy(parameters[name]):
            raise PlanError(f"{name}: expected a weight with a shape, got a lazy one; run the model once first")


def _home(tie: Tie, shapes: tuple[tuple[int, ...], ...]) -> int | None:
    """The first member that has every value exactly once: the others can be computed from it."""
    for i, labels in enumerate(split_labels(tie, shapes)):
        if len(labels) == tie.partition.classes == len(np.unique(labels)) and labels.min(initial=0) >= 0:
            return i
    return None


def _as_home(tie: Tie, shapes: tuple[tuple[int, ...], ...], home: int, member: int) -> bool:
    """Whether a member's weight is that of the home itself."""
    labels = split_labels(tie, shapes)
    return (
        tie.members[member].groups == tie.members[home].groups
        and shapes[member] == shapes[home]
        and np.array_equal(labels[member], labels[home])
    )


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
            alike = member.groups == other.groups and np.array_equal(labels[i], labels[j])
            if each[i] is each[j] and (names[i] == names[j] or not alike):
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


def _put_in_force(bonds: Bonds, values: Sequence[Tensor], guards: Sequence[Guard]) -> None:
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
