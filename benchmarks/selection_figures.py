"""What is counted in a selection: how it repeats, against chance; what is equal in it; what it is worth refitted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import hypergeom

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

EQUAL = 1e-3
"""Relative difference of norms up to which covariates count as equal."""
ALIKE = 0.9
"""Cosine of coefficients, either sign, from which covariates of equal norm are refitted as one."""
RIDGES = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Per sample; the refit's is chosen on the validation split."""


def overlap(a: Mask, b: Mask) -> float:
    """Return the Jaccard index |a ∩ b| ÷ |a ∪ b|; two empty selections agree."""
    either = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / either if either else 1.0


@cache
def chance_overlap(a: int, b: int, p: int) -> float:
    """Return the mean Jaccard index of two independent random selections of a and b among p.

    The intersection k is hypergeometric, and the union has a + b − k.
    """
    if a + b == 0:
        return 1.0
    k = np.arange(max(0, a + b - p), min(a, b) + 1)
    return float(hypergeom.pmf(k, p, a, b) @ (k / (a + b - k)))


def stability(selected: Sequence[Mask]) -> dict[str, float | None]:
    """Return the mean overlap of all pairs, what chance gives for their sizes, and the share of the rest reached."""
    pairs = list(combinations(selected, 2))
    found = float(np.mean([overlap(a, b) for a, b in pairs]))
    chance = float(np.mean([chance_overlap(int(a.sum()), int(b.sum()), len(a)) for a, b in pairs]))
    beyond = (found - chance) / (1 - chance) if chance < 1 - 1e-9 else None
    return {"overlap": found, "overlap by chance": chance, "overlap beyond chance": beyond}


def equality(norms: Array, groups: Sequence[range]) -> dict[str, float | None]:
    """Return, as means over the groups with a member selected, how equal their members' norms are.

    Returns:
        members selected: Share of the members.
        members equal: The largest set of two or more selected members of equal norm, as a share of the members.
        spread: Standard deviation ÷ mean of the norms of all members, 0 for the unselected.
    """
    seen = [norms[list(group)] for group in groups if norms[list(group)].any()]
    if not seen:
        return {"members selected": None, "members equal": None, "spread": None}
    return {
        "members selected": float(np.mean([np.mean(part > 0) for part in seen])),
        "members equal": float(np.mean([_largest_equal(part) / len(part) for part in seen])),
        "spread": float(np.mean([part.std() / part.mean() for part in seen])),
    }


def _largest_equal(norms: Array) -> int:
    sizes = [len(members) for members in equal_norms(norms)]
    return max((size for size in sizes if size > 1), default=0)


def equal_norms(norms: Array) -> Iterator[NDArray[np.intp]]:
    """Yield the selected, in sets within which no norm is more than a thousandth below the largest."""
    order = np.argsort(-norms, kind="stable")
    order = order[norms[order] > 0]
    while len(order):
        inside = norms[order] >= (1 - EQUAL) * norms[order[0]]
        yield order[inside]
        order = order[~inside]


def ties(X: Array) -> Array:
    """Return `(p, c)`: a column for each set of selected covariates with equal norms and (anti-)parallel coefficients.

    Its entries are ±1 ÷ √members, so that a ridge weighs tied and untied covariates alike.
    """
    norms = np.linalg.norm(X, axis=1)
    columns = []
    for members in equal_norms(norms):
        while len(members):
            cosines = X[members] @ X[members[0]] / (norms[members] * norms[members[0]])
            joined = np.abs(cosines) >= ALIKE
            column = np.zeros(len(X))
            column[members[joined]] = np.sign(cosines[joined]) / np.sqrt(joined.sum())
            columns.append(column)
            members = members[~joined]
    return np.stack(columns, axis=1) if columns else np.zeros((len(X), 0))


def refit(features: Array, gram: Array, moment: Array, validation: tuple[Array, Array]) -> tuple[Array, float]:
    """Fit what is selected anew, with the ridge that is best on the validation split, `≥ 1e-8` per sample.

    Args:
        features: `(p, c)`: what `ties` gives, or columns of the identity.
        gram: AᵀA of the sample, `(p, p)`.
        moment: AᵀY, `(p, r)`.
        validation: A and Y, centred as the sample.

    Returns:
        The coefficients, `(p, r)`, and their relative validation error.
    """
    values, vectors = np.linalg.eigh(features.T @ gram @ features)
    turned = features @ vectors
    target = turned.T @ moment
    scale = np.trace(gram) / len(gram)
    fits = [turned @ (target / (np.maximum(values, 0.0) + ridge * scale)[:, None]) for ridge in RIDGES]
    errors = [relative_error(fit, validation) for fit in fits]
    best = int(np.argmin(errors))
    return fits[best], errors[best]


def relative_error(X: Array, split: tuple[Array, Array]) -> float:
    """Return ‖Y − AX‖² ÷ ‖Y‖²."""
    A, Y = split
    return float(np.square(Y - A @ X).sum() / np.square(Y).sum())
