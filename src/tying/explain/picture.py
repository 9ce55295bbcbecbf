"""The picture: from above, what the place in the middle of a layer sees; from below, what an input reaches."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from tying.errors import TyingError
from tying.explain.fields import Field, Fields
from tying.explain.planes import box, called, crossed, extent
from tying.files.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tying.report.pictures.style import Theme

MOST_PANELS, MOST_LINES = 6, 12
"""Layers in a picture: as panels of images, as lines of signals and sequences."""


ABOVE = "From above: what the place in the middle of a layer sees of the input"
BELOW = "From below: what of a layer the middle of the input (+) reaches"


def draw(fields: Fields, image: NDArray[np.float64] | None, path: str | Path) -> Path:
    """Write the picture of who sees whom, over the example where it is an image.

    Raises:
        TyingError: If matplotlib is not installed, or the path can't be written.
    """
    target, kind = check_place(path)
    from tying.report.pictures.style import drawn

    if len(fields.input_shape) > 1:
        chosen = _chosen(fields.layers, MOST_PANELS)
        content = drawn((max(2.0 * len(chosen), 6.0), 5.6), kind, _panels(fields, chosen, image))
    else:
        chosen = _chosen(fields.layers, MOST_LINES)
        content = drawn((10, 1.6 + 0.32 * len(chosen)), kind, _lines(fields, chosen))
    try:
        write_atomically(target, content)
    except OSError as error:
        raise TyingError(f"path: expected a place to write a file, got {path} ({error}); choose another one") from error
    return target


def check_place(path: str | Path) -> tuple[Path, str]:
    """Return the path of a picture and its kind, "png", "svg" or "pdf", if one can be drawn there.

    Raises:
        TyingError: If the suffix is another one, the folder is not there, or matplotlib is not installed.
    """
    target = Path(path)
    kind = target.suffix.removeprefix(".")
    if kind not in ("png", "svg", "pdf"):
        raise TyingError(f"path: expected a name that ends with .png, .svg or .pdf, got {target.name}; add the suffix")
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise TyingError(f"path: expected a place to write a file, got {path}; choose one in a folder that is there")
    try:
        importlib.import_module("tying.report.pictures.style")
    except ImportError as error:
        raise TyingError(
            f'draw: expected matplotlib to be installed, got {error}; run: pip install "tying[report]"'
        ) from error
    return target, kind


def _chosen(layers: Sequence[Field], most: int) -> list[Field]:
    """Leave out layers that show what the one before shows, and then as many as needed, evenly, from the first on."""
    if any(len(each.shape) > 1 for each in layers):  # of what follows when the places are gone, the first
        ends = [
            i for i, each in enumerate(layers) if len(each.shape) > 1 or not any(len(e.shape) < 2 for e in layers[:i])
        ]
        layers = [layers[i] for i in ends]
    telling = [
        each
        for i, each in enumerate(layers)
        if not i or (each.shape, each.sees) != (layers[i - 1].shape, layers[i - 1].sees)
    ]
    if len(telling) <= most:
        return telling
    return [telling[round(i * (len(telling) - 1) / (most - 1))] for i in range(most)]


def _panels(
    fields: Fields, layers: Sequence[Field], image: NDArray[np.float64] | None
) -> Callable[[Figure, Theme], None]:
    def put(figure: Figure, theme: Theme) -> None:
        upper, lower = cast(Any, figure.subfigures(2, 1))
        for each, title in ((upper, ABOVE), (lower, BELOW)):
            each.suptitle(title + "\n", ha="left", x=0.005, fontsize=11, weight="bold")
        for subfigure, show in ((upper, _from_above), (lower, _from_below)):
            panels = subfigure.subplots(1, len(layers), squeeze=False)[0]
            for panel, layer in zip(panels, layers, strict=True):
                show(panel, theme, fields, layer, image)

    return put


def _from_above(panel: Axes, theme: Theme, fields: Fields, layer: Field, image: NDArray[np.float64] | None) -> None:
    seen = _flat(layer.seen)
    if image is not None and image.shape == seen.shape:
        low, high = float(image.min()), float(image.max())
        panel.imshow(image, cmap="gray", vmin=low - 3.0 * (high - low), vmax=high)  # pale: the field stands out
    else:
        panel.imshow(np.zeros(seen.shape), cmap="gray_r", vmin=0, vmax=1)
    _overlay(panel, seen, theme.series[0], 0.6)
    (top, bottom), (left, right) = box(torch.as_tensor(seen))
    around = [left, right, right, left, left], [top, top, bottom, bottom, top]
    outline = (np.array(line) - 0.5 for line in around)
    panel.plot(*outline, color=theme.series[0], linewidth=1.6, clip_on=False, zorder=5)
    height, width = fields.input_place[-2:]  # the place that reaches, in the lower line
    panel.plot([width], [height], marker="+", markersize=7, markeredgewidth=1.6, color=theme.series[1], zorder=6)
    _frame(panel, theme)
    panel.set_title(f"{_called(layer)}\n{extent(layer.sees_box)} of {crossed(fields.input_shape)}")


def _from_below(panel: Axes, theme: Theme, fields: Fields, layer: Field, image: NDArray[np.float64] | None) -> None:
    reached = _flat(layer.reaches)
    panel.imshow(np.zeros(reached.shape), cmap="gray_r", vmin=0, vmax=1)
    _overlay(panel, reached, theme.series[1], 0.9)
    height, width = reached.shape
    if max(height, width) <= 40:  # finer lines would be all that one sees
        for at in range(1, width):
            panel.axvline(at - 0.5, color=theme.grid, linewidth=0.5)
        for at in range(1, height):
            panel.axhline(at - 0.5, color=theme.grid, linewidth=0.5)
    _frame(panel, theme)
    panel.set_title(f"{_called(layer)}\n{extent(layer.reached_box)} of {crossed(layer.shape)}")


def _lines(fields: Fields, layers: Sequence[Field]) -> Callable[[Figure, Theme], None]:
    """Signals, sequences, plain vectors: a line for every layer, the input's width."""

    def put(figure: Figure, theme: Theme) -> None:
        above, below = figure.subplots(1, 2, sharey=True)
        length = fields.input_shape[0]
        for line, layer in enumerate(layers, 1):
            _strip(above, theme, line, layer.seen, length, theme.series[0])
            _strip(below, theme, line, layer.reaches.ravel(), length, theme.series[1])
        middle = np.zeros(length, dtype=bool)
        middle[fields.input_place[0]] = True
        _strip(above, theme, 0, np.zeros(length, dtype=bool), length, theme.muted)
        _strip(below, theme, 0, middle, length, theme.ink)
        above.set_title("From above: what the middle of a layer\nsees of the input")
        below.set_title("From below: what of a layer the middle\nof the input reaches")
        above.set_yticks(range(len(layers) + 1), ["input", *map(_called, layers)])
        for panel in (above, below):
            panel.set_xlim(0, length)
            panel.set_xlabel("place of the input")
            panel.spines[["left", "bottom"]].set_visible(False)
            panel.tick_params(length=0)

    return put


