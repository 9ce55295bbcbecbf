"""The gradient of a hard tie against the sum, or the mean, of the untied gradients: float64, in all ways to compute it.

A step of SGD at rate 1 shows the gradient with which each weight moves, however the tie is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ties.cases import Kind, Reference, Subject, plan_of, untied
from benchmarks.ties.computing import compiled
from tying.enforce.ties.expansion import Gradient
from tying.enforce.ties.tie import tie_
from tying.groups import Groups
from tying.plan import Member, Partition, Tie, TiePlan, qualified

Way = Callable[[Subject, Path], None]
Verb = Callable[..., None]
"""`tie_`, or what stands in for it."""


def _groups(first: str, second: str, groups: Groups, labels: list[int]) -> TiePlan:
    return TiePlan([Tie((Member(first, groups), Member(second, groups)), Partition(labels))])


CASES: dict[str, tuple[Kind, TiePlan]] = {
    "inside": ("inside", plan_of("inside")),
    "whole, layers": ("layers", plan_of("layers")),
    "whole, models": ("models", plan_of("models")),
    "transposed": ("transposed", plan_of("transposed")),
    "groups, layers": (
        "layers",
        _groups("encoder.weight", "decoder.weight", Groups.outputs(), [0, 1, 1, 2, 3, -1, 1, 0, 4, 4, 2, 3]),
    ),
    "groups, models": (
        "models",
        _groups("a.encoder.weight", "b.encoder.weight", Groups.inputs(), [0, 1, 2, 3, 3, 4, 3, 2, 5, 5, 0, -1]),
    ),
    "first units of a wider layer": (
        "models",
        TiePlan(
            [
                Tie(
                    (Member("a.enter.weight", Groups.outputs()), Member("b.enter.weight", Groups.outputs())),
                    Partition([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 6, 7]),
                )
            ]
        ),
    ),
}


def eager(subject: Subject, folder: Path) -> None:
    """Each model as it is."""


def compile_by(backend: str) -> Way:
    """Each model by `torch.compile`."""
    return lambda subject, folder: compiled(backend)(subject)


def rate_one(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


def expected_step(kind: Kind, plan: TiePlan, start: dict[str, Tensor], gradient: Gradient) -> dict[str, Tensor]:
    """The weights after the step: for every label, a loop over its groups."""
    gradients = Reference(kind, start).gradients()
    moved = {name: start[name] - g for name, g in gradients.items()}
    for tie in plan:
        read = {m: m.groups.read(gradients[m.parameter]) for m in tie.members}
        entries = [(m, i) for m in tie.members for i in range(len(read[m]))]
        labels = tie.partition.labels.tolist()
        for m in tie.members:
            total = torch.zeros_like(read[m])
            for at, (member, i) in enumerate(entries):
                alike = [e for e, label in zip(entries, labels, strict=True) if label == labels[at]]
                if member is m and labels[at] >= 0:
                    total[i] = torch.stack([read[each][j] for each, j in alike]).sum(dim=0)
                    total[i] /= len(alike) if gradient == "mean" else 1
            moved[m.parameter] = start[m.parameter] - m.groups.write(total, start[m.parameter].shape)
    return moved


def difference(
    case: str,
    gradient: Gradient = "sum",
    way: Way = eager,
    *,
    folder: Path = Path(),
    share: slice = slice(None),
    weights: Callable[[Subject], dict[str, Tensor]] = Subject.weights,
    verb: Verb = tie_,
) -> float:
    """Return the largest difference from the step that is written out, ÷ the largest gradient."""
    kind, plan = CASES[case]
    models = untied(kind)
    values = {qualified(k, n): p for k, m in models.items() for n, p in m.named_parameters()}
    with torch.no_grad():
        for name, value in plan.project(values).items():
            values[name].copy_(value)
    start = {name: p.detach().clone() for name, p in values.items()}
    subject = Subject(kind, "ours", models, make=rate_one, share=share)
    verb(subject.handed, plan, gradient=gradient)
    way(subject, folder)
    subject.step()
    after, expected = weights(subject), expected_step(kind, plan, start, gradient)
    largest = max(float((start[name] - value).abs().max()) for name, value in expected.items())
    return max(float((after[name] - value).abs().max()) for name, value in expected.items()) / largest


def table(ways: dict[str, Way], **more: Any) -> dict[str, dict[str, dict[str, float]]]:
    """Every case in every way, by case, way and "sum" or "mean"."""
    both: tuple[Gradient, Gradient] = ("sum", "mean")
    return {
        case: {name: {g: difference(case, g, way, **more) for g in both} for name, way in ways.items()}
        for case in CASES
    }
