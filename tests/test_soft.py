"""Soft ties over real models: against slow loops, finite differences, and the hard tie that they tend to."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils import parametrizations

from test_distances import distance_by_hand
from tying.enforce.ties.tie import tie_
from tying.enforce.ties.unique import unique_parameters
from tying.errors import PenaltyError, PlanError
from tying.find.match import match
from tying.groups import Groups
from tying.models import Models, parameters_of
from tying.penalties.distances import L1, L2, Cosine, Distance, Huber, Norm
from tying.plan import Member, Partition, Tie, TiePlan
from tying.train.soft import SoftTie
from tying.train.strengths import Tightening

WHOLE, INPUTS, OUTPUTS, FILTERS, ELEMENTS = (
    Groups.whole(),
    Groups.inputs(),
    Groups.outputs(),
    Groups.filters(),
    Groups.elements(),
)
DISTANCES = [L2(), L1(), Huber(0.4), Cosine(), Norm()]


def tied(labels: list[int], *members: tuple[str, Groups]) -> Tie:
    return Tie(tuple(Member(*member) for member in members), Partition(labels))


def whole(*names: str) -> Tie:
    return tied([0] * len(names), *((name, WHOLE) for name in names))


# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    build: Callable[[], Models]
    ties: list[Tie]

    @property
    def plan(self) -> TiePlan:
        return TiePlan(self.ties)

    def models(self, seed: int = 0) -> Models:
        torch.manual_seed(seed)
        models = self.build()
        for module in [models] if isinstance(models, nn.Module) else models.values():
            module.double()
        return models


def small(outputs: int = 2, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2, bias), nn.Tanh(), nn.Linear(2, outputs))


def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))


CASES = {
    "two models": Case(
        lambda: {"a": small(), "b": small()},
        [whole("a.0.weight", "b.0.weight"), whole("a.0.bias", "b.0.bias")],
    ),
    "two architectures, only some parameters pair": Case(
        lambda: {"a": small(3), "b": deep()}, [whole("a.0.weight", "b.0.weight")]
    ),
    "three models": Case(
        lambda: {"a": small(), "b": deep(), "c": small(1)},
        [whole("a.0.weight", "b.0.weight", "c.0.weight"), whole("a.0.bias", "c.0.bias")],
    ),
    "four models": Case(lambda: {name: small() for name in "abcd"}, [whole(*(f"{name}.0.weight" for name in "abcd"))]),
    "an encoder and a decoder": Case(
        lambda: nn.ModuleDict({"encoder": nn.Linear(4, 3), "decoder": nn.Linear(3, 4)}),
        [tied([0, 1, 2] * 2, ("encoder.weight", OUTPUTS), ("decoder.weight", INPUTS))],
    ),
    "the first units of a wider layer": Case(
        lambda: {"a": nn.Linear(3, 2), "b": nn.Linear(3, 4)},
        [tied([0, 1, 0, 1, 2, 3], ("a.weight", OUTPUTS), ("b.weight", OUTPUTS))],
    ),
    "groups of one layer, some pruned": Case(
        lambda: nn.Linear(6, 2), [tied([0, 1, -1, 0, -1, 0], ("weight", INPUTS)), tied([0, -1], ("bias", ELEMENTS))]
    ),
    "kernels in another order": Case(
        lambda: {"a": nn.Conv2d(2, 2, 2), "b": nn.Conv2d(1, 3, 2)},
        [tied([0, 1, 2, -1, 1, 0, 0], ("a.weight", FILTERS), ("b.weight", FILTERS))],
    ),
    "outputs of a convolution and of a layer": Case(
        lambda: {"a": nn.Conv2d(1, 3, 2), "b": nn.Linear(4, 3)},
        [tied([0, 1, 2] * 2, ("a.weight", OUTPUTS), ("b.weight", OUTPUTS))],
    ),
    "members of different sizes whose labels repeat": Case(
        lambda: {"a": nn.Linear(2, 1), "b": nn.Linear(2, 3)},
        [tied([0, 1, 0, 1], ("a.weight", OUTPUTS), ("b.weight", OUTPUTS))],
    ),
    "two groups of one label, three of another": Case(
        lambda: {"a": nn.Linear(5, 2)}, [tied([0, 1, 1, 0, 1], ("a.weight", INPUTS))]
    ),
}


def arrays_of(plan: TiePlan, models: Models) -> dict[str, Tensor]:
    known = parameters_of(models)
    return {m.parameter: known[m.parameter].detach().clone() for tie in plan for m in tie.members}


def anchor_for(case: Case) -> dict[str, Tensor]:
    return arrays_of(case.plan, case.models(seed=1))


def omega_by_hand(
    plan: TiePlan, weights: Mapping[str, Tensor], distance: Distance, to: str | Mapping[str, Tensor] = "pairs"
) -> float:
    """The double loop, label by label, group by group."""
    total = 0.0
    for tie in plan:
        groups = tie.matrix(weights).numpy()
        labels = tie.partition.labels
        anchors = None if isinstance(to, str) else tie.matrix(to).numpy()
        for i, group in enumerate(groups):
            if labels[i] < 0:
                total += distance_by_hand(distance, group, np.zeros_like(group))
            elif anchors is not None:
                total += distance_by_hand(distance, group, anchors[i])
        for label in range(tie.partition.classes) if anchors is None else ():
            shared = groups[labels == label]
            if to == "pairs":
                total += sum(distance_by_hand(distance, x, y) for x, y in itertools.combinations(shared, 2))
            else:
                total += sum(distance_by_hand(distance, x, shared.mean(axis=0)) for x in shared)
    return total


def forms(case: Case) -> dict[str, str | dict[str, Tensor]]:
    return {"pairs": "pairs", "centre": "centre", "anchor": anchor_for(case)}


def combinations(solvable: bool = False) -> list:
    found = []
    for name, distance, form in itertools.product(CASES, DISTANCES, ("pairs", "centre", "anchor")):
        most = max(int(tie.partition.sizes.max(initial=0)) for tie in CASES[name].ties)
        pruned = any(tie.partition.pruned for tie in CASES[name].ties)
        any_number = isinstance(distance, L2) or form == "anchor" or (isinstance(distance, L1) and form == "pairs")
        if isinstance(distance, Cosine) and (pruned or solvable):
            continue
        if not solvable or most <= 2 or any_number:
            found.append(pytest.param(name, distance, form, id=f"{name}-{distance}-{form}"))
    return found


# ---------------------------------------------------------------- value and gradient


def law_of_value(case: Case, distance: Distance, form: str, compute: Callable[[SoftTie, Models], Tensor]) -> None:
    models, to = case.models(), forms(case)[form]
    found = compute(SoftTie(case.plan, 0.7, distance, to=to), models)
    expected = 0.7 * omega_by_hand(case.plan, arrays_of(case.plan, models), distance, to)
    assert found.dtype == torch.float64
    assert found.shape == ()
    np.testing.assert_allclose(found.item(), expected, rtol=1e-12)


@pytest.mark.parametrize(("name", "distance", "form"), combinations())
def test_the_value_is_that_of_the_double_loop(name: str, distance: Distance, form: str) -> None:
    law_of_value(CASES[name], distance, form, lambda soft, models: soft(models))


@pytest.mark.parametrize(
    "broken",
    [
        lambda soft, models: soft(models) / 2,
        lambda soft, models: SoftTie(soft.plan, soft.strength, L2(), to="centre")(models),
        lambda soft, models: SoftTie(TiePlan(list(soft.plan)[:1]), soft.strength, L2())(models),
        lambda soft, models: SoftTie(soft.plan, soft.strength, L1())(models),
    ],
)
def test_half_of_it_another_form_or_another_distance_fails_the_law(broken: Callable) -> None:
    with pytest.raises(AssertionError):
        law_of_value(CASES["three models"], L2(), "pairs", broken)


def test_pruned_groups_are_drawn_to_zero() -> None:
    case = CASES["groups of one layer, some pruned"]
    pruned = TiePlan([Tie.of("weight", INPUTS, [-1] * 6)])
    models = case.models()
    torch.testing.assert_close(SoftTie(pruned, 2.0)(models), 2 * models.weight.square().sum())


class Holder(nn.Module):
    """The soft tie as a function of the weights."""

    def __init__(self, soft: SoftTie, models: Models) -> None:
        super().__init__()
        self.soft = soft
        self.models = models if isinstance(models, nn.Module) else nn.ModuleDict(dict(models))
        self.alone = isinstance(models, nn.Module)

    def forward(self) -> Tensor:
        return self.soft(self.models if self.alone else dict(self.models.items()))  # pyright: ignore


def law_of_gradient(case: Case, distance: Distance, form: str, soft_of: Callable[..., SoftTie] = SoftTie) -> None:
    models, to = case.models(), forms(case)[form]
    holder = Holder(soft_of(case.plan, 0.7, distance, to=to), models)
    wanted = [f"models.{name}" for name in arrays_of(case.plan, models)]
    values = [dict(holder.named_parameters())[name].detach().clone().requires_grad_() for name in wanted]

    def function(*tensors: Tensor) -> Tensor:
        return torch.func.functional_call(holder, dict(zip(wanted, tensors, strict=True)), ())

    assert torch.autograd.gradcheck(function, values, eps=1e-7, atol=1e-5, raise_exception=False)


@pytest.mark.parametrize(("name", "distance", "form"), combinations())
def test_the_gradient_is_that_of_finite_differences(name: str, distance: Distance, form: str) -> None:
    law_of_gradient(CASES[name], distance, form)


class OneEnd(SoftTie):
    def __call__(self, models: Models, *, progress: float | None = None) -> Tensor:
        value = super().__call__(models, progress=progress)
        return value.detach() + (value - value.detach()) / 2


def test_half_the_gradient_fails_the_law() -> None:
    with pytest.raises(AssertionError):
        law_of_gradient(CASES["two models"], L2(), "pairs", OneEnd)


def test_the_gradient_of_the_textbooks_penalty_in_closed_form_and_symmetric() -> None:
    case = CASES["two models"]
    models = case.models()
    soft = SoftTie(case.plan, 0.7)
    soft(models).backward()
    for leaf in ("weight", "bias"):
        mine, theirs = getattr(models["a"][0], leaf), getattr(models["b"][0], leaf)
        torch.testing.assert_close(mine.grad, 2 * 0.7 * (mine - theirs).detach(), rtol=1e-14, atol=0)
        assert torch.equal(mine.grad, -theirs.grad)
    assert models["a"][2].weight.grad is None
    swapped = {"a": models["b"], "b": models["a"]}
    for distance in DISTANCES:
        soft = SoftTie(case.plan, 0.7, distance)
        assert soft(models).item() == pytest.approx(soft(swapped).item(), rel=1e-14)


@pytest.mark.parametrize("distance", DISTANCES, ids=repr)
def test_equal_models_have_no_gradient(distance: Distance) -> None:
    for count in (2, 3, 4):
        model = small().double()
        models = {name: copy.deepcopy(model) for name in "abcd"[:count]}
        soft = SoftTie(match(models), 3.0, distance)
        value = soft(models)
        value.backward()
        assert value.item() == pytest.approx(0.0, abs=1e-14)
        for parameter in parameters_of(models).values():
            assert parameter.grad is not None
            assert parameter.grad.abs().max() <= 1e-14


# ---------------------------------------------------------------- the prox


def law_of_prox(case: Case, distance: Distance, form: str, prox_: Callable[[SoftTie, Models, float], None]) -> None:
    """F(Y) ≥ F(X) + ½‖Y − X‖² for all Y: X is the minimiser of ½‖X − W‖² + step · Ω(X), which is strongly convex."""
    generator = torch.Generator().manual_seed(0)
    to = forms(case)[form]
    for step, strength in ((0.1, 0.5), (0.5, 2.0), (0.01, 3000.0)):
        models = case.models()
        before = arrays_of(case.plan, models)
        prox_(SoftTie(case.plan, strength, distance, to=to), models, step)
        after = arrays_of(case.plan, models)

        def objective(weights: dict[str, Tensor], rate: float = step * strength, before=before) -> float:
            near = sum(0.5 * float((weights[name] - before[name]).square().sum()) for name in before)
            return near + rate * omega_by_hand(case.plan, weights, distance, to)

        ends = [before, case.plan.project(before)]
        ends += [
            {n: t + torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in after.items()}
            for _ in range(6)
        ]
        least = objective(after)
        for end, fraction in itertools.product(ends, (1.0, 0.1, 1e-3)):
            other = {name: after[name] + fraction * (end[name] - after[name]) for name in after}
            moved = sum(0.5 * float((other[name] - after[name]).square().sum()) for name in after)
            assert objective(other) - least - moved >= -1e-10 * (1 + step * strength) * (1 + least)


@pytest.mark.parametrize(("name", "distance", "form"), combinations(solvable=True))
def test_the_prox_is_the_minimiser(name: str, distance: Distance, form: str) -> None:
    law_of_prox(CASES[name], distance, form, lambda soft, models, step: soft.prox_(models, step))


@pytest.mark.parametrize(
    "broken",
    [
        lambda soft, models, step: soft.prox_(models, step / 2),
        lambda soft, models, step: SoftTie(soft.plan, soft.strength, to="centre").prox_(models, step),
        lambda soft, models, step: SoftTie(TiePlan(list(soft.plan)[1:]), soft.strength).prox_(models, step),
        lambda soft, models, step: None,
    ],
)
def test_another_step_or_form_fails_the_law(broken: Callable) -> None:
    with pytest.raises(AssertionError):
        law_of_prox(CASES["three models"], L2(), "pairs", broken)


@pytest.mark.parametrize(("name", "distance", "form"), combinations(solvable=True))
def test_infinite_strength_is_the_projection(name: str, distance: Distance, form: str) -> None:
    case = CASES[name]
    models, to = case.models(), forms(case)[form]
    before = arrays_of(case.plan, models)
    soft = SoftTie(case.plan, math.inf, distance, to=to)
    soft.prox_(models, 0.0)
    assert all(torch.equal(before[name], each) for name, each in arrays_of(case.plan, models).items())
    soft.prox_(models, 1e-3)
    after = arrays_of(case.plan, models)
    if isinstance(to, str):
        expected = case.plan.project(before)
    else:
        pruned = [Partition(np.where(tie.partition.labels < 0, -1, np.arange(len(tie.partition)))) for tie in case.plan]
        expected = TiePlan([Tie(t.members, p) for t, p in zip(case.plan, pruned, strict=True)]).project(to)
    for each in after:
        torch.testing.assert_close(after[each], expected[each], rtol=0, atol=1e-15)
    for tie in case.plan if isinstance(to, str) else ():
        groups = tie.matrix(after)
        for label in range(tie.partition.classes):
            shared = groups[torch.from_numpy(tie.partition.labels == label)]
            assert torch.equal(shared, shared[:1].expand_as(shared))


def test_ties_over_inputs_and_over_outputs_apply_in_order() -> None:
    plan = TiePlan([Tie.of("weight", INPUTS, [0, 0, 1]), Tie.of("weight", OUTPUTS, [0, 0])])
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    expected = plan.project({"weight": model.weight.detach().clone()})["weight"]
    SoftTie(plan, math.inf).prox_(model, 1.0)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=0, atol=1e-15)


# ---------------------------------------------------------------- training: the limit, and on the way there


X = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TARGETS = {"a": X @ X.new_tensor([[1.0], [2.0], [0.5]]), "b": (X[:, :1] * X[:, 1:2]).sin() - X[:, 2:]}


def pair() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"a": small(1).double(), "b": deep().double()}


PAIR = match(pair(), pairs={"a.0.*": "b.0.*"})


def train(
    models: dict[str, nn.Module],
    *,
    steps: int = 60,
    rate: float = 0.05,
    term: Callable[[], Tensor | float] = lambda: 0.0,
    after: Callable[[], None] = lambda: None,
) -> None:
    optimizer = torch.optim.SGD(unique_parameters(models), lr=rate, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = sum(mse_loss(model(X), TARGETS[name]) for name, model in models.items()) + term()
        loss.backward()  # pyright: ignore
        optimizer.step()
        after()


def projected() -> dict[str, nn.Module]:
    """Projected gradient descent, by hand."""
    models = pair()

    @torch.no_grad()
    def project() -> None:
        for leaf in ("weight", "bias"):
            ends = [getattr(models[name][0], leaf) for name in "ab"]  # pyright: ignore
            mean = (ends[0] + ends[1]) / 2
            for end in ends:
                end.copy_(mean)

    project()
    train(models, after=project)
    return models


def hard() -> dict[str, nn.Module]:
    models = pair()
    tie_(models, PAIR, gradient="mean")
    train(models)
    return models


def hard_with_sums() -> dict[str, nn.Module]:
    models = pair()
    tie_(models, PAIR)
    train(models)
    return models


def apart(models: dict[str, nn.Module], others: dict[str, nn.Module]) -> float:
    """The largest difference between weights, as the layers compute with them."""
    layers = [
        (layer, others[name][index])  # pyright: ignore
        for name, model in models.items()
        for index, layer in enumerate(model)  # pyright: ignore
        if isinstance(layer, nn.Linear)
    ]
    differences = [getattr(x, leaf) - getattr(y, leaf) for x, y in layers for leaf in ("weight", "bias")]
    return max(float(difference.detach().abs().max()) for difference in differences)


def law_of_the_limit(limit: Callable[[], dict[str, nn.Module]], strength: float = 1e8) -> None:
    """All weights of both models, heads too, after 60 steps of SGD with momentum."""
    models = pair()
    soft = SoftTie(PAIR, strength)
    soft.prox_(models, math.ldexp(1, 60))  # as tie_ starts: from the mean
    train(models, after=lambda: soft.prox_(models, 0.05))
    assert apart(models, limit()) <= 1e-6


@pytest.mark.parametrize("limit", [projected, hard])
def test_the_limit_of_the_prox_is_the_hard_tie(limit: Callable) -> None:
    law_of_the_limit(limit)


def test_the_sum_of_the_gradients_is_another_limit_and_a_weak_tie_none() -> None:
    with pytest.raises(AssertionError):
        law_of_the_limit(hard_with_sums)
    with pytest.raises(AssertionError):
        law_of_the_limit(hard, strength=10.0)


STRENGTHS = [0.0, 1e-4, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e4, 1e8]


def law_of_monotone(distances: list[float]) -> None:
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(distances))
    assert distances[-1] <= 1e-6 * distances[0]
    assert distances[0] > 1e-2


@pytest.mark.parametrize("form", ["pairs", "centre"])
def test_the_stronger_the_nearer_where_the_problem_is_solved_exactly(form: str) -> None:
    """Least squares for two: min Σ_m ‖X_m w_m − y_m‖² + strength · Ω, by normal equations written out here."""
    generator = torch.Generator().manual_seed(4)
    xs = [torch.randn(20, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    ys = [torch.randn(20, 1, generator=generator, dtype=torch.float64) for _ in range(2)]
    models = {name: nn.Linear(3, 1, bias=False).double() for name in "ab"}
    found = []
    factor = 1.0 if form == "pairs" else 0.5
    for strength in STRENGTHS:
        soft = SoftTie(TiePlan([whole("a.weight", "b.weight")]), strength, to=form)  # pyright: ignore
        eye = factor * strength * torch.eye(3, dtype=torch.float64)
        matrix = torch.cat([torch.cat([xs[0].T @ xs[0] + eye, -eye], 1), torch.cat([-eye, xs[1].T @ xs[1] + eye], 1)])
        solution = torch.linalg.solve(matrix, torch.cat([x.T @ y for x, y in zip(xs, ys, strict=True)]))
        with torch.no_grad():
            for model, part in zip(models.values(), solution.split(3), strict=True):
                model.weight.copy_(part.T)
        loss = sum(mse_loss(models[n](x), y, reduction="sum") for n, x, y in zip("ab", xs, ys, strict=True))
        (loss + soft(models)).backward()  # pyright: ignore
        gradients = [model.weight.grad.abs().max() for model in models.values()]  # pyright: ignore
        assert max(gradients) <= 1e-9 * (1 + strength), "the solution is not stationary for loss + soft tie"
        for model in models.values():
            model.zero_grad()
        found += soft.distances(models).values()
    law_of_monotone(found)


def distances_after_training(strengths: list[float]) -> list[float]:
    found = []
    for strength in strengths:
        models = pair()
        soft = SoftTie(PAIR, strength)
        train(models, after=lambda soft=soft, models=models: soft.prox_(models, 0.05))
        found.append(math.hypot(*soft.distances(models).values()))
    return found


def test_the_stronger_the_nearer_after_training_small_networks() -> None:
    law_of_monotone(distances_after_training(STRENGTHS))


def test_the_wrong_way_round_fails_the_law() -> None:
    with pytest.raises(AssertionError):
        law_of_monotone(distances_after_training(STRENGTHS[::-1]))


def law_of_rest(step: float) -> None:
    """At rest the prox has what the loss term has: the minimum of loss + Ω."""
    ends = []
    for prox in (False, True):
        torch.manual_seed(0)
        models = {"a": nn.Linear(3, 1).double(), "b": nn.Linear(3, 1).double()}
        soft = SoftTie(match(models), 0.5)
        if prox:
            train(models, steps=400, after=lambda soft=soft, models=models: soft.prox_(models, step))
        else:
            train(models, steps=400, term=lambda soft=soft, models=models: soft(models))
        ends.append(arrays_of(soft.plan, models))
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=1e-6, atol=1e-6)


def test_the_prox_comes_to_rest_where_the_loss_term_does() -> None:
    law_of_rest(0.05 / (1 - 0.9))


def test_the_bare_learning_rate_under_momentum_comes_to_rest_elsewhere() -> None:
    with pytest.raises(AssertionError):
        law_of_rest(0.05)


# ---------------------------------------------------------------- strengths


def law_of_strengths(strength, expected: Callable[[str], float], progress: float | None = None) -> None:
    case = CASES["two models"]
    models = case.models()
    weights = arrays_of(case.plan, models)
    by_hand = sum(
        expected(tie.members[0].parameter) * omega_by_hand(TiePlan([tie]), weights, L2()) for tie in case.plan
    )
    soft = SoftTie(case.plan, strength)
    assert soft(models, progress=progress).item() == pytest.approx(by_hand, rel=1e-12)
    soft.prox_(models, 0.1, progress=progress)
    for leaf in ("weight", "bias"):
        before = weights[f"a.0.{leaf}"] - weights[f"b.0.{leaf}"]
        after = getattr(models["a"][0], leaf) - getattr(models["b"][0], leaf)
        shrunk = before / (1 + 4 * 0.1 * expected(f"a.0.{leaf}"))
        torch.testing.assert_close(after.detach(), shrunk, rtol=1e-12, atol=1e-15)


def geometric(progress: float) -> float:
    return 1e-2 * (1e4**progress)


BY_NAME = {"b.*.weight": 3.0, "*": Tightening(1e-2, 1e2)}


def test_strengths_by_number_by_name_and_by_schedule() -> None:
    law_of_strengths(2, lambda name: 2.0)
    law_of_strengths({"*.weight": 3.0, "*": 0.5}, lambda name: 3.0 if "weight" in name else 0.5)
    law_of_strengths({"*": 0.5, "*.weight": 3.0}, lambda name: 0.5)  # the first that fits
    for progress in (0, 0.0, 0.4, 1.0):
        law_of_strengths(Tightening(1e-2, 1e2), lambda name, p=progress: geometric(p), progress)
        law_of_strengths(lambda p: p * 2, lambda name, p=progress: p * 2, progress)
        law_of_strengths(BY_NAME, lambda name, p=progress: 3.0 if "weight" in name else geometric(p), progress)


def test_the_last_pattern_or_a_straight_line_fails_the_law() -> None:
    with pytest.raises(AssertionError):
        law_of_strengths({"*": 0.5, "*.weight": 3.0}, lambda name: 3.0 if fnmatchcase(name, "*.weight") else 0.5)
    with pytest.raises(AssertionError):
        law_of_strengths(Tightening(1e-2, 1e2), lambda name: 1e-2 + 0.4 * (1e2 - 1e-2), 0.4)


def test_no_strength_is_no_tie_and_costs_no_reading() -> None:
    case = CASES["two models"]
    models = case.models()
    with torch.no_grad():
        models["a"][0].weight.fill_(math.nan)
    value = SoftTie(case.plan, 0.0)(models)
    value.backward()
    assert value.item() == 0.0


def test_a_label_of_one_group_costs_nothing() -> None:
    model = nn.Linear(3, 2)
    soft = SoftTie(TiePlan([Tie.of("weight", INPUTS, [0, 1, 2])]), 1.0)
    value = soft(model)
    value.backward()
    assert value.item() == 0.0
    soft.prox_(model, 1.0)
    assert soft.distances(model) == {"weight[inputs]": 0.0}


# ---------------------------------------------------------------- in the user's loop


def test_the_distances_are_the_norms_of_the_differences() -> None:
    case = CASES["three models"]
    models = case.models()
    a, b, c = (models[name][0].weight.detach() for name in "abc")
    found = SoftTie(case.plan, 5.0, "l1").distances(models)
    squares = (a - b).square().sum() + (a - c).square().sum() + (b - c).square().sum()
    assert list(found) == [
        "a.0.weight[whole] ~ b.0.weight[whole] ~ c.0.weight[whole]",
        "a.0.bias[whole] ~ c.0.bias[whole]",
    ]
    assert next(iter(found.values())) == pytest.approx(float(squares.sqrt()), rel=1e-14)
    assert list(found.values())[1] == pytest.approx(
        float((models["a"][0].bias - models["c"][0].bias).detach().norm()), rel=1e-14
    )


@pytest.mark.parametrize(
    ("name", "distance"),
    [(name, each) for name in ("three models", "the first units of a wider layer") for each in DISTANCES]
    + [("kernels in another order", L2())],
)
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_it_compiles_whole_and_gives_the_same(name: str, distance: Distance) -> None:
    case = CASES[name]
    models = case.models()
    soft = SoftTie(case.plan, Tightening(0.1, 10.0), distance)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: soft(models, progress=0.5), backend="aot_eager", fullgraph=True)
    found = []
    for function in (lambda: soft(models, progress=0.5), compiled):
        for parameter in parameters_of(models).values():
            parameter.grad = None
        value = function()
        value.backward()
        gradients = {n: p.grad for n, p in parameters_of(models).items() if p.grad is not None}
        found.append({"value": value.detach(), **gradients})
    torch.testing.assert_close(found[1], found[0])


def test_short_floats_are_computed_in_float32_and_autocast_changes_nothing() -> None:
    torch.manual_seed(0)
    models = {"a": small().to(torch.bfloat16), "b": small().to(torch.bfloat16)}
    wide = {name: copy.deepcopy(model).double() for name, model in models.items()}
    plan = match(models)
    for distance in DISTANCES:
        soft = SoftTie(plan, 0.5, distance)
        value = soft(models)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(soft(wide).item(), rel=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(soft(models), value)
        if not isinstance(distance, Cosine):
            again = copy.deepcopy(models)
            exact = copy.deepcopy(wide)
            soft.prox_(again, 0.3)
            soft.prox_(exact, 0.3)
            assert apart(again, {n: copy.deepcopy(m).to(torch.bfloat16) for n, m in exact.items()}) == 0.0


def test_a_soft_tie_is_copied_and_pickled_and_says_what_it_is() -> None:
    case = CASES["two models"]
    models = case.models()
    soft = SoftTie(case.plan, Tightening(0.1, 1.0), Huber(0.2), to=anchor_for(case))
    for twin in (copy.deepcopy(soft), pickle.loads(pickle.dumps(soft))):
        assert torch.equal(twin(models, progress=1), soft(models, progress=1))
    assert repr(soft) == (
        "SoftTie(2 ties, strength=Tightening(start=0.1, end=1.0), distance=Huber(delta=0.2), to='anchor')"
    )


def test_an_anchor_stays_where_it_was_though_the_model_moves() -> None:
    """L2-SP: drawn to the weights one started from."""
    model = small().double()
    plan = TiePlan([whole("0.weight")])
    soft = SoftTie(plan, 1.0, to=model.state_dict())
    assert soft(model).item() == 0.0
    start = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    assert soft(model).item() == pytest.approx(start.numel())
    soft.prox_(model, 0.5)
    torch.testing.assert_close(model[0].weight.detach(), start + 0.5)


def test_a_frozen_end_draws_and_stays_and_a_computed_weight_counts_as_computed() -> None:
    case = CASES["two models"]
    models = case.models()
    models["b"].requires_grad_(False)
    soft = SoftTie(case.plan, 1.0)
    soft(models).backward()
    assert models["b"][0].weight.grad is None
    gap = (models["a"][0].weight - models["b"][0].weight).detach()
    torch.testing.assert_close(models["a"][0].weight.grad, 2 * gap)
    with pytest.raises(PlanError, match=r"b\.0\.weight: expected a parameter in training, got a frozen one"):
        soft.prox_(models, 0.1)
    models["b"].requires_grad_(True)
    parametrizations.weight_norm(models["b"][0])
    value = soft(models)
    value.backward()
    torch.testing.assert_close(value.item(), SoftTie(case.plan, 1.0)(CASES["two models"].models()).item())
    assert models["b"][0].parametrizations.weight.original0.grad is not None
    with pytest.raises(PlanError, match=r"b\.0\.weight: expected a parameter, got a weight that is computed"):
        soft.prox_(models, 0.1)


def test_hard_ties_are_no_distance_and_no_prox_apart() -> None:
    models = pair()
    tie_(models, PAIR)
    soft = SoftTie(PAIR, 1.0)
    assert soft(models).item() == 0.0
    before = models["a"][0].weight.detach().clone()
    soft.prox_(models, 1.0)
    assert torch.equal(models["a"][0].weight, before)
    assert models["a"][0].weight is models["b"][0].weight


def test_shards_of_whole_tensors_have_the_same_value_and_gradient(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    case = CASES["three models"]
    models = case.models()
    soft = SoftTie(case.plan, 0.5)
    expected = soft(models)
    expected.backward()
    gradient = models["b"][0].weight.grad.clone()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for model in models.values():
            for leaf in ("weight", "bias"):
                sharded = distribute_tensor(getattr(model[0], leaf).detach(), mesh, [Shard(0)])
                setattr(model[0], leaf, nn.Parameter(sharded))
        value = soft(models)
        assert not isinstance(value, DTensor)
        torch.testing.assert_close(value, expected)
        value.backward()
        torch.testing.assert_close(models["b"][0].weight.grad.full_tensor(), gradient)
        with pytest.raises(PlanError, match="got a sharded one"):
            soft.prox_(models, 0.1)
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------- bad input


def bits(models: Models) -> list[bytes]:
    return [p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in parameters_of(models).values()]


def refused(models: Models, soft: SoftTie, message: str, error: type[Exception] = PlanError, step: float = 0.1) -> None:
    before = bits(models)
    with pytest.raises(error, match=message):
        soft.prox_(models, step)
    assert bits(models) == before


def test_what_does_not_fit_the_models_is_refused_by_name() -> None:
    models = CASES["two models"].models()
    for ties, message in (
        (
            [whole("a.0.weight", "b.9.weight")],
            r"b\.9\.weight: expected a parameter of the model, got none of that name",
        ),
        ([whole("a.0.weight", "c.0.weight")], r"c\.0\.weight: expected a parameter of the model"),
        ([whole("a.0.weight", "b.2.weight")], "expected members whose groups have equal length"),
        ([whole("0.weight", "a.0.weight")], r"0\.weight: expected a parameter of the model"),
        ([tied([0, 1, 2], ("a.0.weight", INPUTS), ("b.0.weight", INPUTS))], "expected 6 labels"),
        ([tied([0, 0], ("a.0.bias", INPUTS))], "a.0.bias: Groups.inputs.*: expected a parameter with at least 2"),
    ):
        soft = SoftTie(TiePlan(ties), 1.0)
        with pytest.raises(PlanError, match=message):
            soft(models)
        refused(models, soft, message)
    turned = {"a": nn.Linear(2, 3), "b": nn.Linear(3, 2)}
    refused(turned, SoftTie(TiePlan([whole("a.weight", "b.weight")]), 1.0), "expected whole parameters of one shape")
    with pytest.raises(PlanError, match=r"expected weights on one device, got a\.weight: cpu and b\.weight: meta"):
        SoftTie(TiePlan([whole("a.weight", "b.weight")]), 1.0)(
            {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2, device="meta")}
        )
    refused(
        {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)},
        SoftTie(TiePlan([tied([0, 1] * 2, ("a.weight", INPUTS), ("b.weight", OUTPUTS))] * 1), 1.0),
        "step: expected a finite number",
        PenaltyError,
        step=-1.0,
    )
    whole_model = nn.Linear(2, 2)
    whole_model.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False)
    with pytest.raises(
        PlanError, match=r"weight: expected real floating-point weights, got torch\.int64; leave it out"
    ):
        SoftTie(TiePlan([whole("weight")]), 1.0, to={"weight": torch.zeros(2, 2)})(whole_model)
    norm = nn.BatchNorm1d(2)
    with pytest.raises(PlanError, match="running_mean: expected a parameter of the model"):
        SoftTie(TiePlan([tied([0, 0], ("running_mean", ELEMENTS))]), 1.0)(norm)
    with pytest.raises(PlanError, match=r"0\.weight: expected a parameter with a shape, got a lazy one"):
        SoftTie(TiePlan([tied([0, 0], ("0.weight", INPUTS))]), 1.0)(nn.Sequential(nn.LazyLinear(2)))
    square = nn.Linear(2, 2)
    refused(
        square,
        SoftTie(TiePlan([tied([0, 1] * 2, ("weight", INPUTS), ("weight", OUTPUTS))]), 1.0),
        "expected every number once, got weight by inputs and by outputs",
    )


def test_what_is_malformed_is_refused_when_it_is_built() -> None:
    plan = CASES["two models"].plan
    for strength in (-1.0, math.nan, "1", None, {"*": -1}, {"*.weight": 1.0, "*.bias": "x"}, 1j):
        with pytest.raises(PenaltyError, match=r"strength.*: expected a number ≥ 0"):
            SoftTie(plan, strength)  # pyright: ignore
    with pytest.raises(PenaltyError, match=r"expected a pattern for every tie, got none that fits a\.0\.bias"):
        SoftTie(plan, {"*.weight": 1.0})
    with pytest.raises(PenaltyError, match=r"expected patterns of parameters in the plan, got '\*\.kernel'"):
        SoftTie(plan, {"*": 1.0, "*.kernel": 1.0})
    for to in ("center", None, 3, ["a"]):
        with pytest.raises(PenaltyError, match='to: expected "pairs", "centre" or tensors by parameter name'):
            SoftTie(plan, 1.0, to=to)  # pyright: ignore
    with pytest.raises(PenaltyError, match="distance: expected one of"):
        SoftTie(plan, 1.0, "l3")
    with pytest.raises(PlanError, match="plan: expected a TiePlan, got list"):
        SoftTie(list(plan), 1.0)  # pyright: ignore
    with pytest.raises(PlanError, match="plan: expected at least one tie"):
        SoftTie(TiePlan(), 1.0)
    anchor = anchor_for(CASES["two models"])
    for broken in (
        {},
        {**anchor, "a.0.weight": None},
        {**anchor, "a.0.weight": torch.ones(2, 3, dtype=torch.int32)},
        {**anchor, "a.0.weight": torch.ones(4, 3)},
        {**anchor, "a.0.weight": torch.full((2, 3), math.nan)},
        {**anchor, "a.0.weight": torch.ones(2, 3, device="meta")},
    ):
        with pytest.raises(PlanError, match="to"):
            SoftTie(plan, 1.0, to=broken)  # pyright: ignore
    with pytest.raises(PenaltyError, match="expected no pruned groups"):
        SoftTie(CASES["kernels in another order"].plan, 1.0, "cosine")
    for start, end in ((0.0, 1.0), (1.0, math.inf), (-1.0, 1.0), (1.0, "2")):
        with pytest.raises(PenaltyError, match="Tightening"):
            Tightening(start, end)  # pyright: ignore


def test_what_is_wrong_at_a_call_is_refused_and_nothing_changes() -> None:
    case = CASES["two models"]
    models = case.models()
    with pytest.raises(PenaltyError, match="expected a finite strength in a loss, got infinity; use prox_, or tie_"):
        SoftTie(case.plan, math.inf)(models)
    scheduled = SoftTie(case.plan, Tightening(1.0, 2.0))
    for progress, message in (
        (None, "for a strength that is a schedule, got none"),
        (1.1, "from 0 to 1"),
        (math.nan, "from 0"),
    ):
        with pytest.raises(PenaltyError, match=message):
            scheduled(models, progress=progress)
    with pytest.raises(PenaltyError, match=r"strength at progress 0\.5: expected a number ≥ 0"):
        SoftTie(case.plan, lambda progress: -progress)(models, progress=0.5)
    refused(models, SoftTie(case.plan, 1.0, "cosine"), "expected one with a prox", PenaltyError)
    three = CASES["three models"].models()
    for distance, form in (("norm", "pairs"), ("huber", "pairs"), ("l1", "centre")):
        refused(three, SoftTie(CASES["three models"].plan, 1.0, distance, to=form), "closed|prox", PenaltyError)  # pyright: ignore
    for spoilt in (math.nan, math.inf):
        with torch.no_grad():
            models["b"][0].bias[1] = spoilt
        refused(models, SoftTie(case.plan, 1.0), r"0\.bias: expected finite weights, got NaN or infinity", PenaltyError)


def test_an_anchor_has_the_shape_of_its_weight() -> None:
    """As many numbers, or as many groups of one length, are not enough: they would face others."""
    turned = SoftTie(TiePlan([whole("weight")]), 1.0, to={"weight": torch.arange(6.0).reshape(3, 2)})
    message = r"to\['weight'\]: expected an anchor of the shape \(2, 3\) that weight has, got \(3, 2\)"
    model = nn.Linear(3, 2, bias=False)
    refused(model, turned, message)
    with pytest.raises(PlanError, match=message):
        turned(model)
    kernel = nn.Conv2d(3, 2, (1, 4), bias=False)
    refused(
        kernel, SoftTie(TiePlan([tied([0, 1, 2], ("weight", INPUTS))]), 1.0, to={"weight": torch.ones(8, 3)}), "shape"
    )


@pytest.mark.parametrize("distance", ["l2", "l1", "huber", "norm"])
@pytest.mark.parametrize("strength", [0.1, math.inf])
def test_a_weight_that_is_not_finite_is_not_mended_by_an_anchor_or_by_pruning(distance: str, strength: float) -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight[0, 0] = math.nan
    pruned = TiePlan([tied([-1, 0], ("weight", OUTPUTS))])
    for soft in (
        SoftTie(pruned, strength, distance),
        SoftTie(TiePlan([whole("weight")]), strength, distance, to={"weight": torch.zeros(2, 2)}),
    ):
        refused(model, soft, "weight: expected finite weights, got NaN or infinity", PenaltyError)


def test_a_visit_to_another_device_leaves_the_soft_tie_as_it_was() -> None:
    models = {name: nn.Linear(4, 2, bias=False) for name in "ab"}
    plan = TiePlan([tied([0, 1, -1, 2, 0, 1, 2, 2], ("a.weight", INPUTS), ("b.weight", INPUTS))])
    anchor = {f"{name}.weight": torch.ones(2, 4) for name in "ab"}
    for soft in (SoftTie(plan, 1.0), SoftTie(plan, 1.0, to=anchor)):
        value = soft(models)
        assert soft({name: copy.deepcopy(model).to("meta") for name, model in models.items()}).is_meta
        assert torch.equal(soft(models), value)


def test_one_parameter_under_two_names_among_others_is_refused() -> None:
    """It would count once where Ω counts it twice; two names of one parameter alone are equal already."""
    models = {name: nn.Linear(2, 2, bias=False) for name in "abc"}
    models["b"].weight = models["a"].weight
    three = SoftTie(TiePlan([whole("a.weight", "b.weight", "c.weight")]), 1.0)
    refused(models, three, r"expected every number once, got one parameter as a\.weight.* and as b\.weight")
    before = bits(models)
    SoftTie(TiePlan([whole("a.weight", "b.weight")]), 1.0).prox_(models, 1.0)
    assert bits(models) == before


def test_ties_that_undo_each_other_are_refused() -> None:
    model = nn.Linear(3, 2, bias=False)
    plan = TiePlan([tied([0, 0], ("weight", OUTPUTS)), tied([0, 0, 1, 2, 3, 4], ("weight", ELEMENTS))])
    refused(model, SoftTie(plan, 1.0), r"weight.*: expected one tie, or one over its inputs and one over its outputs")


def test_the_remedy_for_a_frozen_member_is_the_same_force() -> None:
    models = {name: nn.Linear(2, 2, bias=False) for name in "ab"}
    models["b"].requires_grad_(False)
    apart = SoftTie(TiePlan([whole("a.weight", "b.weight")]), 0.5)
    drawn = SoftTie(TiePlan([Tie.of("a.weight", Groups.whole(), [0])]), 0.5, to={"a.weight": models["b"].weight})
    torch.testing.assert_close(drawn(models), apart(models))
    frozen = models["b"].weight.clone()
    drawn.prox_(models, 1e12)
    torch.testing.assert_close(models["a"].weight.detach(), frozen)


def test_no_strength_is_in_float32_at_least() -> None:
    models = {"a": nn.Linear(2, 2).bfloat16(), "b": nn.Linear(2, 2).bfloat16()}
    assert SoftTie(match(models), 0.0)(models).dtype == SoftTie(match(models), 1.0)(models).dtype == torch.float32


def test_cross_entropy_in_three_lines() -> None:
    """What the README shows: the plan, the soft tie, the term."""
    torch.manual_seed(0)
    models = {"a": small(2), "b": small(2)}
    soft = SoftTie(match(models), strength=0.1)
    loss = sum(cross_entropy(model(X.float()), (TARGETS[name] > 0).long().flatten()) for name, model in models.items())
    (loss + soft(models)).backward()  # pyright: ignore
    assert all(p.grad is not None for p in parameters_of(models).values())
