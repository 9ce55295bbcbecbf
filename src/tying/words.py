"""Numbers as a reader wants them: every one with its unit."""

from __future__ import annotations

_NARROW = "\u202f"
"""A narrow space that does not break: between a number and its unit."""


def count(value: float | None) -> str:
    """Return an integer with thousands marked: `238,510`."""
    return "–" if value is None else f"{round(value):,}"


def percent(value: float | None, digits: int = 2) -> str:
    """Return a part of one as `98.36 %`."""
    return "–" if value is None else f"{value * 100:.{digits}f}{_NARROW}%"


def points(difference: float | None) -> str:
    """Return a difference of accuracies with its sign: `−0.12 points`."""
    if difference is None:
        return "–"
    sign = "+" if difference > 0 else "−" if difference < 0 else "±"
    return f"{sign}{abs(difference) * 100:.2f}{_NARROW}points"


def size(bytes_: float | None) -> str:
    """Return bytes as `11.2 kB` (1 kB is 1000 bytes)."""
    if bytes_ is None:
        return "–"
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if bytes_ >= limit:
            return (
                f"{bytes_ / limit:.3g}{_NARROW}{unit}"
                if bytes_ < 1000 * limit
                else f"{bytes_ / limit:,.0f}{_NARROW}{unit}"
            )
    return f"{bytes_:.0f}{_NARROW}bytes"


def seconds(value: float | None) -> str:
    """Return a time as `1.23 ms`."""
    if value is None:
        return "–"
    for limit, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= limit:
            return f"{value / limit:.3g}{_NARROW}{unit}"
    return f"{value * 1e9:.3g}{_NARROW}ns"


def times(ratio: float | None) -> str:
    """Return a ratio as `24.1×`."""
    return "–" if ratio is None else f"{ratio:.3g}×" if ratio < 1000 else f"{ratio:,.0f}×"


def change(ratio: float | None, better: str, worse: str) -> str:
    """Return a ratio with its direction: `4.63× faster`, or `1.2× slower` for what is below 1."""
    if ratio is None or ratio <= 0:
        return "–"
    if abs(ratio - 1) < 5e-3:
        return "the same"
    return f"{times(ratio)} {better}" if ratio > 1 else f"{times(1 / ratio)} {worse}"


def ratio(before: float | None, after: float | None) -> float | None:
    """Return how many times smaller `after` is, or `None` where that is unknown."""
    return None if before is None or not after else before / after
