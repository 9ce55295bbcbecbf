"""The laws of the penalties: certificates on random cases, second implementations, theory. Broken twins must fail."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.optimize import isotonic_regression
from sklearn import linear_model
from torch import Tensor

from tying.errors import PenaltyError
from tying.groups import Groups, group_norms
from tying.penalties.certificate import Certificate
from tying.penalties.norms import OWL, GroupLasso, GrOWL, Lasso, Penalty, Ridge
from tying.penalties.prox import owl_dual_norm, owl_norm, prox_growl, prox_owl
from tying.penalties.sequences import Constant, Oscar, Pld, Ramp, Spike
from tying.penalties.sorted_l1 import shrink_sorted

CASES = 10_000
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 4 * torch.finfo(torch.float32).eps,
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
}
SEQUENCES = [Constant(1), Constant(0), Oscar(0.2, 0.3), Ramp(3), Spike(0.5, 2), Spike(0, 1)]
SEQUENCES += [Pld(0.5, 0.4, 0.5), Pld(0.5, 0.4, 0.5, "vgg"), Pld(0.5, 0.4, 0.5, "mnist")]
PENALTIES = {
    "lasso": lambda strength, sequence: Lasso(strength),
    "ridge": lambda strength, sequence: Ridge(strength),
    "group lasso": lambda strength, sequence: GroupLasso(strength),
    "owl": OWL,
    "growl": GrOWL,
}


class Descending:
    """Random explicit weights, ties and zeros among them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, n: int) -> np.ndarray:
        rng = np.random.default_rng(self.seed)
        return np.sort(rng.choice([0.0, 0.5, 1.0, *rng.random(3)], size=n))[::-1]


def random_matrix(rng: np.random.Generator) -> np.ndarray:
    groups, size = int(rng.integers(1, 12)), int(rng.integers(1, 5))
    matrix = rng.standard_normal((groups, size))
    kind = rng.integers(6)
    if kind == 1:
        matrix = np.round(matrix)  # ties and zeros
    elif kind == 2:
        matrix = matrix[rng.integers(0, groups, groups)] * rng.choice(
            [-1, 1], (groups, 1)
        )  # equal groups, mirrored too
    elif kind == 3:
        matrix[rng.random(groups) < 0.5] = 0
    elif kind == 4:
        matrix = np.sign(matrix) * 1.5  # all magnitudes equal
    elif kind == 5:
        matrix = matrix * (rng.random() < 0.7) * 10.0 ** rng.uniform(-6, 0, (groups, 1))  # spread, or all zero
    return matrix * 10.0 ** rng.uniform(-2, 2)


