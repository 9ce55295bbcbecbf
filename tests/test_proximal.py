"""Training with `proximal` against the same training with the proxes written out by hand, on real optimizers."""

from __future__ import annotations

import copy
import gc
import io
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR

from tying.errors import PenaltyError, TyingWarning
from tying.groups import Groups
from tying.penalties import OWL, GroupLasso, GrOWL, Lasso, Ridge
from tying.train.proximal import proximal

INPUTS, OUTPUTS = Groups.inputs(), Groups.outputs()
X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
Y = X[:, :2].sum(dim=1, keepdim=True) + X[:, 2:3]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1))


def sgd(model: nn.Module, lr: float = 0.05, **options) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, **options)


def two_groups(model: nn.Module) -> torch.optim.SGD:
    parts = [{"params": model[0].parameters(), "lr": 0.02}, {"params": model[2].parameters(), "lr": 0.1}]
    return torch.optim.SGD(parts, momentum=0.9)


def backward(model: nn.Module, index: int) -> torch.Tensor:
    batch = slice(8 * (index % 8), 8 * (index % 8) + 8)
    loss = (model(X[batch]) - Y[batch]).square().mean()
    loss.backward()
    return loss


def train(model, optimizer, steps, *, scheduler=None, after_step=lambda index: None, start=0) -> None:
    for index in range(start, start + steps):
        optimizer.zero_grad()
        backward(model, index)
        optimizer.step()
        after_step(index)
        if scheduler is not None:
            scheduler.step()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(model), weights(other), strict=True))


def by_hand(model, rules, *, every: int, rate):
    """Return an `after_step` that applies the proxes, written out; `rate(index, name)` is the learning rate used."""
    since: list[int] = []

    def after_step(index: int) -> None:
        since.append(index)
        if len(since) < every:
            return
        with torch.no_grad():
            for (name, groups), penalty in rules.items():
                p = dict(model.named_parameters())[name]
                step = sum(rate(i, name) for i in since)
                p.copy_(groups.write(penalty.prox(groups.read(p), step), p.shape))
        since.clear()

    return after_step


SCHEDULES = {
    "constant": lambda optimizer: None,
    "warm-up": lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, step / 10)),  # the first rate is 0
    "decay": lambda optimizer: StepLR(optimizer, 5, gamma=0.3),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=41),
}
RULES = {("0.weight", INPUTS): GrOWL(0.3), ("2.weight", INPUTS): Lasso(0.1), ("0.weight", OUTPUTS): GroupLasso(0.02)}


def law_of_the_hand_written_loop(put, *, every: int, schedule, optimizer=sgd) -> None:
    """`put(optimizer, model, rules, every)` must do what `by_hand` does, bit for bit."""
    model, twin = network(), network()
    mine, theirs = optimizer(model), optimizer(twin)
    put(mine, model, RULES, every)
    rates: list[list[float]] = []

    def rate(index: int, name: str) -> float:
        return rates[index][0 if name.startswith("0") else -1]

    apply = by_hand(twin, RULES, every=every, rate=rate)

    def after_step(index: int) -> None:
        rates.append([group["lr"] for group in theirs.param_groups])
        apply(index)

    train(model, mine, 40, scheduler=schedule(mine))
    train(twin, theirs, 40, scheduler=schedule(theirs), after_step=after_step)
    assert same(model, twin), "not what the hand-written loop gives"
    plain = network()
    unpenalised = optimizer(plain)
    train(plain, unpenalised, 40, scheduler=schedule(unpenalised))
    assert not same(model, plain)


def put(optimizer, model, rules, every):
    proximal(optimizer, model, rules, every=every)


@pytest.mark.parametrize("optimizer", [sgd, two_groups])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("every", [1, 4])
def test_it_is_the_hand_written_loop(every, schedule, optimizer):
    law_of_the_hand_written_loop(put, every=every, schedule=SCHEDULES[schedule], optimizer=optimizer)


