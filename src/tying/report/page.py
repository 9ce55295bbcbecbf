"""The page: one HTML file that needs nothing from outside."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tying import words
from tying.errors import TyingError
from tying.files.atomic import write_atomically
from tying.report.data import Layer, Measures, ReportData
from tying.report.definitions import definitions

if TYPE_CHECKING:
    from tying.report.pictures.style import Picture

MOST_TIES = 200
"""A layer with more shared values than this gets the largest listed, and a word about the rest."""


class HasReportData(Protocol):
    """What carries the data of a page: the result of `compress`."""

    @property
    def data(self) -> ReportData:
        """The data of the page."""
        ...


@dataclass(frozen=True)
class Line:
    """One line of the table: a measure of both networks, and how they compare."""

    name: str
    note: str
    """Name of the footnote that defines it, or empty."""
    dense: str
    small: str
    change: str


@dataclass(frozen=True)
class TiedGroups:
    """One shared value: its label and the groups that have it."""

    label: int
    members: str
    size: int


@dataclass(frozen=True)
class LayerSection:
    """What the page says about one layer."""

    layer: Layer
    pruned: int
    alone: int
    tied: int
    values: int
    ties: tuple[TiedGroups, ...]
    shared: int
    unlisted: int
    grouping: Picture
    similarity: Picture | None
    norms: Picture | None


def report(result: ReportData | HasReportData | str | Path, path: str | Path) -> Path:
    """Write the page of a result: one self-contained HTML file, with its pictures inside.

    Args:
        result: The data of the page; the result of `compress`, which carries it; or the `result.json` that `compress`
            left, or the folder it is in.
        path: Where to write. The file appears whole or not at all.

    Returns:
        The path.

    Raises:
        FileError: If the result is a path, and there is no result.
        TyingError: If matplotlib or Jinja2 is not installed, or the folder of the page is not there.

    Example:
        >>> import tempfile
        >>> from tying.report.data import Measures
        >>> data = ReportData("digits", dense=Measures(parameters=1000), small=Measures(parameters=80))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = report(data, f"{folder}/page.html").read_text(encoding="utf-8")
        >>> "digits" in page and "1,000" in page
        True
    """
    if isinstance(result, (str, Path)):
        result = ReportData.load(result)
    data = result if isinstance(result, ReportData) else result.data
    content = render(data).encode()
    try:
        write_atomically(path, content)
    except OSError as error:
        raise TyingError(f"path: expected a place to write a file, got {path} ({error}); choose another one") from error
    return Path(path)


def render(data: ReportData) -> str:
    """Return the page as HTML text.

    Raises:
        TyingError: If matplotlib or Jinja2 is not installed.
    """
    try:
        import jinja2

        from tying.report.pictures.tradeoff import draw_tradeoff
        from tying.report.pictures.training import draw_training
    except ImportError as error:
        raise TyingError(
            f'report: expected matplotlib and Jinja2 to be installed, got {error}; run: pip install "tying[report]"'
        ) from error

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["data_uri"] = _data_uri  # pyright: ignore[reportArgumentType]
    environment.filters.update({name: getattr(words, name) for name in ("count", "percent", "size", "times")})
    here = files("tying.report")
    table = _table(data.dense, data.small)
    notes = definitions(data, {line.note for line in table})
    template = environment.from_string(here.joinpath("page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        data=data,
        css=here.joinpath("page.css").read_text(encoding="utf-8"),
        headline=_headline(data),
        cards=_cards(data),
        table=table,
        definitions=notes,
        notes={name: number for number, name in enumerate(notes, start=1)},
        layers=[_section(layer) for layer in data.layers],
        tradeoff=draw_tradeoff(data.curve) if data.curve else None,
        training=draw_training(data.history) if data.history else None,
    )


def _data_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def _headline(data: ReportData) -> str:
    smaller = data.small.stored_ratio or words.ratio(data.dense.parameters, data.small.parameters)
    if smaller is not None and smaller < 1.005:
        return "No smaller network was found"
    head = f"{words.times(smaller).replace('×', '')} times smaller"
    change = _difference(data.dense.accuracy, data.small.accuracy)
    if change is None:
        return head
    if abs(change) < 5e-5:
        return f"{head}, at the same accuracy"
    return f"{head}, accuracy {words.points(change)}"


def _cards(data: ReportData) -> list[tuple[str, str, str]]:
    """The figures to read first: `(figure, what it is, what it was before)`."""
    dense, small = data.dense, data.small
    cards = [
        (
            words.times(small.stored_ratio),
            "smaller, labels counted",
            f"{words.count(dense.parameters)} parameters before",
        )
        if small.stored_ratio is not None
        else (words.count(small.parameters), "parameters", f"{words.count(dense.parameters)} before")
    ]
    if small.accuracy is not None:
        cards.append((words.percent(small.accuracy), "test accuracy", f"{words.percent(dense.accuracy)} before"))
    if small.file_bytes is not None:
        cards.append((words.size(small.file_bytes), "on disk", f"{words.size(dense.file_bytes)} before"))
    if small.operations is not None:
        fewer = words.times(words.ratio(dense.operations, small.operations))
        cards.append((fewer, "fewer operations", f"{words.count(dense.operations)} per sample before"))
    return cards


def _table(dense: Measures, small: Measures) -> list[Line]:
    lines = [
        _line("Parameters", "", words.count, dense.parameters, small.parameters),
        _line("Unique values", "unique", words.count, dense.unique, small.unique, small.unique_ratio),
        _line("Stored", "stored", words.size, dense.stored_bytes, small.stored_bytes, small.stored_ratio),
        _line("File", "file", words.size, dense.file_bytes, small.file_bytes, small.file_ratio),
        _line("Multiply-adds per sample", "operations", words.count, dense.operations, small.operations),
        *_latency_lines(dense, small),
        _accuracy_line("Accuracy, validation split", dense.validation, small.validation),
        _accuracy_line("Accuracy, test split", dense.accuracy, small.accuracy),
    ]
    return [line for line in lines if line is not None]


def _line(
    name: str,
    note: str,
    write: Callable[[float | None], str],
    dense: float | None,
    small: float | None,
    ratio: float | None = None,
) -> Line | None:
    if dense is None and small is None:
        return None
    change = ratio if ratio is not None else words.ratio(dense, small)
    return Line(name, note, write(dense), write(small), words.change(change, "smaller", "larger"))


def _latency_lines(dense: Measures, small: Measures) -> list[Line]:
    before = {latency.batch: latency for latency in dense.latency}
    lines: list[Line] = []
    for latency in small.latency:
        old = before.get(latency.batch)
        ratio = words.ratio(old.median, latency.median) if old is not None else None
        shown = [
            "–"
            if one is None
            else f"{words.seconds(one.median)} ({words.seconds(one.low)} to {words.seconds(one.high)})"
            for one in (old, latency)
        ]
        lines.append(
            Line(
                f"Time of a forward pass, batch {latency.batch}",
                "latency",
                shown[0],
                shown[1],
                words.change(ratio, "faster", "slower"),
            )
        )
    return lines


def _accuracy_line(name: str, dense: float | None, small: float | None) -> Line | None:
    if dense is None and small is None:
        return None
    change = words.points(_difference(dense, small))
    return Line(name, "accuracy", words.percent(dense), words.percent(small), change)


def _difference(dense: float | None, small: float | None) -> float | None:
    return None if dense is None or small is None else small - dense


def _section(layer: Layer) -> LayerSection:
    from tying.report.pictures.grouping import draw_grouping
    from tying.report.pictures.norms import draw_norms
    from tying.report.pictures.similarity import draw_similarity

    sizes = Counter(layer.labels)
    pruned = sizes.pop(-1, 0)
    shared = sorted((label for label, size in sizes.items() if size > 1), key=lambda label: (-sizes[label], label))
    places: dict[int, list[int]] = {label: [] for label in shared}
    for place, label in enumerate(layer.labels):
        if label in places:
            places[label].append(place)
    return LayerSection(
        layer=layer,
        pruned=pruned,
        alone=sum(1 for size in sizes.values() if size == 1),
        tied=sum(len(members) for members in places.values()),
        values=len(sizes),
        ties=tuple(TiedGroups(label, _ranges(places[label]), sizes[label]) for label in shared[:MOST_TIES]),
        shared=len(shared),
        unlisted=max(0, len(shared) - MOST_TIES),
        grouping=draw_grouping(layer),
        similarity=draw_similarity(layer) if shared and len(layer.similarity) > 1 else None,
        norms=draw_norms(layer) if layer.norms else None,
    )


def _ranges(numbers: list[int]) -> str:
    """Return ascending numbers with neighbours joined: `3–5, 9`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
