"""Patterns of parameter names, read in one way."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase


def fitting(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that a pattern stands for, as `fnmatch` reads it; a name that it is stands for itself alone.

    Example:
        >>> fitting("heads[0].*", ["heads[0].weight", "heads0.weight"]), fitting("heads[0]", ["heads[0]", "heads0"])
        (['heads0.weight'], ['heads[0]'])
    """
    listed = list(names)
    return [pattern] if pattern in listed else [name for name in listed if fnmatchcase(name, pattern)]
