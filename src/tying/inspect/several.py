"""What several checkpoints share: what is equal bit for bit, and how far apart the rest is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from tying import words
from tying.equal import equal_ties
from tying.errors import FileError
from tying.inspect.skipped import Skipped, identity, reasons, unfit
from tying.inspect.table import aligned
from tying.plan import Tie
from tying.store.checkpoint import Entry
from tying.store.state import dtype_name

Place = tuple[str, str]
"""A checkpoint's short name, and a tensor's name in it."""

How = Literal["equal", "transposed", "groups", "zero", "alike", "differs", "other shape", "other dtype", "alone"]


@dataclass(frozen=True)
class Row:
    """What tensors of one or several checkpoints have to do with each other."""

    names: tuple[str, ...]
    """Of the tensors, each once."""
    sources: tuple[str, ...]
    """The checkpoints that have them."""
    how: How
    """"equal", "transposed" and "groups" are bit for bit: whole tensors, two whose outputs are the other's inputs, or
    outputs or inputs that occur more than once. Of one name and not equal: "zero" (all of them), "alike", "differs",
    "other shape", "other dtype". "alone": the name is in one checkpoint."""
    what: str
    """The tie in words, as `a.0.weight[outputs] ~ b.0.weight[outputs]: 18 groups → 12 values`, where it is one."""
    shapes: tuple[tuple[int, ...], ...]
    """Each once."""
    distance: float | None
    """‖a − b‖ ÷ max(‖a‖, ‖b‖) of tensors of one name and shape, the largest over all pairs; 0 for equal ones; None for
    others, or if it is not finite."""
    bytes: int
    """That the checkpoints hold for the tensors, what a file of `tying.save` ties counted once; 0 if another row counts
    them."""
    bytes_left: int
    """With what is equal stored once, packed labels counted."""


@dataclass(frozen=True)
class Sharing:
    """What several checkpoints share; `str()` is a table."""

    sources: Mapping[str, str]
    """The files, by the short names that stand for them."""
    tolerance: float
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors of all checkpoints that were looked at."""
        return sum(row.bytes for row in self.rows)

    @property
    def bytes_left(self) -> int:
        """Bytes of a bundle's tensors, in which what is equal is stored once; labels counted, the header not."""
        return sum(row.bytes_left for row in self.rows)

    @property
    def saved(self) -> int:
        """Bytes that a bundle spares."""
        return self.bytes - self.bytes_left

    def to_json(self) -> str:
        """Return everything as one JSON object, with the totals."""
        totals = {name: getattr(self, name) for name in ("bytes", "bytes_left", "saved")}
        content = {**asdict(self), "sources": dict(self.sources), "totals": totals}
        return json.dumps(content, indent=2, allow_nan=False)

    def __str__(self) -> str:
        return _table(self)


def compare(sources: Mapping[str, str], entries: Sequence[Iterable[Entry]], tolerance: float) -> Sharing:
    """Compare checkpoints, given by short names and in the same order as their tensors.

    Raises:
        FileError: If one of them holds no tensor.
    """
    held: dict[Place, Tensor] = {}
    sizes: dict[Place, int] = {}
    skipped: list[Skipped] = []
    for source, each in zip(sources, entries, strict=True):
        seen: dict[tuple[object, ...], str] = {}
        for name, tensor, size in each:
            reason = unfit(tensor, seen.setdefault(identity(tensor), name), name)
            if reason is None:
                held[source, name], sizes[source, name] = tensor.detach(), size
            else:
                skipped.append(Skipped(f"{source}.{name}", reason))
        if not any(place[0] == source for place in held):
            raise FileError(
                f"{sources[source]}: expected at least one floating-point tensor, got none of {len(seen)} tensors; "
                "pass the checkpoint of a model"
            )
    numbered = {source: str(i) for i, source in enumerate(sources)}  # names may have dots in them
    full = {f"{numbered[source]}.{name}": (source, name) for source, name in held}
    ties = equal_ties({key: held[place] for key, place in full.items()})
    tied: dict[Place, int] = {}
    found: list[tuple[Place, Row]] = []
    for i, tie in enumerate(ties):
        places = [full[member.parameter] for member in tie.members]
        tied.update(dict.fromkeys(places, i))
        total = sum(sizes[place] for place in places)
        found.append((places[0], _of_tie(tie, {place: held[place] for place in places}, total)))
    by_name: dict[str, list[Place]] = {}
    for place in held:
        by_name.setdefault(place[1], []).append(place)
    for places in by_name.values():
        alone = [place for place in places if place not in tied]
        if alone or len({tied[place] for place in places}) > 1:
            counted = sum(sizes[place] for place in alone)
            found.append((places[0], _of_name({place: held[place] for place in places}, counted, tolerance)))
    order = {place: i for i, place in enumerate(held)}
    found.sort(key=lambda entry: order[entry[0]])
    return Sharing(dict(sources), tolerance, tuple(row for _, row in found), tuple(skipped))


