"""Both stages by budget: which strength, how far to tie, and the networks to hold the result against."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import cast

from torch import Tensor

from tying.channels.find import find_channels
from tying.compress import randomness
from tying.compress.fits import FOLDER, Fits
from tying.compress.load import load_task
from tying.compress.progress import Progress
from tying.compress.search import STRENGTHS, Attempt, Search
from tying.compress.summary import Asked, CompressResult, Kind, summarise
from tying.compress.targets import find_targets
from tying.compress.task import FROM_FILE, Task, check_task, name_of
from tying.enforce.compaction.compact import compact
from tying.errors import FileError, TaskError
from tying.files.atomic import write_atomically
from tying.plan import TiePlan
from tying.store import save
from tying.version import __version__

EPOCHS = 30
FITS = 1 + len(STRENGTHS) + (1 + len(STRENGTHS)) + 4
"""How many fits a search begins with, and its controls; a search for `max_drop` needs some more."""


def compress(
    task: Task | None = None,
    *,
    max_drop: float | None = None,
    ratio: float | None = None,
    bytes_: int | None = None,
    seed: int = 0,
    epochs: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> CompressResult:
    """Train a network, learn which of its weights can be equal, enforce it, retrain, and hand back what is left.

    The dense network is trained first. Stage one trains it anew under GrOWL on the inputs and group lasso on the
    outputs of every layer, at several strengths (scaled by what the dense layers are like); `discover` makes plans of
    growing distortion, `compact` the smaller networks, stage two retrains them. The validation split chooses the
    strength and the size; the test split is looked at once, for the report.

    Args:
        task: What to train and how (see `Task`); None: scikit-learn's digits.
        max_drop: The smallest network found whose validation accuracy is within this much (0.003 = 0.3 points) of the
            dense network's. The default, at 0.003.
        ratio: The best network found with at most 1 ÷ ratio of the dense network's parameters (labels not counted).
        bytes_: The best network found whose file has at most this many bytes.
        seed: The same seed gives the same network.
        epochs: Of each fit; None: `task.epochs`, else 30.
        out: A folder for `small.safetensors`, `plan.safetensors` and `result.json`. Finished fits are kept there too:
            after Ctrl-C the same call goes on where it was.
        progress: Whether to say on standard error where the work is.

    Returns:
        The small network, its plan, its measures and all that the report page shows.

    Raises:
        TaskError: If the task lacks a function, or answers with something unusable.
        CompactError: If the network can't be compacted, whatever the plan.
        PlanError: If the budget is out of reach.
        FileError: If `out` holds another run.

    Example:
        >>> result = compress(ratio=8, epochs=2, progress=False)
        >>> result.report.unique >= 8
        True
    """
    budget = _budget(max_drop, ratio, bytes_)
    chosen = load_task() if task is None else task
    check_task(chosen, name_of(chosen))
    rounds = _epochs(chosen, epochs)
    folder = _open(out, chosen, seed, rounds)
    with randomness.kept(), Progress(shown=progress, epochs=rounds * (2 * len(STRENGTHS) + 8)) as bar:
        fits = Fits(chosen, seed=seed, epochs=rounds, folder=folder, progress=bar)
        initial, example = fits.initial(), chosen.example_inputs()
        if not isinstance(example, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TaskError(f"example_inputs(): expected a Tensor, got {type(example).__name__}; return a batch of two")
        compact(initial, TiePlan(), example)  # what can't be compacted at all is refused before anything is trained
        channels = find_channels(initial, example)
        search = Search(fits, channels, find_targets(initial, channels), example)
        attempt = _SEARCHES[budget.kind](search, budget.value)
        result = summarise(search, attempt, budget)
    if folder is not None:
        save(result.model, folder / "small.safetensors", plan=result.plan)
        result.plan.save(folder / "plan.safetensors")
        result.data.save(folder / "result.json")
    return result


_SEARCHES: dict[str, Callable[[Search, float], Attempt | None]] = {
    "max_drop": Search.to_drop,
    "ratio": Search.to_ratio,
    "bytes": lambda search, most: search.to_bytes(int(most)),
}


def _budget(max_drop: float | None, ratio: float | None, bytes_: int | None) -> Asked:
    given: dict[Kind, float | None] = {"max_drop": max_drop, "ratio": ratio, "bytes": bytes_}
    named = {kind: value for kind, value in given.items() if value is not None}
    if len(named) > 1:
        raise TaskError(f"budget: expected one of max_drop, ratio, bytes_, got {', '.join(named)}; choose one")
    kind, value = next(iter(named.items()), ("max_drop", 0.003))
    low, high, hint = {
        "max_drop": (0.0, 1.0, "0.003 is 0.3 points"),
        "ratio": (1.0, math.inf, "24 is 24 times smaller"),
        "bytes": (1.0, math.inf, "20000 is 20 kB"),
    }[kind]
    if not low <= value < high:
        name = "bytes_" if kind == "bytes" else kind
        raise TaskError(f"{name}: expected a number from {low:g} to {high:g}, got {value}; {hint}")
    return Asked(cast("Kind", kind), float(value))


def _epochs(task: Task, given: int | None) -> int:
    epochs = given if given is not None else getattr(task, "epochs", EPOCHS)
    if not isinstance(epochs, int) or epochs < 1:
        raise TaskError(f"epochs: expected a whole number ≥ 1, got {epochs!r}; 30 is the default")
    return epochs


def _open(out: str | Path | None, task: Task, seed: int, epochs: int) -> Path | None:
    """Make the folder, or check that what it holds was begun with the same task, seed and epochs."""
    if out is None:
        return None
    folder = Path(out)
    run = {"task": name_of(task), "source": _digest(task), "seed": seed, "epochs": epochs, "tying": __version__}
    record = folder / "run.json"
    if record.is_file():
        try:
            begun = json.loads(record.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FileError(
                f"{record}: expected the record of a run, got {error}; delete the folder {folder}"
            ) from error
        if begun != run and (folder / FOLDER).is_dir():  # else nothing was done yet: a task that was mended
            raise FileError(
                f"{folder}: expected a new folder or one of the same run {run}, got {begun}; "
                "choose another folder, or delete this one to begin anew"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps(run, indent=2).encode())
    except OSError as error:
        raise FileError(f"out: expected a folder to write to, got {folder} ({error}); choose another one") from error
    return folder


def _digest(task: Task) -> str:
    """Return a digest of the task's class or module, or of the file it was loaded from: an edited task is noticed."""
    module = task if inspect.ismodule(task) else sys.modules.get(type(task).__module__)
    whole = module is task or type(task).__module__.startswith(FROM_FILE)
    try:
        source = inspect.getsource(cast("ModuleType", module) if whole else type(task))
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(source.encode()).hexdigest()[:16]
