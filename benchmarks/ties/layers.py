"""One end of a tie frozen, rewritten, replaced, written to."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from benchmarks.ties.cases import Subject, both_ends, dense
from benchmarks.ties.verdict import Expected


def frozen_parameter(subject: Subject) -> Expected:
    cast(Tensor, subject.end(1).weight).requires_grad_(False)
    return Expected(frozen=both_ends(subject))


def frozen_module(subject: Subject) -> Expected:
    subject.end(1).requires_grad_(False)
    return Expected(frozen=both_ends(subject))


def pruned(subject: Subject) -> None:
    prune.l1_unstructured(subject.end(1), "weight", 0.3)


def pruned_for_good(subject: Subject) -> Expected:
    """The mask is written into the weight, the reparametrization goes; training goes on."""
    prune.l1_unstructured(subject.end(1), "weight", 0.3)
    prune.remove(subject.end(1), "weight")
    return Expected(trained_alike=False)


def weight_normed(subject: Subject) -> Expected:
    nn.utils.parametrizations.weight_norm(subject.end(1))
    return Expected(trained_alike=False)


def old_weight_normed(subject: Subject) -> Expected:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(subject.end(1))
    return Expected(trained_alike=False)


class Doubled(nn.Module):
    """Twice the weight: a parametrization that changes the value."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return it doubled."""
        return 2 * weight


def parametrized(subject: Subject) -> Expected:
    parametrize.register_parametrization(subject.end(1), "weight", Doubled())
    return Expected(trained_alike=False)


def parametrized_both(subject: Subject) -> Expected:
    """Both ends get the same parametrization: what they compute with stays equal."""
    for which in (0, 1) if subject.kind != "inside" else (0,):
        parametrize.register_parametrization(subject.end(which), "weight", Doubled())
    return Expected(trained_alike=False)


def _replace(subject: Subject, new: nn.Module) -> None:
    model, leaf = subject.holder(1)
    setattr(model, leaf, new)


def replaced(subject: Subject) -> Expected:
    old = cast(Any, subject.end(1))
    torch.manual_seed(5)
    _replace(subject, nn.Linear(old.in_features, old.out_features, bias=False).double())
    return Expected(trained_alike=False)


def replaced_by_copy(subject: Subject) -> None:
    _replace(subject, copy.deepcopy(subject.end(1)))


def replaced_by_equal(subject: Subject) -> None:
    old = cast(Any, subject.end(1))
    new = nn.Linear(old.in_features, old.out_features, bias=False).double()
    with torch.no_grad():
        new.weight.copy_(old.weight)
    _replace(subject, new)


def exchanged(subject: Subject) -> Expected:
    """Each model gets the other one's module: what stands there is the same."""
    (a, leaf), (b, _) = subject.holder(0), subject.holder(1)
    one, other = a.get_submodule(leaf), b.get_submodule(leaf)
    setattr(a, leaf, other)
    setattr(b, leaf, one)
    return Expected()


def module_shared(subject: Subject) -> None:
    _replace(subject, subject.end(0))


def wrapped(subject: Subject) -> Expected:
    """The same module, one level deeper, as wrappers for checkpointing or adapters do."""
    layer = cast(Any, subject.end(1))
    around: Any = nn.Sequential(layer)
    around.in_features = layer.in_features
    _replace(subject, around)
    return Expected()


def new_parameter(subject: Subject) -> Expected:
    """A new Parameter under one of the names."""
    subject.end(1).weight = nn.Parameter(cast(Tensor, subject.end(1).weight).detach() + 0.5)
    return Expected(subject.weights(), trained_alike=False)


def new_data(subject: Subject) -> Expected:
    """`p.data = …` at one of the names."""
    weight = cast(Tensor, subject.end(1).weight)
    weight.data = weight.detach().clone() + 0.5
    return _written(subject)


def written_to_data(subject: Subject) -> Expected:
    """`p.data.copy_(…)` at one of the names, as many initialisers do."""
    weight = cast(Tensor, subject.end(1).weight)
    weight.data.copy_(weight.detach() + 0.5)
    return _written(subject)


def written_in_place(subject: Subject) -> Expected:
    """A value written to one of the names under `no_grad`, as every `nn.init` function does."""
    with torch.no_grad():
        weight = cast(Tensor, subject.end(1).weight)
        weight.copy_(weight.detach() + 0.5)
    return _written(subject)


def initialised(subject: Subject) -> Expected:
    """`nn.init` on one of the names."""
    was = subject.weights()
    nn.init.constant_(cast(Tensor, subject.end(1).weight), 0.25)
    return _written(subject, {n: torch.full_like(was[n], 0.25) for n in both_ends(subject)})


def _written(subject: Subject, new: dict[str, Tensor] | None = None) -> Expected:
    """All ends have the value that was written."""
    values = dense(subject.kind, 0)
    values.update(new or {name: values[name] + 0.5 for name in both_ends(subject)})
    return Expected(values)


def called_inside(subject: Subject) -> Expected:
    """The layers are called without the model they belong to; one end was replaced before."""
    replaced(subject)

    def run(model: Any, x: Tensor) -> Tensor:
        x = model.encoder(model.enter(x).tanh()).tanh()
        return model.head(model.decoder(x).tanh())

    subject.run = {key: (lambda x, model=model: run(model, x)) for key, model in subject.models.items()}
    return Expected(trained_alike=False)
