"""What the modules of a model are called on: watched, in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tying.errors import TyingError
from tying.explain.planes import CONVOLUTIONS, TRANSPOSED


@dataclass(frozen=True)
class Watched:
    """One call of a module that takes a tensor, by position or by name, and gives one."""

    given: Tensor
    made: Tensor
    again: Callable[[Tensor], Any]
    """Calls it once more, on another tensor and with all else as it was."""


@dataclass(frozen=True)
class Observed:
    """One call of a module, without the batch."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@contextmanager
def watching(model: nn.Module, see: Callable[[str, nn.Module, Watched], None]) -> Generator[None]:
    """Call `see(name, module, call)` for every call of a module that takes a tensor first and gives one."""

    def hook(name: str) -> Callable[..., None]:
        def seen(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], made: Any) -> None:
            first = next((key for key in named if isinstance(named[key], Tensor)), None) if not args else None
            given = args[0] if args else named.get(first or "")
            if not isinstance(given, Tensor) or not isinstance(made, Tensor):
                return

            def again(x: Tensor) -> Any:
                return module(x, *args[1:], **named) if first is None else module(**{**named, first: x})

            see(name, module, Watched(given, made, again))

        return seen

    handles: list[RemovableHandle] = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_hook(hook(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_finite(name: str, made: Any, where: str) -> None:
    """Refuse numbers that no figure can be made of.

    Raises:
        TyingError: If one is not finite.
    """
    if isinstance(made, Tensor) and not bool(torch.isfinite(made).all()):
        raise TyingError(f"{name}: expected finite numbers, got NaN or infinity {where}")


def observe(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, list[Observed]]:
    """Run the model once on one sample, and return what each of its modules was called on.

    Raises:
        TyingError: If a layer with weights, or the model, gives something that is not finite: it names the first
            module that does.
    """
    calls: dict[str, list[Observed]] = {}
    infinite: list[str] = []

    def see(name: str, module: nn.Module, call: Watched) -> None:
        given, made = call.given, call.made
        if not infinite and not bool(torch.isfinite(made).all()):
            infinite.append(name or type(module).__name__)
        if infinite and (not name or next(module.parameters(recurse=False), None) is not None):
            check_finite(infinite[0], made, "for the example inputs; mend the weights or the inputs")
        kernel = getattr(module, "kernel_size", None)
        if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) and kernel is not None and given.ndim == len(kernel) + 1:
            given, made = given[None], made[None]  # called without a batch
        calls.setdefault(name, []).append(Observed(tuple(given.shape[1:]), tuple(made.shape[1:])))

    with torch.no_grad(), watching(model, see):
        model(*inputs)
    return calls