@cache
def cases(dtype: torch.dtype) -> list[tuple[Tensor, float, object, float]]:
    """`CASES` tuples (matrix, strength, sequence, step): steps and strengths of 0 among them."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(CASES):
        matrix = torch.from_numpy(random_matrix(rng)).to(dtype)
        pick = int(rng.integers(len(SEQUENCES) + 3))
        sequence = SEQUENCES[pick] if pick < len(SEQUENCES) else Descending(index)
        step = 0.0 if rng.random() < 0.05 else float(10 ** rng.uniform(-2, 1))
        strength = 0.0 if rng.random() < 0.02 else float(matrix.abs().max()) * 10 ** rng.uniform(-2, 0.5)
        made.append((matrix, strength, sequence, step))
    return made


def law_of_prox(name: str, dtype: torch.dtype, prox, count: int = CASES) -> None:
    """Same shape and dtype, no negative zero, the certificate holds, a step of 0 moves nothing, equals stay equal."""
    for matrix, strength, sequence, step in cases(dtype)[:count]:
        penalty = PENALTIES[name](strength, sequence)
        found = prox(penalty, matrix, step)
        assert found.shape == matrix.shape
        assert found.dtype == dtype
        certificate = penalty.certify(matrix, found, step)
        assert certificate.holds(TOLERANCE[dtype]), ("certificate", penalty, matrix, step, found, certificate)
        if step == 0 or strength == 0:
            assert torch.equal(found, matrix), "moved by nothing"
        a, b = matrix.double().numpy(), found.double().numpy()
        assert not (np.signbit(b) & (b == 0)).any(), "a negative zero"
        law_of_equals(a, b, one_number=name in ("lasso", "ridge", "owl"))


def law_of_equals(a: np.ndarray, b: np.ndarray, one_number: bool) -> None:
    """Numbers of equal magnitude, or equal groups, before (a): equal bit for bit after (b)."""
    if one_number:
        a, b = np.abs(a).reshape(-1, 1), np.abs(b).reshape(-1, 1)
    order = np.lexsort(a.T)
    equal = (a[order][1:] == a[order][:-1]).all(axis=1)
    assert (b[order][1:] == b[order][:-1])[equal].all(), ("equal before, not after", a, b)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).split(".")[-1])
@pytest.mark.parametrize("name", PENALTIES)
def test_certificate_holds_on_every_random_case(name, dtype):
    law_of_prox(name, dtype, lambda penalty, matrix, step: penalty.prox(matrix, step))


# Broken twins. Each takes (penalty, matrix, step) and is wrong in one way that ports of these proxes really are.


def sorted_twin(kernel, on_groups: bool):
    """A prox around another kernel: (magnitudes, thresholds) → new magnitudes."""

    def prox(penalty, matrix, step):
        m = matrix.double().numpy()
        flat = m if on_groups else m.reshape(-1, 1)
        r = np.sqrt((flat**2).sum(axis=1))
        q = kernel(r, step * penalty.strength * penalty.sequence(len(r)))
        x = flat * np.divide(q, r, out=np.zeros_like(r), where=r > 0)[:, None]
        return torch.from_numpy(x.reshape(m.shape)).to(matrix.dtype) + 0.0

    return prox


def no_pooling(r, t):
    out, order = np.empty_like(r), np.argsort(-r)
    out[order] = np.maximum(r[order] - t, 0)
    return out


def wrong_sort(r, t):
    out, order = np.empty_like(r), np.argsort(r)
    out[order] = np.maximum(isotonic_regression(r[order] - t, increasing=False).x, 0)
    return out


def unsorted_weights(r, t):
    return np.maximum(isotonic_regression(r - t, increasing=False).x, 0)


def undone_wrongly(r, t):
    order = np.argsort(-r)
    return np.maximum(isotonic_regression(r[order] - t, increasing=False).x, 0)[order]  # order, not its inverse


def running_maximum(r, t):
    out, order = np.empty_like(r), np.argsort(-r)
    out[order] = np.maximum(np.maximum.accumulate((r[order] - t)[::-1])[::-1], 0)
    return out


def not_clipped(r, t):
    out, order = np.empty_like(r), np.argsort(-r)
    out[order] = isotonic_regression(r[order] - t, increasing=False).x
    return out


def in_single_precision(r, t):
    return shrink_sorted(r.astype(np.float32).astype(np.float64), t.astype(np.float32).astype(np.float64))


def ties_by_position(r, t):
    return shrink_sorted(r, t) * (1 + 4e-16 * (np.arange(len(r)) % 2))


KERNELS = [no_pooling, wrong_sort, unsorted_weights, undone_wrongly, running_maximum, not_clipped, in_single_precision]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["owl", "growl"])
def test_law_refuses_a_broken_sorted_prox(name, kernel):
    with pytest.raises(AssertionError, match="certificate"):
        law_of_prox(name, torch.float64, sorted_twin(kernel, on_groups=name == "growl"), 1000)


@pytest.mark.parametrize("name", ["owl", "growl"])
def test_law_refuses_ties_broken_by_rounding(name):
    with pytest.raises(AssertionError, match=r"equal before, not after|moved by nothing"):
        law_of_prox(name, torch.float64, sorted_twin(ties_by_position, on_groups=name == "growl"), 1000)


def test_law_accepts_the_same_twin_around_the_right_kernel():
    for name in ("owl", "growl"):
        law_of_prox(name, torch.float64, sorted_twin(shrink_sorted, on_groups=name == "growl"), 1000)


BROKEN = {
    "lasso": [
        lambda p, m, s: torch.where(m.abs() > p.strength * s, m, 0.0),  # hard threshold
        lambda p, m, s: m - p.strength * s * m.sign(),  # crosses zero
        lambda p, m, s: GroupLasso(p.strength).prox(m, s),
    ],
    "ridge": [
        lambda p, m, s: m * (1 - p.strength * s),  # a gradient step
        lambda p, m, s: m / (1 + 2 * p.strength * s),  # without the ½
    ],
    "group lasso": [
        lambda p, m, s: Lasso(p.strength).prox(m, s),
        lambda p, m, s: m * (1 - p.strength * s / m.norm(dim=1, keepdim=True)),  # no clip, 0 ÷ 0
        lambda p, m, s: GroupLasso(p.strength * m.shape[1] ** 0.5).prox(m, s),
    ],
    "owl": [
        lambda p, m, s: OWL(p.strength, p.sequence).prox(m, s).abs(),  # sign lost
        lambda p, m, s: OWL(p.strength, p.sequence).prox(m.float(), s).double(),
    ],
    "growl": [
        lambda p, m, s: OWL(p.strength, p.sequence).prox(m, s),
        lambda p, m, s: p.prox(m, s).flip(1),  # right norms, wrong directions
        lambda p, m, s: -p.prox(m, s),
        lambda p, m, s: p.prox(m, s) + 1e-10 * (m == 0),
    ],
}


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, twins in BROKEN.items() for i in range(len(twins))])
def test_law_refuses_a_broken_twin(name, number):
    twin = BROKEN[name][number]
    with pytest.raises(AssertionError, match="certificate"):
        law_of_prox(name, torch.float64, lambda *case: twin(*case) + 0.0, 1000)


# Second implementations.


def prox_by_pools(v: np.ndarray, w: np.ndarray) -> np.ndarray:
    """PAVA on Python lists, in long double: slow and obvious."""
    order = sorted(range(len(v)), key=lambda i: -abs(v[i]))
    pools: list[list] = []  # [sum, members]
    for rank, i in enumerate(order):
        pools.append([np.longdouble(abs(v[i])) - np.longdouble(w[rank]), [i]])
        while len(pools) > 1 and pools[-2][0] / len(pools[-2][1]) <= pools[-1][0] / len(pools[-1][1]):
            total, members = pools.pop()
            pools[-1] = [pools[-1][0] + total, pools[-1][1] + members]
    out = np.zeros(len(v), dtype=np.longdouble)
    for total, members in pools:
        out[members] = max(total / len(members), 0)
    return (np.sign(v) * out).astype(np.float64)


def law_of_second_opinion(prox, reference, tolerance: float) -> None:
    rng = np.random.default_rng(1)
    for n in [*range(1, 40), 300, 1000]:
        v = rng.standard_normal(n) * 10 ** rng.uniform(-3, 3)
        if n % 3 == 0:
            v = np.round(v, 1)
        w = np.abs(v).max() * rng.uniform(0.01, 2) * np.sort(rng.random(n))[::-1]
        found = prox(torch.from_numpy(v), w).numpy()
        np.testing.assert_allclose(found, reference(v, w), rtol=0, atol=tolerance * np.abs(v).max())


def test_prox_is_that_of_pools_in_long_double():
    law_of_second_opinion(prox_owl, prox_by_pools, 2e-15)
    with pytest.raises(AssertionError):
        law_of_second_opinion(lambda v, w: prox_owl(v, w, 1 + 1e-12), prox_by_pools, 2e-15)


def test_prox_is_that_of_skglm():
    from skglm.utils.prox_funcs import prox_SLOPE

    def reference(v, w):
        out, order = np.empty_like(v), np.argsort(-np.abs(v))
        out[order] = prox_SLOPE(np.abs(v)[order], w)
        return np.copysign(out, v)

    law_of_second_opinion(prox_owl, reference, 1e-13)


def test_a_large_vector_stays_exact():
    rng = np.random.default_rng(2)
    v, w = rng.standard_normal(200_000), np.linspace(2, 0, 200_000)
    found = prox_owl(torch.from_numpy(v), w).numpy()
    magnitudes = np.sort(np.abs(v))[::-1]
    fit = isotonic_regression(magnitudes - w, increasing=False)
    means = np.add.reduceat((magnitudes - w).astype(np.longdouble), fit.blocks[:-1]) / np.diff(fit.blocks)
    expected = np.repeat(np.maximum(means, 0), np.diff(fit.blocks)).astype(float)
    np.testing.assert_allclose(np.sort(np.abs(found))[::-1], expected, rtol=0, atol=1e-13)
    assert OWL(1.0, w).certify(torch.from_numpy(v)[None], torch.from_numpy(found)[None], 1.0).holds(1e-13)


def minimise(A: np.ndarray, Y: np.ndarray, penalty: Penalty, steps: int = 3000) -> np.ndarray:
    """½‖A X − Y‖² + Ω(X) by accelerated proximal gradient with restarts; the result is a prox's output."""
    a, y = torch.from_numpy(A), torch.from_numpy(Y)
    step = 1 / np.linalg.norm(A, 2) ** 2
    x = z = torch.zeros(A.shape[1], Y.shape[1], dtype=torch.float64)
    momentum = 1.0
    for _ in range(steps):
        new = penalty.prox(z - step * (a.T @ (a @ z - y)), step)
        if ((z - new) * (new - x)).sum() > 0:
            momentum = 1.0
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        z = new + (momentum - 1) / following * (new - x)
        settled = torch.equal(new, x)
        x, momentum = new, following
        if settled:
            break
    return x.numpy()


