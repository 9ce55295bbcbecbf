"""A supervised model tied to an unsupervised twin, so that points without labels teach it too.

1. The hybrid of Lasserre, Bishop & Minka (CVPR 2006). One model p(x, c), two sets of its parameters: θ predicts the
   class of the labelled points, p(c | x, θ); θ̃ explains all points, p(x | θ̃). A prior ties them,
   exp(−‖θ − θ̃‖² / 2σ²) with σ = (α / (1 − α))²: that is a soft tie of strength 1 / 2σ². α = 0 is the generative
   model (σ = 0, a hard tie), α = 1 the discriminative one (no tie). The model is wrong where classes are elongated: it
   takes them for round.
2. Handwritten digits, few of them with a label. The first layer of a classifier is tied to the encoder of an
   autoencoder, both learning at once; or to k-means, which stays as it was fitted.

As it stands: few seeds, in seconds on a CPU. `--seeds 20 --labels 2 5 20 --out FOLDER` does more and draws pictures;
`python -m benchmarks.hybrid`, from a checkout, is the full study.
"""

from __future__ import annotations

import argparse
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid, mse_loss

import tying
from tying import Groups

APART, UNLABELLED, VAGUE = 2.5, 200, 10.0
"""Distance of the means of the true classes; points of each class without a label; deviation of the prior of θ, θ̃."""
HIDDEN, STEPS, RECONSTRUCTION = 64, 200, 0.1
"""Hidden units; optimizer steps; the weight of an image's squared error, summed over its pixels."""
LEARNT, CHOOSING = 110, 134
"""Of each digit's images the first are to learn from, those up to here to choose a strength by, the rest to test."""
HARD = math.inf

# --- 1. The hybrid of Lasserre, Bishop & Minka -------------------------------------------------------------------


@dataclass(frozen=True)
class Points:
    """Two true classes in the plane, of deviation `elongation` across and 1 along the line between their means."""

    labelled: Tensor
    """(2n, 2), float64."""
    classes: Tensor
    """(2n,): 0 and 1, as many of each."""
    everything: Tensor
    """The labelled ones and 2 · 200 others, whose class nobody knows."""
    elongation: float


def draw_points(elongation: float, labels: int, seed: int) -> Points:
    """Draw a sample with `labels` labelled points of each class."""
    rng = np.random.default_rng(seed)
    classes = np.repeat([0, 1], labels + UNLABELLED)
    points = rng.standard_normal((len(classes), 2)) * [elongation, 1.0] + np.outer(classes - 0.5, [0.0, APART])
    known = np.tile(np.arange(labels + UNLABELLED) < labels, 2)
    x = torch.from_numpy(points)
    return Points(x[known], torch.from_numpy(classes[known]), x, elongation)


