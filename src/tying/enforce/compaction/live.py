"""What lives of a network's tensors while channels go: float64 copies, and the indices that are left of their axes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tying.channels.find import Channel, Slice
from tying.enforce.held import names_of, owned
from tying.errors import CompactError
from tying.plan import TiePlan, qualified

READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The layers whose biases can take constants over."""


class Network:
    """Float64 copies of a network's tensors, and which indices of their axes live."""

    def __init__(self, reference: nn.Module) -> None:
        self.model = reference
        self.paths = {id(module): path for path, module in reference.named_modules()}
        self._names = names_of(reference)
        self._all = {names[0]: list(names) for names in self._names.values()}
        self.first = {name: names[0] for names in self._names.values() for name in names}
        tensors = owned(reference)
        self.values = {name: tensors[name].detach().double().clone() for name in dict.fromkeys(self.first.values())}
        self.live = {name: [torch.ones(n, dtype=torch.bool) for n in t.shape] for name, t in self.values.items()}
        self.written: set[str] = set()
        self._present: dict[str, Tensor] = {}
        self._zero: dict[str, dict[int, NDArray[np.bool_]]] = {}
        self._holders: dict[str, list[nn.Module]] = {}

    def cut(self, name: str) -> Tensor:
        """The tensor without what has gone."""
        return _left(self.values[name], dict(enumerate(self.live[name])))

    def zero(self, name: str, axis: int) -> NDArray[np.bool_]:
        """Which indices of an axis are zero wherever the other axes live: `(size,)` bool."""
        known = self._zero.setdefault(name, {})
        if axis not in known:
            present = self.presence(name) if axis < 2 else (self.values[name] != 0).cpu()
            others = {d: live for d, live in enumerate(self.live[name][: present.ndim]) if d != axis}
            present = _left(present, others)
            known[axis] = ~present.movedim(axis, 0).reshape(present.shape[axis], -1).any(1).numpy()
        return known[axis]

    def presence(self, name: str) -> Tensor:
        """What is not zero, bool, on the CPU: all axes from the third on, as of kernels, count as one number."""
        if name not in self._present:
            present = _left((self.values[name] != 0).cpu(), dict(enumerate(self.live[name][2:], 2)))
            self._present[name] = present.flatten(2).any(2) if present.ndim > 2 else present
        return self._present[name]

    def unread(self, channel: Channel) -> bool:
        """Whether every reader has zero weights for the channel."""
        for part in channel.readers:
            zero = self.zero(part.parameter, part.axis)
            if not all(zero[index] for index in part.indices):
                return False
        return True

    def remove(self, slices: Iterable[Slice]) -> None:
        """Let slices of tensors go."""
        gone: dict[tuple[str, int], list[int]] = {}
        for part in slices:
            gone.setdefault((part.parameter, part.axis), []).extend(part.indices)
        for (name, axis), indices in gone.items():
            self.live[name][axis][indices] = False
            self._forget(name, axis)

    def add_to_bias(self, module: nn.Module, amount: Tensor) -> None:
        """Add to the module's bias; one that is None starts at zero and lives as the outputs of the weight do."""
        path = self.paths[id(module)]
        name, weight = (qualified(path, leaf) for leaf in ("bias", "weight"))
        name = self.first.get(name, name)
        if name not in self.values:
            self.values[name] = torch.zeros_like(amount)
            self.live[name] = [self.live[self.first[weight]][0]]
        self.values[name] += amount
        self.written.add(name)

    def stop_reading(self, part: Slice, index: int) -> None:
        """Set one index of a reader's slice to zero."""
        self.values[part.parameter].select(part.axis, index).zero_()
        self.written.add(part.parameter)
        self.zero(part.parameter, part.axis)[index] = True
        if part.parameter in self._present and part.axis < 2:
            self._present[part.parameter].select(part.axis, index).zero_()
        self._forget(part.parameter, part.axis)

    def holders(self, name: str) -> list[nn.Module]:
        """The modules that hold the tensor of this first name as their weight; empty where something else does."""
        if name not in self._holders:
            found = [(self.model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in self._all[name]]
            plain = all(isinstance(module, READERS) and leaf == "weight" for module, leaf in found)
            self._holders[name] = list(dict.fromkeys(module for module, _ in found)) if plain else []
        return self._holders[name]

    def names(self, tensor: Tensor) -> list[str]:
        """All the names of a tensor of the reference."""
        return self._names[id(tensor)]

    def _forget(self, name: str, axis: int) -> None:
        """Look anew at the tensor's zeros along other axes than the one on which it changed."""
        known = self._zero.get(name, {})
        self._zero[name] = {axis: known[axis]} if axis in known else {}
        if axis >= 2:
            self._present.pop(name, None)

    def emptied(self) -> list[tuple[str, int]]:
        """The axes, by name and number, that have lost all of their indices."""
        return [
            (name, axis)
            for name, axes in self.live.items()
            for axis, live in enumerate(axes)
            if len(live) and not bool(live.any())
        ]

    def changed(self, plan: TiePlan) -> dict[str, Tensor]:
        """The tensors that are cut, written to or planned, without what has gone."""
        planned = {member.parameter for tie in plan for member in tie.members}
        cut = {name for name, axes in self.live.items() if not all(bool(live.all()) for live in axes)}
        return {name: self.cut(name) for name in self.values if name in planned | cut | self.written}


def _left(tensor: Tensor, live: Mapping[int, Tensor]) -> Tensor:
    """The tensor with what lives of it, by axis."""
    for axis, lives in live.items():
        if not bool(lives.all()):
            tensor = tensor.index_select(axis, torch.nonzero(lives).flatten().to(tensor.device))
    return tensor


def everything_pruned(name: str, what: str) -> CompactError:
    """Return the error that nothing is left."""
    return CompactError(
        f"{name}: expected at least one of its {what} to be left, got none: all are zero, or only feed what is zero; "
        "prune less (a weaker penalty, a lower threshold), or take the layer out of the model"
    )
