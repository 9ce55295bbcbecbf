"""The command of the channels benchmark: goes on, counts what breaks, keeps the whole only; trials; torch-pruning."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.channels import __main__ as command
from benchmarks.channels import graphs, peer, summary, weights, work
from benchmarks.channels.fixtures import ARCHITECTURES
from benchmarks.channels.plant import Part, Plant, planted
from benchmarks.channels.trials import Outputs, outputs_of
from benchmarks.channels.work import Answer, Task, answered
from benchmarks.data import DataUnavailableError
from torch import nn

from architectures import Architecture, bert_streams

TASKS: list[Task] = [("draws", name, range(1)) for name in ("a", "b", "c", "d", "e")]


def fragile(task: Task, folder: Path) -> Answer:
    """ "b" ends its process, always; "c" the first time."""
    mark = folder / task[1]
    if task[1] == "b" or (task[1] == "c" and not mark.exists()):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return Answer(found=task[1])


def test_a_process_that_dies_costs_its_piece_only(tmp_path: Path) -> None:
    found = {task[1]: answer for task, answer in answered(TASKS, 2, tmp_path, fragile)}
    assert {name: answer.found for name, answer in found.items()} == {"a": "a", "b": None, "c": "c", "d": "d", "e": "e"}
    assert [name for name, answer in found.items() if answer.failed] == ["b"]


def slow(task: Task, folder: Path) -> Answer:
    (folder / task[1]).touch()
    if task[1] != "a":
        signal.pause()
    return Answer(found=task[1])


def test_closing_ends_the_processes(tmp_path: Path) -> None:
    coming = answered(TASKS, 2, tmp_path, slow)
    assert next(coming)[1].found == "a"
    coming.close()  # hangs where they are waited for
    assert not (tmp_path / "e").exists()


def test_finished_pieces_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Task] = []

    def done(task: Task) -> list[str]:
        made.append(task)
        if task[1] == "c":
            raise RuntimeError("no")
        if task[1] == "d":
            raise DataUnavailableError("not here")
        return [task[1]]

    monkeypatch.setattr(work, "done", done)
    first = dict(answered(TASKS, 0, tmp_path))
    again = dict(answered(TASKS, 0, tmp_path))
    assert first == again
    assert [task[1] for task in made] == ["a", "b", "c", "d", "e", "c", "d"]  # what was not there is looked for again
    assert first[TASKS[0]].found == ["a"]
    assert first[TASKS[2]].failed == "RuntimeError: no"
    assert first[TASKS[3]].unavailable == "not here"


def test_another_source_is_another_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = work.fingerprint()
    assert work.fingerprint() == before
    monkeypatch.setattr(peer, "package", lambda: "another one")
    assert work.fingerprint() != before


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of its own for results, and torch-pruning said to be there."""
    monkeypatch.setattr(command, "OUT", tmp_path / "channels.json")
    monkeypatch.setattr(command, "CACHE", tmp_path)
    monkeypatch.setattr(peer, "is_here", lambda: True)
    return tmp_path


def verdict(**other: Any) -> dict[str, Any]:
    names = ("planted", "exact", "removed", "heads_exact", "heads_removed", "implied", "seed")
    counts: dict[str, Any] = dict.fromkeys(names, 0)
    whole = {"outcome": "equal", "said": "", "difference": 0.0, "before": 4, "after": 2, "beyond": {}, "missed": {}}
    return {**counts, **whole, "seconds": 1.0, **other}


def made_up(task: Task, **other: Any) -> Answer:
    if task[0] == "streams":
        return Answer(found={"count": 1, "wrong": []})
    if task[0] == "peer":
        return Answer(found={"equal": 1})
    if task[0] == "graphs":
        return Answer(found=[graphs.Graph(0, [], "equal", "", 1, 1).as_dict()])
    return Answer(found=[verdict(**other)])


def run(monkeypatch: pytest.MonkeyPatch, here: Path, *arguments: str, **other: Any) -> int:
    def answers(tasks: list[Task], *_: object) -> Any:
        return (pair for pair in [(task, made_up(task, **other)) for task in tasks])

    monkeypatch.setattr(command, "answered", answers)
    return command.main(["--runs", str(here), *arguments])


@pytest.mark.parametrize(
    "arguments", [["--only", "mlp"], ["--draws", "5"], ["--graphs", "50"], ["--peer", "0"], ["--quick"]]
)
def test_a_part_does_not_take_the_place_of_the_whole(
    arguments: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, here, *arguments) == 0
    assert (here / "channels-part.json").exists()
    assert not (here / "channels.json").exists()


def test_without_torch_pruning_it_is_a_part(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "is_here", lambda: False)
    assert run(monkeypatch, here) == 0
    assert not (here / "channels.json").exists()


