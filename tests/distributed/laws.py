"""Laws that every rank holds at once: each is called by all ranks together, and judges after its last message."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.nn.parallel import DistributedDataParallel

from distributed.cases import Spread, X, Y, full, pair, plain, train
from distributed.counting import Messages
from tying.axes import squares_anywhere
from tying.errors import PenaltyError
from tying.find.discover import discover
from tying.groups import Groups, Joined, Part
from tying.penalties import OWL, GroupLasso, GrOWL, Lasso, Ridge
from tying.train import shards
from tying.train.proximal import ProximalHandle, proximal
from tying.train.rules import Rules

T = TypeVar("T")


class LawError(AssertionError):
    """A law does not hold; torch's own assertions are another thing."""


def expect(holds: object, message: object) -> None:
    if not holds:
        raise LawError(str(message))


def kept(ndim: int) -> list[tuple[int, ...]]:
    """All axes along which groups may be counted."""
    return [axes for n in range(ndim + 1) for axes in combinations(range(ndim), n)]


def law_squares(spread: Spread) -> None:
    """One message, of one number per group, gives every rank the squares that the gathered weights have."""
    _, model, *_ = pair(spread)
    sharded = [
        (name, parameter, axes)
        for name, parameter in model.named_parameters()
        if shards.is_sharded(parameter)
        for axes in kept(parameter.dim())
    ]
    message = shards.Message([shards.piece_of(name, parameter, axes) for name, parameter, axes in sharded])
    with Messages() as messages:
        found = message([squares_anywhere(shards.local(p), axes).numpy() for _, p, axes in sharded])
    expect(messages.sent == [("allreduce_", 8 * sum(map(len, found)))], messages.sent)
    for (name, parameter, axes), squares in zip(sharded, found, strict=True):
        whole = full(parameter)
        others = tuple(axis for axis in range(whole.dim()) if axis not in axes)
        expected = (whole.square().sum(dim=others) if others else whole.square()).reshape(-1)
        expect(
            np.allclose(squares, expected.numpy(), rtol=1e-12, atol=0), f"{name} along {axes}: {squares}, {expected}"
        )


INPUTS, OUTPUTS, ELEMENTS = Groups.inputs(), Groups.outputs(), Groups.elements()

ONE_ROUND = {
    ("conv.weight", OUTPUTS): GroupLasso(0.3),
    "first.weight": GrOWL(0.3),
    ("second.weight", OUTPUTS): GrOWL(0.3),
    ("last.weight", INPUTS): GroupLasso(0.3),
}
GROUPS = 3 + 9 + 5 + 5
"""Of ONE_ROUND."""
RULES = {
    **ONE_ROUND,
    ("second.weight", INPUTS): GroupLasso(0.3),
    ("conv.weight", ELEMENTS): Lasso(0.06),
    ("first.bias", ELEMENTS): Ridge(0.1),
    ("conv.bias", OUTPUTS): GroupLasso(0.01),
}


JOINED = {
    Joined((Part("first.weight", 0, tuple(range(7))), Part("second.weight", 1, tuple(range(7)))), 7): GrOWL(0.3),
    Joined((Part("conv.weight", 0, (0, 1, 1)), Part("last.weight", 1, (-1, 2, 2, 0, 0))), 3): GroupLasso(0.1),
}
"""Over parameters of which one may be sharded and the other plain."""


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(parameter) for name, parameter in model.named_parameters()}


def here(model: nn.Module) -> dict[str, Tensor]:
    return {name: shards.local(parameter).clone() for name, parameter in model.named_parameters()}


def from_all(thing: T) -> list[T]:
    found: list[T] = [thing] * dist.get_world_size()
    dist.all_gather_object(found, thing)
    return found


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].nan_to_num(), other[name].nan_to_num()) for name in one
    )


def refusal_of(call: Callable[[], object]) -> str:
    try:
        call()
    except PenaltyError as error:
        return str(error)
    return ""


