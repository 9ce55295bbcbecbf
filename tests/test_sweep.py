"""A step of all penalties at once against penalties applied one by one: any network, any memory, what is refused."""

from __future__ import annotations

import copy
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

from tying import GroupLasso, Groups, GrOWL, Lasso, proximal
from tying.errors import PenaltyError, PlanError
from tying.groups import Joined, Part
from tying.penalties import Constant, Oscar, Ramp

INPUTS, OUTPUTS = Groups.inputs(), Groups.outputs()
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Weights(nn.ParameterDict):
    """Parameters of all sorts, of one step each."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        shapes = {
            "linear": (30, 20),
            "wide": (3, 1100),
            "tall": (1100, 3),
            "conv": (24, 12, 3, 3),
            "depthwise": (16, 1, 3, 3),
            "one_input": (7, 1),
            "one_output": (1, 7),
            "volume": (4, 5, 2, 3, 2),
            "tokens": (500, 8),
            "empty": (0, 4),
            "hollow": (4, 0),
        }
        super().__init__({name: nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in shapes.items()})


def as_they_are(model: nn.Module) -> None:
    pass


def channels_last(model: nn.Module) -> None:
    for parameter in model.parameters():
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        if parameter.dim() in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])


def transposed(model: nn.Module) -> None:
    for parameter in model.parameters():
        order = tuple(reversed(range(parameter.dim())))
        parameter.data = parameter.data.permute(order).contiguous().permute(order)


def with_gaps(model: nn.Module) -> None:
    for parameter in model.parameters():
        wide = parameter.data.new_zeros([2 * size for size in parameter.shape])
        gaps = wide[tuple(slice(None, None, 2) for _ in parameter.shape)]
        parameter.data = gaps.copy_(parameter.data)


def with_zero_groups(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data[: parameter.shape[0] // 2] = 0


MEMORY = [as_they_are, channels_last, transposed, with_gaps, with_zero_groups]


def give_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def step(model: nn.Module, rules, lr: float = 0.1, **options) -> None:
    """One step of an optimizer that changes nothing by itself."""
    give_gradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    handle = proximal(optimizer, model, rules, **options)
    optimizer.step()
    handle.remove()


def one_by_one(model: nn.Module, rules, lr: float = 0.1) -> None:
    """In float64, through matrices, a parameter at a time."""
    parameters = dict(model.named_parameters())
    for (name, groups), penalty in rules.items():
        parameter = parameters[name].data
        matrix = penalty.prox(groups.read(parameter).double(), lr)
        parameter.copy_(groups.write(matrix, parameter.shape))


PENALTIES = [
    GroupLasso(2.0),
    GrOWL(1.0),
    GrOWL(1.0, Oscar(0.5, 0.1)),
    GrOWL(0.0),
    GrOWL(3.0, Constant(1.0)),
    Lasso(0.3),
]


def law_of_one_by_one(take, dtype: torch.dtype, change, groups: Groups) -> None:
    model, twin = Weights(dtype), Weights(dtype)
    change(model)
    change(twin)
    names = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    rules = {(name, groups): PENALTIES[turn % len(PENALTIES)] for turn, name in enumerate(names)}
    take(model, rules)
    one_by_one(twin, rules)
    for name, parameter in model.named_parameters():
        scale = float(parameter.detach().abs().max()) if parameter.numel() else 1.0
        torch.testing.assert_close(parameter, twin[name], rtol=0, atol=DTYPES[dtype] * scale, msg=name)


@pytest.mark.parametrize("groups", [INPUTS, OUTPUTS, Groups.filters(), Groups.whole(), Groups.elements()], ids=str)
@pytest.mark.parametrize("change", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_at_once_is_one_by_one(dtype, change, groups):
    law_of_one_by_one(step, dtype, change, groups)


def forgetting_the_last(model: nn.Module, rules) -> None:
    step(model, dict(list(rules.items())[:-1]))


def as_one_layer(model: nn.Module, rules) -> None:
    """Every layer's norms lowered by the same thresholds, as if each were as long as the first."""
    step(model, {key: GroupLasso(penalty.strength) for key, penalty in rules.items()})


