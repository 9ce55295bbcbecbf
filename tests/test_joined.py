"""Joined groups of the families of networks, against what is written down by hand and what the networks do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as f

from channel_laws import assert_equal, check_cut_is_exact, check_readers_are_all, outputs
from families import FAMILIES, Family, resnet20_of
from fuzzer import fuzzed
from joined_laws import check_it_vanishes, check_partition, without
from networks import NETWORKS, Net, Network, randomised
from tying.channels.find import find_channels
from tying.channels.joined import NotJoined, joined_groups, not_joined
from tying.channels.labels import Ledger
from tying.enforce.compaction.compact import compact, plan_compaction
from tying.errors import PlanError
from tying.groups import Groups, Joined, Part
from tying.penalties.norms import GroupLasso
from tying.plan import TiePlan
from tying.train.proximal import proximal

EVERY_FAMILY = [pytest.param(family, id=name) for name, family in FAMILIES.items()]
EVERY_NETWORK = [pytest.param(network, id=name) for name, network in NETWORKS.items()]


def written(found: tuple[Joined, ...]) -> tuple[tuple[str, int], ...]:
    """As by hand: the readers' names without ".weight", and how many channels."""
    return tuple((" ".join(part.parameter.removesuffix(".weight") for part in j.parts), j.count) for j in found)


def law(model: nn.Module, x: Tensor) -> int:
    found, channels = joined_groups(model, x), find_channels(model, x)
    check_partition(model, found)
    return sum(check_it_vanishes(model, x, channels, joined) for joined in found)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_families(family: Family) -> None:
    model, x = family.make()
    assert written(joined_groups(model, x)) == family.joined
    assert 2 * law(model, x) > sum(count for _, count in family.joined[1:])
    reasons = {left_out.reason for left_out in not_joined(model, x)}
    for reason in reasons:
        assert any(words in reason for words in family.lost), reason
    for words in family.lost:
        assert any(words in reason for reason in reasons), words


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_channels_of_families(family: Family) -> None:
    model, x = family.make()
    channels = find_channels(model, x)
    assert sum(channel.blocked is None for channel in channels) == family.free
    check_readers_are_all(model, x, channels)
    check_cut_is_exact(model, x, channels)


@pytest.mark.parametrize("network", EVERY_NETWORK)
def test_registered_networks(network: Network) -> None:
    law(*network.make())


@pytest.mark.parametrize("seed", range(25))
def test_drawn_networks(seed: int) -> None:
    law(*fuzzed(seed))


# ---------------------------------------------------------------- broken twins


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_reader_left_out_fails_the_law(family: Family) -> None:
    model, x = family.make()
    channels = find_channels(model, x)
    for joined in joined_groups(model, x):
        for index in range(len(joined.parts)) if len(joined.parts) > 1 else ():
            with pytest.raises(AssertionError):
                check_it_vanishes(model, x, channels, without(joined, index))


@pytest.mark.parametrize(
    "broken",
    [
        Joined((Part("head.weight", 1, (0, 1, 1, 1)),), 2),
        Joined((Part("head.weight", 1, (0, 1, 2)),), 3),
        Joined((Part("head.weight", 1, (0, 1, 2, 3)), Part("head.weight", 1, (-1, -1, -1, 0))), 4),
    ],
    ids=["uneven", "short", "twice"],
)
def test_groups_that_are_no_partition_fail_the_law(broken: Joined) -> None:
    with pytest.raises(AssertionError):
        check_partition(FAMILIES["vit"].make()[0], [broken])


# ---------------------------------------------------------------- what is left out


