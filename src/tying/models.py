"""One model, or several by name: the same parameter names throughout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

from torch import nn

from tying.errors import PlanError
from tying.plan import qualified

Models: TypeAlias = nn.Module | Mapping[str, nn.Module]
"""A model, whose parameters have their own names, or several: `{"a": model_a}` has `"a.fc1.weight"`."""


def by_name(models: Models) -> dict[str, nn.Module]:
    """Return the models by the prefix of their parameters' names; one model alone has the prefix "".

    Raises:
        PlanError: If it is neither, if a name is empty or has a dot in it, or if a model stands there twice.
    """
    if isinstance(models, nn.Module):
        return {"": models}
    if not isinstance(models, Mapping) or not all(isinstance(m, nn.Module) for m in models.values()):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError(
            f'models: expected a module, or modules by name, got {type(models).__name__}; write {{"a": model_a, '
            '"b": model_b}'
        )
    for name in models:
        if not isinstance(name, str) or not name or "." in name:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(f"models: expected names without dots, got {name!r}; choose one such as 'a'")
    seen: dict[int, str] = {}
    for name, model in models.items():
        if id(model) in seen:
            raise PlanError(
                f"models: expected different modules, got the same one as {seen[id(model)]!r} and as {name!r}; "
                "name each model once"
            )
        seen[id(model)] = name
    return dict(models)


def parameters_of(models: Models) -> dict[str, nn.Parameter]:
    """Return all parameters by full name, each under all its names, in the order of the models.

    Raises:
        PlanError: As `by_name`.

    Example:
        >>> list(parameters_of({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2, bias=False)}))
        ['a.weight', 'a.bias', 'b.weight']
    """
    return {
        qualified(prefix, name): parameter
        for prefix, model in by_name(models).items()
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def modules_of(models: Models) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules by full name, each once, the models themselves by theirs."""
    for prefix, model in by_name(models).items():
        for path, module in model.named_modules():
            yield qualified(prefix, path) if path else prefix, module


def callable_parts(models: Models) -> dict[str, nn.Module]:
    """Return the models by prefix, and in place of one that can't be called (`nn.ModuleDict`) its parts by theirs.

    Example:
        >>> list(callable_parts(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})))
        ['a', 'b']
    """
    parts: dict[str, nn.Module] = {}
    waiting = list(by_name(models).items())
    while waiting:
        prefix, module = waiting.pop(0)
        container = type(module).forward is nn.Module.forward and not list(module.named_parameters(recurse=False))
        if container and list(module.children()):
            waiting[:0] = [(qualified(prefix, name), child) for name, child in module.named_children()]
        else:
            parts[prefix] = module
    return parts
