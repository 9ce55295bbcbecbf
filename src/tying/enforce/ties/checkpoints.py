"""A state dict on its way into a tied model: what contradicts a tie is refused, what is not tied yet translated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from tying.enforce.ties.bonds import Bond, Bonds, Place
from tying.enforce.ties.difference import difference
from tying.enforce.ties.expansion import Expansion
from tying.errors import TieError
from tying.plan import qualified


def prepare(
    bonds: Bonds, model: str, state: dict[str, Tensor], prefix: str, *, assign: bool
) -> list[tuple[Bond, frozenset[str]]]:
    """Check a state dict before it is loaded into one of the models.

    The checkpoint of a network that was not tied may have the plain weight where a computed one stands now: it is
    translated, provided that it obeys the tie. One that is to be assigned may have but one end of a tie: the other
    takes it, too.

    Returns:
        The bonds for which it has values, with the models whose state dicts have then brought these values.

    Raises:
        TieError: If the state dict has different values for what is one value, or if another model's state dict has
            just brought others.
    """
    arriving: list[tuple[Bond, frozenset[str]]] = []
    for bond in bonds.bonds:
        own = [place for place in bond.places if place.prefix == model and bonds.module_at(place) is not None]
        if len(bond.ties[0].members) > 1:  # inside one parameter labels are loaded with the values
            _refuse_other_labels(bond, own, state, prefix)
        _translate(bond, own, state, prefix)
        given = [(place, state[prefix + place.state_key]) for place in own if prefix + place.state_key in state]
        for place, tensor in given[1:]:
            _refuse_difference(bond, given[0][0].name, given[0][1], place.name, tensor)
        if given:
            before = _still_there(bond)
            if before and model not in before:
                _refuse_second_opinion(bond, before, *given[0])
            arriving.append((bond, frozenset({model}) if model in before else before | {model}))
            for place in own if assign else ():
                state.setdefault(prefix + place.state_key, given[0][1])
    return arriving


def _still_there(bond: Bond) -> frozenset[str]:
    """The models whose state dicts have brought the values that are stored now."""
    return bond.loaded[0] if bond.loaded is not None and bond.loaded[1] == bond.stored._version else frozenset()


def _refuse_second_opinion(bond: Bond, before: frozenset[str], place: Place, tensor: Tensor) -> None:
    """What the models have in common must be what the first of them has brought."""
    first = next(other for other in bond.places if other.prefix in before)
    both = [
        {label for p in bond.places if chosen(p.prefix) for label in bond.labels(p.member).tolist() if label >= 0}
        for chosen in (before.__contains__, place.prefix.__eq__)
    ]
    stored, common = bond.stored, both[0] & both[1]
    if len(common) < bond.ties[0].partition.classes:
        if tensor.shape != stored.shape or tensor.is_meta or stored.is_meta:
            return  # PyTorch tells the shapes
        chosen_values = torch.tensor(sorted(common), dtype=torch.int64)
        stored, tensor = (bond.values_in(each.detach().cpu())[chosen_values] for each in (stored, tensor))
    _refuse_difference(bond, f"{first.name}, as loaded just before", stored, place.name, tensor)


def _refuse_difference(bond: Bond, name: str, expected: Tensor, other: str, got: Tensor) -> None:
    if expected is got or expected.shape != got.shape or expected.is_meta or got.is_meta:
        return  # PyTorch tells the shapes
    wanted = bond.stored.dtype
    told = difference(name, expected.detach().to("cpu", wanted), other, got.detach().to("cpu", wanted))
    if told is not None:
        raise TieError(f"state_dict: {told}")


def _refuse_other_labels(bond: Bond, own: Sequence[Place], state: dict[str, Tensor], prefix: str) -> None:
    """Labels between several parameters are the plan's."""
    for place in own:
        for name, planned in _buffers(bond, place):
            given = state.get(prefix + name)
            if given is not None and not torch.equal(given.cpu(), planned):
                raise TieError(
                    f"{place.name}: expected a state dict with the labels of the tie in force, got others; untie_ the "
                    "models and tie_ them by the plan with which it was saved"
                )


def _buffers(bond: Bond, place: Place) -> list[tuple[str, Tensor]]:
    """The labels of a computed weight, by their names in a state dict, as the plan has them."""
    if not place.expanded:
        return []
    start = qualified(place.path, f"parametrizations.{place.leaf}.0")
    return [(f"{start}.{n}", b) for n, b in bond.expansion(place.member, torch.device("cpu")).named_buffers()]


def _translate(bond: Bond, own: Sequence[Place], state: dict[str, Tensor], prefix: str) -> None:
    """Put what is stored in the place of the plain weights of a network that was not tied."""
    plain = [p for p in own if p.expanded and prefix + p.key in state and prefix + p.state_key not in state]
    if not plain:
        return
    home = next((p for p in own if not p.expanded and prefix + p.key in state), None)
    values = bond.stored.detach().clone() if home is None else state[prefix + home.key].detach()
    expansions = {place: bond.expansion(place.member, values.device) for place in plain}
    for place in plain if home is None else ():
        values = _merged(expansions[place], values, state[prefix + place.key].detach().to(values))
    for place in plain:
        weight = state[prefix + place.key]
        expected = expansions[place](values).to(weight)
        told = difference(f"the {bond.ties[0].partition.classes} values of the tie", expected, place.name, weight)
        if told is not None:
            raise TieError(f"state_dict: {told}")
    for place in plain:
        del state[prefix + place.key]
        state[prefix + place.state_key] = values
        for name, planned in _buffers(bond, place):
            state.setdefault(prefix + name, planned)


def _merged(expansion: Expansion, stored: Tensor, weight: Tensor) -> Tensor:
    """What is stored, with the values that a weight has."""
    first, *rest = expansion.each_stage()
    if rest or first.complete:
        return expansion.right_inverse(weight)
    labels = cast(Tensor, first.labels)
    matrix = (stored if first.source is None else first.source[0].read(stored)).clone()
    matrix[labels[labels >= 0]] = first.groups.read(weight)[labels >= 0]
    return matrix if first.source is None else first.source[0].write(matrix, first.source[1])
