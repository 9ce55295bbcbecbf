"""Squares of groups, and groups scaled, in the order of memory: any shape, dtype and memory format, without a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from tying.axes import broadcast, finer, in_memory_order, scaled, squares_anywhere
from tying.groups import Groups, Kind

SHAPES = [(5, 7), (300, 784), (33, 70, 3, 3), (9, 1), (4, 1, 3, 3), (64, 64, 1, 1), (3, 5000), (2000, 37), (7,)]
SHAPES += [(1, 1), (0, 3), (3, 0), (4, 6, 2, 3, 2), (2, 3, 70, 70)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


def channels_last(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return contiguous(shape, dtype).contiguous(memory_format=formats.get(len(shape), torch.contiguous_format))


def transposed(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape[::-1]).to(dtype).permute(*reversed(range(len(shape))))


def with_gaps(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn([2 * size for size in shape]).to(dtype)[tuple(slice(None, None, 2) for _ in shape)]


FORMATS = [contiguous, channels_last, transposed, with_gaps]
Squares = Callable[[Tensor, tuple[int, ...]], Tensor]


def law_squares(squares: Squares, kind: Kind, tensor: Tensor) -> None:
    """What a sum of squares in extended precision gives, within 1e-7 for the norm; in float64, within 1e-14."""
    groups = Groups(kind)
    matrix = groups.read(tensor).double().numpy().astype(np.longdouble)
    expected = np.sqrt((matrix**2).sum(axis=1)).astype(float)
    found = squares(tensor, groups.axes(tensor.dim()))
    assert found.dtype == torch.float64
    tolerance = 1e-14 if tensor.dtype == torch.float64 else 1e-7
    np.testing.assert_allclose(found.sqrt().numpy(), expected, rtol=tolerance, atol=0)


def fits(kind: Kind, shape: tuple[int, ...]) -> bool:
    return len(shape) >= {"inputs": 2, "filters": 2, "outputs": 1}.get(kind, 0)


CASES = [(kind, shape) for shape in SHAPES for kind in get_args(Kind) if fits(kind, shape)]


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_squares_are_those_of_the_groups(kind, shape, memory):
    torch.manual_seed(0)
    for dtype in DTYPES:
        law_squares(squares_anywhere, kind, memory(shape, dtype))


def in_few_bits(tensor: Tensor, kept: tuple[int, ...]) -> Tensor:
    others = [axis for axis in range(tensor.dim()) if axis not in kept]
    return tensor.square().sum(dim=others).double()


def along_the_wrong_axis(tensor: Tensor, kept: tuple[int, ...]) -> Tensor:
    return squares_anywhere(tensor.t(), kept)


@pytest.mark.parametrize("twin", [in_few_bits, along_the_wrong_axis])
def test_squares_that_are_wrong_fail_the_law(twin):
    torch.manual_seed(0)
    with pytest.raises(AssertionError):
        law_squares(twin, "inputs", contiguous((70, 70), torch.bfloat16))


def law_equal_groups(squares: Squares, kind: Kind, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Equal groups have equal sums, bit for bit, wherever they stand and however memory is aligned."""
    groups = Groups(kind)
    count, size = groups.shape(shape)
    one = torch.randn(size).to(dtype)
    tensor = groups.write(one.expand(count, size).contiguous(), shape)
    shifted = torch.empty(tensor.numel() + 3, dtype=dtype)[3:].view(shape).copy_(tensor)
    for each in (tensor, shifted):
        assert squares(each, groups.axes(each.dim())).unique().numel() == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["inputs", "outputs"])
@pytest.mark.parametrize("shape", [(300, 67), (64, 1000), (37, 129, 3, 3), (1000, 33), (7, 513)])
def test_equal_groups_have_equal_squares(shape, kind, dtype):
    torch.manual_seed(0)
    law_equal_groups(squares_anywhere, kind, shape, dtype)


def summed_by_torch(tensor: Tensor, kept: tuple[int, ...]) -> Tensor:
    return tensor.double().square().sum(dim=[axis for axis in range(tensor.dim()) if axis not in kept])


def test_sums_that_depend_on_the_position_fail_the_law():
    torch.manual_seed(0)
    with pytest.raises(AssertionError):
        law_equal_groups(summed_by_torch, "inputs", (300, 67), torch.float32)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22, 1e35])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 50), (6, 5, 3, 3), (1, 70_000)])
def test_tiny_and_huge_weights_keep_their_norms(shape, dtype, scale):
    torch.manual_seed(0)
    law_squares(squares_anywhere, "outputs", (torch.randn(shape, dtype=torch.float64) * scale).to(dtype))
    law_squares(squares_anywhere, "inputs", (torch.randn(shape, dtype=torch.float64) * scale).to(dtype))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_group(dtype, bad):
    tensor = torch.ones(40, 3, dtype=dtype)
    tensor[7, 1] = bad
    assert squares_anywhere(tensor, (1,)).isfinite().tolist() == [True, False, True]
    assert squares_anywhere(tensor, (0,)).isfinite().sum() == 39


def law_scaled(tensor: Tensor, kind: Kind) -> None:
    """Every group is multiplied by its factor, rounded once, and nothing else changes."""
    groups = Groups(kind)
    count, _ = groups.shape(tensor.shape)
    factors = torch.rand(count, dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    expected = groups.write((groups.read(tensor) * factors[:, None]).to(tensor.dtype), tensor.shape)
    view = in_memory_order(tensor, groups.axes(tensor.dim()))
    if view is None:
        pair = broadcast(tensor, groups.axes(tensor.dim()), factors)
    else:
        fine, repeats = finer(view)
        pair = scaled(fine, factors.repeat_interleave(repeats))
    pair[0].mul_(pair[1])
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_groups_are_scaled_in_place(kind, shape, memory):
    torch.manual_seed(0)
    for dtype in DTYPES:
        law_scaled(memory(shape, dtype), kind)


@pytest.mark.parametrize("kind", ["inputs", "outputs", "whole"])
@pytest.mark.parametrize("memory", [contiguous, channels_last, transposed])
@pytest.mark.parametrize("shape", [(300, 200), (60, 40, 3, 3), (8, 8, 2, 3, 3)])
def test_dense_memory_has_a_view(shape, memory, kind):
    tensor = memory(shape, torch.float32)
    view = in_memory_order(tensor, Groups(kind).axes(tensor.dim()))
    assert view is not None
    assert view.data_ptr() == tensor.data_ptr()
    assert view.shape[1] == Groups(kind).shape(shape)[0]
