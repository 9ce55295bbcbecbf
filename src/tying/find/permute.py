"""Units that can change places without changing what a model computes: found, proven, and moved."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tying.channels.find import Channel, Channels, Slice
from tying.errors import PlanError

Order: TypeAlias = NDArray[np.int64]
"""A permutation of units, `(units,)`: position k holds, afterwards, the unit that was at `order[k]`."""

TOLERANCE = 1e-9
"""The largest difference of outputs, relative to the largest output, that counts as the same function in float64."""


@dataclass(frozen=True)
class Side:
    """Where the units of a space stand along one axis of a tensor: unit k at `indices[k]`."""

    name: str
    axis: int
    indices: NDArray[np.int64]
    """`(units, indices per unit)`: several where a unit is flattened into several inputs."""
    aliases: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}[axis {self.axis}]"


@dataclass(frozen=True)
class Space:
    """Units that stand side by side in the same tensors: candidates for changing places with each other."""

    makers: tuple[Side, ...]
    sides: tuple[Side, ...]
    """All that moves with the units: makers and readers."""
    blocked: str | None
    """Why a unit can't be *removed*, if so: whether it can move has to be tried."""
    lost: str | None
    """Why more may depend on the units than `sides`, if so."""

    @property
    def units(self) -> int:
        """How many units the space has."""
        return len(self.sides[0].indices)

    def __str__(self) -> str:
        return str((self.makers or self.sides)[0])


def spaces_of(channels: Channels) -> list[Space]:
    """Gather the channels that occupy the same axes of the same tensors, as many indices each.

    Spaces of one unit are left out, and so are the inputs of the model, which nothing makes, and its outputs.
    """
    found: dict[tuple[object, ...], list[Channel]] = {}
    for channel in channels:
        occupied = tuple((part.parameter, part.axis, len(part.indices)) for part in _sorted(channel.slices))
        if channel.makers and channel.blocked != "an output of the model":
            found.setdefault((occupied, channel.blocked is None), []).append(channel)
    return [_space(units) for units in found.values() if len(units) > 1]


def permuted(tensors: Mapping[str, Tensor], moves: Iterable[tuple[Space, Order]]) -> dict[str, Tensor]:
    """Return what those of the tensors that the moved spaces are made of become: new tensors, under first names."""
    lines: dict[tuple[str, int], NDArray[np.int64]] = {}
    for space, order in moves:
        for side in (side for side in space.sides if side.name in tensors):
            length = tensors[side.name].shape[side.axis]
            line = lines.setdefault((side.name, side.axis), np.arange(length))
            line[side.indices] = side.indices[order]
    result: dict[str, Tensor] = {}
    for (name, axis), line in lines.items():
        current = result.get(name, tensors[name].detach())
        result[name] = current.index_select(axis, torch.as_tensor(line, device=current.device))
    return result


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers under all their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


