"""A plan and a model give a new, smaller network of plain layers that computes the same function."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from tying.errors import CompactError
from tying.nn import TiedLinear
from tying.plan import TiePlan

Inputs = Tensor | tuple[Tensor, ...]


def compact(model: nn.Module, plan: TiePlan, example_inputs: Inputs, *, tolerance: float = 1e-9) -> nn.Module:
    """Return a new, smaller network that computes what `model` computes once projected on the plan.

    Args:
        model: Any dtype, device and mode; not written to.
        plan: Ties of one member over `Groups.inputs()` or `Groups.outputs()` of linear or convolution weights.
        example_inputs: A tensor, or the tuple of tensors that `model` takes; the first dimension is the batch.
        tolerance: Largest difference from the projected model, in float64, relative to its largest output.

    Returns:
        A module with the model's dtype, device and mode, which shares no tensor with it and trains like any other.

    Raises:
        CompactError: If the network can't be built, or computes something else.
        PlanError: If the plan does not fit the model.

    Example:
        >>> from tying.groups import Groups
        >>> from tying.plan import Tie
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> plan = TiePlan([Tie.of("0.weight", Groups.inputs(), [0, 0, 1, -1])])
        >>> compact(model, plan, torch.randn(2, 4))[0]
        TiedLinear(in_features=4, out_features=3, read=3, classes=2, bias=True)
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    _check_compactable(model, plan)
    reference = copy.deepcopy(model).double().eval()
    _write(reference, plan.project(dict(reference.named_parameters())))
    layers = _linear_chain(reference, inputs)
    small = _shrink(copy.deepcopy(model), reference, layers, plan)
    checked = _shrink(copy.deepcopy(model).double(), reference, layers, plan)
    _compare(reference, checked.eval(), inputs, tolerance)
    return small


@dataclass
class _Layer:
    name: str
    weight: Tensor
    bias: Tensor
    inputs: Tensor
    read: list[int] = field(default_factory=list[int])
    made: list[int] = field(default_factory=list[int])


def _check_compactable(model: nn.Module, plan: TiePlan) -> None:
    plan.check_fits(dict(model.named_parameters()))
    modules = dict(model.named_modules())
    for tie in plan:
        name = tie.members[0].parameter
        module = modules[name.rpartition(".")[0]]
        plain = type(module) is nn.Linear and name.endswith("weight")
        if len(tie.members) > 1 or not plain or tie.members[0].groups.kind not in ("inputs", "outputs"):
            raise CompactError(
                f"{tie}: expected a tie of one member over the inputs or outputs of a plain linear weight, got "
                f"{type(module).__name__}; tie it with tie_ instead"
            )


def _write(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def _linear_chain(reference: nn.Module, inputs: tuple[Tensor, ...]) -> list[_Layer]:
    """The linear layers in the order they are called, units that nobody reads or that are constant left out."""
    seen: list[_Layer] = []
    hooks: list[Any] = []
    for name, module in reference.named_modules():
        if type(module) is nn.Linear:

            def note(layer: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                linear = cast(nn.Linear, layer)
                bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()  # pyright: ignore[reportUnnecessaryComparison]
                seen.append(_Layer(name, linear.weight.detach().clone(), bias.clone(), args[0].detach()))

            hooks.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        reference(*_random_like(inputs, 7))
    for hook in hooks:
        hook.remove()
    for layer in seen:
        layer.read, layer.made = list(range(layer.weight.shape[1])), list(range(layer.weight.shape[0]))
    for _ in seen:
        for maker, reader in itertools.pairwise(seen):
            values = reader.inputs.reshape(-1, reader.weight.shape[1])
            dead = (maker.weight == 0).all(1) & (values == values[0]).all(0)
            reader.bias += reader.weight[:, dead] @ values[0, dead]
            reader.weight[:, dead] = 0
            unread = (reader.weight == 0).all(0)
            maker.weight[unread] = 0
            maker.made = reader.read = torch.nonzero(~unread).flatten().tolist()
            if not maker.made:
                raise CompactError(
                    f"{maker.name}.weight: expected at least one unit that is read, got none; everything is pruned: "
                    "weaken the penalty or keep more groups"
                )
    return seen


def _shrink(model: nn.Module, reference: nn.Module, layers: list[_Layer], plan: TiePlan) -> nn.Module:
    labels = {tie.members[0].parameter: tie.partition.labels for tie in plan if tie.members[0].groups.kind == "inputs"}
    for layer in layers:
        old = cast(nn.Linear, model.get_submodule(layer.name))
        weight = layer.weight[layer.made][:, layer.read]
        needs_bias = old.bias is not None or bool(layer.bias.any())  # pyright: ignore[reportUnnecessaryComparison]
        new = nn.Linear(
            len(layer.read),
            len(layer.made),
            needs_bias,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
        with torch.no_grad():
            new.weight.copy_(weight)
            if needs_bias:
                new.bias.copy_(layer.bias[layer.made])
        tied = torch.tensor(list(labels.get(f"{layer.name}.weight", range(layer.weight.shape[1]))))[layer.read]
        tied[(weight == 0).all(0)] = -1
        if not bool((tied >= 0).any()):
            raise CompactError(
                f"{layer.name}.weight: expected at least one input that is read, got none; everything is pruned: "
                "weaken the penalty or keep more groups"
            )
        distinct = len(set(tied.tolist()) - {-1}) == len(tied)
        result = new if distinct else TiedLinear.from_linear(new, tied)
        parent, _, leaf = layer.name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, result.train(old.training))
    return model


def _random_like(inputs: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
    """Deterministic random inputs of another batch size, float64 on the inputs' device."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn((batch, *x.shape[1:]), generator=generator, dtype=torch.float64).to(x.device) for x in inputs
    )


def _compare(reference: nn.Module, small: nn.Module, inputs: tuple[Tensor, ...], tolerance: float) -> None:
    remedy = "the model has sizes written in its forward, or does not read its layers one after the other"
    for given in (tuple(x.double() for x in inputs), _random_like(inputs, len(inputs[0]) + 1)):
        with torch.no_grad():
            expected = cast(Tensor, reference(*given))
            try:
                got = cast(Tensor, small(*given))
            except Exception as error:
                raise CompactError(
                    f"model: expected a compacted network that runs, got {error}; {remedy}: tie_ it instead"
                ) from error
        if got.shape != expected.shape:
            raise CompactError(
                f"model: expected an output of shape {tuple(expected.shape)}, got {tuple(got.shape)}; {remedy}: "
                "tie_ it instead"
            )
        difference = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-300))
        if not difference <= tolerance:
            raise CompactError(
                f"model: expected equal outputs to {tolerance:g}, got a relative difference of {difference:.3g}; "
                f"{remedy}: tie_ it instead"
            )
