"""The digits of examples/hybrid.py with all strengths at once, and what they are compared with.

Weights of L networks are stacked, `(L, ...)`: one per strength, all from the same start. Adam works number by number,
so each learns as it would alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from examples import hybrid
from examples.hybrid import HARD, RECONSTRUCTION, STEPS, Digits, build, kmeans_encoder
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

Weights = dict[str, Tensor]
Code = Callable[[Tensor], Tensor]
Score = tuple[float, float]
"""Accuracy on the validation and on the test split."""
ENCODER = ("encoder.weight", "encoder.bias")
PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
"""`C` of logistic regressions, chosen on validation."""


def outputs(weights: Weights, code: Code, images: Tensor) -> Tensor:
    """Return what L networks make of images: `(n, 64)` → `(L, n, outputs)`."""
    first, bias = (weights[name] for name in ENCODER)
    flat = (images @ first.flatten(0, 1).T).unflatten(1, first.shape[:2]).movedim(1, 0)
    return torch.baddbmm(weights["head.bias"][:, None], code(flat + bias[:, None]), weights["head.weight"].mT)


def learn(
    digits: Digits,
    strengths: list[float],
    classifier: Weights,
    code: Code,
    *,
    autoencoder: Weights | None = None,
    anchor: Mapping[str, Tensor] | None = None,
) -> None:
    """Fit in place: the classifiers, tied to their autoencoders or to an anchor; at infinity hard, or not at all."""
    hard = torch.tensor([s == HARD for s in strengths])
    finite = torch.tensor([0.0 if s == HARD else s for s in strengths])
    others = autoencoder if autoencoder is not None else anchor
    assert others is not None
    with torch.no_grad():
        for name in ENCODER:  # where the hard tie starts
            middle = (classifier[name] + others[name]) / 2 if autoencoder else others[name].expand_as(classifier[name])
            for weights in (classifier, autoencoder) if autoencoder else (classifier,):
                weights[name].copy_(torch.where(_over(hard, middle), middle, weights[name]))
    parameters = [*classifier.values(), *(autoencoder or {}).values()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    images, answers = digits.labelled
    for _ in range(STEPS):
        logits = outputs(classifier, code, images)
        loss = cross_entropy(logits.flatten(0, 1), answers.repeat(len(logits)), reduction="sum") / len(answers)
        if autoencoder:
            targets = digits.unlabelled.expand(len(strengths), -1, -1)
            error = mse_loss(outputs(autoencoder, code, digits.unlabelled), targets, reduction="sum")
            loss = loss + RECONSTRUCTION * error / len(digits.unlabelled)
        for name in ENCODER:
            apart = (classifier[name] - others[name]).square().flatten(1).sum(dim=1)
            loss = loss + (finite * apart).sum()
        optimizer.zero_grad()
        loss.backward()
        for name in ENCODER:
            _keep_hard(hard, classifier[name], autoencoder[name] if autoencoder else None)
        optimizer.step()
        schedule.step()


def _over(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (like.dim() - 1))


def _keep_hard(hard: Tensor, own: Tensor, other: Tensor | None) -> None:
    """Add up the gradients of what is tied hard, or leave out what stays at its anchor."""
    assert own.grad is not None
    if other is None:
        own.grad.masked_fill_(_over(hard, own), 0.0)
    else:
        assert other.grad is not None
        both = own.grad + other.grad
        own.grad, other.grad = (torch.where(_over(hard, own), both, g) for g in (own.grad, other.grad))


def stacked(model: nn.Module, count: int) -> Weights:
    """Return a model's weights, as many times."""
    return {name: value.detach().repeat(count, *[1] * value.dim()) for name, value in model.named_parameters()}


