"""What a checkpoint could give, against a slow and obvious count; and files that must be refused by name."""

from __future__ import annotations

import importlib
import json
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tying import store
from tying.errors import FileError, PlanError
from tying.inspect import Findings, Inspection, inspect
from tying.nn import TiedLinear


def _planted(shape: tuple[int, ...], seed: int, *, zeros: int = 0, copies: int = 0, noise: float = 0.0) -> Tensor:
    """Random weights, the first inputs and outputs zero, the last inputs noisy copies of others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator, dtype=torch.float64)
    for k in range(copies):
        weight[:, -1 - k] = weight[:, zeros + k // 2] * (1 + noise * torch.randn(1, generator=generator).item())
    weight[:, :zeros] *= 1e-3
    weight[:zeros] *= 1e-3
    return weight


CASES: dict[str, tuple[Tensor, float, float]] = {
    "linear": (_planted((7, 12), 0, zeros=2, copies=4), 0.05, 0.05),
    "conv": (_planted((6, 10, 3, 3), 1, zeros=1, copies=3, noise=0.01), 0.05, 0.05),
    "conv1d": (_planted((4, 9, 5), 2, copies=4, noise=0.04), 0.05, 0.05),
    "float32": (_planted((40, 30), 3, zeros=3, copies=8).float(), 0.05, 0.02),
    "bfloat16": (_planted((40, 30), 4, zeros=3, copies=8).bfloat16(), 0.05, 0.02),
    "float16": (_planted((40, 30), 5, zeros=3, copies=8).half(), 0.05, 0.02),
    "exact only": (_planted((5, 20), 6, zeros=1, copies=6), 0.0, 0.0),
    "all zero": (torch.zeros(3, 4), 0.05, 0.05),
    "all equal": (torch.ones(3, 5), 0.05, 0.05),
    "loose": (_planted((2, 200), 7), 0.3, 0.6),
    "chain": (torch.linspace(1, 2, 40).reshape(1, 40).repeat(3, 1), 0.05, 0.05),
    "far apart": (torch.tensor([[1e-30, 1e-30, 1e30, 1e30], [2e-30, 2e-30, 0, 1e29]], dtype=torch.float64), 0, 0.2),
    "more than one block": (_planted((3, 600), 8, copies=200, noise=1e-3), 0.05, 0.05),
    "one input": (torch.ones(4, 1), 0.05, 0.05),
}  # fmt: skip


def _groups(weight: Tensor, dimension: int) -> list[list[float]]:
    return [weight.double().select(dimension, k).flatten().tolist() for k in range(weight.shape[dimension])]


def _norm(group: list[float]) -> float:
    return math.hypot(*group)


def _oracle(weight: Tensor, support: float, tolerance: float) -> Findings:
    """The definitions, one group after another."""
    inputs, outputs = _groups(weight, 1), _groups(weight, 0)

    def kept(groups: list[list[float]]) -> list[list[float]]:
        largest = max(map(_norm, groups))
        return [group for group in groups if _norm(group) > support * largest]

    leaders: list[list[float]] = []
    for group in sorted(kept(inputs), key=_norm, reverse=True):
        if not any(math.dist(group, leader) <= tolerance * _norm(leader) for leader in leaders):
            leaders.append(group)
    names = len(leaders) + (len(kept(inputs)) < len(inputs))
    label_bits = len(inputs) * max(0, math.ceil(math.log2(names))) if len(leaders) < len(inputs) else 0
    left = len(leaders) * len(kept(outputs)) * math.prod(weight.shape[2:])
    return Findings(
        name="w",
        shape=tuple(weight.shape),
        dtype=str(weight.dtype)[6:],
        inputs=len(inputs),
        zero_inputs=len(inputs) - len(kept(inputs)),
        alike_inputs=len(kept(inputs)) - len(leaders),
        compared=len(kept(inputs)),
        outputs=len(outputs),
        zero_outputs=len(outputs) - len(kept(outputs)),
        values=weight.numel(),
        values_left=left,
        bytes=weight.numel() * weight.element_size(),
        bytes_left=left * weight.element_size() + math.ceil(label_bits / 8),
    )


def check_counts(function: Callable[..., Inspection], case: str) -> None:
    """The law: every count is the obvious one's."""
    weight, support, tolerance = CASES[case]
    before = weight.clone()
    found = function({"w": weight}, support=support, tolerance=tolerance)
    assert found.findings == (_oracle(weight, support, tolerance),)
    assert torch.equal(weight, before)