def put_last_rate_only(optimizer, model, rules, every):
    """Step size = the current learning rate × the number of steps: wrong when the rate changes in between."""
    steps = []

    def hook(optimizer, args, kwargs):
        steps.append(1)
        if len(steps) % every == 0:
            with torch.no_grad():
                for (name, groups), penalty in rules.items():
                    p = dict(model.named_parameters())[name]
                    p.copy_(
                        groups.write(penalty.prox(groups.read(p), optimizer.param_groups[0]["lr"] * every), p.shape)
                    )

    optimizer.register_step_post_hook(hook)


def put_each_step(optimizer, model, rules, every):
    proximal(optimizer, model, rules, every=1)


def put_in_other_order(optimizer, model, rules, every):
    proximal(optimizer, model, dict(reversed(rules.items())), every=every)


@pytest.mark.parametrize("twin", [put_last_rate_only, put_each_step, put_in_other_order])
def test_law_refuses_a_broken_twin(twin):
    with pytest.raises(AssertionError, match="not what the hand-written loop gives"):
        law_of_the_hand_written_loop(twin, every=4, schedule=SCHEDULES["warm-up"])


def test_every_step_and_the_default_are_the_same():
    law_of_the_hand_written_loop(lambda o, m, r, every: proximal(o, m, r), every=1, schedule=SCHEDULES["decay"])
    law_of_the_hand_written_loop(
        lambda o, m, r, every: proximal(o, m, r, every="step"), every=1, schedule=SCHEDULES["decay"]
    )


def test_epochs_are_counted_or_told():
    law_of_the_hand_written_loop(
        lambda o, m, r, every: proximal(o, m, r, every="epoch", steps_per_epoch=every),
        every=8,
        schedule=SCHEDULES["one cycle"],
    )
    told, counted = network(), network()
    optimizer = sgd(told)
    handle = proximal(optimizer, told, RULES, every="epoch")
    train(told, optimizer, 24, after_step=lambda index: handle.epoch_end() if index % 8 == 7 else None)
    other = sgd(counted)
    proximal(other, counted, RULES, every=8)
    train(counted, other, 24)
    assert same(told, counted)
    handle.remove()


def test_epoch_end_is_harmless_where_epochs_do_not_matter():
    model = network()
    optimizer = sgd(model)
    handle = proximal(optimizer, model, RULES, every=5)
    train(model, optimizer, 4)
    before = weights(model)
    handle.epoch_end()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_a_hand_written_loop_says_when():
    model, twin = network(), network()
    optimizer, other = sgd(model), sgd(twin)
    handle = proximal(optimizer, model, RULES, every="epoch")
    for start, steps in ((0, 3), (3, 1), (4, 7)):
        train(model, optimizer, steps, start=start)
        handle.prox_()
        handle.prox_()  # nothing is pending any more
        train(twin, other, steps, start=start)
        by_hand(twin, RULES, every=1, rate=lambda index, name, steps=steps: sum([0.05] * steps))(0)
    assert same(model, twin)


# What an optimizer's step may be.


def test_gradient_accumulation_counts_steps_not_batches():
    model, twin = network(), network()
    optimizer, other = sgd(model), sgd(twin)
    proximal(optimizer, model, RULES)
    apply = by_hand(twin, RULES, every=1, rate=lambda index, name: 0.05)
    for m, o, then in ((model, optimizer, lambda: None), (twin, other, lambda: apply(0))):
        for index in range(24):
            backward(m, index)
            if index % 4 == 3:
                o.step()
                o.zero_grad()
                then()
    assert same(model, twin)


