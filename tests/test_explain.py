"""What `explain` says of whole networks, what it refuses, and what it leaves as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from families import FAMILIES
from networks import Net
from tying import explain
from tying.errors import TyingError
from tying.explain import fields
from tying.explain.planes import is_looked_at, places


@pytest.mark.parametrize("name", FAMILIES)
def test_fields_of_the_families_of_networks(name: str) -> None:
    model, x = FAMILIES[name].make()
    explanation = explain(model, x, shifts=1)
    assert explanation.untraced is None
    assert explanation.fields is not None
    assert not explanation.fields.inexact
    for layer in explanation.fields.layers:
        assert 1 <= layer.sees <= int(np.prod(explanation.fields.input_shape))
        assert layer.sees == layer.seen.sum()
        assert layer.reached == layer.reaches.sum()
        assert layer.reaches.shape == layer.shape
    json.loads(explanation.to_json())
    assert "What is stored" in str(explanation) or not explanation.layers


@pytest.mark.parametrize(("depth", "width"), [(1, 3), (2, 5), (3, 7), (4, 9)])
def test_convolutions_on_top_of_each_other_see_more(depth: int, width: int) -> None:
    model = nn.Sequential(*(nn.Conv2d(1, 1, 3) for _ in range(depth)))
    fields = explain(model, torch.rand(1, 1, 21, 21), shifts=0).fields
    assert fields is not None
    last = fields.layers[-1]
    assert last.sees == last.reached == width**2
    assert [end - start for start, end in last.sees_box] == [width, width]


def test_the_fields_of_lenet() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(800, 10)
    )
    fields = explain(model, torch.rand(1, 1, 28, 28), shifts=0).fields
    assert fields is not None
    assert [layer.sees for layer in fields.layers] == [5**2, 6**2, 14**2, 16**2, 28**2]
    assert [layer.reached for layer in fields.layers] == [5**2, 3**2, 7**2, 4**2, 10]
    assert [layer.place for layer in fields.layers] == [(12, 12), (6, 6), (4, 4), (2, 2), (5,)]


PLACES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...], list[int]]] = {
    "flattened": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 30), nn.Linear(30, 9)), (1, 1, 28, 28), (28, 28), [784] * 2
    ),
    "flattened signal": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (2, 3, 4), (3, 4), [12]),
    "folded": (lambda: Net(lambda m, x: m.c(x.reshape(-1, 1, 8, 8)), c=nn.Conv2d(1, 2, 3)), (2, 64), (64,), [9]),
    "unflattened": (lambda: nn.Sequential(nn.Unflatten(1, (1, 4, 4, 4)), nn.Conv3d(1, 1, 2)), (2, 64), (64,), [8]),
}  # fmt: skip


def law_places(name: str) -> None:
    """The places of the input are numbers of a sample; a layer sees as many as, disturbed, change its middle."""
    build, shape, input_shape, sees = PLACES[name]
    torch.manual_seed(0)
    model, x = build().double(), torch.rand(shape, dtype=torch.float64)
    explanation = explain(model, x)
    found = explanation.fields
    assert found is not None
    assert found.input_shape == input_shape
    assert [layer.sees for layer in found.layers] == sees
    last, sample = found.layers[-1], x[:1].flatten()
    counted = 0
    for place in range(len(sample)):
        other = sample.clone()
        other[place] += 1
        before, after = (model(each.reshape(1, *shape[1:]))[0] for each in (sample, other))
        at = last.place if before.ndim == len(last.place) else (slice(None), *last.place)
        counted += not torch.equal(before[at], after[at])
    assert counted == sees[-1]


@pytest.mark.parametrize("name", PLACES)
def test_places_of_an_input_that_is_first_given_another_shape(name: str) -> None:
    law_places(name)


@pytest.mark.parametrize("name", PLACES)
def test_places_as_the_reader_would_have_them_fail_the_law(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_the_reader(model: nn.Module, dependence: Any) -> tuple[int, ...]:
        reader = next(module for module in model.modules() if is_looked_at(module))
        return places(reader, len(fields.source_shape(dependence)), of_input=True)

    monkeypatch.setattr(fields, "input_places", as_the_reader)
    with pytest.raises((AssertionError, IndexError)):
        law_places(name)


def test_every_call_of_a_layer_has_its_field() -> None:
    explanation = explain(Net(lambda m, x: m.c(m.c(m.c(x))), c=nn.Conv2d(1, 1, 3)), torch.rand(1, 1, 16, 16), shifts=0)
    assert explanation.fields is not None
    assert [(layer.call, layer.sees) for layer in explanation.fields.layers] == [(1, 9), (2, 25), (3, 49)]
    assert "c (3rd call)   10×10                 49" in str(explanation)


def test_the_model_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, state = torch.rand(3, 1, 6, 6), torch.get_rng_state()
    explain(model, x)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_of_a_model_that_cannot_be_traced_the_costs_are_there() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.conv(x) if float(x.sum()) > 0 else x

    explanation = explain(Net(forward, conv=nn.Conv1d(1, 1, 3)), torch.ones(1, 1, 6))
    (layer,) = explanation.layers
    assert layer.shared.values == 4
    assert explanation.fields is None
    assert explanation.untraced is not None
    assert "torch.export" in explanation.untraced
    assert "not known" in str(explanation)
    assert "take control flow that depends on the data out of forward" in explanation.untraced
    assert "tie_" not in explanation.untraced
    with pytest.raises(TyingError, match="nothing to draw"):
        explanation.draw("none.png")


def test_of_a_gradient_in_forward_the_costs_are_there() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(m.conv(x).sum(), x)[0]

    explanation = explain(Net(forward, conv=nn.Conv1d(1, 1, 3)), torch.ones(1, 1, 6))
    assert [layer.shared.values for layer in explanation.layers] == [4]
    assert explanation.untraced is not None
    assert explanation.untraced.startswith("convolution_backward in the model's forward: ")
    assert "tie_" not in explanation.untraced


@pytest.mark.parametrize(
    ("inputs", "options", "said"),
    [
        ("text", {}, "expected a tensor or a tuple of tensors"),
        ((), {}, "expected a tensor or a tuple of tensors"),
        (torch.rand(1, 3, 8), {}, "expected inputs that the model takes"),
        (torch.rand(0, 1, 8), {}, "example_inputs: expected at least one sample"),
        (torch.full((1, 1, 8), float("inf")), {}, "example_inputs: expected finite numbers"),
        (torch.rand(1, 1, 8), {"shifts": -1}, "shifts: expected"),
        (torch.rand(1, 1, 8), {"shifts": 1.5}, "shifts: expected an integer ≥ 0, got 1.5"),
        (torch.rand(1, 1, 8), {"shifts": True}, "shifts: expected an integer ≥ 0, got True"),
    ],
)
def test_bad_input_is_refused_by_name(inputs: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(TyingError, match=said):
        explain(nn.Conv1d(1, 1, 3), inputs, **options)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: "conv", "model: expected a torch.nn.Module, got str"),
        (
            lambda: nn.Sequential(nn.LazyConv1d(1, 3)),
            "0.weight: expected a tensor with a shape, got an uninitialised one; run the model once",
        ),
        (
            lambda: Net(lambda m, x: m.second(m.first(x)), first=poisoned(), second=nn.Conv1d(1, 1, 1)),
            "^first: expected finite",
        ),
        (lambda: Net(lambda m, x: m.conv(x.log()), conv=nn.Conv1d(1, 1, 3)), "for noise as bright as the example"),
    ],
    ids=["no module", "lazy", "not finite", "not finite for noise"],
)
def test_a_model_that_cannot_be_explained_is_refused_by_name(model: Callable[[], Any], said: str) -> None:
    with pytest.raises(TyingError, match=said):
        explain(model(), torch.rand(1, 1, 8) + 0.1)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_a_script_is_refused_by_name() -> None:
    with pytest.raises(TyingError, match=r"^model: expected a module with a forward in Python"):
        explain(torch.jit.script(nn.Conv1d(1, 1, 3)), torch.rand(1, 1, 8))


def poisoned() -> nn.Module:
    conv = nn.Conv1d(1, 1, 3)
    with torch.no_grad():
        conv.weight[0, 0, 0] = float("nan")
    return conv


class Counts(nn.Module):
    """Writes to a buffer and an attribute whenever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if not torch.compiler.is_compiling():
            self.seen.append(x)
        return x


