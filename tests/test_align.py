"""Units made to face each other: a permuted copy comes back, what a model computes stays, and never is it worse."""

from __future__ import annotations

import copy
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from families import FAMILIES, resnet20_of
from networks import NETWORKS, Net, randomised
from tying.channels.find import find_channels
from tying.errors import PlanError
from tying.find import align as align_module
from tying.find import permute as permute_module
from tying.find import units
from tying.find.align import by_weights
from tying.find.match import Match, match
from tying.find.permute import Order, Reference, Side, Space, permuted, spaces_of, tensors_of, write
from tying.groups import Groups
from tying.outputs import difference, same_random_numbers, tensors_in

Places = list[tuple[int, list[tuple[str, int]]]]
"""How many units, and the (tensor, axis) they occupy; units that are flattened occupy as many runs."""


# ---------------------------------------------------------------- permuted by hand


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 25), nn.Tanh(), nn.Linear(25, 12), nn.ReLU(), nn.Linear(12, 4)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 16, 3),
        nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(64, 14), nn.BatchNorm1d(14), nn.ReLU(), nn.Linear(14, 3),
    )  # fmt: skip


def norm(name: str) -> list[tuple[str, int]]:
    return [(f"{name}.{each}", 0) for each in ("weight", "bias", "running_mean", "running_var")]


def conv(name: str) -> list[tuple[str, int]]:
    return [(f"{name}.0.weight", 0), *norm(f"{name}.1")]


MLP: Places = [
    (30, [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]),
    (25, [("2.weight", 0), ("2.bias", 0), ("4.weight", 1)]),
    (12, [("4.weight", 0), ("4.bias", 0), ("6.weight", 1)]),
]


def narrow() -> nn.Module:
    """Two inputs and no biases: what the first units read tells little beside what reads them."""
    sizes = [2, 24, 24, 24, 2]
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b, bias=False), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


NARROW: Places = [(24, [(f"{i}.weight", 0), (f"{i + 2}.weight", 1)]) for i in (0, 2, 4)]
CNN: Places = [
    (12, [("0.weight", 0), *norm("1"), ("4.weight", 1)]),
    (16, [("4.weight", 0), ("4.bias", 0), *norm("5"), ("8.weight", 1)]),  # 2 × 2 inputs of the linear layer each
    (14, [("8.weight", 0), ("8.bias", 0), *norm("9"), ("11.weight", 1)]),
]


def resnet20_places() -> Places:
    """A stream per stage: the stem or the shortcut and the ends of three blocks; and the middle of every block."""
    places: Places = []
    for width, blocks in ((16, (0, 1, 2)), (32, (3, 4, 5)), (64, (6, 7, 8))):
        ends = [f"blocks.{i}.b" for i in blocks]
        makers = ["stem.0", *ends] if width == 16 else [*ends, f"blocks.{blocks[0]}.shortcut"]
        readers = [f"blocks.{i}.a.0" for i in (blocks if width == 16 else blocks[1:])]
        after = blocks[-1] + 1
        readers += ["head"] if after == 9 else [f"blocks.{after}.a.0", f"blocks.{after}.shortcut.0"]
        stream = [each for name in makers for each in conv(name)]
        places.append((width, [*stream, *((f"{name}.weight", 1) for name in readers)]))
        places += [(width, [*conv(f"blocks.{i}.a"), (f"blocks.{i}.b.0.weight", 1)]) for i in blocks]
    return places


BY_HAND: dict[str, tuple[Callable[[], nn.Module], Places, tuple[int, ...]]] = {
    "mlp": (mlp, MLP, (20,)),
    "narrow": (narrow, NARROW, (2,)),
    "cnn": (cnn, CNN, (2, 10, 10)),
    "resnet20": (resnet20_of, resnet20_places(), (3, 16, 16)),
}


def permute_by_hand(model: nn.Module, places: Places, seed: int, forgotten: str = "nothing") -> list[list[int]]:
    """Shuffle the units; return for every place which unit stands where now."""
    generator = torch.Generator().manual_seed(seed)
    orders: list[list[int]] = []
    state = model.state_dict()
    for count, occupied in places:
        order = torch.randperm(count, generator=generator)
        orders.append(order.tolist())
        for name, axis in occupied:
            if forgotten not in name and forgotten != f"axis {axis}":
                tensor = state[name]
                run = tensor.shape[axis] // count
                moved = (order[:, None] * run + torch.arange(run)).reshape(-1)
                tensor.copy_(tensor.index_select(axis, moved))
    return orders


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    make, _, shape = BY_HAND[name]
    return randomised(make()).to(dtype), torch.randn(4, *shape, dtype=dtype)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        result = copy.deepcopy(model).double().eval()(x.double() if x.is_floating_point() else x)
    return list(result) if isinstance(result, tuple) else [result]


