"""Sequences against the formulas, written out rank by rank; arrays against what they must be refused for."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from tying.errors import PenaltyError
from tying.penalties.sequences import Constant, Explicit, Oscar, Pld, Ramp, Spike, as_sequence, check_weights, weights

SIZES = [1, 2, 3, 7, 10, 100, 784]


def ramp_mnist(n: int, i: int, base: float, slope: float, fraction: float) -> float:
    p = math.floor(fraction * n) - 1
    if i > p:
        return base
    return base + slope * (n - 1) * ((p - i) / (p - 1) if p > 1 else 1.0)


def ramp_paper(n: int, i: int, base: float, slope: float, fraction: float) -> float:
    p = math.floor(fraction * n)
    return base + (p - i + 1) * slope if i <= p else base


def ramp_vgg(n: int, i: int, base: float, slope: float, fraction: float) -> float:
    p = math.floor(fraction * n)
    return base + (p - i) * slope if i <= p else base


# (sequence, its formula for rank i of n, i from 1)
FORMULAS = [
    (Constant(0.7), lambda n, i: 0.7),
    (Constant(0), lambda n, i: 0.0),
    (Oscar(0.5, 0.25), lambda n, i: 0.5 + 0.25 * (n - i)),
    (Ramp(3.0), lambda n, i: 1 + 3 * (n - i) / (n - 1) if n > 1 else 1.0),
    (Spike(0.3, 2.0), lambda n, i: 2.3 if i == 1 else 0.3),
    (Pld(12, 0.215, 0.5), lambda n, i: ramp_paper(n, i, 12, 0.215, 0.5)),
    (Pld(4.5, 0.1, 0.1, "vgg"), lambda n, i: ramp_vgg(n, i, 4.5, 0.1, 0.1)),
    (Pld(12, 0.215, 0.5, "mnist"), lambda n, i: ramp_mnist(n, i, 12, 0.215, 0.5)),
]


def law_of_sequence(sequence, formula, n):
    found = sequence(n)
    assert found.shape == (n,)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [formula(n, i) for i in range(1, n + 1)], rtol=1e-14)
    np.testing.assert_array_equal(weights(sequence, n), found)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("sequence", "formula"), FORMULAS, ids=[str(sequence) for sequence, _ in FORMULAS])
def test_sequence_is_its_formula(sequence, formula, n):
    law_of_sequence(sequence, formula, n)


def test_law_refuses_a_neighbouring_variant():
    paper = next(formula for sequence, formula in FORMULAS if sequence == Pld(12, 0.215, 0.5))
    with pytest.raises(AssertionError):
        law_of_sequence(Pld(12, 0.215, 0.5, "vgg"), paper, 100)
    with pytest.raises(AssertionError):
        law_of_sequence(lambda n: Ramp(3.0)(n)[::-1].copy(), lambda n, i: 1 + 3 * (n - i) / (n - 1), 10)


def test_peaks_of_the_official_settings():
    assert Pld(12, 0.215, 0.5, "mnist")(784)[0] == pytest.approx(12 + 783 * 0.215)
    assert (Pld(12, 0.215, 0.5, "mnist")(784) > 12).sum() == 784 // 2 - 2  # the last of the 391 ranks is at 12 itself
    assert Pld(4.5, 0.1, 0.1, "vgg")(64)[0] == pytest.approx(4.5 + 0.1 * 5)
    assert Pld(4.5, 0.1, 0.1, "paper")(64)[0] == pytest.approx(4.5 + 0.1 * 6)


def test_a_fraction_that_floats_spoil_is_floored_as_meant():
    assert (Pld(0, 1, 0.29)(100) > 0).sum() == 29


def test_sequences_are_values():
    assert Ramp(3) == Ramp(3.0)
    assert len({Ramp(3), Ramp(3.0), Spike(1, 2), Pld(1, 2, 0.5), Explicit((2, 1)), Explicit((2.0, 1.0))}) == 4


@pytest.mark.parametrize("given", [[3, 1, 0], (3.0, 1.0, 0.0), np.array([3, 1, 0]), torch.tensor([3.0, 1.0, 0.0])])
def test_arrays_serve_as_sequences(given):
    assert as_sequence(given) == Explicit((3.0, 1.0, 0.0))
    np.testing.assert_array_equal(weights(given, 3), [3, 1, 0])


def test_all_zero_is_no_penalty():
    np.testing.assert_array_equal(check_weights([0, 0, 0], 3), np.zeros(3))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([1.0, 2.0], r"sequence: expected non-increasing weights, got 1.0 then 2.0 at index 1; sort"),
        ([1.0, -2.0], r"sequence: expected weights ≥ 0, got -2.0 at index 1"),
        ([np.nan, 1.0], r"sequence: expected finite weights, got nan at index 0"),
        ([np.inf, 1.0], r"sequence: expected finite weights, got inf at index 0"),
        ([[1.0], [0.5]], r"sequence: expected a flat list of weights, got shape \(2, 1\)"),
        (1.0, r"sequence: expected a flat list"),
        ("abc", r"sequence: expected numbers, got 'abc'"),
        (torch.ones(2, requires_grad=True), r"sequence: expected numbers, got tensor"),
        ([2.0, 1.0, 0.5], r"sequence: expected 2 weights, one per group, got 3"),
    ],
)
def test_a_wrong_array_is_refused_by_what_is_wrong(given, says):
    with pytest.raises(PenaltyError, match=says):
        weights(given, 2)


def test_nothing_that_is_asked_for_can_be_written_to():
    own = np.array([2.0, 1.0])
    explicit = Explicit((2.0, 1.0))
    copies = [explicit, copy.copy(explicit), copy.deepcopy(explicit), pickle.loads(pickle.dumps(explicit))]
    for sequence in (*copies, Ramp(3.0), own, [2.0, 1.0], lambda n: own):
        with pytest.raises(ValueError, match="read-only"):
            weights(sequence, 2)[0] = 9.0
    assert not weights(Ramp(3.0), 200_000).flags.writeable
    assert own.flags.writeable
    assert len(set(copies)) == 1


class Louder(Ramp):
    volume = 1.0

    def __call__(self, n):
        return self.volume * super().__call__(n)


class Doubled(Explicit):
    def __call__(self, n):
        return 2 * super().__call__(n)


def test_a_subclass_is_asked_every_time(monkeypatch):
    assert weights(Louder(3.0), 2).tolist() == [4.0, 1.0]
    monkeypatch.setattr(Louder, "volume", 2.0)
    assert weights(Louder(3.0), 2).tolist() == [8.0, 2.0]
    assert weights(Doubled((3.0, 1.0)), 2).tolist() == [6.0, 2.0]


def test_a_users_own_function_is_checked_too():
    np.testing.assert_array_equal(weights(lambda n: np.ones(n), 3), np.ones(3))
    with pytest.raises(PenaltyError, match="non-increasing"):
        weights(lambda n: np.arange(n, dtype=float), 3)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Constant(-1), r"Constant.base: expected a finite number ≥ 0, got -1"),
        (lambda: Oscar(1, math.nan), r"Oscar.slope"),
        (lambda: Ramp(math.inf), r"Ramp.ratio"),
        (lambda: Spike("a", 1), r"Spike.base"),
        (lambda: Pld(1, 1, 1.5), r"Pld.fraction: expected a share of the ranks in \[0, 1\], got 1.5"),
        (lambda: Pld(1, 1, 0.5, "cifar"), r"Pld.variant: expected one of"),
        (lambda: Explicit((1.0, 2.0)), r"non-increasing"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(build, says):
    with pytest.raises(PenaltyError, match=says):
        build()
