"""The memory benchmark: what it counts by hand, plans that keep what they say, a peak that holds it all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import memory, stage_two_memory
from benchmarks.stage_two_memory import POWER_OF_UNITS, SUBJECTS, against_dense, drawn, made, perceptron, tied
from torch import nn

BATCH = (torch.randn(32, 784), torch.randint(10, (32,)))


def law_counts(count: Callable[..., dict[str, int]]) -> None:
    found = count(partial(perceptron, 50, 1), BATCH, 2)
    values = 784 * 50 + 50 + 50 * 10 + 10
    assert found["state_bytes"] == 4 * (4 * values + 4), "parameters, gradients, two moments, a step for each of four"
    assert found["kept_bytes"] >= 4 * 32 * (50 + 10), "what ReLU and the loss gave"
    assert found["buffer_bytes"] == 0


def test_counts() -> None:
    law_counts(memory._train)


def test_counts_without_moments_are_found_out() -> None:
    def twin(*arguments: Any) -> dict[str, int]:
        found = memory._train(*arguments)
        return {**found, "state_bytes": found["state_bytes"] // 2}

    with pytest.raises(AssertionError):
        law_counts(twin)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells peaks there")
def test_peak_holds_what_is_counted() -> None:
    found = memory.peak_of_training(partial(perceptron, 600, 1), BATCH, steps=2, processes=1)
    assert found["peak_bytes"] >= 0.95 * (found["state_bytes"] + found["kept_bytes"])
    assert found["peak_bytes"] <= 1.5 * (found["state_bytes"] + found["kept_bytes"])


def values(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("subject", SUBJECTS)
def test_compacted_networks_keep_as_many_values_as_asked(subject: str) -> None:
    dense, small = made(subject, 1), made(subject, 4)
    assert values(dense) / values(small) == pytest.approx(4, rel=0.05)
    x = torch.randn(3, *SUBJECTS[subject].shape)
    assert dense(x).shape == small(x).shape


def law_keeps_as_much_less_as_there_are_fewer_units(subject: str, ratio: float) -> None:
    batch = (torch.randn(2, *SUBJECTS[subject].shape), torch.randint(10, (2,)))
    dense, small = (memory._train(partial(made, subject, r), batch, 1)["kept_bytes"] for r in (1, ratio))
    assert small <= 1.02 * dense * ratio**-POWER_OF_UNITS, f"{small} bytes kept, {dense} by the dense network"


@pytest.mark.parametrize("ratio", [2, 16])
def test_sums_of_tied_inputs_are_not_kept_beside_them(ratio: float) -> None:
    law_keeps_as_much_less_as_there_are_fewer_units("ResNet-20", ratio)


def test_a_network_that_keeps_the_sums_fails_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tying.nn.product.nothing_transforms", lambda: False)
    with pytest.raises(AssertionError, match="by the dense network"):
        law_keeps_as_much_less_as_there_are_fewer_units("ResNet-20", 2)


def test_every_class_of_a_tie_is_used() -> None:
    generator = np.random.default_rng(0)
    alive = drawn(100, 0.4, 8, generator)
    labels = tied("weight", alive, 8, generator).partition.labels
    assert set(labels[~alive]) == {-1}
    assert sorted(set(labels[alive])) == list(range(round(100 * 8**-0.6)))


@pytest.mark.parametrize("quick", [True, False])
def test_a_quick_run_keeps_no_results(quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one(subject: str, ratio: float, images: int, *_: object) -> dict[str, Any]:
        size = round(1e6 / ratio)
        line = {"network": subject, "ratio": ratio, "batch": images, "values": size}
        return {**line, "peak_bytes": size, "state_bytes": size, "kept_bytes": size}

    out = tmp_path / "memory.json"
    monkeypatch.setattr(stage_two_memory, "OUT", out)
    monkeypatch.setattr(stage_two_memory, "one", one)
    monkeypatch.setattr("sys.argv", ["stage_two_memory", *["--quick"] * quick])
    stage_two_memory.main()
    assert [path.exists() for path in (out, out.with_suffix(".png"))] == 2 * [not quick]


def test_lines_are_held_against_the_dense_network_at_the_same_batch() -> None:
    line = {"network": "a", "peak_bytes": 8, "state_bytes": 8, "kept_bytes": 8}
    lines = [
        {**line, "batch": 1, "ratio": 1, "values": 8},
        {**line, "batch": 2, "ratio": 1, "values": 8, "peak_bytes": 16},
        {**line, "batch": 2, "ratio": 2, "values": 4},
    ]
    assert [each["times_fewer"]["peak"] for each in against_dense(lines)] == [1, 1, 2]
    assert against_dense(lines)[2]["times_fewer"]["values"] == 2
