"""The tied layers against their dense twins: outputs, gradients, saving, exporting, and what they refuse."""

from __future__ import annotations

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tying.errors import PlanError
from tying.nn import TiedConv1d, TiedConv2d, TiedConv3d, TiedLinear
from tying.nn.product import Reading, Way

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own, once

LABELS = {
    "ties and zeros": [0, 1, -1, 0, 2, 1, -1, 0],
    "zeros only": [0, -1, 1, 2, -1, 3, -1, 4],
    "identity": list(range(8)),
    "permuted names": [7, 6, 5, 4, 3, 2, 1, 0],
    "one label": [3] * 8,
    "one input": [-1, -1, -1, -1, -1, 5, -1, -1],
}
LAYERS = {
    "linear": (lambda: nn.Linear(8, 5), (3, 8)),
    "linear without bias": (lambda: nn.Linear(8, 5, bias=False), (3, 8)),
    "linear, leading dims": (lambda: nn.Linear(8, 5), (2, 3, 4, 8)),
    "linear, one vector": (lambda: nn.Linear(8, 5), (8,)),
    "conv1d": (lambda: nn.Conv1d(8, 5, 3, padding=1), (2, 8, 7)),
    "conv1d, unbatched": (lambda: nn.Conv1d(8, 5, 3, stride=2), (8, 7)),
    "conv2d": (lambda: nn.Conv2d(8, 5, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 8, 7, 6)),
    "conv2d, same": (lambda: nn.Conv2d(8, 5, 3, padding="same", bias=False), (2, 8, 5, 5)),
    "conv2d, same, even kernel": (lambda: nn.Conv2d(8, 5, (4, 2), padding="same", dilation=(1, 3)), (2, 8, 6, 5)),
    "conv2d, unbatched": (lambda: nn.Conv2d(8, 5, 3), (8, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(8, 5, 2, padding=1), (2, 8, 3, 4, 3)),
}


def tie(layer: nn.Module, labels: list[int]) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return TiedLinear.from_linear(layer, labels)
    kind = {nn.Conv1d: TiedConv1d, nn.Conv2d: TiedConv2d, nn.Conv3d: TiedConv3d}[type(layer)]
    return kind.from_conv(layer, labels)


def dense(layer: nn.Module, labels: list[int]) -> nn.Module:
    """The oracle: the layer with every input's weight replaced by the mean over its label, in plain loops."""
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for i, label in enumerate(labels):
            same = [j for j, other in enumerate(labels) if other == label]
            twin.weight[:, i] = 0 if label < 0 else sum(layer.weight[:, j] for j in same) / len(same)
    return twin


def law_same_outputs(tied: nn.Module, twin: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(tied(x), twin(x), rtol=1e-12, atol=1e-12)


def law_gradients_add_up(tied: nn.Module, twin: nn.Module, x: Tensor, labels: list[int]) -> None:
    gradients = []
    for module in (tied, twin):
        given = x.clone().requires_grad_()
        module.zero_grad()
        (module(given) ** 2).sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)
    order = list(dict.fromkeys(label for label in labels if label >= 0))
    for k, label in enumerate(order):
        summed = sum(twin.weight.grad[:, i] for i, other in enumerate(labels) if other == label)
        torch.testing.assert_close(tied.weight.grad[:, k], summed, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_a_tied_layer_computes_and_learns_like_its_dense_twin(make, shape, labels):
    torch.manual_seed(0)
    layer = make().double()
    tied, twin, x = tie(layer, labels), dense(layer, labels), torch.randn(shape, dtype=torch.float64)
    law_same_outputs(tied, twin, x)
    law_gradients_add_up(tied, twin, x, labels)
    back = tied.to_linear() if isinstance(tied, TiedLinear) else tied.to_conv()
    assert type(back) is type(layer)
    torch.testing.assert_close(back.state_dict(), twin.state_dict())
    assert tied.weight.shape[1] == len(set(labels) - {-1})


WAYS = ("sum", "select", "dense")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_every_way_computes_and_learns_the_same(make, shape, labels, way):
    torch.manual_seed(0)
    layer = make().double()
    tied, twin, x = tie(layer, labels), dense(layer, labels), torch.randn(shape, dtype=torch.float64)
    tied.way = way
    law_gradients_add_up(tied, twin, x, labels)
    with torch.no_grad():
        law_same_outputs(tied, twin, x)
    with torch.inference_mode():
        law_same_outputs(tied, twin, x)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("name", ["conv2d", "conv2d, same", "conv3d"])
def test_channels_last_is_kept_and_computes_and_learns_the_same(name, labels, way):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    layer = make().double()
    tied, twin = tie(layer, labels), dense(layer, labels)
    tied.way = way
    tied.to(memory_format=layout)
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=layout)
    law_gradients_add_up(tied, twin, x, labels)
    with torch.no_grad():
        law_same_outputs(tied, twin, x)
        assert tied._reading("sum", 1).sums(x, tied.classes).is_contiguous(memory_format=layout)
        assert tied(x).is_contiguous(memory_format=layout) == twin(x).is_contiguous(memory_format=layout)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, in jvp
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("way", WAYS)
def test_under_the_transformations_of_torch_func_and_for_empty_batches(make, shape, way):
    torch.manual_seed(0)
    layer = make().double()
    tied, x = tie(layer, LABELS["ties and zeros"]), torch.randn(2, *shape, dtype=torch.float64)
    tied.way = way
    with torch.no_grad():
        each = torch.stack([tied(sample) for sample in x])
        torch.testing.assert_close(torch.func.vmap(tied)(x), each, rtol=1e-12, atol=1e-12)
        _, moved = torch.func.jvp(tied, (x[0],), (x[1],))
        torch.testing.assert_close(moved, tied(x[1]) - tied(torch.zeros_like(x[1])), rtol=1e-12, atol=1e-12)
        if shape[0] < 8:
            assert tied(x[0, :0]).shape[0] == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_as_close_as_the_dense_layers(way, layout, autocast):
    torch.manual_seed(0)
    layer, labels = nn.Conv2d(64, 32, 3, padding=1), [(7 * i) % 21 if i % 2 else -1 for i in range(64)]
    x = torch.randn(4, 64, 14, 14).to(memory_format=layout)
    exact = dense(layer, labels)(x).detach()
    tied, twin = tie(layer, labels).to(memory_format=layout), dense(layer, labels).to(memory_format=layout)
    tied.way = way
    if not autocast:
        tied, twin, x = tied.bfloat16(), twin.bfloat16(), x.bfloat16()
    for grad in (torch.no_grad, torch.enable_grad):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), grad():
            mine, others = tied(x), twin(x)
        assert mine.dtype == others.dtype == torch.bfloat16
        # Sums are rounded, too: once by the fast ways, at every step by index_add.
        assert (mine - exact).norm() <= 2 * (others - exact).norm()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["linear, leading dims", "conv1d", "conv2d", "conv3d"])
