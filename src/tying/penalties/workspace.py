"""Arrays to compute in that are not allocated anew every time: the system's zeroing of pages costs more than a sort.

Up to 131,072 numbers, every thread keeps the arrays that it asked for: 4 MB at most, and 1 MB for all of them. Beyond,
they are made anew and given back.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_KEPT = 1 << 17
_FEW = 1 << 10
"""So few are allocated faster than they are looked up."""

_kept = threading.local()


def borrow(name: str, count: int, dtype: Any) -> NDArray[Any]:
    """Return `(count,)` numbers of any value, the caller's until somebody in this thread borrows the same name.

    Example:
        >>> borrow("keys", 2000, np.uint64).shape
        (2000,)
    """
    if count <= _FEW or count > _KEPT:
        return np.empty(count, dtype)
    array = vars(_kept).get(name)
    if array is None or len(array) < count:
        array = vars(_kept)[name] = np.empty(min(_KEPT, 1 << (count - 1).bit_length()), dtype)
    return array[:count]


def places(count: int) -> NDArray[np.uint64]:
    """Return 0, 1, …, count − 1, to be read only.

    Example:
        >>> places(3)
        array([0, 1, 2], dtype=uint64)
    """
    return _places()[:count] if count <= _KEPT else np.arange(count, dtype=np.uint64)


@cache
def _places() -> NDArray[np.uint64]:
    found = np.arange(_KEPT, dtype=np.uint64)
    found.setflags(write=False)
    return found
