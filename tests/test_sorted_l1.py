"""The kernel against pooling in long double and two other libraries, on kinds of cases; broken twins must fail."""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from sortedl1 import Slope
from torch._subclasses import FakeTensorMode

from tying.errors import PenaltyError
from tying.penalties import isotonic, order, segmented, sorted_l1
from tying.penalties.isotonic import by_public_name, pool
from tying.penalties.norms import OWL, GrOWL
from tying.penalties.order import ascending, ascending_in_segments
from tying.penalties.prox import owl_dual_norm, owl_norm, prox_growl, prox_owl
from tying.penalties.segmented import shrink_segmented
from tying.penalties.sequences import Constant, Explicit, Oscar, Pld, Ramp, Spike
from tying.penalties.sorted_l1 import shrink_sorted, shrink_vectors

SIZES = [0, 1, 2, 3, 17, 300, 1500, 20_000]
VALUES = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "rounded": lambda rng, n: np.round(rng.standard_normal(n), 1),
    "heavy tails": lambda rng, n: rng.standard_cauchy(n),
    "many magnitudes": lambda rng, n: rng.standard_normal(n) * 10.0 ** rng.uniform(-9, 3, n),
    "sparse": lambda rng, n: rng.standard_normal(n) * (rng.random(n) < 0.1),
    "all equal": lambda rng, n: rng.choice([-1.7, 1.7], n),
    "nearly equal": lambda rng, n: 1.0 + 1e-6 * rng.standard_normal(n),
}
WEIGHTS = {
    "none": lambda rng, n: np.zeros(n),
    "constant": Constant(0.3),
    "oscar": lambda rng, n: Oscar(0.01, 2 / max(n, 1))(n),
    "ramp": lambda rng, n: 0.2 * Ramp(3.0)(n),
    "steep": lambda rng, n: 5 * Ramp(30.0)(n),
    "pld": Pld(0.1, 1e-4, 0.3),
    "spike": Spike(0.1, 3.0),
    "staircase": lambda rng, n: np.sort(rng.choice([0.0, 0.1, 0.5, 0.9], n))[::-1],
    "random": lambda rng, n: np.sort(rng.random(n))[::-1],
    "normal quantiles": lambda rng, n: np.sort(np.abs(rng.standard_normal(n)))[::-1],  # what the theory of SLOPE takes
}
KINDS = [(v, w, n) for v in VALUES for w in WEIGHTS for n in SIZES]  # 560


def case(kind: tuple[str, str, int]) -> tuple[np.ndarray, np.ndarray]:
    """A vector and its thresholds, float64."""
    values, weights, n = kind
    rng = np.random.default_rng(KINDS.index(kind))
    sequence = WEIGHTS[weights]
    return VALUES[values](rng, n), sequence(n) if not hasattr(sequence, "__code__") else sequence(rng, n)


