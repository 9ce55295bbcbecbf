"""Places: along which dimensions of a tensor they lie beside each other, and which layers are asked whom they see."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeAlias, cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from tying.explain.marks.marks import zeros
from tying.nn import LocallyConnected1d, LocallyConnected2d, TiedConv1d, TiedConv2d, TiedConv3d, TiedLinear

Axes: TypeAlias = "tuple[int, ...]"

_POOL = re.compile(r"(?:Adaptive)?(?:Max|Avg|LP)Pool([123])d")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, TiedConv1d, TiedConv2d, TiedConv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LOCAL = (LocallyConnected1d, LocallyConnected2d)
SPATIAL = (*CONVOLUTIONS, *TRANSPOSED, *LOCAL)


def kind_of(module: nn.Module) -> str:
    """Return the name of a module's class, as it was before its weights were computed by parametrizations."""
    return type_before_parametrizations(module).__name__


def called(name: str, kind: str, call: int) -> str:
    """Return what one call of a module is called; the model has no name, but a kind.

    Example:
        >>> called("conv", "Conv2d", 1), called("conv", "Conv2d", 3), called("", "Conv2d", 1)
        ('conv', 'conv (3rd call)', 'Conv2d')
    """
    ending = "th" if call % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(call % 10, "th")
    return (name or kind) + (f" ({call}{ending} call)" if call > 1 else "")


def is_pool(module: nn.Module) -> bool:
    """Whether a module puts windows of its input together without weights."""
    return _dimensions_of_pool(module) > 0


def _dimensions_of_pool(module: nn.Module) -> int:
    found = (_POOL.fullmatch(kind.__name__) for kind in type(module).__mro__)
    return next((int(match[1]) for match in found if match), 0)


def is_spatial(module: nn.Module) -> bool:
    """Whether a module works on the places of an image, a signal or a volume: convolutions, pools, resampling."""
    return isinstance(module, (*SPATIAL, nn.Upsample)) or is_pool(module)


def is_looked_at(module: nn.Module) -> bool:
    """Whether places of a module are asked whom they see: of all that connects different places."""
    return is_spatial(module) or isinstance(module, nn.Linear | TiedLinear | nn.Embedding | nn.MultiheadAttention)


def places(module: nn.Module, ndim: int, *, of_input: bool = False) -> Axes:
    """Return the dimensions of a module's output (or input) along which its places lie; over the others are channels.

    Of a sequence `(N, L, E)` the positions; of what has neither, `(N, E)`, every number is a place.

    Example:
        >>> places(nn.Conv2d(1, 1, 3), 4), places(nn.Linear(4, 4), 3), places(nn.Linear(4, 4), 2)
        ((2, 3), (1,), (1,))
    """
    if is_spatial(module):
        if isinstance(module, nn.Upsample):
            return tuple(range(2, ndim))
        count = _dimensions_of_pool(module) or len(cast("tuple[int, ...]", module.kernel_size))
        return tuple(range(ndim - count, ndim))
    if isinstance(module, nn.Embedding) and of_input:
        return tuple(range(1, ndim)) or (0,)
    return tuple(range(1, ndim - 1)) if ndim > 2 else (ndim - 1,)


def on_places(marks: Tensor, axes: Axes) -> Tensor:
    """Return which places have a marked element: bool, of the shape of the places."""
    others = [axis for axis in range(marks.ndim) if axis not in axes]
    return (marks.amax(others) if others else marks) > 0


def marks_at(shape: tuple[int, ...], axes: Axes, place: tuple[int, ...]) -> Tensor:
    """Return marks on all channels of one place."""
    marks = zeros(*shape)
    index: list[int | slice] = [slice(None)] * len(shape)
    for axis, at in zip(axes, place, strict=True):
        index[axis] = at
    marks[tuple(index)] = 1
    return marks


def middle(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the place in the middle."""
    return tuple(size // 2 for size in shape)


def box(seen: Tensor) -> tuple[tuple[int, int], ...]:
    """Return the smallest box around what is marked, (first, last + 1) along each dimension; empty: (0, 0).

    Example:
        >>> import torch
        >>> box(torch.tensor([[False, True, True], [False, False, True]]))
        ((0, 2), (1, 3))
    """
    if not bool(seen.any()):
        return ((0, 0),) * seen.ndim
    at = seen.nonzero()
    return tuple(zip(at.amin(0).tolist(), (at.amax(0) + 1).tolist(), strict=True))


def extent(box_: tuple[tuple[int, int], ...]) -> str:
    """Return how long a box is in each dimension, as words.

    Example:
        >>> extent(((0, 2), (1, 6)))
        '2×5'
    """
    return crossed(last - first for first, last in box_)


def shape_of(shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    """Return how many places there are along each of the dimensions."""
    return tuple(shape[axis] for axis in axes)


def crossed(sizes: Iterable[object]) -> str:
    """Return sizes as words: 3×4."""
    return "×".join(map(str, sizes))