class RoundGaussians(nn.Module):
    """log p(x, c) of two classes as round Gaussians of one variance: points (n, 2) → (n, 2)."""

    def __init__(self, points: Points) -> None:
        super().__init__()
        means = torch.stack([points.labelled[points.classes == c].mean(dim=0) for c in (0, 1)])
        variance = (points.labelled - means[points.classes]).square().mean().clamp(min=0.05)
        self.means = nn.Parameter(means)
        self.log_variance = nn.Parameter(variance.log()[None])
        self.log_odds = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Return log p(x, c)."""
        prior = logsigmoid(torch.cat([-self.log_odds, self.log_odds]))
        distances = (x[:, None] - self.means).square().sum(dim=2)
        return prior - math.log(2 * math.pi) - self.log_variance - distances / (2 * self.log_variance.exp())


def strength_of(alpha: float) -> float:
    """Return 1 / 2σ² with σ = (α / (1 − α))²."""
    return math.inf if alpha == 0 else ((1 - alpha) / alpha) ** 4 / 2


def hybrid_loss(models: Mapping[str, nn.Module], points: Points) -> Tensor:
    """Return −Σ_labelled log p(c | x, θ) − Σ_all log p(x | θ̃) − the log of a vague prior on both; the tie comes on top.

    Without the vague prior few labels would be fitted by parameters without bound.
    """
    supervised = cross_entropy(models["discriminative"](points.labelled), points.classes, reduction="sum")
    unsupervised = -models["generative"](points.everything).logsumexp(dim=1).sum()
    vague = torch.stack([p.square().sum() for p in tying.unique_parameters(models)]).sum() / (2 * VAGUE**2)
    return supervised + unsupervised + vague


def fit_hybrid(points: Points, alphas: Sequence[float]) -> dict[float, RoundGaussians]:
    """Return for each α the model that predicts, p(c | x, θ).

    There are several minima: the lower is kept of the one found from the labelled points' own means and the one found
    from the generative model, α = 0.
    """
    start = RoundGaussians(points)
    generative = fit_from(start, points, 0)
    found = {0.0: generative[1]}
    for alpha in alphas:
        if alpha > 0:
            ends = fit_from(start, points, alpha), fit_from(generative[1], points, alpha)
            found[alpha] = min(ends, key=lambda end: end[0])[1]
    return {alpha: found[alpha] for alpha in alphas}


def fit_from(start: RoundGaussians, points: Points, alpha: float) -> tuple[float, RoundGaussians]:
    """Return the loss that L-BFGS ends at, and the model that predicts."""
    models = {"discriminative": RoundGaussians(points), "generative": RoundGaussians(points)}
    for model in models.values():
        model.load_state_dict(start.state_dict())
    plan = tying.match(models)  # by name and shape: all of them
    strength = strength_of(alpha)
    if strength == HARD:
        tying.tie_(models, plan)
        strength = 0.0
    soft = tying.SoftTie(plan, strength)
    optimizer = torch.optim.LBFGS(
        tying.unique_parameters(models), max_iter=300, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = hybrid_loss(models, points) + soft(models)
        value.backward()
        return value

    optimizer.step(cast("Any", loss))
    return loss().item(), models["discriminative"]


@torch.no_grad()
def accuracy_of(model: RoundGaussians, elongation: float) -> float:
    """Return the share of all points of the true classes that the model gets right; its border is a line."""
    first, second = model.means
    normal = (second - first) / model.log_variance.exp()
    return accuracy_of_line(normal, model.log_odds - normal @ (first + second) / 2, elongation)


def accuracy_of_line(normal: Tensor, offset: Tensor, elongation: float) -> float:
    """Return the share of all points right, exactly, where class 1 is said of x with normal · x + offset > 0."""
    spread = (normal * torch.tensor([elongation, 1.0], dtype=torch.float64)).norm()
    margin = (normal[1] * APART / 2 + torch.cat([offset, -offset])) / spread
    return torch.special.ndtr(margin).mean().item()


# --- 2. Digits -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digits:
    """Images (n, 64) in [0, 1] and their digits; `unlabelled` are all images to learn from, the labelled ones too."""

    labelled: tuple[Tensor, Tensor]
    unlabelled: Tensor
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@cache
def _images() -> tuple[Any, Any]:
    images, digits = cast("Any", load_digits)(return_X_y=True)
    return (images / 16).astype(np.float32), digits


def draw_digits(labels: int, seed: int) -> Digits:
    """Split scikit-learn's 1,797: of each digit 110 to learn from, `labels` of them labelled; 24 to choose; a rest."""
    if not 0 < labels <= LEARNT:
        raise ValueError(f"labels: expected 1 to {LEARNT} of each digit, got {labels}; the others are to test")
    images, digits = _images()
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(np.flatnonzero(digits == digit)) for digit in range(10)]

    def part(start: int, stop: int | None) -> tuple[Tensor, Tensor]:
        chosen = np.concatenate([own[start:stop] for own in shuffled])
        return torch.from_numpy(images[chosen]), torch.from_numpy(digits[chosen])

    return Digits(part(0, labels), part(0, LEARNT)[0], part(LEARNT, CHOOSING), part(CHOOSING, None))


def build(code: nn.Module, outputs: int) -> nn.Sequential:
    """Return a network of two layers; the parameters of the first are called encoder.weight and encoder.bias."""
    layers = {"encoder": nn.Linear(64, HIDDEN), "code": code, "head": nn.Linear(HIDDEN, outputs)}
    return nn.Sequential(OrderedDict(layers))


