"""Accuracy against size: ours, the controls, and the dense network it came from."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tying.report.data import Point
from tying.report.pictures.style import Picture, Theme, picture

_MARKERS = ("s", "^", "D", "v", "P", "X")


def draw_tradeoff(curve: tuple[Point, ...]) -> Picture:
    """Return accuracy over numbers stored (logarithmic), one line per label, bars where the spread is known."""
    lines = _lines(curve)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        controls = 0
        for points in lines:
            _draw_line(axes, points, _line_style(points[0], controls, theme))
            controls += points[0].kind == "control"
            if points[0].kind == "dense":
                axes.axhline(points[0].accuracy * 100, color=theme.muted, linestyle=":", linewidth=1.2)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.08, y=0.08)
        axes.set_xlabel("numbers stored (logarithmic; left is smaller)")
        axes.set_ylabel("accuracy (%)")
        axes.grid(which="major")
        axes.legend(loc="best", fontsize=9)

    return picture((6.0, 4.0), _alt(lines), draw)


def _line_style(point: Point, controls: int, theme: Theme) -> dict[str, Any]:
    """The dense network a star, ours the thick line, every control its own colour and mark."""
    if point.kind == "dense":
        return {"marker": "*", "color": theme.ink, "zorder": 3, "markersize": 12, "linestyle": "none"}
    if point.kind == "ours":
        return {"marker": "o", "color": theme.series[0], "zorder": 4, "linewidth": 2.2, "markersize": 7}
    colour = theme.series[1 + controls % (len(theme.series) - 1)]
    marker = _MARKERS[controls % len(_MARKERS)]
    return {"marker": marker, "color": colour, "zorder": 2, "linestyle": "--", "markersize": 6}


def _lines(curve: tuple[Point, ...]) -> list[list[Point]]:
    """The points by label, in order of size; labels in the order given."""
    order = {point.label: index for index, point in reversed(list(enumerate(curve)))}
    ranked = sorted(curve, key=lambda point: (order[point.label], point.values))
    return [list(points) for _, points in groupby(ranked, key=lambda point: point.label)]


def _draw_line(axes: Axes, points: list[Point], style: dict[str, Any]) -> None:
    heights = [point.accuracy * 100 for point in points]
    below = [h - point.low * 100 if point.low is not None else 0.0 for point, h in zip(points, heights, strict=True)]
    above = [point.high * 100 - h if point.high is not None else 0.0 for point, h in zip(points, heights, strict=True)]
    spread = [below, above] if any(below) or any(above) else None
    values = [point.values for point in points]
    axes.errorbar(values, heights, yerr=spread, capsize=3, elinewidth=1.2, label=points[0].label, **style)


def _short(value: float, _position: int | None = None) -> str:
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g} {letter}"
    return f"{value:g}"


def _alt(lines: list[list[Point]]) -> str:
    described = [
        f"{points[0].label}: " + ", ".join(f"{p.accuracy * 100:.2f} % at {p.values:,} numbers" for p in points)
        for points in lines
    ]
    return "Accuracy against numbers stored. " + "; ".join(described) + "."
