"""Ties across layers and models, against gradients and values added up number by number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tied_models import CASES, INPUTS, OUTPUTS, WHOLE, pair, tie
from tying.enforce import check, compact, tie_, unique_parameters, untie_
from tying.enforce.ties.tie import plan_of
from tying.errors import TieError
from tying.measure import measure
from tying.models import Models, by_name, parameters_of
from tying.plan import TiePlan


def loss(models: Models) -> Tensor:
    x = torch.randn(4, 5, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = torch.zeros((), dtype=torch.float64)
    for i, model in enumerate(by_name(models).values()):
        data = x if any(isinstance(m, nn.Conv2d) for m in model.modules()) else x.flatten(1)
        total = total + ((model(data) - i) ** 2).sum()
    return total


def weights(models: Models) -> dict[str, Tensor]:
    """Every weight as its layer reads it, under the names of models that were never tied."""
    found: dict[str, Tensor] = {}
    for prefix, model in by_name(models).items():
        for path, module in model.named_modules():
            for leaf in ("weight", "bias"):
                if isinstance(module, nn.Linear | nn.Conv2d):
                    found[".".join(filter(None, [prefix, path, leaf]))] = getattr(module, leaf)
    return found


def each_number(plan: TiePlan, shapes: dict[str, torch.Size]) -> dict[tuple[int, int, int], list[tuple[str, int]]]:
    """(tie, label, position in the group) → the numbers of the weights that are one; the slow way, with names."""
    result: dict[tuple[int, int, int], list[tuple[str, int]]] = {}
    for t, one in enumerate(plan):
        at = 0
        for member in one.members:
            shape = shapes[member.parameter]
            matrix = member.groups.read(torch.arange(shape.numel()).reshape(shape))
            for group in matrix.tolist():
                for position, number in enumerate(group):
                    label = int(one.partition.labels[at])
                    result.setdefault((t, label, position), []).append((member.parameter, number))
                at += 1
    return result


def law_starts_at_the_mean(tied: Models, dense: Models, plan: TiePlan) -> None:
    values, before = weights(tied), weights(dense)
    for (_, label, _), numbers in each_number(plan, {n: w.shape for n, w in before.items()}).items():
        mean = sum(before[name].flatten()[i].item() for name, i in numbers) / len(numbers) if label >= 0 else 0.0
        for name, i in numbers:
            assert values[name].flatten()[i].item() == pytest.approx(mean, abs=1e-15)


def law_steps_by_the_sum(tied: Models, dense: Models, plan: TiePlan, gradient: str) -> None:
    """One step of descent moves every tied number by the sum (or mean) of the gradients that untied weights have."""
    with torch.no_grad():
        for name, weight in weights(dense).items():
            weight.copy_(weights(tied)[name])
    loss(dense).backward()
    before = {name: weight.detach().clone() for name, weight in weights(tied).items()}
    optimizer = torch.optim.SGD(unique_parameters(tied), lr=1.0)
    loss(tied).backward()
    optimizer.step()
    untied = {name: weight.grad.flatten() for name, weight in weights(dense).items()}
    numbers = each_number(plan, {name: weight.shape for name, weight in before.items()})
    expected = {name: before[name].flatten() - grad for name, grad in untied.items()}
    for (_, label, _), same in numbers.items():
        step = sum(untied[name][i].item() for name, i in same) / (len(same) if gradient == "mean" else 1)
        for name, i in same:
            expected[name][i] = before[name].flatten()[i] - (step if label >= 0 else 0.0)
    for name, weight in weights(tied).items():
        torch.testing.assert_close(weight.flatten(), expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradient", ["sum", "mean"])
@pytest.mark.parametrize("case", CASES)
def test_a_tie_starts_at_the_mean_steps_by_the_sum_and_is_undone(case, gradient):
    build, plan = CASES[case]
    tied, dense = build(), build()
    names = list(parameters_of(tied))
    tie_(tied, plan, gradient=gradient)
    assert plan_of(tied) == plan
    assert check(tied)
    law_starts_at_the_mean(tied, dense, plan)
    law_steps_by_the_sum(tied, dense, plan, gradient)
    kept = {name: weight.detach().clone() for name, weight in weights(tied).items()}
    untie_(tied)
    assert sorted(parameters_of(tied)) == sorted(names)
    assert len({id(p) for p in parameters_of(tied).values()}) == len(names)
    assert all(torch.equal(weights(tied)[name], weight) for name, weight in kept.items())
    assert len(check(tied).ties) == 0
    assert not any(m._forward_pre_hooks for root in by_name(tied).values() for m in root.modules())


def test_the_law_fails_for_the_mean_where_the_sum_was_asked():
    build, plan = CASES["transposed"]
    tied, dense = build(), build()
    tie_(tied, plan, gradient="mean")
    with pytest.raises(AssertionError):
        law_steps_by_the_sum(tied, dense, plan, "sum")


def test_the_law_fails_for_weights_that_share_memory_and_nothing_else():
    build, plan = CASES["transposed"]
    tied, dense = build(), build()
    tied.decoder.weight = nn.Parameter(tied.encoder.weight.detach().t())
    with pytest.raises(AssertionError):
        law_starts_at_the_mean(tied, dense, plan)


def test_the_law_fails_for_equal_weights_that_are_stored_apart():
    build, plan = CASES["transposed"]
    tied, dense = build(), build()
    with torch.no_grad():
        tied.decoder.weight.copy_(tied.encoder.weight.t())
    with pytest.raises(AssertionError):
        law_steps_by_the_sum(tied, dense, plan, "sum")


def test_whole_weights_are_one_parameter_and_transposes_read_it():
    models = pair()
    tie_(
        models,
        TiePlan(
            [*CASES["two models, transposed"][1], tie([0, 0], ("a.decoder.bias", WHOLE), ("b.decoder.bias", WHOLE))]
        ),
    )
    a, b = models["a"], models["b"]
    assert a.decoder.bias is b.decoder.bias
    assert a.encoder.parametrizations.weight.original is b.decoder.weight
    assert len(unique_parameters(models)) == 6
    assert isinstance(b.decoder.weight, nn.Parameter)


def test_weights_that_are_one_already_come_under_the_guard():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)).double()
    model[1].weight = model[0].weight
    before = model[0].weight
    tie_(model, TiePlan([tie([0, 0], ("0.weight", WHOLE), ("1.weight", WHOLE))]))
    assert model[0].weight is before
    model[1].weight = nn.Parameter(torch.zeros(5, 5, dtype=torch.float64))
    with pytest.raises(TieError, match=r"1\.weight: expected the value of 0\.weight"):
        model(torch.zeros(1, 5, dtype=torch.float64))


# ---------------------------------------------------------------- what computed weights are for others


@pytest.mark.parametrize("case", ["transposed", "groups of two layers, some pruned"])
def test_computed_weights_are_measured_and_read_in_inference_mode(case):
    build, plan = CASES[case]
    model = build()
    tie_(model, plan)
    x = torch.randn(4, 5, dtype=torch.float64)
    with torch.inference_mode():
        seen = model(x)
    assert torch.equal(model(x), seen)
    assert measure(model, example_inputs=x, latency=False).parameters == sum(
        p.numel() for p in unique_parameters(model)
    )


def test_a_write_in_place_that_would_be_lost_is_told():
    build, plan = CASES["groups of two layers, some pruned"]
    model = build()
    tie_(model, plan)
    x = torch.randn(4, 5, dtype=torch.float64)
    model(x).sum().backward()
    nn.init.zeros_(model.decoder.weight)
    with pytest.raises(TieError, match="got a write in place, which is lost"):
        model(x)
    model(x)


def test_steps_of_the_optimizer_are_no_lost_writes():
    build, plan = CASES["transposed"]
    model = build()
    tie_(model, plan)
    optimizer = torch.optim.SGD(unique_parameters(model), lr=0.1)
    x = torch.randn(4, 5, dtype=torch.float64)
    for _ in range(3):
        model(x).sum().backward()
        optimizer.step()


class Chain(nn.Module):
    """Two layers in the middle that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.middle = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        for layer in self.middle:
            x = torch.relu(layer(x))
        return self.last(x)


