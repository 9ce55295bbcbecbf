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
MOST = 256
"""No eye tells more colours than this apart: beyond, they come round again."""

_LIGHTNESS = (0.45, 0.62, 0.8)
_SATURATION = 0.62
_GOLDEN = 0.6180339887498949


def label_colours(labels: Iterable[int], neighbours: Iterable[tuple[int, int]] = ()) -> dict[int, Colour]:
    """Return one colour, RGB in [0, 1], per distinct label, no two equal (up to 256 labels).

    Labels that touch get colours that differ much, measured in what both the usual eye and the red-green-blind one
    see (not the best of all choices: that is a hard problem; a greedy one, improved by swaps).

    Args:
        labels: The labels to colour.
        neighbours: Pairs of labels that touch in the picture.

    Example:
        >>> colours = label_colours([0, 1, 2], [(0, 1), (1, 2)])
        >>> len(set(colours.values()))
        3
    """
    names = sorted(set(labels))
    place = {name: index for index, name in enumerate(names)}
    touching = np.zeros((len(names), len(names)), dtype=bool)
    for one, other in neighbours:
        if one != other and one in place and other in place:
            touching[place[one], place[other]] = touching[place[other], place[one]] = True
    palette = _palette(min(len(names), MOST))
    if len(names) > MOST:
        return {name: palette[index % MOST] for index, name in enumerate(names)}
    given = _improve(_serve(touching, _distances(palette)), touching, _distances(palette))
    return {name: palette[given[place[name]]] for name in names}


def _serve(touching: NDArray[np.bool_], distances: NDArray[np.float64]) -> list[int]:
    """Give each label, those that touch many first, the free colour farthest from its neighbours'."""
    given = [-1] * len(touching)
    free = list(range(len(touching)))
    for label in np.argsort(-touching.sum(axis=1), kind="stable").tolist():
        around = [given[other] for other in np.flatnonzero(touching[label]) if given[other] >= 0]
        best = free[int(distances[free][:, around].min(axis=1).argmax())] if around else free[0]
        given[label] = best
        free.remove(best)
    return given


def _improve(given: list[int], touching: NDArray[np.bool_], distances: NDArray[np.float64]) -> list[int]:
    """Swap colours as long as the two neighbours that are hardest to tell apart become easier to."""
    around = [np.flatnonzero(line) for line in touching]
    colours = np.array(given, dtype=np.int64)

    def least(label: int) -> float:
        return float(distances[colours[label], colours[around[label]]].min(initial=np.inf))

    def swap(one: int, other: int) -> None:
        colours[[one, other]] = colours[[other, one]]

    def after(one: int, other: int) -> float:
        swap(one, other)
        result = min(least(one), least(other))
        swap(one, other)
        return result

    for _ in range(2 * len(given)):
        apart = [least(label) for label in range(len(given))]
        hardest = int(np.argmin(apart))
        scores = [after(hardest, other) if other != hardest else -1.0 for other in range(len(given))]
        if max(scores) <= apart[hardest]:
            break
        swap(hardest, int(np.argmax(scores)))
    return colours.tolist()


def _distances(palette: list[Colour]) -> NDArray[np.float64]:
    seen = np.array([_seen(colour) for colour in palette]).reshape(len(palette), 6)
    return np.linalg.norm(seen[:, None] - seen[None], axis=2)


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
