"""The tensors of a checkpoint file, whoever wrote it: read one after another, and nothing in it is run."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tying.errors import FileError
from tying.files.sealed import KEY, unseal
from tying.store.network import KIND, VERSION

_HOLDERS = ("state_dict", "model_state_dict", "model", "module", "net", "weights")
"""Where training scripts put a state dict beside the optimizer's."""

_BOLD = re.compile(r"\x1b\[\d*m")
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


def read_tensors(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of a `.safetensors` file, of a file `tying.save` wrote, or of a saved state dict.

    The kind is told by the content, not by the name. A state dict saved by `torch.save` is loaded with
    `weights_only=True`: a pickle that wants to run something is refused.

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


def _safetensors(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
            names: list[str] = list(file.keys())
            record: str | None = (file.metadata() or {}).get(KEY)
            if record is None:
                for name in names:
                    yield name, file.get_tensor(name)
                return
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"{path}: expected a whole .safetensors file, got one that can't be read ({error}); "
            "it is truncated or damaged: copy or save it again"
        ) from error
    yield from unseal(path, kind=KIND, version=VERSION)[0].items()


def _state_dict(path: str | Path, *, mapped: bool) -> Iterator[tuple[str, Tensor]]:
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
    yield from state.items()


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
