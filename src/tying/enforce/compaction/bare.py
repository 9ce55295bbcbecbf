"""The sizes of norms that hold no tensors: nothing but what they are given says how many channels are left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.instancenorm import _InstanceNorm  # pyright: ignore[reportPrivateUsage]

from tying.enforce.compaction.adapt import Attributes, attributes_kept, set_attributes_
from tying.enforce.compaction.compare import run
from tying.errors import CompactError


def bare_norms(network: nn.Module) -> dict[str, str]:
    """Return the norms without weights and statistics: by name, the attribute that says how many channels it has."""
    return {
        name: "num_channels" if isinstance(module, nn.GroupNorm) else "num_features"
        for name, module in network.named_modules()
        if isinstance(module, (nn.GroupNorm, _NormBase)) and not [*module.parameters(), *module.buffers()]
    }


def fit_bare_norms_(network: nn.Module, inputs: tuple[Tensor, ...]) -> Attributes:
    """Give norms without weights and statistics as many channels as come in, and return what was set.

    A norm that is called with several numbers of channels keeps its own, and so do all if the network does not run.

    Args:
        network: Written to; in evaluation mode.
        inputs: What it takes.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(1, 3, 1), nn.GroupNorm(3, 6, affine=False)).eval()
        >>> fit_bare_norms_(network, (torch.zeros(2, 1, 4, 4),))
        {'1': {'num_channels': 3}}
    """
    norms = bare_norms(network)
    given = _channels_given(network, norms, inputs) if norms else {}
    changed: dict[str, dict[str, Any]] = {}
    for name, sizes in given.items():
        if len(sizes) == 1 and getattr(network.get_submodule(name), norms[name]) not in sizes:
            changed[name] = {norms[name]: min(sizes)}
    set_attributes_(network, changed)
    return changed


def _channels_given(network: nn.Module, norms: Mapping[str, str], inputs: tuple[Tensor, ...]) -> Mapping[str, set[int]]:
    """How many channels each norm is given, at all its calls."""
    given: dict[str, set[int]] = {name: set() for name in norms}

    def noted(name: str) -> Callable[..., None]:
        def note(norm: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            x: Tensor = (*args, *named.values())[0]
            alone = isinstance(norm, _InstanceNorm) and x.dim() == norm._get_no_batch_dim()  # pyright: ignore[reportPrivateUsage]
            channels = x.shape[0 if alone else 1]
            given[name].add(channels)
            setattr(norm, norms[name], channels)  # its forward warns of another one

        return note

    handles = [
        network.get_submodule(name).register_forward_pre_hook(noted(name), with_kwargs=True, prepend=True)
        for name in norms
    ]
    try:
        with attributes_kept(network):
            run(network, inputs)
    except CompactError:  # whoever compares the network says so
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return given
