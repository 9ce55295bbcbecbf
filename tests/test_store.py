"""Round trips over registered networks, against oracles; every bad file; a full disk and Ctrl-C for real."""

from __future__ import annotations

import base64
import copy
import json
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import save as plain_encode
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from failing_disk import law_a_full_disk_leaves_the_old_file, law_ctrl_c_leaves_the_old_file, small_disk
from tying import store
from tying.enforce import compact, tie_
from tying.errors import FileError
from tying.files import packing
from tying.files.sealed import KEY, seal
from tying.groups import Groups
from tying.nn import TiedConv1d, TiedConv2d, TiedConv3d, TiedLinear
from tying.plan import Member, Partition, Tie, TiePlan
from tying.store.checkpoint import read_tensors
from tying.store.state import same_bits

# ---------------------------------------------------------------- labels and bits


def slow_pack(values: list[int]) -> tuple[int, bytes]:
    """One big Python integer."""
    if not values:
        return 0, b""
    bits = 0
    while 2**bits < max(values) - min(values) + 1:
        bits += 1
    number = sum((value - min(values)) << (bits * i) for i, value in enumerate(values))
    return bits, number.to_bytes(math.ceil(len(values) * bits / 8), "little")


def law_packing(pack: Callable[[np.ndarray], packing.Packed], unpack: Callable[[packing.Packed], np.ndarray]) -> None:
    random = np.random.default_rng(0)
    for classes in range(1, 301):
        for extra in (0, 1, 2, 7, classes % 13):
            for pruned in (False, True):
                labels = np.concatenate([np.arange(classes), random.integers(0, classes, extra)])
                labels = random.permutation(np.append(labels, -1) if pruned else labels)
                packed = pack(labels)
                assert (packed.bits, packed.content) == slow_pack(labels.tolist())
                assert packed.bits == math.ceil(math.log2(classes + pruned))
                assert np.array_equal(unpack(packed), labels)


def test_labels_take_the_bits_that_tell_them_apart() -> None:
    law_packing(packing.pack, packing.unpack)


def broken_bits(labels: np.ndarray) -> packing.Packed:
    packed = packing.pack(labels)
    wider = packed.bits + ((packed.bits > 0) and (int(labels.max() - labels.min()) + 1).bit_count() == 1)
    return packing.Packed(packed.low, wider, packed.count, slow_pack([*labels.tolist(), 2**wider - 1 + packed.low])[1])


def broken_order(labels: np.ndarray) -> packing.Packed:
    packed = packing.pack(labels)
    return packing.Packed(packed.low, packed.bits, packed.count, packed.content[::-1])


def broken_low(labels: np.ndarray) -> packing.Packed:
    packed = packing.pack(labels)
    return packing.Packed(0, packed.bits, packed.count, packed.content)


@pytest.mark.parametrize("broken", [broken_bits, broken_order, broken_low])
def test_broken_packing_fails_the_law(broken: Callable[[np.ndarray], packing.Packed]) -> None:
    with pytest.raises(AssertionError):
        law_packing(broken, packing.unpack)


@pytest.mark.parametrize("values", [[], [3], [-(2**63), 2**63 - 1, 0], [2**63 - 1, -1], [-5] * 9])
def test_extreme_integers_pack(values: list[int]) -> None:
    packed = packing.pack(np.array(values, dtype=np.int64))
    assert (packed.bits, packed.content) == slow_pack(values)
    assert packing.unpack(packed).tolist() == values


@pytest.mark.parametrize(
    "packed",
    [
        packing.Packed(0, 3, 5, b"\0"),
        packing.Packed(0, 3, 5, b"\0\0\0"),
        packing.Packed(0, 3, 5, b"\0\x80"),
        packing.Packed(0, 0, 4, b"\0"),
    ],
)
def test_bytes_that_no_labels_give_are_refused(packed: packing.Packed) -> None:
    with pytest.raises(FileError, match="packed labels: expected"):
        packing.unpack(packed)


# ---------------------------------------------------------------- networks


