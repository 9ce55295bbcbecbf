"""What is said about the time left: each epoch counts once, what is read does not, no fit outlasts the estimate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks import Corners
from tying import compress
from tying.compress import run
from tying.compress.progress import Progress

Said = list[tuple[str, int, int]]


def told(monkeypatch: pytest.MonkeyPatch, progress: type[Progress], task: Corners, **options: Any) -> Said:
    """The fit, and the epochs done and left, each time something was said."""
    said: Said = []

    class Noted(progress):
        def _show(self, fit: str, state: str) -> None:
            super()._show(fit, state)
            said.append((fit, self.done, self.left))

    monkeypatch.setattr(run, "Progress", Noted)
    compress(task, progress=False, **options)
    return said


def law_estimate(monkeypatch: pytest.MonkeyPatch, progress: type[Progress], folder: Path, **budget: Any) -> None:
    task = Corners()
    said = told(monkeypatch, progress, task, out=folder, **budget)
    assert said[-1][1] == len(task.stages) * task.epochs
    for fit in {fit for fit, _, _ in said}:
        moments = [(done, left) for name, done, left in said if name == fit]
        end = moments[-1][0]
        assert all(left >= end - done for done, left in moments)
    again = told(monkeypatch, progress, Corners(), out=folder, **budget)
    assert again[-1][1] == 0
    assert again[-1][2] <= said[-1][2]


@pytest.mark.parametrize("budget", [{"ratio": 8}, {"max_drop": 0.02}])
def test_the_estimate_is_of_what_is_left(
    budget: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    law_estimate(monkeypatch, Progress, tmp_path, **budget)


class CountingWhatIsRead(Progress):
    def read(self, fit: str, epochs: int) -> None:
        self.epoch(fit, "read")


class AsPlanned(Progress):
    def __init__(self, *, shown: bool, epochs: int) -> None:
        super().__init__(shown=shown, epochs=4 * Corners.epochs)

    def begin(self, fit: str, epochs: int) -> None:
        self._show(fit, "")


@pytest.mark.parametrize("broken", [CountingWhatIsRead, AsPlanned])
def test_other_estimates_fail_the_law(broken: type[Progress], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        law_estimate(monkeypatch, broken, tmp_path, ratio=8)


def test_a_line_says_what_is_left_and_tied(capfd: pytest.CaptureFixture[str]) -> None:
    compress(Corners(), ratio=4)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("stage two, no penalty")]
    assert any("groups " in line and "  ties " in line for line in lines), lines
