"""Both stages on tiny tasks: the same seed gives the same bits, budgets are met, what is interrupted goes on."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import random
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Optimizer

from networks import Net
from tasks import CLASSES, Corners, Stripes, of
from tying import compress, discover, load
from tying.channels.find import Channels, find_channels
from tying.compress import CompressResult, load_task
from tying.compress.randomness import reseed
from tying.compress.targets import compacted_size, find_targets, silenced
from tying.enforce import compact, plan_compaction
from tying.errors import CompactError, FileError, PlanError, TaskError
from tying.files.sealed import bytes_of
from tying.groups import Groups
from tying.measure import measure
from tying.plan import Tie, TiePlan
from tying.store import load_plan

INPUTS, OUTPUTS = Groups.inputs(), Groups.outputs()

run = functools.partial(compress, progress=False)


@pytest.fixture(autouse=True)
def _without_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing takes four times as long as all the rest."""
    summary = importlib.import_module("tying.compress.summary")
    monkeypatch.setattr(summary, "measure", functools.partial(measure, latency=False))


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: bytes_of(tensor).numpy().tobytes() for name, tensor in model.state_dict().items()}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@functools.cache
def reference(make: Callable[[], Any], **options: Any) -> CompressResult:
    """What a run without folder gives, once for all tests: not to be written to."""
    return run(make(), **options)


def same(one: CompressResult, other: CompressResult) -> bool:
    def told(result: CompressResult) -> Any:
        return {key: value for key, value in json.loads(result.to_json()).items() if key != "provenance"}

    return bits(one.model) == bits(other.model) and one.plan == other.plan and told(one) == told(other)


# ---------------------------------------------------------------- the same seed


def law_same_network(make: Callable[[], Any], budget: dict[str, Any], folder: Path) -> None:
    """Whatever was drawn before; with a folder or without, and read from it; another seed gives another."""
    first = reference(make, seed=3, **budget)
    torch.manual_seed(99)
    torch.rand(5)
    assert same(run(make(), seed=3, out=folder, **budget), first)
    task = make()
    assert same(run(task, seed=3, out=folder, **budget), first)
    assert task.stages == []
    assert bits(reference(make, **budget).model) != bits(first.model)


@pytest.mark.parametrize(
    ("make", "budget"), [(Corners, {"ratio": 8}), (Corners, {"max_drop": 0.02}), (Stripes, {"ratio": 6})]
)
def test_the_same_seed_gives_the_same_network(make: Callable[[], Any], budget: dict[str, Any], tmp_path: Path) -> None:
    law_same_network(make, budget, tmp_path / "out")


class Restless(Corners):
    """Draws from a generator that no seed reaches."""

    generator = torch.Generator()

    def data(self, split: str) -> tuple[Tensor, Tensor]:
        points, labels = super().data(split)
        return points + 0.01 * torch.randn(points.shape, generator=self.generator), labels


class OfPythonsRandomness(Corners):
    """Augments by NumPy and by Python, as tasks do."""

    def data(self, split: str) -> tuple[Tensor, Tensor]:
        import random

        points, labels = super().data(split)
        return points + 0.01 * random.random() + 0.01 * np.random.rand(), labels  # noqa: NPY002


class Seeded(Restless):
    """The same, but reached by its own `seed`."""

    def seed(self, value: int) -> None:
        self.generator.manual_seed(value)


