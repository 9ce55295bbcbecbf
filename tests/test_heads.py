"""Heads, groups and the channels of an RMSNorm: cut whole and exactly, or left with the reason; and broken twins."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f

from networks import Net, randomised
from tying.channels import constants, graph, labels, rules
from tying.channels.attention import scaled_dot_product_attention
from tying.channels.constants import Fact
from tying.channels.find import Norm, find_channels
from tying.channels.graph import Call
from tying.channels.labels import Ledger
from tying.channels.tracer import Tracer
from tying.enforce.compaction import adapt, sizes
from tying.enforce.compaction.compact import compact, plan_compaction
from tying.enforce.compaction.description import describe, rebuild
from tying.errors import CompactError, PlanError
from tying.groups import Groups
from tying.nn import TiedConv2d, TiedLinear
from tying.plan import Tie, TiePlan

NOTHING = TiePlan([])


class Fused(nn.Module):
    """q, k and v by one layer of 12 features, in three heads."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.num_heads, self.head_dim, self.all_head_size, self.mode = 3, 4, 12, mode

    def forward(self, x: Tensor) -> Tensor:
        batch, length, features = x.shape
        qkv, heads = self.qkv(x), (batch, length, -1, self.head_dim)
        if self.mode == "five axes":
            q, k, v = qkv.reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.mode == "head by head":
            q, k, v = qkv.view(batch, length, self.num_heads, 3, -1).transpose(1, 2).unbind(3)
        else:
            three = {"chunk": 0, "split": self.all_head_size, "literal": features}[self.mode]
            parts = qkv.chunk(3, -1) if not three else qkv.split(three, -1)
            q, k, v = (part.view(heads).transpose(1, 2) for part in parts)
        y = f.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


