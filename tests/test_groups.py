"""Groups against index loops: a bijection for every kind and shape, norms to the last bits, errors by name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tying.errors import PlanError
from tying.groups import Groups, Kind, group_norms

PARAMETERS = {
    "linear": nn.Linear(5, 3).weight,
    "linear of one input": nn.Linear(1, 4).weight,
    "linear of one output": nn.Linear(4, 1).weight,
    "conv1d": nn.Conv1d(4, 3, 2).weight,
    "conv2d": nn.Conv2d(3, 4, (2, 3)).weight,
    "conv3d": nn.Conv3d(2, 3, (1, 2, 3)).weight,
    "depthwise": nn.Conv2d(4, 8, 3, groups=4).weight,
    "bias": nn.Linear(3, 5).bias,
    "scalar": nn.Parameter(torch.tensor(2.5)),
    "no outputs": nn.Parameter(torch.empty(0, 3)),
    "no inputs": nn.Parameter(torch.empty(3, 0)),
    "transposed in memory": nn.Parameter(torch.randn(4, 6).t()),
    "every other": nn.Parameter(torch.randn(6, 8, 4)[::2, 1::2]),
    "channels last": nn.Parameter(torch.randn(3, 4, 2, 5).to(memory_format=torch.channels_last)),
}
DIMENSIONS: dict[Kind, int] = {"inputs": 2, "filters": 2, "outputs": 1, "elements": 0, "whole": 0, "positions": 1}
CASES = [
    (kind, name) for kind in get_args(Kind) for name, tensor in PARAMETERS.items() if tensor.ndim >= DIMENSIONS[kind]
]

Read = Callable[[Groups, Tensor], Tensor]
Write = Callable[[Groups, Tensor, tuple[int, ...]], Tensor]


def slow_read(kind: Kind, tensor: Tensor) -> list[list[float]]:
    """Index by index: the axes that number the groups, the others in their own order inside."""
    outer = {"inputs": (1,), "outputs": (0,), "filters": (0, 1), "whole": (), "positions": (0,)}.get(
        kind, range(tensor.ndim)
    )
    inner = [axis for axis in range(tensor.ndim) if axis not in outer]
    matrix: list[list[float]] = []
    for group in itertools.product(*(range(tensor.shape[axis]) for axis in outer)):
        numbers: list[float] = []
        for rest in itertools.product(*(range(tensor.shape[axis]) for axis in inner)):
            at = dict(zip((*outer, *inner), (*group, *rest), strict=True))
            numbers.append(tensor[tuple(at[axis] for axis in range(tensor.ndim))].item())
        matrix.append(numbers)
    return matrix


def law_bijection(read: Read, write: Write, kind: Kind, tensor: Tensor) -> None:
    groups = Groups(kind)
    matrix = read(groups, tensor)
    assert matrix.tolist() == slow_read(kind, tensor.detach())
    assert tuple(matrix.shape) == groups.shape(tensor.shape)
    assert matrix.dtype == tensor.dtype
    back = write(groups, matrix, tuple(tensor.shape))
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)
    other = torch.randn(matrix.shape)
    assert torch.equal(read(groups, write(groups, other, tuple(tensor.shape))), other)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_read_and_write_are_inverse_and_read_what_the_loops_read(kind: Kind, name: str) -> None:
    law_bijection(Groups.read, Groups.write, kind, PARAMETERS[name])


def a_plain_view(groups: Groups, tensor: Tensor) -> Tensor:
    """A public port's: right for a linear weight's shape, but the channels of a convolution are mixed."""
    return tensor.reshape(groups.shape(tensor.shape))


def a_plain_view_back(groups: Groups, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    return matrix.reshape(shape)


def reading_outputs(groups: Groups, tensor: Tensor) -> Tensor:
    return Groups.outputs().read(tensor) if groups.kind == "inputs" else groups.read(tensor)


def without_transposing_back(groups: Groups, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    return matrix.reshape(shape)


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "conv3d"])
@pytest.mark.parametrize(
    ("read", "write"),
    [
        (a_plain_view, a_plain_view_back),
        (reading_outputs, Groups.write),
        (Groups.read, without_transposing_back),
    ],
)
def test_broken_readings_fail_the_law(read: Read, write: Write, name: str) -> None:
    with pytest.raises(AssertionError):
        law_bijection(read, write, "inputs", PARAMETERS[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("kind", get_args(Kind))
def test_any_dtype_is_read_and_written(kind: Kind, dtype: torch.dtype) -> None:
    law_bijection(Groups.read, Groups.write, kind, torch.arange(24).reshape(2, 3, 4).to(dtype))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_gradients_go_through_in_both_directions(kind: Kind, name: str) -> None:
    groups, value = Groups(kind), PARAMETERS[name].detach()
    tensor = value.clone().requires_grad_()
    weights = torch.randn(groups.shape(value.shape))
    (groups.read(tensor) * weights).sum().backward()
    assert tensor.grad is not None
    assert torch.equal(tensor.grad, groups.write(weights, value.shape))
    matrix = weights.clone().requires_grad_()
    (groups.write(matrix, value.shape) * value).sum().backward()
    assert matrix.grad is not None
    assert torch.equal(matrix.grad, groups.read(value))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_what_is_read_is_a_view_or_apart_but_never_changes_the_parameter(kind: Kind, name: str) -> None:
    tensor = PARAMETERS[name].detach().clone()
    before = tensor.clone()
    Groups(kind).write(Groups(kind).read(tensor) * 2, tensor.shape)
    Groups(kind).norms(tensor)
    assert torch.equal(tensor, before)


# ---------------------------------------------------------------- norms


def slow_norms(matrix: Tensor) -> list[float]:
    """Each in Python's floats, the sum rounded once."""
    return [math.sqrt(math.fsum(x * x for x in numbers)) for numbers in matrix.double().tolist()]