def test_a_task_whose_randomness_is_out_of_reach_fails_the_law(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        law_same_network(Restless, {"ratio": 8}, tmp_path / "out")


@pytest.mark.parametrize("make", [Seeded, OfPythonsRandomness])
def test_all_usual_randomness_is_seeded(make: Callable[[], Any]) -> None:
    """A folder gives another number of evaluations, not of draws inside a fit: without one, all is repeated."""
    assert same(run(make(), ratio=8), run(make(), ratio=8))


# ---------------------------------------------------------------- interrupted


class Interrupted(Corners):
    """Ctrl-C comes in the middle of the n-th fit."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def fit(self, model: nn.Module, *, epochs: int, on_step: Any, on_epoch: Any, stage: str) -> None:
        steps = 0

        def stop(optimizer: Optimizer) -> None:
            nonlocal steps
            steps += 1
            if len(self.stages) == self.at and steps == 13:
                raise KeyboardInterrupt
            on_step(optimizer)

        super().fit(model, epochs=epochs, on_step=stop, on_epoch=on_epoch, stage=stage)


@functools.cache
def uninterrupted() -> tuple[CompressResult, list[str]]:
    task = Corners()
    return run(task, ratio=8), task.stages


def law_goes_on(go_on: Callable[..., CompressResult], at: int, folder: Path) -> None:
    """The same bits as uninterrupted, and nothing that was finished is done again."""
    expected, fits = uninterrupted()
    task = Interrupted(at)
    with pytest.raises(KeyboardInterrupt):
        run(task, ratio=8, out=folder)
    assert task.stages == fits[:at]
    assert not (folder / "small.safetensors").exists()
    task = Interrupted(10**6)
    resumed = go_on(task, ratio=8, out=folder)
    assert task.stages == fits[at - 1 :]
    assert same(resumed, expected)


@pytest.mark.parametrize("at", [1, 3, 7])
def test_what_was_interrupted_goes_on_where_it_was(at: int, tmp_path: Path) -> None:
    law_goes_on(run, at, tmp_path / "out")


def from_the_beginning(task: Any, *, out: Path, **options: Any) -> CompressResult:
    return run(task, **options)


def without_seeds(task: Any, **options: Any) -> CompressResult:
    fits = importlib.import_module("tying.compress.fits").Fits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fits, "_reseed", lambda self, name: None)
        return run(task, **options)


@pytest.mark.parametrize("broken", [from_the_beginning, without_seeds])
def test_going_on_in_other_ways_fails_the_law(broken: Callable[..., CompressResult], tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        law_goes_on(broken, 3, tmp_path / "out")


def test_one_folder_serves_several_budgets(tmp_path: Path) -> None:
    """The dense network and stage one are trained once; nothing of another size is mistaken for the same."""
    for budget in ({"ratio": 8}, {"ratio": 8.01}, {"ratio": 12}, {"bytes_": 2500}, {"max_drop": 0.02}):
        task = Corners()
        shared = run(task, out=tmp_path / "out", **budget)
        assert task.stages.count("one") == (3 if budget == {"ratio": 8} else 0)
        assert same(shared, reference(Corners, **budget))


# ---------------------------------------------------------------- budgets


def in_folder(make: Callable[[], Any], folder: Path, **budget: Any) -> CompressResult:
    result = run(make(), out=folder, **budget)
    assert result.kept
    return result


def law_ratio(compressed: Callable[..., CompressResult], make: Callable[[], Any], ratio: float, folder: Path) -> None:
    result = compressed(make, folder, ratio=ratio)
    dense = make().model()
    saved = load(folder / "small.safetensors", make().model())
    assert count(saved) * ratio <= count(dense)
    assert count(saved) == count(result.model) == result.report.model.parameters


@pytest.mark.parametrize(("make", "ratio"), [(Corners, 2.0), (Corners, 13.7), (Stripes, 4.0), (Stripes, 16.0)])
def test_a_ratio_is_met_by_the_network_on_disk(make: Callable[[], Any], ratio: float, tmp_path: Path) -> None:
    law_ratio(in_folder, make, ratio, tmp_path / "out")


def law_bytes(compressed: Callable[..., CompressResult], make: Callable[[], Any], most: int, folder: Path) -> None:
    result = compressed(make, folder, bytes_=most)
    assert (folder / "small.safetensors").stat().st_size == result.report.model.bytes <= most


@pytest.mark.parametrize(("make", "most"), [(Corners, 3500), (Corners, 2000), (Stripes, 4000)])
def test_bytes_are_met_by_the_file_on_disk(make: Callable[[], Any], most: int, tmp_path: Path) -> None:
    law_bytes(in_folder, make, most, tmp_path / "out")


def with_the_shapes_alone(make: Callable[[], Any], folder: Path, **budget: Any) -> CompressResult:
    """As if a pruned unit always went: what a padded convolution reads of it stays."""
    with pytest.MonkeyPatch.context() as patch:
        search = importlib.import_module("tying.compress.search")
        patch.setattr(search, "silenced", lambda plan, model, channels: plan)
        patch.setattr(search.Search, "_within", believing_the_estimate)
        return run(make(), out=folder, **budget)


def believing_the_estimate(self: Any, source: Any, most: float, estimate: Any, size_of: Any, budget: str) -> Any:
    plan = self._plan(source.fit.model, self.targets, lambda size: estimate(size) <= most, budget)
    return plan, compact(source.fit.model, plan, self.example)


def test_believing_the_estimate_fails_the_laws(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        law_ratio(with_the_shapes_alone, Stripes, 16.0, tmp_path / "out")
    with pytest.raises(AssertionError):
        law_bytes(with_the_shapes_alone, Stripes, 4000, tmp_path / "other")


@pytest.mark.parametrize(("make", "max_drop"), [(Corners, 0.02), (Corners, 0.3), (Stripes, 0.1)])
def test_a_drop_is_kept_on_the_validation_split(make: Callable[[], Any], max_drop: float) -> None:
    result = reference(make, max_drop=max_drop)
    (point,) = [p for p in result.data.curve if p.kind == "dense"]
    validation = make().evaluate(result.model, "validation")
    assert result.kept
    assert validation >= point.accuracy - max_drop - 1e-9
    assert result.report.model.parameters < result.report.parameters
    assert result.data.small.accuracy == make().evaluate(result.model, "test")
    assert result.data.small.validation == validation


def test_the_larger_drop_gives_no_larger_network() -> None:
    sizes = [reference(Corners, max_drop=drop).report.model.parameters for drop in (0.02, 0.3)]
    assert sizes == sorted(sizes, reverse=True)


def test_where_nothing_is_good_enough_the_dense_network_comes_back() -> None:
    """By a task that only thinks well of the network as it was."""

    def evaluate(model: nn.Module, split: str) -> float:
        return float(count(model) == 606)

    result = run(of(Corners(), evaluate=evaluate), max_drop=0.1)
    assert count(result.model) == 606
    assert result.kept
    assert (len(result.plan), result.plan.ties[0].partition.pruned) == (4, 0)
    assert "handed back as it is" in " ".join(result.data.notes)


class Wide(Corners):
    """The output takes most of the parameters: a sixteenth can't be reached."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(12, CLASSES))


def test_a_drop_is_found_where_the_usual_ratios_are_out_of_reach() -> None:
    result = run(Wide(), max_drop=0.5)
    assert result.kept
    assert count(result.model) < 12 * CLASSES + CLASSES
    with pytest.raises(PlanError, match="ratio=16: expected a budget that one value per member meets, got less"):
        run(Wide(), ratio=16)


def test_bytes_out_of_reach_are_refused_by_name() -> None:
    with pytest.raises(PlanError, match="bytes_=700: expected"):
        run(Corners(), bytes_=700)


# ---------------------------------------------------------------- what comes back


@pytest.mark.parametrize("make", [Corners, Stripes])
def test_the_saved_network_is_the_one_that_came_back(make: Callable[[], Any], tmp_path: Path) -> None:
    result = run(make(), ratio=6, out=tmp_path)
    saved = load(tmp_path / "small.safetensors", make().model())
    x = make().data("test")[0]
    assert not result.model.training
    with torch.no_grad():
        assert torch.equal(saved.eval()(x), result.model(x))
    assert load_plan(tmp_path / "small.safetensors") == result.plan == TiePlan.load(tmp_path / "plan.safetensors")
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(result.to_json())
    assert {path.name for path in tmp_path.iterdir()} == {
        "fits", "plan.safetensors", "result.json", "run.json", "small.safetensors",
    }  # fmt: skip


def test_the_test_split_is_looked_at_once_and_last() -> None:
    task = Corners()
    looked: list[str] = []
    evaluate = task.evaluate

    def note(model: nn.Module, split: str) -> float:
        looked.append(f"{split} after {len(task.stages)} fits")
        return evaluate(model, split)

    run(of(task, evaluate=note), ratio=6)
    fits = len(task.stages)
    assert [each for each in looked if each.startswith("test")] == [f"test after {fits} fits"] * 2
    assert not any(each.startswith("train") for each in looked)


def test_the_controls_are_as_large_as_the_result_and_not_larger() -> None:
    result = reference(Stripes, ratio=6)
    controls = {p.label: p.values for p in result.data.curve if p.label in ("pruned only", "narrow dense")}
    assert set(controls) == {"pruned only", "narrow dense"}
    for values in controls.values():
        assert 0.7 * count(result.model) <= values <= count(result.model)


def test_the_controls_are_trained_as_long_as_the_result() -> None:
    """Each ends with the same stage two, after a stage of its own."""
    task = Stripes()
    fit = task.fit
    seen: list[tuple[str, int]] = []

    def note(model: nn.Module, *, stage: str, **options: Any) -> None:
        seen.append((stage, count(model)))
        fit(model, stage=stage, **options)

    result = run(of(task, fit=note), ratio=6)
    controls = {p.label: p.values for p in result.data.curve if p.label in ("pruned only", "narrow dense")}
    assert all(("two", values) in seen for values in controls.values())
    assert ("dense", controls["narrow dense"]) in seen


def test_a_task_that_does_not_ask_is_not_told_the_stage() -> None:
    task = Corners()
    fit = task.fit

    def plain(model: nn.Module, *, epochs: int, on_step: Any, on_epoch: Any) -> None:
        fit(model, epochs=epochs, on_step=on_step, on_epoch=on_epoch, stage="?")

    assert same(run(of(task, fit=plain), ratio=8), reference(Corners, ratio=8))
    assert set(task.stages) == {"?"}


class Frozen(Stripes):
    """A first layer that is not trained, and batch statistics that stay: flags that must not be touched."""

    def model(self) -> nn.Module:
        model = super().model()
        model[0].weight.requires_grad_(False)
        return model

    def fit(self, model: nn.Module, *, epochs: int, on_step: Any, on_epoch: Any, stage: str) -> None:
        self.stages.append(stage)
        images, labels = self.data("train")
        optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model.train()
        model[1].eval()
        for epoch in range(epochs):
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            on_step(optimizer)
            on_epoch(epoch)
            assert model.training
            assert not model[1].training


def test_frozen_layers_stay_frozen_and_modes_stay() -> None:
    result = run(Frozen(), ratio=4)
    assert result.kept
    assert not result.model[0].weight.requires_grad


class Shared(Corners):
    """One weight in two layers."""

    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, CLASSES))
        model[2].weight = model[0].weight
        return model