class Shared(nn.Module):
    """Six heads of queries to three, or one, of keys and values."""

    def __init__(self, mode: str, keys: int = 3) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 24), nn.Linear(12, 4 * keys), nn.Linear(12, 4 * keys)
        self.out, self.mode = nn.Linear(24, 12, bias=False), mode
        self.n_heads, self.n_kv_heads, self.n_rep = 6, keys, 6 // keys

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.mode == "gqa":
            y = f.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            shape = (len(x), self.n_kv_heads, self.n_rep, x.shape[1], 4)
            k, v = (y[:, :, None].expand(shape).reshape(len(x), self.n_heads, -1, 4) for y in (k, v))
            scores = (q @ k.transpose(-1, -2) / 2).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1) > 0, -1e9)
            y = scores.softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Spelled(nn.Module):
    """Attention in einsums, its parameters of three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(12, 3, 4)) for _ in range(3))
        self.out = nn.Parameter(torch.randn(3, 4, 12))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btc,chd->bthd", x, weight) for weight in (self.q, self.k, self.v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
        return torch.einsum("bihd,hdc->bic", torch.einsum("bhij,bjhd->bihd", scores, v), self.out)


class Rms(nn.Module):
    """A stream, normalised, read, and added to."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.norm, self.up, self.down = nn.Linear(4, 6), norm(), nn.Linear(6, 5), nn.Linear(5, 6)
        self.last, self.head = norm(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(self.last(x))


class ByHand(nn.Module):
    def __init__(self, literal: bool = False) -> None:
        super().__init__()
        self.weight, self.eps, self.literal = nn.Parameter(torch.rand(6)), 1e-2, literal

    def forward(self, x: Tensor) -> Tensor:
        eps = 1e-3 if self.literal else self.eps
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def double(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomised(build())


def tokens(features: int) -> Tensor:
    return torch.randn(2, 5, features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_same(model: nn.Module, small: nn.Module, x: Tensor) -> None:
    for given in (x, 2 * x.flip(0)[:1] if x.is_floating_point() else x):
        torch.testing.assert_close(small(given), model(given), rtol=1e-9, atol=1e-9)


def silence(weight: Tensor, *indices: int) -> None:
    with torch.no_grad():
        weight[:, list(indices)] = 0


ATTENTION = {
    **{f"fused, {m}": (lambda m=m: Fused(m), 1, 4) for m in ("five axes", "head by head", "chunk", "split")},
    "grouped": (lambda: Shared("gqa"), 1, 8), "grouped by hand": (lambda: Shared("hand"), 1, 8),
    "one key": (lambda: Shared("gqa", 1), 2, 8), "one key by hand": (lambda: Shared("hand", 1), 2, 8),
}  # fmt: skip
"""The network, and how many heads go when the readers of how many features in the middle are zero."""


@pytest.mark.parametrize("name", ATTENTION)
def test_heads_go_whole(name: str) -> None:
    build, count, width = ATTENTION[name]
    model, x = double(build), tokens(12)
    before = sum(p.numel() for p in model.parameters())
    silence(model.out.weight, *range(width, 2 * width) if width == 8 else range(4, 8))
    plan = plan_compaction(model, NOTHING, x)
    assert len(plan.removed) == count
    small = compact(model, NOTHING, x)
    assert_same(model, small, x)
    gone = sum(len(s.indices) * model.state_dict()[s.parameter].numel() // model.state_dict()[s.parameter].shape[s.axis]
               for c in plan.removed for s in c.slices)  # fmt: skip
    assert before - sum(p.numel() for p in small.parameters()) == gone
    again = rebuild(double(build), describe(small))
    again.load_state_dict(small.state_dict())
    assert_same(model, again, x)


@pytest.mark.parametrize("name", ATTENTION)
def test_half_a_head_stays(name: str) -> None:
    model, x = double(ATTENTION[name][0]), tokens(12)
    silence(model.out.weight, 4, 5)
    assert not plan_compaction(model, NOTHING, x).removed
    assert_same(model, compact(model, NOTHING, x), x)


def test_heads_in_einsums() -> None:
    model, x = double(Spelled), tokens(12)
    with torch.no_grad():
        model.out[1] = 0
    small = compact(model, NOTHING, x)
    assert small.q.shape == (12, 2, 4)
    assert_same(model, small, x)


def test_a_size_that_no_attribute_gives_leaves_the_head_and_says_why() -> None:
    model, x = double(lambda: nn.Sequential(Fused("literal"), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2))), tokens(12)
    silence(model[0].out.weight, 4, 5, 6, 7)
    silence(model[3].weight, 2)
    plan = plan_compaction(model, NOTHING, x)
    assert len(plan.removed) == 1
    (kept,) = plan.kept
    assert kept.what.startswith("0.qkv.weight[axis 0")
    assert "'0' needs sizes that none of its attributes gives" in kept.reason
    small = compact(model, NOTHING, x)
    assert small[1].out_features == 4
    assert_same(model, small, x)


def test_transformers_bert() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=10,
        max_position_embeddings=8,
    )  # fmt: skip
    model = Net(lambda m, ids: m.bert(ids).last_hidden_state, bert=double(lambda: transformers.BertModel(config)))
    ids = torch.randint(0, 30, (2, 5))
    layers = model.bert.encoder.layer
    silence(layers[0].attention.output.dense.weight, *range(4, 12))
    silence(layers[1].attention.output.dense.weight, *range(4))
    silence(layers[1].output.dense.weight, 3)
    small = compact(model, NOTHING, ids)
    found = [layer.attention.self.query.out_features for layer in small.bert.encoder.layer]
    assert found == [4, 8]
    assert small.bert.encoder.layer[1].intermediate.dense.out_features == 9
    assert_same(model, small, ids)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "torch": lambda: nn.RMSNorm(6, eps=1e-2), "torch, eps of the dtype": lambda: nn.RMSNorm(6), "by hand": ByHand,
}  # fmt: skip


def zero_in_stream(model: nn.Module, index: int) -> None:
    with torch.no_grad():
        for layer in (model.embed, model.down):
            layer.weight[index] = layer.bias[index] = 0


@pytest.mark.parametrize("name", NORMS)
def test_zero_channels_leave_an_rms_norm(name: str) -> None:
    model, x = double(lambda: Rms(NORMS[name])), tokens(4)
    zero_in_stream(model, 2)
    small = compact(model, NOTHING, x)
    assert (small.embed.out_features, small.last.weight.shape) == (5, (5,))
    assert_same(model, small, 0.1 * x)
    again = rebuild(double(lambda: Rms(NORMS[name])), describe(small))
    again.load_state_dict(small.state_dict())
    assert_same(model, again, x)
    single = compact(model.float(), NOTHING, x)
    torch.testing.assert_close(single(x.float()), model(x.float()), rtol=1e-4, atol=1e-5)


def test_unread_channels_stay_in_an_rms_norm() -> None:
    model, x = double(lambda: Rms(NORMS["torch"])), tokens(4)
    silence(model.up.weight, 2)
    silence(model.head.weight, 2)
    plan = plan_compaction(model, NOTHING, x)
    assert not plan.removed
    assert "rms_norm in 'norm' normalises it together with others" in str(plan)


