"""The soft tie: a penalty on the distance between weights that a plan says are equal, as a loss term or as a prox."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, cast

import torch
from torch import Tensor

from tying.errors import PenaltyError, PlanError
from tying.models import Models
from tying.penalties.distances import L2, Distance, as_distance
from tying.penalties.sequences import check_not_negative
from tying.plan import TiePlan
from tying.train.drawn import Drawn, To, check_trained, is_finite, nothing, total_of, weights_of
from tying.train.strengths import Strength, at, per_tie


class SoftTie:
    """Draw together what a plan says is equal: groups with one label, whatever layer or model they are in.

    Ω = Σ over the ties of strength · Σ over the labels of

    | `to`       | the sum over the groups w_1 … w_n of a label                                           |
    |------------|----------------------------------------------------------------------------------------|
    | `"pairs"`  | Σ_{i<j} d(w_i, w_j)                                                                    |
    | `"centre"` | Σ_i d(w_i, w̄), w̄ their mean, which follows them                                        |
    | an anchor  | Σ_i d(w_i, a_i), a_i the same group of a tensor that stays, of the same parameter name |

    and pruned groups (label −1) are drawn to zero: strength · d(w, 0). Two models with whole tensors and `"l2"`:
    Ω = strength · ‖w_A − w_B‖², as in Goodfellow, Bengio, Courville, *Deep Learning*, section 7.9. A single
    model and an anchor of the weights it started from: L2-SP (Li, Grandvalet, Davoine, arXiv 1802.01483).

    Use it in one of two ways, in your own loop: added to the loss, or as a proximal step after the optimizer's. The
    first works with every optimizer, and for `"l2"` and SGD diverges from about learning rate ·
    strength · n = 1 on (n members). The second takes any strength, infinity too, and with `"l1"` and `"norm"` makes
    weights exactly equal, which the loss term never does. For `"l2"` and SGD its limit strength → ∞ is
    `tie_(models, plan, gradient="mean")`.

    Models may differ in architecture; parameters that are not in the plan are free. The plan is checked against the
    models at every call, the rest when it is built.

    Args:
        plan: Which groups are equal: of `match`, `declare`, `discover`, or by hand. With several models by name, the
            parameters are called `"a.fc1.weight"`.
        strength: A number ≥ 0; or a schedule, a function of the progress in [0, 1], as `Tightening`; or either of them
            by pattern of parameter names, as `{"*.fc1.*": 1e-2, "*": 1e-3}`: a tie has that of the first pattern that
            fits one of its members. Infinity is for `prox_` only.
        distance: d: `"l2"` (squared), `"l1"`, `"huber"`, `"cosine"` (1 − cos), `"norm"` (not squared), or one of
            `tying.penalties.distances` with settings of its own, as `Huber(delta=0.1)`.
        to: What each group is drawn to, see above; an anchor is copied here, by parameter name (as `state_dict()` of
            the one model), and must have every parameter of the plan.

    Raises:
        PenaltyError: If strength, distance or `to` is malformed, or `"cosine"` is to draw pruned groups to zero.
        PlanError: If the plan is none, or the anchor does not fit it.

    Example:
        >>> from torch import nn
        >>> from tying.groups import Groups
        >>> from tying.plan import Member, Partition, Tie
        >>> models = {"a": nn.Linear(2, 1), "b": nn.Linear(2, 1, bias=False)}
        >>> members = Member("a.weight", Groups.whole()), Member("b.weight", Groups.whole())
        >>> soft = SoftTie(TiePlan([Tie(members, Partition([0, 0]))]), strength=0.1)
        >>> with torch.no_grad():
        ...     _ = models["a"].weight.fill_(1.0), models["b"].weight.fill_(3.0)
        >>> loss = 0.0 + soft(models)  # 0.0: the losses of the tasks
        >>> round(loss.item(), 6)
        0.8
        >>> soft.prox_(models, step=5.0)
        >>> models["a"].weight.data, models["b"].weight.data
        (tensor([[1.6667, 1.6667]]), tensor([[2.3333, 2.3333]]))
    """

    def __init__(
        self,
        plan: TiePlan,
        strength: Strength,
        distance: str | Distance = "l2",
        *,
        to: Literal["pairs", "centre"] | Mapping[str, Tensor] = "pairs",
    ) -> None:
        if not isinstance(plan, TiePlan):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(f"plan: expected a TiePlan, got {type(plan).__name__}; make one with match or declare")
        if not len(plan):
            raise PlanError("plan: expected at least one tie, got none; see what match did not pair")
        self.plan, self.strength, self.distance, self.to = plan, strength, as_distance(distance), _kind(to)
        self._strengths = per_tie(plan, strength)
        if not self.distance.to_zero:
            _refuse_pruned(plan, self.distance)
        anchors = to if isinstance(to, Mapping) else None
        self._drawn = [Drawn(tie, self.to, anchors) for tie in plan]

    def __call__(self, models: Models, *, progress: float | None = None) -> Tensor:
        """Return Ω, to add to the loss: a differentiable scalar in the weights' common dtype, float32 at least.

        It costs a few passes over the weights of the plan. For `"l2"` and two members its gradient is
        2 · strength · (w_A − w_B). Compiles, is left alone by autocast, and takes shards (DTensor) of whole tensors.

        Args:
            models: Whose parameters the plan names, and only read. A frozen parameter stays, and draws the others;
                a parametrized weight counts as it is computed.
            progress: Of training, in [0, 1]: needed where a strength is a schedule.

        Raises:
            PlanError: Names the parameter that is not there, has another shape, holds integers, or lies elsewhere.
            PenaltyError: If a strength is infinite, or a schedule has no progress or gives no number ≥ 0.
        """
        weights = weights_of(self.plan, models)
        terms: dict[float, list[Tensor]] = {}
        for drawn, strength in zip(self._drawn, at(progress, self._strengths), strict=True):
            if strength == math.inf:
                raise PenaltyError(
                    f"{drawn.tie}: expected a finite strength in a loss, got infinity; use prox_, or tie_ for good"
                )
            if strength:
                terms.setdefault(strength, []).append(drawn.value(weights, self.distance))
        if not terms:
            return nothing(list(weights.values()))
        return total_of([strength * total_of(each) for strength, each in terms.items()])

    @torch.no_grad()
    def prox_(self, models: Models, step: float, *, progress: float | None = None) -> None:
        """Move the weights to argmin_X ½‖X − W‖² + step · Ω(X), in place: call it after `optimizer.step()`.

        `"l2"`: w̄ + (w − w̄) ÷ (1 + 2 · step · strength · n), n the groups of a label (n = 1 for `"centre"`, and an
        anchor, which takes the place of w̄). `"l1"`: by sorting, Shakerinava et al., arXiv 2311.03096. `"huber"`,
        `"norm"`: the difference of two members, or to an anchor, shrinks. Infinite strength gives the projection: all
        groups of a label get their mean bit for bit, pruned ones zero; so does `tie_`, once and for good. `"cosine"`
        has no prox. Ties over the inputs and over the outputs of one parameter are applied in order. For SGD: after
        an optimizer that scales the gradient number by number, as Adam, no prox comes to rest where the loss term does;
        add that instead.

        Computed in float64. All results are found and checked before the first is written.

        Args:
            models: Whose parameters the plan names: written to, none of them frozen, computed or sharded.
            step: How far the optimizer goes along a steady gradient, ≥ 0: of SGD the learning rate ÷ (1 − momentum).
                Training then comes to rest where loss + Ω does; with the bare learning rate the tie is 1 − momentum
                times as strong.
            progress: Of training, in [0, 1]: needed where a strength is a schedule.

        Raises:
            PlanError: As when called, or names the parameter that can't be written to, that is two members of one tie,
                or that several ties share in any other way. Nothing has changed then.
            PenaltyError: As when called, if the distance has no prox for so many members, or names the parameter that
                has NaN or infinity in it. Nothing has changed then.
        """
        length = check_not_negative("step", step)
        weights = weights_of(self.plan, models)
        check_trained(self.plan, weights)
        _check_finite(weights)
        aliases: dict[int, list[str]] = {}
        for name, weight in weights.items():
            aliases.setdefault(id(weight), []).append(name)
        current = dict(weights)
        for drawn, strength in zip(self._drawn, at(progress, self._strengths), strict=True):
            if length and strength:
                for name, new in drawn.prox(current, self.distance, length * strength).items():
                    current.update(dict.fromkeys(aliases[id(weights[name])], new))
        changed = {name: new for name, new in current.items() if new is not weights[name]}
        _check_finite(changed)
        for name, new in changed.items():
            weights[name].copy_(new)

    @torch.no_grad()
    def distances(self, models: Models) -> dict[str, float]:
        """Return how far apart the groups of every tie are, for your log: by the names of its members.

        √Ω with `"l2"` and strength 1, whatever this tie's are, in float64: for two whole tensors, ‖w_A − w_B‖.

        Raises:
            PlanError: As when called.

        Example:
            >>> from torch import nn
            >>> from tying.groups import Groups
            >>> from tying.plan import Tie
            >>> model = nn.Linear(2, 1)
            >>> with torch.no_grad():
            ...     _ = model.weight.copy_(torch.tensor([[1.0, 4.0]]))
            >>> SoftTie(TiePlan([Tie.of("weight", Groups.inputs(), [0, 0])]), strength=0.1).distances(model)
            {'weight[inputs]': 3.0}
        """
        weights = {name: weight.double() for name, weight in weights_of(self.plan, models).items()}
        return {
            " ~ ".join(map(str, drawn.tie.members)): drawn.value(weights, L2()).sqrt().item() for drawn in self._drawn
        }

    def __repr__(self) -> str:
        return f"SoftTie({len(self.plan)} ties, strength={self.strength!r}, distance={self.distance!r}, to={self.to!r})"


def _check_finite(weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        if not is_finite(weight):
            raise PenaltyError(
                f"{name}: expected finite weights, got NaN or infinity; training has diverged: lower the learning "
                "rate, or start again from a checkpoint"
            )


def _kind(to: object) -> To:
    if isinstance(to, Mapping):
        return "anchor"
    if to not in ("pairs", "centre"):
        raise PenaltyError(
            f'to: expected "pairs", "centre" or tensors by parameter name, got {to!r}; for an anchor pass '
            "model.state_dict()"
        )
    return cast(To, to)


def _refuse_pruned(plan: TiePlan, distance: Distance) -> None:
    for tie in plan:
        if tie.partition.pruned:
            raise PenaltyError(
                f"{tie}: expected no pruned groups, got some that {distance} can't draw to zero, as it leaves lengths "
                "free; take another distance, or leave them out of the plan"
            )