def law_training(spread: Spread, rules: Rules = RULES) -> None:
    """Training spread over ranks is the training of one process; every rank has the same bits of every number."""
    whole, model, share, shares = pair(spread)
    optimizers = sgd(whole), sgd(model)
    proximal(optimizers[0], whole, rules)
    proximal(optimizers[1], model, rules)
    train(whole, optimizers[0], 20)
    train(model, optimizers[1], 20, share, shares)
    expected, found = weights(whole), weights(model)
    everywhere = from_all(found)
    zeros = sum(int((value == 0).sum()) for value in expected.values())
    expect(10 < zeros < 100, f"{zeros} zeros: a penalty that does nothing, or kills all, shows nothing")
    for name in expected:
        expect(torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-11), f"{name}: {found[name]}")
        expect(torch.equal(found[name] == 0, expected[name] == 0), f"{name}: other zeros")
    expect(all(same_bits(found, other) for other in everywhere), "other bits on another rank")


def law_messages(spread: Spread) -> None:
    """A prox of all parameters sends one message, of 8 bytes for every group that may lie on several ranks."""
    _, model, share, shares = pair(spread)
    optimizer = sgd(model)
    handle = proximal(optimizer, model, ONE_ROUND, every="epoch", freeze_zeros=True)
    train(model, optimizer, 12, share, shares)
    with Messages() as messages:
        handle.prox_()
    sharded = {name for name, parameter in model.named_parameters() if shards.is_sharded(parameter)}
    groups = {"conv.weight": 3, "first.weight": 9, "second.weight": 5, "last.weight": 5}
    expected = 8 * sum(count for name, count in groups.items() if name in sharded)
    expect(messages.sent == [("allreduce_", expected)], messages.sent)
    dead = sum(int(dead.sum()) for dead in handle.state_dict()["dead"].values())
    with Messages() as messages:
        optimizer.step()  # after which dead groups are made zero again
        handle.state_dict()
        handle.prox_()
        handle.remove()
    expect(messages.sent == [("allreduce_", expected)], messages.sent)
    expect(dead > 0, "nothing died")


def law_refusal(spread: Spread) -> None:
    """What is not finite on one rank, a replica's too, is refused by every rank in the same words; nothing changes."""
    verdicts = []
    for name, rank, rules in [
        ("first.weight", 0, ONE_ROUND),
        ("first.weight", dist.get_world_size() - 1, ONE_ROUND),
        ("second.weight", 1, ONE_ROUND),
        ("first.bias", 1, {("first.bias", ELEMENTS): Lasso(0.1), **ONE_ROUND}),
        ("first.bias", 1, {("first.bias", ELEMENTS): Ridge(0.1)}),
    ]:
        _, model, share, shares = pair(spread)
        optimizer = sgd(model)
        handle = proximal(optimizer, model, rules, every="epoch")
        train(model, optimizer, 2, share, shares)
        part = shards.local(dict(model.named_parameters())[name])
        had = part.clone()
        if dist.get_rank() == rank:
            part.reshape(-1)[:1] = float("nan")
        before = here(model)
        said = refusal_of(handle.prox_)
        untouched = same_bits(before, here(model))
        part.copy_(had)
        handle.prox_()  # all ranks are still in step
        verdicts.append((name, part.numel() > 0, rank, said, untouched))
    for results in zip(*from_all(verdicts), strict=True):
        name, held_there, rank, said, _ = results[next(iter({rank for _, _, rank, _, _ in results}))]
        expect(held_there, f"{name} has nothing on rank {rank}: the case shows nothing")
        expect(said.startswith(f"{name}: ") and "NaN" in said, f"{name} on rank {rank}: {said!r}")
        expect(len({other for *_, other, _ in results}) == 1, f"{name} on rank {rank}: {results}")
        expect(all(untouched for *_, untouched in results), f"{name} on rank {rank}: weights have changed")


def law_frozen(spread: Spread) -> None:
    """Groups that were zero once stay zero, those of single numbers too, and they are those of one process."""
    rules = {**ONE_ROUND, ("first.bias", OUTPUTS): Lasso(0.2)}
    results = []
    whole, model, share, shares = pair(spread)
    for net, at, of in ((whole, 0, 1), (model, share, shares)):
        optimizer = sgd(net)
        handle = proximal(optimizer, net, rules, every="epoch", freeze_zeros=True)
        train(net, optimizer, 12, at, of)
        handle.epoch_end()
        once = weights(net)
        train(net, optimizer, 4, at, of)
        results.append((handle.state_dict()["dead"], once, weights(net)))
        handle.prox_()
    (one, *_), (many, once, later) = results
    everywhere = from_all(many)
    expect(one.keys() == many.keys(), f"{many.keys()}")
    for key in one:
        expect(all(torch.equal(one[key], other[key]) for other in everywhere), f"{key}: {one[key]}, {everywhere}")
    expect(sum(int(dead.sum()) for dead in one.values()) > 5, one)
    expect(bool(one["first.bias[outputs]"].any()), "no number died")
    for axis, name in ((1, "first.weight"), (0, "second.weight"), (0, "first.bias")):
        dead = [key for key in one if key.startswith(f"{name}[")]
        expect(
            bool((later[name].index_select(axis, one[dead[0]].nonzero().flatten()) == 0).all()), f"{name}: alive again"
        )
        expect(bool((once[name].index_select(axis, one[dead[0]].nonzero().flatten()) == 0).all()), f"{name}: alive")


