"""What is equal already, bit for bit: whole tensors, transposed ones, and groups that occur more than once."""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tying.files.sealed import bytes_of
from tying.groups import Groups, Kind
from tying.plan import Member, Partition, Tie

_TURNED: dict[Kind, Kind] = {"outputs": "inputs", "inputs": "outputs"}
"""How a transposed tensor is read."""


def equal_ties(tensors: Mapping[str, Tensor]) -> list[Tie]:
    """Find what is equal bit for bit among tensors, each tensor in at most one tie.

    Three kinds, of which each tensor gets the one that saves most bits, `numbers spared · bits each − packed labels`:

    - whole: all members over `Groups.whole()`, one label;
    - transposed (two dimensions): the first member's outputs are another's inputs, one label per output;
    - group-wise: outputs or inputs of at least two numbers that occur more than once, inside one tensor or across
      several, whose readings may differ; only where that saves more than tying what is equal as a whole. What to
      choose among ties that overlap is decided greedily, the one that saves most first.

    Bits decide: NaN equals itself, −0 is not 0. Zeros are not called equal: a tensor or group whose bits are all zero
    makes no tie, and has the label −1 where its tensor is tied group-wise. One tensor under two names is equal to
    itself whatever it holds. No distances: the groups' sums (BLAKE2, 128 bits) are compared, then what they found is
    compared bit by bit. Time and memory are linear in the bytes.

    Args:
        tensors: By name; read as `nn.Linear` and `nn.ConvNd` lay weights out. Only plain floating-point tensors with
            values are looked at, on any device; those of different dtypes are never equal.

    Returns:
        Ties in the order of their first members, members in the order given.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        >>> tied = {"a": weight, "b": weight.clone(), "c": weight.t(), "d": torch.ones(2, 8)}
        >>> for tie in equal_ties(tied):
        ...     print(tie)
        a[outputs] ~ b[outputs] ~ c[inputs]: 6 groups → 2 values, 0 pruned
        d[inputs]: 8 groups → 1 values, 0 pruned
    """
    held = {name: tensor.detach() for name, tensor in tensors.items() if _readable(tensor)}
    place = {name: i for i, name in enumerate(held)}
    copies = list(_turned_together(_equal_as_a_whole(held), place))
    group_wise = list(_group_wise(copies, place))
    taken = {id(node.copies) for nodes in group_wise for node in nodes}
    found = [_group_tie(nodes, place) for nodes in group_wise]
    found += [each.tie() for each in copies if id(each) not in taken and len(each.names) > 1]
    found = [tie for tie in found if _holds(tie, held)]  # sums that collide cost a tie, and never make a false one
    return sorted(found, key=lambda tie: place[tie.members[0].parameter])


