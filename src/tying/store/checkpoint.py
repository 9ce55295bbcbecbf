"""The tensors of a checkpoint file, whoever wrote it: read one after another, and nothing in it is run."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tying.errors import FileError
from tying.files.sealed import KEY, unseal
from tying.store import before
from tying.store.network import KIND, VERSION, contents
from tying.store.record import Understood, steps_of
from tying.store.shares import bytes_of_each

_HOLDERS = ("state_dict", "model_state_dict", "model", "module", "net", "weights")
"""Where training scripts put a state dict beside the optimizer's."""

_BOLD = re.compile(r"\x1b\[\d*m")
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


class Entry(NamedTuple):
    """A tensor of a checkpoint."""

    name: str
    tensor: Tensor
    bytes: int
    """That the checkpoint holds for it: fewer than the tensor has where it shares its values with others."""


def read_tensors(path: str | Path) -> Iterator[Entry]:
    """Yield the tensors of a `.safetensors` file, of a file `tying.save` wrote, or of a saved state dict.

    The kind is told by the content, not by the name. A state dict saved by `torch.save` is loaded with
    `weights_only=True`: a pickle that wants to run something is refused. Of a file `tying.save` wrote, the networks'
    own tensors: labels unpacked, tied weights whole, one object under all names that shared it.

    Raises:
        FileError: If the file is not there, truncated, of no such kind, or would run code.
    """
    kind = _kind(Path(path))
    if kind == "safetensors":
        yield from _safetensors(path)
    else:
        yield from _state_dict(path, mapped=kind == "zip")


def _kind(path: Path) -> str:
    """Tell the format by the first bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
            size = path.stat().st_size
    except OSError as error:
        raise FileError(f"{path}: expected a checkpoint, got {error.strerror}; check the path") from error
    if head.startswith(_ZIP):
        return "zip"
    if len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < max(size, 1 << 27):
        return "safetensors"
    if head.startswith(_PICKLE):
        return "pickle"
    raise FileError(
        f"{path}: expected a .safetensors file or a state dict saved by torch.save, got {size} bytes that begin with "
        f"{head!r}; save it with safetensors.torch.save_file or tying.save"
    )


def _safetensors(path: str | Path) -> Iterator[Entry]:
    try:
        with safe_open(str(path), framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
            names: list[str] = list(file.keys())
            record: str | None = (file.metadata() or {}).get(KEY)
            if record is None:
                for name in names:
                    yield entry_of(name, file.get_tensor(name))
                return
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"{path}: expected a whole .safetensors file, got one that can't be read ({error}); "
            "it is truncated or damaged: copy or save it again"
        ) from error
    yield from _saved(path)


def entry_of(name: str, tensor: Tensor) -> Entry:
    """Return a tensor that shares its values with no other."""
    return Entry(name, tensor, tensor.numel() * tensor.element_size())


def _saved(path: str | Path) -> list[Entry]:
    """The tensors of what `tying.save` wrote."""
    stored, record = unseal(path, kind=KIND, version=VERSION)
    with Understood(path):
        state, ties = contents(stored, record)
        steps = steps_of(stored, record)
        sizes = bytes_of_each(state, stored, steps)
        if record.get("tie_"):
            sizes.update(before.bytes_of_each(stored, [tie for tie, _ in ties]))
        first = dict(state.aliases)
        for step in steps:
            shared, *others = [member.parameter for member in step.tie.members]
            if step.is_one_tensor:
                first.update(dict.fromkeys(others, shared))
                sizes[shared] += sum(sizes[name] for name in others)
        own = {name: tensor for name, tensor in state.tensors.items() if name not in first}
        own.update({name: view.of(state.tensors[view.base]) for name, view in state.views.items()})
        names = {name: name for name in own} | {name: first.get(source, source) for name, source in first.items()}
        return [Entry(name, own[source], sizes[source]) for name, source in names.items()]


def _state_dict(path: str | Path, *, mapped: bool) -> Iterator[Entry]:
    try:
        with warnings.catch_warnings():  # about archives that are refused anyway
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # what foreign bytes make of an unpickler can't be listed
        first = _BOLD.sub("", str(error).strip().split("\n")[0])
        raise FileError(
            f"{path}: expected a state dict of plain tensors, got a file that is damaged or would run code "
            f"({type(error).__name__}: {first}); save model.state_dict(), not the model, or use safetensors"
        ) from error
    state = _find_state(content)
    if state is None:
        raise FileError(f"{path}: expected a state dict, got {_described(content)}; save model.state_dict() by itself")
    yield from (entry_of(name, tensor) for name, tensor in state.items())


def _find_state(content: Any) -> dict[str, Tensor] | None:
    """The state dict: the content itself, or what a training script keeps under one of the usual names."""
    if not isinstance(content, Mapping):
        return None
    entries = cast("Mapping[Any, Any]", content)
    tensors = {str(name): value for name, value in entries.items() if isinstance(value, Tensor)}
    if tensors:
        return tensors
    return next((state for name in _HOLDERS if (state := _find_state(entries.get(name))) is not None), None)


def _described(content: Any) -> str:
    if isinstance(content, Mapping):
        names = list(map(str, cast("Mapping[Any, Any]", content)))
        return f"a dictionary of {names[:8]} without tensors"
    return f"a {type(content).__name__}"
