"""Which ties hold, in words; and those that broke made whole again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tying.enforce.ties.bonds import Bonds
from tying.enforce.ties.guard import bonds_of, guards_of
from tying.enforce.ties.mend import Diagnosis, diagnose, mend
from tying.models import Models

How = Literal["holds", "can be mended", "broken", "alone"]


@dataclass(frozen=True)
class CheckedTie:
    """How one tie is."""

    names: tuple[str, ...]
    """Of the weights, as they were when they were tied."""
    how: How
    """"can be mended": the weights are stored apart and have equal values. "alone": this is a copy without the models
    that have the other weights."""
    reason: str = ""

    def __str__(self) -> str:
        return f"{' ~ '.join(self.names)}: {self.how}" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class Checked:
    """How all ties are; true if there are some and all hold."""

    ties: tuple[CheckedTie, ...]

    def __bool__(self) -> bool:
        return bool(self.ties) and all(tie.how == "holds" for tie in self.ties)

    def __str__(self) -> str:
        held = sum(tie.how == "holds" for tie in self.ties)
        lines = [f"{held} of {len(self.ties)} ties hold" if self.ties else "nothing is tied"]
        return "\n".join([*lines, *(f"  {tie}" for tie in self.ties if tie.how != "holds")])


def check(models: Models) -> Checked:
    """Say which ties of `tie_` hold, which broke, and how. Nothing is changed.

    Args:
        models: A model, or several by name.

    Returns:
        One entry for each tie; in an `if` true where there are ties and all hold; `print` shows those that don't.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from tying.enforce.ties.tie import tie_
        >>> from tying.find.match import match
        >>> models = {"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)}
        >>> tie_(models, match(models))
        >>> print(check(models))
        2 of 2 ties hold
        >>> models["b"].bias = nn.Parameter(models["a"].bias.detach().clone())
        >>> print(check(models))
        1 of 2 ties hold
          a.bias ~ b.bias: can be mended (stored apart, with equal values)
        >>> retie_(models)
        >>> bool(check(models))
        True
    """
    return Checked(tuple(_told(bonds, diagnose(bonds, bond)) for bonds in bonds_of(models) for bond in bonds.bonds))


def retie_(models: Models) -> None:
    """Store once again what broken ties hold apart, where the values agree.

    The guard does so by itself at the next forward. Undo it with `untie_`.

    Args:
        models: A model, or several by name; written to.

    Raises:
        TieError: If values differ: names both weights, with both values where they differ most. Nothing has changed
            then in the ties of the same call of `tie_`.
    """
    for bonds in bonds_of(models):
        mend(bonds)
    for guard in guards_of(models):
        guard.remember()


def _told(bonds: Bonds, diagnosis: Diagnosis) -> CheckedTie:
    names = tuple(dict.fromkeys(place.name for place in diagnosis.bond.places))
    if diagnosis.problem is not None:
        return CheckedTie(names, "broken", diagnosis.problem)
    away = [place.name for place in diagnosis.bond.places if place.prefix in bonds.absent]
    if away:
        return CheckedTie(names, "alone", f"a copy without {', '.join(away)}")
    if not diagnosis.holds:
        return CheckedTie(names, "can be mended", "stored apart, with equal values")
    return CheckedTie(names, "holds")
