"""Plans from prior knowledge: what is declared equal is equal once projected, and nothing else is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tying import declare, match
from tying.errors import PlanError
from tying.groups import Groups
from tying.plan import Member, Partition, Tie, TiePlan
from tying.train.soft import SoftTie

INPUTS, OUTPUTS, WHOLE = Groups.inputs(), Groups.outputs(), Groups.whole()


def blocks() -> nn.ModuleDict:
    """Three blocks alike, an encoder with its decoder, and what ends differently."""
    torch.manual_seed(0)
    each = [nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)}) for _ in range(3)]
    return nn.ModuleDict(
        {
            "blocks": nn.ModuleList(each),
            "encoder": nn.Linear(8, 3),
            "decoder": nn.Linear(3, 8),
            "conv": nn.Conv2d(3, 8, 1),
            "norm": nn.LayerNorm(4),
        }
    ).double()


UP = [f"blocks.{i}.up.weight" for i in range(3)]
DOWN = [f"blocks.{i}.down.weight" for i in range(3)]

CASES: dict[str, tuple[Sequence[Sequence[Any]], Callable[[Mapping[str, Tensor]], list[list[Tensor]]]]] = {
    # what is declared, and which tensors must be equal then
    "names": ([UP], lambda w: [[w[name] for name in UP]]),
    "patterns": (
        [["blocks.*.up.weight"], ["blocks.[01].down.weight", "blocks.2.down.weight"], ["blocks.*.up.bias"]],
        lambda w: [[w[name] for name in UP], [w[name] for name in DOWN], [w[f"blocks.{i}.up.bias"] for i in range(3)]],
    ),
    "transposed": (
        [[("encoder.weight", OUTPUTS), ("decoder.weight", INPUTS)]],
        lambda w: [[w["encoder.weight"], w["decoder.weight"].T]],
    ),
    "transposed, in a pattern": (
        [[("blocks.*.up.weight", OUTPUTS), ("blocks.*.down.weight", INPUTS)]],
        lambda w: [[w[name] for name in UP] + [w[name].T for name in DOWN]],
    ),
    "a convolution of 1×1 with a linear layer": (
        [[("conv.weight", OUTPUTS), ("decoder.weight", OUTPUTS)]],
        lambda w: [[w["conv.weight"][:, :, 0, 0], w["decoder.weight"]]],
    ),
    "types": (
        [[(nn.Conv2d, INPUTS), ("decoder.weight", INPUTS)]],
        lambda w: [[w["conv.weight"][:, :, 0, 0], w["decoder.weight"]]],
    ),
    "filters": (
        [[("encoder.weight", Groups.filters()), ("decoder.weight", Groups.filters())]],
        lambda w: [[w["encoder.weight"].flatten(), w["decoder.weight"].flatten()]],
    ),
    "nothing": ([], lambda w: []),
}

Declare = Callable[..., TiePlan]


def law_equal(say: Declare, name: str) -> None:
    """Projected: equal, each the mean of what they were; all else as it was."""
    declared, equal = CASES[name]
    model = blocks()
    weights = dict(model.named_parameters())
    plan = say(model, equal=declared)
    after = {**weights, **plan.project(weights)}
    for before_set, after_set in zip(equal(weights), equal(after), strict=True):
        mean = torch.stack([tensor.detach() for tensor in before_set]).mean(0)
        for tensor in after_set:
            torch.testing.assert_close(tensor, mean, rtol=1e-13, atol=1e-14)
    touched = {id(weights[name]) for tie in plan for name in (m.parameter for m in tie.members)}
    named = sum(len(each) for each in equal(weights))
    assert len(touched) == named


@pytest.mark.parametrize("name", CASES)
def test_what_is_declared_equal_becomes_equal(name: str) -> None:
    law_equal(declare, name)


def reading_the_whole(model: nn.Module, *, equal: Sequence[Sequence[Any]]) -> TiePlan:
    """The Groups are forgotten: the numbers are as many, but not in the same order."""
    names = [[s[0] if isinstance(s, tuple) else s for s in selectors] for selectors in equal]
    members = [[Member(name, Groups.elements()) for name in selectors] for selectors in names]
    sizes = [model.get_parameter(each[0].parameter).numel() for each in members]
    return TiePlan([Tie(tuple(m), Partition(list(range(n)) * len(m))) for m, n in zip(members, sizes, strict=True)])


def the_first_two(model: nn.Module, *, equal: Sequence[Sequence[Any]]) -> TiePlan:
    plan = declare(model, equal=equal)
    return TiePlan([Tie(t.members[:2], Partition(t.partition.labels[: 2 * t.partition.classes])) for t in plan])


@pytest.mark.parametrize(("broken", "name"), [(reading_the_whole, "transposed"), (the_first_two, "patterns")])
def test_declaring_in_other_ways_fails_the_law(broken: Declare, name: str) -> None:
    with pytest.raises(AssertionError):
        law_equal(broken, name)


def test_labels_are_taken_as_they_are() -> None:
    plan = declare(
        blocks(),
        labels={("encoder.weight", INPUTS): [0, 0, 1, -1, 1, 2, 2, 2], ("conv.weight", OUTPUTS): torch.arange(8) // 2},
        equal=[["blocks.0.up.weight", "blocks.1.up.weight"]],
    )
    assert plan == TiePlan(
        [
            Tie.of("encoder.weight", INPUTS, [0, 0, 1, -1, 1, 2, 2, 2]),
            Tie.of("conv.weight", OUTPUTS, [0, 0, 1, 1, 2, 2, 3, 3]),
            Tie((Member(UP[0], WHOLE), Member(UP[1], WHOLE)), Partition([0, 0])),
        ]
    )
    assert dict(plan.provenance) == {"declare": "by hand"}


def test_a_weight_that_is_shared_already_is_one_parameter() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    assert [str(m) for m in declare(model, equal=[[nn.Linear]]).ties[0].members] == [
        "0.weight[whole]",
        "1.weight[whole]",
    ]


def test_a_shared_weight_goes_by_any_of_its_names() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    plan = declare(model, labels={("1.weight", INPUTS): [0, 0, 1]})
    assert plan == TiePlan([Tie.of("1.weight", INPUTS, [0, 0, 1])])
    with pytest.raises(PlanError, match=r"at least two parameters for 0\.weight, 1\.weight, got 1"):
        declare(model, equal=[["0.weight", "1.weight"]])


def test_names_over_several_models_are_declared_likewise() -> None:
    models = {"a": blocks(), "b": blocks(), "c": nn.Linear(4, 6).double()}
    plan = declare(models, equal=[["?.blocks.0.up.weight", "c.weight"], [("*.encoder.weight", OUTPUTS)], [nn.Conv2d]])
    assert [[str(member) for member in tie.members] for tie in plan] == [
        ["a.blocks.0.up.weight[whole]", "b.blocks.0.up.weight[whole]", "c.weight[whole]"],
        ["a.encoder.weight[outputs]", "b.encoder.weight[outputs]"],
        ["a.conv.weight[whole]", "b.conv.weight[whole]"],
    ]
    models["b"].conv.weight = models["a"].conv.weight
    assert declare(models, equal=[[nn.Conv2d]]).ties[0] == plan.ties[2]


def test_a_bare_layer_has_a_weight_by_type() -> None:
    with pytest.raises(PlanError, match=r"equal: expected at least two parameters for <class .*Linear'>, got 1; widen"):
        declare(nn.Linear(2, 2), equal=[[nn.Linear]])


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"equal": [["nothing.*", "encoder.weight"]]}, r"nothing\.\*: expected to match .* got none; the model has"),
        ({"equal": [[nn.LSTM, nn.Linear]]}, "LSTM'>: expected to match a parameter of the model, got none"),
        ({"equal": [["encoder.weight"]]}, r"equal: expected at least two parameters for encoder\.weight, got 1; widen"),
        ({"equal": ["encoder.weight", "decoder.weight"]}, "equal: expected sets .*, got the name 'encoder.weight'"),
        ({"equal": [[]]}, "equal: expected at least two parameters for , got 0"),
        ({"equal": [["encoder.weight", "decoder.weight"]]}, r"got \[\(3, 8\), \(8, 3\)\]; for a transposed tie"),
        ({"equal": [["encoder.weight", "norm.weight"]]}, r"encoder.weight\[whole\] ~ norm.weight\[whole\]: expected"),
        ({"equal": [["blocks.*.up.*"]]}, r"blocks.0.up.weight\[whole\] ~ .*: expected parameters of one shape"),
        (
            {"equal": [[("encoder.weight", INPUTS), ("decoder.weight", INPUTS)]]},
            r"encoder.weight\[inputs\] ~ decoder.weight\[inputs\]: expected as many groups .* \[8, 3\]; choose",
        ),
        (
            {"equal": [[("encoder.weight", INPUTS), ("blocks.0.up.weight", OUTPUTS)]]},
            r"expected as many groups in each, got \[8, 6\]",
        ),
        ({"equal": [["encoder.weight", "encoder.*ght"]]}, "Tie.members: expected distinct members"),
        ({"equal": [[("encoder.bias", INPUTS), ("decoder.bias", INPUTS)]]}, r"Groups.inputs\(\): expected a"),
        ({"equal": [UP[:2], UP[1:]]}, r"blocks.1.up.weight\[whole\]: expected one tie, got several"),
        ({"labels": {("encoder.weight", INPUTS): [0, 1, 2]}}, r"encoder.weight\[inputs\]: expected 8 labels, .* got 3"),
        ({"labels": {"encoder.weight": [0] * 8}}, "labels: expected a parameter's name and its Groups as key"),
        ({"labels": {("encoder.weight", INPUTS): [0.5] * 8}}, "labels: expected one integer per group"),
        ({"labels": {("encoder.weight", INPUTS): [-3] * 8}}, r"labels: expected −1 \(pruned\) or a label ≥ 0, got -3"),
        ({"labels": {("encodr.weight", INPUTS): [0] * 8}}, "encodr.weight: expected a parameter of the model"),
        ({"labels": {("encoder.bias", INPUTS): [0] * 3}}, r"Groups.inputs\(\): expected a parameter with at least 2"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name_and_the_model_stays(said: dict[str, Any], message: str) -> None:
    model = blocks()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=message):
        declare(model, **said)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_name_stands_for_itself_though_a_pattern_could_be_read_in_it() -> None:
    model = nn.ModuleDict({"heads[0]": nn.Linear(2, 2), "heads0": nn.Linear(2, 2), "heads1": nn.Linear(2, 2)})
    plan = declare(model, equal=[["heads[0].weight", "heads1.weight"]])
    assert [member.parameter for member in plan.ties[0].members] == ["heads[0].weight", "heads1.weight"]
    soft = SoftTie(plan, {"heads[0].weight": 2.0})
    assert soft(model).item() > 0
    pairs = {"a.heads[0].weight": "b.heads[0].weight"}
    matched = match({"a": model, "b": copy.deepcopy(model)}, pairs=pairs)
    assert [member.parameter for member in matched.ties[0].members] == ["a.heads[0].weight", "b.heads[0].weight"]
