"""Which layers of a model share, what they are called on, and what their sharing saves."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tying.explain import costs
from tying.explain.costs import Cost, Costs, TiedInputs
from tying.nn import LocallyConnected1d, LocallyConnected2d, TiedConv1d, TiedConv2d, TiedConv3d, TiedLinear
from tying.windows import Windows

Transposed: TypeAlias = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, TiedConv1d, TiedConv2d, TiedConv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SHARING = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear, TiedLinear, nn.Embedding)
"""The layers whose cost is known in closed form."""


@dataclass(frozen=True)
class Observed:
    """One call of a module, without the batch."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """A layer that shares, or several that share a parameter, beside the same connections not shared, and dense."""

    name: str
    """Of the module; of several, the first."""
    kind: str
    also: tuple[str, ...]
    """The other modules with the same parameters."""
    calls: int
    """Of all of them, in one forward pass."""
    inputs: tuple[int, ...]
    """The shape of one sample, at the first call."""
    outputs: tuple[int, ...]
    over: str
    """What is shared over, in words: "24×24 positions, 2 calls"."""
    connections: int
    """Pairs of an output unit and an input unit that it reads: the entries of the sparse matrix of the map."""
    shared: Cost
    local: Cost
    """The same connections, each with a value of its own: a locally connected layer at every position and call."""
    dense: Cost
    """Every output unit connected with every input unit, at every call."""


@contextmanager
def watching(model: nn.Module, see: Callable[[str, nn.Module, Tensor, Tensor], None]) -> Generator[None]:
    """Call `see(name, module, input, output)` for every call of a module that takes a tensor and gives one."""

    def hook(name: str) -> Callable[..., None]:
        def seen(module: nn.Module, inputs: Any, output: Any) -> None:
            if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                see(name, module, inputs[0], output)

        return seen

    handles: list[RemovableHandle] = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_layers(model: nn.Module, calls: Mapping[str, list[Observed]]) -> tuple[Layer, ...]:
    """Return the layers that share: those that would store more if every position and every call had its own values.

    Args:
        model: The model.
        calls: By the names of its modules, what they were called on, in the order of the calls.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, SHARING) and name in calls}
    found = (_layer({name: modules[name] for name in names}, calls) for names in _bound_together(modules))
    order = {name: place for place, name in enumerate(calls)}
    sharing = [layer for layer in found if layer.local.values > layer.shared.values]
    return tuple(sorted(sharing, key=lambda layer: order[layer.name]))


def not_counted(model: nn.Module, calls: Mapping[str, list[Observed]]) -> tuple[str, ...]:
    """Return the parameters of two dimensions or more that belong to no module whose cost is known."""
    counted = (*SHARING, LocallyConnected1d, LocallyConnected2d)  # the latter share nothing
    known = {
        id(p) for name, m in model.named_modules() if isinstance(m, counted) and name in calls for p in m.parameters()
    }
    return tuple(name for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in known)


def _bound_together(modules: Mapping[str, nn.Module]) -> list[list[str]]:
    """Group the modules that have a parameter in common, in the order of the modules."""
    groups: list[tuple[set[int], list[str]]] = []
    for name, module in modules.items():
        own = {id(parameter) for parameter in module.parameters()}
        joined = [group for group in groups if group[0] & own]
        for group in joined:
            groups.remove(group)
        groups.append((own.union(*(g[0] for g in joined)), [*(n for g in joined for n in g[1]), name]))
    return [names for _, names in groups]


def _layer(modules: Mapping[str, nn.Module], calls: Mapping[str, list[Observed]]) -> Layer:
    called = [(module, call) for name, module in modules.items() for call in calls[name]]
    each = [costs_of(module, call) for module, call in called]
    total = sum(each[1:], each[0])
    stored = {id(p): p for module in modules.values() for p in module.parameters()}.values()
    numbers, size = sum(p.numel() for p in stored), sum(p.numel() * p.element_size() for p in stored)
    shared = Cost(numbers, total.shared.multiply_adds, total.shared.operations, size)
    first, *also = modules
    module, call = called[0]
    return Layer(
        name=first,
        kind=type(module).__name__.removeprefix("Parametrized"),
        also=tuple(also),
        calls=len(called),
        inputs=call.inputs,
        outputs=call.outputs,
        over=_over(modules, called),
        connections=total.connections,
        shared=shared,
        local=total.local,
        dense=total.dense,
    )


