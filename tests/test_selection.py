"""The selection benchmark: its solver against others, its certificate against the truth, its figures by counting."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from benchmarks import selection, selection_data
from benchmarks.data import CACHE
from benchmarks.selection_figures import chance_overlap, equal_norms, equality, overlap, refit, stability, ties
from benchmarks.selection_newton import derivative_factor
from benchmarks.selection_solver import Penalised, Problems, largest_strength, relative_gap, solve
from sklearn.linear_model import MultiTaskLasso

from tying.penalties import Constant, Oscar, Pld, Ramp, prox_growl, prox_owl

PENALISED = {
    "lasso": Penalised(Constant(), "numbers"),
    "elastic net": Penalised(Constant(), "numbers", ridge=1.0),
    "group lasso": Penalised(Constant()),
    "owl": Penalised(Ramp(3.0), "numbers"),
    "growl": Penalised(Ramp(3.0)),
    "growl, pld": Penalised(Pld(1.0, 0.3, 0.5)),
}


def regression(rho: float = 0.9, responses: int = 1, n: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Twelve columns in three groups that correlate, the first group active."""
    rng = np.random.default_rng(seed)
    A = np.sqrt(rho) * np.repeat(rng.standard_normal((n, 3)), 4, axis=1) + np.sqrt(1 - rho) * rng.standard_normal(
        (n, 12)
    )
    return A, A[:, :4] @ np.ones((4, responses)) + rng.standard_normal((n, responses))


def problems(*pairs: tuple[np.ndarray, np.ndarray]) -> Problems:
    return Problems.of(*(torch.from_numpy(np.stack(parts)) for parts in zip(*pairs, strict=True)))


def solution(A, Y, penalised: Penalised, strength: float, **options) -> np.ndarray:
    found = solve(problems((A, Y)), penalised, torch.tensor([strength]).double(), tolerance=1e-13, **options)
    return found.X[0].numpy()


# The solver, against others.


def law_of_the_other_solver(mine, other) -> None:
    for seed in range(3):
        for rho in (0.5, 0.99):
            A, Y = regression(rho, 3, seed=seed)
            for strength in (0.5, 5.0):
                np.testing.assert_allclose(mine(A, Y, strength), other(A, Y, strength), rtol=0, atol=1e-6)


def skglm_lasso(A, Y, strength):
    from skglm import Lasso

    model = Lasso(alpha=strength / len(A), fit_intercept=False, tol=1e-12, max_iter=1000)
    return np.stack([model.fit(A, y).coef_ for y in Y.T], axis=1)


def sklearn_group_lasso(A, Y, strength):
    model = MultiTaskLasso(alpha=strength / len(A), fit_intercept=False, tol=1e-14, max_iter=100_000)
    return model.fit(A, Y).coef_.T


def sortedl1_owl(A, Y, strength):
    from sortedl1 import Slope

    model = Slope(lam=strength * Ramp(3.0)(12) / len(A), alpha=1.0, fit_intercept=False, tol=1e-13)
    return np.asarray(model.fit(A, Y[:, 0]).coef_).reshape(12, 1)


def slow_growl(A, Y, strength):
    """Proximal gradient, with momentum that restarts, until nothing moves."""
    A, Y = torch.from_numpy(A), torch.from_numpy(Y)
    step = 1 / torch.linalg.matrix_norm(A, 2).item() ** 2
    X = Z = torch.zeros(A.shape[1], Y.shape[1], dtype=torch.float64)
    momentum = 1.0
    for _ in range(20_000):
        new = prox_growl(Z - step * (A.T @ (A @ Z - Y)), Ramp(3.0), step * strength)
        momentum = 1.0 if ((Z - new) * (new - X)).sum() > 0 else momentum
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        moved = (new - X).abs().max()
        Z, X, momentum = new + (momentum - 1) / following * (new - X), new, following
        if moved < 1e-13:
            break
    return X.numpy()


OTHERS = {
    "lasso": skglm_lasso,
    "group lasso": sklearn_group_lasso,
    "growl": slow_growl,
    "owl": sortedl1_owl,
}


@pytest.mark.parametrize("steps", [1000, 0], ids=["admm", "newton"])
@pytest.mark.parametrize("name", OTHERS)
def test_it_finds_what_other_solvers_find(name, steps):
    responses = 1 if name == "owl" else 3

    def mine(A, Y, strength):
        return solution(A, Y[:, :responses], PENALISED[name], strength, most=steps)

    law_of_the_other_solver(mine, OTHERS[name])


def test_the_law_of_the_other_solver_notices_a_wrong_one():
    with pytest.raises(AssertionError):
        law_of_the_other_solver(lambda A, Y, s: solution(A, Y, PENALISED["lasso"], 1.001 * s), skglm_lasso)
    flat = Penalised(Constant(2.5))  # the mean of the ramp
    with pytest.raises(AssertionError):
        law_of_the_other_solver(lambda A, Y, s: solution(A, Y, flat, s), slow_growl)


