"""Locally connected layers: the convolution where their positions agree, and the sum over taps where they don't."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tying.errors import PlanError
from tying.nn import LocallyConnected1d, LocallyConnected2d

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

SIZES = {1: (11,), 2: (7, 9)}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d}
LOCALS = {1: LocallyConnected1d, 2: LocallyConnected2d}

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    f"{d}d kernel={kernel} stride={stride} padding={padding} dilation={dilation} groups={groups}": (
        d,
        {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
    )
    for d, kernel, stride, padding, dilation, groups in itertools.product(
        (1, 2), (1, 2, 3), (1, 2), (0, 1, "same"), (1, 2), (1, 2)
    )
    if not (padding == "same" and stride == 2)
} | {
    f"2d {mode}": (2, {"kernel_size": 3, "padding": 2, "padding_mode": mode, "stride": (1, 2)})
    for mode in ("reflect", "replicate", "circular")
}
CASES["2d uneven"] = (2, {"kernel_size": (2, 5), "stride": (3, 1), "padding": (0, 2), "dilation": (2, 1)})
CASES["2d depthwise, no bias"] = (2, {"kernel_size": 3, "groups": 4, "bias": False})


def _pair(name: str) -> tuple[nn.Conv1d | nn.Conv2d, Any]:
    torch.manual_seed(0)
    dimensions, options = CASES[name]
    conv = CONVS[dimensions](4, 8, **options, dtype=torch.float64)
    return conv, LOCALS[dimensions].from_conv(conv, SIZES[dimensions])


def law_as_the_convolution(conv: nn.Module, local: nn.Module, x: Tensor) -> None:
    """Outputs and gradients of the inputs are equal; the gradients of the positions add up to the kernel's."""
    xs = [x.clone().requires_grad_() for _ in range(2)]
    ys = [module(each) for module, each in zip((conv, local), xs, strict=True)]
    assert ys[0].shape == ys[1].shape
    torch.testing.assert_close(ys[1], ys[0], rtol=1e-12, atol=1e-12)
    seed = torch.randn_like(ys[0])
    for y in ys:
        y.backward(seed)
    torch.testing.assert_close(xs[1].grad, xs[0].grad, rtol=1e-12, atol=1e-12)
    for name, parameter in conv.named_parameters():
        summed = dict(local.named_parameters())[name].grad
        assert summed is not None
        torch.testing.assert_close(summed.sum(0), parameter.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [(), (1,), (3,)], ids=["one sample", "batch of 1", "batch of 3"])
def test_equal_positions_are_the_convolution(name: str, batch: tuple[int, ...]) -> None:
    conv, local = _pair(name)
    x = torch.randn(*batch, 4, *SIZES[CASES[name][0]], dtype=torch.float64)
    law_as_the_convolution(conv, local, x)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name: str) -> None:
    conv, local = _pair(name)
    back = local.to_conv()
    assert str(back) == str(conv)
    connected = local.windows.reads().max(0) >= 0  # a tap that never reads an input has no weight to keep
    for key, value in conv.state_dict().items():
        got = back.state_dict()[key]
        if key == "weight":
            value, got = value.flatten(2)[..., connected], got.flatten(2)[..., connected]
        torch.testing.assert_close(got, value, rtol=1e-14, atol=0)


