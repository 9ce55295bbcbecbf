"""Channels of registered and drawn networks, held to the laws; and broken rules, which must fail them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as f

from channel_laws import (
    check_constants,
    check_cut_is_exact,
    check_folding,
    check_readers_are_all,
    law,
    plant_dead_units,
)
from fuzzer import fuzzed
from networks import NETWORKS, Net, Network, randomised
from tying.channels import rules
from tying.channels.constants import constants_of, find_constants
from tying.channels.find import Slice, channels_of, find_channels
from tying.channels.graph import Call, export
from tying.channels.labels import Ledger, unique
from tying.channels.tracer import Tracer, spread
from tying.enforce.compaction.compact import compact
from tying.errors import CompactError
from tying.plan import TiePlan

REGISTERED = [pytest.param(network, id=name) for name, network in NETWORKS.items()]


@pytest.mark.parametrize("network", REGISTERED)
def test_registered(network: Network) -> None:
    model, x = network.make()
    graph = export(model, x)
    channels = channels_of(graph)
    assert sum(channel.blocked is None for channel in channels) == network.free
    reasons = {c.blocked for c in channels if c.blocked} - {"an input of the model", "an output of the model"}
    for reason in reasons:
        assert any(words in reason for words in network.blocked), reason
    for words in network.blocked:
        assert any(words in reason for reason in reasons), words
    check_readers_are_all(model, x, channels)
    if network.literal:
        with pytest.raises(AssertionError):
            check_cut_is_exact(model, x, channels)
    else:
        check_cut_is_exact(model, x, channels)
    for every in (1, 2, 3):
        dead = copy.deepcopy(model)
        plant_dead_units(dead, channels, every)
        found = constants_of(export(dead, x), x)
        check_constants(dead, found, network.shape)
        if not network.literal:
            check_folding(dead, found, 3 * torch.randn(5, *network.shape[1:], dtype=torch.float64))


@pytest.mark.parametrize("seed", range(80))
def test_fuzzed(seed: int) -> None:
    model, x = fuzzed(seed)
    graph = export(model, x)
    channels = channels_of(graph)
    check_readers_are_all(model, x, channels)
    check_cut_is_exact(model, x, channels)
    plant_dead_units(model, channels, 2)
    found = constants_of(graph, x)
    check_constants(model, found, x.shape)
    check_folding(model, found, 3 * torch.randn(5, *x.shape[1:], dtype=torch.float64))


def forgetful_linear(tracer: Tracer, call: Call) -> Any:
    """A rule that neither reads nor passes on."""
    return spread(call["weight"].along(0), len(call.shape) - 1, len(call.shape)).expand(call.shape)


def wrong_stride(tracer: Tracer, call: Call) -> Any:
    return call["self"].movedim(1, -1).reshape(call.shape)


def as_elementwise(tracer: Tracer, call: Call) -> Any:
    return rules.pointwise(tracer, call)


def as_batchnorm(tracer: Tracer, call: Call) -> Any:
    tracer.attach(call["input"], call["input"].ndim - 1, [call["weight"], call["bias"]], call)
    return call["input"]


def as_if_ungrouped(tracer: Tracer, call: Call) -> Any:
    """Reads the kernels' second axis as if it were all channels, as convolutions without groups do."""
    inner, outer = call["weight"].along(1), call["weight"].along(0)
    tracer.ledger.unite(call["input"][:, :1], inner.reshape(1, -1, 1, 1))
    tracer.ledger.mark_read(inner)
    tracer.ledger.mark_made(outer)
    tracer.ledger.reads.append(unique(call["input"]))
    return spread(outer, 1, 4).expand(call.shape)


def mean_that_keeps(tracer: Tracer, call: Call) -> Any:
    tracer.ledger.reads.append(unique(call["self"]))
    return tracer.ledger.anonymous(call.shape, "mean")


BROKEN_RULES = [
    ("lenet", "flatten", wrong_stride),
    ("permute_then_flatten", "flatten", wrong_stride),
    ("softmax", "softmax", as_elementwise),
    ("layernorm_residual", "layer_norm", as_batchnorm),
    ("mean_of_channels", "mean", mean_that_keeps),
]


