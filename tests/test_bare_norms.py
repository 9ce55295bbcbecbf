"""Norms without weights and statistics: their sizes say what comes in once channels have gone."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from tying.enforce import compact, plan_compaction
from tying.enforce.compaction import compact as module_under_test
from tying.enforce.compaction.bare import bare_norms
from tying.enforce.compaction.description import describe, rebuild
from tying.groups import Groups
from tying.plan import Tie, TiePlan


class Twice(nn.Module):
    """One norm for two widths: no number of channels is right for both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 4, 3), nn.Conv2d(4, 2, 3)
        self.norm = nn.BatchNorm2d(8, affine=False, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.norm(self.b(self.norm(self.a(x)).relu())))


NORMS = {
    "group norm": (lambda: nn.GroupNorm(4, 8, affine=False), 6),
    "batch norm": (lambda: nn.BatchNorm2d(8, affine=False, track_running_stats=False), 5),
    "instance norm": (lambda: nn.InstanceNorm2d(8), 5),
}
LABELS = {5: [0, 1, -1, -1, 2, 3, -1, 4], 6: [0, 1, -1, -1, 2, 3, 4, 5]}


def network(norm: nn.Module, left: int) -> tuple[nn.Module, TiePlan, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 2, 3))
    ties = [Tie.of("0.weight", Groups.outputs(), LABELS[left]), Tie.of("3.weight", Groups.inputs(), LABELS[left])]
    return model, TiePlan(ties), torch.randn(2, 2, 8, 8)


def law_sizes_say_what_comes_in(small: nn.Module, left: int, x: Tensor) -> None:
    norm = small.get_submodule("1")
    assert getattr(norm, bare_norms(small)["1"]) == left
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small(x)


@pytest.mark.parametrize(("make", "left"), NORMS.values(), ids=NORMS)
def test_a_norm_without_tensors_has_the_size_of_what_is_left(make, left):
    model, plan, x = network(make(), left)
    law_sizes_say_what_comes_in(compact(model, plan, x), left, x)
    assert left in plan_compaction(model, plan, x).attributes["1"].values()


@pytest.mark.parametrize(("make", "left"), NORMS.values(), ids=NORMS)
def test_it_is_described_and_rebuilt_so(make, left):
    model, plan, x = network(make(), left)
    small = compact(model, plan, x)
    rebuilt = rebuild(model, describe(small))
    rebuilt.load_state_dict(small.state_dict())
    law_sizes_say_what_comes_in(rebuilt, left, x)
    assert torch.equal(rebuilt(x), small(x))


@pytest.mark.filterwarnings("ignore:input's size at dim=1 does not match num_features")
@pytest.mark.parametrize(("make", "left"), NORMS.values(), ids=NORMS)
def test_the_law_fails_when_sizes_are_left_alone(make, left, monkeypatch):
    monkeypatch.setattr(module_under_test, "fit_bare_norms_", lambda *_: {})
    model, plan, x = network(make(), left)
    with pytest.raises(AssertionError):
        law_sizes_say_what_comes_in(compact(model, plan, x), left, x)


def test_a_norm_for_two_widths_keeps_its_own():
    plan = TiePlan([Tie.of("b.weight", Groups.inputs(), LABELS[5])])
    small = compact(Twice(), plan, torch.randn(2, 2, 9, 9))
    assert (small.a.out_channels, small.norm.num_features) == (5, 8)


def test_a_trial_of_another_size_does_not_warn_of_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.GroupNorm(4, 8), nn.InstanceNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3))
    ties = [Tie.of("0.weight", Groups.outputs(), LABELS[6]), Tie.of("4.weight", Groups.inputs(), LABELS[6])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = compact(model, TiePlan(ties), torch.randn(2, 2, 8, 8))
    assert (small[1].num_groups, small[1].num_channels, small[2].num_features) == (3, 6, 6)
