"""Networks are compared on inputs of other sizes, too: what depends on a size shows there, and only there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from networks import Net
from tying.enforce.compaction import compare
from tying.enforce.compaction.compact import compact
from tying.enforce.compaction.probes import TRIES, probes
from tying.errors import CompactError
from tying.plan import TiePlan


def padded_where_odd() -> tuple[nn.Module, Tensor, Tensor]:
    """A constant channel meets zeros at the border, at odd sizes only."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = torch.relu(m.one(x))
        return m.two(nn.functional.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2)) if x.shape[-1] % 2 else x)

    model = Net(forward, one=nn.Conv2d(1, 4, 1), two=nn.Conv2d(4, 3, 2, stride=2)).double()
    with torch.no_grad():
        model.one.weight[1] = 0
        model.one.bias[1] = 1
    return model, torch.randn(2, 1, 8, 8), torch.randn(2, 1, 7, 7)


def cut_at_a_literal_length() -> tuple[nn.Module, Tensor, Tensor]:
    """The limit is as long as what is cut, once; of longer inputs the network reads other numbers."""
    model = Net(
        lambda m, x: m.head(m.conv(x).flatten(1)[:, :12]), conv=nn.Conv1d(3, 4, 3), head=nn.Linear(12, 2)
    ).double()
    with torch.no_grad():
        model.head.weight[:, 3:6] = 0
    return model, torch.randn(2, 3, 5), torch.randn(2, 3, 9)


@pytest.mark.parametrize("make", [padded_where_odd, cut_at_a_literal_length])
def test_what_differs_at_another_size_is_refused(
    make: Callable[[], tuple[nn.Module, Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x, other = make()
    with pytest.raises(CompactError, match=r"once compacted, on inputs of \(2, "):
        compact(model, TiePlan([]), x.double())
    monkeypatch.setattr(compare, "probes", lambda runs, inputs: [])  # a comparison that lets it pass
    small = compact(model, TiePlan([]), x.double())
    torch.testing.assert_close(small(x.double()), model(x.double()))
    with pytest.raises((AssertionError, RuntimeError)):
        torch.testing.assert_close(small(other.double()), model(other.double()))


def shapes(model: Callable[..., Tensor], *inputs: Tensor) -> list[tuple[tuple[int, ...], ...]]:
    return [tuple(tuple(x.shape) for x in given) for given, _ in probes(lambda given: [model(*given)], inputs)]


def test_the_sizes_are_those_that_the_model_takes() -> None:
    x, image = torch.randn(3, 5, 4), torch.randn(2, 3, 8, 8)
    assert shapes(nn.Linear(4, 2), x) == [((4, 5, 4),), ((2, 11, 4),)]
    assert shapes(nn.Conv1d(5, 2, 1), x) == [((4, 5, 4),), ((2, 5, 9),)]
    assert shapes(nn.Conv2d(3, 2, 3), image) == [((3, 3, 8, 8),), ((2, 3, 9, 9),)]
    assert shapes(lambda x: x.view(len(x), 3, 2, 4, 2, 4), image) == [((3, 3, 8, 8),)]
    assert shapes(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), image) == [((3, 3, 8, 8),)]


def test_a_table_of_positions_that_is_full_is_read_in_part() -> None:
    table = torch.randn(5, 4)
    assert shapes(lambda x: x + table[: x.shape[1]], torch.randn(3, 5, 4)) == [((4, 5, 4),), ((2, 4, 4),)]


def test_lengths_that_are_equal_go_together() -> None:
    ids, mask = torch.randint(0, 9, (2, 6)), torch.ones(2, 1, 6, 6, dtype=torch.bool)
    embed = nn.Embedding(9, 4)

    def model(ids: Tensor, mask: Tensor) -> Tensor:
        x = embed(ids)[:, None]
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    assert shapes(model, ids, mask) == [((3, 6), (3, 1, 6, 6)), ((2, 13), (2, 1, 13, 13))]


def test_the_batch_stays_where_the_model_takes_one_only() -> None:
    assert shapes(lambda x: x.view(3, -1, 4), torch.randn(3, 5, 4))[0] == ((3, 5, 4),)


def test_what_the_model_does_not_take_is_given_up_soon() -> None:
    asked: list[Tensor] = []

    def model(*inputs: Tensor) -> Tensor:
        asked.append(inputs[0])
        if any(x.shape[1:] != (2 * i + 2, 2 * i + 3) for i, x in enumerate(inputs)):
            raise ValueError("other sizes")
        return inputs[0]

    assert len(shapes(model, *(torch.randn(2, 2 * i + 2, 2 * i + 3) for i in range(4)))) == 1
    assert len(asked) == 1 + 2 * TRIES