@pytest.mark.parametrize(("name", "operation", "rule"), BROKEN_RULES)
def test_a_broken_rule_fails_the_laws(
    name: str, operation: str, rule: rules.Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rules.RULES, operation, rule)
    with pytest.raises(AssertionError):
        law(name)


@pytest.mark.parametrize(
    ("name", "check"),
    [("sliced", "require_fixed"), ("split_unevenly", "require_fixed"), ("heads_cut_apart", "require_whole")],
)
def test_a_missing_check_fails_the_laws(name: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, check, lambda self, *args: None)
    with pytest.raises(AssertionError):
        law(name)


def test_the_guard_turns_a_forgetful_rule_into_a_blocked_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rules.RULES, "linear", forgetful_linear)
    law("lenet")
    monkeypatch.setattr(Ledger, "require_kept", lambda self, *args: None)
    with pytest.raises(AssertionError):
        law("lenet")


def test_groups_taken_for_channels_fail_the_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = rules.convolution
    monkeypatch.setattr(
        rules, "convolution", lambda t, call: as_if_ungrouped(t, call) if call["groups"] > 1 else plain(t, call)
    )
    with pytest.raises(AssertionError):
        law("grouped")


def test_a_forgotten_bias_fails_the_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "add_bias", lambda *args: None)
    with pytest.raises(AssertionError):
        law("mlp")


def test_free_outputs_fail_the_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Ledger.block
    monkeypatch.setattr(
        Ledger,
        "block",
        lambda self, of, why, **how: None if why == "an output of the model" else block(self, of, why, **how),
    )
    with pytest.raises(AssertionError):
        law("mlp")


def test_readers_are_listed_in_the_order_of_the_positions() -> None:
    channels = channels_of(export(*NETWORKS["lenet"].make()))
    assert channels.of("4.weight", 0, 2).readers == (Slice("8.weight", 1, (8, 9, 10, 11)),)
    channels = channels_of(export(*NETWORKS["permute_then_flatten"].make()))
    assert channels.of("conv.bias", 0, 1).readers == (Slice("head.weight", 1, tuple(range(1, 36, 3))),)
    channels = channels_of(export(*NETWORKS["flatten_a_concatenation"].make()))
    assert channels.of("b.weight", 0, 0).readers == (Slice("head.weight", 1, tuple(range(36, 42))),)


def test_a_channel_has_all_its_readers_though_blocked() -> None:
    channels = channels_of(export(*NETWORKS["layernorm_residual"].make()))
    channel = channels.of("embed.weight", 0, 3)
    assert channel.blocked == "layer_norm in 'norm' normalises it together with others"
    assert [str(part) for part in channel.readers] == ["up.weight[axis 1: 3]", "head.weight[axis 1: 3]"]
    assert {part.parameter for part in channel.makers} >= {"embed.weight", "norm.bias", "down.bias"}
    assert channels.of("down.weight", 0, 3) is channel


def test_inputs_have_readers_and_no_makers() -> None:
    channels = channels_of(export(*NETWORKS["lenet"].make()))
    (pixel,) = channels.read_by("0.weight")
    assert (pixel.makers, pixel.blocked) == ((), "an input of the model")
    assert [channel.blocked for channel in channels.made_by("10.weight")] == ["an output of the model"] * 2
    assert channels.of("0.weight", 2, 0) is None
    assert channels.of("no such parameter", 0, 0) is None


def test_ties_are_known_under_all_their_names() -> None:
    channels = channels_of(export(*NETWORKS["tied_weights"].make()))
    channel = channels.of("b.weight", 0, 1)
    assert channel is channels.of("a.weight", 0, 1)
    assert Slice("a.weight", 0, (1,), ("b.weight",)) in channel.slices
    assert len(channel.slices) == len({(part.parameter, part.axis) for part in channel.slices})


