"""The plan: which weights are equal. Everything else is where it comes from and how strongly it is enforced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from tying.errors import FileError, PlanError
from tying.files.atomic import write_atomically
from tying.files.packing import bits_for
from tying.files.sealed import seal, unseal
from tying.groups import Groups

KIND, VERSION = "tying.plan", 1


class Partition:
    """One integer label per group: the same label is the same value, −1 is zero.

    Labels are renamed to 0 … K−1 in order of first appearance, so that two partitions that say the same are equal.

    Example:
        >>> Partition([7, -1, 7, 3])
        Partition([0, -1, 0, 1])
        >>> import torch
        >>> Partition([7, -1, 7, 3]).project(torch.tensor([[1.0], [5.0], [3.0], [4.0]])).flatten()
        tensor([2., 0., 2., 4.])
    """

    __slots__ = ("classes", "labels", "sizes")

    labels: NDArray[np.int64]
    """`(G,)`, read-only."""
    sizes: NDArray[np.int64]
    """`(K,)`, the number of groups that share each label."""
    classes: int
    """K, the number of distinct labels, −1 left out."""

    def __init__(self, labels: ArrayLike) -> None:
        try:
            array = np.asarray(labels)
        except (ValueError, TypeError, RuntimeError) as error:  # lists of unequal length, tensors on a GPU
            raise PlanError(f"labels: expected one integer per group, got {error}; pass a flat list") from error
        if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            raise PlanError(
                f"labels: expected one integer per group, got an array of shape {array.shape} and dtype {array.dtype}; "
                "pass a flat list of integers"
            )
        if array.size and array.min() < -1:
            raise PlanError(
                f"labels: expected −1 (pruned) or a label ≥ 0, got {int(array.min())}; use −1 for pruned groups"
            )
        kept = array >= 0
        _, first, inverse = np.unique(array[kept], return_index=True, return_inverse=True)
        rank = np.empty(len(first), dtype=np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        self.labels = np.full(array.shape, -1, dtype=np.int64)
        self.labels[kept] = rank[inverse]
        self.labels.setflags(write=False)
        self.classes = len(first)
        self.sizes = np.bincount(self.labels[kept], minlength=self.classes)
        self.sizes.setflags(write=False)

    def __len__(self) -> int:
        return len(self.labels)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Partition) and np.array_equal(self.labels, other.labels)

    def __hash__(self) -> int:
        return hash(self.labels.tobytes())

    def __repr__(self) -> str:
        return f"Partition({self.labels.tolist()})"

    def __reduce__(self) -> tuple[type[Partition], tuple[NDArray[np.int64]]]:
        return Partition, (self.labels,)  # numpy's own copies can be written to

    @property
    def pruned(self) -> int:
        """The number of groups labelled −1."""
        return len(self) - int(self.sizes.sum())

    @property
    def label_bits(self) -> int:
        """The bits of the packed labels: ⌈log2 K⌉ each, with −1 as one more value where it occurs."""
        return len(self) * bits_for(self.classes + (self.pruned > 0))

    def reduce(self, matrix: Tensor) -> Tensor:
        """Sum the groups of each label: `(G, D)` → `(K, D)`. The transpose of `expand`."""
        kept, labels = self.indices(matrix.device)
        summed = matrix.new_zeros(self.classes, matrix.shape[1])
        return summed.index_add(0, labels, matrix.index_select(0, kept))

    def mean(self, matrix: Tensor) -> Tensor:
        """Average the groups of each label: `(G, D)` → `(K, D)`, summed in float64, in the matrix's dtype.

        Groups that are equal already keep their value bit for bit (float32 and shorter).
        """
        wide = torch.promote_types(matrix.dtype, torch.float64)
        sizes = torch.as_tensor(self.sizes.copy(), device=matrix.device)
        return (self.reduce(matrix.to(wide)) / sizes[:, None]).to(matrix.dtype)

    def expand(self, values: Tensor) -> Tensor:
        """Give every group the value of its label, pruned groups zero: `(K, D)` → `(G, D)`."""
        kept, labels = self.indices(values.device)
        full = values.new_zeros(len(self), values.shape[1])
        return full.index_copy(0, kept, values.index_select(0, labels))

    def project(self, matrix: Tensor) -> Tensor:
        """`P`: every group replaced by the mean of its label, pruned groups by zero; an orthogonal projector."""
        return self.expand(self.mean(matrix))

    def prune(self, matrix: Tensor) -> Tensor:
        """Set the pruned groups to zero and leave the others as they are: `(G, D)` → `(G, D)`."""
        stays = torch.as_tensor(self.labels >= 0, device=matrix.device)
        return matrix * stays[:, None]

    def indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the indices of the groups that are not pruned and the label of each, both int64."""
        kept = np.flatnonzero(self.labels >= 0)
        return torch.as_tensor(kept, device=device), torch.as_tensor(self.labels[kept], device=device)


