"""Where the work is and how long it will take, on standard error."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class Progress:
    """A bar over all epochs of all fits, with the time left; one line per fit that is done.

    How many fits a search needs shows on the way: what was planned for is corrected as fits begin or are read.

    Args:
        shown: False says nothing.
        epochs: How many epochs are planned.
    """

    def __init__(self, *, shown: bool, epochs: int) -> None:
        self.done, self.left = 0, epochs
        """Epochs."""
        self._bar: Any = None
        if shown:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description:<28}"),
                BarColumn(24),
                TextColumn("{task.fields[state]:<34}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=Console(stderr=True, highlight=False), transient=True)
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

    def begin(self, fit: str, epochs: int) -> None:
        """A fit begins: so many epochs are to come at the least."""
        self.left = max(self.left, epochs)
        self._show(fit, "")

    def read(self, fit: str, epochs: int) -> None:
        """A fit was read: its epochs are not to come."""
        self.left = max(self.left - epochs, 0)
        self._show(fit, "read")

    def epoch(self, fit: str, state: str) -> None:
        """One epoch of a fit is done."""
        self.done, self.left = self.done + 1, max(self.left - 1, 0)
        self._show(fit, state)

    def line(self, text: str) -> None:
        """Leave one line that stays."""
        if self._bar is not None:
            self._bar.console.print(text)

    def _show(self, fit: str, state: str) -> None:
        if self._bar is not None:
            total = self.done + self.left
            self._bar.update(self._task, description=fit, state=state, completed=self.done, total=total)
