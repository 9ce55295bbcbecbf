"""Run a Python file of the user's, as a module."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from tying.errors import TaskError


def run_file(path: str | Path, *, prefix: str, wanted: str) -> ModuleType:
    """Run a file, which finds the modules beside it, as a script does: its folder is added to `sys.path`.

    Args:
        path: Of the file.
        prefix: What the module's name begins with; the file's name follows.
        wanted: What the file should hold, for the message.

    Raises:
        TaskError: If the file is not there, or doesn't run.
    """
    file = Path(path)
    if not file.is_file():
        raise TaskError(f"{file}: expected a Python file with {wanted}, got none there; give the path of one")
    spec = importlib.util.spec_from_file_location(prefix + file.stem, file)
    if spec is None or spec.loader is None:
        raise TaskError(f"{file}: expected a Python file, got something that can't be imported; name it *.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise TaskError(f"{file}: expected {wanted}, got {error!r} when running the file; mend the file") from error
    return module
