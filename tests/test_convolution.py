"""A convolution as ties of a dense or a locally connected layer: the same forward and gradient, and back again."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tying
from tying.errors import CompactError, PlanError
from tying.find.convolution import dense_of, hardwired, how_close
from tying.groups import Groups
from tying.nn import FlatConv, LocallyConnected1d, LocallyConnected2d
from tying.plan import Partition, Tie, TiePlan
from tying.wiring.recognise import recognise
from tying.wiring.wiring import Wiring

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

SIZES = {1: (9,), 2: (6, 7)}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d}
LOCALS = {1: LocallyConnected1d, 2: LocallyConnected2d}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    f"{d}d kernel={kernel} stride={stride} padding={padding} dilation={dilation} groups={groups}": (
        d,
        {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
    )
    for d, kernel, stride, padding, dilation, groups in itertools.product(
        (1, 2), (1, 2, 3), (1, 2, 3), (0, 1, 2, "same"), (1, 2), (1, 2)
    )
    if not (padding == "same" and stride > 1)
}
CASES["2d uneven"] = (2, {"kernel_size": (2, 3), "stride": (3, 1), "padding": (0, 2), "dilation": (2, 1)})
CASES["2d depthwise, no bias"] = (2, {"kernel_size": 3, "padding": 1, "groups": 4, "bias": False})
CASES["2d circular"] = (2, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"})
SOME = [name for i, name in enumerate(CASES) if i % 12 == 0 or i >= len(CASES) - 3]
"""Of every kind one: for what is slow or does not depend on the geometry."""


def conv_of(name: str) -> tuple[nn.Conv1d | nn.Conv2d, tuple[int, ...]]:
    torch.manual_seed(0)
    dimensions, options = CASES[name]
    out_channels = 8 if options.get("groups") == 4 else 2
    return CONVS[dimensions](4, out_channels, **options, dtype=torch.float64), SIZES[dimensions]


def flat(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), layer)


def law_the_convolution(conv: nn.Module, layer: nn.Module, size: tuple[int, ...], step: float = 0.1) -> None:
    """Outputs and gradients of the inputs are equal, and outputs again after three steps of training."""
    both = nn.ModuleList([conv, layer])
    optimizers = [torch.optim.SGD(model.parameters(), lr=step) for model in both]
    for _ in range(3):
        x = torch.randn(2, 4, *size, dtype=torch.float64)
        xs = [x.clone().requires_grad_() for _ in both]
        ys = [model(each).flatten(1) for model, each in zip(both, xs, strict=True)]
        torch.testing.assert_close(ys[1], ys[0], rtol=1e-12, atol=1e-12)
        seed = torch.randn_like(ys[0])
        for optimizer, y in zip(optimizers, ys, strict=True):
            optimizer.zero_grad()
            (y * seed).mean().backward()
            optimizer.step()
        torch.testing.assert_close(xs[1].grad, xs[0].grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_a_tied_dense_layer_is_the_convolution(name: str) -> None:
    conv, size = conv_of(name)
    dense = flat(dense_of(conv, size))
    tying.tie_(dense, hardwired(conv, size, name="1"))
    read = taps_that_read(conv, size)
    assert sum(p.numel() for p in dense.parameters()) == sum(
        p.numel() if p.dim() == 1 else p.numel() * read // math.prod(conv.kernel_size) for p in conv.parameters()
    )
    law_the_convolution(conv, dense, size)


def taps_that_read(conv: nn.Conv1d | nn.Conv2d, size: tuple[int, ...]) -> int:
    """How many taps read an input at some position."""
    return int((Wiring.of_conv(conv, size).windows.reads() >= 0).any(0).sum())


@pytest.mark.parametrize("name", CASES)
def test_a_tied_locally_connected_layer_is_the_convolution(name: str) -> None:
    conv, size = conv_of(name)
    local = LOCALS[len(size)].from_conv(cast(Any, conv), size)
    tying.tie_(local, hardwired(local))
    assert sum(p.numel() for p in local.parameters()) == sum(p.numel() for p in conv.parameters())
    law_the_convolution(conv, local, size)


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_where_taps_meet_the_dense_layer_adds_up_and_the_locally_connected_one_ties(mode: str) -> None:
    conv = nn.Conv2d(4, 2, 3, padding=1, padding_mode=mode, dtype=torch.float64)
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(dense_of(conv, (6, 7))(x.flatten(1)), conv(x).flatten(1), rtol=1e-12, atol=1e-12)
    with pytest.raises(PlanError, match="two taps read the same input"):
        hardwired(conv, (6, 7))
    local = LocallyConnected2d.from_conv(conv, (6, 7))
    tying.tie_(local, hardwired(local))
    law_the_convolution(conv, local, (6, 7))


@pytest.mark.parametrize("name", SOME)
def test_the_dense_layer_is_the_jacobian(name: str) -> None:
    conv, size = conv_of(name)
    jacobian = torch.autograd.functional.jacobian(conv, torch.zeros(4, *size, dtype=torch.float64))
    dense = dense_of(conv, size)
    torch.testing.assert_close(dense.weight, jacobian.reshape(dense.weight.shape), rtol=0, atol=0)


def _relabelled(change: Callable[[Any], Any]) -> Callable[[TiePlan], TiePlan]:
    def broken(plan: TiePlan) -> TiePlan:
        weight, *others = plan.ties
        return TiePlan([Tie(weight.members, Partition(change(weight.partition.labels))), *others], plan.provenance)

    return broken


BROKEN: dict[str, Callable[[TiePlan], TiePlan]] = {
    "one input further": _relabelled(lambda labels: np.roll(labels, 1)),
    "one connection missing": _relabelled(
        lambda labels: np.where(np.arange(len(labels)) == labels.argmax(), -1, labels)
    ),
    "two taps of one value": _relabelled(lambda labels: np.where(labels == 1, 0, labels)),
    "no zeros": _relabelled(lambda labels: np.where(labels < 0, labels.max() + 1, labels)),
    "no bias": lambda plan: TiePlan(plan.ties[:1], plan.provenance),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_ties_fail_the_law_and_are_not_made_a_convolution(broken: str) -> None:
    conv, size = conv_of("2d kernel=3 stride=2 padding=1 dilation=1 groups=2")
    dense = flat(dense_of(conv, size))
    plan = BROKEN[broken](hardwired(conv, size, name="1"))
    with pytest.raises(
        CompactError, match=r"1\.(weight|bias).*: expected (the labels of a convolution|ties of weight)"
    ):
        tying.compact(dense, plan, torch.randn(2, 4, *size))
    tying.tie_(dense, plan)
    with pytest.raises(AssertionError):
        law_the_convolution(conv, dense, size)


# ---------------------------------------------------------------- and back


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("known", ["provenance", "labels"])
def test_compact_gives_the_convolution_back(name: str, known: str, tmp_path: Path) -> None:
    conv, size = conv_of(name)
    if known == "labels" and conv.padding_mode != "zeros":
        pytest.skip("labels tell zero padding only")
    plan = hardwired(conv, size, name="1")
    if known == "provenance":
        plan.save(tmp_path / "plan.safetensors")
        plan = TiePlan.load(tmp_path / "plan.safetensors")
    else:
        plan = TiePlan(plan.ties)
    x = torch.randn(3, 4, *size, dtype=torch.float64)
    small = cast(Any, tying.compact(flat(dense_of(conv, size)), plan, x))
    back = small[1].conv
    assert isinstance(small[1], FlatConv)
    torch.testing.assert_close(small(x), conv(x).flatten(1), rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in small.parameters()) <= sum(p.numel() for p in conv.parameters())
    if known == "provenance":
        assert Wiring.of_conv(back, size) == Wiring.of_conv(conv, size)
        assert taps_that_read(conv, size) < math.prod(conv.kernel_size) or torch.allclose(
            back.weight, conv.weight, rtol=1e-14, atol=0
        )


@pytest.mark.parametrize("name", SOME)
def test_compact_gives_the_convolution_of_a_locally_connected_layer_back(name: str) -> None:
    conv, size = conv_of(name)
    model = nn.Sequential(LOCALS[len(size)].from_conv(cast(Any, conv), size), nn.ReLU())
    x = torch.randn(3, 4, *size, dtype=torch.float64)
    small = cast(Any, tying.compact(model, hardwired(model[0], name="0"), x))
    assert str(small[0]) == str(conv)
    torch.testing.assert_close(small[0].weight, conv.weight, rtol=1e-14, atol=0)
    torch.testing.assert_close(small(x), conv(x).relu(), rtol=1e-12, atol=1e-12)


def test_the_layer_may_be_the_whole_model_and_of_any_dtype_and_mode() -> None:
    conv = nn.Conv2d(1, 2, 3).requires_grad_(False).eval()
    dense = dense_of(conv, 5)
    small = tying.compact(dense, hardwired(conv, 5), torch.randn(2, 25))
    assert isinstance(small, FlatConv)
    assert torch.equal(small.conv.weight, conv.weight)
    assert not any(p.requires_grad for p in small.parameters())
    assert not small.training
    half = tying.compact(dense.bfloat16(), hardwired(conv, 5), torch.randn(2, 25).bfloat16())
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_channels_of_the_convolution_go_with_those_who_make_and_read_them() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    with torch.no_grad():
        conv.weight[:, 1] = 0  # nobody reads channel 1
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), dense_of(conv, 6), nn.ReLU(), nn.Linear(144, 5))
    with torch.no_grad():
        cast(Any, model[4]).weight[:, 36:72] = 0  # nor what channel 1 of the dense layer makes
    x = torch.randn(2, 1, 8, 8)
    small = cast(Any, tying.compact(model, hardwired(conv, 6, name="2"), x))
    assert (small[0].out_channels, small[2].conv.in_channels, small[2].conv.out_channels) == (2, 2, 3)
    assert small[4].in_features == 108
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


def test_other_ties_of_the_same_plan_are_kept() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 2, 3)
    model = nn.Sequential(nn.Linear(4, 25), nn.ReLU(), dense_of(conv, 5), nn.ReLU(), nn.Linear(18, 3))
    plan = hardwired(conv, 5, name="2") + TiePlan([Tie.of("4.weight", Groups.inputs(), [0, 1, -1] * 6)])
    small = cast(Any, tying.compact(model, plan, torch.randn(2, 4)))
    assert isinstance(small[2], FlatConv)
    assert small[4].classes == 2


def test_a_layer_that_is_called_twice_is_one_convolution() -> None:
    conv = nn.Conv1d(1, 1, 3, padding=1)
    dense = dense_of(conv, 8)
    model = nn.Sequential(dense, nn.Tanh(), dense)
    small = cast(Any, tying.compact(model, hardwired(conv, 8, name="0"), torch.randn(2, 8)))
    assert small[0] is small[2]
    assert isinstance(small[0], FlatConv)


def test_what_is_no_layer_of_its_own_is_refused_by_name() -> None:
    conv = nn.Conv1d(1, 1, 3, padding=1)
    model = nn.Sequential(dense_of(conv, 8), nn.Linear(8, 8))
    cast(Any, model[1]).weight = cast(Any, model[0]).weight
    plan, x = hardwired(conv, 8, name="0"), torch.randn(2, 8)
    with pytest.raises(CompactError, match=r"0.weight: expected a layer of its own.* shared"):
        tying.compact(model, plan, x)
    hooked = nn.Sequential(dense_of(conv, 8))
    hooked[0].register_forward_hook(lambda *_: None)
    with pytest.raises(CompactError, match=r"0.weight: expected a layer of its own.* hooks"):
        tying.compact(hooked, plan, x)
    local = nn.Sequential(LocallyConnected1d.from_conv(conv, 8))
    for labels in ([0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, -1]):
        ties = [Tie.of(f"0.{leaf}", Groups.positions(), labels) for leaf in ("weight", "bias")]
        with pytest.raises(CompactError, match=r"0.weight\[positions\].*expected one label for all positions"):
            tying.compact(local, TiePlan(ties), torch.randn(2, 1, 8))
    with pytest.raises(CompactError, match=r"0.bias: expected ties of weight and bias together"):
        tying.compact(local, TiePlan(hardwired(conv_to_local(conv), name="0").ties[:1]), torch.randn(2, 1, 8))
    units = TiePlan([Tie.of("0.weight", Groups.outputs(), [0, 1, 2, 3, 4, 5, 6, -1])])
    with pytest.raises(CompactError, match=r"0\.(weight|bias).*: expected"):
        tying.compact(local, units, torch.randn(2, 1, 8))


def conv_to_local(conv: nn.Conv1d) -> LocallyConnected1d:
    return LocallyConnected1d.from_conv(conv, 8)


@pytest.mark.parametrize("name", CASES)
def test_the_geometry_is_found_from_the_labels(name: str) -> None:
    conv, size = conv_of(name)
    if conv.padding_mode != "zeros":
        pytest.skip("labels tell zero padding only")
    wiring = Wiring.of_conv(conv, size)
    labels = Partition(wiring.weight_labels())
    found = recognise((wiring.out_features, wiring.in_features), labels, Partition(wiring.bias_labels()))
    assert found is not None
    assert Partition(found.weight_labels()) == labels
    assert math.prod(found.kernel_shape) <= conv.weight.numel()


def test_no_geometry_is_found_in_other_labels() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        assert recognise((12, 12), Partition(draw.integers(-1, 4, 144))) is None
    assert recognise((3, 3), Partition([-1] * 9)) is None


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def replaced(conv: nn.Conv2d) -> nn.Conv2d:
    """A forward of its own in the layer, not in its class."""
    other = copy.deepcopy(conv)
    other.forward = lambda input: 2 * conv(input)
    return other


CLOSENESS_OF: dict[str, tuple[Any, Any, str]] = {
    "a layer without values": (
        LocallyConnected2d(1, 2, 6, 3, device="meta"),
        None,
        r"^weight: .*meta device; load it first",
    ),
    "a convolution": (
        nn.Conv2d(1, 1, 3),
        None,
        r"^layer: expected LocallyConnected1d or LocallyConnected2d, got Conv2",
    ),
    "no layer": (None, None, r"^layer: .*got None"),
    "ties in a list": (LocallyConnected2d(1, 2, 6, 3), [], r"^plan: expected a TiePlan or None, got list"),
    "a name for a plan": (LocallyConnected2d(1, 2, 6, 3), "x", r"^plan: expected a TiePlan or None, got str"),
}


@pytest.mark.parametrize(("layer", "plan", "message"), CLOSENESS_OF.values(), ids=CLOSENESS_OF)
def test_how_close_takes_locally_connected_layers_with_values(layer: Any, plan: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        how_close(layer, plan)


def test_refused_before_anything_is_made() -> None:
    conv = nn.Conv2d(1, 1, 3)
    with pytest.raises(PlanError, match="input_size: expected the size of one channel"):
        hardwired(conv)
    with pytest.raises(PlanError, match="input_size: expected an input that the kernel fits into"):
        hardwired(conv, 2)
    with pytest.raises(PlanError, match="input_size: expected none for LocallyConnected2d"):
        hardwired(LocallyConnected2d.from_conv(conv, 5), 5)
    with pytest.raises(PlanError, match=r"conv: expected an nn.Conv1d or nn.Conv2d"):
        dense_of(cast(Any, nn.Linear(2, 2)), 2)
    for make in (dense_of, hardwired, FlatConv):
        for own in (Doubled(1, 1, 3), replaced(conv)):
            with pytest.raises(PlanError, match="has a forward of its own"):
                make(own, 5)
    with pytest.raises(PlanError, match="geometry: expected what"):
        Wiring.from_text("{}")
    with pytest.raises(PlanError):
        hardwired(conv, 5).check_fits(dict(nn.Linear(24, 9).named_parameters()))


# ---------------------------------------------------------------- files


def _made(kind: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network to save, one freshly built to load it into, and an input."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)

    def build(layer: nn.Module) -> nn.Module:
        return nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))

    if "dense" in kind:
        model, fresh, x = build(dense_of(conv, 7)), build(nn.Linear(98, 64)), torch.randn(2, 98)
        plan = hardwired(conv, 7, name="0")
    else:
        local = LocallyConnected2d.from_conv(conv, 7)
        model, fresh = build(local), build(LocallyConnected2d(2, 4, 7, 3, 2, 1, groups=2))
        x, plan = torch.randn(2, 2, 7, 7), hardwired(local, name="0")
    if kind.startswith("tied"):
        tying.tie_(model, plan)
    elif kind.startswith("compacted"):
        model = tying.compact(model, plan, x)
    return model, fresh, x


KINDS = ("tied dense", "tied local", "compacted dense", "compacted local", "local")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("into", ["the original", "its own kind"])
def test_saved_and_loaded(kind: str, into: str, tmp_path: Path) -> None:
    model, fresh, x = _made(kind)
    path = tmp_path / "it.safetensors"
    tying.save(model, path)
    back = tying.load(path, fresh if into == "the original" else _made(kind)[0])
    assert torch.equal(back(x), model(x))
    assert [tuple(p.shape) for p in back.parameters()] == [tuple(p.shape) for p in model.parameters()]
    tying.check(back)
    if kind == "tied local":  # one kernel stored, of 16 positions
        assert path.stat().st_size < 4 * 16 * 72


def test_saved_in_a_bundle(tmp_path: Path) -> None:
    made = {kind.replace(" ", "_"): _made(kind) for kind in KINDS}
    path = tmp_path / "all.safetensors"
    tying.save({name: model for name, (model, _, _) in made.items()}, path)
    back = tying.load(path, {name: fresh for name, (_, fresh, _) in made.items()})
    for name, (model, _, x) in made.items():
        assert torch.equal(back[name](x), model(x))


def test_a_file_of_another_geometry_is_refused_by_name(tmp_path: Path) -> None:
    model, _, _ = _made("compacted local")
    tying.save(model, tmp_path / "it.safetensors")
    other = nn.Sequential(LocallyConnected2d(2, 4, 7, 5, 2, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(tying.errors.FileError, match="0"):
        tying.load(tmp_path / "it.safetensors", other)
