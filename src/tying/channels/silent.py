"""What torch says beside its errors, held back: warnings of its loggers, and the graph as far as it came."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Generator


@contextlib.contextmanager
def silent() -> Generator[None]:
    """Hold back what torch's loggers say and what is printed to stderr; errors are raised as ever."""
    loggers = [logging.getLogger(name) for name in ("torch", *_OWN)]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_OWN = ("torch.fx.experimental.symbolic_shapes", "torch.export", "torch._export")
"""Loggers with levels of their own."""