def test_a_whole_problem_has_the_solution_of_sortedl1():
    from sortedl1 import Slope

    rng = np.random.default_rng(3)
    A, y = rng.standard_normal((40, 12)), rng.standard_normal(40)
    w = Oscar(0.2, 0.3)(12)
    other = Slope(lam=w / 40, alpha=1.0, fit_intercept=False, tol=1e-12).fit(A, y)
    mine = minimise(A, y[:, None], OWL(1.0, w))
    np.testing.assert_allclose(mine[:, 0], np.asarray(other.coef_).ravel(), atol=1e-6)
    assert len(np.unique(np.abs(mine))) < 12


# Values: identities that do not sort.


def test_oscar_is_the_sum_of_pairwise_maxima():
    rng = np.random.default_rng(4)
    for n in (1, 2, 5, 9):
        x = rng.standard_normal(n)
        pairs = sum(max(abs(a), abs(b)) for a, b in combinations(x, 2))
        expected = 0.7 * np.abs(x).sum() + 0.2 * pairs
        assert OWL(1.0, Oscar(0.7, 0.2)).value(torch.from_numpy(x)[None]).item() == pytest.approx(expected, rel=1e-13)
    peak = OWL(2.0, Spike(1, 3)).value(torch.tensor([[1.0, -4.0, 2.0]]))
    assert peak.item() == 2 * (7 + 3 * 4)


