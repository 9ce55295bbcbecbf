"""Units that can change places without changing what a model computes: found, proven, and moved."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tying.channels.find import Channel, Channels, Slice
from tying.errors import PlanError
from tying.outputs import difference, random_like, same_random_numbers, tensors_in

Order: TypeAlias = NDArray[np.int64]
"""A permutation of units, `(units,)`: position k holds, afterwards, the unit that was at `order[k]`."""

TOLERANCE = 1e-9
"""The largest relative difference of outputs that counts as the same function in float64."""

DRAWS = 8
"""How many times other weights are drawn, at most, until every unit has made a difference to the outputs."""

UNFELT = "the outputs do not depend on all of them for the inputs that were tried"


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
        if channel.makers and not channel.output:
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
            PlanError: Names the model, if it can't be copied, does not run in float64 or gives NaN or infinity.
        """
        self.name = name
        self.given = tuple(x.double() if x.is_floating_point() else x for x in inputs)
        try:
            self.model = copy.deepcopy(model).double()
            for module in self.model.modules():
                module.training = False
            for parameter in self.model.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
            self.tensors = tensors_of(self.model)
            outputs = run(self.model, self.given)
        except Exception as error:
            raise PlanError(
                f"{name}: expected a model that can be copied and runs on the example inputs in float64, got "
                f"{type(error).__name__}: {error}; without that no permutation can be proven, so leave out align=True"
            ) from error
        if not _is_sound(outputs):
            raise PlanError(
                f"{name}: expected finite outputs on the example inputs, got NaN or infinity, which nothing can be "
                "compared with; mend the model, or take other example inputs"
            )
        self.samples = [self.given, *map(tuple, _samples(self.given))]
        self.runs = self._run_all()

    def change(self, moves: Sequence[tuple[Space, Order]]) -> float:
        """Return by how much the outputs differ, as `tying.outputs.difference` tells, once the units are moved."""
        names = {side.name: (side.name, *side.aliases) for space, _ in moves for side in space.sides}
        before = {name: self.tensors[name].detach().clone() for name in names}
        try:
            self._write(permuted(self.tensors, moves), names)
            return max((difference(outputs, run(self.model, inputs)) for inputs, outputs in self.runs), default=0.0)
        finally:
            self._write(before, names)

    def reasons(self, spaces: Sequence[Space]) -> list[str | None]:
        """Return why the units of each space stay; None where they may change places.

        They may where they can be removed exactly, which the graph proves; or where trials show that a shift of all and
        a swap of two, which generate all permutations, change nothing: with the model's weights and with others, on
        the given and on random inputs, and only if every unit makes a difference to the outputs there.
        """
        asked = [space for space in spaces if space.blocked and not space.lost]
        untold = self._untold() if asked else None
        if untold:
            return [untold if space.blocked else None for space in spaces]
        kept = self._movable(asked)
        acts = {side.name: np.zeros(self.tensors[side.name].shape, np.bool_) for s in kept for side in s.sides}
        for draw in range(DRAWS):
            if all(_all_act(space, acts) for space in kept):
                break
            with self._other_weights(draw):
                kept = self._movable(kept)
                self._note_acting(acts)
        proven = {id(space): None if _all_act(space, acts) else UNFELT for space in kept}
        return [proven.get(id(space), space.blocked) for space in spaces]

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

    def _untold(self) -> str | None:
        """Return why no trial can show anything, if so."""
        integers = [x for x in self.given if not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)]
        for x in integers:
            if not x.numel() or bool(x.min() == x.max()):
                return "an integer input is one number throughout, so nothing can be tried: take differing examples"
        return None if len(self.runs) > 1 else "no random inputs give finite outputs, so nothing can be tried"

    def _movable(self, spaces: Sequence[Space]) -> list[Space]:
        """Return the spaces whose trials change nothing: tried together, and one by one where that fails."""
        if all(self._kept([(space, trial(space.units)) for space in spaces]) for trial in (_shift, _swap)):
            return list(spaces)
        return [s for s in spaces if all(self._kept([(s, trial(s.units))]) for trial in (_shift, _swap))]

    def _kept(self, moves: Sequence[tuple[Space, Order]]) -> bool:
        return self.change(moves) <= TOLERANCE

    def _run_all(self) -> list[tuple[tuple[Tensor, ...], list[Tensor]]]:
        """Return inputs and outputs, where these are finite."""
        found: list[tuple[tuple[Tensor, ...], list[Tensor]]] = []
        for inputs in self.samples:
            try:
                outputs = run(self.model, inputs)
            except Exception:  # random inputs that the model does not take: it does take the given ones
                continue
            if _is_sound(outputs):
                found.append((inputs, outputs))
        return found

    @contextmanager
    def _other_weights(self, draw: int) -> Generator[None, None, None]:
        """Add noise of about its size to every parameter: what is zero by chance, or dead, is not then."""
        parameters = [p for p in self.model.parameters() if p.is_floating_point() and p.numel()]
        before, runs = [p.detach().clone() for p in parameters], self.runs
        generator = torch.Generator().manual_seed(draw)
        try:
            with torch.no_grad():
                for p in parameters:
                    noise = torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
                    p += noise * (float(p.square().mean().sqrt()) * min(2**draw / 2, 2) or 0.1)
            self.runs = self._run_all()
            yield
        finally:
            self.runs = runs
            with torch.no_grad():
                for p, value in zip(parameters, before, strict=True):
                    p.copy_(value)

    def _note_acting(self, acts: Mapping[str, NDArray[np.bool_]]) -> None:
        """Note which numbers make a difference to the outputs: those whose gradient is not zero."""
        names = [name for name in acts if self.tensors[name].requires_grad]
        tensors = [self.tensors[name] for name in names]
        for inputs, _ in self.runs:
            for name, found in zip(names, self._acting(tensors, inputs), strict=True):
                acts[name][...] |= found

    def _acting(self, tensors: Sequence[Tensor], inputs: tuple[Tensor, ...]) -> list[NDArray[np.bool_]]:
        """Return where the gradients of the outputs, summed with random weights, are not zero."""
        generator = torch.Generator().manual_seed(0)
        with torch.enable_grad(), same_random_numbers(self.model):
            outputs = [x for x in _numbers(tensors_in(self.model(*inputs))) if x.requires_grad]
            weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]
            terms = [(weight * x)[x.isfinite()].sum() for weight, x in zip(weights, outputs, strict=True)]
            none = [None] * len(tensors)
            found = torch.autograd.grad(terms, tensors, allow_unused=True) if terms and tensors else none
        sizes = [
            torch.zeros_like(t) if g is None else g.abs().nan_to_num() for t, g in zip(tensors, found, strict=True)
        ]
        least = 1e-12 * max((float(size.max()) for size in sizes if size.numel()), default=0.0)
        return [(size > least).cpu().numpy() for size in sizes]

    def _write(self, values: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                for alias in names[name]:
                    self.tensors[alias].copy_(value)


def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the outputs as a flat list, without gradients; random numbers are the same at every call."""
    with torch.no_grad(), same_random_numbers(model):
        return [output.detach().clone() for output in tensors_in(model(*inputs))]


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


def _samples(given: tuple[Tensor, ...]) -> list[list[Tensor]]:
    """Return random inputs of several sizes: of size 1, 100 and that of the largest number given."""
    largest = max((float(x.abs().max()) for x in given if x.is_floating_point() and x.numel()), default=0.0)
    return [random_like(given, scale=scale, seed=i) for i, scale in enumerate((1.0, 100.0, largest or 0.01))]


def _is_sound(outputs: Sequence[Tensor]) -> bool:
    """Tell whether outputs can be compared: finite, but for −∞ where some are masked."""
    return all(bool((x.isfinite() | x.isneginf()).all()) and bool(x.isfinite().any()) for x in _numbers(outputs))


def _numbers(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(x) if x.is_complex() else x for x in outputs if x.numel()]


def _all_act(space: Space, acts: Mapping[str, NDArray[np.bool_]]) -> bool:
    """Tell whether each unit has some number that acts."""
    found = np.zeros(space.units, dtype=np.bool_)
    for side in space.sides:
        others = tuple(axis for axis in range(acts[side.name].ndim) if axis != side.axis)
        lines: NDArray[np.bool_] = np.asarray(acts[side.name].any(axis=others), dtype=np.bool_)
        found |= lines[side.indices].any(1)
    return bool(found.all())
