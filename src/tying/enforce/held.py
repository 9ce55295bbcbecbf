"""Who holds a tensor, where a module stands in its model, and whether it stands there by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from tying.plan import qualified


def owned(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by name, each under all its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def names_of(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of every parameter and buffer by the tensor's id, the first name first."""
    names: dict[int, list[str]] = {}
    for name, tensor in owned(model).items():
        names.setdefault(id(tensor), []).append(name)
    return names


def holders(
    model: nn.Module, name: str, names: Mapping[int, Sequence[str]] | None = None
) -> list[tuple[nn.Module, str]]:
    """Return the modules that hold the tensor of this name, each once, with the attribute it is there.

    Args:
        model: Not written to.
        name: Of a parameter or buffer.
        names: Those of `names_of(model)`, for who asks about many tensors.
    """
    path, _, leaf = name.rpartition(".")
    every = (names or names_of(model))[id(getattr(model.get_submodule(path), leaf))]
    found = [(model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in every]
    return list({(id(module), leaf): (module, leaf) for module, leaf in found}.values())


def places_of(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of every module by its id, the first name first."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    return places


def has_hooks(layer: nn.Module) -> bool:
    """Whether something else runs with a layer's forward or backward."""
    return any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks))  # pyright: ignore[reportPrivateUsage]


def not_alone(
    model: nn.Module, name: str, names: Mapping[int, Sequence[str]] | None = None, *, whole: bool = False
) -> str | None:
    """Return why the layer of this name can't be replaced without a word to others; None if it can.

    Args:
        model: Not written to.
        name: Of a module with a weight.
        names: As for `holders`.
        whole: Whether it may be the whole model.
    """
    if not name and not whole:
        return "it is the whole model; wrap it in nn.Sequential"
    if has_hooks(model.get_submodule(name)):
        return "it has hooks, which would be lost; remove them"
    shared = holders(model, qualified(name, "weight"), names)
    return f"its weight is shared by {len(shared)} modules" if len(shared) > 1 else None