class Transposed(Corners):
    """The second layer is the first one turned around: its inputs can't be tied without its outputs."""

    def model(self) -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            decoded = functional.linear(m.code(x).relu(), m.code.weight.t())
            return m.last(m.head(decoded.relu()).relu())

        return Net(forward, code=nn.Linear(12, 10), head=nn.Linear(12, 16), last=nn.Linear(16, CLASSES))


class Mirrored(Stripes):
    """Convolutions whose padding no tied layer has."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(64, CLASSES)),
        )


class BottleNeck(Corners):
    """Units that put out one half when pruned, read without a bias."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            *(nn.Linear(12, 20), nn.Sigmoid(), nn.Linear(20, 9, bias=False), nn.Sigmoid()),
            nn.Linear(9, CLASSES, bias=False),
        )


@pytest.mark.parametrize(("make", "ratio"), [(Shared, 1.2), (Transposed, 2.0), (Mirrored, 3.0), (BottleNeck, 3.0)])
def test_unusual_networks_keep_their_budget(make: Callable[[], Any], ratio: float, tmp_path: Path) -> None:
    law_ratio(in_folder, make, ratio, tmp_path / "out")


def test_the_callers_random_states_are_given_back() -> None:
    def drawn() -> tuple[float, float, float]:
        return random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002

    reseed(5)
    expected = drawn()
    reseed(5)
    compress(Corners(), ratio=2, epochs=1, progress=False)
    assert drawn() == expected


