"""A plan and a model give a new, smaller network of plain layers that computes the same function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tying.channels.constants import constants_of
from tying.channels.find import channels_of
from tying.channels.graph import export
from tying.enforce.compaction.adapt import Attributes, set_attributes_
from tying.enforce.compaction.bare import bare_norms, fit_bare_norms_
from tying.enforce.compaction.collecting import garbage_put_off
from tying.enforce.compaction.compare import Inputs, Reference, check_equal, same_random_numbers
from tying.enforce.compaction.convolutions import Geometry, place_convolutions
from tying.enforce.compaction.dense import written_out
from tying.enforce.compaction.fastest import choose_fastest_
from tying.enforce.compaction.reduction import Compaction, reduce
from tying.enforce.compaction.refusals import (
    check_by_itself,
    check_compactable,
    check_model,
    check_plan,
    checked_inputs,
    checked_tolerance,
    why_not_run,
)
from tying.enforce.compaction.surgery import place_tied_, replace_, set_ways_, tied_layers, ways_of
from tying.enforce.compaction.trial import tried
from tying.errors import CompactError
from tying.plan import Member, Tie, TiePlan
from tying.usable import copy_of


def compact(
    model: nn.Module, plan: TiePlan, example_inputs: Inputs, *, tolerance: float = 1e-9, fastest: bool = False
) -> nn.Module:
    """Return a new, smaller network that computes what `model` computes once it is projected on the plan.

    Channels that nobody reads go, together with the units that make them; a pruned unit, whose output is then a
    constant, goes once its readers' biases have taken the constant over; layers whose inputs are tied become tied
    layers (`tying.nn`), which sum the inputs of each label and multiply by a small matrix. All to the fixed point. What
    can't go stays as zeros: `tying.enforce.plan_compaction` says what, and why. The result is always compared with the
    projected model in float64, in evaluation mode, on the example and on random inputs of another batch size, and of
    other lengths and image sizes where the model takes them; at sizes that are not tried, nothing is compared.

    Args:
        model: Any dtype, device and mode; not written to. Weights shared between its modules stay shared. Its tied
            layers are cut, and tied further: ties over the inputs of their weights are ties of their classes.
        plan: Ties of one member: over `Groups.inputs()` of the weights of `nn.Linear` and `nn.ConvNd`, pruned and
            tied; over `Groups.outputs()` of any parameter, pruned only; and those of
            `tying.find.convolution.hardwired`, which put a convolution in the place of a linear or locally connected
            layer.
        example_inputs: A tensor, or the tuple of tensors that `model` takes; the first dimension is the batch.
        tolerance: Largest difference from the projected model's outputs, relative to the largest of them.
        fastest: Measure here, layer by layer on the example inputs, whether a tied layer should sum its inputs or read
            them as the dense one does (`tying.enforce.compaction.fastest`); it stores each value once either way.
            Machines differ: without it, the same plan gives the same network on every one.

    Returns:
        A module with the model's dtype, device, mode and `requires_grad`, which shares no tensor with it.

    Raises:
        CompactError: If the plan can't be compacted, nothing would be left of a layer, or the network computes
            something else; names the parameter or the module.
        PlanError: If the plan does not fit the model, or is none.

    Example:
        >>> from tying.groups import Groups
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> plan = TiePlan([
        ...     Tie.of("0.weight", Groups.inputs(), [0, 0, 1, -1]),
        ...     Tie.of("0.weight", Groups.outputs(), [0, -1, 1]),
        ... ])
        >>> compact(model, plan, torch.randn(2, 4))
        Sequential(
          (0): TiedLinear(in_features=4, out_features=2, read=3, classes=2, bias=True)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=2, bias=True)
        )
    """
    inputs, tolerance = _checked(model, plan, example_inputs, tolerance)
    with garbage_put_off(), same_random_numbers(model):
        ways = ways_of(model)
        model, plan = _written_out(model, plan)
        planned = _plan(model, plan, inputs, tolerance)
        small = _build(copy_of(model, CompactError), planned.layers, planned.compaction)
        set_ways_(small, ways)
        if (fastest and choose_fastest_(small, inputs)) or ways or not planned.compared:
            checked = _build(copy_of(model, CompactError).double(), planned.layers, planned.compaction).eval()
            set_ways_(checked, ways_of(small))
            check_equal(planned.reference, checked, tolerance)
        return small


def plan_compaction(model: nn.Module, plan: TiePlan, example_inputs: Inputs, *, tolerance: float = 1e-9) -> Compaction:
    """Return what `compact` would do to the model, and what it could not do, with the reasons.

    It compares as `compact` does where heads, groups or the channels of norms go: whether they can is found by trial.

    Args:
        model: Not written to.
        plan: As for `compact`.
        example_inputs: As for `compact`.
        tolerance: As for `compact`.

    Raises:
        CompactError: As `compact`, all but the comparison of the result.
        PlanError: If the plan does not fit the model.

    Example:
        >>> from tying.groups import Groups
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sigmoid(), nn.Conv2d(2, 2, 3, padding=1))
        >>> _ = nn.init.zeros_(model[0].bias)
        >>> plan = TiePlan([Tie.of("0.weight", Groups.outputs(), [0, -1])])
        >>> print(plan_compaction(model, plan, torch.randn(2, 1, 8, 8)))
        Compaction: 0 channels removed, 0 of them folded into biases
          0.weight[axis 0: 1] stays: its constant 0.5 is read with zero padding by 2.weight
    """
    inputs, tolerance = _checked(model, plan, example_inputs, tolerance)
    with garbage_put_off(), same_random_numbers(model):
        return _plan(*_written_out(model, plan), inputs, tolerance).compaction


def _checked(
    model: nn.Module, plan: TiePlan, example_inputs: Inputs, tolerance: float
) -> tuple[tuple[Tensor, ...], float]:
    """The last two arguments, once all four are of the kind that is expected."""
    check_model(model)
    check_plan(plan)
    return checked_inputs(example_inputs), checked_tolerance(tolerance)


@dataclass(frozen=True)
class _Planned:
    """What is to be done to a model, and what the result must compute."""

    reference: Reference
    """The model projected on the plan, float64 and in evaluation mode."""
    layers: Mapping[str, Geometry]
    """What becomes a convolution, by module name."""
    compaction: Compaction
    compared: bool
    """Whether the result of the compaction was compared with the reference already."""


def _plan(model: nn.Module, plan: TiePlan, inputs: tuple[Tensor, ...], tolerance: float) -> _Planned:
    """Find out what goes. Convolutions are placed before channels are looked for: theirs can go too."""
    plan = _by_first_names(plan, model)
    found = check_compactable(model, plan)
    projected = copy_of(model, CompactError).double().eval()
    parameters = dict(projected.named_parameters())
    with torch.no_grad():
        for name, value in plan.project(parameters).items():
            parameters[name].copy_(value)
    try:
        reference = Reference(projected, inputs)  # what fails here would fail below, with less to say
    except CompactError as error:
        raise why_not_run(copy_of(model, CompactError), inputs, error) from error
    network = place_convolutions(copy_of(projected, CompactError), found.layers) if found.layers else projected
    graph = export(network, reference.inputs)
    channels, constants = channels_of(graph), constants_of(graph, reference.inputs)

    def reduced(refused: Mapping[int, str]) -> Compaction:
        return reduce(network, found.others, channels, constants, refused)

    def build(compaction: Compaction) -> nn.Module:
        return _build(copy_of(model, CompactError).double(), found.layers, compaction).eval()

    def check(small: nn.Module, norms: bool) -> None:
        fit_bare_norms_(small, reference.inputs)
        check_equal(reference, small, tolerance, norms=norms)

    compaction, compared = tried(network, reduced, build, check)
    if bare_norms(network):
        attributes = _merged(compaction.attributes, fit_bare_norms_(build(compaction), reference.inputs))
        compaction = replace(compaction, attributes=attributes)
    return _Planned(reference, found.layers, compaction, compared)


def _merged(one: Attributes, other: Attributes) -> Attributes:
    return {path: {**one.get(path, {}), **other.get(path, {})} for path in dict.fromkeys([*one, *other])}


def _written_out(model: nn.Module, plan: TiePlan) -> tuple[nn.Module, TiePlan]:
    """The model and the plan themselves, unless the model has tied layers: then a copy in which these are dense.

    Raises:
        CompactError: If the model is tied with another: a copy would not be.
    """
    check_by_itself(model)
    return written_out(copy_of(model, CompactError), plan) if tied_layers(model) else (model, plan)


def _by_first_names(plan: TiePlan, model: nn.Module) -> TiePlan:
    """The plan with shared parameters under their first names, which all that follows goes by."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}

    def renamed(tie: Tie) -> Tie:
        return Tie(tuple(Member(names.get(m.parameter, m.parameter), m.groups) for m in tie.members), tie.partition)

    return TiePlan([renamed(tie) for tie in plan], plan.provenance)


def _build(network: nn.Module, layers: Mapping[str, Geometry], compaction: Compaction) -> nn.Module:
    network = place_convolutions(network, layers)
    replace_(network, compaction.tensors)
    set_attributes_(network, compaction.attributes)
    place_tied_(network, compaction.labels)
    return network
