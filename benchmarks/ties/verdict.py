"""What became of a tie: measured after the operation and two steps of training, never assumed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks.ties.cases import (
    KINDS,
    Column,
    Kind,
    OptimizerMaker,
    Reference,
    Subject,
    apart,
    data,
    off,
    plan_of,
    sgd,
    tied,
    untied,
)
from tying.errors import TyingError
from tying.plan import qualified

Verdict = Literal["kept", "repaired", "error", "silent", "not applicable"]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.1}
"""Of the difference from the reference's update, relative; a gradient lost or counted twice is 0.1 to 1."""


class NotApplicableError(Exception):
    """There is no such operation for this kind of tie."""


class ChangedError(Exception):
    """The operation itself did another thing than it is for, and said nothing."""


@dataclass
class Expected:
    """What an operation is to leave behind, where that is more than what was."""

    values: dict[str, Tensor] | None = None
    """The weights by name; None: as they were."""
    frozen: tuple[str, ...] = ()
    trajectory: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]] | None = None
    """Makes the weights that are judged from those after each step: an average."""
    judged: Callable[[], Any] | None = None
    """Gives the models that are judged, in place of those that are trained."""
    opaque: bool = False
    """Only outputs can be compared: the layers are not there any more."""
    trained_alike: bool = True
    """Whether the explicit reference trains as this does; else only the ends are compared."""


@dataclass(frozen=True)
class Operation:
    """What happens to tied models in daily use."""

    name: str
    act: Callable[[Subject], Expected | None]
    note: str = ""
    kinds: tuple[Kind, ...] = KINDS
    prepare: Callable[[Subject], None] | None = None
    """Called before the tie."""
    optimizer: Literal["before", "after"] = "after"
    """When the optimizer is made: before the operation or after it."""
    make: OptimizerMaker = sgd
    clip: float | None = None
    steps: int = 2
    must_refuse: str = ""
    """Why nothing but an error is right: what was asked for contradicts the tie."""
    listed: bool = True
    """Whether the issue names it; else it was thought of beside it."""
    slow: bool = False


@dataclass
class Cell:
    """A verdict, and what it rests on."""

    verdict: Verdict
    said: str = ""
    """The error: its type and first line."""
    at: str = ""
    """What was going on when the error came."""
    by: str = ""
    """Whose error it is: tying's or PyTorch's (or another library's)."""
    named: bool = False
    """Whether the error names a parameter, in full."""
    apart: float | None = None
    """The largest difference between the ends; 0: equal bit for bit."""
    off: float | None = None
    """‖difference from the reference's update‖ ÷ ‖update‖."""
    warned: list[str] = field(default_factory=list[str])

    def as_json(self) -> dict[str, Any]:
        """Return what is not empty."""

        def finite(value: object) -> object:
            return str(value) if isinstance(value, float) and not abs(value) < float("inf") else value

        empty = ("", None, [])
        return {k: finite(v) for k, v in asdict(self).items() if v is not False and v not in empty}


def judge(operation: Operation, kind: Kind, column: Column) -> Cell:
    """Run the operation on a tied case, train, compare; errors count only before a wrong step was made."""
    if kind not in operation.kinds:
        return Cell("not applicable")
    subject = Subject(kind, column, {})
    progress = {"steps": 0}
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            subject = _prepared(operation, kind, column)
            cell = _measured(operation, subject, progress)
        except NotApplicableError as reason:
            return Cell("not applicable", said=str(reason))
        except ImportError as error:
            return Cell("not applicable", said=f"not installed: {error.name}")
        except ChangedError as error:
            cell = Cell("silent", said=str(error), at=subject.at)
        except Exception as error:
            cell = refused(error, subject, progress["steps"])
    cell.warned = sorted({str(w.message).splitlines()[0][:160] for w in caught if _matters(w)})
    return cell


def _matters(warning: warnings.WarningMessage) -> bool:
    return not issubclass(warning.category, (DeprecationWarning, FutureWarning, ImportWarning, ResourceWarning))


