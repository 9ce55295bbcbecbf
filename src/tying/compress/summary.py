"""What came of it: the small network, its measures, and all that the report page shows."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from tying.compress.fits import Fit
from tying.compress.search import Attempt, Search, Source, count
from tying.compress.task import name_of
from tying.enforce.compaction.compact import compact
from tying.find.discover import discover
from tying.groups import Groups
from tying.measure import Report, measure
from tying.penalties.norms import GrOWL
from tying.penalties.sequences import weights
from tying.plan import Member, Tie, TiePlan
from tying.report.data import Budget, Epoch, Layer, Point, ReportData, Stayed, measures, similarities
from tying.store import encode
from tying.version import __version__

Kind = Literal["max_drop", "ratio", "bytes"]


@dataclass(frozen=True)
class Asked:
    """The budget: its kind and its value."""

    kind: Kind
    value: float


@dataclass(frozen=True)
class CompressResult:
    """What `compress` hands back.

    Attributes:
        model: The small network, retrained, in evaluation mode.
        plan: Which weights of the dense architecture it ties and prunes.
        report: Its measures beside the dense network's.
        data: All that the report page shows; `tying.report` draws it.
        kept: Whether the budget was kept (`max_drop`: on the validation split).
    """

    model: nn.Module
    plan: TiePlan
    report: Report
    data: ReportData
    kept: bool

    def __str__(self) -> str:
        return str(self.report)

    def to_json(self) -> str:
        """Return all that the report page shows, as JSON."""
        return self.data.to_json()


def summarise(search: Search, attempt: Attempt | None, asked: Asked) -> CompressResult:
    """Train the controls, measure on the test split (once), and gather the figures.

    Args:
        search: With all its attempts.
        attempt: The one that was chosen; None: no network kept the budget, and the dense one is handed back.
        asked: The budget.
    """
    dense = search.dense
    chosen = attempt or _untied(search)
    controls = search.controls(chosen) if attempt else {}
    small = chosen.fit.model
    report = measure(
        small,
        like=dense.model,
        example_inputs=search.example,
        evaluate=lambda model: search.fits.accuracy(model, "test"),
    )
    # The file that `compress` writes also holds the plan: its bytes are what the budget is about.
    report = replace(report, model=replace(report.model, bytes=len(encode(small, plan=chosen.plan))))
    budget = _kept(asked, report, dense.accuracy - chosen.fit.accuracy)
    before, after = measures(report, validation=(dense.accuracy, chosen.fit.accuracy))
    data = ReportData(
        title=name_of(search.fits.task),
        dense=before,
        small=after,
        budget=budget,
        layers=tuple(_layer(tie, chosen.plan, chosen.source, search) for tie in chosen.plan if _is_weight(tie, search)),
        curve=_curve(search, chosen, controls),
        history=_history(search, chosen),
        stayed=_stayed(search),
        notes=_notes(chosen, attempt is None),
        provenance={
            "seed": str(search.fits.seed),
            "epochs of each fit": str(search.fits.epochs),
            "tying": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )
    return CompressResult(small.eval(), chosen.plan, report, data, budget.kept)


def _untied(search: Search) -> Attempt:
    source = Source("no penalty", search.dense, {})
    plan = discover(search.dense.model, search.targets, support=0.0)
    small = compact(search.dense.model, plan, search.example)
    fit = Fit(small, search.dense.accuracy, (), {})
    return Attempt(source, plan, fit)


def _kept(asked: Asked, report: Report, drop: float) -> Budget:
    if asked.kind == "max_drop":
        return Budget("max_drop", asked.value, drop, drop <= asked.value + 1e-12)
    if asked.kind == "ratio":
        got = report.parameters / report.model.parameters
        return Budget("ratio", asked.value, got, got >= asked.value)
    return Budget("bytes", asked.value, report.model.bytes, report.model.bytes <= asked.value)


def _is_weight(tie: Tie, search: Search) -> bool:
    return tie.members[0].parameter in search.targets


def _layer(tie: Tie, plan: TiePlan, source: Source, search: Search) -> Layer:
    member = tie.members[0]
    weight = _weight_as_read(tie, plan, source.fit.model)
    norms = member.groups.norms(weight).cpu()
    pruned = norms[torch.as_tensor(tie.partition.labels < 0)]
    penalty = source.penalties.get((member.parameter, member.groups))
    strength = 0.0 if penalty is None else penalty.strength
    similarity, labels = similarities(member.groups.read(weight).cpu().double().numpy(), tie.partition.labels)
    shape = tuple(search.example.shape[1:])
    pixels = len(shape) in (2, 3) and torch.Size(shape).numel() == len(norms) and member.groups.kind == "inputs"
    return Layer(
        name=member.parameter,
        groups=member.groups.kind,
        labels=tuple(tie.partition.labels.tolist()),
        grid=shape if pixels else None,
        norms=tuple(norms.tolist()),
        weights=tuple(weights(penalty.sequence, len(norms)) * strength) if isinstance(penalty, GrOWL) else (),
        threshold=float(pruned.max()) if len(pruned) else None,
        similarity=similarity,
        similarity_labels=labels,
        penalty="none" if penalty is None else f"{type(penalty).__name__}, strength {strength:.3g}",
    )


def _weight_as_read(tie: Tie, plan: TiePlan, model: nn.Module) -> Tensor:
    """Return the weight as `discover` read it: the inputs after what the outputs' tie pruned was set to zero."""
    member = tie.members[0]
    weight = model.get_parameter(member.parameter).detach()
    outputs = Member(member.parameter, Groups.outputs())
    for other in plan:
        if other.members == (outputs,) and member != outputs:
            weight = outputs.groups.write(other.partition.prune(outputs.groups.read(weight)), weight.shape)
    return weight


