"""Tensors in one memory: what overlaps is found, what only lies side by side is left alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from tying.channels.find import find_channels
from tying.channels.joined import joined_groups, not_joined
from tying.channels.memory import overlapping
from tying.enforce import compact
from tying.errors import CompactError
from tying.groups import Groups
from tying.plan import Tie, TiePlan


def spans_of(memory: Tensor, *spans: tuple[int, int]) -> dict[str, Tensor]:
    return {f"{start}-{end}": memory[start:end] for start, end in spans}


TENSORS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "apart": lambda: {"a": torch.zeros(3), "b": torch.zeros(3)},
    "side by side": lambda: spans_of(torch.zeros(9), (0, 3), (3, 6), (6, 9)),
    "one in another": lambda: spans_of(torch.zeros(9), (0, 9), (3, 6)),
    "one in two": lambda: spans_of(torch.zeros(9), (0, 5), (4, 9), (4, 5)),
    "a chain": lambda: spans_of(torch.zeros(9), (0, 4), (3, 6), (5, 9)),
    "a short one after a long one": lambda: spans_of(torch.zeros(9), (0, 7), (1, 2), (3, 4), (7, 9)),
    "the same numbers": lambda: spans_of(torch.zeros(9), (2, 5)) | {"again": torch.zeros(3)},
    "nothing in between": lambda: spans_of(torch.zeros(9), (0, 9), (4, 4)),
    "transposed": lambda: (lambda weight: {"a": weight, "b": weight.t()})(torch.zeros(2, 3)),
    "columns": lambda: (lambda weight: {"a": weight[:, :2], "b": weight[:, 2:]})(torch.zeros(2, 4)),
    "another dtype": lambda: (lambda x: {"a": x[2:4], "b": x.view(torch.float64)[:1], "c": x[4:]})(torch.zeros(6)),
    "on the meta device": lambda: {"a": torch.zeros(3, device="meta"), "b": torch.zeros(3, device="meta")},
}


def law_overlaps_are_those_of_the_addresses(tensors: Mapping[str, Tensor], found: Mapping[str, str]) -> None:
    """The oracle: every pair, by the addresses of the first and the last number."""
    reach: dict[str, set[int]] = {}
    for name, tensor in tensors.items():
        at = [
            tensor.data_ptr() + tensor.element_size() * sum(i * s for i, s in zip(index, tensor.stride(), strict=True))
            for index in ([0] * tensor.dim(), [n - 1 for n in tensor.shape])
        ]
        some = tensor.numel() and not tensor.is_meta
        reach[name] = set(range(at[0], at[1] + tensor.element_size())) if some else set()
    with_another = {a for a in tensors for b in tensors if a != b and reach[a] & reach[b]}
    assert set(found) == with_another
    assert all(reach[one] & reach[other] for one, other in found.items())


@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_overlaps_are_those_of_the_addresses(make):
    tensors = make()
    law_overlaps_are_those_of_the_addresses(tensors, overlapping(tensors))


def test_the_law_fails_when_storages_are_compared():
    tensors = TENSORS["side by side"]()
    names = list(tensors)
    with pytest.raises(AssertionError):
        law_overlaps_are_those_of_the_addresses(tensors, dict(zip(names, names[1:] + names[:1], strict=True)))


def in_one_vector() -> nn.Module:
    """Its parameters lie side by side in one storage, as after an optimizer that works on a vector."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters())
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == 1
    return model


def test_parameters_side_by_side_are_cut():
    model, x = in_one_vector(), torch.randn(2, 4)
    assert [channel.blocked for channel in find_channels(model, x).made_by("0.weight")] == [None] * 3
    assert len(joined_groups(model, x)) == 2
    assert not not_joined(model, x)
    plan = TiePlan([Tie.of("0.weight", Groups.outputs(), [0, -1, 1])])
    assert compact(model, plan, x)[2].in_features == 2


def test_parameters_that_overlap_are_not():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), torch.randn(2, 3)
    model[2].weight = nn.Parameter(model[0].weight.t())
    blocked = [channel.blocked or "" for channel in find_channels(model, x).made_by("0.weight")]
    assert all("shares its memory" in reason for reason in blocked)
    with pytest.raises(CompactError, match="shares it with"):
        compact(model, TiePlan(), x)
