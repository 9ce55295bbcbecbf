"""What can be removed exactly, found by trial; and what is left then, counted from the streams alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.channels.fixtures import Span, Stream, feels, numbers, tensors_of
from benchmarks.channels.plant import TIABLE, Part, Plant

SAME = 1e-9


@dataclass
class Truth:
    """What can go from a planted network."""

    exact: dict[str, tuple[int, ...]]
    """By stream: the planted channels that can go, the function kept to 1e-9."""
    alone: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """By stream: the channels that can go though nothing was planted there: real weights hold units that are dead."""
    biased: set[str] = field(default_factory=set)
    """The modules without a bias that need one, for a constant."""

    def gone(self, stream: str) -> tuple[int, ...]:
        """All that can go from a stream."""
        return self.exact.get(stream, ()) + self.alone.get(stream, ())


def unlike(expected: object, got: object) -> float:
    """The largest difference of two outputs, relative to the largest number of each tensor; inf for other shapes."""
    worst, pairs = 0.0, list(zip(numbers(expected), numbers(got), strict=True))
    for one, other in ((a.detach(), b.detach()) for a, b in pairs):
        if one.shape != other.shape or not bool(other.isfinite().all()):
            return float("inf")
        worst = max(worst, float((one - other).abs().max() / one.abs().max().clamp(min=1e-300)))
    return worst


def wrong_streams(model: nn.Module, inputs: tuple[Tensor, ...], streams: Sequence[Stream]) -> list[str]:
    """Name the streams that are not as written down: disturbed, every third channel is felt, or not, unlike it says."""
    return [
        one.name
        for one in streams
        if (feels(model, inputs, one, range(0, one.count, 3)) <= SAME) != one.free
    ]  # fmt: skip


def find(
    wanted: nn.Module, inputs: tuple[Tensor, ...], plant: Plant, streams: Sequence[Stream], *, trained: bool
) -> Truth:
    """Try every part: what no reader reads can go if the stream is free; a constant, if biases can take it over."""
    truth = Truth({})
    constant = [part for part in plant.parts if part.kind in ("dead", "silent")]
    alone = _dead_by_themselves(wanted, plant, streams) if trained else []
    seen = _inputs_of_readers(wanted, inputs, [*constant, *alone])
    with torch.no_grad():
        expected = wanted(*inputs)
    for part in plant.parts:
        stream = part.stream
        if part.kind == "void" or (part.kind == "unread" and stream.free):
            truth.exact[stream.name] = part.channels
        elif part in constant:
            truth.exact[stream.name] = _constants(wanted, inputs, expected, part, seen, truth)
    for part in alone:
        truth.alone[part.stream.name] = _constants(wanted, inputs, expected, part, seen, truth)
    return truth


def _dead_by_themselves(wanted: nn.Module, plant: Plant, streams: Sequence[Stream]) -> list[Part]:
    """The channels, not planted, whose depthwise kernel is zero: weights that decayed until nothing was left."""
    tensors, planted = tensors_of(wanted), {part.stream.name: part.channels for part in plant.parts}
    found: list[Part] = []
    for one in streams:
        kernels = [tensors[s.tensor].detach() for s in one.makers if tensors[s.tensor].shape[1:2] == (1,)]
        dead = {c for kernel in kernels for c in (kernel.flatten(1) == 0).all(1).nonzero().flatten().tolist()}
        if left := dead - set(planted.get(one.name, ())):
            found.append(Part(one, tuple(sorted(left)), "dead", False))
    return found


def _inputs_of_readers(model: nn.Module, inputs: tuple[Tensor, ...], parts: Sequence[Part]) -> dict[str, Tensor]:
    """By module: what it reads, channels first, `(channels, everything else)`."""
    seen: dict[str, Tensor] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            axis = -1 if isinstance(module, nn.Linear) else 1
            seen[path] = given[0].movedim(axis, 0).flatten(1)

        return hook

    with contextlib.ExitStack() as stack, torch.no_grad():
        for path in {span.tensor.rpartition(".")[0] for part in parts for span in part.stream.readers}:
            stack.callback(model.get_submodule(path).register_forward_pre_hook(note(path)).remove)
        model(*inputs)
    return seen


def _constants(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    expected: object,
    part: Part,
    seen: Mapping[str, Tensor],
    truth: Truth,
) -> tuple[int, ...]:
    """The channels of a part that are constants which the readers' biases can take over."""
    zero, other = list[int](), list[int]()
    for channel in part.channels:
        read = torch.stack([_spread(seen, span, channel) for span in part.stream.readers])
        if bool((read[:, 0] <= 1e-12).all()):
            (zero if bool((read[:, 1] == 0).all()) else other).append(channel)
    if other and unlike(expected, _folded(model, inputs, part.stream, other, seen)) <= SAME:
        paths = {span.tensor.rpartition(".")[0] for span in part.stream.readers}
        truth.biased |= {path for path in paths if getattr(model.get_submodule(path), "bias", None) is None}
        return tuple(sorted([*zero, *other]))
    return tuple(zero)