def law_kept(before: nn.Module, after: nn.Module, x: Tensor) -> None:
    for expected, got in zip(outputs(before, x), outputs(after, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("name", BY_HAND)
def test_permuting_by_hand_keeps_the_function(name: str) -> None:
    model, x = build(name, dtype=torch.float64)
    other = copy.deepcopy(model)
    permute_by_hand(other, BY_HAND[name][1], 1)
    law_kept(model, other, x)


@pytest.mark.parametrize(
    ("name", "forgotten"),
    [("mlp", "axis 1"), ("mlp", "bias"), ("cnn", "running_mean"), ("cnn", "running_var"), ("resnet20", "shortcut")],
)
def test_forgetting_some_of_it_does_not(name: str, forgotten: str) -> None:
    model, x = build(name, dtype=torch.float64)
    other = copy.deepcopy(model)
    permute_by_hand(other, BY_HAND[name][1], 1, forgotten)
    with pytest.raises(AssertionError):
        law_kept(model, other, x)


# ---------------------------------------------------------------- a permuted copy comes back

Align = Callable[[dict[str, nn.Module], Tensor], Match]


def by_weight(models: dict[str, nn.Module], x: Tensor) -> Match:
    return match(models, align=True, example_inputs=x)


def by_activation(models: dict[str, nn.Module], x: Tensor) -> Match:
    return match(models, align=True, example_inputs=x, by="activations")


def law_recovered(align: Align, name: str, seed: int = 0, noise: float = 0.0, samples: int = 4) -> None:
    """The inverse of each permutation is found (of 99 % of the units with noise), and all bits are back without."""
    model, x = build(name, seed)
    x = x if samples == 4 else torch.randn(samples, *x.shape[1:])
    other = copy.deepcopy(model)
    orders = permute_by_hand(other, BY_HAND[name][1], seed + 1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += noise * parameter.std() * torch.randn_like(parameter)
    result = align({"a": model, "b": other}, x)
    found = {each.units: each.order for each in result.aligned}
    right, total = 0, 0
    for (count, occupied), order in zip(BY_HAND[name][1], orders, strict=True):
        name_, axis = occupied[0]
        got = found[f"{name_}[axis {axis}]"] or ()
        right += sum(k == unit for k, unit in zip(got, np.argsort(order).tolist(), strict=True))
        total += count
    assert len(found) == len(orders)
    assert right >= (0.99 * total if noise else total)
    if not noise:
        assert_same(model, other)
        assert all(pair.cosine == pytest.approx(1, abs=1e-12) and pair.distance == 0 for pair in result.pairs)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, expected), got in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(expected, got), name


@pytest.mark.parametrize("align", [by_weight, by_activation])
@pytest.mark.parametrize("name", BY_HAND)
def test_a_permuted_copy_comes_back_bit_for_bit(name: str, align: Align) -> None:
    law_recovered(align, name)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", BY_HAND)
def test_with_five_percent_noise_nearly_all_units_do(name: str, seed: int) -> None:
    law_recovered(by_weight, name, seed, noise=0.05)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_by_activations_with_five_percent_noise(name: str) -> None:
    law_recovered(by_activation, name, noise=0.05, samples=100)


class Unsettled(align_module._Search):
    """The first sweep counts all numbers, also where the other axis is still in disorder."""

    def _scores(self, at: int, current: Any, settled: Any = None) -> Any:
        return super()._scores(at, current)

    def _improve(self, current: Any, orders: Any, sequence: Any) -> Any:
        return 0.0, orders


def greedy(scores: NDArray[np.float64]) -> Order:
    """The best unit for each place in turn."""
    scores = scores.copy()
    chosen: list[int] = []
    for row in scores:
        row[chosen] = -np.inf
        chosen.append(int(row.argmax()))
    return np.array(chosen)


def test_counting_what_is_in_disorder_does_not_find_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(align_module, "_Search", Unsettled)
    with pytest.raises(AssertionError):
        law_recovered(by_weight, "narrow")


FREE = [
    *("resnet20", "resnet50", "resnext", "mobilenet_v2", "densenet", "unet", "branches", "transformer", "gpt", "llama"),
    *("vit", "convnext", "called_twice", "tied_weights", "flatten_a_concatenation", "gated", "grouped", "depthwise"),
]


@pytest.mark.parametrize("name", FREE)
def test_every_family_comes_back(name: str) -> None:
    """Permuted through `find_channels`: what `permute` does is held by hand above, and by the function below."""
    model, x = (FAMILIES.get(name) or NETWORKS[name]).make()
    other = copy.deepcopy(model)
    spaces = spaces_of(find_channels(other, x))
    reasons = Reference("other", other, (x,)).reasons(spaces)
    random = np.random.default_rng(0)
    moves = [(s, random.permutation(s.units)) for s, reason in zip(spaces, reasons, strict=True) if not reason]
    tensors = tensors_of(other)
    write([(tensors[local], value) for local, value in permuted(tensors, moves).items()])
    law_kept(model, other, x)
    assert sum(space.units for space, _ in moves) >= FAMILIES[name].free if name in FAMILIES else moves
    result = by_weight({"a": model, "b": other}, x)
    assert_same(model, other)
    assert [each.order for each in result.aligned if each.order] == [tuple(np.argsort(o).tolist()) for _, o in moves]


# ---------------------------------------------------------------- what holds for any two models

INDEPENDENT = ["mlp", "cnn", "resnet20"]


def total_distance(match_: Match, models: Mapping[str, nn.Module]) -> float:
    """‖a − b‖² over all parameters, by hand."""
    a, b = models.values()
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return sum(float((x.detach().double() - y.detach().double()).square().sum()) for x, y in pairs)


def law_never_worse(align: Align, name: str) -> None:
    model, x = build(name, 0, torch.float64)
    other, _ = build(name, 1, torch.float64)
    models, before = {"a": model, "b": other}, copy.deepcopy(other)
    kept = copy.deepcopy(model)
    distance = total_distance(match(models), models)
    result = align(models, x)
    assert_same(model, kept)
    law_kept(before, other, x)
    assert total_distance(result, models) < distance
    again = copy.deepcopy(other)
    assert not any(each.moved for each in align(models, x).aligned)
    assert_same(again, other)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_independent_models_come_nearer_and_compute_the_same(name: str) -> None:
    law_never_worse(by_weight, name)


def test_independent_models_by_activations_compute_the_same() -> None:
    model, x = build("cnn", 0, torch.float64)
    other, _ = build("cnn", 1, torch.float64)
    before = copy.deepcopy(other)
    assert any(each.moved for each in by_activation({"a": model, "b": other}, x).aligned)
    law_kept(before, other, x)


def test_assigning_the_other_way_is_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    def shuffled(
        spaces: Sequence[Space], tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]
    ) -> list[Order | None]:
        return [np.random.default_rng(0).permutation(space.units) for space in spaces]

    monkeypatch.setattr(units, "by_weights", shuffled)
    with pytest.raises(AssertionError):
        law_never_worse(by_weight, "mlp")


def single(width: int, seed: int) -> tuple[Space, dict[str, Tensor], dict[str, Tensor]]:
    """One space: units made by a matrix with a bias, read by a matrix."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"up": (width, 4), "bias": (width,), "down": (3, width)}
    one, other = ({n: torch.randn(s, generator=generator).double() for n, s in shapes.items()} for _ in range(2))
    lines = np.arange(width)[:, None]
    sides = tuple(Side(name, axis, lines, ()) for name, axis in (("up", 0), ("bias", 0), ("down", 1)))
    return Space(sides[:2], sides, None, None), one, other


def law_optimal(seed: int) -> None:
    """One space by weights: no permutation is better. All 120 are tried."""
    space, tensors, targets = single(5, seed)
    (order,) = by_weights([space], tensors, targets)
    assert order is not None

    def value(order: Sequence[int]) -> float:
        chosen = list(order)
        moved = {"up": tensors["up"][chosen], "bias": tensors["bias"][chosen], "down": tensors["down"][:, chosen]}
        return sum(float((targets[name] * moved[name]).sum()) for name in moved)

    assert value(order.tolist()) == pytest.approx(max(map(value, itertools.permutations(range(5)))), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_one_space_is_assigned_optimally(seed: int) -> None:
    law_optimal(seed)


def test_a_greedy_assignment_is_not_optimal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(align_module, "_assign", greedy)
    with pytest.raises(AssertionError):
        [law_optimal(seed) for seed in range(5)]


def law_correlated() -> None:
    """By activations: the sum of numpy's own correlations is the largest of all permutations."""
    torch.manual_seed(4)
    a, b = (nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in range(2))
    x = torch.randn(40, 3) + 3
    result = by_activation({"a": a, "b": copy.deepcopy(b)}, x)
    with torch.no_grad():
        one, other = a[0](x).numpy(), b[0](x).numpy()
    table = np.corrcoef(one.T, other.T)[:5, 5:]
    best = max(itertools.permutations(range(5)), key=lambda order: table[range(5), list(order)].sum())
    assert result.aligned[0].order == best


def test_activations_face_what_they_correlate_with_most() -> None:
    law_correlated()


def test_activations_that_are_not_centred_face_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(align_module._Correlations):
        def add(self, theirs: Any, mine: Any) -> None:
            self.count, self.products = 1, theirs.T @ mine

        def scores(self) -> Any:
            return self.products

    monkeypatch.setattr(align_module, "_Correlations", Plain)
    with pytest.raises(AssertionError):
        law_correlated()


def law_in_batches(batch: int) -> None:
    """Batch by batch the correlations are numpy's over all observations; a constant unit has none."""
    generator = np.random.default_rng(0)
    theirs, mine = (generator.normal(size=(100, 6)) + 1e3 * generator.normal(size=6) for _ in range(2))
    mine[:, 2] = 7.1
    side = Side("weight", 0, np.arange(6).reshape(3, 2), ())
    found = align_module._Correlations(side)
    for start in range(0, 100, batch):
        found.add(theirs[start : start + batch], mine[start : start + batch])
    with np.errstate(invalid="ignore", divide="ignore"):
        table = np.nan_to_num(np.corrcoef(theirs.T, mine.T)[:6, 6:])
    np.testing.assert_allclose(found.scores(), table[::2, ::2] + table[1::2, 1::2], atol=1e-9)


@pytest.mark.parametrize("batch", [100, 30, 1])
def test_correlations_are_gathered_batch_by_batch(batch: int) -> None:
    law_in_batches(batch)


def test_leaving_the_means_as_the_first_batch_has_them_fails_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    class Drifting(align_module._Correlations):
        def scores(self) -> Any:
            self.sums *= 0
            return super().scores()

    monkeypatch.setattr(align_module, "_Correlations", Drifting)
    with pytest.raises(AssertionError):
        law_in_batches(10)


def test_batches_give_the_same_order_and_a_model_that_mixes_samples_is_taken_whole() -> None:
    model, _ = build("cnn")
    other, _ = build("cnn", 1)
    x = torch.randn(200, 2, 10, 10)
    orders = []
    for batch in (64, 1000):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(align_module, "BATCH", batch)
            orders.append([each.order for each in by_activation({"a": model, "b": copy.deepcopy(other)}, x).aligned])
    assert orders[0] == orders[1]
    mixing = Net(lambda m, x: m.last(m.body(x - x.mean(0))), body=nn.Linear(3, 4), last=nn.Linear(4, 2))
    reference, plain = Reference("m", mixing, (torch.randn(200, 3),)), Reference("p", mlp(), (torch.randn(200, 20),))
    assert len(align_module._batches(plain, plain)) == 4
    assert len(align_module._batches(plain, reference)) == 1


def test_units_of_a_convolution_lie_before_its_positions() -> None:
    """As many rows as channels, and no batch: the sizes alone do not say which is which."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 3))
    other = copy.deepcopy(model)
    permute_by_hand(other, [(6, [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)])], 0)
    by_activation({"a": model, "b": other}, torch.randn(2, 6, 6))
    assert_same(model, other)


def test_complex_weights_count_with_both_parts() -> None:
    lines = np.arange(2)[:, None]
    space = Space((), (Side("w", 0, lines, ()),), None, None)
    target = torch.tensor([[1j], [-1j]])
    (order,) = by_weights([space], {"w": target.flip(0)}, {"w": target})
    assert order is not None
    assert order.tolist() == [1, 0]


# ---------------------------------------------------------------- what moves, what stays, and why


def test_a_third_model_faces_the_first_and_gradients_go_along() -> None:
    model, x = build("mlp")
    second, third = copy.deepcopy(model), copy.deepcopy(model)
    third(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in third.parameters() if parameter.grad is not None]
    for seed, other in enumerate((second, third)):
        permute_by_hand(other, MLP, seed)
    with torch.no_grad():  # gradients as permuted as the weights
        shadow = copy.deepcopy(model)
        for parameter, gradient in zip(shadow.parameters(), expected, strict=True):
            parameter.copy_(gradient)
        permute_by_hand(shadow, MLP, 1)
        for parameter, gradient in zip(third.parameters(), shadow.parameters(), strict=True):
            parameter.grad = gradient.detach().clone()
    by_weight({"a": model, "b": second, "c": third}, x)
    assert_same(model, second)
    assert_same(model, third)
    for parameter, gradient in zip(third.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


def test_a_partner_that_only_a_later_model_has_is_faced() -> None:
    """The hidden layer of the third is the second's, not the first's."""
    torch.manual_seed(0)
    first = nn.Linear(4, 6)
    second = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    third = copy.deepcopy(second)
    permute_by_hand(third, [(6, [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)])], 0)
    by_weight({"a": first, "b": second, "c": third}, torch.randn(2, 4))
    assert_same(second, third)


def test_flags_generators_and_the_models_themselves_stay() -> None:
    model, x = build("cnn")
    model.train()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    other = copy.deepcopy(model)
    permute_by_hand(other, CNN, 0)
    tensors = [id(t) for t in tensors_of(other).values()]
    random = torch.get_rng_state()
    by_activation({"a": model, "b": other}, x)
    assert [module.training for module in model.modules()] == flags == [m.training for m in other.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert tensors == [id(t) for t in tensors_of(other).values()]
    assert_same(model, other)


def test_layers_of_other_sizes_stay_and_the_rest_is_aligned() -> None:
    torch.manual_seed(0)

    def make(inputs: int, hidden: int) -> nn.Module:
        layers = (nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 8), nn.ReLU())
        return nn.Sequential(*layers, nn.Linear(8, 2))

    a, b = make(4, 5), make(3, 6)
    first, last = torch.randperm(8), torch.randperm(8)
    b[0].bias.data = a[0].bias.data[first]
    b[4].bias.data, b[6].weight.data = a[4].bias.data[last], a[6].weight.data[:, last]
    result = match({"a": a, "b": b}, align=True, example_inputs={"a": torch.randn(2, 4), "b": torch.randn(2, 3)})
    assert [(each.units, each.order is None, each.reason) for each in result.aligned] == [
        ("0.weight[axis 0]", False, None),
        ("2.weight[axis 0]", True, "no parameter of theirs is paired"),
        ("4.weight[axis 0]", False, None),
    ]
    assert torch.equal(a[0].bias, b[0].bias)
    assert torch.equal(a[6].weight, b[6].weight)


def test_units_of_which_only_some_are_paired_stay() -> None:
    torch.manual_seed(0)
    models = {name: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)) for name in "ab"}
    pairs = {("a.0.weight", Groups.outputs(), range(3)): ("b.0.weight", Groups.outputs(), range(3))}
    (told,) = match(models, pairs=pairs, align=True, example_inputs=torch.randn(2, 4)).aligned
    assert told.reason == "only some of their groups are paired"


def test_a_transpose_is_faced() -> None:
    """The encoder's hidden units are what the other's decoder reads."""
    torch.manual_seed(0)
    a = nn.ModuleDict({"encoder": nn.Linear(7, 5)})
    a.forward = lambda x: a["encoder"](x)  # type: ignore[method-assign]
    b = Net(lambda m, x: m.decoder(m.encoder(x).relu()), encoder=nn.Linear(3, 5), decoder=nn.Linear(5, 7))
    order = torch.randperm(5)
    b.decoder.weight.data = a["encoder"].weight.data.t()[:, order].contiguous()
    pairs = {("a.encoder.weight", Groups.outputs()): ("b.decoder.weight", Groups.inputs())}
    inputs = {"a": torch.randn(2, 7), "b": torch.randn(2, 3)}
    result = match({"a": a, "b": b}, pairs=pairs, align=True, example_inputs=inputs)
    assert result.aligned[0].order == tuple(torch.argsort(order).tolist())
    assert torch.equal(a["encoder"].weight, b.decoder.weight.t())


def test_what_two_models_share_already_stays() -> None:
    model, x = build("mlp")
    other = copy.deepcopy(model)
    permute_by_hand(other, MLP[:1], 0)
    other[4].weight = model[4].weight
    before = copy.deepcopy(model)
    result = by_weight({"a": model, "b": other}, x)
    assert [each.reason for each in result.aligned] == [
        None,
        "4.weight is also a.4.weight",
        "4.weight is also a.4.weight",
    ]
    assert_same(before, model)
    assert torch.equal(other[0].weight, model[0].weight)


def test_groups_of_a_groupnorm_move_whole() -> None:
    model, x = NETWORKS["groupnorm"].make()
    other = copy.deepcopy(model)
    groups = next(module.num_groups for module in other.modules() if isinstance(module, nn.GroupNorm))
    tensors = tensors_of(other)
    moves = [(space, np.roll(np.arange(space.units), 1)) for space in spaces_of(find_channels(other, x))]
    assert [space.units for space, _ in moves] == [groups]
    write([(tensors[name], value) for name, value in permuted(tensors, moves).items()])
    before = copy.deepcopy(other)
    result = by_weight({"a": model, "b": other}, x)
    assert [each.moved for each in result.aligned] == [groups]
    law_kept(before, other, x)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name))


@pytest.mark.parametrize("name", ["buffer_mask", "unknown_operation", "mixed_over_tokens", "attention"])
def test_what_cannot_move_stays_and_says_why(name: str) -> None:
    model, x = NETWORKS[name].make()
    other, _ = NETWORKS[name].make(1)
    before = copy.deepcopy(other)
    result = by_weight({"a": model, "b": other}, x)
    stays = [each for each in result.aligned if each.order is None]
    assert stays
    for word in NETWORKS[name].blocked[:1]:
        assert any(word in str(each.reason) for each in stays)
    law_kept(before, other, x)


def test_units_that_no_layer_shows_stay_by_activations() -> None:
    model, x = NETWORKS["products"].make()
    other, _ = NETWORKS["products"].make(1)
    reasons = {each.reason for each in by_activation({"a": model, "b": other}, x).aligned}
    assert reasons == {"no layer's output shows them in both models"}


def test_dead_units_and_equal_ones_do_no_harm() -> None:
    model, x = build("mlp", dtype=torch.float64)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for each in (model, other):
            each[0].weight[:4] = 0
            each[0].bias[:4] = 0
            each[2].weight[1] = each[2].weight[0]
    for align in (by_weight, by_activation):
        law_kept(other, model, x)
        align({"a": model, "b": other}, x)
        law_kept(model, other, x)


# ---------------------------------------------------------------- blocked spaces: what trials show


class Scaled(nn.Module):
    """Hidden units whose places a buffer knows: `find_channels` can't tell, and trials have to."""

    def __init__(self, change: Callable[[Any], None] = lambda m: None, mask: float = 0.0) -> None:
        super().__init__()
        self.first, self.last, self.mask = nn.Linear(4, 6), nn.Linear(6, 3), mask
        self.register_buffer("scale", torch.arange(1.0, 7.0))
        self.register_buffer("legal", torch.tensor([True, True, False]))
        with torch.no_grad():
            change(self)

    def forward(self, x: Tensor) -> Tensor:
        out = self.last(torch.relu(self.first(x)) * self.scale)
        return out.masked_fill(~self.legal, self.mask) if self.mask else out


class Gated(nn.Module):
    """Tokens whose number decides what each unit counts; for token 0 all count alike."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(9, 6), nn.Linear(6, 3)
        self.register_buffer("gate", torch.arange(9.0)[:, None] * torch.arange(6.0) + 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.table(tokens) * self.gate[tokens])


class Switched(nn.Module):
    """Nothing comes out unless the switch is on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Scaled()

    def forward(self, x: Tensor, on: Tensor) -> Tensor:
        return self.inner(x) * on[:, None]


Blocked = tuple[Callable[[], nn.Module], tuple[Tensor, ...], tuple[Tensor, ...], Callable[[Any], None]]

BLOCKED: dict[str, Blocked] = {  # the model, what it is aligned on, what comes later, and what becomes of it
    "plain": (Scaled, (torch.ones(2, 4),), (torch.randn(5, 4),), lambda m: None),
    "a head of zeros, trained later": (
        lambda: Scaled(lambda m: m.last.weight.zero_()),
        (torch.randn(5, 4),),
        (torch.randn(5, 4),),
        lambda m: m.last.weight.fill_(1.0),
    ),
    "dead on small inputs": (
        lambda: Scaled(lambda m: m.first.bias.fill_(-20.0)),
        (torch.zeros(2, 4),),
        (255 * torch.rand(5, 4),),
        lambda m: None,
    ),
    **{
        f"masked with {mask}": (
            lambda mask=mask: Scaled(mask=mask),
            (torch.randn(5, 4),),
            (torch.randn(5, 4),),
            lambda m: None,
        )
        for mask in (-1e9, torch.finfo(torch.float32).min, -math.inf)
    },
    "one token": (Gated, (torch.zeros(2, 3, dtype=torch.long),), (torch.arange(9)[None],), lambda m: None),
    "switched off": (
        Switched,
        (torch.ones(2, 4), torch.zeros(2, dtype=torch.bool)),
        (torch.randn(2, 4), torch.ones(2) > 0),
        lambda m: None,
    ),
}


def law_blocked(name: str) -> None:
    """Whatever the examples show, the model computes the same as before: on other inputs, and with other weights."""
    torch.manual_seed(0)
    make, examples, later, becomes = BLOCKED[name]
    models = {"a": make(), "b": make()}
    before = copy.deepcopy(models["b"])
    result = match(models, align=True, example_inputs=examples)
    assert all(each.reason for each in result.aligned if each.order is None)
    with torch.no_grad():
        for model in (before, models["b"]):
            becomes(model)
        torch.testing.assert_close(models["b"](*later), before(*later), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BLOCKED)
def test_what_a_buffer_counts_by_place_stays(name: str) -> None:
    law_blocked(name)


def relative_to_the_largest(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    pairs = zip(expected, got, strict=True)
    return max(float(((a - b).abs() / a.abs().max()).nan_to_num(nan=0).max()) for a, b in pairs)


def test_a_mask_hides_it_where_all_is_relative_to_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permute_module, "difference", relative_to_the_largest)
    with pytest.raises(AssertionError):
        law_blocked("masked with -3.4028234663852886e+38")


@pytest.mark.parametrize("name", ["a head of zeros, trained later", "one token"])
def test_units_that_need_not_make_a_difference_move_wrongly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permute_module, "_all_act", lambda space, acts: True)
    monkeypatch.setattr(Reference, "_untold", lambda self: None)
    with pytest.raises(AssertionError):
        law_blocked(name)


