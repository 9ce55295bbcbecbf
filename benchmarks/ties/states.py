"""Values that come from elsewhere into tied models: state dicts, empty memory, initialisation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.ties.cases import Subject, both_ends, dense, plan_of, share_by_hand, tied, untied
from benchmarks.ties.verdict import ChangedError, Expected
from tying.enforce.ties.tie import tie_


def through_meta(subject: Subject) -> None:
    """Everything to the meta device, empty memory, the weights from a checkpoint."""
    for model in subject.models.values():
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.to("meta")
        model.to_empty(device="cpu")
        model.load_state_dict(state)


def from_meta(subject: Subject) -> Expected:
    states = {key: m.state_dict() for key, m in tied(subject.kind, subject.column, 1).models.items()}
    for key, model in subject.models.items():
        model.to_empty(device="cpu")
        model.load_state_dict(states[key])
    return Expected(dense(subject.kind, 1))


def from_meta_assigned(subject: Subject) -> Expected:
    states = {key: m.state_dict() for key, m in tied(subject.kind, subject.column, 1).models.items()}
    for key, model in subject.models.items():
        model.load_state_dict(states[key], assign=True)
    return Expected(dense(subject.kind, 1))


def emptied_and_reset(subject: Subject) -> Expected:
    """Each layer draws its own weights, as after a start on the meta device."""
    for model in subject.models.values():
        model.to_empty(device="cpu")
    return reset(subject)


def reset(subject: Subject) -> Expected:
    def draw(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    torch.manual_seed(3)
    was = subject.weights()
    for model in subject.models.values():
        model.apply(draw)
    now = subject.weights()
    for name in both_ends(subject):
        if torch.equal(was[name], now[name]):
            raise ChangedError(f"{name}: reset_parameters changed nothing")
    return Expected(now)


def _states(subject: Subject) -> dict[str, dict[str, Tensor]]:
    """The state of another case of the same kind, tied in the same way, as it comes from a file: every name its own."""
    other = tied(subject.kind, subject.column, 1).models
    return {key: {name: v.detach().clone() for name, v in m.state_dict().items()} for key, m in other.items()}


def _end_names(subject: Subject, which: int, states: dict[str, dict[str, Tensor]]) -> tuple[str, list[str]]:
    """The key of the model and the names in its state of what the end is made of (labels left out)."""
    key = next(k for k, m in subject.models.items() if m is subject.holder(which)[0])
    leaf = subject.holder(which)[1]
    names = [n for n, v in states[key].items() if n.startswith(f"{leaf}.") and v.is_floating_point()]
    return key, names


def loaded(assign: bool = False) -> Callable[[Subject], Expected]:
    def act(subject: Subject) -> Expected:
        for key, state in _states(subject).items():
            subject.models[key].load_state_dict(state, assign=assign)
        return Expected(dense(subject.kind, 1))

    return act


def loaded_different(assign: bool = False) -> Callable[[Subject], None]:
    """The two names of a tie hold different values; inside one parameter: groups that are to be equal differ."""

    def act(subject: Subject) -> None:
        if subject.kind == "inside":
            weight = dense("inside", 1)["encoder.weight"]
            weight[:, 0] += 1
            _load_plain(subject, {"": {**_plain_states(subject)[""], "encoder.weight": weight}}, assign=assign)
            return
        states = _states(subject)
        key, names = _end_names(subject, 1, states)
        for name in names:
            states[key][name] = states[key][name] + 1
        for key, state in states.items():
            subject.models[key].load_state_dict(state, assign=assign)

    return act


def loaded_without(which: int, assign: bool = False) -> Callable[[Subject], Expected]:
    """One of the two names is missing."""

    def act(subject: Subject) -> Expected:
        states = _states(subject)
        key, names = _end_names(subject, which, states)
        for name in names:
            del states[key][name]
        for key, state in states.items():
            subject.models[key].load_state_dict(state, strict=False, assign=assign)
        expected = dense(subject.kind, 1)
        if subject.kind == "inside":
            expected["encoder.weight"] = dense("inside", 0)["encoder.weight"]
        return Expected(expected)

    return act


def _plain_states(subject: Subject) -> dict[str, dict[str, Tensor]]:
    return {key: {n: v.clone() for n, v in m.state_dict().items()} for key, m in untied(subject.kind, 1).items()}


def _load_plain(subject: Subject, states: dict[str, dict[str, Tensor]], assign: bool = False) -> None:
    for key, state in states.items():
        subject.models[key].load_state_dict(state, assign=assign)


def loaded_from_untied(subject: Subject) -> Expected:
    """A checkpoint of the networks before they were tied, whose ends happen to be equal."""
    _load_plain(subject, _plain_states(subject))
    return Expected(dense(subject.kind, 1))


def loaded_into_untied(subject: Subject) -> None:
    """The tied networks' state in new networks, which are then tied."""
    fresh = untied(subject.kind, 1)
    for key, model in subject.models.items():
        fresh[key].load_state_dict(model.state_dict())
    subject.models = fresh
    tied_twice(subject)


def tied_twice(subject: Subject) -> None:
    if subject.ours:
        tie_(subject.handed, plan_of(subject.kind))
    else:
        share_by_hand(subject.kind, subject.models)


def as_vector(subject: Subject) -> Expected:
    """All parameters as one vector and back, half as long."""
    for model in subject.models.values():
        vector = nn.utils.parameters_to_vector(model.parameters())
        nn.utils.vector_to_parameters(vector.detach() / 2, model.parameters())
    values = dense(subject.kind, 0)
    if subject.kind == "models":  # halved through each model
        both = both_ends(subject)
        return Expected({name: v / (4 if name in both else 2) for name, v in values.items()})
    return Expected({name: v / 2 for name, v in values.items()})