def test_progress_is_told_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    compress(Corners(), ratio=8)
    out, err = capfd.readouterr()
    assert not out
    assert "dense" in err
    assert "stage two, strength 0.5, 8x" in err
    assert "validation" in err


def test_a_task_in_a_file_and_a_task_as_an_object_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "corners.py"
    path.write_text("from tasks import Corners\ntask = Corners()\n")
    assert same(run(load_task(path), ratio=8), reference(Corners, ratio=8))
    path.write_text("from tasks import Corners\nname, epochs = 'corners', 3\nc = Corners()\n" + "".join(
        f"{function} = c.{function}\n" for function in ("model", "fit", "evaluate", "example_inputs")
    ))  # fmt: skip
    assert same(run(load_task(path), ratio=8), reference(Corners, ratio=8))


# ---------------------------------------------------------------- the size of what compact leaves


def bare(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def residual() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = functional.relu(m.stem(x))
        return m.head(functional.relu(x + m.second(functional.gelu(m.first(x)))).mean((2, 3)))

    conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
    return Net(forward, stem=conv(3, 12), first=conv(12, 10), second=conv(10, 12), head=nn.Linear(12, CLASSES))


def concatenated() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        both = torch.cat([functional.relu(m.left(x)), functional.silu(m.right(x))], 1)
        return m.head(functional.relu(m.join(both)).flatten(1))

    conv = functools.partial(nn.Conv2d, kernel_size=3)
    return Net(forward, left=conv(3, 8), right=conv(3, 6), join=conv(14, 9), head=nn.Linear(144, CLASSES))


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "three layers": (Corners().model, (12,)),
    "three layers, tokens": (Corners().model, (5, 12)),
    "no biases, tanh": (lambda: bare(nn.Linear(20, 16, False), nn.Tanh(), nn.Linear(16, 5, False)), (20,)),
    "batch norm": (
        lambda: (
            bare(nn.Linear(20, 16, False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 9, False), nn.ELU())
            + bare(nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))
        ),
        (20,),
    ),
    "convolutions that pad": (Stripes().model, (1, 8, 8)),
    "convolutions that don't": (
        lambda: (
            bare(nn.Conv1d(9, 10, 3), nn.PReLU(10), nn.AvgPool1d(2), nn.Conv1d(10, 12, 2, bias=False), nn.ReLU())
            + bare(nn.BatchNorm1d(12), nn.Flatten(), nn.Linear(36, 4))
        ),
        (9, 10),
    ),
    "residual": (residual, (3, 8, 8)),
    "concatenation": (concatenated, (3, 8, 8)),
    "one layer": (lambda: bare(nn.Linear(12, 4)), (12,)),
}