def test_a_module_that_writes_to_a_buffer_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Conv1d(1, 1, 3), Counts())
    explain(model, torch.rand(1, 1, 8))
    assert float(model[1].calls) == 0
    assert model[1].seen == []


def test_nothing_depends_on_the_default_dtype() -> None:
    def said() -> str:
        torch.manual_seed(0)
        layers = (nn.Conv1d(1, 2, 3, padding=1, stride=2), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(4, 2))
        return explain(nn.Sequential(*(layer.float() for layer in layers)), x).fields.__repr__()

    x = torch.rand(1, 1, 8)
    expected, default = said(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert said() == expected
    finally:
        torch.set_default_dtype(default)


def test_torch_says_nothing_of_its_own_of_a_model_it_cannot_trace(capfd: pytest.CaptureFixture[str]) -> None:
    explain(Net(lambda m, x: m.conv(x) if float(x.sum()) > 0 else x, conv=nn.Conv1d(1, 1, 3)), torch.ones(1, 1, 6))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 4)), (1, 1, 8, 8)),
        (lambda: nn.Sequential(nn.Conv1d(2, 2, 3), nn.MaxPool1d(2)), (1, 2, 12)),
        (lambda: nn.Conv3d(1, 1, 2), (1, 1, 4, 4, 4)),
        (lambda: nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 7)), (1, 5)),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), (1, 1, 4, 4)),
        (lambda: nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 1, 2)), (1, 16)),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_every_kind_of_network_has_a_picture(
    model: Callable[[], nn.Module], shape: tuple[int, ...], suffix: str, tmp_path: Path
) -> None:
    path = explain(model(), torch.rand(shape), shifts=0).draw(tmp_path / f"fields.{suffix}")
    assert path.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml"}[suffix])