def law_bits(spread: Spread, dtype: torch.dtype) -> None:
    """A prox is that of one process to the rounding, and equal groups on different ranks come out equal in all bits."""
    whole = plain(dtype)
    with torch.no_grad():
        whole.first.weight[:, -1] = whole.first.weight[:, 0]
        whole.first.weight[-1] = whole.first.weight[0]
        whole.second.weight[-1] = whole.second.weight[0]
    model, *_ = spread.spread(copy.deepcopy(whole))
    for net in (whole, model):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        handle = proximal(optimizer, net, ONE_ROUND, every="epoch")
        optimizer.step()
        handle.epoch_end()
    expected, found = weights(whole), weights(model)
    for name in expected:
        near = torch.allclose(expected[name], found[name], rtol=4 * torch.finfo(dtype).eps, atol=0)
        expect(near, f"{name}: {found[name]}, {expected[name]}")
    expect(torch.equal(found["first.weight"][:, -1], found["first.weight"][:, 0]), "equal inputs")
    expect(torch.equal(found["second.weight"][-1], found["second.weight"][0]), "equal outputs")
    expect(not torch.equal(found["first.weight"], plain(dtype).first.weight), "nothing was done")


def law_plan(spread: Spread) -> None:
    """The weights gathered on one rank at the end give the plan that the same seed gives in one process."""
    whole, model, share, shares = pair(spread, torch.float32)
    for net, at, of in ((whole, 0, 1), (model, share, shares)):
        optimizer = sgd(net)
        proximal(optimizer, net, {key: penalty.scaled(1 / 3) for key, penalty in ONE_ROUND.items()})
        train(net, optimizer, 40, at, of)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() > 0:
        return
    gathered = plain(torch.float32)
    gathered.load_state_dict(state)
    plans = [discover(net, {"first.weight": INPUTS, "second.weight": OUTPUTS}, clusters=3) for net in (whole, gathered)]
    expect(plans[0].ties == plans[1].ties, f"{plans[0]}, {plans[1]}")
    kinds = [set(tie.partition.labels.tolist()) for tie in plans[0].ties]
    expect(kinds == [{0, 1, 2}, {-1, 0, 1, 2, 3}], plans[0])


