"""compact against the projected model: same function, fewer numbers, the same training, or a refusal by name."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tying.channels.constants import Constants, Reading, constants_of
from tying.channels.find import Channels, Slice, channels_of
from tying.channels.graph import Graph
from tying.enforce.compaction.compact import compact, plan_compaction
from tying.enforce.ties.tie import tie_
from tying.errors import CompactError, PlanError
from tying.groups import Groups
from tying.nn import TiedConv2d, TiedLinear
from tying.plan import Member, Partition, Tie, TiePlan

module_under_test = importlib.import_module("tying.enforce.compaction.compact")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.head = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.head(torch.relu(x + self.b(torch.tanh(self.a(x)))))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.a, self.norm_a = nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.b, self.norm_b = nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.pool, self.head = nn.AdaptiveAvgPool2d(2), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = self.norm_b(self.b(torch.relu(self.norm_a(self.a(x)))))
        return self.head(self.pool(torch.relu(x + y)).flatten(1))


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv1d(3, 4, 3), nn.Conv1d(3, 5, 3)
        self.read, self.side, self.head = nn.Conv1d(9, 6, 2), nn.Conv1d(9, 6, 2), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([torch.sigmoid(self.left(x)), torch.relu(self.right(x))], 1)
        return self.head((self.read(x) * torch.sigmoid(self.side(x))).flatten(1))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 9), nn.ELU())
        self.one, self.two = nn.Linear(9, 4, bias=False), nn.Sequential(nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        y = self.trunk(x)
        return {"one": self.one(y), "more": (self.two(y), torch.sigmoid(self.one(y)))}


class Shared(nn.Module):
    """A module called twice, and a weight that two modules hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.twin = nn.Linear(6, 6)
        self.twin.weight = self.twice.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.sigmoid(self.twice(torch.sigmoid(self.twice(x))))
        return self.head(torch.tanh(self.twin(x)))


class Inputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.number, self.head = nn.Embedding(7, 5), nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, words: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        words = torch.where(mask[..., None], self.table(words), 0.0)
        return self.head(torch.relu(words.mean(1) + self.number(x)))


def seq(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: copy.deepcopy(nn.Sequential(*layers))


def floats(*shape: int) -> tuple[Tensor, ...]:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(9)),)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "mlp": (seq(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)), floats(2, 8)),
    "mlp, no biases": (seq(nn.Linear(8, 7, False), nn.Sigmoid(), nn.Linear(7, 3, False)), floats(2, 8)),
    "mlp, batchnorm": (
        seq(nn.Linear(8, 7), nn.ReLU(), nn.BatchNorm1d(7), nn.Dropout(), nn.Linear(7, 3, False)),
        floats(4, 8),
    ),
    "linear over time": (
        seq(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 4), nn.Softplus(), nn.Linear(4, 2)),
        floats(2, 3, 5),
    ),
    "lenet": (
        seq(
            *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.Tanh(), nn.AvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(24, 9), nn.ReLU(), nn.Linear(9, 3)),
        ),
        floats(2, 1, 14, 14),
    ),
    "vgg": (
        seq(
            *(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 3, padding=1, bias=False)),
            *(nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 3)),
        ),
        floats(2, 3, 8, 8),
    ),
    "conv3d": (
        seq(nn.Conv3d(2, 5, 2), nn.ReLU(), nn.Conv3d(5, 4, 2, bias=False), nn.Flatten(), nn.Linear(32, 2)),
        floats(2, 2, 4, 4, 4),
    ),
    "depthwise": (
        seq(nn.Conv2d(3, 6, 1), nn.ReLU6(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 3, 1), nn.Flatten()),
        floats(2, 3, 5, 5),
    ),
    "grouped": (
        seq(nn.Conv1d(3, 6, 1), nn.ReLU(), nn.Conv1d(6, 9, 2, groups=3), nn.ELU(), nn.Conv1d(9, 3, 2), nn.Flatten()),
        floats(2, 3, 5),
    ),
    "residual": (Residual, floats(2, 5)),
    "resnet": (ResNet, floats(2, 3, 8, 8)),
    "concat": (Concat, floats(2, 3, 5)),
    "two heads": (TwoHeads, floats(3, 6)),
    "shared": (Shared, floats(3, 4)),
    "several inputs": (
        Inputs,
        (torch.tensor([[0, 6, 2], [3, 3, 1]]), *floats(2, 3), torch.tensor([[True, False, True], [True, True, False]])),
    ),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """The network with weights drawn anew, biases and BatchNorm statistics too."""
    model, generator = NETWORKS[name][0](), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 2 - (0 if "running_var" in key else 1))
    return model