class Flat(nn.Module):
    """A wrapper, so that a network is more than a chain."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.scale = lambda x: x * 1.5  # nothing that could be pickled

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.layers(x))


def mlp() -> nn.Module:
    return Flat(nn.Linear(12, 9), nn.ReLU(), nn.BatchNorm1d(9), nn.Linear(9, 5, bias=False))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3, groups=2)
    )


class Shared(nn.Module):
    """One weight under two names, one module under two names, one weight as the transpose of another."""

    def __init__(self, shared: bool = True, twice: bool = True) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.body = nn.ModuleList([nn.Linear(6, 6)] * 2 if twice else [nn.Linear(6, 6), nn.Linear(6, 6)])
        self.decoder = nn.Linear(6, 6, bias=False)
        if shared:
            self.head.weight = self.embed.weight
            self.decoder.weight = nn.Parameter(self.embed.weight.t())

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.head(self.body[1](self.body[0](self.embed(x)).relu())))


class Odd(nn.Module):
    """Buffers of every kind, extra state, and values that compare strangely."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("empty", torch.zeros(0, 3, dtype=torch.int64))
        self.register_buffer("same", torch.full((50,), -7))
        self.register_buffer("mask", torch.ones(3, 11, dtype=torch.bool))
        self.register_buffer("count", torch.tensor(5, dtype=torch.int32))
        self.register_buffer("strange", torch.tensor([math.nan, -0.0, math.inf]))
        self.register_buffer("table", torch.arange(4.0) / 3, persistent=False)
        self.register_buffer("nothing", None)
        self.extra: object = None

    def get_extra_state(self) -> object:
        return self.extra

    def set_extra_state(self, state: object) -> None:
        self.extra = state

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.table


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 4, num_layers=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