def check_all(function: Callable[..., Inspection]) -> None:
    for case in CASES:
        check_counts(function, case)


@pytest.mark.parametrize("case", CASES)
def test_every_count_is_the_obvious_one(case: str) -> None:
    check_counts(inspect, case)


def _transposed(state: dict[str, Tensor], **options: float) -> Inspection:
    found = inspect({name: weight.transpose(0, 1) for name, weight in state.items()}, **options)
    fixed = replace(found.findings[0], shape=tuple(state["w"].shape))
    return replace(found, findings=(fixed,))


def _without_labels(state: dict[str, Tensor], **options: float) -> Inspection:
    found = inspect(state, **options)
    first = found.findings[0]
    return replace(found, findings=(replace(first, bytes_left=first.values_left * state["w"].element_size()),))


def _absolute(state: dict[str, Tensor], *, support: float, tolerance: float) -> Inspection:
    return inspect(state, support=support, tolerance=min(0.99, tolerance * state["w"].double().norm().item()))


@pytest.mark.parametrize("twin", [_transposed, _without_labels, _absolute])
def test_a_wrong_count_is_caught(twin: Callable[..., Inspection]) -> None:
    with pytest.raises(AssertionError):
        check_all(twin)


def test_a_layer_too_large_is_sampled_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("tying.inspect.one"), "MOST_COMPARED", 10)
    found = inspect({"w": torch.ones(3, 40), "v": torch.ones(3, 10)})
    first, second = found.findings
    assert (first.compared, first.sampled, first.alike_inputs) == (10, True, 9)
    assert (second.compared, second.sampled, second.alike_inputs) == (10, False, 9)
    assert "Of w an even sample of 10 inputs" in str(found)
    assert "Of v" not in str(found)


STATE = {
    "fc1.weight": _planted((6, 8), 0, zeros=2, copies=2).float(),
    "fc1.bias": torch.zeros(6),
    "conv.weight": _planted((4, 5, 3, 3), 1).float(),
    "steps": torch.tensor(3),
    "table": torch.zeros(4, 4, dtype=torch.int64),
}


def _written(path: Path, how: str) -> Path:
    if how == "safetensors":
        save_file(STATE, path)
    elif how == "zip":
        torch.save(STATE, path)
    elif how == "legacy":
        torch.save(STATE, path, _use_new_zipfile_serialization=False)
    elif how == "within":
        torch.save({"epoch": 3, "optimizer": {"state": {}}, "model": {"state_dict": STATE}}, path)
    return path


@pytest.mark.parametrize("how", ["safetensors", "zip", "legacy", "within"])
def test_every_kind_of_file_says_the_same(tmp_path: Path, how: str) -> None:
    found, expected = inspect(_written(tmp_path / "checkpoint", how)), inspect(STATE)
    assert sorted(found.findings, key=lambda f: f.name) == sorted(expected.findings, key=lambda f: f.name)
    assert sorted(found.skipped, key=lambda s: s.name) == sorted(expected.skipped, key=lambda s: s.name)


def test_a_file_of_tying_is_read(tmp_path: Path) -> None:
    store.save(nn.Sequential(TiedLinear([0, 0, 1, -1], 3), nn.ReLU(), nn.Linear(3, 2)), tmp_path / "small.safetensors")
    assert {found.shape for found in inspect(tmp_path / "small.safetensors").findings} == {(3, 2), (2, 3)}