def reference(v: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Pooling of neighbours in long double, one number after the other."""
    ranked = np.argsort(-np.abs(v), kind="stable")
    lowered = np.abs(v).astype(np.longdouble)[ranked] - thresholds.astype(np.longdouble)
    sums: list[np.longdouble] = []
    sizes: list[int] = []
    for number in lowered:
        total, size = number, 1
        while sums and sums[-1] * size <= total * sizes[-1]:
            total, size = total + sums.pop(), size + sizes.pop()
        sums.append(total)
        sizes.append(size)
    x = np.zeros(len(v), dtype=np.longdouble)
    means = [max(total / size, np.longdouble(0)) for total, size in zip(sums, sizes, strict=True)]
    x[ranked] = np.repeat(np.array(means, dtype=np.longdouble), sizes) if means else 0
    return np.copysign(x, v)


def law_of_exactness(prox, kind: tuple[str, str, int], dtype: type) -> None:
    """Within 1e-13 (float32: 1e-7) of the largest magnitude; equal magnitudes, in order, stay so bit for bit."""
    v, thresholds = case(kind)
    v = v.astype(dtype)
    found = prox(v, thresholds)
    assert found.dtype == dtype
    assert found.shape == v.shape
    if not len(v):
        return
    off = np.abs(found - reference(v.astype(np.float64), thresholds)).max()
    assert off <= {np.float64: 1e-13, np.float32: 1e-7}[dtype] * np.abs(v).max(), (kind, off)
    assert not (np.signbit(found) & (found == 0)).any(), "a negative zero"
    assert (found * v >= 0).all(), "a sign changed"
    ranked = np.argsort(np.abs(v), kind="stable")
    before, after = np.diff(np.abs(v)[ranked]), np.diff(np.abs(found)[ranked])
    assert (after[before == 0] == 0).all(), "equal before, not after"
    assert (after >= 0).all(), "out of order"


def through_tensors(v: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    return prox_owl(torch.from_numpy(v), thresholds).numpy()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("values", VALUES)
def test_the_prox_is_exact_on_every_kind_of_case(values, dtype):
    for kind in KINDS:
        if kind[0] == values:
            law_of_exactness(through_tensors, kind, dtype)


def in_single(v, thresholds):
    return through_tensors(v.astype(np.float32), thresholds).astype(v.dtype)


def never_pooled(v, thresholds):
    x, ranked = np.empty_like(v), np.argsort(-np.abs(v))
    x[ranked] = np.maximum(np.abs(v)[ranked] - thresholds, 0)
    return np.copysign(x, v) + v.dtype.type(0)


def told_apart(v, thresholds):
    x = through_tensors(v, thresholds)
    return np.nextafter(x, np.inf, where=np.arange(len(v)) % 2 == 1, out=x.copy())


def signs_lost(v, thresholds):
    return np.abs(through_tensors(v, thresholds))


@pytest.mark.parametrize("twin", [in_single, never_pooled, told_apart, signs_lost])
def test_the_law_refuses_a_twin(twin):
    kind = ("rounded", "ramp", 300)
    law_of_exactness(through_tensors, kind, np.float64)
    with pytest.raises(AssertionError):
        law_of_exactness(twin, kind, np.float64)


def test_skglm_gives_the_same():
    from skglm.penalties import SLOPE

    for kind in KINDS:
        v, thresholds = case(kind)
        if len(v) > 1:
            found, other = through_tensors(v, thresholds), SLOPE(thresholds).prox_vec(v, 1.0)
            tolerance = 1e-13 if len(v) < 20_000 else 1e-12  # it adds up one by one: 4e-13 off from long double there
            np.testing.assert_allclose(found, other, rtol=0, atol=tolerance * np.abs(v).max(), err_msg=str(kind))


def test_sortedl1_gives_the_same():
    """It has no prox by itself: that is its solution of least squares with the identity as design."""
    for kind in KINDS:
        v, thresholds = case(kind)
        if 1 < len(v) < 100 and thresholds.any() and len(np.unique(v)) > 1:  # it refuses a constant
            model = Slope(lam=thresholds, alpha=1 / len(v), fit_intercept=False, tol=1e-14, max_iter=10**4)
            other = np.asarray(model.fit(np.eye(len(v)), v).coef_).ravel()
            found = through_tensors(v, thresholds)
            np.testing.assert_allclose(found, other, rtol=0, atol=1e-13 * np.abs(v).max(), err_msg=str(kind))


# Many segments.


def segments(seed: int, sizes: list[int]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Magnitudes and thresholds of different scales, side by side."""
    rng = np.random.default_rng(seed)
    values, weights = list(VALUES.values()), list(WEIGHTS)
    parts = []
    for n in sizes:
        v, kind = values[rng.integers(len(values))](rng, n), weights[rng.integers(len(weights))]
        sequence = WEIGHTS[kind]
        t = sequence(rng, n) if hasattr(sequence, "__code__") else sequence(n)
        scale = 10.0 ** rng.integers(-8, 8)
        parts.append((np.abs(v) * scale, t * scale * rng.choice([0.01, 1.0, 3.0])))
    return *(np.concatenate(side) for side in zip(*parts, strict=True)), sizes


SEGMENTED = [
    [5],
    [0, 0, 3, 0, 1, 1, 0],
    [64] * 50,
    [1] * 200,
    [3] * 64,
    [3] * 65,
    [200, 0, 5000, 1, 4096, 4095, 2, 7, 6000],
    list(range(90)),
    [9000],
]


def law_of_segments(shrink, seed: int, sizes: list[int], tolerance: float = 1e-13) -> None:
    """Every segment as if it were alone: 1e-13 of its own largest magnitude, equals equal bit for bit."""
    magnitudes, thresholds, lengths = segments(seed, sizes)
    found = shrink(magnitudes, thresholds, lengths)
    assert found.shape == magnitudes.shape
    for start, stop in pairwise(np.cumsum([0, *lengths])):
        m, t, x = magnitudes[start:stop], thresholds[start:stop], found[start:stop]
        if not len(m):
            continue
        assert np.abs(x - reference(m, t)).max() <= tolerance * max(m.max(), t.max()), (start, stop)
        ranked = np.argsort(m, kind="stable")
        assert (np.diff(x[ranked])[np.diff(m[ranked]) == 0] == 0).all(), "equal before, not after"


def segmented_on_tensors(magnitudes, thresholds, lengths):
    return shrink_segmented(torch.from_numpy(magnitudes), torch.from_numpy(thresholds), lengths).numpy()


@pytest.mark.parametrize("sizes", SEGMENTED, ids=lambda sizes: f"{len(sizes)} segments of up to {max(sizes)}")
@pytest.mark.parametrize("shrink", [shrink_sorted, segmented_on_tensors])
def test_every_segment_is_solved_as_if_alone(shrink, sizes):
    for seed in range(5):
        law_of_segments(shrink, seed, sizes)


HARD = {
    "geometric": lambda n: 2.0 ** -np.arange(n, dtype=float),
    "slowly geometric": lambda n: 0.99 ** np.arange(n),
    "doubly exponential": lambda n: np.exp(-np.exp(np.linspace(-3, 3.5, n))),
    "from both ends": lambda n: np.r_[1 + 2.0 ** -np.arange(n - n // 2), 1 - 2.0 ** -np.arange(n // 2)[::-1]],
    "powers": lambda n: np.arange(1.0, n + 1) ** -8,
    "staircase": lambda n: np.floor(np.linspace(9, 0, n)),
    "staircase of pairs": lambda n: np.repeat(np.arange(n), 2)[:n][::-1].astype(float),
    "equal": np.ones,
    "one giant": lambda n: np.r_[1e9, np.ones(n - 1)],
}


def hard_cases():
    """Magnitudes whose fit is known to be deep: nothing, everything, or every scale is pooled."""
    for n in (1, 2, 3, 31, 32, 33, 1000, 2500):
        for name, make in HARD.items():
            for weights in ("none", "oscar", "steep", "staircase", "random"):
                sequence = WEIGHTS[weights]
                rng = np.random.default_rng(n)
                thresholds = sequence(rng, n)
                yield f"{name}, {weights}, {n}", make(n), thresholds * make(n).max() / max(thresholds.max(), 1e-9) * 0.7


def law_of_hard_cases(shrink) -> None:
    cases = list(hard_cases())
    magnitudes, thresholds = (np.concatenate(side) for side in list(zip(*cases, strict=True))[1:])
    found = shrink(magnitudes, thresholds, [len(m) for _, m, _ in cases])
    for (name, m, t), x in zip(cases, np.split(found, np.cumsum([len(m) for _, m, _ in cases])[:-1]), strict=True):
        assert np.abs(x - reference(m, t)).max() <= 1e-13 * m.max(), name


@pytest.mark.parametrize("shrink", [shrink_sorted, segmented_on_tensors])
def test_hard_cases_are_exact(shrink):
    law_of_hard_cases(shrink)


def split_at_the_argmax(magnitudes, thresholds, lengths):
    """Blocks split where the running sums are farthest above their chord, log2(n) + 3 times: not always enough."""
    found, start = np.empty_like(magnitudes), 0
    for n in lengths:
        ranked = np.argsort(-magnitudes[start : start + n], kind="stable")
        lowered = magnitudes[start + ranked] - thresholds[start : start + n]
        sums = np.r_[0.0, np.cumsum(lowered)]
        edges = [0, n]
        for _ in range(int(np.ceil(np.log2(n))) + 3):
            for a, b in list(pairwise(edges)):
                above = sums[a : b + 1] - sums[a] - (sums[b] - sums[a]) / (b - a) * np.arange(b - a + 1)
                edges += [a + int(above.argmax())] if above.max() > 0 else []
            edges = sorted(set(edges))
        means = np.diff(sums[edges]) / np.diff(edges)
        found[start + ranked] = np.repeat(np.maximum(means, 0), np.diff(edges))
        start += n
    return found


def test_the_law_of_hard_cases_refuses_too_few_levels(monkeypatch):
    with pytest.raises(AssertionError):
        law_of_hard_cases(split_at_the_argmax)
    plan = segmented._plan

    def shallow(lengths, device):
        made = segmented._Plan(lengths, device)
        made.levels = made.levels[:-1]
        return made

    monkeypatch.setattr(segmented, "_plan", shallow)
    with pytest.raises(AssertionError):
        law_of_hard_cases(segmented_on_tensors)
    assert plan((5,), torch.device("cpu")).levels == [(1, 8), (2, 8), (4, 8)]


def test_the_version_without_a_round_trip_never_looks_at_a_number():
    """On the meta device there are none to look at."""
    for lengths in ([7, 0, 300], [], [0], [1]):
        nothing = torch.empty(sum(lengths), dtype=torch.float64, device="meta")
        assert shrink_segmented(nothing, nothing, lengths).shape == (sum(lengths),)
    with pytest.raises(NotImplementedError):
        torch.empty(3, device="meta").nonzero()


def test_the_version_without_a_round_trip_keeps_nothing_of_a_mode():
    magnitudes, thresholds, lengths = segments(3, [51, 8, 401])
    m, t = torch.from_numpy(magnitudes), torch.from_numpy(thresholds)
    segmented._plan.cache_clear()
    with FakeTensorMode():
        for _ in range(2):
            assert shrink_segmented(torch.ones(460).double(), torch.ones(460).double(), lengths).shape == (460,)
    with torch.inference_mode():
        expected = shrink_segmented(m, t, lengths).numpy()
    np.testing.assert_array_equal(shrink_segmented(m, t, lengths).numpy(), expected)
    assert not segmented._plan(tuple(lengths), m.device).slots.is_inference()
    with FakeTensorMode():
        shrink_segmented(torch.ones(460).double(), torch.ones(460).double(), lengths)


def test_the_version_without_a_round_trip_keeps_its_input_and_repeats_its_bits():
    magnitudes, thresholds, lengths = segments(3, [50, 7, 400])
    m, t = torch.from_numpy(magnitudes), torch.from_numpy(thresholds)
    first = shrink_segmented(m, t, lengths)
    assert torch.equal(first, shrink_segmented(m, t, lengths))
    np.testing.assert_array_equal(m.numpy(), segments(3, [50, 7, 400])[0])


@pytest.mark.parametrize(
    "twin",
    [
        lambda m, t, lengths: shrink_sorted(m, t),  # one segment
        lambda m, t, lengths: shrink_sorted(m, t, lengths[::-1]),
        lambda m, t, lengths: shrink_sorted(m.astype(np.float32).astype(np.float64), t, lengths),
    ],
)
def test_the_law_of_segments_refuses_a_twin(twin):
    law_of_segments(shrink_sorted, 0, list(range(90)))
    with pytest.raises(AssertionError):
        law_of_segments(twin, 0, list(range(90)))


def test_what_stands_between_segments_is_never_averaged():
    """Neighbours whose fits come close from both sides: constant segments at the ends of their range."""
    high, low = np.full(40, 1e8), np.full(40, 1e-8)
    magnitudes = np.concatenate([low, high] * 30)
    thresholds = np.concatenate([Ramp(3.0)(40) * m[0] / 10 for m in [low, high] * 30])
    alone = np.concatenate([shrink_sorted(m, Ramp(3.0)(40) * m[0] / 10) for m in [low, high] * 30])
    np.testing.assert_allclose(shrink_sorted(magnitudes, thresholds, [40] * 60), alone, rtol=1e-14)


# The parts.


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("n", [1, 2, 511, 512, 513, 5000, 200_000])
def test_the_order_is_that_of_all_bits(n, dtype):
    rng = np.random.default_rng(n)
    for values in (rng.standard_normal(n), np.round(rng.standard_normal(n), 2), 1 + rng.integers(0, 9, n) * 2.0**-52):
        values = values.astype(dtype)
        ranked, ordered = ascending(values)
        np.testing.assert_array_equal(np.sort(ranked), np.arange(n))
        np.testing.assert_array_equal(ordered, np.sort(np.abs(values)).astype(np.float64))
        np.testing.assert_array_equal(np.abs(values)[ranked], ordered)
    for bad in (np.nan, np.inf, -np.inf):
        values[n // 2] = bad
        assert not ascending(values)[1][-1] < np.inf


@pytest.mark.parametrize("sizes", [[1], [2, 1], [1, 1, 1], [30] * 64, [1000, 1, 3000, 7], [40_000, 2]])
def test_the_order_in_segments_is_lexicographic(sizes):
    n = sum(sizes)
    rng = np.random.default_rng(n)
    segment = np.repeat(np.arange(len(sizes)), sizes)
    for values in (np.abs(rng.standard_normal(n)), 1 + rng.integers(0, 9, n) * 2.0**-52, np.zeros(n)):
        ranked, ordered = ascending_in_segments(values, np.array(sizes))
        np.testing.assert_array_equal(np.sort(ranked), np.arange(n))
        expected = np.lexsort((values, -segment))
        np.testing.assert_array_equal(ordered, values[expected])
        np.testing.assert_array_equal(values[ranked], ordered)
        np.testing.assert_array_equal(segment[ranked], segment[expected])


def test_numbers_that_the_keys_do_not_tell_apart_are_sorted_where_they_are(monkeypatch):
    """Norms of many layers concentrate: the segments in which two are out of order are few, and so is the work."""
    values = np.random.default_rng(0).random(8000)
    values[4001:4003] = 0.5 + 2.0**-53, 0.5
    sizes = np.array([1000] * 8)
    monkeypatch.setattr(np, "lexsort", None)
    ranked, ordered = ascending_in_segments(values, sizes)
    np.testing.assert_array_equal(ordered.reshape(8, 1000), np.sort(values.reshape(8, 1000)[::-1], axis=1))
    np.testing.assert_array_equal(values[ranked], ordered)


@pytest.mark.parametrize("n", [1, 2, 50, 1024, 1025, 5000])
def test_the_public_regression_is_the_bare_one(n, monkeypatch):
    values = np.random.default_rng(n).standard_normal(n) + np.linspace(-1, 1, n)
    bare = values.copy()
    edges = pool(bare).copy()
    monkeypatch.setattr(isotonic, "_routine", lambda: by_public_name)
    public = values.copy()
    np.testing.assert_array_equal(pool(public), edges)
    np.testing.assert_array_equal(public, bare)


def test_unusual_machines_sort_by_argsort(monkeypatch):
    monkeypatch.setattr(order, "_is_unusual", lambda values: True)
    for kind in (("rounded", "ramp", 1500), ("normal", "random", 20_000)):
        law_of_exactness(through_tensors, kind, np.float32)
    law_of_segments(shrink_sorted, 0, [64] * 50)


def test_ties_that_rounding_tells_apart_are_made_equal_again():
    fit = np.array([1.0, 1.0 + 2e-16, 1.0 + 4e-16, 3.0])
    sorted_l1._equalise(fit, np.array([True, True, False]))
    np.testing.assert_array_equal(fit, [1.0, 1.0, 1.0, 3.0])


def fakes(real):
    """SciPy's routine, changed in ways that the values alone would not tell."""
    return {
        "other edges": lambda x, w, r: (*real(x, w, r)[:2], np.arange(len(r)), len(r) - 1),
        "other count": lambda x, w, r: (*(found := real(x, w, r))[:3], found[3] + 1),
        "edges without 0": lambda x, w, r: (*(found := real(x, w, r))[:2], np.roll(found[2], -1), found[3] - 1),
        "not in place": lambda x, w, r: real(x.copy(), w, r),
        "in place by halves": lambda x, w, r: (x, w, r, real(x.copy(), w, r)[3]),
        "another signature": lambda x, w: real(x, w, None),
        "another error": lambda x, w, r: {}["gone"],
        "another result": lambda x, w, r: real(x, w, r)[0],
    }


@pytest.mark.parametrize("fake", fakes(None))
def test_a_routine_that_has_changed_is_not_used(fake, monkeypatch):
    import scipy.optimize._pava_pybind as bound

    monkeypatch.setattr(isotonic, "_routine", isotonic._routine.__wrapped__)
    assert isotonic._routine() is bound.pava
    monkeypatch.setattr(bound, "pava", fakes(bound.pava)[fake])
    assert isotonic._routine() is by_public_name
    law_of_exactness(through_tensors, ("rounded", "oscar", 1500), np.float64)


@pytest.mark.parametrize("n", [100, 1000, 60_000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_prox_may_be_interrupted_by_another(n, dtype, monkeypatch):
    """As by a signal's handler, or a finaliser."""
    v, other = np.random.default_rng(n).standard_normal((2, n)).astype(dtype)
    expected, real, depth = through_tensors(v, Ramp(3.0)(n) / 9), sorted_l1.pool, []

    def interrupted(values):
        if not depth:
            depth.append(1)
            through_tensors(other, Ramp(1.0)(n))
            edges = real(values)
            through_tensors(other, Ramp(1.0)(n))
            return edges
        return real(values)

    monkeypatch.setattr(sorted_l1, "pool", interrupted)
    np.testing.assert_array_equal(through_tensors(v, Ramp(3.0)(n) / 9), expected)
    assert depth


def test_threads_share_nothing():
    rng = np.random.default_rng(0)
    vectors = [rng.standard_normal(50_000) for _ in range(4)]
    expected = [shrink_vectors(v, Ramp(3.0)(50_000), 0.1) for v in vectors]
    wrong = []

    def repeat(v, x):
        found = [shrink_vectors(v, Ramp(3.0)(50_000), 0.1) for _ in range(10)]
        wrong.extend(again for again in found if not np.array_equal(again, x))

    threads = [threading.Thread(target=repeat, args=pair) for pair in zip(vectors, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# What people pass.


@pytest.mark.parametrize("n", [1, 100, 1000, 200_000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_named(n, dtype, bad):
    v = torch.ones(n, dtype=dtype)
    v[n // 2] = bad
    for vector, weights in ((v, Ramp(3.0)), (v, Constant(1.0)), (v.expand(3, n), Ramp(3.0)), (v[None], Ramp(3.0))):
        count = vector.numel() // n
        says = rf"^v: expected finite numbers, got NaN or infinity in {count} of {count * n}, first at entry {n // 2};"
        with pytest.raises(PenaltyError, match=says):
            prox_owl(vector, weights)
    with pytest.raises(PenaltyError, match=r"first at group 0"):
        prox_growl(v[None], Ramp(3.0))


def test_a_million_numbers():
    v = torch.randn(1 << 20)
    found = prox_owl(v, Ramp(3.0), 0.3)
    flat = through_tensors(v.double().numpy(), 0.3 * Ramp(3.0)(1 << 20))
    np.testing.assert_allclose(found.double().numpy(), flat, rtol=0, atol=1e-7 * float(v.abs().max()))
    assert prox_growl(v[:, None], Ramp(3.0), 0.3).sub(found[:, None]).abs().max() < 1e-6


def test_views_are_read_as_what_they_show():
    base = torch.randn(6, 40, dtype=torch.float64)
    for view in (base[2], base.T[3], base[:, ::3][1], base.flip(0)[1], torch.randn(1).expand(7), base[0, :0]):
        before = base.clone()
        expected = prox_owl(view.clone(), Ramp(3.0), 0.2)
        assert torch.equal(prox_owl(view, Ramp(3.0), 0.2), expected)
        assert torch.equal(base, before)
    negative = torch.view_as_complex(torch.randn(5, 2)).conj().imag
    assert negative.is_neg()
    assert torch.equal(prox_owl(negative, Ramp(3.0), 0.2), prox_owl(negative.clone().resolve_neg(), Ramp(3.0), 0.2))


@pytest.mark.parametrize("shape", [(3, 40), (2, 3, 40), (130, 7), (5, 3000), (2, 5000), (0, 4), (3, 0), (1, 1), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_a_batch_is_its_vectors(shape, dtype):
    batch = torch.randn(shape, dtype=dtype)
    found = prox_owl(batch, Ramp(3.0), 0.2)
    assert found.shape == shape
    assert found.dtype == dtype
    for index in np.ndindex(shape[:-1]):
        assert torch.equal(found[index], prox_owl(batch[index], Ramp(3.0), 0.2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_small_numbers_beside_a_large_one_are_not_tied_by_company(dtype):
    v, weights = torch.tensor([1, 3e-15, 1e-15, 2e-15, 0], dtype=dtype), [4e-16, 3e-16, 2e-16, 1e-16, 0]
    alone = prox_owl(v, weights)
    assert len(alone.unique()) == 5
    assert torch.equal(prox_owl(v.repeat(64, 1), weights), alone.repeat(64, 1))


def test_a_number_by_itself_is_no_vector():
    with pytest.raises(PenaltyError, match=r"v: expected a vector or a batch of vectors, got a single number; use"):
        prox_owl(torch.tensor(1.0), [1.0])
    with pytest.raises(PenaltyError, match=r"x: expected a vector or a batch of vectors, got a single number; use x"):
        owl_norm(torch.tensor(1.0), [1.0])


def in_fake_mode(_: object) -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(2, 2)


NO_NUMBERS = {
    "an integer": (torch.ones(2, 2, dtype=torch.int64), r"real floating-point numbers, got torch.int64; pass real"),
    "complex": (
        torch.ones(2, 2, dtype=torch.complex64),
        r"real floating-point numbers, got torch.complex64; pass magn",
    ),
    "eight bits": (
        torch.ones(2, 2).to(torch.float8_e4m3fn),
        r"real floating-point numbers of 16 bits or more, got",
    ),
    "a list": ([[1.0, 2.0]], r"a tensor, got list; use torch.as_tensor"),
    "an array": (np.ones((2, 2)), r"a tensor, got ndarray; use torch.as_tensor"),
    "meta": (torch.ones(2, 2, device="meta"), r"numbers, got a tensor on the meta device"),
    "sparse": (torch.ones(2, 2).to_sparse(), r"a dense tensor, got torch.sparse_coo; use to_dense"),
    "fake": (in_fake_mode(None), r"a plain tensor, with all its numbers, got FakeTensor"),
}


@pytest.mark.parametrize("given", NO_NUMBERS)
@pytest.mark.parametrize(
    ("function", "name"), [(prox_owl, "v"), (prox_growl, "matrix"), (owl_norm, "x"), (owl_dual_norm, "u")]
)
def test_what_holds_no_numbers_is_refused_by_the_name_of_the_argument(given, function, name):
    what, says = NO_NUMBERS[given]
    with pytest.raises(PenaltyError, match=f"^{name}: expected {says}"):
        function(what, Ramp(3.0))


def test_a_parameter_is_a_tensor():
    assert torch.equal(prox_owl(torch.nn.Parameter(torch.ones(2)), [1.0, 0.0]).detach(), torch.full((2,), 0.5))


@pytest.mark.parametrize("function", [prox_owl, prox_growl, owl_norm, owl_dual_norm])
def test_wrong_weights_are_called_weights(function):
    for wrong in ([1.0], [1.0, 2.0], Explicit((1.0,)), lambda n: np.ones(n + 1)):
        with pytest.raises(
            PenaltyError, match=r"^weights: expected (2 weights, one per number|non-increasing weights)"
        ):
            function(torch.ones(2, 2), wrong)


# Numbers whose sums, or squares, exceed what float64 holds.


@pytest.mark.parametrize("n", [2, 4, 400, 20_000])
@pytest.mark.parametrize("width", [None, 3])
def test_huge_numbers_are_as_exact_as_others(n, width):
    unit = 2.0**1020
    v, thresholds = np.random.default_rng(n).uniform(-8, 8, n), np.linspace(9.0, 0.5, n)
    ours = torch.from_numpy(v * unit)
    found = prox_owl(ours if width is None else ours.expand(width, n), thresholds * unit).numpy() / unit
    np.testing.assert_array_equal(found, np.broadcast_to(through_tensors(v, thresholds), found.shape))
    large = torch.full((n,), 1.5e308, dtype=torch.float64)
    np.testing.assert_allclose(prox_owl(large, np.linspace(1e308, 0, n)).numpy(), 1e308, rtol=1e-15)
    segmented = shrink_sorted(np.abs(np.tile(v, 3)) * unit, np.tile(thresholds, 3) * unit, [n] * 3) / unit
    np.testing.assert_array_equal(segmented, np.abs(np.tile(through_tensors(v, thresholds), 3)))
    assert not prox_owl(torch.ones(n), thresholds * unit).any()


def test_the_norms_of_huge_numbers():
    large = torch.full((4,), 1.5e308, dtype=torch.float64)
    for x in (large, large.clone().requires_grad_()):
        assert float(owl_dual_norm(x, np.full(4, 1e308)).detach()) == pytest.approx(1.5, rel=1e-15)
        assert float(owl_dual_norm(x, [3.0, 2, 1, 0]).detach()) == pytest.approx(1e308, rel=1e-15)
        assert float(owl_norm(x, [1e-5, 0, 0, 0]).detach()) == pytest.approx(1.5e303)
        assert float(owl_norm(x, [1.0, 1, 1, 1]).detach()) == np.inf  # 6e308 rounded to float64


@pytest.mark.parametrize("unit", [1e200, 1e-200, 1e-160, 1e300, 1.0])
def test_groups_of_huge_and_tiny_numbers(unit):
    exact = 2.0 ** round(np.log2(unit))
    matrix, weights = torch.tensor([[3.0, 4.0], [0.0, 4.0], [0.0, 0.0]], dtype=torch.float64), np.array([2.0, 0.5, 0.0])
    expected = prox_growl(matrix, weights)
    for ours in (matrix * exact, (matrix * exact).requires_grad_()):
        found = prox_growl(ours, weights * exact).detach()
        torch.testing.assert_close(found / exact, expected, rtol=1e-15, atol=0)
        torch.testing.assert_close(GrOWL(exact, weights).prox(ours, 1.0) / exact, expected, rtol=1e-15, atol=0)


def test_what_exceeds_float64_is_refused_by_name():
    with pytest.raises(
        PenaltyError, match=r"^matrix: expected norms of groups below 1.8e308, got more at group 1; divide"
    ):
        prox_growl(torch.tensor([[1.0, 1.0], [1.5e308, 1.5e308]], dtype=torch.float64), Ramp(3.0))
    for function in (prox_owl, prox_growl):
        with pytest.raises(
            PenaltyError, match=r"^step: expected step · strength · weights below 1.8e308, got 10 · 1e\+308"
        ):
            function(torch.ones(2, 2), [1e308, 1.0], 10.0)
    for penalty in (GrOWL(1e308), OWL(1e308)):
        with pytest.raises(PenaltyError, match=r"^step: expected step · strength"):
            penalty.prox(torch.ones(2, 2), 10.0)


def test_the_answer_is_ones_own():
    v, w = torch.randn(5000), Ramp(3.0)
    first = prox_owl(v, w, 0.1)
    kept = first.clone()
    prox_owl(torch.randn(5000), w, 0.1)
    assert torch.equal(first, kept)
    first.zero_()
    assert torch.equal(prox_owl(v, w, 0.1), kept)