def half_known(name: str) -> nn.Module:
    """A layer that the head reads, and something else that can't be followed."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.body(x)
        return m.head(h) + m.tail(HALF_KNOWN[name](m, h) * m.other(x))

    return Net(
        forward, body=nn.Linear(4, 5), other=nn.Linear(4, 5), mix=nn.Linear(1, 5), head=nn.Linear(5, 2),
        tail=nn.Linear(5, 2),
    )  # fmt: skip


HALF_KNOWN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "sort": lambda m, h: h.sort(-1)[0],
    "cumsum": lambda m, h: h.cumsum(-1),
    "amax": lambda m, h: h.amax(-1, keepdim=True),
    "amin": lambda m, h: m.mix(h.amin(-1, keepdim=True)),
    "sum": lambda m, h: h * h.sum(-1, keepdim=True).sort(0)[0],
    "linear": lambda m, h: f.linear(h, torch.ones(5, 5, dtype=h.dtype).tril()),
    "select": lambda m, h: h[:, 1:2],
}


@pytest.mark.parametrize("name", HALF_KNOWN)
def test_channels_that_are_lost_are_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = randomised(half_known(name)), torch.randn(3, 4, dtype=torch.float64)
    found = joined_groups(model, x)
    assert not [part for joined in found for part in joined.parts if part.parameter == "head.weight"]
    lost = {left_out.parameter: left_out for left_out in not_joined(model, x)}
    if name == "select":
        assert lost["head.weight"].indices == (1,)
    else:
        assert lost["head.weight"].indices == tuple(range(5))
        assert name in lost["head.weight"].reason
    law(model, x)
    monkeypatch.setattr(Ledger, "_losses", lambda self, classes, gone: [None] * (int(classes.max()) + 1))
    with pytest.raises(AssertionError):
        law(model, x)


def test_a_weight_read_along_both_axes_at_once_is_left_out() -> None:
    model = Net(
        lambda m, x: f.linear((h := m.stem(x)) + m.both(h).relu(), m.both.weight.t()),
        stem=nn.Linear(4, 3), both=nn.Linear(3, 3),
    )  # fmt: skip
    x = torch.zeros(2, 4)
    assert written(joined_groups(model, x)) == (("stem", 4),)
    (left_out,) = not_joined(model, x)
    assert left_out == NotJoined(
        "both.weight", 0, (0, 1, 2), "'both.weight' reads it along axis 0 and axis 1, which overlap"
    )
    with pytest.raises(PlanError, match=r"'both\.weight', whose channels can't be joined: .*which overlap; penalise"):
        joined_groups(model, x, names="both.weight")


def test_memory_that_two_parameters_share_is_not_counted_twice() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model[2].weight = nn.Parameter(model[0].weight.detach().t())
    assert written(joined_groups(model, torch.zeros(2, 3))) == (("4", 3),)
    assert {left_out.parameter for left_out in not_joined(model, torch.zeros(2, 3))} == {"0.weight", "2.weight"}
    flat = torch.randn(24)  # one memory, no overlap
    model[0].weight, model[2].weight = (nn.Parameter(part) for part in (flat[:12].view(4, 3), flat[12:].view(3, 4)))
    assert written(joined_groups(model, torch.zeros(2, 3))) == (("0", 3), ("2", 4), ("4", 3))


# ---------------------------------------------------------------- which groups


@pytest.mark.parametrize("name", ["mlp", "lenet", "conv1d", "products"])
def test_of_a_plain_layer_they_are_its_inputs(name: str) -> None:
    model, x = NETWORKS[name].make()
    parameters = dict(model.named_parameters())
    for joined in joined_groups(model, x):
        (part,) = joined.parts
        if part.axis == 1 and joined.count == len(part.labels):
            assert part.labels == tuple(range(joined.count))
            weight = parameters[part.parameter]
            torch.testing.assert_close(norms(parameters, joined), Groups.inputs().norms(weight), rtol=1e-14, atol=0)


def norms(parameters: dict[str, nn.Parameter], joined: Joined) -> Tensor:
    """One number after the other."""
    squares = [0.0] * joined.count
    for part in joined.parts:
        slabs = parameters[part.parameter].detach().movedim(part.axis, 0)
        for label, slab in zip(part.labels, slabs, strict=True):
            if label >= 0:
                squares[label] += sum(value * value for value in slab.flatten().tolist())
    return torch.tensor(squares, dtype=torch.float64).sqrt()


def test_a_flattened_map_has_all_its_inputs() -> None:
    *_, head = joined_groups(*NETWORKS["permute_then_flatten"].make())
    assert head == Joined((Part("head.weight", 1, (0, 1, 2) * 12),), 3)
    _, wide, narrow = joined_groups(*NETWORKS["flatten_a_concatenation"].make())
    assert (wide.count, narrow.count) == (3, 2)
    assert wide.parts[0].labels == (*(label for label in range(3) for _ in range(12)), *[-1] * 12)
    assert narrow.parts[0].labels == (*[-1] * 36, *[0] * 6, *[1] * 6)


def test_units_that_go_through_one_group_of_a_convolution_are_one() -> None:
    *_, last = joined_groups(*NETWORKS["grouped"].make())
    assert last == Joined((Part("3.weight", 1, (0, 0, 0, 1, 1, 1)),), 2)


def test_shared_parameters_go_by_their_first_name() -> None:
    model, x = NETWORKS["tied_weights"].make()
    assert written(joined_groups(model, x)) == (("a", 4), ("c join", 3))
    assert joined_groups(model, x, names="b.weight") == joined_groups(model, x, names="a.weight")


def test_a_weight_used_both_ways_round_is_in_two() -> None:
    assert [str(joined) for joined in joined_groups(*NETWORKS["transposed_tie"].make())] == [
        "encoder.weight[axis 0]",
        "encoder.weight[axis 1]",
    ]


def test_they_do_not_depend_on_dtype_mode_or_run() -> None:
    model, x = FAMILIES["resnet20"].make()
    expected = joined_groups(model, x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert joined_groups(model.train(), x) == expected
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert joined_groups(model.bfloat16(), x.bfloat16()) == expected


# ---------------------------------------------------------------- names


def test_names_choose_channels_all_of_whose_readers_match() -> None:
    model, x = FAMILIES["resnet20"].make()
    every = joined_groups(model, x)
    assert written(joined_groups(model, x, "blocks.?.b.*")) == tuple(w for w in written(every) if ".b.0" in w[0])
    assert joined_groups(model, x, ("*",)) == every
    blocks = joined_groups(model, x, ["blocks.*"])
    assert {part.parameter for joined in blocks for part in joined.parts} <= {
        name for name, _ in model.named_parameters() if name.startswith("blocks")
    }
    assert written(blocks) == tuple(w for w in written(every) if "stem" not in w[0] and "head" not in w[0])
    with_head = joined_groups(model, x, ["blocks.*", "head.weight"])
    assert with_head == tuple(joined for joined in every if "stem" not in str(joined))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("blocks.0.a.O.weight", r"which matches none; similar names are: .*blocks\.0\.a\.0\.weight"),
        (["blocks.*", "tail"], r"got 'tail', which matches none; the model has: stem\.0\.0\.weight, .*…"),
        ("head.weight", r"blocks\.7\.a\.0\.weight, blocks\.8\.a\.0\.weight read as well; name them too"),
        (["blocks.0.*", "head.*"], r"'head\.\*', whose channels blocks\.7\.a\.0\.weight, .* read as well"),
        ([], r"names: expected at least one pattern"),
        ("blocks.0.b.1.weight", "which reads no channel; name the weights of linear"),
    ],
)
def test_names_that_choose_nothing_are_refused(names: str | list[str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        joined_groups(*FAMILIES["resnet20"].make(), names)


# ---------------------------------------------------------------- under a penalty


def half_shrunk(model: nn.Module, found: tuple[Joined, ...]) -> dict[str, Tensor]:
    """Let `proximal` shrink every group by the median norm of its `Joined`; return what that should give, slowly."""
    parameters = dict(model.named_parameters())
    expected = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    rules: dict[Joined, GroupLasso] = {}
    for joined in found:
        before = norms(parameters, joined)
        rules[joined] = GroupLasso(float(before.quantile(0.5)))
        factors = (1 - rules[joined].strength / before).clamp(min=0).tolist()
        for part in joined.parts:
            for slab, label in zip(expected[part.parameter].movedim(part.axis, 0), part.labels, strict=True):
                slab *= 1.0 if label < 0 else factors[label]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = proximal(optimizer, model, rules)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    handle.remove()
    return expected


SHRUNK = {**FAMILIES, **{name: NETWORKS[name] for name in ("lenet", "flatten_a_concatenation", "grouped")}}


@pytest.mark.parametrize("name", SHRUNK)
def test_a_group_is_shrunk_by_its_norm_over_all_readers(name: str) -> None:
    model, x = SHRUNK[name].make()
    expected = half_shrunk(model, joined_groups(model, x))
    for parameter, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), expected[parameter], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["resnet20", "resnet50", "resnext", "mobilenet_v2", "densenet", "vgg", "unet"])
def test_what_is_zero_as_one_is_removed_with_all_that_makes_it(name: str) -> None:
    model, x = FAMILIES[name].make()
    found = joined_groups(model, x)
    half_shrunk(model, found)
    parameters = dict(model.named_parameters())
    free = found[1:]  # the first are the model's inputs
    zero = sum(int((norms(parameters, joined) == 0).sum()) for joined in free)
    assert zero > len(free) / 2
    assert len(plan_compaction(model, TiePlan([]), x).removed) >= zero
    small = compact(model, TiePlan([]), x)
    assert_equal(outputs(small, x), outputs(model, x), name)
    sizes = {n: p.numel() for n, p in small.named_parameters()}
    assert all(sizes[part.parameter] < parameters[part.parameter].numel() for joined in free for part in joined.parts)


def test_training_drives_whole_channels_of_the_streams_to_zero_and_they_are_removed() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    pixels, labels = torch.as_tensor(digits.images / 16).float()[:600, None], torch.as_tensor(digits.target)[:600]
    model = resnet20_of((8, 8, 8), inputs=1)
    streams = joined_groups(model, pixels[:2], names=["blocks.*.a.0.weight", "head.weight"])
    assert [joined.count for joined in streams] == [8]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, 48, cycle_momentum=False)
    handle = proximal(optimizer, model, dict.fromkeys(streams, GroupLasso(2.0)))
    for _ in range(4):
        for batch in torch.randperm(600).split(50):
            optimizer.zero_grad()
            f.cross_entropy(model(pixels[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    handle.remove()
    parameters = dict(model.named_parameters())
    gone = norms(parameters, streams[0]) == 0
    assert 0 < int(gone.sum()) < 8
    for part in streams[0].parts:
        zero = ~parameters[part.parameter].movedim(part.axis, 0).flatten(1).any(1)
        assert zero.tolist() == gone.tolist()
    assert all(bool(parameters[f"blocks.{i}.b.0.weight"].flatten(1).any(1).all()) for i in (6, 7, 8))  # makers are not
    small = compact(model.eval(), TiePlan([]), pixels[:2])
    assert small.head.in_features == 8 - int(gone.sum())
    assert {small.get_parameter(f"blocks.{i}.b.0.weight").shape[0] for i in (6, 7, 8)} == {small.head.in_features}
