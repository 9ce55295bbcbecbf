"""What was measured of a network, beside the one it stands for: the ratios, a table, JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from tying import words
from tying.errors import TyingError

BATCHES = (1, 256)
"""The batch sizes at which networks are timed."""


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward pass of a batch on one thread: the median of the rounds and its quartiles."""

    batch: int
    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """The interquartile range, in seconds."""
        return self.high - self.low


@dataclass(frozen=True)
class Figures:
    """What is known of one network; None where nothing was asked or can be said."""

    parameters: int
    """Numbers in its parameters, each parameter once, as `sum(p.numel() for p in model.parameters())`."""
    values: int
    """Unique non-zero numbers: every tie counted once, zeros not."""
    bits: int
    """What its parameters take when every tie is stored once (zeros counted), plus ⌈log2 K⌉ bits per label."""
    bytes: int
    """On disk, as `tying.save` writes it."""
    plain_bytes: int
    """On disk, as a `.safetensors` file of its state dict, shared tensors once."""
    operations: int | None = None
    """Multiply-adds of one forward pass at batch 1, from `torch.utils.flop_counter` (which counts products, so not
    the additions that sum tied inputs)."""
    latency: tuple[Latency, ...] = ()
    """One for each batch size; empty: not asked."""
    accuracy: float | None = None


@dataclass(frozen=True)
class Report:
    """A network beside the one it stands for; `str()` is a table.

    With P = the numbers in all parameters of `like` (of the model itself where there is no `like`):
    `unique` = P ÷ the model's unique non-zero numbers (the papers' figure: no labels, no zeros);
    `stored` = bits of P ÷ bits of the model's unique set and its packed labels;
    `file` = bytes of `like`'s plain state dict on disk ÷ bytes of the model as `tying.save` writes it.
    A ratio whose divisor is 0 is None.
    """

    model: Figures
    like: Figures | None
    parameter_bits: int
    """Bits of all parameters of `like`, or of the model."""

    @property
    def parameters(self) -> int:
        """P: the numbers in all parameters of `like`, or of the model."""
        return (self.like or self.model).parameters

    @property
    def values(self) -> int:
        """The model's unique non-zero numbers."""
        return self.model.values

    @property
    def unique(self) -> float | None:
        """P ÷ unique non-zero numbers."""
        return words.ratio(self.parameters, self.model.values)

    @property
    def stored(self) -> float | None:
        """Bits of P ÷ bits of the unique set with its labels."""
        return words.ratio(self.parameter_bits, self.model.bits)

    @property
    def file(self) -> float | None:
        """Bytes of the plain file of `like` ÷ bytes of the model's file."""
        return words.ratio((self.like or self.model).plain_bytes, self.model.bytes)

    def to_json(self) -> str:
        """Return everything, ratios too, as JSON; `from_json` is the inverse."""
        ratios = {"unique": self.unique, "stored": self.stored, "file": self.file}
        return json.dumps({**asdict(self), "ratios": ratios}, indent=2, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Report:
        """Read what `to_json` gave.

        Raises:
            TyingError: If the text is something else.
        """
        try:
            read = json.loads(text)
            like = read["like"]
            return Report(_figures(read["model"]), _figures(like) if like else None, read["parameter_bits"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TyingError(
                f"text: expected what Report.to_json gave, got something else ({error!r}); measure again"
            ) from error

    def __str__(self) -> str:
        return _table(self)


def _figures(read: dict[str, Any]) -> Figures:
    return replace(Figures(**read), latency=tuple(Latency(**each) for each in read["latency"]))


def _table(report: Report) -> str:
    model, like = report.model, report.like
    base = like or model
    rows = [
        ("", "model", "like" if like else "itself, plain", "ratio"),
        ("parameters", *_compared(words.count, model.parameters, base.parameters)),
        ("unique non-zero values", *_compared(words.count, model.values, base.parameters)),
        ("stored, labels counted", *_compared(words.size, model.bits / 8, report.parameter_bits / 8)),
        ("file", *_compared(words.size, model.bytes, base.plain_bytes)),
        ("operations", *_compared(words.count, model.operations, like and like.operations)),
    ]
    for batch in BATCHES:
        mine, theirs = _at(model, batch), _at(like, batch)
        times = words.times(words.ratio(theirs and theirs.median, mine and mine.median))
        rows.append((f"latency, batch {batch}", _time(mine), _time(theirs), times))
    dense = like.accuracy if like else None
    change = None if model.accuracy is None or dense is None else model.accuracy - dense
    rows.append(("accuracy", words.percent(model.accuracy), words.percent(dense), words.points(change)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def _compared(write: Callable[[float | None], str], small: float | None, large: float | None) -> tuple[str, str, str]:
    return write(small), write(large), words.times(words.ratio(large, small))


def _at(figures: Figures | None, batch: int) -> Latency | None:
    return next((each for each in figures.latency if each.batch == batch), None) if figures else None


def _time(latency: Latency | None) -> str:
    """The median and the interquartile range."""
    return "–" if latency is None else f"{words.seconds(latency.median)} (IQR {words.seconds(latency.spread)})"
