"""A plan from trained weights: groups near zero go, groups that resemble each other tie."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tying.errors import PlanError
from tying.find.budget import Candidate, count_bytes, count_values, give_up, least, smallest_within
from tying.find.clusters import LINKAGES, Method, check_method, cluster
from tying.groups import Groups, group_norms
from tying.plan import Member, Tie, TiePlan

PerMember = int | None | Mapping[str | tuple[str, Groups], int | None]
"""One value for all members, or one each: keyed by parameter name, or by (parameter name, Groups)."""


def discover(
    model: nn.Module,
    groups: Mapping[str, Groups | tuple[Groups, ...]],
    *,
    clusters: PerMember = None,
    keep: PerMember = None,
    support: float = 0.05,
    distortion: float | None = None,
    ratio: float | None = None,
    bytes_: int | None = None,
    validate: Callable[[TiePlan], float] | None = None,
    max_drop: float = 0.003,
    method: Method = "ward",
    preference: float = 0.6,
    seed: int = 0,
) -> TiePlan:
    """Find which groups of a trained network can go and which can be equal. The model is not touched.

    A group is pruned (label −1) when its l2 norm is at most `support` times the largest of its parameter: training
    noise regrows exact zeros, so `== 0` finds nothing. The others are clustered. Where one parameter is read in
    two ways, `outputs()` comes before `inputs()` and what the first pruned is zero for the second.

    How far to go is given (`clusters`, `keep`), or chosen by one of `distortion`, `ratio`, `bytes_`, `validate`: each
    member then gives up the same share of its energy, ‖W − PW‖² ÷ ‖W‖², whatever its size. `outputs()` are only pruned
    on that way (tying outputs is a narrower layer), and inputs keep at least as many values as units are left.

    Args:
        model: Any module; its floating-point parameters are read, in float64.
        groups: Parameter name → how to read it as groups (one `Groups`, or several).
        clusters: How many distinct values the groups of a member keep; None: zero groups only. One number for all
            leaves `outputs()` untied: name that member to tie it.
        keep: At most this many groups of a member stay, those of largest norm; None: all within the support.
        support: Relative norm, in [0, 1), at or below which a group counts as zero.
        distortion: The share of its energy, in [0, 1], that each member may give up.
        ratio: Numbers in the named parameters ÷ distinct numbers kept; the fewest ties that reach it.
        bytes_: Bytes for the distinct numbers kept (in the parameter's dtype) and the packed labels.
        validate: Plan → score, higher is better (accuracy on a validation split); the smallest plan whose score is
            within `max_drop` of the score without ties, found by bisection.
        max_drop: For `validate`, in units of the score.
        method: `ward`, `complete`, `average`, `cosine` (linkages), `kmeans`, or `affinity` (affinity propagation
            with the paper's similarity; finds the number of clusters itself).
        preference: For `affinity`: 0.6 (MNIST) or 0.8 (VGG) in the paper's code.
        seed: For `kmeans` and `affinity`; the linkages have no chance in them.

    Raises:
        PlanError: A name that is not a parameter of the model, groups that it doesn't have, weights that are not
            finite, more clusters than non-zero groups, everything pruned, a budget out of reach.

    Source: Zhang, Wang, Figueiredo, Balzano, *Learning to Share*, ICLR 2018 (openreview rypT3fb0b).

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 2, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 1.1, 0.0, 5.0], [2.0, 2.1, 0.01, 5.0]]))
        >>> print(discover(layer, {"weight": Groups.inputs()}, clusters=2))
        TiePlan (discover: ward, support 0.05)
          weight[inputs]: 4 groups → 2 values, 1 pruned
    """
    budgets = {"distortion": distortion, "ratio": ratio, "bytes_": bytes_, "validate": validate}
    chosen = [name for name, value in budgets.items() if value is not None]
    if len(chosen) > 1 or (chosen and clusters is not None):
        raise PlanError(
            f"clusters, {', '.join(budgets)}: expected at most one of them, got several; choose one way to decide"
        )
    check_method(method)
    _check_budget(distortion, ratio, bytes_, max_drop)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    members = _members(groups, parameters)
    most = _per_member(keep, members, "keep")
    provenance = {"discover": f"{method}, support {support:g}"}

    def plan_by(choose: Callable[[Candidate], Tie]) -> TiePlan:
        return TiePlan(_walk(members, parameters, support, most, choose), provenance)

    if not chosen:
        wanted = _per_member(clusters, members, "clusters")
        named = isinstance(clusters, Mapping)
        return plan_by(
            lambda c: c.tie(_labels(c, wanted[c.member], method, preference, seed) if named or c.tieable else None)
        )
    if method not in LINKAGES:
        raise PlanError(
            f"method: expected a linkage {LINKAGES} to choose the clusters by a budget, got {method!r}; "
            "use method='ward', or give `clusters`"
        )

    def plan_at(share: float) -> TiePlan:
        return plan_by(lambda candidate: give_up(candidate, share, method))

    if validate is not None:
        return smallest_within(plan_at, validate, max_drop)
    if ratio is not None:
        total = sum(parameters[name].numel() for name in groups)
        return least(plan_at, lambda plan: count_values(plan, parameters) * ratio <= total, f"ratio={ratio:g}")
    if bytes_ is not None:
        return least(plan_at, lambda plan: count_bytes(plan, parameters) <= bytes_, f"bytes_={bytes_}")
    return plan_at(cast("float", distortion))


def _check_budget(distortion: float | None, ratio: float | None, bytes_: int | None, max_drop: float) -> None:
    if distortion is not None and not 0 <= distortion <= 1:
        raise PlanError(f"distortion: expected a share in [0, 1], got {distortion}; 0.2 is a good start")
    for name, value, hint in (("ratio", ratio, "24 is 24 times fewer"), ("bytes_", bytes_, "20000 is 20 kB")):
        if value is not None and not 1 <= value < math.inf:
            raise PlanError(f"{name}: expected a finite number ≥ 1, got {value}; {hint}")
    if not 0 <= max_drop < math.inf:
        raise PlanError(f"max_drop: expected a finite number ≥ 0, got {max_drop}; in units of the score")


def _members(groups: Mapping[str, Groups | tuple[Groups, ...]], parameters: Mapping[str, Tensor]) -> list[Member]:
    if not isinstance(groups, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError(
            f"groups: expected Groups by parameter name, got {type(groups).__name__}; "
            "write for instance {'fc1.weight': Groups.inputs()}"
        )
    members = [
        Member(name, kind)
        for name, kinds in groups.items()
        for kind in sorted((kinds,) if isinstance(kinds, Groups) else kinds, key=lambda kind: kind != Groups.outputs())
    ]
    if not members:
        raise PlanError(
            "groups: expected at least one parameter, got none; name one, as {'fc1.weight': Groups.inputs()}"
        )
    for member in members:
        _check(member, parameters)
    return members


def _walk(
    members: list[Member],
    parameters: Mapping[str, Tensor],
    support: float,
    most: Mapping[Member, int | None],
    choose: Callable[[Candidate], Tie],
) -> list[Tie]:
    """Choose a tie for one member after the other; what one prunes is zero for the next of that parameter."""
    if not 0 <= support < 1:
        raise PlanError(f"support: expected a relative norm in [0, 1), got {support}; 0.05 is the usual choice")
    current = {m.parameter: parameters[m.parameter].detach().cpu().double() for m in members}
    units: dict[str, int] = {}
    ties: list[Tie] = []
    for member in members:
        weight = current[member.parameter]
        matrix = member.groups.read(weight)
        kept = _support(group_norms(matrix).numpy(), support, most[member], member)
        tie = choose(Candidate(member, kept, matrix.numpy(), units.get(member.parameter, 1)))
        if member.groups == Groups.outputs():
            units[member.parameter] = tie.partition.classes
        current[member.parameter] = member.groups.write(tie.partition.prune(matrix), weight.shape)
        ties.append(tie)
    return ties


def _support(norms: NDArray[np.float64], support: float, most: int | None, member: Member) -> NDArray[np.int64]:
    largest = norms.max(initial=0.0)
    kept = np.flatnonzero(norms > support * largest)
    if not len(kept):
        raise PlanError(
            f"{member}: expected a group that is not zero, got {len(norms)} zero groups; "
            "train with less strength: this layer has lost everything"
        )
    if most is not None and most < 1:
        raise PlanError(f"keep: expected at least 1 group of {member}, got {most}; ask for 1 or more")
    if most is not None and most < len(kept):
        kept = np.sort(kept[np.argsort(-norms[kept], kind="stable")[:most]])
    return kept


def _check(member: Member, parameters: Mapping[str, Tensor]) -> None:
    parameter = parameters.get(member.parameter)
    if parameter is None:
        raise PlanError(
            f"{member.parameter}: expected a parameter of the model, got none of that name; "
            f"the model has {', '.join(parameters) or 'no parameters'}: name one of them"
        )
    member.shape(parameters)
    if not parameter.is_floating_point() or not torch.isfinite(parameter).all():
        raise PlanError(
            f"{member.parameter}: expected finite floating-point weights, got {parameter.dtype} with "
            f"{int((~torch.isfinite(parameter)).sum())} NaN or inf; train again with a smaller learning rate"
        )


def _labels(
    candidate: Candidate, clusters: int | None, method: Method, preference: float, seed: int
) -> NDArray[np.int64] | None:
    if clusters is None and method != "affinity":
        return None
    try:
        return cluster(candidate.matrix[candidate.kept], method, clusters, seed=seed, preference=preference)
    except PlanError as error:
        raise PlanError(f"{candidate.member}: {error}") from error


def _per_member(given: PerMember, members: list[Member], name: str) -> dict[Member, int | None]:
    by_key = given if isinstance(given, Mapping) else dict.fromkeys([m.parameter for m in members], given)
    result: dict[Member, int | None] = dict.fromkeys(members)
    for key, value in by_key.items():
        matching = [m for m in members if key in (m.parameter, (m.parameter, m.groups))]
        if not matching:
            raise PlanError(
                f"{name}: expected keys among {', '.join(map(str, members))}, got {key!r}; "
                "name a parameter, or a (parameter, Groups) pair, that `groups` names too"
            )
        if value is not None and not isinstance(value, (int, np.integer)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(f"{name}: expected a whole number or None, got {value!r}; round it")
        result.update(dict.fromkeys(matching, value))
    return result