def test_what_is_not_looked_at_has_its_reason() -> None:
    shared = torch.randn(3, 3)
    found = inspect({
        "good": shared,
        "again": shared,
        "bias": torch.zeros(3),
        "count": torch.tensor(1.0),
        "whole": torch.zeros(2, 2, dtype=torch.int32),
        "empty": torch.zeros(0, 2),
        "sparse": torch.eye(2).to_sparse(),
        "meta": torch.zeros(2, 2, device="meta"),
        "broken": torch.tensor([[math.nan, 1.0], [math.inf, 2.0]]),
    })  # fmt: skip
    assert [f.name for f in found.findings] == ["good"]
    assert {s.name: s.reason for s in found.skipped} == {
        "again": "the same tensor as good",
        "bias": "1 dimension",
        "count": "0 dimensions",
        "whole": "int32 numbers",
        "empty": "empty",
        "sparse": "no plain dense tensor",
        "meta": "no plain dense tensor",
        "broken": "2 of its numbers are NaN or infinite",
    }
    assert "Not looked at" in str(found)


def test_totals_and_json_add_up() -> None:
    found = inspect(STATE)
    read = json.loads(found.to_json())
    for name in ("values", "values_left", "bytes", "bytes_left"):
        assert read["totals"][name] == getattr(found, name) == sum(f[name] for f in read["findings"])
    assert read["skipped"][0] == {"name": "fc1.bias", "reason": "1 dimension"}
    assert f"{found.values:,}" in str(found)


class _Runs:
    """A pickle that would run something."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def _truncated(path: Path, how: str, part: float) -> None:
    whole = _written(path, how).read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])


def _tampered(path: Path) -> None:
    store.save(nn.Linear(3, 2), path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "No such file"),
    "a folder": (lambda path: path.mkdir(), "Is a directory"),
    "empty": (lambda path: path.write_bytes(b""), "0 bytes"),
    "text": (lambda path: path.write_text("hello, this is no checkpoint"), "hello"),
    "safetensors cut in the header": (lambda path: _truncated(path, "safetensors", 0.1), "truncated"),
    "safetensors cut in the numbers": (lambda path: _truncated(path, "safetensors", 0.8), "truncated"),
    "zip cut": (lambda path: _truncated(path, "zip", 0.5), "damaged"),
    "legacy cut": (lambda path: _truncated(path, "legacy", 0.5), "damaged"),
    "a pickle that runs": (lambda path: torch.save({"w": _Runs(path.with_name("ran"))}, path), "would run code"),
    "a bare pickle that runs": (lambda path: path.write_bytes(pickle.dumps(_Runs(path.with_name("ran")))), "damaged"),
    "a whole model": (lambda path: torch.save(nn.Linear(2, 2), path), "would run code"),
    "a single tensor": (lambda path: torch.save(torch.ones(2, 2), path), "got a Tensor"),
    "no tensors": (lambda path: torch.save({"epoch": 1}, path), "'epoch'"),
    "no weights": (lambda path: save_file({"bias": torch.ones(3)}, path), "none of 1 tensors"),
    "tampered": (_tampered, "sum"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_by_name(tmp_path: Path, case: str) -> None:
    make, said = BAD[case]
    path = tmp_path / "checkpoint.pt"
    make(path)
    with pytest.raises(FileError, match=said) as caught:
        inspect(path)
    assert "checkpoint.pt" in str(caught.value)
    assert not (tmp_path / "ran").exists(), "the pickle has run"


def test_a_model_is_refused_and_what_is_no_tensor_passed_over() -> None:
    with pytest.raises(FileError, match=r"source: expected a path or a state dict, got Linear; pass model.state_dict"):
        inspect(nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]
    assert inspect({**STATE, "_extra_state": {"epoch": 3}}) == inspect(STATE)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("option", ["support", "tolerance"])
@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_options_out_of_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(PlanError, match=rf"{option}: expected a number in \[0, 1\)"):
        inspect(STATE, **{option: value})