def _spread(seen: Mapping[str, Tensor], span: Span, channel: int) -> Tensor:
    """How far what a reader sees of a channel varies, and how large it is."""
    values = seen[span.tensor.rpartition(".")[0]][list(span.indices(channel))]
    return torch.stack([(values.amax(1) - values.amin(1)).max(), values.abs().max()])


def _folded(
    model: nn.Module, inputs: tuple[Tensor, ...], stream: Stream, channels: Sequence[int], seen: Mapping[str, Tensor]
) -> object:
    """The outputs when readers see 0 in the place of constants, and add what the constants would have given."""
    with contextlib.ExitStack() as stack, torch.no_grad():
        for span in stream.readers:
            module: Any = model.get_submodule(span.tensor.rpartition(".")[0])
            index = torch.tensor(span.all(channels))
            value = seen[span.tensor.rpartition(".")[0]][index, 0]
            weight = module.weight.movedim(span.axis, 0).index_select(0, index)  # (read, out, *kernel)
            if isinstance(module, nn.modules.conv._ConvTransposeNd):
                return torch.full((), torch.nan)  # what it adds differs from place to place
            total = torch.einsum("r,ro->o", value, weight.reshape(*weight.shape[:2], -1).sum(2))
            stack.callback(module.register_forward_pre_hook(_without(index, module)).remove)
            stack.callback(module.register_forward_hook(_adding(total, module)).remove)
        return model(*inputs)


def _without(index: Tensor, module: nn.Module) -> Callable[..., tuple[Tensor, ...]]:
    axis = -1 if isinstance(module, nn.Linear) else 1
    return lambda _, given: (given[0].index_fill(axis, index, 0), *given[1:])


def _adding(total: Tensor, module: nn.Module) -> Callable[..., Tensor]:
    def add(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return output + (total if isinstance(module, nn.Linear) else total.reshape(-1, *[1] * (output.ndim - 2)))

    return add


def implied(wanted: nn.Module, plant: Plant, truth: Truth, streams: Sequence[Stream]) -> int:
    """How many parameters are left when all that can go has gone, and tied inputs are stored once."""
    tensors = tensors_of(wanted)
    gone: dict[tuple[int, int], set[int]] = {}
    for stream in streams:
        for span in (*stream.makers, *stream.readers):
            indices = span.all(truth.gone(stream.name))
            gone.setdefault((id(tensors[span.tensor]), span.axis), set()).update(indices)
    total = 0
    for name, parameter in wanted.named_parameters():
        left = parameter.detach()
        for axis in range(left.ndim):
            stays = sorted(set(range(parameter.shape[axis])) - gone.get((id(parameter), axis), set()))
            left = left.index_select(axis, torch.tensor(stays, dtype=torch.int64))
        inputs = sorted(set(range(parameter.shape[1])) - gone.get((id(parameter), 1), set())) if left.ndim > 1 else []
        total += _stored(wanted, plant, name, left, inputs)
    return total + sum(_outputs_left(wanted, path, gone) for path in truth.biased)


def _stored(wanted: nn.Module, plant: Plant, name: str, left: Tensor, inputs: Sequence[int]) -> int:
    """The numbers that a weight keeps, once the inputs that the plan ties, or prunes, are summed."""
    path, _, leaf = name.rpartition(".")
    module = wanted.get_submodule(path)
    if leaf != "weight" or type(module) not in TIABLE or not {name} & {*plant.ties, *plant.pruned}:
        return left.numel()
    if getattr(module, "groups", 1) > 1:
        return left.numel()
    labels = plant.ties.get(name, tuple(range(module.weight.shape[1])))
    nonzero = (left.movedim(1, 0).flatten(1) != 0).any(1).tolist()
    classes = {labels[i] for i, counts in zip(inputs, nonzero, strict=True) if counts}
    return left.numel() // len(inputs) * len(classes)


def _outputs_left(model: nn.Module, path: str, gone: Mapping[tuple[int, int], set[int]]) -> int:
    weight: Any = model.get_submodule(path).weight
    return weight.shape[0] - len(gone.get((id(weight), 0), ()))