def test_a_ridge_is_more_rows_of_data():
    A, Y = regression()
    rows = np.vstack([A, np.sqrt(2.0) * np.eye(12)]), np.vstack([Y, np.zeros((12, 1))])
    with_ridge = solution(A, Y, replace(PENALISED["elastic net"], ridge=1.0), 2.0)
    np.testing.assert_allclose(with_ridge, solution(*rows, PENALISED["lasso"], 2.0), rtol=0, atol=1e-9)


def test_problems_side_by_side_are_solved_as_alone():
    pairs = [regression(rho, 3, seed=seed) for seed, rho in enumerate((0.1, 0.9, 0.999))]
    strengths = torch.tensor([0.5, 3.0, 10.0]).double()
    for penalised in PENALISED.values():
        together = solve(problems(*pairs), penalised, strengths, tolerance=1e-13).X.numpy()
        for pair, strength, X in zip(pairs, strengths.tolist(), together, strict=True):
            np.testing.assert_allclose(X, solution(*pair, penalised, strength), rtol=0, atol=1e-7)


def test_at_the_largest_strength_nothing_is_left_and_below_it_something():
    for name, penalised in PENALISED.items():
        P = problems(regression(responses=2))
        largest = largest_strength(P, penalised)
        assert not solve(P, penalised, largest * (1 + 1e-9), tolerance=1e-12).X.any(), name
        assert solve(P, penalised, largest * 0.99, tolerance=1e-9).X.any(), name


def test_the_prox_of_many_thresholds_is_that_of_each():
    rng = np.random.default_rng(0)
    V, thresholds = torch.from_numpy(rng.standard_normal((4, 12, 3))), torch.tensor([1e-3, 0.1, 1.0, 3.0]).double()
    for weights in (Constant(), Oscar(0.1, 0.05)):
        grouped, single = Penalised(weights).prox(V, thresholds), Penalised(weights, "numbers").prox(V, thresholds)
        for v, t, group, number in zip(V, thresholds.tolist(), grouped, single, strict=True):
            torch.testing.assert_close(group, prox_growl(v, weights, t), rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(number.flatten(), prox_owl(v.flatten(), weights, t), rtol=1e-12, atol=1e-14)


# The certificate.


def law_of_the_gap(gap) -> None:
    """It is never less than what is missing to the optimum, at any X, and no more than rounding at the optimum."""
    rng = np.random.default_rng(1)
    for name, penalised in PENALISED.items():
        if penalised.ridge:
            continue  # its gap is that of the problem with more rows
        A, Y = regression(0.95, 2)
        P, strength = problems((A, Y)), torch.tensor([4.0]).double()

        def value(X, A=A, Y=Y, penalised=penalised):
            return 0.5 * np.square(A @ X - Y).sum() + 4.0 * penalised.value(torch.from_numpy(X)[None]).item()

        best = solution(A, Y, penalised, 4.0)
        unit = 0.5 * np.square(Y).sum()
        assert abs(gap(P, penalised, strength, torch.from_numpy(best)[None]).item()) < 1e-12, name
        for size in (1e-3, 0.1, 1.0, 30.0):  # the last overshoots
            X = best + size * rng.standard_normal(best.shape) + size * best
            found = gap(P, penalised, strength, torch.from_numpy(X)[None]).item()
            assert found >= (value(X) - value(best)) / unit - 1e-12, (name, size)


def gap_without_a_lower_end(P, penalised, strength, X):
    """The multiple of the residual is held below what is feasible, but a negative one is not."""
    GX = P.gram @ X
    fitted, quadratic = (X * P.moment).sum(dim=(1, 2)), (X * GX).sum(dim=(1, 2))
    residual = P.energy - 2 * fitted + quadratic
    scale = torch.minimum((P.energy - fitted) / residual, strength / penalised.dual_norm(P.moment - GX))
    bound = scale * (P.energy - fitted) - 0.5 * scale.square() * residual
    return (0.5 * residual + strength * penalised.value(X) - bound) / (0.5 * P.energy)


def gap_that_forgets_feasibility(P, penalised, strength, X):
    return relative_gap(P, penalised, 2 * strength, X) - strength * penalised.value(X) / (0.5 * P.energy)


def test_the_gap_is_a_proof():
    law_of_the_gap(relative_gap)
    for broken in (gap_without_a_lower_end, gap_that_forgets_feasibility):
        with pytest.raises(AssertionError):
            law_of_the_gap(broken)


# The derivative of the prox.


def law_of_the_difference_quotient(factor) -> None:
    rng = np.random.default_rng(2)
    for name, penalised in PENALISED.items():
        groups, pools = penalised.on == "groups", penalised.weights != Constant()
        for _ in range(5):
            V, direction = rng.standard_normal((2, 12, 3))

            def prox(V, penalised=penalised):
                return penalised.prox(torch.from_numpy(V)[None], torch.tensor([0.3]).double())[0].numpy()

            B = factor(V, prox(V), groups=groups, pools=pools)
            expected = (prox(V + 1e-7 * direction) - prox(V - 1e-7 * direction)) / 2e-7
            found = np.einsum("mgi,m->gi", B, np.einsum("mgi,gi->m", B, direction))
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=name)


