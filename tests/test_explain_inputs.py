"""What `explain` makes of the inputs and the model that it is given: copies, one sample, nothing written to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f
from torch.nn.utils import prune

import tying
from networks import Net
from tying import Groups, explain
from tying.errors import TyingError
from tying.explain import equivariance, run, sample
from tying.explain.calls import Watched

SHAPES: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...]]] = {
    "after": (lambda here: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=here)), (1, 3, 12, 12)),
    "before": (lambda here: nn.Sequential(nn.ReLU(inplace=here), nn.Conv2d(3, 4, 3)), (2, 3, 12, 12)),
    "inside": (lambda here: Activated(3, 4, 3, here=here), (1, 3, 12, 12)),
    "first of all": (lambda here: Net(Doubled(here), conv=nn.Conv2d(1, 1, 3)), (2, 1, 12, 12)),
}


class Activated(nn.Conv2d):
    def __init__(self, *args: int, here: bool) -> None:
        super().__init__(*args)
        self.here = here

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(f.leaky_relu(x, inplace=self.here))


class Doubled:
    def __init__(self, here: bool) -> None:
        self.here = here

    def __call__(self, m: Any, x: Tensor) -> Tensor:
        return m.conv(x.mul_(2) if self.here else x * 2)


def law_in_place_or_not(name: str) -> None:
    """Where a result is written changes no figure, and nothing that was given."""
    build, shape = SHAPES[name]
    said = []
    for here in (True, False):
        torch.manual_seed(0)
        model, x = build(here), torch.randn(shape)
        before = x.clone()
        explanation = explain(model, x)
        assert torch.equal(x, before)
        said.append((explanation.equivariance, explanation.fields))
    assert said[0] == said[1]
    assert not any(layer.broken_by for layer in said[0][0])


@pytest.mark.parametrize("name", SHAPES)
def test_where_a_result_is_written_changes_nothing(name: str) -> None:
    law_in_place_or_not(name)


@contextmanager
def keeping_aliases(model: nn.Module, see: Callable[..., None]) -> Generator[None]:
    handles = [
        module.register_forward_hook(
            lambda module, args, made, name=name: see(name, module, Watched(args[0], made, module))
        )
        for name, module in model.named_modules()
    ]
    yield
    for handle in handles:
        handle.remove()


def test_aliases_of_what_is_overwritten_fail_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equivariance, "watching", keeping_aliases)
    with pytest.raises(AssertionError):
        law_in_place_or_not("after")


def test_inputs_that_a_pass_may_write_to_fail_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equivariance, "copies", lambda inputs: inputs)
    with pytest.raises(AssertionError):
        law_in_place_or_not("first of all")


def attending() -> nn.Module:
    def forward(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        return m.out(f.scaled_dot_product_attention(m.q(x), x, x, attn_mask=mask.bool()))

    return Net(forward, q=nn.Linear(8, 8), out=nn.Linear(8, 8))


def law_masks(samples: int, mask: Tensor) -> None:
    """The middle one of seven sees itself and the three before, whatever the batch."""
    torch.manual_seed(0)
    fields = explain(attending(), (torch.randn(samples, 7, 8), mask), shifts=0).fields
    assert fields is not None
    assert [(layer.sees, layer.sees_box) for layer in fields.layers] == [(1, ((3, 4),)), (4, ((0, 4),))]


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_a_mask_for_all_samples_stays_whole(samples: int) -> None:
    law_masks(samples, torch.ones(7, 7).tril())


def test_masks_that_are_batched_are_cut() -> None:
    law_masks(7, torch.ones(7, 7, 7).tril())


def test_a_mask_cut_by_chance_fails_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "_is_first", lambda *_: True)
    with pytest.raises(AssertionError):
        law_masks(7, torch.ones(7, 7).tril())


def test_samples_that_mix_are_refused_by_name() -> None:
    model = Net(lambda m, x, y: m.linear(x - x.mean(0)) + y, linear=nn.Linear(3, 3))
    with pytest.raises(TyingError, match=r"example_inputs: expected inputs of which the first sample .* of one sample"):
        explain(model, (torch.rand(4, 3), torch.rand(4, 3)))
    assert explain(model, (torch.rand(1, 3), torch.rand(1, 3))).fields is not None


def noisy(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    return m.linear(x + torch.randn_like(x)) * mask


@pytest.mark.parametrize("samples", [1, 5, 40])
def test_batches_of_a_model_that_draws_numbers_are_cut(samples: int) -> None:
    explanation = explain(Net(noisy, linear=nn.Linear(4, 2)), (torch.rand(samples, 4), torch.rand(samples, 1)))
    assert explanation.inputs == (4,)


def test_in_inference_mode_units_see_what_they_see() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 3))  # parameters of its mode, too
        x = torch.rand(2, 1, 9, 9)
        inside = explain(model, x)
        assert torch.is_inference_mode_enabled()
    assert inside.fields is not None
    assert [layer.sees for layer in inside.fields.layers] == [9, 25]
    assert explain(model, x) == inside


def sparse() -> nn.Module:
    model = nn.Linear(8, 2)
    model.weight = nn.Parameter(model.weight.detach().to_sparse())
    return model


def uncopied() -> nn.Module:
    model = nn.Linear(4, 2)
    model.lock = threading.Lock()
    return model


@pytest.mark.parametrize(
    ("model", "inputs", "said"),
    [
        (
            lambda: nn.Conv2d(1, 1, 3, device="meta"),
            (torch.rand(1, 1, 5, 5),),
            "^weight: expected a tensor with values.* to_empty",
        ),
        (lambda: nn.Conv2d(1, 1, 3), (torch.rand(1, 1, 5, 5, device="meta"),), "^example_inputs: expected values"),
        (lambda: nn.Conv2d(1, 1, 3), (torch.rand(1, 1, 5, 5), 3), r"^example_inputs\[1\]: expected a tensor, got 3"),
        (lambda: nn.Conv2d(1, 1, 3), (torch.rand(1, 1, 5, 5), None), r"^example_inputs\[1\]: .* got None"),
        (
            sparse,
            (torch.rand(8, 8),),
            r"^weight: expected dense weights, got torch\.sparse_coo; .*to_dense\(\)",
        ),
        (lambda: nn.Linear(8, 2), (torch.eye(8).to_sparse(),), r"^example_inputs: expected dense .*to_dense\(\)"),
        (lambda: nn.Embedding(10, 4), (torch.zeros(1, 0).long(),), r"^example_inputs: .* elements, got .* \(1, 0\);"),
        (lambda: nn.Linear(4, 2), (torch.zeros(2, 0, 4),), r"^example_inputs: .* elements, got .* \(2, 0, 4\);"),
        (uncopied, (torch.rand(2, 4),), r"^model: expected a model that can be copied, got TypeError: "),
    ],
)
def test_what_has_no_values_is_refused_by_name(model: Callable[[], nn.Module], inputs: Any, said: str) -> None:
    with pytest.raises(TyingError, match=said):
        explain(model(), inputs)


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    @torch.compile(backend="eager")
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def compiled(model: nn.Module) -> nn.Module:
    return cast(nn.Module, torch.compile(model, backend="eager"))


COMPILED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "the whole": (lambda: compiled(nn.Sequential(nn.Conv2d(3, 4, 3))), "0"),
    "a part": (lambda: nn.Sequential(compiled(nn.Sequential(nn.Conv2d(3, 4, 3)))), "0.0"),
    "twice": (lambda: compiled(nn.Sequential(compiled(nn.Conv2d(3, 4, 3)))), "0"),
    "the forward": (Decorated, "conv"),
}


@pytest.mark.parametrize(("make", "name"), COMPILED.values(), ids=COMPILED)
def test_compiled_models_are_explained_as_they_are_in_python(make: Callable[[], nn.Module], name: str) -> None:
    model = make()
    before = dict(model.named_modules())
    explanation = explain(model, torch.rand(2, 3, 8, 8))
    assert [layer.name for layer in explanation.layers] == [name]
    assert explanation.fields is not None
    assert explanation.fields.layers[-1].sees == 9
    assert explanation.equivariance
    assert dict(model.named_modules()) == before


def test_a_sparse_buffer_is_no_weight() -> None:
    model = Net(lambda m, x: (m.near @ m.linear(x[0]))[None], linear=nn.Linear(4, 3))
    model.register_buffer("near", torch.eye(5).to_sparse())
    assert not explain(model, torch.rand(1, 5, 4)).layers


def test_hooks_of_the_user_see_nothing_of_it() -> None:
    seen: list[str] = []
    model = nn.Sequential(nn.Conv1d(1, 1, 3), nn.Linear(6, 2))
    model[0].register_forward_hook(lambda *_: seen.append("after"))
    model[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    explain(model, torch.rand(2, 1, 8))
    assert not seen
    model(torch.rand(2, 1, 8))
    assert seen == ["before", "after"]


def test_hooks_that_compute_a_weight_and_guards_of_ties_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tying.tie_(model, tying.declare(model, labels={("0.weight", Groups.inputs()): [0, 0, 1]}))
    prune.l1_unstructured(model[1], "weight", 4)
    model[1].weight = model[1].weight.detach()
    before = {type(hook) for module in model.modules() for hook in module._forward_pre_hooks.values()}
    model.register_forward_hook(lambda *_: None)
    copied = run._copied(model)
    after = {type(hook) for module in copied.modules() for hook in module._forward_pre_hooks.values()}
    assert before == after
    assert len(after) == 2
    assert not copied._forward_hooks