def test_a_tied_layer_is_compiled_whole(name, way):
    make, shape = LAYERS[name]
    tied, x = tie(make(), LABELS["ties and zeros"]), torch.randn(shape)
    tied.way = way
    torch.compiler.reset()
    compiled = torch.compile(tied, backend="aot_eager", fullgraph=True)
    for grad in (torch.no_grad, torch.enable_grad):
        with grad():
            torch.testing.assert_close(compiled(x), tied(x))


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # torch's own
def test_what_is_exported_sums_and_holds_no_wide_weight():
    tied = tie(nn.Conv2d(8, 5, 3), LABELS["ties and zeros"])
    tied.way = "dense"
    program = torch.export.export(tied, (torch.randn(2, 8, 7, 6),)).run_decompositions({})
    assert not [node for node in program.graph.nodes if "index_copy" in str(node.target)]
    assert [node for node in program.graph.nodes if "index_add" in str(node.target)]


def test_the_laws_fail_for_a_layer_that_keeps_one_input_of_each_label_instead_of_the_sum():
    class Forgets(TiedLinear):
        def _reading(self, way: Way, dim: int) -> Reading:
            first = [self.labels.tolist().index(k) for k in range(self.classes)]
            return Reading(way, dim, torch.tensor(first), torch.arange(self.classes))

    torch.manual_seed(0)
    layer, labels = nn.Linear(8, 5).double(), LABELS["ties and zeros"]
    broken, twin = Forgets.from_linear(layer, labels), dense(layer, labels)
    x = torch.randn(3, 8, dtype=torch.float64)
    with pytest.raises(AssertionError):
        law_same_outputs(broken, twin, x)
    with pytest.raises(AssertionError):
        law_gradients_add_up(broken, twin, x, labels)