@pytest.mark.parametrize("twin", [forgetting_the_last, as_one_layer])
def test_what_is_not_one_by_one_fails_the_law(twin):
    with pytest.raises(AssertionError):
        law_of_one_by_one(twin, torch.float64, as_they_are, INPUTS)


@pytest.mark.parametrize("groups", [INPUTS, OUTPUTS], ids=str)
@pytest.mark.parametrize("change", MEMORY)
def test_without_waiting_for_the_host_it_is_the_same(change, groups):
    law_of_one_by_one(asynchronously, torch.float64, change, groups)


def asynchronously(model: nn.Module, rules) -> None:
    step(model, rules, asynchronous=True)


def test_many_small_layers_and_few_large_ones_share_calls():
    torch.manual_seed(0)
    sizes = [(5, 9)] * 130 + [(40, 6000), (3, 2), (6000, 40)]
    model, twin = (nn.ParameterDict({f"w{i}": nn.Parameter(torch.empty(s)) for i, s in enumerate(sizes)}) for _ in "ab")
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.data.copy_(one.data.normal_())
    rules = {(name, INPUTS): GrOWL(1.0) for name in model}
    step(model, rules)
    one_by_one(twin, rules)
    for name, parameter in model.items():
        torch.testing.assert_close(parameter, twin[name], rtol=0, atol=1e-6)


# Joined groups.


def two_readers() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"left": nn.Linear(6, 4), "right": nn.Conv2d(6, 5, 3), "flat": nn.Linear(12, 3)})


LABELS = (3, 0, 1, -1, 2, 0)
JOINED = Joined(
    (
        Part("left.weight", 1, LABELS),
        Part("right.weight", 1, (0, 1, 2, 3, -1, -1)),
        Part("flat.weight", 1, tuple(label for label in (2, 1, 0, 3, 3, -1) for _ in range(2))),
    ),
    4,
)


def matrix_of(model: nn.Module, joined: Joined) -> list[torch.Tensor]:
    """Return the numbers of every group, side by side."""
    parameters = dict(model.named_parameters())
    groups: list[list[torch.Tensor]] = [[] for _ in range(joined.count)]
    for part in joined.parts:
        for position, label in enumerate(part.labels):
            if label >= 0:
                groups[label].append(parameters[part.parameter].detach().select(part.axis, position).flatten())
    return [torch.cat(group).double() for group in groups]


def law_of_joined_groups(take) -> None:
    """The norm of every joined group is what the penalty makes of the norms; directions and all else stay."""
    model = two_readers()
    before = matrix_of(model, JOINED)
    untouched = model["left"].weight[:, 3].clone(), model["right"].weight[:, 4:].clone()
    take(model, {JOINED: GrOWL(3.0, Ramp(2.0))})
    after = matrix_of(model, JOINED)
    norms = torch.stack([group.norm() for group in before])
    wanted = GrOWL(3.0, Ramp(2.0)).prox(norms[:, None], 0.1)[:, 0]
    for group, old, norm, want in zip(after, before, norms, wanted, strict=True):
        torch.testing.assert_close(group, old * (want / norm), rtol=0, atol=1e-6)
    assert torch.equal(model["left"].weight[:, 3], untouched[0])
    assert torch.equal(model["right"].weight[:, 4:], untouched[1])


@pytest.mark.parametrize("take", [step, asynchronously])
def test_joined_groups_are_one(take):
    law_of_joined_groups(take)


def apart(model: nn.Module, rules) -> None:
    """Every part by itself."""
    for penalty in rules.values():
        for part in JOINED.parts:
            present = sorted(set(part.labels) - {-1})
            labels = tuple(present.index(label) if label >= 0 else -1 for label in part.labels)
            step(model, {Joined((Part(part.parameter, 1, labels),), len(present)): penalty})