def test_a_literal_eps_keeps_the_channel() -> None:
    model, x = double(lambda: Rms(lambda: ByHand(literal=True))), tokens(4)
    zero_in_stream(model, 2)
    plan = TiePlan([Tie.of("embed.weight", Groups.outputs(), [0, 1, -1, 2, 3, 4])])
    assert "eps of the RMSNorm in 'norm' is none of its attributes" in str(plan_compaction(model, plan, x))
    assert_same(model, compact(model, plan, x), x)


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 6, 1), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 2, 1))


def test_groups_of_a_norm_go_whole() -> None:
    model = double(grouped)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    silence(model[3].weight, 2)
    assert not plan_compaction(model, NOTHING, x).removed
    silence(model[3].weight, 3)
    small = compact(model, NOTHING, x)
    assert (small[1].num_groups, small[1].num_channels) == (2, 4)
    assert_same(model, small, x)
    again = rebuild(double(grouped), describe(small))
    again.load_state_dict(small.state_dict())
    assert_same(model, again, x)


def test_tied_layers_are_cut_and_tied_further() -> None:
    model = double(lambda: nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.ReLU(), TiedConv2d([0, 0, 1, 2, 2, -1], 5, 3), nn.Flatten(1, 2), nn.Tanh(),
        TiedLinear([0, 1, 0, 1], 3),
    ))  # fmt: skip
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    silence(model[2].weight, 1)
    small = compact(model, NOTHING, x)
    assert (small[0].out_channels, small[2].partition.labels.tolist()) == (4, [0, 0, 1, 1])
    assert_same(model, small, x)
    plan = TiePlan([Tie.of("2.weight", Groups.inputs(), [0, -1, 0])])
    further = compact(model, plan, x)
    assert (further[2].classes, len(further[2].labels)) == (1, 4)
    with torch.no_grad():
        model[2].weight[:, [0, 2]] = model[2].weight[:, [0, 2]].mean(1, keepdim=True)
    assert_same(model, further, x)
    with pytest.raises(PlanError):
        compact(model, TiePlan([Tie.of("2.weight", Groups.inputs(), [0, 1])]), x)


def test_a_tied_layer_that_shares_its_weight_is_refused_by_name() -> None:
    model = nn.Sequential(TiedLinear([0, 0, 1, 1], 4), TiedLinear([0, 1, 1, 0], 4))
    model[1].weight = model[0].weight
    with pytest.raises(CompactError, match=r"weight: .*shared by 2 modules"):
        compact(model, NOTHING, torch.randn(2, 4))


def test_other_operations() -> None:
    bag = double(lambda: nn.Sequential(nn.EmbeddingBag(9, 5), nn.Linear(5, 2)))
    silence(bag[1].weight, 3)
    ids = torch.randint(0, 9, (3, 4))
    small = compact(bag, NOTHING, ids)
    assert small[0].embedding_dim == 4
    assert_same(bag, small, ids)
    rnn = Net(
        lambda m, x: m.b(m.rnn(m.a(x))[0]), a=nn.Linear(4, 6), rnn=nn.LSTM(6, 3, batch_first=True), b=nn.Linear(3, 2)
    )
    assert {c.blocked for c in find_channels(rnn, torch.randn(2, 5, 4)).made_by("a.weight")} == {
        "lstm in 'rnn' has no rule"
    }


@pytest.mark.parametrize(("dim", "free"), [(1, 0), (2, 1)])
def test_what_is_rolled_keeps_its_channels_only_along_other_axes(dim: int, free: int) -> None:
    model = double(lambda: Net(lambda m, x: m.b(m.a(x).roll(1, dim)), a=nn.Conv1d(2, 5, 1), b=nn.Conv1d(5, 2, 1)))
    silence(model.b.weight, 1)
    x = torch.randn(2, 2, 4, dtype=torch.float64)
    plan = plan_compaction(model, NOTHING, x)
    assert len(plan.removed) == free
    assert free or "roll in the model's forward" in str(plan)
    assert_same(model, compact(model, NOTHING, x), x)


class Kinds(IntEnum):
    """Numbers that say what something is, not how much."""

    CAUSAL, FULL = 3, 12


class Shape(NamedTuple):
    heads: int
    width: int


