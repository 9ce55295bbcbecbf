"""The way of each tied layer, chosen by measurement: the same function of the same stored values."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tying.enforce import compact
from tying.enforce.compaction import fastest
from tying.enforce.compaction.description import describe, rebuild
from tying.enforce.compaction.fastest import MARGIN, choose_fastest_
from tying.enforce.compaction.surgery import set_ways_, ways_of
from tying.errors import CompactError, PlanError
from tying.groups import Groups
from tying.nn import TiedConv2d, TiedLinear
from tying.plan import Tie, TiePlan
from tying.store import load, save

SLOW = {"select": (3.0, 4.0), "dense": (3.0, 4.0)}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(),
        nn.Conv2d(12, 6, 1), nn.Flatten(), nn.Linear(6 * 36, 4),
    )  # fmt: skip


PLAN = TiePlan(
    [
        Tie.of("0.weight", Groups.inputs(), [0, 1, 0, 2, -1, 1, -1, 0]),
        Tie.of("4.weight", Groups.inputs(), [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]),
        Tie.of("6.weight", Groups.inputs(), [i % 36 for i in range(6 * 36)]),
    ]
)
X = torch.randn(3, 8, 6, 6)
TIED = ("0", "4", "6")


def law_unchanged(small: nn.Module, before: nn.Module) -> None:
    """All but the ways is as it was: tensors, modes, types."""
    torch.testing.assert_close(small.state_dict(), before.state_dict(), rtol=0, atol=0)
    assert [m.training for m in small.modules()] == [m.training for m in before.modules()]
    assert [type(m) for m in small.modules()] == [type(m) for m in before.modules()]
    assert not [m for m in small.modules() if m._forward_pre_hooks]


def test_measuring_changes_nothing_but_the_ways():
    small = compact(network(), PLAN, X).train()
    before, generator = copy.deepcopy(small), torch.get_rng_state()
    choices = choose_fastest_(small, X)
    law_unchanged(small, before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [choice.layer for choice in choices] == list(TIED)
    for choice in choices:
        assert small.get_submodule(choice.layer).way == choice.way == best_of(choice.seconds)
        assert str(choice).startswith(f"{choice.layer}: {choice.way} (sum ")


def best_of(seconds: dict[str, tuple[float, float]]) -> str:
    """The oracle: whichever is clearly faster than summing, by both figures."""
    usual = seconds["sum"]
    best = min(seconds, key=lambda way: seconds[way][0])
    return best if seconds[best][0] < MARGIN * usual[0] and seconds[best][1] < MARGIN * usual[1] else "sum"


def test_a_measurement_in_training_mode_would_fail_the_law():
    small = compact(network(), PLAN, X).train()
    before = copy.deepcopy(small)
    small(X)  # moves the statistics of BatchNorm
    with pytest.raises(AssertionError):
        law_unchanged(small, before)


def law_same_of_the_same_values(fast: nn.Module, usual: nn.Module, ways: dict[str, str]) -> None:
    """The ways are those chosen; the values are the same, and what is computed of them."""
    assert ways_of(usual) == {}
    assert ways_of(fast) == ways
    torch.testing.assert_close(fast.state_dict(), usual.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(fast(X), usual(X))


def in_turn(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Let the layers seem fastest in another way each."""
    turns = iter(["dense", "select", "dense"])
    monkeypatch.setattr(fastest, "_best", lambda seconds: next(turns))
    return {"0": "dense", "4": "select", "6": "dense"}


def test_compact_chooses_and_computes_the_same_of_the_same_values(monkeypatch):
    usual, ways = compact(network().eval(), PLAN, X), in_turn(monkeypatch)
    law_same_of_the_same_values(compact(network().eval(), PLAN, X, fastest=True), usual, ways)


def test_a_way_that_computes_something_else_is_refused_and_fails_the_law(monkeypatch):
    usual, ways = compact(network().eval(), PLAN, X), in_turn(monkeypatch)
    whole = TiedConv2d.forward

    def broken(self: TiedConv2d, x: Tensor) -> Tensor:
        return whole(self, x) * (1.001 if self.way == "select" else 1)

    monkeypatch.setattr(TiedConv2d, "forward", broken)
    with pytest.raises(CompactError, match=r"^4: expected the outputs of the projected model"):
        compact(network().eval(), PLAN, X, fastest=True)
    fast = copy.deepcopy(usual)
    set_ways_(fast, ways)
    with pytest.raises(AssertionError):
        law_same_of_the_same_values(fast, usual, ways)