def test_the_whole_is_kept(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, here) == 0
    kept = json.loads((here / "channels.json").read_text())["results"]
    assert kept["complete"]
    assert list(kept["architectures"]) == list(ARCHITECTURES)
    assert kept["peer"]["all"] == {"equal": 110}


@pytest.mark.parametrize("outcome", ["differs", "crashed"])
def test_what_is_wrong_is_said(
    outcome: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, here, "--only", "mlp", outcome=outcome, said="so it is") == 1
    assert f"seed 0: {outcome} so it is" in capsys.readouterr().err
    assert run(monkeypatch, here, "--only", "mlp", outcome="refused") == 0


def test_wrong_streams_and_failed_pieces_are_said() -> None:
    streams = (("streams", "mlp", range(1)), Answer(found={"count": 2, "wrong": ["0"]}))
    failed = (("draws", "mlp", range(20)), Answer(failed="its process died, twice"))
    assert summary.problems(command.collected([streams, failed])) == [
        "failed: draws mlp [0, 20]: its process died, twice",
        "mlp: streams not as written down: 0",
    ]
    assert summary.problems(command.collected([])) == []


def test_quick(tmp_path: Path) -> None:
    """The command itself, on two small networks."""
    out = tmp_path / "out.json"
    arguments = ["--quick", "--only", "mlp", "lenet5", "--jobs", "0", "--runs", str(tmp_path), "--out", str(out)]
    assert command.main(arguments) == 0
    results = json.loads(out.read_text())["results"]
    assert [results["architectures"][name]["equal"] for name in ("mlp", "lenet5")] == [2, 2]
    assert results["graphs"]["graphs"] == 20
    before = out.read_bytes()
    assert command.main(arguments) == 0
    assert out.read_bytes() == before


# ---------------------------------------------------------------- trials


def test_unread_and_constant_outputs_are_found_by_trial() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)
    ).double()  # fmt: skip
    with torch.no_grad():
        model[2].weight[:, 1] = 0  # nobody reads it
        model[0].weight[2] = 0  # a bias
        model[5].weight[:, 16:32] = 0
    x = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = outputs_of(model, [x])
    assert found == {
        "0.weight": Outputs(0, 4, frozenset({1}), frozenset({2})),
        "2.weight": Outputs(0, 3, frozenset({1}), frozenset()),
        "5.weight": Outputs(0, 2, frozenset(), frozenset()),
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_went_is_counted_by_identity() -> None:
    """A constant that went in the place of an unread output does not count for it."""
    weight = torch.randn(6, 5)
    outputs = Outputs(0, 6, frozenset({1, 2}), frozenset({3, 4}))

    def gone(*left: int) -> int:
        return graphs.surely_gone(weight, weight[list(left)][:, [0, 2, 3]], outputs)

    assert gone(0, 3, 4, 5) == 2
    assert gone(0, 1, 2, 5) == 0
    assert gone(0, 2, 3, 5) == 1
    assert gone(0, 5) == 2
    weight[3:5] = 0  # constants that are left can't be told apart: none of them is one that is unread
    assert gone(0, 1, 2, 5) == 0
    assert gone(0, 1, 3, 5) in (0, 1)


def test_what_is_said_to_be_left_must_have_its_own_numbers_in_order() -> None:
    weight = torch.arange(24, dtype=torch.float64).reshape(6, 4)
    left = weight[[0, 2, 5]][:, [0, 3]]
    assert graphs.are_left(weight, left, [0, 2, 5])
    for other in ([0, 2], [0, 1, 5], [2, 0, 5], [0, 2, 4], [0, 2, 4, 5]):
        assert not graphs.are_left(weight, left, other)


# ---------------------------------------------------------------- torch-pruning


@pytest.mark.skipif(not peer.is_here(), reason="torch-pruning is not installed")
def test_torch_pruning_is_asked_for_whole_heads() -> None:
    """What it leaves of a small BERT has the heads that were not planted, and computes the same."""

    def build() -> nn.Module:
        kind = weights.bert_class()
        return kind(kind.config_class(
            vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
            attn_implementation="eager",
        ))  # fmt: skip

    architecture = Architecture(build, bert_streams, (6,), tokens=50)
    try:
        model, inputs = architecture.make()
    except DataUnavailableError as error:
        pytest.skip(str(error))
    heads = next(one for one in bert_streams(model) if one.head)
    part = Part(heads, (1, 2), "unread", False)
    wanted = planted(model, Plant((part,), {}, {}))[1]
    assert peer._outcome(wanted, inputs, part) == "equal"
    assert peer._outcome(model, inputs, part) == "silently wrong", "heads that are read"


@pytest.mark.skipif(not peer.is_here(), reason="torch-pruning is not installed")
def test_its_time_is_up_even_where_that_is_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "SECONDS", 0.05)

    def stubborn() -> None:
        with contextlib.suppress(peer.TooLongError):
            while True:
                pass
        while True:
            pass

    with pytest.raises(peer.TooLongError), peer._limited():
        stubborn()
