"""Tied layers written out: the dense layers that they stand for, and their labels as ties, to go on from."""

from __future__ import annotations

from typing import cast

from torch import nn

from tying.enforce.compaction.surgery import tied_layers
from tying.enforce.held import not_alone, places_of
from tying.errors import CompactError
from tying.groups import Groups
from tying.nn import TiedLinear
from tying.plan import Member, Partition, Tie, TiePlan, qualified


def written_out(model: nn.Module, plan: TiePlan) -> tuple[nn.Module, TiePlan]:
    """Return a model without tied layers that computes the same, and the plan with their labels as ties.

    Args:
        model: Written to: pass a copy.
        plan: Ties over the inputs of a tied layer label its classes: here they come to label its inputs.

    Raises:
        CompactError: If a tied layer has hooks, is the whole model, or shares its weight.
        PlanError: If the plan does not fit the model.
    """
    plan.check_fits(dict(model.named_parameters()))
    layers, places = tied_layers(model), places_of(model)
    labels = {qualified(name, "weight"): layer.partition.labels for name, layer in layers.items()}
    for name, layer in layers.items():
        _check_alone(model, name)
        dense = layer.to_linear() if isinstance(layer, TiedLinear) else layer.to_conv()
        dense.weight.requires_grad_(layer.weight.requires_grad)
        dense.bias = cast("nn.Parameter", layer.bias)
        for place in places[id(layer)]:
            model.set_submodule(place, dense.train(layer.training))
    ties: list[Tie] = []
    for tie in plan:
        member = tie.members[0]
        if len(tie.members) == 1 and member.parameter in labels and member.groups.kind == "inputs":
            held, given = labels.pop(member.parameter), tie.partition.labels
            ties.append(Tie((member,), Partition([-1 if label < 0 else int(given[label]) for label in held])))
        else:
            ties.append(tie)
    ties += [Tie((Member(name, Groups.inputs()),), Partition(held)) for name, held in labels.items()]
    return model, TiePlan(ties, plan.provenance)


def _check_alone(model: nn.Module, name: str) -> None:
    weight = qualified(name, "weight")
    if reason := not_alone(model, name):
        raise CompactError(f"{weight}: expected a tied layer of its own, to compact it further, got one, but {reason}")
