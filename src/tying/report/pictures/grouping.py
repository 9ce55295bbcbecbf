"""The map: which groups share a value, on the pixel grid of the input where there is one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from tying.report.data import Layer
from tying.report.pictures.colours import Colour, ink_on, label_colours
from tying.report.pictures.style import Picture, Theme, picture

PRUNED = -1
ABSENT = -2
"""A cell that fills up the last line and stands for no group."""

NUMBERED = 32
"""Cells carry the number of their label on grids up to this many cells wide: colour is never the only sign."""


def draw_grouping(layer: Layer) -> Picture:
    """Return the map of a layer's groups: pruned hatched, groups of one label in one colour, the alone left plain."""
    panels = _panels(layer)
    _, height, width = panels.shape
    scale = min(0.5, 6.4 / (width * min(len(panels), 3)))
    across = min(len(panels), 3)
    down = math.ceil(len(panels) / across)
    size = (
        max(4.2, width * scale * across + 0.5),
        height * scale * down + 0.5 + 0.3 * (down if len(panels) > 1 else 0),
    )

    def draw(figure: Figure, theme: Theme) -> None:
        colours = _colours(panels)
        for index, cells in enumerate(panels):
            axes = figure.add_subplot(down, across, index + 1)
            _draw_cells(axes, cells, colours, theme, scale)
            if len(panels) > 1:
                axes.set_title(f"channel {index + 1}")

    return picture(size, _alt(layer), draw)


def _panels(layer: Layer) -> NDArray[np.int64]:
    """The labels as `(channels, height, width)`; without a grid, in the order of the groups, line after line."""
    labels = np.asarray(layer.labels, dtype=np.int64)
    if layer.grid is not None:
        return labels.reshape((1,) * (3 - len(layer.grid)) + tuple(layer.grid))
    width = min(len(labels), max(16, math.ceil(math.sqrt(2 * len(labels)))))
    height = math.ceil(len(labels) / width)
    cells = np.full(height * width, ABSENT, dtype=np.int64)
    cells[: len(labels)] = labels
    return cells.reshape(1, height, width)


def _colours(panels: NDArray[np.int64]) -> dict[int, Colour]:
    sizes = Counter(panels.flatten().tolist())
    shared = [label for label, count in sizes.items() if label >= 0 and count > 1]
    touching = [
        pair
        for one, other in ((panels[:, :, :-1], panels[:, :, 1:]), (panels[:, :-1], panels[:, 1:]))
        for pair in zip(one.flatten().tolist(), other.flatten().tolist(), strict=True)
    ]
    return label_colours(shared, touching)


def _draw_cells(axes: Axes, cells: NDArray[np.int64], colours: dict[int, Colour], theme: Theme, scale: float) -> None:
    height, width = cells.shape
    plain = {PRUNED: to_rgb(theme.pruned), ABSENT: to_rgb(theme.paper)}
    image = np.array([[colours.get(int(c), plain.get(int(c), to_rgb(theme.alone))) for c in line] for line in cells])
    axes.imshow(image, interpolation="nearest", extent=(0, width, height, 0))
    for bottom, start, stop in _pruned_runs(cells):
        axes.add_patch(Rectangle((start, bottom), stop - start, 1, fill=False, hatch="////", linewidth=0))
    axes.add_collection(LineCollection(_borders(cells), colors=theme.ink, linewidths=0.7, capstyle="projecting"))
    if width <= NUMBERED:
        for (line, place), label in np.ndenumerate(cells):
            if label in colours:
                ink = ink_on(colours[label])
                x, y = place + 0.5, line + 0.5
                size = min(9, scale * 26)
                text = axes.text(x, y, str(label), ha="center", va="center_baseline", fontsize=size, color=ink)
                text.set_in_layout(False)
    axes.set_axis_off()


def _pruned_runs(cells: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """Pruned cells as stretches `(line, start, stop)`: one hatched patch each instead of one per cell."""
    for number, line in enumerate(cells == PRUNED):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(np.int8), [0]])))
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            yield number, start, stop


def _borders(cells: NDArray[np.int64]) -> list[list[tuple[int, int]]]:
    """The lines between cells of different labels, and around the whole."""
    padded = np.pad(cells, 1, constant_values=ABSENT)
    upright = np.argwhere(padded[1:-1, :-1] != padded[1:-1, 1:]).tolist()
    flat = np.argwhere(padded[:-1, 1:-1] != padded[1:, 1:-1]).tolist()
    return [[(x, y), (x, y + 1)] for y, x in upright] + [[(x, y), (x + 1, y)] for y, x in flat]


class _Counts:
    def __init__(self, labels: tuple[int, ...]) -> None:
        sizes = Counter(labels)
        self.pruned = sizes.pop(PRUNED, 0)
        self.alone = sum(1 for count in sizes.values() if count == 1)
        self.tied = sum(count for count in sizes.values() if count > 1)
        self.shared = sum(1 for count in sizes.values() if count > 1)


def _alt(layer: Layer) -> str:
    counts = _Counts(layer.labels)
    where = f"on a grid of {' × '.join(map(str, layer.grid))}" if layer.grid is not None else "in their order"
    return (
        f"Map of the {len(layer.labels)} {layer.groups} of {layer.name} {where}: {counts.pruned} pruned (hatched), "
        f"{counts.tied} tied to {counts.shared} shared values (one colour each), {counts.alone} kept alone."
    )
