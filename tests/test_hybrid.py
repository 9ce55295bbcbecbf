"""The hybrid's benchmark does what its example does, with many networks at once."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import pytest
import torch
from benchmarks import hybrid_digits, hybrid_points
from benchmarks.hybrid import gain, percent, points, show_points
from benchmarks.hybrid_points import SIZE, Samples, objective
from examples import hybrid as example
from rich.console import Console
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


def test_newton_ends_where_the_example_ends() -> None:
    for alpha, best in hybrid_points.fit_all(SAMPLES, (0.0, 0.4, 1.0)).items():
        assert best.slope.max() <= hybrid_points.TOLERANCE
        expected = [
            example.accuracy_of(example.fit_hybrid(points, [alpha])[alpha], points.elongation) for points in DRAWN
        ]
        assert hybrid_points.accuracies(best.z, DRAWN) == pytest.approx(expected, abs=1e-5)


TRAP = example.draw_points(1.5, 2, 119)
"""Its labelled points' own means lead to a minimum that is not the lowest."""


def law_the_lowest_is_kept(fit: Callable[[Samples, float], Tensor]) -> None:
    samples = Samples.of([TRAP])
    generative = hybrid_points.fit(samples, 0.0, samples.start.repeat(1, 2))[0]
    assert fit(samples, 0.1) <= hybrid_points.fit(samples, 0.1, generative)[1] + 1e-6


def test_the_lowest_of_several_minima_is_kept() -> None:
    best = hybrid_points.fit_all(Samples.of([TRAP]), (0.0, 0.1))[0.1]
    assert (best.disagree(), best.first_is_not_best()) == (1, 1)
    law_the_lowest_is_kept(lambda samples, alpha: hybrid_points.fit_all(samples, (0.0, alpha))[alpha].value)
    ours = hybrid_points.accuracies(best.z, [TRAP])[0]
    assert example.accuracy_of(example.fit_hybrid(TRAP, [0.1])[0.1], TRAP.elongation) == pytest.approx(ours, abs=1e-4)
    assert ours > 0.8


def test_a_single_start_fails_the_law() -> None:
    with pytest.raises(AssertionError):
        law_the_lowest_is_kept(lambda samples, alpha: hybrid_points.fit(samples, alpha, samples.start.repeat(1, 2))[1])


@pytest.mark.parametrize("labels", [0, 111])
def test_labels_that_would_leak_into_validation_are_refused(labels: int) -> None:
    with pytest.raises(ValueError, match=rf"labels: expected 1 to 110 of each digit, got {labels}; the others are to"):
        example.draw_digits(labels, 0)


def test_what_is_chosen_stands_beside_the_same_seeds() -> None:
    line, found = points(1.5, 2, 5, lambda: None)
    chosen = line["chosen"]
    assert chosen["accuracy at alpha 0"] == percent(found[0.0][1::2])
    assert chosen["accuracy at alpha 1"] == percent(found[1.0][1::2])
    for alpha in (0, 1):
        apart = chosen["accuracy"][0] - chosen[f"accuracy at alpha {alpha}"][0]
        assert chosen[f"gain on alpha {alpha}"][0] == pytest.approx(apart, abs=2e-3)
    assert sum(line["fits"]["not stationary"]) == 0
    console = Console(width=240, record=True, file=io.StringIO())
    show_points([line], console)
    head, row = (text for text in console.export_text().splitlines() if text.startswith(("┃", "│")))
    assert all(cell.strip() for cell in head.strip("┃").split("┃")), "a column without a head"
    assert all(cell.strip() for cell in row.strip("│").split("│"))


def test_one_seed_has_no_error() -> None:
    assert gain([0.9], [0.8]) == [pytest.approx(10.0), None]


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
