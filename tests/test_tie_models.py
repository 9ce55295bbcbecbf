"""Ties across layers and models, against gradients and values added up number by number."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tying.enforce import check, compact, retie_, shard_groups, tie_, unique_parameters, untie_
from tying.enforce.tie import plan_of
from tying.errors import PlanError, TieError
from tying.groups import Groups
from tying.measure import measure
from tying.models import Models, by_name, parameters_of
from tying.plan import Member, Partition, Tie, TiePlan

WHOLE, INPUTS, OUTPUTS, FILTERS = Groups.whole(), Groups.inputs(), Groups.outputs(), Groups.filters()


class Autoencoder(nn.Module):
    def __init__(self, units: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder, self.decoder = nn.Linear(5, units), nn.Linear(units, 5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x)))


def seeded(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for layer in layers:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.reset_parameters()
    return nn.Sequential(*layers).double()


def pair() -> dict[str, nn.Module]:
    return {"a": Autoencoder(3, 1), "b": Autoencoder(3, 2)}


def tie(labels: list[int], *members: tuple[str, Groups]) -> Tie:
    return Tie(tuple(Member(*member) for member in members), Partition(labels))


CASES: dict[str, tuple[Callable[[], Models], TiePlan]] = {
    "whole, two layers": (
        lambda: seeded(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)),
        TiePlan([tie([0, 0], ("0.weight", WHOLE), ("2.weight", WHOLE))]),
    ),
    "transposed": (
        Autoencoder,
        TiePlan([tie([0, 1, 2, 0, 1, 2], ("encoder.weight", OUTPUTS), ("decoder.weight", INPUTS))]),
    ),
    "transposed, in another order": (
        Autoencoder,
        TiePlan([tie([0, 1, 2, 2, 0, 1], ("encoder.weight", OUTPUTS), ("decoder.weight", INPUTS))]),
    ),
    "groups of two layers, some pruned": (
        Autoencoder,
        TiePlan([tie([0, 0, -1, 1, -1, 0], ("encoder.weight", OUTPUTS), ("decoder.weight", INPUTS))]),
    ),
    "two models, all": (
        pair,
        TiePlan(
            [
                tie([0, 0], (f"a.{name}", WHOLE), (f"b.{name}", WHOLE))
                for name in ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
            ]
        ),
    ),
    "three models": (
        lambda: {**pair(), "c": Autoencoder(3, 3)},
        TiePlan([tie([0, 0, 0], *((f"{m}.encoder.weight", WHOLE) for m in "abc"))]),
    ),
    "two models, transposed": (
        pair,
        TiePlan([tie([0, 1, 2, 0, 1, 2], ("b.decoder.weight", INPUTS), ("a.encoder.weight", OUTPUTS))]),
    ),
    "the first units of a wider layer": (
        lambda: {"a": Autoencoder(2, 1), "b": Autoencoder(4, 2)},
        TiePlan(
            [
                tie([0, 1, 0, 1, 2, 3], ("a.encoder.weight", OUTPUTS), ("b.encoder.weight", OUTPUTS)),
                tie([0, 1, 0, 1, 2, 3], ("a.decoder.weight", INPUTS), ("b.decoder.weight", INPUTS)),
            ]
        ),
    ),
    "some units of each": (
        pair,
        TiePlan([tie([0, 1, 2, 3, 1, 4], ("a.encoder.bias", OUTPUTS), ("b.encoder.bias", OUTPUTS))]),
    ),
    "kernels of convolutions": (
        lambda: seeded(nn.Conv2d(5, 2, 1), nn.Conv2d(2, 5, 1)),
        TiePlan([tie([*range(10), *reversed(range(10))], ("0.weight", FILTERS), ("1.weight", FILTERS))]),
    ),
    "inside one weight, in two models": (
        pair,
        TiePlan([tie([0, 1, 0], ("a.encoder.weight", OUTPUTS)), tie([0, 0, 1], ("b.encoder.weight", OUTPUTS))]),
    ),
}


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


# ---------------------------------------------------------------- broken, mended, refused


def test_what_broke_is_told_and_mended_where_the_values_agree():
    models = pair()
    tie_(models, CASES["two models, all"][1])
    stored = models["a"].encoder.weight
    models["b"].encoder.weight = nn.Parameter(stored.detach().clone())
    told = check(models)
    assert not told
    assert [(t.names, t.how) for t in told.ties if t.how != "holds"] == [
        (("a.encoder.weight", "b.encoder.weight"), "can be mended")
    ]
    retie_(models)
    assert check(models)
    assert models["b"].encoder.weight is stored


def test_what_differs_is_refused_with_both_values_and_nothing_changes():
    models = pair()
    tie_(models, CASES["two models, all"][1])
    other = models["a"].encoder.weight.detach().clone()
    other[1, 2] = 7.25
    models["b"].encoder.weight = nn.Parameter(other)
    models["b"].encoder.bias = nn.Parameter(models["a"].encoder.bias.detach().clone())
    held = models["b"].encoder.bias
    value = f"{models['a'].encoder.weight[1, 2].item():.6g}"
    with pytest.raises(TieError, match=f"b.encoder.weight: expected the value of a.encoder.weight.*{value}, got 7.25"):
        retie_(models)
    with pytest.raises(TieError, match=r"b\.encoder\.weight"):
        models["b"](torch.zeros(1, 5, dtype=torch.float64))
    assert models["b"].encoder.bias is held
    assert "broken" in str(check(models))


def test_a_stored_weight_whose_shape_was_changed_is_told():
    model = Autoencoder()
    tie_(model, CASES["transposed"][1])
    parametrize.remove_parametrizations(model.decoder, "weight")
    # PyTorch wrote the decoder's shape into what both share: it is the encoder's, too
    with pytest.raises(
        TieError, match=r"encoder\.weight: expected what is stored for it, of shape \(3, 5\), got \(5, 3\)"
    ):
        model(torch.zeros(1, 5, dtype=torch.float64))


def test_a_computed_weight_that_was_made_plain_is_computed_again_where_it_agrees():
    model = Autoencoder()
    tie_(model, CASES["transposed"][1])
    agreeing = nn.Linear(3, 5).double()
    with torch.no_grad():
        agreeing.weight.copy_(model.encoder.weight.t())
    model.decoder = agreeing
    assert [t.how for t in check(model).ties] == ["can be mended"]
    model(torch.zeros(1, 5, dtype=torch.float64))
    assert check(model)
    assert model.decoder.parametrizations.weight.original is model.encoder.weight


def test_both_ends_copied_stay_tied_and_one_end_alone_is_not_trained():
    models = pair()
    tie_(models, CASES["two models, all"][1])
    x = torch.ones(2, 5, dtype=torch.float64)
    both = copy.deepcopy(models)
    assert check(both)
    both["a"](x).sum().backward()
    assert both["b"].encoder.weight is both["a"].encoder.weight is not models["a"].encoder.weight
    alone = copy.deepcopy(models["a"])
    assert [t.how for t in check(alone).ties] == ["alone"] * 4
    with torch.no_grad():
        assert torch.equal(alone(x), models["a"](x))
    with pytest.raises(TieError, match="expected to be trained together with b"):
        alone(x)
    untie_(alone)
    alone(x).sum().backward()
    assert check(models)


def test_a_copy_alone_does_not_mind_ties_that_lie_in_another_model():
    models = pair()
    tie_(models, TiePlan([ENCODERS, tie([0, 0, 1, 2, 3], ("b.decoder.bias", OUTPUTS))]))
    with torch.no_grad():
        copy.deepcopy(models["a"])(torch.zeros(1, 5, dtype=torch.float64))


def test_a_model_that_is_gone_leaves_the_other_in_peace():
    models = pair()
    tie_(models, CASES["two models, all"][1])
    a = models.pop("a")
    del models
    a(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
    assert check(a)
    untie_(a)
    assert not a._forward_pre_hooks


def _frozen() -> Models:
    models = pair()
    models["b"].encoder.weight.requires_grad_(False)
    return models


def _single() -> Models:
    models = pair()
    models["b"].float()
    return models


def _elsewhere() -> Models:
    models = pair()
    models["b"].to("meta")
    return models


def _integers() -> Models:
    models = pair()
    for model in models.values():
        model.encoder.weight = nn.Parameter(torch.zeros(3, 5, dtype=torch.int64), requires_grad=False)
    return models


def _tied() -> Models:
    models = pair()
    tie_(models, TiePlan([ENCODERS]))
    return models


def _normed() -> Models:
    models = pair()
    nn.utils.parametrizations.weight_norm(models["b"].encoder)
    return models


def _recurrent() -> Models:
    return {"a": nn.LSTM(5, 3), "b": nn.Linear(12, 5)}


ENCODERS = tie([0, 0], ("a.encoder.weight", WHOLE), ("b.encoder.weight", WHOLE))
REFUSED: dict[str, tuple[Callable[[], Models], list[Tie], str]] = {
    "another shape": (
        lambda: {"a": Autoencoder(3), "b": Autoencoder(4)},
        [ENCODERS],
        r"a\.encoder\.weight\[whole\] ~ b\.encoder\.weight\[whole\]: .* \[\(1, 15\), \(1, 20\)\]",
    ),
    "frozen": (_frozen, [ENCODERS], r"a\.encoder\.weight trained, b\.encoder\.weight frozen"),
    "integers": (_integers, [ENCODERS], r"a\.encoder\.weight: expected a floating-point weight, got torch\.int64"),
    "dtypes": (_single, [ENCODERS], r"a\.encoder\.weight torch\.float64, b\.encoder\.weight torch\.float32"),
    "devices": (_elsewhere, [ENCODERS], r"a\.encoder\.weight cpu, b\.encoder\.weight meta"),
    "missing": (
        pair,
        [tie([0, 0], ("a.encoder.weight", WHOLE), ("b.head.weight", WHOLE))],
        r"b\.head\.weight: expected a parameter of the model, got none",
    ),
    "overlapping": (
        pair,
        [ENCODERS, tie([0, 1, 0], ("b.encoder.weight", OUTPUTS))],
        r"b\.encoder\.weight: expected one tie, .* got \(a\.encoder.* and \(b\.encoder",
    ),
    "a cycle": (
        lambda: {**pair(), "c": Autoencoder(3, 3)},
        [
            tie([0, 1, 2, 0, 1, 2], ("a.encoder.weight", OUTPUTS), ("b.encoder.weight", OUTPUTS)),
            tie([0, 0], ("b.encoder.weight", WHOLE), ("c.encoder.weight", WHOLE)),
            tie([*range(15), *range(15)], ("c.encoder.weight", FILTERS), ("a.encoder.weight", FILTERS)),
        ],
        r"a\.encoder\.weight: expected one tie",
    ),
    "with itself": (
        lambda: nn.Linear(3, 3),
        [tie([0, 1, 2, 0, 1, 2], ("weight", OUTPUTS), ("weight", INPUTS))],
        r"weight: expected to be tied with other parameters, got a tie with itself",
    ),
    "tied already": (
        _tied,
        [ENCODERS],
        r"a\.encoder\.weight: expected a weight that is not tied yet, got one tied with",
    ),
    "parametrized": (_normed, [ENCODERS], r"b\.encoder\.weight: expected a plain parameter"),
    "recurrent": (
        _recurrent,
        [tie([*range(12), *range(12)], ("b.weight", INPUTS), ("a.weight_ih_l0", OUTPUTS))],
        r"a\.weight_ih_l0: expected a layer that reads its weight at every call, got LSTM",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_tied_is_refused_by_name_and_nothing_changes(case):
    build, ties, message = REFUSED[case]
    models = build()
    before = {name: (id(p), p.detach().clone()) for name, p in parameters_of(models).items()}
    good = tie([0, 0, 1, 2, 1], ("a.decoder.bias", OUTPUTS))
    with pytest.raises(PlanError, match=message):
        tie_(models, TiePlan([*([good] if case not in ("with itself", "recurrent") else []), *ties]))
    after = parameters_of(models)
    assert list(after) == list(before)
    assert all(id(after[name]) == i for name, (i, _) in before.items())
    assert all(p.is_meta or torch.equal(after[name], p) for name, (_, p) in before.items())


@pytest.mark.parametrize("models", [[nn.Linear(1, 1)], {"a.b": nn.Linear(1, 1)}, {"": nn.Linear(1, 1)}, {"a": 3}])
def test_models_are_modules_by_name(models):
    with pytest.raises(PlanError, match="models: expected"):
        tie_(models, TiePlan([]))


def test_one_model_under_two_names_is_refused():
    model = nn.Linear(1, 1)
    with pytest.raises(PlanError, match="got the same one as 'a' and as 'b'"):
        tie_({"a": model, "b": model}, TiePlan([]))


def test_an_interrupted_tie_is_undone(monkeypatch):
    models = pair()
    before = {name: (id(p), p.detach().clone()) for name, p in parameters_of(models).items()}
    plan = TiePlan([ENCODERS, tie([0, 1, 2, 0, 1, 2], ("a.decoder.weight", INPUTS), ("b.decoder.weight", INPUTS))])
    plan = plan + CASES["some units of each"][1]

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(parametrize, "register_parametrization", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tie_(models, plan)
    after = parameters_of(models)
    assert all(id(after[name]) == i and torch.equal(after[name], p) for name, (i, p) in before.items())
    assert len(check(models).ties) == 0


# ---------------------------------------------------------------- what is sharded together


def test_blocks_that_share_a_parameter_are_sharded_together_and_with_the_root_where_it_shares():
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("one", "two", "three", "four", "head")})
    model["three"].weight = model["one"].weight
    model["head"].weight = model["four"].weight
    blocks = [model[name] for name in ("one", "two", "three", "four")]
    assert shard_groups(model, blocks) == [[model["one"], model["three"]], [model["two"]]]


def test_blocks_must_lie_in_the_model_and_beside_each_other():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(PlanError, match="inside another"):
        shard_groups(model, [model[0], model[0][0]])
    with pytest.raises(PlanError, match="not in it"):
        shard_groups(model, [nn.Linear(2, 2)])


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


def test_shared_weights_may_change_their_shape_together():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    tie_(model, TiePlan([tie([0, 0], ("0.weight", WHOLE), ("2.weight", WHOLE))]))
    with torch.no_grad():
        for parameter in (model[0].weight, model[2].weight, model[4].weight):
            parameter[:, 3] = 0
        for layer in (model[0], model[2]):
            layer.weight[3] = 0
            layer.bias[3] = 0
    x = torch.randn(5, 4, dtype=torch.float64)
    small = compact(model, TiePlan([]), x)
    assert check(small)
    assert small[2].in_features == 4 or small[0].weight is small[2].weight
    torch.testing.assert_close(small(x), model(x))
