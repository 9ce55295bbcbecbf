"""Rules, as the user writes them, resolved to the parameters of a model, or refused by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import product
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd  # pyright: ignore[reportPrivateUsage]
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer

from tying.errors import PenaltyError, PlanError
from tying.groups import Groups, Joined
from tying.nn import LocallyConnected1d, LocallyConnected2d
from tying.penalties.norms import Lasso, OnNorms, Penalty, Ridge, acts_on_norms
from tying.penalties.tensors import check_floating
from tying.train.shards import is_sharded, why_not

_COMPUTED = "one that the weight is computed from; remove the parametrization first"

Key: TypeAlias = "str | tuple[str, Groups]"
GroupRules: TypeAlias = "Mapping[Key, Penalty]"
Rules: TypeAlias = "GroupRules | Mapping[str, Penalty] | Mapping[Joined, Penalty] | Mapping[Key | Joined, Penalty]"
"""Spelt out, because the keys of a `Mapping` are invariant."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where groups lie in one parameter."""

    name: str
    parameter: nn.Parameter
    axes: tuple[int, ...]
    """Along which groups are counted."""
    labels: NDArray[np.intp] | None
    """The group of every position along the axis, −1 for none; None: every position is the group of its number."""
    param_group: int
    """The optimizer's param group that holds the parameter."""

    def overlaps(self, other: Place) -> bool:
        """Whether a number of the parameter is in groups of both, counted along the same axes."""
        if self.parameter is not other.parameter or self.axes != other.axes:
            return False
        return self.labels is None or other.labels is None or bool(((self.labels >= 0) & (other.labels >= 0)).any())


@dataclass(frozen=True, eq=False)
class Target:
    """Groups under one penalty."""

    groups: Groups | Joined
    places: tuple[Place, ...]
    count: int
    """G, the number of groups."""
    penalty: Penalty
    key: str
    """Names and groups, `fc1.weight[inputs]`; numbered where several joined groups have the same."""

    @property
    def name(self) -> str:
        """The name of the parameter, or of the first that is joined."""
        return self.places[0].name

    @property
    def kind(self) -> str:
        """For messages."""
        return "joined groups" if isinstance(self.groups, Joined) else str(self.groups)

    def overlaps(self, other: Target) -> bool:
        """Whether a number is in groups of both, counted along the same axes."""
        return any(mine.overlaps(theirs) for mine, theirs in product(self.places, other.places))


def resolve(rules: Rules, model: nn.Module, optimizer: Optimizer) -> list[Target]:
    """Return what the rules ask for, in their order; a shared parameter once, under its first name.

    A parameter that is frozen and in no param group is skipped when a pattern matched it.

    Raises:
        PenaltyError: Names the rule or the parameter that can't be followed, and says why.
    """
    if not isinstance(rules, Mapping) or not rules:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PenaltyError(
            f"rules: expected at least one {{parameter name: penalty}}, got {rules!r}; for instance "
            '{"fc1.weight": GrOWL(4e-3)}'
        )
    names = dict(model.named_parameters(remove_duplicate=False))
    places = _places(optimizer)
    targets: list[Target] = []
    for key, penalty in rules.items():
        for target in _targets(key, penalty, names, places, model):
            _refuse_twice(target, targets)
            same = sum(other.key.partition(" (")[0] == target.key for other in targets)
            targets.append(replace(target, key=f"{target.key} ({same + 1})") if same else target)
    return targets


def _targets(
    key: Any, penalty: Any, names: dict[str, nn.Parameter], places: dict[int, int], model: nn.Module
) -> list[Target]:
    if not isinstance(penalty, Penalty) or isinstance(penalty, type):
        raise PenaltyError(f"{key}: expected a penalty, got {penalty!r}; pass one, for instance GrOWL(4e-3)")
    if isinstance(key, Joined):
        return [_joined(key, penalty, names, places, model)]
    pattern, groups = _read_key(key)
    return [_target(name, names[name], groups, penalty, places, model) for name in _match(pattern, names, places)]


def _read_key(key: Any) -> tuple[str, Groups]:
    pattern, groups = (
        cast("tuple[Any, Any]", key) if isinstance(key, tuple) and len(key) == 2 else (key, Groups.inputs())
    )
    if not isinstance(pattern, str) or not isinstance(groups, Groups):
        raise PenaltyError(
            f"rules: expected a parameter name, (name, Groups) or Joined as key, got {key!r}; "
            'write "fc1.weight" or ("fc1.weight", Groups.outputs())'
        )
    return pattern, groups