def test_closures_are_one_step_however_often_they_run():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    with pytest.warns(TyingWarning, match="got LBFGS"):
        handle = proximal(optimizer, model, {"0.weight": GroupLasso(0.5)}, every=3)
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        return backward(model, 0)

    optimizer.step(closure)
    optimizer.step(closure)
    assert len(calls) > 2
    assert handle.state_dict()["steps"] == 2
    assert handle.state_dict()["pending"] == {"0.weight[inputs]": pytest.approx(0.2)}
    optimizer.step(closure)
    assert handle.state_dict()["steps"] == 0

    model, twin = network(), network()
    optimizer, other = sgd(model), sgd(twin)
    proximal(optimizer, model, RULES)
    proximal(other, twin, RULES)
    for index in range(6):

        def closure(index=index):
            optimizer.zero_grad()
            return backward(model, index)

        optimizer.step(closure)
    train(twin, other, 6)
    assert same(model, twin)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skipped_is_no_step(fused):
    """A fused optimizer is called all the same, and skips by itself."""
    model = network()
    optimizer = sgd(model, fused=fused)
    handle = proximal(optimizer, model, RULES, every=100)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for index in range(6):
        optimizer.zero_grad()
        before = weights(model)
        loss = (model(X) - Y).square().mean() * (torch.inf if index in (2, 3) else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = not all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
        assert moved == (index not in (2, 3))
    assert handle.state_dict()["steps"] == 4
    assert handle.state_dict()["pending"]["2.weight[inputs]"] == pytest.approx(4 * 0.05)


def test_a_learning_rate_may_be_a_tensor():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.25))
    handle = proximal(optimizer, model, RULES, every=100)
    train(model, optimizer, 2)
    assert handle.state_dict()["pending"]["0.weight[inputs]"] == 0.5


