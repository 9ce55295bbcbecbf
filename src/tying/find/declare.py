"""A plan from prior knowledge: these parameters, or these groups of one parameter, are equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from torch import nn

from tying.errors import PlanError
from tying.find.pairs import Parameters
from tying.groups import Groups
from tying.models import Models, by_name
from tying.patterns import fitting
from tying.plan import Member, Partition, Tie, TiePlan, qualified

Selector = str | type[nn.Module] | tuple[str | type[nn.Module], Groups]
"""A name or pattern (`"blocks.*.fc1.weight"`) or a module type (its `weight`s), with the Groups to read it by."""


def declare(
    models: Models,
    *,
    labels: Mapping[tuple[str, Groups], ArrayLike] | None = None,
    equal: Sequence[Sequence[Selector]] = (),
) -> TiePlan:
    """Say which weights are equal. The models are only read.

    Args:
        models: A module, or modules by name: the parameters of `{"a": model}` are called "a.fc1.weight".
        labels: `(parameter, Groups)` → one label per group: the same label is the same value, −1 is zero.
        equal: Sets of selectors; the parameters that a set selects are equal to each other, group by group. A
            selector without `Groups` reads the whole parameter; `[("encoder.weight", Groups.outputs()),
            ("decoder.weight", Groups.inputs())]` is a transposed tie. A weight with several names in one model
            goes by any of them, and counts once.

    Raises:
        PlanError: A selector that matches nothing, a set with fewer than two parameters, groups that don't compare.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"encoder": nn.Linear(8, 3), "decoder": nn.Linear(3, 8)})
        >>> transposed = [("encoder.weight", Groups.outputs()), ("decoder.weight", Groups.inputs())]
        >>> print(declare(model, equal=[transposed]))
        TiePlan (declare: by hand)
          encoder.weight[outputs] ~ decoder.weight[inputs]: 6 groups → 3 values, 0 pruned
    """
    known = Parameters.of(models)
    parameters = known.named
    ties = [_labelled(key, given) for key, given in (labels or {}).items()]
    for selectors in equal:
        if isinstance(selectors, str):
            raise PlanError(
                f"equal: expected sets of parameters, got the name {selectors!r}; write equal=[[{selectors!r}, ...]]"
            )
        members = _select(models, known, selectors)
        if len(members) < 2:
            raise PlanError(
                f"equal: expected at least two parameters for {_listed(selectors)}, got {len(members)}; "
                "widen the pattern"
            )
        counts = [member.shape(parameters)[0] for member in members]
        if len(set(counts)) > 1:
            raise PlanError(
                f"{' ~ '.join(map(str, members))}: expected as many groups in each, got {counts}; "
                "choose the Groups of each member so that they compare"
            )
        shapes = [tuple(parameters[m.parameter].shape) for m in members if m.groups == Groups.whole()]
        if len(set(shapes)) > 1:  # as many numbers each, but in another order
            raise PlanError(
                f"{' ~ '.join(map(str, members))}: expected parameters of one shape, got {shapes}; for a transposed "
                "tie give the Groups: (name, Groups.outputs()) with (name, Groups.inputs())"
            )
        ties.append(Tie(tuple(members), Partition(np.tile(np.arange(counts[0]), len(members)))))
    plan = TiePlan(ties, {"declare": "by hand"})
    plan.check_fits(parameters)
    return plan


def _labelled(key: tuple[str, Groups], labels: ArrayLike) -> Tie:
    if not isinstance(key, tuple) or len(key) != 2:  # pyright: ignore[reportUnnecessaryIsInstance, reportUnnecessaryComparison]
        raise PlanError(
            f"labels: expected a parameter's name and its Groups as key, got {key!r}; "
            "write for instance ('fc1.weight', Groups.inputs())"
        )
    return Tie.of(*key, labels)


def _select(models: Models, known: Parameters, selectors: Sequence[Selector]) -> list[Member]:
    """Return what the set selects, in its order: of a weight with several names in one model, the first selected."""
    first: dict[tuple[tuple[str, int], Groups], str] = {}
    members: list[Member] = []
    for selector in selectors:
        groups = selector[1] if isinstance(selector, tuple) else Groups.whole()
        names = _names(models, known, selector)
        # What is selected twice by one name stays: the tie says so.
        members += [Member(n, groups) for n in names if first.setdefault((known.key(n), groups), n) == n]
    return members


def _names(models: Models, known: Parameters, selector: Selector) -> list[str]:
    """Return the names that a selector stands for."""
    pattern = selector[0] if isinstance(selector, tuple) else selector
    if isinstance(pattern, str):
        found = [pattern] if pattern in known.named else fitting(pattern, known.named)
    else:
        modules = ((p, name, m) for p, model in by_name(models).items() for name, m in model.named_modules())
        weights = (qualified(p, qualified(name, "weight")) for p, name, m in modules if isinstance(m, pattern))
        found = [name for name in weights if name in known.named]
    if not found:
        raise PlanError(
            f"{_listed([selector])}: expected to match a parameter of the model, got none; the model has "
            f"{', '.join(known.named)}: name one of them"
        )
    return found


def _listed(selectors: Sequence[Selector]) -> str:
    return ", ".join(str(s[0] if isinstance(s, tuple) else s) for s in selectors)
