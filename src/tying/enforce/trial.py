"""What a graph can't tell is tried: heads, groups and channels of an RMSNorm go if the network computes the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from tying.enforce.adapt import Attributes, fitting
from tying.enforce.reduction import Compaction
from tying.errors import CompactError


def tried(
    model: nn.Module,
    reduced: Callable[[Mapping[int, str]], Compaction],
    check: Callable[[Compaction], None],
) -> tuple[Compaction, bool]:
    """Return a compaction whose heads and the like could be cut, and whether it has been compared.

    Args:
        model: As it was before. Not written to.
        reduced: The compaction, given the reasons why some channels (by number) must stay.
        check: Raises CompactError unless the network after a compaction computes the same as before.
    """
    compaction = reduced({})
    if not compaction.changes:
        return compaction, False
    try:
        return _fitted(model, compaction, check), True
    except CompactError as error:
        kinds = _kinds(model, compaction)
        refused = _refused(compaction, kinds, str(error)) if len(kinds) == 1 else {}
    for kind in kinds if len(kinds) > 1 else ():
        others = _refused(compaction, {k: v for k, v in kinds.items() if k != kind}, "tried later")
        try:
            _fitted(model, reduced(others), check)
        except CompactError as error:
            refused |= _refused(compaction, {kind: kinds[kind]}, str(error))
    compaction = reduced(refused)
    try:
        return (_fitted(model, compaction, check), True) if compaction.changes else (compaction, False)
    except CompactError as error:
        return reduced(refused | _refused(compaction, _kinds(model, compaction), str(error))), False


def _fitted(model: nn.Module, compaction: Compaction, check: Callable[[Compaction], None]) -> Compaction:
    """The compaction with attributes that fit.

    Raises:
        CompactError: If none do.
    """

    def whole(attributes: Attributes) -> Compaction:
        paths = dict.fromkeys([*attributes, *compaction.attributes])
        both = {path: {**attributes.get(path, {}), **compaction.attributes.get(path, {})} for path in paths}
        return replace(compaction, attributes=both)

    changes = list(dict.fromkeys(change for change in compaction.changes.values() if change.sizes))
    if not changes:
        check(compaction)
        return compaction
    return whole(fitting(model, changes, lambda attributes: check(whole(attributes))))


def _kinds(model: nn.Module, compaction: Compaction) -> dict[type, list[int]]:
    """The channels that have to be tried, by the class of the module that counts them."""
    kinds: dict[type, list[int]] = {}
    for number, change in compaction.changes.items():
        kinds.setdefault(type(model.get_submodule(change.modules[0])), []).append(number)
    return kinds


def _refused(compaction: Compaction, kinds: Mapping[type, list[int]], why: str) -> dict[int, str]:
    """The reason for each channel of these kinds."""
    return {
        number: f"the forward of {compaction.changes[number].modules[0] or 'the model'!r} needs sizes that none of its "
        f"attributes gives ({why.split('; ')[0]})"
        for numbers in kinds.values()
        for number in numbers
    }
