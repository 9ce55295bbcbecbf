"""Which ties hold, which broke and how; and those that broke made whole again where the values agree."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from tying.enforce.ties.bonds import Bond, Bonds, Place, chain_at, install, is_expansion
from tying.enforce.ties.difference import REMEDY, alike, difference
from tying.enforce.ties.steps import changed, kept, released
from tying.errors import TieError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What stands at a place now."""

    place: Place
    tensor: Tensor
    installed: bool
    """Whether the place reads a stored parameter; else it has a plain weight where an expanded one was."""


@dataclass(frozen=True)
class Diagnosis:
    """How a bond is."""

    bond: Bond
    found: tuple[Found, ...] = ()
    problem: str | None = None
    """Why it can't be mended."""
    reference: Found | None = None
    """What the others are compared with."""
    loaded: bool = False
    """Whether a state dict has just been loaded."""
    functional: bool = False
    """Whether tensors that are no parameters stand in for a while, as in `torch.func.functional_call`."""

    @property
    def holds(self) -> bool:
        """Whether all places read one tensor."""
        whole = all(f.installed for f in self.found) and len({id(f.tensor) for f in self.found}) <= 1
        return self.problem is None and (whole or self.functional)


def mend(bonds: Bonds, *, loaded: str | None = None) -> bool:
    """Mend every bond, or none; what was mended is logged. `loaded` as for `diagnose`.

    Returns:
        Whether tensors stand in for a while, so that nothing is to be remembered.

    Raises:
        TieError: Names the places whose values differ, with both values.
    """
    diagnoses = [diagnose(bonds, bond, loaded=loaded) for bond in bonds.bonds]
    for diagnosis in diagnoses:
        if diagnosis.problem is not None:
            raise TieError(diagnosis.problem)
    for diagnosis in diagnoses:
        _store(diagnosis, bonds)
        if not diagnosis.holds:
            _log.info("%s: stored once again", ", ".join(found.place.name for found in diagnosis.found))
    return any(diagnosis.functional for diagnosis in diagnoses)


def diagnose(bonds: Bonds, bond: Bond, *, loaded: str | None = None) -> Diagnosis:
    """Look at all places of a bond; nothing is changed.

    Args:
        bonds: What one call of `tie_` put in force.
        bond: One of them.
        loaded: The model into which a state dict has just been loaded: what it brought are the values of all.
    """
    found: list[Found] = []
    for place in bonds.present(bond):
        what = _look(bonds, place)
        if isinstance(what, str):
            return Diagnosis(bond, problem=f"{place.name}: expected the weight {_tied_with(bond, place)}, got {what}")
        found.append(what)
    if not found:  # all its places are in models that are not here
        return Diagnosis(bond)
    if torch.compiler.is_compiling() or any(not isinstance(f.tensor, nn.Parameter) for f in found):
        return Diagnosis(bond, tuple(found), _apart_in_one_model(found) or _trained_apart(found), functional=True)
    reference = _reference(bond, found, loaded)
    return Diagnosis(bond, tuple(found), _disagreement(bond, found, reference, loaded), reference, loaded is not None)


def _look(bonds: Bonds, place: Place) -> Found | str:
    module = bonds.module_at(place)
    if module is None:
        return f"a model without {place.path!r}; put the module back, or call untie_"
    chain = chain_at(module, place.leaf)
    own = module._parameters.get(place.leaf)  # pyright: ignore[reportPrivateUsage]
    if chain is not None:
        if place.expanded and is_expansion(chain) and len(chain) == 1:
            return Found(place, chain.original, True)
        kinds = ", ".join(type(p).__name__ for p in chain)
        return f"one computed by other parametrizations ({kinds}); remove them, or untie_ before you parametrize"
    if own is None:
        moved = f"{place.leaf}_orig" in module._parameters  # pyright: ignore[reportPrivateUsage]
        why = "pruned by torch.nn.utils.prune" if moved else "gone"
        return f"one that is {why}; put the parameter back, or untie_ before you change it"
    return Found(place, own, not place.expanded)


def _tied_with(bond: Bond, place: Place) -> str:
    others = [other.name for other in bond.places if other != place]
    return f"tied with {', '.join(others)}" if others else "that is stored once"


def _apart_in_one_model(found: list[Found]) -> str | None:
    """While tensors stand in, the places of each model must still have one."""
    for one in found:
        for other in found:
            if one.place.prefix == other.place.prefix and one.tensor is not other.tensor:
                return (
                    f"{other.place.name}: expected the tensor that stands in for {one.place.name}, to which it is "
                    "tied, got another; pass the same tensor for both"
                )
    return None