def test_groups_that_are_not_joined_fail_the_law():
    with pytest.raises(AssertionError):
        law_of_joined_groups(apart)


def test_a_joined_channel_vanishes_as_one():
    model = two_readers()
    with torch.no_grad():
        model["left"].weight[:, 1] *= 0.01  # by itself, this layer would give the channel up
    step(model, {JOINED: GroupLasso(1.0)})
    assert model["left"].weight[:, 1].any()
    step(model, {JOINED: GroupLasso(100.0)})
    assert not any(group.any() for group in matrix_of(model, JOINED))


BAD_GROUPS = {
    "a label too large": (lambda: Joined((Part("w", 1, LABELS),), 3), r"^w\[axis 1\]: expected labels from −1 to 2"),
    "a label too small": (lambda: Joined((Part("w", 1, (0, -2)),), 1), r"expected labels from −1 to 0"),
    "a group nowhere": (lambda: Joined((Part("w", 1, LABELS),), 5), r"each group in some part"),
    "no parts": (lambda: Joined((), 1), r"^Joined.parts: expected at least one Part, got \(\)"),
    "not parts": (lambda: Joined((("w", 1, (0,)),), 1), r"^Joined.parts: expected at least one Part"),
    "an axis by name": (lambda: Part("w", "1", (0,)), r"^Part: expected a parameter's name, an axis and whole numbers"),
    "labels that are true": (lambda: Part("w", 1, (True, False)), r"^Part: expected .* as labels"),
    "one label": (lambda: Part("w", 1, 3), r"^Part: expected .* as labels"),
    "a module": (lambda: Part(nn.Linear(1, 1), 1, (0,)), r"^Part: expected a parameter's name"),
}


@pytest.mark.parametrize("name", BAD_GROUPS)
def test_groups_that_make_no_sense_are_refused(name):
    make, says = BAD_GROUPS[name]
    with pytest.raises(PlanError, match=says):
        make()


def test_labels_may_come_as_an_array():
    assert Part("w", 1, np.array([0, 1])) == Part("w", 1, [0, 1]) == Part("w", 1, (0, 1))
    assert hash(Joined([Part("w", 1, np.array([0, 1]))], 2)) == hash(Joined((Part("w", 1, (0, 1)),), 2))


BAD_JOINS = {
    "no such parameter": (Joined((Part("middle.weight", 1, LABELS),), 4), r"got 'middle.weight', which matches none"),
    "a pattern": (Joined((Part("*.weight", 1, LABELS),), 4), r"got '\*.weight', which matches none"),
    "too few labels": (Joined((Part("left.weight", 1, (0, 1)),), 2), r"expected an axis of left.weight, .* 2 labels"),
    "no such axis": (Joined((Part("left.weight", 2, LABELS),), 4), r"expected an axis of left.weight, .* got axis 2"),
    "twice the same": (Joined((Part("left.weight", 1, LABELS),) * 2, 4), r"expected every number in one group"),
    "across": (
        Joined((Part("left.weight", 1, LABELS), Part("left.weight", 0, (0, 1, 2, 3))), 4),
        r"expected every number in one group, got left.weight along axes 1 and 0",
    ),
    "complex": (Joined((Part("spun", 0, (0, 1)),), 2), r"^spun.axis 0.: matrix: expected real floating-point"),
    "computed": (
        Joined((Part("normed.parametrizations.weight.original1", 1, (0, 1)),), 2),
        r"^normed.parametrizations.weight.original1: expected a parameter, got one that the weight is computed from",
    ),
    "without numbers": (Joined((Part("nowhere", 0, (0, 1)),), 2), r"^nowhere: expected a parameter with numbers"),
}


