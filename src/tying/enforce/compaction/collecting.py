"""Garbage put off for a while, then collected among what is new."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def garbage_put_off() -> Generator[None, None, None]:
    """Collect no cyclic garbage meanwhile, and what has come up in the end.

    Where a hundred thousand small objects are made and stay for a while, as the channels of a network, the collector
    would walk all objects of the process time and again, in vain. Does nothing where it is switched off.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect(0)
