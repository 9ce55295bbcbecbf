"""Where the work is and how long it will take, on standard error."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class Progress:
    """A bar over all epochs of all fits, with the time left; one line per fit that is done.

    Args:
        shown: False says nothing.
        epochs: How many epochs are planned; `plan` corrects the number when the search knows more.
    """

    def __init__(self, *, shown: bool, epochs: int) -> None:
        self._bar: Any = None
        self._console: Any = None
        if shown:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._console = Console(stderr=True, highlight=False)
            columns = (
                TextColumn("{task.description:<28}"),
                BarColumn(24),
                TextColumn("{task.fields[state]:<34}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=epochs, state="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def plan(self, epochs_left: int) -> None:
        """Say how many epochs are still to come."""
        if self._bar is not None:
            self._bar.update(self._task, total=self._bar.tasks[0].completed + epochs_left)

    def epoch(self, fit: str, state: str) -> None:
        """One epoch of a fit is done."""
        if self._bar is not None:
            self._bar.update(self._task, description=fit, state=state, advance=1)

    def done(self, line: str) -> None:
        """Leave one line that stays."""
        if self._console is not None:
            self._console.print(line)
