"""A task: the network, how it is trained and how it is judged. What `compress` works on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, Protocol, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from tying.errors import TaskError

Split = Literal["train", "validation", "test"]
Stage = Literal["dense", "one", "two"]

FROM_FILE = "tying_task_"
"""How the modules are named that task files are loaded as."""

NEEDED = {
    "model": "model() -> nn.Module, a freshly initialised network",
    "fit": "fit(model, *, epochs, on_step, on_epoch), which trains the model in place",
    "evaluate": "evaluate(model, split) -> float, the accuracy in [0, 1] on 'validation' or 'test'",
    "example_inputs": "example_inputs() -> Tensor, a batch as the model takes it",
}


class Task(Protocol):
    """What `compress` and the command line work on: any object, or a Python file, with these four functions.

    Optional beside them: `epochs: int` (the default number of epochs), `name: str`, and a parameter `stage` of
    `fit`: it is then told `"dense"`, `"one"` or `"two"`. Stage one wants SGD with momentum, stage two can use Adam.
    """

    def model(self) -> nn.Module:
        """Return a freshly initialised network, drawn from torch's global random state."""
        ...

    def fit(
        self,
        model: nn.Module,
        *,
        epochs: int,
        on_step: Callable[[Optimizer], None],
        on_epoch: Callable[[int], None],
    ) -> None:
        """Train in place; call `on_step(optimizer)` after each step and `on_epoch(epoch)` after each epoch."""
        ...

    def evaluate(self, model: nn.Module, split: Split) -> float:
        """Return the accuracy in [0, 1] on a split. What is chosen is chosen on `validation`; `test` is for the end."""
        ...

    def example_inputs(self) -> Tensor:
        """Return a batch of inputs as the model takes them."""
        ...


def check_task(task: Any, name: str) -> Task:
    """Return the task if it has what `compress` needs.

    Raises:
        TaskError: Names every function that is missing and how to write it.
    """
    if inspect.isclass(task):
        raise TaskError(
            f"{name}: expected a task, got the class {task.__name__}; pass one made of it: {task.__name__}()"
        )
    missing = [text for needed, text in NEEDED.items() if not callable(getattr(task, needed, None))]
    if missing:
        raise TaskError(f"{name}: expected a task, got one without " + "; ".join(missing) + ": add what is missing")
    taken = inspect.signature(task.fit).parameters
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
    refused = [word for word in ("epochs", "on_step", "on_epoch") if word not in taken and not anything]
    if refused:
        raise TaskError(
            f"{name}: expected fit(model, *, epochs, on_step, on_epoch), got fit{inspect.signature(task.fit)}; "
            f"let it take {', '.join(refused)} and call the two functions"
        )
    return cast(Task, task)


def takes_stage(task: Task) -> bool:
    """Say whether the task's `fit` wants to be told which stage it trains."""
    return "stage" in inspect.signature(task.fit).parameters


def name_of(task: Task) -> str:
    """Return the task's own name, or its class or file name."""
    given = getattr(task, "name", None) or getattr(task, "__name__", None) or type(task).__name__
    return str(given).removeprefix(FROM_FILE)
