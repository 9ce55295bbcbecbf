"""The hybrid's benchmark does what its example does, with many networks at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from benchmarks import hybrid_digits, hybrid_points
from benchmarks.hybrid import gain
from benchmarks.hybrid_points import SIZE, Samples, objective
from examples import hybrid as example
from torch import Tensor
from torch.nn.utils import vector_to_parameters

import tying

DRAWN = [example.draw_points(elongation, 3, seed) for seed, elongation in enumerate((1.0, 1.5, 3.0))]
SAMPLES = Samples.of(DRAWN)
STRENGTHS = [0.0, 0.1, math.inf]


def by_soft_tie(points: example.Points, z: Tensor, alpha: float) -> Tensor:
    """Return the example's objective, as its three lines say it."""
    models = {"discriminative": example.RoundGaussians(points), "generative": example.RoundGaussians(points)}
    for model, own in zip(models.values(), z.split(SIZE), strict=True):
        vector_to_parameters(own, model.parameters())
    return example.hybrid_loss(models, points) + tying.SoftTie(tying.match(models), example.strength_of(alpha))(models)


def law_same_objective(formula: Callable[[Samples, Tensor, float], Tensor], alpha: float) -> None:
    z = SAMPLES.start.repeat(1, 2) + torch.linspace(-0.3, 0.3, 2 * SIZE, dtype=torch.float64)
    expected = torch.stack([by_soft_tie(points, own, alpha) for points, own in zip(DRAWN, z, strict=True)])
    torch.testing.assert_close(formula(SAMPLES, z, alpha), expected.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
def test_the_stacked_objective_is_that_of_the_soft_tie(alpha: float) -> None:
    law_same_objective(lambda *given: objective(*given)[0], alpha)


def test_half_the_strength_fails_the_law() -> None:
    def wrong(samples: Samples, z: Tensor, alpha: float) -> Tensor:
        return objective(samples, z, alpha)[0] - example.strength_of(alpha) / 2 * (
            z[:, :SIZE] - z[:, SIZE:]
        ).square().sum(1)

    with pytest.raises(AssertionError):
        law_same_objective(wrong, 0.5)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_derivatives_in_closed_form_are_those_of_autograd(alpha: float) -> None:
    z = SAMPLES.start if alpha == 0 else SAMPLES.start.repeat(1, 2)
    z = z + torch.linspace(-0.3, 0.3, z.shape[1], dtype=torch.float64)
    _, gradient, hessian = objective(SAMPLES, z, alpha)

    def total(moved: Tensor) -> Tensor:
        return objective(SAMPLES, moved, alpha, derivatives=False)[0].sum()

    def slope(moved: Tensor) -> Tensor:
        return torch.func.grad(total)(moved).sum(0)  # samples don't touch each other

    torch.testing.assert_close(gradient, torch.func.grad(total)(z), rtol=1e-10, atol=1e-10)
    curvature = torch.func.jacrev(slope)(z).movedim(1, 0)
    torch.testing.assert_close(hessian, curvature, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_newton_ends_where_the_example_ends(alpha: float) -> None:
    theta, slope = hybrid_points.fit(SAMPLES, alpha)
    assert slope.max() <= hybrid_points.TOLERANCE
    expected = [example.accuracy_of(example.fit_hybrid(points, alpha), points.elongation) for points in DRAWN]
    assert hybrid_points.accuracies(theta, DRAWN) == pytest.approx(expected, abs=1e-5)


def test_the_exact_accuracy_is_that_of_many_points() -> None:
    points, many = DRAWN[1], 200_000
    model = example.RoundGaussians(points)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * many, 2, dtype=torch.float64, generator=generator) * torch.tensor([points.elongation, 1.0])
    classes = torch.arange(2).repeat_interleave(many)
    x[:, 1] += (classes - 0.5) * example.APART
    counted = (model(x).argmax(dim=1) == classes).double().mean().item()
    assert example.accuracy_of(model, points.elongation) == pytest.approx(counted, abs=3e-3)  # 5 standard errors


def test_all_strengths_at_once_learn_what_each_learns_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in example, hybrid_digits:
        monkeypatch.setattr(module, "STEPS", 20)
    digits = example.draw_digits(10, 0)
    scores = dict(hybrid_digits.run(10, 0, STRENGTHS, [0.0]))
    for name, way in {"autoencoder": example.with_autoencoder, "k-means": example.with_kmeans}.items():
        for strength in STRENGTHS:
            alone = example.share_right(way(digits, strength, 0), *digits.test)
            assert scores[name][hybrid_digits.label(strength)][1] == pytest.approx(alone, abs=0.005), (name, strength)
        all_of_it = [test for _, test in scores[name].values()]
        assert max(all_of_it) - min(all_of_it) > 0.01, "the strengths can't be told apart"


def test_kmeans_as_weights_chooses_the_nearest_centre() -> None:
    images = example.draw_digits(1, 0).unlabelled.double()
    weights, temperature = example.kmeans_encoder(images, 0)
    nearest = torch.cdist(images, weights["encoder.weight"]).square()
    outputs = images @ weights["encoder.weight"].T + weights["encoder.bias"]
    assert torch.equal(outputs.argmax(dim=1), nearest.argmin(dim=1))
    assert temperature == pytest.approx(nearest.amin(dim=1).mean().item() / 3)
    soft = example.SoftAssignment(temperature)(outputs)
    torch.testing.assert_close(soft, torch.softmax(-nearest / (2 * temperature), dim=1))


def test_a_gain_is_of_pairs() -> None:
    assert gain([0.9, 0.8, 0.7], [0.8, 0.7, 0.6]) == [pytest.approx(10.0), pytest.approx(0.0, abs=1e-3)]
