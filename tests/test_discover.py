"""Plans from trained weights: planted ties come back, budgets are met and tight, nothing else is touched."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from tying import discover
from tying.errors import PlanError
from tying.find.clusters import LINKAGES, Dendrogram, Method, cluster, similarity
from tying.groups import Groups
from tying.plan import Member, Partition, Tie, TiePlan

INPUTS, OUTPUTS = Groups.inputs(), Groups.outputs()
METHODS: tuple[Method, ...] = ("ward", "complete", "average", "cosine", "kmeans", "affinity")

Discover = Callable[..., TiePlan]


class Layers(nn.Module):
    """Weights by name: `discover` reads nothing else of a model."""

    def __init__(self, **weights: NDArray[Any]) -> None:
        super().__init__()
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(weight)))


def inputs_of(groups: NDArray[Any]) -> Layers:
    """A linear layer whose input groups are these."""
    return Layers(fc=groups.T)


def normal(*shape: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=shape)


def labels_of(plan: TiePlan, at: int = 0) -> NDArray[np.int64]:
    return plan.ties[at].partition.labels


# ---------------------------------------------------------------- planted ties


def planted(seed: int, noise: float) -> tuple[Layers, Partition]:
    """60 input groups in 9 clusters and 8 near zero, as GrOWL leaves them."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(9, 12)) + 3 * np.eye(9, 12)
    labels = random.permutation(np.concatenate([np.arange(9), random.integers(0, 9, 43), np.full(8, -1)]))
    groups = np.where(labels[:, None] < 0, 0, centres[labels]) + noise * random.normal(size=(60, 12))
    return inputs_of(groups.astype(np.float32)), Partition(labels)


def law_planted(find: Discover, method: Method) -> None:
    for seed in range(3):
        model, partition = planted(seed, noise=0.01)
        options = {"preference": 0.6} if method == "affinity" else {"clusters": 9}
        plan = find(model, {"fc": INPUTS}, method=method, **options)
        assert plan == TiePlan([Tie((Member("fc", INPUTS),), partition)])


@pytest.mark.parametrize("method", METHODS)
def test_planted_ties_are_recovered_under_noise(method: Method) -> None:
    law_planted(discover, method)


def by_the_norm_alone(model: nn.Module, groups: Any, *, clusters: int = 9, **_: Any) -> TiePlan:
    """Equal norms are what GrOWL guarantees: tying by them mixes directions."""
    matrix = INPUTS.read(model.get_parameter("fc")).detach().double()
    norms = matrix.norm(dim=1).numpy()[:, None]
    labels = np.where(norms[:, 0] > 0.05 * norms.max(), Dendrogram.of(norms).cut(clusters), -1)
    return TiePlan([Tie.of("fc", INPUTS, labels)])


def without_support(model: nn.Module, groups: Any, **options: Any) -> TiePlan:
    return discover(model, groups, **options, support=0.0)


def of_the_outputs(model: nn.Module, groups: Any, **options: Any) -> TiePlan:
    return discover(model, {"fc": OUTPUTS}, **{**options, "clusters": {"fc": 9}})


@pytest.mark.parametrize("broken", [by_the_norm_alone, without_support, of_the_outputs])
def test_finding_in_other_ways_fails_the_law(broken: Discover) -> None:
    with pytest.raises(AssertionError):
        law_planted(broken, "ward")


# ---------------------------------------------------------------- clusters


def duplicated(seed: int) -> NDArray[np.float64]:
    """Groups of which many are equal bit for bit: all merges among them have height zero."""
    random = np.random.default_rng(seed)
    return random.normal(size=(6, 3))[random.integers(0, 6, 25)]


MATRICES = {
    "random": normal(30, 5),
    "wide": normal(12, 200),
    "numbers": normal(40, 1),
    "one": normal(1, 4),
    "two": normal(2, 4),
    "duplicates": duplicated(1),
    "all equal": np.ones((9, 4)),
    "rounded": np.round(normal(40, 2)) + 0.5,
    "tiny": normal(20, 3) * 1e-30,
    "parallel": np.outer(np.arange(1.0, 12), [1.0, 2, 3]),
}


