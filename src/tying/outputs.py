"""What a model gives for inputs: as a flat list of tensors, on random inputs too; and how far two are apart."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def tensors_in(output: object) -> list[Tensor]:
    """Return the tensors of an output, whatever holds them, as a flat list; numbers as tensors.

    Raises:
        TypeError: If there is none, or something in it that can't be compared.
    """
    leaves = list(_leaves(output))
    unknown = [leaf for leaf in leaves if not isinstance(leaf, (Tensor, bool, int, float, complex, str, type(None)))]
    tensors = [leaf if isinstance(leaf, Tensor) else torch.tensor(leaf) for leaf in leaves if _counts(leaf)]
    if unknown or not tensors:
        found = type(unknown[0] if unknown else output).__name__
        raise TypeError(
            f"an output of {found}, whose tensors can't be found; return tensors, in tuples or dictionaries"
        )
    return tensors


def tensors_inside(output: object) -> list[Tensor]:
    """Return the tensors of what a module inside of a model gives, without a word about the rest."""
    return [leaf for leaf in _leaves(output) if isinstance(leaf, Tensor)]


def difference(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Return the largest relative difference of two lists of tensors; inf where shapes, NaN or infinity differ.

    Every number counts relative to itself, but to no less than most are: a tenth of the distinct numbers of its tensor
    is smaller. So what is added to mask an output does not hide what happens to the others.
    """
    if [x.shape for x in expected] != [x.shape for x in got]:
        return float("inf")
    return max((_difference(_real(a), _real(b)) for a, b in zip(expected, got, strict=True)), default=0.0)


def random_like(inputs: Sequence[Tensor], batch: int | None = None, *, scale: float = 1, seed: int = 0) -> list[Tensor]:
    """Return random inputs, the same at every call, in the given ones' dtypes and on their devices.

    Normal numbers times the scale; coins for booleans; integers between the given ones' extremes. With `batch`, inputs
    whose first dimension is that of the first input get so many samples.
    """
    generator = torch.Generator().manual_seed(seed)
    result: list[Tensor] = []
    for x in inputs:
        batched = batch is not None and x.dim() > 0 and inputs[0].dim() > 0 and len(x) == len(inputs[0])
        shape = (batch, *x.shape[1:]) if batched else tuple(x.shape)
        if x.is_floating_point() or x.is_complex():
            dtype = torch.complex128 if x.is_complex() else torch.float64
            new = scale * torch.randn(cast("tuple[int, ...]", shape), generator=generator, dtype=dtype)
        elif x.dtype == torch.bool:
            new = torch.rand(cast("tuple[int, ...]", shape), generator=generator) < 0.5
        else:
            low, high = (int(x.min()), int(x.max())) if x.numel() else (0, 0)
            new = torch.randint(low, high + 1, cast("tuple[int, ...]", shape), generator=generator)
        result.append(new.to(x.device, x.dtype))
    return result


@contextmanager
def same_random_numbers(model: nn.Module) -> Generator[None, None, None]:
    """Draw the same random numbers at every entry; the generators of the CPU and the model's GPUs stay as they are."""
    gpus = sorted({t.device.index for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=gpus):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[index] for index in gpus)):
            generator.manual_seed(0)
        yield


def _leaves(output: object) -> Iterator[object]:
    """Go through what a tree holds, also in a mapping or a sequence that torch does not know."""
    for leaf in pytree.tree_leaves(cast(Any, output)):
        if isinstance(leaf, Mapping):
            yield from _leaves(list(cast("Mapping[Any, Any]", leaf).values()))
        elif isinstance(leaf, (tuple, list)):
            yield from _leaves(list(cast("Sequence[Any]", leaf)))
        else:
            yield leaf


def _counts(leaf: object) -> bool:
    return isinstance(leaf, (Tensor, bool, int, float, complex))


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.to(torch.complex128)) if x.is_complex() else x.to(torch.float64)


def _difference(a: Tensor, b: Tensor) -> float:
    apart = ~((a == b) | (a.isnan() & b.isnan()))
    if not bool(apart.any()):
        return 0.0
    sizes = np.sort(a[a.isfinite() & (a != 0)].abs().detach().cpu().numpy())  # faster than torch's unique
    sizes = np.concatenate([sizes[:1], sizes[1:][sizes[1:] != sizes[:-1]]])
    least = float(sizes[len(sizes) // 10]) if len(sizes) else 1e-300
    found = (a - b)[apart].abs() / a[apart].abs().clamp(min=least)
    return float(found.nan_to_num(nan=float("inf")).max())
