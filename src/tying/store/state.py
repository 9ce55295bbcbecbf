"""What a network holds, each tensor once however many names it has; and a fresh network filled with it."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save as encode
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tying.enforce.compaction.surgery import tied_layers
from tying.enforce.held import owned
from tying.errors import FileError
from tying.files.sealed import bytes_of

EXTRA = "_extra_state"


@dataclass(frozen=True)
class View:
    """A tensor that lies in the memory of another, as `nn.Parameter(weight.t())` does."""

    base: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, base: Tensor) -> Tensor:
        """Return the view: it shares the base's memory."""
        return base.detach().as_strided(self.shape, self.strides, self.offset)


@dataclass(frozen=True)
class State:
    """A network's state dict, with what a state dict does not say: which names are one tensor, which are trained."""

    tensors: Mapping[str, Tensor]
    """Every tensor object once, by its first name."""
    aliases: Mapping[str, str]
    """A further name of the same object → its first name."""
    views: Mapping[str, View]
    frozen: frozenset[str]
    """First names of the parameters that don't require a gradient."""
    extra: Mapping[str, Any]
    """What `nn.Module.get_extra_state` gave, where it is not a tensor."""
    transient: Mapping[str, tuple[str, tuple[int, ...]]]
    """dtype and shape of the buffers that no state dict holds: the model builds them itself."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor under every name."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        shapes.update({name: view.shape for name, view in self.views.items()})
        shapes.update({name: shapes[source] for name, source in self.aliases.items()})
        return shapes


def collect(model: nn.Module) -> State:
    """Read a network's state: nothing is copied.

    Raises:
        FileError: If the state dict holds what a safetensors file can't.
    """
    refuse_lazy(model)
    held = owned(model)
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    extra: dict[str, Any] = {}
    first: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if name.rpartition(".")[2] == EXTRA and name not in held:
            if not isinstance(value, Tensor):
                extra[name] = _as_json(name, value)
                continue
        elif value is not held.get(name):
            raise FileError(
                f"{name}: expected a parameter or buffer of the model, got what a state_dict hook made of it; "
                "save the model without the hook"
            )
        _refuse_unstorable(name, value)
        if id(value) in first:
            aliases[name] = first[id(value)]
        else:
            first[id(value)], tensors[name] = name, value
    views = views_of(tensors)
    derived = {id(buffer) for layer in tied_layers(model).values() for buffer in layer.buffers()}
    return State(
        {name: tensor for name, tensor in tensors.items() if name not in views},
        aliases,
        views,
        frozenset(n for n, t in tensors.items() if isinstance(t, nn.Parameter) and not t.requires_grad),
        extra,
        {
            name: (dtype_name(tensor.dtype), tuple(tensor.shape))
            for name, tensor in held.items()
            if name not in tensors and name not in aliases and id(tensor) not in derived
        },
    )


def fill(model: nn.Module, state: State) -> None:
    """Write the state into a model of the same architecture: new tensors, one object under all its names.

    Dtypes and memory layout are the stored ones, devices are the model's (a model built on `meta` fills on the CPU).

    Raises:
        FileError: If names or shapes differ, or the filled model holds something else. The model is spoilt then.
    """
    held = owned(model)
    _check_names(held, set(model.state_dict()), state)
    placed: dict[str, Tensor] = {}
    for name in [*state.tensors, *state.views]:
        if name not in held:  # an extra state
            placed[name] = state.tensors[name]
            continue
        old = held[name]
        view = state.views.get(name)
        device = "cpu" if old.is_meta else old.device
        # the base of a view is in `tensors`, which come first
        new = view.of(placed[view.base]) if view else state.tensors[name].to(device)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=name not in state.frozen)
        placed[name] = new
        _place(model, name, new)
    for name, source in state.aliases.items():
        _place(model, name, placed[source])
    for name, (dtype, _) in state.transient.items():
        _place(model, name, held[name].to(getattr(torch, dtype)))
    whole = {**placed, **{name: placed[source] for name, source in state.aliases.items()}}
    try:  # the values are there: this runs the hooks that modules hang on loading
        model.load_state_dict({**whole, **state.extra})
    except (RuntimeError, ValueError) as error:
        raise FileError(f"model: expected a model that takes the stored state, got {error}; {_REMEDY}") from error
    _check_filled(model, whole, state)


_REMEDY = "build the model that was saved, as it was before compacting"


def _as_json(name: str, value: Any) -> Any:
    try:
        back = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        back = None
    if back != value:
        raise FileError(
            f"{name}: expected a tensor or what JSON can hold as extra state, got {type(value).__name__}; "
            "return one of these from get_extra_state (files hold no pickle)"
        )
    return back


def refuse_lazy(model: nn.Module) -> None:
    """Raise `FileError` if a parameter waits for its first input to be given a shape."""
    for name, tensor in owned(model).items():
        if is_lazy(tensor):
            raise FileError(
                f"{name}: expected a tensor with a shape, got an uninitialised one; run the model once first"
            )


def check_transient(model: nn.Module, state: State) -> None:
    """Raise `FileError` unless the buffers that no state dict holds are those that the saved network had."""
    held = owned(model)
    for name, (_, shape) in state.transient.items():
        if name not in held or tuple(held[name].shape) != shape:
            got = f"shape {tuple(held[name].shape)}" if name in held else "none"
            raise FileError(
                f"{name}: expected a buffer of shape {shape} that the model builds itself, got {got}; {_REMEDY}, or "
                "let the state dict hold the buffer (persistent=True) and save again"
            )


def check_not_outgrown(model: nn.Module, state: State) -> None:
    """Raise `FileError` if a stored parameter is longer somewhere than the model's: compacting only makes smaller."""
    shapes = state.shapes()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shape, held = shapes.get(name, ()), tuple(parameter.shape)
        if len(shape) == len(held) and any(stored > size for stored, size in zip(shape, held, strict=True)):
            raise FileError(
                f"{name}: expected a model at least as large as the stored one, {shape}, got shape {held}; {_REMEDY}"
            )