def law_cut(cut: Callable[[NDArray[np.float64], Method, int], NDArray[np.int64]], name: str, method: Method) -> None:
    """Any number of clusters is met exactly, and each one is the next with two of its clusters joined."""
    matrix = MATRICES[name]
    finer: set[frozenset[int]] = {frozenset([i]) for i in range(len(matrix))}
    for clusters in range(len(matrix), 0, -1):
        labels = cut(matrix, method, clusters)
        assert labels.shape == (len(matrix),)
        assert sorted(set(labels.tolist())) == list(range(clusters))
        sets = {frozenset(np.flatnonzero(labels == label).tolist()) for label in range(clusters)}
        assert len(sets - finer) <= 1
        assert all(any(part <= whole for whole in sets) for part in finer)
        finer = sets


@pytest.mark.parametrize("method", LINKAGES)
@pytest.mark.parametrize("name", MATRICES)
def test_every_linkage_gives_every_number_of_clusters_from_one_tree(name: str, method: Method) -> None:
    law_cut(cluster, name, method)


def by_height(matrix: NDArray[np.float64], method: Method, clusters: int) -> NDArray[np.int64]:
    """Equal heights can't be told apart: too few or too many clusters."""
    from scipy.cluster.hierarchy import fcluster

    if len(matrix) == 1:
        return np.zeros(1, dtype=np.int64)
    tree = Dendrogram.of(matrix, method)
    table = np.column_stack([tree.merges, tree.heights, np.ones(len(tree.merges))])
    return fcluster(table, clusters, criterion="maxclust").astype(np.int64) - 1


def by_kmeans(matrix: NDArray[np.float64], method: Method, clusters: int) -> NDArray[np.int64]:
    """Each number by itself: no tree."""
    return cluster(matrix, "kmeans", clusters)


@pytest.mark.parametrize(("broken", "name"), [(by_height, "duplicates"), (by_kmeans, "random")])
def test_cutting_in_other_ways_fails_the_law(broken: Callable[..., NDArray[np.int64]], name: str) -> None:
    with pytest.raises(AssertionError):
        law_cut(broken, name, "ward")


def slow_ward(matrix: NDArray[np.float64], clusters: int) -> NDArray[np.int64]:
    """Join the pair whose joining adds least to the squared distances from the means; over and over."""
    sets = [[i] for i in range(len(matrix))]

    def spread(indices: list[int]) -> float:
        return float(np.square(matrix[indices] - matrix[indices].mean(0)).sum())

    while len(sets) > clusters:
        pairs = itertools.combinations(range(len(sets)), 2)
        a, b = min(pairs, key=lambda p: spread(sets[p[0]] + sets[p[1]]) - spread(sets[p[0]]) - spread(sets[p[1]]))
        sets[a] += sets.pop(b)
    labels = np.empty(len(matrix), dtype=np.int64)
    for label, indices in enumerate(sets):
        labels[indices] = label
    return labels


@pytest.mark.parametrize("clusters", [1, 2, 7, 17])
def test_ward_is_the_ward_of_the_definition_of_scipy_and_of_sklearn(clusters: int) -> None:
    from scipy.cluster.hierarchy import cut_tree, linkage
    from sklearn.cluster import AgglomerativeClustering

    for seed in range(3):
        matrix = normal(18, 4, seed=seed)
        ours = Partition(cluster(matrix, "ward", clusters))
        assert ours == Partition(slow_ward(matrix, clusters))
        assert ours == Partition(cut_tree(linkage(matrix, "ward"), clusters)[:, 0])
        assert ours == Partition(AgglomerativeClustering(clusters, linkage="ward").fit(matrix).labels_)


@pytest.mark.parametrize(
    ("method", "metric"), [("complete", "euclidean"), ("average", "euclidean"), ("cosine", "cosine")]
)
@pytest.mark.parametrize("clusters", [1, 4, 30])
def test_the_other_linkages_are_sklearns(method: Method, metric: str, clusters: int) -> None:
    from sklearn.cluster import AgglomerativeClustering

    linkage = "average" if method == "cosine" else method
    for seed in range(3):
        matrix = normal(40, 4, seed=seed)
        peer = AgglomerativeClustering(clusters, linkage=linkage, metric=metric).fit(matrix)
        assert Partition(cluster(matrix, method, clusters)) == Partition(peer.labels_)