def random_plan(model: nn.Module, seed: int) -> TiePlan:
    """Zero and tied inputs of the layers that are not shared; pruned outputs, some with their biases."""
    generator = torch.Generator().manual_seed(seed)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    ties = []
    for name, layer in layers:
        out, into = layer.weight.shape[:2]
        shared = [n for n, p in model.named_parameters(remove_duplicate=False) if p is layer.weight] != [
            f"{name}.weight"
        ]
        if shared or torch.rand((), generator=generator) < 0.2:
            continue
        if getattr(layer, "groups", 1) == 1:
            labels = torch.randint(-1, max(2, into // 2), (into,), generator=generator)
            labels[int(torch.randint(into, (), generator=generator))] = 0
            ties.append(Tie.of(f"{name}.weight", Groups.inputs(), labels.numpy()))
        if name != layers[-1][0]:
            keep = torch.rand(out, generator=generator) < 0.6
            keep[int(torch.randint(out, (), generator=generator))] = True
            labels = torch.where(keep, torch.arange(out), -1).numpy()
            ties.append(Tie.of(f"{name}.weight", Groups.outputs(), labels))
            if layer.bias is not None and torch.rand((), generator=generator) < 0.5:
                ties.append(Tie.of(f"{name}.bias", Groups.outputs(), labels))
    return TiePlan(ties)


def projected(model: nn.Module, plan: TiePlan) -> nn.Module:
    """The oracle: the dense model, each group replaced by its label's mean in float64."""
    twin = copy.deepcopy(model).double().eval()
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for name, value in plan.project(parameters).items():
            parameters[name].copy_(value)
    return twin


def flat(output) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    return [tensor for part in parts for tensor in flat(part)]


def law_same_function(small: nn.Module, model: nn.Module, plan: TiePlan, inputs: tuple[Tensor, ...]) -> None:
    """Equal to 1e-10 on fresh random inputs of three samples."""
    twin, small = projected(model, plan), copy.deepcopy(small).double().eval()
    generator = torch.Generator().manual_seed(77)
    given = [
        torch.randn((3, *x.shape[1:]), generator=generator, dtype=torch.float64)
        if x.is_floating_point()
        else x[torch.tensor([0, 1, 0])]
        for x in inputs
    ]
    try:
        got = flat(small(*given))
    except RuntimeError as error:
        raise AssertionError("the compacted network does not run") from error
    for a, b in zip(got, flat(twin(*given)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def snapshot(model: nn.Module) -> dict[str, tuple[int, bytes]]:
    state = model.state_dict(keep_vars=True)
    return {name: (id(t), t.detach().numpy().tobytes()) for name, t in state.items()}


def numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_compacted_network_computes_what_the_projected_one_does(name, seed):
    model, inputs = build(name, seed).double(), NETWORKS[name][1]
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    plan, before = random_plan(model, seed + 10), snapshot(model)
    small = compact(model, plan, inputs)
    law_same_function(small, model, plan, inputs)
    assert numbers(small) < numbers(model)
    assert snapshot(model) == before
    storages = {p.untyped_storage().data_ptr() for p in model.state_dict().values()}
    assert not storages & {p.untyped_storage().data_ptr() for p in small.state_dict().values()}


def test_every_number_that_can_go_goes():
    """Counted by hand: 5 of 8 inputs read as 2 values, units 1 and 4 pruned, unit 2 read by nobody, then unit 5 too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4, bias=False), nn.Sigmoid(), nn.Linear(4, 3))
    model = model.double()
    with torch.no_grad():
        model[2].weight[:, 5] = 0
        model[2].weight[1, 5] = 1.0  # unit 5 is read by the second layer's unit 1 only, which goes
    plan = TiePlan(
        [
            Tie.of("0.weight", Groups.inputs(), [0, 0, 1, -1, 1, 0, -1, -1]),
            Tie.of("0.weight", Groups.outputs(), [0, -1, 1, 2, -1, 3]),
            Tie.of("2.weight", Groups.inputs(), [0, 1, -1, 2, 3, 4]),
            Tie.of("2.weight", Groups.outputs(), [0, -1, 1, 2]),
        ]
    )
    small = compact(model, plan, torch.randn(2, 8))
    law_same_function(small, model, plan, floats(2, 8))
    assert [tuple(p.shape) for p in small.parameters()] == [(2, 2), (2,), (3, 2), (3,), (3, 3), (3,)]
    assert small[0].labels.tolist() == [0, 0, 1, -1, 1, 0, -1, -1]
    assert type(small[2]) is nn.Linear
    found = plan_compaction(model, plan, torch.randn(2, 8))
    assert (len(found.removed), found.folded, found.kept) == (5, 3, ())
    assert "5 channels removed, 3 of them folded" in str(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_network_is_of_the_models_kind(dtype):
    model = build("vgg").to(dtype)
    model[0].weight.requires_grad_(False)
    model[1].eval()
    model[3].register_buffer("note", torch.tensor([7]))
    plan = TiePlan(
        [
            Tie.of("0.weight", Groups.inputs(), [0, 0, -1]),
            *(Tie.of(f"{n}", Groups.outputs(), [0, -1, 1, 2, 3]) for n in ("0.weight", "0.bias", "1.weight", "1.bias")),
            Tie.of("7.weight", Groups.inputs(), [0, 1, 1, 0, -1, 2]),
        ]
    )
    small = compact(model, plan, floats(2, 3, 8, 8)[0].to(dtype))
    assert isinstance(small[0], TiedConv2d)
    assert isinstance(small[7], TiedConv2d)
    assert small[1].num_features == small[0].out_channels == small[3].in_channels == 4
    assert not small[0].weight.requires_grad
    assert small[3].weight.requires_grad
    assert [m.training for m in small] == [m.training for m in model]
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert small[3].note.tolist() == [7]
    if dtype == torch.float32:
        x = floats(3, 3, 8, 8)[0]
        torch.testing.assert_close(small.eval()(x), projected(model, plan).float()(x), rtol=1e-4, atol=1e-5)


def test_a_layer_whose_labels_all_differ_stays_plain():
    model = build("mlp")
    labels = [-1, 0, 1, -1, 2, 3, 4]
    small = compact(model, TiePlan([Tie.of("2.weight", Groups.inputs(), labels)]), floats(2, 8))
    assert [type(m) for m in small] == [type(m) for m in model]
    assert small[2].in_features == small[0].out_features == 5


def test_a_shared_weight_that_is_cut_stays_shared():
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(5, 2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            x = torch.sigmoid(self.first(x))
            return self.a(x) * self.b(x)

    model, plan = Twins().double(), TiePlan([Tie.of("first.weight", Groups.outputs(), [0, -1, -1, 1, 2])])
    small = compact(model, plan, floats(2, 3))
    law_same_function(small, model, plan, floats(2, 3))
    assert small.a.weight is small.b.weight
    assert small.a.weight.shape == (2, 3)


def test_a_shared_weight_goes_by_any_of_its_names():
    model, inputs = build("shared"), NETWORKS["shared"][1]
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p is model.twice.weight]
    assert len(names) == 2
    first, second = (TiePlan([Tie.of(name, Groups.outputs(), [-1, 0, 1, 2, 3, 4])]) for name in names)
    expected, got = compact(model, first, inputs).state_dict(), compact(model, second, inputs).state_dict()
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    with pytest.raises(PlanError, match="expected one tie, got several"):
        compact(model, first + second, inputs)


def test_what_is_pruned_and_stays_has_its_reason():
    model = build("vgg")
    pruned = [0, -1, 1, 2, 3]
    plan = TiePlan([Tie.of("0.weight", Groups.outputs(), pruned), Tie.of("9.weight", Groups.outputs(), [0, -1, 1])])
    constant, output = plan_compaction(model, plan, floats(2, 3, 8, 8)).kept
    assert "read with zero padding by 3.weight; prune 0.bias, 1.weight, 1.bias there as well" in constant.reason
    assert output.what == "9.weight[axis 0: 1]"
    assert output.reason == "an output of the model"
    more = TiePlan([*plan, *(Tie.of(n, Groups.outputs(), pruned) for n in ("0.bias", "1.weight", "1.bias"))])
    assert len(plan_compaction(model, more, floats(2, 3, 8, 8)).kept) == 1
    assert compact(model, more, floats(2, 3, 8, 8))[3].in_channels == 4


def test_zero_inputs_that_cannot_be_selected_stay_as_zeros():
    model = nn.Sequential(nn.Conv1d(3, 2, 3, padding=1, padding_mode="circular"))
    plan = TiePlan([Tie.of("0.weight", Groups.inputs(), [0, -1, 1])])
    assert "padding_mode='circular'" in plan_compaction(model, plan, floats(2, 3, 5)).kept[0].reason
    small = compact(model, plan, floats(2, 3, 5))
    law_same_function(small, model, plan, floats(2, 3, 5))
    with pytest.raises(CompactError, match=r"0\.weight: .* padding_mode='circular'"):
        compact(model, TiePlan([Tie.of("0.weight", Groups.inputs(), [0, 1, 1])]), floats(2, 3, 5))


def law_trains_like_the_tied_network(small: nn.Module, tied: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Five SGD steps, in training mode: outputs stay equal."""
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (small, tied)]
    x = inputs[0].double()
    for _ in range(5):
        outputs = []
        for model, optimizer in zip((small, tied), optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(model(x))
            (outputs[-1] ** 2).mean().backward()
            optimizer.step()
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9)


TRAINED = {
    "mlp": [
        ("0.weight", [0, 0, 1, -1, 2, 1, 1, 3]),
        ("2.weight", [0, -1, 1, 1, -1, 2, 2]),
        ("4.weight", [0, 1, 1, -1, 0, 0]),
    ],
    "lenet": [("3.weight", [0, -1, 1, 0]), ("7.weight", [i % 5 - 1 for i in range(24)])],
    "vgg": [("0.weight", [0, -1, 0]), ("7.weight", [0, 1, 1, 0, 2, -1])],
}


def trained_pair(name: str, gradient: str) -> tuple[nn.Module, nn.Module]:
    model = build(name).double().train()
    plan = TiePlan([Tie.of(parameter, Groups.inputs(), labels) for parameter, labels in TRAINED[name]])
    small, tied = compact(model, plan, NETWORKS[name][1]), copy.deepcopy(model)
    tie_(tied, plan, gradient=gradient)
    return small, tied


@pytest.mark.parametrize("name", TRAINED)
def test_a_compacted_network_trains_like_the_tied_one_step_for_step(name):
    law_trains_like_the_tied_network(*trained_pair(name, "sum"), NETWORKS[name][1])


def test_the_training_law_fails_when_gradients_are_averaged():
    with pytest.raises(AssertionError):
        law_trains_like_the_tied_network(*trained_pair("mlp", "mean"), NETWORKS["mlp"][1])


def test_a_compacted_network_is_exported_copied_and_loaded():
    model, plan = build("lenet"), random_plan(build("lenet"), 10)
    small = compact(model, plan, NETWORKS["lenet"][1]).eval()
    x = torch.randn(5, 1, 14, 14)
    program = torch.export.export(small, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x[:3]), small(x[:3]))
    twin = copy.deepcopy(small)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    twin.load_state_dict(small.state_dict())
    assert torch.equal(twin(x), small(x))


# Broken twins: each is caught by the comparison, and by the law when the comparison is skipped.


class Literal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 16, 3), nn.Linear(256, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).view(-1, 256))