def test_memory_shared_without_being_one_tensor_blocks() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    model[2].weight = nn.Parameter(model[0].weight.detach().t())
    channels = find_channels(model, torch.zeros(2, 3))
    assert all("shares its memory" in str(channel.blocked) for channel in channels.made_by("0.weight"))


def test_a_used_buffer_that_is_no_statistic_is_no_slice() -> None:
    channels = channels_of(export(*NETWORKS["mlp_with_batchnorm"].make()))
    names = {part.parameter for channel in channels for part in channel.slices}
    assert "1.running_var" in names
    assert "1.num_batches_tracked" not in names


def test_the_model_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten())
    model.append(nn.Linear(8, 2))
    model[1].eval()
    before = {name: (id(t), t.clone(), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    modes = [module.training for module in model.modules()]
    x = torch.randn(2, 1, 4, 4)
    kept = x.clone()
    find_channels(model, x)
    find_constants(model, x)
    with pytest.raises(CompactError):
        find_channels(model, torch.randn(2, 3))
    assert [module.training for module in model.modules()] == modes
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert (id(tensor), tensor._version) == (before[name][0], before[name][2])
        assert torch.equal(tensor, before[name][1])
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_do_not_depend_on_the_dtype(dtype: torch.dtype) -> None:
    for name in ("lenet", "residual"):
        model, x = NETWORKS[name].make()
        expected = find_channels(model, x)
        assert find_channels(model.to(dtype), x.to(dtype)) == expected
        assert find_channels(model.train(), x.to(dtype)) == expected


def test_control_flow_on_data_is_refused_by_name() -> None:
    model = Net(lambda m, x: m.a(x) if x.sum() > 0 else x, a=nn.Linear(2, 2))
    with pytest.raises(CompactError, match=r"Net: expected a forward that torch\.export can follow.*got .*tie_"):
        find_channels(model, torch.zeros(1, 2))


def test_an_embedding_with_a_tied_head() -> None:
    model = Net(
        lambda m, i: f.linear(torch.relu(m.body(m.table(i))) + m.table(i), m.table.weight),
        table=nn.Embedding(7, 4), body=nn.Linear(4, 4),
    )  # fmt: skip
    randomised(model)
    ids = torch.randint(0, 7, (2, 3))
    channels = find_channels(model, ids)
    free = [channel for channel in channels if channel.blocked is None]
    assert [str(part) for part in free[2].slices] == [
        "table.weight[axis 1: 2]", "body.weight[axis 0: 2]", "body.bias[axis 0: 2]", "body.weight[axis 1: 2]",
    ]  # fmt: skip
    check_readers_are_all(model, ids, channels)
    with torch.no_grad():
        model.table.weight[:, 1] = 0.25
    assert find_constants(model, ids).readings["body.weight", 1, 1].value == 0.25


def test_a_rule_that_breaks_down_denies_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tracer: Tracer, call: Call) -> None:
        raise RuntimeError("a shape that no rule expects")

    monkeypatch.setitem(rules.RULES, "relu", broken)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    reason = find_channels(model, torch.zeros(1, 2)).of("0.weight", 0, 0).blocked
    assert reason == "relu in '1' is beyond the rule for it (RuntimeError)"


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_named(kind: type[nn.RNNBase]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), kind(4, 6))
    channel = find_channels(model, torch.zeros(2, 5, 3)).of("0.weight", 0, 0)
    assert "in '1' has no rule" in channel.blocked


def test_an_axis_of_one_that_einsum_spreads_over_heads_is_followed() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.o = nn.Linear(12, 12), nn.Linear(12, 4), nn.Linear(12, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k = (layer(x).unflatten(-1, (-1, 4)) for layer in (self.q, self.k))
            scores = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
            return self.o(torch.einsum("bhts,bshd->bthd", scores, k).flatten(2))

    torch.manual_seed(0)
    model, x = Shared().double().eval(), torch.randn(2, 5, 12).double()
    with torch.no_grad():
        model.o.weight[:, 4:8] = 0
    small = compact(model, TiePlan([]), x)
    assert small.q.out_features == 8
    torch.testing.assert_close(small(x), model(x))