def learn(classifier: nn.Module, digits: Digits, rest: Callable[[], Tensor], parameters: list[nn.Parameter]) -> None:
    """Fit the labelled digits, and what else there is, with Adam on all images at once."""
    images, answers = digits.labelled
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (cross_entropy(classifier(images), answers) + rest()).backward()
        optimizer.step()
        schedule.step()


def with_autoencoder(digits: Digits, strength: float, seed: int) -> nn.Module:
    """Return a classifier whose first layer is tied to the encoder of an autoencoder that learns at the same time."""
    torch.manual_seed(seed)
    models = {"classifier": build(nn.ReLU(), 10), "autoencoder": build(nn.ReLU(), 64)}
    plan = tying.match(models)  # the first layers; the heads differ in shape
    if strength == HARD:
        tying.tie_(models, plan)
    soft = tying.SoftTie(plan, 0.0 if strength == HARD else strength)

    def rest() -> Tensor:
        error = mse_loss(models["autoencoder"](digits.unlabelled), digits.unlabelled) * digits.unlabelled.shape[1]
        return RECONSTRUCTION * error + soft(models)

    learn(models["classifier"], digits, rest, tying.unique_parameters(models))
    return models["classifier"]


class SoftAssignment(nn.Module):
    """How much an image belongs to each centre: softmax of the encoder's outputs ÷ temperature."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        """Return shares that sum to 1."""
        return torch.softmax(x / self.temperature, dim=1)


def kmeans_encoder(images: Tensor, seed: int) -> tuple[dict[str, Tensor], float]:
    """Return k-means as the weights of a linear encoder, and the temperature of its code.

    With w_k = centre c_k and b_k = −½‖c_k‖², w_k · x + b_k = ½‖x‖² − ½‖x − c_k‖²: the largest output is that of the
    nearest centre. The one-hot code of k-means is the softmax at temperature 0; at t it is soft,
    exp(−‖x − c_k‖² / 2t) ÷ their sum, and gradients pass. t is a third of the mean ‖x − nearest c_k‖².
    """
    found = KMeans(HIDDEN, n_init=2, random_state=seed).fit(images.numpy())
    centres = torch.from_numpy(found.cluster_centers_).to(images)
    weights = {"encoder.weight": centres, "encoder.bias": -centres.square().sum(dim=1) / 2}
    return weights, float(found.inertia_) / len(images) / 3


def with_kmeans(digits: Digits, strength: float, seed: int) -> nn.Module:
    """Return a classifier whose first layer starts as k-means of all images, and is tied to it: a fixed anchor."""
    anchor, temperature = kmeans_encoder(digits.unlabelled, seed)
    torch.manual_seed(seed)
    classifier = build(SoftAssignment(temperature), 10)
    classifier.load_state_dict(anchor, strict=False)
    alone = {(name, Groups.whole()): [0] for name in anchor}
    soft = tying.SoftTie(tying.declare(classifier, labels=alone), 0.0 if strength == HARD else strength, to=anchor)
    if strength == HARD:
        classifier.get_submodule("encoder").requires_grad_(False)
    learn(classifier, digits, lambda: soft(classifier), [p for p in classifier.parameters() if p.requires_grad])
    return classifier


@torch.no_grad()
def share_right(classifier: nn.Module, images: Tensor, answers: Tensor) -> float:
    """Return the accuracy."""
    return (classifier(images).argmax(dim=1) == answers).double().mean().item()


# --- Tables and pictures -------------------------------------------------------------------------------------------

Curves = Mapping[str, Mapping[float, Sequence[float]]]
"""Title of a curve → α or strength → accuracy with each seed; seed by seed, the samples are the same."""


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and its standard error; a single value has none."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(
        values
    ) > 1 else math.nan


def show(title: str, curves: Curves) -> None:
    """Print the accuracies in percent; below them the gain on the last α, or on strength 0, with its standard error."""
    knobs = list(next(iter(curves.values())))
    base = knobs[-1] if knobs[-1] == 1 else knobs[0]
    print(f"\n{title:<30}" + "".join(f"{_tick(knob):>13}" for knob in knobs))
    for name, curve in curves.items():
        print(f"{name:<30}" + "".join(f"{mean_and_error(curve[knob])[0]:13.1%}" for knob in knobs))
        gains = [mean_and_error([100 * (a - b) for a, b in zip(curve[k], curve[base], strict=True)]) for k in knobs]
        cells = [
            "–" if k == base else f"{gain:+.1f} ± {error:.1f}".replace("nan", "–")
            for k, (gain, error) in zip(knobs, gains, strict=True)
        ]
        print(f"{'  against ' + _tick(base):<30}" + "".join(f"{cell:>13}" for cell in cells))


def _tick(knob: float) -> str:
    return "hard" if knob == HARD else f"{knob:g}"


def picture(
    panels: Mapping[str, Curves],
    knob: str,
    path: Path,
    levels: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> None:
    """Draw a panel per title, a curve per name with the standard errors of the means, and levels that have no knob."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    colours = ("#0067a8", "#c44f00", "#007a5a", "#96458a")
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"axes.spines.right": False, "axes.spines.top": False, "font.size": 9}):
        figure = Figure(figsize=(max(2.6 * len(panels), 9), 3.4), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, curves) in zip(axes, panels.items(), strict=True):
            knobs = list(next(iter(curves.values())))
            places = dict(zip(knobs, knobs if knob == "α" else range(len(knobs)), strict=True))
            for (name, curve), colour in zip(curves.items(), colours, strict=False):
                means, errors = zip(
                    *(mean_and_error([100 * v for v in values]) for values in curve.values()), strict=True
                )
                x = [places[k] for k in curve]
                axis.errorbar(x, means, errors, label=name, color=colour, marker=".", capsize=2, linewidth=1.4)
            for name, values in (levels or {}).get(title, {}).items():
                axis.axhline(100 * float(np.mean(values)), label=name, color="#5a6675", linewidth=1, linestyle="--")
            if knob != "α":
                axis.set_xticks(list(places.values()), [_tick(k) for k in places], rotation=45)
            axis.set(title=title, xlabel=knob)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("test accuracy, %")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
        figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="of the digits; four times as many of the points")
    parser.add_argument("--labels", type=int, nargs="+", default=[5], help="of each class of the points")
    parser.add_argument("--digits", type=int, nargs="+", default=[10], help="labels of each digit, at most 110")
    parser.add_argument("--out", type=Path, help="a folder for the pictures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    drawn = {labels: [draw_digits(labels, seed) for seed in range(options.seeds)] for labels in options.digits}

    toy: dict[str, Curves] = {}
    for elongation, words in (1.0, "the model is right"), (1.5, "a little wrong"), (3.0, "very wrong"):
        curves: dict[str, dict[float, list[float]]] = {}
        for labels in options.labels:
            curve = curves[f"{labels} labels per class"] = {alpha: [] for alpha in (0, 0.4, 0.7, 1)}
            for seed in range(4 * options.seeds):
                for alpha, model in fit_hybrid(draw_points(elongation, labels, seed), list(curve)).items():
                    curve[alpha].append(accuracy_of(model, elongation))
        toy[f"elongation {elongation:g}: {words}"] = curves
        show(f"elongation {elongation:g}, α =", curves)

    ways = {"autoencoder": with_autoencoder, "k-means": with_kmeans}
    panels: dict[str, Curves] = {}
    for labels, samples in drawn.items():
        curves = {
            name: {
                strength: [share_right(way(s, strength, seed), *s.test) for seed, s in enumerate(samples)]
                for strength in (0, 1e-3, 0.1, HARD)
            }
            for name, way in ways.items()
        }
        panels[f"{labels} labels per digit"] = curves
        show(f"{labels} labels per digit, strength =", curves)
    if options.out:
        picture(toy, "α", options.out / "hybrid_points.png")
        picture(panels, "strength", options.out / "hybrid_digits.png")
        print(f"\nwrote {options.out / 'hybrid_points.png'} and {options.out / 'hybrid_digits.png'}")


if __name__ == "__main__":
    main()
