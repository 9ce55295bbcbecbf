"""What several checkpoints share, counted by hand; the bytes that a bundle really has; how it is told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tying import store
from tying.enforce import tie_
from tying.errors import FileError, PlanError
from tying.find.declare import declare
from tying.find.match import match
from tying.groups import Groups
from tying.inspect import Inspection, Sharing, inspect
from tying.store.checkpoint import read_tensors

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


# ---------------------------------------------------------------- files that `tying.save` wrote


class Coder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(12, 8), nn.Linear(8, 12)


def coders() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"a": Coder(), "b": Coder()}


def tied_as_a_whole() -> dict[str, nn.Module]:
    models = coders()
    tie_(models, match(models))
    return models


def tied_transposed() -> dict[str, nn.Module]:
    models = coders()
    groups = [("a.encoder.weight", Groups.outputs()), ("b.decoder.weight", Groups.inputs())]
    tie_(models, declare(models, equal=[groups, ["a.encoder.bias", "b.encoder.bias"]]))
    return models


def tied_inside() -> dict[str, nn.Module]:
    models = coders()
    inside = {("a.encoder.weight", Groups.inputs()): [0, 0, 1, 2, 3, 3, 4, 5, -1, 6, 7, 7]}
    tie_(models, declare(models, labels=inside))
    return models


def views_and_aliases() -> dict[str, nn.Module]:
    models: dict[str, Any] = coders()
    models["b"].decoder.weight = nn.Parameter(models["a"].encoder.weight.t())
    models["b"].encoder.bias = models["a"].encoder.bias
    return models


Models = dict[str, nn.Module]


def dense(models: Models) -> State:
    """What the layers compute with, by full name."""
    parts = [(f"{n}.{part}", getattr(model, part)) for n, model in models.items() for part in ("encoder", "decoder")]
    return {
        f"{name}.{leaf}": getattr(part, leaf).detach().clone() for name, part in parts for leaf in ("weight", "bias")
    }


def numbers_in(path: Path) -> int:
    """Bytes of the file's tensors: values and packed labels."""
    with safe_open(path, framework="pt") as file:
        return sum(tensor.nbytes for tensor in map(file.get_tensor, file.keys()))


def law_saved(models: Models, path: Path, look: Callable[..., Any] = inspect) -> None:
    """A file that `tying.save` wrote holds the networks' own weights, and in its bytes what they share once."""
    store.save(models, path)
    plain = dense(models)
    kept = {found.name: found for found in inspect(plain).findings}
    seen = look(path)
    again = {skipped.name for skipped in seen.skipped}
    assert {found.name for found in seen.findings} | again == set(plain)
    for found in seen.findings:
        assert replace(found, bytes=0, bytes_left=0) == replace(kept[found.name], bytes=0, bytes_left=0)
        assert found.bytes_left <= found.bytes <= kept[found.name].bytes
    sharing = look(path, plain)
    assert {row.how for row in sharing.rows} <= {"equal", "transposed", "groups"}
    assert sharing.bytes == numbers_in(path) + sum(tensor.nbytes for tensor in plain.values())
    other = look(path, {"w": torch.randn(7, 7)})
    assert other.saved == 0, "told what the file stores once already"


@pytest.mark.parametrize("build", [coders, tied_as_a_whole, tied_transposed, tied_inside, views_and_aliases])
def test_a_file_of_tying_is_looked_into_as_the_networks_it_holds(build: Callable[[], Models], tmp_path: Path) -> None:
    law_saved(build(), tmp_path / "pair.safetensors")


def packed(source: Path | State, *others: Path | State) -> Inspection | Sharing:
    """Looks at how the file packs its tensors."""
    return inspect(*(load_file(each) if isinstance(each, Path) else each for each in (source, *others)))


def counted_dense(source: Path | State, *others: Path | State) -> Inspection | Sharing:
    """Counts every tensor in full."""
    opened = [
        each if isinstance(each, dict) else {n: t for n, t, _ in read_tensors(each)} for each in (source, *others)
    ]
    return inspect(*opened)


@pytest.mark.parametrize("look", [packed, counted_dense])
@pytest.mark.parametrize("build", [tied_transposed, tied_inside])
def test_a_wrong_look_into_a_file_of_tying_fails_the_law(
    look: Callable[..., Any], build: Callable[[], Models], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError):
        law_saved(build(), tmp_path / "pair.safetensors", look)


def test_a_network_tied_to_another_is_found_in_the_file_of_both(tmp_path: Path) -> None:
    models = tied_as_a_whole()
    store.save(models, tmp_path / "pair.safetensors")
    store.save(models["b"], tmp_path / "alone.safetensors")
    sharing = inspect(tmp_path / "pair.safetensors", tmp_path / "alone.safetensors")
    assert {row.how for row in sharing.rows} == {"equal"}
    assert sharing.saved == sum(tensor.nbytes for tensor in models["b"].state_dict().values())


def law_distance(look: Callable[..., Sharing]) -> None:
    """Tensors of one name that have groups in common are told how far apart they are."""
    one, other = torch.randn(6, 40), torch.randn(6, 40)
    other[:4] = one[:4]
    (row,) = look({"w": one}, {"w": other}).rows
    a, b = one.double().flatten().tolist(), other.double().flatten().tolist()
    assert row.how == "groups"
    assert row.distance == pytest.approx(math.dist(a, b) / max(math.hypot(*a), math.hypot(*b)), rel=1e-12)
    (row,) = look({"w": one}, {"v": other}).rows
    assert (row.how, row.distance) == ("groups", None)


def test_groups_in_common_are_told_with_their_distance() -> None:
    law_distance(inspect)


def without_distances(*sources: State) -> Sharing:
    sharing = inspect(*sources)
    return replace(sharing, rows=tuple(replace(row, distance=None) for row in sharing.rows))


def test_no_distance_fails_the_law() -> None:
    with pytest.raises(AssertionError):
        law_distance(without_distances)


def test_names_with_dots_are_told_apart(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    save_file({"b.w": weight}, tmp_path / "m.safetensors")
    save_file({"w": weight.clone()}, tmp_path / "m.b.safetensors")
    sharing = inspect(tmp_path / "m.safetensors", tmp_path / "m.b.safetensors")
    assert [(row.how, row.names, row.sources) for row in sharing.rows] == [("equal", ("b.w", "w"), ("m", "m.b"))]
    assert sharing.saved == weight.nbytes
    assert sharing.rows[0].what == "m.b.w[whole] ~ m.b.w[whole]: 2 groups → 1 values, 0 pruned"


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
