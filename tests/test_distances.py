"""Distances and their proxes against loops, finite differences, certificates and SciPy; broken twins must fail."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.optimize import isotonic_regression, linprog
from torch import Tensor

from tying.errors import PenaltyError
from tying.penalties import distances
from tying.penalties.distances import L1, L2, MANY, Cosine, Distance, Huber, Norm, as_distance, mean_of, stacked

DISTANCES = [L2(), L1(), Huber(), Huber(0.3), Cosine(), Norm()]
STEPS = [0.0, 0.03, 0.4, 2.0, 50.0, 1e9, 1e300]


def stacks() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 1, 1), (2, 3, 4), (3, 2, 5), (4, 3, 1), (5, 1, 7), (9, 2, 3)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def awkward_stacks() -> list[Tensor]:
    """With equal members, zeros, and members that are equal in part."""
    partly = torch.tensor([[[1.0, 2.0]], [[1.0, 5.0]], [[3.0, 2.0]]], dtype=torch.float64)
    ones = torch.ones(3, 2, 2, dtype=torch.float64)
    return [ones, torch.zeros_like(ones), partly, partly[:2], torch.cat([partly, partly]), partly[:, :, :1] * 0]


# ---------------------------------------------------------------- values


def distance_by_hand(distance: Distance, x: np.ndarray, y: np.ndarray) -> float:
    apart = np.abs(x - y)
    if isinstance(distance, L2):
        return float((apart**2).sum())
    if isinstance(distance, L1):
        return float(apart.sum())
    if isinstance(distance, Huber):
        return sum(0.5 * t * t if t <= distance.delta else distance.delta * (t - 0.5 * distance.delta) for t in apart)
    if isinstance(distance, Norm):
        return math.sqrt((apart**2).sum())
    lengths = math.sqrt(x @ x) * math.sqrt(y @ y)
    return 1 - float(x @ y) / lengths if lengths else 1.0


def by_hand(distance: Distance, stack: Tensor, form: str) -> np.ndarray:
    """The double loop: `(K,)`."""
    members = stack.numpy()
    if form == "pairs":
        pairs = list(itertools.combinations(members, 2))
    else:
        pairs = [(member, members.mean(axis=0)) for member in members]
    labels = range(stack.shape[1])
    return np.array([sum(distance_by_hand(distance, x[k], y[k]) for x, y in pairs) for k in labels])


def value(distance: Distance, stack: Tensor, form: str) -> Tensor:
    return distance.all_pairs(stack) if form == "pairs" else distance.to_mean(stack)


def law_of_value(distance: Distance, form: str, compute: Callable = value) -> None:
    for stack in [*stacks(), *awkward_stacks()]:
        for given in (stack, list(stack)):
            found = compute(distance, given, form)
            assert found.shape == stack.shape[1:2]
            np.testing.assert_allclose(found.numpy(), by_hand(distance, stack, form), rtol=1e-12, atol=1e-14)
        if stack.shape[1] == 1:  # one label: its members alone
            assert torch.equal(compute(distance, stack[:, 0], form), compute(distance, stack, form)[0])


@pytest.mark.parametrize("form", ["pairs", "centre"])
@pytest.mark.parametrize("distance", DISTANCES, ids=repr)
def test_values_are_those_of_the_double_loop(distance: Distance, form: str) -> None:
    law_of_value(distance, form)


@pytest.mark.parametrize(
    "broken",
    [
        lambda distance, stack, form: value(distance, stack, form) / 2,
        lambda distance, stack, form: value(distance, stack, "centre" if form == "pairs" else "pairs"),
        lambda distance, stack, form: value(distance, stacked(stack)[:2], form),
        lambda distance, stack, form: 2 * value(distance, stack, form) * len(stack) / (len(stack) + 1),
    ],
)
def test_wrong_factors_fail_the_law(broken: Callable) -> None:
    with pytest.raises(AssertionError):
        law_of_value(L2(), "pairs", broken)


def law_of_small_differences(compute: Callable[[Tensor], Tensor]) -> None:
    """Weights around 100 that differ by 1e-3, in float32: the value is exact up to what float32 can hold."""
    generator = torch.Generator().manual_seed(1)
    for count in (2, 3, 5):
        stack = 100 + 1e-3 * torch.randn(count, 2, 50, generator=generator)
        expected = by_hand(L2(), stack.double(), "pairs")
        np.testing.assert_allclose(compute(stack).double().numpy(), expected, rtol=1e-5)


def test_small_differences_of_large_numbers_do_not_cancel() -> None:
    law_of_small_differences(L2().all_pairs)


@pytest.mark.parametrize(
    "broken",
    [
        lambda stack: len(stack) * (stack.square().sum((0, 2)) - len(stack) * stack.mean(0).square().sum(1)),
        lambda stack: len(stack) * stack.square().sum((0, 2)) - stack.sum(0).square().sum(1),
    ],
)
def test_a_difference_of_squares_fails_the_law(broken: Callable) -> None:
    with pytest.raises(AssertionError):
        law_of_small_differences(broken)


# ---------------------------------------------------------------- gradients


def law_of_gradient(distance: Distance, form: str, compute: Callable = value) -> None:
    for stack in stacks():
        if isinstance(distance, Cosine) and stack.shape[2] == 1:
            continue  # signs have no derivative
        leaf = stack.clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x: compute(distance, x, form), leaf, eps=1e-7, atol=1e-5, raise_exception=False
        )
    for stack in awkward_stacks():
        leaf = stack.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(compute(distance, leaf, form).sum(), leaf)
        assert gradient.isfinite().all()
        if not isinstance(distance, Cosine):  # what one member gains the others lose
            torch.testing.assert_close(gradient.sum(0), torch.zeros_like(gradient[0]), rtol=0, atol=1e-12)
        if bool((stack == stack[:1]).all()):
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["pairs", "centre"])
@pytest.mark.parametrize("distance", DISTANCES, ids=repr)
def test_gradients_are_those_of_finite_differences_and_zero_where_all_are_equal(distance: Distance, form: str) -> None:
    law_of_gradient(distance, form)


def half_detached(distance: Distance, stack: Tensor, form: str) -> Tensor:
    return distance.all_pairs(torch.cat([stack[:1], stack[1:].detach()]))


def norm_without_care(distance: Distance, stack: Tensor, form: str) -> Tensor:
    return sum((x - y).square().sum(-1).sqrt() for x, y in itertools.combinations(stack, 2))  # pyright: ignore


@pytest.mark.parametrize("broken", [half_detached, norm_without_care])
def test_gradients_of_one_end_and_of_square_roots_at_zero_fail_the_law(broken: Callable) -> None:
    with pytest.raises(AssertionError):
        law_of_gradient(Norm(), "pairs", broken)


# ---------------------------------------------------------------- proxes


@dataclass(frozen=True)
class Problem:
    """½‖X − V‖² + step · Ω(X)."""

    distance: Distance
    form: str

    def omega(self, stack: Tensor) -> Tensor:
        if self.form == "anchor":  # the first member is fixed at 0: shrink
            return self.distance.between(stack, torch.zeros_like(stack)).sum()
        return value(self.distance, stack, self.form).sum()

    def prox(self, stack: Tensor, step: float) -> Tensor:
        if self.form == "anchor":
            return self.distance.shrink(stack, step)
        solve = self.distance.prox_all_pairs if self.form == "pairs" else self.distance.prox_to_mean
        return stacked(solve(stack, step))

    def solvable(self, count: int) -> bool:
        if isinstance(self.distance, Cosine):
            return False
        several = isinstance(self.distance, L2) or (isinstance(self.distance, L1) and self.form == "pairs")
        return count == 2 or several or self.form == "anchor"


PROBLEMS = [Problem(distance, form) for distance in DISTANCES for form in ("pairs", "centre", "anchor")]
SOLVED = [problem for problem in PROBLEMS if problem.solvable(2)]


def law_of_strong_convexity(problem: Problem, prox: Callable[[Tensor, float], Tensor]) -> None:
    """F(Y) ≥ F(X) + ½‖Y − X‖² for all Y if and only if X is the minimiser, as F is strongly convex with modulus 1."""
    generator = torch.Generator().manual_seed(2)
    for stack in [each for each in (*stacks(), *awkward_stacks()) if problem.solvable(len(each))]:
        for step in STEPS[:5]:

            def objective(x: Tensor, stack: Tensor = stack, step: float = step) -> float:
                return float(0.5 * (x - stack).square().sum() + step * problem.omega(x))

            x = prox(stack, step)
            assert x.shape == stack.shape
            ends = [stack, mean_of(stack).expand_as(stack), torch.zeros_like(stack), stack.roll(1, 0)]
            ends += [x + torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(20)]
            ends += [x + each.reshape(x.shape) for each in torch.eye(x.numel(), dtype=x.dtype)]
            ends += [x - each.reshape(x.shape) for each in torch.eye(x.numel(), dtype=x.dtype)]
            for end, fraction in itertools.product(ends, (1.0, 0.1, 1e-3)):
                y = x + fraction * (end - x)
                slack = objective(y) - objective(x) - 0.5 * float((y - x).square().sum())
                assert slack >= -1e-11 * (1 + step) * (1 + abs(objective(x))), (stack, step, slack)


@pytest.mark.parametrize("problem", SOLVED, ids=str)
def test_a_prox_is_the_minimiser(problem: Problem) -> None:
    law_of_strong_convexity(problem, problem.prox)


@pytest.mark.parametrize("problem", SOLVED, ids=str)
@pytest.mark.parametrize("factor", [0.5, 0.98, 1.02, 2.0])
def test_another_strength_fails_the_law(problem: Problem, factor: float) -> None:
    with pytest.raises(AssertionError):
        law_of_strong_convexity(problem, lambda stack, step: problem.prox(stack, factor * step))


def gradient_of(problem: Problem, stack: Tensor, step: float, x: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(step * problem.omega(leaf), leaf)
    return x - stack + slope


@pytest.mark.parametrize("problem", [p for p in SOLVED if isinstance(p.distance, (L2, Huber))], ids=str)
def test_the_gradient_vanishes_at_a_smooth_prox(problem: Problem) -> None:
    for stack in [each for each in (*stacks(), *awkward_stacks()) if problem.solvable(len(each))]:
        for step in STEPS[:5]:
            x = problem.prox(stack, step)
            found = gradient_of(problem, stack, step, x)
            torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-13 * (1 + step))


def law_of_subgradient(prox: Callable[[Tensor, float], Tensor]) -> None:
    """x = prox(v) iff v_i − x_i = step · Σ_j s_ij with s_ij = −s_ji = sign(x_i − x_j), or in [−1, 1] where equal."""
    for stack in [*stacks(), *awkward_stacks()]:
        count = len(stack)
        pairs = list(itertools.combinations(range(count), 2))
        for step in STEPS[1:5]:
            x = prox(stack, step)
            for v, z in zip(stack.reshape(count, -1).T.numpy(), x.reshape(count, -1).T.numpy(), strict=True):
                balance = np.zeros((count, len(pairs)))
                bounds = []
                for p, (i, j) in enumerate(pairs):
                    balance[i, p], balance[j, p] = step, -step
                    sign = np.sign(z[i] - z[j])
                    bounds.append((sign, sign) if sign else (-1, 1))
                # Least misfit ‖balance s − (v − z)‖∞, as a linear programme.
                target = v - z
                rows = np.block([[balance, -np.ones((count, 1))], [-balance, -np.ones((count, 1))]])
                cost = np.append(np.zeros(len(pairs)), 1.0)
                limits = np.append(target, -target)
                solved = linprog(cost, A_ub=rows, b_ub=limits, bounds=[*bounds, (0, None)])
                assert solved.status == 0
                assert solved.fun <= 1e-8 * (1 + step), (v, z, step, solved.fun)


def test_the_prox_of_all_absolute_differences_has_a_subgradient_for_every_number_of_members() -> None:
    law_of_subgradient(lambda stack, step: stacked(L1().prox_all_pairs(stack, step)))


@pytest.mark.parametrize(
    "broken",
    [
        lambda stack, step: stacked(L2().prox_all_pairs(stack, step)),
        lambda stack, step: stacked(L1().prox_all_pairs(stack, step / 2)),
        lambda stack, step: mean_of(stack) + L1().shrink(stack - mean_of(stack), step),
    ],
)
def test_another_prox_has_no_such_subgradient(broken: Callable) -> None:
    with pytest.raises(AssertionError):
        law_of_subgradient(broken)


def test_the_prox_of_all_absolute_differences_is_that_of_scipys_isotonic_regression() -> None:
    generator = torch.Generator().manual_seed(3)
    for count, step in itertools.product((2, 3, 7, 40), (0.01, 0.2, 3.0)):
        v = torch.randn(count, 1, 1, generator=generator, dtype=torch.float64)
        order = np.argsort(v.flatten().numpy())
        shifts = step * (2 * np.arange(count) - count + 1)
        expected = np.empty(count)
        expected[order] = isotonic_regression(v.flatten().numpy()[order] - shifts).x  # pyright: ignore
        found = stacked(L1().prox_all_pairs(v, step)).flatten().numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def law_monotone(fit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Few members or many, in several columns: each column is fitted as scipy does."""
    generator = torch.Generator().manual_seed(4)
    for count in (2, MANY, MANY + 1, 100):
        stack = torch.randn(count, 3, 2, generator=generator, dtype=torch.float64)
        expected = [isotonic_regression(column).x for column in stack.reshape(count, -1).T.numpy()]  # pyright: ignore
        np.testing.assert_allclose(fit(stack).reshape(count, -1).T.numpy(), expected, rtol=0, atol=1e-12)