def stirred(name: str) -> tuple[nn.Module, Tensor, Channels]:
    build, shape = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.uniform_(0.5, 2) if key.endswith("var") else tensor.normal_()
    x = torch.randn(2, *shape)
    return model, x, find_channels(model, x)


def random_plan(model: nn.Module, channels: Channels) -> TiePlan:
    """Labels at random, over what `compress` ties and prunes."""
    random = np.random.default_rng(0)
    ties: list[Tie] = []
    for name, kinds in find_targets(model, channels).items():
        for groups in kinds:
            number = groups.shape(model.get_parameter(name).shape)[0]
            pruned = random.random(number) < random.choice([0.2, 0.6])
            pruned[0] = False  # else a layer could be left with what its neighbours pruned
            labels = np.arange(number) if groups == OUTPUTS else random.integers(0, random.integers(1, 9), number)
            ties.append(Tie.of(name, groups, np.where(pruned, -1, labels)))
    return TiePlan(ties)


Size = Callable[[TiePlan, nn.Module, Channels], Any]


def law_size(size: Size, quiet: Callable[..., TiePlan], name: str) -> None:
    """As many values as the compacted network has, and no zeros are left for want of a place for a constant."""
    model, x, channels = stirred(name)
    plan = quiet(random_plan(model, channels), model, channels)
    assert size(plan, model, channels).values == count(compact(model, plan, x))
    assert not plan_compaction(model, plan, x).kept


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_size_that_is_counted_is_the_size_of_the_compacted_network(name: str) -> None:
    law_size(compacted_size, silenced, name)


