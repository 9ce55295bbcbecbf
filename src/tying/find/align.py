"""Which unit of one model faces which of another: assignments on weights, or on activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]
from torch.utils.hooks import RemovableHandle

from tying.errors import PlanError
from tying.find.permute import TOLERANCE, Order, Reference, Side, Space, run
from tying.outputs import difference

Array: TypeAlias = NDArray[np.float64]

BATCH = 64
"""How many samples of the example inputs are looked at together, where the models take them apart."""

LEAST = 1e-9
"""The gain, relative to the size of what is compared, below which units stay where they are."""


def by_weights(
    spaces: Sequence[Space], tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> list[Order | None]:
    """Permute the units of every space so that the tensors come near to their targets.

    Maximised is Σ ⟨target, permuted tensor⟩ over all tensors with a target, in float64, which is to say that
    Σ ‖target − permuted tensor‖² is least. With the other spaces held, a space is a linear assignment. A first sweep
    settles one space after the other, each by those numbers whose other axes are settled already (the inputs of the
    model are), most of them first; then spaces are improved in turn until none can be. The same is done from where the
    units stand, and the better of the two is kept: the sum is never less than before. Deterministic.

    Args:
        spaces: What may be permuted.
        tensors: By name.
        targets: By name, of the same shapes; tensors without a target count for nothing.

    Returns:
        One order per space; None where none of its tensors has a target.

    Source: Ainsworth, Hayase, Srinivasa, *Git Re-Basin*, ICLR 2023 (arXiv 2209.04836), section 3.2; the first sweep is
    not in it.
    """
    wanted = {name: _numbers(target) for name, target in targets.items()}
    start = {name: _numbers(tensors[name]) for name in wanted}
    compared = [any(side.name in wanted for side in space.sides) for space in spaces]
    within = [space for space, counts in zip(spaces, compared, strict=True) if counts]
    search = _Search(within, wanted)
    found = max((search.from_settled(start), search.from_here(start)), key=lambda each: each[0])[1]
    orders = iter(found)
    return [next(orders) if counts else None for counts in compared]


def by_activations(
    spaces: Sequence[Space], model: Reference, other: Reference, names: Mapping[str, str]
) -> list[Order | None]:
    """Permute the units of every space so that their activations on the given inputs correlate most with the other's.

    Maximised is Σ_k corr(unit k of the other model, unit order[k] of this one), over the outputs of the modules that
    make the units (before the nonlinearity), summed over these modules; samples and positions are the observations. A
    unit that is constant correlates with none. Spaces do not depend on each other. Float64, deterministic.

    Args:
        spaces: Of the model.
        model: Whose units are permuted.
        other: The one they shall face.
        names: The model's tensors → the other's, where they are paired.

    Returns:
        One order per space; None where no module's output shows the units in both models.

    Raises:
        PlanError: Names the model and the tensor whose layer gives NaN or infinity.

    Source: Li, Yosinski, Clune, Lipson, Hopcroft, *Convergent Learning*, 2015 (arXiv 1511.07543).
    """
    sides = {side.name: side for space in spaces for side in space.makers if side.name in names}
    found = {name: _Correlations(side) for name, side in sides.items()}
    for one, another in _batches(model, other):
        mine = _activations(model, {name: name for name in sides}, sides, one)
        theirs = _activations(other, {name: names[name] for name in sides}, sides, another)
        for name in sides:
            if name in mine and name in theirs and mine[name].shape == theirs[name].shape:
                found[name].add(theirs[name], mine[name])
    return [_most_correlated(space, found) for space in spaces]


class _Search:
    """Assignments of all spaces at once, towards targets; what is searched is held as permuted copies."""

    def __init__(self, spaces: Sequence[Space], targets: Mapping[str, Array]) -> None:
        self.spaces = spaces
        self.targets = targets
        self.sides = [[side for side in space.sides if side.name in targets] for space in spaces]

    def from_here(self, start: Mapping[str, Array]) -> tuple[float, list[Order]]:
        """Improve the spaces in turn."""
        return self._improve(dict(start), [np.arange(space.units) for space in self.spaces], range(len(self.spaces)))

    def from_settled(self, start: Mapping[str, Array]) -> tuple[float, list[Order]]:
        """Settle the spaces one after the other by what is settled, then improve them in turn."""
        settled = {name: [np.ones(length, dtype=bool) for length in t.shape] for name, t in self.targets.items()}
        for side in (side for sides in self.sides for side in sides):
            settled[side.name][side.axis][side.indices] = False
        current, orders = dict(start), [np.arange(space.units) for space in self.spaces]
        waiting, sequence = list(range(len(self.spaces))), list[int]()
        while waiting:
            at = max(waiting, key=lambda i: (*self._known(i, settled), -i))
            if any(self._known(at, settled)):
                orders[at] = _assign(self._scores(at, current, settled))
                self._move(at, orders[at], current)
            for side in self.sides[at]:
                settled[side.name][side.axis][side.indices] = True
            waiting.remove(at)
            sequence.append(at)
        return self._improve(current, orders, sequence)

    def _improve(
        self, current: dict[str, Array], orders: list[Order], sequence: Sequence[int]
    ) -> tuple[float, list[Order]]:
        moved = True
        while moved:
            moved = False
            for at in sequence:
                scores = self._scores(at, current)
                order = _assign(scores)
                gain = float(scores[np.arange(len(order)), order].sum() - scores.trace())
                if gain <= LEAST * self._size(at, current):
                    continue
                trial = dict(current)
                self._move(at, order, trial)
                if self._twice(at) and self._agreement(at, trial) - self._agreement(at, current) <= LEAST * self._size(
                    at, current
                ):
                    continue  # both axes of one tensor: the assignment is no more than a first-order guess
                current.update(trial)
                orders[at], moved = orders[at][order], True
        return sum(float(np.vdot(target, current[name])) for name, target in self.targets.items()), orders

    def _scores(
        self, at: int, current: Mapping[str, Array], settled: Mapping[str, Sequence[NDArray[np.bool_]]] | None = None
    ) -> Array:
        """⟨target's unit, current unit⟩, `(units, units)`; over what is settled only, if given."""
        scores = np.zeros((self.spaces[at].units,) * 2)
        for side in self.sides[at]:
            known = None if settled is None else settled[side.name]
            wanted, present = (_units(t[side.name], side, known) for t in (self.targets, current))
            scores += wanted @ present.T
        return scores

    def _known(self, at: int, settled: Mapping[str, Sequence[NDArray[np.bool_]]]) -> tuple[int, int]:
        """How many settled numbers each unit has, in matrices and in vectors."""
        counts = [0, 0]
        for side in self.sides[at]:
            others = [known.sum() for axis, known in enumerate(settled[side.name]) if axis != side.axis]
            counts[not others] += side.indices.shape[1] * int(np.prod(others, dtype=np.int64))
        return counts[0], counts[1]

    def _move(self, at: int, order: Order, current: dict[str, Array]) -> None:
        for side in self.sides[at]:
            line = np.arange(current[side.name].shape[side.axis])
            line[side.indices] = side.indices[order]
            current[side.name] = np.take(current[side.name], line, side.axis)

    def _twice(self, at: int) -> bool:
        names = [side.name for side in self.sides[at]]
        return len(set(names)) < len(names)

    def _agreement(self, at: int, current: Mapping[str, Array]) -> float:
        names = {side.name: None for side in self.sides[at]}
        return sum(float(np.vdot(self.targets[name], current[name])) for name in names)

    def _size(self, at: int, current: Mapping[str, Array]) -> float:
        """What the inner products could be at most: ‖targets‖·‖tensors‖ of the space."""
        pairs = [(self.targets[side.name], current[side.name]) for side in self.sides[at]]
        return sum(float(np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs)


def _numbers(tensor: Tensor) -> Array:
    """Return a tensor in float64; complex numbers as two real ones along a last axis."""
    real = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
    return real.double().cpu().numpy()


def _units(tensor: Array, side: Side, known: Sequence[NDArray[np.bool_]] | None) -> Array:
    """Return what each unit has of the tensor, `(units, numbers)`, only where the other axes are known."""
    for axis, mask in enumerate(known or ()):
        if axis != side.axis and not mask.all():
            tensor = np.compress(mask, tensor, axis)
    return np.moveaxis(tensor, side.axis, 0)[side.indices].reshape(len(side.indices), -1)


def _assign(scores: Array) -> Order:
    """Return, for each place k, the unit u that it gets, so that the sum of scores[k, u] is largest."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(scores, maximize=True)[1].astype(np.int64)


class _Correlations:
    """Of a layer's units in two models, gathered batch by batch, about the means of the first batch."""

    def __init__(self, side: Side) -> None:
        self.indices, self.count = side.indices, 0

    def add(self, theirs: Array, mine: Array) -> None:
        """Take in observations of both, `(observations, units)` each."""
        both = np.stack([theirs, mine])
        if not self.count:
            self.origin = both.mean(1)
            self.sums, self.squares = np.zeros_like(self.origin), np.zeros_like(self.origin)
            self.products = np.zeros((self.indices.shape[1], len(self.indices), len(self.indices)))
        both -= self.origin[:, None]
        self.count += both.shape[1]
        self.sums += both.sum(1)
        self.squares += np.square(both).sum(1)
        self.products += [both[0][:, line].T @ both[1][:, line] for line in self.indices.T]

    def scores(self) -> Array:
        """Return the correlations, `(units, units)`, summed over the corresponding positions of a unit that is several.

        Zero where a unit is constant.
        """
        means = self.sums / self.count
        lengths = np.sqrt(np.maximum(self.squares - self.count * means**2, 0))
        whole = self.squares + 2 * self.origin * self.sums + self.count * self.origin**2
        alive = lengths > 1e-12 * np.sqrt(np.maximum(whole, 0))
        inverse = np.where(alive, 1 / np.where(alive, lengths, 1), 0)
        total = np.zeros(self.products.shape[1:])
        for line, products in zip(self.indices.T, self.products, strict=True):
            centred = products - self.count * np.outer(means[0][line], means[1][line])
            total += inverse[0][line][:, None] * centred * inverse[1][line]
        return total


def _most_correlated(space: Space, found: Mapping[str, _Correlations]) -> Order | None:
    makers = {side.name.rpartition(".")[0]: side.name for side in reversed(space.makers) if side.name in found}
    seen = [found[name].scores() for name in makers.values() if found[name].count]  # once per module
    return _assign(sum(seen, np.zeros((space.units,) * 2))) if seen else None


def _batches(model: Reference, other: Reference) -> list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Return the example inputs of both models in batches of samples; whole where a model mixes the samples."""
    lengths = {len(x) if x.dim() else 0 for each in (model, other) for x in each.given}
    if len(lengths) > 1 or not max(lengths, default=0) > BATCH or not (_is_batched(model) and _is_batched(other)):
        return [(model.given, other.given)]
    mine, theirs = (zip(*(x.split(BATCH) for x in each.given), strict=True) for each in (model, other))
    return list(zip(mine, theirs, strict=True))


def _is_batched(model: Reference) -> bool:
    """Whether the first samples alone give the first outputs."""
    first = tuple(x[:BATCH] for x in model.given)
    whole = run(model.model, model.given)
    return all(x.dim() and len(x) == len(model.given[0]) for x in whole) and (
        difference([x[:BATCH] for x in whole], run(model.model, first)) <= TOLERANCE
    )


def _activations(
    model: Reference, names: Mapping[str, str], sides: Mapping[str, Side], inputs: tuple[Tensor, ...]
) -> dict[str, Array]:
    """Return, by the keys, the outputs of the layers that own these tensors: `(observations, units)`."""
    caught: dict[str, list[Tensor]] = {key: [] for key in names}
    handles: list[RemovableHandle] = []
    for key, name in names.items():
        module = model.model.get_submodule(name.rpartition(".")[0])
        units, axis = model.tensors[name].shape[sides[key].axis], _axis(module)

        def catch(
            _: nn.Module, __: object, output: object, key: str = key, units: int = units, axis: int = axis
        ) -> None:
            if not isinstance(output, Tensor) or output.is_complex() or output.dim() < max(2, -axis):
                return
            if output.shape[axis] == units:
                caught[key].append(output.movedim(axis, -1).reshape(-1, units))

        if next(module.children(), None) is None:
            handles.append(module.register_forward_hook(catch))
    try:
        run(model.model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    observed = {key: torch.cat(parts).double().cpu() for key, parts in caught.items() if parts}
    for key, values in observed.items():
        if not bool(values.isfinite().all()):
            raise PlanError(
                f"{model.name}.{names[key]}: expected finite activations to align by, got NaN or infinity; "
                "take other example inputs, or align by weights"
            )
    return {key: values.numpy() for key, values in observed.items()}


def _axis(module: nn.Module) -> int:
    """Return along which dimension of what a layer gives its units lie, with or without a batch."""
    if isinstance(module, _ConvNd):
        return 1 - module.weight.dim()
    return 1 if isinstance(module, (_NormBase, nn.GroupNorm, nn.PReLU)) else -1