@pytest.mark.parametrize("method", LINKAGES)
def test_heights_never_fall(method: Method) -> None:
    for matrix in MATRICES.values():
        assert (np.diff(Dendrogram.of(matrix, method).heights) >= 0).all()


def test_the_similarity_is_the_papers() -> None:
    matrix = normal(7, 4)
    got = similarity(matrix)
    for i, j in itertools.product(range(7), repeat=2):
        norms = math.fsum(x * x for x in matrix[i]), math.fsum(x * x for x in matrix[j])
        expected = math.fsum(a * b for a, b in zip(matrix[i], matrix[j], strict=True)) / max(norms)
        assert got[i, j] == pytest.approx(expected, rel=1e-13, abs=1e-15)
    assert (similarity(np.zeros((2, 3))) == 0).all()


def test_affinity_is_affinity_propagation_on_that_similarity() -> None:
    from sklearn.cluster import AffinityPropagation

    matrix = INPUTS.read(planted(0, noise=0.01)[0].fc.detach()).double().numpy()
    for preference in (0.6, 0.8):
        peer = AffinityPropagation(affinity="precomputed", preference=preference, random_state=0).fit(
            similarity(matrix)
        )
        assert Partition(cluster(matrix, "affinity", None, preference=preference)) == Partition(peer.labels_)


def test_affinity_that_does_not_converge_is_refused_by_name() -> None:
    """On a regular pentagon no corner is a better exemplar than its neighbours: the messages oscillate for ever."""
    angles = np.arange(5) * 2 * np.pi / 5
    groups = np.column_stack([np.cos(angles), np.sin(angles)])
    with pytest.raises(
        PlanError, match=r"fc\[inputs\]: method 'affinity': expected .* to converge on 5 .* use method="
    ):
        discover(inputs_of(groups), {"fc": INPUTS}, method="affinity", preference=-0.5)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [(np.ones((1, 3)), [0]), (np.eye(2), [0, 1]), (np.ones((2, 2)), [0, 0]), (np.eye(5), [*range(5)])],
)
def test_affinity_of_groups_all_alike_is_what_the_preference_says(
    groups: NDArray[np.float64], expected: list[int]
) -> None:
    assert labels_of(discover(inputs_of(groups), {"fc": INPUTS}, method="affinity")).tolist() == expected


def test_kmeans_takes_equal_groups_as_one() -> None:
    plan = discover(inputs_of(duplicated(0)), {"fc": INPUTS}, method="kmeans", clusters=20)
    assert plan.ties[0].partition == Partition(np.unique(duplicated(0), axis=0, return_inverse=True)[1].reshape(-1))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_plan_and_draws_nothing_from_outside(method: Method) -> None:
    model = inputs_of(normal(30, 6) + np.repeat(2 * normal(10, 6, seed=9), 3, axis=0))
    options = {} if method == "affinity" else {"clusters": 7}
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002  it is this state that stays
    plans = [discover(model, {"fc": INPUTS}, method=method, seed=3, **options) for _ in range(3)]
    assert plans[0] == plans[1] == plans[2]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


# ---------------------------------------------------------------- support and keep


def test_the_support_is_relative_to_the_largest_norm() -> None:
    """The bound itself is pruned; other parameters don't count."""
    groups = np.diag([8.0, 4.0, 2.0, 1.0, 0.0])
    model = Layers(fc=groups.T, other=100 * groups)
    for support, kept in [(0.0, 4), (0.124, 4), (0.125, 3), (0.25, 2), (0.49, 2), (0.5, 1), (0.99, 1)]:
        plan = discover(model, {"fc": INPUTS, "other": OUTPUTS}, support=support)
        for at in (0, 1):
            assert labels_of(plan, at).tolist() == [*range(kept), *[-1] * (5 - kept)], support


def test_noise_in_place_of_zeros_is_pruned_and_groups_stay_apart() -> None:
    model, partition = planted(0, noise=0.01)
    labels = labels_of(discover(model, {"fc": INPUTS}))
    assert np.array_equal(labels < 0, partition.labels < 0)
    assert len(set(labels.tolist())) == 1 + (partition.labels >= 0).sum()