def test_values_are_float64_scalars_by_the_formulas():
    matrix = torch.tensor([[3.0, 4.0], [0.0, -1.0]])
    expected = {"lasso": 2 * 8, "ridge": 0.5 * 2 * 26, "group lasso": 2 * 6, "owl": 2 * 8, "growl": 2 * 6}
    for name, value in expected.items():
        found = PENALTIES[name](2.0, Constant(1)).value(matrix)
        assert found.dtype == torch.float64
        assert found.shape == ()
        assert found.item() == pytest.approx(value, rel=1e-15)
    assert GrOWL(1.0, [2.0, 1.0]).value(matrix).item() == 11


def test_constant_weights_and_single_numbers_are_the_special_cases():
    for matrix, strength, sequence, step in cases(torch.float64)[:300]:
        flat = OWL(strength, Constant(1)).prox(matrix, step)
        torch.testing.assert_close(flat, Lasso(strength).prox(matrix, step), rtol=0, atol=1e-13 * (1 + strength * step))
        grouped = GrOWL(strength, Constant(1)).prox(matrix, step)
        expected = GroupLasso(strength).prox(matrix, step)
        torch.testing.assert_close(grouped, expected, rtol=0, atol=1e-13 * (1 + strength * step))
        single = matrix.reshape(-1, 1)
        torch.testing.assert_close(
            GrOWL(strength, sequence).prox(single, step), OWL(strength, sequence).prox(single, step), rtol=1e-13, atol=0
        )


