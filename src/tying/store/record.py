"""The record of a file that `save` writes: what its tensors are, and the networks they make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from tying.enforce.compaction.description import Description
from tying.enforce.compaction.surgery import TIED
from tying.errors import FileError
from tying.files.packing import Packed, pack, unpack
from tying.groups import Groups
from tying.plan import Member, Partition, Tie, TiePlan, qualified
from tying.store.state import EXTRA, State, View, dtype_name
from tying.store.unique import Step

_INTEGERS = {
    dtype_name(dtype): dtype for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
}


@dataclass
class Written:
    """The tensors of a file in the making."""

    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    packed: dict[str, list[Any]] = field(default_factory=dict[str, list[Any]])
    labels: list[str] = field(default_factory=list[str])
    """Names of tensors that are not the network's own: labels of ties that no buffer of the network holds."""
    _known: dict[Packed, str] = field(default_factory=dict[Packed, str])

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the network, packed if it holds integers and that makes it smaller."""
        dtype = dtype_name(tensor.dtype)
        if dtype in _INTEGERS and tensor.dim():
            packed = pack(tensor.detach().cpu().numpy())
            if len(packed.content) < tensor.numel() * tensor.element_size():
                self._put(name, packed, dtype, tuple(tensor.shape))
                return
        self.tensors[name] = tensor

    def tie(self, tie: Tie) -> list[Any]:
        """Describe a tie; its labels are written unless equal ones are there. After every `put`."""
        packed = pack(tie.partition.labels)
        if packed not in self._known:
            name = f"labels.{len(self.labels)}"
            while name in self.tensors:
                name += "_"
            self._put(name, packed, "int64", (packed.count,))
            self.labels.append(name)
        return [[[m.parameter, m.groups.kind] for m in tie.members], self._known[packed]]

    def plan(self, plan: TiePlan) -> dict[str, Any]:
        """Describe a plan."""
        ties = [self.tie(tie) for tie in plan]
        return {"ties": ties, "provenance": dict(plan.provenance)} if ties else {}

    def _put(self, name: str, packed: Packed, dtype: str, shape: tuple[int, ...]) -> None:
        self.tensors[name] = torch.from_numpy(np.frombuffer(packed.content, dtype=np.uint8).copy())
        self.packed[name] = [packed.low, packed.bits, dtype, shape]
        self._known.setdefault(packed, name)


class Understood:
    """A sum protects from damage, not from a record that was made up: what does not fit together is refused too."""

    def __init__(self, path: str | Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError)):
            raise FileError(
                f"{self.path}: expected a record that fits its tensors, got one that does not ({error!r}); "
                "save the model again"
            ) from error


def state_of(stored: Mapping[str, Tensor], record: Mapping[str, Any]) -> State:
    """Return the networks' state: labels unpacked, tied weights whole again."""
    labels = set(record.get("labels", ()))
    tensors = {name: _unpacked(name, stored, record) for name in stored if name not in labels}
    for step in reversed(steps_of(stored, record)):
        tensors.update(step.undo(tensors))
    views = {name: View(base, tuple(s), tuple(t), at) for name, (base, s, t, at) in record.get("views", {}).items()}
    for view in views.values():
        view.of(tensors[view.base])
    for name, strides in record.get("strides", {}).items():
        plain = tensors[name]
        tensors[name] = torch.empty_strided(plain.shape, strides, dtype=plain.dtype).copy_(plain)
    return State(
        tensors,
        record.get("aliases", {}),
        views,
        frozenset(record.get("frozen", ())),
        record.get("extra", {}),
        {name: (dtype, tuple(shape)) for name, (dtype, shape) in record.get("transient", {}).items()},
    )


def steps_of(stored: Mapping[str, Tensor], record: Mapping[str, Any]) -> list[Step]:
    """Return the ties that the file stores once, in the order in which they were."""
    steps: list[Step] = []
    for entry, shapes in record.get("steps", ()):
        entry = record["ties"][entry][0] if isinstance(entry, int) else entry
        steps.append(Step(tie_of(entry, stored, record), tuple(tuple(shape) for shape in shapes)))
    return steps


def _unpacked(name: str, stored: Mapping[str, Tensor], record: Mapping[str, Any]) -> Tensor:
    if name not in record.get("packed", {}):
        return stored[name]
    low, bits, dtype, shape = record["packed"][name]
    packed = Packed(low, bits, math.prod(shape), stored[name].numpy().tobytes())
    return torch.from_numpy(unpack(packed)).reshape(shape).to(_INTEGERS[dtype])


def tie_of(entry: list[Any], stored: Mapping[str, Tensor], record: Mapping[str, Any]) -> Tie:
    """Return a tie that `Written.tie` described."""
    members, labels = entry
    partition = Partition(_unpacked(labels, stored, record).reshape(-1).numpy())
    return Tie(tuple(Member(name, Groups(kind)) for name, kind in members), partition)


def without_known(description: Description, state: State) -> Description:
    """Leave out of a description what the file's tensors say: their shapes."""
    shapes = {name: list(shape) for name, shape in state.shapes().items()}
    lean: Description = {}
    for path, entry in description.items():
        unknown = {
            leaf: s for leaf, s in entry["tensors"].items() if s is None or shapes.get(qualified(path, leaf)) != s
        }
        rest = {key: value for key, value in entry.items() if key != "tensors"}
        lean[path] = {**rest, "tensors": unknown} if unknown else rest
    return lean


_TIED_TYPES = {twin.__name__ for twin in TIED.values()}


def with_known(lean: Description, state: State) -> Description:
    """Put the shapes back: the inverse of `without_known`."""
    description = {path: {**entry, "tensors": dict(entry.get("tensors", {}))} for path, entry in lean.items()}
    for name, shape in state.shapes().items():
        path, _, leaf = name.rpartition(".")
        if path in description and leaf != EXTRA:
            description[path]["tensors"][leaf] = list(shape)
    for entry in description.values():
        shapes = [shape for shape in entry["tensors"].values() if shape is not None]
        tied = entry["type"] in _TIED_TYPES
        if not all(map(_is_shape, shapes)) or (tied and not entry["tensors"]["labels"]):
            raise ValueError(entry)
    return description


def _is_shape(value: Any) -> bool:
    sizes = cast("list[Any]", value) if isinstance(value, list) else [None]
    return all(type(size) is int and 0 <= size < 2**63 for size in sizes)
