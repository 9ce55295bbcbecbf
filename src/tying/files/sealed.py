"""A `.safetensors` file with one JSON record about its tensors and sums over all of it: damage is noticed and named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as encode
from torch import Tensor

from tying.errors import FileError

KEY = "tying"
"""The only metadata key: safetensors writes several in random order, and the same network must give the same bytes."""


def seal(tensors: Mapping[str, Tensor], record: Mapping[str, Any], *, kind: str, version: int) -> bytes:
    """Return the file's bytes: the same tensors and record give the same bytes.

    Args:
        tensors: By name; any strided layout, on any device.
        record: What JSON can hold.
        kind: What the file is, as `"tying.model"`.
        version: Of that kind's layout; `unseal` refuses newer ones.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    written = {**record, "format": f"{kind}/{version}", "sums": {name: _sum(name, t) for name, t in plain.items()}}
    written["sum"] = _sum_of(written)
    return encode(plain, {KEY: _canonical(written)})


def unseal(
    path: str | Path, *, kind: str, version: int, writer: str = "tying.save"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors (on the CPU, in their own memory) and the record of a file that `seal` wrote.

    Args:
        path: The file.
        kind: What it has to be.
        version: The newest layout of that kind which is understood.
        writer: The function that writes such files, for the messages.

    Raises:
        FileError: If the file is not there, truncated, foreign, newer than `version`, or not as it was written;
            names the tensor that differs.
    """
    try:
        with safe_open(str(path), framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
            metadata: dict[str, str] = file.metadata() or {}
            record = _record(path, metadata, kind, version, writer)
            # cloned: what safe_open returns lies in the mapped file, unaligned, and changes with it
            tensors: dict[str, Tensor] = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"{path}: expected a file that {writer} wrote, got one that can't be read, truncated or no safetensors "
            f"({error}); check the path, or save it again"
        ) from error
    _check(path, tensors, record, writer)
    return tensors, record


def _record(path: str | Path, metadata: Mapping[str, str], kind: str, version: int, writer: str) -> dict[str, Any]:
    if KEY not in metadata:
        raise FileError(
            f"{path}: expected a file that {writer} wrote ({kind}/{version}), got an ordinary safetensors file; "
            "read it with safetensors.torch.load_file"
        )
    try:
        record = json.loads(metadata[KEY])
        found, _, number = str(record["format"]).rpartition("/")
        newer = int(number) > version
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(
            f"{path}: expected the record that {writer} wrote, got one that can't be read ({error!r}); "
            "the file was changed: save it again"
        ) from error
    if found != kind or newer:
        raise FileError(
            f"{path}: expected {kind}/{version} or older, got {record['format']}; "
            + ("update tying to read it" if found == kind else f"pass a file that {writer} wrote")
        )
    return record


def _check(path: str | Path, tensors: Mapping[str, Tensor], record: dict[str, Any], writer: str) -> None:
    if record.pop("sum", None) != _sum_of(record):
        raise FileError(
            f"{path}: expected the record that {writer} wrote, got one that was changed since; save it again"
        )
    sums: dict[str, str] = record.pop("sums")
    if differing := sorted(set(sums) ^ set(tensors)):
        raise FileError(
            f"{path}: expected the tensors that {writer} wrote, got {differing[0]!r} added or missing; "
            "the file was changed: save it again"
        )
    for name, tensor in tensors.items():
        if _sum(name, tensor) != sums[name]:
            raise FileError(
                f"{name}: expected the tensor that {writer} wrote (sum {sums[name]}), got another "
                f"{tensor.dtype} {tuple(tensor.shape)} in {path}; the file was changed: save it again"
            )


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the tensor's bits as a flat uint8 tensor: NaN equals itself, −0 is not 0."""
    plain = tensor.detach().cpu().contiguous()
    flat = plain.as_strided((plain.numel(),), (1,))  # `reshape` keeps the odd stride that a single number may have
    return flat.view(torch.uint8)


def _sum(name: str, tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    digest.update(bytes_of(tensor).numpy().data)
    return digest.hexdigest()[:16]


def _sum_of(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(record).encode()).hexdigest()[:16]


def _canonical(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
