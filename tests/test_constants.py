"""Constants: exact values, and broken proofs, which must fail the laws."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from channel_laws import (
    law,
)
from networks import Net, randomised
from tying.channels import constants
from tying.channels.constants import Constants, find_constants
from tying.enforce.compaction.compact import compact
from tying.errors import CompactError
from tying.plan import TiePlan


def test_constants_that_were_only_seen_fail_the_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "_varying", lambda call: [torch.zeros(1, dtype=torch.bool)] * len(call.outputs))
    with pytest.raises(AssertionError):
        law("mlp")


def test_folding_across_a_zero_border_fails_the_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    law("lenet", folding=True)
    monkeypatch.setattr(
        Constants, "foldable", lambda self, *key: self.readings[key].value if key in self.readings else None
    )
    with pytest.raises(AssertionError):
        law("lenet", folding=True)


def test_the_constant_of_a_dead_unit_is_exact() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())
    model.append(nn.Linear(12, 2))
    torch.manual_seed(0)
    randomised(model)
    norm = model[1]
    with torch.no_grad():
        model[0].weight[1] = 0
        norm.bias[1] = 2
        norm.weight[2] = 0
        norm.bias[2] = -1
    readings = find_constants(model, torch.randn(2, 1, 6, 6, dtype=torch.float64)).readings
    with torch.no_grad():
        bias = float(
            (model[0].bias[1] - norm.running_mean[1]) / (norm.running_var[1] + norm.eps) ** 0.5 * norm.weight[1]
        )
    assert {index for _, _, index in readings} == set(range(4, 12))
    for index in range(4, 8):
        assert readings["5.weight", 1, index].value == pytest.approx(max(0.0, bias + 2), abs=1e-14)
        assert readings["5.weight", 1, index + 4].value == 0


def test_a_constant_must_be_the_same_in_every_call() -> None:
    model = Net(
        lambda m, x: m.reader(torch.relu(m.one(x))) + m.reader(torch.relu(m.two(x))),
        one=nn.Linear(2, 3), two=nn.Linear(2, 3), reader=nn.Linear(3, 2),
    )  # fmt: skip
    with torch.no_grad():
        for layer, values in ((model.one, (1.0, 2.0, 3.0)), (model.two, (1.0, 5.0, 3.0))):
            layer.weight[:2] = 0
            layer.bias[:] = torch.tensor(values)
    readings = find_constants(model, torch.randn(2, 2)).readings
    assert {key: reading.value for key, reading in readings.items()} == {("reader.weight", 1, 0): 1.0}


def test_inputs_may_be_nested() -> None:
    def forward(m: nn.Module, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return m.reader(torch.relu(m.one(pair[0]))) + pair[1]

    model = Net(forward, one=nn.Linear(2, 3), reader=nn.Linear(3, 2))
    with torch.no_grad():
        model.one.weight[1], model.one.bias[1] = 0, 0.5
    readings = find_constants(model, ((torch.randn(2, 2), torch.randn(2, 2)),)).readings
    assert {key: reading.value for key, reading in readings.items()} == {("reader.weight", 1, 1): 0.5}


def test_where_the_largest_stands_is_no_constant() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        _, places = nn.functional.max_pool1d(x, 2, return_indices=True)
        return m.reader(places.to(x.dtype))

    model = Net(forward, reader=nn.Linear(2, 2))
    first_is_largest = torch.tensor([[[2.0, 1.0, 1.0, 2.0]], [[3.0, 1.0, 1.0, 2.0]]])
    assert not find_constants(model, first_is_largest).readings


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.reader(nn.functional.prelu(-m.ones, x[0])),
        lambda m, x: m.reader(nn.functional.batch_norm(m.ones, m.zeros, m.ones[0], m.ones[0], x[0])),
    ],
    ids=["slope", "shift"],
)
def test_a_scale_that_is_computed_makes_no_constant(forward: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
    model = Net(forward, reader=nn.Linear(2, 2))
    model.register_buffer("ones", torch.ones(3, 2))
    model.register_buffer("zeros", torch.zeros(2))
    assert not find_constants(model, torch.ones(1, 2)).readings


def positions_in_a_table() -> nn.Module:
    return Net(
        lambda m, x: m.reader(torch.relu(m.embed(x) + m.table.weight[: x.shape[1]])),
        embed=nn.Linear(3, 8), table=nn.Embedding(20, 8), reader=nn.Linear(8, 4),
    )  # fmt: skip


def positions_looked_up() -> nn.Module:
    return Net(
        lambda m, x: m.reader(torch.relu(m.embed(x) + m.table(torch.arange(x.shape[1])))),
        embed=nn.Linear(3, 8), table=nn.Embedding(20, 8), reader=nn.Linear(8, 4),
    )  # fmt: skip


def positions_by_index() -> nn.Module:
    return Net(
        lambda m, x: m.reader(torch.relu(m.embed(x) + m.table.weight[torch.arange(x.shape[1])])),
        embed=nn.Linear(3, 8), table=nn.Embedding(20, 8), reader=nn.Linear(8, 4),
    )  # fmt: skip


def positions_counted() -> nn.Module:
    return Net(
        lambda m, x: m.reader(torch.relu(m.embed(x) + torch.arange(x.shape[1])[:, None])),
        embed=nn.Linear(3, 8), table=nn.Embedding(20, 8), reader=nn.Linear(8, 4),
    )  # fmt: skip


def law_constant_at_every_length(make: Callable[[], nn.Module], length: int) -> set[int]:
    """What is proven constant from an example of one length is so at others, and its value is the same."""
    torch.manual_seed(0)
    model = make().double()
    with torch.no_grad():
        model.embed.weight[1:3] = 0
        model.table.weight[:, 2] = 0.5
    seen: list[torch.Tensor] = []
    model.reader.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    readings = find_constants(model, torch.randn(2, length, 3, dtype=torch.float64)).readings
    seen.clear()
    for other in (1, 7, 20):
        model(torch.randn(2, other, 3, dtype=torch.float64))
    for (_, _, index), reading in readings.items():
        values = torch.cat(seen)[:, index]
        torch.testing.assert_close(values, torch.full_like(values, reading.value), rtol=0, atol=1e-12)
    return {index for _, _, index in readings}


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("make", [positions_in_a_table, positions_looked_up, positions_by_index, positions_counted])
def test_what_positions_make_constant_is_so_at_every_length(make: Callable[[], nn.Module], length: int) -> None:
    assert law_constant_at_every_length(make, length) == (set() if make is positions_counted else {2})


def test_constants_of_a_part_of_a_table_fail_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "read_in_part", lambda call, facts: None)
    with pytest.raises(AssertionError):
        law_constant_at_every_length(positions_in_a_table, 1)
    monkeypatch.undo()
    monkeypatch.setattr(constants.operations, "COUNTERS", frozenset())
    with pytest.raises(AssertionError):
        law_constant_at_every_length(positions_counted, 1)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "groups": lambda: nn.GroupNorm(4, 8),
    "instances": lambda: nn.InstanceNorm2d(8, affine=True),
    "samples": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "running": lambda: nn.BatchNorm2d(8),
}


def law_silent_norm(norm: str, in_place: bool) -> int:
    """What a norm scales by zero is its bias, and folds. Returns how many channels go, of two."""

    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        if in_place:
            x = x.clone()
            x[:, 0, 0] = 0
        return m.head(torch.relu(m.norm(m.body(x))))

    torch.manual_seed(0)
    model = Net(forward, body=nn.Conv2d(3, 8, 3), norm=NORMS[norm](), head=nn.Conv2d(8, 4, 1)).double().eval()
    with torch.no_grad():
        nn.init.normal_(model.norm.bias)
        model.norm.weight[:2] = 0
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    small, other = compact(model, TiePlan([]), x), torch.randn(3, 3, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(small(other), model(other), rtol=1e-9, atol=1e-9)
    return 8 - len(small.body.weight)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_what_a_norm_scales_by_zero_goes(norm: str, in_place: bool) -> None:
    # GroupNorm: the two are a group, which goes as a whole
    assert law_silent_norm(norm, in_place) == 2


def test_a_norm_that_is_constant_whatever_its_weight_fails_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("group_norm", "instance_norm"):
        monkeypatch.setitem(constants.MASKS, name, lambda call, facts: [torch.zeros(1)])
    monkeypatch.setattr(constants, "SAME", float("inf"))  # else what it gives on the example shows that it varies
    for norm in ("groups", "instances"):
        with pytest.raises((AssertionError, CompactError)):
            law_silent_norm(norm, False)
