"""What is equal already, against slow loops over all pairs of groups; hashes that collide; what is no equality."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from tying import equal
from tying.equal import equal_ties
from tying.groups import Groups
from tying.plan import Member, Partition, Tie

Find = Callable[[Mapping[str, Tensor]], list[Tie]]


# ---------------------------------------------------------------- the slow way


def content(tensor: Tensor) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes()


def group_bytes(tensor: Tensor, kind: str) -> list[bytes]:
    if kind == "whole":
        return [content(tensor)]
    axis = 0 if kind == "outputs" else 1
    return [content(tensor.select(axis, i)) for i in range(tensor.shape[axis])]


def zero(group: bytes) -> bool:
    return set(group) == {0}


def bits_saved(parts: list[tuple[Tensor, str]]) -> int:
    """By tying what is equal in these readings: numbers spared less labels; 0 if no group but zeros occurs twice."""
    groups = [group for tensor, kind in parts for group in group_bytes(tensor, kind)]
    values = {group for group in groups if not zero(group)}
    pruned = any(map(zero, groups))
    if len(values) == sum(not zero(group) for group in groups):
        return 0
    labels = len(groups) * math.ceil(math.log2(len(values) + pruned)) if len(values) + pruned else 0
    return (len(groups) - len(values)) * len(groups[0]) * 8 - labels


def comparable(tensor: Tensor, kind: str) -> tuple[object, ...]:
    return (tensor.dtype, len(group_bytes(tensor, kind)[0]))


# ---------------------------------------------------------------- the law


def law_equal(tensors: dict[str, Tensor], find: Find) -> None:
    ties = find(tensors)
    members = [member for tie in ties for member in tie.members]
    assert len({m.parameter for m in members}) == len(members), "a tensor in two ties"
    assert ties == find(tensors), "another answer the second time"
    for tie in ties:
        tie.check_fits(tensors)
        groups = [group for m in tie.members for group in group_bytes(tensors[m.parameter], m.groups.kind)]
        labels = tie.partition.labels.tolist()
        assert len({tensors[m.parameter].dtype for m in tie.members}) == 1
        every = len(tie.members) > 1 and labels == [*range(tie.partition.classes)] * len(tie.members)
        for (one, a), (other, b) in itertools.combinations(zip(groups, labels, strict=True), 2):
            assert a != b or one == other, "tied but not equal"
            assert one != other or a == b or every, "equal but not tied"
        for group, label in zip(groups, labels, strict=True):
            assert zero(group) == (label < 0) or (every and label >= 0)
    together = {m.parameter: i for i, tie in enumerate(ties) for m in tie.members}
    for a, b in itertools.combinations(tensors, 2):
        one, other = tensors[a], tensors[b]
        if not one.is_floating_point() or one.dtype != other.dtype or zero(content(one)):
            continue
        same = one.shape == other.shape and content(one) == content(other)
        turned = one.dim() == 2 and one.t().shape == other.shape and content(one.t()) == content(other)
        if same or turned:
            assert together.get(a, a) == together.get(b, b), f"{a} and {b} are equal"
    nothing_left(tensors, ties)


def nothing_left(tensors: Mapping[str, Tensor], ties: list[Tie]) -> None:
    """No tensor outside of all ties, and no two of them, could save anything."""
    tied = {m.parameter for tie in ties for m in tie.members}
    readings = [
        (name, kind)
        for name, tensor in tensors.items()
        if name not in tied and tensor.is_floating_point() and tensor.dim() > 1 and tensor.numel()
        for kind in ("outputs", "inputs")
        if Groups(kind).shape(tensor.shape)[1] > 1
    ]
    for one in readings:
        assert bits_saved([(tensors[one[0]], one[1])]) <= 0, f"{one} has equal groups"
    for one, other in itertools.combinations(readings, 2):
        pair = [(tensors[name], kind) for name, kind in (one, other)]
        if one[0] != other[0] and comparable(*pair[0]) == comparable(*pair[1]):
            assert bits_saved(pair) <= 0, f"{one} and {other} have equal groups"


# ---------------------------------------------------------------- planted equalities


def planted(seed: int) -> dict[str, Tensor]:
    """Random small tensors, some copied, turned, made of one another's groups, with zeros, −0 and NaN among them."""
    random = np.random.default_rng(seed)
    dtype = (torch.float32, torch.float64, torch.bfloat16)[seed % 3]
    tensors: dict[str, Tensor] = {}
    for i in range(random.integers(1, 7)):
        name = f"m{i % 2}.layer{i}.weight"
        shape = [int(n) for n in random.integers(1, 6, size=random.choice([1, 2, 2, 2, 3, 4]))]
        drawn = random.integers(-2, 3, shape) if random.random() < 0.4 else random.normal(size=shape)
        tensor = torch.tensor(drawn, dtype=dtype)
        others = [t for t in tensors.values() if t.dtype == dtype]
        source = others[random.integers(len(others))] if others else tensor
        what = random.choice(["new", "copy", "turned", "outputs", "inputs", "crossed", "zeros", "same", "special"])
        if what == "copy":
            tensor = source.clone()
        elif what == "same":
            tensor = source
        elif what == "turned" and source.dim() == 2:
            tensor = source.t() if random.random() < 0.5 else source.t().contiguous()
        elif what in ("outputs", "inputs", "crossed") and source.dim() >= 2:
            axis = 0 if what == "outputs" else 1
            picks = torch.tensor(random.integers(0, source.shape[axis], random.integers(1, 8)))
            tensor = source.index_select(axis, picks)
            tensor = tensor.transpose(0, 1) if what == "crossed" else tensor
            if random.random() < 0.5:
                tensor = tensor.clone()
                tensor[:1] = torch.tensor(random.normal(size=tensor[:1].shape), dtype=dtype)
        elif what == "zeros":
            tensor = torch.zeros(shape, dtype=dtype) * (-1 if random.random() < 0.3 else 1)
        elif what == "special":
            tensor = tensor.clone()
            tensor.reshape(-1)[0] = math.nan
            tensor.reshape(-1)[-1] = -0.0
        tensors[name] = tensor.half() if random.random() < 0.1 else tensor
    tensors["steps"] = torch.tensor([1, 1])
    return tensors


