"""What can't be tied: refused by name, and nothing changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tied_models import CASES, ENCODERS, FILTERS, INPUTS, OUTPUTS, WHOLE, Autoencoder, pair, tie
from tying.enforce import check, shard_groups, tie_
from tying.errors import PlanError
from tying.models import Models, parameters_of
from tying.plan import Tie, TiePlan


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
        r"weight\[outputs\] ~ weight\[inputs\]: expected different parameters, got a tie of one with itself",
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
