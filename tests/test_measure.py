"""What `measure` counts, against slow and obvious counts; what it leaves as it was; what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tying import store
from tying.enforce import tie_
from tying.errors import FileError, PlanError, TyingError
from tying.figures import Figures, Latency, Report
from tying.groups import Groups
from tying.measure import Sharing, measure, sharing
from tying.nn import TiedConv2d, TiedLinear
from tying.plan import Member, Partition, Tie, TiePlan

# ---------------------------------------------------------------- networks and what is known of them


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.BatchNorm1d(9), nn.Linear(9, 5, bias=False))


INPUTS = [0, 1, 1, -1, 2, 2, 0, 0, -1, 1, 2, 3]
OUTPUTS = [0, 1, 0, 2, 2, 2, -1, 0, 1]


def both() -> TiePlan:
    return TiePlan(
        [Tie.of("0.weight", Groups.inputs(), INPUTS), Tie.of("0.weight", Groups.outputs(), OUTPUTS)],
    )


def across() -> TiePlan:
    members = (Member("0.weight", Groups.inputs()), Member("3.weight", Groups.outputs()))
    return TiePlan([Tie(members, Partition([*INPUTS, 0, 5, -1, 2, 2]))])


def elements() -> TiePlan:
    return TiePlan([Tie.of("3.weight", Groups.elements(), [i % 4 - 1 for i in range(45)])])


def projected(plan: TiePlan, model: nn.Module | None = None) -> nn.Module:
    model = model or mlp()
    with torch.no_grad():
        for name, value in plan.project(dict(model.named_parameters())).items():
            model.get_parameter(name).copy_(value)
    return model


def tied_layers() -> nn.Module:
    model = mlp()
    model[0] = TiedLinear.from_linear(model[0], INPUTS)
    return model


def tied_in_place() -> nn.Module:
    model = mlp()
    tie_(model, both())
    return model


def pruned() -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model[0].weight[:, :5] = 0
        model[0].weight[2] = 0
    return model


def shared() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    return model


# network, plan, unique non-zero values, bits of values (zeros too) and of labels: by hand
REST = 9 + 9 + 9 + 45  # bias, BatchNorm, last weight
COUNTS: dict[str, tuple[Callable[[], nn.Module], TiePlan | None, int, int, int]] = {
    "dense": (mlp, None, 108 + REST - 9, 32 * (108 + REST), 0),  # BatchNorm's bias is 0
    "pruned": (pruned, None, 7 * 8 + REST - 9, 32 * (108 + REST), 0),
    "shared": (shared, None, 36 + 6 + 6, 32 * 48, 0),
    "TiedLinear": (tied_layers, None, 4 * 9 + REST - 9, 32 * (36 + REST), 12 * 3),
    "tie_": (tied_in_place, None, 4 * 3 + REST - 9, 32 * (12 + REST), 12 * 3 + 9 * 2),
    "in the values, both sides": (lambda: projected(both()), both(), 12 + REST - 9, 32 * (12 + REST), 12 * 3 + 9 * 2),
    "in the values, across": (
        lambda: projected(across()),
        across(),
        5 * 9 + REST - 9 - 45,
        32 * (5 * 9 + REST - 45),
        17 * 3,
    ),
    "in the values, elements": (
        lambda: projected(elements()),
        elements(),
        108 + 3 + 9 + 9,
        32 * (108 + 27 + 3),
        45 * 2,
    ),
    "bfloat16": (lambda: tied_layers().bfloat16(), None, 4 * 9 + REST - 9, 16 * (36 + REST), 12 * 3),
}


def slow_unique(model: nn.Module, plan: TiePlan) -> int:
    """Classes of single numbers that the plan makes equal, and that are not zero: one pass per tie until stable."""
    owner: dict[tuple[str, int], tuple[str, int]] = {}

    def root(x: tuple[str, int]) -> tuple[str, int]:
        while owner.setdefault(x, x) != x:
            x = owner[x]
        return x

    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        for i in range(parameter.numel()):
            root((name, i))
    for tie in plan:
        rows: list[list[tuple[str, int]]] = []
        for member in tie.members:
            shape = parameters[member.parameter].shape
            index = member.groups.read(torch.arange(shape.numel()).reshape(shape))
            rows += [[(member.parameter, int(i)) for i in row] for row in index]
        for i, one in enumerate(rows):
            for j, other in enumerate(rows[:i]):
                if tie.partition.labels[i] == tie.partition.labels[j] != -1:
                    for a, b in zip(one, other, strict=True):
                        owner[root(a)] = root(b)
    value = {(n, i): float(v) for n, p in parameters.items() for i, v in enumerate(p.detach().flatten())}
    return len({root(x) for x, v in value.items() if v != 0})


def plain_file(model: nn.Module, path: Path) -> int:
    seen: dict[int, str] = {}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen[id(tensor)] = name
            state[name] = tensor.detach().clone()
    save_file(state, path)
    return path.stat().st_size


Measure = Callable[..., Report]


def law_counts(case: str, folder: Path, measuring: Measure) -> None:
    build, plan, values, number_bits, label_bits = COUNTS[case]
    model, like = build(), nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 5)).double()
    report = measuring(model, like=like, plan=plan)
    numbers = 40 * 30 + 30 + 30 * 5 + 5
    assert report.parameters == numbers
    assert report.values == values
    assert report.values == slow_unique(model, plan or TiePlan())
    assert report.unique == pytest.approx(numbers / values)
    assert report.model.bits == number_bits + label_bits
    assert report.stored == pytest.approx(numbers * 64 / (number_bits + label_bits))
    store.save(model, folder / "a.safetensors", plan=plan)
    on_disk = (folder / "a.safetensors").stat().st_size
    assert report.file == pytest.approx(plain_file(like, folder / "b.safetensors") / on_disk)
    assert measuring(model, like=like, plan=plan, path=folder / "a.safetensors") == report
    alone = measuring(model, plan=plan)
    own = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert (alone.parameters, alone.like) == (own, None)
    assert alone.file == pytest.approx(plain_file(model, folder / "b.safetensors") / on_disk)


@pytest.mark.parametrize("case", COUNTS)
def test_counts(case: str, tmp_path: Path) -> None:
    law_counts(case, tmp_path, measure)


def with_zeros(*args: nn.Module, **options: object) -> Report:
    report = measure(*args, **options)
    model = report.model
    every = Figures(model.parameters, model.parameters, model.bits, model.bytes, model.plain_bytes)
    return Report(every, report.like, report.parameter_bits)


def without_labels(*args: nn.Module, **options: object) -> Report:
    report = measure(*args, **options)
    model = report.model
    free = Figures(model.parameters, model.values, model.values * 32, model.bytes, model.plain_bytes)
    return Report(free, report.like, report.parameter_bits)


def without_plan(*args: nn.Module, **options: object) -> Report:
    return measure(*args, **{**options, "plan": None})


def in_single_precision(*args: nn.Module, **options: object) -> Report:
    report = measure(*args, **options)
    return Report(report.model, report.like, report.parameters * 32)


@pytest.mark.parametrize(
    ("case", "broken"),
    [
        ("pruned", with_zeros),
        ("TiedLinear", without_labels),
        ("in the values, both sides", without_plan),
        ("in the values, across", without_plan),
        ("dense", in_single_precision),
    ],
)
def test_broken_counts_fail_the_law(case: str, broken: Measure, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        law_counts(case, tmp_path, broken)


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.Flatten(1))


@pytest.mark.parametrize(
    ("build", "shape", "operations"),
    [
        (mlp, (12,), 12 * 9 + 9 * 5),
        (tied_layers, (12,), 4 * 9 + 9 * 5),
        (conv, (3, 8, 8), 6 * 3 * 9 * 64 + 4 * 3 * 9 * 36),
        (lambda: nn.Sequential(TiedConv2d([0, 0, 1], 5, 3)), (3, 8, 8), 5 * 2 * 9 * 36),
    ],
)
@pytest.mark.parametrize("batch", [1, 3, 300])
def test_operations_are_multiply_adds_of_one_sample(
    build: Callable[[], nn.Module], shape: tuple[int, ...], operations: int, batch: int
) -> None:
    report = measure(build(), example_inputs=torch.rand(batch, *shape), latency=False)
    assert report.model.operations == operations
    assert report.model.latency == ()


class Watched(nn.Module):
    """Notes what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.calls: set[tuple[int, bool, bool, int]] = set()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        grad = torch.is_grad_enabled()
        self.calls.add((len(x), self.training, grad, torch.get_num_threads()))
        return self.linear(x + y) + torch.rand(1)