def _trained_apart(found: list[Found]) -> str | None:
    """Tensors may stand in for one of several tied models, but not to be trained there."""
    trained = [f for f in found if f.tensor.requires_grad and not isinstance(f.tensor, nn.Parameter)]
    others = [f for f in found if isinstance(f.tensor, nn.Parameter)]
    if not (trained and others and torch.is_grad_enabled()):
        return None
    return (
        f"{trained[0].place.name}: expected to be trained together with {others[0].place.name}, to which it is "
        "tied, got a tensor that stands in for it alone; call a module that holds all of them, run this "
        "one under torch.no_grad(), or untie_ it"
    )


def _without_values(bond: Bond, reference: Tensor) -> bool:
    """Whether memory was given to a parameter of the meta device, and nothing written to it."""
    return bond.stored.is_meta and not reference.is_meta and reference._version == 0


def _disagreement(bond: Bond, found: list[Found], reference: Found | None, loaded: str | None) -> str | None:
    """Say which places have different values, or None."""
    if reference is None:
        names = ", ".join(f.place.name for f in found)
        return f"{names}: expected at least one that holds the stored values, got none; {REMEDY}"
    if bond.computes and tuple(reference.tensor.shape) != bond.shape:
        return (
            f"{reference.place.name}: expected what is stored for it, of shape {bond.shape}, got "
            f"{tuple(reference.tensor.shape)}; untie_ before you change shapes, and tie_ again"
        )
    if loaded is None and _without_values(bond, reference.tensor):
        return (
            f"{reference.place.name}: expected values, got memory that to_empty gave and nobody has written "
            "to; load a state dict, or set what is stored"
        )
    brought = loaded is not None and reference.tensor is not bond.stored
    for other in found:
        if other.installed and (other.tensor is reference.tensor or (brought and other.tensor is bond.stored)):
            continue
        if loaded is not None and other.place.prefix != loaded and _without_values(bond, other.tensor):
            continue
        expected = reference.tensor
        if not other.installed:
            with torch.no_grad():
                expected = bond.expansion(other.place.member, expected.device).to(expected.device)(expected)
            if other.tensor.grad is not None:
                return (
                    f"{other.place.name}: expected no gradient of a weight that is to be computed again, got one; call "
                    "zero_grad first"
                )
        told = difference(reference.place.name, expected, other.place.name, other.tensor)
        if told is not None:
            return told
    return None


def _reference(bond: Bond, found: list[Found], loaded: str | None) -> Found | None:
    """What a state dict has brought; else the stored parameter where it still stands somewhere."""
    installed = [f for f in found if f.installed]
    brought = [f for f in installed if f.place.prefix == loaded and f.tensor is not bond.stored]
    stored = [f for f in installed if f.tensor is bond.stored]
    return next(iter([*brought, *stored, *installed]), None)


def _store(diagnosis: Diagnosis, bonds: Bonds) -> None:
    """Make all places of a bond read one parameter: the stored one, which optimizers know, where it can be."""
    bond, found = diagnosis.bond, diagnosis.found
    if diagnosis.functional or not found:
        return
    reference = cast(Found, diagnosis.reference)
    if reference.tensor is not bond.stored:
        replaced = diagnosis.holds and not diagnosis.loaded
        if replaced or bond.stored.is_meta or not alike(bond.stored, reference.tensor):
            _adopt(bond, cast(nn.Parameter, reference.tensor))
        else:
            with torch.no_grad():
                bond.stored.copy_(reference.tensor)
    kept(bond.stored)
    for place, tensor, installed in ((f.place, f.tensor, f.installed) for f in found):
        if installed and tensor is not bond.stored and tensor.grad is not None:
            bond.stored.grad = tensor.grad if bond.stored.grad is None else bond.stored.grad + tensor.grad
        module = cast(nn.Module, bonds.module_at(place))
        if not installed:
            install(module, place, bond)
        elif tensor is not bond.stored:
            if place.expanded:
                chain_at(module, place.leaf).original = bond.stored
            else:
                setattr(module, place.leaf, bond.stored)
        if tensor is not bond.stored:
            released(tensor, place.name)


def _adopt(bond: Bond, parameter: nn.Parameter) -> None:
    """Take what stands in all places for what is stored; a shard and the whole take turns, and both are in use."""
    if not any(hasattr(p, "to_local") for p in (bond.stored, parameter)):
        released(bond.stored, bond.places[0].name)
    bond.adopt(parameter)
    changed()