def factor_that_pools_nothing(V, N, *, groups, pools):
    return derivative_factor(V, N, groups=groups, pools=False)


def test_the_derivative_of_the_prox_is_its_difference_quotient():
    law_of_the_difference_quotient(derivative_factor)
    with pytest.raises(AssertionError):
        law_of_the_difference_quotient(factor_that_pools_nothing)


# Overlap and chance.


def law_of_chance(formula) -> None:
    """The mean over all pairs of selections of these sizes, one by one."""
    p = 6
    for a in range(p + 1):
        for b in range(p + 1):
            masks = [[np.isin(np.arange(p), chosen) for chosen in combinations(range(p), size)] for size in (a, b)]
            expected = np.mean([overlap(first, second) for first in masks[0] for second in masks[1]])
            assert formula(a, b, p) == pytest.approx(expected, rel=1e-12), (a, b)


def test_the_overlap_by_chance_is_the_mean_over_all_selections():
    law_of_chance(chance_overlap)
    with pytest.raises(AssertionError):  # the ratio of the means is not the mean of the ratio
        law_of_chance(lambda a, b, p: (a * b / p) / (a + b - a * b / p) if a + b else 1.0)


def test_the_overlap_by_chance_is_what_random_selections_have():
    rng = np.random.default_rng(3)
    masks = [rng.permutation(100) < size for size in (5, 30, 30, 80) for _ in range(60)]
    found = stability(masks)
    assert found["overlap"] == pytest.approx(found["overlap by chance"], abs=0.005)
    assert found["overlap beyond chance"] == pytest.approx(0, abs=0.01)


def test_what_repeats_is_beyond_chance_and_all_of_them_is_not():
    same = np.arange(20) < 7
    assert stability([same, same, same]) == {
        "overlap": 1.0,
        "overlap by chance": pytest.approx(chance_overlap(7, 7, 20)),
        "overlap beyond chance": pytest.approx(1.0),
    }
    everything = np.ones(20, dtype=bool)
    assert stability([everything, everything])["overlap beyond chance"] is None
    nothing = np.zeros(20, dtype=bool)
    assert stability([nothing, nothing])["overlap"] == 1.0


# Equality and refitting.


