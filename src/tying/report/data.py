"""What the page shows, as plain data: numbers and words, no live objects, so that it can be redrawn from a file."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tying import words
from tying.errors import FileError, PlanError
from tying.figures import Latency, Report
from tying.files.atomic import write_atomically
from tying.groups import similarity

FORMAT = "tying.result/1"

MOST_SIMILAR = 400
"""A similarity matrix of more groups than this is drawn from an even sample of them."""

T = TypeVar("T")


@dataclass(frozen=True)
class Measures:
    """What one network takes and gives. `None`: not measured, and the page leaves it out.

    Ratios are against the dense network: 24 means 24 times smaller.
    """

    parameters: int
    """Numbers in the parameters of the network as it runs."""
    unique: int | None = None
    """Distinct non-zero numbers that the network needs, labels not counted."""
    stored_bytes: float | None = None
    """Bytes of the unique numbers and of the packed labels."""
    file_bytes: int | None = None
    """Bytes on disk."""
    unique_ratio: float | None = None
    stored_ratio: float | None = None
    file_ratio: float | None = None
    operations: int | None = None
    """Multiply-adds of one forward pass for one sample."""
    latency: tuple[Latency, ...] = ()
    accuracy: float | None = None
    """On the test split, in [0, 1]."""
    validation: float | None = None
    """On the validation split, in [0, 1]: the split that chose."""


@dataclass(frozen=True)
class Budget:
    """What was asked, and what came of it, in the same unit."""

    kind: Literal["max_drop", "ratio", "bytes"]
    asked: float
    """`max_drop`: accuracy given up, in [0, 1]. `ratio`: times fewer parameters. `bytes`: size of the file."""
    got: float
    kept: bool

    def asked_in_words(self) -> str:
        """Return what was asked, with its unit."""
        if self.kind == "max_drop":
            return f"at most {words.points(self.asked).lstrip('+±')} of accuracy lost on the validation split"
        if self.kind == "ratio":
            return f"at least {words.times(self.asked)} fewer parameters"
        return f"a file of at most {words.size(self.asked)}"

    def got_in_words(self) -> str:
        """Return what came of it, with its unit."""
        if self.kind == "max_drop":
            return f"{words.points(self.got).lstrip('+')} lost" if self.got > 0 else "nothing lost"
        return f"{words.times(self.got)} fewer" if self.kind == "ratio" else words.size(self.got)

    def __str__(self) -> str:
        verdict = "the budget was kept" if self.kept else "the budget was not kept"
        return f"asked for {self.asked_in_words()}, got {self.got_in_words()}: {verdict}"


@dataclass(frozen=True)
class Layer:
    """One tied parameter: its labels, and what they were read from at the end of stage one."""

    name: str
    """The parameter, for instance `fc1.weight`."""
    groups: str
    """The kind of `Groups`, for instance `inputs`."""
    labels: tuple[int, ...]
    """One per group: the same label is the same value, −1 is pruned."""
    grid: tuple[int, ...] | None = None
    """`(height, width)` or `(channels, height, width)` of the input image if the groups are its pixels."""
    norms: tuple[float, ...] = ()
    """l2 norm per group before anything was pruned, as many as labels; empty: unknown."""
    weights: tuple[float, ...] = ()
    """The OWL weights λ that were applied, strength included, non-increasing, as many as labels; empty: none."""
    threshold: float | None = None
    """The largest norm that was pruned; None: nothing was."""
    similarity: tuple[tuple[float, ...], ...] = ()
    """`S_ij = w_i·w_j / max(‖w_i‖², ‖w_j‖²)` of the groups kept, sorted by label; `similarities` makes it."""
    similarity_labels: tuple[int, ...] = ()
    """The label of each group in `similarity`."""
    penalty: str = ""
    """In words, for instance `GrOWL, strength 0.004, ramp of ratio 3`."""


@dataclass(frozen=True)
class Point:
    """One network in the picture of accuracy against size."""

    label: str
    """What it is, for instance `pruned only`. Points of one label are joined by a line."""
    kind: Literal["ours", "control", "dense"]
    values: int
    """Numbers stored."""
    accuracy: float
    """Mean, in [0, 1]."""
    low: float | None = None
    high: float | None = None
    """The spread, over seeds."""


@dataclass(frozen=True)
class Epoch:
    """The accuracy after one epoch."""

    stage: str
    """For instance `dense`, `stage one`, `stage two`, in the order of time."""
    epoch: int
    """Counted from 1 within the stage."""
    accuracy: float
    """On the validation split, in [0, 1]."""


@dataclass(frozen=True)
class Stayed:
    """Something that was not tied or removed, and why."""

    what: str
    reason: str


@dataclass(frozen=True)
class ReportData:
    """All that the page shows.

    Example:
        >>> data = ReportData(
        ...     title="digits",
        ...     budget=Budget("ratio", asked=12, got=12.4, kept=True),
        ...     dense=Measures(parameters=1000, accuracy=0.98),
        ...     small=Measures(parameters=80, accuracy=0.97, stored_ratio=12.4),
        ...     layers=(Layer("fc1.weight", "inputs", labels=(0, 0, -1, 1), grid=(2, 2)),),
        ... )
        >>> ReportData.from_json(data.to_json()) == data
        True
    """

    title: str
    """The task, for instance `digits`."""
    dense: Measures
    small: Measures
    budget: Budget | None = None
    layers: tuple[Layer, ...] = ()
    curve: tuple[Point, ...] = ()
    history: tuple[Epoch, ...] = ()
    stayed: tuple[Stayed, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences for the reader: what to keep in mind about these figures."""
    provenance: Mapping[str, str] = field(default_factory=dict[str, str])
    """Seed, versions, command, machine, date: name to text."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "provenance", dict(self.provenance))
        for layer in self.layers:
            _check_layer(layer)

    def to_json(self) -> str:
        """Return the data as one JSON object (numbers as they are, nothing that is not finite)."""
        return json.dumps({"format": FORMAT, **asdict(self)}, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> ReportData:
        """Read what `to_json` wrote.

        Raises:
            FileError: If the text is not such an object: names the field, what was expected and what was found.
        """
        try:
            decoded = json.loads(text)
        except ValueError as error:
            raise FileError(
                f"result: expected JSON, got {text[:40]!r} ({error}); pass the result.json of `tying compress`"
            ) from error
        if not isinstance(decoded, dict) or cast("dict[str, Any]", decoded).get("format") != FORMAT:
            raise FileError(
                f"result: expected an object of format {FORMAT!r}, got {text[:40]!r}; "
                "pass the result.json of `tying compress`"
            )
        content = dict(cast("dict[str, Any]", decoded))
        del content["format"]
        return _decode(ReportData, content, "result")

    def save(self, path: str | Path) -> None:
        """Write the data as JSON; the file appears whole or not at all."""
        write_atomically(path, self.to_json().encode())

    @staticmethod
    def load(path: str | Path) -> ReportData:
        """Read what `save` wrote.

        Args:
            path: The file, or the folder in which `compress` left its `result.json`.

        Raises:
            FileError: If the file is not there or is not a result.
        """
        path = Path(path) / "result.json" if Path(path).is_dir() else Path(path)
        try:
            return ReportData.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(
                f"{path}: expected the result.json of `tying compress`, got {error!r}; run `tying compress` to make one"
            ) from error
        except FileError as error:
            raise FileError(f"{path}: {error}") from error


def measures(report: Report, *, validation: tuple[float, float] | None = None) -> tuple[Measures, Measures]:
    """Return what `tying.measure` found, as the page shows it: of the dense network, and of the small one.

    Args:
        report: Of `measure(small, like=dense, ...)`.
        validation: The accuracies of both on the validation split, dense first.

    Raises:
        PlanError: If nothing was measured beside the network.
    """
    dense, small = report.like, report.model
    if dense is None:
        raise PlanError("report: expected a network beside the dense one, got one alone; measure it with like=dense")
    before, after = validation or (None, None)
    return (
        Measures(
            parameters=dense.parameters,
            unique=dense.values,
            stored_bytes=report.parameter_bits / 8,
            file_bytes=dense.plain_bytes,
            operations=dense.operations,
            latency=dense.latency,
            accuracy=dense.accuracy,
            validation=before,
        ),
        Measures(
            parameters=small.parameters,
            unique=small.values,
            stored_bytes=small.bits / 8,
            file_bytes=small.bytes,
            unique_ratio=report.unique,
            stored_ratio=report.stored,
            file_ratio=report.file,
            operations=small.operations,
            latency=small.latency,
            accuracy=small.accuracy,
            validation=after,
        ),
    )


def similarities(
    matrix: ArrayLike, labels: ArrayLike, *, most: int = MOST_SIMILAR
) -> tuple[tuple[tuple[float, ...], ...], tuple[int, ...]]:
    """Return the `similarity` of the groups kept, sorted by label: what `Layer.similarity` and its labels hold.

    Args:
        matrix: The groups, `(G, D)`.
        labels: `(G,)` integers; −1 and zero groups are left out.
        most: Of more groups than this, an even sample along the sorted order is taken.

    Returns:
        `S` as a tuple of tuples, rounded to 0.01 (it is a picture), and the label of each of its groups.

    Example:
        >>> similarities([[1.0, 0.0], [0.0, 0.0], [2.0, 0.0]], [0, -1, 1])
        (((1.0, 0.5), (0.5, 1.0)), (0, 1))
    """
    groups = np.asarray(matrix, dtype=np.float64)
    names: NDArray[np.int64] = np.asarray(labels, dtype=np.int64)
    kept = np.flatnonzero((names >= 0) & (np.linalg.norm(groups, axis=1) > 0))
    order = kept[np.argsort(names[kept], kind="stable")]
    if len(order) > most:
        order = order[np.linspace(0, len(order) - 1, most).round().astype(np.int64)]
    rounded = np.round(similarity(groups[order]), 2)
    return tuple(tuple(map(float, line)) for line in rounded), tuple(map(int, names[order]))


def _check_layer(layer: Layer) -> None:
    count = len(layer.labels)
    cells = math.prod(layer.grid) if layer.grid is not None else count
    expected = {"grid": (cells, (count,)), "norms": (len(layer.norms), (0, count))}
    expected["weights"] = (len(layer.weights), (0, count))
    expected["similarity"] = (len(layer.similarity), (len(layer.similarity_labels),))
    for name, (got, allowed) in expected.items():
        if got not in allowed:
            raise PlanError(
                f"Layer.{name} of {layer.name}: expected {' or '.join(map(str, allowed))} entries, got {got}; "
                "give one per group"
            )


def _decode(kind: Any, value: Any, where: str) -> Any:
    """Rebuild `kind` from what JSON gave, and refuse what does not fit by the name of the field."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        present = [option for option in arguments if option is not type(None)]
        return None if value is None and len(present) < len(arguments) else _decode(present[0], value, where)
    if is_dataclass(kind):
        return _decode_fields(cast("type[Any]", kind), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(arguments[0], item, where) for item in cast("list[Any]", value))
    if origin is Mapping and isinstance(value, dict):
        return {str(name): str(text) for name, text in cast("dict[Any, Any]", value).items()}
    if origin is Literal and value in arguments:
        return value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return value
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise FileError(
        f"{where}: expected {_readable(kind)}, got {str(value)[:40]!r}; run `tying compress` to make it anew"
    )


def _decode_fields(kind: type[T], value: Any, where: str) -> T:
    if not isinstance(value, dict):
        raise FileError(f"{where}: expected an object, got {str(value)[:40]!r}; run `tying compress` to make it anew")
    content, hints = cast("dict[str, Any]", value), get_type_hints(kind)
    names = {f.name for f in fields(cast(Any, kind))}
    unknown = sorted(set(content) - names)
    if unknown:
        raise FileError(f"{where}: expected only {sorted(names)}, got {unknown} as well; update tying to read it")
    decoded = {name: _decode(hints[name], item, f"{where}.{name}") for name, item in content.items()}
    try:
        return kind(**decoded)
    except (TypeError, PlanError) as error:
        raise FileError(f"{where}: expected a complete {kind.__name__}, got: {error}; make it anew") from error


def _readable(kind: Any) -> str:
    return str(getattr(kind, "__name__", kind)) if not get_args(kind) else str(kind).replace("typing.", "")
