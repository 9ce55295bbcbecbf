"""What training a tied layer holds: its input and its weight, as the dense layer does; and that it learns the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from test_tied_layers import LABELS, LAYERS, WAYS, tie
from tying.nn import TiedConv1d, TiedConv2d, TiedConv3d, TiedLinear, product

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own, once

TIES = [0, 1, -1, 0, 2, 1, -1, 0]
MAPS = {
    "linear": lambda: nn.Linear(8, 5),
    "conv1d": lambda: nn.Conv1d(8, 5, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(8, 5, 3, padding=1),
    "conv3d": lambda: nn.Conv3d(8, 5, 2),
}
SHAPES = {"linear": (64, 8), "conv1d": (16, 8, 32), "conv2d": (4, 8, 12, 12), "conv3d": (2, 8, 6, 6, 6)}


def kept_bytes(make: Callable[[], Tensor], *but: Tensor) -> int:
    """Bytes that autograd keeps while this is made, beside these tensors."""
    known = {tensor.untyped_storage().data_ptr() for tensor in but}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no place is used twice

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = make()
    assert made.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def law_keeps_its_input_and_its_weight(layer: nn.Module, x: Tensor) -> None:
    beside = kept_bytes(lambda: layer(x), x, *layer.buffers())
    assert beside <= layer.weight.nbytes, f"{beside} bytes beside the input"


@contextmanager
def plain_operations() -> Iterator[None]:
    """The broken twin: autograd keeps what it likes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "nothing_transforms", lambda: False)
        yield


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("trained", [False, True], ids=["batch", "hidden"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAPS)
def test_only_the_input_and_the_weight_are_kept(name, way, trained, autocast):
    layer, x = tie(MAPS[name](), TIES), torch.randn(SHAPES[name], requires_grad=trained)
    layer.way = way
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        law_keeps_its_input_and_its_weight(layer, x)
    if name.startswith("conv2d"):
        layer, x = layer.to(memory_format=torch.channels_last), x.detach().to(memory_format=torch.channels_last)
        law_keeps_its_input_and_its_weight(layer, x.requires_grad_(trained))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAPS)
def test_plain_operations_keep_more_and_fail_the_law(name, way):
    layer, x = tie(MAPS[name](), TIES), torch.randn(SHAPES[name])
    layer.way = way
    with plain_operations(), pytest.raises(AssertionError, match="beside the input"):
        law_keeps_its_input_and_its_weight(layer, x)


def test_a_frozen_weight_keeps_no_input():
    layer, x = tie(nn.Linear(8, 5), TIES), torch.randn(64, 8, requires_grad=True)
    layer.weight.requires_grad_(False)
    assert kept_bytes(lambda: layer(x), layer.weight) == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("frozen", ["weight", "bias", "input"])
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_what_is_trained_learns_the_same_where_the_rest_is_not(make, shape, frozen, way):
    torch.manual_seed(0)
    tied, x = tie(make().double(), TIES), torch.randn(shape, dtype=torch.float64, requires_grad=frozen != "input")
    tied.way = way
    for name, parameter in tied.named_parameters():
        parameter.requires_grad_(name != frozen)
    trained = [tensor for tensor in (x, *tied.parameters()) if tensor.requires_grad]
    mine = torch.autograd.grad((tied(x) ** 2).sum(), trained)
    with plain_operations():
        theirs = torch.autograd.grad((tied(x) ** 2).sum(), trained)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def law_derives_twice(tied: nn.Module, x: Tensor) -> None:
    names = list(dict(tied.named_parameters()))

    def made(given: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(tied, dict(zip(names, parameters, strict=True)), (given,))

    operands = (x.requires_grad_(), *(p.detach().clone().requires_grad_() for p in tied.parameters()))
    try:
        torch.autograd.gradcheck(made, operands)
        torch.autograd.gradgradcheck(made, operands)
    except RuntimeError as error:
        raise AssertionError(str(error)) from error


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("labels", [LABELS["ties and zeros"], [0, 1, 2, 2, 1, 0, 0, 1]], ids=["zeros", "all read"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(8, 2), (2, 8)),
        (lambda: nn.Conv2d(8, 2, 2, stride=2), (2, 8, 3, 3)),
        (lambda: nn.Conv2d(8, 2, (1, 2), padding="same", bias=False), (8, 2, 3)),
    ],
    ids=["linear", "conv2d", "conv2d, same"],
)
def test_gradients_of_gradients_agree_with_differences(make, shape, labels, way):
    torch.manual_seed(0)
    tied = tie(make().double(), labels)
    tied.way = way
    law_derives_twice(tied, torch.randn(shape, dtype=torch.float64))