def test_the_dual_norm_bounds_the_pairing_and_is_reached():
    rng = np.random.default_rng(5)
    for _ in range(300):
        n = int(rng.integers(1, 8))
        w = np.sort(rng.random(n))[::-1]
        x, u = torch.from_numpy(rng.standard_normal(n)), torch.from_numpy(rng.standard_normal(n))
        bound = owl_norm(x, w) * owl_dual_norm(u, w)
        assert abs(float(x @ u)) <= float(bound) * (1 + 1e-14)
        sizes = u.abs().argsort(descending=True)  # the bound is reached by the signs of the k largest, for some k
        best = max(
            float(u[sizes[:k]].abs().sum() / owl_norm(torch.zeros_like(u).index_fill(0, sizes[:k], 1.0), w))
            for k in range(1, n + 1)
        )
        assert best == pytest.approx(float(owl_dual_norm(u, w)), rel=1e-13)


def test_zero_is_the_prox_exactly_when_the_dual_norm_is_at_most_one():
    seen = {True: 0, False: 0}
    for matrix, _, sequence, _ in cases(torch.float64)[:2000]:
        vector = matrix.reshape(-1)
        dual = float(owl_dual_norm(vector, sequence))
        if abs(dual - 1) < 1e-12:
            continue
        zero = not prox_owl(vector, sequence).any()
        assert zero == (dual <= 1)
        seen[zero] += 1
    assert min(seen.values()) > 100
    assert owl_dual_norm(torch.zeros(3), [0, 0, 0]) == 0
    assert owl_dual_norm(torch.ones(3), [0, 0, 0]) == torch.inf


# Theory (Figueiredo & Nowak, AISTATS 2016).


def test_the_solution_is_zero_exactly_above_the_dual_norm_of_the_gradient():
    rng = np.random.default_rng(6)
    for penalty, norms in ((OWL, np.ravel), (GrOWL, lambda g: np.sqrt((g**2).sum(axis=1)))):
        A, Y = rng.standard_normal((20, 8)), rng.standard_normal((20, 1 if penalty is OWL else 3))
        critical = float(owl_dual_norm(torch.from_numpy(norms(A.T @ Y)), Ramp(3)))
        assert not minimise(A, Y, penalty(1.0001 * critical, Ramp(3))).any()
        assert minimise(A, Y, penalty(0.9999 * critical, Ramp(3))).any()