def _prepared(operation: Operation, kind: Kind, column: Column) -> Subject:
    subject = tied(kind, column, prepare=operation.prepare)
    subject.make, subject.clip = operation.make, operation.clip
    return subject


def _measured(operation: Operation, subject: Subject, progress: dict[str, int]) -> Cell:
    if operation.optimizer == "before":
        subject.optimizers = [subject.make(subject.parameters())]
    start = {qualified(k, n): p.detach() for k, m in untied(subject.kind).items() for n, p in m.named_parameters()}
    subject.at = "the operation"
    with _mended() as repairs:
        return _after(operation, subject, progress, start, repairs)


@contextmanager
def _mended() -> Iterator[list[object]]:
    """What the guard mended meanwhile."""
    repairs: list[object] = []
    heard, log = logging.Handler(logging.INFO), logging.getLogger("tying.enforce.ties.mend")
    heard.emit = repairs.append
    log.addHandler(heard)
    log.setLevel(logging.INFO)
    try:
        yield repairs
    finally:
        log.removeHandler(heard)
        log.setLevel(logging.NOTSET)


def _after(
    operation: Operation, subject: Subject, progress: dict[str, int], start: dict[str, Tensor], repairs: list[object]
) -> Cell:
    expected = operation.act(subject) or Expected()
    start = {name: value.to(subject.dtype) for name, value in (expected.values or start).items()}
    reference = Reference(subject.kind, start, operation.make)
    reference.frozen = set(expected.frozen)
    trajectory: list[dict[str, Tensor]] = []
    for _ in range(operation.steps):
        subject.step()
        reference.step(operation.clip)
        trajectory.append({name: value.detach().clone() for name, value in reference.values.items()})
        progress["steps"] += 1
    subject.at = "the forward after training"
    after = expected.trajectory(trajectory) if expected.trajectory else [start, *trajectory][-1]
    if expected.judged is not None:
        progress["steps"], subject.at = 0, "the operation, after training"
        subject.models, subject.run = expected.judged(), {}
    gap, wrong = _compared(subject, start, after, expected)
    good = gap == 0 and wrong <= TOLERANCE[subject.dtype]
    if not good or operation.must_refuse:
        return Cell("silent", apart=gap, off=wrong, said=operation.must_refuse if good else "")
    return Cell("repaired" if repairs else "kept", apart=gap, off=wrong)


def _compared(
    subject: Subject, start: dict[str, Tensor], after: dict[str, Tensor], expected: Expected
) -> tuple[float, float]:
    """How far the ends are apart, and how far weights and outputs are from the reference's."""
    plain = Reference(subject.kind, start)
    with torch.no_grad():
        before = {key: network.to(subject.dtype) for key, network in plain.networks.items()}
        outputs = _outputs_of(before, start, subject), subject.outputs(), _outputs_of(before, after, subject)
    gap, wrong = 0.0, 0.0
    if expected.trained_alike:
        wrong = off(*({k: v.detach() for k, v in each.items()} for each in outputs))
    if not expected.opaque:
        weights = subject.weights()
        gap = apart(plan_of(subject.kind), weights)
        if expected.trained_alike:
            wrong = max(wrong, off(start, weights, after))
    return gap, wrong


def _outputs_of(networks: dict[str, Any], values: dict[str, Tensor], subject: Subject) -> dict[str, Tensor]:
    found = {}
    for key, network in networks.items():
        own = {name: values[qualified(key, name)] for name, _ in network.named_parameters()}
        found[key] = functional_call(network, own, (data(key, subject.dtype)[0],))
    return found


def refused(error: Exception, subject: Subject, steps: int) -> Cell:
    """An error that comes after a wrong step was made in silence is too late."""
    words = str(error).strip().splitlines() or [""]
    names = [qualified(key, name) for key, m in untied(subject.kind).items() for name, _ in m.named_parameters()]
    late = steps > 0
    return Cell(
        "silent" if late else "error",
        said=("too late: " if late else "") + f"{type(error).__name__}: {words[0][:300]}",
        at=subject.at,
        by="tying" if isinstance(error, TyingError) else "PyTorch",
        named=any(name in str(error) for name in names),
    )