@pytest.mark.parametrize("name", ["fields.jpg", "fields", "none/fields.png"])
def test_a_picture_without_a_place_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(TyingError, match="path: expected"):
        explain(nn.Conv1d(1, 1, 3), torch.rand(1, 1, 6)).draw(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_what_the_picture_says_and_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.figure

    figures: list[Any] = []
    savefig = matplotlib.figure.Figure.savefig

    def saved(figure: Any, *args: Any, **named: Any) -> Any:
        figures.append(figure)
        return savefig(figure, *args, **named)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", saved)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2))
    explain(model, torch.rand(1, 1, 10, 10), shifts=0).draw(tmp_path / "fields.png")
    panels = [panel for figure in figures for panel in figure.axes]
    assert [panel.get_title("left") for panel in panels] == [
        "0 · Conv2d\n3×3 of 10×10",
        "1 · MaxPool2d\n4×4 of 10×10",
        "0 · Conv2d\n3×3 of 8×8",
        "1 · MaxPool2d\n2×2 of 4×4",
    ]
    places = [(list(line.get_xdata()), list(line.get_ydata())) for line in panels[0].lines if line.get_marker() == "+"]
    assert places == [([5], [5])]


@pytest.mark.parametrize("name", ["vgg", "resnext"])
def test_the_fields_of_a_family_against_a_disturbed_input(name: str) -> None:
    """Only what is seen changes the unit in the middle; of the first layer, all that is seen does."""
    model, x = FAMILIES[name].make()
    model, x = model.double().eval(), x[:1].double()
    fields = explain(model, x, shifts=0).fields
    assert fields is not None
    layers = [layer for layer in fields.layers if len(layer.shape) == 2][::2]
    made: dict[str, Tensor] = {}
    for layer in layers:
        model.get_submodule(layer.name).register_forward_hook(
            lambda _m, _x, y, name=layer.name: made.setdefault(name, y.detach())
        )

    def units(x: Tensor) -> list[Tensor]:
        made.clear()
        with torch.no_grad():
            model(x)
        return [made[layer.name][0, :, layer.place[0], layer.place[1]] for layer in layers]

    before = units(x)
    for place in product(*map(range, fields.input_shape)):
        other = x.clone()
        other[0, :, place[0], place[1]] += 1
        for i, (layer, was, now) in enumerate(zip(layers, before, units(other), strict=True)):
            changed = not torch.equal(was, now)
            assert bool(layer.seen[place]) >= changed
            assert i or bool(layer.seen[place]) == changed