def _match(pattern: str, names: dict[str, nn.Parameter], places: dict[int, int]) -> list[str]:
    """Return the names that a rule means: one per parameter, frozen ones outside the optimizer left out."""
    if pattern in names:
        return [pattern]
    matched = [name for name in names if fnmatchcase(name, pattern)]
    if not matched:
        for name, parameter in names.items():  # FullyShardedDataParallel has other names
            reason = why_not(parameter)
            if reason:
                raise PenaltyError(f"{name}: {reason}")
        raise _unknown(pattern, names)
    wanted = {id(names[name]): name for name in reversed(matched) if _trained(names[name], places)}
    if not wanted:
        raise PenaltyError(
            f"rules: expected {pattern!r} to match a parameter in training, got only frozen ones "
            f"({', '.join(matched[:10])}); unfreeze them and give them to the optimizer, or drop the rule"
        )
    return list(reversed(wanted.values()))


def _unknown(pattern: str, names: dict[str, nn.Parameter]) -> PenaltyError:
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
    listed = close or list(names)[:10]
    more = "" if close or len(names) <= 10 else ", …"
    return PenaltyError(
        f"rules: expected a parameter's name or a pattern, got {pattern!r}, which matches none; "
        f"{'similar names are' if close else 'the model has'}: {', '.join(listed)}{more}"
    )


def _trained(parameter: nn.Parameter, places: dict[int, int]) -> bool:
    return parameter.requires_grad or id(parameter) in places


def _target(
    name: str, parameter: nn.Parameter, groups: Groups, penalty: Penalty, places: dict[int, int], model: nn.Module
) -> Target:
    place = _place(name, parameter, places)
    try:
        reason = _why_not(model, name, groups)
        if reason:
            raise PenaltyError(reason)
        count, _ = groups.shape(parameter.shape)
        if is_sharded(parameter):
            _check_shards(parameter, groups, penalty)
        else:
            penalty.prox(groups.read(parameter.detach()), 0.0)  # its dtype, its values, explicit weights' number
    except (PenaltyError, PlanError) as error:
        raise PenaltyError(f"{name}: {error}") from error
    axes = groups.axes(parameter.dim())
    return Target(groups, (replace(place, axes=axes),), count, penalty, f"{name}[{groups}]")


def _check_shards(parameter: Tensor, groups: Groups, penalty: Penalty) -> None:
    """Refuse what a penalty can't do without gathering the weights."""
    if acts_on_norms(penalty):
        if len(groups.axes(parameter.dim())) == parameter.dim() > 1:
            raise PenaltyError(
                f"expected groups of many numbers for a parameter that is sharded, got {groups}, every number a group: "
                "each would travel at every step; use Lasso, or Groups.inputs()"
            )
    elif not isinstance(penalty, (Lasso, Ridge)):
        raise PenaltyError(
            f"expected a penalty on single numbers or on norms for a parameter that is sharded, got {penalty!r}, which "
            "sorts all of them; use Lasso, or GrOWL on groups"
        )
    penalty.prox(torch.zeros(groups.shape(parameter.shape)[0], 1, dtype=parameter.dtype), 0.0)


def _joined(
    joined: Joined, penalty: Penalty, names: dict[str, nn.Parameter], places: dict[int, int], model: nn.Module
) -> Target:
    if not acts_on_norms(penalty):
        raise PenaltyError(
            f"{joined}: expected a penalty on the norms of groups, got {penalty!r}; use GroupLasso or GrOWL, or name "
            "the parameters one by one"
        )
    found: list[Place] = []
    for part in joined.parts:
        if part.parameter not in names:
            raise _unknown(part.parameter, names)
        place = _place(part.parameter, names[part.parameter], places)
        if isinstance(model.get_submodule(part.parameter.rpartition(".")[0]), ParametrizationList):
            raise PenaltyError(f"{part.parameter}: expected a parameter, got {_COMPUTED}")
        place = replace(place, axes=(part.axis,), labels=np.asarray(part.labels, dtype=np.intp))
        _check_part(place, joined, found)
        found.append(place)
    try:
        for place in found:
            check_floating(place.parameter)
        cast(OnNorms, penalty).thresholds(joined.count, 0.0)  # explicit weights' number
    except PenaltyError as error:
        raise PenaltyError(f"{joined}: {error}") from error
    return Target(joined, tuple(found), joined.count, penalty, str(joined))


