"""What `explain` says of costs, against materialised layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f

import tying
from explain_laws import matrix, numbers, positive, products
from networks import Net
from tying import Groups, explain
from tying.explain.calls import Observed, observe
from tying.explain.costs import Costs
from tying.explain.layers import costs_of
from tying.nn import LocallyConnected1d, LocallyConnected2d, TiedConv2d, TiedLinear

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


def test_what_is_not_shared_has_its_own_columns() -> None:
    """Summing tied inputs first, a layer multiplies less than the same connections not shared."""
    conv = TiedConv2d([0, 0, 1, 1, -1, 2], 4, 3, padding=1)
    local = LocallyConnected2d(5, 4, (8, 8), 3, padding=1)
    said = explain(nn.Sequential(conv), torch.rand(1, 6, 8, 8), shifts=0)
    (layer,) = said.layers
    assert (layer.shared.multiply_adds, layer.local.multiply_adds) == (6_912, 11_520)
    assert layer.local.multiply_adds == products(local.double(), (5, 8, 8))
    _, computed, *_ = str(said).split("\n\n")
    assert [line.split()[2:4] for line in computed.splitlines()[2:4]] == [["6,912", "11,520"]] * 2


def test_weights_stored_for_taps_on_padding_are_named() -> None:
    said = explain(nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False), torch.rand(1, 2, 8, 8), shifts=0)
    assert (said.layers[0].connections, said.layers[0].local.values) == (968, 1152)
    assert "a kernel of its own at each position, its taps on padding too" in str(said)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_normalised_weight_is_no_tie(norm: Callable[[nn.Module], nn.Module]) -> None:
    explanation = explain(nn.Sequential(norm(nn.Conv1d(2, 2, 3))), torch.rand(1, 2, 8), shifts=1)
    assert [(layer.kind, layer.over) for layer in explanation.layers] == [("Conv1d", "6 positions")]
    assert explanation.fields is not None
    assert [each.kind for each in (*explanation.fields.layers, *explanation.equivariance)] == ["Conv1d", "Conv1d"]


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


class Scaled(PadsItself):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.scale = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(f.pad(x, (0, 1, 0, 1)), self.weight * self.scale, self.bias)


class Standardised(PadsItself):
    """The weight without its mean: of weights that are all equal, nothing is left."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(f.pad(x, (0, 1, 0, 1)), self.weight + self.weight.mean(), self.bias)


class Activated(PadsItself):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).neg().relu()


class Shortcut(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Reflects(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(f.pad(x, (0, 2, 0, 2), mode="reflect"))


class ScaledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return f.linear(x, self.weight * 3, self.bias)


@pytest.mark.parametrize("kind", [Scaled, Standardised, Activated])
def test_connections_of_a_forward_of_its_own_are_those_of_its_graph(kind: type[nn.Conv2d]) -> None:
    expected = int((matrix(positive(PadsItself(2, 3, 3, 2)), (2, 6, 6)) != 0).sum())
    (layer,) = explain(kind(2, 3, 3, 2), torch.rand(1, 2, 6, 6), shifts=0).layers
    assert layer.connections == expected
    if kind is not Activated:
        law_costs(kind(2, 3, 3, 2), (2, 6, 6))


def test_a_normalised_weight_over_padding_of_its_own() -> None:
    layer = nn.utils.parametrizations.weight_norm(PadsItself(2, 3, 3, 2))
    (found,) = explain(nn.Sequential(layer), torch.rand(1, 2, 6, 6), shifts=0).layers
    assert found.connections == int((matrix(positive(PadsItself(2, 3, 3, 2)), (2, 6, 6)) != 0).sum())


@pytest.mark.parametrize("kind", [Shortcut, Reflects])
def test_a_forward_that_is_more_than_its_product_is_not_counted(kind: type[nn.Conv2d]) -> None:
    explanation = explain(
        nn.Sequential(kind(1, 1, (1, 1) if kind is Shortcut else 3)), torch.rand(1, 1, 5, 5), shifts=0
    )
    assert (explanation.layers, explanation.uncounted) == ((), ("0.weight",))


def test_a_linear_layer_with_a_scaled_weight() -> None:
    law_costs(ScaledLinear(3, 2), (4, 3))


def test_layers_called_by_keyword_are_seen() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.up(input=m.conv(input=x), output_size=[8])

    model = Net(forward, conv=nn.Conv1d(1, 1, 3, stride=2), up=nn.ConvTranspose1d(1, 1, 3, stride=2))
    explanation = explain(model, torch.rand(2, 1, 8), shifts=1)
    assert [layer.name for layer in explanation.layers] == ["conv", "up"]
    assert explanation.uncounted == ()
    assert [layer.name for layer in explanation.equivariance] == ["conv", "up"]
