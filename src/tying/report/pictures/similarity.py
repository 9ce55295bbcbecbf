"""How alike the groups kept are, sorted by label: ties stand out as squares along the diagonal."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tying.report.data import Layer
from tying.report.pictures.style import Picture, Theme, picture


def draw_similarity(layer: Layer) -> Picture:
    """Return the similarity matrix of a layer, −1 to 1, with a frame around each set of tied groups."""
    matrix = np.asarray(layer.similarity, dtype=np.float64)
    labels = np.asarray(layer.similarity_labels, dtype=np.int64)
    starts = np.flatnonzero(np.diff(labels, prepend=labels[0] - 1))
    stops = np.append(starts[1:], len(labels))

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        image = axes.imshow(matrix, cmap=_colour_map(theme), vmin=-1, vmax=1, interpolation="nearest")
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            if stop - start > 1:
                corner = (start - 0.5, start - 0.5)
                axes.add_patch(
                    Rectangle(corner, stop - start, stop - start, fill=False, edgecolor=theme.ink, linewidth=0.8)
                )
        axes.set_xlabel("kept groups, sorted by label")
        axes.set_ylabel("kept groups, sorted by label")
        bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[-1, -0.5, 0, 0.5, 1])
        bar.set_label("similarity S (1: equal)")
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]

    return picture((5.2, 4.4), _alt(layer, matrix, labels), draw)


def _alt(layer: Layer, matrix: np.ndarray, labels: np.ndarray) -> str:
    same = (labels[:, None] == labels[None, :]) & ~np.eye(len(labels), dtype=bool)
    other = labels[:, None] != labels[None, :]
    words = f"Similarity matrix of {len(labels)} kept {layer.groups} of {layer.name}, sorted by label."
    if same.any():
        words += f" Median similarity {np.median(matrix[same]):.2f} between tied groups"
        words += f", {np.median(matrix[other]):.2f} between others." if other.any() else "."
    return words


def _colour_map(theme: Theme) -> LinearSegmentedColormap:
    return LinearSegmentedColormap.from_list("similarity", [theme.series[1], theme.paper, theme.series[0]])
