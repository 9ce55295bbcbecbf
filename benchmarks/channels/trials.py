"""What can go from any network, found without asking the package: every output of every layer is disturbed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.channels.oracle import SAME, unlike

MAKERS = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Outputs:
    """The outputs of one layer that a network could do without."""

    axis: int
    """Of the weight, along which they lie."""
    count: int
    unread: frozenset[int]
    """Whatever is made of them, the outputs of the network do not feel it."""
    constant: frozenset[int]
    """The same number for every input and position: zero, or a bias. A later layer may be able to take it over, or not
    (at the border of what is padded, say)."""

    @property
    def idle(self) -> bool:
        """Whether there are no others: the layer would have nothing left."""
        return len(self.unread | self.constant) == self.count


def outputs_of(model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Outputs]:
    """Try every output of every layer that has a weight, on every input; weights that layers share count once.

    Returns:
        By name of the weight. Transposed convolutions in groups, recurrences and tables are not tried.
    """
    constant = _constants(model, inputs)
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    seen: set[int] = set()
    found: dict[str, Outputs] = {}
    for path, layer in model.named_modules():
        if (axis := output_axis(layer)) is None:
            continue
        weight: Any = layer.weight
        if id(weight) in seen:
            continue
        seen.add(id(weight))
        unread = {i for i in range(weight.shape[axis]) if _is_unread(model, layer, axis, i, inputs, expected)}
        found[f"{path}.weight"] = Outputs(
            axis, weight.shape[axis], frozenset(unread), frozenset(constant.get(path, ()))
        )
    return found


def output_axis(layer: nn.Module) -> int | None:
    """Return the axis of the weight along which the outputs lie, or None for what is no layer of that kind."""
    if not isinstance(layer, MAKERS):
        return None
    if not getattr(layer, "transposed", False):
        return 0
    return 1 if layer.groups == 1 else None


def _is_unread(
    model: nn.Module, layer: nn.Module, axis: int, index: int, inputs: Sequence[Tensor], expected: Sequence[Tensor]
) -> bool:
    """Whether two very different versions of one output give what the network gave."""
    tensors: list[Tensor] = [layer.weight.detach().select(axis, index)]
    if layer.bias is not None:
        tensors.append(layer.bias.detach()[index])
    before = [tensor.clone() for tensor in tensors]
    generator = torch.Generator().manual_seed(index)
    try:
        for size in (1.0, -3.0):
            for tensor in tensors:
                tensor.copy_(size * (0.5 + torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)))
            with torch.no_grad():
                if any(unlike(e, model(x)) > SAME for e, x in zip(expected, inputs, strict=True)):
                    return False
    finally:
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
    return True


def _constants(model: nn.Module, inputs: Sequence[Tensor]) -> Mapping[str, set[int]]:
    """By layer: the outputs that were one number throughout, in every call."""
    low: dict[str, Tensor] = {}
    high: dict[str, Tensor] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(layer: nn.Module, _: object, output: Tensor) -> None:
            flat = output.detach().movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
            low[path] = torch.minimum(flat.amin(1), low.get(path, flat.amin(1)))
            high[path] = torch.maximum(flat.amax(1), high.get(path, flat.amax(1)))

        return hook

    with contextlib.ExitStack() as stack, torch.no_grad():
        for path, layer in model.named_modules():
            if output_axis(layer) is not None:
                stack.callback(layer.register_forward_hook(note(path)).remove)
        for x in inputs:
            model(x)
    return {path: set(((high[path] - low[path]) <= 1e-12).nonzero().flatten().tolist()) for path in low}
