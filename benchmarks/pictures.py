"""How the pictures of the benchmarks look: as those of the report, on light paper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from tying.report.pictures.style import LIGHT


def draw(path: Path, size: tuple[float, float], into: Callable[[Figure], None]) -> None:
    """Write a picture of so many inches as PNG; `into` puts everything into the empty figure."""
    settings = {
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.edgecolor": LIGHT.muted,
        "axes.labelcolor": LIGHT.ink,
        "axes.prop_cycle": f"cycler(color={list(LIGHT.series)})",
        "axes.titlelocation": "left",
        "axes.titlesize": 10,
        "font.size": 9,
        "grid.color": LIGHT.grid,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 4,
        "text.color": LIGHT.ink,
        "xtick.color": LIGHT.muted,
        "ytick.color": LIGHT.muted,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        into(figure)
        figure.savefig(path, dpi=90)
