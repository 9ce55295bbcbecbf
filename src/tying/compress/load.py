"""A task from a Python file; without a file, the embedded one."""

from __future__ import annotations

from pathlib import Path

from tying.compress.digits import Digits
from tying.compress.task import FROM_FILE, Task, check_task
from tying.scripts import run_file


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
    module = run_file(path, prefix=FROM_FILE, wanted="a task")
    return check_task(getattr(module, "task", module), str(Path(path)))
