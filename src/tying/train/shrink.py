"""From the squared norms of groups to what each group is multiplied by: the prox of a penalty on norms."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
from numpy.typing import NDArray

from tying.axes import SAFE
from tying.errors import PenaltyError
from tying.penalties.arrays import Vector
from tying.penalties.norms import OnNorms
from tying.penalties.sorted_l1 import shrink_sorted
from tying.penalties.tensors import check_finite
from tying.train.rules import Place, Target

Labels = NDArray[np.intp]
Steps = Mapping[str, float]
"""The step size of every target, by its key; at 0 it is left alone."""

_SOLVED = 4096
"""Norms that are shrunk in one call, which works on a dozen copies of them."""
_TINY = np.finfo(np.float64).tiny


def factors(
    squares: Vector, targets: Sequence[Target], steps: Steps, again: Callable[[Target], Sequence[Vector]]
) -> Vector:
    """Return norm after the prox ÷ norm before it, for every group, target after target; 0 ÷ 0 is 0.

    Args:
        squares: The squared norms of the groups, `(n,)`; overwritten.
        targets: Under penalties on norms.
        steps: Their step sizes.
        again: Gives, for a target whose squares can't be trusted, those at the positions of each of its places,
            formed in float64.

    Raises:
        PenaltyError: Names the parameter that has NaN or infinity in it.
    """
    _mend(squares, targets, again)
    norms = np.sqrt(squares, out=squares)
    for some, span in _sets(targets):
        shrunk = shrink_sorted(norms[span], _thresholds(some, steps), [target.count for target in some])
        np.divide(shrunk, np.maximum(norms[span], _TINY), out=norms[span])
    return norms


def starts(targets: Sequence[Target]) -> list[int]:
    """Return where the groups of every target begin, target after target."""
    return np.cumsum([0, *(target.count for target in targets)]).tolist()[:-1]


def join(target: Target, sums: Sequence[Vector]) -> Vector:
    """Return the squared norms of a target's groups, from the sums at the positions of its places."""
    if target.places[0].labels is None:
        return sums[0]
    total = np.zeros(target.count)
    for place, own in zip(target.places, sums, strict=True):
        total += by_label(cast(Labels, place.labels), own, target.count)
    return total


def by_label(labels: Labels, sums: Vector, count: int) -> Vector:
    """Return, for each of so many groups, the sum at the positions that have its label; −1 is no group's."""
    return cast(Vector, np.bincount(labels + 1, weights=sums, minlength=count + 1)[1:])


def check(places: Sequence[Place], sums: Sequence[Vector]) -> None:
    """Raise `PenaltyError` that names the first place whose sums of squares are not finite."""
    for place, own in zip(places, sums, strict=True):
        with named(place.name):
            check_finite(own, "group")


@contextmanager
def named(name: str) -> Generator[None, None, None]:
    """Say of which parameter a penalty complains."""
    try:
        yield
    except PenaltyError as error:
        raise PenaltyError(f"{name}: {error}") from error


def _mend(squares: Vector, targets: Sequence[Target], again: Callable[[Target], Sequence[Vector]]) -> None:
    """Put sums formed in float64 where those formed in float32 have lost something, or refuse what is not finite."""
    if SAFE[0] < squares.min() and squares.max() < SAFE[1]:
        return
    begin = starts(targets)
    peaks = np.maximum.reduceat(squares, begin)
    for index in np.flatnonzero(~((peaks > SAFE[0]) & (peaks < SAFE[1]))).tolist():
        target = targets[index]
        sums = again(target)
        check(target.places, sums)
        squares[begin[index] :][: target.count] = join(target, sums)


def _thresholds(targets: Sequence[Target], steps: Steps) -> Vector:
    known: dict[tuple[int, int, float], Vector] = {}
    for target in targets:
        case = id(target.penalty), target.count, steps[target.key]
        if case not in known:
            known[case] = cast(OnNorms, target.penalty).thresholds(target.count, steps[target.key])
    return np.concatenate([known[id(target.penalty), target.count, steps[target.key]] for target in targets])


def _sets(targets: Sequence[Target]) -> Iterator[tuple[list[Target], slice]]:
    """Yield neighbouring targets whose norms are shrunk in one call, and where those are."""
    some: list[Target] = []
    start = stop = 0
    for target in targets:
        if some and stop + target.count - start > _SOLVED:
            yield some, slice(start, stop)
            some, start = [], stop
        some.append(target)
        stop += target.count
    if some:
        yield some, slice(start, stop)
