"""How strongly a soft tie draws: a number, or a schedule, for all ties or by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias, cast

from tying.errors import PenaltyError
from tying.patterns import fitting
from tying.penalties.sequences import check_not_negative
from tying.plan import Tie, TiePlan

Schedule: TypeAlias = Callable[[float], float]
"""From the progress of training, in [0, 1], to a strength ≥ 0."""
Strength: TypeAlias = "float | Schedule | Mapping[str, float | Schedule]"


@dataclass(frozen=True)
class Tightening:
    """A strength that grows geometrically, from independent models to shared weights: start · (end ÷ start)^progress.

    Every decade of strength takes the same share of training. At the end call `tie_`: what is left of the distance is
    then averaged away, and the weights stay equal.

    Attributes:
        start: Strength at progress 0, > 0: so small that the weights go their own ways.
        end: Strength at progress 1, > 0, finite.

    Example:
        >>> tightening = Tightening(1e-4, 1e4)
        >>> [tightening(progress) for progress in (0.0, 0.5, 1.0)]
        [0.0001, 1.0, 10000.0]
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            if check_not_negative(f"Tightening.{name}", getattr(self, name)) == 0:
                raise PenaltyError(f"Tightening.{name}: expected a number > 0, got 0; pass a small one, as 1e-6")

    def __call__(self, progress: float) -> float:
        """Return the strength at a progress in [0, 1]."""
        return self.start ** (1 - progress) * self.end**progress


def per_tie(plan: TiePlan, strength: Strength) -> list[float | Schedule]:
    """Return the strength or the schedule of every tie of a plan.

    Raises:
        PenaltyError: If one is neither a number ≥ 0 nor a function, a pattern fits no tie, or a tie no pattern.
    """
    if not isinstance(strength, Mapping):
        return [_checked("strength", strength)] * len(plan)
    given = {pattern: _checked(f"strength[{pattern!r}]", each) for pattern, each in strength.items()}
    names = dict.fromkeys(member.parameter for tie in plan for member in tie.members)
    for pattern in given:
        if not isinstance(pattern, str) or not fitting(pattern, names):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PenaltyError(
                f"strength: expected patterns of parameters in the plan, got {pattern!r}, which fits none; "
                f"the plan has {', '.join(list(names)[:8])}{', …' if len(names) > 8 else ''}"
            )
    fits = {pattern: {*fitting(pattern, names)} for pattern in given}
    return [_first(tie, given, fits) for tie in plan]


def _first(tie: Tie, given: Mapping[str, float | Schedule], fits: Mapping[str, set[str]]) -> float | Schedule:
    names = [member.parameter for member in tie.members]
    for pattern, strength in given.items():
        if any(name in fits[pattern] for name in names):
            return strength
    raise PenaltyError(
        f"strength: expected a pattern for every tie, got none that fits {' ~ '.join(names)}; "
        'add "*", with the strength of all others'
    )


def _checked(name: str, given: Any) -> float | Schedule:
    return cast(Schedule, given) if callable(given) else strength_of(name, given)


def strength_of(name: str, given: object) -> float:
    """Return a strength as a float ≥ 0; it may be infinite.

    Raises:
        PenaltyError: Names it, if it is none.
    """
    if not isinstance(given, Real) or not float(given) >= 0:
        raise PenaltyError(f"{name}: expected a number ≥ 0, a schedule, or either by name, got {given!r}; pass one")
    return float(given)


def at(progress: float | None, strengths: list[float | Schedule]) -> list[float]:
    """Return the strengths of the ties at some progress.

    Raises:
        PenaltyError: If a schedule is not told the progress, or that is not in [0, 1], or it gives no number ≥ 0.
    """
    if progress is not None and not (isinstance(progress, Real) and 0 <= progress <= 1):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PenaltyError(f"progress: expected a number from 0 to 1, got {progress!r}; pass step ÷ number of steps")
    return [_at(progress, each) for each in strengths]


def _at(progress: float | None, each: float | Schedule) -> float:
    if not callable(each):
        return each
    if progress is None:
        raise PenaltyError(
            "progress: expected a number from 0 to 1 for a strength that is a schedule, got none; "
            "call soft(models, progress=step / steps)"
        )
    return strength_of(f"strength at progress {progress}", each(float(progress)))
