"""Accuracy over the epochs of each stage: what regularising cost, and what retraining won back."""

from __future__ import annotations

from itertools import groupby

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tying.report.data import Epoch
from tying.report.pictures.style import Picture, Theme, picture


def draw_training(history: tuple[Epoch, ...]) -> Picture:
    """Return the stages one after another on one axis of epochs, named where they begin."""
    stages = [(name, list(epochs)) for name, epochs in groupby(history, key=lambda epoch: epoch.stage)]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        start = 0
        for index, (name, epochs) in enumerate(stages):
            colour = theme.series[index % len(theme.series)]
            places = range(start + 1, start + len(epochs) + 1)
            marker = "o" if len(history) <= 60 else None
            axes.plot(places, [epoch.accuracy * 100 for epoch in epochs], color=colour, marker=marker, markersize=4)
            if index:
                axes.axvline(start + 0.5, color=theme.grid, linewidth=1.2)
            axes.text(
                start + 0.5 + len(epochs) / 2, 1.02, name, color=colour, ha="center", va="bottom", fontsize=10,
                fontweight="bold", transform=axes.get_xaxis_transform(),
            )  # fmt: skip
            start += len(epochs)
        axes.set_xlim(0.5, start + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch, counted over all stages")
        axes.set_ylabel("validation accuracy (%)")
        axes.grid(axis="y")

    return picture((6.0, 3.2), _alt(stages), draw)


def _alt(stages: list[tuple[str, list[Epoch]]]) -> str:
    described = [
        f"{name}, {len(epochs)} epochs, from {epochs[0].accuracy * 100:.1f} % to {epochs[-1].accuracy * 100:.1f} %"
        for name, epochs in stages
    ]
    return "Validation accuracy per epoch. " + "; ".join(described) + "."