@pytest.mark.parametrize(("dtype", "given"), [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)])
def test_inputs_of_another_type_are_measured_as_they_are_compacted(dtype, given):
    small = compact(network().eval().to(dtype), PLAN, X.to(given), fastest=True)
    assert small[0].weight.dtype == dtype
    mixed = nn.Sequential(TiedLinear([0, 0, 1], 2).double(), nn.Linear(2, 1))
    with pytest.raises(CompactError, match=r"^1: expected a forward that runs"):
        choose_fastest_(mixed, torch.randn(2, 3).double())


def test_a_way_that_was_chosen_before_stays():
    small = compact(network().eval(), PLAN, X)
    set_ways_(small, {"0": "dense", "4": "select"})
    again = compact(small, TiePlan([]), X)
    assert ways_of(again) == {"0": "dense", "4": "select"}
    torch.testing.assert_close(again(X), small(X))


def test_a_model_without_ties_has_nothing_to_choose():
    model = nn.Sequential(nn.Linear(4, 3))
    assert choose_fastest_(model, torch.randn(2, 4)) == ()
    plan = TiePlan([Tie.of("0.weight", Groups.inputs(), [0, 1, 2, 3])])
    assert type(compact(model, plan, torch.randn(2, 4), fastest=True)[0]) is nn.Linear


def test_a_model_that_does_not_run_is_named_and_keeps_its_ways():
    model = nn.Sequential(TiedLinear([0, 0, 1], 2), nn.Linear(3, 1))
    model[0].way = "dense"
    with pytest.raises(CompactError, match=r"^1: expected a forward that runs"):
        choose_fastest_(model, torch.randn(2, 3))
    assert model[0].way == "dense"
    assert not model[0]._forward_pre_hooks


def test_a_layer_called_twice_with_a_keyword_is_measured_as_a_whole(monkeypatch):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = TiedLinear([0, 0, 1, -1], 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x=self.layer(x))

    calls = iter([{"sum": (1.0, 2.0), "select": (2.0, 3.0), "dense": (0.5, 4.0)}, {"sum": (8.0, 9.0)} | SLOW])
    monkeypatch.setattr(fastest, "_seconds", lambda *_: next(calls))
    [choice] = choose_fastest_(Twice(), torch.randn(2, 4))
    assert choice.seconds == {"sum": (9.0, 11.0), "select": (5.0, 7.0), "dense": (3.5, 8.0)}
    assert choice.way == "dense"
    assert not list(calls)


@pytest.mark.parametrize("way", ["select", "dense"])
def test_the_ways_are_kept_by_copies_and_files_bit_for_bit(way, tmp_path: Path):
    small = compact(network().eval(), PLAN, X)
    set_ways_(small, dict.fromkeys(TIED, way))
    save(small, tmp_path / "small.safetensors")
    back = load(tmp_path / "small.safetensors", network().eval())
    assert ways_of(back) == ways_of(copy.deepcopy(small)) == dict.fromkeys(TIED, way)
    assert torch.equal(back(X), small(X))
    assert f"way={way}" in repr(back[0])
    set_ways_(small, {})
    save(small, tmp_path / "usual.safetensors")
    assert ways_of(load(tmp_path / "usual.safetensors", back)) == {}


def test_an_unknown_way_in_a_description_is_refused():
    small = nn.Sequential(TiedConv2d([0, 0, 1], 4, 3))
    small[0].way = "dense"
    description = describe(small)
    assert ways_of(rebuild(nn.Sequential(nn.Conv2d(3, 4, 3)), description)) == {"0": "dense"}
    for wrong in ("fast", ["dense"], None):
        description["0"]["way"] = wrong
        with pytest.raises(PlanError, match=r"^0: expected a module with"):
            rebuild(nn.Sequential(nn.Conv2d(3, 4, 3)), description)