@pytest.mark.parametrize("keep", [1, 3, 20, 59, 60, 500])
def test_keep_keeps_the_groups_of_largest_norm(keep: int) -> None:
    weight = normal(5, 60)
    norms = np.sqrt(np.square(weight).sum(0))
    for given in (keep, {"fc": keep}, {("fc", INPUTS): keep}):
        labels = labels_of(discover(Layers(fc=weight), {"fc": INPUTS}, keep=given, support=0.0))
        assert (labels >= 0).sum() == min(keep, 60)
        assert norms[labels >= 0].min() >= norms[labels < 0].max(initial=0)


def test_keep_and_clusters_go_together() -> None:
    plan = discover(Layers(fc=normal(5, 60)), {"fc": INPUTS}, keep=20, clusters=6)
    assert (plan.ties[0].partition.classes, plan.ties[0].partition.pruned) == (6, 40)


# ---------------------------------------------------------------- several readings of one parameter


def two_layers(seed: int = 0) -> Layers:
    random = np.random.default_rng(seed)
    return Layers(
        wide=(random.normal(size=(12, 20)) * random.uniform(0.05, 1, (12, 1))).astype(np.float32),
        conv=(random.normal(size=(10, 8, 3, 3)) * random.uniform(0.05, 1, (8, 1, 1))).astype(np.float32),
        bias=random.normal(size=5),
    )


BOTH = {"wide": (OUTPUTS, INPUTS), "conv": (INPUTS, OUTPUTS)}


@pytest.mark.parametrize(
    "options",
    [{"distortion": 0.2}, {"distortion": 0.6, "method": "average"}, {"clusters": 4}, {"keep": 5}, {"support": 0.4}],
)
def test_outputs_are_pruned_before_inputs_are_looked_at(options: dict[str, Any]) -> None:
    """What outputs lost is zero for the inputs; a budget leaves the inputs as many values as there are units."""
    model = two_layers()
    plan = discover(model, BOTH, **options)
    assert [str(tie.members[0]) for tie in plan] == ["wide[outputs]", "wide[inputs]", "conv[outputs]", "conv[inputs]"]
    for name, outputs, inputs in (("wide", 0, 1), ("conv", 2, 3)):
        without = copy.deepcopy(model)
        with torch.no_grad():
            without.get_parameter(name)[labels_of(plan, outputs) < 0] = 0
        alone = discover(without, {name: INPUTS}, **options).ties[0]
        if "distortion" in options:
            kept = len(alone.partition) - alone.partition.pruned
            values = max(alone.partition.classes, min(plan.ties[outputs].partition.classes, kept))
            method = options.get("method", "ward")
            alone = discover(without, {name: INPUTS}, clusters=values, method=method).ties[0]
        assert alone == plan.ties[inputs]


def test_one_number_for_all_leaves_outputs_untied_unless_named() -> None:
    model = two_layers()
    plan = discover(model, BOTH, clusters=4)
    assert [tie.partition.classes for tie in plan] == [12, 4, 10, 4]
    named = discover(model, BOTH, clusters={"wide": 3, ("conv", INPUTS): 2})
    assert [tie.partition.classes for tie in named] == [3, 3, 10, 2]


def test_a_list_of_groups_is_as_good_as_a_tuple() -> None:
    assert discover(two_layers(), {"wide": [INPUTS, OUTPUTS]}) == discover(two_layers(), {"wide": (OUTPUTS, INPUTS)})


# ---------------------------------------------------------------- budgets


def give_up(plan: TiePlan, model: nn.Module) -> list[float]:
    """‖W − PW‖² ÷ ‖W‖² of each tie in turn, W being what the ties before left, pruned groups being zero; float64."""
    current = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    shares: list[float] = []
    for tie in plan:
        name, groups = tie.members[0].parameter, tie.members[0].groups
        matrix, labels = groups.read(current[name]), torch.tensor(tie.partition.labels.tolist())
        projected, pruned = matrix.clone(), matrix.clone()
        for label in labels.unique().tolist():
            projected[labels == label] = 0.0 if label < 0 else matrix[labels == label].mean(0)
        pruned[labels < 0] = 0
        shares.append(float((matrix - projected).square().sum() / matrix.square().sum()))
        current[name] = groups.write(pruned, current[name].shape)
    return shares


SLACK = 1e-11