def test_the_laws_fail_for_a_way_that_gives_the_inputs_that_are_not_read_the_first_weight():
    class Reads(TiedLinear):
        def _reading(self, way: Way, dim: int) -> Reading:
            return Reading("dense", dim, torch.arange(len(self.labels)), self.labels.clamp(min=0))

    torch.manual_seed(0)
    layer, labels = nn.Linear(8, 5).double(), LABELS["ties and zeros"]
    broken, twin = Reads.from_linear(layer, labels), dense(layer, labels)
    x = torch.randn(3, 8, dtype=torch.float64)
    with pytest.raises(AssertionError):
        law_same_outputs(broken, twin, x)
    with pytest.raises(AssertionError):
        law_gradients_add_up(broken, twin, x, labels)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padding", ["same", 0])
def test_a_large_batch_is_computed_in_parts(way, padding, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("tying.nn.parts.PART", 1000)
    layer = nn.Conv2d(8, 5, 3, padding=padding).double()
    tied, twin = tie(layer, LABELS["ties and zeros"]), dense(layer, LABELS["ties and zeros"])
    tied.way = way
    sizes = []
    convolve = tied._convolve
    tied._convolve = lambda x: (sizes.append(len(x)), convolve(x))[1]
    with torch.no_grad():
        for batch in (0, 1, 2, 7):
            law_same_outputs(tied, twin, torch.randn(batch, 8, 7, 6, dtype=torch.float64))
    assert sizes == [0, *[1] * 10]


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_a_tied_layer_survives_copying_saving_and_loading_into_other_labels(make, shape):
    layer = tie(make(), LABELS["ties and zeros"])
    other = tie(make(), [-1, -1, 0, 1, 2, 2, 2, 2])
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    x = torch.randn(shape)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert other.labels.tolist() == layer.labels.tolist()


def test_labels_that_do_not_belong_to_the_weight_are_refused_when_loaded():
    layer = TiedLinear([0, 1, 1, -1], 2)
    state = layer.state_dict()
    state["labels"] = torch.tensor([0, 0, 0, -1])
    with pytest.raises(PlanError, match="labels: expected 2 distinct labels"):
        layer.load_state_dict(state)


def test_a_tied_layer_is_loaded_onto_the_meta_device():
    with torch.device("meta"):
        skeleton = TiedLinear([0, 0, 1], 2)
    layer = TiedLinear([1, -1, 0], 2)
    skeleton.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(2, 3)
    assert torch.equal(skeleton(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_and_mode_and_what_is_trained_are_the_layers(dtype):
    linear = nn.Linear(4, 3, dtype=dtype).eval()
    linear.weight.requires_grad_(False)
    tied = TiedLinear.from_linear(linear, [0, 0, -1, 1])
    assert tied(torch.randn(2, 4, dtype=dtype)).dtype == dtype
    assert tied.weight.dtype == tied.bias.dtype == dtype
    assert not tied.training
    assert not tied.weight.requires_grad
    assert tied.bias.requires_grad
    assert tied.weight.data_ptr() != linear.weight.data_ptr()


@pytest.mark.parametrize("name", ["linear, leading dims", "conv1d", "conv2d", "conv3d"])
def test_a_tied_layer_is_exported_with_a_dynamic_batch(name):
    make, shape = LAYERS[name]
    tied = tie(make(), LABELS["ties and zeros"])
    x = torch.randn(shape)
    program = torch.export.export(tied, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    larger = torch.randn(5, *shape[1:])
    torch.testing.assert_close(program.module()(larger), tied(larger))


def test_new_layers_start_like_the_dense_layer_that_reads_as_many_inputs():
    torch.manual_seed(0)
    tied, plain = TiedLinear(np.arange(300) % 100, 1000), nn.Linear(300, 1000)
    x = torch.randn(64, 300)
    ratio = tied(x).std() / plain(x).std()
    assert 0.95 < ratio < 1.05
    assert "read=300, classes=100" in repr(tied)
    assert "kernel_size=(3,), stride=(1,)" in repr(TiedConv1d([0, 0], 2, 3))


class Threefold(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TiedLinear([-1, -1], 2), "labels: expected at least one input that is read"),
        (lambda: TiedLinear([[0, 1]], 2), "labels: expected one integer per group"),
        (lambda: TiedLinear.from_linear(nn.Linear(3, 2), [0, 0]), "labels: expected 3 labels"),
        (lambda: TiedConv2d([0, 0], 2, 3, padding_mode="circular"), "padding_mode: expected 'zeros'"),
        (lambda: TiedConv2d([0, 0], 2, (3, 3, 3)), "kernel_size: expected an integer or 2"),
        (lambda: TiedConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=2), [0] * 4), "conv: expected Conv2d with groups=1"),
        (lambda: TiedConv2d.from_conv(nn.Conv1d(4, 4, 3), [0] * 4), "conv: expected Conv2d"),
        (lambda: TiedConv2d.from_conv(nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), [0, 0]), "padding_mode"),
        (lambda: TiedConv2d.from_conv(Threefold(4, 2, 1), [0, 1, 2, 3]), "conv: .* has a forward of its own"),
        (lambda: TiedLinear.from_linear(Doubled(3, 2), [0, 1, 2]), "linear: .* has a forward of its own"),
        (lambda: setattr(TiedLinear([0, 0], 2), "way", "fast"), "way: expected one of sum, select, dense, got 'fast'"),
    ],
)
def test_what_cannot_be_tied_is_refused_by_name(call, message):
    with pytest.raises(PlanError, match=message):
        call()