def qualified(module: str, leaf: str) -> str:
    """Return the full name of a module's parameter: `fc1.weight`, or `weight` where the module is the model.

    Example:
        >>> qualified("fc1", "weight"), qualified("", "weight")
        ('fc1.weight', 'weight')
    """
    return f"{module}.{leaf}" if module else leaf


@dataclass(frozen=True)
class Member:
    """A parameter's name and how it is read as groups."""

    parameter: str
    groups: Groups

    def __post_init__(self) -> None:
        if not isinstance(self.parameter, str) or not isinstance(self.groups, Groups):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(
                f"Member: expected a parameter's name and its Groups, got {self.parameter!r} and {self.groups!r}; "
                'write for instance "fc1.weight" and Groups.inputs()'
            )

    def shape(self, parameters: Mapping[str, Tensor]) -> tuple[int, int]:
        """Return the `(G, D)` of the parameter read as groups.

        Raises:
            PlanError: Names the parameter, if there is none of that name or it has no such groups.
        """
        if self.parameter not in parameters:
            raise PlanError(
                f"{self.parameter}: expected a parameter of the model, got none of that name; "
                f"the model has {_some(parameters)}: make the plan for this model"
            )
        try:
            return self.groups.shape(parameters[self.parameter].shape)
        except PlanError as error:
            raise PlanError(f"{self.parameter}: {error}") from error

    def __str__(self) -> str:
        return f"{self.parameter}[{self.groups}]"


