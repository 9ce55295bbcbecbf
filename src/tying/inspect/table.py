"""Cells in columns of equal width."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]], *, texts: int) -> list[str]:
    """Return the lines with their cells below each other: the first ones, texts, on the left, numbers on the right.

    Example:
        >>> aligned([("weight", "bytes"), ("w", "4")], texts=1)
        ['weight  bytes', 'w           4']
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    formats = [f"{'<' if place < texts else '>'}{width}" for place, width in enumerate(widths)]
    return ["  ".join(map(format, line, formats)).rstrip() for line in lines]
