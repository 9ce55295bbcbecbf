"""Which strength, and how far to tie: every choice is made on the validation split."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor, nn

from tying.channels.find import Channels
from tying.compress.fits import Fit, Fits, Rules
from tying.compress.targets import Size, Targets, compacted_size
from tying.enforce.compact import compact
from tying.errors import CompactError, PlanError
from tying.find.budget import least
from tying.find.discover import discover
from tying.groups import Groups
from tying.penalties.norms import GroupLasso, GrOWL, Penalty
from tying.penalties.sequences import Ramp
from tying.plan import TiePlan
from tying.store import encode

STRENGTHS = (0.5, 1.0, 2.0)
"""How often the prox alone would take away a layer's median group norm over the whole of stage one."""
RAMP = Ramp(3.0)
PROBE = 16.0
STEP = math.sqrt(2)
LARGEST = 4096.0


@dataclass(frozen=True)
class Source:
    """A trained network to discover plans in: after stage one at some strength, or the dense one (strength 0)."""

    name: str
    fit: Fit
    penalties: Rules


@dataclass(frozen=True)
class Attempt:
    """A plan of some source, and the network after stage two."""

    source: Source
    plan: TiePlan
    fit: Fit
    size: Size


class Search:
    """Sources, attempts and controls of one task and seed; each is trained when it is first asked for."""

    def __init__(self, fits: Fits, channels: Channels, targets: Targets, example: Tensor) -> None:
        self.fits, self.channels, self.targets, self.example = fits, channels, targets, example
        self.attempts: list[Attempt] = []

    @cached_property
    def dense(self) -> Fit:
        """The network as the task trains it."""
        return self.fits.fit("dense", self.fits.initial(), stage="dense")

    @cached_property
    def parameters(self) -> int:
        """The numbers in the dense network's parameters."""
        return sum(p.numel() for p in self.dense.model.parameters())

    @cached_property
    def sources(self) -> list[Source]:
        """The dense network, and one network per strength."""
        return [Source("no penalty", self.dense, {}), *map(self._stage_one, STRENGTHS)]

    def to_ratio(self, ratio: float) -> Attempt:
        """Return the best network with at most 1 ÷ ratio of the dense network's parameters."""
        return self._best(self._each(self.sources, lambda source: self._attempt(source, ratio)))

    def to_bytes(self, most: int) -> Attempt:
        """Return the best network whose file has at most this many bytes."""
        return self._best(self._each(self.sources, lambda source: self._attempt_bytes(source, most)))

    def to_drop(self, max_drop: float) -> Attempt | None:
        """Return the smallest network within `max_drop` of the dense one; None if every attempt lost more.

        One strength is chosen at a middling size, then sizes grow or shrink by √2. Single accuracies are noisy and the
        smallest lucky one would be chosen: accuracy can only fall with the ratio, so a size counts as good enough only
        if the isotonic fit through all attempts says so too.
        """
        target = self.dense.accuracy - max_drop
        source = self.to_ratio(PROBE).source
        tried = {PROBE: next(a for a in self.attempts if a.source is source)}
        self._shrink(source, tried, target)
        ratio = PROBE
        while not _good_enough(tried, target) and (ratio := ratio / STEP) > 1.1:
            tried[ratio] = self._attempt(source, ratio)
        good = _good_enough(tried, target)
        return tried[max(good)] if good else None

    def controls(self, attempt: Attempt) -> dict[str, Fit]:
        """Train what the result must be held against, at its size: no penalty, pruned only, a narrow dense network."""
        ratio = self.parameters / attempt.size.values
        found = {}
        if attempt.source.penalties:
            found["no penalty"] = self._attempt(self.sources[0], ratio, keep=False).fit
        kept: dict[str | tuple[str, Groups], int | None] = {
            (t.members[0].parameter, t.members[0].groups): t.partition.classes for t in attempt.plan
        }
        pruned = discover(attempt.source.fit.model, self.targets, keep=kept)
        small = compact(attempt.source.fit.model, pruned, self.example)
        found["pruned only"] = self.fits.fit(f"pruned only {attempt.source.name}", small, stage="two")
        narrow = self._narrow(attempt.size.values)
        if narrow is not None:
            found["narrow dense"] = self.fits.fit("narrow dense", narrow, stage="dense")
        return found

    def _stage_one(self, strength: float) -> Source:
        name = f"strength {strength:g}"
        penalties: dict[str | tuple[str, Groups], Penalty] = {
            (parameter, groups): self._penalty(parameter, groups, strength)
            for parameter, kinds in self.targets.items()
            for groups in kinds
        }
        fit = self.fits.fit(f"stage one, {name}", self.fits.initial(), stage="one", rules=penalties)
        return Source(name, fit, penalties)

    def _penalty(self, parameter: str, groups: Groups, strength: float) -> Penalty:
        norms = groups.norms(self.dense.model.get_parameter(parameter))
        scale = strength * float(norms.median()) / self.dense.distance[parameter]
        if groups == Groups.inputs():
            return GrOWL(scale / float(RAMP(len(norms)).mean()), RAMP)
        return GroupLasso(scale)

    def _shrink(self, source: Source, tried: dict[float, Attempt], target: float) -> None:
        """Try smaller and smaller networks until two in a row lost too much, or nothing smaller can be made."""
        ratio, failures = PROBE, 0
        while failures < 2 and (ratio := ratio * STEP) <= LARGEST:
            try:
                tried[ratio] = self._attempt(source, ratio)
            except (PlanError, CompactError):
                return
            failures = 0 if tried[ratio].fit.accuracy >= target else failures + 1

    def _each(self, sources: list[Source], attempt: Callable[[Source], Attempt]) -> list[Attempt]:
        """Attempt it with every source; one that can't be made that small is left out, unless none can."""
        found: list[Attempt] = []
        refused: list[PlanError | CompactError] = []
        for source in sources:
            try:
                found.append(attempt(source))
            except (PlanError, CompactError) as error:  # noqa: PERF203
                refused.append(error)
        if not found:
            raise refused[-1]
        return found

    def _attempt(self, source: Source, ratio: float, *, keep: bool = True) -> Attempt:
        plan = self._plan(source, lambda size: size.values * ratio <= self.parameters, f"ratio={ratio:g}")
        return self._retrain(source, plan, self._compact(source, plan), f"{ratio:.3g}x", keep=keep)

    def _attempt_bytes(self, source: Source, most: int) -> Attempt:
        width = next(self.dense.model.parameters()).element_size()
        room, excess = most, 0
        for _ in range(4):
            plan = self._plan(source, _within(room, width), f"bytes={most}")
            small = self._compact(source, plan)
            excess = len(encode(small, plan=plan)) - most
            if excess <= 0:
                return self._retrain(source, plan, small, f"{most} bytes")
            room -= excess
        raise PlanError(f"bytes={most}: expected a file that small, got one {excess} bytes larger; ask for more bytes")

    def _plan(self, source: Source, fits: Callable[[Size], bool], budget: str) -> TiePlan:
        model = source.fit.model
        return least(
            lambda share: discover(model, self.targets, distortion=share),
            lambda plan: fits(compacted_size(plan, model, self.channels)),
            budget,
        )

    def _compact(self, source: Source, plan: TiePlan) -> nn.Module:
        return compact(source.fit.model, plan, self.example)

    def _retrain(self, source: Source, plan: TiePlan, small: nn.Module, size: str, *, keep: bool = True) -> Attempt:
        fit = self.fits.fit(f"stage two, {source.name}, {size}", small, stage="two")
        attempt = Attempt(source, plan, fit, compacted_size(plan, source.fit.model, self.channels))
        if keep:
            self.attempts.append(attempt)
        return attempt

    def _best(self, attempts: list[Attempt]) -> Attempt:
        """Return the most accurate; of equals the last, whose penalty is the strongest and structure the clearest."""
        return max(enumerate(attempts), key=lambda indexed: (indexed[1].fit.accuracy, indexed[0]))[1]

    def _narrow(self, values: int) -> nn.Module | None:
        """Return an untrained network of plain layers, as large as the result, or None if units can't go."""
        outputs = {name: (Groups.outputs(),) for name, kinds in self.targets.items() if Groups.outputs() in kinds}
        if not outputs:
            return None
        model = self.fits.initial()
        try:
            plan = least(
                lambda share: discover(model, outputs, distortion=share, support=0.0),
                lambda plan: compacted_size(plan, model, self.channels).values <= values,
                f"values={values}",
            )
        except PlanError:
            return None
        return compact(model, plan, self.example)


def _within(room: int, width: int) -> Callable[[Size], bool]:
    return lambda size: size.values * width + size.label_bytes <= room


def _good_enough(tried: Mapping[float, Attempt], target: float) -> list[float]:
    from scipy.optimize import isotonic_regression

    ratios = sorted(tried)
    accuracies = np.array([tried[ratio].fit.accuracy for ratio in ratios])
    smooth = isotonic_regression(accuracies, increasing=False).x
    return [r for r, raw, fitted in zip(ratios, accuracies, smooth, strict=True) if min(raw, fitted) >= target]
