"""What no output feels goes, though something reads it or it has a place that stays; and rules that say so wrongly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f

from channel_laws import check_cut_is_exact, check_readers_are_all
from networks import Net, randomised
from tying.channels import averages, constants, rules
from tying.channels.constants import find_constants
from tying.channels.find import find_channels
from tying.channels.labels import Ledger
from tying.channels.moves import move
from tying.enforce.compaction import reduction
from tying.enforce.compaction.compact import compact
from tying.errors import CompactError
from tying.outputs import difference
from tying.plan import TiePlan


def loop() -> nn.Module:
    """A block that reads channel 1 of a stream, and adds to it alone; nothing else reads that channel."""
    net = Net(
        lambda m, x: m.head((s := m.stem(x)) + m.down(torch.relu(m.up(s)))),
        stem=nn.Linear(3, 4), up=nn.Linear(4, 5), down=nn.Linear(5, 4), head=nn.Linear(4, 2),
    )  # fmt: skip
    with torch.no_grad():
        net.head.weight[:, 1] = 0
        net.down.weight[1:, 2] = 0
        net.down.weight[0, 2] = 0
        net.down.weight[1, 2] = 0.7
        net.up.weight[[0, 1, 3, 4], 1] = 0
    return net


def beside_the_input() -> nn.Module:
    """Channel 0 of what is added to the input is read by nobody: it stays, and what makes it alone goes."""
    net = Net(
        lambda m, x: m.head(x + m.down(torch.relu(m.up(x)))),
        up=nn.Linear(3, 5), down=nn.Linear(5, 3), head=nn.Linear(3, 2),
    )  # fmt: skip
    with torch.no_grad():
        net.head.weight[:, 0] = 0
        net.up.weight[:, 0] = 0
        net.down.weight[1:, 2] = 0
    return net


def beside_a_norm() -> nn.Module:
    """As before, but the channel that nobody reads is normalised with the others, which feel it."""
    net = Net(
        lambda m, x: m.head(f.layer_norm(x + m.down(torch.relu(m.up(x))), (3,))),
        up=nn.Linear(3, 5), down=nn.Linear(5, 3), head=nn.Linear(3, 2),
    )  # fmt: skip
    with torch.no_grad():
        net.head.weight[:, 0] = 0
        net.down.weight[1:, 2] = 0
    return net


def law_compacted(model: nn.Module, x: Tensor) -> nn.Module:
    small = compact(model, TiePlan([]), x)
    other = torch.randn(5, *x.shape[1:], dtype=x.dtype)
    with torch.no_grad():
        assert difference([model(other)], [small(other)]) <= 1e-9
    return small


@pytest.mark.parametrize(("make", "left"), [(loop, (3, 4)), (beside_the_input, (3, 4)), (beside_a_norm, (3, 5))])
def test_what_no_output_feels_goes(make: Callable[[], nn.Module], left: tuple[int, int]) -> None:
    model, x = make().double(), torch.randn(2, 3, dtype=torch.float64)
    check_readers_are_all(model, x, find_channels(model, x))
    small = law_compacted(model, x)
    assert (small.down.out_features, small.up.out_features) == left


def test_taking_all_for_unfelt_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_hidden(network: object, channels: object) -> list[object]:
        return [c for c in channels if any(s.parameter == "up.weight" and s.indices == (1,) for s in c.makers)]  # pyright: ignore

    monkeypatch.setattr(reduction, "unfelt", without_hidden)
    with pytest.raises(CompactError):
        law_compacted(beside_a_norm().double(), torch.randn(2, 3, dtype=torch.float64))


def test_taking_what_is_normalised_together_for_unfelt_fails_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Ledger.block
    monkeypatch.setattr(
        Ledger, "block", lambda self, labels, why, *, unless=None, felt=True: block(self, labels, why, felt=False)
    )
    model, x = beside_a_norm().double(), torch.randn(2, 3, dtype=torch.float64)
    with pytest.raises(AssertionError):
        check_readers_are_all(model, x, find_channels(model, x))


WAYS = {
    "fused": lambda q, k, v: f.scaled_dot_product_attention(q, k, v),
    "by hand": lambda q, k, v: f.dropout((q @ k.mT).softmax(-1), 0.1, training=False) @ v,
    "by hand, in batches": lambda q, k, v: torch.bmm((q @ k.mT).softmax(2).view(-1, *q.shape[-2:-1] * 2), v),
    "no shares": lambda q, k, v: torch.relu(q @ k.mT) @ v,
    "shares of the queries": lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
    "masked": lambda q, k, v: f.scaled_dot_product_attention(q, k, v, attn_mask=q @ k.mT > 0),
}


def attention(way: str) -> nn.Module:
    """Whose values are their biases: the shares don't matter."""
    net = Net(
        lambda m, x: m.out(WAYS[way](m.q(x), m.k(x), m.v(x))).mean(1),
        q=nn.Linear(3, 4), k=nn.Linear(3, 4), v=nn.Linear(3, 4), out=nn.Linear(4, 2),
    )  # fmt: skip
    torch.manual_seed(0)
    randomised(net)
    with torch.no_grad():
        net.v.weight.zero_()
    return net


