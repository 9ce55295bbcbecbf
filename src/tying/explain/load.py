"""A model and inputs for it from a Python file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tying.errors import TaskError
from tying.scripts import run_file

_NEEDED = {
    "model": "model() -> nn.Module, the network",
    "example_inputs": "example_inputs() -> Tensor, a batch as the network takes it",
}


def load_example(path: str | Path) -> tuple[nn.Module, Tensor | tuple[Tensor, ...]]:
    """Return what `model()` and `example_inputs()` of a Python file give, or of its global `task` if there is one.

    The file of a task of `compress` is one. It is run, and finds the modules beside it, as a script does.

    Raises:
        TaskError: If the file is not there, doesn't run, lacks a function, or one of them fails or gives
            something else.
    """
    module = run_file(path, prefix="tying_model_", wanted="a model")
    source: Any = getattr(module, "task", module)
    missing = [text for name, text in _NEEDED.items() if not callable(getattr(source, name, None))]
    if missing:
        raise TaskError(f"{path}: expected a model, got a file without " + "; ".join(missing) + ": add what is missing")
    model, inputs = (_given(path, name, getattr(source, name)) for name in ("model", "example_inputs"))
    if not isinstance(model, nn.Module):
        raise TaskError(
            f"{path}: expected model() to give an nn.Module, got {type(model).__name__}; return the network"
        )
    return model, inputs


def _given(path: str | Path, name: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise TaskError(f"{path}: expected {name}() to return, got {error!r}; mend {name}()") from error