def _of_tie(tie: Tie, tensors: Mapping[Place, Tensor], counted: int) -> Row:
    kinds = {member.groups.kind for member in tie.members}
    labels = tie.partition.labels.tolist()
    turned = len(tie.members) > 1 and labels == [*range(tie.partition.classes)] * len(tie.members)
    group = sum(map(_bytes, tensors.values())) // len(tie.partition)
    left = tie.partition.classes * group + math.ceil(tie.partition.label_bits / 8)
    how: How = "equal" if kinds == {"whole"} else "transposed" if turned else "groups"
    members = (f"{source}.{name}[{m.groups}]" for (source, name), m in zip(tensors, tie.members, strict=True))
    what = " ~ ".join(members) + str(tie).removeprefix(" ~ ".join(map(str, tie.members)))
    distance = 0.0 if how == "equal" else _largest_distance(tensors)
    return Row(*_named(tensors), how, what, _shapes(tensors), distance, counted, min(counted, left))


def _of_name(tensors: Mapping[Place, Tensor], counted: int, tolerance: float) -> Row:
    shapes, dtypes = _shapes(tensors), {tensor.dtype for tensor in tensors.values()}
    distance: float | None = None
    how: How
    if len(tensors) == 1:
        how = "alone"
    elif len(shapes) > 1:
        how = "other shape"
    else:
        distance = _largest_distance(tensors)
        alike = distance is not None and distance <= tolerance
        how = "other dtype" if len(dtypes) > 1 else "alike" if alike else "differs"
        if how == "alike" and not any(map(_norm, tensors.values())):
            how = "zero"
    what = ", ".join(sorted(map(dtype_name, dtypes))) if how == "other dtype" else ""
    return Row(*_named(tensors), how, what, shapes, distance, counted, counted)


def _largest_distance(tensors: Mapping[Place, Tensor]) -> float | None:
    """Over all pairs; None unless they are several of one name and shape whose numbers are finite."""
    if len(tensors) < 2 or len({name for _, name in tensors}) > 1 or len(_shapes(tensors)) > 1:
        return None
    largest = max(_distance(a, b) for a, b in combinations(tensors.values(), 2))
    return largest if math.isfinite(largest) else None


def _distance(a: Tensor, b: Tensor) -> float:
    largest = max(_norm(a), _norm(b))
    return _norm(a.to("cpu", torch.float64) - b.to("cpu", torch.float64)) / largest if largest else 0.0


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.to("cpu", torch.float64)))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _named(tensors: Mapping[Place, Tensor]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(dict.fromkeys(name for _, name in tensors)), tuple(dict.fromkeys(source for source, _ in tensors))


def _shapes(tensors: Mapping[Place, Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(dict.fromkeys(tuple(tensor.shape) for tensor in tensors.values()))


_HEADS = ("weight", "in", "shape", "how", "distance", "bytes", "in a bundle")
_MOST_LISTED = 24
"""Of more rows, those that say the usual are one line."""


def _table(sharing: Sharing) -> str:
    lines = [_HEADS, *_lines(sharing)]
    lines.append(("total", "", "", "", "", f"{sharing.bytes:,}", f"{sharing.bytes_left:,}"))
    text = [*(f"{short}: {source}" for short, source in sharing.sources.items()), *aligned(lines, texts=4)]
    saved = words.percent(sharing.saved / sharing.bytes, 1)
    text.append(f"A bundle spares {sharing.saved:,} bytes ({saved}), labels counted, once what is equal is tied.")
    text.append(f"equal, transposed, groups → values: bit for bit. alike: distance ≤ {sharing.tolerance:.3g}.")
    text.append("distance: ‖a − b‖ ÷ max(‖a‖, ‖b‖).")
    if sharing.skipped:
        text.append(f"Not looked at: {reasons(sharing.skipped)}.")
    return "\n".join(text)


def _lines(sharing: Sharing) -> list[tuple[str, ...]]:
    everywhere = tuple(sharing.sources)
    usual = [r for r in sharing.rows if r.how == "equal" and len(r.names) == 1 and r.sources == everywhere]
    if len(sharing.rows) <= _MOST_LISTED or len(usual) < 2:
        return list(map(_line, sharing.rows))
    total, left = (sum(getattr(row, name) for row in usual) for name in ("bytes", "bytes_left"))
    folded = (f"{len(usual)} weights", " ".join(everywhere), "", "equal", "", f"{total:,}", f"{left:,}")
    return [folded, *(_line(row) for row in sharing.rows if row not in usual)]


def _line(row: Row) -> tuple[str, ...]:
    how = "" if row.how == "alone" else row.how
    if row.how == "groups":
        how = row.what.rpartition(": ")[2].removesuffix(", 0 pruned")
    return (
        " ~ ".join(row.names),
        " ".join(row.sources),
        ", ".join("×".join(map(str, shape)) or "1" for shape in row.shapes),
        how,
        "" if row.distance is None or row.how in ("equal", "zero") else f"{row.distance:.2g}",
        f"{row.bytes:,}" if row.bytes else "",
        f"{row.bytes_left:,}" if row.bytes else "",
    )
