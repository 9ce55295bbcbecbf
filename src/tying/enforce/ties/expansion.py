"""A weight computed at every read from values that are stored once elsewhere: the parametrization behind ties."""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tying.errors import TieError
from tying.groups import Groups
from tying.plan import Partition

Gradient = Literal["sum", "mean"]


class AssignmentError(TieError, NotImplementedError):
    """A weight is assigned that does not by itself say what is stored."""


class Stage(nn.Module):
    """One reading of a weight: its groups are the labels' values, pruned ones zero.

    `(K, D)` values, or a tensor that `source` reads as such, become a weight of `shape`. The labels are a buffer, so
    that a state dict has them; without labels group i is value i. The gradient of a value is the sum of its groups'
    gradients; `sizes`, `(K,)`, divides it, for their mean.
    """

    labels: Tensor | None
    sizes: Tensor | None

    def __init__(
        self,
        groups: Groups,
        labels: NDArray[np.int64],
        classes: int,
        shape: tuple[int, ...],
        *,
        source: tuple[Groups, tuple[int, ...]] | None = None,
        sizes: NDArray[np.int64] | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.groups, self.classes, self.shape, self.source = groups, classes, shape, source
        in_order = source is not None and np.array_equal(labels, np.arange(classes))
        self.register_buffer("labels", None if in_order else torch.tensor(labels, device=device))
        self.register_buffer("sizes", None if sizes is None else torch.tensor(np.maximum(sizes, 1), device=device))

    @property
    def partition(self) -> Partition:
        """The labels, numbered by first occurrence."""
        return Partition(np.arange(self.classes) if self.labels is None else self.labels.cpu().numpy())

    @property
    def complete(self) -> bool:
        """Whether every value is in some group: then the weight says what is stored."""
        return self.partition.classes == self.classes

    def forward(self, stored: Tensor) -> Tensor:
        """Return the weight."""
        values = stored if self.source is None else self.source[0].read(stored)
        if self.sizes is not None:
            values = _divide_gradient(values, self.sizes[:, None])
        if self.labels is not None:
            index = self.labels.remainder(self.classes + 1)  # pruned groups read the zeros, which come last
            values = torch.cat([values, values.new_zeros(1, values.shape[1])]).index_select(0, index)
        elif self.groups.kind == "inputs":  # as `Groups.write`, without its copy
            return values.reshape(self.shape[1], self.shape[0], *self.shape[2:]).transpose(0, 1)
        return self.groups.write(values, self.shape)

    def inverse(self, weight: Tensor) -> Tensor:
        """Return what to store for a complete weight: the mean of each label's groups, summed in float64."""
        matrix = self.groups.read(weight)
        if self.labels is None:
            values = matrix.clone()  # what is assigned stays the user's
        else:
            kept = self.labels >= 0
            wide = torch.promote_types(matrix.dtype, torch.float64)
            summed = torch.zeros(self.classes, matrix.shape[1], dtype=wide, device=matrix.device)
            summed.index_add_(0, self.labels[kept], matrix[kept].to(summed.dtype))
            counts = torch.bincount(self.labels[kept], minlength=self.classes)
            values = (summed / counts[:, None]).to(matrix.dtype)
        return values if self.source is None else self.source[0].write(values, self.source[1])

    def extra_repr(self) -> str:
        """Say what `print` shows."""
        return f"{self.groups}, {self.classes} values → {self.groups.shape(self.shape)[0]} groups"


class Expansion(nn.Module):
    """The parametrization: stored values → weight, through one stage or two (inputs, then outputs of what is left).

    `name` is the weight's, for errors.
    """

    def __init__(self, name: str, *stages: Stage) -> None:
        super().__init__()
        self.name = name
        self.stages = nn.ModuleList(stages)
        self._writes: tuple[Tensor, int] | None = None

    def each_stage(self) -> list[Stage]:
        """Return the stages, the one next to the weight first."""
        return [cast(Stage, stage) for stage in self.stages]

    def forward(self, stored: Tensor) -> Tensor:
        """Return the weight.

        Raises:
            AssignmentError: If the weight that was returned the last time was written to, which changes nothing that is
                stored.
        """
        if torch.compiler.is_compiling() or cast(Any, torch.jit).is_tracing():
            return self._expand(stored)
        if self._writes is not None and self._writes[0]._version != self._writes[1]:
            self._writes = None
            raise AssignmentError(
                f"{self.name}: expected to be assigned (module.weight = …), as it is computed from what its tie "
                "stores, got a write in place, which is lost; assign it, set the stored values, or untie_ first"
            )
        # without gradients a view of a parameter can still claim one, which hooks stumble over
        weight = self._expand(stored if torch.is_grad_enabled() else stored.detach())
        self._writes = _writes_to(weight, stored)
        return weight

    def _expand(self, stored: Tensor) -> Tensor:
        for stage in reversed(self.each_stage()):
            stored = stage(stored)
        return stored

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_writes": None}

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return what to store for a weight that is assigned.

        Raises:
            AssignmentError: If other weights hold values that this one has not.
        """
        for stage in self.each_stage():
            if not stage.complete:
                raise AssignmentError(
                    f"{self.name}: expected a weight that holds all {stage.classes} values of its tie, got one of "
                    f"{stage.partition.classes}; set the stored values instead, or call untie_ first"
                )
            weight = stage.inverse(weight)
        return weight


def _writes_to(weight: Tensor, stored: Tensor) -> tuple[Tensor, int] | None:
    """A counter of what is written to the weight from now on, and its count; None where writes reach what is stored.

    A detached tensor counts together with the one that it comes from, and goes on when its memory is given back.
    """
    try:
        if weight.is_inference() or weight.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr():
            return None
        counter = weight.detach()
        counter.data = counter.new_empty(0)
    except RuntimeError:  # inside a transform of torch.func, or no storage: nobody initialises weights there
        return None
    return counter, counter._version


def _divide_gradient(values: Tensor, sizes: Tensor) -> Tensor:
    """The same values, whose gradients are divided."""
    if torch.compiler.is_compiling():  # which warns of functions of one's own
        held = values.detach()
        return held + (values - held) / sizes.to(values.dtype)
    return cast(Tensor, _DividedGradient.apply(values, sizes))


class _DividedGradient(torch.autograd.Function):
    """The identity, whose gradient is divided by a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, sizes: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (sizes,) = ctx.saved_tensors
        return gradient / sizes.to(gradient.dtype), None