def law_distortion(find: Discover, method: Method, asked: float) -> None:
    """As much as is allowed and no more: not one merge, or one output, further."""
    for seed in range(3):
        model = two_layers(seed)
        for groups in ({"wide": INPUTS}, {"conv": INPUTS}, {"wide": OUTPUTS}, BOTH):
            plan = find(model, groups, distortion=asked, method=method, support=0.0)
            assert max(give_up(plan, model)) <= asked + SLACK
            last = plan.ties[-1]
            kind, kept = last.members[0].groups, last.partition.classes
            if kept > 1 and len(plan) == 1:
                further = {"clusters": kept - 1} if kind == INPUTS else {"keep": kept - 1}
                assert give_up(discover(model, groups, method=method, support=0.0, **further), model)[0] > asked
            if kind == OUTPUTS:
                assert last.partition.classes == (last.partition.labels >= 0).sum()


@pytest.mark.parametrize("asked", [0.0, 0.003, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("method", LINKAGES)
def test_the_distortion_is_kept_and_used_up(method: Method, asked: float) -> None:
    law_distortion(discover, method, asked)


def a_bit_too_far(model: nn.Module, groups: Any, *, distortion: float, **options: Any) -> TiePlan:
    return discover(model, groups, distortion=1.3 * distortion, **options)


def not_far_enough(model: nn.Module, groups: Any, *, distortion: float, **options: Any) -> TiePlan:
    return discover(model, groups, distortion=0.7 * distortion, **options)


@pytest.mark.parametrize("broken", [a_bit_too_far, not_far_enough])
def test_another_distortion_fails_the_law(broken: Discover) -> None:
    with pytest.raises(AssertionError):
        law_distortion(broken, "ward", 0.3)


def test_the_support_is_part_of_the_distortion() -> None:
    """It goes first; where it takes more than allowed, nothing is left to give up."""
    model = two_layers()
    for asked in (0.01, 0.3):
        plan = discover(model, {"conv": INPUTS}, distortion=asked, support=0.3)
        alone = give_up(discover(model, {"conv": INPUTS}, support=0.3), model)[0]
        assert give_up(plan, model)[0] <= max(asked, alone) + SLACK
        if alone > asked:
            assert plan.ties[0].partition.classes == (labels_of(plan) >= 0).sum()


def test_no_distortion_ties_what_is_equal_and_full_distortion_leaves_one() -> None:
    for seed in range(5):
        groups = duplicated(seed)
        model, distinct = inputs_of(groups), len(np.unique(groups, axis=0))
        assert discover(model, {"fc": INPUTS}, distortion=0.0).ties[0].partition.classes == distinct
        assert discover(model, {"fc": INPUTS}, distortion=1.0).ties[0].partition.classes == 1
    opposite = inputs_of(np.array([[0.1, 0.7], [-0.1, -0.7], [0.1, 0.7], [-0.1, -0.7], [0.0, 0.0]]))
    assert discover(opposite, {"fc": INPUTS}, distortion=1.0).ties[0].partition.classes == 1
    assert discover(opposite, {"fc": INPUTS}, distortion=0.0).ties[0].partition.classes == 2


def slow_bits(values: int) -> int:
    bits = 0
    while 2**bits < values:
        bits += 1
    return bits


def slow_values(plan: TiePlan, model: nn.Module) -> dict[str, int]:
    """Give every number of each parameter a name; equal numbers the same one; count the names."""
    counts: dict[str, int] = {}
    for name in {tie.members[0].parameter for tie in plan}:
        shape = model.get_parameter(name).shape
        names: list[Any] = [[] for _ in range(math.prod(shape))]
        for tie in plan:
            if tie.members[0].parameter == name:
                groups, labels = tie.members[0].groups, tie.partition.labels
                where = groups.read(torch.arange(math.prod(shape)).reshape(shape))
                for group, numbers in enumerate(where.tolist()):
                    for number in numbers:
                        names[number].append((str(groups), int(labels[group])))
        kernel = math.prod(shape[2:])
        counts[name] = len({(i % kernel, *n) for i, n in enumerate(names) if all(label >= 0 for _, label in n)})
    return counts


def slow_bytes(plan: TiePlan, model: nn.Module) -> int:
    total = sum(count * model.get_parameter(name).element_size() for name, count in slow_values(plan, model).items())
    for tie in plan:
        labels = tie.partition.labels.tolist()
        if tie.members[0].groups != OUTPUTS and len({x for x in labels if x >= 0}) < len(labels):
            total += math.ceil(len(labels) * slow_bits(len(set(labels))) / 8)
    return total


Fits = Callable[[TiePlan, nn.Module], bool]


@functools.cache
def every_step() -> list[TiePlan]:
    return [discover(two_layers(), BOTH, distortion=step / 1024) for step in range(1025)]


def law_budget(plan: TiePlan, fits: Fits) -> None:
    """The budget is met, and 1/1024 of the energy less would not have met it."""
    model = two_layers()
    assert fits(plan, model)
    equal = [step for step, each in enumerate(every_step()) if each == plan]
    assert any(step == 0 or not fits(every_step()[step - 1], model) for step in equal)


CASES: list[tuple[str, Any, Fits]] = [
    ("ratio", 1.0, lambda plan, m: True),
    ("ratio", 3.0, lambda plan, m: sum(slow_values(plan, m).values()) * 3.0 <= 960),
    ("ratio", 24.5, lambda plan, m: sum(slow_values(plan, m).values()) * 24.5 <= 960),
    ("bytes_", 100_000, lambda plan, m: True),
    ("bytes_", 1500, lambda plan, m: slow_bytes(plan, m) <= 1500),
    ("bytes_", 120, lambda plan, m: slow_bytes(plan, m) <= 120),
]


@pytest.mark.parametrize(("budget", "value", "fits"), CASES)
def test_budgets_are_met_and_used_up(budget: str, value: float, fits: Fits) -> None:
    model = two_layers()
    assert sum(model.get_parameter(name).numel() for name in BOTH) == 960
    plan = discover(model, BOTH, **{budget: value})
    law_budget(plan, fits)


def test_a_smaller_or_larger_plan_than_asked_fails_the_law() -> None:
    _, _, fits = CASES[1]
    with pytest.raises(AssertionError):
        law_budget(discover(two_layers(), BOTH, ratio=6), fits)
    with pytest.raises(AssertionError):
        law_budget(discover(two_layers(), BOTH, ratio=2), fits)


@pytest.mark.parametrize("method", LINKAGES)
def test_values_and_bytes_are_counted_as_the_slow_way_counts(method: Method) -> None:
    from tying.find.budget import count_bytes, count_values

    model = two_layers()
    parameters = dict(model.named_parameters())
    for share in (0.0, 0.02, 0.3, 0.7, 1.0):
        plan = discover(model, BOTH, distortion=share, method=method)
        assert count_values(plan, parameters) == sum(slow_values(plan, model).values())
        assert count_bytes(plan, parameters) == slow_bytes(plan, model)


def score(plan: TiePlan, model: nn.Module) -> float:
    return 1 - sum(give_up(plan, model))


@pytest.mark.parametrize("max_drop", [0.0, 0.01, 0.2])
def test_validate_gives_the_smallest_plan_that_is_good_enough(max_drop: float) -> None:
    """Good enough, and 1/256 of the energy more is not; the validation function sees plans for this model only."""
    model, seen = two_layers(), list[TiePlan]()

    def validate(plan: TiePlan) -> float:
        seen.append(plan)
        plan.check_fits(dict(model.named_parameters()))
        return score(plan, model)

    plan = discover(model, BOTH, validate=validate, max_drop=max_drop)
    untied = discover(model, BOTH, distortion=0.0)
    assert seen[0] == untied
    assert score(plan, model) >= score(untied, model) - max_drop
    steps = [discover(model, BOTH, distortion=step / 256) for step in range(257)]
    worse = [score(each, model) < score(untied, model) - max_drop for each in steps]
    at = max(step for step, each in enumerate(steps) if each == plan)
    assert worse[at + 1]


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(PlanError, match="validate: expected a score, got NaN"):
        discover(two_layers(), BOTH, validate=lambda _: math.nan)


# ---------------------------------------------------------------- the model, and what it may be

CALLS: dict[str, dict[str, Any]] = {
    "zero groups only": {},
    "clusters": {"clusters": 3},
    "k-means": {"clusters": 3, "method": "kmeans"},
    "affinity": {"method": "affinity"},
    "distortion": {"distortion": 0.3},
    "ratio": {"ratio": 6},
    "bytes": {"bytes_": 800},
    "validate": {"validate": lambda plan: -len(str(plan))},
}


def law_untouched(find: Discover, options: dict[str, Any]) -> None:
    model = two_layers().train()
    model.wide.sum().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    identities = {name: (id(p), p.data_ptr(), p._version) for name, p in model.named_parameters()}
    find(model, BOTH, **options)
    assert {name: (id(p), p.data_ptr(), p._version) for name, p in model.named_parameters()} == identities
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(model.wide.grad, torch.ones_like(model.wide))
    assert model.training


@pytest.mark.parametrize("name", CALLS)
def test_the_model_is_not_touched(name: str) -> None:
    law_untouched(discover, CALLS[name])


def pruning_as_it_goes(model: nn.Module, groups: Any, **options: Any) -> TiePlan:
    plan = discover(model, groups, **options)
    for name, value in plan.project(dict(model.named_parameters())).items():
        model.get_parameter(name).data.copy_(value)
    return plan


def test_touching_the_model_fails_the_law() -> None:
    with pytest.raises(AssertionError):
        law_untouched(pruning_as_it_goes, CALLS["clusters"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_are_read_in_float64(dtype: torch.dtype) -> None:
    """Short floats that hold the same numbers give the same plan; 16 bits overflow on the way to a norm."""
    model = two_layers().to(torch.bfloat16).to(torch.float32)
    with torch.no_grad():
        model.wide *= 2.0**9
    for options in ({"clusters": 4}, {"distortion": 0.3}):
        assert discover(copy.deepcopy(model).to(dtype), BOTH, **options) == discover(model, BOTH, **options)


def test_a_weight_with_two_names_has_two_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    assert discover(model, {"b.weight": INPUTS}).ties[0].members[0].parameter == "b.weight"


def test_where_the_plan_comes_from_is_written_in_it() -> None:
    plan = discover(two_layers(), BOTH, clusters=3, method="average", support=0.1)
    assert dict(plan.provenance) == {"discover": "average, support 0.1"}


# ---------------------------------------------------------------- bad input


def spoilt(value: float) -> Layers:
    weight = normal(4, 6)
    weight[2, 3] = value
    return Layers(fc=weight)


def three() -> Layers:
    return Layers(fc=np.array([[3.0, 0, 2, 0, 1], [3.0, 0, 2, 0.01, 1]]), other=normal(4, 3))


@pytest.mark.parametrize(
    ("model", "groups", "options", "message"),
    [
        (three, {"fc9": INPUTS}, {}, "fc9: expected a parameter of the model, .* the model has fc, other: name"),
        (lambda: Layers(), {"fc": INPUTS}, {}, "fc: expected a parameter .* the model has no parameters"),
        (three, {}, {}, "groups: expected at least one parameter, got none; name one"),
        (lambda: spoilt(math.nan), {"fc": INPUTS}, {}, "fc: expected finite .* torch.float64 with 1 NaN or inf; train"),
        (lambda: spoilt(-math.inf), {"fc": INPUTS}, {"ratio": 2}, "fc: expected finite floating-point weights"),
        (two_layers, {"bias": INPUTS}, {}, r"Groups.inputs\(\): expected a parameter with at least 2 dimension"),
        (three, {"fc": INPUTS}, {"clusters": 4}, r"fc\[inputs\]: clusters: expected 1 to 3, the number of non"),
        (three, {"fc": INPUTS}, {"clusters": 0}, r"fc\[inputs\]: clusters: expected 1 to 3, .* got 0; ask for fewer"),
        (three, {"fc": INPUTS}, {"clusters": 2, "keep": 1}, r"fc\[inputs\]: clusters: expected 1 to 1"),
        (three, {"fc": INPUTS}, {"clusters": 4, "method": "kmeans"}, r"fc\[inputs\]: clusters: expected 1 to 3"),
        (three, {"fc": INPUTS}, {"clusters": 2, "method": "affinity"}, r"fc\[inputs\]: clusters: expected None for"),
        (three, {"fc": INPUTS}, {"clusters": {"fc9": 2}}, r"clusters: expected keys among fc\[inputs\], got 'fc9'"),
        (three, {"fc": INPUTS}, {"keep": {("fc", OUTPUTS): 2}}, r"keep: expected keys among fc\[inputs\], got \('fc'"),
        (three, {"fc": INPUTS}, {"keep": 0}, r"keep: expected at least 1 group of fc\[inputs\], got 0"),
        (lambda: Layers(fc=np.zeros((2, 3))), {"fc": INPUTS}, {}, r"fc\[inputs\]: expected a group .* got 3 zero"),
        (lambda: Layers(fc=np.zeros((2, 0))), {"fc": INPUTS}, {}, r"fc\[inputs\]: expected a group .* got 0 zero"),
        (three, {"fc": INPUTS}, {"support": 1.0}, r"support: expected a relative norm in \[0, 1\), got 1.0"),
        (three, {"fc": INPUTS}, {"support": -0.1}, "support: expected a relative norm"),
        (three, {"fc": INPUTS}, {"support": math.nan}, "support: expected a relative norm"),
        (three, {"fc": INPUTS}, {"method": "median"}, "method: expected one of .*'ward'.* got 'median'; pick"),
        (three, {"fc": INPUTS}, {"method": "median", "clusters": 2}, "method: expected one of"),
        (three, {"fc": INPUTS}, {"method": "kmeans", "ratio": 2}, "method: expected a linkage .* got 'kmeans'; use"),
        (three, {"fc": INPUTS}, {"ratio": 2, "bytes_": 9}, "clusters, distortion, ratio, bytes_, validate: expected"),
        (three, {"fc": INPUTS}, {"ratio": 2, "clusters": 2}, "clusters, .*: expected at most one of them, got several"),
        (three, {"fc": INPUTS}, {"distortion": 1.1}, r"distortion: expected a share in \[0, 1\], got 1.1"),
        (three, {"fc": INPUTS}, {"distortion": -0.1}, "distortion: expected a share"),
        (three, {"fc": INPUTS}, {"distortion": math.nan}, "distortion: expected a share"),
        (three, {"fc": INPUTS}, {"ratio": 6}, "ratio=6: expected a budget that one value per member meets, got less"),
        (three, {"fc": INPUTS}, {"bytes_": 3}, "bytes_=3: expected a budget that one value per member meets"),
        (three, {"fc": INPUTS}, {"ratio": 0.5}, "ratio: expected a finite number ≥ 1, got 0.5; 24 is"),
        (three, {"fc": INPUTS}, {"ratio": math.nan}, "ratio: expected a finite number ≥ 1, got nan"),
        (three, {"fc": INPUTS}, {"bytes_": 0}, "bytes_: expected a finite number ≥ 1, got 0; 20000 is"),
        (three, {"fc": INPUTS}, {"validate": len, "max_drop": -0.1}, "max_drop: expected a finite number ≥ 0"),
        (three, {"fc": INPUTS}, {"validate": lambda plan: None}, "validate: expected a score, got None; return"),
        (three, {"fc": INPUTS}, {"clusters": 784 / 24}, "clusters: expected a whole number or None, got 32.6.*; round"),
        (three, {"fc": INPUTS}, {"keep": {"fc": "2"}}, "keep: expected a whole number or None, got '2'; round"),
        (three, {"fc": ()}, {}, "groups: expected at least one parameter, got none; name one"),
        (three, {"fc": "inputs"}, {}, r"expected a parameter's name and its Groups, got 'fc' and .*Groups\.inputs\(\)"),
        (three, ["fc"], {}, "groups: expected Groups by parameter name, got list; write for instance"),
        (three, {"fc": (INPUTS, INPUTS)}, {}, r"fc\[inputs\]: expected one tie, got several"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name_and_the_model_stays(
    model: Callable[[], nn.Module], groups: Any, options: dict[str, Any], message: str
) -> None:
    given = model()
    before = copy.deepcopy(given.state_dict())
    with pytest.raises(PlanError, match=message):
        discover(given, groups, **options)
    for name, value in given.state_dict().items():
        assert torch.equal(value, before[name]) or torch.equal(value.isnan(), before[name].isnan())


def test_integers_are_no_weights() -> None:
    model = nn.Module()
    model.register_parameter("fc", nn.Parameter(torch.ones(2, 3, dtype=torch.int8), requires_grad=False))
    with pytest.raises(PlanError, match=r"fc: expected finite floating-point weights, got torch.int8 with 0 NaN"):
        discover(model, {"fc": INPUTS})
