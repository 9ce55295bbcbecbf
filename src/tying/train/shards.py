"""Sharded parameters (DTensor): the squares of the groups' norms travel between the ranks, the weights never.

A group may lie on several ranks, and a rank may hold a replica of what another holds. Every rank adds up the squares
of what it has, once per number over all ranks; one sum over the ranks gives every rank the same bits of every group's
squares, and from there on each works for itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from tying.errors import PenaltyError
from tying.penalties.arrays import Vector

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, as `fully_shard` and `parallelize_module` make of parameters."""
    module = sys.modules.get("torch.distributed.tensor")  # who has a DTensor has imported it; it costs half a second
    return module is not None and isinstance(tensor, cast(Any, module).DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, sharing its memory; a plain tensor is its own. Sends nothing.

    Example:
        >>> weight = torch.ones(3, 2)
        >>> local(weight).data_ptr() == weight.data_ptr()
        True
    """
    if not is_sharded(tensor):
        return tensor.detach()
    with torch.no_grad():
        return cast("DTensor", tensor).to_local()


def why_not(tensor: Tensor) -> str | None:
    """Return why the shards of a parameter can't be worked with, or None: what `expected …, got …; remedy` says."""
    if getattr(tensor, "_is_flat_param", False) or getattr(tensor, "_fsdp_flattened", False):
        got = "a flat one of FullyShardedDataParallel, in which groups lie torn"
    elif hasattr(tensor, "ds_id"):
        got = "one of DeepSpeed's ZeRO, which is empty between the steps"
    elif is_sharded(tensor) and any(placement.is_partial() for placement in cast("DTensor", tensor).placements):
        got = "one whose ranks hold terms of a sum"
    else:
        return None
    return f"expected a whole parameter or a DTensor, got {got}; use torch.distributed.fsdp.fully_shard"


@dataclass(frozen=True, eq=False)
class Piece:
    """Which of a sharded parameter's groups have numbers on this rank.

    Attributes:
        name: The parameter's, for messages.
        mesh: The ranks that hold the parameter, in the order of its mesh.
        device: The type of device between which the mesh sends.
        first: Whether this rank is the first along all dimensions of the mesh that hold replicas.
        count: n, the number of groups of the whole parameter.
        size: The number of entries of each group, over all ranks.
        local_size: The number of entries of each group that are here.
        positions: `(local n,)` which of the n groups are here, in the order of the local tensor.
    """

    name: str
    mesh: tuple[int, ...]
    device: str
    first: bool
    count: int
    size: int
    local_size: int
    positions: NDArray[np.int64]


def piece_of(name: str, parameter: Tensor, axes: Sequence[int]) -> Piece:
    """Return where this rank's groups are, the groups being counted along `axes`. Sends nothing."""
    parameter = cast("DTensor", parameter)
    shape = tuple(parameter.shape)
    here = tuple(local(parameter).shape)
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    positions = np.zeros(1, dtype=np.int64)
    for axis in axes:
        positions = (positions[:, None] * shape[axis] + _along(parameter, axis)).reshape(-1)
    replicas = [placement.is_replicate() for placement in parameter.placements]
    return Piece(
        name,
        tuple(cast("list[int]", mesh.mesh.flatten().tolist())),
        mesh.device_type,
        first=coordinate is not None and not any(at for at, same in zip(coordinate, replicas, strict=True) if same),
        count=_product(shape, axes),
        size=_product(shape, set(range(len(shape))) - set(axes)),
        local_size=_product(here, set(range(len(shape))) - set(axes)) if coordinate is not None else 0,
        positions=positions if coordinate is not None else positions[:0],
    )


class Message:
    """The one message of a step: the squares of all groups of all sharded parameters, summed over the ranks.

    Every rank must make it, at the same time, with the same parameters. Making it sends one message, and so does each
    call; neither does if there is nothing to ask of another rank.

    Raises:
        PenaltyError: On every rank, if the ranks that hold a parameter are not some of those that hold another one,
            or if they don't hold each number of it exactly once, replicas aside.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = tuple(pieces)
        self._bounds = np.cumsum([0, *(piece.count for piece in pieces)])
        self._ranks = frozenset(max((piece.mesh for piece in pieces), key=len, default=()))
        self._counts = [piece.first and min(self._ranks) in piece.mesh for piece in pieces]
        for piece in pieces:
            if not self._ranks.issuperset(piece.mesh):
                raise PenaltyError(
                    f"{piece.name}: expected some of the ranks {sorted(self._ranks)} that hold another parameter, got "
                    f"{sorted(piece.mesh)}; call proximal() once for the parameters of each mesh"
                )
        self._silent = len(self._ranks) < 2 or dist.get_rank() not in self._ranks
        self._group = None if self._silent else _group(self._ranks)
        self._check()

    def __call__(self, squares: Sequence[Vector | None]) -> list[Vector]:
        """Return the `(n,)` sums over all ranks, per piece, of the `(local n,)` squares here: the same bits everywhere.

        A number that is not finite on any rank, a replica's as well, makes the sum of its group not finite. Of a piece
        that is not asked about, None, the sums are 0: the message is as long, whatever this rank asks.
        """
        vector = np.zeros(self._bounds[-1])
        for piece, own, counts, start in zip(self._pieces, squares, self._counts, self._bounds, strict=False):
            if own is not None:
                vector[start + piece.positions] = own if counts else np.where(np.isfinite(own), 0.0, np.nan)
        if not self._silent:
            message = torch.from_numpy(vector).to(self._pieces[0].device)
            dist.all_reduce(message, group=self._group)
            vector = cast(Vector, message.cpu().numpy())
        return [vector[start:stop] for start, stop in pairwise(self._bounds)]

    def _check(self) -> None:
        found = self([np.full(len(piece.positions), float(piece.local_size)) for piece in self._pieces])
        for piece, sizes in zip(self._pieces, found, strict=True):
            if piece.mesh and not self._silent and (sizes != piece.size).any():
                wrong = int(np.flatnonzero(sizes != piece.size)[0])
                raise PenaltyError(
                    f"{piece.name}: expected ranks that hold each number once, replicas aside, got {sizes[wrong]:g} of "
                    f"{piece.size} numbers of group {wrong}; shard it with fully_shard or distribute_tensor"
                )


def _along(parameter: DTensor, axis: int) -> NDArray[np.int64]:
    """Return which positions of an axis are here.

    An index is sharded as the parameter is, so that uneven shards, several mesh dimensions on one axis and strided
    shards (`fully_shard` on top of tensor parallelism, whose offsets torch has no public function for) come out right.
    """
    from torch.distributed.tensor import Replicate, distribute_tensor

    shape = [1] * parameter.ndim
    shape[axis] = parameter.shape[axis]
    index = torch.arange(parameter.shape[axis]).reshape(shape)
    placements: list[Placement] = [
        placement if getattr(placement, "dim", None) in (axis, axis - parameter.ndim) else Replicate()
        for placement in parameter.placements
    ]
    # src_data_rank=None: every rank has the whole index, nothing is sent.
    sharded = distribute_tensor(index, parameter.device_mesh, placements, src_data_rank=None)
    return cast("NDArray[np.int64]", local(sharded).reshape(-1).cpu().numpy())


def _group(ranks: frozenset[int]) -> dist.ProcessGroup | None:
    if len(ranks) == dist.get_world_size():
        return None  # all ranks: the default group
    return cast(dist.ProcessGroup, dist.new_group(sorted(ranks), use_local_synchronization=True))


def _product(shape: Sequence[int], axes: Sequence[int] | set[int]) -> int:
    return int(np.prod([shape[axis] for axis in axes], dtype=np.int64))
