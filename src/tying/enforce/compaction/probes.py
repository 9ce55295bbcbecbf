"""Random inputs on which two networks should compute the same, of other batch and other sizes than the example's."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from tying.outputs import random_like

ENOUGH, TRIES = 2, 8
"""So many other sizes are compared, of so many near ones and far ones that are tried: what the model does not take says
nothing."""

Runs: TypeAlias = Callable[[tuple[Tensor, ...]], list[Tensor]]
Case: TypeAlias = tuple[tuple[Tensor, ...], list[Tensor]]
"""Inputs, and the outputs that are expected."""


def probes(runs: Runs, inputs: tuple[Tensor, ...]) -> Iterator[Case]:
    """Yield random inputs that the model takes, with its outputs: of another batch size first, then of other sizes.

    Sequences become twice as long and one longer (else one longer or one shorter), images a pixel larger (else a pixel
    smaller or half as large), all lengths that are equal at once (else one by one). Where the model takes none of
    these, lengths that 2, 4 or 8 divide, and twice as long ones. A padding that depends on whether a
    size is odd, a literal limit, a table of positions show there. On a GPU nothing grows: an index beyond a table
    would end the process.

    Args:
        runs: The model's outputs; raises where it does not take the inputs.
        inputs: As the model takes them; the first dimension of the first, and of those as long, is the batch.

    Raises:
        Exception: Whatever `runs` raises where it takes no random inputs like the given ones.
    """
    batch = len(inputs[0]) + 1 if inputs[0].dim() else None
    other = tuple(random_like(inputs, batch))
    expected = _tried(runs, other)
    if expected is None:  # the model takes one batch size only
        batch, other = None, tuple(random_like(inputs))
        expected = runs(other)
    yield other, expected
    found: list[Case] = []
    near = itertools.islice(_sized(inputs, found), TRIES)
    for sized in itertools.chain(near, itertools.islice(_divisible(inputs, found), TRIES)):
        other = tuple(random_like(sized, batch and 2))
        expected = _tried(runs, other)
        if expected is not None:
            found.append((other, expected))
            yield found[-1]
            if len(found) == ENOUGH:
                return


def _tried(runs: Runs, inputs: tuple[Tensor, ...]) -> list[Tensor] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return runs(inputs)
    except Exception:  # the model's own: it does not take such inputs
        return None


_Places: TypeAlias = tuple[tuple[int, int], ...]
"""Inputs and their dimensions, which are equally long."""


def _sized(inputs: Sequence[Tensor], found: Sequence[Case]) -> Iterator[tuple[Tensor, ...]]:
    """Yield inputs of other sizes, the likely ones first; no further kind of change once some are `found` to fit."""
    joint = _together(inputs)
    alone: list[_Places] = [(place,) for places in joint if len(places) > 1 for place in places]
    for chosen in (joint, alone):
        for turn in range(3):
            for places in chosen:
                old = inputs[places[0][0]].shape[places[0][1]]
                image = min(inputs[i].dim() for i, _ in places) > 3
                new = ((old + 1, old - 1, old // 2) if image else (2 * old + 1, old + 1, old - 1))[turn]
                yield from _long(inputs, places, new)
            if found:
                return


def _divisible(inputs: Sequence[Tensor], found: Sequence[Case]) -> Iterator[tuple[Tensor, ...]]:
    """Yield larger inputs, of lengths that 2, 4 or 8 divide, and twice as large ones; none if some are `found`."""
    for turn in range(4):
        for places in _together(inputs):
            old = inputs[places[0][0]].shape[places[0][1]]
            lengths = dict.fromkeys([*(old + n - old % n for n in (2, 4, 8)), 2 * old])
            for new in list(lengths)[turn : turn + 1]:
                if not found:
                    yield from _long(inputs, places, new)


def _together(inputs: Sequence[Tensor]) -> list[_Places]:
    """The dimensions of the inputs whose lengths may change, those that are equally long together."""
    together: dict[int, list[tuple[int, int]]] = {}
    for i, x in enumerate(inputs):
        for d in range(1 if inputs[0].dim() and x.dim() and len(x) == len(inputs[0]) else 0, x.dim()):
            if x.shape[d] > 1 or (i == 0 and x.dim() <= 3):  # what is 1 elsewhere may be there to be broadcast
                together.setdefault(x.shape[d], []).append((i, d))
    return [tuple(places) for places in together.values()]


def _long(inputs: Sequence[Tensor], places: _Places, new: int) -> Iterator[tuple[Tensor, ...]]:
    """The inputs, so long at these places; nothing if a GPU would have to grow, or nothing is left."""
    old = inputs[places[0][0]].shape[places[0][1]]
    if new > 1 and not (new > old and any(x.is_cuda for x in inputs)):
        yield tuple(_resized(x, [d for i, d in places if i == at], new) for at, x in enumerate(inputs))


def _resized(x: Tensor, dims: Sequence[int], length: int) -> Tensor:
    """The numbers of the tensor again and again, until the dimensions are so long."""
    for dim in dims:
        x = x.index_select(dim, torch.arange(length, device=x.device) % x.shape[dim])
    return x
