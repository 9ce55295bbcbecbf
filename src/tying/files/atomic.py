"""A file appears whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write bytes beside `path`, flush them to disk, then rename: a full disk or Ctrl-C leaves the old file.

    Raises:
        OSError: As the system gives it; nothing is left behind.
    """
    target = Path(path)
    beside = target.parent / f".{target.name}.{secrets.token_hex(8)}"
    try:  # from before the file is there: Ctrl-C comes at any time
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
