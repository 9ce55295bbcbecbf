"""A parameter read as a `(G, D)` matrix of comparable groups, and back.

Everything else in the package (penalties, clusters, plans) works on that matrix and never on the parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tying.axes import squares_anywhere
from tying.errors import PlanError

Kind = Literal["inputs", "outputs", "filters", "elements", "whole", "positions"]


@dataclass(frozen=True)
class Groups:
    """A way to read a parameter as `G` groups of `D` numbers each: a bijection.

    | kind       | one group is                                       | G         | D               |
    |------------|----------------------------------------------------|-----------|-----------------|
    | `inputs`   | everything that reads one input unit or channel    | shape[1]  | numel / shape[1]|
    | `outputs`  | everything that makes one output unit or channel   | shape[0]  | numel / shape[0]|
    | `filters`  | what one output makes of one input (a conv kernel) | s[0]·s[1] | prod(shape[2:]) |
    | `elements` | a single number                                    | numel     | 1               |
    | `whole`    | the parameter                                      | 1         | numel           |
    | `positions`| a locally connected layer's kernels at one place   | shape[0]  | numel / shape[0]|

    Example:
        >>> import torch
        >>> weight = torch.arange(6.0).reshape(2, 3)  # nn.Linear(3, 2).weight
        >>> Groups.inputs().read(weight)
        tensor([[0., 3.],
                [1., 4.],
                [2., 5.]])
        >>> Groups.inputs().shape(weight.shape)
        (3, 2)
    """

    kind: Kind

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise PlanError(f"Groups.kind: expected one of {get_args(Kind)}, got {self.kind!r}; pick one of them")

    @staticmethod
    def inputs() -> Groups:
        """One group per input unit or channel: dimension 1 of `nn.Linear.weight` and `nn.ConvNd.weight`."""
        return Groups("inputs")

    @staticmethod
    def outputs() -> Groups:
        """One group per output unit or channel: dimension 0."""
        return Groups("outputs")

    @staticmethod
    def filters() -> Groups:
        """One group per (output, input) pair: one kernel of a convolution, one number of a linear layer."""
        return Groups("filters")

    @staticmethod
    def elements() -> Groups:
        """One group per number."""
        return Groups("elements")

    @staticmethod
    def whole() -> Groups:
        """One group: the whole parameter."""
        return Groups("whole")

    @staticmethod
    def positions() -> Groups:
        """One group per position of a locally connected layer (`tying.nn.LocallyConnected2d`): dimension 0.

        Positions are not units: tied positions are a convolution, tied units a narrower layer.
        """
        return Groups("positions")

    def axes(self, dimensions: int) -> tuple[int, ...]:
        """Return the axes along which the groups of a parameter with so many dimensions are counted, ascending."""
        known: dict[Kind, tuple[int, ...]] = {"inputs": (1,), "outputs": (0,), "filters": (0, 1), "whole": ()}
        return known.get("outputs" if self.kind == "positions" else self.kind, tuple(range(dimensions)))

    def shape(self, parameter_shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
        """Return `(G, D)` for a parameter of this shape.

        Raises:
            PlanError: If a parameter of this shape has no such groups (a bias has no inputs).
        """
        shape = tuple(parameter_shape)
        needed = {"inputs": 2, "filters": 2, "outputs": 1, "elements": 0, "whole": 0, "positions": 1}[self.kind]
        if len(shape) < needed:
            raise PlanError(
                f"Groups.{self.kind}(): expected a parameter with at least {needed} dimension(s), got shape {shape}; "
                "use Groups.elements() or Groups.whole() for it"
            )
        total = 1
        for size in shape:
            total *= size
        count = {
            "inputs": lambda: shape[1],
            "outputs": lambda: shape[0],
            "positions": lambda: shape[0],
            "filters": lambda: shape[0] * shape[1],
            "elements": lambda: total,
            "whole": lambda: 1,
        }[self.kind]()
        return count, (total // count if count else 0)

    def read(self, tensor: Tensor) -> Tensor:
        """Return the tensor as `(G, D)`: same dtype and device, a view where strides allow it, differentiable."""
        count, size = self.shape(tensor.shape)
        if self.kind == "inputs":
            tensor = tensor.transpose(0, 1)
        return tensor.reshape(count, size)

    def write(self, matrix: Tensor, parameter_shape: torch.Size | tuple[int, ...]) -> Tensor:
        """Return the `(G, D)` matrix as a parameter of this shape: the inverse of `read`.

        Raises:
            PlanError: If the matrix is not the `(G, D)` of a parameter of this shape.
        """
        shape = tuple(parameter_shape)
        expected = self.shape(shape)
        if tuple(matrix.shape) != expected:
            raise PlanError(
                f"Groups.{self.kind}(): expected a matrix of shape {expected} for a parameter of shape {shape}, "
                f"got {tuple(matrix.shape)}; pass what `read` returned for such a parameter"
            )
        if self.kind == "inputs":
            return matrix.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1).contiguous()
        return matrix.reshape(shape)

    def norms(self, tensor: Tensor) -> Tensor:
        """Return the l2 norm of every group, `(G,)` float64 on the tensor's device, not differentiable.

        As `group_norms` of what `read` gives, without a copy.

        Raises:
            PlanError: If a tensor of this shape has no such groups.

        Example:
            >>> import torch
            >>> Groups.inputs().norms(torch.tensor([[3.0, 0.0], [4.0, 2.0]]))
            tensor([5., 2.], dtype=torch.float64)
        """
        self.shape(tensor.shape)
        return torch.sqrt(squares_anywhere(tensor, self.axes(tensor.dim())))

    def __str__(self) -> str:
        return cast(str, self.kind)


@dataclass(frozen=True)
class Part:
    """A parameter that takes part in joined groups: position i of `axis` belongs to group `labels[i]`, −1 to none.

    Raises:
        PlanError: If one of the three is not what it should be.
    """

    parameter: str
    axis: int
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        labels = tuple(self.labels) if isinstance(self.labels, Iterable) else ()  # pyright: ignore[reportUnnecessaryIsInstance]
        numbers = cast("tuple[object, ...]", (*labels, self.axis))
        whole = all(isinstance(each, (int, np.integer)) and not isinstance(each, bool) for each in numbers)
        if not (isinstance(self.parameter, str) and labels and whole):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(
                f"Part: expected a parameter's name, an axis and whole numbers as labels, got {self.parameter!r}, "
                f'{self.axis!r} and {self.labels!r:.80}; write Part("fc.weight", 1, (0, 1, 2))'
            )
        object.__setattr__(self, "labels", tuple(map(int, labels)))


@dataclass(frozen=True)
class Joined:
    """Groups that lie side by side in several parameters: all that reads one channel is one group.

    A group's numbers are those of all the parts at the positions with its label. Of a channel that several layers
    read, each layer by itself may prune its share and the channel still can't go; joined, it vanishes as one.

    Attributes:
        parts: At least one; one parameter may take part several times, at different positions.
        count: G, the number of groups.

    Raises:
        PlanError: If a group is in no part, or a label is none of 0 … G − 1 and −1.

    Example:
        >>> Joined((Part("left.weight", 1, (0, 1, 2)), Part("right.weight", 1, (0, 1, 2))), 3).count
        3
    """

    parts: tuple[Part, ...]
    count: int

    def __post_init__(self) -> None:
        parts = tuple(self.parts) if isinstance(self.parts, Iterable) else ()  # pyright: ignore[reportUnnecessaryIsInstance]
        if not parts or not all(isinstance(part, Part) for part in parts):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(f"Joined.parts: expected at least one Part, got {self.parts!r:.80}; list them")
        object.__setattr__(self, "parts", parts)
        labels = {label for part in parts for label in part.labels}
        if not labels >= set(range(self.count)) or not labels <= set(range(-1, self.count)):
            raise PlanError(
                f"{self}: expected labels from −1 to {self.count - 1}, each group in some part, got "
                f"{sorted(labels)[:10]}; number the groups from 0 without gaps"
            )

    def __str__(self) -> str:
        return " + ".join(f"{part.parameter}[axis {part.axis}]" for part in self.parts)


def group_norms(matrix: Tensor) -> Tensor:
    """Return the l2 norm of every group of a `(G, D)` matrix, `(G,)` float64, not differentiable.

    Equal groups have norms equal bit for bit, wherever they stand: a penalty would pull them apart otherwise. Squares
    are formed and added up as in `tying.axes.squares`; norms of float32 weights are within 1e-7.

    Example:
        >>> group_norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([5., 0.], dtype=torch.float64)
    """
    return torch.sqrt(squares_anywhere(matrix, (0,)))


def similarity(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how alike the groups of a `(G, D)` matrix are: S_ij = w_i·w_j ÷ max(‖w_i‖², ‖w_j‖²), `(G, G)`.

    1 for equal groups, lower where direction or length differ, 0 for zero groups.

    Source: the clustering of *Learning to Share*, ICLR 2018 (openreview rypT3fb0b).

    Example:
        >>> import numpy as np
        >>> similarity(np.array([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
        array([[1. , 0.5, 0. ],
               [0.5, 1. , 0. ],
               [0. , 0. , 1. ]])
    """
    squares = np.einsum("id,id->i", matrix, matrix)
    return (matrix @ matrix.T) / np.maximum(np.maximum.outer(squares, squares), np.finfo(np.float64).tiny)
