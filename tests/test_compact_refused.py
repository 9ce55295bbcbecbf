"""What `compact` does not take: refused by name, with the remedy, and nothing changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tying.channels.find import find_channels
from tying.channels.joined import joined_groups
from tying.enforce import compact, plan_compaction
from tying.enforce.compaction.fastest import choose_fastest_
from tying.errors import CompactError, PlanError
from tying.groups import Groups
from tying.plan import Tie, TiePlan

PRUNED = TiePlan([Tie.of("body.weight", Groups.outputs(), [0, -1, 1])])


class Net(nn.Module):
    """Two layers; what a subclass does between them, or with the output, is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x).relu())


def snapshot(model: nn.Module) -> dict[str, tuple[int, bytes]]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (id(t), b"" if t.is_meta else t.detach().numpy().tobytes()) for name, t in tensors.items()}


class Masked(Net):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x).relu()[x.sum(-1) > 0])


class Selected(Net):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x).index_select(0, (x.sum(-1) > 0).nonzero().flatten()))


class Distinct(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), torch.unique(x)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.part = nn.Linear(4, 3), Masked()

    def forward(self, x: Tensor) -> Any:
        return self.part(x) if x.shape[-1] == 4 else self.body(x)


SIZED_BY_DATA: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a mask": (Masked, r"^index in the model's forward: .*torch\.where.*tie_"),
    "the places of what is not zero": (Selected, r"^nonzero in the model's forward: "),
    "a second output": (Distinct, r"^_?unique\w* in the model's forward: "),
    "inside of a module": (Inner, r"^index in 'part': "),
}
READERS = {
    "compact": lambda model, x: compact(model, PRUNED, x),
    "plan_compaction": lambda model, x: plan_compaction(model, PRUNED, x),
    "find_channels": find_channels,
    "joined_groups": joined_groups,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize(("make", "message"), SIZED_BY_DATA.values(), ids=SIZED_BY_DATA)
def test_sizes_that_depend_on_the_data_are_refused_by_name(make, message, read):
    model = make()
    before = snapshot(model)
    with pytest.raises(CompactError, match=message):
        read(model, torch.randn(8, 4))
    assert snapshot(model) == before


class Gradient(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)

    def forward(self, x: Tensor) -> Any:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return super().forward(torch.autograd.grad(self.conv(x[:, None]).sum(), x)[0])


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_gradient_in_forward_is_refused_by_name(read):
    with pytest.raises(CompactError, match=r"^\w+_backward in the model's forward: .*autograd\.grad in forward.*tie_"):
        read(Gradient(), torch.randn(8, 4))


class Scaled(Net):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x) * x.max().item())


def test_a_number_that_depends_on_the_data_is_no_size():
    assert compact(Scaled(), PRUNED, torch.randn(8, 4)).head.in_features in (2, 3)


def scripted(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(model)


def half_on_meta() -> nn.Module:
    model = Net()
    model.head.to("meta")
    return model


def with_a_script_inside() -> nn.Module:
    model = Net()
    model.head = scripted(nn.Linear(3, 2))
    return model


def sparse() -> nn.Module:
    model = Net()
    model.body.weight = nn.Parameter(model.body.weight.detach().to_sparse())
    return model


UNUSABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "on the meta device": (lambda: Net().to("meta"), r"^body\.weight: .*meta device; .*to_empty"),
    "half on the meta device": (half_on_meta, r"^head\.weight: .*meta device"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), r"^0\.weight: .*uninitialised one; run the model once"),
    "lazy statistics": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.LazyBatchNorm1d(affine=False)),
        r"^1\.running_mean: .*uninitialised one; run the model once",
    ),
    "scripted": (lambda: scripted(nn.Sequential(nn.Linear(4, 3))), r"^model: .*torch\.jit; pass the model"),
    "a script inside": (with_a_script_inside, r"^head: .*torch\.jit; pass the model"),
    "sparse": (sparse, r"^body\.weight: expected dense weights, got torch\.sparse_coo; .*to_dense\(\)"),
    "complex": (
        lambda: nn.Linear(4, 3, dtype=torch.complex64),
        r"^weight: expected real numbers, got torch\.complex64: .*float64; .*tie_",
    ),
    "no module": (lambda: torch.relu, r"^model: expected a torch\.nn\.Module, got builtin"),
}


