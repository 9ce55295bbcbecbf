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
    """One call of a module that takes a tensor, by position or by name, and gives one.

    Both are copies: what works in place may write to them later.
    """

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
    open_calls: list[tuple[nn.Module, Tensor | None]] = []

    def before(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = args[0] if args else named.get(_first(named) or "")
        open_calls.append((module, given.clone() if isinstance(given, Tensor) else None))

    def given_to(module: nn.Module) -> Tensor | None:
        while open_calls:  # calls that failed, and whose errors the model caught, are passed over
            called, given = open_calls.pop()
            if called is module:
                return given
        return None

    def hook(name: str) -> Callable[..., None]:
        def seen(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], made: Any) -> None:
            given, first = given_to(module), None if args else _first(named)
            if given is None or not isinstance(made, Tensor):
                return

            def again(x: Tensor) -> Any:
                return module(x, *args[1:], **named) if first is None else module(**{**named, first: x})

            see(name, module, Watched(given, made.clone(), again))

        return seen

    handles: list[RemovableHandle] = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(hook(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(named: dict[str, Any]) -> str | None:
    return next((key for key in named if isinstance(named[key], Tensor)), None)


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
        model(*copies(inputs))
    return calls


def copies(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return inputs for one forward pass, which may write to them."""
    return tuple(x.clone() for x in inputs)