def test_plans_that_discover_makes_are_counted_too() -> None:
    model, x, channels = stirred("residual")
    for share in (0.3, 1.0):
        plan = silenced(discover(model, find_targets(model, channels), distortion=share), model, channels)
        assert compacted_size(plan, model, channels).values == count(compact(model, plan, x))


def leaving_constants(plan: TiePlan, model: nn.Module, channels: Channels) -> TiePlan:
    return plan


def of_the_ties_alone(plan: TiePlan, model: nn.Module, channels: Channels) -> Any:
    """Layer by layer: what one layer prunes is not taken off its neighbours."""
    values = count(model)
    for tie in plan:
        p, member = tie.partition, tie.members[0]
        values -= model.get_parameter(member.parameter).numel() * (len(p) - p.classes) // len(p)
    return types.SimpleNamespace(values=values)


@pytest.mark.parametrize("name", ["batch norm", "convolutions that pad"])
def test_leaving_constants_fails_the_law(name: str) -> None:
    with pytest.raises(AssertionError):
        law_size(compacted_size, leaving_constants, name)


@pytest.mark.parametrize("name", ["three layers", "concatenation"])
def test_counting_layer_by_layer_fails_the_law(name: str) -> None:
    with pytest.raises(AssertionError):
        law_size(of_the_ties_alone, silenced, name)


def test_a_constant_that_can_be_folded_is_left_to_be_folded() -> None:
    model, _, channels = stirred("three layers")
    plan = TiePlan([Tie.of("0.weight", OUTPUTS, [-1, *range(23)])])
    assert silenced(plan, model, channels) == plan


# ---------------------------------------------------------------- bad input


def nothing_called(model: nn.Module, *, epochs: int, on_step: Any, on_epoch: Any) -> None:
    return None


def only(*called: str) -> Callable[..., None]:
    def fit(model: nn.Module, *, epochs: int, on_step: Any, on_epoch: Any) -> None:
        optimizer = SGD(model.parameters(), lr=0.1)
        for epoch in range(epochs):
            if "on_step" in called:
                on_step(optimizer)
            if "on_epoch" in called:
                on_epoch(epoch)

    return fit


def of_nothing(model: nn.Module, *, epochs: int, on_step: Any, on_epoch: Any) -> None:
    on_step(None)


def diverging(model: nn.Module, *, epochs: int, on_step: Any, on_epoch: Any) -> None:
    only("on_step", "on_epoch")(model, epochs=epochs, on_step=on_step, on_epoch=on_epoch)
    nn.init.constant_(model[2].bias, math.inf)


