"""What a benchmark's results say repeats them: the whole command, and it parses to what was asked."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import lenet, resnet20, vgg16_cifar10
from benchmarks.record import command_of

ASKED = [
    [],
    ["--seeds", "3", "--quick"],
    ["--only", "GrOWL + l2", "it's", "--large-seeds", "0"],
]


def parsed(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--large-seeds", type=int, default=2)
    parser.add_argument("--step", type=float, default=0.1)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--named", default="")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    return parser.parse_args(words)


def law_repeats(command: Callable[[str, argparse.Namespace], str]) -> None:
    """The words after the module parse to what was asked, wherever files lie."""
    for words in ASKED:
        asked = parsed(words)
        said = command("some", parsed([*words, "--out", "/elsewhere/a.json", "--runs", "/elsewhere", "--jobs", "1"]))
        python, m, module, *rest = shlex.split(said)
        assert (python, m, module) == ("python", "-m", "benchmarks.some")
        assert parsed(rest) == asked
        assert "elsewhere" not in said


def test_repeats() -> None:
    law_repeats(command_of)


@pytest.mark.parametrize("twin", [
    lambda module, options: f"python -m benchmarks.{module} --seeds {options.seeds}",
    lambda module, options: command_of(module, options).replace("'", ""),
    lambda module, options: f"{command_of(module, options)} --out {options.out}",
])  # fmt: skip
def test_commands_that_repeat_something_else_are_found_out(twin: Callable[[str, argparse.Namespace], str]) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        law_repeats(twin)


def in_threads(monkeypatch: pytest.MonkeyPatch, bench: Any, run: Callable[..., dict[str, Any]]) -> None:
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(bench, "data", lambda *_: None)
    monkeypatch.setattr(bench, "run", run)


def lenet_run(dataset: str, method: str, size: int, choice: Any, seed: int, folder: Path) -> dict[str, Any]:
    row = {"dataset": dataset, "method": method, "size": size, "choice": choice, "seed": seed, "shapes": [[2, 3]]}
    return {**row, "values": 9, "operations": 7, "file_bytes": 50, "validation": 90.0 + seed, "test": 80.0 + seed}


def resnet20_run(method: str, rate: float, seed: int, folder: Path) -> dict[str, Any]:
    row = {"method": method, "rate": rate, "seed": seed, "values": 9, "operations": 7, "file_bytes": 50}
    return {**row, "validation": 90.0 + rate, "test": 80.0 + seed - 2 * (method != "dense")}


@pytest.mark.parametrize(
    ("name", "bench", "run"),
    [("lenet", lenet, lenet_run), ("resnet20", resnet20, resnet20_run)],
    ids=["lenet", "resnet20"],
)
def test_seeds_of_controls_are_said_and_summed_up(
    name: str, bench: Any, run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_threads(monkeypatch, bench, run)
    out = tmp_path / "results.json"
    given = ["--seeds", "3", "--controls", "1", "--jobs", "1", "--out", str(out), "--runs", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [name, *given])
    bench.main()
    found = json.loads(out.read_text())
    assert found["command"] == f"python -m benchmarks.{name} --seeds 3 --controls 1"
    for line in found["results"]["lines"]:
        control = line["method"] in bench.CONTROLS
        assert line["seeds"] == [0, 1, 2][: 1 if control else 3]
        assert line["test_mean"] == pytest.approx(sum(line["test"]) / len(line["test"]))
        assert (line["test_spread"] is None) == control
        assert control or line["test_spread"] == pytest.approx(1)
        if name == "resnet20":
            assert line["below_dense"] == (0 if line["method"] == "dense" else 2)


def test_lines_of_the_vgg_table_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(method: str, setting: object, seed: int, *_: object) -> dict[str, Any]:
        return {"method": method, "seed": seed, "collapsed": ["conv6.weight"]}

    empty = (torch.empty(0), torch.empty(0))
    monkeypatch.setattr(vgg16_cifar10, "data", lambda *_: (empty, empty))
    monkeypatch.setattr(vgg16_cifar10, "run", run)
    out = tmp_path / "vgg.json"
    monkeypatch.setattr("sys.argv", ["vgg", "--method", "GrOWL", "GrOWL + l2", "--smoke", "--out", str(out)])
    vgg16_cifar10.main()
    found = json.loads(out.read_text())
    assert found["command"] == "python -m benchmarks.vgg16_cifar10 --seeds 1 --method GrOWL 'GrOWL + l2' --smoke"
    assert [line["method"] for line in found["results"]["lines"]] == ["GrOWL", "GrOWL + l2"]
