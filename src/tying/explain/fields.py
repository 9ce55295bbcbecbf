"""Receptive fields: from above, which inputs a place of the network sees; from below, which places an input reaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from tying.explain.marks.dependence import Dependence, Mark
from tying.explain.marks.marks import zeros
from tying.explain.planes import Axes, box, is_looked_at, kind_of, marks_at, middle, on_places, places, shape_of

Box = tuple[tuple[int, int], ...]
"""(first, last + 1) along each dimension."""


@dataclass(frozen=True)
class Field:
    """What the place in the middle of a layer sees, and what of the layer the input in the middle reaches.

    The units of a place, all its channels, are asked together: it sees what any of them sees.
    """

    name: str
    kind: str
    call: int
    """Which of the calls of the module, from 1 on."""
    shape: tuple[int, ...]
    """How many places the layer's output has, along each dimension."""
    place: tuple[int, ...]
    """The place that is asked."""
    sees: int
    """How many places of the input it depends on."""
    sees_box: Box
    """The smallest box around them."""
    reached: int
    """How many places of the layer depend on the place in the middle of the input."""
    reached_box: Box
    seen: NDArray[np.bool_] = field(repr=False, compare=False)
    """Which places of the input the place sees."""
    reaches: NDArray[np.bool_] = field(repr=False, compare=False)
    """Which places of the layer the input reaches."""


@dataclass(frozen=True)
class Fields:
    """The receptive fields of a network, layer by layer."""

    input_shape: tuple[int, ...]
    """How many places the input has, along each dimension."""
    input_place: tuple[int, ...]
    """The one that reaches."""
    layers: tuple[Field, ...]
    inexact: tuple[str, ...]
    """Operations without a rule, which were taken to mix all that they read: there, fields are upper bounds."""


def input_places(model: nn.Module, dependence: Dependence) -> Axes:
    """Return the dimensions of the input along which its places lie: as the layer says that reads it first.

    Where that layer works on another number of dimensions, every number of a sample is a place; of an image or a
    volume, all its channels together. Samples are no places, but where there is nothing else.
    """
    ndim = len(source_shape(dependence))
    for step in dependence.steps:
        for name, module in model.named_modules():
            if is_looked_at(module) and step.node in dependence.first_call(name):
                given = _single(dependence.varies[step.operands[0]])
                if given.ndim == ndim:
                    return places(module, ndim, of_input=True)
                return tuple(range(2 if ndim > 3 else 1, ndim)) or (0,)
    return tuple(range(2, ndim)) or (ndim - 1,)


def source_shape(dependence: Dependence) -> tuple[int, ...]:
    """Return the shape of the input, one sample in a batch."""
    return tuple(_single(dependence.varies[dependence.source]).shape)


def layers_of(model: nn.Module, dependence: Dependence) -> Mapping[tuple[str, int], tuple[nn.Module, fx.Node]]:
    """Return the calls of layers that are looked at, in order, by name and number; with the node of the output."""
    order = {step.node: place for place, step in enumerate(dependence.steps)}
    found: dict[tuple[str, int], tuple[nn.Module, fx.Node]] = {}
    for name, module in model.named_modules():
        for number, inside in enumerate(dependence.calls_of(name) if is_looked_at(module) else (), 1):
            made = [node for node in inside if isinstance(dependence.varies[node], Tensor)]
            if made:
                found[name, number] = (module, made[-1])
    return dict(sorted(found.items(), key=lambda item: order[item[1][1]]))


def find_fields(model: nn.Module, dependence: Dependence) -> Fields:
    """Return the receptive fields of all layers that connect places.

    Example:
        >>> from tying.explain.marks.dependence import find_dependence
        >>> model = nn.Sequential(nn.Conv1d(1, 1, 3), nn.Conv1d(1, 1, 3))
        >>> fields = find_fields(model, find_dependence(model, torch.zeros(1, 1, 9)))
        >>> [(field.sees, field.sees_box, field.reached) for field in fields.layers]
        [(3, ((3, 6),), 3), (5, ((2, 7),), 5)]
    """
    axes, shape = input_places(model, dependence), source_shape(dependence)
    place = middle(shape_of(shape, axes))
    reached = dependence.forward({dependence.source: marks_at(shape, axes, place)})
    found: list[Field] = []
    for (name, call), (module, node) in layers_of(model, dependence).items():
        made = _single(dependence.varies[node])
        own = places(module, made.ndim)
        asked = middle(shape_of(tuple(made.shape), own))
        back = dependence.backward({node: marks_at(tuple(made.shape), own, asked)})
        seen = on_places(_single(back.get(dependence.source, zeros(*shape))), axes)
        there = on_places(_single(reached.get(node, torch.zeros_like(made))), own)
        found.append(
            Field(
                name=name,
                kind=kind_of(module),
                call=call,
                shape=tuple(there.shape),
                place=asked,
                sees=int(seen.sum()),
                sees_box=box(seen),
                reached=int(there.sum()),
                reached_box=box(there),
                seen=seen.numpy(),
                reaches=there.numpy(),
            )
        )
    return Fields(shape_of(shape, axes), place, tuple(found), dependence.inexact)


def _single(mark: Mark) -> Tensor:
    return mark if isinstance(mark, Tensor) else mark[0]