@pytest.mark.parametrize("call", [compact, plan_compaction])
@pytest.mark.parametrize(("make", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_model_without_values_or_python_is_refused_by_name(make, message, call):
    with pytest.raises(CompactError, match=message):
        call(make(), TiePlan(), torch.randn(2, 4))


CALLS = {"find_channels": find_channels, "joined_groups": joined_groups, "choose_fastest_": choose_fastest_}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("model", [None, torch.relu])
def test_what_is_no_model_is_refused_by_name(call, model):
    with pytest.raises(CompactError, match=r"^model: expected a torch\.nn\.Module, got "):
        call(model, torch.randn(2, 4))


@pytest.mark.parametrize("inputs", [None, 3, [torch.randn(2, 4)], ()])
def test_what_are_no_inputs_is_refused_by_name(inputs):
    with pytest.raises(CompactError, match=r"^example_inputs: expected a tensor or a tuple of tensors, got "):
        choose_fastest_(Net(), inputs)


ARGUMENTS = {
    "tolerance in words": ({"tolerance": "x"}, CompactError, r"^tolerance: expected a finite number ≥ 0, got 'x'; "),
    "no tolerance": ({"tolerance": None}, CompactError, r"^tolerance: .*got None; "),
    "a truth value": ({"tolerance": True}, CompactError, r"^tolerance: .*got True; "),
    "a list": ({"plan": []}, PlanError, r"^plan: expected a TiePlan, got list; "),
    "no plan": ({"plan": None}, PlanError, r"^plan: expected a TiePlan, got NoneType; "),
    "a name": ({"plan": "x"}, PlanError, r"^plan: expected a TiePlan, got str; "),
    "no inputs": ({"example_inputs": ()}, CompactError, r"^example_inputs: "),
}


@pytest.mark.parametrize("call", [compact, plan_compaction])
@pytest.mark.parametrize(("given", "kind", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_an_argument_of_another_kind_is_refused_by_name(given, kind, message, call):
    with pytest.raises(kind, match=message):
        call(Net(), **{"plan": PRUNED, "example_inputs": torch.randn(2, 4), **given})


def test_any_number_is_a_tolerance():
    assert compact(Net(), PRUNED, torch.randn(2, 4), tolerance=np.float32(1e-6)).body.out_features == 2


class Casting(Net):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x.float()))


class Listed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(2, 2)]

    def forward(self, x: Tensor) -> Any:
        return self.layers[0](super().forward(x))


@dataclass
class Output:
    y: Tensor


class Dataclass(Net):
    def forward(self, x: Tensor) -> Any:
        return Output(super().forward(x))


class Nothing(Net):
    def forward(self, x: Tensor) -> Any:
        super().forward(x)


class Keyword(Net):
    def forward(self, x: Tensor, *, scale: float) -> Any:
        return super().forward(x) * scale


class Two(Net):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return super().forward(x) * y


NOT_RUNNING = {
    "a cast": (Casting, 4, r"^body: .*in float64, though it runs as it is; .*no x\.float\(\)"),
    "layers in a list": (Listed, 4, r"^model: .*in float64, though it runs as it is; .*nn\.ModuleList"),
    "a cast of other inputs": (Casting, 3, r"^body: .*shapes.*; pass example_inputs as the model takes them$"),
    "other inputs": (Net, 3, r"^body: .*shapes.*; pass example_inputs as the model takes them$"),
    "one input of two": (Two, 4, r"'y'; pass example_inputs as the model takes them$"),
    "a keyword": (Keyword, 4, r"'scale'; .*wrap the model in a module whose forward passes scale$"),
    "an output of another kind": (Dataclass, 4, r"an output of Output.*; return tensors, in tuples or dictionaries$"),
    "no output": (Nothing, 4, r"an output of NoneType.*; return tensors, in tuples or dictionaries$"),
}


@pytest.mark.parametrize(("make", "features", "message"), NOT_RUNNING.values(), ids=NOT_RUNNING)
def test_what_does_not_run_is_told_from_what_is_not_given(make, features, message):
    model = make()
    before, training = snapshot(model), model.training
    with pytest.raises(CompactError, match=message):
        compact(model, PRUNED, torch.randn(2, features))
    assert (snapshot(model), model.training) == (before, training)
    assert not model._forward_hooks
