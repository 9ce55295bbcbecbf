"""Groups that resemble each other: hierarchical clusters, k-means, or the paper's affinity propagation."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from tying.errors import PlanError
from tying.groups import similarity

Method = Literal["ward", "complete", "average", "cosine", "kmeans", "affinity"]
LINKAGES = ("ward", "complete", "average", "cosine")


@dataclass(frozen=True)
class Dendrogram:
    """The merges of `n` groups, cheapest first: one tree gives every number of clusters.

    Attributes:
        merges: `(n − 1, 2)`: which two clusters each merge joins; numbers ≥ n name earlier merges.
        heights: `(n − 1,)`, non-decreasing: the linkage distance at which they join.
    """

    merges: NDArray[np.int64]
    heights: NDArray[np.float64]

    @staticmethod
    def of(matrix: NDArray[np.float64], method: Method = "ward") -> Dendrogram:
        """Build the tree of the groups of a `(n, D)` matrix: O(n²) time and memory.

        `ward`, `complete` and `average` use the Euclidean distance; `cosine` is average linkage on 1 − cosine.
        """
        if len(matrix) < 2:
            return Dendrogram(np.empty((0, 2), dtype=np.int64), np.empty(0))
        from scipy.cluster.hierarchy import linkage

        if method == "cosine":
            tree = linkage(matrix, method="average", metric="cosine")
        else:
            tree = linkage(matrix, method=method)
        return Dendrogram(tree[:, :2].astype(np.int64), np.maximum.accumulate(tree[:, 2]))

    def cut(self, clusters: int) -> NDArray[np.int64]:
        """Return `(n,)` labels of exactly this many clusters: the first `n − clusters` merges are done."""
        count = len(self.merges) + 1
        members: dict[int, list[int]] = {i: [i] for i in range(count)}
        for step, (left, right) in enumerate(self.merges[: count - clusters]):
            members[count + step] = members.pop(int(left)) + members.pop(int(right))
        labels = np.empty(count, dtype=np.int64)
        for label, indices in enumerate(members.values()):
            labels[indices] = label
        return labels


def cluster(
    matrix: NDArray[np.float64], method: Method, clusters: int | None, *, seed: int = 0, preference: float = 0.6
) -> NDArray[np.int64]:
    """Label the groups of a `(n, D)` matrix so that those that resemble each other share a label.

    Args:
        matrix: Non-zero groups, float64.
        method: A linkage (`ward`, `complete`, `average`, `cosine`), `kmeans`, or `affinity`.
        clusters: How many labels; `affinity` finds the number itself and takes None.
        seed: For `kmeans` and `affinity`.
        preference: For `affinity`: how readily a group becomes an exemplar (0.6 for MNIST, 0.8 for VGG).

    Raises:
        PlanError: If the method is unknown, the number of clusters is not in 1 … n, or one is given to `affinity`.
    """
    check_method(method)
    if method == "affinity":
        if clusters is not None:
            raise PlanError(
                f"clusters: expected None for method='affinity', which finds the number itself, got {clusters}; "
                "leave it out and steer with `preference`, or use method='ward'"
            )
        return _affinity(matrix, preference, seed)
    count = len(matrix)
    if clusters is None or not 1 <= clusters <= count:
        raise PlanError(
            f"clusters: expected 1 to {count}, the number of non-zero groups, got {clusters}; "
            "ask for fewer clusters, or lower `support` so that more groups count as non-zero"
        )
    if method == "kmeans":
        return _kmeans(matrix, clusters, seed)
    return Dendrogram.of(matrix, method).cut(clusters)


def check_method(method: str) -> None:
    """Raise `PlanError` unless the method is known."""
    if method not in get_args(Method):
        raise PlanError(f"method: expected one of {get_args(Method)}, got {method!r}; pick one of them")


def _affinity(matrix: NDArray[np.float64], preference: float, seed: int) -> NDArray[np.int64]:
    from sklearn.cluster import AffinityPropagation  # pyright: ignore[reportMissingTypeStubs]
    from sklearn.exceptions import ConvergenceWarning

    similar = similarity(matrix)
    for damping in (0.5, 0.7, 0.9):  # the paper's first; more where the messages oscillate
        model = cast("Any", AffinityPropagation)(
            affinity="precomputed", preference=preference, damping=damping, max_iter=1000, random_state=seed
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            # One group, or all alike: the preference alone decides, which is as good an answer as any.
            warnings.filterwarnings("ignore", "All samples have mutually equal similarities")
            try:
                return cast("NDArray[np.int64]", model.fit(similar).labels_.astype(np.int64))
            except ConvergenceWarning:
                continue
    raise PlanError(
        f"method 'affinity': expected affinity propagation to converge on {len(matrix)} groups, got oscillating "
        "messages at damping 0.5, 0.7 and 0.9; use method='ward', which always ends"
    )


def _kmeans(matrix: NDArray[np.float64], clusters: int, seed: int) -> NDArray[np.int64]:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # Fewer distinct groups than clusters: some labels stay unused, which is what equal groups deserve.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = cast("Any", KMeans)(clusters, n_init=4, random_state=seed).fit(matrix)
    return cast("NDArray[np.int64]", model.labels_.astype(np.int64))