def test_a_gradient_that_forgets_an_input_of_each_label_fails_the_law(monkeypatch):
    whole = product.expand_by_label

    def forgets(sums: Tensor, dim: int, kept: Tensor, targets: Tensor, inputs: int) -> Tensor:
        return whole(sums, dim, kept[1:], targets[1:], inputs)

    monkeypatch.setattr(product, "expand_by_label", forgets)
    with pytest.raises(AssertionError):
        law_derives_twice(tie(nn.Linear(8, 2).double(), TIES), torch.randn(2, 8, dtype=torch.float64))


def test_gradients_for_many_outputs_at_once():
    torch.manual_seed(0)
    for make in (lambda: nn.Linear(8, 5), lambda: nn.Conv1d(8, 5, 3)):
        tied, x = tie(make().double(), TIES), torch.randn(3, 8, 4, dtype=torch.float64).requires_grad_()
        given = x.movedim(1, 2) if isinstance(tied, TiedLinear) else x
        made = tied(given)
        each = torch.randn(4, *made.shape, dtype=torch.float64)
        operands = (x, tied.weight, tied.bias)
        together = torch.autograd.grad(made, operands, each, is_grads_batched=True, retain_graph=True)
        apart = [torch.autograd.grad(made, operands, one, retain_graph=True) for one in each]
        torch.testing.assert_close(together, tuple(torch.stack(g) for g in zip(*apart, strict=True)))


def test_under_autocast_a_weight_that_others_use_learns_from_all_of_them():
    """Autocast keeps its 16-bit copies of leaves: one made without gradients must not serve where they are recorded."""
    torch.manual_seed(0)
    tied, x, small = tie(nn.Linear(8, 5), TIES), torch.randn(16, 8), torch.randn(16, 3)

    def learned(autocast: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = tied(x).square().sum() + nn.functional.linear(small, tied.weight).square().sum()
        return torch.autograd.grad(loss, tied.weight)[0]

    assert learned(autocast=True).dtype == torch.float32
    torch.testing.assert_close(learned(autocast=True), learned(autocast=False), rtol=0.05, atol=0.5)


@pytest.mark.parametrize("way", WAYS)
def test_an_input_that_is_changed_in_place_is_refused_as_by_the_dense_layer(way):
    tied, x = tie(nn.Linear(8, 5), TIES), torch.randn(3, 8)
    tied.way = way
    for layer in (tied, nn.Linear(8, 5)):
        made = layer(x)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            made.sum().backward()


@pytest.mark.parametrize("way", WAYS)
def test_a_way_chosen_between_the_passes_changes_nothing(way):
    tied, x = tie(nn.Conv2d(8, 5, 3), TIES), torch.randn(2, 8, 5, 5)
    tied.way = way
    [expected] = torch.autograd.grad(tied(x).square().sum(), tied.weight)
    loss = tied(x).square().sum()
    tied.way = WAYS[(WAYS.index(way) + 1) % 3]
    tied._kept, tied._targets = tied._kept[:1], tied._targets[:1]
    torch.testing.assert_close(torch.autograd.grad(loss, tied.weight), (expected,))


@pytest.mark.parametrize("way", WAYS)
def test_within_checkpoints_and_for_inputs_of_inference_mode(way):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), TiedConv2d(TIES, 5, 3))
    model[2].way = way
    x = torch.randn(2, 3, 7, 7)
    expected = torch.autograd.grad(model(x).square().sum(), [*model.parameters()])
    found = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), [*model.parameters()])
    torch.testing.assert_close(found, expected)
    assert kept_bytes(lambda: checkpoint(model, x, use_reentrant=False), x) == 0
    if way == "sum":  # the others never could: the product itself would keep such an input
        with torch.inference_mode():
            hidden = model[:2](x)
        model[2](hidden).square().sum().backward()
        torch.testing.assert_close(model[2].weight.grad, expected[2])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAPS)
