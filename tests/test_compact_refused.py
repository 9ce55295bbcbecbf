"""What `compact` does not take: refused by name, with the remedy, and nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tying.channels.find import find_channels
from tying.channels.joined import joined_groups
from tying.enforce import compact, plan_compaction
from tying.errors import CompactError
from tying.groups import Groups
from tying.plan import Tie, TiePlan

PRUNED = TiePlan([Tie.of("body.weight", Groups.outputs(), [0, -1, 1])])


class Net(nn.Module):
    """Two layers; what a subclass does between them, or with the output, is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x).relu())


def snapshot(model: nn.Module) -> dict[str, tuple[int, bytes]]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (id(t), b"" if t.is_meta else t.detach().numpy().tobytes()) for name, t in tensors.items()}


class Masked(Net):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x).relu()[x.sum(-1) > 0])


class Selected(Net):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x).index_select(0, (x.sum(-1) > 0).nonzero().flatten()))


class Distinct(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), torch.unique(x)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.part = nn.Linear(4, 3), Masked()

    def forward(self, x: Tensor) -> Any:
        return self.part(x) if x.shape[-1] == 4 else self.body(x)


SIZED_BY_DATA: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a mask": (Masked, r"^index in the model's forward: .*torch\.where.*tie_"),
    "the places of what is not zero": (Selected, r"^nonzero in the model's forward: "),
    "a second output": (Distinct, r"^_?unique\w* in the model's forward: "),
    "inside of a module": (Inner, r"^index in 'part': "),
}
READERS = {
    "compact": lambda model, x: compact(model, PRUNED, x),
    "plan_compaction": lambda model, x: plan_compaction(model, PRUNED, x),
    "find_channels": find_channels,
    "joined_groups": joined_groups,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize(("make", "message"), SIZED_BY_DATA.values(), ids=SIZED_BY_DATA)
def test_sizes_that_depend_on_the_data_are_refused_by_name(make, message, read):
    model = make()
    before = snapshot(model)
    with pytest.raises(CompactError, match=message):
        read(model, torch.randn(8, 4))
    assert snapshot(model) == before


class Scaled(Net):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x) * x.max().item())


def test_a_number_that_depends_on_the_data_is_no_size():
    assert compact(Scaled(), PRUNED, torch.randn(8, 4)).head.in_features in (2, 3)
