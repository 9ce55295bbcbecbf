"""Several networks in one file: round trips together and apart, against the networks that were saved; wrong names."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tying import store
from tying.enforce import compact, tie_, unique_parameters
from tying.enforce.ties.check import check
from tying.enforce.ties.tie import gradients_of, plan_of
from tying.equal import equal_ties
from tying.errors import FileError, PlanError, TieError
from tying.files.sealed import KEY, seal, unseal
from tying.groups import Groups
from tying.models import parameters_of
from tying.plan import Member, Partition, Tie, TiePlan
from tying.store.bundle import Together
from tying.store.state import same_bits

Pair = dict[str, nn.Module]


def stir(models: Mapping[str, nn.Module]) -> None:
    """Values unlike any constructor's, other ones in each network, running statistics included."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for model in models.values():
            for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if "running" in n)]:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)


def share(one: nn.Module, other: nn.Module, except_: str) -> None:
    """Let the other network have the first one's parameters and buffers, but for those whose names begin so."""
    for name, tensor in [*one.named_parameters(), *one.named_buffers()]:
        if not name.startswith(except_):
            path, _, leaf = name.rpartition(".")
            setattr(other.get_submodule(path), leaf, tensor)


def mlp(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, classes))


def conv(classes: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
    )


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(12, 5), nn.Linear(5, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x).tanh())