NORM_SHAPES = [(1, 1), (1, 7), (7, 1), (3, 5), (64, 33), (300, 784), (2, 200_001), (200_001, 2), (5, 131_072)]


def law_norms(norms: Callable[[Tensor], Tensor], shape: tuple[int, int], dtype: torch.dtype, *, across: bool) -> None:
    """As exact as float64 can be, 1e-7 for what has fewer bits; equal groups have equal norms wherever they stand."""
    generator = torch.Generator().manual_seed(shape[0])
    matrix = torch.randn(shape, generator=generator).to(dtype)
    matrix = matrix.t().contiguous().t() if across else matrix
    got = norms(matrix)
    assert got.dtype == torch.float64
    assert got.shape == shape[:1]
    some = torch.randperm(len(matrix), generator=generator)[:50]
    exact = torch.tensor(slow_norms(matrix[some]), dtype=torch.float64)
    torch.testing.assert_close(got[some], exact, rtol=1e-14 if dtype == torch.float64 else 1e-7, atol=0)
    equal = torch.randperm(len(matrix), generator=generator)[: max(2, len(matrix) // 3)]
    matrix[equal] = matrix[equal[0]].clone()
    assert norms(matrix)[equal].unique().numel() == 1


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", NORM_SHAPES)
def test_norms_are_exact_and_equal_groups_have_equal_norms(
    shape: tuple[int, int], dtype: torch.dtype, across: bool
) -> None:
    law_norms(group_norms, shape, dtype, across=across)


def norms_in_their_own_dtype(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=1).double()


def norms_by_running_sum(matrix: Tensor) -> Tensor:
    """Rounded at every term, in float32: what a plain loop does."""
    return torch.from_numpy(np.cumsum(matrix.float().square().numpy(), axis=1, dtype=np.float32)[:, -1]).sqrt().double()


@pytest.mark.parametrize(
    ("broken", "dtype"),
    [
        (norms_in_their_own_dtype, torch.float16),
        (norms_in_their_own_dtype, torch.bfloat16),
        (norms_by_running_sum, torch.float32),
        (norms_by_running_sum, torch.bfloat16),
    ],
)
def test_norms_in_few_bits_fail_the_law(broken: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError):
        law_norms(broken, (4, 100_001), dtype, across=False)


def test_norms_of_nothing() -> None:
    assert group_norms(torch.empty(3, 0)).tolist() == [0, 0, 0]
    assert group_norms(torch.empty(0, 3)).tolist() == []


def test_norms_say_when_a_group_is_not_finite() -> None:
    got = group_norms(torch.tensor([[1.0, math.nan], [math.inf, 0.0], [3.0, 4.0]]))
    assert math.isnan(got[0])
    assert got[1:].tolist() == [math.inf, 5.0]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_norms_of_a_parameter_are_those_of_its_groups(kind: Kind, name: str) -> None:
    got = Groups(kind).norms(PARAMETERS[name])
    assert not got.requires_grad
    torch.testing.assert_close(
        got.tolist(), slow_norms(torch.tensor(slow_read(kind, PARAMETERS[name].detach()))), rtol=1e-7, atol=0
    )


# ---------------------------------------------------------------- errors and the rest


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("inputs", ()), ("inputs", (4,)), ("filters", ()), ("filters", (4,)), ("outputs", ())],
)
def test_a_parameter_without_such_groups_is_refused(kind: Kind, shape: tuple[int, ...]) -> None:
    message = rf"Groups\.{kind}\(\): expected a parameter with at least .* got shape .*Groups\.elements\(\)"
    for refused in (
        lambda g: g.shape(shape),
        lambda g: g.read(torch.zeros(shape)),
        lambda g: g.norms(torch.ones(shape)),
    ):
        with pytest.raises(PlanError, match=message):
            refused(Groups(kind))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(PlanError, match=r"Groups\.kind: expected one of .*, got 'rows'; pick"):
        Groups("rows")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("shape", [(3, 5), (5, 2), (15,), (5, 3, 1)])
def test_a_matrix_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match=r"Groups\.inputs\(\): expected a matrix of shape \(5, 3\) .* got"):
        Groups.inputs().write(torch.zeros(shape), (3, 5))


@pytest.mark.parametrize("kind", get_args(Kind))
def test_groups_are_values(kind: Kind) -> None:
    made = getattr(Groups, kind)()
    assert (made, hash(made), str(made)) == (Groups(kind), hash(Groups(kind)), kind)
    with pytest.raises(FrozenInstanceError):
        made.kind = "whole"
