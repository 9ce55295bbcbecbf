"""tie_ and untie_ against projected gradient descent on the dense model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tying.enforce.ties.tie import plan_of, tie_, untie_
from tying.enforce.ties.unique import unique_parameters
from tying.errors import PlanError
from tying.groups import Groups
from tying.plan import Tie, TiePlan


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 2)
    ).double()


def tie_of(name: str, groups: Groups, seed: int = 0) -> Tie:
    count = groups.shape(dict(network().named_parameters())[name].shape)[0]
    return Tie.of(name, groups, torch.randint(-1, max(1, count // 2), (count,), generator=_seeded(seed)).numpy())


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


PLANS = {
    "inputs": TiePlan([tie_of("3.weight", Groups.inputs())]),
    "outputs": TiePlan([tie_of("3.weight", Groups.outputs())]),
    "filters": TiePlan([tie_of("0.weight", Groups.filters())]),
    "elements": TiePlan([tie_of("3.weight", Groups.elements())]),
    "a bias": TiePlan([tie_of("3.bias", Groups.outputs())]),
    "whole, pruned": TiePlan([Tie.of("5.bias", Groups.whole(), [-1])]),
    "conv inputs": TiePlan([Tie.of("0.weight", Groups.inputs(), [1, -1, 1])]),
    "inputs and outputs": TiePlan([tie_of("3.weight", Groups.outputs(), 1), tie_of("3.weight", Groups.inputs(), 2)]),
    "conv, both": TiePlan([tie_of("0.weight", Groups.outputs(), 1), Tie.of("0.weight", Groups.inputs(), [0, 0, 1])]),
    "several layers": TiePlan([tie_of("3.weight", Groups.inputs()), tie_of("5.weight", Groups.outputs())]),
}


def project_(model: nn.Module, plan: TiePlan) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in plan.project(parameters).items():
            parameters[name].copy_(value)


def multiplicity(plan: TiePlan, name: str, shape: torch.Size) -> torch.Tensor:
    """How many elements share each element's value: the slow way, by writing names into the tensor."""
    sizes = torch.ones(shape, dtype=torch.float64)
    for tie in plan:
        member, partition = tie.members[0], tie.partition
        if member.parameter == name:
            per_group = [partition.sizes[k] if k >= 0 else 0 for k in partition.labels.tolist()]
            matrix = torch.tensor(per_group, dtype=torch.float64)[:, None].expand(member.groups.shape(shape))
            sizes = sizes * member.groups.write(matrix.contiguous(), shape)
    return sizes


def law_trains_like_projected_descent(tied: nn.Module, dense: nn.Module, plan: TiePlan, gradient: str) -> None:
    """Three SGD steps: the tied model's weights are the projection of the dense ones', each moved by the sum.

    Summing over members is the projected (mean) gradient times the number of members.
    """
    steps = torch.optim.SGD(tied.parameters(), lr=0.05)
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64, generator=_seeded(1))
    for _ in range(3):
        for model in (tied, dense):
            model.zero_grad()
            (model(x) ** 2).sum().backward()
        steps.step()
        gradients = plan.project({name: p.grad for name, p in dense.named_parameters()})
        with torch.no_grad():
            for name, p in dense.named_parameters():
                direction = gradients.get(name, p.grad)
                p -= 0.05 * direction * (multiplicity(plan, name, p.shape) if gradient == "sum" else 1)
        for name, p in dense.named_parameters():
            torch.testing.assert_close(_read(tied, name), p, rtol=1e-10, atol=1e-10)