def _strip(panel: Axes, theme: Theme, line: int, marks: NDArray[np.bool_], length: int, colour: str) -> None:
    """One layer as a line of cells, stretched to the width of the input."""
    edges = np.linspace(0, length, len(marks) + 1)
    border = {"edgecolor": theme.paper, "linewidth": 0.6} if len(marks) <= 80 else {}
    for marked, fill in ((False, theme.grid), (True, colour)):
        cells = [(edges[i], edges[i + 1] - edges[i]) for i in np.flatnonzero(marks == marked)]
        panel.broken_barh(cells, (line - 0.4, 0.8), facecolor=fill, **border)  # pyright: ignore[reportArgumentType]


def _flat(marks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What is drawn of more or fewer than two dimensions: the middle of a volume, a vector in several lines."""
    while marks.ndim > 2:
        marks = marks[marks.shape[0] // 2]
    if marks.ndim == 2:
        return marks
    height = max(d for d in range(1, int(np.sqrt(marks.size)) + 1) if marks.size % d == 0)
    return marks.reshape(height, -1)


def _overlay(panel: Axes, marks: NDArray[np.bool_], colour: str, alpha: float) -> None:
    from matplotlib.colors import to_rgb

    layer = np.zeros((*marks.shape, 4))
    layer[..., :3] = to_rgb(colour)
    layer[..., 3] = marks * alpha
    panel.imshow(layer, interpolation="nearest")


def _frame(panel: Axes, theme: Theme) -> None:
    panel.set_xticks([])
    panel.set_yticks([])
    for spine in panel.spines.values():
        spine.set_visible(True)
        spine.set_color(theme.muted)


def _called(layer: Field) -> str:
    name = called(layer.name, layer.kind, layer.call)
    return f"{name} · {layer.kind}" if layer.name else name