network = Corners().model()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, r"corners: expected a task, got one without model\(\) -> .*: add what is"),
        ({"fit": 3, "evaluate": None}, r"without fit\(model, \*, epochs, .*; evaluate\(model, split\) -> float"),
        ({"example_inputs": None}, r"without example_inputs\(\) -> Tensor"),
        ({"fit": lambda model: None}, r"expected fit\(model, .*, on_epoch\), got fit\(model\); let it take ep"),
        ({"fit": lambda model, *, epochs: None}, "let it take on_step, on_epoch and call"),
        ({"fit": nothing_called}, r"fit\(\): expected on_epoch\(epoch\) after every epoch, got no call; call it"),
        ({"fit": only("on_step")}, r"fit\(\): expected on_epoch\(epoch\) after every epoch"),
        ({"fit": only("on_epoch")}, r"fit\(\): expected on_step\(optimizer\) after every .* got no call"),
        ({"fit": of_nothing}, r"on_step\(\): expected the optimizer, got NoneType; call on_step\(optimizer\)"),
        ({"fit": diverging}, r"fit\(\): expected finite weights after 'dense', got NaN or infinite ones in 2.bias"),
        ({"evaluate": lambda m, s: 97.3}, r"evaluate\(\): expected an accuracy in \[0, 1\], got 97.3; return a share"),
        ({"evaluate": lambda m, s: math.nan}, r"evaluate\(\): expected an accuracy in \[0, 1\], got nan"),
        ({"evaluate": lambda m, s: -0.1}, r"evaluate\(\): expected an accuracy"),
        ({"evaluate": lambda m, s: None}, r"evaluate\(\): expected a number, got None; return the accuracy"),
        ({"evaluate": lambda m, s: "97 %"}, r"evaluate\(\): expected a number, got '97 %'"),
        ({"model": lambda: 3}, r"model\(\): expected an nn.Module, got int; return the network"),
        ({"model": lambda: nn.Linear}, r"model\(\): expected an nn.Module, got type"),
        ({"model": lambda: network}, r"model\(\): expected a new network at every call, got the same one again"),
        ({"model": lambda: nn.Flatten()}, r"model\(\): expected a linear or conv.* got Flatten without one"),
        ({"model": lambda: nn.Sequential(nn.Linear(12, 4), nn.Linear(4, 4))[:0]}, "got Sequential without one"),
        ({"example_inputs": lambda: [1.0]}, r"example_inputs\(\): expected a Tensor, got list; return a batch"),
        ({"epochs": 0}, "epochs: expected a whole number ≥ 1, got 0"),
        ({"epochs": 2.5}, "epochs: expected a whole number ≥ 1, got 2.5"),
    ],
)  # fmt: skip
def test_a_bad_task_is_told_what_to_do(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=message):
        run(of(Corners(), **changes), ratio=8, out=tmp_path / "out")
    assert not (tmp_path / "out" / "small.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 8, "bytes_": 3000}, "budget: expected one of max_drop, ratio, bytes_, got ratio, bytes; choose one"),
        ({"ratio": 8, "max_drop": 0.1}, "budget: expected one of"),
        ({"ratio": 0.5}, "ratio: expected a number from 1 to inf, got 0.5; 24 is 24 times smaller"),
        ({"ratio": math.nan}, "ratio: expected a number"),
        ({"ratio": math.inf}, "ratio: expected a number"),
        ({"max_drop": 1.0}, "max_drop: expected a number from 0 to 1, got 1.0; 0.003 is 0.3 points"),
        ({"max_drop": -0.1}, "max_drop: expected a number"),
        ({"bytes_": 0}, "bytes_: expected a number from 1 to inf, got 0; 20000 is 20 kB"),
        ({"epochs": 0, "ratio": 8}, "epochs: expected a whole number"),
    ],
)
def test_a_bad_budget_is_refused_before_anything_is_done(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    task = Corners()
    with pytest.raises(TaskError, match=message):
        run(task, out=tmp_path / "out", **options)
    assert task.stages == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("nowhere.py", None, "nowhere.py: expected a Python file with a task, got none there; give the path of one"),
        ("task.py", "def model(): pass\n", r"task.py: expected a task, got one without fit\(model"),
        ("task.py", "1 / 0\n", r"task.py: expected a task, got ZeroDivisionError\('division by zero'\) when running"),
        ("task.py", "def model(:\n", "task.py: expected a task, got SyntaxError"),
        ("task.txt", "", "task.txt: expected a Python file, got something that can't be imported; name it"),
        ("task.py", "raise SystemExit(3)\n", r"task.py: expected a task, got SystemExit\(3\) when running"),
        ("task.py", "class Task: pass\ntask = Task\n", r"task.py: expected a task, got the class Task; .*: Task\(\)"),
        ("task.py", "task = 3\n", r"task.py: expected a task, got one without model\(\)"),
    ],
)
def test_a_bad_task_file_is_told_what_to_do(path: str, text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / path).write_text(text)
    with pytest.raises(TaskError, match=message):
        load_task(tmp_path / path)


