"""The paper's VGG-16 setting on made-up data, with narrow layers: its steps, its measures, going on after a stop."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import vgg16_cifar10 as bench
from benchmarks.vgg16 import WEIGHTS, Vgg16, augmented, layers, regularised, standardised
from benchmarks.vgg16_tables import vgg16
from torch import Tensor, nn
from torch.optim import SGD

import tying
from tying import Groups, GrOWL
from tying.penalties.sequences import Pld

INPUTS = Groups.inputs()
NARROW = (8, 8, 8, 8, 16, 16, 16, 16, 16, 16, 16, 16, 16)
SETTING = replace(bench.SMOKE, batch=16, widths=NARROW)


def made_up(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise, brighter on one side: uint8, ten classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    images = torch.randint(100, (count, 3, 32, 32), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, :, 3 * label :][:, :, :5] += 150
    return images.to(torch.uint8), labels


def narrow(seed: int = 0) -> Vgg16:
    torch.manual_seed(seed)
    return Vgg16(NARROW)


def planted() -> Vgg16:
    """Three zero groups and two nearly equal ones in two of the layers; nothing to be found in the others."""
    model = narrow()
    with torch.no_grad():
        for name in ("conv6.weight", "fc1.weight"):
            weight = model.get_parameter(name)
            weight[:, :3] = 0
            weight[:, 4] = weight[:, 3] * 1.01
    return model


def test_full_size_is_the_papers() -> None:
    with torch.device("meta"):
        model = Vgg16()
    assert sum(layer.weight.numel() for layer in layers(model).values()) == WEIGHTS
    assert len(layers(model)) == 15
    assert regularised(model) == [*(f"conv{i}.weight" for i in range(2, 14)), "fc1.weight"]
    assert len(bench.rules(model, "GrOWL", 390)) == len(bench.STRENGTHS) == 13
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)


def law_one_prox_of_the_learning_rate(steps_told: int) -> None:
    """An epoch of three steps without a gradient ends in one prox whose step is the learning rate."""
    model = narrow()
    before = {name: model.get_parameter(name).detach().clone() for name in regularised(model)}
    optimizer = SGD(model.parameters(), lr=0.01)
    handle = tying.proximal(optimizer, model, bench.rules(model, "GrOWL", steps_told), every="epoch")
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    handle.epoch_end()
    handle.remove()
    for (name, weight), (base, slope) in zip(before.items(), bench.STRENGTHS, strict=True):
        penalty = GrOWL(1.0, Pld(base, slope, 0.1, variant="vgg"))
        expected = INPUTS.write(penalty.prox(INPUTS.read(weight), 0.01), weight.shape)
        assert torch.allclose(model.get_parameter(name), expected, atol=1e-6)


def test_one_prox_of_the_learning_rate() -> None:
    law_one_prox_of_the_learning_rate(3)


def test_strengths_of_every_step_are_found_out() -> None:
    with pytest.raises(AssertionError):
        law_one_prox_of_the_learning_rate(1)


def test_images_are_crops_of_what_was_padded_then_standardised() -> None:
    images, _ = made_up(12, 0)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for image, found in zip(padded, augmented(images, torch.Generator().manual_seed(0)), strict=True):
        crops = [image[:, y : y + 32, x : x + 32] for y in range(5) for x in range(5)]
        candidates = standardised(torch.stack([*crops, *(crop.flip(2) for crop in crops)]))
        assert (candidates - found).abs().flatten(1).amax(1).min() < 1e-6
        assert found.mean().abs() < 1e-5
        assert found.std(correction=0) == pytest.approx(1, abs=1e-4)
    assert torch.equal(standardised(torch.full((1, 3, 32, 32), 7)), torch.zeros(1, 3, 32, 32))


Resume = Callable[[Path, Mapping[str, Any], Mapping[str, Any], torch.device], tuple[int, float]]


def law_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch, resume: Resume) -> None:
    """Three epochs, and one, a stop, and two more, give the same weights bit for bit: in stage one and tied."""
    split = made_up(32, 0)
    common = {"batch": 16, "decay": 2e-3, "seed": 0}
    monkeypatch.setattr(bench, "resume", resume)
    for tied in (False, True):
        networks: list[nn.Module] = []
        for epochs in ((3,), (1, 3)):
            for count in epochs:  # a new process has a new network
                model = planted()
                if tied:
                    tying.tie_(model, bench.plan_for(model), gradient="mean")
                stage = bench.Stage(count, 1e-2, 2)
                path = folder / f"{tied}-{len(epochs)}.pt"
                bench.train(model, split, stage, path=path, penalty="none" if tied else "GrOWL", **common)
            networks.append(model)
        one, other = (model.state_dict() for model in networks)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    law_goes_on(tmp_path, monkeypatch, bench.resume)


@pytest.mark.parametrize("forgotten", ["optimizer", "schedule"])
def test_what_is_forgotten_is_found_out(forgotten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resume = bench.resume

    def twin(
        path: Path, parts: Mapping[str, Any], setting: Mapping[str, Any], device: torch.device
    ) -> tuple[int, float]:
        return resume(path, {name: part for name, part in parts.items() if name != forgotten}, setting, device)

    with pytest.raises(AssertionError):
        law_goes_on(tmp_path, monkeypatch, twin)


@pytest.mark.parametrize(
    "other", [{"decay": 0.0}, {"batch": 8}, {"seed": 1}, {"penalty": "none"}, {"stage": bench.Stage(2, 1e-3, 2)}]
)
def test_a_checkpoint_of_another_setting_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    path, split = tmp_path / "one.pt", made_up(32, 0)
    common = {"stage": bench.Stage(1, 1e-2, 2), "batch": 16, "decay": 2e-3, "seed": 0, "penalty": "GrOWL"}
    bench.train(narrow(), split, path=path, **common)
    before = path.read_bytes()
    name = "rate" if "stage" in other else next(iter(other))
    with pytest.raises(ValueError, match=rf"got {name} = "):
        bench.train(narrow(), split, path=path, **{**common, **other})
    assert path.read_bytes() == before


def test_plan_ties_what_is_alike_and_nothing_else() -> None:
    plan = bench.plan_for(planted())
    found = {tie.members[0].parameter: tie.partition for tie in plan}
    assert list(found) == regularised(planted())
    for name in ("conv6.weight", "fc1.weight"):
        labels = found[name].labels
        assert labels[:3].tolist() == [-1, -1, -1]
        assert labels[3] == labels[4] >= 0
    assert found["conv9.weight"].classes == 16


def counted(model: nn.Module, plan: tying.TiePlan) -> dict[str, float]:
    """The paper's measures, number by number, of the weights after the plan."""
    weights = {name: layer.weight.detach().clone() for name, layer in layers(model).items()}
    labels = {tie.members[0].parameter.removesuffix(".weight"): tie.partition.labels.tolist() for tie in plan}
    names = list(weights)
    total = left = unique = 0
    for name, after in zip(names, [*names[1:], None], strict=True):
        inputs = labels.get(name, list(range(weights[name].shape[1])))
        read = [True] * weights[name].shape[0]
        if after is not None:
            read = [label >= 0 for label in labels.get(after, range(weights[after].shape[1]))]
        kernel = weights[name][0, 0].numel()
        total += weights[name].numel()
        left += sum(kernel for label in inputs for is_read in read if label >= 0 and is_read)
        unique += kernel * len({label for label in inputs if label >= 0}) * sum(read)
    return {"sparsity": 1 - left / total, "sharing": left / unique, "compression": total / unique}