def test_the_monotone_fit_is_the_same_for_few_and_for_many() -> None:
    law_monotone(distances._monotone)


def test_running_maxima_are_no_monotone_fit() -> None:
    with pytest.raises(AssertionError):
        law_monotone(lambda stack: stack.cummax(0).values)


def law_of_directions(cosine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Lengths make no difference, also where their squares are beyond float32."""
    x, y = torch.tensor([3.0, 4.0]), torch.tensor([4.0, -3.0])
    for a, b in itertools.product((1.0, 1e25, 1e-25), repeat=2):
        for other, expected in ((x, 0.0), (y, 1.0), (-x, 2.0)):
            assert cosine(a * x, b * other).item() == pytest.approx(expected, abs=1e-6)


def test_the_cosine_of_huge_and_of_tiny_groups_is_that_of_their_directions() -> None:
    law_of_directions(Cosine().between)
    assert Cosine().between(torch.zeros(3, 0), torch.zeros(3, 0)).tolist() == [1, 1, 1]
    tiny = torch.tensor([1e-25, 0.0], requires_grad=True)
    Cosine().between(tiny, torch.tensor([0.0, 1.0])).backward()
    assert tiny.grad is not None
    torch.testing.assert_close(tiny.grad, torch.tensor([0.0, -1e25]))


def test_the_plain_formula_fails_the_law_of_directions() -> None:
    with pytest.raises(AssertionError):
        law_of_directions(lambda x, y: 1 - (x / x.norm() * (y / y.norm())).sum())


@pytest.mark.parametrize("problem", SOLVED, ids=str)
def test_no_step_changes_nothing_and_a_huge_one_gives_the_mean(problem: Problem) -> None:
    for stack in [each for each in (*stacks(), *awkward_stacks()) if problem.solvable(len(each))]:
        torch.testing.assert_close(problem.prox(stack, 0.0), stack, rtol=0, atol=1e-15)
        limit = torch.zeros_like(stack) if problem.form == "anchor" else mean_of(stack).expand_as(stack)
        for step in STEPS[5:]:
            torch.testing.assert_close(problem.prox(stack, step), limit, rtol=0, atol=1e-8)
        x = problem.prox(stack, math.inf)
        torch.testing.assert_close(x, limit, rtol=0, atol=1e-15)
        assert torch.equal(x, x[:1].expand_as(x))


@pytest.mark.parametrize("distance", [L1(), Norm()], ids=repr)
def test_members_become_exactly_equal_at_a_finite_step(distance: Distance) -> None:
    for stack in stacks():
        if Problem(distance, "pairs").solvable(len(stack)):
            x = stacked(distance.prox_all_pairs(stack, 20.0))
            assert torch.equal(x, x[:1].expand_as(x))
            torch.testing.assert_close(x, mean_of(stack).expand_as(x), rtol=0, atol=1e-13)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if not p.solvable(3)], ids=str)
def test_what_has_no_closed_form_says_so_and_what_has(problem: Problem) -> None:
    with pytest.raises(PenaltyError, match=r"expected one with a prox for .*, got .*; L2 has one"):
        problem.prox(stacks()[2], 1.0)


def test_names_stand_for_distances_and_settings_are_checked() -> None:
    assert [as_distance(name) for name in ("l2", "l1", "huber", "cosine", "norm")] == [
        L2(),
        L1(),
        Huber(1.0),
        Cosine(),
        Norm(),
    ]
    assert as_distance(Huber(0.1)) == Huber(0.1)
    for bad in ("L2", "euclid", None, L2, 2):
        with pytest.raises(PenaltyError, match="distance: expected one of 'l2'"):
            as_distance(bad)
    for delta in (0, -1.0, math.nan, math.inf, "1"):
        with pytest.raises(PenaltyError, match=r"Huber\.delta: expected"):
            Huber(delta)  # pyright: ignore