class Decoys(nn.Module):
    """Attention over at most 12 positions, with attributes that equal a size and say something else."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))
        self.n_heads, self.max_length, self.layer_idx, self.hidden_size = 3, 12, 3, 12
        self.kind, self.shape, self.flags, self.window = Kinds.CAUSAL, Shape(3, 4), [3, True], torch.Size([3, 12])

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, : self.max_length]
        heads = (*x.shape[:2], self.n_heads, self.shape.width)
        q, k, v = (layer(x).view(heads).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = f.scaled_dot_product_attention(q, k, v, is_causal=self.kind is Kinds.CAUSAL)
        return self.out(y.transpose(1, 2).flatten(2))


def test_attributes_that_only_equal_a_size_stay() -> None:
    model, x = double(Decoys), tokens(12)
    silence(model.out.weight, *range(4, 8))
    small = compact(model, NOTHING, x)
    names = ("n_heads", "max_length", "layer_idx", "hidden_size", "kind", "shape", "flags", "window")
    found = {name: getattr(small, name) for name in names}
    assert found == {**{name: getattr(model, name) for name in names}, "n_heads": 2}
    assert type(small.kind) is Kinds
    for length in (1, 10, 16):
        assert_same(model, small, x.repeat(1, 4, 1)[:, :length])


def test_modules_of_one_class_keep_what_only_one_of_them_needs() -> None:
    model, x = double(lambda: nn.Sequential(*(Decoys() for _ in range(5)))), tokens(12)
    for number, block in enumerate(model):
        block.layer_idx = number
    silence(model[2].out.weight, *range(4, 8))
    silence(model[3].out.weight, *range(8))
    small = compact(model, NOTHING, x)
    assert [block.n_heads for block in small] == [3, 3, 2, 1, 3]
    assert [block.layer_idx for block in small] == [0, 1, 2, 3, 4]
    assert_same(model, small, x)


class Crowded(Decoys):
    """Many attributes that equal the size that changes, all of which must stay."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(12):
            setattr(self, f"size_{number}", 12)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + sum(12 - getattr(self, f"size_{number}") for number in range(12))


def test_trials_reach_every_attribute() -> None:
    model, x = double(Crowded), tokens(12)
    silence(model.out.weight, *range(4, 8))
    small = compact(model, NOTHING, x)
    assert (small.n_heads, small.size_3) == (2, 12)
    assert_same(model, small, x)


def test_a_module_that_lets_nothing_be_set_keeps_its_heads() -> None:
    class Frozen(Decoys):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "n_heads" and value != 3:
                raise AttributeError("n_heads is what the configuration says")
            super().__setattr__(name, value)

    model, x = double(Frozen), tokens(12)
    silence(model.out.weight, *range(4, 8))
    (kept,) = plan_compaction(model, NOTHING, x).kept
    assert "none of its attributes gives" in kept.reason
    small = compact(model, NOTHING, x)
    assert small.q.out_features == 12
    assert_same(model, small, x)


class TwoKinds(nn.Module):
    """Two heads look near by, two everywhere: which ones is a matter of their positions."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.cut, self.half = cut, 8

    def forward(self, x: Tensor) -> Tensor:
        y = [layer(x) for layer in (self.q, self.k, self.v)]
        if self.cut == "split":
            pairs = [[self.apart(part) for part in each.split(self.half, -1)] for each in y]
        elif self.cut == "slice":
            pairs = [[self.apart(each[..., : self.half]), self.apart(each[..., self.half :])] for each in y]
        else:
            pairs = [self.apart(each).chunk(2, 1) for each in y]
        at = torch.arange(x.shape[1])
        near = (at[:, None] - at).abs() < 8
        one, two = (f.scaled_dot_product_attention(*(p[i] for p in pairs), attn_mask=(near, None)[i]) for i in (0, 1))
        return self.out(torch.cat([one, two], 1).transpose(1, 2).flatten(2))

    def apart(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 4)).transpose(1, 2)


@pytest.mark.parametrize("cut", ["chunk", "split", "slice"])
def test_heads_of_two_kinds_stay(cut: str) -> None:
    model = double(lambda: TwoKinds(cut))
    silence(model.out.weight, *range(4))
    assert not plan_compaction(model, NOTHING, tokens(16)).removed
    assert_same(model, compact(model, NOTHING, tokens(16)), tokens(16).repeat(1, 4, 1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Decoys(), Decoys()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x)
        return x + self.two(x)


def test_of_silent_attention_one_head_is_left() -> None:
    model, x = double(Residual), tokens(12)
    silence(model.one.out.weight, *range(12))
    plan = plan_compaction(model, NOTHING, x)
    assert "all heads or groups in 'one' are silent, and one must be left" in str(plan)
    small = compact(model, NOTHING, x)
    assert (small.one.q.out_features, small.two.q.out_features) == (4, 12)
    assert_same(model, small, x)


def test_of_silent_groups_one_is_left() -> None:
    model, x = double(grouped), torch.randn(2, 2, 4, 4, dtype=torch.float64)
    silence(model[3].weight, *range(6))
    small = compact(model, NOTHING, x)
    assert (small[1].num_groups, small[0].out_channels) == (1, 2)
    assert_same(model, small, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_rms_norm_in_half_precision_has_the_eps_of_float32(dtype: torch.dtype) -> None:
    model = double(lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.RMSNorm(6), nn.Linear(6, 2)))
    with torch.no_grad():
        model[0].weight[2:5] = 0
    model, x = model.to(dtype), (0.01 * tokens(4)).to(dtype)
    small = compact(model, NOTHING, x)
    assert small[1].weight.shape == (3,)
    torch.testing.assert_close(small(x), model(x), rtol=0.05, atol=0.02)


class EpsTwice(nn.Module):
    """Its eps keeps the norm from zero, and what is divided by as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.eps = nn.Linear(4, 6, bias=False), nn.Linear(6, 2, bias=False), 1e-6
        self.weight = nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = self.head(self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)))
        return x / x.norm(dim=-1, keepdim=True).clamp(min=self.eps)


