"""What a model needs for anyone to run a copy of it: refused by name where it is missing."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tying.errors import TyingError


def check_usable(model: nn.Module, error: type[TyingError]) -> None:
    """Raise unless the model is one of PyTorch's, with a forward in Python, values, and dense parameters.

    Args:
        model: Of any kind; not written to.
        error: The class to raise.

    Raises:
        TyingError: Of that class; names the module or the tensor.

    Example:
        >>> check_usable(nn.Linear(2, 2, device="meta"), TyingError)
        Traceback (most recent call last):
        tying.errors.TyingError: weight: expected a tensor with values, got one on the meta device; move the model ...
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise error(f"model: expected a torch.nn.Module, got {type(model).__name__}; pass the network")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise error(
                f"{name or 'model'}: expected a module with a forward in Python, got one of torch.jit; pass the model "
                "that it was made of"
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise error(f"{name}: expected a tensor with a shape, got an uninitialised one; run the model once")
        if tensor.is_meta:
            raise error(
                f"{name}: expected a tensor with values, got one on the meta device; move the model with "
                "to_empty(device=...), then load its weights"
            )
        if isinstance(tensor, nn.Parameter) and tensor.layout is not torch.strided:
            raise error(f"{name}: expected dense weights, got {tensor.layout}; put weight.to_dense() in their place")


def copy_of(model: nn.Module, error: type[TyingError]) -> nn.Module:
    """Return a deep copy: a forward may write to buffers, count its calls, keep what it saw.

    Args:
        model: Not written to.
        error: The class to raise.

    Raises:
        TyingError: Of that class, if the model can't be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as reason:
        raise error(
            f"model: expected a model that can be copied, got {type(reason).__name__}: {reason}; keep what is computed "
            "from parameters (as torch.nn.utils.weight_norm does not), and handles, out of its attributes"
        ) from reason