def test_timed_in_turn_on_one_thread_and_everything_is_put_back() -> None:
    model, like, x = Watched(), Watched(), torch.rand(5, 3)
    like.linear.eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    draws = torch.get_rng_state()
    try:
        report = measure(model, like=like, example_inputs=(x, x), evaluate=lambda network: float(network.training))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), draws)
    assert (model.training, model.linear.training, like.training, like.linear.training) == (True, True, True, False)
    assert {(batch, training, grad) for batch, training, grad, _ in model.calls} == {
        (1, False, False),
        (256, False, False),
    }
    assert (256, False, False, 1) in model.calls
    assert (256, False, False, 2) not in model.calls
    for figures in (report.model, report.like):
        assert figures is not None
        assert [latency.batch for latency in figures.latency] == [1, 256]
        for latency in figures.latency:
            assert 0 < latency.low <= latency.median <= latency.high < math.inf
            assert latency.spread == latency.high - latency.low
        assert figures.accuracy == 0


def test_a_failure_puts_everything_back_too() -> None:
    model = mlp()
    draws = torch.get_rng_state()

    def evaluate(_: nn.Module) -> float:
        torch.rand(3)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        measure(model, evaluate=evaluate)
    assert model.training
    assert model[0].training
    assert torch.equal(torch.get_rng_state(), draws)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"plan": TiePlan([Tie.of("gone", Groups.inputs(), [0])])}, PlanError, "gone"),
        ({"plan": TiePlan([Tie.of("0.weight", Groups.inputs(), [0, 0])])}, PlanError, "12 labels"),
        ({"plan": both()}, PlanError, r"0.weight\[inputs\].*weights that differ inside a group.*plan.project"),
        ({"path": "nowhere.safetensors"}, FileError, "nowhere"),
        ({"evaluate": lambda _: None}, TyingError, "evaluate: expected .* got None"),
        ({"evaluate": lambda _: math.nan}, TyingError, "evaluate: expected .* got nan"),
        ({"evaluate": lambda _: 98.3}, TyingError, r"evaluate: expected .* \[0, 1\], got 98.3"),
        ({"example_inputs": [torch.rand(2, 12)]}, TyingError, "example_inputs: expected .* got .*'list'"),
        ({"example_inputs": torch.tensor(3.0)}, TyingError, "example_inputs: expected .* batch"),
        ({"example_inputs": torch.rand(0, 12)}, TyingError, "example_inputs"),
        ({"example_inputs": (torch.rand(2, 12), torch.rand(3, 12))}, TyingError, "example_inputs"),
        ({"example_inputs": ()}, TyingError, "example_inputs"),
    ],
)
def test_bad_input_is_refused_by_name(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        measure(mlp(), **options)


def test_a_plan_for_ties_that_are_in_the_layers_is_refused() -> None:
    with pytest.raises(PlanError, match="a compacted network keeps its ties in its layers and needs no plan"):
        measure(tied_layers(), plan=TiePlan([Tie.of("0.weight", Groups.inputs(), INPUTS)]))


# ---------------------------------------------------------------- the report

FULL = Report(
    Figures(1000, 900, 32_000, 5000, 4000, 800, (Latency(1, 2e-5, 1e-5, 3e-5), Latency(256, 2e-3, 1e-3, 4e-3)), 0.98),
    Figures(24_000, 24_000, 768_000, 97_000, 96_500, 20_000, (Latency(1, 1e-4, 1e-4, 1e-4),), 0.985),
    768_000,
)
BARE = Report(Figures(10, 0, 0, 300, 400), None, 320)


@pytest.mark.parametrize("report", [FULL, BARE])
def test_json_gives_the_report_back(report: Report) -> None:
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": 3}', FULL.to_json().replace('"bits"', '"bit"')])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(TyingError, match=r"text: expected what Report\.to_json gave"):
        Report.from_json(text)


def test_the_table_reads_without_colour_and_never_shows_the_unknown_as_zero() -> None:
    assert str(FULL).replace("\u202f", " ").splitlines() == [
        "                                    model               like         ratio",
        "parameters                          1,000             24,000           24×",
        "unique non-zero values                900             24,000         26.7×",
        "stored, labels counted               4 kB              96 kB           24×",
        "file                                 5 kB            96.5 kB         19.3×",
        "operations                            800             20,000           25×",
        "latency, batch 1        20 µs (IQR 20 µs)  100 µs (IQR 0 ns)            5×",
        "latency, batch 256        2 ms (IQR 3 ms)                  –             –",
        "accuracy                          98.00 %            98.50 %  −0.50 points",
    ]
    rows = {line[:24].strip(): line[24:].split() for line in str(BARE).splitlines()[1:]}
    for unknown in ("operations", "latency, batch 1", "latency, batch 256", "accuracy"):
        assert rows[unknown] == ["–", "–", "–"]
    assert BARE.unique is BARE.stored is None
    assert rows["unique non-zero values"] == ["0", "10", "–"]


# ---------------------------------------------------------------- the paper's measures


def slow_sharing(weight: Tensor, groups: Groups, labels: list[int], original: int) -> Sharing:
    matrix = groups.read(weight).tolist()
    unique, nonzero = set(), 0
    for row, label in zip(matrix, labels, strict=True):
        for d, value in enumerate(row):
            nonzero += value != 0
            if value != 0:
                unique.add((label, d))
    return Sharing(1 - nonzero / original, nonzero / len(unique), original / len(unique))


def law_sharing(measuring: Callable[..., Sharing]) -> None:
    random = np.random.default_rng(0)
    for groups in (Groups.inputs(), Groups.outputs(), Groups.filters()):
        for seed in range(20):
            weight = torch.randn(6, 5, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            weight[random.integers(6)] = 0
            count, _ = groups.shape(weight.shape)
            labels = random.integers(-1, max(1, count // 2), count)
            tie = Tie.of("weight", groups, labels)
            if tie.partition.classes:
                weight = TiePlan([tie]).project({"weight": weight})["weight"]
                expected = slow_sharing(weight, groups, tie.partition.labels.tolist(), 80)
                got = measuring(weight, groups, labels, original=80)
                assert (got.sparsity, got.sharing, got.compression) == pytest.approx(
                    (expected.sparsity, expected.sharing, expected.compression)
                )
                assert got.compression == pytest.approx(got.sharing / (1 - got.sparsity))


def test_sharing() -> None:
    law_sharing(sharing)


def by_groups(weight: Tensor, groups: Groups, labels: np.ndarray, *, original: int) -> Sharing:
    """Counts groups, not numbers."""
    partition = Partition(labels)
    kept = len(partition) - partition.pruned
    return Sharing(partition.pruned / len(partition), kept / partition.classes, len(partition) / partition.classes)


def of_what_is_left(weight: Tensor, groups: Groups, labels: np.ndarray, *, original: int) -> Sharing:
    """Forgets what was cut out of the layer."""
    return sharing(weight, groups, labels)


@pytest.mark.parametrize("broken", [by_groups, of_what_is_left])
def test_broken_sharing_fails_the_law(broken: Callable[..., Sharing]) -> None:
    with pytest.raises(AssertionError):
        law_sharing(broken)


def test_sharing_of_nothing_and_of_what_does_not_obey() -> None:
    zeros = torch.zeros(2, 3)
    assert sharing(zeros, Groups.inputs(), [-1] * 3) == Sharing(1.0, None, None)
    with pytest.raises(PlanError, match="weight"):
        sharing(torch.rand(2, 3), Groups.inputs(), [0, 0, 1])
    with pytest.raises(PlanError, match="labels"):
        sharing(torch.rand(2, 3), Groups.inputs(), [0, 0])
    with pytest.raises(PlanError, match="original: expected at least the 6"):
        sharing(torch.rand(2, 3), Groups.inputs(), [0, 1, 2], original=5)
