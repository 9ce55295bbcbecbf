"""Hard ties: each value stored once, in one layer, in several, or in several models; and independent copies again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast, get_args

from torch import Tensor, nn

from tying.enforce.ties.bind import bond_of, by_parameters, put_in_force
from tying.enforce.ties.bonds import (
    Bond,
    Bonds,
    Place,
    chain_at,
    is_expansion,
    places_by_parameter,
    renamed,
    replace,
    same_ties,
)
from tying.enforce.ties.expansion import Gradient
from tying.enforce.ties.guard import Guard, bonds_of, guards_of
from tying.enforce.ties.refusals import refuse_lists, refuse_unfit
from tying.enforce.ties.steps import changed, released
from tying.errors import PlanError
from tying.models import Models, callable_parts, modules_of, parameters_of
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
        >>> from tying.enforce.ties.unique import unique_parameters
        >>> [tuple(p.shape) for p in unique_parameters(models)]
        [(3, 4), (3,)]
        >>> untie_(models)
        >>> models["a"].weight is models["b"].weight
        False
    """
    if gradient not in get_args(Gradient):
        raise PlanError(f"gradient: expected 'sum' or 'mean', got {gradient!r}; pass one of the two")
    parameters = parameters_of(models)
    refuse_unfit(models, plan, parameters)
    roots = callable_parts(models)
    places = places_by_parameter(roots)
    built = [bond_of(ties, parameters, places, gradient) for ties in by_parameters(plan, parameters)]
    if not built:
        return
    bonds = Bonds([bond for bond, _ in built])
    guards = [Guard(bonds, prefix, roots[prefix]) for prefix in sorted({p.prefix for b, _ in built for p in b.places})]
    refuse_lists(bonds)
    put_in_force(bonds, [values for _, values in built], guards)


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
    paths = {id(module): path for path, module in modules_of(models)}
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
    paths = {id(module): path for path, module in modules_of(models)}
    return {
        qualified(paths[id(root)], place.key): bond.gradient
        for bonds in bonds_of(models)
        for bond in bonds.bonds
        for place in bonds.present(bond)
        if id(root := bonds.root(place.prefix)) in paths
    }


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