def test_an_eps_with_two_uses_keeps_the_channel() -> None:
    model, x = double(EpsTwice), tokens(4)
    with torch.no_grad():
        model.embed.weight[:4] = 0
    plan = TiePlan([Tie.of("embed.weight", Groups.outputs(), [-1, -1, -1, -1, 0, 1])])
    assert "uses a number like its eps elsewhere as well" in str(plan_compaction(model, plan, x))
    for scale in (1, 1e-9, 1e-12):
        assert_same(model, compact(model, plan, x), scale * x)


def test_an_rms_norm_leaves_what_equals_its_width() -> None:
    class Cropped(ByHand):
        def __init__(self) -> None:
            super().__init__()
            self.longest = 6

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, : self.longest])

    model, x = double(lambda: nn.Sequential(nn.Linear(4, 6), Cropped(), nn.Linear(6, 2))), tokens(4)
    with torch.no_grad():
        model[0].weight[2] = model[0].bias[2] = 0
    small = compact(model, NOTHING, x)
    assert (small[0].out_features, small[1].longest) == (5, 6)
    assert_same(model, small, x.repeat(1, 2, 1))


def test_a_head_whose_values_are_zero_goes() -> None:
    model, x = double(lambda: Shared("gqa")), tokens(12)
    with torch.no_grad():
        model.v.weight[4:8] = model.v.bias[4:8] = 0
    assert len(plan_compaction(model, NOTHING, x).removed) == 1
    small = compact(model, NOTHING, x)
    assert small.q.out_features == 16
    assert_same(model, small, x)


def test_what_is_constant_before_an_rms_norm_varies_after_it() -> None:
    model, x = double(lambda: Rms(NORMS["torch"])), tokens(4)
    with torch.no_grad():
        model.embed.weight[2] = model.down.weight[2] = model.up.weight[1] = 0
        model.embed.bias[2] = model.down.bias[2] = model.up.weight[1, 2] = model.up.bias[1] = 1
    small = compact(model, NOTHING, x[:1, :1])
    assert_same(model, small, x)


class Multihead(nn.Module):
    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.embed, self.others = nn.Linear(4, 6), nn.Linear(4, 5)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, **sizes)
        self.out, self.sizes = nn.Linear(6, 3), sizes

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        z = self.others(x) if self.sizes else y
        return self.out(self.attention(y, z, z, need_weights=False)[0])


@pytest.mark.parametrize("sizes", [{}, {"kdim": 5, "vdim": 5}], ids=["one weight", "three weights"])
def test_multihead_attention_keeps_its_stream(sizes: dict[str, int]) -> None:
    model, x = double(lambda: Multihead(**sizes)), tokens(4)
    attention = model.attention
    silence(attention.q_proj_weight if sizes else attention.in_proj_weight, 1)
    for weight in (attention.k_proj_weight, attention.v_proj_weight) if sizes else ():
        silence(weight, 2)
    silence(model.out.weight, 3)
    (kept,) = plan_compaction(model, NOTHING, x).kept
    assert str(kept) == ("embed.weight[axis 0: 1] stays: nn.MultiheadAttention checks its embed_dim in 'attention'")
    small = compact(model, NOTHING, x)
    assert (small.embed.out_features, small.out.in_features) == (6, 5)
    assert small.others.out_features == (4 if sizes else 5)
    assert_same(model, small, x)
    with torch.no_grad():  # as attention is then computed at once
        assert_same(model, small, x)