@pytest.mark.parametrize("name", BAD_JOINS)
def test_a_join_that_cannot_be_followed_is_refused(name):
    joined, says = BAD_JOINS[name]
    model = two_readers()
    model["normed"] = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    model.spun = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    model.nowhere = nn.Parameter(torch.ones(2, device="meta"))
    with pytest.raises(PenaltyError, match=says):
        proximal(torch.optim.SGD(model.parameters(), lr=0.1), model, {joined: GrOWL(1.0)})


def test_joined_groups_take_penalties_on_norms_only():
    model = two_readers()
    with pytest.raises(PenaltyError, match=r"expected a penalty on the norms of groups, got Lasso"):
        proximal(torch.optim.SGD(model.parameters(), lr=0.1), model, {JOINED: Lasso(1.0)})


@pytest.mark.parametrize("first", [JOINED, ("left.weight", INPUTS)], ids=["joined", "plain"])
def test_a_number_is_in_one_rule_for_each_axis(first):
    model = two_readers()
    second = ("left.weight", INPUTS) if first is JOINED else JOINED
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PenaltyError, match=r"^left.weight: expected one penalty on its"):
        proximal(optimizer, model, {first: GrOWL(1.0), second: GrOWL(1.0)})
    proximal(optimizer, model, {first: GrOWL(1.0), ("left.weight", OUTPUTS): GrOWL(1.0)})
    with pytest.raises(PenaltyError, match=r"that an earlier proximal\(\) penalises"):
        proximal(optimizer, model, {second: GrOWL(1.0)})


def test_joined_parameters_need_one_learning_rate():
    model = two_readers()
    others = [*model["right"].parameters(), *model["flat"].parameters()]
    optimizer = torch.optim.SGD([{"params": model["left"].parameters(), "lr": 0.1}, {"params": others}], lr=0.2)
    with pytest.raises(PenaltyError, match=r"expected one learning rate .* whose groups are joined, got 0.1, 0.2"):
        proximal(optimizer, model, {JOINED: GrOWL(1.0)})
    optimizer.param_groups[1]["lr"] = 0.1
    handle = proximal(optimizer, model, {("flat.weight", OUTPUTS): GrOWL(1.0), JOINED: GrOWL(1.0)}, every=100)
    optimizer.param_groups[1]["lr"] = 0.3
    give_gradients(model)
    before = handle.state_dict()
    with pytest.raises(PenaltyError, match=r"got 0.1, 0.3"):
        optimizer.step()
    assert handle.state_dict()["pending"] == before["pending"]


def test_what_is_frozen_counts_in_the_norm_and_stays():
    model = two_readers()
    before = matrix_of(model, JOINED)
    frozen = model["right"].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    proximal(optimizer, model, {JOINED: GroupLasso(1.0)}, freeze_zeros=True)
    give_gradients(model)
    model["right"].weight.requires_grad_(False)
    left = model["left"].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model["right"].weight, frozen)
    factor = 1 - 0.1 / before[2].norm()
    torch.testing.assert_close(model["left"].weight[:, 4].double(), left[:, 4].double() * factor)
    model["right"].weight.requires_grad_(True)
    optimizer.step()
    assert not torch.equal(model["right"].weight, frozen)


# Memory that moves, and memory that is not there.


@pytest.mark.parametrize("change", [channels_last, transposed, with_gaps, nn.Module.double, nn.Module.bfloat16])
def test_parameters_may_get_other_memory(change):
    model, twin = Weights(torch.float32), Weights(torch.float32)
    rules = {(name, INPUTS): GrOWL(1.0) for name, p in model.named_parameters() if p.dim() > 1}
    give_gradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    proximal(optimizer, model, rules)
    optimizer.step()
    step(twin, rules)
    for each in (model, twin):
        change(each)
    give_gradients(model)
    optimizer.step()
    step(twin, rules)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, twin[name]), name