def with_autoencoder(digits: Digits, strengths: list[float], seed: int) -> tuple[list[Score], Weights, Weights]:
    """Return the scores of the example's `with_autoencoder`; the autoencoders' weights; where classifiers start."""
    torch.manual_seed(seed)
    start = stacked(build(nn.ReLU(), 10), len(strengths))
    classifier = {name: value.clone() for name, value in start.items()}
    autoencoder = stacked(build(nn.ReLU(), 64), len(strengths))
    learn(digits, strengths, classifier, torch.relu, autoencoder=autoencoder)
    return scores(digits, classifier, torch.relu), autoencoder, start


def with_anchor(
    digits: Digits, strengths: list[float], anchor: Mapping[str, Tensor], t: float, seed: int
) -> list[Score]:
    """Return the scores of the example's `with_kmeans`, of any centres."""
    torch.manual_seed(seed)
    classifier = stacked(build(nn.Identity(), 10), len(strengths))
    for name in ENCODER:
        classifier[name].copy_(anchor[name].expand_as(classifier[name]))
    code = soft_assignment(t)
    learn(digits, strengths, classifier, code, anchor=anchor)
    return scores(digits, classifier, code)


def soft_assignment(temperature: float) -> Code:
    return lambda x: torch.softmax(x / temperature, dim=-1)


@torch.no_grad()
def scores(digits: Digits, classifier: Weights, code: Code) -> list[Score]:
    """Return the accuracies of each network."""
    found = [
        (outputs(classifier, code, x).argmax(dim=2) == y).double().mean(dim=1).tolist()
        for x, y in (digits.validation, digits.test)
    ]
    return list(zip(*found, strict=True))


def read_out(digits: Digits, encode: Callable[[Tensor], Tensor]) -> Score:
    """Return the score of a logistic regression on a code, its penalty chosen on validation."""
    x, y = encode(digits.labelled[0]).numpy(), digits.labelled[1].numpy()
    splits = [(encode(images).numpy(), answers.numpy()) for images, answers in (digits.validation, digits.test)]
    scale = x.std() + 1e-12
    found = []
    for penalty in PENALTIES:
        model: Any = LogisticRegression(C=penalty, max_iter=5_000).fit(x / scale, y)
        found.append(tuple(float(np.mean(model.predict(a / scale) == b)) for a, b in splits))
    return max(found, key=lambda score: score[0])


def run(labels: int, seed: int, strengths: list[float], decays: list[float]) -> Iterator[tuple[str, dict[str, Score]]]:
    """Yield name → strength, or "" for what has none → score; everything on one sample."""
    digits = hybrid.draw_digits(labels, seed)

    def by_strength(found: list[Score], knobs: list[float]) -> dict[str, Score]:
        return {label(knob): score for knob, score in zip(knobs, found, strict=True)}

    found, autoencoder, start = with_autoencoder(digits, strengths, seed)
    yield "autoencoder", by_strength(found, strengths)
    weight, bias = (autoencoder[name][strengths.index(0.0)].detach() for name in ENCODER)
    yield "autoencoder alone, read-out", {"": read_out(digits, lambda x: torch.relu(x @ weight.T + bias))}
    decayed = {name: value[:1].repeat(len(decays), *[1] * (value.dim() - 1)) for name, value in start.items()}
    learn(digits, decays, decayed, torch.relu, anchor={name: torch.zeros(()) for name in ENCODER})
    yield "weight decay", by_strength(scores(digits, decayed, torch.relu), decays)
    anchor, t = kmeans_encoder(digits.unlabelled, seed)
    yield "k-means", by_strength(with_anchor(digits, strengths, anchor, t, seed), strengths)
    code = soft_assignment(t)
    yield "k-means, read-out", {"": read_out(digits, lambda x: code(x @ anchor[ENCODER[0]].T + anchor[ENCODER[1]]))}
    own, _ = kmeans_encoder(digits.labelled[0], seed)  # a temperature of so few would be near zero: it gets the other
    yield "k-means of the labelled only", by_strength(with_anchor(digits, strengths, own, t, seed), strengths)
    yield "pixels, logistic regression", {"": read_out(digits, lambda x: x)}


def label(strength: float) -> str:
    return "hard" if strength == math.inf else f"{strength:g}"
