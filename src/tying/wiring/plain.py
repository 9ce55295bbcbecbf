"""Whether a layer computes what its class of `torch.nn` says: only then its attributes tell its map."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import nn

from tying.errors import PlanError

_COMPUTING = ("forward", "_conv_forward")


def is_plain(module: nn.Module, kinds: Iterable[type[nn.Module]]) -> bool:
    """Return whether a module computes with the forward of one of the kinds, and not with one of its own.

    Example:
        >>> class Scaled(nn.Linear):
        ...     def forward(self, input):
        ...         return 2 * super().forward(input)
        >>> is_plain(nn.Linear(1, 1), [nn.Linear]), is_plain(Scaled(1, 1), [nn.Linear])
        (True, False)
    """
    if any(name in vars(module) for name in _COMPUTING):
        return False
    given = [getattr(type(module), name, None) for name in _COMPUTING]
    return any(given == [getattr(kind, name, None) for name in _COMPUTING] for kind in kinds)


def check_plain(module: nn.Module, kinds: Iterable[type[nn.Module]], *, name: str = "conv") -> None:
    """Refuse a layer, passed as the parameter of this name, whose map its attributes do not tell.

    Raises:
        PlanError: If it has a forward of its own.
    """
    if not is_plain(module, kinds):
        raise PlanError(
            f"{name}: expected the forward of torch.nn, got {type(cast(Any, module)).__name__}, which has a forward of "
            "its own; build the layer of its map by hand"
        )