def test_a_task_file_finds_what_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "its_parts.py").write_text("name = 'of parts'\n")
    (tmp_path / "task.py").write_text("import its_parts, tasks\ntask = tasks.Corners()\ntask.name = its_parts.name\n")
    assert load_task(tmp_path / "task.py").name == "of parts"


def test_a_network_that_no_plan_can_compact_is_refused_before_it_is_trained() -> None:
    class Normed(Corners):
        def model(self) -> nn.Module:
            model = super().model()
            nn.utils.parametrizations.weight_norm(model[2])
            return model

    empty = of(Corners(), example_inputs=lambda: torch.empty(0, 12))
    for task, message in (
        (Normed(), "2: expected plain parameters, got a parametrization of weight; call"),
        (empty, r"example_inputs: expected at least one sample, got shapes \(0, 12\); pass"),
    ):
        with pytest.raises(CompactError, match=message):
            run(task, ratio=4)
        assert task.stages == []


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_to_is_refused_by_name(out: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match=r"out: expected a folder to write to, got .*; choose another one"):
        run(Corners(), ratio=4, out=tmp_path / out)
    assert files(tmp_path) == {"file": b"mine"}


def test_a_task_file_that_was_edited_is_noticed(tmp_path: Path) -> None:
    """In what its class uses too."""
    for rate, expected in ((0.1, contextlib.nullcontext()), (0.2, pytest.raises(FileError, match="new folder"))):
        (tmp_path / "task.py").write_text(
            f"from tasks import Corners\nRATE = {rate}\nclass Mine(Corners):\n    rate = RATE\ntask = Mine()\n"
        )
        with expected:
            run(load_task(tmp_path / "task.py"), ratio=4, epochs=1, out=tmp_path / "out")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done") / "out"
    with pytest.MonkeyPatch.context() as patch:
        summary = importlib.import_module("tying.compress.summary")
        patch.setattr(summary, "measure", functools.partial(measure, latency=False))
        run(Corners(), ratio=8, out=folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Edited(Corners):
    def example_inputs(self) -> Tensor:
        return super().example_inputs() * 1.0


@pytest.mark.parametrize(
    ("task", "options"),
    [(Corners, {"seed": 1}), (Corners, {"epochs": 2}), (Stripes, {}), (Edited, {})],
)
def test_the_folder_of_another_run_is_refused_and_stays(task: Any, options: dict[str, Any], done: Path) -> None:
    before = files(done)
    with pytest.raises(FileError, match=r"out: expected a new folder or one of the same run .*; choose another folder"):
        run(task(), ratio=8, out=done, **options)
    assert files(done) == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def foreign(path: Path) -> None:
    path.write_text("not a network")


@pytest.mark.parametrize(("name", "spoil"), [("dense", cut), ("stage-one-strength-2", foreign), ("dense", foreign)])
def test_a_spoilt_fit_is_refused_by_name(name: str, spoil: Callable[[Path], None], done: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "out"
    shutil.copytree(done, folder)
    spoil(folder / "fits" / f"{name}.safetensors")
    with pytest.raises(FileError, match=rf"{name}.safetensors: expected the fit '.*' of this task, got .*; delete the"):
        run(Corners(), ratio=8, out=folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(FileError, match=r"run.json: expected the record of a run"):
        run(Corners(), ratio=8, out=folder)


def test_a_mended_task_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    class Draft(Corners):
        def evaluate(self, model: nn.Module, split: str) -> float:
            return 100 * super().evaluate(model, split)

    with pytest.raises(TaskError, match="return a share"):
        run(Draft(), ratio=8, out=tmp_path / "out")
    assert same(run(Corners(), ratio=8, out=tmp_path / "out"), reference(Corners, ratio=8))
