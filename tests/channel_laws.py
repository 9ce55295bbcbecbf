"""Laws of channels and constants, in float64, against what the networks do: nothing here looks at a graph."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from networks import NETWORKS
from tying.channels.constants import Constants, constants_of
from tying.channels.find import Channel, Channels, Slice, channels_of
from tying.channels.graph import export

TOLERANCE = 1e-10


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result = model(x)
    return torch.cat([part.flatten() for part in (result if isinstance(result, tuple) else (result,))])


def assert_equal(one: Tensor, other: Tensor, what: str) -> None:
    assert one.shape == other.shape, what
    assert (one - other).abs().max() <= TOLERANCE * (1 + other.abs().max()), what


def change(model: nn.Module, slices: Sequence[Slice], seed: int | None) -> None:
    """Set slices to zero, or to noise."""
    tensors = model.state_dict()
    for part in slices:
        tensor = tensors[part.parameter]
        index = torch.tensor(part.indices)
        new = torch.zeros_like(tensor.index_select(part.axis, index))
        if seed is not None:
            new = 0.5 + torch.rand(new.shape, generator=torch.Generator().manual_seed(seed), dtype=new.dtype)
        tensor.index_copy_(part.axis, index, new)


def check_readers_are_all(model: nn.Module, x: Tensor, channels: Channels) -> None:
    """Once its readers are zero, nothing depends on what makes a channel: one that can go, or has only its place."""
    for channel in channels:
        assert channel.only_read or channel.blocked, channel
        if channel.only_read:
            silent, disturbed = copy.deepcopy(model), copy.deepcopy(model)
            change(disturbed, channel.makers, seed=1)
            for each in (silent, disturbed):
                change(each, channel.readers, seed=None)
            assert_equal(outputs(disturbed, x), outputs(silent, x), f"{channel}")


def removable_together(model: nn.Module, channels: Channels) -> Iterator[list[Channel]]:
    """Each channel by itself, then every second one; never the last index of an axis."""
    free = [channel for channel in channels if channel.blocked is None]
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for wanted in [*([channel] for channel in free), free[::2], free[1::2]]:
        left, chosen = copy.deepcopy(shapes), list[Channel]()
        for channel in wanted:
            if all(len(part.indices) < left[part.parameter][part.axis] for part in channel.slices):
                chosen.append(channel)
                for part in channel.slices:
                    left[part.parameter][part.axis] -= len(part.indices)
        if chosen:
            yield chosen


def check_cut_is_exact(model: nn.Module, x: Tensor, channels: Channels) -> None:
    """With readers at zero, the network with all slices cut out computes the same."""
    for chosen in removable_together(model, channels):
        silent = copy.deepcopy(model)
        for channel in chosen:
            change(silent, channel.readers, seed=None)
        try:
            small = outputs(cut(silent, chosen, channels), x)
        except RuntimeError as error:
            raise AssertionError(f"{error}: {chosen}") from error
        assert_equal(small, outputs(silent, x), f"{chosen}")


def cut(model: nn.Module, chosen: Sequence[Channel], channels: Channels | None = None) -> nn.Module:
    """Cut slices out of every tensor, then let the sizes follow from the shapes: a surgeon for these tests only."""
    small = copy.deepcopy(model)
    gone: dict[tuple[str, int], set[int]] = {}
    for part in itertools.chain.from_iterable(channel.slices for channel in chosen):
        for name in (part.parameter, *part.aliases):
            gone.setdefault((name, part.axis), set()).update(part.indices)
    tensors = small.state_dict(keep_vars=True)
    done: set[tuple[int, int]] = set()
    for (name, axis), indices in gone.items():
        tensor = tensors[name]
        if (id(tensor), axis) not in done:
            done.add((id(tensor), axis))
            kept = torch.tensor([i for i in range(tensor.shape[axis]) if i not in indices])
            tensor.data = tensor.data.index_select(axis, kept)
    for module in small.modules():
        adapt(module)
    for each in channels.counted if channels else ():
        module: Any = small.get_submodule(each.modules[0])
        left = sum(not any(head is channel for channel in chosen) for head in each.channels)
        for name in ("heads", "num_groups"):
            if hasattr(module, name):
                setattr(module, name, left)
    return small


def adapt(module: Any) -> None:
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = module.weight.shape[0]
    elif isinstance(module, nn.modules.conv._ConvNd):
        first, second = module.weight.shape[:2]
        if module.groups > 1:
            module.groups = module.groups * first // (module.in_channels if module.transposed else module.out_channels)
        one, other = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
        setattr(module, one, first)
        setattr(module, other, second * module.groups)


def check_constants(model: nn.Module, found: Constants, shape: Sequence[int]) -> None:
    """What is proven constant is constant over random inputs; folded into biases, the function stays."""
    inputs = 3 * torch.randn(32, *shape[1:], dtype=torch.float64)
    modules = dict(model.named_modules())
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, module in modules.items()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    ]
    outputs(model, inputs)
    for hook in hooks:
        hook.remove()
    for (parameter, axis, index), reading in found.readings.items():
        name = parameter.rpartition(".")[0]
        for value in (
            seen.get(name, []) if axis == (1 if not getattr(modules[name], "transposed", False) else 0) else []
        ):
            dim = value.ndim - 1 - (modules[name].weight.ndim - 2)
            assert_equal(value.select(dim, index), torch.full_like(value.select(dim, index), reading.value), parameter)


def check_folding(model: nn.Module, found: Constants, x: Tensor) -> int:
    """Constants taken over by biases: the weights that read them may go to zero."""
    folded, count = copy.deepcopy(model), 0
    for name, module in folded.named_modules():
        plain = isinstance(module, nn.Linear) or (
            isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1 and not module.transposed
        )
        names = [n for n, p in folded.named_parameters(remove_duplicate=False) if p in set(module.parameters())]
        if not plain or module.bias is None or len(names) > 2:
            continue
        with torch.no_grad():
            for index in range(module.weight.shape[1]):
                value = found.foldable(f"{name}.weight", 1, index)
                if value is not None:
                    count += 1
                    module.bias += module.weight[:, index].reshape(len(module.bias), -1).sum(1) * value
                    module.weight[:, index] = 0
    assert_equal(outputs(folded, x), outputs(model, x), "folded")
    return count


def plant_dead_units(model: nn.Module, channels: Channels, every: int) -> None:
    """Zero the weights, not the biases, that make every n-th channel."""
    tensors = model.state_dict()
    made = [channel for channel in channels if channel.makers]
    for channel in made[::every]:
        change(model, [part for part in channel.makers if tensors[part.parameter].ndim > 1], seed=None)


def law(name: str, *, folding: bool = False) -> None:
    """Check all laws on one registered network."""
    network = NETWORKS[name]
    model, x = network.make()
    channels = channels_of(export(model, x))
    check_readers_are_all(model, x, channels)
    check_cut_is_exact(model, x, channels)
    plant_dead_units(model, channels, 2)
    found = constants_of(export(model, x), x)
    check_constants(model, found, network.shape)
    if folding:
        check_folding(model, found, x)
