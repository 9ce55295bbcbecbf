"""The weights of the sorted-L1 norm: λ_1 ≥ … ≥ λ_n ≥ 0, one per rank, as a function of how many there are.

A sequence is a frozen description; `weights(sequence, n)` gives the numbers, checked. Sources: OSCAR: Bondell & Reich,
doi:10.1111/j.1541-0420.2007.00843.x; PLD and spike: Zhang et al., *Learning to Share*, ICLR 2018, openreview rypT3fb0b.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike

from tying.errors import PenaltyError
from tying.penalties.arrays import Vector

SequenceLike: TypeAlias = "Callable[[int], Vector] | ArrayLike"
Variant = Literal["paper", "vgg", "mnist"]


@dataclass(frozen=True)
class Constant:
    """λ_i = base: OWL becomes the lasso, GrOWL the group lasso.

    Example:
        >>> Constant(2.0)(3)
        array([2., 2., 2.])
    """

    base: float = 1.0

    def __post_init__(self) -> None:
        _check_settings(self, base=self.base)

    def __call__(self, n: int) -> Vector:
        """Return the `(n,)` float64 weights."""
        return np.full(n, float(self.base))


@dataclass(frozen=True)
class Oscar:
    """λ_i = base + slope · (n − i), i = 1 … n: a straight line, every two neighbours `slope` apart.

    Example:
        >>> Oscar(1.0, 0.5)(3)
        array([2. , 1.5, 1. ])
    """

    base: float
    slope: float

    def __post_init__(self) -> None:
        _check_settings(self, base=self.base, slope=self.slope)

    def __call__(self, n: int) -> Vector:
        """Return the `(n,)` float64 weights."""
        values = _down_to_zero(n)
        values *= self.slope
        values += self.base
        return values


@dataclass(frozen=True)
class Ramp:
    """λ_i = 1 + ratio · (n − i) / (n − 1): the `Oscar` whose ends, 1 + ratio and 1, do not depend on n.

    The safe default: one `strength` means about the same for a layer of 30 groups and for one of 3,000. For n = 1 the
    weight is 1.

    Example:
        >>> Ramp(3.0)(4)
        array([4., 3., 2., 1.])
    """

    ratio: float = 3.0

    def __post_init__(self) -> None:
        _check_settings(self, ratio=self.ratio)

    def __call__(self, n: int) -> Vector:
        """Return the `(n,)` float64 weights."""
        values = _down_to_zero(n)
        values /= max(n - 1, 1)
        values *= self.ratio
        values += 1.0
        return values


@dataclass(frozen=True)
class Pld:
    """Partial linear decay: a ramp over the first ranks, then a flat tail at `base`.

    | variant   | ramp over i ≤ p                                  | p                    |
    |-----------|--------------------------------------------------|----------------------|
    | `"paper"` | base + slope · (p − i + 1)                       | ⌊fraction · n⌋       |
    | `"vgg"`   | base + slope · (p − i)                           | ⌊fraction · n⌋       |
    | `"mnist"` | evenly spaced, base + slope · (n − 1) to base    | ⌊fraction · n⌋ − 1   |

    The official VGG code has fraction 0.1, the MNIST code 0.5. The flat tail makes groups zero but does not tie them.

    Example:
        >>> Pld(1.0, 0.5, 0.5)(6)
        array([2.5, 2. , 1.5, 1. , 1. , 1. ])
        >>> Pld(1.0, 0.5, 0.5, variant="vgg")(6)
        array([2. , 1.5, 1. , 1. , 1. , 1. ])
        >>> Pld(1.0, 0.5, 0.5, variant="mnist")(8)
        array([4.5 , 2.75, 1.  , 1.  , 1.  , 1.  , 1.  , 1.  ])
    """

    base: float
    slope: float
    fraction: float
    variant: Variant = "paper"

    def __post_init__(self) -> None:
        _check_settings(self, base=self.base, slope=self.slope, fraction=self.fraction)
        if self.fraction > 1:
            raise PenaltyError(
                f"Pld.fraction: expected a share of the ranks in [0, 1], got {self.fraction}; 0.5 is half of them"
            )
        if self.variant not in get_args(Variant):
            raise PenaltyError(f"Pld.variant: expected one of {get_args(Variant)}, got {self.variant!r}; pick one")

    def __call__(self, n: int) -> Vector:
        """Return the `(n,)` float64 weights."""
        ranks = math.floor(self.fraction * n + 1e-9)  # 0.29 · 100 is 28.999…: the floor meant is 29
        if self.variant == "paper":
            ramp = self.slope * (_down_to_zero(ranks) + 1)
        elif self.variant == "vgg":
            ramp = self.slope * _down_to_zero(ranks)
        else:
            ranks = max(ranks - 1, 0)
            ramp = np.linspace(self.slope * (n - 1), 0.0, ranks)
        return self.base + np.concatenate([ramp, np.zeros(n - ranks)])


@dataclass(frozen=True)
class Spike:
    """λ_1 = base + slope, the others base: the lasso plus slope times the largest magnitude (L1 + L∞).

    Example:
        >>> Spike(1.0, 4.0)(3)
        array([5., 1., 1.])
    """

    base: float
    slope: float

    def __post_init__(self) -> None:
        _check_settings(self, base=self.base, slope=self.slope)

    def __call__(self, n: int) -> Vector:
        """Return the `(n,)` float64 weights."""
        values = np.full(n, float(self.base))
        values[:1] += self.slope
        return values


@dataclass(frozen=True)
class Explicit:
    """Weights given one by one: finite, ≥ 0, non-increasing. All zero means no penalty.

    Example:
        >>> Explicit((3.0, 1.0))(2)
        array([3., 1.])
        >>> Explicit((3.0, 1.0))(4)
        Traceback (most recent call last):
        tying.errors.PenaltyError: sequence: expected 4 weights, one per group, got 2; pass as many as there are groups
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        checked = check_weights(self.values)
        object.__setattr__(self, "values", tuple(checked.tolist()))
        object.__setattr__(self, "_array", _locked(checked.copy()))

    def __call__(self, n: int) -> Vector:
        """Return the `(n,)` float64 weights.

        Raises:
            PenaltyError: If n is not the number of weights given.
        """
        return self.locked(n).copy()

    def __setstate__(self, state: dict[str, object]) -> None:
        """Become the copy of another, unpickled or `deepcopy`: arrays come out of both writable."""
        vars(self).update(state)
        object.__setattr__(self, "_array", _locked(np.array(self.values, dtype=np.float64)))

    def locked(self, n: int, name: str = "sequence") -> Vector:
        """Return the `(n,)` float64 weights, not a copy: read-only.

        Raises:
            PenaltyError: If n is not the number of weights given, which are called by that name.
        """
        array: Vector = vars(self)["_array"]
        return array if len(array) == n else check_weights(array, n, name)


