"""Optimizers of tied weights: one step for one gradient, whoever takes it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from tied_models import CASES, ENCODERS, pair
from tying.enforce import check, tie_, unique_parameters, untie_
from tying.errors import TieError
from tying.plan import TiePlan

X = torch.ones(2, 5, dtype=torch.float64)


def tied() -> dict[str, nn.Module]:
    models = pair()
    tie_(models, CASES["two models, all"][1])
    return models


def backward(*models: nn.Module) -> None:
    sum(model(X).square().sum() for model in models).backward()


def each_its_own(models: dict[str, nn.Module]) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=0.01) for model in models.values()]


@pytest.mark.parametrize(
    "clip",
    [None, lambda p: clip_grad_norm_(p, 0.1), lambda p: clip_grad_value_(p, 0.1)],
    ids=["as it is", "clipped by norm", "clipped by value"],
)
def test_a_gradient_is_not_stepped_twice(clip):
    models = tied()
    one, other = each_its_own(models)
    backward(*models.values())
    if clip:
        clip(models["a"].parameters())
    one.step()
    if clip:
        clip(models["b"].parameters())
    with pytest.raises(TieError, match=r"a\.encoder\.weight and b\.encoder\.weight, .* got a second"):
        other.step()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_optimizers_may_take_turns(set_to_none):
    models = tied()
    optimizers = each_its_own(models)
    for _ in range(3):
        for optimizer, model in zip(optimizers, models.values(), strict=True):
            for each in optimizers:
                each.zero_grad(set_to_none=set_to_none)
            backward(model)
            optimizer.step()


def test_one_optimizer_may_follow_another():
    models = tied()
    backward(*models.values())
    torch.optim.SGD(unique_parameters(models), lr=0.01).step()
    search = torch.optim.LBFGS(unique_parameters(models), max_iter=2)

    def closure() -> torch.Tensor:
        search.zero_grad()
        loss = sum(model(X).square().sum() for model in models.values())
        loss.backward()
        return loss

    search.step(closure)
    adam = torch.optim.Adam(unique_parameters(models))
    adam.zero_grad()
    backward(*models.values())
    adam.step()


def test_a_gradient_that_was_zeroed_is_no_second_step():
    models = tied()
    one, other = each_its_own(models)
    backward(*models.values())
    one.step()
    other.zero_grad(set_to_none=False)
    other.step()


def test_a_parameter_that_a_model_takes_back_may_be_stepped():
    models = pair()
    own = models["b"].encoder.weight
    tie_(models, TiePlan([ENCODERS]))
    before = torch.optim.SGD(models["b"].parameters(), lr=0.01)
    untie_(models)
    models["b"].encoder.weight = own
    backward(*models.values())
    torch.optim.SGD(models["b"].parameters(), lr=0.01).step()
    with pytest.raises(TieError, match="expected one made after parameters were tied"):
        before.step()


def test_a_parameter_exchanged_within_the_optimizer_is_seen():
    models = tied()
    optimizer = torch.optim.SGD(unique_parameters(models), lr=0.01)
    backward(*models.values())
    optimizer.step()
    optimizer.param_groups[0]["params"][1] = optimizer.param_groups[0]["params"][0]
    with pytest.raises(TieError, match="times"):
        optimizer.step()


def test_a_parameter_that_was_stepped_may_still_be_swapped():
    models = tied()
    backward(*models.values())
    torch.optim.SGD(unique_parameters(models), lr=0.01).step()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for model in models.values():
            model.zero_grad()
            model.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert check(models)


def test_a_fused_step_ends_what_was_just_loaded():
    models = tied()
    models["a"].load_state_dict(pair()["a"].state_dict())
    best = {name: value.clone() for name, value in models["b"].state_dict().items()}
    backward(*models.values())
    torch.optim.AdamW(unique_parameters(models), fused=True).step()
    models["b"].load_state_dict(best)
    assert torch.equal(models["a"].encoder.weight, best["encoder.weight"])