def _refuse_unstorable(name: str, tensor: Tensor) -> None:
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer) or type(tensor.data) is Tensor
    if not plain or tensor.is_meta or tensor.layout is not torch.strided:
        kind = "meta" if tensor.is_meta else str(tensor.layout)
        raise FileError(
            f"{name}: expected a plain tensor with values, got a {kind} {type(tensor).__name__}; "
            "materialise it, or make it dense"
        )
    if not _storable(tensor.dtype):
        raise FileError(
            f"{name}: expected a dtype that safetensors holds, got {tensor.dtype}; convert it, or keep it out of the "
            "state dict with persistent=False"
        )


@functools.cache
def _storable(dtype: torch.dtype) -> bool:
    try:
        encode({"x": torch.empty(0, dtype=dtype)})
    except Exception:
        return False
    return True


def dtype_name(dtype: torch.dtype) -> str:
    """Return `"float32"` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def views_of(tensors: Mapping[str, Tensor]) -> dict[str, View]:
    """Say which tensors lie wholly in the memory of another one, which is then the only one to be stored."""
    groups: dict[tuple[int, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            groups.setdefault((tensor.untyped_storage().data_ptr(), tensor.dtype), []).append(name)
    views: dict[str, View] = {}
    for names in groups.values():
        dense = [name for name in names if is_dense(tensors[name])]
        if len(names) < 2 or not dense:
            continue
        base = max(dense, key=lambda name: tensors[name].numel())  # the first of equals
        start, size = int(tensors[base].storage_offset()), tensors[base].numel()
        for name in names:
            tensor = tensors[name]
            offset = int(tensor.storage_offset()) - start
            if name != base and offset >= 0 and offset + _span(tensor) <= size:
                views[name] = View(base, tuple(tensor.shape), tensor.stride(), offset)
    return views


def _span(tensor: Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's numbers fill a stretch of memory, each once, in whatever order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _check_names(held: Mapping[str, Tensor], present: set[str], state: State) -> None:
    shapes = state.shapes()
    stored = {*shapes, *state.extra}
    for name in sorted(stored ^ present):
        here, there = ("in the file", "in the model") if name in stored else ("in the model", "in the file")
        raise FileError(f"{name}: expected a tensor of that name {there}, got one only {here}; {_REMEDY}")
    for name, shape in shapes.items():
        if name in held and tuple(held[name].shape) != shape:
            raise FileError(
                f"{name}: expected shape {shape}, as in the file, got {tuple(held[name].shape)} in the model; {_REMEDY}"
            )


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, tensor)


def _check_filled(model: nn.Module, whole: Mapping[str, Tensor], state: State) -> None:
    """Modules that are one in the model but two in the file, and hooks that change values, show only now."""
    held = owned(model)
    for name, tensor in whole.items():
        if name in held and not same_bits(held[name], tensor):
            raise FileError(
                f"{name}: expected the stored values, got others once the model was filled; the model shares it "
                f"under another name, or a hook changed it: {_REMEDY}"
            )
    for name, source in state.aliases.items():
        if held[name] is not held[source]:
            raise FileError(f"{name}: expected the same tensor as {source}, got another one; {_REMEDY}")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether shape, dtype and every bit are equal: NaN equals itself, −0 is not 0."""
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(bytes_of(one), bytes_of(other))
