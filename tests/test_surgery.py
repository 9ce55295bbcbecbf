"""Surgery: tensors replaced under all their names, sizes kept in step, architectures recorded and rebuilt."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from tying.enforce.compaction.description import describe, rebuild
from tying.enforce.compaction.surgery import place_tied_, replace_, sizes_of
from tying.errors import CompactError, PlanError
from tying.nn import TiedConv2d, TiedLinear


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.deep = (
            nn.Conv2d(3, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3, groups=4),
        )
        self.head = nn.Linear(4, 3, bias=False)
        self.twin = nn.Linear(4, 3)
        self.twin.weight = self.head.weight
        self.again = self.conv
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.deep(torch.relu(self.norm(self.conv(x)))).mean((2, 3)) * self.scale
        return self.head(y) + self.twin(y)


TYPES = [
    nn.Linear(3, 4),
    nn.Bilinear(3, 4, 5),
    nn.Conv1d(4, 6, 3, groups=2),
    nn.Conv2d(4, 8, 3, groups=4),
    nn.Conv3d(4, 6, 3),
    nn.ConvTranspose1d(4, 6, 3, groups=2),
    nn.ConvTranspose2d(4, 6, 3),
    nn.BatchNorm1d(5),
    nn.BatchNorm2d(5, affine=False),
    nn.BatchNorm3d(5, affine=False, track_running_stats=False),
    nn.InstanceNorm2d(5, affine=True),
    nn.GroupNorm(2, 4),
    nn.PReLU(4),
    nn.Embedding(5, 3),
    TiedLinear([0, 0, 1], 2),
    TiedConv2d([0, 0, 1], 2, 3),
]


@pytest.mark.parametrize("module", TYPES, ids=lambda m: type(m).__name__)
def test_the_table_says_what_torch_says(module):
    assert sizes_of(module)
    assert sizes_of(module) == {name: getattr(module, name) for name in sizes_of(module)}


def test_replaced_tensors_stand_under_all_names_and_sizes_follow():
    model = Net().eval()
    model.head.weight.requires_grad_(False)
    keep = torch.tensor([0, 2, 3])
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    values = {
        "conv.weight": state["conv.weight"][keep],
        **{f"norm.{leaf}": state[f"norm.{leaf}"][keep] for leaf in ("weight", "bias", "running_mean", "running_var")},
        "deep.weight": state["deep.weight"][keep],
        "deep.bias": state["deep.bias"][keep],
        "scale": state["scale"][keep],
        "twin.weight": state["twin.weight"][:, keep],
        "head.bias": torch.tensor([1.0, 2.0, 3.0]),
    }
    replace_(model, values)
    assert model.head.weight is model.twin.weight
    assert model.again is model.conv
    assert not model.head.weight.requires_grad
    assert (model.conv.out_channels, model.norm.num_features, model.deep.groups) == (3, 3, 3)
    assert (model.head.in_features, model.twin.in_features) == (3, 3)
    assert all(t.dtype == torch.float32 for t in model.state_dict().values() if t.is_floating_point())
    assert model(torch.randn(2, 3, 6, 6)).shape == (2, 3)
    assert isinstance(model.head.bias, nn.Parameter)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv1d(6, 9, 3, groups=3), torch.randn(2, 6, 8)),
        (nn.ConvTranspose1d(6, 9, 3, groups=3), torch.randn(2, 6, 8)),
        (nn.Conv2d(3, 6, 3, groups=3), torch.randn(2, 3, 5, 5)),
    ],
    ids=lambda value: None if isinstance(value, torch.Tensor) else str(value),
)
def test_whole_groups_of_a_convolution_go(layer, x):
    expected, model = layer(x), nn.Sequential(layer)
    ins, outs, rows = layer.in_channels // 3, layer.out_channels // 3, len(layer.weight) // 3
    replace_(model, {"0.weight": layer.weight[rows:], "0.bias": layer.bias[outs:]})
    torch.testing.assert_close(model(x[:, ins:]), expected[:, outs:])
    assert (layer.in_channels, layer.out_channels, layer.groups) == (2 * ins, 2 * outs, 2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_architecture_is_rebuilt_from_its_json(device):
    torch.manual_seed(0)
    small = Net().eval()
    replace_(small, {"scale": torch.ones(4), "head.bias": torch.randn(3)})
    place_tied_(small, {"conv": [0, -1, 0]})
    assert isinstance(small.again, TiedConv2d)
    assert small.again is small.conv
    fresh = Net().to(device).eval()
    before = json.dumps(describe(fresh))
    built = rebuild(fresh, json.loads(json.dumps(describe(small))))
    assert json.dumps(describe(fresh)) == before
    assert describe(built) == describe(small)
    built.load_state_dict(small.state_dict(), assign=device == "meta")
    if device == "cpu":
        assert built.head.weight is built.twin.weight
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(built(x), small(x))
    assert repr(built) == repr(small)


def described(change) -> dict:
    record = describe(Net())
    change(record)
    return record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d.pop("norm"),
            r"norm: expected no module of that name with tensors \(the saved model has none\), got BatchNorm2d; build",
        ),
        (lambda d: d.update(extra={"type": "Linear", "tensors": {}}), "extra: expected a module with type=Linear"),
        (lambda d: d["head"].update(type="TiedConv2d"), "head: expected a module with type=TiedConv2d"),
        (lambda d: d["head"].update(in_features=7), "head: expected a module with type=Linear, in_features=7"),
        (lambda d: d["head"]["tensors"].update(other=[2]), "head: expected"),
        (lambda d: d["head"]["tensors"].update(weight=[3, 2]), "head: expected"),
    ],
)
def test_a_description_of_another_model_is_refused_by_name(change, message):
    with pytest.raises(PlanError, match=message):
        rebuild(Net(), described(change))


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].register_forward_hook(lambda *_: None)
    return model


def parametrized() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))


def shared() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (hooked, "0", "0.weight: .* hooks"),
        (parametrized, "0", "0.weight: .* parametrization"),
        (shared, "0", "0.weight: .* shared by 2 modules"),
        (lambda: nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), "0", "0.weight: .* groups=2"),
        (lambda: nn.Sequential(nn.Conv1d(3, 4, 3, padding_mode="circular")), "0", "padding_mode='circular'"),
        (lambda: nn.Sequential(nn.ConvTranspose1d(3, 4, 3)), "0", "ConvTranspose1d has no tied twin"),
        (lambda: nn.Linear(3, 2), "", "^weight: .* the whole model"),
    ],
)
def test_what_cannot_be_replaced_by_a_tied_layer_is_refused_and_stays(make, name, message):
    model = make()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(CompactError, match=message):
        place_tied_(model, {name: [0, 0, 1]})
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_a_parametrized_tensor_is_not_replaced():
    model = parametrized()
    with pytest.raises(CompactError, match=r"0\.bias: expected plain parameters"):
        replace_(model, {"0.bias": torch.zeros(2)})


@pytest.mark.parametrize(("layer", "dims"), [(nn.Conv2d, 4), (nn.Conv3d, 5)])
def test_what_is_cut_lies_in_memory_as_before(layer, dims):
    last = {4: torch.channels_last, 5: torch.channels_last_3d}[dims]
    model = nn.Sequential(layer(4, 6, 3), layer(6, 4, 3), layer(4, 2, 3)).to(memory_format=last)
    replace_(model, {"1.weight": model[1].weight[:2]})
    place_tied_(model, {"2": [0, 0, 1, -1]})
    assert all(module.weight.is_contiguous(memory_format=last) for module in model)
    usual = nn.Sequential(layer(4, 6, 3))
    replace_(usual, {"0.weight": usual[0].weight[:2]})
    assert usual[0].weight.is_contiguous()
    fresh = nn.Sequential(layer(4, 6, 3), layer(6, 4, 3), layer(4, 2, 3)).to(memory_format=last)
    assert rebuild(fresh, describe(model))[1].weight.is_contiguous(memory_format=last)