def as_sequence(sequence: SequenceLike) -> Callable[[int], Vector]:
    """Return a sequence as it is, and an array, list or tensor as a checked `Explicit` sequence."""
    if callable(sequence):
        return sequence
    return Explicit(tuple(check_weights(sequence).tolist()))


def weights(sequence: SequenceLike, n: int, name: str = "sequence") -> Vector:
    """Return the n weights of a sequence, or of an array of n weights, `(n,)` float64, checked; read-only.

    The weights of the sequences of this module are kept, up to 131,072 of them: they are asked for at every step.
    Those of subclasses are not, which may depend on more than their settings.

    Args:
        sequence: The sequence or the weights.
        n: How many are wanted.
        name: What messages call the sequence.

    Raises:
        PenaltyError: If they are not n finite, non-negative, non-increasing numbers.
    """
    if isinstance(sequence, _LASTING) and type(sequence) in _LASTING and n <= _KEPT:
        return _kept(sequence, n)
    if isinstance(sequence, Explicit) and type(sequence) is Explicit:
        return sequence.locked(n, name)
    return _locked(check_weights(sequence(n) if callable(sequence) else sequence, n, name).view())


_LASTING = (Constant, Oscar, Ramp, Pld, Spike)
_KEPT = 1 << 17


@lru_cache(maxsize=128)
def _kept(sequence: Callable[[int], Vector], n: int) -> Vector:
    return _locked(check_weights(sequence(n), n))


def _locked(values: Vector) -> Vector:
    values.setflags(write=False)
    return values


def check_product(factor: float, numbers: Vector) -> None:
    """Raise `PenaltyError` if a step, or step · strength, times the largest of `(n,)` weights exceeds float64."""
    if len(numbers) and not factor * numbers.item(0) < math.inf:
        raise PenaltyError(
            f"step: expected step · strength · weights below 1.8e308, got {factor:g} · {numbers[0]:g}; lower one"
        )


def check_weights(given: ArrayLike, n: int | None = None, name: str = "sequence") -> Vector:
    """Return the weights as `(n,)` float64; `name` is what messages call them.

    Raises:
        PenaltyError: If they are not flat, not finite, negative, increasing somewhere, or not n of them.
    """
    try:
        values = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:  # the last: a tensor that requires a gradient
        raise PenaltyError(f"{name}: expected numbers, got {given!r}; pass a flat list of weights") from error
    # A NaN fails every comparison, so the ends and the order are enough.
    if (
        values.ndim == 1
        and n in (None, len(values))
        and (not len(values) or np.inf > values[0] >= values[-1] >= 0)
        and np.count_nonzero(values[1:] <= values[:-1]) == max(len(values) - 1, 0)  # faster than .all()
    ):
        return values
    raise PenaltyError(f"{name}: {_what_is_wrong(values, n, name)}")


def _what_is_wrong(values: Vector, n: int | None, name: str) -> str:
    if values.ndim != 1:
        return f"expected a flat list of weights, got shape {values.shape}; flatten it"
    if n not in (None, len(values)):
        each = "group" if name == "sequence" else "number sorted"
        return f"expected {n} weights, one per {each}, got {len(values)}; pass as many as there are {each.split()[0]}s"
    if not np.isfinite(values).all():
        rank = int(np.flatnonzero(~np.isfinite(values))[0])
        return f"expected finite weights, got {values[rank]} at index {rank}; mend it"
    if (values < 0).any():
        rank = int(np.flatnonzero(values < 0)[0])
        return f"expected weights ≥ 0, got {values[rank]} at index {rank}; raise it to 0 or more"
    rank = int(np.flatnonzero(values[1:] > values[:-1])[0])
    return (
        f"expected non-increasing weights, got {values[rank]} then {values[rank + 1]} at index {rank + 1}; "
        "sort them, largest first"
    )


def _down_to_zero(n: int) -> Vector:
    return np.arange(n - 1, -1, -1, dtype=np.float64)


def check_not_negative(name: str, value: object) -> float:
    """Return a number as a float.

    Raises:
        PenaltyError: Names it, if it is not a finite number ≥ 0.
    """
    if type(value) is float and 0.0 <= value < math.inf:  # what is usual is found out at once
        return value
    if not (isinstance(value, Real) and math.isfinite(value) and float(value) >= 0):
        raise PenaltyError(f"{name}: expected a finite number ≥ 0, got {value!r}; pass such a number")
    return float(value)


def _check_settings(owner: object, **settings: object) -> None:
    for name, value in settings.items():
        check_not_negative(f"{type(owner).__name__}.{name}", value)
