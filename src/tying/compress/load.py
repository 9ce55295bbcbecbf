"""A task from a Python file; without a file, the embedded one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from tying.compress.digits import Digits
from tying.compress.task import FROM_FILE, Task, check_task
from tying.errors import TaskError


def load_task(path: str | Path | None = None) -> Task:
    """Load a task from a Python file: the module itself, or its global `task` if there is one.

    The file is run, and finds the modules beside it, as a script does: its folder is added to `sys.path`.

    Args:
        path: Of the file; None: the embedded task, a small network on scikit-learn's digits.

    Raises:
        TaskError: If the file is not there, doesn't run, or lacks a function.

    Example:
        >>> load_task().example_inputs().shape
        torch.Size([2, 1, 8, 8])
    """
    if path is None:
        return Digits()
    file = Path(path)
    if not file.is_file():
        raise TaskError(f"{file}: expected a Python file with a task, got none there; give the path of one")
    spec = importlib.util.spec_from_file_location(FROM_FILE + file.stem, file)
    if spec is None or spec.loader is None:
        raise TaskError(f"{file}: expected a Python file, got something that can't be imported; name it *.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise TaskError(f"{file}: expected a task, got {error!r} when running the file; mend the file") from error
    return check_task(getattr(module, "task", module), str(file))
