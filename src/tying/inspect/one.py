"""What a checkpoint could give: groups that are zero or equal already, and what removing and tying them would save."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tying import words
from tying.errors import FileError
from tying.files.packing import bits_for
from tying.groups import Groups
from tying.inspect.skipped import Skipped, identity, reasons, unfit
from tying.inspect.table import aligned
from tying.store.checkpoint import Entry
from tying.store.state import dtype_name

MOST_COMPARED = 16_384
"""Of more input groups than this, an even sample is compared."""

_PROJECTED, _BLOCK = 32, 256

_SLACK = 1e-5
"""What rounding may add to a squared relative distance of projections, with room: they only choose candidates."""


@dataclass(frozen=True)
class Findings:
    """What one weight could give. Groups are counted; inputs along dimension 1, outputs along dimension 0."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    inputs: int
    zero_inputs: int
    alike_inputs: int
    """Non-zero inputs that could take the value of another one: kept inputs − distinct values."""
    compared: int
    """Non-zero inputs that were compared; fewer than there are where `sampled`."""
    outputs: int
    zero_outputs: int
    values: int
    values_left: int
    """Numbers that remain: distinct inputs × non-zero outputs × kernel."""
    bytes: int
    """Of the weight in the checkpoint: fewer than its numbers have where ties are stored once already."""
    bytes_left: int
    """Bytes of the numbers that remain and of the packed labels; never more than `bytes`."""

    @property
    def sampled(self) -> bool:
        """Whether only a sample of the inputs was compared; `alike_inputs` counts within it."""
        return self.compared < self.inputs - self.zero_inputs


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint could give; `str()` is a table.

    It counts what lies in the values, and trains nothing: how accuracy bears it is for `discover`, `compact` and
    `measure` to say.
    """

    source: str
    support: float
    tolerance: float
    findings: tuple[Findings, ...]
    skipped: tuple[Skipped, ...]

    @property
    def values(self) -> int:
        """Numbers in all weights that were looked at."""
        return sum(found.values for found in self.findings)

    @property
    def values_left(self) -> int:
        """Numbers that would remain."""
        return sum(found.values_left for found in self.findings)

    @property
    def bytes(self) -> int:
        """Bytes of all weights that were looked at."""
        return sum(found.bytes for found in self.findings)

    @property
    def bytes_left(self) -> int:
        """Bytes that would remain, packed labels counted."""
        return sum(found.bytes_left for found in self.findings)

    def to_json(self) -> str:
        """Return everything as one JSON object, with the totals."""
        totals = {name: getattr(self, name) for name in ("values", "values_left", "bytes", "bytes_left")}
        return json.dumps({**asdict(self), "totals": totals}, indent=2, allow_nan=False)

    def __str__(self) -> str:
        return _table(self)


def look(label: str, entries: Iterable[Entry], support: float, tolerance: float) -> Inspection:
    """Look into one checkpoint, one tensor after another.

    Raises:
        FileError: If it holds no weight.
    """
    findings: list[Findings] = []
    skipped: list[Skipped] = []
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor, size in entries:
        first = seen.setdefault(identity(tensor), name)
        reason = unfit(tensor, first, name, dimensions=2) or _not_finite(tensor)
        if reason is None:
            findings.append(_look(name, tensor.detach(), size, support, tolerance))
        else:
            skipped.append(Skipped(name, reason))
    if not findings:
        raise FileError(
            f"{label}: expected at least one floating-point tensor of two or more dimensions, got none of "
            f"{len(skipped)} tensors; pass the checkpoint of a model"
        )
    return Inspection(label, support, tolerance, tuple(findings), tuple(skipped))


def _not_finite(tensor: Tensor) -> str | None:
    wrong = tensor.numel() - int(torch.isfinite(_float(tensor)).sum())
    return f"{wrong:,} of its numbers are NaN or infinite" if wrong else None


def _float(tensor: Tensor) -> Tensor:
    """At least 32 bit: in 16, norms create false equalities."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _look(name: str, tensor: Tensor, size: int, support: float, tolerance: float) -> Findings:
    weight = _float(tensor)
    kept_outputs = _kept(Groups.outputs().norms(weight), support)
    inputs = Groups.inputs().read(weight)
    norms = Groups.inputs().norms(weight).cpu().numpy()
    kept = np.flatnonzero(_kept(torch.as_tensor(norms), support))
    compared = kept
    if len(kept) > MOST_COMPARED:
        compared = kept[np.linspace(0, len(kept) - 1, MOST_COMPARED).round().astype(np.int64)]
    alike = len(compared) - _distinct(inputs, compared, norms, tolerance)
    distinct = len(kept) - alike
    left = distinct * int(kept_outputs.sum()) * math.prod(tensor.shape[2:])
    bits = bits_for(distinct + (len(kept) < len(inputs))) if distinct < len(inputs) else 0
    return Findings(
        name=name,
        shape=tuple(tensor.shape),
        dtype=dtype_name(tensor.dtype),
        inputs=len(inputs),
        zero_inputs=len(inputs) - len(kept),
        alike_inputs=alike,
        compared=len(compared),
        outputs=tensor.shape[0],
        zero_outputs=tensor.shape[0] - int(kept_outputs.sum()),
        values=tensor.numel(),
        values_left=left,
        bytes=size,
        bytes_left=min(size, left * tensor.element_size() + math.ceil(len(inputs) * bits / 8)),
    )


