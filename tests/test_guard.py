"""Ties in daily use: kept, repaired or a clear error, never broken in silence; sharing by hand is the broken twin."""

from __future__ import annotations

import copy

import pytest
import torch
from benchmarks.ties.cases import KINDS, Column, Kind, Reference, apart, data, off, plan_of, tied, untied
from benchmarks.ties.gradients import CASES, compile_by, difference, eager
from benchmarks.ties.libraries import LIBRARIES
from benchmarks.ties.operations import OPERATIONS
from benchmarks.ties.verdict import Operation, judge
from torch import nn

from tying.enforce.ties.tie import tie_, untie_
from tying.errors import TieError

BY_NAME = {operation.name: operation for operation in (*OPERATIONS, *LIBRARIES)}
TRIED = [
    (operation, kind)
    for operation in BY_NAME.values()
    for kind in operation.kinds
    if not operation.slow and not operation.name.startswith("PEFT")  # seconds to import
]

CLEAR = (
    "Serialization of parametrized modules is only supported through state_dict()",
    "you can only change requires_grad flags of leaf variables",
    "cannot assign 'torch.DoubleTensor' object to parameter 'weight_orig'",
    "attribute 'weight' already exists",
    "KeyError: 'weight'",  # not clear, but before anything is changed: the old weight_norm looks for a parameter
    "Error(s) in loading state_dict",
    "Some tensors share memory",
    "Inplace update to inference tensor outside InferenceMode is not allowed",
    "nn.quantized.dynamic.Linear.from_float only works for",
)
"""What PyTorch itself refuses to do with a weight that is shared or computed, in words that say so."""


def law_never_silent(operation: Operation, kind: Kind, column: Column = "ours") -> None:
    """The ends are equal and trained as the reference, or an error came before any wrong step and says where."""
    cell = judge(operation, kind, column)
    if cell.verdict == "not applicable":
        pytest.skip(cell.said)
    assert cell.verdict != "silent", cell
    if cell.verdict == "error":
        assert cell.named if cell.by == "tying" else any(words in cell.said for words in CLEAR), cell


NOT_SEEN = {
    ("weight.data = … at one name", "inside"),
    ("weight.data = … at one name", "transposed"),
    ("weight.data.copy_(…) at one name", "inside"),
}
"""A computed weight is new at every read, and PyTorch tells nobody what is done to its `data`."""


def _case(operation: Operation, kind: Kind):
    marks = [pytest.mark.xfail(strict=True)] if (operation.name, kind) in NOT_SEEN else []
    return pytest.param(operation, kind, marks=marks, id=f"{operation.name}: {kind}")


@pytest.mark.parametrize(("operation", "kind"), [_case(*tried) for tried in TRIED])
def test_a_tie_never_breaks_in_silence(operation: Operation, kind: Kind) -> None:
    law_never_silent(operation, kind)


ALL: tuple[Kind, ...] = ("layers", "transposed", "models")
BROKEN: dict[str, tuple[Kind, ...]] = {
    "training with Adam": ("transposed",),
    ".to(dtype)": ("transposed",),
    ".half()": ("transposed",),
    ".to(meta), to_empty, load_state_dict": ALL,
    "deepcopy of the root": ("transposed",),
    "deepcopy of each model apart": ("models",),
    "pickle": ("transposed",),
    "pickle of each model apart": ("models",),
    "load_state_dict(assign=True)": ALL,
    "load_state_dict, the two names differ": ALL,
    "load_state_dict(strict=False, assign=True), second name missing": ALL,
    "torch.compile, then assign=True": ALL,
    "functional_call, trained": ("transposed", "models"),
    "functional_call, one name given": ("transposed", "models"),
    "clip_grad_norm_": ("transposed",),
    "weight decay": ("transposed",),
    "layer.requires_grad_(False) at one end": ("transposed",),
    "prune.l1_unstructured at one end": ("layers", "models"),
    "parametrize at one end": ALL,
    "weight_norm at one end": ALL,
    "a module replaced": ALL,
    "a module replaced by its deepcopy": ALL,
    "two optimizers": ("layers", "models"),
    "an optimizer made before the tie": ("transposed",),
    "one optimizer over list(a.parameters()) + list(b.parameters())": ("models",),
}
"""What breaks a tie that was made by hand, each parameter in the optimizer once."""
TWINS = [(BY_NAME[name], kind) for name, kinds in BROKEN.items() for kind in kinds]


