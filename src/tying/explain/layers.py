"""Which layers of a model share, what they are called on, and what their sharing saves."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from tying.errors import PlanError
from tying.explain import costs
from tying.explain.costs import Cost, Costs, TiedInputs
from tying.nn import LocallyConnected1d, LocallyConnected2d, TiedConv1d, TiedConv2d, TiedConv3d, TiedLinear
from tying.wiring.windows import Windows

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
    modules = {name: module for name, module in model.named_modules() if _are_known(module, calls.get(name))}
    found = (_layer({name: modules[name] for name in names}, calls) for names in _bound_together(modules))
    order = {name: place for place, name in enumerate(calls)}
    sharing = [layer for layer in found if layer.local.values > layer.shared.values]
    return tuple(sorted(sharing, key=lambda layer: order[layer.name]))


def not_counted(model: nn.Module, calls: Mapping[str, list[Observed]]) -> tuple[str, ...]:
    """Return the parameters of two dimensions or more that belong to no module whose cost is known."""
    local = (LocallyConnected1d, LocallyConnected2d)  # they share nothing
    counted = [m for n, m in model.named_modules() if isinstance(m, local) or _are_known(m, calls.get(n))]
    known = {id(parameter) for module in counted for parameter in module.parameters()}
    return tuple(name for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in known)


def _are_known(module: nn.Module, calls: list[Observed] | None) -> bool:
    return calls is not None and all(_is_known(module, call) for call in calls)


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
    found = costs.convolution(windows, m.in_channels, m.out_channels, groups=groups, bias=bias, width=width, tied=tied)
    return found if _is_plain(module) else replace(found, connections=_count_connections(module, call))


def windows_of(module: nn.Module, call: Observed) -> Windows:
    """Return the windows of a convolution on what it is called on; of a transposed one, those that it transposes.

    Of a convolution with a forward of its own, which may pad as it likes, the shapes say how much it pads.
    """
    m = cast(Any, module)
    size = call.outputs[1:] if isinstance(module, TRANSPOSED) else call.inputs[1:]
    dimensions = len(m.kernel_size)
    if _is_plain(module):
        mode = getattr(m, "padding_mode", "zeros")
        return Windows.of(size, m.kernel_size, m.stride, m.padding, m.dilation, mode, dimensions=dimensions)
    geometry = zip(size, call.outputs[1:], m.kernel_size, m.stride, m.dilation, strict=True)
    totals = [max((o - 1) * s + d * (k - 1) + 1 - n, 0) for n, o, k, s, d in geometry]
    pads = tuple((total // 2, total - total // 2) for total in totals)
    return Windows(tuple(size), tuple(m.kernel_size), tuple(m.stride), tuple(m.dilation), pads)


def _is_plain(module: nn.Module) -> bool:
    """Whether the forward is that of `torch.nn` or `tying.nn`: what its attributes say is what it does."""
    return any(type(module).forward is kind.forward for kind in SHARING)


def _is_known(module: nn.Module, call: Observed) -> bool:
    """Whether the closed forms hold for a call: its shapes are those of the layer."""
    if not isinstance(module, SHARING) or (isinstance(module, TRANSPOSED) and not _is_plain(module)):
        return False
    if not isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        return True
    there = call.inputs[1:] if isinstance(module, TRANSPOSED) else call.outputs[1:]
    try:
        return windows_of(module, call).output_size == there
    except PlanError:
        return False


def _count_connections(module: nn.Module, call: Observed) -> int:
    """Count the pairs of a convolution of zero-padded inputs: with all weights and inputs 1, the sum of its outputs."""
    given = {name: torch.full_like(p, float(p.ndim > 1), dtype=torch.float64) for name, p in module.named_parameters()}
    with torch.no_grad():
        ones = torch.ones(1, *call.inputs, dtype=torch.float64, device=next(module.parameters()).device)
        return round(float(functional_call(module, given, (ones,)).sum()))


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
