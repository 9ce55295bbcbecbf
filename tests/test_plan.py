"""Partitions and plans against dense matrices: a projector, its halves transposes; files whole, equal and refused."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from failing_disk import law_a_full_disk_leaves_the_old_file, law_ctrl_c_leaves_the_old_file, small_disk
from tying import store
from tying.enforce import compact, tie_
from tying.errors import FileError, PlanError
from tying.files.sealed import KEY, seal
from tying.groups import Groups
from tying.plan import KIND, VERSION, Member, Partition, Tie, TiePlan

INPUTS, OUTPUTS = Groups.inputs(), Groups.outputs()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random_labels(count: int, classes: int, seed: int) -> list[int]:
    """Labels with holes, some −1, in no order."""
    return [int(x) for x in np.random.default_rng(seed).choice([-1, *range(3, 3 + 2 * classes, 2)], count)]


LABELS = {
    "none": [],
    "one": [4],
    "one, pruned": [-1],
    "all pruned": [-1, -1, -1],
    "all tied": [9, 9, 9, 9],
    "all apart": [3, 1, 2, 0],
    "mixed": [7, -1, 7, 3, 3, 7, -1, 0],
    "huge names": [2**62, 5, -1, 2**62],
    **{f"random {classes} of 40": random_labels(40, classes, classes) for classes in (1, 2, 7, 39)},
}


# ---------------------------------------------------------------- partitions


def slow_canonical(labels: list[int]) -> list[int]:
    names: dict[int, int] = {}
    return [-1 if label < 0 else names.setdefault(label, len(names)) for label in labels]


def membership(labels: list[int]) -> Tensor:
    """The dense 0/1 matrix of `expand`: `(G, K)`."""
    canonical = slow_canonical(labels)
    matrix = torch.zeros(len(labels), max(canonical, default=-1) + 1, dtype=torch.float64)
    for group, label in enumerate(canonical):
        if label >= 0:
            matrix[group, label] = 1
    return matrix


def law_partition(make: Callable[[list[int]], Partition], labels: list[int]) -> None:
    p, expand = make(labels), membership(labels)
    groups, classes = expand.shape
    matrix, other = torch.randn(groups, 3, dtype=torch.float64), torch.randn(groups, 3, dtype=torch.float64)
    values = torch.randn(classes, 3, dtype=torch.float64)
    assert p.labels.tolist() == slow_canonical(labels)
    assert (len(p), p.classes, p.sizes.tolist()) == (groups, classes, expand.sum(0).tolist())
    assert p.pruned == sum(label < 0 for label in labels)
    close = {"rtol": 1e-13, "atol": 1e-13}
    torch.testing.assert_close(p.expand(values), expand @ values, **close)
    torch.testing.assert_close(p.reduce(matrix), expand.T @ matrix, **close)
    torch.testing.assert_close((p.expand(values) * matrix).sum(), (values * p.reduce(matrix)).sum(), **close)
    torch.testing.assert_close(p.project(matrix), expand @ torch.linalg.pinv(expand) @ matrix, **close)
    torch.testing.assert_close(p.mean(p.expand(values)), values, **close)
    torch.testing.assert_close(p.project(p.project(matrix)), p.project(matrix), **close)
    torch.testing.assert_close((p.project(matrix) * other).sum(), (matrix * p.project(other)).sum(), **close)


@pytest.mark.parametrize("name", LABELS)
def test_expand_and_reduce_are_transposes_and_project_is_the_projector_on_equal_groups(name: str) -> None:
    law_partition(Partition, LABELS[name])


class SumsOnly(Partition):
    """Replaces each group by the sum of its label."""

    __slots__ = ()

    def mean(self, matrix: Tensor) -> Tensor:
        return self.reduce(matrix)


class KeepsPruned(Partition):
    """Leaves pruned groups as they are."""

    __slots__ = ()

    def project(self, matrix: Tensor) -> Tensor:
        return torch.where(torch.tensor(self.labels < 0)[:, None], matrix, super().project(matrix))


class TakesTheFirst(Partition):
    """A projector, but not an orthogonal one: each group becomes the first of its label."""

    __slots__ = ()

    def mean(self, matrix: Tensor) -> Tensor:
        firsts = [self.labels.tolist().index(label) for label in range(self.classes)]
        return matrix[firsts]


@pytest.mark.parametrize("broken", [SumsOnly, KeepsPruned, TakesTheFirst])
def test_broken_partitions_fail_the_law(broken: type[Partition]) -> None:
    with pytest.raises(AssertionError):
        law_partition(broken, LABELS["mixed"])


class RankedBySize(Partition):
    """Labels renamed in order of their numbers, not of their appearance."""

    __slots__ = ()

    def __init__(self, labels: list[int]) -> None:
        super().__init__(labels)
        self.labels = np.unique(labels, return_inverse=True)[1]


def test_labels_ranked_by_size_fail_the_law() -> None:
    with pytest.raises(AssertionError):
        law_partition(RankedBySize, [3, 3, 1])


def law_short_floats(project: Callable[[Partition, Tensor], Tensor], dtype: torch.dtype) -> None:
    """Nothing overflows, the mean is right to the last bit, and equal groups keep their bits."""
    p = Partition([0] * 300 + [1] * 7 + [-1])
    matrix = torch.full((308, 2), 400.0) + torch.randn(308, 2)
    matrix = matrix.to(dtype)
    once = project(p, matrix)
    assert once.dtype == dtype
    exact = torch.tensor([[math.fsum(matrix[:300, d].tolist()) / 300 for d in (0, 1)]], dtype=torch.float64).to(dtype)
    assert torch.equal(once[:1], exact)
    assert torch.equal(project(p, once), once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_short_floats_are_averaged_in_long_ones(dtype: torch.dtype) -> None:
    law_short_floats(Partition.project, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_averaging_short_floats_fails_the_law(dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError):
        law_short_floats(lambda p, m: p.expand(p.reduce(m) / torch.tensor(p.sizes[:, None]).to(m.dtype)), dtype)


def test_gradients_go_through_the_projection() -> None:
    p = Partition(LABELS["mixed"])
    matrix = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(p.project, matrix)
    assert torch.autograd.gradcheck(p.reduce, matrix)
    assert torch.autograd.gradcheck(p.expand, torch.randn(3, 2, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ([0, 1, 0, -1], [5, 2, 5, -1], True),
        ([0, 1, 0, -1], [1, 0, 1, -1], True),
        ([0, 1, 0, -1], [0, 1, 1, -1], False),
        ([0, 1, 0, -1], [0, 1, 0, 2], False),
        ([0, 1, 0], [0, 1, 0, -1], False),
        ([], [], True),
    ],
)
def test_partitions_are_equal_when_they_say_the_same(one: list[int], other: list[int], equal: bool) -> None:
    assert (Partition(one) == Partition(other)) is equal
    assert (hash(Partition(one)) == hash(Partition(other))) is equal
    assert Partition(np.array(one, dtype=np.int16)) == Partition(torch.tensor(one, dtype=torch.int32))


@pytest.mark.parametrize(
    "copied", [lambda p: p, copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=range(4)
)
def test_a_partition_does_not_change(copied: Callable[[Partition], Partition]) -> None:
    given = np.array([0, 0, 1])
    p = copied(Partition(given))
    given[:] = 5
    assert p.labels.tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="read-only"):
        p.labels[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        p.sizes[0] = 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -2], r"labels: expected −1 \(pruned\) or a label ≥ 0, got -2; use −1"),
        ([0.0, 1.0], "labels: expected one integer per group, got .* dtype float64; pass a flat list"),
        ([[0, 1]], r"labels: expected one integer per group, got an array of shape \(1, 2\)"),
        (3, r"labels: expected one integer per group, got an array of shape \(\)"),
        (["a", "b"], "labels: expected one integer per group"),
        ([True, False], "labels: expected one integer per group, got .* bool"),
        ([[0], [0, 1]], "labels: expected one integer per group"),
        ([None, 1], "labels: expected one integer per group, got .* object"),
        (torch.ones(2, requires_grad=True), "labels: expected one integer per group"),
    ],
)
def test_what_are_no_labels_is_refused(labels: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Partition(labels)  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------- plans


def parameters() -> dict[str, Tensor]:
    shapes = {"a.weight": (6, 8), "b.weight": (8, 3), "c.weight": (4, 6, 1, 2), "d.weight": (3, 6), "a.bias": (6,)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def across(*members: tuple[str, Groups], labels: list[int]) -> Tie:
    return Tie(tuple(Member(*member) for member in members), Partition(labels))


PLANS = {
    "nothing": TiePlan(),
    "inputs": TiePlan([Tie.of("a.weight", INPUTS, LABELS["mixed"])]),
    "inputs and outputs": TiePlan(
        [
            Tie.of("c.weight", INPUTS, [0, 1, 0, -1, 2, 1]),
            Tie.of("c.weight", OUTPUTS, [0, -1, 1, 0]),
            Tie.of("a.weight", OUTPUTS, [0, 0, 1, 1, -1, 1]),
        ]
    ),
    "filters": TiePlan([Tie.of("c.weight", Groups.filters(), [i % 5 - 1 for i in range(24)])]),
    "elements and whole": TiePlan(
        [Tie.of("a.bias", Groups.elements(), [0, 0, 1, -1, 1, 0]), Tie.of("b.weight", Groups.whole(), [-1])]
    ),
    "transposed, across layers": TiePlan(
        [across(("b.weight", OUTPUTS), ("d.weight", INPUTS), labels=[*range(8), 0, 1, 2, -1, 4, 7])]
    ),
}


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([values[name].flatten() for name in sorted(values)])


def slow_projector(plan: TiePlan) -> Tensor:
    """Dense, over all numbers of all parameters: the projector on {W : every tie of the plan holds}.

    Each tie says that some differences are zero, and some numbers: the projector on the null space of what it says.
    """
    zeros = {name: torch.zeros_like(tensor) for name, tensor in parameters().items()}
    numbers = {name: torch.arange(tensor.numel()).reshape(tensor.shape) for name, tensor in zeros.items()}
    start = 0
    for name in sorted(numbers):
        numbers[name] += start
        start += numbers[name].numel()
    said: list[Tensor] = []
    for tie in plan:
        where = torch.cat([member.groups.read(numbers[member.parameter]) for member in tie.members])
        first: dict[int, int] = {}
        for group, label in enumerate(tie.partition.labels.tolist()):
            for d in range(where.shape[1]):
                equation = torch.zeros(start, dtype=torch.float64)
                equation[where[group, d]] += 1
                if label >= 0:
                    equation[where[first.setdefault(label, group), d]] -= 1
                if equation.any():
                    said.append(equation)
    if not said:
        return torch.eye(start, dtype=torch.float64)
    _, singular, right = torch.linalg.svd(torch.stack(said), full_matrices=False)
    right = right[singular > 1e-9]
    return torch.eye(start, dtype=torch.float64) - right.T @ right


Project = Callable[[TiePlan, dict[str, Tensor]], dict[str, Tensor]]


def law_plan(project: Project, plan: TiePlan) -> None:
    given = parameters()
    before = {name: tensor.clone() for name, tensor in given.items()}
    got = project(plan, given)
    assert set(got) == {member.parameter for tie in plan for member in tie.members}
    assert all(torch.equal(given[name], before[name]) for name in given)
    expected = slow_projector(plan) @ flat(given)
    torch.testing.assert_close(flat({**given, **got}), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_projects_orthogonally_on_what_it_says(name: str) -> None:
    law_plan(TiePlan.project, PLANS[name])


@pytest.mark.parametrize("name", PLANS)
def test_the_order_of_ties_does_not_matter(name: str) -> None:
    law_plan(lambda plan, given: TiePlan(tuple(plan)[::-1]).project(given), PLANS[name])


def the_last_tie_only(plan: TiePlan, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tie applied to the given weights: the last one of a parameter wins."""
    return {k: v for tie in plan for k, v in tie.split(tie.partition.project(tie.matrix(given)), given).items()}


