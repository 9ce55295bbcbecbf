"""The hybrid of examples/hybrid.py for hundreds of samples at once, by Newton's method in closed form.

Parameters `(S, 6)` of S samples: two means of two coordinates, log variance, log odds. From each start every sample
goes downhill to a stationary point that is verified. There are several: the starts are the labelled points' own means
and the solution at α = 0, as in the example, and those at the α below and above; the lowest objective is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from examples.hybrid import VAGUE, Points, RoundGaussians, accuracy_of, accuracy_of_line, strength_of
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

SIZE = 6
TOLERANCE = 1e-6
"""Of the gradient's largest entry, where sums run over hundreds of points."""
Derivatives = tuple[Tensor, Tensor, Tensor]
"""Value `(S,)`, gradient `(S, p)`, Hessian `(S, p, p)`."""


@dataclass(frozen=True)
class Samples:
    """As many samples of points, stacked."""

    labelled: Tensor
    classes: Tensor
    """`(S, n, 2)`, one-hot."""
    everything: Tensor
    start: Tensor

    @staticmethod
    def of(samples: Sequence[Points]) -> Samples:
        """Stack samples of one size."""
        start = [torch.cat([p.flatten() for p in RoundGaussians(s).parameters()]) for s in samples]
        return Samples(
            torch.stack([s.labelled for s in samples]),
            torch.stack([one_hot(s.classes, 2).double() for s in samples]),
            torch.stack([s.everything for s in samples]),
            torch.stack(start).detach(),
        )

    def __getitem__(self, chosen: Tensor) -> Samples:
        return Samples(self.labelled[chosen], self.classes[chosen], self.everything[chosen], self.start[chosen])


@dataclass
class Best:
    """The lowest of the stationary points found so far, for each sample."""

    z: Tensor
    """θ and θ̃ side by side, `(S, 12)`."""
    value: Tensor
    slope: Tensor
    """The largest entry of the objective's gradient, `(S,)`."""
    first: Tensor
    """Objective of what is found from the labelled points' own means."""
    highest: Tensor
    """Objective of the worst that any start leads to."""

    def lower(self, z: Tensor, value: Tensor, slope: Tensor) -> None:
        """Keep what is lower."""
        better = value < self.value
        self.z = torch.where(better[:, None], z, self.z)
        self.value, self.slope = torch.where(better, value, self.value), torch.where(better, slope, self.slope)
        self.highest = torch.maximum(self.highest, value)

    def disagree(self) -> int:
        """Return for how many samples one start leads higher than another."""
        return int((self.highest - self.value > 1e-7 * self.value.abs()).sum())

    def first_is_not_best(self) -> int:
        """Return for how many samples the labelled points' own means lead higher than another start."""
        return int((self.first - self.value > 1e-7 * self.value.abs()).sum())


def fit_all(samples: Samples, alphas: Sequence[float]) -> dict[float, Best]:
    """Return the lowest stationary points at every α, of which 0 is the first and the others rise."""
    found: dict[float, Best] = {}
    for alpha in alphas:
        z, value, slope = fit(samples, alpha, samples.start.repeat(1, 2))
        found[alpha] = Best(z, value, slope, value, value)
    for up, order in (True, list(alphas)), (False, list(alphas)[::-1]):
        for alpha, beside in zip(order[1:], order[:-1], strict=True):
            starts = {beside, 0.0} if up else {beside}
            for start in sorted(starts):
                found[alpha].lower(*fit(samples, alpha, found[start].z))
    return found


def fit(samples: Samples, alpha: float, start: Tensor, *, steps: int = 300) -> Derivatives:
    """Go downhill from θ and θ̃ side by side, `(S, 12)`; at α = 0 from their middle.

    Return θ and θ̃, the objective, and the largest entry of its gradient, `(S,)`.
    """
    together = alpha == 0
    z = (start[:, :SIZE] + start[:, SIZE:]) / 2 if together else start.clone()
    height, slope = torch.full((2, len(z)), math.inf, dtype=z.dtype)
    live = torch.arange(len(z))
    for _ in range(steps):
        value, gradient, hessian = objective(samples[live], z[live], alpha)
        height[live], slope[live] = value, gradient.abs().amax(dim=1)
        rest = slope[live] > TOLERANCE
        if not rest.any():
            break
        live = live[rest]
        z[live] = _step(samples[live], z[live], alpha, value[rest], gradient[rest], hessian[rest])
    return (z.repeat(1, 2) if together else z), height, slope


def _step(samples: Samples, z: Tensor, alpha: float, value: Tensor, gradient: Tensor, hessian: Tensor) -> Tensor:
    """Take Newton's step with the curvatures made positive, of length 2 at most, halved until it leads downhill."""
    curvatures, axes = torch.linalg.eigh(hessian)
    along = (axes.mT @ gradient[:, :, None])[:, :, 0] / curvatures.abs().clamp(min=1e-6)
    direction = -(axes @ along[:, :, None])[:, :, 0]
    direction *= (2 / direction.norm(dim=1, keepdim=True)).clamp(max=1)
    fall = (gradient * direction).sum(dim=1)
    length = torch.ones_like(value)
    for _ in range(40):
        new = objective(samples, z + length[:, None] * direction, alpha, derivatives=False)[0]
        short = new > value + 1e-4 * length * fall + 1e-13 * value.abs()  # no better than rounding
        if not short.any():
            break
        length = torch.where(short, length / 2, length)
    return z + length[:, None] * direction