def test_per_sample_gradients_of_torch_func(name, way):
    torch.manual_seed(0)
    tied, x = tie(MAPS[name]().double(), TIES), torch.randn(SHAPES[name], dtype=torch.float64)
    tied.way = way

    def loss(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(tied, parameters, (one[None],)).square().sum()

    parameters = dict(tied.named_parameters())
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    tied(x).square().sum().backward()
    for key, parameter in parameters.items():
        torch.testing.assert_close(each[key].sum(0), parameter.grad)


def test_copies_of_a_layer_in_the_middle_of_training_learn_on():
    tied, x = tie(nn.Linear(8, 5), TIES), torch.randn(3, 8)
    loss = tied(x).square().sum()
    other = copy.deepcopy(tied)
    loss.backward()
    other(x).square().sum().backward()
    torch.testing.assert_close(other.weight.grad, tied.weight.grad)


MANY = {
    "linear": (lambda labels: TiedLinear(labels, 2), (9, 2048)),
    "conv1d": (lambda labels: TiedConv1d(labels, 2, 3), (1, 2048, 9)),
    "conv2d": (lambda labels: TiedConv2d(labels, 2, 2), (1, 2048, 4, 4)),
    "conv2d, channels last": (
        lambda labels: TiedConv2d(labels, 2, 2).to(memory_format=torch.channels_last),
        (1, 2048, 4, 4),
    ),
    "conv3d": (lambda labels: TiedConv3d(labels, 2, 2), (1, 2048, 3, 3, 3)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("within", [False, True], ids=["backward outside", "backward within"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MANY)
def test_under_autocast_the_gradient_of_many_tied_columns_is_that_of_float64(name, way, within, dtype):
    torch.manual_seed(0)
    make, shape = MANY[name]
    tied, x = make([0] * 2000 + [-1] * 8 + [1] * 40), torch.rand(shape) / 2
    exact = copy.deepcopy(tied).double()
    exact(x.double()).sum().backward()
    tied.way = way
    with torch.autocast("cpu", dtype):
        loss = tied(x).float().sum()
        if within:
            loss.backward()
    if not within:
        loss.backward()
    assert tied.weight.grad.dtype == torch.float32
    for mine, theirs in zip(tied.weight.grad.unbind(1), exact.weight.grad.unbind(1), strict=True):
        assert (mine - theirs).norm() <= 0.01 * theirs.norm()


@pytest.mark.parametrize("within", [False, True], ids=["backward outside", "backward within"])
@pytest.mark.parametrize("way", ["select", "dense"])
@pytest.mark.parametrize("make", [lambda: TiedLinear([0] * 4096, 2), lambda: TiedConv2d([0] * 4096, 2, 1)])
def test_what_overflows_in_float16_is_summed_in_float32(make, way, within):
    tied = make()
    tied.way = way
    x = torch.full((64, 4096), 10.0) if isinstance(tied, TiedLinear) else torch.full((1, 4096, 8, 8), 10.0)
    with torch.autocast("cpu", torch.float16):
        loss = tied(x).float().sum()
        if within:
            loss.backward()
    if not within:
        loss.backward()
    assert torch.equal(tied.weight.grad, torch.full_like(tied.weight, 2621440.0))


@pytest.mark.parametrize("way", ["select", "dense"])
def test_a_16_bit_weight_sums_its_columns_in_float32(way):
    tied = TiedLinear([0] * 4096, 2, dtype=torch.bfloat16)
    tied.way = way
    tied(torch.ones(1, 4096, dtype=torch.bfloat16)).sum().backward()
    assert torch.equal(tied.weight.grad, torch.full_like(tied.weight, 4096.0))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAPS)
def test_gradients_of_complex_numbers_are_those_of_the_dense_weight(name, way):
    torch.manual_seed(0)
    make = {"linear": lambda: TiedLinear(TIES, 5, dtype=torch.complex128)}.get(name)
    if make is None:
        kind, size = {"conv1d": (TiedConv1d, 3), "conv2d": (TiedConv2d, 3), "conv3d": (TiedConv3d, 2)}[name]
        make = lambda: kind(TIES, 5, size, padding=1, dtype=torch.complex128)  # noqa: E731
    tied, x = make(), torch.randn(SHAPES[name], dtype=torch.complex128).requires_grad_()
    with torch.no_grad():
        tied.weight.copy_(torch.randn_like(tied.weight))
    tied.way = way
    wide = torch.cat([tied.weight[:, [k]] if k >= 0 else torch.zeros_like(tied.weight[:, :1]) for k in TIES], 1)
    product = {"linear": nn.functional.linear, "conv1d": nn.functional.conv1d, "conv2d": nn.functional.conv2d}
    function, extra = product.get(name, nn.functional.conv3d), {} if name == "linear" else {"padding": 1}
    expected = function(x, wide, tied.bias, **extra)
    torch.testing.assert_close(tied(x), expected)
    operands = (x, tied.weight, tied.bias)
    mine = torch.autograd.grad(tied(x).abs().square().sum(), operands)
    torch.testing.assert_close(mine, torch.autograd.grad(expected.abs().square().sum(), operands))
    with torch.no_grad():
        torch.testing.assert_close(tied(x), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAPS)
def test_the_weight_is_kept_only_where_the_input_needs_a_gradient(name, way):
    torch.manual_seed(0)
    tied, x = tie(MAPS[name](), TIES), torch.randn(2, *SHAPES[name])
    tied.way = way
    assert kept_bytes(lambda: tied(x[0]), x, *tied.buffers()) == 0
    twin = copy.deepcopy(tied)
    first, second = (tied(each).square().sum() for each in x)
    first.backward()
    with torch.no_grad():
        tied.weight.sub_(0.1 * tied.weight.grad)
    second.backward()
    sum(twin(each).square().sum() for each in x).backward()
    torch.testing.assert_close(tied.weight.grad, twin.weight.grad)
    made = tied(x[0].requires_grad_())
    with torch.no_grad():
        tied.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        made.sum().backward()


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_of_inference_mode_computes_where_gradients_are_recorded(way):
    with torch.inference_mode():
        tied, dense = TiedLinear([0, 0, 1, -1], 2), nn.Linear(4, 2)
    tied.way = way
    x = torch.randn(3, 4)
    assert dense(x).requires_grad
    with torch.no_grad():
        expected = tied(x)
    torch.testing.assert_close(tied(x), expected)
    tied.requires_grad_(False)
    torch.testing.assert_close(tied(x), expected)


@pytest.mark.parametrize(
    ("way", "trained", "unused"),
    [
        ("sum", "input", ["sum_by_label", "select"]),
        ("select", "input", ["sum_by_label", "select"]),
        ("dense", "weight", ["expand_by_label"]),
    ],
)
def test_an_operand_whose_values_no_gradient_needs_is_not_made_anew(way, trained, unused, monkeypatch):
    tied, x = tie(nn.Conv2d(8, 5, (2, 3), padding="same"), TIES), torch.randn(2, 8, 6, 6)
    tied.way = way
    x.requires_grad_(trained == "input")
    tied.weight.requires_grad_(trained == "weight")
    loss = tied(x).sum()
    for name in unused:
        monkeypatch.setattr(product, name, None)
    loss.backward()
    assert (x if trained == "input" else tied.weight).grad is not None
