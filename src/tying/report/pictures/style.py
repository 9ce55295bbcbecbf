"""How every picture looks: drawn twice, on light and on dark paper, as SVG that needs nothing from outside."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

PIXELS_PER_INCH = 96


@dataclass(frozen=True)
class Theme:
    """The colours of one paper. `series` is ordered, and told apart by the colour-blind (after Okabe and Ito)."""

    name: str
    paper: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]
    pruned: str
    """Pruned groups."""
    alone: str
    """Groups kept that share their value with no other."""


LIGHT = Theme(
    name="light",
    paper="#ffffff",
    ink="#1c2430",
    muted="#5a6675",
    grid="#dfe4ea",
    series=("#0067a8", "#c44f00", "#007a5a", "#96458a", "#7a6000", "#c2185b", "#4a5568"),
    pruned="#e4e7eb",
    alone="#ffffff",
)
DARK = Theme(
    name="dark",
    paper="#171c24",
    ink="#e8ecf1",
    muted="#a3afbd",
    grid="#333d4a",
    series=("#62b6f0", "#ff9a52", "#3ecda3", "#e39ad4", "#e3c44d", "#ff7fa8", "#b7c4d3"),
    pruned="#2a323d",
    alone="#171c24",
)


@dataclass(frozen=True)
class Picture:
    """One picture on both papers, with the words that belong to it."""

    light: bytes
    dark: bytes
    width: int
    """In CSS pixels."""
    height: int
    alt: str
    """What a reader who cannot see it should know."""


def picture(size: tuple[float, float], alt: str, draw: Callable[[Figure, Theme], None]) -> Picture:
    """Draw on light and on dark paper.

    Args:
        size: Width and height in inches, of 96 CSS pixels each.
        alt: What the picture says, in words.
        draw: Puts everything into the empty figure, in the colours of the theme.
    """
    return Picture(
        light=_svg(size, draw, LIGHT),
        dark=_svg(size, draw, DARK),
        width=round(size[0] * PIXELS_PER_INCH),
        height=round(size[1] * PIXELS_PER_INCH),
        alt=alt,
    )


def drawn(
    size: tuple[float, float], format_: str, draw: Callable[[Figure, Theme], None], theme: Theme = LIGHT
) -> bytes:
    """Draw on one paper, as a file of its own.

    Args:
        size: Width and height in inches.
        format_: As matplotlib names it: "png", "svg", "pdf".
        draw: As `picture` takes it.
        theme: The paper.
    """
    buffer = io.BytesIO()
    with rc_context(_settings(theme)):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, theme)
        figure.savefig(buffer, format=format_, facecolor=theme.paper, dpi=1.5 * PIXELS_PER_INCH)
    return buffer.getvalue()


def _svg(size: tuple[float, float], draw: Callable[[Figure, Theme], None], theme: Theme) -> bytes:
    buffer = io.BytesIO()
    with rc_context(_settings(theme)):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure, theme)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _settings(theme: Theme) -> dict[Any, Any]:
    return {
        "axes.axisbelow": True,
        "axes.edgecolor": theme.muted,
        "axes.facecolor": "none",
        "axes.grid": False,
        "axes.labelcolor": theme.ink,
        "axes.labelsize": 10,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": theme.ink,
        "axes.titlelocation": "left",
        "axes.titlesize": 10,
        "axes.unicode_minus": True,
        "figure.facecolor": "none",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 10,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "hatch.color": theme.muted,
        "hatch.linewidth": 0.5,
        "legend.frameon": False,
        "legend.labelcolor": theme.ink,
        "lines.linewidth": 1.8,
        "svg.fonttype": "path",
        "svg.hashsalt": "tying",
        "text.color": theme.ink,
        "xtick.color": theme.muted,
        "xtick.labelcolor": theme.ink,
        "ytick.color": theme.muted,
        "ytick.labelcolor": theme.ink,
    }