def test_a_prox_in_inference_mode_is_as_good_as_another():
    model, twin = two_readers(), two_readers()
    for each, inference in ((model, True), (twin, False)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        handle = proximal(optimizer, each, {JOINED: GrOWL(1.0), ("flat.weight", OUTPUTS): GrOWL(1.0)}, every="epoch")
        for _ in range(2):
            give_gradients(each)
            optimizer.step()
            with torch.inference_mode(inference):
                handle.epoch_end()
        optimizer.step()
        handle.epoch_end()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.int32)


@pytest.mark.parametrize("groups", [INPUTS, OUTPUTS, JOINED], ids=["inputs", "outputs", "joined"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_zeros_are_the_same_zero_bit_for_bit(groups, asynchronous):
    model = two_readers()
    step(model, {groups if groups is JOINED else ("left.weight", groups): GroupLasso(100.0)}, asynchronous=asynchronous)
    left = model["left"].weight if groups is not JOINED else model["left"].weight[:, :3]
    assert not bits(left).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_dead_group_is_zero_whatever_its_gradient(bad):
    model = two_readers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model["left"].weight.data[:, 2] = 0
    proximal(optimizer, model, {"left.weight": GroupLasso(1e-3)}, freeze_zeros=True)
    give_gradients(model)
    optimizer.step()
    model["left"].weight.grad[:, 2] = bad
    optimizer.step()
    assert not model["left"].weight[:, 2].any()
    assert model["left"].weight.isfinite().all()


class Halved(GroupLasso):
    """A penalty with a prox of its own."""

    def prox(self, matrix, step):
        return matrix * 0.5


def test_a_penalty_with_a_prox_of_its_own_is_asked_for_it():
    model = two_readers()
    before = model["left"].weight.detach().clone()
    step(model, {"left.weight": Halved(1.0)})
    assert torch.equal(model["left"].weight, before * 0.5)


def test_a_state_with_masks_of_another_shape_is_refused():
    model = two_readers()
    handle = proximal(
        torch.optim.SGD(model.parameters(), lr=0.1), model, {"left.weight": GrOWL(1.0)}, freeze_zeros=True
    )
    state = handle.state_dict()
    state["dead"] = {key: mask[:, None].expand(-1, 2) for key, mask in state["dead"].items()}
    with pytest.raises(PenaltyError, match=r"^state: expected that of a handle on"):
        handle.load_state_dict(state)


def test_an_expanded_parameter_is_refused():
    model = nn.ParameterDict({"w": nn.Parameter(torch.ones(1, 3).expand(4, 3))})
    with pytest.raises(PenaltyError, match=r"^w: expected a parameter whose numbers lie apart in memory"):
        proximal(torch.optim.SGD(model.parameters(), lr=0.1), model, {"w": GrOWL(1.0)})


def test_a_million_groups():
    torch.manual_seed(0)
    model = nn.ParameterDict({"w": nn.Parameter(torch.randn(1 << 20, 1))})
    before = model["w"].detach().clone()
    step(model, {("w", OUTPUTS): GrOWL(1.0)})
    assert GrOWL(1.0).certify(before, model["w"].detach(), 0.1).holds(1e-6)


def law_of_memory(groups: Groups, beside=lambda weight: None) -> None:
    """A step allocates at most 1 % of the weights, NumPy's and PyTorch's arrays together."""
    model = nn.ParameterDict({f"w{i}": nn.Parameter(torch.randn(1000, 1000)) for i in range(8)})
    give_gradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = proximal(optimizer, model, {("*", groups): GrOWL(0.01)}, every=100)
    tracemalloc.start()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        beside(model["w0"])
        handle.prox_()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    allocated = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert most + sum(size for size in allocated if size > 0) < 0.015 * weights


@pytest.mark.parametrize("groups", [INPUTS, OUTPUTS], ids=str)
def test_a_step_needs_hardly_any_memory(groups):
    law_of_memory(groups)


def test_a_copy_of_a_weight_fails_the_law():
    with pytest.raises(AssertionError):
        law_of_memory(INPUTS, lambda weight: weight.detach().clone())


# Weights that diverged.


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", range(3))
def test_nothing_changes_if_one_weight_is_bad(where, bad):
    torch.manual_seed(0)
    model = nn.ParameterDict({f"w{i}": nn.Parameter(torch.randn(1000, 1000)) for i in range(3)})
    give_gradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = proximal(optimizer, model, {"*": GrOWL(1.0)}, every=100)
    optimizer.step()
    good = float(model[f"w{where}"].detach()[5, 7])
    model[f"w{where}"].data[5, 7] = bad
    before = [parameter.detach().clone() for parameter in model.values()]
    with pytest.raises(PenaltyError, match=rf"^w{where}: matrix: expected finite weights, got NaN or infinity in 1 "):
        handle.prox_()
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, model.values(), strict=True))
    model[f"w{where}"].data[5, 7] = good
    twin = copy.deepcopy(model)
    handle.prox_()
    step(twin, {"*": GrOWL(1.0)})
    assert all(torch.equal(a, b) for a, b in zip(twin.values(), model.values(), strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_nobody_waits_for_is_told_one_step_later_and_made_up_for(bad):
    torch.manual_seed(0)
    model = nn.ParameterDict({f"w{i}": nn.Parameter(torch.randn(10, 10)) for i in range(3)})
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = proximal(optimizer, model, {"*": GrOWL(1.0)}, asynchronous=True)
    give_gradients(model)
    before = [parameter.detach().clone() for parameter in model.values()]
    good = float(model["w1"].detach()[5, 7])
    model["w1"].data[5, 7] = bad
    optimizer.step()
    with pytest.raises(PenaltyError, match=r"^w1\[inputs\]: expected finite weights at the last prox, got NaN"):
        optimizer.step()
    model["w1"].data[5, 7] = good
    assert all(torch.equal(a, b) for a, b in zip(before, model.values(), strict=True))
    handle.prox_()  # both steps
    handle.remove()
    step(twin, {"*": GrOWL(1.0)}, lr=0.2, asynchronous=True)
    assert all(torch.equal(a, b) for a, b in zip(twin.values(), model.values(), strict=True))


def test_what_nobody_waited_for_is_told_when_the_handle_is_removed():
    model = nn.ParameterDict({"w": nn.Parameter(torch.full((2, 2), torch.nan))})
    model["w"].data.fill_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = proximal(optimizer, model, {"w": GrOWL(1.0)}, asynchronous=True)
    give_gradients(model)
    model["w"].data[0, 0] = torch.nan
    optimizer.step()
    with pytest.raises(PenaltyError, match=r"^w\[inputs\]: expected finite weights"):
        handle.remove()
    handle.remove()


def test_who_does_not_wait_can_not_freeze_zeros():
    model = two_readers()
    with pytest.raises(PenaltyError, match=r"^asynchronous: expected it without freeze_zeros, got both"):
        step(model, {"left.weight": GrOWL(1.0)}, asynchronous=True, freeze_zeros=True)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e25, 1e38])
def test_tiny_and_huge_weights_are_shrunk_as_others(scale):
    torch.manual_seed(0)
    weight = torch.rand(20, 10) + 0.5
    model = nn.ParameterDict({"w": nn.Parameter(weight * scale)})
    step(model, {"w": GrOWL(scale)})
    expected = GrOWL(1.0).prox(weight.t().double(), 0.1).t()
    torch.testing.assert_close(model["w"].double() / scale, expected, rtol=1e-5, atol=1e-6)


def test_the_users_model_may_be_compiled():
    compilations: list[torch.fx.GraphModule] = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    twin, x = copy.deepcopy(model), torch.randn(5, 6)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for each, forward in ((model, compiled), (twin, twin)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        proximal(optimizer, each, {"*.weight": GroupLasso(1.0)})
        for _ in range(4):
            optimizer.zero_grad()
            forward(x).sum().backward()
            optimizer.step()
    assert torch.equal(compiled(x), twin(x))
    assert not model[2].weight.all()
    assert len(compilations) == 1