@pytest.mark.parametrize(("operation", "kind"), TWINS, ids=[f"{o.name}: {kind}" for o, kind in TWINS])
def test_a_tie_made_by_hand_fails_the_law(operation: Operation, kind: Kind) -> None:
    with pytest.raises(AssertionError, match="silent"):
        law_never_silent(operation, kind, "plain, each once")


@pytest.mark.parametrize("operation", [BY_NAME[n] for n in ("training", ".half()", "deepcopy of the root")])
def test_values_made_equal_once_fail_the_law(operation: Operation) -> None:
    with pytest.raises(AssertionError, match="silent"):
        law_never_silent(operation, "inside", "plain")


@pytest.mark.parametrize("name", ["training", "clip_grad_norm_", "weight decay"])
def test_two_lists_of_parameters_in_a_row_fail_the_law(name: str) -> None:
    with pytest.raises(AssertionError, match="silent"):
        law_never_silent(BY_NAME[name], "models", "plain")


WAYS = {"eager": eager, "compiled": compile_by("eager")}


def law_gradient(case: str, gradient: str = "sum", way: str = "eager", verb=tie_) -> None:
    """The gradient of a hard tie is the sum, or the mean, of the untied ones."""
    assert difference(case, gradient, WAYS[way], verb=verb) < 1e-12


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gradient", ["sum", "mean"])
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_a_hard_tie_is_that_of_the_untied_ones(case: str, gradient: str, way: str) -> None:
    law_gradient(case, gradient, way)


@pytest.mark.parametrize("case", CASES)
def test_the_other_gradient_fails_the_law(case: str) -> None:
    def other(models, plan, *, gradient):
        tie_(models, plan, gradient={"sum": "mean", "mean": "sum"}[gradient])

    for gradient in ("sum", "mean"):
        with pytest.raises(AssertionError):
            law_gradient(case, gradient, verb=other)


def test_only_one_ends_gradient_fails_the_law():
    def by_storage(models, plan, *, gradient):
        models.decoder.weight = nn.Parameter(models.encoder.weight.t())
        models.decoder.weight.requires_grad_(False)

    with pytest.raises(AssertionError):
        law_gradient("transposed", verb=by_storage)


def test_a_copy_of_one_model_alone_computes_and_is_not_trained():
    subject = tied("models", "ours")
    alone, x = copy.deepcopy(subject.models["a"]), data("a")[0]
    with torch.no_grad():
        assert torch.equal(alone(x), subject.models["a"](x))
    with pytest.raises(TieError, match=r"a\.encoder\.weight: .* b\.encoder\.weight"):
        alone(x)
    untie_(alone)
    alone(x).sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_untied_models_train_as_if_they_had_never_been_tied(kind: Kind):
    subject = tied(kind, "ours")
    untie_(subject.handed)
    start = {name: value.clone() for name, value in subject.weights().items()}
    reference = Reference(kind, start)
    reference.plan = type(reference.plan)()
    for _ in range(3):
        subject.step()
        reference.step()
    assert off(start, subject.weights(), reference.values) < 1e-12
    assert apart(plan_of(kind), subject.weights()) > 0


class Whole(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x)


@pytest.mark.parametrize("kind", ["inside", "layers", "transposed"])
def test_a_tie_of_a_part_is_guarded_within_the_whole(kind: Kind):
    part = untied(kind)[""]
    whole = Whole(part)
    tie_(part, plan_of(kind))
    whole = copy.deepcopy(whole)
    whole.load_state_dict(whole.state_dict(), assign=True)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    whole(data("")[0]).square().sum().backward()
    optimizer.step()
    subject = tied(kind, "plain")
    subject.models = {"": whole.part}
    assert apart(plan_of(kind), subject.weights()) == 0


@pytest.mark.parametrize("kind", ["layers", "transposed", "models"])
def test_after_an_error_the_values_are_as_they_were_and_the_tie_can_be_mended(kind: Kind):
    subject = tied(kind, "ours")
    before = {name: value.clone() for name, value in subject.weights().items()}
    model, leaf = subject.holder(1)
    module = getattr(model, leaf)
    setattr(model, leaf, nn.Linear(module.in_features, module.out_features, bias=False).double())
    for _ in range(2):
        with pytest.raises(TieError, match=r"encoder\.weight"):
            subject.step()
        subject.optimizers = []
    setattr(model, leaf, module)
    assert all(torch.equal(before[name], value) for name, value in subject.weights().items())
    reference = Reference(kind, before)
    subject.step()
    reference.step()
    assert off(before, subject.weights(), reference.values) < 1e-12
