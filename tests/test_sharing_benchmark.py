"""The sharing benchmark: one map three times, images moved as said, choices the test split has no part in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import sharing
from benchmarks.data import Images
from torch import Tensor


def law_moves(move: Callable[[Tensor, int, int], Tensor]) -> None:
    """Every pixel is where it should be, or gone; what came in is zero."""
    image = torch.arange(1.0, 31.0).reshape(1, 1, 5, 6)
    for down, right in ((0, 0), (2, 0), (-2, 0), (0, 3), (0, -3), (1, -2)):
        moved = move(image, down, right)
        for y in range(5):
            for x in range(6):
                inside = 0 <= y - down < 5 and 0 <= x - right < 6
                assert moved[0, 0, y, x] == (image[0, 0, y - down, x - right] if inside else 0)


def test_moves() -> None:
    law_moves(sharing.shifted)


def test_rolling_is_found_out() -> None:
    with pytest.raises(AssertionError):
        law_moves(lambda images, down, right: images.roll((down, right), (-2, -1)))


def test_layers_are_one_map() -> None:
    """The same kernel as each of them gives the same outputs; fewer values each time."""
    conv, local, dense = sharing.convolution(), sharing.locally_connected(), sharing.dense()
    x = torch.randn(4, 1, 28, 28)
    maps = torch.eye(784).reshape(784, 1, 28, 28)
    with torch.no_grad():
        local[0] = sharing.LocallyConnected2d.from_conv(conv[0], 28)
        dense[1].weight.copy_((conv[0](maps) - conv[0].bias[:, None, None]).flatten(1).T)
        dense[1].bias.copy_(conv[0].bias.repeat_interleave(14 * 14))
    expected = conv[0](x).flatten(1)
    assert torch.allclose(local[0](x).flatten(1), expected, atol=1e-5)
    assert torch.allclose(dense[1](x.flatten(1)), expected, atol=1e-4)
    values = [sum(p.numel() for p in build().parameters()) - 15_690 for build in sharing.LAYERS.values()]
    assert values == [784 * 1568 + 1568, 196 * 8 * 25 + 1568, 8 * 25 + 8]


def made_up(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """A bright square whose place is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    images = 0.1 * torch.rand(count, 1, 28, 28, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 4 + 10 * (label // 5) :, 5 * (label % 5) :][:5, :5] = 1
    return images, labels


def test_chosen_on_validation_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was chosen has the best validation accuracy; a second call finds everything there and trains nothing."""
    images = Images(train=made_up(400, 0), validation=made_up(100, 1), test=made_up(100, 2))
    monkeypatch.setattr(sharing, "data", lambda: images)
    monkeypatch.setattr(sharing, "STEPS", {50: 15, 200: 15})
    monkeypatch.setattr(sharing, "RATES", (3e-3, 1e-2))
    lines = sharing.learned(tmp_path, [50, 200], 1)
    assert [(line["layer"], line["samples"]) for line in lines] == [(n, s) for s in (50, 200) for n in sharing.LAYERS]
    for line in lines:
        best = max(line["tried"], key=lambda each: each["validation"])
        assert (line["rate"], line["decay"]) == (best["rate"], best["decay"])
        assert line["test_mean"] > 30
        assert len(line["by_shift"]) == (7 if line["samples"] == 200 else 1)

    def fail(*arguments: Any) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr(sharing, "learn", fail)
    assert sharing.learned(tmp_path, [50, 200], 1) == lines


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    images = Images(train=made_up(400, 0), validation=made_up(100, 1), test=made_up(100, 2))
    monkeypatch.setattr(sharing, "data", lambda: images)
    monkeypatch.setattr(sharing, "STEPS", {50: 2, 60: 2, 200: 2})


@pytest.mark.usefixtures("small")
def test_a_few_samples_first_then_all(tmp_path: Path) -> None:
    """What was the largest number of samples, and seen moved, no longer is."""
    few = sharing.learned(tmp_path, [50, 60], 1)
    every = sharing.learned(tmp_path, [50, 60, 200], 2)
    assert [len(line["by_shift"]) for line in few] == 3 * [1] + 3 * [7]
    assert [len(line["by_shift"]) for line in every] == 6 * [1] + 3 * [7]
    assert [line["test"] for line in few] == [line["test"][:1] for line in every[:6]]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("quick", [True, False])
def test_a_quick_run_keeps_no_results(quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sharing.json"
    cost = {"layer_values": 1, "layer_operations": 1, "file_bytes": 1, "memory": {"peak_bytes": 1}}
    costs = {layer: {**cost, "epoch_seconds": {"median": 1.0}} for layer in sharing.LAYERS}
    monkeypatch.setattr(sharing, "STEPS", {300: 1, 1_000: 1})
    monkeypatch.setattr(sharing, "OUT", out)
    monkeypatch.setattr(sharing, "costs", lambda rounds: costs)
    monkeypatch.setattr("sys.argv", ["sharing", "--seeds", "1", "--runs", str(tmp_path / "runs"), *["--quick"] * quick])
    sharing.main()
    assert [path.exists() for path in (out, out.with_suffix(".png"))] == 2 * [not quick]


def test_layers_see_the_same_samples() -> None:
    split = (torch.arange(100.0), torch.arange(100))
    one, other, third = (sharing.some(split, 10, seed)[1].tolist() for seed in (0, 0, 1))
    assert one == other != third
    assert len(set(one)) == 10
