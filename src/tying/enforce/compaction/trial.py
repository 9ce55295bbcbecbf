"""What a graph can't tell is tried: heads, groups and channels of an RMSNorm go if the network computes the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from tying.enforce.compaction.adapt import Attributes, attributes_kept, fitting, set_attributes_
from tying.enforce.compaction.reduction import Compaction
from tying.errors import CompactError


def tried(
    model: nn.Module,
    reduced: Callable[[Mapping[int, str]], Compaction],
    build: Callable[[Compaction], nn.Module],
    check: Callable[[nn.Module, bool], None],
) -> tuple[Compaction, bool]:
    """Return a compaction whose heads and the like could be cut, and whether it has been compared.

    Args:
        model: As it was before. Not written to.
        reduced: The compaction, given the reasons why some channels (by number) must stay.
        build: The network after a compaction.
        check: Raises CompactError unless that network computes the same; on small inputs too if a norm changed.
    """
    compaction = reduced({})
    if not compaction.changes:
        return compaction, False
    try:
        return _fitted(model, compaction, build, check), True
    except CompactError as error:
        kinds = _kinds(model, compaction)
        refused = _refused(compaction, kinds, str(error)) if len(kinds) == 1 else {}
    for kind in kinds if len(kinds) > 1 else ():
        others = _refused(compaction, {k: v for k, v in kinds.items() if k != kind}, "tried later")
        try:
            _fitted(model, reduced(others), build, check)
        except CompactError as error:
            refused |= _refused(compaction, {kind: kinds[kind]}, str(error))
    compaction = reduced(refused)
    try:
        return (_fitted(model, compaction, build, check), True) if compaction.changes else (compaction, False)
    except CompactError as error:
        return reduced(refused | _refused(compaction, _kinds(model, compaction), str(error))), False


def _fitted(
    model: nn.Module,
    compaction: Compaction,
    build: Callable[[Compaction], nn.Module],
    check: Callable[[nn.Module, bool], None],
) -> Compaction:
    """The compaction with attributes that fit.

    Raises:
        CompactError: If none do.
    """
    network, norms = build(compaction), bool(compaction.attributes)

    def fits(attributes: Attributes) -> None:
        with attributes_kept(network):
            set_attributes_(network, attributes)
            check(network, norms)

    changes = list(dict.fromkeys(change for each in compaction.changes.values() for change in each))
    found = fitting(model, changes, fits, compaction.attributes)
    if found:
        paths = dict.fromkeys([*found, *compaction.attributes])
        both = {path: {**found.get(path, {}), **compaction.attributes.get(path, {})} for path in paths}
        compaction = replace(compaction, attributes=both)
        check(build(compaction), norms)  # without what a forward kept from a trial
    return compaction


def _kinds(model: nn.Module, compaction: Compaction) -> dict[type, list[int]]:
    """The channels that have to be tried, by the class of the module that counts them."""
    kinds: dict[type, list[int]] = {}
    for number, (change, *_) in compaction.changes.items():
        kinds.setdefault(type(model.get_submodule(change.modules[0])), []).append(number)
    return kinds


def _refused(compaction: Compaction, kinds: Mapping[type, list[int]], why: str) -> dict[int, str]:
    """The reason for each channel of these kinds."""
    told: dict[int, str] = {}
    for number in (number for numbers in kinds.values() for number in numbers):
        module = compaction.changes[number][0].modules[0]
        told[number] = (
            f"the forward of {module or 'the model'!r} needs sizes that none of its attributes gives "
            f"({why.split('; ')[0]})"
        )
    return told