class Reference:
    """A model's float64 copy in evaluation mode, and what it computes on given and on random inputs."""

    def __init__(self, name: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Copy the model and run it.

        Raises:
            PlanError: Names the model, if it can't be copied or does not run in float64.
        """
        self.name = name
        given = tuple(x.double() if x.is_floating_point() else x for x in inputs)
        self.inputs = (given, _random_like(given))
        try:
            self.model = copy.deepcopy(model).double()
            for module in self.model.modules():
                module.training = False
            self.tensors = tensors_of(self.model)
            self.outputs = self._run()
        except Exception as error:
            raise PlanError(
                f"{name}: expected a model that can be copied and runs on the example inputs in float64, got "
                f"{type(error).__name__}: {error}; without that no permutation can be proven, so leave out align=True"
            ) from error

    def change(self, moves: Sequence[tuple[Space, Order]]) -> float:
        """Return by how much the outputs differ, relative to the largest, once the units are moved."""
        names = {side.name: (side.name, *side.aliases) for space, _ in moves for side in space.sides}
        before = {name: self.tensors[name].detach().clone() for name in names}
        try:
            self._write(permuted(self.tensors, moves), names)
            return _difference(self.outputs, self._run())
        finally:
            self._write(before, names)

    def movable(self, spaces: Sequence[Space]) -> list[bool]:
        """Tell in which spaces units may change places: any may where a shift of all and a swap of two change nothing.

        The two generate all permutations. Spaces whose units can be removed exactly are taken as they are, others are
        tried together, and one by one where that fails.
        """
        asked = [space for space in spaces if space.blocked and not space.lost]
        trials = ([(space, trial(space.units)) for space in asked] for trial in (_shift, _swap))
        if all(self._kept(trial) for trial in trials):
            proven = {id(space) for space in asked}
        else:
            proven = {id(s) for s in asked if all(self._kept([(s, trial(s.units))]) for trial in (_shift, _swap))}
        return [space.blocked is None or id(space) in proven for space in spaces]

    def check(self, moves: Sequence[tuple[Space, Order]]) -> None:
        """Raise unless the model computes the same once the units are moved.

        Raises:
            PlanError: Names the model and the first units that can't be moved.
        """
        change = self.change(moves)
        if change <= TOLERANCE:
            return
        alone = ((space, self.change([(space, order)])) for space, order in moves)
        blamed, change = next(((str(s), c) for s, c in alone if not c <= TOLERANCE), ("its units", change))
        raise PlanError(
            f"{self.name}: expected the outputs to stay to a relative difference of {TOLERANCE:g} when the units of "
            f"{blamed} change places, got {change:.3g}; positions written in its forward may be the cause: leave out "
            "align=True"
        )

    def _kept(self, moves: Sequence[tuple[Space, Order]]) -> bool:
        return self.change(moves) <= TOLERANCE

    def _run(self) -> list[list[Tensor]]:
        return [run(self.model, inputs) for inputs in self.inputs]

    def _write(self, values: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                for alias in names[name]:
                    self.tensors[alias].copy_(value)


def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the outputs as a flat list, without gradients; random numbers are the same at every call."""
    gpus = sorted({t.device.index for t in tensors_of(model).values() if t.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(devices=gpus):
        torch.manual_seed(0)
        return [output.detach().clone() for output in _flatten(model(*inputs))]


def write(changes: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write each new value into its tensor, in place: all of them or none."""
    before = [tensor.detach().clone() for tensor, _ in changes]
    with torch.no_grad():
        try:
            for tensor, value in changes:
                tensor.copy_(value)
        except Exception:
            for (tensor, _), value in zip(changes, before, strict=True):
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
            raise


def _space(units: Sequence[Channel]) -> Space:
    reasons = [(unit.blocked, unit.lost) for unit in units]
    return Space(
        _sides([unit.makers for unit in units]),
        _sides([unit.slices for unit in units]),
        next((blocked for blocked, _ in reasons if blocked), None),
        next((lost for _, lost in reasons if lost), None),
    )


def _sides(parts: Sequence[tuple[Slice, ...]]) -> tuple[Side, ...]:
    """Stack the slices of the units, which occupy the same axes; in the order of the first unit's."""
    ordered = [_sorted(each) for each in parts]
    stacked = [
        Side(column[0].parameter, column[0].axis, np.array([part.indices for part in column]), column[0].aliases)
        for column in zip(*ordered, strict=True)
    ]
    rank = {(part.parameter, part.axis): i for i, part in enumerate(parts[0])}
    return tuple(sorted(stacked, key=lambda side: rank[side.name, side.axis]))


def _sorted(parts: Iterable[Slice]) -> list[Slice]:
    return sorted(parts, key=lambda part: (part.parameter, part.axis))


def _shift(units: int) -> Order:
    return np.roll(np.arange(units), 1)


def _swap(units: int) -> Order:
    return np.array([1, 0, *range(2, units)])


def _random_like(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return random inputs, the same at every call: normal numbers; integers between the given ones' extremes."""
    generator = torch.Generator().manual_seed(0)

    def draw(x: Tensor) -> Tensor:
        if x.is_floating_point():
            return torch.randn(x.shape, generator=generator, dtype=torch.float64)
        low, high = (int(x.min()), int(x.max())) if x.numel() else (0, 0)
        return torch.randint(low, high + 1, x.shape, generator=generator)

    return tuple(draw(x).to(x.device, x.dtype) for x in inputs)


def _difference(expected: Sequence[Sequence[Tensor]], got: Sequence[Sequence[Tensor]]) -> float:
    """The largest difference between outputs, relative to the largest; NaN and infinite ones have to stay."""
    worst = 0.0
    for a, b in zip((x for each in expected for x in each), (x for each in got for x in each), strict=True):
        a, b = a.to(torch.float64), b.to(torch.float64)
        apart = ~((a == b) | (a.isnan() & b.isnan()))
        if bool(apart.any()):
            finite = a[a.isfinite()].abs()
            size = max(float(finite.max()) if finite.numel() else 0.0, 1e-300)
            worst = max(worst, float((a - b)[apart].abs().nan_to_num(nan=float("inf")).max()) / size)
    return worst


def _flatten(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _flatten(list(cast("Mapping[Any, Any]", output).values()))
    elif isinstance(output, (tuple, list)):
        for part in cast("Sequence[Any]", output):
            yield from _flatten(part)