def grouping_problems(outputs: int):
    """Least squares in which two columns of A are close enough for their coefficients to be forced equal."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        A = rng.standard_normal((15, 6))
        A[:, 1] = A[:, 0] + 1e-3 * rng.standard_normal(15)
        A /= np.linalg.norm(A, axis=0)
        Y = A @ np.concatenate([[[1.0], [0.4]], rng.standard_normal((4, 1))]) * rng.uniform(0.5, 1.5, (1, outputs))
        gap = 1.05 * np.linalg.norm(A[:, 0] - A[:, 1]) * np.linalg.norm(Y)
        yield A, Y, Oscar(0.01, gap)


def law_of_grouping(outputs: int, penalty, tolerance: float) -> None:
    kept = 0
    for A, Y, sequence in grouping_problems(outputs):
        X = minimise(A, Y, penalty(sequence))
        norms = np.linalg.norm(X, axis=1)
        assert abs(norms[0] - norms[1]) <= tolerance * norms[0]
        kept += norms[0] > 0
    assert kept >= 6


def test_close_columns_get_equal_coefficients():
    law_of_grouping(1, lambda sequence: OWL(1.0, sequence), 0.0)
    law_of_grouping(3, lambda sequence: GrOWL(1.0, sequence), 1e-14)
    for twin in (lambda sequence: Lasso(0.01), lambda sequence: OWL(1.0, Constant(0.05))):
        with pytest.raises(AssertionError):
            law_of_grouping(1, twin, 0.0)


def test_blocks_of_correlated_columns_are_kept_whole_where_lasso_picks_some():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((10, 100))
    for start in (20, 60):
        A[:, start : start + 10] = A[:, start : start + 1] + 0.01 * rng.standard_normal((10, 10))
    truth = np.zeros((100, 1))
    truth[20:30] = truth[60:70] = 1
    y = A @ truth + 0.01 * rng.standard_normal((10, 1))
    owl = minimise(A, y, OWL(1.0, Oscar(0.05, 1e-3)), 20000)
    lasso = linear_model.Lasso(alpha=0.05 / 10, fit_intercept=False, tol=1e-5, max_iter=10**5).fit(A, y).coef_[:, None]
    for block in (slice(20, 30), slice(60, 70)):
        assert len(np.unique(owl[block])) == 1
        assert 0 < np.count_nonzero(lasso[block]) < 10
    assert np.linalg.norm(owl - truth) < np.linalg.norm(lasso - truth)


# Norms of groups.


def law_of_group_norms(norms) -> None:
    rng = np.random.default_rng(7)
    for _ in range(150):
        size, groups = int(rng.integers(1, 300)), int(rng.integers(1, 130))
        dtype = torch.float64 if rng.random() < 0.5 else torch.float32
        one = torch.from_numpy(rng.standard_normal(size)).to(dtype)
        exact = float(np.sqrt((one.numpy().astype(np.longdouble) ** 2).sum()))
        for tensor, read in (
            (one.repeat(groups, 1), Groups.outputs()),
            (one[:, None].repeat(1, groups), Groups.inputs()),
        ):
            found = norms(read.read(tensor))
            assert found.dtype == torch.float64
            assert found.shape == (groups,)
            assert (found == found[0]).all(), "equal groups, different norms"
            assert float(found[0]) == pytest.approx(exact, rel=1e-14 if dtype == torch.float64 else 1e-7)


def test_norms_of_equal_groups_are_equal_bit_for_bit():
    law_of_group_norms(group_norms)
    for twin in (
        lambda m: (
            m.double().square().sum(dim=1).sqrt() if m.is_contiguous() else m.T.double().square().sum(dim=0).sqrt()
        ),
        lambda m: m.norm(dim=1).double(),
        lambda m: m.norm(dim=1),
    ):
        with pytest.raises(AssertionError):
            law_of_group_norms(twin)


@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (2, 300_000), (3, 70_000), (300_000, 1), (1, 1)])
def test_norms_of_odd_shapes(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    expected = torch.from_numpy(np.sqrt((matrix.numpy().astype(np.longdouble) ** 2).sum(axis=1)).astype(float))
    torch.testing.assert_close(group_norms(matrix), expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(group_norms(matrix.T.contiguous().T), expected, rtol=1e-7, atol=0)


# The rest of the contract.


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_are_values_that_scale(name):
    penalty = PENALTIES[name](2.0, Ramp(3.0))
    assert isinstance(penalty, Penalty)
    assert penalty.scaled(0.5) == PENALTIES[name](1.0, Ramp(3.0))
    assert type(penalty.scaled(0.5)) is type(penalty)
    assert hash(penalty) == hash(PENALTIES[name](2.0, Ramp(3.0)))
    matrix = torch.randn(4, 3, requires_grad=True)
    assert not penalty.prox(matrix, 0.1).requires_grad
    assert not penalty.value(matrix).requires_grad
    twice = penalty.scaled(2.0).prox(matrix, 0.1)
    torch.testing.assert_close(twice, penalty.prox(matrix, 0.2), rtol=0, atol=0)


@pytest.mark.parametrize("name", PENALTIES)
def test_the_input_is_left_alone_and_layout_does_not_matter(name):
    penalty = PENALTIES[name](0.3, Ramp(3.0))
    weight = torch.randn(5, 7)
    before = weight.clone()
    through_view = penalty.prox(Groups.inputs().read(weight), 0.5)
    assert torch.equal(weight, before)
    torch.testing.assert_close(through_view, penalty.prox(weight.T.contiguous(), 0.5), rtol=1e-7, atol=0)
    for empty in (torch.zeros(0, 3), torch.zeros(3, 0)):
        assert penalty.prox(empty, 0.5).shape == empty.shape
        assert penalty.certify(empty, penalty.prox(empty, 0.5), 0.5).holds(0.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", PENALTIES)
def test_weights_that_are_not_finite_are_refused(name, bad):
    matrix = torch.ones(3, 2)
    matrix[1, 0] = bad
    with pytest.raises(PenaltyError, match=r"matrix: expected finite weights, got NaN or infinity in 1 of"):
        PENALTIES[name](1.0, Ramp(3.0)).prox(matrix, 0.1)
    assert not PENALTIES[name](1.0, Ramp(3.0)).certify(torch.ones(3, 2), matrix, 0.1).holds(1e300)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Lasso(-1.0), r"Lasso.strength: expected a finite number ≥ 0, got -1.0"),
        (lambda: GrOWL(torch.nan), r"GrOWL.strength"),
        (lambda: GrOWL(1.0, [1.0, 2.0]), r"sequence: expected non-increasing"),
        (lambda: OWL(1.0, [1.0, -2.0]), r"sequence: expected weights ≥ 0"),
        (lambda: Lasso(1.0).scaled(-1.0), r"factor: expected a finite number ≥ 0"),
        (lambda: Lasso(1.0).prox(torch.ones(2, 2), -0.1), r"step: expected a finite number ≥ 0"),
        (lambda: GrOWL(1.0, [1.0]).prox(torch.ones(2, 2), 0.1), r"sequence: expected 2 weights, one per group, got 1"),
        (lambda: GrOWL(1.0).prox(torch.ones(2), 0.1), r"matrix: expected shape \(G, D\), got \(2,\)"),
        (lambda: GrOWL(1.0).prox(torch.ones(2, 2, dtype=torch.int64), 0.1), r"floating-point weights, got torch.int64"),
        (lambda: Lasso(1.0).prox(torch.ones(2, 2, dtype=torch.complex64), 0.1), r"got torch.complex64"),
        (lambda: Lasso(1.0).certify(torch.ones(2, 2), torch.ones(2, 1), 0.1), r"prox_of_matrix: expected the shape"),
        (lambda: prox_owl(torch.ones(2), [1.0, 1.0], -1), r"step: expected"),
        (lambda: prox_growl(torch.ones(2, 2), [1.0, 1.0], torch.nan), r"step: expected"),
    ],
)
def test_bad_input_is_refused_by_name(call, says):
    with pytest.raises(PenaltyError, match=says):
        call()


def test_a_certificate_with_a_nan_does_not_hold():
    assert not Certificate({"a": 0.0, "b": float("nan")}).holds(1.0)
    assert not Certificate({"b": float("nan"), "a": 0.0}).holds(1.0)


@pytest.mark.parametrize("scale", [1e-140, 1e-30, 1e30, 1e140])
@pytest.mark.parametrize("name", PENALTIES)
def test_extreme_scales_keep_the_certificate(name, scale):
    torch.manual_seed(0)
    matrix = torch.randn(6, 3, dtype=torch.float64) * scale
    for strength in (scale, 1.0):
        penalty = PENALTIES[name](strength, Ramp(3.0))
        assert penalty.certify(matrix, penalty.prox(matrix, 0.3), 0.3).holds(1e-13)