@pytest.mark.parametrize("seed", range(0, 400, 20))
def test_what_is_equal_is_found(seed: int) -> None:
    for each in range(seed, seed + 20):
        law_equal(planted(each), equal_ties)


def without_members(tensors: Mapping[str, Tensor]) -> list[Tie]:
    return [tie for tie in equal_ties(tensors) if len(tie.members) == 1]


def without_groups(tensors: Mapping[str, Tensor]) -> list[Tie]:
    return [tie for tie in equal_ties(tensors) if len(tie.members) > 1]


def by_value(tensors: Mapping[str, Tensor]) -> list[Tie]:
    """−0 taken for 0, as `torch.equal` does."""
    return equal_ties({name: t + 0.0 if t.is_floating_point() else t for name, t in tensors.items()})


def of_any_size(tensors: Mapping[str, Tensor]) -> list[Tie]:
    """As if labels cost nothing: single numbers that coincide, and all that is equal in the first two dimensions."""
    flat = {name: t for name, t in tensors.items() if t.dim() > 1 and t.numel() and t.is_floating_point()}
    return [Tie.of(name, Groups.outputs(), [*range(t.shape[0] - 1), 0]) for name, t in flat.items()]


@pytest.mark.parametrize("broken", [without_members, without_groups, by_value, of_any_size])
def test_a_broken_search_fails_the_law(broken: Find) -> None:
    def every() -> None:
        for seed in range(60):
            law_equal(planted(seed), broken)

    with pytest.raises(AssertionError):
        every()


# ---------------------------------------------------------------- which tie, by hand


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def members(*entries: tuple[str, str]) -> tuple[Member, ...]:
    return tuple(Member(name, Groups(kind)) for name, kind in entries)