class Headed(nn.Module):
    def __init__(self, body: nn.Module, classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(9, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def two_mlps(models: Pair) -> None:
    share(models["a"], models["b"], "4.")


def three(models: Pair) -> None:
    two_mlps(models)
    models["c"][0].weight = models["b"][0].weight
    models["c"][2].bias = models["c"][0].bias  # inside one network
    models["b"][2].bias.requires_grad_(False)


def two_convs(models: Pair) -> None:
    share(models["a"], models["b"], "5.")


def statistics_apart(models: Pair) -> None:
    two_convs(models)
    models["b"][1] = copy.deepcopy(models["b"][1])


def compacted_beside_dense(models: Pair) -> None:
    plan = TiePlan(
        [
            Tie.of("0.weight", Groups.inputs(), [0, 0, -1, 1, 1, 0, 2, 3, 3, 3, 4, 4]),
            Tie.of("2.weight", Groups.outputs(), [0, 1, 2, -1, 3, 4, -1, 5, 6]),
        ]
    )
    models["small"] = compact(models["small"], plan, torch.rand(4, 12))
    models["small"][0].bias = models["dense"][0].bias
    models["both"][4].bias = models["small"][4].bias


def views(models: Pair) -> None:
    models["b"].decoder.weight = nn.Parameter(models["a"].encoder.weight.t())
    models["b"].encoder.weight = nn.Parameter(models["a"].encoder.weight.detach()[:, :])
    models["a"].decoder.bias = nn.Parameter(models["b"].encoder.weight.detach()[2])


def frozen(models: Pair) -> None:
    two_mlps(models)
    models["a"][0].requires_grad_(False)
    models["b"][4].requires_grad_(False)


def halves(models: Pair) -> None:
    two_mlps(models)
    for model in models.values():
        model.half()  # in place: the parameters stay what they are, and shared


TRANSPOSED = Tie(
    (Member("a.encoder.weight", Groups.outputs()), Member("b.decoder.weight", Groups.inputs())),
    Partition([*range(5), *range(5)]),
)


def whole(*names: str) -> Tie:
    return Tie(tuple(Member(name, Groups.whole()) for name in names), Partition([0] * len(names)))


def tied_whole_and_transposed(models: Pair) -> None:
    tie_(models, TiePlan([TRANSPOSED, whole("a.encoder.bias", "b.encoder.bias")]))
    tie_(models, TiePlan([whole("a.decoder.bias", "b.decoder.bias")]), gradient="mean")


def tied_by_groups(models: Pair) -> None:
    inside = Tie.of("b.0.weight", Groups.inputs(), [0, 0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 8])
    outputs = (Member("a.2.weight", Groups.outputs()), Member("b.2.weight", Groups.outputs()))
    across = Tie(outputs, Partition([0, 1, 2, 3, 4, 4, -1, 5, 6, 0, 1, 2, 3, 7, 8, 9, 9, -1]))
    tie_(models, TiePlan([inside, across]), gradient="mean")


def tied_three_in_float64(models: Pair) -> None:
    for model in models.values():
        model.double()
    with torch.no_grad():
        models["a"][0].bias.fill_(-0.0)
    tie_(models, TiePlan([whole(*(f"{name}.{i}.weight" for name in models for i in (2,)))]))
    tie_(models, TiePlan([Tie.of("c.4.weight", Groups.outputs(), [0, 0, 0])]))
    with torch.no_grad():
        models["a"][2].weight.fill_(0.1)
        models["a"][2].weight[0] = -0.0
        models["c"][4].parametrizations.weight.original.fill_(0.1)


def tied_and_frozen(models: Pair) -> None:
    tied_whole_and_transposed(models)
    models["a"].encoder.weight.requires_grad_(False)
    models["b"].encoder.bias.requires_grad_(False)


def tied_and_shared(models: Pair) -> None:
    share(models["a"], models["b"], "4.")
    tie_(models, TiePlan([whole("a.4.bias", "b.4.bias"), whole("a.0.bias", "a.2.bias")]))


def tied_beside_compacted(models: Pair) -> None:
    plan = TiePlan([Tie.of("0.weight", Groups.inputs(), [0, 0, -1, 1, 1, 0, 2, 3, 3, 3, 4, 4])])
    models["small"] = compact(models["small"], plan, torch.rand(4, 12))
    tie_(models, TiePlan([whole("dense.2.weight", "small.2.weight")]))


def two_precisions(models: Pair) -> None:
    models["a"].bfloat16()
    models["b"].double()


def nothing(models: Pair) -> None:
    pass


def one_body() -> Pair:
    body = mlp(9)
    return {"a": Headed(body, 3), "b": Headed(body, 4)}


@dataclass(frozen=True)
class Case:
    build: Callable[[], Pair]
    change: Callable[[Pair], None]
    x: Tensor


FLAT, IMAGES = torch.rand(5, 12), torch.rand(3, 3, 6, 6)
CASES = {
    "two MLPs that share all but the heads": Case(lambda: {"a": mlp(), "b": mlp(4)}, two_mlps, FLAT),
    "three, and names that modules have": Case(lambda: {"a": mlp(), "b": mlp(), "c": mlp(2)}, three, FLAT),
    "names that modules have": Case(lambda: {"keys": mlp(), "train": mlp(), "forward": mlp(4)}, nothing, FLAT),
    "a network that is one layer": Case(lambda: {"a": nn.Linear(12, 2), "b": nn.Linear(12, 2)}, nothing, FLAT),
    "convolutions with BatchNorm": Case(lambda: {"a": conv(), "b": conv(2)}, two_convs, IMAGES),
    "statistics apart": Case(lambda: {"a": conv(), "b": conv(2)}, statistics_apart, IMAGES),
    "compacted beside dense": Case(
        lambda: {"dense": mlp(), "small": mlp(), "both": mlp()}, compacted_beside_dense, FLAT
    ),
    "views of one memory": Case(lambda: {"a": Autoencoder(), "b": Autoencoder()}, views, FLAT),
    "frozen": Case(lambda: {"a": mlp(), "b": mlp()}, frozen, FLAT),
    "half precision": Case(lambda: {"a": mlp(), "b": mlp()}, halves, FLAT.half()),
    "one module in both": Case(one_body, nothing, FLAT),
    "bfloat16 beside float64": Case(lambda: {"a": mlp(), "b": mlp()}, two_precisions, FLAT),
    "whole and transposed ties": Case(
        lambda: {"a": Autoencoder(), "b": Autoencoder()}, tied_whole_and_transposed, FLAT
    ),
    "ties of groups": Case(lambda: {"a": mlp(), "b": mlp()}, tied_by_groups, FLAT),
    "ties of three in float64": Case(lambda: {"a": mlp(), "b": mlp(), "c": mlp()}, tied_three_in_float64, FLAT),
    "ties that are frozen": Case(lambda: {"a": Autoencoder(), "b": Autoencoder()}, tied_and_frozen, FLAT),
    "ties of what is shared": Case(lambda: {"a": mlp(), "b": mlp()}, tied_and_shared, FLAT),
    "ties beside a compacted one": Case(lambda: {"dense": mlp(), "small": mlp()}, tied_beside_compacted, FLAT),
    "one alone under a name": Case(lambda: {"a": mlp()}, nothing, FLAT),
}

Load = Callable[..., "nn.Module | Pair"]


def made(case: Case) -> Pair:
    torch.manual_seed(0)
    models = case.build()
    stir(models)
    case.change(models)
    return models


def fresh(case: Case) -> Pair:
    torch.manual_seed(7)
    return case.build()


def weights(models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Every parameter and buffer as the layers see it, under all its names."""
    found: dict[str, Tensor] = {}
    for prefix, model in models.items():
        for path, module in model.named_modules(remove_duplicate=False):
            leaves = [*module._parameters, *module._buffers, *getattr(module, "parametrizations", {})]
            if ".parametrizations" not in f".{path}":
                found.update({f"{prefix}.{path}.{leaf}": getattr(module, leaf) for leaf in leaves})
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def one_object(models: Mapping[str, nn.Module]) -> set[frozenset[str]]:
    """Which names are one tensor object."""
    sets: dict[int, set[str]] = {}
    for name, tensor in Together(models).state_dict(keep_vars=True).items():
        sets.setdefault(id(tensor), set()).add(name)
    return set(map(frozenset, sets.values()))


def one_memory(models: Mapping[str, nn.Module]) -> set[frozenset[str]]:
    sets: dict[int, set[str]] = {}
    for name, tensor in Together(models).state_dict(keep_vars=True).items():
        if tensor.numel() and tensor.dim():
            sets.setdefault(tensor.untyped_storage().data_ptr(), set()).add(name)
    return set(map(frozenset, sets.values()))


def memory(models: Mapping[str, nn.Module]) -> int:
    """Bytes of all storages, each once."""
    tensors = Together(models).state_dict(keep_vars=True).values()
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def law_same(saved: Pair, read: Mapping[str, nn.Module], x: Tensor) -> None:
    """Bit for bit the same values, of the same kind, and the same outputs, in training too."""
    one, other = weights({name: saved[name] for name in read}), weights(read)
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert same_bits(tensor, other[name]), name
        assert tensor.requires_grad == other[name].requires_grad, name
    for training in (False, True):
        mine, theirs = copy.deepcopy((saved, dict(read)))  # running statistics change in training
        for name, model in theirs.items():
            given = x.to(next(model.parameters()).dtype)
            with torch.no_grad():
                assert same_bits(mine[name].train(training)(given), model.train(training)(given))


def law_one_object(one: Mapping[str, nn.Module], other: Mapping[str, nn.Module]) -> None:
    """The names that both have: weights whose tie was with another network are plain ones without it."""
    names = [set().union(*one_object(models)) for models in (one, other)]
    both = names[0] & names[1]
    assert len(both) >= len(min(names, key=len)) - 3
    assert {s & both for s in one_object(one)} - {frozenset()} == {s & both for s in one_object(other)} - {frozenset()}


def law_bundle(case: Case, path: Path, load: Load = store.load, save: Callable[..., None] = store.save) -> None:
    models = made(case)
    before = {name: tensor.detach().clone() for name, tensor in weights(models).items()}
    save(models, path)
    assert all(same_bits(before[name], tensor) for name, tensor in weights(models).items())
    given = fresh(case)
    untouched = {name: tensor.detach().clone() for name, tensor in weights(given).items()}
    read = load(path, given)
    assert list(read) == list(models)
    law_same(models, read, case.x)
    assert one_object(read) == one_object(models)
    assert one_memory(read) == one_memory(models)
    assert memory(read) <= memory(models)
    for name, model in models.items():
        alone = {name: load(path, given[name], name=name)}
        law_same(models, alone, case.x)
        assert memory(alone) <= memory({name: model})
        law_one_object(alone, {name: model})
    some = dict(list(given.items())[::2])
    law_same(models, load(path, some), case.x)
    assert all(same_bits(untouched[name], tensor) for name, tensor in weights(given).items())


@pytest.mark.parametrize("case", CASES)
def test_a_bundle_reads_back_together_and_apart(case: str, tmp_path: Path) -> None:
    law_bundle(CASES[case], tmp_path / "pair.safetensors")


def unshared(path: Path, models: nn.Module | Pair, **name: str) -> nn.Module | Pair:
    read = store.load(path, models, **name)
    return read if isinstance(read, nn.Module) else {n: copy.deepcopy(model) for n, model in read.items()}


def memory_of_all(path: Path, models: nn.Module | Pair, **name: str) -> nn.Module | Pair:
    """One network alone, whose weights lie in the memory of more."""
    read = store.load(path, models, **name)
    if isinstance(read, nn.Module):
        with torch.no_grad():
            for p in read.parameters():
                p.set_(torch.cat([p.reshape(-1), p.reshape(-1)])[: p.numel()].reshape(p.shape))
    return read


def of_another(path: Path, models: nn.Module | Pair, **name: str) -> nn.Module | Pair:
    return store.load(path, models, name="a") if name else store.load(path, models)


def thawed(path: Path, models: nn.Module | Pair, **name: str) -> nn.Module | Pair:
    read = store.load(path, models, **name)
    return read.requires_grad_() if isinstance(read, nn.Module) else read


@pytest.mark.parametrize(
    ("case", "load"),
    [
        ("two MLPs that share all but the heads", unshared),
        ("two MLPs that share all but the heads", memory_of_all),
        ("frozen", of_another),
        ("frozen", thawed),
    ],
)
def test_a_broken_reader_fails_the_law(case: str, load: Load, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        law_bundle(CASES[case], tmp_path / "pair.safetensors", load)


# ---------------------------------------------------------------- sizes


def wide(classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, classes))


def law_once(path: Path, save: Callable[[Pair, Path], None]) -> None:
    """What two networks share is in the file once."""
    models: Pair = {"a": wide(2), "b": wide(2)}
    share(models["a"], models["b"], "4.")
    save(models, path)
    apart = 0
    for name, model in models.items():
        store.save(model, path.with_name(name))
        apart += path.with_name(name).stat().st_size
    assert path.stat().st_size <= 0.52 * apart


def test_a_bundle_holds_what_is_shared_once(tmp_path: Path) -> None:
    law_once(tmp_path / "pair.safetensors", store.save)


def twice(models: Pair, path: Path) -> None:
    store.save(copy.deepcopy(models["a"]), path)
    store.save({name: copy.deepcopy(model) for name, model in models.items()}, path)


def test_networks_saved_apart_in_one_file_fail_the_law(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        law_once(tmp_path / "pair.safetensors", twice)


def test_what_is_equal_but_not_tied_is_stored_once_by_a_plan(tmp_path: Path) -> None:
    models: Pair = {"a": wide(2), "b": wide(2)}
    models["b"].load_state_dict({**models["a"].state_dict(), "4.weight": models["b"][4].weight})
    plan = TiePlan(equal_ties(parameters_of(models)))
    store.save(models, tmp_path / "apart.safetensors")
    store.save(models, tmp_path / "once.safetensors", plan=plan)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("once", "apart")]
    assert sizes[0] <= 0.55 * sizes[1]
    assert store.load_plan(tmp_path / "once.safetensors") == plan
    read = store.load(tmp_path / "once.safetensors", {"a": wide(2), "b": wide(2)})
    law_same(models, read, torch.rand(3, 64))
    assert read["a"][0].weight is not read["b"][0].weight
    alone = store.load(tmp_path / "once.safetensors", wide(2), name="b")
    law_same(models, {"b": alone}, torch.rand(3, 64))
    assert memory({"b": alone}) == memory({"b": models["b"]})


# ---------------------------------------------------------------- wrong names, wrong files


def bundle(path: Path) -> Pair:
    models = made(CASES["two MLPs that share all but the heads"])
    store.save(models, path)
    return models


WRONG: dict[str, tuple[object, str | None, str]] = {
    "a bundle as one network": (mlp(), None, r"expected a single network, got a bundle of 'a', 'b'; pass `name`"),
    "no such name": (mlp(), "c", r"expected a bundle with 'c' in it, got one of 'a', 'b'; "),
    "no such name among others": ({"a": mlp(), "c": mlp()}, None, r"expected a bundle with 'c' in it"),
    "none": ({}, None, r"expected models by name, got none; the bundle has 'a', 'b'"),
    "the other's architecture": (mlp(), "b", r"pair\.safetensors: b\.4\.weight: expected a model at least as large"),
    "exchanged": ({"a": mlp(4), "b": mlp()}, None, r"b\.4\.weight: expected a model at least as large"),
    "another kind": (
        {"a": mlp(), "b": nn.Sequential(nn.Conv1d(12, 9, 1), *mlp(4)[1:])},
        None,
        r"pair\.safetensors: in 'b': .*0: expected a module",
    ),
    "a smaller one": (mlp(2), "a", r"a\.4\.weight: expected a model at least as large"),
    "a layer too many": (mlp().append(nn.Linear(3, 3)), "a", r"in 'a': .*: 5: expected no module .* got Linear; build"),
    "a layer too few": (
        mlp()[:4],
        "a",
        r"in 'a': .*: 4: expected a module with .*type=Linear.* got none of that name; ",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_names_and_networks_are_refused(case: str, tmp_path: Path) -> None:
    given, name, message = WRONG[case]
    bundle(tmp_path / "pair.safetensors")
    with pytest.raises(FileError, match=message):
        store.load(tmp_path / "pair.safetensors", given, **({} if name is None else {"name": name}))


@pytest.mark.parametrize(
    ("given", "name", "message"),
    [
        (mlp(), "a", r"to read 'a' of it, got a single network; leave `name` out .an nn.ModuleDict is saved as one"),
        ({"a": mlp()}, None, r"of 'a', got a single network; pass the model itself .an nn.ModuleDict is saved as one"),
    ],
)
def test_a_single_network_is_no_bundle(given: object, name: str | None, message: str, tmp_path: Path) -> None:
    store.save(nn.ModuleDict({"a": mlp()}), tmp_path / "one.safetensors")
    with pytest.raises(FileError, match=message):
        store.load(tmp_path / "one.safetensors", given, **({} if name is None else {"name": name}))


def test_a_name_beside_names_is_no_fault_of_the_file(tmp_path: Path) -> None:
    bundle(tmp_path / "pair.safetensors")
    with pytest.raises(PlanError, match="name: expected none beside models by name, got 'a'"):
        store.load(tmp_path / "pair.safetensors", {"a": mlp()}, name="a")


def as_version_1(models: nn.Module | Pair, path: Path) -> None:
    """Writes what is new under the old number."""
    store.save(models, path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()[KEY])
    kept = {key: value for key, value in record.items() if key not in ("sum", "sums", "format")}
    path.write_bytes(seal(tensors, kept, kind=store.KIND, version=1))


def law_versions(path: Path, save: Callable[[nn.Module | Pair, Path], None]) -> None:
    """A reader of version 1 reads what it understands, and refuses the rest."""
    tied = mlp()
    tie_(tied, TiePlan([Tie.of("0.weight", Groups.inputs(), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5])]))
    save(mlp(), path)
    assert unseal(path, kind=store.KIND, version=1)[1]["architecture"]
    for new in ({"0": nn.Linear(2, 2), "1": nn.Linear(2, 2)}, tied):
        save(new, path)
        with contextlib.suppress(FileError):
            raise AssertionError(unseal(path, kind=store.KIND, version=1))


def test_an_old_reader_refuses_what_it_does_not_understand(tmp_path: Path) -> None:
    law_versions(tmp_path / "new.safetensors", store.save)
    models = {"a": mlp(), "b": mlp()}
    as_version_1(models, tmp_path / "pair.safetensors")  # as they were written before there was a second version
    law_same(models, store.load(tmp_path / "pair.safetensors", {"a": mlp(), "b": mlp()}), FLAT)


def test_one_number_for_all_fails_the_law(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        law_versions(tmp_path / "new.safetensors", as_version_1)


@pytest.mark.parametrize("models", [{}, {"a.b": mlp()}, {"": mlp()}, {"a": 1}, {"a": (m := mlp()), "b": m}, [mlp()]])
def test_models_that_are_none_are_refused_and_the_old_file_stays(models: object, tmp_path: Path) -> None:
    path = tmp_path / "pair.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(PlanError, match="models: expected"):
        store.save(models, path)
    assert path.read_bytes() == b"old"


def test_a_bundle_that_was_cut_or_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pair.safetensors"
    bundle(path)
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(FileError, match=r"pair\.safetensors: expected .*, got .*; "):
            store.load(path, mlp(), name="a")
    for at in range(9, len(content) - 1, 97):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x04]) + content[at + 1 :])
        with pytest.raises(FileError):
            store.load(path, {"a": mlp(), "b": mlp(4)})
    save_file({"a.0.weight": torch.ones(2, 2)}, path)
    with pytest.raises(FileError, match="got an ordinary safetensors file"):
        store.load(path, mlp(), name="a")


MADE_UP: list[dict[str, object]] = [
    {"models": 3},
    {"models": ["a"]},
    {"ties": [[[[["a.0.weight", "whole"], ["b.0.weight", "whole"]], "none"], "sum"]]},
    {"ties": [[[[["a.0.weight", "whole"], ["b.9.weight", "whole"]], "labels.0"], "sum"]]},
    {"ties": [[[[["a.0.weight", "whole"], ["b.0.weight", "whole"]], "labels.0"], "median"]]},
    {"ties": [[[[["a.1.num_batches_tracked", "whole"], ["b.0.weight", "whole"]], "labels.0"], "sum"]]},
    {"steps": [[7, [[4, 3, 3, 3]]]]},
    {"steps": [["x", [[4, 3, 3, 3]]]]},
    {"aliases": {"b.0.weight": "b.none"}},
    {"architecture": {"a.0": 3}},
]


@pytest.mark.parametrize("change", MADE_UP)
def test_a_record_that_was_made_up_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "pair.safetensors"
    models = {"a": conv(), "b": conv(2)}
    tie_(models, TiePlan([whole("a.0.weight", "b.0.weight")]))
    store.save(models, path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()[KEY])
    kept = {key: value for key, value in record.items() if key not in ("sum", "sums", "format")}
    path.write_bytes(seal(tensors, {**kept, **change}, kind=store.KIND, version=store.VERSION))
    with pytest.raises(FileError, match=r"pair\.safetensors: "):
        store.load(path, {"a": conv(), "b": conv(2)})
    if "steps" in change:
        with pytest.raises(FileError, match=r"pair\.safetensors: "):
            store.load(path, conv(), name="a")


def test_a_bundle_says_the_same_bytes_and_names_that_anyone_reads(tmp_path: Path) -> None:
    path = tmp_path / "pair.safetensors"
    models = bundle(path)
    assert path.read_bytes() == store.encode(models)
    read = load_file(path)
    assert set(read) == {
        *(f"a.{name}" for name in models["a"].state_dict()),
        *(f"b.{name}" for name in models["b"].state_dict() if name.startswith("4.")),
    }


# ---------------------------------------------------------------- ties that hold, and ties that broke


def tied_pair() -> Pair:
    return made(CASES["whole and transposed ties"])


def test_what_was_tied_is_tied_and_guarded_again(tmp_path: Path) -> None:
    models = tied_pair()
    store.save(models, tmp_path / "pair.safetensors")
    read = store.load(tmp_path / "pair.safetensors", {"a": Autoencoder(), "b": Autoencoder()})
    assert plan_of(read) == plan_of(models) == store.load_plan(tmp_path / "pair.safetensors")
    assert gradients_of(read) == gradients_of(models)
    assert len(check(read).ties) == 3
    assert check(read)
    for pair in (models, read):
        sum(model(FLAT).square().sum() for model in pair.values()).backward()
    grads = [[p.grad for p in unique_parameters(pair)] for pair in (models, read)]
    assert len(grads[0]) == len(grads[1])
    assert all(map(same_bits, *grads))
    read["b"].encoder.bias = nn.Parameter(torch.ones(5))
    with pytest.raises(TieError, match="bias"):
        read["b"](FLAT)


def test_a_module_dict_that_was_tied_is_one_network(tmp_path: Path) -> None:
    models = nn.ModuleDict({"a": mlp(), "b": mlp()})
    tie_(models, TiePlan([whole("a.2.weight", "b.2.weight")]))
    store.save(models, tmp_path / "both.safetensors")
    read = store.load(tmp_path / "both.safetensors", nn.ModuleDict({"a": mlp(), "b": mlp()}))
    law_same(dict(models), dict(read), FLAT)
    assert check(read)
    assert read["a"][2].weight is read["b"][2].weight
    read["b"][2].weight = nn.Parameter(torch.ones(9, 9))
    with pytest.raises(TieError, match=r"2\.weight"):
        read["b"](FLAT)


def test_a_network_read_alone_is_trained_alone(tmp_path: Path) -> None:
    store.save(tied_pair(), tmp_path / "pair.safetensors")
    alone = store.load(tmp_path / "pair.safetensors", Autoencoder(), name="b")
    assert plan_of(alone) == TiePlan()
    alone(FLAT).sum().backward()
    assert all(p.grad is not None for p in alone.parameters())


def test_one_of_two_tied_networks_is_saved_by_itself(tmp_path: Path) -> None:
    models = tied_pair()
    for model in (models["b"], copy.deepcopy(models["b"])):
        store.save(model, tmp_path / "b.safetensors")
        law_same(models, {"b": store.load(tmp_path / "b.safetensors", Autoencoder())}, FLAT)
    assert check(models)


def test_networks_that_are_tied_are_read_into_and_left_alone(tmp_path: Path) -> None:
    models, given = tied_pair(), tied_pair()
    with torch.no_grad():
        given["a"].encoder.weight.fill_(7)
    store.save(models, tmp_path / "pair.safetensors")
    law_same(models, store.load(tmp_path / "pair.safetensors", given), FLAT)
    law_same(models, {"b": store.load(tmp_path / "pair.safetensors", given["b"], name="b")}, FLAT)
    assert check(given)
    assert (given["b"].decoder.weight == 7).all()


def test_broken_ties_are_not_written(tmp_path: Path) -> None:
    models, path = tied_pair(), tmp_path / "pair.safetensors"
    path.write_bytes(b"old")
    models["b"].encoder.bias = nn.Parameter(models["a"].encoder.bias.detach().clone())
    store.save(models, path)  # equal values: nothing is lost
    path.write_bytes(b"old")
    models["b"].encoder.bias = nn.Parameter(torch.ones(5))
    with pytest.raises(TieError, match=r"encoder\.bias"):
        store.save(models, path)
    assert path.read_bytes() == b"old"
