"""One valid `.safetensors` file: each value once, labels packed, and how to build the smaller network again."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tying.enforce.surgery import TIED, Description, describe, rebuild
from tying.enforce.tie import Gradient, gradients_of, plan_of, tie_, untie_
from tying.errors import FileError, TyingError
from tying.files.atomic import write_atomically
from tying.files.packing import Packed, pack, unpack
from tying.files.sealed import seal, unseal
from tying.groups import Groups
from tying.plan import Member, Partition, Tie, TiePlan, qualified
from tying.store.state import (
    EXTRA,
    State,
    View,
    check_not_outgrown,
    check_transient,
    collect,
    dtype_name,
    fill,
    is_dense,
    refuse_lazy,
)
from tying.store.unique import Step, plan_in_force, unique_set

KIND, VERSION = "tying.model", 1

_INTEGERS = {
    dtype_name(dtype): dtype for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
}


def save(model: nn.Module, path: str | Path, *, plan: TiePlan | None = None) -> None:
    """Write a network as one `.safetensors` file: each tensor once, ties once, labels in ⌈log2 K⌉ bits.

    In the file: every tensor of the state dict once, however many names it has, in its own dtype; the values of tied
    layers and of weights tied by `tie_` as the network holds them, `(out, K, …)` or `(K, D)`; weights that obey the
    `plan` bit for bit with one group per label; integer and boolean buffers (labels among them) packed. As metadata,
    in JSON: the architecture, what is shared or frozen, the plan, a sum of everything. No pickle. The same network
    gives the same bytes. The inverse is `load`.

    Args:
        model: Any dtype, device and mode; not written to.
        path: The file appears whole or not at all: a full disk or Ctrl-C leaves the old one.
        plan: Kept with the network (see `load_plan`), also where it speaks of the network before compacting; without
            one, the ties of the network's own layers.

    Raises:
        FileError: If the state dict holds what safetensors or JSON can't.
        OSError: If the disk is full, or the folder missing or not writable.

    Example:
        >>> import tempfile, os
        >>> from tying.nn import TiedLinear
        >>> small = nn.Sequential(TiedLinear([0, 0, 1, -1], 3), nn.ReLU(), nn.Linear(3, 2))
        >>> path = os.path.join(tempfile.mkdtemp(), "small.safetensors")
        >>> save(small, path)
        >>> again = load(path, nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        >>> x = torch.randn(5, 4)
        >>> torch.equal(again(x), small(x))
        True
    """
    write_atomically(path, encode(model, plan=plan))


def encode(model: nn.Module, *, plan: TiePlan | None = None) -> bytes:
    """Return the bytes that `save` writes."""
    state = collect(model)
    unique = unique_set(model, state, plan)
    hidden = {member.parameter for step in unique.steps for member in step.tie.members}
    written = _Written()
    for name, tensor in {**state.tensors, **unique.parameters}.items():
        if name not in hidden or name in unique.parameters:
            written.put(name, tensor)
    tied, gradients = plan_of(model), gradients_of(model)
    record = {
        "architecture": _without_known(describe(_untied(model)), state),
        "aliases": dict(state.aliases),
        "views": {name: [v.base, v.shape, v.strides, v.offset] for name, v in state.views.items()},
        "strides": {
            name: tensor.stride()
            for name, tensor in state.tensors.items()
            if not tensor.is_contiguous() and is_dense(tensor)
        },
        "frozen": sorted(state.frozen),
        "extra": dict(state.extra),
        "transient": dict(state.transient),
        "steps": [[written.tie(step.tie), step.shapes] for step in unique.steps],
        "tie_": [[written.tie(tie), gradients[tie.members[0].parameter]] for tie in tied],
        "plan": written.plan(plan if plan is not None else plan_in_force(model)),
        "packed": written.packed,
        "labels": written.labels,
    }
    return seal(written.tensors, {k: v for k, v in record.items() if v}, kind=KIND, version=VERSION)


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Read a network that `save` wrote: its outputs equal the saved one's bit for bit, on the same machine.

    Args:
        path: The file.
        model: The original architecture, freshly built (its values don't matter), or the compacted one. Not written
            to. Devices and training mode are taken from it, dtypes and `requires_grad` from the file.

    Returns:
        A new module.

    Raises:
        FileError: If the file is not there, truncated, foreign, changed since, or newer than this version reads, or
            if the model is of another architecture; names the tensor or module.
    """
    stored, record = unseal(path, kind=KIND, version=VERSION)
    with _Understood(path):
        state = _state(stored, record)
        description = _with_known(record.get("architecture", {}), state)
        ties = [(_tie_of(entry, stored, record), str(gradient)) for entry, gradient in record.get("tie_", ())]
    try:
        refuse_lazy(model)
        check_transient(model, state)
        check_not_outgrown(model, state)
        with torch.random.fork_rng(devices=[]):  # layers draw their first values, which are not kept
            built = rebuild(_untied(model), description)
            for gradient in sorted({gradient for _, gradient in ties}):
                tie_(built, TiePlan([tie for tie, g in ties if g == gradient]), gradient=cast(Gradient, gradient))
        fill(built, state)
    except FileError as error:
        raise FileError(f"{path}: {error}") from error
    except TyingError as error:
        raise FileError(f"{path}: expected the architecture that was saved, got another: {error}") from error
    return built


def load_plan(path: str | Path) -> TiePlan:
    """Read the plan that `save` kept: the one it was given, or the ties of the network's own layers.

    Raises:
        FileError: As `load`, for what is wrong with the file.
    """
    tensors, record = unseal(path, kind=KIND, version=VERSION)
    with _Understood(path):
        stored = record.get("plan", {"ties": [], "provenance": {}})
        return TiePlan([_tie_of(tie, tensors, record) for tie in stored["ties"]], stored["provenance"])


@dataclass
class _Written:
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


class _Understood:
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


def _state(stored: Mapping[str, Tensor], record: Mapping[str, Any]) -> State:
    labels = set(record.get("labels", ()))
    tensors = {name: _unpacked(name, stored, record) for name in stored if name not in labels}
    for entry, shapes in reversed(record.get("steps", [])):
        step = Step(_tie_of(entry, stored, record), tuple(tuple(shape) for shape in shapes))
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


def _unpacked(name: str, stored: Mapping[str, Tensor], record: Mapping[str, Any]) -> Tensor:
    if name not in record.get("packed", {}):
        return stored[name]
    low, bits, dtype, shape = record["packed"][name]
    packed = Packed(low, bits, math.prod(shape), stored[name].numpy().tobytes())
    return torch.from_numpy(unpack(packed)).reshape(shape).to(_INTEGERS[dtype])


def _tie_of(entry: list[Any], stored: Mapping[str, Tensor], record: Mapping[str, Any]) -> Tie:
    members, labels = entry
    partition = Partition(_unpacked(labels, stored, record).reshape(-1).numpy())
    return Tie(tuple(Member(name, Groups(kind)) for name, kind in members), partition)


def _untied(model: nn.Module) -> nn.Module:
    """The model, or a copy of it without the ties of `tie_`: these are recorded apart."""
    if not plan_of(model):
        return model
    copied = copy.deepcopy(model)
    untie_(copied)
    return copied


def _without_known(description: Description, state: State) -> Description:
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


def _with_known(lean: Description, state: State) -> Description:
    """The inverse of `_without_known`."""
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
