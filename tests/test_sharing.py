"""What several checkpoints share, counted by hand; the bytes that a bundle really has; how it is told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tying import store
from tying.enforce import tie_
from tying.errors import FileError, PlanError
from tying.find.match import match
from tying.inspect import Sharing, inspect

State = dict[str, Tensor]


def network(classes: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, classes))


def pair() -> tuple[State, State]:
    """Equal bodies, a nearly equal bias, other heads, something turned, groups in common, zeros, integers."""
    one = {name: tensor.clone() for name, tensor in network().state_dict().items()}
    other = {name: tensor.clone() for name, tensor in network(4, seed=1).state_dict().items()}
    other["0.weight"], other["0.bias"] = one["0.weight"].clone(), one["0.bias"] * 1.01
    other["turned"] = one["2.weight"].t().contiguous()
    other["more"] = torch.cat([one["4.weight"], torch.randn(9, 40)])
    for state in (one, other):
        state["zeros"], state["steps"] = torch.zeros(5), torch.tensor(3)
    one["short"], other["short"] = torch.arange(4.0), torch.arange(4.0).half()
    return one, other


def how(sharing: Sharing) -> dict[tuple[str, ...], tuple[str, tuple[str, ...]]]:
    return {row.names: (row.how, row.sources) for row in sharing.rows}


def law_sharing(look: Callable[..., Sharing]) -> None:
    one, other = pair()
    sharing = look(one, other)
    assert list(sharing.sources) == ["1", "2"]
    assert how(sharing) == {
        ("0.weight",): ("equal", ("1", "2")),
        ("0.bias",): ("alike", ("1", "2")),
        ("2.weight", "turned"): ("transposed", ("1", "2")),
        ("2.weight",): ("differs", ("1", "2")),
        ("2.bias",): ("differs", ("1", "2")),
        ("4.weight", "more"): ("groups", ("1", "2")),
        ("4.weight",): ("other shape", ("1", "2")),
        ("4.bias",): ("other shape", ("1", "2")),
        ("zeros",): ("zero", ("1", "2")),
        ("short",): ("other dtype", ("1", "2")),
    }
    rows = {row.names: row for row in sharing.rows}
    for name in ("0.bias", "2.weight", "2.bias"):
        a, b = one[name].double().flatten().tolist(), other[name].double().flatten().tolist()
        expected = math.dist(a, b) / max(math.hypot(*a), math.hypot(*b))
        assert rows[name,].distance == pytest.approx(expected, rel=1e-12)
    assert rows["0.weight",].distance == 0
    floats = [t for state in (one, other) for t in state.values() if t.is_floating_point()]
    assert sharing.bytes == sum(t.numel() * t.element_size() for t in floats)
    turned = 2 * 40 * 6 / 8  # bytes of labels: 40 values are told apart by 6 bits
    groups = math.ceil(15 * 4 / 8)
    assert sharing.saved == (30 * 40 + 40 * 30 + 3 * 40) * 4 - turned - groups
    assert [(s.name, s.reason) for s in sharing.skipped] == [(f"{i}.steps", "int64 numbers") for i in (1, 2)]


def test_what_two_share_is_counted() -> None:
    law_sharing(inspect)


def swapped(one: State, other: State) -> Sharing:
    return inspect(one, {name: t.t() if t.dim() == 2 else t for name, t in other.items()})


def without_the_first(one: State, other: State) -> Sharing:
    return inspect(dict(list(one.items())[1:]), other)


def absolute(one: State, other: State) -> Sharing:
    return inspect({n: t * 2 for n, t in one.items()}, other)


@pytest.mark.parametrize("broken", [swapped, without_the_first, absolute])
def test_a_wrong_count_is_caught(broken: Callable[..., Sharing]) -> None:
    with pytest.raises(AssertionError):
        law_sharing(broken)


def test_the_bundle_has_the_bytes_that_were_told(tmp_path: Path) -> None:
    one, other = network(), network()
    with torch.no_grad():
        other[4].weight.add_(1)
    models = {"one": one, "other": other}
    for name, model in models.items():
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    sharing = inspect(*(tmp_path / f"{name}.safetensors" for name in models))
    assert list(sharing.sources) == ["one", "other"]
    store.save(models, tmp_path / "apart")
    tie_(models, match(models, equal=True))
    store.save(models, tmp_path / "bundle")
    spared = (tmp_path / "apart").stat().st_size - (tmp_path / "bundle").stat().st_size
    assert spared == pytest.approx(sharing.saved, abs=1500)  # what the headers differ in
    assert sharing.saved > 9000


def test_the_table_says_it_shortly() -> None:
    assert str(inspect(*pair())).replace("\u202f", " ").splitlines() == [
        "1: state dict",
        "2: state dict",
        "weight             in   shape         how                    distance   bytes  in a bundle",
        "0.weight           1 2  30×40         equal                             9,600        4,800",
        "0.bias             1 2  30            alike                    0.0099     240          240",
        "2.weight ~ turned  1 2  40×30, 30×40  transposed                        9,600        4,860",
        "2.weight           1 2  40×30         differs                     1.4   4,800        4,800",
        "2.bias             1 2  40            differs                     1.4     320          320",
        "4.weight ~ more    1 2  3×40, 12×40   15 groups → 12 values             2,400        1,928",
        "4.weight           1 2  3×40, 4×40    other shape                         640          640",
        "4.bias             1 2  3, 4          other shape                          28           28",
        "zeros              1 2  5             zero                                 40           40",
        "short              1 2  4             other dtype                   0      24           24",
        "total                                                                  27,692       17,680",
        "A bundle spares 10,012 bytes (36.2 %), labels counted, once what is equal is tied.",
        "equal, transposed, groups → values: bit for bit. alike: distance ≤ 0.05.",
        "distance: ‖a − b‖ ÷ max(‖a‖, ‖b‖).",
        "Not looked at: 2 × int64 numbers.",
    ]


def test_many_weights_that_are_equal_are_one_line() -> None:
    state = {f"layers.{i}.weight": torch.randn(4, 4) for i in range(40)}
    told = str(inspect({**state, "head": torch.ones(2)}, {**state, "head": torch.ones(3)})).splitlines()
    assert told[3].split() == ["40", "weights", "1", "2", "equal", "5,120", "2,560"]
    assert len(told) == 9


def test_three_files_and_json(tmp_path: Path) -> None:
    one, other = pair()
    for folder, state in (("x", one), ("y", other), ("z", one)):
        (tmp_path / folder).mkdir()
        save_file(state, tmp_path / folder / "model.safetensors")
    files = [tmp_path / folder / "model.safetensors" for folder in "xyz"]
    sharing = inspect(*files, tolerance=0.0)
    assert sharing.sources == {str(i + 1): str(file) for i, file in enumerate(files)}
    by_name = [(row.how, row.sources) for row in sharing.rows if row.names == ("0.bias",)]
    assert by_name == [("equal", ("1", "3")), ("differs", ("1", "2", "3"))]
    told = json.loads(sharing.to_json())
    assert told["totals"] == {"bytes": sharing.bytes, "bytes_left": sharing.bytes_left, "saved": sharing.saved}
    assert sum(row["bytes"] for row in told["rows"]) == sharing.bytes
    assert len(told["rows"]) == len(sharing.rows)


def test_a_tensor_under_two_names_is_there_once() -> None:
    weight = torch.randn(3, 3)
    sharing = inspect({"a": weight, "b": weight}, {"a": weight.clone()})
    assert sharing.bytes == 2 * 36
    assert [s.reason for s in sharing.skipped] == ["the same tensor as a"]


def test_strange_tensors_are_passed_over() -> None:
    nan = torch.tensor([math.nan, 1.0])
    state = {"nan": nan, "meta": torch.empty(3, device="meta"), "empty": torch.empty(0), "w": torch.ones(2)}
    sharing = inspect(state, {"nan": nan + 1, "w": torch.ones(2), "alone": torch.ones(1)})
    assert [(row.how, row.distance) for row in sharing.rows] == [("differs", None), ("equal", 0), ("alone", None)]
    json.loads(sharing.to_json())


@pytest.mark.parametrize(
    ("sources", "options", "error", "message"),
    [
        (
            ({"w": torch.ones(2)}, {}),
            {},
            FileError,
            "state dict: expected at least one floating-point tensor, got none",
        ),
        (({"w": torch.ones(2)}, {"n": torch.tensor(1)}), {}, FileError, "got none of 1 tensors"),
        (({"w": torch.ones(2)}, "none.safetensors"), {}, FileError, "none.safetensors: expected a checkpoint"),
        (({"w": torch.ones(2)}, nn.Linear(2, 2)), {}, FileError, "source: expected a path or a state dict, got Linear"),
        (({"w": torch.ones(2)},) * 2, {"tolerance": 1.0}, PlanError, "tolerance: expected"),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    sources: tuple[object, ...], options: dict[str, float], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        inspect(*sources, **options)