def objective(samples: Samples, z: Tensor, alpha: float, *, derivatives: bool = True) -> Derivatives:
    """Return the example's `hybrid_loss` plus the tie, and its derivatives; at α = 0 of θ = θ̃, `z (S, 6)`."""
    together = z.shape[1] == SIZE
    theta, tilde = (z, z) if together else (z[:, :SIZE], z[:, SIZE:])
    everything = _log_sum(tilde, samples.everything, derivatives)
    among = _log_sum(theta, samples.labelled, derivatives)
    right = _weighted(theta, samples.labelled, samples.classes, derivatives)
    parts = [[b - c for b, c in zip(among, right, strict=True)], [-a for a in everything]]
    if together:
        value, gradient, hessian = (a + b for a, b in zip(*parts, strict=True))
    else:
        value = parts[0][0] + parts[1][0]
        gradient = torch.cat([part[1] for part in parts], dim=1)
        hessian = torch.zeros(*z.shape, z.shape[1], dtype=z.dtype)
        hessian[:, :SIZE, :SIZE], hessian[:, SIZE:, SIZE:] = (part[2] for part in parts)
        strength, apart = strength_of(alpha), theta - tilde
        value = value + strength * apart.square().sum(dim=1)
        gradient = gradient + 2 * strength * torch.cat([apart, -apart], dim=1)
        tie = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=z.dtype)
        hessian = hessian + 2 * strength * torch.kron(tie, torch.eye(SIZE, dtype=z.dtype))
    identity = torch.eye(z.shape[1], dtype=z.dtype)
    return (
        value + z.square().sum(dim=1) / (2 * VAGUE**2),
        gradient + z / VAGUE**2,
        hessian + identity / VAGUE**2,
    )


def _log_joint(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p(x, c) `(S, N, 2)`, x − mean_c `(S, N, 2, 2)` and its squared length."""
    apart = x[:, :, None] - t[:, None, :4].view(-1, 1, 2, 2)
    squares = apart.square().sum(dim=3)
    prior = logsigmoid(torch.stack([-t[:, 5], t[:, 5]], dim=1))
    constant = prior - math.log(2 * math.pi) - t[:, 4:5]
    return constant[:, None] - squares / (2 * t[:, 4].exp())[:, None, None], apart, squares


def _weighted(t: Tensor, x: Tensor, weights: Tensor, derivatives: bool) -> Derivatives:
    """Return Σ_n Σ_c weight · log p(x, c) and its derivatives, the weights `(S, N, 2)` held."""
    joint, apart, squares = _log_joint(t, x)
    value = (weights * joint).sum(dim=(1, 2))
    if not derivatives:
        return value, torch.zeros_like(t), torch.zeros(*t.shape, SIZE, dtype=t.dtype)
    precision, odds = (-t[:, 4]).exp(), t[:, 5]
    counts = weights.sum(dim=1)
    pulls = precision[:, None, None] * (weights[..., None] * apart).sum(dim=1)
    energy = precision * (weights * squares).sum(dim=(1, 2)) / 2
    total = counts.sum(dim=1)
    gradient = torch.cat(
        [pulls.flatten(1), (energy - total)[:, None], (counts[:, 1] - total * odds.sigmoid())[:, None]], dim=1
    )
    hessian = torch.zeros(*t.shape, SIZE, dtype=t.dtype)
    hessian[:, range(4), range(4)] = -(precision[:, None] * counts).repeat_interleave(2, dim=1)
    hessian[:, :4, 4] = hessian[:, 4, :4] = -pulls.flatten(1)
    hessian[:, 4, 4] = -energy
    hessian[:, 5, 5] = -total * odds.sigmoid() * (-odds).sigmoid()
    return value, gradient, hessian


def _log_sum(t: Tensor, x: Tensor, derivatives: bool) -> Derivatives:
    """Return Σ_n log Σ_c p(x, c) and its derivatives."""
    joint, apart, squares = _log_joint(t, x)
    value = joint.logsumexp(dim=2).sum(dim=1)
    if not derivatives:
        return value, torch.zeros_like(t), torch.zeros(*t.shape, SIZE, dtype=t.dtype)
    shares = joint.softmax(dim=2)
    _, gradient, hessian = _weighted(t, x, shares, derivatives)
    precision = (-t[:, 4]).exp()[:, None]
    sign = torch.tensor([-1.0, 1.0], dtype=t.dtype)
    pulls = (precision[..., None, None] * sign[:, None] * apart).flatten(2)  # of the second class less the first's
    energy = precision * (squares[..., 1] - squares[..., 0]) / 2
    difference = torch.cat([pulls, energy[..., None], torch.ones_like(energy)[..., None]], dim=2)
    spread = (shares[..., 0] * shares[..., 1])[..., None] * difference
    return value, gradient, hessian + spread.mT @ difference


def accuracies(theta: Tensor, samples: Sequence[Points]) -> list[float]:
    """Return the exact accuracy of each sample's model."""
    return [accuracy_of(put(own, points), points.elongation) for own, points in zip(theta, samples, strict=True)]


@torch.no_grad()
def put(theta: Tensor, points: Points) -> RoundGaussians:
    """Return the example's model with these parameters."""
    model = RoundGaussians(points)
    torch.nn.utils.vector_to_parameters(theta[:SIZE], model.parameters())
    return model


PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
"""`C` of the logistic regression."""


def logistic_regression(points: Points, penalty: float) -> float:
    """Return the exact accuracy of the control that only shrinks: the labelled points, and nothing of the others."""
    model: Any = LogisticRegression(C=penalty, max_iter=1_000).fit(points.labelled.numpy(), points.classes.numpy())
    return accuracy_of_line(torch.from_numpy(model.coef_[0]), torch.from_numpy(model.intercept_), points.elongation)
