"""Ties that broke: told, mended where the values agree, refused where they don't; copies; state dicts."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tied_models import CASES, ENCODERS, OUTPUTS, WHOLE, Autoencoder, pair, tie
from tying.enforce import check, compact, retie_, tie_, untie_
from tying.errors import CompactError, TieError
from tying.models import parameters_of
from tying.plan import TiePlan

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


def test_any_model_tells_what_broke_in_another():
    models = pair()
    tie_(models, CASES["two models, all"][1])
    models["a"].encoder = nn.Linear(5, 3).double()
    with pytest.raises(TieError, match=r"encoder\.weight: expected the value of"):
        models["b"](torch.zeros(1, 5, dtype=torch.float64))


def test_a_model_is_not_kept_alive_by_those_that_are_tied_with_it():
    models = pair()
    tie_(models, CASES["two models, all"][1])
    layer = weakref.ref(models["b"].encoder)
    del models["b"]
    models["a"](torch.zeros(1, 5, dtype=torch.float64))
    gc.collect()
    assert layer() is None


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
    copy.deepcopy(a)(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
    untie_(a)
    assert not a._forward_pre_hooks


# ---------------------------------------------------------------- parts, copies, gradients


def test_parts_of_a_container_are_guarded_as_models():
    parts = nn.ModuleDict(pair())
    tie_(parts, CASES["two models, all"][1])
    first, second = (Autoencoder(3, seed).state_dict() for seed in (7, 8))
    parts["a"].load_state_dict(first)
    with pytest.raises(TieError, match=r"b\.encoder\.weight: expected the value of a\.encoder\.weight, as loaded just"):
        parts["b"].load_state_dict(second)
    copied = copy.deepcopy(parts)
    assert check(copied)
    copied["b"].encoder = nn.Linear(5, 3).double()
    with pytest.raises(TieError, match=r"b\.encoder"):
        copied["b"](torch.zeros(1, 5, dtype=torch.float64))
    untie_(parts)
    assert not check(parts)


def test_one_checkpoint_after_the_other_is_loaded_into_a_tied_pair():
    models = pair()
    tie_(models, CASES["two models, all"][1])
    for seed in (7, 8, 9):
        state = Autoencoder(3, seed).state_dict()
        for model in models.values():
            model.load_state_dict(state)
        assert torch.equal(models["b"].encoder.weight, state["encoder.weight"])


@pytest.mark.parametrize("end", ["encoder", "decoder"])
def test_one_end_that_is_assigned_brings_the_other(end):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    tie_(model, TiePlan([tie([0, 0], ("0.weight", WHOLE), ("1.weight", WHOLE))]))
    name = {"encoder": "0.weight", "decoder": "1.weight"}[end]
    state = {name: torch.eye(3, dtype=torch.float64)}
    model.load_state_dict(state, strict=False, assign=True)
    assert check(model)
    assert torch.equal(model[0].weight, state[name])
    assert torch.equal(model[1].weight, state[name])


def test_a_shallow_copy_that_outlives_its_original_is_guarded():
    model = Autoencoder()
    tie_(model, CASES["transposed"][1])
    shallow = copy.copy(model)
    del model
    shallow(torch.zeros(1, 5, dtype=torch.float64))
    shallow.encoder = nn.Linear(5, 3).double()
    with pytest.raises(TieError, match=r"encoder\.weight"):
        shallow(torch.zeros(1, 5, dtype=torch.float64))


def test_gradients_of_ends_that_are_mended_add_up():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    tie_(model, TiePlan([tie([0, 0], ("0.weight", WHOLE), ("1.weight", WHOLE))]))
    whole = copy.deepcopy(model)
    x = torch.randn(2, 3, dtype=torch.float64)
    model[1].weight = nn.Parameter(model[0].weight.detach().clone())
    model[1](model[0](x)).sum().backward()  # its layers, not the model: no guard looks yet
    retie_(model)
    whole(x).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, whole[0].weight.grad, rtol=1e-12, atol=1e-12)


def test_an_untie_that_fails_leaves_every_tie():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    tie_(model, TiePlan([tie([0, 0, 1], (f"{i}.weight", OUTPUTS)) for i in range(2)]))
    model(torch.zeros(1, 3, dtype=torch.float64))
    nn.init.zeros_(model[1].weight)
    with pytest.raises(TieError, match=r"1\.weight: .* a write in place"):
        untie_(model)
    assert check(model)
    assert len(check(model).ties) == 2


def test_a_tie_that_fails_when_values_are_written_is_undone():
    models = {name: nn.Linear(4, 3, bias=False) for name in "ab"}
    models["a"].weight = nn.Parameter(torch.zeros(1, 1).expand(3, 4))  # which can't be written to
    before = parameters_of(models)
    with pytest.raises(RuntimeError):
        tie_(models, TiePlan([tie([0, 0], ("a.weight", WHOLE), ("b.weight", WHOLE))]))
    assert all(parameters_of(models)[name] is parameter for name, parameter in before.items())
    assert not any(model._forward_pre_hooks for model in models.values())


def test_one_model_after_the_other_is_loaded_by_assignment():
    models = pair()
    tie_(models, CASES["two models, all"][1])
    stored = models["a"].encoder.weight
    state = Autoencoder(3, 7).state_dict()
    models["a"].load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    assert torch.equal(models["b"].encoder.weight, state["encoder.weight"])
    models["b"].load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    assert check(models)
    assert models["b"].encoder.weight is models["a"].encoder.weight is stored
    models["a"].load_state_dict(state)
    with pytest.raises(TieError, match="as loaded just before"):
        models["b"].load_state_dict(Autoencoder(3, 8).state_dict(), assign=True)


def test_a_copy_alone_may_be_loaded_and_only_its_training_is_refused():
    models = pair()
    tie_(models, CASES["two models, all"][1])
    best = copy.deepcopy(models["a"])
    best.load_state_dict(Autoencoder(3, 7).state_dict())
    with pytest.raises(TieError, match="trained together"):
        best(torch.zeros(1, 5, dtype=torch.float64))


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("case", ["the first units of a wider layer", "some units of each"])
def test_checkpoints_of_models_that_have_some_units_in_common_load_in_any_order(case, order):
    build, plan = CASES[case]
    models, source = build(), build()
    tie_(models, plan)
    with torch.no_grad():
        for name, value in plan.project(parameters_of(source)).items():
            parameters_of(source)[name].copy_(value)
    for name in order:
        models[name].load_state_dict(source[name].state_dict())
    for name in "ab":
        assert torch.equal(models[name].encoder.weight, source[name].encoder.weight)
        assert torch.equal(models[name].encoder.bias, source[name].encoder.bias)


@pytest.mark.parametrize("gradient", ["sum", "mean"])
@pytest.mark.parametrize("flow", ["assign", "to_empty"])
@pytest.mark.parametrize("case", ["two models, all", "two models, transposed", "some units of each"])
def test_ties_made_on_the_meta_device_are_loaded(case, flow, gradient):
    build, plan = CASES[case]
    source = build()
    tie_(source, plan, gradient=gradient)
    states = {name: model.state_dict() for name, model in source.items()}
    models = {name: model.to("meta") for name, model in build().items()}
    tie_(models, plan, gradient=gradient)
    for model in models.values() if flow == "to_empty" else ():
        model.to_empty(device="cpu")
    for name, model in models.items():
        model.load_state_dict(states[name], assign=flow == "assign")
    assert check(models)
    for name, model in models.items():
        torch.testing.assert_close(model(torch.ones(1, 5).double()), source[name](torch.ones(1, 5).double()))


def test_a_model_that_is_tied_with_another_is_compacted_once_it_is_untied():
    models = pair()
    tie_(models, CASES["two models, all"][1])
    x = torch.randn(4, 5, dtype=torch.float64)
    with pytest.raises(CompactError, match=r"a\.encoder\.weight ~ b\.encoder\.weight: expected a model by itself"):
        compact(models["a"], TiePlan([]), x)
    alone = copy.deepcopy(models["a"])
    untie_(alone)
    torch.testing.assert_close(compact(alone, TiePlan([]), x)(x), models["a"](x))