def law_state(spread: Spread, folder: Path) -> None:
    """What is saved through torch.distributed.checkpoint goes on as if nothing had been: here, and in one process."""
    whole, model, share, shares = pair(spread)
    ends: list[dict[str, Tensor]] = []
    for net, at, of, alone in ((whole, 0, 1, True), (model, share, shares, False)):
        optimizer = sgd(net)
        handle = proximal(optimizer, net, ONE_ROUND, every=12, freeze_zeros=True)
        train(net, optimizer, 15, at, of)  # there are dead groups, and three steps without a prox
        expect(any(dead.any() for dead in handle.state_dict()["dead"].values()), "nothing died")
        path = folder / f"{spread.name} {'one' if alone else 'many'}"
        if not alone or dist.get_rank() == 0:
            dcp.save(_states(net, optimizer, handle), checkpoint_id=path, no_dist=alone)
        dist.barrier()
        train(net, optimizer, 9, at, of)
        ends.append(weights(net))
    for saved in ("one", "many"):
        one, many, share, shares = pair(spread)
        for net, at, of, alone in ((one, 0, 1, True), (many, share, shares, False)):
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.mul_(0.5)
            optimizer = sgd(net)
            handle = proximal(optimizer, net, ONE_ROUND, every=12, freeze_zeros=True)
            states = _states(net, optimizer, handle)
            dcp.load(states, checkpoint_id=folder / f"{spread.name} {saved}", no_dist=alone)
            set_state_dict(net, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
            handle.load_state_dict(states["nested"]["handle"])  # the same as the handle of its own has loaded
            train(net, optimizer, 9, at, of)
            ends.append(weights(net))
    for end in ends[1:]:
        for name, value in ends[0].items():
            expect(torch.allclose(end[name], value, rtol=1e-9, atol=1e-12), f"{name}: {end[name]}, {value}")


def _states(model: nn.Module, optimizer: torch.optim.Optimizer, handle: ProximalHandle) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {
        "model": of_model,
        "optimizer": of_optimizer,
        "handle": handle,
        "nested": {"handle": handle.state_dict()},
    }


def law_replicas() -> None:
    """Under DDP the ranks learn from different data and stay equal, bit for bit, without a message of the handle's."""
    model = plain(torch.float32)
    parallel = DistributedDataParallel(model)
    optimizer = sgd(model)
    proximal(optimizer, model, RULES)
    for _ in range(20):
        optimizer.zero_grad()
        x, y = (part[dist.get_rank() :: dist.get_world_size()].float() for part in (X, Y))
        (parallel(x) - y).square().mean().backward()
        with Messages() as messages:
            optimizer.step()  # and the prox after it
        expect(not messages.sent, messages.sent)
    found = weights(model)
    expect(all(same_bits(found, other) for other in from_all(found)), "other bits on another rank")
    expect(10 < sum(int((value == 0).sum()) for value in found.values()) < 100, found)


def zero_redundancy(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own use of torch.jit.script
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, **options)


def law_shared_states() -> None:
    """torch's ZeroRedundancyOptimizer shares out its states by whole parameters: each step is that of plain SGD."""
    results = []
    for make in (sgd, lambda net: zero_redundancy(net, momentum=0.9)):
        model = plain()
        parallel = DistributedDataParallel(model)
        optimizer = make(model)
        proximal(optimizer, model, RULES)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)
        for _ in range(8):
            train(parallel, optimizer, 1, dist.get_rank(), dist.get_world_size())
            schedule.step()
        results.append(weights(model))
    found = from_all(results)
    expect(all(same_bits(found[0][0], other) for pair_ in found for other in pair_), "other weights")


def law_named() -> None:
    """What can't be worked with is refused in words that say what to use."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    flat = [FullyShardedDataParallel(plain(), use_orig_params=o, device_id=torch.device("cpu")) for o in (True, False)]
    zero = plain()
    for parameter in zero.parameters():
        parameter.ds_id = 0
    sum_ = nn.Linear(3, 3)
    sum_.weight = nn.Parameter(DTensor.from_local(torch.ones(3, 3), mesh, [Partial()]))
    sharded = plain()
    fully_shard(sharded, mesh=mesh)
    whole = plain()
    overlapping = zero_redundancy(whole, overlap_with_ddp=True)
    cases = {
        "flat, by pattern": (flat[0], None, {"*first.weight": GrOWL(0.1)}, "use torch.distributed.fsdp.fully_shard"),
        "flat, by name": (flat[0], None, {"first.weight": GrOWL(0.1)}, "use torch.distributed.fsdp.fully_shard"),
        "flat, one": (flat[1], None, {"first.weight": GrOWL(0.1)}, "use torch.distributed.fsdp.fully_shard"),
        "ZeRO": (zero, None, {"first.weight": GrOWL(0.1)}, "use torch.distributed.fsdp.fully_shard"),
        "sum": (sum_, None, {"weight": GrOWL(0.1)}, "terms of a sum"),
        "OWL": (sharded, None, {"first.weight": OWL(0.1)}, "use Lasso, or GrOWL on groups"),
        "elements": (sharded, None, {("first.weight", ELEMENTS): GrOWL(0.1)}, "use Lasso"),
        "too few weights": (sharded, None, {"first.weight": GrOWL(0.1, [1.0, 0.0])}, "9"),
        "overlapping": (whole, overlapping, {"first.weight": GrOWL(0.1)}, "overlap_with_ddp"),
    }
    said = {
        name: refusal_of(lambda case=case: proximal(case[1] or sgd(case[0]), case[0], case[2]))
        for name, case in cases.items()
    }
    for name, (*_, remedy) in cases.items():
        expect(remedy in said[name], f"{name}: {said[name]}")
    expect(all(other == said for other in from_all(said)), said)