def test_what_is_frozen_or_without_gradient_is_left_alone():
    model = network()
    optimizer = sgd(model)
    handle = proximal(optimizer, model, RULES)
    model[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone()
    train(model, optimizer, 3)
    assert torch.equal(model[0].weight, before)
    model[0].weight.requires_grad_(True)
    train(model, optimizer, 3)
    assert not torch.equal(model[0].weight, before)

    unused = nn.ModuleDict({"used": nn.Linear(6, 1), "unused": nn.Linear(6, 1)})
    optimizer = sgd(unused)
    handle = proximal(optimizer, unused, {"*.weight": Lasso(1.0)})
    before = unused["unused"].weight.detach().clone()
    train(unused["used"], optimizer, 3)
    assert torch.equal(unused["unused"].weight, before)
    with pytest.warns(TyingWarning, match=r"unused.weight\[inputs\]: expected a gradient at the optimizer's steps"):
        handle.remove()


def test_weight_decay_of_the_optimizer_stays():
    model = network()
    optimizer = sgd(model, weight_decay=0.1)
    proximal(optimizer, model, {"0.weight": Ridge(0.0)})
    twin = network()
    train(model, optimizer, 10)
    train(twin, sgd(twin, weight_decay=0.1), 10)
    assert same(model, twin)


@pytest.mark.parametrize("every", [1, 3])
def test_zeros_can_be_frozen_for_good(every):
    rules = {"0.weight": GroupLasso(0.8), ("2.weight", OUTPUTS): Lasso(0.01)}
    free, frozen = network(), network()
    zeros = {}
    for model, freeze in ((free, False), (frozen, True)):
        seen, regrown = torch.zeros(6, dtype=torch.bool), False
        optimizer = sgd(model)
        proximal(optimizer, model, rules, every=every, freeze_zeros=freeze)
        for index in range(60):
            train(model, optimizer, 1, start=index)
            zero = INPUTS.norms(model[0].weight) == 0
            regrown |= bool((seen & ~zero).any())
            if (index + 1) % every == 0:
                seen |= zero
        zeros[freeze] = regrown, int(seen.sum())
    assert zeros[True][1] > 0
    assert zeros[True][0] is False
    assert zeros[False][0] is True


# Removing, saving, resuming.


def test_remove_ends_it_and_only_it():
    model, twin = network(), network()
    optimizer, other = sgd(model), sgd(twin)
    handle = proximal(optimizer, model, RULES)
    train(model, optimizer, 5)
    handle.remove()
    handle.remove()
    train(model, optimizer, 5, start=5)
    proximal(other, twin, RULES)
    train(twin, other, 5)
    plain = sgd(twin)
    plain.load_state_dict(other.state_dict())
    train(twin, plain, 5, start=5)
    assert same(model, twin)
    proximal(optimizer, model, RULES)  # a removed handle does not stand in the way of a new one


def test_steps_that_the_penalties_miss_are_told():
    model = network()
    optimizer = sgd(model)
    handle = proximal(optimizer, model, RULES, every="epoch")
    train(model, optimizer, 3)
    with pytest.warns(
        TyingWarning, match=r"remove\(\): expected no step since the last prox, got 3; call handle.epoch_"
    ):
        handle.remove()
    before = weights(model)
    handle.prox_()
    assert not torch.equal(before[0], weights(model)[0])

    handle = proximal(optimizer, model, RULES, every="epoch")
    with pytest.warns(TyingWarning, match=r"epoch_end\(\): expected steps of the optimizer since the last epoch"):
        handle.epoch_end()


def test_penalties_that_were_never_applied_are_told_when_the_optimizer_goes():
    model = network()
    optimizer = sgd(model)
    handle = proximal(optimizer, model, RULES, every="epoch")
    train(model, optimizer, 120)
    holder = [optimizer]
    del optimizer
    with pytest.warns(TyingWarning, match=r"120 steps without; with every=\"epoch\" call handle.epoch_end\(\)"):
        holder.clear()
    with pytest.warns(TyingWarning, match="expected no step"):
        handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = network()
        optimizer = sgd(model)
        proximal(optimizer, model, RULES, every=50)
        train(model, optimizer, 120)
        del optimizer
        gc.collect()


def run(model, optimizer, scheduler, handle, start, steps):
    train(model, optimizer, steps, scheduler=scheduler, start=start)


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("stop", [1, 7, 16, 23])
def test_a_resumed_run_is_the_uninterrupted_one(stop, freeze):
    def build():
        model = network()
        optimizer = two_groups(model)
        scheduler = OneCycleLR(optimizer, max_lr=[0.05, 0.1], total_steps=41)
        return [model, optimizer, scheduler, proximal(optimizer, model, RULES, every=8, freeze_zeros=freeze)]

    whole = build()
    run(*whole, 0, 40)
    first = build()
    run(*first, 0, stop)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    second = build()
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    run(*second, stop, 40 - stop)
    assert same(second[0], whole[0])

    without = build()
    file.seek(0)
    for part, state in zip(without[:3], torch.load(file, weights_only=True)[:3], strict=True):
        part.load_state_dict(state)
    run(*without, stop, 40 - stop)
    if stop % 8:
        assert not same(without[0], whole[0])  # the handle's own state matters


def test_a_state_of_other_rules_is_refused_and_changes_nothing():
    model = network()
    optimizer = sgd(model)
    handle = proximal(optimizer, model, RULES, every=100)
    train(model, optimizer, 3)
    before = handle.state_dict()
    other = proximal(sgd(model), model, {"0.weight": Lasso(1.0)}, every=100)
    wrong = [other.state_dict(), {}, {**before, "steps": "many"}, {**before, "steps": -1}, {**before, "pending": 3}]
    pending = before["pending"]
    wrong += [{**before, "pending": {**pending, "0.weight[inputs]": wait}} for wait in (-1.0, math.nan, math.inf)]
    wrong += [
        {**before, "dead": {"0.weight[inputs]": torch.zeros(2, dtype=torch.bool)}},
        {**before, "dead": {"x": [True]}},
    ]
    for state in wrong:
        with pytest.raises(PenaltyError, match=r"^state: expected"):
            handle.load_state_dict(state)
        assert handle.state_dict() == before


def same_state(one, other) -> bool:
    dead, others = one["dead"], other["dead"]
    return dead.keys() == others.keys() and (
        {**one, "dead": [mask.tolist() for mask in dead.values()]}
        == {**other, "dead": [mask.tolist() for mask in others.values()]}
    )


def test_the_saved_state_is_a_snapshot():
    model = network()
    optimizer = sgd(model)
    handle = proximal(optimizer, model, RULES, every=100, freeze_zeros=True)
    train(model, optimizer, 2)
    state = copy.deepcopy(handle.state_dict())
    kept = handle.state_dict()
    train(model, optimizer, 2)
    handle.prox_()
    assert same_state(kept, state)
    assert not same_state(kept, handle.state_dict())


# What is refused, and that nothing has changed then.


class Odd(nn.Module):
    """Every kind of layer that a rule may name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.again = nn.Linear(4, 3)
        self.again.weight = self.linear.weight
        self.conv = nn.Conv2d(4, 6, 3)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 3)
        self.tokens = nn.Embedding(10, 4)
        self.bag = nn.EmbeddingBag(10, 4)
        self.two = nn.Bilinear(4, 5, 3)
        self.normed = parametrizations.weight_norm(nn.Linear(4, 3))
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Linear(4, 3).requires_grad_(False)
        self.frozen_inside = nn.Linear(4, 3).requires_grad_(False)
        self.counts = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
        self.broken = nn.Parameter(torch.full((2, 2), torch.nan))


def odd() -> tuple[Odd, torch.optim.SGD]:
    model = Odd()
    return model, torch.optim.SGD([p for n, p in model.named_parameters() if not n.startswith("frozen.")], lr=0.1)


REFUSED = [
    ({}, r"rules: expected at least one"),
    ([("linear.weight", Lasso(1))], r"rules: expected at least one"),
    ({"linear.wieght": Lasso(1)}, r"got 'linear.wieght', which matches none; similar names are: linear.weight"),
    ({"zz": Lasso(1)}, r"got 'zz', which matches none; the model has: counts, broken, linear.weight"),
    ({"head*": Lasso(1)}, r"got 'head\*', which matches none"),
    ({"linear.weight": 0.1}, r"linear.weight: expected a penalty, got 0.1"),
    ({"linear.weight": Lasso}, r"linear.weight: expected a penalty, got <class"),
    ({3: Lasso(1)}, r"rules: expected a parameter name, \(name, Groups\) or Joined as key, got 3"),
    ({("linear.weight", "inputs"): Lasso(1)}, r"rules: expected a parameter name, \(name, Groups\)"),
    ({"linear.bias": Lasso(1)}, r"^linear.bias: Groups.inputs\(\): expected a parameter with at least 2 dimension"),
    ({"linear.weight": GrOWL(1, [1, 0])}, r"^linear.weight: sequence: expected 4 weights, one per group, got 2"),
    (
        {"linear.weight": Lasso(1), "linear.*t": Lasso(1)},
        r"^linear.weight: expected one penalty on its inputs, got sev",
    ),
    (
        {"linear.weight": Lasso(1), "again.weight": Lasso(1)},
        r"^again.weight: expected one penalty on its inputs, got several, which is the same parameter as linear.weight",
    ),
    (
        {"up.weight": Lasso(1)},
        r"^up.weight: expected a parameter with inputs as groups, got ConvTranspose2d, whose dim",
    ),
    ({("up.weight", OUTPUTS): Lasso(1)}, r"^up.weight: expected a parameter with outputs as groups, got ConvTranspose"),
    ({"grouped.weight": Lasso(1)}, r"^grouped.weight: .* got Conv2d with groups=2, whose dimension 1 is not the input"),
    ({"tokens.weight": Lasso(1)}, r"^tokens.weight: expected a parameter with inputs as groups, got Embedding, whose"),
    ({("tokens.weight", OUTPUTS): Lasso(1)}, r"^tokens.weight: expected a parameter with outputs as groups"),
    ({"bag.weight": Lasso(1)}, r"^bag.weight: .* got EmbeddingBag"),
    ({"two.weight": Lasso(1)}, r"^two.weight: .* got Bilinear, which has two inputs"),
    ({"normed.*.original1": Lasso(1)}, r"^normed.parametrizations.weight.original1: .* remove the parametrization"),
    (
        {"frozen.weight": Lasso(1)},
        r"^frozen.weight: expected a parameter that this optimizer steps, .* \(it is frozen\)",
    ),
    (
        {"frozen.*": Lasso(1)},
        r"expected 'frozen.\*' to match a parameter in training, got only frozen ones \(frozen.we",
    ),
    ({"counts": Lasso(1)}, r"^counts: matrix: expected real floating-point weights, got torch.complex64"),
    ({"broken": Lasso(1)}, r"^broken: matrix: expected finite weights, got NaN or infinity in 4 of 4"),
]


@pytest.mark.parametrize(("rules", "says"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_rule_that_cannot_be_followed_is_refused_by_name(rules, says):
    model, optimizer = odd()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PenaltyError, match=says):
        proximal(optimizer, model, rules)
    for name, value in model.state_dict().items():
        assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(state[name]))
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"every": 0}, r"every: expected a number of steps ≥ 1, got 0"),
        ({"every": True}, r"every: expected a number of steps"),
        ({"every": "batch"}, r'every: expected "step", "epoch" or a number of steps, got \'batch\''),
        ({"every": 2.5}, r'every: expected "step", "epoch" or a number of steps, got 2.5'),
        ({"every": "epoch", "steps_per_epoch": 0}, r"steps_per_epoch: expected a number of steps ≥ 1, got 0"),
        ({"every": "epoch", "steps_per_epoch": 2.5}, r"steps_per_epoch: expected a whole number together with"),
        ({"every": "step", "steps_per_epoch": 3}, r"steps_per_epoch: expected a whole number together with"),
        ({"every": 4, "steps_per_epoch": 3}, r"steps_per_epoch: expected a whole number together with"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(options, says):
    model = network()
    with pytest.raises(PenaltyError, match=says):
        proximal(sgd(model), model, RULES, **options)


def test_what_can_be_grouped_is_accepted():
    model, optimizer = odd()
    rules = {
        ("again.weight", INPUTS): GrOWL(1.0),
        ("conv.weight", INPUTS): GrOWL(1.0),
        ("conv.weight", Groups.filters()): Lasso(0.1),
        ("grouped.weight", OUTPUTS): GroupLasso(0.1),
        ("grouped.weight", Groups.filters()): GroupLasso(0.1),
        ("up.weight", Groups.filters()): GroupLasso(0.1),
        ("up.bias", OUTPUTS): Lasso(0.1),
        ("tokens.weight", Groups.elements()): OWL(0.1),
        ("tokens.weight", Groups.whole()): GroupLasso(0.1),
        ("norm.weight", OUTPUTS): Lasso(0.1),
        ("frozen_inside.weight", INPUTS): Lasso(0.1),  # in the optimizer: it may thaw
    }
    handle = proximal(optimizer, model, rules)
    assert handle.parameters[:3] == ("again.weight", "conv.weight", "grouped.weight")


def test_a_pattern_takes_every_trained_parameter_once_under_its_first_name():
    model = Odd()
    optimizer = torch.optim.SGD([model.linear.weight, model.frozen_inside.weight], lr=0.1)
    handle = proximal(optimizer, model, {"[!ucgtbn]*n*r*.weight": Lasso(0.1)})
    assert handle.parameters == ("linear.weight",)
    handle.remove()
    shared = nn.ModuleDict({"a": model.linear, "b": model.again})
    handle = proximal(optimizer, shared, {"*.weight": Lasso(0.1)})
    assert handle.parameters == ("a.weight",)
    loss = shared["b"](torch.ones(1, 4)).sum() * 0.0
    loss.backward()
    before = model.linear.weight.detach().clone()
    optimizer.step()
    expected = Lasso(0.1).prox(INPUTS.read(before), 0.1)
    assert torch.equal(model.linear.weight, INPUTS.write(expected, before.shape))  # once, not twice


def test_a_parameter_outside_the_optimizer_is_refused_by_name():
    model = network()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with pytest.raises(
        PenaltyError, match=r"^0.weight: expected a parameter that this optimizer steps, got one in none"
    ):
        proximal(optimizer, model, RULES)


def test_a_lazy_parameter_is_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(PenaltyError, match=r"^1.weight: expected a parameter with a shape, got a lazy one"):
        proximal(optimizer, model, {"1.weight": Lasso(1)})


def test_an_optimizer_without_learning_rate_is_refused():
    class Plain(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

    model = network()
    with pytest.raises(PenaltyError, match=r"optimizer: expected a learning rate in every param group, got none in gr"):
        proximal(Plain(model.parameters()), model, RULES)


def test_a_second_handle_on_the_same_groups_is_refused():
    model = network()
    optimizer = sgd(model)
    handle = proximal(optimizer, model, {"0.weight": Lasso(1)})
    proximal(optimizer, model, {"2.weight": Lasso(1), ("0.weight", OUTPUTS): Lasso(1)})
    with pytest.raises(
        PenaltyError, match=r"^0.weight: .* an earlier proximal\(\) penalises; call remove\(\) on its han"
    ):
        proximal(optimizer, model, {"0.weight": GrOWL(1)})
    handle.remove()
    proximal(optimizer, model, {"0.weight": GrOWL(1)})


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_diverged_are_refused_and_none_is_written(bad):
    model = network()
    optimizer = sgd(model)
    handle = proximal(optimizer, model, {"0.weight": GrOWL(0.1), "2.weight": Lasso(0.1)}, every=100)
    train(model, optimizer, 3)
    with torch.no_grad():
        model[2].weight[0, 1] = bad
    before, state = weights(model), handle.state_dict()
    with pytest.raises(
        PenaltyError, match=r"^2.weight: matrix: expected finite weights, got NaN or infinity in 1 of 5"
    ):
        handle.prox_()
    assert all(
        torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in zip(before, weights(model), strict=True)
    )
    assert handle.state_dict() == state
    with torch.no_grad():
        model[2].weight[0, 1] = 0.0
    handle.prox_()
    assert not torch.equal(before[0], weights(model)[0])


# Which optimizers are warned about.

ADAPTIVE = [
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "LBFGS",
]


@pytest.mark.parametrize("name", ADAPTIVE)
def test_an_adaptive_optimizer_is_warned_about_once_where_it_is_given(name):
    model = network()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
    says = rf"got {name}, which rescales.*torch.optim.SGD\(..., momentum=0.9\)"
    with pytest.warns(TyingWarning, match=says) as caught:
        proximal(optimizer, model, RULES)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    if name != "LBFGS":
        train(model, optimizer, 3)


@pytest.mark.parametrize("name", ["SGD", "ASGD"])
def test_a_plain_optimizer_is_not(name):
    model = network()
    proximal(getattr(torch.optim, name)(model.parameters(), lr=0.01), model, RULES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_train(dtype):
    model = network().to(dtype)
    optimizer = sgd(model)
    proximal(optimizer, model, {"0.weight": GrOWL(0.3)}, every=5)
    for _ in range(20):
        optimizer.zero_grad()
        (model(X.to(dtype)) - Y.to(dtype)).square().mean().backward()
        optimizer.step()
    assert model[0].weight.dtype == dtype
    assert 0 < (INPUTS.norms(model[0].weight) == 0).sum() < 6


def test_convolutions_train_by_input_channel():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 1))
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    proximal(optimizer, model, {"2.weight": GroupLasso(0.1)})
    before = model[2].weight.detach().clone()
    model(torch.randn(5, 3, 6, 6)).square().mean().backward()
    gradient = model[2].weight.grad.clone()
    optimizer.step()
    stepped = before - 0.01 * gradient
    norms = stepped.double().square().sum(dim=(0, 2, 3), keepdim=True).sqrt()
    expected = stepped * (1 - 0.001 / norms).clamp(min=0).float()
    torch.testing.assert_close(model[2].weight.detach(), expected, rtol=1e-6, atol=1e-8)
