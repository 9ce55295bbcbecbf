"""Plans over several models: pairs by name, by a map, by what is equal; and what is told about them."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tying import declare
from tying.errors import PlanError
from tying.find import match as match_module
from tying.find.match import Match, Pair, match
from tying.groups import Groups
from tying.models import parameters_of
from tying.plan import Member, Partition, Tie, TiePlan

INPUTS, OUTPUTS, FILTERS = Groups.inputs(), Groups.outputs(), Groups.filters()


class Site(nn.Module):
    """An encoder that sites have in common, and a head of their own size."""

    def __init__(self, classes: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, classes)


def sites(*classes: int) -> dict[str, nn.Module]:
    return {name: Site(n, seed) for seed, (name, n) in enumerate(zip("abcd", classes, strict=False))}


def members(plan: TiePlan) -> list[list[str]]:
    return [[str(member) for member in tie.members] for tie in plan]


# ---------------------------------------------------------------- by name and shape


def test_the_same_name_and_shape_in_all_models_is_one_tie() -> None:
    models = sites(3, 3, 3)
    names = list(dict(models["a"].named_parameters()))
    expected = declare(models, equal=[[f"{model}.{name}" for model in models] for name in names])
    assert match(models) == expected
    assert expected == match(models)
    assert not match(models).unpaired
    assert match(models).provenance == {"match": "by name and shape"}


def test_other_shapes_and_names_stay_unpaired_with_the_reason() -> None:
    models = sites(3, 5, 3)
    models["b"].extra = nn.Linear(2, 2, bias=False)
    result = match(models)
    assert members(result)[-1] == ["a.head.bias[whole]", "c.head.bias[whole]"]
    assert [(each.name, each.shape, each.reason) for each in result.unpaired] == [
        ("b.head.weight", (5, 4), "other shape: a.head.weight has (3, 4), c.head.weight has (3, 4)"),
        ("b.head.bias", (5,), "other shape: a.head.bias has (3,), c.head.bias has (3,)"),
        ("b.extra.weight", (2, 2), "no such name in a, c"),
    ]


def test_what_is_one_parameter_in_one_model_is_one_tie() -> None:
    def model(tied: bool) -> nn.Module:
        result = nn.ModuleDict({"table": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
        if tied:
            result["head"].weight = result["table"].weight
        return result

    assert members(match({"a": model(True), "b": model(True)})) == [["a.table.weight[whole]", "b.table.weight[whole]"]]
    mixed = [["a.table.weight[whole]", "b.table.weight[whole]", "b.head.weight[whole]"]]
    assert members(match({"a": model(True), "b": model(False)})) == mixed
    reverse = [["a.table.weight[whole]", "a.head.weight[whole]", "b.table.weight[whole]"]]
    assert members(match({"a": model(False), "b": model(True)})) == reverse


def test_what_two_models_share_already_is_paired_as_before() -> None:
    models = sites(3, 3)
    before = match(models)
    models["b"].body[0].weight = models["a"].body[0].weight
    assert match(models) == before
    assert match(models).pairs[0].distance == 0


def test_matching_reads_only() -> None:
    models = sites(3, 4)
    before = copy.deepcopy({name: model.state_dict() for name, model in models.items()})
    match(models)
    match(models, equal=True)
    match(models, pairs={"a.body.*": "b.body.*"})
    for name, model in models.items():
        assert all(torch.equal(tensor, before[name][key]) for key, tensor in model.state_dict().items())


# ---------------------------------------------------------------- by a map, against what is obvious

Where = tuple[str, tuple[int, ...]]
"""A parameter and the place of one number in it."""


def wide(seed: int = 0) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    a = nn.ModuleDict(
        {"encoder": nn.Linear(6, 4), "decoder": nn.Linear(4, 6), "mid": nn.Linear(3, 5), "conv": nn.Conv2d(2, 3, 2)}
    )
    b = nn.ModuleDict(
        {"net": nn.Linear(6, 9), "back": nn.Linear(9, 6), "mid": nn.Linear(4, 3), "conv": nn.Conv2d(4, 2, 2)}
    )
    return {"a": a, "b": b.double().float()}


def places(models: Mapping[str, nn.Module], *names: str) -> list[Where]:
    parameters = parameters_of(models)
    return [(name, at) for name in names for at in itertools.product(*map(range, parameters[name].shape))]


MAPS: dict[str, tuple[dict[Any, Any], Callable[[Where, Where], bool]]] = {
    # what is said, and whether a number of a and a number of b must be the same
    "wider": (
        {("a.encoder.weight", OUTPUTS): ("b.net.weight", OUTPUTS), ("a.encoder.bias", OUTPUTS): "b.net.bias"},
        lambda x, y: x[0][2:8] + y[0][2:5] == "encodenet" and x[1] == y[1] and x[0][-4:] == y[0][-4:],
    ),
    "a range": (
        {("a.encoder.weight", OUTPUTS): ("b.net.weight", OUTPUTS, slice(3, 7))},
        lambda x, y: (x[0], y[0]) == ("a.encoder.weight", "b.net.weight") and y[1] == (x[1][0] + 3, x[1][1]),
    ),
    "a range backwards": (
        {("a.encoder.weight", OUTPUTS, range(3, 0, -1)): ("b.net.weight", OUTPUTS, range(3))},
        lambda x, y: (x[0], y[0]) == ("a.encoder.weight", "b.net.weight")
        and y[1][0] < 3
        and x[1] == (3 - y[1][0], y[1][1]),
    ),
    "two ranges": (
        {
            ("a.encoder.weight", OUTPUTS, range(2)): ("b.net.weight", OUTPUTS, range(7, 9)),
            ("a.encoder.weight", OUTPUTS, range(2, 4)): ("b.net.weight", OUTPUTS, range(1, 3)),
        },
        lambda x, y: (x[0], y[0]) == ("a.encoder.weight", "b.net.weight")
        and y[1] == ([7, 8, 1, 2][x[1][0]], x[1][1]),
    ),
    "transposed": (
        {("a.decoder.weight", INPUTS): ("b.net.weight", OUTPUTS)},
        lambda x, y: (x[0], y[0]) == ("a.decoder.weight", "b.net.weight") and x[1] == y[1][::-1],
    ),
    "a block": (
        {("a.mid.weight", FILTERS): "b.mid.weight"},
        lambda x, y: (x[0], y[0]) == ("a.mid.weight", "b.mid.weight") and x[1] == y[1],
    ),
    "a block of kernels": (
        {("a.conv.weight", FILTERS): ("b.conv.weight", FILTERS)},
        lambda x, y: (x[0], y[0]) == ("a.conv.weight", "b.conv.weight") and x[1] == y[1],
    ),
    "a later block of kernels": (
        {("a.conv.weight", FILTERS, range(1)): ("b.conv.weight", FILTERS, range(1, 2))},
        lambda x, y: (x[0], y[0]) == ("a.conv.weight", "b.conv.weight")
        and x[1][:2] == (0, 0)
        and y[1] == (1, 1, *x[1][2:]),
    ),
    "a block of numbers": (
        {("a.mid.weight", Groups.elements()): ("b.mid.weight", Groups.elements())},
        lambda x, y: (x[0], y[0]) == ("a.mid.weight", "b.mid.weight") and x[1] == y[1],
    ),
}  # fmt: skip

Plan = Callable[..., TiePlan]


def law_map(plan: Plan, name: str) -> None:
    """Projected, the numbers that must be the same are the mean of the two, all others as they were."""
    said, same = MAPS[name]
    models = wide()
    parameters = {key: p.detach().double() for key, p in parameters_of(models).items()}
    a, b = (places(models, *(key for key in parameters if key[0] == model)) for model in "ab")
    expected = {key: tensor.clone() for key, tensor in parameters.items()}
    for x, y in itertools.product(a, b):
        if same(x, y):
            mean = (parameters[x[0]][x[1]] + parameters[y[0]][y[1]]) / 2
            expected[x[0]][x[1]] = expected[y[0]][y[1]] = mean
    got = {**parameters, **plan(models, pairs=said).project(parameters)}
    for key, tensor in expected.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", MAPS)
def test_what_a_map_says_is_equal_and_nothing_else(name: str) -> None:
    law_map(match, name)


def in_one_run(models: Any, *, pairs: Any) -> TiePlan:
    """The first groups as they lie in memory, in place of a block of the grid."""
    plan = match(models, pairs=pairs)
    (tie,) = plan.ties
    counts = [member.shape(parameters_of(models))[0] for member in tie.members]
    short = plan.pairs[0].paired[0]
    labels = [*range(counts[0]), *range(short), *range(counts[0], counts[0] + counts[1] - short)]
    return TiePlan([Tie(tie.members, Partition(labels))])


def at_the_start(models: Any, *, pairs: Any) -> TiePlan:
    """Ranges forgotten."""

    def plain(side: Any) -> Any:
        return side[:2] if isinstance(side, tuple) else side

    return match(models, pairs={plain(left): plain(right) for left, right in pairs.items()})


def unturned(models: Any, *, pairs: Any) -> TiePlan:
    """Transposes forgotten: as many numbers, in their order."""
    (tie,) = match(models, pairs=pairs).ties
    sizes = [parameters_of(models)[member.parameter].numel() for member in tie.members]
    labels = [*range(sizes[0]), *range(sizes[1])]
    return TiePlan([Tie(tuple(Member(m.parameter, Groups.elements()) for m in tie.members), Partition(labels))])


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        (in_one_run, "a block"),
        (in_one_run, "a block of kernels"),
        (at_the_start, "a range"),
        (at_the_start, "a later block of kernels"),
        (unturned, "transposed"),
    ],
)
def test_pairing_in_other_ways_fails_the_law(broken: Plan, name: str) -> None:
    with pytest.raises(AssertionError):
        law_map(broken, name)


def stacks(left: int, right: int) -> dict[str, nn.Module]:
    def stack(n: int, width: int) -> nn.ModuleList:
        return nn.ModuleList(
            [nn.ModuleDict({"up": nn.Linear(2, width), "down": nn.Linear(width, 2)}) for _ in range(n)]
        )

    return {
        "a": nn.ModuleDict({"enc": stack(left, 3)}),
        "b": nn.ModuleDict({"net": stack(right, 3)}),
        "c": nn.ModuleDict({"net": stack(right, 3)}),
    }


def test_stars_are_put_in_on_the_right() -> None:
    result = match(stacks(2, 2), pairs={"a.enc.*.*.weight": ["b.net.*.*.weight", "c.net.*.*.weight"]})
    expected = [
        [f"{model}.{i}.{layer}.weight[whole]" for model in ("a.enc", "b.net", "c.net")]
        for i in range(2)
        for layer in ("up", "down")
    ]
    assert members(result) == expected
    assert {each.reason for each in result.unpaired} == {"no pair names it"}
    assert len(result.unpaired) == 3 * 4
    crossed = match(stacks(2, 2), pairs={"a.enc.0.up.weight": ("b.net.1.up.weight", "c.net.0.up.weight")})
    assert members(crossed) == [[f"{name}.up.weight[whole]" for name in ("a.enc.0", "b.net.1", "c.net.0")]]


def test_what_a_pattern_finds_no_partner_for_stays_unpaired() -> None:
    models = stacks(2, 1)
    models["b"]["net"][0]["down"] = nn.Linear(4, 2)
    result = match(models, pairs={"a.enc.*.weight": "b.net.*.weight"})
    assert members(result) == [["a.enc.0.up.weight[whole]", "b.net.0.up.weight[whole]"]]
    reasons = {each.name: each.reason for each in result.unpaired}
    assert reasons["a.enc.1.up.weight"] == "no b.net.1.up.weight"
    assert reasons["a.enc.0.down.weight"] == (
        "other shape: a.enc.0.down.weight has (2, 3), b.net.0.down.weight has (2, 4)"
    )
    assert reasons["b.net.0.down.weight"] == reasons["a.enc.0.down.weight"]
    assert reasons["c.net.0.up.weight"] == "no pair names it"


def test_pairs_inside_one_model() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(6, 4), "decoder": nn.Linear(4, 6)})
    said = {("encoder.weight", OUTPUTS): ("decoder.weight", INPUTS)}
    assert match(model, pairs=said) == declare(model, equal=[[*said, *said.values()]])
    prefixed = {("m.encoder.weight", OUTPUTS): ("m.decoder.weight", INPUTS)}
    assert members(match({"m": model}, pairs=prefixed)) == [["m.encoder.weight[outputs]", "m.decoder.weight[inputs]"]]
    halves = match(model, pairs={("encoder.weight", OUTPUTS, range(2)): ("encoder.weight", OUTPUTS, range(2, 4))})
    assert halves == TiePlan([Tie.of("encoder.weight", OUTPUTS, [0, 1, 0, 1])])
    assert halves.pairs[0].paired == (4,)


def test_a_parameter_found_by_two_of_its_names_is_paired_once() -> None:
    models = {name: nn.ModuleDict({"x": nn.Linear(3, 3), "y": nn.Linear(3, 3)}) for name in "ab"}
    for model in models.values():
        model["y"].weight = model["x"].weight
    assert members(match(models, pairs={"a.*.weight": "b.*.weight"})) == [["a.x.weight[whole]", "b.x.weight[whole]"]]


def test_inputs_and_outputs_of_one_parameter_may_both_be_paired() -> None:
    models = {name: nn.Linear(4, 4, bias=False) for name in "abc"}
    result = match(
        models, pairs={("a.weight", OUTPUTS): ("b.weight", OUTPUTS), ("a.weight", INPUTS): ("c.weight", OUTPUTS)}
    )
    assert members(result) == [["a.weight[outputs]", "b.weight[outputs]"], ["a.weight[inputs]", "c.weight[outputs]"]]


# ---------------------------------------------------------------- what is equal already


def test_what_is_equal_is_found_across_models_and_inside_one() -> None:
    models = sites(3, 3)
    with torch.no_grad():
        models["b"].body[0].weight.copy_(models["a"].body[0].weight)
        models["b"].head.weight[:, 1] = models["b"].head.weight[:, 0]
    result = match(models, equal=True)
    assert ["a.body.0.weight[whole]", "b.body.0.weight[whole]"] in members(result)
    assert any(each[0].startswith("b.head.weight") for each in members(result))
    assert all((pair.cosine, pair.distance) == (pytest.approx(1, abs=1e-15), 0) for pair in result.pairs)
    assert {each.reason for each in result.unpaired} == {"equal to no other"}
    assert result.provenance == {"match": "what is equal"}
    alone = match(models["b"], equal=True)
    assert all(member.parameter[:2] != "b." for tie in alone for member in tie.members)


# ---------------------------------------------------------------- how well it agrees


def slow_agreement(tie: Tie, parameters: Mapping[str, Tensor]) -> tuple[float, float]:
    """Number by number, each group beside the first of its label."""
    groups = [row for m in tie.members for row in m.groups.read(parameters[m.parameter]).detach().double().tolist()]
    first: dict[int, list[float]] = {}
    xs: list[float] = []
    ys: list[float] = []
    for label, group in zip(tie.partition.labels.tolist(), groups, strict=True):
        if label in first:
            xs += group
            ys += first[label]
        elif label >= 0:
            first[label] = group
    norms = [math.sqrt(math.fsum(v * v for v in each)) for each in (xs, ys)]
    product = math.fsum(x * y for x, y in zip(xs, ys, strict=True))
    apart = math.sqrt(math.fsum((x - y) ** 2 for x, y in zip(xs, ys, strict=True)))
    return product / (norms[0] * norms[1]), apart / max(norms)


Agree = Callable[[Tie, Mapping[str, Tensor]], Pair]


def law_agreement(agree: Agree) -> None:
    models = wide()
    parameters = parameters_of(models)
    ties = [tie for said, _ in MAPS.values() for tie in match(models, pairs=said)]
    ties += [*match({"a": models["a"], "b": copy.deepcopy(models["a"]), "c": wide(2)["a"]})]
    ties.append(Tie.of("a.encoder.weight", OUTPUTS, [0, -1, 1, 0]))
    three = {"a": models["a"], "b": wide(1)["a"], "c": wide(2)["a"]}
    for tie in ties:
        known = parameters_of(three) if len(tie.members) == 3 else parameters
        pair = agree(tie, known)
        assert (pair.cosine, pair.distance) == pytest.approx(slow_agreement(tie, known), rel=1e-12)


def test_agreement_is_what_number_by_number_gives() -> None:
    law_agreement(match_module._agreement)


def of_all_groups(tie: Tie, parameters: Mapping[str, Tensor]) -> Pair:
    """Every group of the first member beside every group of the last, paired or not."""
    x, y = (tie.members[i].groups.read(parameters[tie.members[i].parameter]).detach().double() for i in (0, -1))
    n = min(len(x), len(y))
    x, y = x[:n].flatten(), y[:n].flatten()
    distance = float((x - y).norm() / max(x.norm(), y.norm()))
    return Pair(tie.members, (n, n), (n, n), float(torch.nn.functional.cosine_similarity(x, y, 0)), distance)


def in_single_precision(tie: Tie, parameters: Mapping[str, Tensor]) -> Pair:
    pair = match_module._agreement(tie, parameters)
    return Pair(
        pair.members, pair.groups, pair.paired, float(np.float32(pair.cosine)), float(np.float32(pair.distance))
    )


@pytest.mark.parametrize("broken", [of_all_groups, in_single_precision])
def test_other_agreements_fail_the_law(broken: Agree) -> None:
    with pytest.raises(AssertionError):
        law_agreement(broken)


def test_complex_numbers_agree_with_both_parts() -> None:
    models = {name: Hollow() for name in "ab"}
    for name, value in (("a", 3 + 4j), ("b", 3 - 4j)):
        models[name].weight = nn.Parameter(torch.tensor([value]))
    (pair,) = match(models).pairs
    assert (pair.cosine, pair.distance) == pytest.approx(((9 - 16) / 25, 8 / 5))


def test_zeros_agree_with_zeros_only() -> None:
    models = {name: nn.Linear(2, 2, bias=False) for name in "ab"}
    with torch.no_grad():
        models["a"].weight.zero_()
    pair = match(models).pairs[0]
    assert (pair.cosine, pair.distance) == (0, 1)
    with torch.no_grad():
        models["b"].weight.zero_()
    pair = match(models).pairs[0]
    assert (pair.cosine, pair.distance) == (1, 0)


def test_models_without_values_are_paired_all_the_same() -> None:
    models = sites(3, 3)
    meta = {name: copy.deepcopy(model).to("meta") for name, model in models.items()}
    assert match(meta) == match(models)
    assert all(math.isnan(pair.cosine) and math.isnan(pair.distance) for pair in match(meta).pairs)


# ---------------------------------------------------------------- a plan like others


def test_a_match_is_a_plan() -> None:
    models = sites(3, 4)
    result = match(models)
    plain = TiePlan(result.ties)
    assert result == plain
    assert plain == result
    assert len({result, plain}) == 1
    assert result != TiePlan(result.ties[1:])
    assert result != "a plan"
    assert isinstance(result, TiePlan)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_copies_keep_all_that_is_told(copied: Callable[[Match], Match]) -> None:
    result = match(sites(3, 4))
    other = copied(result)
    assert isinstance(other, Match)
    assert str(other) == str(result)
    assert (other.pairs, other.unpaired, other.aligned) == (result.pairs, result.unpaired, result.aligned)


def test_the_plan_is_saved(tmp_path: Path) -> None:
    result = match(sites(3, 4))
    result.save(tmp_path / "plan.safetensors")
    assert TiePlan.load(tmp_path / "plan.safetensors") == result


def test_all_is_shown_in_a_table() -> None:
    models = {"a": nn.Linear(3, 2), "b": nn.Linear(3, 4)}
    with torch.no_grad():
        for model in models.values():
            model.weight.fill_(0.5)
    shown = match(models, pairs={("a.weight", OUTPUTS): ("b.weight", OUTPUTS)})
    assert str(shown).splitlines() == [
        "Match (match: by a map)",
        "  pairs                                  groups          cosine  distance",
        "  a.weight[outputs] ~ b.weight[outputs]  2 of 2, 2 of 4  1.0000  0.0000",
        "  unpaired  shape  reason",
        "  a.bias    (2,)   no pair names it",
        "  b.bias    (4,)   no pair names it",
    ]


# ---------------------------------------------------------------- bad input


class Hollow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0, 3))


TWO = {"a": nn.Linear(3, 2), "b": nn.Linear(3, 4)}
SAME = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)}
EMPTY = {name: Hollow() for name in "ab"}
X = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("models", "said", "message"),
    [
        (nn.Linear(2, 2), {}, "models: expected at least two by name, got 1; write"),
        ({"a": nn.Linear(2, 2)}, {}, "models: expected at least two by name, got 1"),
        ({}, {}, "models: expected at least two by name, got 0"),
        (nn.Linear(2, 2), {"pairs": {"weight": "bias"}, "align": True}, "models: expected at least two"),
        ([nn.Linear(2, 2)], {}, "models: expected a module, or modules by name, got list"),
        (SAME, {"equal": True, "align": True}, "equal: expected it alone"),
        (SAME, {"equal": True, "pairs": {"a.*": "b.*"}}, "equal: expected it alone"),
        (SAME, {"by": "names"}, "by: expected 'weights' or 'activations', got 'names'"),
        (SAME, {"align": True}, "example_inputs: expected what the models take, for align=True, got None"),
        (SAME, {"align": True, "example_inputs": {"a": X}}, r"example_inputs: expected inputs for \['a', 'b', 'c'\]"),
        (SAME, {"align": True, "example_inputs": [X]}, r"example_inputs: expected tensors for 'a', got \(\[tensor"),
        (SAME, {"pairs": {}}, "pairs: expected a map with at least one entry"),
        (SAME, {"pairs": ["a.*"]}, "pairs: expected a map"),
        (SAME, {"pairs": {"a.*": 3}}, r"pairs: expected a name, \(name, Groups\) or \(name, Groups, range\), got 3"),
        (SAME, {"pairs": {("a.weight", OUTPUTS, 3): "b.weight"}}, "pairs: expected a name, .* got .*3"),
        (SAME, {"pairs": {"a.weight": ()}}, "pairs: expected a partner for a.weight, got none"),
        (SAME, {"pairs": {"a.wait": "b.weight"}}, "pairs: expected 'a.wait' to name a parameter, .* a.weight, a.bias"),
        (SAME, {"pairs": {"a.weight": "b.wait"}}, "pairs: expected 'b.wait' to name a parameter, got none"),
        (SAME, {"pairs": {"a.*": "d.*"}}, r"expected 'a\.\*' to find a partner, got none: pairs: expected 'd.weight'"),
        (SAME, {"pairs": {"a.*": "*.*"}}, r"expected as many stars in '\*\.\*' as in 'a\.\*', or none, got 2 and 1"),
        (SAME, {"pairs": {"a.*": "b.weight"}}, r"a.bias ~ b.weight: expected parameters of one shape, got \[\(4,\), "),
        (TWO, {"pairs": {"a.weight": "b.weight"}}, r"a.weight ~ b.weight: expected .* \[\(2, 3\), \(4, 3\)\]; to pair"),
        (TWO, {"pairs": {("a.weight", INPUTS): "b.weight"}}, r"of one length, got 2 in \(2, 3\), 4 in \(4, 3\); where"),
        (TWO, {"pairs": {("a.bias", INPUTS): "b.weight"}}, r"a.bias: Groups.inputs\(\): expected a parameter with"),
        (TWO, {"pairs": {("a.bias", Groups.elements()): "b.weight"}}, r"along as many axes, got \[1, 2\]"),
        (TWO, {"pairs": {("a.bias", Groups.whole(), range(2)): "b.bias"}}, "expected Groups that are several"),
        (TWO, {"pairs": {("a.bias", OUTPUTS, range(1, 3)): "b.bias"}}, "a.bias: expected outputs from 0 to 1, got"),
        (TWO, {"pairs": {("a.weight", FILTERS, range(9)): ("b.weight", FILTERS, range(9))}}, "filters from 0 to 1"),
        (EMPTY, {"pairs": {("a.weight", OUTPUTS): "b.weight"}}, "got none in a.weight, whose shape is"),
        (SAME, {"by": "activations"}, "by: expected it with align=True, got it without"),
        (SAME, {"example_inputs": X}, "example_inputs: expected it with align=True, got it without"),
        (TWO, {"pairs": {("a.bias", OUTPUTS, range(0)): "b.bias"}}, "expected the range of a.bias to choose as many"),
        (TWO, {"pairs": {("a.bias", OUTPUTS): ("b.bias", OUTPUTS, slice(1, 4))}}, r"got \(3,\) beside \(2,\)"),
        (SAME, {"pairs": {"a.weight": "a.weight"}}, r"a.weight\[whole\]: expected one partner .* it is one parameter"),
        (SAME, {"pairs": {"a.weight": ("b.weight", "b.weight")}}, r"b.weight\[whole\]: expected one partner for each"),
        (SAME, {"pairs": {"a.weight": "b.weight", "b.weight": "a.weight"}}, "expected one partner .* and a.weight"),
        (SAME, {"pairs": {"a.weight": "b.weight", "a.*": "c.*"}}, r"a.weight\[whole\]: expected one partner for each"),
        (SAME, {"pairs": {"a.weight": "c.weight", "b.weight": "c.weight"}}, r"c.weight\[whole\]: expected one partner"),
        (
            SAME,
            {"pairs": {("a.weight", OUTPUTS): "b.weight", "a.weight": "c.weight"}},
            r"a.weight: expected one way to read it, .* ~ c.weight\[whole\] and a.weight\[outputs\] ~ b",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(models: Any, said: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        match(models, **said)


def test_a_parameter_that_has_two_names_is_no_partner_of_itself() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(PlanError, match="it is one parameter"):
        match(model, pairs={"0.weight": "1.weight"})