def test_the_outputs_of_a_model_are_no_units_whatever_blocks_them() -> None:
    spaces = spaces_of(find_channels(Scaled(mask=-1e9), torch.ones(2, 4)))
    assert [str(space) for space in spaces] == ["first.weight[axis 0]"]


def test_a_reference_that_is_not_finite_proves_nothing() -> None:
    models = {"a": Scaled(), "b": Scaled(lambda m: m.legal.fill_(True), mask=1.0)}
    models["b"].register_buffer("scale", torch.full((6,), math.nan))
    with pytest.raises(PlanError, match="b: expected finite outputs on the example inputs, got NaN or infinity"):
        by_weight(models, torch.randn(2, 4))


class Auxiliary(nn.Module):
    """A second head that only training, or another method, reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.aside = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(self.first(x))
        return (self.last(hidden), self.aside(hidden)) if self.training else self.last(hidden)


def test_parameters_that_the_forward_does_not_use_are_refused() -> None:
    torch.manual_seed(0)
    models = {"a": Auxiliary(), "b": Auxiliary()}
    before = states(models)
    with pytest.raises(PlanError, match=r"b\.aside\.weight, b\.aside\.bias: expected parameters that the forward uses"):
        by_weight(models, torch.randn(3, 4))
    assert_untouched(models, before)
    match(models)  # without align nothing is asked


# ---------------------------------------------------------------- what a model gives


class Box:
    pass


def test_the_tensors_of_an_output_are_found_or_it_is_refused() -> None:
    x, y = torch.ones(2), torch.zeros(1)
    assert [t.tolist() for t in tensors_in({"one": (x, [y, None]), "two": OrderedDict(a=2.5)})] == [[1, 1], [0], 2.5]
    for wrong in (Box(), (x, Box()), None, []):
        with pytest.raises(TypeError, match="return tensors"):
            tensors_in(wrong)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.0, 2.2], 0.1),
        ([1.0, 2.0, -1e9], [1.0, 2.2, -1e9], 0.1),
        ([1.0, -math.inf], [1.1, -math.inf], 0.1),
        ([1.0, math.inf], [1.0, -math.inf], math.inf),
        ([1.0, 2.0], [1.0, math.nan], math.inf),
        ([0.0, 2.0], [0.2, 2.0], 0.1),
        ([1 + 1j], [1 + 2j], 1.0),
        ([1.0], [1.0, 1.0], math.inf),
    ],
)
def test_a_difference_is_relative_to_the_number_itself(one: list[Any], other: list[Any], expected: float) -> None:
    assert difference([torch.tensor(one)], [torch.tensor(other)]) == pytest.approx(expected, rel=1e-6)


def test_random_numbers_of_the_user_stay_and_no_other_gpu_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    with same_random_numbers(nn.Linear(1, 1)):
        first = torch.rand(1)
    with same_random_numbers(nn.Linear(1, 1)):
        assert torch.equal(torch.rand(1), first)
    assert not seeded


# ---------------------------------------------------------------- nothing or all


def states(models: Mapping[str, nn.Module]) -> list[dict[str, Tensor]]:
    return [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models.values()]


def assert_untouched(models: Mapping[str, nn.Module], before: Sequence[dict[str, Tensor]]) -> None:
    for model, state in zip(models.values(), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def without(*forgotten: str) -> Callable[..., list[Space]]:
    """`spaces_of` that overlooks some of what moves."""

    def broken(channels: Any) -> list[Space]:
        spaces = spaces_of(channels)
        return [
            Space(s.makers, tuple(side for side in s.sides if not any(f in str(side) for f in forgotten)), None, None)
            for s in spaces
        ]

    return broken


@pytest.mark.parametrize("forgotten", ["running_mean", "running_var", "axis 1", "bias"])
def test_what_would_change_the_function_is_refused_and_nothing_written(
    forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = build("cnn")
    good, bad = copy.deepcopy(model), copy.deepcopy(model)
    for other in (good, bad):
        permute_by_hand(other, CNN, 0)
    models = {"a": model, "good": good, "bad": bad}
    before = states(models)
    calls = iter([spaces_of, without(forgotten)])
    monkeypatch.setattr(units, "spaces_of", lambda channels: next(calls)(channels))
    with pytest.raises(PlanError, match=r"bad: expected the outputs to stay .* when the units of .*weight\[axis 0\]"):
        by_weight(models, x)
    assert_untouched(models, before)


def loops(m: Any, x: Tensor) -> Tensor:
    while x.sum() > 0:
        x = x - 1
    return m.body(x)


def in_single_precision(m: Any, x: Tensor) -> Tensor:
    return m.last(torch.relu(m.body(x))) @ torch.eye(3, dtype=torch.float32)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (loops, "b: expected a model whose units can be found, got Net: expected a forward that torch.export"),
        (in_single_precision, "b: expected a model that can be copied and runs .* in float64, got RuntimeError"),
    ],
)
def test_a_model_that_cannot_be_followed_is_refused(forward: Any, message: str) -> None:
    models = {
        "a": Net(lambda m, x: m.last(m.body(x)), body=nn.Linear(3, 3), last=nn.Linear(3, 3)),
        "b": Net(forward, body=nn.Linear(3, 3), last=nn.Linear(3, 3)),
    }
    before = states(models)
    with pytest.raises(PlanError, match=message):
        by_weight(models, torch.randn(2, 3))
    assert_untouched(models, before)


@pytest.mark.parametrize("align", [by_weight, by_activation])
def test_weights_that_are_not_finite_are_refused(align: Align) -> None:
    models = {name: build("mlp", seed)[0] for seed, name in enumerate("ab")}
    with torch.no_grad():
        models["a"][2].bias[3] = math.nan
    before = {name: tensor.clone() for name, tensor in models["b"].state_dict().items()}
    with pytest.raises(PlanError, match=r"a\.2\.bias: expected finite weights to align, got NaN or infinity"):
        align(models, torch.randn(3, 20))
    assert all(torch.equal(tensor, before[name]) for name, tensor in models["b"].state_dict().items())


def test_activations_that_are_not_finite_are_refused() -> None:
    models: dict[str, nn.Module] = {
        name: Net(lambda m, x: m.last(torch.tanh(m.body(x))), body=nn.Linear(3, 3), last=nn.Linear(3, 2))
        for name in "ab"
    }
    with torch.no_grad():
        models["b"].body.weight.fill_(1.0)
    x = torch.full((3, 3), 1.7e308, dtype=torch.float64)
    with pytest.raises(PlanError, match=r"b\.body\.weight: expected finite activations to align by"):
        by_activation(models, x)


def test_a_write_that_fails_is_taken_back() -> None:
    good, bad = torch.ones(3), torch.zeros(1).expand(3)
    with pytest.raises(RuntimeError):
        write([(good, torch.zeros(3)), (bad, torch.arange(3.0))])
    assert good.tolist() == [1, 1, 1]


def test_a_space_moves_if_a_shift_and_a_swap_change_nothing() -> None:
    model, x = NETWORKS["layernorm_residual"].make()
    spaces = spaces_of(find_channels(model, x))
    assert [space.blocked is None for space in spaces] == [False, True]
    assert Reference("m", model, (x,)).reasons(spaces) == [None, None]
    fixed, y = NETWORKS["buffer_mask"].make()
    (stays,) = [space for space in spaces_of(find_channels(fixed, y)) if space.blocked]
    assert Reference("m", fixed, (y,)).reasons([stays]) == [stays.blocked]
