"""What `explain` says: costs against materialised layers, fields against disturbed inputs, shifts by brute force."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f
from torch.utils.flop_counter import FlopCounterMode

import tying
from families import FAMILIES
from networks import NETWORKS, Net
from tying import Groups, explain
from tying.errors import TyingError
from tying.explain.costs import Costs
from tying.explain.dependence import Dependence, find_dependence
from tying.explain.equivariance import Equivariance, Shift, measure_equivariance
from tying.explain.layers import Observed, costs_of, observe
from tying.nn import LocallyConnected1d, LocallyConnected2d, TiedConv2d, TiedLinear


def positive(layer: Any) -> Any:
    """Float64, all weights positive: no connection can cancel another."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 1)
    return layer.double().eval()


def matrix(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The dense matrix of an affine layer, by feeding it unit vectors: (output units, input units)."""
    units = torch.eye(int(np.prod(shape)), dtype=torch.float64).reshape(-1, *shape)
    with torch.no_grad():
        return torch.stack([(layer(u[None]) - layer(torch.zeros_like(u)[None])).flatten() for u in units], 1)


def products(layer: nn.Module, shape: tuple[int, ...]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.zeros(1, *shape, dtype=torch.float64))
    return counter.get_total_flops() // 2


def numbers(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())


# ---------------------------------------------------------------- costs

CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(2, 3, 3), (2, 6, 5)),
    "no bias": (lambda: nn.Conv2d(2, 3, (1, 2), bias=False), (2, 4, 5)),
    "stride and padding": (lambda: nn.Conv2d(1, 2, 3, stride=2, padding=1), (1, 6, 7)),
    "dilation": (lambda: nn.Conv2d(1, 2, (2, 3), dilation=2, padding=(1, 2)), (1, 6, 6)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 4, 4)),
    "depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3, padding="same"), (3, 4, 4)),
    "wide padding": (lambda: nn.Conv2d(1, 1, 2, padding=2), (1, 3, 3)),
    "circular": (lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), (1, 5, 4)),
    "reflect": (lambda: nn.Conv2d(1, 2, 3, padding=2, padding_mode="reflect"), (1, 5, 4)),
    "replicate": (lambda: nn.Conv2d(1, 2, 3, padding=2, padding_mode="replicate", stride=2), (1, 5, 4)),
    "signal": (lambda: nn.Conv1d(2, 3, 4, stride=3, padding=2), (2, 11)),
    "volume": (lambda: nn.Conv3d(1, 2, 2, padding=1), (1, 3, 2, 3)),
}


def law_costs(
    layer: nn.Module, shape: tuple[int, ...], count: Callable[[nn.Module, Observed], Costs] = costs_of
) -> None:
    """Closed forms are what the layer, the locally connected and the dense layer of the same map have and do."""
    layer = positive(layer)
    (call,) = observe(layer, (torch.zeros(1, *shape, dtype=torch.float64),))[""]
    costs, dense = count(layer, call), matrix(layer, shape)
    has_bias = getattr(layer, "bias", None) is not None
    linear = nn.Linear(dense.shape[1], dense.shape[0], bias=has_bias).double()
    assert costs.connections == int((dense != 0).sum())
    assert costs.dense.values == numbers(linear)
    assert costs.dense.bytes == 8 * numbers(linear)
    assert costs.dense.multiply_adds == products(linear, (dense.shape[1],))
    assert costs.shared.multiply_adds == products(layer, shape)
    assert costs.shared.values == numbers(layer)
    if type(layer) in (nn.Conv1d, nn.Conv2d):
        kind = LocallyConnected1d if isinstance(layer, nn.Conv1d) else LocallyConnected2d
        local = kind.from_conv(layer, shape[1:])
        assert costs.local.values == numbers(local)
        assert costs.local.bytes == 8 * numbers(local)
    if costs.connections == costs.shared.multiply_adds:  # nothing is padded: the sparse matrix says what is summed
        terms = (dense != 0).sum(1)
        assert costs.shared.operations == int((2 * terms - 1).clamp(0).sum()) + has_bias * len(dense)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_costs_of_convolutions(name: str) -> None:
    build, shape = CONVOLUTIONS[name]
    law_costs(build(), shape)


TRANSPOSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.ConvTranspose2d(2, 3, 3), (2, 3, 4)),
    "stride and padding": (lambda: nn.ConvTranspose2d(1, 2, 4, stride=2, padding=1), (1, 3, 4)),
    "output padding": (lambda: nn.ConvTranspose1d(2, 2, 3, stride=3, output_padding=2, bias=False), (2, 4)),
    "groups and dilation": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, dilation=2, padding=2, groups=2), (4, 5)),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_costs_of_transposed_convolutions(name: str) -> None:
    build, shape = TRANSPOSED[name]
    law_costs(build(), shape)


OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear over a sequence": (lambda: nn.Linear(3, 2), (4, 3)),
    "linear over a table": (lambda: nn.Linear(3, 2, bias=False), (2, 2, 3)),
    "linear": (lambda: nn.Linear(3, 2), (3,)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_costs_of_linear_layers(name: str) -> None:
    build, shape = OTHERS[name]
    law_costs(build(), shape)


def _changed(**changes: Callable[[Costs], int]) -> Callable[[nn.Module, Observed], Costs]:
    def count(layer: nn.Module, call: Observed) -> Costs:
        costs = costs_of(layer, call)
        for name, change in changes.items():
            part, _, what = name.partition("_in_")
            changed = replace(getattr(costs, part), **{what: change(costs)}) if what else change(costs)
            costs = replace(costs, **{part: changed})
        return costs

    return count


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        ("stride and padding", _changed(connections=lambda c: c.shared.multiply_adds)),  # padding is a connection
        ("plain", _changed(local_in_values=lambda c: c.local.values - 2 * 12 + 2)),  # one bias for all positions
        ("groups", _changed(connections=lambda c: c.connections * 2)),  # no groups
        ("plain", _changed(shared_in_operations=lambda c: c.shared.multiply_adds)),  # products only
        ("plain", _changed(dense_in_bytes=lambda c: 4 * c.dense.values)),  # another dtype
        ("circular", _changed(connections=lambda c: c.connections - 1)),
    ],
)
def test_wrong_costs_fail_the_law(name: str, twin: Callable[[nn.Module, Observed], Costs]) -> None:
    build, shape = CONVOLUTIONS[name]
    with pytest.raises(AssertionError):
        law_costs(build(), shape, twin)


def test_the_classic_figures_come_out() -> None:
    """Goodfellow, Bengio, Courville, *Deep Learning*, 9.2: image of 320 × 280, kernel of two pixels."""
    (layer,) = explain(nn.Conv2d(1, 1, (1, 2), bias=False), torch.rand(1, 1, 280, 320)).layers
    assert layer.outputs == (1, 280, 319)
    assert (layer.shared.values, layer.shared.operations) == (2, 267_960)
    assert (layer.local.values, layer.connections) == (178_640, 178_640)
    assert layer.dense.values == layer.dense.multiply_adds == 8_003_072_000
    assert layer.dense.operations > 16_000_000_000
    assert round(layer.dense.operations / layer.shared.operations, -4) == 60_000


def test_an_embedding_over_a_sequence_beside_the_layer_that_reads_one_hot_vectors() -> None:
    table = nn.Embedding(5, 3)
    (layer,) = explain(table, torch.randint(0, 5, (2, 4))).layers
    one_hot = matrix(Net(lambda m, x: x @ table.weight.detach().double()), (4, 5))
    assert layer.connections == int((one_hot != 0).sum())
    assert layer.dense.values == one_hot.numel()
    assert (layer.shared.values, layer.local.values) == (15, 60)
    assert layer.shared.multiply_adds == 0


def test_several_names_and_calls_of_one_value_are_one_line() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(m.twice(m.twice(m.first(x))))

    model = Net(forward, first=nn.Linear(4, 4), twice=nn.Linear(4, 4), out=nn.Linear(4, 4, bias=False))
    model.out.weight = model.first.weight
    tied, twice = explain(model, torch.rand(2, 4)).layers
    assert (tied.name, tied.also, tied.calls, tied.shared.values, tied.local.values) == ("first", ("out",), 2, 20, 36)
    assert (twice.name, twice.calls, twice.shared.values, twice.local.values) == ("twice", 2, 20, 40)
    assert twice.shared.multiply_adds == 32
    assert (tied.over, twice.over) == ("2 layers", "2 calls")


def test_tied_inputs_share() -> None:
    model = nn.Sequential(TiedConv2d([0, 0, 1, -1], 2, 3), nn.Flatten(), TiedLinear([0] * 8, 3))
    conv, linear = explain(model, torch.rand(1, 4, 4, 4)).layers
    assert (conv.shared.values, conv.local.values) == (2 * 2 * 9 + 2, 4 * 2 * 3 * 9 + 8)
    assert conv.dense.values == 64 * 8 + 8
    assert conv.shared.multiply_adds == products(model[0].double(), (4, 4, 4))
    assert conv.connections == int((matrix(positive(model[0]), (4, 4, 4)) != 0).sum())
    assert (linear.shared.values, linear.local.values, linear.over) == (6, 27, "8 inputs by 1 values")


def test_a_layer_tied_in_place_shares() -> None:
    model = nn.Sequential(nn.Linear(6, 2))
    tying.tie_(model, tying.declare(model, labels={("0.weight", Groups.inputs()): [0, 0, 1, 1, -1, -1]}))
    (layer,) = explain(model, torch.rand(1, 6)).layers
    assert (layer.kind, layer.shared.values, layer.dense.values, layer.over) == ("Linear", 2 * 2 + 2, 14, "ties")


def test_what_shares_nothing_is_not_listed_and_what_is_not_known_is_named() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixing = nn.Parameter(torch.rand(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.mixing

    explanation = explain(nn.Sequential(nn.Linear(3, 3), Own(), LocallyConnected1d(1, 1, 3, 2)), torch.rand(1, 1, 3))
    assert explanation.layers == ()
    assert explanation.uncounted == ("1.mixing",)
    assert "no layer shares" in str(explanation)


class PadsItself(nn.Conv2d):
    """As TensorFlow pads for stride 2: one more at the end."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(f.pad(x, (0, 1, 0, 1)))


class Crops(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :-1]


def test_a_convolution_that_pads_in_its_own_way() -> None:
    law_costs(PadsItself(1, 2, 3, stride=2), (1, 6, 6))
    law_costs(PadsItself(1, 2, 5), (1, 4, 4))
    own = explain(nn.Sequential(Crops(1, 1, 2)), torch.rand(1, 1, 5, 5))
    assert (own.layers, own.uncounted) == ((), ("0.weight",))


# ---------------------------------------------------------------- who sees whom


def end_of(dependence: Dependence) -> Any:
    return next(step.node for step in dependence.steps if any(user.op == "output" for user in step.node.users))


def found(dependence: Dependence, *, backwards: bool) -> Tensor:
    """Which outputs depend on which inputs, (outputs, inputs): one mark at a time."""
    end = end_of(dependence)
    one, other = (end, dependence.source) if backwards else (dependence.source, end)
    like, target = dependence.varies[one], dependence.varies[other]
    ask = dependence.backward if backwards else dependence.forward
    lines: list[Tensor] = []
    for i in range(like.numel()):
        mark = torch.zeros(like.numel())
        mark[i] = 1
        lines.append(ask({one: mark.reshape(like.shape)}).get(other, torch.zeros(target.shape)).flatten() > 0)
    return torch.stack(lines, 0 if backwards else 1)


def disturbed(model: nn.Module, x: Tensor, draws: int = 12) -> Tensor:
    """Which outputs change with which inputs, (outputs, inputs), by disturbing each of them, several times."""
    changes: Tensor | None = None
    with torch.no_grad():
        for seed in range(draws):
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn((2, *x.shape), generator=generator, dtype=x.dtype) * (1 + seed)
            before = _first(model(noise[0])).flatten()
            columns = []
            for i in range(x.numel()):
                other = noise[0].clone().flatten()
                other[i] = noise[1].flatten()[i]
                columns.append(_first(model(other.reshape(x.shape))).flatten() != before)
            now = torch.stack(columns, 1)
            changes = now if changes is None else changes | now
    assert changes is not None
    return changes


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def law_dependence(model: nn.Module, x: Tensor, dependence: Dependence, *, exact: bool = True) -> None:
    """What changes is found, from above and from below alike; and nothing else, where it is exact."""
    truth, above, below = (
        disturbed(model, x, 12 if exact else 3),
        found(dependence, backwards=True),
        found(dependence, backwards=False),
    )
    assert torch.equal(above, below)
    assert not (truth & ~above).any()
    if exact:
        assert torch.equal(truth, above)


def relu_free(model: nn.Module) -> nn.Module:
    """Softplus for ReLU: a unit that is dead for all draws would hide whom it sees."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus())
    return model


TAKEN = [n for n in NETWORKS if n not in ("attention", "embedding_and_head", "tokens_tied")]
LOOSE = {
    "convolved_without_batch",
    "transposed_convolution",
    "products",
    "unknown_operation",
    "residual",
    "resampled_and_padded",
}
"""Units that are dead for all draws, no rule, or slow: there only that nothing is missed."""


@pytest.mark.parametrize("name", TAKEN)
def test_who_sees_whom_in_small_networks(name: str) -> None:
    model, x = NETWORKS[name].make()
    if not isinstance(x, Tensor) or not x.is_floating_point():
        pytest.skip("no numbers to disturb")
    model, x = relu_free(model), x[:1]
    law_dependence(model, x, find_dependence(model, x), exact=name not in LOOSE)


def causal_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, -1)
    return f.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_hand(mask: float) -> Callable[[Any, Tensor], Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).chunk(3, -1)
        later = torch.full((x.shape[1], x.shape[1]), mask, dtype=x.dtype).triu(1)
        return torch.softmax(q @ k.transpose(1, 2) + later, -1) @ v

    return forward


def sliding(m: Any, x: Tensor) -> Tensor:
    return f.max_pool1d(f.pad(m.conv(x), (2, 0)), 3, 2, 1, ceil_mode=True)[..., :3] + f.avg_pool1d(
        f.interpolate(x, scale_factor=2), 4
    )


MIXES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "causal attention": (lambda: Net(causal_attention, qkv=nn.Linear(2, 6)), (1, 4, 2)),
    "causal attention by hand": (lambda: Net(by_hand(float("-inf")), qkv=nn.Linear(2, 6)), (1, 4, 2)),
    "attention, lowest number": (lambda: Net(by_hand(torch.finfo(torch.float64).min), qkv=nn.Linear(2, 6)), (1, 3, 2)),
    "pools and resampling": (lambda: Net(sliding, conv=nn.Conv1d(2, 2, 2, bias=False)), (1, 2, 6)),
    "strided and dilated": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3, 2, 2, 2), nn.Tanh(), nn.Conv2d(2, 2, 2, groups=2)), (1, 1, 5, 6)
    ),
    "circular": (lambda: nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular"), (1, 1, 5)),
    "reflect": (lambda: nn.Conv1d(1, 1, 3, padding=2, padding_mode="reflect"), (1, 1, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(2, 4, 3, 2, 1, groups=2), (1, 2, 4)),
    "local": (
        lambda: nn.Sequential(LocallyConnected2d(1, 2, (4, 4), 3, padding=1), LocallyConnected2d(2, 1, (4, 4), 2)),
        (1, 1, 4, 4),
    ),
    "tied": (lambda: TiedConv2d([0, -1, 0, 1], 2, 2), (1, 4, 3, 3)),
    "normalised": (
        lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.GroupNorm(2, 4), nn.Conv1d(4, 2, 1, groups=2)), (1, 4, 3)
    ),
    "recurrent": (lambda: Net(lambda m, x: m.cell(x)[0], cell=nn.GRU(2, 2, batch_first=True)), (1, 3, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXES)
def test_who_sees_whom_where_places_mix(name: str) -> None:
    build, shape = MIXES[name]
    torch.manual_seed(0)
    model, x = build().double().eval(), torch.randn(shape, dtype=torch.float64)
    dependence = find_dependence(model, x)
    law_dependence(model, x, dependence, exact=name != "recurrent")
    assert bool(dependence.inexact) == (name == "recurrent")


WRONG: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "mask": (MIXES["causal attention"][0], lambda: Net(by_hand(0.0), qkv=nn.Linear(2, 6)), (1, 4, 2)),
    "no mask": (lambda: Net(by_hand(0.0), qkv=nn.Linear(2, 6)), MIXES["causal attention"][0], (1, 4, 2)),
    "dilation": (
        lambda: nn.Conv1d(1, 1, 3, padding=2, dilation=2), lambda: nn.Conv1d(1, 1, 3, padding=1), (1, 1, 7)
    ),
    "padding on the other side": (
        lambda: nn.Sequential(nn.ZeroPad1d((1, 0)), nn.Conv1d(1, 1, 2)),
        lambda: nn.Sequential(nn.ZeroPad1d((0, 1)), nn.Conv1d(1, 1, 2)), (1, 1, 5),
    ),
    "groups": (lambda: nn.Conv1d(2, 2, 1, groups=2), lambda: nn.Conv1d(2, 2, 1), (1, 2, 3)),
    "ceiling": (lambda: nn.MaxPool1d(2, 1), lambda: nn.MaxPool1d(1, 1), (1, 1, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_dependence_fails_the_law(name: str) -> None:
    right, wrong, shape = WRONG[name]
    torch.manual_seed(0)
    model, x = right().double().eval(), torch.randn(shape, dtype=torch.float64)
    with pytest.raises((AssertionError, RuntimeError)):
        law_dependence(model, x, find_dependence(wrong().double().eval(), x))


def test_weights_that_are_zero_connect_nothing() -> None:
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        model.weight[0, 1] = 0
    dependence = find_dependence(model, torch.zeros(1, 3, dtype=torch.float64))
    assert found(dependence, backwards=True).tolist() == [[True, False, True], [True, True, True]]


def test_the_dense_layer_that_a_convolution_hard_wires_sees_what_the_convolution_sees() -> None:
    conv = positive(nn.Conv2d(1, 2, 3, stride=2, padding=1))
    x = torch.randn(1, 1, 5, 6, dtype=torch.float64)
    dense = matrix(conv, (1, 5, 6))
    linear = nn.Linear(dense.shape[1], dense.shape[0]).double()
    with torch.no_grad():
        linear.weight.copy_(dense)
    ways = (find_dependence(conv, x), find_dependence(linear, x.reshape(1, -1)))
    above, below = (found(way, backwards=True) for way in ways)
    assert torch.equal(above, below)


@pytest.mark.parametrize("name", FAMILIES)
def test_fields_of_the_families_of_networks(name: str) -> None:
    model, x = FAMILIES[name].make()
    explanation = explain(model, x, shifts=1)
    assert explanation.untraced is None
    assert explanation.fields is not None
    assert not explanation.fields.inexact
    for layer in explanation.fields.layers:
        assert 1 <= layer.sees <= int(np.prod(explanation.fields.input_shape))
        assert layer.sees == layer.seen.sum()
        assert layer.reached == layer.reaches.sum()
        assert layer.reaches.shape == layer.shape
    json.loads(explanation.to_json())
    assert "What is stored" in str(explanation) or not explanation.layers


@pytest.mark.parametrize(("depth", "width"), [(1, 3), (2, 5), (3, 7), (4, 9)])
def test_convolutions_on_top_of_each_other_see_more(depth: int, width: int) -> None:
    model = nn.Sequential(*(nn.Conv2d(1, 1, 3) for _ in range(depth)))
    fields = explain(model, torch.rand(1, 1, 21, 21), shifts=0).fields
    assert fields is not None
    last = fields.layers[-1]
    assert last.sees == last.reached == width**2
    assert [end - start for start, end in last.sees_box] == [width, width]


def test_the_fields_of_lenet() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(800, 10)
    )
    fields = explain(model, torch.rand(1, 1, 28, 28), shifts=0).fields
    assert fields is not None
    assert [layer.sees for layer in fields.layers] == [5**2, 6**2, 14**2, 16**2, 28**2]
    assert [layer.reached for layer in fields.layers] == [5**2, 3**2, 7**2, 4**2, 10]
    assert [layer.unit for layer in fields.layers] == [(12, 12), (6, 6), (4, 4), (2, 2), (5,)]


# ---------------------------------------------------------------- equivariance


def by_brute_force(layer: nn.Module, structure: nn.Module, x: Tensor, by: int, stride: int) -> tuple[Any, Any]:
    """(interior, border) of one shift by a whole number of strides: pair by pair, sight from the dense matrix."""
    size, channels = x.shape[-1], x.shape[1]
    sight = matrix(structure, tuple(x.shape[1:])).reshape(-1, structure_places(structure, x), channels, size) != 0
    full = int(sight.sum((2, 3)).max())
    interior, border = [], []
    plain = layer(x)[0]
    for to in (by, -by):
        other = torch.zeros_like(x)
        for i in range(size):
            if 0 <= i - to < size:
                other[..., i] = x[..., i - to]
        entered = torch.tensor([not 0 <= i - to < size for i in range(size)])
        moved = layer(other)[0]
        for unit, place in product(range(plain.shape[0]), range(plain.shape[1])):
            before = place - to // stride
            if 0 <= before < plain.shape[1]:
                apart = abs(float(moved[unit, place] - plain[unit, before])) / float(plain.abs().max())
                sees = sight[unit, place]
                padded = int(sees.sum()) < full or int(sight[unit, before].sum()) < full
                (border if padded or bool(sees[:, entered].any()) else interior).append(apart)
    return max(interior, default=None), max(border, default=None)


def structure_places(structure: nn.Module, x: Tensor) -> int:
    with torch.no_grad():
        return structure(torch.zeros_like(x)).shape[-1]


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module] | None, int]] = {
    "valid": (lambda: nn.Conv1d(2, 3, 3), None, 1),
    "padded": (lambda: nn.Conv1d(2, 3, 3, padding=1), None, 1),
    "stride": (lambda: nn.Conv1d(2, 2, 3, stride=2), None, 2),
    "stride and padding": (lambda: nn.Conv1d(2, 2, 3, stride=2, padding=1), None, 2),
    "dilated": (lambda: nn.Conv1d(2, 2, 3, padding=2, dilation=2), None, 1),
    "average": (lambda: nn.AvgPool1d(2), None, 2),
    "largest": (lambda: nn.MaxPool1d(3, 2), lambda: nn.AvgPool1d(3, 2), 2),
    "largest, padded": (lambda: nn.MaxPool1d(3, 1, 1), lambda: nn.AvgPool1d(3, 1, 1), 1),
    "local": (lambda: LocallyConnected1d(2, 2, 12, 3), None, 1),
    "local, padded": (lambda: LocallyConnected1d(2, 2, 12, 3, padding=1), None, 1),
}


def law_shifts(layer: nn.Module, structure: nn.Module, stride: int, measured: Equivariance, x: Tensor) -> None:
    for shift in measured.alone:
        assert shift.whole == (shift.by % stride == 0)
        if shift.whole:
            expected = by_brute_force(layer, structure, x, shift.by, stride)
            assert (shift.interior, shift.border) == tuple(
                e if e is None else pytest.approx(e, abs=1e-12) for e in expected
            )


def measured(name: str) -> tuple[nn.Module, nn.Module, int, Equivariance, Tensor]:
    build, structure, stride = LAYERS[name]
    torch.manual_seed(0)
    layer = build().double()
    if not isinstance(layer, nn.MaxPool1d):
        positive(layer)
    x = torch.randn(1, 2, 12, dtype=torch.float64)
    (result,) = measure_equivariance(layer, find_dependence(layer, x), (x,), 3)
    return layer, layer if structure is None else structure(), stride, result, x


@pytest.mark.parametrize("name", LAYERS)
def test_shifts_against_brute_force(name: str) -> None:
    layer, structure, stride, result, x = measured(name)
    with torch.no_grad():
        law_shifts(layer, structure, stride, result, x)


@pytest.mark.parametrize(
    "twin",
    [
        lambda s: replace(s, whole=True),
        lambda s: replace(s, interior=None),
        lambda s: replace(s, border=0.0),
        lambda s: replace(s, interior=s.border, border=s.interior),
    ],
    ids=["every shift is whole", "no interior", "padding breaks nothing", "inside out"],
)
def test_wrong_shifts_fail_the_law(twin: Callable[[Shift], Shift]) -> None:
    layer, structure, stride, result, x = measured("stride and padding")
    with pytest.raises(AssertionError), torch.no_grad():
        law_shifts(layer, structure, stride, replace(result, alone=tuple(map(twin, result.alone))), x)


@pytest.mark.parametrize(
    ("build", "broken"),
    [
        (lambda: nn.Conv2d(1, 2, 3), ()),
        (lambda: nn.Conv2d(1, 2, 3, padding=1), ("padding",)),
        (lambda: nn.Conv2d(1, 2, 3, stride=2), ("stride 2",)),
        (lambda: nn.Conv2d(1, 2, 3, stride=(1, 3), padding=1), ("stride 3", "padding")),
        (lambda: nn.MaxPool2d(2), ("pooling by 2",)),
        (lambda: nn.AvgPool2d(3, 2, 1), ("pooling by 2", "padding")),
        (lambda: nn.ConvTranspose2d(1, 1, 2, 2), ()),
        (lambda: LocallyConnected2d(1, 1, (12, 12), 3), ("weights of its own at each place",)),
    ],
)
def test_it_says_what_breaks_equivariance(build: Callable[[], nn.Module], broken: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    (layer,) = explain(build(), torch.rand(1, 1, 12, 12)).equivariance
    assert layer.broken_by == broken


def test_what_was_thinned_out_on_the_way_does_not_come_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 1, 3, stride=2), nn.ConvTranspose1d(1, 1, 4, stride=2)).double()
    down, up = explain(model, torch.rand(1, 1, 21, dtype=torch.float64)).equivariance
    assert (down.period, up.period, up.stride) == ((2,), (2,), (0.5,))
    for shift in up.through:
        assert shift.whole == (shift.by % 2 == 0)
        assert (shift.interior is not None and shift.interior < 1e-12) == shift.whole


# ---------------------------------------------------------------- the rest


def test_the_model_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, state = torch.rand(3, 1, 6, 6), torch.get_rng_state()
    explain(model, x)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_of_a_model_that_cannot_be_traced_the_costs_are_there() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.conv(x) if float(x.sum()) > 0 else x

    explanation = explain(Net(forward, conv=nn.Conv1d(1, 1, 3)), torch.ones(1, 1, 6))
    (layer,) = explanation.layers
    assert layer.shared.values == 4
    assert explanation.fields is None
    assert explanation.untraced is not None
    assert "torch.export" in explanation.untraced
    assert "not known" in str(explanation)
    with pytest.raises(TyingError, match="nothing to draw"):
        explanation.draw("none.png")


@pytest.mark.parametrize(
    ("inputs", "options", "said"),
    [
        ("text", {}, "expected a tensor or a tuple of tensors"),
        ((), {}, "expected a tensor or a tuple of tensors"),
        (torch.rand(1, 3, 8), {}, "expected inputs that the model takes"),
        (torch.rand(1, 1, 8), {"shifts": -1}, "shifts: expected"),
    ],
)
def test_bad_input_is_refused_by_name(inputs: Any, options: dict[str, int], said: str) -> None:
    with pytest.raises(TyingError, match=said):
        explain(nn.Conv1d(1, 1, 3), inputs, **options)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 4)), (1, 1, 8, 8)),
        (lambda: nn.Sequential(nn.Conv1d(2, 2, 3), nn.MaxPool1d(2)), (1, 2, 12)),
        (lambda: nn.Conv3d(1, 1, 2), (1, 1, 4, 4, 4)),
        (lambda: nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 7)), (1, 5)),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), (1, 1, 4, 4)),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_every_kind_of_network_has_a_picture(
    model: Callable[[], nn.Module], shape: tuple[int, ...], suffix: str, tmp_path: Path
) -> None:
    path = explain(model(), torch.rand(shape), shifts=0).draw(tmp_path / f"fields.{suffix}")
    assert path.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml"}[suffix])


@pytest.mark.parametrize("name", ["fields.jpg", "fields", "none/fields.png"])
def test_a_picture_without_a_place_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(TyingError, match="path: expected"):
        explain(nn.Conv1d(1, 1, 3), torch.rand(1, 1, 6)).draw(tmp_path / name)
    assert not list(tmp_path.iterdir())