def slow_local(layer: Any, x: Tensor) -> Tensor:
    """The sum of the definition, one output at a time."""
    windows, per = layer.windows, layer.out_channels // layer.groups
    reads, share = windows.reads(), layer.in_channels // layer.groups
    flat = x.flatten(2)
    made = torch.zeros(len(x), layer.out_channels, windows.positions, dtype=x.dtype)
    for p, o in itertools.product(range(windows.positions), range(layer.out_channels)):
        made[:, o, p] += 0 if layer.bias is None else layer.bias[p, o]
        for c, k in itertools.product(range(share), range(windows.taps)):
            if reads[p, k] >= 0:
                weight = layer.weight[p, o].reshape(share, -1)[c, k]
                made[:, o, p] += weight * flat[:, o // per * share + c, reads[p, k]]
    return made.reshape(len(x), layer.out_channels, *layer.output_size)


def law_the_definition(forward: Callable[[Any, Tensor], Tensor], layer: Any, x: Tensor) -> None:
    torch.testing.assert_close(forward(layer, x), slow_local(layer, x), rtol=1e-12, atol=1e-12)


SMALL = {
    "1d": LocallyConnected1d(2, 4, 6, 3, stride=2, padding=1, groups=2, dtype=torch.float64),
    "2d": LocallyConnected2d(2, 2, (4, 5), (3, 2), padding=(1, 0), dilation=(1, 2), dtype=torch.float64),
    "2d circular": LocallyConnected2d(2, 2, 4, 3, padding=1, padding_mode="circular", dtype=torch.float64),
    "2d same": LocallyConnected2d(1, 2, 4, 2, padding="same", bias=False, dtype=torch.float64),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("batch", [1, 2])
def test_it_is_the_sum_of_the_definition(name: str, batch: int) -> None:
    layer = SMALL[name]
    x = torch.randn(batch, layer.in_channels, *layer.input_size, dtype=torch.float64)
    law_the_definition(lambda layer, x: layer(x), layer, x)


BROKEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "positions in another order": lambda layer, x: layer(x.flip(-1)).flip(-1),
    "one kernel everywhere": lambda layer, x: layer.to_conv(tolerance=math.inf)(x),
    "the bias of the mean": lambda layer, x: (
        layer(x) + (layer.bias.mean(0) - layer.bias).T.reshape(1, -1, *layer.output_size)
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_layer_fails_the_law(broken: str) -> None:
    layer = SMALL["2d"]
    with pytest.raises(AssertionError):
        law_the_definition(BROKEN[broken], layer, torch.randn(2, 2, 4, 5, dtype=torch.float64))


def test_a_position_that_differs_fails_the_law_of_the_convolution() -> None:
    conv, local = _pair("2d uneven")
    with torch.no_grad():
        local.weight[-1] += 1e-9
    with pytest.raises(AssertionError):
        law_as_the_convolution(conv, local, torch.randn(2, 4, 7, 9, dtype=torch.float64))
    local.to_conv(tolerance=1e-6)
    with pytest.raises(PlanError, match="positions that agree"):
        local.to_conv(tolerance=1e-12)


def test_a_tap_that_reads_a_padded_zero_has_no_say_in_the_convolution() -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1)
    local = LocallyConnected2d.from_conv(conv, 4)
    with torch.no_grad():
        local.weight[0, 0, 0, 0, 0] = 100.0
    torch.testing.assert_close(local.to_conv().weight, conv.weight)


def test_state_dict_print_and_flags() -> None:
    conv = nn.Conv2d(2, 3, 3, bias=False).requires_grad_(False).eval()
    local = LocallyConnected2d.from_conv(conv, 5)
    assert list(local.state_dict()) == ["weight"]
    assert not local.weight.requires_grad
    assert not local.training
    other = LocallyConnected2d(2, 3, 5, 3, bias=False)
    other.load_state_dict(local.state_dict())
    x = torch.randn(2, 2, 5, 5)
    assert torch.equal(other(x), local(x))
    assert "input_size=(5, 5)" in str(local)
    assert LocallyConnected2d(2, 3, 5, 3, device="meta").weight.is_meta


@pytest.mark.parametrize("batch", [1, 4])
def test_bfloat16_and_autocast(batch: int) -> None:
    local = LocallyConnected2d(3, 4, 6, 3, padding=1)
    x = torch.randn(batch, 3, 6, 6)
    expected = local(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(local(x).float(), expected, atol=0.1)
    got = local.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert torch.allclose(got.float(), expected, atol=0.1)


def test_channels_last_inputs() -> None:
    local = LocallyConnected2d(3, 4, 6, 3, padding=1)
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(local(x.to(memory_format=torch.channels_last)), local(x))


def test_export_with_any_batch() -> None:
    local = LocallyConnected2d(3, 4, 6, 3, padding=1, stride=2)
    program = torch.export.export(
        local, (torch.randn(2, 3, 6, 6),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
    )
    x = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(program.module()(x), local(x))


@pytest.mark.parametrize("batch", [1, 3])
def test_it_is_compiled_whole(batch: int) -> None:
    torch.compiler.reset()
    local = LocallyConnected2d(3, 4, 6, 3, padding=1)
    compiled = torch.compile(local, backend="aot_eager", fullgraph=True)
    x = torch.randn(batch, 3, 6, 6)
    torch.testing.assert_close(compiled(x), local(x))
    compiled(x).sum().backward()
    assert local.weight.grad is not None


@pytest.mark.filterwarnings("ignore")
def test_onnx_computes_the_same(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    local = LocallyConnected2d(3, 4, 6, 3, padding=1).eval()
    x = torch.randn(3, 3, 6, 6)
    program = torch.onnx.export(local, (x,), dynamo=True, verbose=False)
    assert program is not None
    program.save(str(tmp_path / "local.onnx"))
    session = runtime.InferenceSession(str(tmp_path / "local.onnx"))
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.as_tensor(got), local(x), rtol=1e-4, atol=1e-5)


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "too small an input": (lambda: LocallyConnected2d(1, 1, 2, 3), "input_size: expected an input"),
    "groups that don't divide": (lambda: LocallyConnected2d(3, 4, 5, 3, groups=2), "groups: expected a divisor"),
    "same with a stride": (lambda: LocallyConnected2d(1, 1, 5, 3, 2, "same"), "padding: expected numbers"),
    "an unknown word": (lambda: LocallyConnected2d(1, 1, 5, 3, 1, "full"), "padding: expected numbers"),
    "an unknown mode": (lambda: LocallyConnected2d(1, 1, 5, 3, padding_mode="odd"), "padding_mode: expected one of"),
    "three sizes for two": (lambda: LocallyConnected2d(1, 1, (5, 5, 5), 3), "input_size: expected an integer or 2"),
    "a stride of zero": (lambda: LocallyConnected2d(1, 1, 5, 3, 0), "stride: expected 2 whole numbers"),
    "negative padding": (lambda: LocallyConnected2d(1, 1, 5, 3, 1, -1), "padding: expected 2 pairs"),
    "reflection beyond the input": (
        lambda: LocallyConnected1d(1, 1, 3, 3, 1, 3, padding_mode="reflect"),
        "padding: expected reflect",
    ),
    "a size with a half": (lambda: LocallyConnected2d(1, 1, 5, 3.0), "kernel_size: expected an integer or 2"),  # type: ignore[arg-type]
    "no size": (lambda: LocallyConnected1d(1, 1, None, 3), "input_size: expected an integer or 1"),  # type: ignore[arg-type]
    "a stride of True": (lambda: LocallyConnected1d(1, 1, 5, 3, True), "stride: expected an integer or 1"),
    "no channels": (lambda: LocallyConnected1d(0, 1, 5, 3), "in_channels: expected an integer ≥ 1, got 0"),
    "half a channel": (lambda: LocallyConnected1d(1, 0.5, 5, 3), "out_channels: expected an integer ≥ 1, got 0.5"),  # type: ignore[arg-type]
    "groups that are none": (lambda: LocallyConnected1d(1, 1, 5, 3, groups=None), "groups: expected an integer ≥ 1"),  # type: ignore[arg-type]
    "a layer without values": (
        lambda: LocallyConnected1d(1, 1, 5, 3, device="meta").to_conv(),
        "weight: expected values to compare, got a layer on the meta device",
    ),
    "a forward of its own": (lambda: LocallyConnected2d.from_conv(Doubled(1, 1, 3), 5), "forward of its own"),
    "another layer": (lambda: LocallyConnected2d.from_conv(nn.Conv1d(1, 1, 1), 5), "conv: expected Conv2d"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(PlanError, match=message):
        make()


@pytest.mark.parametrize("shape", [(2, 3, 6, 7), (2, 2, 6, 6), (6, 6), (1, 2, 3, 6, 6)])
def test_an_input_of_another_size_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="expected an input of shape"):
        LocallyConnected2d(3, 4, 6, 3)(torch.randn(shape))


@pytest.mark.parametrize("groups", [1, 2])
def test_an_empty_batch_gives_an_empty_batch(groups: int) -> None:
    local = LocallyConnected2d(2, 4, (6, 5), 3, stride=2, padding=1, groups=groups)
    made = local(torch.zeros(0, 2, 6, 5))
    assert made.shape == (0, 4, 3, 3)
    made.sum().backward()
    assert local.weight.grad is not None
    assert not local.weight.grad.any()


def test_sizes_may_be_of_numpy() -> None:
    local = LocallyConnected2d(np.int64(2), np.int32(4), np.array([6, 5]), np.int64(3), groups=np.int64(2))  # type: ignore[arg-type]
    assert all(type(n) is int for n in (local.in_channels, local.out_channels, local.groups, *local.input_size))
    assert local(torch.zeros(1, 2, 6, 5)).shape == (1, 4, 4, 3)