def by_hand() -> Iterator[tuple[str, dict[str, Tensor], list[Tie]]]:
    w, other = normal(4, 6), normal(3, 6, seed=1)
    whole = Tie(members(("a", "whole"), ("c", "whole")), Partition([0, 0]))
    yield "a copy", {"a": w, "b": other, "c": w.clone()}, [whole]
    yield "one object", {"a": w, "c": w}, [whole]
    yield "one object of zeros", {"a": (z := torch.zeros(3)), "c": z}, [whole]
    yield "zeros", {"a": torch.zeros(3), "c": torch.zeros(3)}, []
    yield "−0 and 0", {"a": -torch.zeros(3), "c": torch.zeros(3)}, []
    yield "−0 twice", {"a": -torch.zeros(3), "c": -torch.zeros(3)}, [whole]
    yield "NaN", {"a": torch.full((3,), math.nan), "c": torch.full((3,), math.nan)}, [whole]
    yield "other dtypes", {"a": w.half(), "c": w.half().float()}, []
    yield "other shapes", {"a": w, "c": w.reshape(6, 4)}, []
    yield "integers", {"a": torch.ones(5, 5).long(), "c": torch.ones(5, 5).long()}, []
    turned = members(("a", "outputs"), ("c", "inputs"))
    yield "a transpose", {"a": w, "c": w.t().contiguous()}, [Tie(turned, Partition([0, 1, 2, 3] * 2))]
    padded = w.clone()
    padded[0] = 0
    yield "a transpose with zeros", {"a": padded, "c": padded.t()}, [Tie(turned, Partition([0, 1, 2, 3] * 2))]
    square = normal(5, 5)
    yield "a symmetric tensor", {"a": square + square.t()}, []
    three = members(("a", "outputs"), ("b", "inputs"), ("c", "outputs"))
    yield "two copies and a transpose", {"a": w, "b": w.t(), "c": w.clone()}, [Tie(three, Partition([0, 1, 2, 3] * 3))]
    yield (
        "equal inputs",
        {"a": w[:, [0, 1, 1, 2, 0]]},
        [Tie.of("a", Groups.inputs(), [0, 1, 1, 2, 0])],
    )
    kernels = normal(2, 3, 3, 3)
    yield (
        "equal outputs, and zeros",
        {"a": torch.cat([kernels, torch.zeros(1, 3, 3, 3), kernels[1:]])},
        [Tie.of("a", Groups.outputs(), [0, 1, -1, 1])],
    )
    yield "zeros alone", {"a": torch.cat([w, torch.zeros(2, 6)])}, []
    yield (
        "a wider layer",
        {"a": w, "b": torch.cat([w[:3], normal(5, 6, seed=3)])},
        [Tie(members(("a", "outputs"), ("b", "outputs")), Partition([0, 1, 2, 3, 0, 1, 2, 4, 5, 6, 7, 8]))],
    )
    yield (
        "inputs of one, outputs of another",
        {"a": w, "b": w.t()[:, [2, 0]]},
        [Tie(members(("a", "outputs"), ("b", "inputs")), Partition([0, 1, 2, 3, 2, 0]))],
    )
    long = normal(1, 3)
    yield (
        "not worth its labels",
        {"a": torch.cat([normal(200, 3), long]), "b": torch.cat([normal(200, 3, seed=2), long])},
        [],
    )
    yield "single numbers", {"a": torch.ones(4, 1), "b": torch.ones(1, 3)[:, :1], "c": torch.ones(5) * 2}, []
    twins = w[[0, 0, 0, 0, 1, 1, 1, 1]]
    yield (
        "copies of equal groups",
        {"a": twins, "b": twins.clone()},
        [Tie(members(("a", "outputs"), ("b", "outputs")), Partition([0, 0, 0, 0, 1, 1, 1, 1] * 2))],
    )
    yield "empty", {"a": torch.zeros(0, 3), "b": torch.zeros(0, 3), "s": torch.tensor(2.0)}, []
    yield "nothing", {}, []


HAND = {name: (tensors, ties) for name, tensors, ties in by_hand()}


@pytest.mark.parametrize("case", HAND)
def test_the_tie_that_saves_most(case: str) -> None:
    tensors, ties = HAND[case]
    assert equal_ties(tensors) == ties


def test_a_group_in_many_layers_does_not_tie_them_all() -> None:
    shared = normal(1, 4, seed=9)
    many = {f"w{i}": torch.cat([normal(20, 4, seed=i), shared]) for i in range(30)}
    twice = torch.cat([normal(50, 4, seed=99)] * 2)
    ties = equal_ties({**many, "twice": torch.cat([twice, shared])})
    assert ["twice"] in [[m.parameter for m in tie.members] for tie in ties]


def test_sums_that_collide_make_no_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal, "_digest", lambda content: bytes([int(content.any())]))
    tensors = {"a": normal(4, 6), "b": normal(4, 6, seed=1)}
    assert equal_ties(tensors) == []


def test_only_plain_tensors_are_looked_at() -> None:
    tensors = {
        "meta": torch.empty(3, 3, device="meta"),
        "sparse": torch.eye(3).to_sparse(),
        "complex": torch.ones(3, 3, dtype=torch.complex64),
        "parameter": torch.nn.Parameter(normal(3, 3)),
        "buffer": normal(3, 3),
    }
    assert [m.parameter for tie in equal_ties(tensors) for m in tie.members] == ["parameter", "buffer"]