def _over(modules: Mapping[str, nn.Module], called: list[tuple[nn.Module, Observed]]) -> str:
    module, call = called[0]
    places = positions_of(module, call)
    said = [f"{'×'.join(map(str, places))} positions"] if math.prod(places) > 1 else []
    tied = _tied(module)
    if tied is not None and tied.classes < tied.read:
        said.append(f"{tied.read} inputs by {tied.classes} values")
    elif hasattr(module, "parametrizations"):
        said.append("ties")
    if len(modules) > 1:
        said.append(f"{len(modules)} layers")
    if len(called) > len(modules):
        said.append(f"{len(called)} calls")
    return ", ".join(said)


def positions_of(module: nn.Module, call: Observed) -> tuple[int, ...]:
    """Return over which positions a layer uses its values: of the output, or of the input of what is transposed."""
    if isinstance(module, CONVOLUTIONS):
        return call.outputs[1:]
    if isinstance(module, TRANSPOSED):
        return call.inputs[1:]
    return call.inputs if isinstance(module, nn.Embedding) else call.inputs[:-1]


def costs_of(module: nn.Module, call: Observed) -> Costs:
    """Return the costs of one call of a layer in closed form; those of the shared one without ties inside."""
    m = cast(Any, module)
    bias: bool = getattr(m, "bias", None) is not None
    width: int = m.weight.element_size()
    if isinstance(module, nn.Embedding):
        return costs.embedding(math.prod(call.inputs), m.num_embeddings, m.embedding_dim, width=width)
    if isinstance(module, nn.Linear | TiedLinear):
        count = math.prod(call.inputs[:-1])
        return costs.linear(count, m.in_features, m.out_features, bias=bias, width=width, tied=_tied(module))
    windows, groups = windows_of(module, call), int(getattr(m, "groups", 1))
    if isinstance(module, TRANSPOSED):
        return costs.transposed(windows, m.in_channels, m.out_channels, groups=groups, bias=bias, width=width)
    tied = _tied(module)
    return costs.convolution(windows, m.in_channels, m.out_channels, groups=groups, bias=bias, width=width, tied=tied)


def windows_of(module: nn.Module, call: Observed) -> Windows:
    """Return the windows of a convolution on what it is called on; of a transposed one, those that it transposes."""
    m = cast(Any, module)
    size = call.outputs[1:] if isinstance(module, TRANSPOSED) else call.inputs[1:]
    mode = getattr(m, "padding_mode", "zeros")
    return Windows.of(size, m.kernel_size, m.stride, m.padding, m.dilation, mode, dimensions=len(m.kernel_size))


def _tied(module: nn.Module) -> TiedInputs | None:
    if not isinstance(module, TiedLinear | TiedConv1d | TiedConv2d | TiedConv3d):
        return None
    return TiedInputs(int((module.labels >= 0).sum()), module.classes)


def observe(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, list[Observed]]:
    """Run the model once on one sample, and return what each of its modules was called on."""
    calls: dict[str, list[Observed]] = {}

    def see(name: str, module: nn.Module, given: Tensor, made: Tensor) -> None:
        kernel = getattr(module, "kernel_size", None)
        if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) and kernel is not None and given.ndim == len(kernel) + 1:
            given, made = given[None], made[None]  # called without a batch
        calls.setdefault(name, []).append(Observed(tuple(given.shape[1:]), tuple(made.shape[1:])))

    with torch.no_grad(), watching(model, see):
        model(*inputs)
    return calls