def test_shared_weights_may_change_their_shape_together():
    model = Chain()
    tie_(model, TiePlan([tie([0, 0], ("middle.0.weight", WHOLE), ("middle.1.weight", WHOLE))]))
    with torch.no_grad():  # a unit that is nothing anywhere
        model.middle[0].weight[3] = model.middle[0].weight[:, 3] = model.last.weight[:, 3] = 0
        for layer in (model.first, *model.middle):
            layer.bias[3] = 0
        model.first.weight[3] = 0
    x = torch.randn(5, 4, dtype=torch.float64)
    small = compact(model, TiePlan([]), x)
    assert small.middle[0].weight is small.middle[1].weight
    assert tuple(small.middle[0].weight.shape) == (5, 5)
    torch.testing.assert_close(small(x), model(x))
    assert check(small)
    assert plan_of(small) == plan_of(model)


@pytest.mark.parametrize("gradient", ["sum", "mean"])
def test_every_number_is_kept_bit_for_bit(gradient):
    models = {name: nn.Linear(3, 2, bias=False) for name in "ab"}
    odd = torch.tensor([[0.0, -0.0, torch.inf], [-torch.inf, 1e-42, 3.4e38]])
    tie_(models, TiePlan([tie([0, 1, 0, 1], ("a.weight", OUTPUTS), ("b.weight", OUTPUTS))]), gradient=gradient)
    for name, model in models.items():
        model.load_state_dict({"weight": odd.clone()}, strict=False)
        assert torch.equal(models[name].weight.view(torch.int32), odd.view(torch.int32))


def test_complex_weights_keep_their_imaginary_part():
    model = nn.Linear(4, 4, bias=False, dtype=torch.complex64)
    before = model.weight.detach().clone()
    tie_(model, TiePlan([tie([0, 0, 1, 1], ("weight", groups)) for groups in (INPUTS, OUTPUTS)]))
    mean = before.reshape(2, 2, 2, 2).mean((1, 3)).repeat_interleave(2, 0).repeat_interleave(2, 1)
    torch.testing.assert_close(model.weight.detach(), mean)