def members_apart(plan: TiePlan, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each member averaged by itself."""
    result: dict[str, Tensor] = {}
    for tie in plan:
        start = 0
        for member in tie.members:
            matrix = member.groups.read(result.get(member.parameter, given[member.parameter]))
            labels = tie.partition.labels[start : start + len(matrix)]
            start += len(matrix)
            shape = given[member.parameter].shape
            result[member.parameter] = member.groups.write(Partition(labels).project(matrix), shape)
    return result


def in_place(plan: TiePlan, given: dict[str, Tensor]) -> dict[str, Tensor]:
    got = plan.project(given)
    for name, value in got.items():
        given[name].copy_(value)
    return got


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        (the_last_tie_only, "inputs and outputs"),
        (members_apart, "transposed, across layers"),
        (in_place, "inputs"),
    ],
)
def test_broken_projections_fail_the_law(broken: Project, name: str) -> None:
    with pytest.raises(AssertionError):
        law_plan(broken, PLANS[name])


@pytest.mark.parametrize(
    "ties",
    [
        [Tie.of("a.weight", INPUTS, [0] * 8), Tie.of("a.weight", Groups.elements(), random_labels(48, 5, 0))],
        [Tie.of("c.weight", OUTPUTS, [0] * 4), Tie.of("c.weight", Groups.filters(), random_labels(24, 3, 0))],
        [
            across(("b.weight", OUTPUTS), ("d.weight", INPUTS), labels=[0] * 14),
            Tie.of("b.weight", INPUTS, [0, 0, 1]),
        ],
        [across(("a.weight", Groups.filters()), ("a.weight", Groups.elements()), labels=[0] * 96)],
    ],
)
def test_ties_that_would_undo_each_other_are_not_projected_on(ties: list[Tie]) -> None:
    """One after the other does not give what both say: the oracle shows it."""
    given = parameters()
    result: dict[str, Tensor] = {}
    for tie in ties:
        current = {**given, **result}
        result.update(tie.split(tie.partition.project(tie.matrix(current)), current))
    difference = flat({**given, **result}) - slow_projector(TiePlan(ties)) @ flat(given)
    name = ties[0].members[0].parameter
    if len(ties) > 1:
        assert difference.abs().max() > 1e-3
    with pytest.raises(PlanError, match=rf"{name}: expected one tie, or one over its inputs .*; merge their labels"):
        TiePlan(ties).project(given)


def test_plans_are_values() -> None:
    plan = TiePlan([Tie.of("a.weight", INPUTS, [0, 0, 1]), Tie.of("b.weight", OUTPUTS, [0, -1])], {"by": "hand"})
    renamed = TiePlan((Tie.of("a.weight", INPUTS, [8, 8, 2]), Tie.of("b.weight", OUTPUTS, [6, -1])), {"by": "machine"})
    assert plan == renamed
    assert hash(plan) == hash(renamed)
    assert plan != TiePlan(tuple(plan)[:1])
    assert plan != TiePlan([Tie.of("a.weight", OUTPUTS, [0, 0, 1]), tuple(plan)[1]])
    assert (len(plan), list(plan)) == (2, [plan.ties[0], plan.ties[1]])
    assert TiePlan(tuple(plan)[:1], {"x": "1"}) + TiePlan(tuple(plan)[1:], {"y": "2"}) == plan
    assert dict((TiePlan((), {"x": "1"}) + TiePlan((), {"y": "2"})).provenance) == {"x": "1", "y": "2"}
    with pytest.raises(TypeError):
        plan.provenance["by"] = "me"  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_plans_can_be_copied(copied: Callable[[TiePlan], TiePlan]) -> None:
    plan = TiePlan([Tie.of("a.weight", INPUTS, [0, 0, 1, -1])], {"by": "hand"})
    assert copied(plan) == plan
    assert str(copied(plan)) == str(plan)


def test_a_plan_can_be_read() -> None:
    plan = TiePlan([Tie.of("a.weight", INPUTS, [0, 0, 1, -1]), *PLANS["transposed, across layers"]], {"by": "hand"})
    assert str(plan).splitlines() == [
        "TiePlan (by: hand)",
        "  a.weight[inputs]: 4 groups → 2 values, 1 pruned",
        "  b.weight[outputs] ~ d.weight[inputs]: 14 groups → 8 values, 1 pruned",
    ]
    assert str(TiePlan()) == "TiePlan"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tie((), Partition([])), "Tie.members: expected at least one, got none; name the parameter"),
        (
            lambda: across(("a", INPUTS), ("a", INPUTS), labels=[0, 0]),
            r"Tie.members: expected distinct members, got a\[inputs\] ~ a\[inputs\]; name each member once",
        ),
        (
            lambda: TiePlan([Tie.of("a", INPUTS, [0]), Tie.of("b", INPUTS, [0]), Tie.of("a", INPUTS, [1])]),
            r"a\[inputs\]: expected one tie, got several; merge",
        ),
        (lambda: Tie.of("a", "inputs", [0]), r"Member: .* got 'a' and 'inputs'; .* Groups\.inputs\(\)"),  # pyright: ignore
        (lambda: TiePlan([], {"at": 3}), r"provenance: expected text by name, got \{'at': 3\}"),  # pyright: ignore
    ],
)
def test_what_is_no_plan_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()


# ---------------------------------------------------------------- a plan for another model


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


MISFITS = {
    "no such parameter": (
        TiePlan([Tie.of("0.weight", INPUTS, [0, 0, 1, 1]), Tie.of("fc9.weight", INPUTS, [0, 0])]),
        r"fc9\.weight: expected a parameter of the model, got none .* the model has 0\.weight, 0\.bias, 2\.weight, 2\.",
    ),
    "too few labels": (
        TiePlan([Tie.of("2.weight", INPUTS, [0, 0, 1]), Tie.of("0.weight", INPUTS, [0, 0, 1])]),
        r"0\.weight\[inputs\]: expected 4 labels, one per group, got 3; the plan was made for another model",
    ),
    "too many labels": (
        TiePlan([Tie.of("0.weight", OUTPUTS, [0, 0, 1, 1])]),
        r"0\.weight\[outputs\]: expected 3 labels, one per group, got 4",
    ),
    "no such groups": (
        TiePlan([Tie.of("0.bias", INPUTS, [0])]),
        r"0\.bias: Groups\.inputs\(\): expected a parameter with at",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
@pytest.mark.parametrize(
    "use",
    [
        lambda plan, m: plan.check_fits(dict(m.named_parameters())),
        lambda plan, m: plan.project(dict(m.named_parameters())),
        lambda plan, m: compact(m, plan, torch.zeros(2, 4)),
        lambda plan, m: tie_(m, plan),
    ],
    ids=["check_fits", "project", "compact", "tie_"],
)
def test_a_plan_for_another_model_is_refused_by_name_and_the_model_stays(
    use: Callable[[TiePlan, nn.Module], object], name: str
) -> None:
    plan, message = MISFITS[name]
    given = model()
    before, modules = copy.deepcopy(given.state_dict()), [type(m) for m in given.modules()]
    with pytest.raises(PlanError, match=message):
        use(plan, given)
    assert [type(m) for m in given.modules()] == modules
    assert list(given.state_dict()) == list(before)
    assert all(torch.equal(given.state_dict()[key], value) for key, value in before.items())


def test_members_keep_their_dtypes() -> None:
    given = {"a": torch.ones(2, 2), "b": torch.ones(2, 2, dtype=torch.float64)}
    projected = TiePlan([across(("a", INPUTS), ("b", INPUTS), labels=[0, 1, 0, 1])]).project(given)
    assert {name: value.dtype for name, value in projected.items()} == {"a": torch.float32, "b": torch.float64}


def test_members_of_unequal_length_are_refused() -> None:
    plan = TiePlan([across(("0.weight", INPUTS), ("2.weight", INPUTS), labels=[0] * 7)])
    with pytest.raises(
        PlanError, match=r"0\.weight\[inputs\] ~ 2\.weight\[inputs\]: expected members .*\(4, 3\), \(3, 2"
    ):
        plan.check_fits(dict(model().named_parameters()))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(1, torch.int8), (128, torch.int8), (129, torch.int16), (32768, torch.int16), (32769, torch.int32)],
)
def test_labels_of_every_size_come_back(classes: int, dtype: torch.dtype, tmp_path: Path) -> None:
    labels = np.random.default_rng(0).permutation(np.append(np.arange(classes), [-1, 0, classes - 1]))
    plan = TiePlan([Tie.of("a", INPUTS, labels)], {"by": "hand"})
    plan.save(tmp_path / "plan")
    assert load_file(tmp_path / "plan")["labels.0"].dtype == dtype
    again = TiePlan.load(tmp_path / "plan")
    assert again == plan
    assert dict(again.provenance) == {"by": "hand"}


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_comes_back(name: str, tmp_path: Path) -> None:
    PLANS[name].save(str(tmp_path / "plan"))
    assert TiePlan.load(str(tmp_path / "plan")) == PLANS[name]


@pytest.mark.parametrize("named", ["", "ä.weight", 'a"b', "a\nb", "名前"])
def test_any_name_comes_back(named: str, tmp_path: Path) -> None:
    plan = TiePlan(
        [Tie.of(named, INPUTS, [0, 1]), across((named, OUTPUTS), ("b", INPUTS), labels=[0, 0])], {named: named}
    )
    plan.save(tmp_path / "plan")
    again = TiePlan.load(tmp_path / "plan")
    assert (again, dict(again.provenance)) == (plan, {named: named})


def law_same_bytes(save: Callable[[TiePlan, Path], None], folder: Path) -> None:
    """Whatever the labels are called; and saving what was loaded changes nothing."""
    plans = [TiePlan([Tie.of("a", INPUTS, labels)], {"z": "1", "a": "2"}) for labels in ([0, 1, -1], [5, 2, -1])]
    written: set[bytes] = set()
    for plan in plans * 10:
        save(plan, folder / "plan")
        written.add((folder / "plan").read_bytes())
    save(TiePlan.load(folder / "plan") if len(written) == 1 else plans[0], folder / "plan")
    written.add((folder / "plan").read_bytes())
    assert len(written) == 1


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    law_same_bytes(TiePlan.save, tmp_path)


def several_metadata_keys(plan: TiePlan, path: Path) -> None:
    """Safetensors writes them in random order."""
    save_file({"labels.0": torch.tensor(plan.ties[0].partition.labels)}, path, {"a": "1", "b": "2", "c": "3"})


def test_the_obvious_metadata_fails_the_law_of_same_bytes(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        law_same_bytes(several_metadata_keys, tmp_path)


def test_nothing_of_a_plan_is_pickled(tmp_path: Path) -> None:
    PLANS["inputs"].save(tmp_path / "plan")
    with safe_open(str(tmp_path / "plan"), framework="pt") as file:
        assert list(file.metadata()) == [KEY]
        assert json.loads(file.metadata()[KEY])["ties"] == [[["a.weight", "inputs"]]]


def saved(path: Path) -> bytes:
    TiePlan([Tie.of("a.weight", INPUTS, [0, 0, 1, -1]), Tie.of("b.weight", OUTPUTS, [0, 1])], {"by": "me"}).save(path)
    return path.read_bytes()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    content = saved(path)
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(FileError, match="plan: expected"):
            TiePlan.load(path)


def test_a_byte_changed_anywhere_is_refused_or_without_effect(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    content = saved(path)
    plan = TiePlan.load(path)
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            read = TiePlan.load(path)
        except FileError:
            continue
        assert read == plan
        assert dict(read.provenance) == {"by": "me"}


def made_up(path: Path, record: object, labels: list[float] | None = None, version: int = VERSION) -> None:
    tensors = {} if labels is None else {"labels.0": torch.tensor(labels)}
    path.write_bytes(seal(tensors, record, kind=KIND, version=version))  # pyright: ignore[reportArgumentType]


def tie(*members: object, provenance: object = None) -> dict[str, object]:
    return {"ties": [list(members)], "provenance": provenance or {}}


GOOD = ["a", "inputs"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: save_file(model().state_dict(), p), "expected .* got an ordinary safetensors file"),
        (lambda p: store.save(model(), p), "expected tying.plan/1 or older, got tying.model/1; pass a file that Tie"),
        (lambda p: made_up(p, {}, version=2), "expected tying.plan/1 or older, got tying.plan/2; update tying"),
        (lambda p: torch.save(model().state_dict(), p), "truncated or no safetensors"),
        (lambda p: p.write_bytes(b""), "truncated or no safetensors"),
        (lambda p: p.mkdir(), "can't be read"),
        (lambda _: None, "can't be read"),
        (lambda p: made_up(p, {}), "expected a plan .* KeyError"),
        (lambda p: made_up(p, {"ties": 3, "provenance": {}}), "expected a plan .* TypeError"),
        (lambda p: made_up(p, tie(GOOD)), "expected a plan .*labels.0"),
        (lambda p: made_up(p, tie(["a"]), [0, 1]), "expected a plan .* ValueError"),
        (lambda p: made_up(p, tie(["a", "rows"]), [0, 1]), "expected a plan .* 'rows'"),
        (lambda p: made_up(p, tie(["a", ["rows"]]), [0, 1]), "expected a plan"),
        (lambda p: made_up(p, tie(), [0, 1]), "expected a plan .* at least one"),
        (lambda p: made_up(p, tie(GOOD, GOOD), [0, 1]), "expected a plan .* distinct members"),
        (lambda p: made_up(p, tie(GOOD, provenance=[3]), [0, 1]), "expected a plan"),
        (lambda p: made_up(p, tie(GOOD), [0, -2]), "expected a plan .* got -2"),
        (lambda p: made_up(p, tie(GOOD), [0.5]), "expected a plan .* float32"),
    ],
)
def test_what_is_no_plan_file_is_refused(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    make(tmp_path / "plan")
    with pytest.raises(FileError, match=rf"plan: .*{message}"):
        TiePlan.load(tmp_path / "plan")


# ---------------------------------------------------------------- whole or not at all

MANY_LABELS = """
import numpy as np
from tying import Groups, Tie, TiePlan
def write(path):
    TiePlan([Tie.of("a", Groups.inputs(), np.arange(100_000))]).save(path)
"""
MANY_BYTES = """
from pathlib import Path
from tying.files.atomic import write_atomically
def write(path):
    write_atomically(path, bytes(100_000_000))
"""
PLAINLY = """
from pathlib import Path
def write(path):
    Path(path).write_bytes(bytes(100_000_000))
"""
BESIDE_WITHOUT_CLEANING_UP = """
import os
from pathlib import Path
def write(path):
    Path(path + ".new").write_bytes(bytes(100_000_000))
    os.replace(path + ".new", path)
"""


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    law_a_full_disk_leaves_the_old_file(MANY_LABELS, tmp_path / "plan")


def test_ctrl_c_leaves_the_old_file(tmp_path: Path) -> None:
    law_ctrl_c_leaves_the_old_file(MANY_BYTES, tmp_path / "plan")


@pytest.mark.parametrize("code", [PLAINLY, BESIDE_WITHOUT_CLEANING_UP], ids=["plainly", "beside"])
def test_writing_in_other_ways_fails_the_laws(code: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        law_a_full_disk_leaves_the_old_file(code, tmp_path / "plan")
    for left in os.listdir(tmp_path):
        (tmp_path / left).unlink()
    with pytest.raises(AssertionError):
        law_ctrl_c_leaves_the_old_file(code, tmp_path / "plan")


def test_a_real_full_disk_leaves_the_old_plan(tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        content = saved(disk / "plan")
        with pytest.raises(OSError, match="No space left"):
            TiePlan([Tie.of("a", INPUTS, np.arange(100_000))]).save(disk / "plan")
        assert (disk / "plan").read_bytes() == content
        assert os.listdir(disk) == ["plan"]


def test_a_folder_that_is_not_there_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        PLANS["inputs"].save(tmp_path / "nowhere" / "plan")
