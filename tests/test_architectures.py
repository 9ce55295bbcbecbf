"""Networks of full size: channels as written down by hand, held to trials; then planted with structure, and cut."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from benchmarks import data
from benchmarks.channels import oracle, weights
from benchmarks.channels.draws import try_one
from benchmarks.channels.plant import Part, Plant, planted
from benchmarks.channels.weights import SOURCES
from benchmarks.data import DataUnavailableError, is_here
from torch import Tensor, nn

from architectures import ARCHITECTURES, Architecture
from llama import Llama
from streams import feels, tensors_of
from tying.enforce.compaction.compact import compact
from tying.plan import TiePlan

Made = tuple[Architecture, nn.Module, tuple[Tensor, ...]]


FETCHED = {"efficientnet_lite0": ("code", "lite0"), "minilm": ("minilm",)}
"""What is fetched for a network; tests don't."""


def made(name: str) -> Made:
    if not all(is_here(SOURCES[part]) for part in FETCHED.get(name, ())):
        pytest.skip(f"the weights of {name} have not been fetched")
    try:
        return ARCHITECTURES[name], *ARCHITECTURES[name].make()
    except DataUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def full_size(request: pytest.FixtureRequest) -> Made:
    return made(request.param)


def test_channels_are_as_written_down(full_size: Made) -> None:
    architecture, model, inputs = full_size
    streams = architecture.streams(model)
    tensors = tensors_of(model)
    for one in streams:
        for span in (*one.makers, *one.readers):
            assert max(span.indices(one.count - 1)) < tensors[span.tensor].shape[span.axis]
    chosen = streams[:: max(1, len(streams) // 6)] + streams[-1:]  # the benchmark tries all
    assert oracle.wrong_streams(model, inputs, chosen) == []


def test_planted_and_compacted(full_size: Made) -> None:
    """Equal to the planted network on other inputs, also of other sizes; all that can go has gone, as counted."""
    architecture, model, _ = full_size
    verdict, _, _ = try_one(architecture, model, architecture.streams(model), seed=1)
    assert verdict.outcome == "equal", verdict
    assert verdict.removed == verdict.exact, verdict
    assert verdict.after == verdict.implied, verdict


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With an empty cache, a network that needs files is skipped, and nobody looks for them elsewhere."""
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(weights, "ensure", lambda source: pytest.fail(source.name))
    for name in FETCHED:
        with pytest.raises(pytest.skip.Exception, match="have not been fetched"):
            made(name)


@pytest.mark.parametrize("name", ["lenet5", "resnet20"])
def test_a_forgotten_reader_is_found_out(name: str) -> None:
    architecture, model, inputs = made(name)
    one = next(s for s in architecture.streams(model) if len(s.readers) == (1 if name == "lenet5" else 4))
    broken = dataclasses.replace(one, readers=one.readers[:-1])
    assert feels(model, inputs, one, [1]) <= oracle.SAME
    assert oracle.wrong_streams(model, inputs, [broken]) == [one.name]


def test_the_plan_is_projected_as_the_package_does() -> None:
    """Two ways to the planted network: by plain loops, and by the plan."""
    architecture, model, _ = made("lenet5")
    _, plant, wanted = try_one(architecture, model, architecture.streams(model), seed=4)
    given = planted(model, plant)[0]
    parameters = dict(given.named_parameters())
    projected = {**parameters, **plant.plan.project(parameters)}
    assert plant.ties
    for name, parameter in wanted.named_parameters():
        torch.testing.assert_close(projected[name], parameter, rtol=1e-12, atol=1e-14)


def test_a_network_that_lost_a_channel_too_many_differs() -> None:
    architecture, model, inputs = made("lenet5")
    stream = architecture.streams(model)[0]
    wanted = planted(model, Plant((Part(stream, (3,), "unread", False),), {}, {}))[1]
    broken = planted(model, Plant((Part(stream, (3, 4), "unread", False),), {}, {}))[1]
    assert oracle.unlike(wanted(*inputs), compact(wanted, TiePlan([]), inputs)(*inputs)) <= oracle.SAME
    assert oracle.unlike(wanted(*inputs), compact(broken, TiePlan([]), inputs)(*inputs)) > oracle.SAME


def test_a_tap_that_meets_only_padding_counts() -> None:
    """A kernel whose only tap lies outside of a 2 × 2 map reads something on a larger one."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 1), nn.Conv2d(3, 3, 5, padding=2, groups=3, bias=False), nn.Conv2d(3, 2, 1)
    ).double()  # fmt: skip
    with torch.no_grad():
        model[1].weight[1] = 0
        model[1].weight[1, 0, 0, 0] = 1
    small = compact(model, TiePlan([]), torch.randn(2, 1, 2, 2, dtype=torch.float64))
    larger = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    assert oracle.unlike(model(larger), small(larger)) <= oracle.SAME


def test_a_constant_with_a_border_is_no_constant() -> None:
    """On one pixel a constant through a padded convolution is one number; a larger map has a border."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 1), nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.Conv2d(3, 2, 1)
    ).double()  # fmt: skip
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 1
    small = compact(model, TiePlan([]), torch.randn(2, 1, 1, 1, dtype=torch.float64))
    larger = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    assert oracle.unlike(model(larger), small(larger)) <= oracle.SAME


@pytest.mark.parametrize("part", ["v", "all"])
def test_a_silent_head_goes(part: str) -> None:
    """A head whose values are zero gives zero, whatever reads it."""
    torch.manual_seed(0)
    model = Llama(words=11, features=24, hidden=8, blocks=1).double().eval()
    with torch.no_grad():
        for name in ("v",) if part == "v" else "qkv":
            weight = model.layers[0].get_submodule(f"{name}_proj").weight
            weight[: len(weight) // 2] = 0
    ids = torch.randint(0, 11, (2, 5))
    small = compact(model, TiePlan([]), ids)
    assert small.layers[0].v_proj.out_features == 4
    assert oracle.unlike(model(ids), small(ids)) <= oracle.SAME