def _read(model: nn.Module, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


@pytest.mark.parametrize("gradient", ["sum", "mean"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_tied_model_trains_as_the_plan_says_and_is_given_back(plan, gradient):
    model, dense = network(), network()
    project_(dense, plan)
    tie_(model, plan, gradient=gradient)
    law_trains_like_projected_descent(model, dense, plan, gradient)
    assert plan_of(model) == TiePlan(sorted(plan, key=lambda t: (t.members[0].parameter, t.members[0].groups.kind)))
    untie_(model)
    assert not any(parametrize.is_parametrized(m) for m in model.modules())
    assert sorted(dict(model.named_parameters())) == sorted(dict(dense.named_parameters()))
    for name, p in dense.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name].data, p.data, rtol=1e-10, atol=1e-10)


def test_the_law_fails_when_the_gradient_is_the_mean_and_the_sum_was_asked():
    plan, model, dense = PLANS["inputs"], network(), network()
    project_(dense, plan)
    tie_(model, plan, gradient="mean")
    with pytest.raises(AssertionError):
        law_trains_like_projected_descent(model, dense, plan, "sum")


def test_the_unique_set_is_the_only_parameter():
    model, plan = network(), PLANS["inputs"]
    dense = sum(p.numel() for p in model.parameters())
    tie_(model, plan)
    partition = plan.ties[0].partition
    assert model[3].parametrizations.weight.original.shape == (partition.classes, 6)
    assert sum(p.numel() for p in unique_parameters(model)) == dense - 6 * (16 - partition.classes)


def test_a_tied_model_is_copied_saved_and_loaded_with_its_labels():
    model, other = network(), network()
    tie_(model, PLANS["inputs"])
    labels = torch.tensor(PLANS["inputs"].ties[0].partition.labels.tolist())
    tie_(other, TiePlan([Tie.of("3.weight", Groups.inputs(), labels.flip(0).numpy())]))
    with torch.no_grad():
        model[3].parametrizations.weight.original.add_(1.0)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other[3].weight, model[3].weight)
    assert torch.equal(copy.deepcopy(model)[3].weight, model[3].weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_what_is_trained_stay(dtype):
    model = network().to(dtype)
    model[3].weight.requires_grad_(False)
    tie_(model, PLANS["inputs"])
    assert model[3].weight.dtype == dtype
    assert not model[3].parametrizations.weight.original.requires_grad
    untie_(model)
    assert model[3].weight.dtype == dtype
    assert not model[3].weight.requires_grad


def test_untie_leaves_other_parametrizations_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    nn.utils.parametrizations.weight_norm(model[0])
    tie_(model, TiePlan([Tie.of("1.weight", Groups.inputs(), [0, 0, 1])]))
    untie_(model)
    assert parametrize.is_parametrized(model[0], "weight")
    assert not parametrize.is_parametrized(model[1])


def test_a_tie_under_another_parametrization_is_not_taken_away_with_it():
    model = nn.Sequential(nn.Linear(3, 3))
    tie_(model, TiePlan([Tie.of("0.weight", Groups.inputs(), [0, 0, 1])]))
    nn.utils.parametrizations.spectral_norm(model[0])
    weight = model.eval()[0].weight.clone()
    with pytest.raises(PlanError, match=r"weight: expected the tie to be its only parametrization"):
        untie_(model)
    assert torch.equal(model[0].weight, weight)


@pytest.mark.parametrize("gradient", ["sum", "mean"])
def test_a_tied_model_is_exported(gradient):
    model = network()
    tie_(model, PLANS["inputs"], gradient=gradient)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.rnn, self.normed = nn.Linear(3, 3), nn.Linear(3, 3), nn.GRU(3, 2), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        nn.utils.parametrizations.weight_norm(self.normed)


@pytest.mark.parametrize(
    ("ties", "message"),
    [
        ([Tie.of("rnn.weight_ih_l0", Groups.inputs(), [0, 0, 1])], "rnn.weight_ih_l0: .* GRU"),
        ([Tie.of("normed.weight", Groups.inputs(), [0, 0, 1])], "normed.weight: expected a plain parameter"),
        ([Tie.of("c.weight", Groups.inputs(), [0, 0, 1])], "c.weight: expected a parameter of the model"),
        ([Tie.of("b.bias", Groups.inputs(), [0, 0, 1])], "b.bias: expected a parameter|expected a parameter with"),
        ([Tie.of("b.bias", Groups.outputs(), [0, 0])], "expected 3 labels"),
        (
            [Tie.of("b.bias", Groups.outputs(), [0, 0, 1]), Tie.of("b.bias", Groups.whole(), [-1])],
            "b.bias: expected one tie, or one over inputs and one over outputs",
        ),
    ],
)
def test_what_cannot_be_tied_is_refused_and_nothing_changes(ties, message):
    model = Shared()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    good = Tie.of("a.bias", Groups.outputs(), [0, 0, 1])
    with pytest.raises(PlanError, match=message):
        tie_(model, TiePlan([*([good] if "a.bias" not in str(ties[0]) else []), *ties]))
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(id(after[n]) == i and torch.equal(after[n], p) for n, (i, p) in before.items())


def test_a_registration_that_fails_half_way_is_undone(monkeypatch):
    model = network()
    before = {name: p.clone() for name, p in model.named_parameters()}
    register = parametrize.register_parametrization

    def fails_the_second_time(module: nn.Module, leaf: str, parametrization: nn.Module, **options: bool) -> None:
        if isinstance(module, nn.Linear):
            raise KeyboardInterrupt
        register(module, leaf, parametrization, **options)

    monkeypatch.setattr(parametrize, "register_parametrization", fails_the_second_time)
    with pytest.raises(KeyboardInterrupt):
        tie_(model, TiePlan([*PLANS["conv inputs"], *PLANS["inputs"]]))
    assert sorted(before) == sorted(name for name, _ in model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_gradient_is_sum_or_mean():
    with pytest.raises(PlanError, match="gradient: expected 'sum' or 'mean', got 'max'"):
        tie_(network(), PLANS["inputs"], gradient="max")