def law_constant(way: str) -> int:
    """What is said to be constant is, at other lengths too. Returns how many inputs of the last layer are."""
    model, x = attention(way), torch.randn(3, dtype=torch.float64).expand(2, 5, 3)  # any shares give the same here
    readings = find_constants(model, x).readings
    seen: list[Tensor] = []
    model.out.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, -2)))
    for length in (5, 9):
        model(torch.randn(3, length, 3, dtype=torch.float64))
    found = {index: reading.value for (name, _, index), reading in readings.items() if name == "out.weight"}
    for index, value in found.items():
        assert all((each[:, index] - value).abs().max() <= 1e-12 for each in seen), way
    return len(found)


@pytest.mark.parametrize("way", WAYS)
def test_a_weighted_mean_of_constants_is_constant(way: str) -> None:
    assert law_constant(way) == (4 if way in ("fused", "by hand", "by hand, in batches") else 0)


def test_any_product_taken_for_a_mean_fails_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "are_shares", lambda node: True)
    for way in ("no shares", "shares of the queries"):
        with pytest.raises(AssertionError):
            law_constant(way)
    assert averages.are_shares(None) is False


def shares_of_nothing() -> tuple[nn.Module, Tensor]:
    """A softmax over the positions of what is constant: one by their number, which another input changes."""
    net = Net(
        lambda m, x: m.head(m.one(x).softmax(1) + m.two(x)).mean(1),
        one=nn.Linear(3, 4), two=nn.Linear(3, 4), head=nn.Linear(4, 2),
    )  # fmt: skip
    torch.manual_seed(0)
    randomised(net)
    with torch.no_grad():
        for layer in (net.one, net.two):
            layer.weight[:2] = 0
    return net, torch.randn(2, 6, 3, dtype=torch.float64)


def test_what_depends_on_the_length_is_left_and_the_rest_goes() -> None:
    model, x = shares_of_nothing()
    with torch.no_grad():
        model.head.weight[:, 3] = 0
    small = compact(model, TiePlan([]), x)
    assert small.head.in_features == 3
    longer = torch.randn(2, 11, 3, dtype=torch.float64)
    with torch.no_grad():
        assert difference([model(longer)], [small(longer)]) <= 1e-9


def test_a_softmax_of_constants_taken_for_one_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants.operations, "ADDING_UP", frozenset())
    model, x = shares_of_nothing()
    with pytest.raises(CompactError, match="on inputs of"):
        compact(model, TiePlan([]), x)


SHUFFLES = {
    "channel_shuffle": lambda x: f.channel_shuffle(x, 2),
    "pixel_shuffle": lambda x: f.pixel_shuffle(x, 2),
}


def shuffled(name: str) -> tuple[nn.Module, Tensor]:
    net = Net(
        lambda m, x: m.head(torch.relu(SHUFFLES[name](m.body(x)))).mean((2, 3)),
        body=nn.Conv2d(2, 8, 3), head=nn.Conv2d(8 if name == "channel_shuffle" else 2, 3, 1),
    )  # fmt: skip
    torch.manual_seed(0)
    return randomised(net), torch.randn(2, 2, 6, 6, dtype=torch.float64)


@pytest.mark.parametrize(("name", "free"), [("channel_shuffle", 4), ("pixel_shuffle", 2)])
def test_what_is_shuffled_goes_in_whole_sets(name: str, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = shuffled(name)
    channels = find_channels(model, x)
    assert sum(channel.blocked is None for channel in channels) == free
    check_readers_are_all(model, x, channels)
    check_cut_is_exact(model, x, channels)
    monkeypatch.setitem(rules.RULES, name, move)
    naive = find_channels(model, x)
    if name == "pixel_shuffle":
        assert all(channel.blocked for channel in naive)
    else:
        with pytest.raises(AssertionError):
            check_cut_is_exact(model, x, naive)