@dataclass(frozen=True)
class Tie:
    """Members whose groups have equal D, and one label per group, member after member.

    One member ties groups inside a layer; several tie layers or models. Members that differ in `Groups` make a
    transposed tie: `("encoder.weight", outputs)` with `("decoder.weight", inputs)`.

    Example:
        >>> tie = Tie.of("fc1.weight", Groups.inputs(), [0, 0, -1, 1])
        >>> print(tie)
        fc1.weight[inputs]: 4 groups → 2 values, 1 pruned
    """

    members: tuple[Member, ...]
    partition: Partition

    @staticmethod
    def of(parameter: str, groups: Groups, labels: ArrayLike) -> Tie:
        """Build a tie inside one parameter."""
        return Tie((Member(parameter, groups),), Partition(labels))

    def __post_init__(self) -> None:
        if not self.members:
            raise PlanError("Tie.members: expected at least one, got none; name the parameter to tie")
        if len(set(self.members)) != len(self.members):
            raise PlanError(f"Tie.members: expected distinct members, got {self._names()}; name each member once")

    def matrix(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the groups of all members, one below the other: `(G, D)`."""
        return torch.cat([member.groups.read(parameters[member.parameter]) for member in self.members])

    def split(self, matrix: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the `(G, D)` matrix as the members' parameters, by name, in their dtypes: the inverse of `matrix`."""
        parts = matrix.split([member.shape(parameters)[0] for member in self.members])
        like = [parameters[member.parameter] for member in self.members]
        return {
            m.parameter: m.groups.write(part, p.shape).to(p.dtype)
            for m, part, p in zip(self.members, parts, like, strict=True)
        }

    def check_fits(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise unless every member is there and the labels are as many as the groups.

        Raises:
            PlanError: Names the member, what was expected and what the model has.
        """
        shapes = [member.shape(parameters) for member in self.members]
        sizes = {size for _, size in shapes}
        if len(sizes) > 1:
            raise PlanError(
                f"{self._names()}: expected members whose groups have equal length, got (groups, length) {shapes}; "
                "choose the Groups of each member so that they compare"
            )
        total = sum(count for count, _ in shapes)
        if total != len(self.partition):
            raise PlanError(
                f"{self._names()}: expected {total} labels, one per group, got {len(self.partition)}; "
                "the plan was made for another model: make it anew"
            )

    def _names(self) -> str:
        return " ~ ".join(map(str, self.members))

    def __str__(self) -> str:
        p = self.partition
        return f"{self._names()}: {len(p)} groups → {p.classes} values, {p.pruned} pruned"


@dataclass(frozen=True)
class TiePlan:
    """A frozen tuple of ties with its provenance: printable, comparable, saved without pickle.

    Example:
        >>> plan = TiePlan([Tie.of("fc1.weight", Groups.inputs(), [0, 0, -1, 1])], {"made by": "hand"})
        >>> print(plan)
        TiePlan (made by: hand)
          fc1.weight[inputs]: 4 groups → 2 values, 1 pruned
    """

    ties: Sequence[Tie] = ()
    provenance: Mapping[str, str] = field(default_factory=dict[str, str], compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ties", tuple(self.ties))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))
        if not all(isinstance(text, str) for entry in self.provenance.items() for text in entry):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(f"provenance: expected text by name, got {dict(self.provenance)!r}; write it as strings")
        seen: set[Member] = set()
        for member in (member for tie in self.ties for member in tie.members):
            if member in seen:
                raise PlanError(f"{member}: expected one tie, got several; merge their labels into one tie")
            seen.add(member)

    def __iter__(self) -> Iterator[Tie]:
        return iter(self.ties)

    def __len__(self) -> int:
        return len(self.ties)

    def __hash__(self) -> int:
        return hash(self.ties)

    def __reduce__(self) -> tuple[type[TiePlan], tuple[Sequence[Tie], dict[str, str]]]:
        return TiePlan, (self.ties, dict(self.provenance))  # a mappingproxy can't be copied

    def __add__(self, other: TiePlan) -> TiePlan:
        return TiePlan((*self.ties, *other.ties), {**self.provenance, **other.provenance})

    def __str__(self) -> str:
        source = ", ".join(f"{key}: {value}" for key, value in self.provenance.items())
        return "\n".join([f"TiePlan ({source})" if source else "TiePlan", *(f"  {tie}" for tie in self.ties)])

    def check_fits(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise `PlanError` unless every tie fits the parameters, by name and shape."""
        for tie in self.ties:
            tie.check_fits(parameters)

    def project(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters that the plan touches, each group replaced by its label's mean or by zero.

        Args:
            parameters: By name, as `dict(model.named_parameters())`. Not written to.

        Returns:
            New tensors, same shapes and dtypes, only the names that occur in the plan. Ties over different
            `Groups` of one parameter are applied one after the other (inputs and outputs commute).

        Raises:
            PlanError: If the plan does not fit the parameters, or its ties overlap in any other way: one of them
                would undo the other.
        """
        self.check_fits(parameters)
        self._check_commutes()
        result: dict[str, Tensor] = {}
        for tie in self.ties:
            current = {**parameters, **result}
            result.update(tie.split(tie.partition.project(tie.matrix(current)), current))
        return result

    def _check_commutes(self) -> None:
        over: dict[str, list[Tie]] = {}
        for tie in self.ties:
            for member in tie.members:
                over.setdefault(member.parameter, []).append(tie)
        for name, ties in over.items():
            kinds = sorted(member.groups.kind for tie in ties for member in tie.members)
            if len(ties) > 1 and kinds != ["inputs", "outputs"]:
                raise PlanError(
                    f"{name}: expected one tie, or one over its inputs and one over its outputs, got "
                    f"{' and '.join(f'({tie})' for tie in ties)}; merge their labels into one tie"
                )

    def save(self, path: str | Path) -> None:
        """Write the plan as `.safetensors`: labels in the smallest integer type, names as metadata.

        The file appears whole or not at all.
        """
        tensors = {f"labels.{i}": _smallest(tie.partition.labels) for i, tie in enumerate(self.ties)}
        described = [[[m.parameter, m.groups.kind] for m in tie.members] for tie in self.ties]
        record = {"ties": described, "provenance": dict(self.provenance)}
        write_atomically(path, seal(tensors, record, kind=KIND, version=VERSION))

    @staticmethod
    def load(path: str | Path) -> TiePlan:
        """Read a plan that `save` wrote.

        Raises:
            FileError: If the file is not there, is truncated, is not a plan or was changed since.
        """
        tensors, record = unseal(path, kind=KIND, version=VERSION, writer="TiePlan.save")
        try:
            ties = [
                Tie(
                    tuple(Member(name, Groups(kind)) for name, kind in members),
                    Partition(tensors[f"labels.{i}"].numpy()),
                )
                for i, members in enumerate(record["ties"])
            ]
            return TiePlan(ties, record["provenance"])
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(
                f"{path}: expected a plan that TiePlan.save wrote, got {error!r}; save the plan again"
            ) from error


def _smallest(labels: NDArray[np.int64]) -> Tensor:
    highest = int(labels.max(initial=0))
    fitting = (dtype for dtype in (torch.int8, torch.int16, torch.int32) if highest <= torch.iinfo(dtype).max)
    return torch.tensor(labels, dtype=next(fitting, torch.int64))


def _some(names: Mapping[str, Tensor], most: int = 8) -> str:
    listed = list(names)[:most]
    return ", ".join(listed) + (", …" if len(names) > most else "")
