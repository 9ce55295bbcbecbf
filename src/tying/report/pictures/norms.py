"""The sorted group norms over the OWL weights: the largest norm meets the largest weight."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from tying.report.data import Layer
from tying.report.pictures.style import Picture, Theme, picture


def draw_norms(layer: Layer) -> Picture:
    """Return two panels over one rank axis: norms, with the threshold of the support, and the weights λ."""
    order = np.argsort(-np.asarray(layer.norms, dtype=np.float64), kind="stable")
    norms = np.asarray(layer.norms, dtype=np.float64)[order]
    ranks = np.arange(1, len(norms) + 1)
    weights = np.asarray(layer.weights, dtype=np.float64)
    threshold = layer.threshold
    kept = np.asarray(layer.labels)[order] >= 0

    def draw(figure: Figure, theme: Theme) -> None:
        heights = [2, 1] if len(weights) else [1]
        panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
        top = panels[0, 0]
        many = len(norms) > 100
        marker, cross = (".", ".") if many else ("o", "x")
        top.plot(ranks[kept], norms[kept], marker, color=theme.series[0], markersize=4, label="norm of a kept group")
        if not kept.all():
            top.plot(
                ranks[~kept],
                norms[~kept],
                cross,
                color=theme.muted,
                markersize=2 if many else 4,
                label="norm of a pruned group",
            )
        if threshold is not None:
            top.axhline(
                threshold, color=theme.series[1], linestyle="--", linewidth=1.2, label=f"threshold {threshold:.3g}"
            )
        top.set_ylabel("group norm ‖w‖")
        top.set_ylim(bottom=0)
        top.grid(axis="y")
        top.legend(fontsize=9)
        if len(weights):
            low = panels[1, 0]
            low.step(ranks, weights, where="mid", color=theme.series[2])
            low.fill_between(ranks, weights, step="mid", color=theme.series[2], alpha=0.2, linewidth=0)
            low.set_ylabel("weight λ")
            low.set_ylim(bottom=0)
            low.grid(axis="y")
        panels[-1, 0].set_xlabel("rank of the group (1: largest norm)")

    return picture((5.2, 4.4 if len(weights) else 3.2), _alt(layer, norms, kept), draw)


def _alt(layer: Layer, norms: np.ndarray, kept: np.ndarray) -> str:
    words = f"Norms of the {len(norms)} {layer.groups} of {layer.name}, sorted, from {norms[0]:.3g} to {norms[-1]:.3g}"
    words += f"; {int(kept.sum())} are kept"
    if layer.threshold is not None:
        words += f"; the threshold is {layer.threshold:.3g}"
    if layer.weights:
        words += f". The weights λ fall from {layer.weights[0]:.3g} to {layer.weights[-1]:.3g}"
    return words + "."