@dataclass(frozen=True)
class _Copies:
    """Tensors that are equal as a whole or transposed: looked at once."""

    names: tuple[str, ...]
    turned: frozenset[str]
    """Those among them that are transposes of the first."""
    readings: Mapping[Kind, NDArray[np.int64]]
    """One number per group of the first, the same for the same bits, −1 for zeros; `whole` for fewer dimensions."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    def tie(self) -> Tie:
        """All members, as a whole or transposed."""
        if not self.turned:
            return Tie(tuple(Member(n, Groups.whole()) for n in self.names), Partition([0] * len(self.names)))
        return Tie(self.members("outputs"), Partition(np.tile(np.arange(self.shape[0]), len(self.names))))

    def members(self, kind: Kind) -> tuple[Member, ...]:
        return tuple(Member(n, Groups(_TURNED[kind] if n in self.turned else kind)) for n in self.names)

    def saved(self) -> int:
        """Bits that `tie` spares."""
        labels = self.tie().partition.label_bits if self.turned else 0
        return (len(self.names) - 1) * int(np.prod(self.shape)) * self.dtype.itemsize * 8 - labels


@dataclass(frozen=True)
class _Node:
    """Copies read one way."""

    copies: _Copies
    kind: Kind

    @property
    def groups(self) -> NDArray[np.int64]:
        return self.copies.readings[self.kind]

    @property
    def size(self) -> int:
        """D, the numbers in a group."""
        return int(np.prod(self.copies.shape)) // len(self.groups)


def _readable(tensor: Tensor) -> bool:
    plain = type(tensor.data) is Tensor and tensor.layout is torch.strided and not tensor.is_meta
    return plain and tensor.is_floating_point() and tensor.numel() > 0


def _equal_as_a_whole(held: Mapping[str, Tensor]) -> list[_Copies]:
    numbers: dict[bytes, int] = {}
    first: dict[object, _Copies] = {}
    memory: dict[object, object] = {}
    for name, tensor in held.items():
        shape = tuple(tensor.shape)
        here = (tensor.device, tensor.data_ptr(), tensor.dtype, shape, tensor.stride())
        if here not in memory:
            kinds: tuple[Kind, ...] = ("outputs", "inputs") if tensor.dim() > 1 else ("whole",)
            readings: dict[Kind, NDArray[np.int64]] = {kind: _numbered(tensor, kind, numbers) for kind in kinds}
            groups = readings[kinds[0]]
            memory[here] = (tensor.dtype, shape, groups.tobytes()) if (groups >= 0).any() else here
            first.setdefault(memory[here], _Copies((), frozenset(), readings, shape, tensor.dtype))
        known = first[memory[here]]
        first[memory[here]] = replace(known, names=(*known.names, name))
    return list(first.values())


def _numbered(tensor: Tensor, kind: Kind, numbers: dict[bytes, int]) -> NDArray[np.int64]:
    groups = _bytes(tensor, Groups(kind))
    zero = _digest(np.zeros(groups.shape[1], dtype=np.uint8))
    sums = map(_digest, groups)
    return np.array([-1 if each == zero else numbers.setdefault(each, len(numbers)) for each in sums], dtype=np.int64)


def _digest(content: NDArray[np.uint8]) -> bytes:
    return hashlib.blake2b(content.data, digest_size=16).digest()


def _bytes(tensor: Tensor, groups: Groups) -> NDArray[np.uint8]:
    """The bits of every group: `(G, D · bytes)`."""
    matrix = groups.read(tensor)
    return bytes_of(matrix).numpy().reshape(len(matrix), -1)


def _turned_together(whole: Sequence[_Copies], place: Mapping[str, int]) -> Iterator[_Copies]:
    """Put transposed tensors of two dimensions with those that they are transposes of."""
    flat = [each for each in whole if len(each.shape) == 2 and (each.readings["outputs"] >= 0).any()]
    by_inputs = {(each.dtype, each.shape[::-1], each.readings["inputs"].tobytes()): each for each in flat}
    gone: set[int] = set()
    for each in whole:
        if id(each) in gone:
            continue
        other = None
        if len(each.shape) == 2:
            other = by_inputs.get((each.dtype, each.shape, each.readings["outputs"].tobytes()))
        if other is None or other is each:
            yield each
        else:
            gone.add(id(other))
            names = sorted((*each.names, *other.names), key=place.__getitem__)
            yield replace(each, names=tuple(names), turned=frozenset(other.names))


def _group_wise(copies: Sequence[_Copies], place: Mapping[str, int]) -> Iterator[list[_Node]]:
    """Choose which tensors to tie group-wise with which, and how each is read: what saves most comes first."""
    pools: dict[tuple[torch.dtype, int], list[_Node]] = {}
    for each in copies:
        for kind in each.readings:
            node = _Node(each, kind)
            if kind != "whole" and node.size > 1:  # single numbers coincide by chance
                pools.setdefault((each.dtype, node.size), []).append(node)
    waiting: list[tuple[int, int, int, list[_Node]]] = []
    order = itertools.count()

    def consider(nodes: Sequence[_Node]) -> None:
        unseen = _connected(nodes)
        while unseen:
            best, rest = _trimmed(unseen.pop())
            if (gain := _gain(best)) > 0:
                heapq.heappush(waiting, (-gain, place[best[0].copies.names[0]], next(order), best))
            unseen += _connected(rest)

    for pool in pools.values():
        consider(pool)
    taken: set[int] = set()
    while waiting:
        nodes = heapq.heappop(waiting)[-1]
        free = [node for node in nodes if id(node.copies) not in taken]
        if len(free) < len(nodes):
            consider(free)
            continue
        taken |= {id(node.copies) for node in nodes}
        yield nodes


def _connected(nodes: Sequence[_Node]) -> list[list[_Node]]:
    """Split into sets of nodes that have groups in common."""
    root = list(range(len(nodes)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    seen: dict[int, int] = {}
    for i, node in enumerate(nodes):
        for group in np.unique(node.groups[node.groups >= 0]).tolist():
            root[find(i)] = find(seen.setdefault(group, i))
    sets: dict[int, list[_Node]] = {}
    for i, node in enumerate(nodes):
        sets.setdefault(find(i), []).append(node)
    return list(sets.values())


def _trimmed(nodes: Sequence[_Node]) -> tuple[list[_Node], list[_Node]]:
    """Leave out nodes that cost more labels than they spare numbers, and one of two readings of the same tensor."""
    best, rest = list(nodes), list[_Node]()
    while len(best) > 1:
        twice = {id(n.copies) for n in best if sum(n.copies is other.copies for other in best) > 1}
        choice = [i for i, node in enumerate(best) if not twice or id(node.copies) in twice]
        gains = [_gain(best[:i] + best[i + 1 :]) for i in choice]
        if not twice and max(gains) <= _gain(best):
            break
        rest.append(best.pop(choice[int(np.argmax(gains))]))
    return best, rest


def _gain(nodes: Sequence[_Node]) -> int:
    """Bits that a tie of all of them spares, beyond what they spare as copies; 0 if no group occurs twice."""
    once = np.concatenate([node.groups for node in nodes])
    once = once[once >= 0]
    if len(np.unique(once)) == len(once):
        return 0
    partition = Partition(np.concatenate([np.tile(node.groups, len(node.copies.names)) for node in nodes]))
    width = nodes[0].size * nodes[0].copies.dtype.itemsize * 8
    saved = (len(partition) - partition.classes) * width - partition.label_bits
    return saved - sum(copies.saved() for copies in {id(n.copies): n.copies for n in nodes}.values())


def _group_tie(nodes: Sequence[_Node], place: Mapping[str, int]) -> Tie:
    entries = [(member, node.groups) for node in nodes for member in node.copies.members(node.kind)]
    entries.sort(key=lambda entry: place[entry[0].parameter])
    return Tie(tuple(member for member, _ in entries), Partition(np.concatenate([groups for _, groups in entries])))


def _holds(tie: Tie, held: Mapping[str, Tensor]) -> bool:
    values: NDArray[np.uint8] | None = None
    known = np.zeros(tie.partition.classes, dtype=bool)
    start = 0
    for member in tie.members:
        groups = _bytes(held[member.parameter], member.groups)
        labels = tie.partition.labels[start : start + len(groups)]
        start += len(groups)
        if values is None:
            # the last are the zeros of −1
            values = np.zeros((tie.partition.classes + 1, groups.shape[1]), dtype=np.uint8)
        present, first = np.unique(labels, return_index=True)
        new = [(label, i) for label, i in zip(present, first, strict=True) if label >= 0 and not known[label]]
        for label, i in new:
            values[label], known[label] = groups[i], True
        if not np.array_equal(values[labels], groups):
            return False
    return True
