"""What is known of a network's sharing: tables, JSON, a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tying import words
from tying.errors import TyingError
from tying.explain.costs import NOTHING, Cost
from tying.explain.equivariance import Equivariance, Shift
from tying.explain.fields import Field, Fields
from tying.explain.layers import Layer
from tying.explain.planes import called, crossed, extent
from tying.inspect.table import aligned

EQUAL = 2e-5
"""Outputs that differ by less, relative to the largest, are printed as equal."""


@dataclass(frozen=True)
class Explanation:
    """What the sharing inside a network saves, who sees whom, how far it is equivariant; `str()` is four tables."""

    model: str
    inputs: tuple[int, ...]
    """The shape of one sample of the first input."""
    layers: tuple[Layer, ...]
    """Those that share, in the order in which they are called."""
    fields: Fields | None
    """None where the model could not be traced."""
    equivariance: tuple[Equivariance, ...]
    """Of the spatial layers: convolutions, pools, resampling."""
    uncounted: tuple[str, ...]
    """Parameters of no layer whose costs are known in closed form."""
    untraced: str | None
    """Why `torch.export` could not follow the model, or None."""
    image: NDArray[np.float64] | None = field(default=None, repr=False, compare=False)
    """The example as a grey picture, where it is an image."""

    @property
    def shared(self) -> Cost:
        """All layers that share, as they are."""
        return sum((layer.shared for layer in self.layers), NOTHING)

    @property
    def local(self) -> Cost:
        """All of them, with the same connections not shared."""
        return sum((layer.local for layer in self.layers), NOTHING)

    @property
    def dense(self) -> Cost:
        """All of them dense."""
        return sum((layer.dense for layer in self.layers), NOTHING)

    @property
    def can_be_drawn(self) -> bool:
        """Whether there are places that see each other."""
        return self.fields is not None and bool(self.fields.layers)

    def to_json(self) -> str:
        """Return everything but the maps of fields and the image as one JSON object, with the totals."""
        content = asdict(self)
        del content["image"]
        for each in (content["fields"] or {"layers": ()})["layers"]:
            del each["seen"], each["reaches"]
        totals = {name: asdict(getattr(self, name)) for name in ("shared", "local", "dense")}
        return json.dumps({**content, "totals": totals}, indent=2, allow_nan=False)

    def draw(self, path: str | Path) -> Path:
        """Write the picture of who sees whom, as the suffix of the path says: `.png`, `.svg` or `.pdf`.

        Raises:
            TyingError: If there is nothing to draw, matplotlib is not installed, or the path can't be written.
        """
        from tying.explain.picture import draw  # matplotlib is slow to import, and an extra

        if self.fields is None or not self.fields.layers:
            raise TyingError(
                f"{self.model}: expected a model whose places see each other, got "
                f"{self.untraced or 'no layer that connects places'}; there is nothing to draw"
            )
        return draw(self.fields, self.image, path)

    def __str__(self) -> str:
        parts = [_stored(self), _computed(self), _seen(self.fields), _moved(self.equivariance)]
        if self.uncounted:
            parts.append(f"Not counted, no closed form is known here: {', '.join(self.uncounted)}.")
        if self.untraced:
            parts.append(f"Who sees whom is not known: {self.untraced}.")
        return "\n\n".join(part for part in parts if part)


def _stored(of: Explanation) -> str:
    if not of.layers:
        return f"{of.model}: no layer shares."
    heads = ("layer", "shared over", "values", "not shared", "dense", "bytes", "not shared", "dense")
    lines: list[tuple[str, ...]] = [heads]
    for layer in of.layers:
        name = " ~ ".join((layer.name or of.model, *layer.also))
        lines.append((name, layer.over, *_three("values", layer), *_three("bytes", layer)))
    lines.append(("total", "", *_three("values", of), *_three("bytes", of)))
    note = "not shared: a kernel of its own at each position, its taps on padding too."
    return "\n".join(["What is stored:", *aligned(lines, texts=2), note])


def _three(what: str, of: Layer | Explanation) -> list[str]:
    show: Any = words.size if what == "bytes" else words.count
    return [show(getattr(cost, what)) for cost in (of.shared, of.local, of.dense)]


def _computed(of: Explanation) -> str:
    if not of.layers:
        return ""
    heads = ("layer", "connections", "multiply-adds", "not shared", "dense", "operations", "not shared", "dense")
    lines: list[tuple[str, ...]] = [heads]
    for layer in of.layers:
        numbers = (*_three("multiply_adds", layer), *_three("operations", layer))
        lines.append((layer.name or of.model, words.count(layer.connections), *numbers))
    connections = words.count(sum(layer.connections for layer in of.layers))
    lines.append(("total", connections, *_three("multiply_adds", of), *_three("operations", of)))
    note = "operations: multiplications and additions. Products with padding are formed, but connect nothing."
    return "\n".join(["What is computed, for one sample:", *aligned(lines, texts=1), note])


def _seen(fields: Fields | None) -> str:
    if fields is None or not fields.layers:
        return ""
    heads = ("layer", "places", "sees of the input", "within", "an input reaches", "within")
    lines = [heads, *map(_field_line, fields.layers)]
    text = [
        f"Who sees whom, of {crossed(fields.input_shape)} inputs (the middle of the layer, the middle of the input):",
        *aligned(lines, texts=1),
    ]
    if fields.inexact:
        text.append(f"At most, since nothing is known of: {', '.join(fields.inexact)}.")
    return "\n".join(text)


def _field_line(each: Field) -> tuple[str, ...]:
    seen, reached = words.count(each.sees), words.count(each.reached)
    name = called(each.name, each.kind, each.call)
    return name, crossed(each.shape), seen, extent(each.sees_box), reached, extent(each.reached_box)


def _moved(layers: Sequence[Equivariance]) -> str:
    if not layers:
        return ""
    most = max((shift.by for layer in layers for shift in layer.alone), default=0)
    each_part = ("interior", "border")
    lines = [("layer", "broken by", "stride", *each_part, "between", "border", "from input", *each_part)]
    lines += [
        (
            called(each.name, each.kind, each.call),
            ", ".join(each.broken_by) or "nothing",
            crossed([f"{s:g}" for s in dict.fromkeys(each.stride)]),
            *_worst(each.alone),
            *_worst(each.alone, whole=False),
            crossed(list(dict.fromkeys(each.period))),
            *_worst(each.through),
        )
        for each in layers
    ]
    return "\n".join(
        [
            f"How far outputs move with the input, shifted by 1 to {most}:",
            *aligned(lines, texts=2),
            "The largest difference, as a part of the largest output, where no padding is seen (interior) and where it",
            "is (border): of a layer whose own input moves by whole strides; by parts of them (between: interior, and",
            "border); and when the input of the network moves by multiples of what stands under from input.",
        ]
    )


def _worst(shifts: Sequence[Shift], *, whole: bool = True) -> tuple[str, str]:
    """The largest differences, in the interior and at the border, of shifts by whole places or of the others."""
    chosen = [shift for shift in shifts if shift.whole == whole]

    def said(values: list[float]) -> str:
        return "–" if not values else "equal" if max(values) <= EQUAL else words.percent(max(values), 0)

    return (
        said([shift.interior for shift in chosen if shift.interior is not None]),
        said([shift.border for shift in chosen if shift.border is not None]),
    )