# ---------------------------------------------------------------- broken twins


def test_a_stream_that_multihead_attention_checks_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_checked", lambda _: ())
    model, x = double(Multihead), tokens(4)
    silence(model.attention.in_proj_weight, 1)
    with pytest.raises(CompactError, match=r"^attention: .*once compacted"):
        compact(model, NOTHING, x)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compact without comparing: what is wrong must show in the law itself."""
    monkeypatch.setattr(
        importlib.import_module("tying.enforce.compaction.compact"), "check_equal", lambda *_, **__: None
    )


def features_apart(tracer: Tracer, call: Call) -> Any:
    """As if attention worked feature by feature."""
    labels = [tracer.labels(call[name], call) for name in ("query", "key", "value")]
    tracer.ledger.unite(labels[0], labels[1])
    tracer.ledger.unite(labels[0], labels[2])
    return labels[2]


@pytest.mark.usefixtures("unchecked")
def test_attention_feature_by_feature_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rules.RULES, "scaled_dot_product_attention", features_apart)
    monkeypatch.setattr(Ledger, "require_whole", lambda self, *args: None)
    with pytest.raises(AssertionError, match="removed"):
        test_half_a_head_stays("fused, chunk")


@pytest.mark.usefixtures("unchecked")
def test_keys_that_stay_behind_their_queries_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_turn(tracer: Tracer, call: Call) -> Any:
        """As if the heads of queries took turns in the heads of keys."""
        if call["enable_gqa"]:
            times = call["query"].shape[1] // call["key"].shape[1]
            k, v = (call[name].repeat(1, times, 1, 1) for name in ("key", "value"))
            call = Call(call.node, call.name, False, False, False, {**call.arguments, "key": k, "value": v})
        return scaled_dot_product_attention(tracer, call)

    monkeypatch.setitem(rules.RULES, "scaled_dot_product_attention", in_turn)
    with pytest.raises(AssertionError, match="removed"):
        test_heads_go_whole("grouped")


@pytest.mark.parametrize("name", ["fused, five axes", "grouped by hand"])
def test_sizes_left_as_they_were_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapt, "_instead", lambda value, sizes: iter(()))
    with pytest.raises(AssertionError, match="assert 0 == 1"):
        test_heads_go_whole(name)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["torch", "by hand"])
def test_a_norm_whose_eps_stays_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def width_alone(model: nn.Module, norm: Norm, before: int, after: int) -> dict[str, Any]:
        return {"normalized_shape": (after,)} if isinstance(model.get_submodule(norm.modules[0]), nn.RMSNorm) else {}

    monkeypatch.setattr(sizes, "adapted", width_alone)
    with pytest.raises(AssertionError, match="not close"):
        test_zero_channels_leave_an_rms_norm(name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_eps_of_the_short_dtype_is_caught(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapt.Epsilon, "of", lambda self, weight: torch.finfo(weight.dtype).eps * self.ratio)
    with pytest.raises(AssertionError, match="not close"):
        test_an_rms_norm_in_half_precision_has_the_eps_of_float32(dtype)


def test_attributes_set_without_need_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapt, "_needed", lambda attributes, fits: attributes)
    with pytest.raises(AssertionError, match="layer_idx"):
        test_attributes_that_only_equal_a_size_stay()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("cut", ["chunk", "split"])
def test_heads_that_change_sides_are_caught(cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "_in_proportion", lambda *args: True)
    with pytest.raises(AssertionError, match="removed"):
        test_heads_of_two_kinds_stay(cut)


def test_silent_heads_in_turn_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_turn(call: Call, facts: Sequence[Fact]) -> list[Tensor]:
        mask = call["value"].present.amax(-2, keepdim=True)
        return [mask.repeat(1, call["query"].value.shape[-3] // mask.shape[-3], 1, 1)]

    monkeypatch.setitem(constants.MASKS, "scaled_dot_product_attention", in_turn)
    with pytest.raises(AssertionError, match="removed"):
        test_a_head_whose_values_are_zero_goes()


@pytest.mark.usefixtures("unchecked")
def test_a_norm_that_leaves_constants_constant_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(constants.MASKS, "rms_norm", lambda call, facts: [call["input"].varies])
    with pytest.raises(AssertionError, match="not close"):
        test_what_is_constant_before_an_rms_norm_varies_after_it()
