"""One valid `.safetensors` file: each value once, labels packed, and how to build the smaller networks again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from tying.enforce.compaction.description import Description, describe, rebuild
from tying.errors import FileError, PlanError, TyingError
from tying.files.atomic import write_atomically
from tying.files.sealed import seal, unseal
from tying.models import Models, by_name
from tying.plan import TiePlan
from tying.store import before
from tying.store.bundle import below, only, prefixed, tie_within, together, wanted
from tying.store.record import Understood, Written, state_of, tie_of, with_known, without_known
from tying.store.state import State, check_not_outgrown, check_transient, collect, fill, is_dense, refuse_lazy
from tying.store.ties import Tied, in_force, known_gradient, tie_again_, untied
from tying.store.unique import plan_in_force, unique_set

KIND, VERSION = "tying.model", 2
"""Version 1 is of one network without ties of `tie_`; 2 has several, and ties across parameters."""


_ANOTHER = "expected the architecture that was saved, got another"


def save(models: Models, path: str | Path, *, plan: TiePlan | None = None) -> None:
    """Write a network, or several as a bundle, as one `.safetensors` file: each tensor once, ties once.

    In the file: every tensor of the state dicts once, however many names it has in however many networks, in its own
    dtype; the values of tied layers, `(out, K, …)`; weights tied by `tie_`, and weights that obey the `plan` bit for
    bit, with one group per label; integer and boolean buffers (labels among them) packed in ⌈log2 K⌉ bits. As metadata,
    in JSON: the architectures, what is shared or frozen, the plan, a sum of everything. No pickle. The same networks
    give the same bytes. The inverse is `load`, of all or of each by itself.

    Args:
        models: One network, or several by name: `{"a": model_a, "b": model_b}`. Any dtype, device and mode; not
            written to.
        path: The file appears whole or not at all: a full disk or Ctrl-C leaves the old one.
        plan: Kept with the network, for `tying.store.load_plan`, also where it speaks of the network before
            compacting; without one, the ties in force. Of `match(models, equal=True)`, it stores once what is equal
            and not yet tied.

    Raises:
        FileError: If the state dict holds what safetensors or JSON can't.
        PlanError: If the models are not a network, or networks by names without dots.
        TieError: If a tie is broken, and values differ that should be one.
        OSError: If the disk is full, or the folder missing or not writable.

    Example:
        >>> import tempfile, os
        >>> from tying.nn import TiedLinear
        >>> small = nn.Sequential(TiedLinear([0, 0, 1, -1], 3), nn.ReLU(), nn.Linear(3, 2))
        >>> path = os.path.join(tempfile.mkdtemp(), "small.safetensors")
        >>> save(small, path)
        >>> again = load(path, nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        >>> x = torch.randn(5, 4)
        >>> torch.equal(again(x), small(x))
        True
    """
    write_atomically(path, encode(models, plan=plan))


def encode(models: Models, *, plan: TiePlan | None = None) -> bytes:
    """Return the bytes that `save` writes."""
    if not by_name(models):
        raise PlanError('models: expected at least one, got none; write {"a": model_a, "b": model_b}')
    ties, plain = in_force(models), untied(models)
    whole = together(plain)
    state = collect(whole)
    unique = unique_set(whole, state, (*(tie for tie, _ in ties), *(plan or ())))
    hidden = {member.parameter for step in unique.steps for member in step.tie.members}
    written = Written()
    for name, tensor in {**state.tensors, **unique.parameters}.items():
        if name not in hidden or name in unique.parameters:
            written.put(name, tensor)
    places = {tie: place for place, (tie, _) in enumerate(ties)}
    record = {
        "models": [] if isinstance(models, nn.Module) else list(models),
        "architecture": without_known(_described(plain), state),
        "aliases": dict(state.aliases),
        "views": {name: [v.base, v.shape, v.strides, v.offset] for name, v in state.views.items()},
        "strides": {
            name: tensor.stride()
            for name, tensor in state.tensors.items()
            if not tensor.is_contiguous() and is_dense(tensor)
        },
        "frozen": sorted(state.frozen),
        "extra": dict(state.extra),
        "transient": dict(state.transient),
        "steps": [
            [places[step.tie] if step.tie in places else written.tie(step.tie), step.shapes] for step in unique.steps
        ],
        "ties": [[written.tie(tie), gradient] for tie, gradient in ties],
        "plan": written.plan(plan if plan is not None else plan_in_force(whole)),
        "plan given": plan is not None,
        "packed": written.packed,
        "labels": written.labels,
    }
    version = VERSION if record["models"] or record["ties"] else 1
    return seal(written.tensors, {k: v for k, v in record.items() if v}, kind=KIND, version=version)


@overload
def load(path: str | Path, models: nn.Module, *, name: str | None = None) -> nn.Module: ...
@overload
def load(path: str | Path, models: Mapping[str, nn.Module]) -> dict[str, nn.Module]: ...
def load(path: str | Path, models: Models, *, name: str | None = None) -> nn.Module | dict[str, nn.Module]:
    """Read what `save` wrote: outputs equal the saved networks' bit for bit, on the same machine.

    Networks read together share what the saved ones shared: one tensor object under several names, ties made again by
    `tie_`. A network read by itself has all its values, and needs no other.

    Args:
        path: The file.
        models: The original architecture, freshly built (its values don't matter), or the compacted one; of a bundle,
            all or some by name. Not written to. Devices and training mode are taken from it, dtypes and
            `requires_grad` from the file.
        name: Which network of a bundle `models` is, to read it by itself.

    Returns:
        A new module, or new modules by name. Modules that were one in several networks come back apart, their tensors
        shared.

    Raises:
        FileError: If the file is not there, truncated, foreign, changed since, or newer than this version reads, or
            if a model is of another architecture; names the tensor or module. If a bundle is read as one network or
            one network as a bundle, or has none of that name.
        PlanError: If the models are not a network, or networks by names without dots; if there is a name beside them.

    Example:
        >>> import tempfile, os
        >>> a, b = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> b.weight = a.weight
        >>> path = os.path.join(tempfile.mkdtemp(), "pair.safetensors")
        >>> save({"a": a, "b": b}, path)
        >>> pair = load(path, {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
        >>> pair["a"].weight is pair["b"].weight
        True
        >>> torch.equal(load(path, nn.Linear(3, 2), name="b").weight, a.weight)
        True
    """
    stored, record = unseal(path, kind=KIND, version=VERSION)
    with Understood(path):
        names = [str(each) for each in record.get("models", ())]
    parts = wanted(path, models, name, names)
    with Understood(path):
        state, ties = contents(stored, record)
        description = with_known(record.get("architecture", {}), state)
        if names and set(parts) < set(names):
            shapes = state.shapes()
            state, known = only(state, parts)
            ties = _within(ties, known, shapes)
    try:
        built = _built(parts, description, state, ties)
    except FileError as error:
        raise FileError(f"{path}: {error}") from error
    except TyingError as error:
        raise FileError(f"{path}: {_ANOTHER}: {error}") from error
    return next(iter(built.values())) if isinstance(models, nn.Module) else built


def contents(stored: Mapping[str, Tensor], record: Mapping[str, Any]) -> tuple[State, list[Tied]]:
    """Return the state of all networks in a file, weights whole, and the ties that were in force."""
    state = state_of(stored, record)
    old = record.get("tie_", ())
    ties: list[Tied] = [
        (tie_of(entry, stored, record), known_gradient(gradient)) for entry, gradient in old or record.get("ties", ())
    ]
    if old:
        state = before.weights_of(state, [tie for tie, _ in ties], record)
    return state, ties


def _within(ties: list[Tied], known: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> list[Tied]:
    return [(left, each) for tie, each in ties if (left := tie_within(tie, known, shapes)) is not None]


def load_plan(path: str | Path) -> TiePlan:
    """Read the plan that `save` kept: the one it was given, or the ties that were in force.

    Raises:
        FileError: As `load`, for what is wrong with the file.
    """
    tensors, record = unseal(path, kind=KIND, version=VERSION)
    with Understood(path):
        stored = record.get("plan", {"ties": [], "provenance": {"made by": "tie_"}})
        entries = list(stored["ties"])
        if not record.get("plan given"):
            entries += [entry for entry, _ in record.get("ties", ())]
        return TiePlan([tie_of(entry, tensors, record) for entry in entries], stored["provenance"] if entries else {})


def _described(models: Models) -> Description:
    each = (prefixed(name, describe(model)) for name, model in by_name(models).items())
    return {name: entry for description in each for name, entry in description.items()}


def _built(
    parts: Mapping[str, nn.Module], description: Description, state: State, ties: list[Tied]
) -> dict[str, nn.Module]:
    """New networks of the given architectures, brought to the described ones, filled, and tied."""
    single = parts.get("")
    given: Models = parts if single is None else single
    refuse_lazy(together(given))
    check_transient(together(given), state)
    check_not_outgrown(together(given), state)
    with torch.random.fork_rng(devices=[]):  # layers draw their first values, which are not kept
        built = {name: _rebuilt(name, model, description) for name, model in by_name(untied(given)).items()}
        models: Models = built if single is None else built[""]
        whole = together(models)
        fill(whole, state)
        tie_again_(models, ties, whole)
    return built


def _rebuilt(name: str, model: nn.Module, description: Description) -> nn.Module:
    try:
        return rebuild(model, below(name, description) if name else description)
    except TyingError as error:
        if not name:
            raise
        raise FileError(f"in {name!r}: {_ANOTHER}: {error}") from error