def stir(model: nn.Module, seed: int = 1) -> nn.Module:
    """Values unlike any constructor's, running statistics included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if "running" in n)]:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return model


def tied_linear(model: nn.Module) -> nn.Module:
    layer = model.layers[0]
    model.layers[0] = TiedLinear.from_linear(layer, [0, 1, 1, -1, 2, 2, 0, 0, -1, 1, 2, 3])
    return model


def tied_conv(dimensions: int) -> tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module], Tensor]:
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    tied = (TiedConv1d, TiedConv2d, TiedConv3d)[dimensions - 1]

    def build() -> nn.Module:
        return nn.Sequential(plain(5, 4, 3, padding=1, stride=2), nn.ReLU(), plain(4, 3, 1, bias=False))

    def change(model: nn.Module) -> nn.Module:
        model[0] = tied.from_conv(model[0], [0, 0, -1, 1, 0])
        return model

    return build, change, torch.rand(2, 5, *[6] * dimensions)


def compacted(model: nn.Module) -> nn.Module:
    plan = TiePlan(
        [
            Tie.of("0.weight", Groups.inputs(), [0, 0, -1, 1, 1, 0, 2, 3]),
            Tie.of("0.weight", Groups.outputs(), [0, 1, -1, 2, -1, 3]),
        ]
    )
    return compact(model, plan, torch.rand(3, 8))


def tie_both(model: nn.Module) -> nn.Module:
    tie_(model, TiePlan([Tie.of("layers.3.weight", Groups.outputs(), [0, 1, 0, 0, -1])]), gradient="mean")
    tie_(
        model,
        TiePlan(
            [
                Tie.of("layers.0.weight", Groups.inputs(), [0, 1, 1, -1, 2, 2, 0, 0, -1, 1, 2, 3]),
                Tie.of("layers.0.weight", Groups.outputs(), [0, 1, 0, 2, 2, 2, -1, 0, 1]),
            ]
        ),
    )
    return model


def tie_after_compact(model: nn.Module) -> nn.Module:
    small = compacted(model)
    tie_(small, TiePlan([Tie.of("2.weight", Groups.elements(), [0, 1] * (small[2].weight.numel() // 2))]))
    return small


def frozen(model: nn.Module) -> nn.Module:
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    return model


def odd(model: nn.Module) -> nn.Module:
    model.extra = {"names": ["é", "b"], "n": 3}
    return model


def odd_tensor(model: nn.Module) -> nn.Module:
    model.extra = torch.arange(3.0)
    return model


def same(model: nn.Module) -> nn.Module:
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module], Tensor]] = {
    "mlp": (mlp, same, torch.rand(7, 12)),
    "mlp that is one layer": (lambda: nn.Linear(3, 2), same, torch.rand(7, 3)),
    "conv with BatchNorm": (conv, same, torch.rand(2, 3, 8, 8)),
    "conv in channels_last": (conv, lambda m: m.to(memory_format=torch.channels_last), torch.rand(2, 3, 8, 8)),
    "frozen": (conv, frozen, torch.rand(2, 3, 8, 8)),
    "TiedLinear": (mlp, tied_linear, torch.rand(7, 12)),
    "TiedLinear into itself": (lambda: tied_linear(mlp()), same, torch.rand(7, 12)),
    "TiedConv1d": tied_conv(1),
    "TiedConv2d": tied_conv(2),
    "TiedConv3d": tied_conv(3),
    "compacted": (lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), compacted, torch.rand(5, 8)),
    "tie_": (mlp, tie_both, torch.rand(7, 12)),
    "tie_ into itself": (lambda: tie_both(mlp()), same, torch.rand(7, 12)),
    "tie_ after compact": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)),
        tie_after_compact,
        torch.rand(5, 8),
    ),
    "shared": (Shared, same, torch.rand(3, 6)),
    "shared after building": (lambda: Shared(False), lambda _: stir(Shared()), torch.rand(3, 6)),
    "no longer shared": (
        lambda: Shared().requires_grad_(),
        lambda m: setattr(m.head, "weight", nn.Parameter(m.head.weight.detach() * 2)) or m,
        torch.rand(3, 6),
    ),
    "bfloat16": (mlp, lambda m: tied_linear(m).bfloat16(), torch.rand(7, 12).bfloat16()),
    "float64": (Odd, lambda m: m.double(), torch.rand(3, 4).double()),
    "half": (mlp, lambda m: m.half(), torch.rand(7, 12).half()),
    "buffers and extra state": (Odd, odd, torch.rand(3, 4)),
    "a tensor as extra state": (Odd, odd_tensor, torch.rand(3, 4)),
    "LSTM": (Recurrent, same, torch.rand(6, 2, 5)),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), same, torch.rand(4, 2, 8)),
    "weight_norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3))), same, torch.rand(2, 4)),
}


Save = Callable[[nn.Module, Path], None]
Load = Callable[[Path, nn.Module], nn.Module]


def names_of_one(model: nn.Module) -> set[frozenset[str]]:
    """Which names are one tensor object."""
    together: dict[int, set[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            together.setdefault(id(tensor), set()).add(name)
    return {frozenset(names) for names in together.values()}


def storages(model: nn.Module) -> set[frozenset[str]]:
    """Which names lie in one piece of memory."""
    together: dict[int, set[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.numel() and tensor.dim():
            together.setdefault(tensor.untyped_storage().data_ptr(), set()).add(name)
    return {frozenset(names) for names in together.values()}


def law_round_trip(case: str, path: Path, save: Save, load: Load) -> None:
    build, change, x = CASES[case]
    torch.manual_seed(0)
    model = change(stir(build()))
    save(model, path)
    torch.manual_seed(7)
    fresh = build()
    before = copy.deepcopy(fresh.state_dict())
    draws = torch.get_rng_state()
    again = load(path, fresh)
    assert torch.equal(torch.get_rng_state(), draws)

    assert all(
        same_bits(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(before.values(), fresh.state_dict().values(), strict=True)
    ), "the model that was passed changed"
    mine = {t.untyped_storage().data_ptr() for t in again.state_dict().values() if isinstance(t, Tensor) and t.numel()}
    theirs = {t.untyped_storage().data_ptr() for t in fresh.state_dict().values() if isinstance(t, Tensor)}
    assert not mine & theirs, "memory is shared with the model that was passed"
    for training in (False, True):
        model.train(training)
        again.train(training)
        assert same_bits(copy.deepcopy(again)(x), copy.deepcopy(model)(x))
    one, other = model.state_dict(keep_vars=True), again.state_dict(keep_vars=True)
    assert list(one) == list(other)
    for name, tensor in one.items():
        if isinstance(tensor, Tensor):
            assert same_bits(other[name], tensor), name
            assert other[name].stride() == tensor.stride(), name
            assert other[name].requires_grad == tensor.requires_grad, name
            assert type(other[name]) is type(tensor), name
        else:
            assert other[name] == tensor
    assert names_of_one(again) == names_of_one(model)
    assert storages(again) == storages(model)
    assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()] or case in (
        "tie_",
        "tie_ into itself",
        "tie_ after compact",
        "weight_norm",
    )
    assert str(again) == str(model)


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case: str, tmp_path: Path) -> None:
    law_round_trip(case, tmp_path / "a.safetensors", store.save, store.load)


def forget_frozen(path: Path, model: nn.Module) -> nn.Module:
    return store.load(path, model).requires_grad_()


def forget_sharing(path: Path, model: nn.Module) -> nn.Module:
    loaded = store.load(path, model)
    loaded.head.weight = nn.Parameter(loaded.head.weight.detach().clone())
    return loaded


def forget_precision(path: Path, model: nn.Module) -> nn.Module:
    return store.load(path, model).half().float()


def forget_layout(path: Path, model: nn.Module) -> nn.Module:
    return store.load(path, model).to(memory_format=torch.contiguous_format)


def write_into_it(path: Path, model: nn.Module) -> nn.Module:
    model.load_state_dict(store.load(path, model).state_dict())
    return model


def forget_buffers(path: Path, model: nn.Module) -> nn.Module:
    loaded = store.load(path, model)
    for name, buffer in loaded.named_buffers():
        if "running" in name:
            buffer.fill_(1)
    return loaded


@pytest.mark.parametrize(
    ("case", "load"),
    [
        ("frozen", forget_frozen),
        ("shared", forget_sharing),
        ("mlp", forget_precision),
        ("conv in channels_last", forget_layout),
        ("mlp", write_into_it),
        ("conv with BatchNorm", forget_buffers),
    ],
)
def test_broken_load_fails_the_law(case: str, load: Load, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        law_round_trip(case, tmp_path / "a.safetensors", store.save, load)


def test_a_model_built_without_memory_loads(tmp_path: Path) -> None:
    model = tied_linear(stir(mlp()))
    store.save(model, tmp_path / "a.safetensors")
    with torch.device("meta"):
        fresh = mlp()
    again = store.load(tmp_path / "a.safetensors", fresh)
    x = torch.rand(3, 12)
    assert same_bits(again.eval()(x), model.eval()(x))


def test_a_single_number_may_have_any_stride(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    model.bias = nn.Parameter(torch.arange(9.0)[3::3][:1])
    store.save(model, tmp_path / "a.safetensors")
    assert store.load(tmp_path / "a.safetensors", nn.Linear(2, 1)).bias.tolist() == [3]


def test_a_loaded_tie_trains_as_the_saved_one(tmp_path: Path) -> None:
    model = tie_both(stir(mlp()))
    store.save(model, tmp_path / "a.safetensors")
    again = store.load(tmp_path / "a.safetensors", mlp())
    for network in (model, again):
        network(torch.ones(2, 12) * torch.arange(2.0)[:, None]).square().sum().backward()
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert same_bits(one.grad, other.grad)


BEFORE_TIES_ACROSS = """
c-pO&zl+pB6vs~y8^OO}3EJqm&aeEkP(cs{3mdD;vP>p3yU}d2B(olOhm|%K7K)96wV<_D!ilAgo}kz$c8Xx-Kj6${&&%E3k6qm~FL{&seCNG4
FPYYn1$(VJ-R?jrmN3P-UFXcIqn6XW=bUj?BZrl|pDMxCs1%VNiyT;+H1A5mjJwhf3L>W%siuo)mlAnZlvO=rNu<5L()Wu5(9SJ0ygW3}$hnf{
f|ZeDoOmZbndH;${5WOiE+1tXXsS^_c2^_y++JCXhGsSbR+{%&o{P+Q@L0Ox+A}l^@K(7CMSc?{TF!W7Q4W~0ew*d?ph!e^8byv7EQ=M98;njv
d&o+r>r$pGOr=F$wQH4jQKr2#XIbQQ^qe8%H$*Zn&8~A`yHcztDt(i&xQ=4+6av_Wt30ap7iq@;r+}aa1On7#5X-=`Ed*{|2f`LY{x2G@W6Lni
SYBsmSQa-$&T>B9$OD#$R=ix-qAyw*TNY*2DrCz%<w7kL<&AomsMKz`MSYnBZIs)}4M$3kO`E#S6?ecSP4BbWaA-RYH*q2p1Cjsb;eS{jY4T*6
DN%0VW~xtJjA}Hn>5gL$`T@s0^g@V3V(EIY+SteAUXC1&upf8=g%H6w@qPQ|Z2MfVlm{>&e(b_T`jUFnLQoSD3od1Xkt+p3JQVvtHoH{M6`mJ{
BqRy+T~1{kFP<?9FW@c>0vUu<#56(sK(;J^5hy70DWR^^sepDa*-SGGIf8`6D8yLM0FB3IT%Z@~mXa>?kVI}s_knC#Act-eFpo>beHXjI-@faP
`);0%H{OVLi_f(Mw}I!_jN8a_YfC+0Aj}t1H>ghexb@5-ATd8MeF(VdQ3p6xpP489eFu&`C=^mwLRIzG+x*U_=!M;}=BGIU#uT`oA>;ob6M!bk
t_K2W$Yl0#1O3N?w4OZYfHfB&;_aQxi7GZlt_2N^9Rk;Mt>90ofc{Cr*9yVjWt%<*vXepp5Jh`eV0wj}>OhfJ(5J>*Eq$3Yvj5=gnl|UJqmRZe
d|_{mef{g+%X7vaJ@CQ$@BDsZ?T^cMtUdc`XvVMJe(}&e({=FKJTH7Z^v>E#zaATV{(JAeeIE|)TYG5f>Du#W&wjpnv~KK)lb_btjvqXB`N7@8
e*is!<%$
"""
"""What `save` wrote of the network below when a file still held what a tie stores, compressed."""


def test_a_file_from_before_ties_across_parameters_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(zlib.decompress(base64.b85decode("".join(BEFORE_TIES_ACROSS.split()))))
    again = store.load(
        path,
        nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4, bias=False), nn.Conv1d(2, 3, 2)).double(),
    )
    a, b, c, d = 0.08810316026210785, -0.28131455183029175, -0.029249250888824463, -0.009906589984893799
    assert again[0].weight.tolist() == [[a, a, b, 0], [c, c, d, 0], [a, a, b, 0]]
    assert again[2].weight.tolist() == [[0.00408577173948288, -0.020223666913807392, 0.3777354247868061]] * 4
    one, two = [-0.01701807975769043, -0.0458298921585083], [-0.2750098506609599, -0.27869681517283124]
    assert again[3].weight.tolist() == [[one, two], [[0, 0], two], [two, one]]
    assert again[0].bias.tolist() == [-0.4776742458343506, -0.33114105463027954, -0.20611155033111572]
    stored = {tuple(p.shape): p.requires_grad for p in again.parameters() if p.dim() > 1}
    assert stored == {(2, 2): True, (3, 1): False}
    again[3].weight.sum().backward()
    kept = again[3].parametrizations.weight.original.grad
    assert kept.tolist() == [[1, 1], [1, 1]]  # the mean, as it was tied
    assert len(store.load_plan(path)) == 4
    looked = {entry.name: entry for entry in read_tensors(path)}
    assert all(same_bits(looked[f"{i}.weight"].tensor, again[i].weight) for i in (0, 2, 3))
    labels = [(4 + 3) * 2, 12 * 2, 6 * 2]  # bits: each tie has three or four values, the pruned one counted
    for i, numbers, bits in zip((0, 2, 3), (4, 3, 4), labels, strict=True):
        assert looked[f"{i}.weight"].bytes == numbers * 8 + math.ceil(bits / 8)


# ---------------------------------------------------------------- ties in the values: stored once by the plan


def two_sided() -> TiePlan:
    return TiePlan(
        [
            Tie.of("layers.0.weight", Groups.inputs(), [0, 1, 1, -1, 2, 2, 0, 0, -1, 1, 2, 3]),
            Tie.of("layers.0.weight", Groups.outputs(), [0, 1, 0, 2, 2, 2, -1, 0, 1]),
            Tie.of("layers.3.weight", Groups.outputs(), [-1] * 5),
        ]
    )


def across() -> TiePlan:
    members = (Member("embed.weight", Groups.outputs()), Member("body.1.weight", Groups.inputs()))
    return TiePlan([Tie(members, Partition([0, 1, 2, 3, 0, -1, 1, 1, 2, 3, 0, -1]))])


PLANS: dict[str, tuple[Callable[[], nn.Module], TiePlan, Tensor, int]] = {
    # the last: floats that are stored of the tied parameters, counted by hand
    "inputs and outputs": (mlp, two_sided(), torch.rand(4, 12), 3 * 4 + 0),
    "across layers, transposed": (lambda: Shared(False, False), across(), torch.rand(4, 6), 4 * 6),
    "filters": (
        conv,
        TiePlan([Tie.of("0.weight", Groups.filters(), [i % 5 - 1 for i in range(18)])]),
        torch.rand(2, 3, 8, 8),
        4 * 9,
    ),
    "whole": (conv, TiePlan([Tie.of("0.weight", Groups.whole(), [-1])]), torch.rand(2, 3, 8, 8), 0),
}


@pytest.mark.parametrize("case", PLANS)
def test_weights_that_obey_the_plan_are_stored_once(case: str, tmp_path: Path) -> None:
    build, plan, x, floats = PLANS[case]
    model, path = stir(build()), tmp_path / "a.safetensors"
    with torch.no_grad():
        for name, value in plan.project(dict(model.named_parameters())).items():
            model.get_parameter(name).copy_(value)
    store.save(model, path, plan=plan)
    again = store.load(path, build())
    assert same_bits(again.eval()(x), model.eval()(x))
    for name, tensor in model.state_dict().items():
        assert same_bits(again.state_dict()[name], tensor), name
    assert store.load_plan(path) == plan
    touched = {member.parameter for tie in plan for member in tie.members}
    stored = sum(tensor.numel() for name, tensor in load_file(path).items() if name in touched)
    assert stored == floats


def test_weights_that_do_not_obey_the_plan_are_stored_as_they_are(tmp_path: Path) -> None:
    model, path = stir(mlp()), tmp_path / "a.safetensors"
    store.save(model, path, plan=two_sided())
    assert same_bits(load_file(path)["layers.0.weight"], model.state_dict()["layers.0.weight"])
    assert store.load_plan(path) == two_sided()
    assert same_bits(store.load(path, mlp()).state_dict()["layers.0.weight"], model.state_dict()["layers.0.weight"])


def test_a_plan_may_name_one_parameter_by_two_names(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    members = (Member("0.weight", Groups.inputs()), Member("1.weight", Groups.inputs()))
    plan = TiePlan([Tie(members, Partition([0, 1, 2, 0, 1, 2]))])
    model[1].weight = model[0].weight  # tied for good by the user since the plan was made
    store.save(model, tmp_path / "a.safetensors", plan=plan)
    assert store.load_plan(tmp_path / "a.safetensors") == plan


def test_the_plan_is_kept_and_costs_no_labels_that_are_there(tmp_path: Path) -> None:
    plan = TiePlan([Tie.of("layers.0.weight", Groups.inputs(), [0, 1, 1, -1, 2, 2, 0, 0, -1, 1, 2, 3])], {"by": "me"})
    model = tied_linear(stir(mlp()))
    store.save(model, tmp_path / "a.safetensors", plan=plan)
    read = store.load_plan(tmp_path / "a.safetensors")
    assert (read, dict(read.provenance)) == (plan, {"by": "me"})
    assert set(load_file(tmp_path / "a.safetensors")) == set(model.state_dict())
    store.save(model, tmp_path / "b.safetensors")
    assert store.load_plan(tmp_path / "b.safetensors") == plan  # derived from the layers
    store.save(stir(mlp()), tmp_path / "c.safetensors")
    assert store.load_plan(tmp_path / "c.safetensors") == TiePlan()


# ---------------------------------------------------------------- the file


def header(content: bytes) -> tuple[dict[str, dict[str, object]], int]:
    """Read by hand, from the format's definition: the entries, and the length of all that is not tensors."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), 8 + length


def test_every_byte_is_accounted_for(tmp_path: Path) -> None:
    labels = [-1] * 384 + [i % 88 for i in range(400)]
    model, path = nn.Sequential(TiedLinear(labels, 100), nn.ReLU(), nn.Linear(100, 10)), tmp_path / "a.safetensors"
    store.save(model, path)
    entries, start = header(path.read_bytes())
    floats = 100 * 88 + 100 + 10 * 100 + 10
    assert path.stat().st_size - start == floats * 4 + 784 * 7 // 8
    assert start < 1200
    assert set(entries.pop("__metadata__")) == {KEY}
    assert set(entries) == set(model.state_dict())


@pytest.mark.parametrize("case", CASES)
def test_each_tensor_once_and_readable_by_anyone(case: str, tmp_path: Path) -> None:
    build, change, _ = CASES[case]
    model, path = change(stir(build())), tmp_path / "a.safetensors"
    store.save(model, path)
    read = load_file(path)  # safetensors' own
    state = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    floating = {id(t) for name, t in state.items() if t.is_floating_point() and ".stages." not in name}
    transposed = case in ("shared", "shared after building", "no longer shared")
    assert sum(tensor.is_floating_point() for tensor in read.values()) == len(floating) - transposed
    for name, tensor in read.items():
        if tensor.is_floating_point() and name in state:  # a tied weight's values have the weight's name
            assert same_bits(tensor, state[name].contiguous())
    assert sum(name in state for name in read) >= len(read) - case.startswith("tie_") * 5
    assert b"pickle" not in path.read_bytes()


def one_metadata_key(model: nn.Module) -> bytes:
    return store.encode(model)


def several_metadata_keys(model: nn.Module) -> bytes:
    return plain_encode(model.state_dict(), {"format": "1", "plan": "2", "sum": "3", "labels": "4"})


def law_same_bytes(encode: Callable[[nn.Module], bytes]) -> None:
    assert len({encode(tied_linear(stir(mlp()))) for _ in range(20)}) == 1


def test_the_same_network_gives_the_same_bytes() -> None:
    law_same_bytes(one_metadata_key)


def test_the_obvious_metadata_fails_the_law_of_same_bytes() -> None:
    with pytest.raises(AssertionError):
        law_same_bytes(lambda _: several_metadata_keys(nn.Linear(2, 2).requires_grad_(False)))


# ---------------------------------------------------------------- bad files, bad models


def good(path: Path) -> tuple[nn.Module, bytes]:
    model = nn.Sequential(TiedLinear([0, 0, 1, -1], 2), nn.Linear(2, 2))
    store.save(stir(model), path)
    return model, path.read_bytes()


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    _, content = good(path)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(FileError, match=r"a\.safetensors: expected .*, got .*; "):
            store.load(path, dense())


def test_a_byte_changed_anywhere_is_refused_or_without_effect(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model, content = good(path)
    _, start = header(content)
    undetected = 0
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x04]) + content[at + 1 :])
        try:
            again = store.load(path, dense())
        except FileError:
            continue
        undetected += 1
        assert at < start, "a tensor's byte changed"
        assert all(map(same_bits, again.state_dict().values(), model.state_dict().values()))
    assert undetected <= 8  # blanks after the header


@pytest.mark.parametrize("name", ["0.weight", "0.labels", "1.bias"])
def test_a_changed_tensor_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    good(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[name] = tensors[name] + 1
    save_file(tensors, path, metadata)
    with pytest.raises(FileError, match=rf"{name}: expected the tensor that tying.save wrote"):
        store.load(path, dense())
    save_file({**load_file(path), "more": torch.zeros(1)}, path, metadata)
    with pytest.raises(FileError, match="'more' added or missing"):
        store.load(path, dense())


def written(record: dict[str, object], path: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    """A file whose sums are right and whose record is made up."""
    path.write_bytes(seal(tensors or {}, record, kind=store.KIND, version=store.VERSION))
    return path


def record_of(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()[KEY])
    return load_file(path), {key: value for key, value in record.items() if key not in ("sum", "sums", "format")}


@pytest.mark.parametrize(
    "change",
    [
        {"packed": {"0.labels": [-1, 2, "float32", [4]]}},
        {"packed": {"0.labels": [-1, 2, "int64", [400]]}},
        {"packed": {"0.labels": [-9, 2, "int64", [4]]}},
        {"packed": {"gone": [-1, 2, "int64", [4]]}},
        {"packed": 3},
        {"architecture": {}},
        {"architecture": {"0": {"type": "os.system"}, "1": {"type": "Linear"}}},
        {"architecture": [1]},
        {"architecture": {"0": {"type": "TiedLinear", "tensors": {"bias": ["3"]}}, "1": {"type": "Linear"}}},
        {"architecture": {"0": {"type": "TiedLinear", "tensors": {"bias": {}}}, "1": {"type": "Linear"}}},
        {"architecture": {"0": {"type": "TiedLinear", "tensors": {"labels": None}}, "1": {"type": "Linear"}}},
        {"architecture": {"0": {"type": "TiedLinear", "tensors": {"weight": [-1]}}, "1": {}}},
        {"aliases": {"1.bias": "nothing"}},
        {"views": {"1.bias": ["0.weight", [9], [1], 100]}},
        {"views": {"more": ["0.weight", [2], [1], 0]}},
        {"strides": {"0.weight": [0, 0]}},
        {"steps": [[[[["0.weight", "inputs"]], "0.labels"], [[2, 9]]]]},
        {"tie_": [[[[["0.weight", "inputs"]], "0.labels"], "sum"]]},
        {"tie_": [[[[["1.weight", "sideways"]], "0.labels"], "sum"]]},
        {"transient": {"1.table": ["float32", [3]]}},
        {"extra": {"1._extra_state": 3}},
    ],
)
def test_a_record_that_was_made_up_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    good(path)
    tensors, record = record_of(path)
    written({**record, **change}, path, tensors)
    with pytest.raises(FileError, match="expected"):
        store.load(path, dense())


def foreign(path: Path) -> None:
    save_file(dense().state_dict(), path)


def a_plan(path: Path) -> None:
    TiePlan([Tie.of("0.weight", Groups.inputs(), [0, 0, 1, -1])]).save(path)


def newer(path: Path) -> None:
    path.write_bytes(seal({}, {}, kind=store.KIND, version=store.VERSION + 1))


def another_kind(path: Path) -> None:
    path.write_bytes(seal({}, {}, kind="tying.sketch", version=1))


def nonsense(path: Path) -> None:
    path.write_bytes(plain_encode({}, {KEY: "{"}))


def no_format(path: Path) -> None:
    path.write_bytes(plain_encode({}, {KEY: "[1]"}))


def pickled(path: Path) -> None:
    torch.save(dense().state_dict(), path)


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (foreign, "got an ordinary safetensors file; read it with safetensors.torch.load_file"),
        (a_plan, "expected tying.model/2 or older, got tying.plan/1; pass a file that tying.save wrote"),
        (newer, r"expected tying.model/2 or older, got tying.model/3; update tying"),
        (another_kind, "got tying.sketch/1; pass a file that tying.save wrote"),
        (nonsense, "got one that can't be read"),
        (no_format, "got one that can't be read"),
        (pickled, "truncated or no safetensors"),
        (folder, "got one that can't be read"),
        (lambda _: None, "got one that can't be read"),
        (lambda path: path.write_bytes(b""), "truncated or no safetensors"),
    ],
)
def test_a_file_of_another_kind_is_refused(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make(tmp_path / "a.safetensors")
    with pytest.raises(FileError, match=message):
        store.load(tmp_path / "a.safetensors", dense())
    with pytest.raises(FileError, match=message):
        store.load_plan(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 2)), r"1: expected"),
        (lambda: nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2), nn.Linear(2, 2)), r"2: expected"),
        (lambda: nn.Sequential(nn.Conv1d(4, 2, 1), nn.Linear(2, 2)), r"0: expected"),
        (lambda: nn.Sequential(nn.Linear(4, 2), nn.Bilinear(2, 2, 2)), r"1: expected"),
        (lambda: nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 2)), r"0\.weight: expected a model at least as large"),
        (lambda: nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2)), r"0.weight: expected a tensor with a shape"),
        (lambda: nn.ModuleDict({"a": nn.Linear(4, 2)}), "expected"),
        (
            lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 2)), nn.Linear(2, 2)),
            "expected",
        ),
    ],
)
def test_another_architecture_is_refused_by_name_and_left_alone(
    build: Callable[[], nn.Module], name: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    good(path)
    model = build()
    before = {n: t for n, t in model.state_dict().items() if not isinstance(t, nn.UninitializedParameter)}
    described = str(model)
    with pytest.raises(FileError, match=name):
        store.load(path, model)
    assert str(model) == described
    assert all(same_bits(model.state_dict()[n], t) for n, t in before.items())


def test_a_module_shared_in_the_file_alone_or_in_the_model_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for saved, built in ((True, False), (False, True)):
        store.save(stir(Shared(twice=saved)), path)
        with pytest.raises(FileError, match=r"body\.1: expected"):
            store.load(path, Shared(twice=built))


class Reshaped(nn.Module):
    """Not in the table of sizes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.zeros(size))
        self.register_buffer("table", torch.zeros(size), persistent=False)


def test_a_table_that_the_model_builds_in_another_size_is_refused(tmp_path: Path) -> None:
    saved = Reshaped(3)
    store.save(saved, tmp_path / "a.safetensors")
    built = Reshaped(3)
    built.table = torch.zeros(4)
    with pytest.raises(FileError, match=r"table: expected a buffer of shape \(3,\)"):
        store.load(tmp_path / "a.safetensors", built)


def complex_(model: nn.Module) -> str:
    model.register_buffer("bad", torch.zeros(2, dtype=torch.complex128))
    return r"bad: expected a dtype that safetensors holds, got torch.complex128"


def sparse(model: nn.Module) -> str:
    model.register_buffer("bad", torch.eye(2).to_sparse())
    return r"bad: expected a plain tensor with values, got a torch.sparse_coo"


def without_memory(model: nn.Module) -> str:
    model.register_buffer("bad", torch.zeros(2, device="meta"))
    return r"bad: expected a plain tensor with values, got a meta"


def lazy(model: nn.Module) -> str:
    model.append(nn.LazyLinear(2))
    return r"2.weight: expected a tensor with a shape"


def unspeakable(model: nn.Module) -> str:
    odd = Odd()
    odd.extra = {1, 2}
    model.append(odd)
    return r"2._extra_state: expected a tensor or what JSON can hold as extra state, got set"


def changed_in_json(model: nn.Module) -> str:
    odd = Odd()
    odd.extra = {1: "one"}
    model.append(odd)
    return r"2._extra_state: expected a tensor or what JSON"


def hooked(model: nn.Module) -> str:
    model.register_state_dict_post_hook(lambda m, state, prefix, _: state.update({"1.bias": state["1.bias"] * 2}))
    return r"1.bias: expected a parameter or buffer of the model, got what a state_dict hook made"


@pytest.mark.parametrize(
    "spoil", [complex_, sparse, without_memory, lazy, unspeakable, changed_in_json, hooked], ids=lambda f: f.__name__
)
def test_what_a_file_cannot_hold_is_refused_and_the_old_file_stays(
    spoil: Callable[[nn.Module], str], tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    _, content = good(path)
    model = dense()
    message = spoil(model)
    with pytest.raises(FileError, match=message):
        store.save(model, path)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["a.safetensors"]


# ---------------------------------------------------------------- a full disk, Ctrl-C: in a process of its own

SAVE = """
from torch import nn
from tying.store import save
model = nn.Linear({size}, 1000)
def write(path):
    save(model, path)
"""


def test_a_disk_that_is_full_leaves_the_old_file(tmp_path: Path) -> None:
    law_a_full_disk_leaves_the_old_file(SAVE.format(size=1000), tmp_path / "a.safetensors")


def test_a_real_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        _, content = good(disk / "a.safetensors")
        with pytest.raises(OSError, match="No space left"):
            store.save(nn.Linear(1000, 100), disk / "a.safetensors")
        assert (disk / "a.safetensors").read_bytes() == content
        assert os.listdir(disk) == ["a.safetensors"]


def test_ctrl_c_leaves_the_old_file(tmp_path: Path) -> None:
    law_ctrl_c_leaves_the_old_file(SAVE.format(size=25_000), tmp_path / "a.safetensors")


def test_a_folder_that_is_not_there_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        store.save(dense(), tmp_path / "nowhere" / "a.safetensors")