def literal(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, TiePlan, tuple[Tensor, ...]]:
    plan = TiePlan([Tie.of("conv.weight", Groups.outputs(), [-1, *range(15)])])
    return Literal(), plan, floats(2, 1, 6, 6)


def silently_literal(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, TiePlan, tuple[Tensor, ...]]:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x))) / self.a.out_features

    return Scaled(), TiePlan([Tie.of("a.weight", Groups.outputs(), [0, 1, -1, 2, 3, 4])]), floats(2, 4)


def fold_without_the_activation(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, TiePlan, tuple[Tensor, ...]]:
    model = build("mlp, batchnorm")
    bias = model[0].bias.detach().clone()

    def forgetful(graph: Graph, inputs: tuple[Tensor, ...]) -> Constants:
        found = constants_of(graph, inputs)
        return Constants({(p, a, i): Reading(float(bias[i]), r.padded) for (p, a, i), r in found.readings.items()})

    monkeypatch.setattr(module_under_test, "constants_of", forgetful)
    return model, TiePlan([Tie.of("0.weight", Groups.outputs(), [0, 1, -1, 2, -1, 3, 4])]), floats(4, 8)


def wrong_flatten_indices(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, TiePlan, tuple[Tensor, ...]]:
    """As after a permute: the reader's inputs are taken for channel-last."""

    def interleaved(graph: Graph) -> Channels:
        channels = []
        for channel in channels_of(graph):
            readers = tuple(
                Slice(s.parameter, s.axis, tuple(range(s.indices[0] // 4, 24, 6))) if len(s.indices) == 4 else s
                for s in channel.readers
            )
            channels.append(dataclasses.replace(channel, readers=readers))
        return Channels(tuple(channels))

    monkeypatch.setattr(module_under_test, "channels_of", interleaved)
    model = build("lenet")
    labels = torch.arange(24)
    labels[0::6] = -1
    return model, TiePlan([Tie.of("7.weight", Groups.inputs(), labels.numpy())]), NETWORKS["lenet"][1]


def forgets_to_cut_a_reader(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, TiePlan, tuple[Tensor, ...]]:
    def blind(graph: Graph) -> Channels:
        found = channels_of(graph)
        return Channels(tuple(dataclasses.replace(c, readers=c.readers[:1]) for c in found))

    monkeypatch.setattr(module_under_test, "channels_of", blind)
    plan = TiePlan([Tie.of("one.weight", Groups.inputs(), [-1, *range(8)])])
    return build("two heads"), plan, NETWORKS["two heads"][1]


BROKEN = [literal, silently_literal, fold_without_the_activation, wrong_flatten_indices, forgets_to_cut_a_reader]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda f: f.__name__)
def test_what_would_compute_something_else_is_refused(broken, monkeypatch):
    model, plan, inputs = broken(monkeypatch)
    before = snapshot(model)
    with pytest.raises(CompactError, match="once compacted"):
        compact(model, plan, inputs)
    assert snapshot(model) == before


@pytest.mark.parametrize("broken", BROKEN, ids=lambda f: f.__name__)
def test_the_law_fails_for_it_when_the_comparison_is_skipped(broken, monkeypatch):
    model, plan, inputs = broken(monkeypatch)
    monkeypatch.setattr(module_under_test, "check_equal", lambda *_: None)
    small = compact(model, plan, inputs)
    with pytest.raises(AssertionError):
        law_same_function(small, model, plan, inputs)


def test_the_comparison_names_the_module(monkeypatch):
    with pytest.raises(CompactError, match=r"^model: expected a forward that runs, got .*256"):
        compact(*literal(monkeypatch))
    model, plan = build("mlp"), TiePlan([Tie.of("0.weight", Groups.outputs(), [0, 1, -1, 2, 3, 4, 5])])
    monkeypatch.setattr(module_under_test, "place_tied_", lambda network, _: network[2].weight.data.mul_(1.001))
    with pytest.raises(CompactError, match=r"^2: expected the outputs"):
        compact(model, plan, floats(2, 8))


EMPTIED = {
    "no reader": ("2.weight", None),
    "no unit": ("0.weight", "0.bias"),
    "planned inputs": ("0.weight", None),
}  # fmt: skip


@pytest.mark.parametrize("name", EMPTIED)
def test_of_a_layer_that_only_zeros_empty_one_unit_is_left(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        for zero in EMPTIED[name]:
            if zero:
                model.get_parameter(zero).zero_()
    plan = TiePlan([Tie.of("0.weight", Groups.inputs(), [0, 0, 1, 1])] if name == "planned inputs" else [])
    inputs = (floats(2, 4)[0].double(),)
    assert "could go, and one must be left" in str(plan_compaction(model, plan, inputs)) or name == "planned inputs"
    small = compact(model, plan, inputs)
    assert small[0].weight.shape[0] == 1
    law_same_function(small, model, plan, inputs)


class Odd(nn.Module):
    """Draws random numbers, takes one batch size only, and gives NaN and infinite outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.b(torch.relu(self.a(x.view(5, 4) + torch.randn(5, 4, dtype=x.dtype))))
        return y, torch.log(y), y[:, 0] / 0, y.argmax(1)


def test_odd_outputs_are_compared_too(monkeypatch):
    model, plan = Odd().double(), TiePlan([Tie.of("a.weight", Groups.outputs(), [0, 1, -1, 2, 3, 4])])
    state = torch.get_rng_state()
    small = compact(model, plan, floats(5, 4)[0].double())
    assert torch.equal(torch.get_rng_state(), state)
    assert small.b.in_features == 5
    monkeypatch.setattr(module_under_test, "place_tied_", lambda network, _: network.b.bias.data.add_(1e-6))
    with pytest.raises(CompactError, match=r"^b: expected the outputs"):
        compact(model, plan, floats(5, 4)[0].double())


def of_mlp(*ties: Tie) -> tuple[nn.Module, TiePlan, tuple[Tensor, ...]]:
    return build("mlp"), TiePlan(ties), floats(2, 8)


def not_finite() -> tuple[nn.Module, TiePlan, tuple[Tensor, ...]]:
    model, plan, inputs = of_mlp(Tie.of("0.weight", Groups.outputs(), [0, 1, -1, 2, 3, 4, 5]))
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    return model, plan, inputs


def parametrized() -> tuple[nn.Module, TiePlan, tuple[Tensor, ...]]:
    model, plan, inputs = of_mlp(Tie.of("0.weight", Groups.inputs(), [0, 0, 1, 1, 2, 2, 3, 3]))
    tie_(model, plan)
    return model, plan, inputs


def a_view() -> tuple[nn.Module, TiePlan, tuple[Tensor, ...]]:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
    model[1].weight = nn.Parameter(model[0].weight.t())
    return model, TiePlan([Tie.of("0.weight", Groups.inputs(), [0, 0, 1, 2])]), floats(2, 4)


def shared_and_tied() -> tuple[nn.Module, TiePlan, tuple[Tensor, ...]]:
    return build("shared"), TiePlan([Tie.of("twice.weight", Groups.inputs(), [0, 0, 1, 2, 3, 4])]), floats(2, 4)


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.relu(self.encoder(x)), self.encoder.weight.t())


def transposed() -> tuple[nn.Module, TiePlan, tuple[Tensor, ...]]:
    return Autoencoder(), TiePlan([Tie.of("encoder.weight", Groups.inputs(), [0, 0, 1, 2])]), floats(2, 4)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else -self.fc(x)


def branches() -> tuple[nn.Module, TiePlan, tuple[Tensor, ...]]:
    return Branches(), TiePlan([Tie.of("fc.weight", Groups.inputs(), [0, 0, 1])]), floats(2, 3)


def fails() -> tuple[nn.Module, TiePlan, tuple[Tensor, ...]]:
    model, plan, _ = of_mlp(Tie.of("0.weight", Groups.inputs(), [0, 0, 1, 1, 2, 2, 3, 3]))
    return model, plan, floats(2, 7)


MISTAKES = {
    "unknown name": (lambda: of_mlp(Tie.of("9.weight", Groups.inputs(), [0])), PlanError, r"^9\.weight: "),
    "another size": (lambda: of_mlp(Tie.of("0.weight", Groups.inputs(), [0, 0])), PlanError, r"0\.weight.*expected 8"),
    "elements": (
        lambda: of_mlp(Tie.of("4.bias", Groups.elements(), [0, 0, 1])),
        CompactError,
        r"^4\.bias\[elements\].*got elements; enforce it with tie_",
    ),
    "two members": (
        lambda: of_mlp(
            Tie((Member("4.bias", Groups.outputs()), Member("2.bias", Groups.outputs())), Partition([0] * 9))
        ),
        CompactError,
        r"4\.bias.*one member, got 2.*tie_",
    ),
    "tied outputs": (
        lambda: of_mlp(Tie.of("2.weight", Groups.outputs(), [0, 0, 1, 2, 3, -1])),
        CompactError,
        r"2\.weight.*outputs that are pruned or alone.*tie_",
    ),
    "inputs of an embedding": (
        lambda: (
            build("several inputs"),
            TiePlan([Tie.of("table.weight", Groups.inputs(), [0, 0, 1, 1, 2])]),
            NETWORKS["several inputs"][1],
        ),
        CompactError,
        r"table\.weight.*'weight' of Embedding.*tie_",
    ),
    "no input left": (
        lambda: of_mlp(Tie.of("0.weight", Groups.inputs(), [-1] * 8)),
        CompactError,
        r"^[024]\.weight: .*prune less",
    ),
    "no unit left": (
        lambda: of_mlp(Tie.of("2.weight", Groups.outputs(), [-1] * 6)),
        CompactError,
        r"^[024]\.weight: .*prune less",
    ),
    "not finite": (not_finite, CompactError, r"^2\.weight: expected finite"),
    "parametrized": (parametrized, (CompactError, PlanError), r"^0: expected plain parameters.*untie_"),
    "a view of another": (a_view, CompactError, r"[01]\.weight.*shares it with [01]\.weight"),
    "shared and tied": (shared_and_tied, CompactError, r"^twice\.weight: .*shared by 2 modules"),
    "transposed": (transposed, CompactError, r"^encoder\.weight: .*used outside of its own forward as well"),
    "control flow": (branches, CompactError, r"."),
    "inputs that do not fit": (fails, CompactError, r"^0: expected a forward that runs.*; pass example_inputs as"),
    "inputs of no tensor": (lambda: (*of_mlp()[:2], [1.0]), CompactError, r"^example_inputs: .*list"),
    "no sample": (
        lambda: (*of_mlp()[:2], torch.empty(0, 8)),
        CompactError,
        r"^example_inputs: .*at least one sample, got shapes \(0, 8\)",
    ),
}


@pytest.mark.parametrize(("make", "kind", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_and_leaves_the_model_alone(make, kind, message):
    model, plan, inputs = make()
    before, training = snapshot(model), model.training
    with pytest.raises(kind, match=message):
        compact(model, plan, inputs)
    assert snapshot(model) == before
    assert model.training == training


@pytest.mark.parametrize("tolerance", [-1e-9, float("nan"), float("inf")])
def test_a_tolerance_that_compares_nothing_is_refused(tolerance):
    with pytest.raises(CompactError, match=r"^tolerance: expected a finite number ≥ 0"):
        compact(*of_mlp(), tolerance=tolerance)


def test_an_empty_plan_gives_an_equal_copy():
    model = build("resnet")
    small = compact(model, TiePlan(), NETWORKS["resnet"][1])
    assert {k: v.shape for k, v in small.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in small.state_dict().items())


def test_a_tied_layer_that_is_tied_with_another_model_is_refused_by_name():
    one, other = (nn.Sequential(TiedLinear([0, 0, 1], 4), nn.Linear(4, 2)) for _ in range(2))
    pair = nn.ModuleDict({"one": one, "other": other})
    members = tuple(Member(f"{name}.0.weight", Groups.outputs()) for name in pair)
    tie_(pair, TiePlan([Tie(members, Partition([0, 1, 2, 3] * 2))]))
    for call in (compact, plan_compaction):
        with pytest.raises(CompactError, match="expected a model by itself"):
            call(one, TiePlan([]), torch.randn(2, 3))


def test_a_weight_that_its_model_uses_by_itself_is_not_tied():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) + torch.relu(self.a(x)) @ self.b.weight.T

    tied = TiePlan([Tie.of("b.weight", Groups.inputs(), [0, 0, 1, 2])])
    with pytest.raises(CompactError, match=r"^b\.weight: .*used outside of its own forward as well"):
        compact(Both(), tied, torch.randn(2, 3))
    small = compact(Both(), TiePlan([Tie.of("b.weight", Groups.inputs(), [0, -1, 1, 2])]), torch.randn(2, 3))
    assert small.b.weight.shape == (2, 3)


def test_a_plan_is_made_with_a_tolerance():
    with pytest.raises(CompactError, match=r"^tolerance: "):
        plan_compaction(build("mlp"), TiePlan([]), floats(2, 8), tolerance=float("nan"))