def _kept(norms: Tensor, support: float) -> Tensor:
    return norms > support * norms.max()


def _distinct(groups: Tensor, chosen: NDArray[np.int64], norms: NDArray[np.float64], tolerance: float) -> int:
    """Count the groups that stand for themselves: down the norms, each joins the first that it is like.

    The distance after an orthogonal projection to few dimensions is never the larger: it spares nearly all full
    distances, and changes no answer.
    """
    order = chosen[np.argsort(-norms[chosen], kind="stable")]
    ordered = groups[torch.as_tensor(order, device=groups.device)]
    sizes = norms[order]
    shadows = _project(ordered / max(float(sizes.max(initial=0.0)), 1e-300))
    squares = np.square(shadows).sum(axis=1)
    free = np.ones(len(order), dtype=bool)
    distinct = 0
    for start in range(0, len(order), _BLOCK):
        block = slice(start, start + _BLOCK)
        apart = squares[block, None] + squares[None] - 2 * shadows[block] @ shadows.T
        close = apart <= (tolerance**2 + _SLACK) * np.square(sizes[block, None] / sizes[0])
        for leader in range(start, min(start + _BLOCK, len(order))):
            if not free[leader]:
                continue
            distinct += 1
            free[leader] = False
            near = np.flatnonzero(close[leader - start] & free)
            if len(near):
                rest = ordered[torch.as_tensor(near, device=groups.device)] - ordered[leader]
                far = torch.linalg.vector_norm(rest, dim=1, dtype=torch.float64).cpu().numpy()
                free[near[far <= tolerance * sizes[leader]]] = False
    return distinct


def _project(groups: Tensor) -> NDArray[np.float64]:
    """The groups in few dimensions, no two farther apart than they are: `(G, D)` → `(G, ≤ 32)`."""
    size = groups.shape[1]
    if size > _PROJECTED:
        noise = np.random.default_rng(0).normal(size=(size, _PROJECTED))
        groups = groups @ torch.as_tensor(np.linalg.qr(noise)[0], dtype=groups.dtype, device=groups.device)
    return groups.cpu().double().numpy()


_HEADS = ("weight", "shape", "inputs", "zero", "alike", "outputs", "zero", "values", "left", "smaller")


def _table(inspection: Inspection) -> str:
    lines = [_HEADS, *map(_line, inspection.findings)]
    lines.append(("total", *[""] * 6, f"{inspection.values:,}", f"{inspection.values_left:,}", _times(inspection)))
    text = [inspection.source, *aligned(lines, texts=2)]
    text.append(f"zero: norm ≤ {inspection.support:.3g} of the weight's largest.")
    text.append(f"alike: distance to another input ≤ {inspection.tolerance:.3g} of that one's norm.")
    text.append(
        "smaller: in bytes, labels counted. Nothing was trained or removed: compact, then measure the accuracy."
    )
    sampled = [found.name for found in inspection.findings if found.sampled]
    if sampled:
        text.append(f"Of {', '.join(sampled)} an even sample of {MOST_COMPARED:,} inputs was compared.")
    if inspection.skipped:
        text.append(f"Not looked at: {reasons(inspection.skipped)}.")
    return "\n".join(text)


def _line(found: Findings) -> tuple[str, ...]:
    return (
        found.name,
        "×".join(map(str, found.shape)),
        f"{found.inputs:,}",
        f"{found.zero_inputs:,}",
        f"{found.alike_inputs:,}" + (" of a sample" if found.sampled else ""),
        f"{found.outputs:,}",
        f"{found.zero_outputs:,}",
        f"{found.values:,}",
        f"{found.values_left:,}",
        _times(found),
    )


def _times(sizes: Findings | Inspection) -> str:
    return words.times(words.ratio(sizes.bytes, sizes.bytes_left)) if sizes.bytes_left else "all"