def _curve(search: Search, chosen: Attempt, controls: Mapping[str, Fit]) -> tuple[Point, ...]:
    ours = [a for a in search.attempts if a.source is chosen.source]
    others = [a for a in search.attempts if a.source is not chosen.source]
    points = [Point("dense", "dense", search.parameters, search.dense.accuracy)]
    points += [Point("tied and pruned", "ours", a.values, a.fit.accuracy) for a in ours]
    points += [Point(a.source.name, "control", a.values, a.fit.accuracy) for a in others]
    points += [Point(name, "control", count(fit.model), fit.accuracy) for name, fit in controls.items()]
    return tuple(points)


def _history(search: Search, chosen: Attempt) -> tuple[Epoch, ...]:
    stages = {"dense": search.dense, "stage one": chosen.source.fit, "stage two": chosen.fit}
    if not chosen.source.penalties:
        del stages["stage one"]
    return tuple(
        Epoch(stage, epoch, accuracy)
        for stage, fit in stages.items()
        for epoch, accuracy in enumerate(fit.history, start=1)
    )


def _stayed(search: Search) -> tuple[Stayed, ...]:
    reasons: dict[tuple[str, str], int] = {}
    for channel in search.channels:
        weights_of = [s.parameter for s in channel.makers if s.parameter in search.targets]
        if channel.blocked and weights_of:
            key = (weights_of[0], channel.blocked)
            reasons[key] = reasons.get(key, 0) + 1
    return tuple(Stayed(f"{count} outputs of {name}", reason) for (name, reason), count in reasons.items())


def _notes(chosen: Attempt, nothing: bool) -> tuple[str, ...]:
    notes = [
        "The validation split chose the strength and the size; the test split was looked at once, at the end. The "
        "accuracies in the two curves are on the validation split, one seed."
    ]
    if nothing:
        notes.append("No network that was tried kept the budget: the dense network is handed back as it is.")
    elif not chosen.source.penalties:
        notes.append(
            "The network that won was trained without a penalty: here the structure of stage one was not worth it."
        )
    return tuple(notes)
