"""Which layers of a model share, what they are called on, and what their sharing saves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from tying.enforce.ties.bonds import is_expansion
from tying.errors import TyingError
from tying.explain import costs
from tying.explain.calls import Observed
from tying.explain.costs import Cost, Costs, TiedInputs
from tying.explain.own import count_connections
from tying.explain.planes import CONVOLUTIONS, LOCAL, TRANSPOSED, crossed, kind_of
from tying.nn import TiedConv1d, TiedConv2d, TiedConv3d, TiedLinear
from tying.wiring.plain import is_plain
from tying.wiring.windows import Windows

SHARING = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear, TiedLinear, nn.Embedding)
"""The layers whose cost is known in closed form."""


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
    """Nothing shared: a locally connected layer at every call, with a kernel of its own at every position. Taps on
    padding, which connect nothing, are stored too."""
    dense: Cost
    """Every output unit connected with every input unit, at every call."""


def find_layers(model: nn.Module, calls: Mapping[str, list[Observed]]) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """Return the layers that share, and the parameters whose cost is not known.

    A layer shares if it would store more if every position and every call had its own values; not counted are
    parameters of two dimensions or more that belong to no module whose cost is known.

    Args:
        model: The model.
        calls: By the names of its modules, what they were called on, in the order of the calls.
    """
    known: dict[str, list[Costs]] = {}
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if (each := _known_costs(module, calls.get(name))) is not None:
            known[name], modules[name] = each, module
    found = (_layer({name: modules[name] for name in names}, calls, known) for names in _bound_together(modules))
    order = {name: place for place, name in enumerate(calls)}
    sharing = [layer for layer in found if layer.local.values > layer.shared.values]
    counted = [*modules.values(), *(m for m in model.modules() if isinstance(m, LOCAL))]  # those share nothing
    stored = {id(parameter) for module in counted for parameter in module.parameters()}
    uncounted = tuple(name for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in stored)
    return tuple(sorted(sharing, key=lambda layer: order[layer.name])), uncounted


def _known_costs(module: nn.Module, calls: list[Observed] | None) -> list[Costs] | None:
    if calls is None or not isinstance(module, SHARING):
        return None
    try:
        return [costs_of(module, call) for call in calls]
    except TyingError:
        return None


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


def _layer(
    modules: Mapping[str, nn.Module], calls: Mapping[str, list[Observed]], known: Mapping[str, list[Costs]]
) -> Layer:
    called = [(module, call) for name, module in modules.items() for call in calls[name]]
    each = [costs for name in modules for costs in known[name]]
    total = sum(each[1:], each[0])
    stored = {id(p): p for module in modules.values() for p in module.parameters()}.values()
    numbers, size = sum(p.numel() for p in stored), sum(p.numel() * p.element_size() for p in stored)
    shared = Cost(numbers, total.shared.multiply_adds, total.shared.operations, size)
    first, *also = modules
    module, call = called[0]
    return Layer(
        name=first,
        kind=kind_of(module),
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
    said = [f"{crossed(places)} positions"] if math.prod(places) > 1 else []
    tied = _tied(module)
    if tied is not None and tied.classes < tied.read:
        said.append(f"{tied.read} inputs by {tied.classes} values")
    elif any(map(is_expansion, cast("Any", module).parametrizations.values() if is_parametrized(module) else ())):
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
    """Return the costs of one call of a layer in closed form; those of the shared one without ties inside.

    Raises:
        TyingError: If the layer has a forward of its own that is more than the product of its geometry.
    """
    plain = is_plain(module, SHARING)
    windows = windows_of(module, call, plain=plain) if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) else None
    there = call.inputs[1:] if isinstance(module, TRANSPOSED) else call.outputs[1:]
    connections = None if plain or isinstance(module, nn.Embedding) else count_connections(module, call.inputs)
    odd = isinstance(module, nn.Embedding) and call.outputs != (*call.inputs, module.embedding_dim)
    unknown = connections is None and not isinstance(module, nn.Embedding) and not plain
    if odd or unknown or (windows is not None and windows.output_size != there):
        raise TyingError(
            f"{type(module).__name__}: expected what its attributes tell, got a forward of its own for inputs of shape "
            f"{call.inputs}; its costs are not known"
        )
    found = _in_closed_form(module, call, windows)
    return found if connections is None else replace(found, connections=connections)


def _in_closed_form(module: nn.Module, call: Observed, windows: Windows | None) -> Costs:
    m = cast(Any, module)
    bias: bool = getattr(m, "bias", None) is not None
    width: int = m.weight.element_size()
    if isinstance(module, nn.Embedding):
        return costs.embedding(math.prod(call.inputs), m.num_embeddings, m.embedding_dim, width=width)
    if windows is None:
        count = math.prod(call.inputs[:-1])
        return costs.linear(count, m.in_features, m.out_features, bias=bias, width=width, tied=_tied(module))
    groups = int(getattr(m, "groups", 1))
    if isinstance(module, TRANSPOSED):
        return costs.transposed(windows, m.in_channels, m.out_channels, groups=groups, bias=bias, width=width)
    tied = _tied(module)
    return costs.convolution(windows, m.in_channels, m.out_channels, groups=groups, bias=bias, width=width, tied=tied)


def windows_of(module: nn.Module, call: Observed, *, plain: bool = True) -> Windows:
    """Return the windows of a convolution on what it is called on; of a transposed one, those that it transposes.

    Of a convolution with a forward of its own, which may pad as it likes, the shapes say how much it pads.

    Raises:
        PlanError: If the kernel does not fit into the input.
    """
    m = cast(Any, module)
    size = call.outputs[1:] if isinstance(module, TRANSPOSED) else call.inputs[1:]
    dimensions = len(m.kernel_size)
    if plain:
        mode = getattr(m, "padding_mode", "zeros")
        return Windows.of(size, m.kernel_size, m.stride, m.padding, m.dilation, mode, dimensions=dimensions)
    geometry = zip(size, call.outputs[1:], m.kernel_size, m.stride, m.dilation, strict=True)
    totals = [max((o - 1) * s + d * (k - 1) + 1 - n, 0) for n, o, k, s, d in geometry]
    pads = tuple((total // 2, total - total // 2) for total in totals)
    return Windows(tuple(size), tuple(m.kernel_size), tuple(m.stride), tuple(m.dilation), pads)


def _tied(module: nn.Module) -> TiedInputs | None:
    if not isinstance(module, TiedLinear | TiedConv1d | TiedConv2d | TiedConv3d):
        return None
    return TiedInputs(int((module.labels >= 0).sum()), module.classes)