@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize(
    ("make", "shape", "expected"),
    [
        (lambda: TiedLinear([0, 0, 1], 2), (2, 4), "TiedLinear: expected an input of shape (*, 3), got (2, 4)"),
        (lambda: TiedLinear([0, 0, 1], 2), (), "TiedLinear: expected an input of shape (*, 3), got ()"),
        (lambda: TiedConv1d([0, 0, 1], 2, 3), (4, 5), "of shape (N, 3, L) or (3, L), got (4, 5)"),
        (lambda: TiedConv2d([0, 0, 1], 2, 3), (3, 5), "of shape (N, 3, H, W) or (3, H, W), got (3, 5)"),
        (lambda: TiedConv2d([0, 0, 1], 2, 3), (2, 4, 5, 5), "of shape (N, 3, H, W) or (3, H, W), got (2, 4, 5, 5)"),
        (lambda: TiedConv3d([0, 0, 1], 2, 3), (3, 5, 5), "of shape (N, 3, D, H, W) or (3, D, H, W), got (3, 5, 5)"),
        (lambda: TiedConv1d([0, 0, 1], 2, 3), (1, 2, 3, 5), "of shape (N, 3, L) or (3, L), got (1, 2, 3, 5)"),
    ],
)
def test_an_input_of_another_shape_is_refused(make, shape, expected, grad):
    with grad(), pytest.raises(RuntimeError, match=re.escape(expected)):
        make()(torch.ones(shape))


@pytest.mark.parametrize("way", WAYS)
def test_the_way_is_copied_and_is_no_part_of_the_state(way):
    tied = TiedLinear([0, 0, 1], 2)
    assert tied.way == "sum"
    tied.way = way
    assert copy.deepcopy(tied).way == pickle.loads(pickle.dumps(tied)).way == way
    assert set(tied.state_dict()) == {"weight", "bias", "labels"}
    with pytest.raises(PlanError, match="way: "):
        tied.way = "fast"
    assert tied.way == way


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_forward_derivatives_where_no_gradient_is_recorded(make, shape):
    torch.manual_seed(0)
    tied = tie(make().double(), LABELS["ties and zeros"])
    x, direction = torch.randn(2, *shape, dtype=torch.float64)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        made = tied(torch.autograd.forward_ad.make_dual(x, direction))
        moved = torch.autograd.forward_ad.unpack_dual(made).tangent
        expected = tied(direction) - tied(torch.zeros_like(direction))
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)