def _check_part(place: Place, joined: Joined, before: list[Place]) -> None:
    (axis,), shape, labels = place.axes, tuple(place.parameter.shape), cast("NDArray[np.intp]", place.labels)
    if not 0 <= axis < len(shape) or len(labels) != shape[axis]:
        raise PenaltyError(
            f"{joined}: expected an axis of {place.name}, shape {shape}, and a label for each of its positions, got "
            f"axis {axis} and {len(labels)} labels; join the groups of this very model"
        )
    for other in before:
        if other.parameter is place.parameter and (other.axes != place.axes or place.overlaps(other)):
            raise PenaltyError(
                f"{joined}: expected every number in one group, got {place.name} along axes {other.axes[0]} and {axis} "
                "at the same positions; give them separate rules"
            )


def _place(name: str, parameter: nn.Parameter, places: dict[int, int]) -> Place:
    if is_lazy(parameter):
        raise PenaltyError(f"{name}: expected a parameter with a shape, got a lazy one; run the model once first")
    reason = why_not(parameter)
    if reason:
        raise PenaltyError(f"{name}: {reason}")
    if parameter.is_meta:
        raise PenaltyError(
            f"{name}: expected a parameter with numbers, got one on the meta device; load the model first"
        )
    if id(parameter) not in places:
        frozen = "" if parameter.requires_grad else " (it is frozen)"
        raise PenaltyError(
            f"{name}: expected a parameter that this optimizer steps, got one in none of its param groups{frozen}; "
            "add it to the optimizer, or drop the rule"
        )
    if any(stride == 0 and size > 1 for stride, size in zip(parameter.stride(), parameter.shape, strict=True)):
        raise PenaltyError(
            f"{name}: expected a parameter whose numbers lie apart in memory, got an expanded one; clone it first"
        )
    return Place(name, parameter, (), None, places[id(parameter)])


def _refuse_twice(target: Target, targets: list[Target]) -> None:
    for other in targets:
        if target.overlaps(other):
            shared = "" if other.name == target.name else f", which is the same parameter as {other.name}"
            shared = "" if isinstance(target.groups, Joined) else shared
            raise PenaltyError(
                f"{target.name}: expected one penalty on its {target.kind}, got several{shared}; keep one of them"
            )


def _places(optimizer: Optimizer) -> dict[int, int]:
    """Return the param group of each parameter, by identity."""
    if getattr(optimizer, "_overlap_with_ddp", False):  # torch's ZeroRedundancyOptimizer; otherwise it works
        raise PenaltyError(
            f"optimizer: expected one that changes the weights in step(), got {type(optimizer).__name__} with "
            "overlap_with_ddp=True, which changes them in backward(); leave that out"
        )
    for index, group in enumerate(optimizer.param_groups):
        if "lr" not in group:
            raise PenaltyError(
                f"optimizer: expected a learning rate in every param group, got none in group {index}; "
                'use an optimizer whose groups have "lr": it is the step size of the prox'
            )
    return {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}


def _why_not(model: nn.Module, name: str, groups: Groups) -> str | None:
    """Return why dimension 0 or 1 of a parameter is not what `groups` takes it for, or None."""
    if groups.kind in ("elements", "whole"):
        return None
    module = model.get_submodule(name.rpartition(".")[0])
    instead = "use Groups.elements() or Groups.whole(), or tying.groups.Joined along the axis meant"
    says = f"expected a parameter with {groups.kind} as groups, got {type(module).__name__}"
    local = isinstance(module, (LocallyConnected1d, LocallyConnected2d))
    if groups.kind == "positions" and not local:
        return f"{says}, which has no positions; use Groups.outputs() for its dimension 0"
    if groups.kind in ("inputs", "outputs") and local:
        return f"{says}, whose dimension 0 is its positions and dimension 1 its outputs; use Groups.positions()"
    if isinstance(module, _ConvTransposeNd) and groups.kind != "filters" and not name.endswith("bias"):
        return f"{says}, whose dimension 0 is its inputs and dimension 1 its outputs; {instead}, or Groups.filters()"
    if isinstance(module, _ConvNd) and module.groups > 1 and groups.kind == "inputs":
        return f"{says} with groups={module.groups}, whose dimension 1 is not the input channels; {instead}"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return f"{says}, whose dimension 0 is its entries and dimension 1 their features; {instead}"
    if isinstance(module, nn.Bilinear) and not name.endswith("bias") and groups.kind != "outputs":
        return f"{says}, which has two inputs; {instead}"
    if isinstance(module, ParametrizationList):
        return f"{says}: {_COMPUTED}"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and not name.endswith("bias"):
        return f"{says} of transformers, which stores (inputs, outputs); {instead}, or replace it with nn.Linear"
    return None
