"""What the report page shows, as data: it comes back as it was, and what does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from made_up_result import BARE, example
from tying.errors import FileError, PlanError
from tying.measure import measure
from tying.nn import TiedLinear
from tying.report import ReportData
from tying.report.data import Layer, measures, similarities
from tying.report.pictures.colours import label_colours


def test_data_come_back_as_they_were(tmp_path: Path) -> None:
    for data in (example(), BARE):
        assert ReportData.from_json(data.to_json()) == data
        data.save(tmp_path / "result.json")
        assert ReportData.load(tmp_path / "result.json") == data


def test_what_was_measured_is_what_is_shown() -> None:
    dense, small = nn.Sequential(nn.Linear(8, 4)), nn.Sequential(TiedLinear([0, 0, 0, 1, 1, 1, 2, -1], 4))
    measured = measure(small, like=dense, example_inputs=torch.ones(2, 8), evaluate=lambda _: 0.5, latency=False)
    before, after = measures(measured, validation=(0.75, 0.5))
    assert (before.parameters, before.stored_bytes, before.accuracy, before.validation) == (36, 4 * 36, 0.5, 0.75)
    assert (after.parameters, after.unique, after.stored_bytes) == (16, 16, 4 * 16 + 8 * 2 / 8)
    assert (after.unique_ratio, after.stored_ratio, after.file_ratio) == (36 / 16, 144 / 66, measured.file)
    assert (before.operations, after.operations) == (32, 12)
    with pytest.raises(PlanError, match="report: expected a network beside"):
        measures(measure(small, latency=False))


def _changed(change: Any) -> str:
    content = json.loads(example().to_json())
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "expected JSON"),
        (example().to_json()[:-30], "expected JSON"),
        ("[1, 2]", "expected an object of format"),
        ('{"format": "tying.plan/1"}', "expected an object of format"),
        (_changed(lambda c: c.pop("dense")), "expected a complete ReportData"),
        (_changed(lambda c: c.update(extra=1)), r"\['extra'\]"),
        (_changed(lambda c: c["dense"].update(parameters="many")), r"result\.dense\.parameters: expected int"),
        (_changed(lambda c: c["small"].update(accuracy=True)), r"result\.small\.accuracy: expected float"),
        (_changed(lambda c: c["small"].update(accuracy=float("nan"))), r"result\.small\.accuracy: expected float"),
        (_changed(lambda c: c["budget"].update(kind="mood")), r"result\.budget\.kind: expected .*max_drop"),
        (_changed(lambda c: c.update(layers=3)), r"result\.layers: expected"),
        (_changed(lambda c: c["layers"].append(3)), r"result\.layers: expected an object"),
        (_changed(lambda c: c["layers"][0].update(norms=[1.0])), r"result: .*Layer\.norms of fc1\.weight"),
    ],
)
def test_foreign_data_are_refused_by_name(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(FileError, match=named):
        ReportData.from_json(text)
    path = tmp_path / "result.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FileError, match=r"result\.json"):
        ReportData.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none\.json: expected the result\.json"):
        ReportData.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("field", "value"), [("grid", (2, 3)), ("norms", (1.0,)), ("weights", (1.0,)), ("similarity", ((1.0,),))]
)
def test_layers_that_do_not_add_up_are_refused(field: str, value: object) -> None:
    layer = dataclasses.replace(Layer("fc1.weight", "inputs", (0, 0, 1, -1)), **{field: value})
    with pytest.raises(PlanError, match=f"Layer.{field} of fc1.weight"):
        dataclasses.replace(BARE, layers=(layer,))


def _similarity_oracle(groups: Any, labels: Any) -> tuple[list[list[float]], list[int]]:
    order = sorted((k for k in range(len(labels)) if labels[k] >= 0 and any(groups[k])), key=lambda k: (labels[k], k))

    def dot(i: int, j: int) -> float:
        return sum(a * b for a, b in zip(groups[i], groups[j], strict=True))

    return [[dot(i, j) / max(dot(i, i), dot(j, j)) for j in order] for i in order], [labels[k] for k in order]


def check_similarities(function: Any) -> None:
    generator = np.random.default_rng(3)
    groups = generator.normal(size=(12, 4))
    groups[5] = 0
    groups[7] = groups[2]
    labels = [3, 1, 0, -1, 2, 2, 1, 0, 3, -1, 0, 1]
    matrix, names = function(groups, labels)
    expected, order = _similarity_oracle(groups.tolist(), labels)
    assert list(names) == order
    np.testing.assert_allclose(matrix, expected, atol=0.00501)


def test_similarities_are_the_papers() -> None:
    check_similarities(similarities)


def test_cosines_are_not_the_papers_similarities() -> None:
    def cosine(groups: Any, labels: Any) -> Any:
        unit = np.asarray(groups) / np.maximum(np.linalg.norm(groups, axis=1, keepdims=True), 1e-300)
        return similarities(unit, labels)

    with pytest.raises(AssertionError):
        check_similarities(cosine)


def test_a_large_similarity_matrix_is_sampled_evenly() -> None:
    labels = np.arange(1000) // 10
    matrix, names = similarities(np.random.default_rng(0).normal(size=(1000, 3)), labels, most=50)
    assert len(matrix) == len(names) == 50
    assert (names[0], names[-1]) == (0, 99)


def _distance(one: Any, other: Any) -> float:
    return float(np.linalg.norm(np.subtract(one, other)))


def check_neighbours_differ(function: Any) -> None:
    """On a chessboard of 64 labels, no two that touch are closer than a quarter of the RGB cube's edge."""
    board = np.random.default_rng(1).permutation(64).reshape(8, 8)
    pairs = [
        *zip(board[:, :-1].flat, board[:, 1:].flat, strict=True),
        *zip(board[:-1].flat, board[1:].flat, strict=True),
    ]
    colours = function(range(64), [(int(a), int(b)) for a, b in pairs])
    assert len(set(colours.values())) == 64
    assert min(_distance(colours[int(a)], colours[int(b)]) for a, b in pairs) > 0.25


def test_neighbouring_labels_get_different_colours() -> None:
    check_neighbours_differ(label_colours)


def test_a_colour_wheel_in_order_is_caught() -> None:
    with pytest.raises(AssertionError):
        check_neighbours_differ(lambda labels, pairs: {k: (k / 64, 0.5, 0.5) for k in labels})
