"""Which strength, and how far to tie: every choice is made on the validation split."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor, nn

from tying.channels.find import Channels
from tying.compress.fits import Fit, Fits
from tying.compress.targets import Size, Targets, compacted_size, silenced
from tying.enforce.compaction.compact import compact
from tying.errors import CompactError, PlanError
from tying.find.budget import least
from tying.find.discover import discover
from tying.groups import Groups
from tying.penalties.norms import GroupLasso, GrOWL, Penalty
from tying.penalties.sequences import Ramp
from tying.plan import TiePlan
from tying.store import encode
from tying.train.rules import GroupRules, Key

STRENGTHS = (0.5, 1.0, 2.0)
"""How often the prox alone would take away a layer's median group norm over the whole of stage one."""
RAMP = Ramp(3.0)
PROBE = 16.0
STEP = math.sqrt(2)
SMALLEST, LARGEST = 1.1, 4096.0


@dataclass(frozen=True)
class Source:
    """A trained network to discover plans in: after stage one at some strength, or the dense one (strength 0)."""

    name: str
    fit: Fit
    penalties: GroupRules


@dataclass(frozen=True)
class Attempt:
    """A plan of some source, and the network after stage two."""

    source: Source
    plan: TiePlan
    fit: Fit

    @property
    def values(self) -> int:
        """The numbers in the network's parameters."""
        return count(self.fit.model)


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
        return count(self.dense.model)

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

        One strength is chosen at a middling size, then sizes grow or shrink by √2. Single accuracies are noisy, and the
        smallest network would be chosen for its luck. But accuracy can only fall as the ratio grows: a size counts only
        if the isotonic fit through all attempts says so too, and if every larger network that was tried is good enough.
        """
        target = self.dense.accuracy - max_drop
        probed = self._probe()
        if probed is None:
            return None
        ratio, attempt = probed
        source, tried = attempt.source, {ratio: attempt}
        self._shrink(source, tried, target)
        while not _good_enough(tried, target) and (ratio := ratio / STEP) > SMALLEST:
            tried[ratio] = self._attempt(source, ratio)
        good = _good_enough(tried, target)
        return tried[max(good)] if good else None

    def controls(self, attempt: Attempt) -> dict[str, Fit]:
        """Train what the result must be held against: no penalty, pruned only, a narrow dense network.

        As large as the result, and trained as long: each has two stages, the same stage two among them.
        """
        ratio = self.parameters / attempt.values
        found: dict[str, Fit] = {}
        plain = [a.values for a in self.attempts if a.source is self.sources[0]]
        if not any(math.isclose(values, attempt.values, rel_tol=0.05) for values in plain):  # it may have been tried
            found["no penalty"] = self._attempt(self.sources[0], ratio, keep=False).fit
        if pruned := self._pruned(attempt):
            name = f"pruned only, {attempt.source.name}"
            found["pruned only"] = self.fits.fit(name, pruned[0], stage="two", plan=pruned[1])
        if narrow := self._narrow(attempt.values):
            self.fits.fit("narrow dense, stage one", narrow[0], stage="dense", plan=narrow[1])
            found["narrow dense"] = self.fits.fit("narrow dense, stage two", narrow[0], stage="two", plan=narrow[1])
        return found

    def _stage_one(self, strength: float) -> Source:
        name = f"strength {strength:g}"
        penalties: dict[Key, Penalty] = {
            (parameter, groups): self._penalty(parameter, groups, strength)
            for parameter, kinds in self.targets.items()
            for groups in kinds
            if self.dense.distance[parameter]  # else the task leaves it as it is
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
        """From the one tried on, try smaller ones until two in a row lost too much, or nothing smaller can be made."""
        (ratio,), failures = tried, 0
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
            raise refused[0]  # of the dense network: of the others, a penalty may have left nothing
        return found

    def _attempt(self, source: Source, ratio: float, *, keep: bool = True) -> Attempt:
        most = self.parameters / ratio
        plan, small = self._within(source, most, lambda size: size.values, lambda _, n: count(n), f"ratio={ratio:g}")
        attempt = self._retrain(source, plan, small, f"{ratio:.3g}x")
        if keep:
            self.attempts.append(attempt)
        return attempt

    def _attempt_bytes(self, source: Source, most: int) -> Attempt:
        width = next(self.dense.model.parameters()).element_size()
        plan, small = self._within(
            source,
            most,
            lambda size: size.values * width + size.label_bytes,
            lambda plan, network: len(encode(network, plan=plan)),
            f"bytes_={most}",
        )
        self.attempts.append(self._retrain(source, plan, small, f"{most} bytes"))
        return self.attempts[-1]

    def _within(
        self,
        source: Source,
        most: float,
        estimate: Callable[[Size], float],
        size_of: Callable[[TiePlan, nn.Module], float],
        budget: str,
    ) -> tuple[TiePlan, nn.Module]:
        """Return the plan of least distortion whose network is not larger than asked, and the network.

        The size is estimated for every plan and measured for the one that fits: what was forgotten is taken off.
        """
        model, room, size = source.fit.model, most, most
        for _ in range(8):
            plan = self._plan(model, self.targets, _below(room, estimate), budget)
            small = compact(model, plan, self.example)
            size = size_of(plan, small)
            if size <= most:
                return plan, small
            room = max(room - (size - most), room / 2)
        raise PlanError(f"{budget}: expected a network of at most {most:g}, got one of {size:g}; ask for a larger one")

    def _plan(
        self, model: nn.Module, targets: Targets, fits: Callable[[Size], bool], budget: str, support: float = 0.05
    ) -> TiePlan:
        return self._least(
            model, lambda share: discover(model, targets, distortion=share, support=support), fits, budget
        )

    def _least(
        self, model: nn.Module, plan_at: Callable[[float], TiePlan], fits: Callable[[Size], bool], budget: str
    ) -> TiePlan:
        """Return the first of the plans from share 0 to 1, silenced, whose network fits."""
        return least(
            lambda share: silenced(plan_at(share), model, self.channels),
            lambda plan: fits(compacted_size(plan, model, self.channels)),
            budget,
        )

    def _retrain(self, source: Source, plan: TiePlan, small: nn.Module, size: str) -> Attempt:
        fit = self.fits.fit(f"stage two, {source.name}, {size}", small, stage="two", plan=plan)
        return Attempt(source, plan, fit)

    def _probe(self) -> tuple[float, Attempt] | None:
        """Return the best network at a middling ratio, the first that can be made at all."""
        ratio = PROBE
        while ratio > SMALLEST:
            try:
                return ratio, self.to_ratio(ratio)
            except (PlanError, CompactError):  # noqa: PERF203
                ratio /= STEP
        return None

    def _best(self, attempts: list[Attempt]) -> Attempt:
        """Return the most accurate; of equals the last, whose penalty is the strongest and structure the clearest."""
        return max(enumerate(attempts), key=lambda indexed: (indexed[1].fit.accuracy, indexed[0]))[1]

    def _pruned(self, attempt: Attempt) -> tuple[nn.Module, TiePlan] | None:
        """Return a network as large as the attempt's, groups pruned in its proportions and none tied."""
        model = attempt.source.fit.model
        left = {t.members[0]: (t.partition.classes, len(t.partition)) for t in attempt.plan}

        def plan_at(share: float) -> TiePlan:
            keep: dict[Key, int | None] = {
                (member.parameter, member.groups): max(1, round(groups * (classes / groups) ** (2 * share)))
                for member, (classes, groups) in left.items()
                if member.parameter in self.targets
            }
            return discover(model, self.targets, keep=keep)

        try:
            most = attempt.values
            plan = self._least(model, plan_at, lambda size: size.values <= most, f"values={most}")
            return compact(model, plan, self.example), plan
        except (PlanError, CompactError):
            return None

    def _narrow(self, values: int) -> tuple[nn.Module, TiePlan] | None:
        """Return an untrained network of plain layers, as large as the result; None if units can't go."""
        outputs = {name: (Groups.outputs(),) for name, kinds in self.targets.items() if Groups.outputs() in kinds}
        if not outputs:
            return None
        model = self.fits.initial()
        try:
            plan = self._plan(model, outputs, lambda size: size.values <= values, f"values={values}", support=0.0)
            return compact(model, plan, self.example), plan
        except (PlanError, CompactError):
            return None


def count(model: nn.Module) -> int:
    """Count the numbers in a network's parameters, each once."""
    return sum(p.numel() for p in model.parameters())


def _below(room: float, estimate: Callable[[Size], float]) -> Callable[[Size], bool]:
    return lambda size: estimate(size) <= room


def _good_enough(tried: Mapping[float, Attempt], target: float) -> list[float]:
    """Return the ratios, ascending, before the first one that lost too much."""
    from scipy.optimize import isotonic_regression

    ratios = sorted(tried)
    accuracies = np.array([tried[ratio].fit.accuracy for ratio in ratios])
    good = np.minimum(accuracies, isotonic_regression(accuracies, increasing=False).x) >= target
    return ratios[: int(np.logical_and.accumulate(good).sum())]