def test_the_papers_measures_are_what_counting_gives() -> None:
    model = planted()
    plan = bench.plan_for(model)
    found = bench.papers_measures(model, plan)
    assert found == pytest.approx(counted(model, plan))
    assert found["compression"] == pytest.approx(found["sharing"] / (1 - found["sparsity"]))
    assert found["compression"] > 1.05


@pytest.mark.parametrize("method", ["weight decay", "group lasso + l2", "GrOWL + l2"])
def test_smoke(method: str, tmp_path: Path) -> None:
    """Both stages; what is compacted computes what was trained."""
    row = bench.run(method, SETTING, 0, made_up(48, 0), made_up(40, 1), tmp_path)
    assert 0 <= row["test"] <= 100
    assert row["test_compacted"] == pytest.approx(row["test"], abs=100 / 40)
    assert row["papers_measures"]["compression"] >= 1
    assert len(row["layers"]) == 13
    (line,) = bench.lines([row])
    assert line["test_spread"] is None
    assert method in bench.said(line)
    seconds = row["seconds"]
    assert bench.run(method, SETTING, 0, made_up(48, 0), made_up(40, 1), tmp_path)["seconds"] == seconds


def test_a_layer_that_lost_everything_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strengths = [(1e4, 0.1) if i == 4 else (1e-3, 0.0) for i in range(13)]
    monkeypatch.setattr(bench, "STRENGTHS", strengths)
    row = bench.run("GrOWL", SETTING, 0, made_up(48, 0), made_up(40, 1), tmp_path)
    assert row["collapsed"] == ["conv6.weight"]
    assert bench.said(bench.lines([row])[0]).endswith("collapsed: conv6.weight")


