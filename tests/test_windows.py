"""The geometry of a convolution: what is no geometry is refused by name, and windows are what PyTorch's are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from tying.errors import PlanError
from tying.wiring.windows import Windows, positions, span

GOOD: dict[str, Any] = {
    "input_size": (6, 5),
    "kernel_size": (3, 2),
    "stride": (2, 1),
    "dilation": (1, 2),
    "padding": ((1, 1), (0, 2)),
}
BAD = {
    "nothing at all": (dict.fromkeys(GOOD, ()), r"^input_size: expected one to three whole numbers ≥ 1, got \(\)"),
    "four dimensions": ({"input_size": (4,) * 4}, r"^input_size: expected one to three"),
    "no size": ({"input_size": None}, r"^input_size: .*got None"),
    "one number": ({"input_size": 6}, r"^input_size: .*got 6"),
    "a list": ({"stride": [2, 1]}, r"^stride: expected 2 whole numbers ≥ 1, got \[2, 1\]"),
    "a word": ({"kernel_size": ("a", 2)}, r"^kernel_size: .*got \('a', 2\)"),
    "a float": ({"kernel_size": (3.0, 2)}, r"^kernel_size: .*got \(3\.0, 2\)"),
    "a flag": ({"dilation": (True, 2)}, r"^dilation: .*got \(True, 2\)"),
    "zero": ({"stride": (0, 1)}, r"^stride: .*got \(0, 1\)"),
    "too few": ({"stride": (1,)}, r"^stride: expected 2 "),
    "no pairs": ({"padding": (1, 0)}, r"^padding: expected 2 pairs of numbers ≥ 0, got \(1, 0\)"),
    "empty pairs": ({"padding": ((), ())}, r"^padding: expected 2 pairs"),
    "three numbers": ({"padding": ((0, 0, 1), (0, 0, 1))}, r"^padding: expected 2 pairs"),
    "one pair": ({"padding": ((1, 1),)}, r"^padding: expected 2 pairs"),
    "less than nothing": ({"padding": ((-1, 0), (0, 0))}, r"^padding: expected 2 pairs"),
    "another mode": ({"padding_mode": "ones"}, r"^padding_mode: "),
    "too small": ({"input_size": (1, 1), "padding": ((0, 0), (0, 0))}, r"^input_size: expected an input that the"),
}


@pytest.mark.parametrize(("wrong", "message"), BAD.values(), ids=BAD)
def test_what_is_no_geometry_is_refused_by_name(wrong, message):
    with pytest.raises(PlanError, match=message):
        Windows(**{**GOOD, **wrong})


SLIDING = [(7, 3, 1, 1), (7, 3, 2, 1), (8, 2, 3, 2), (5, 1, 1, 4), (9, 4, 2, 2)]


@pytest.mark.parametrize(("size", "kernel", "stride", "dilation"), SLIDING)
def test_positions_are_those_of_pytorch(size, kernel, stride, dilation):
    made = functional.conv1d(torch.zeros(1, 1, size), torch.zeros(1, 1, kernel), stride=stride, dilation=dilation)
    assert positions(size, kernel, stride, dilation) == made.shape[-1]
    assert positions(span(kernel, dilation), kernel, stride, dilation) == 1
    assert positions(span(kernel, dilation) - 1, kernel, stride, dilation) == 0


def law_windows_are_those_of_pytorch(windows: Windows, unfolded: torch.Tensor, x: torch.Tensor) -> None:
    reference = functional.unfold(x, windows.kernel_size, dilation=windows.dilation, stride=windows.stride)
    reference = reference.reshape(*x.shape[:2], *windows.kernel_size, *windows.output_size)
    assert torch.equal(unfolded, reference.permute(0, 1, 4, 5, 2, 3))


def padded(windows: Windows) -> torch.Tensor:
    return functional.pad(torch.randn(2, 3, *windows.input_size), windows.pads)


def test_windows_are_those_of_pytorch():
    windows = Windows(**GOOD)
    x = padded(windows)
    law_windows_are_those_of_pytorch(windows, windows.unfold(x), x)


def test_the_law_fails_for_a_dilation_that_is_left_out():
    windows = Windows(**GOOD)
    x = padded(windows)
    with pytest.raises(AssertionError):
        law_windows_are_those_of_pytorch(windows, x.unfold(2, 3, 2).unfold(3, 2, 1)[:, :, :, :3], x)