def test_equality_counts_members_of_equal_norm():
    norms = np.array([1.0, 1.0005, 0.0, 2.0, 5.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    found = equality(norms, [range(4), range(4, 8), range(8, 12)])
    assert found["members selected"] == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert found["members equal"] == pytest.approx((2 / 4 + 0) / 2)  # one alone is equal to nothing
    assert found["spread"] == pytest.approx(np.mean([np.std(part) / np.mean(part) for part in (norms[:4], norms[4:8])]))
    assert equality(norms, [range(8, 12)])["spread"] is None
    assert [sorted(members.tolist()) for members in equal_norms(norms)] == [[4], [5], [3], [0, 1]]


def test_ties_are_of_equal_norm_and_the_same_line():
    X = np.array([[3.0, 4.0], [-3.0, -4.0], [4.0, -3.0], [0.0, 0.0], [1.0, 0.0]])
    found = ties(X)
    expected = np.array([[1.0, -1.0, 0, 0, 0], [0, 0, 1.0, 0, 0], [0, 0, 0, 0, 1.0]]).T / np.sqrt([2.0, 1.0, 1.0])
    np.testing.assert_allclose(np.abs(found.T @ expected), np.eye(3), atol=1e-12)
    assert ties(np.zeros((4, 2))).shape == (4, 0)


def test_a_refit_of_everything_is_least_squares_and_a_tie_is_one_column():
    A, Y = regression(0.5, 2, n=60)
    fit, error = refit(np.eye(12), A.T @ A, A.T @ Y, (A, Y))
    expected = np.linalg.lstsq(A, Y, rcond=None)[0]
    np.testing.assert_allclose(fit, expected, rtol=0, atol=1e-6)
    assert error == pytest.approx(np.square(Y - A @ expected).sum() / np.square(Y).sum(), rel=1e-9)
    pair = np.zeros((12, 1))
    pair[[0, 5], 0] = 1, -1
    fit, _ = refit(pair / np.sqrt(2), A.T @ A, A.T @ Y, (A, Y))
    single = np.linalg.lstsq(A @ pair, Y, rcond=None)[0]
    np.testing.assert_allclose(fit, pair @ single, rtol=0, atol=1e-6)
    nothing, error = refit(np.zeros((12, 0)), A.T @ A, A.T @ Y, (A, Y))
    assert not nothing.any()
    assert error == 1.0


# The whole.


def small(truth: selection_data.Truth = "alike") -> selection.Setting:
    methods = {name: selection.GROUPED[name] for name in ("group lasso", "GrOWL, OSCAR")}
    return selection.Setting(
        {"design": "groups", "rho": 0.95, "truth": truth, "responses": 2},
        lambda seed: selection_data.correlated_groups(0.95, truth, 2, seed),
        methods,
        np.geomspace(0.8, 0.1, 4),
        30,
    )


def lines(setting: selection.Setting, seed: int = 0) -> list[dict]:
    return list(selection.run(setting, seed, 2, lambda _: None))


def law_of_the_unseen_test_split() -> None:
    """What is chosen does not change when the test split does."""

    def spoiled(seed: int) -> selection_data.Data:
        split = small().make(seed)
        return replace(split, test=(split.test[0], split.test[1].flip(0) * 3 - 1))

    for honest, other in zip(lines(small()), lines(replace(small(), make=spoiled)), strict=True):
        for key, value in honest.items():
            if "error" not in key:
                assert other[key] == value, (honest["method"], honest["rule"], key)
        assert honest["error"] != other["error"]


def test_the_test_split_chooses_nothing(monkeypatch):
    law_of_the_unseen_test_split()
    honest = selection.candidate

    def peeking(X, sample):
        return honest(X, replace(sample, validation=sample.test))

    monkeypatch.setattr(selection, "candidate", peeking)
    with pytest.raises(AssertionError):
        law_of_the_unseen_test_split()


def test_a_run_is_complete_certified_and_repeats():
    found = lines(small("one"), seed=1)
    assert found == lines(small("one"), seed=1)
    assert found != lines(small("one"), seed=2)
    assert {(line["method"], line["rule"]) for line in found[:-1]} == {
        (method, rule) for method in small().methods for rule in selection.RULES
    }
    for line in found[:-1]:
        assert line["gap, worst"] <= 1e-6
        assert line["error refitted"] > 0
        assert 0 <= line["overlap by chance"] <= 1
    assert found[-1]["error"] > found[-1]["floor"] > 0
    summary = selection.summarise(found + lines(small("one"), seed=2))
    assert len(summary) == len(found)
    json.dumps(summary, allow_nan=False)
    by_hand = [line["selected"] for seed in (1, 2) for line in lines(small("one"), seed=seed)[:1]]
    assert summary[0]["selected"] == pytest.approx([np.mean(by_hand), np.std(by_hand, ddof=1)], rel=1e-3)


def test_the_floor_is_the_error_of_the_truth():
    split = selection_data.correlated_groups(0.95, "alike", 3, 0)
    A, Y = (part.numpy() for part in split.train)
    A_test, Y_test = (part.numpy() for part in split.test)
    pooled = np.stack([A[:, list(group)].sum(axis=1) for group in split.groups], axis=1)
    fit = np.linalg.lstsq(pooled, Y, rcond=None)[0]
    sums = np.stack([A_test[:, list(group)].sum(axis=1) for group in split.groups], axis=1)
    error = np.square(Y_test - sums @ fit).sum() / np.square(Y_test).sum()
    assert split.floor < error < 1.15 * split.floor  # three numbers a response to learn from a hundred rows


def test_near_copies_are_what_the_theory_says():
    A, _, truth = selection_data.near_copies(0)
    for block in selection_data.near_copies_blocks():
        columns = A[:, list(block)]
        assert (columns - columns.mean(dim=1, keepdim=True)).abs().max() < 0.05
        assert len(set(truth[list(block)].flatten().tolist())) == 1
    found = selection.near_copies(2, strengths=4)
    assert all(line["gap, worst"] <= 1e-9 for line in found)
    owl = [line for line in found if line["method"] == "OSCAR"]
    assert all(line[f"distinct in block {b}"] <= 1 for line in owl for b in (1, 2))


@pytest.mark.skipif(not (CACHE / "tecator").is_dir(), reason="the spectra have not been fetched")
def test_the_spectra_are_the_published_ones():
    table = selection_data.read_spectra()
    assert table.shape == (215, 103)
    assert np.corrcoef(table[:, :100].T).min() == pytest.approx(0.9631, abs=1e-4)
    assert table[0, 100:].tolist() == [60.5, 22.5, 16.7]