Table = Callable[[Mapping[str, Any]], Iterator[str]]


def law_table(table: Table, rows: list[dict[str, Any]]) -> None:
    """Every line has its row, and the figures in it are those that were recorded."""
    results = {"settings": asdict(SETTING), "smoke": True, "weights": WEIGHTS, "lines": bench.lines(rows)}
    recorded = json.loads(json.dumps(results, allow_nan=False))
    text = list(table(recorded))
    assert any("mean nothing" in line for line in text)
    head, rule, *body = [line.strip("| ").split("|") for line in text if line.startswith("|")]
    assert {len(cells) for cells in (head, rule, *body)} == {8}
    assert [cells[0].strip() for cells in body] == [line["method"] for line in recorded["lines"]]
    for cells, line in zip(body, recorded["lines"], strict=True):
        assert f"({line['paper']['test']:.1f})" in cells[2]
        assert f"({line['paper']['compression']:.1f}×)" in cells[5]
        assert ("collapsed" in cells[1]) == (line["collapsed"] > 0)
        if "test_mean" in line:
            assert float(cells[2].split()[0]) == pytest.approx(line["test_mean"], abs=0.005)
            sparsity, sharing, compression = (float(cell.split()[0].rstrip("%×")) for cell in cells[3:6])
            assert compression == pytest.approx(line["compression"], abs=0.06)
            assert compression == pytest.approx(sharing / (1 - sparsity / 100), rel=0.1)
            assert float(cells[6].strip().rstrip("×")) == pytest.approx(line["stored"], abs=0.06)


def rows_of_a_table(folder: Path) -> list[dict[str, Any]]:
    """A line of a smoke run with two seeds, one of a single seed that collapsed, one where one of two did."""
    rows = [bench.run("GrOWL + l2", SETTING, seed, made_up(48, 0), made_up(40, 1), folder) for seed in (0, 1)]
    lost = {"seed": 1, "seconds": [1.0], "test_after_stage_one": 10.0, "collapsed": ["conv6.weight", "fc1.weight"]}
    return [*rows, {"method": "GrOWL", **lost}, {**rows[0], "method": "group lasso"}, {"method": "group lasso", **lost}]


def test_table_says_what_was_recorded(tmp_path: Path) -> None:
    rows = rows_of_a_table(tmp_path)
    law_table(vgg16, rows)

    def the_papers_own(results: Mapping[str, Any]) -> Iterator[str]:
        lines = [{**line, "test_mean": line["paper"]["test"]} for line in results["lines"]]
        return vgg16({**results, "lines": lines})

    with pytest.raises(AssertionError):
        law_table(the_papers_own, rows)
