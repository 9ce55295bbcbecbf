"""How far outputs move along with the input, as `explain` measures it, against shifts by brute force."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from explain_laws import matrix, positive
from networks import Net
from tying import explain, words
from tying.explain.equivariance import Equivariance, Shift, measure_equivariance
from tying.explain.marks import sliding
from tying.explain.marks.dependence import find_dependence
from tying.nn import LocallyConnected1d, LocallyConnected2d


def by_brute_force(
    layer: nn.Module, structure: nn.Module, x: Tensor, by: int, stride: int, steps: int | None = None
) -> tuple[Any, Any]:
    """(interior, border) of one shift by a whole number of strides: pair by pair, sight from the dense matrix.

    With a number of steps: of one shift in one direction, as if the outputs moved by so many places.
    """
    size, channels = x.shape[-1], x.shape[1]
    sight = matrix(structure, tuple(x.shape[1:])).reshape(-1, structure_places(structure, x), channels, size) != 0
    full = int(sight.sum((2, 3)).max())
    interior, border = [], []
    plain = layer(x)[0]
    for to in (by, -by) if steps is None else (by,):
        other = torch.zeros_like(x)
        for i in range(size):
            if 0 <= i - to < size:
                other[..., i] = x[..., i - to]
        entered = torch.tensor([not 0 <= i - to < size for i in range(size)])
        moved = layer(other)[0]
        for unit, place in product(range(plain.shape[0]), range(plain.shape[1])):
            before = place - (to // stride if steps is None else steps)
            if 0 <= before < plain.shape[1]:
                apart = abs(float(moved[unit, place] - plain[unit, before])) / float(plain.abs().max())
                sees = sight[unit, place]
                padded = int(sees.sum()) < full or int(sight[unit, before].sum()) < full
                (border if padded or bool(sees[:, entered].any()) else interior).append(apart)
    return max(interior, default=None), max(border, default=None)


def structure_places(structure: nn.Module, x: Tensor) -> int:
    with torch.no_grad():
        return structure(torch.zeros_like(x)).shape[-1]


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module] | None, Any]] = {
    "valid": (lambda: nn.Conv1d(2, 3, 3), None, 1),
    "padded": (lambda: nn.Conv1d(2, 3, 3, padding=1), None, 1),
    "stride": (lambda: nn.Conv1d(2, 2, 3, stride=2), None, 2),
    "stride and padding": (lambda: nn.Conv1d(2, 2, 3, stride=2, padding=1), None, 2),
    "dilated": (lambda: nn.Conv1d(2, 2, 3, padding=2, dilation=2), None, 1),
    "average": (lambda: nn.AvgPool1d(2), None, 2),
    "largest": (lambda: nn.MaxPool1d(3, 2), lambda: nn.AvgPool1d(3, 2), 2),
    "largest, padded": (lambda: nn.MaxPool1d(3, 1, 1), lambda: nn.AvgPool1d(3, 1, 1), 1),
    "all": (lambda: nn.AdaptiveAvgPool1d(1), None, 12),
    "doubled": (lambda: nn.Upsample(scale_factor=2, mode="linear"), None, Fraction(1, 2)),
    "repeated": (lambda: nn.Upsample(scale_factor=3), None, Fraction(1, 3)),
    "halved": (lambda: nn.Upsample(scale_factor=0.5, mode="linear"), None, 2),
    "local": (lambda: LocallyConnected1d(2, 2, 12, 3), None, 1),
    "local, padded": (lambda: LocallyConnected1d(2, 2, 12, 3, padding=1), None, 1),
}


def between(layer: nn.Module, structure: nn.Module, x: Tensor, by: int, stride: int) -> tuple[Any, Any]:
    """(interior, border) of a shift by a part of a stride: of the whole numbers around it, the one that fits."""
    worst: list[tuple[Any, Any]] = []
    for to in (by, -by):
        tried = [by_brute_force(layer, structure, x, to, stride, steps) for steps in (to // stride, -(-to // stride))]
        tried = [each for each in tried if each != (None, None)]
        worst.append(min(tried, key=lambda each: (each[0] is None, each[0] or 0, each[1] or 0)))
    return tuple(max((each[i] for each in worst if each[i] is not None), default=None) for i in (0, 1))  # type: ignore[return-value]


def law_shifts(layer: nn.Module, structure: nn.Module, stride: int, measured: Equivariance, x: Tensor) -> None:
    for shift in measured.alone:
        assert shift.whole == (shift.by % stride == 0)
        expected = (by_brute_force if shift.whole else between)(layer, structure, x, shift.by, stride)
        assert (shift.interior, shift.border) == tuple(
            e if e is None else pytest.approx(e, abs=1e-12) for e in expected
        )


def measured(name: str) -> tuple[nn.Module, nn.Module, int, Equivariance, Tensor]:
    build, structure, stride = LAYERS[name]
    torch.manual_seed(0)
    layer = build().double()
    if not isinstance(layer, nn.MaxPool1d):
        positive(layer)
    x = torch.randn(1, 2, 12, dtype=torch.float64)
    (result,) = measure_equivariance(layer, find_dependence(layer, x), (x,), 3)
    return layer, layer if structure is None else structure(), stride, result, x


@pytest.mark.parametrize("name", LAYERS)
def test_shifts_against_brute_force(name: str) -> None:
    layer, structure, stride, result, x = measured(name)
    with torch.no_grad():
        law_shifts(layer, structure, stride, result, x)


@pytest.mark.parametrize(
    "twin",
    [
        lambda s: replace(s, whole=True),
        lambda s: replace(s, interior=None),
        lambda s: replace(s, border=0.0),
        lambda s: replace(s, interior=s.border, border=s.interior),
        lambda s: s if s.whole else replace(s, interior=0.0, border=0.0),
    ],
    ids=["every shift is whole", "no interior", "padding breaks nothing", "inside out", "strides break nothing"],
)
def test_wrong_shifts_fail_the_law(twin: Callable[[Shift], Shift]) -> None:
    layer, structure, stride, result, x = measured("stride and padding")
    with pytest.raises(AssertionError), torch.no_grad():
        law_shifts(layer, structure, stride, replace(result, alone=tuple(map(twin, result.alone))), x)


@pytest.mark.parametrize(
    ("build", "broken"),
    [
        (lambda: nn.Conv2d(1, 2, 3), ()),
        (lambda: nn.Conv2d(1, 2, 3, padding=1), ("padding",)),
        (lambda: nn.Conv2d(1, 2, 3, stride=2), ("stride 2",)),
        (lambda: nn.Conv2d(1, 2, 3, stride=(1, 3), padding=1), ("stride 3", "padding")),
        (lambda: nn.MaxPool2d(2), ("pooling by 2",)),
        (lambda: nn.AvgPool2d(3, 2, 1), ("pooling by 2", "padding")),
        (lambda: nn.AdaptiveAvgPool2d(1), ("pooling by 12",)),
        (lambda: nn.Conv2d(1, 2, 3, stride=(2, 3)), ("stride 2×3",)),
        (lambda: nn.Upsample((9, 12), mode="bilinear"), ("resampling by 1.33333",)),
        (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), ("border",)),
        (lambda: nn.Upsample(scale_factor=2, mode="bicubic"), ("border",)),
        (lambda: nn.Upsample(scale_factor=3), ()),
        (lambda: nn.ConvTranspose2d(1, 1, 2, 2), ()),
        (lambda: LocallyConnected2d(1, 1, (12, 12), 3), ("weights of its own at each place",)),
    ],
)
def test_it_says_what_breaks_equivariance(build: Callable[[], nn.Module], broken: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    (layer,) = explain(build(), torch.rand(1, 1, 12, 12)).equivariance
    assert layer.broken_by == broken


def test_a_border_that_is_not_known_fails_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    resampling = sliding._resampling
    monkeypatch.setattr(sliding, "_resampling", lambda *given: replace(resampling(*given), edge=None))
    layer, structure, stride, result, x = measured("doubled")
    with pytest.raises(AssertionError), torch.no_grad():
        law_shifts(layer, structure, stride, result, x)


def test_every_call_of_a_layer_is_measured() -> None:
    torch.manual_seed(0)
    conv = nn.Conv1d(1, 1, 3, stride=2)
    explanation = explain(Net(lambda m, x: m.c(m.c(x)), c=conv), torch.rand(1, 1, 30))
    alone = explain(nn.Sequential(conv, copy.deepcopy(conv)), torch.rand(1, 1, 30)).equivariance
    assert [(each.name, each.call, each.period) for each in explanation.equivariance] == [
        ("c", 1, (2,)),
        ("c", 2, (4,)),
    ]
    assert [each.period for each in alone] == [(2,), (4,)]
    assert "c (2nd call)  stride 2" in str(explanation)


def test_where_only_the_border_is_compared_it_is_printed() -> None:
    torch.manual_seed(0)
    explanation = explain(nn.AdaptiveAvgPool2d(1), torch.rand(1, 1, 7, 7))
    (line,) = (line for line in str(explanation).splitlines() if "pooling by 7" in line)
    border = max(shift.border or 0 for shift in explanation.equivariance[0].alone)
    assert words.percent(border, 0) in line


def test_what_was_thinned_out_on_the_way_does_not_come_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 1, 3, stride=2), nn.ConvTranspose1d(1, 1, 4, stride=2)).double()
    down, up = explain(model, torch.rand(1, 1, 21, dtype=torch.float64)).equivariance
    assert (down.period, up.period, up.stride) == ((2,), (2,), (0.5,))
    for shift in up.through:
        assert shift.whole == (shift.by % 2 == 0)
        assert (shift.interior is not None and shift.interior < 1e-12) == shift.whole
