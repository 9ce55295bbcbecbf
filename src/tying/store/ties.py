"""The ties of `tie_`, taken off before a network is written and put on again when it is read."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tying.enforce.ties.check import check
from tying.enforce.ties.expansion import Gradient
from tying.enforce.ties.tie import gradients_of, plan_of, tie_, untie_
from tying.errors import TieError
from tying.models import Models, by_name, parameters_of
from tying.plan import Tie, TiePlan
from tying.store.state import same_bits

Tied = tuple[Tie, Gradient]
"""A tie that `tie_` made, and how it combines gradients."""


def in_force(models: Models) -> list[Tied]:
    """Return what `tie_` put in force.

    Raises:
        TieError: If a tie is broken, and values differ that should be one; says which.
    """
    for tie in check(models).ties:
        if tie.how == "broken":
            raise TieError(tie.reason)
    gradients = gradients_of(models)
    return [(tie, gradients[tie.members[0].parameter]) for tie in plan_of(models)]


def known_gradient(text: str) -> Gradient:
    """Return how a tie combines gradients, as it was written.

    Raises:
        ValueError: If it is none of the ways.
    """
    if text not in get_args(Gradient):
        raise ValueError(text)
    return cast(Gradient, text)


def untied(models: Models) -> Models:
    """Return the models, or copies of them without the ties of `tie_`: plain weights, bit for bit."""
    if not check(models).ties:  # the plan of one of two tied models alone is empty
        return models
    copied = copy.deepcopy(models) if isinstance(models, nn.Module) else copy.deepcopy(by_name(models))
    untie_(copied)
    return copied


def tie_again_(models: Models, ties: Sequence[Tied], whole: nn.Module) -> None:
    """Tie freshly filled models: the weights keep every bit.

    Args:
        models: Written to.
        ties: What `in_force` gave of those that were saved.
        whole: The filled models under one roof, whose names are the full ones.
    """
    names = {member.parameter for tie, _ in ties for member in tie.members}
    weights = {name: p.detach().clone() for name, p in parameters_of(models).items() if name in names}
    for gradient in get_args(Gradient):
        tie_(models, TiePlan([tie for tie, each in ties if each == gradient]), gradient=gradient)
    for name, weight in weights.items():
        module, leaf = _place(whole, name)
        if not same_bits(getattr(module, leaf), weight):
            _write(module, leaf, weight)


def _place(whole: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return whole.get_submodule(path), leaf


@torch.no_grad()
def _write(module: nn.Module, leaf: str, weight: Tensor) -> None:
    """Set what a weight is made of: a mean of equal float64 values, or of −0, is not that value bit for bit."""
    if not parametrize.is_parametrized(module, leaf):
        getattr(module, leaf).copy_(weight)
        return
    chain = cast("Any", module.parametrizations)[leaf]
    stored = cast(nn.Parameter, chain.original)
    numbered = torch.arange(1, stored.numel() + 1, dtype=torch.float64, device=stored.device)
    source = chain[0](numbered.reshape(stored.shape)).long().reshape(-1)  # which stored number each number is, 0: none
    flat = stored.detach().reshape(-1).clone()
    flat[source[source > 0] - 1] = weight.reshape(-1)[source > 0]
    stored.copy_(flat.reshape(stored.shape))
