"""A colour for every label: neighbours differ, also for a reader who is colour-blind."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Colour = tuple[float, float, float]

# How red-green blindness (deuteranopia) mixes linear RGB: Viénot, Brettel and Mollon, 1999, doi:10.1002/(SICI)
# 1520-6378(199908)24:4<243::AID-COL5>3.0.CO;2-3, rounded.
_WITHOUT_GREEN = np.array([[0.29, 0.71, 0.0], [0.29, 0.71, 0.0], [-0.02, 0.02, 1.0]])
_LIGHTNESS = (0.45, 0.62, 0.8)
_SATURATION = 0.62
_GOLDEN = 0.6180339887498949


def label_colours(labels: Iterable[int], neighbours: Iterable[tuple[int, int]] = ()) -> dict[int, Colour]:
    """Return one colour, RGB in [0, 1], per distinct label, no two equal.

    Labels that touch get the colours that differ most, measured in what both the usual eye and the red-green-blind
    one see: a label is served early if it touches many, and takes the free colour farthest from its neighbours'.

    Args:
        labels: The labels to colour.
        neighbours: Pairs of labels that touch in the picture.

    Example:
        >>> colours = label_colours([0, 1, 2], [(0, 1), (1, 2)])
        >>> len(set(colours.values()))
        3
    """
    names = sorted(set(labels))
    touching: dict[int, set[int]] = {name: set() for name in names}
    for one, other in neighbours:
        if one != other and one in touching and other in touching:
            touching[one].add(other)
            touching[other].add(one)
    palette = _palette(len(names))
    seen = np.stack([_seen(colour) for colour in palette]) if palette else np.empty((0, 6))
    free = list(range(len(palette)))
    given: dict[int, int] = {}
    for name in sorted(names, key=lambda name: (-len(touching[name]), name)):
        around = [given[other] for other in touching[name] if other in given]
        best = _farthest(seen, free, around)
        given[name] = best
        free.remove(best)
    return {name: palette[index] for name, index in given.items()}


def _farthest(seen: NDArray[np.float64], free: list[int], around: list[int]) -> int:
    if not around:
        return free[0]
    distances = np.linalg.norm(seen[free][:, None, :] - seen[around][None, :, :], axis=2).min(axis=1)
    return free[int(distances.argmax())]


def _palette(count: int) -> list[Colour]:
    """`count` colours: hues by the golden ratio, so that any number is spread, on three steps of lightness."""
    return [
        colorsys.hls_to_rgb((0.58 + index * _GOLDEN) % 1.0, _LIGHTNESS[index % len(_LIGHTNESS)], _SATURATION)
        for index in range(count)
    ]


def _seen(colour: Colour) -> NDArray[np.float64]:
    """Where two eyes put a colour: OKLab, with and without the green receptor, `(6,)`."""
    linear = np.array([value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour])
    return np.concatenate([_oklab(linear), _oklab((_WITHOUT_GREEN @ linear).clip(0))])


def _oklab(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear RGB as OKLab (Björn Ottosson, 2020), where distance is about what the eye sees."""
    cones = np.cbrt(np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]) @ linear)
    return np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]) @ cones


def ink_on(colour: Colour) -> str:
    """Return black or white, whichever is read better on the colour (WCAG relative luminance)."""
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"
