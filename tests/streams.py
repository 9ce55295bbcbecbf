"""Channels of a network written down by hand: which slices make them, which read them, and what stands in the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Span:
    """The indices of one axis of a tensor that belong to a channel: `width`, from `offset` + channel · width."""

    tensor: str
    axis: int
    width: int = 1
    offset: int = 0

    def indices(self, channel: int) -> range:
        start = self.offset + channel * self.width
        return range(start, start + self.width)

    def all(self, channels: Sequence[int]) -> list[int]:
        return [index for channel in channels for index in self.indices(channel)]


@dataclass(frozen=True)
class Stream:
    """Channels that run through a network together."""

    name: str
    count: int
    makers: tuple[Span, ...]
    readers: tuple[Span, ...]
    norm: str = ""
    """"layer": normalised with each other by mean and scale, none can go. "rms": by scale, what is zero can go."""
    head: bool = False
    """A channel is a whole attention head (or a key/value head with all its query heads)."""
    leaves: bool = False
    """The numbers are an output of the model as well: none can go."""

    @property
    def free(self) -> bool:
        """Whether a channel can go once all readers are zero, whatever makes it."""
        return not self.norm and not self.leaves


def layer(path: str, axis: int = 0, *, bias: bool = True, width: int = 1) -> list[Span]:
    """What a linear layer or convolution makes."""
    leaves = {"weight": axis, "bias": 0} if bias else {"weight": axis}
    return [Span(f"{path}.{leaf}", a, width) for leaf, a in leaves.items()]


def norm(path: str) -> list[Span]:
    """What a BatchNorm makes."""
    return [Span(f"{path}.{leaf}", 0) for leaf in ("weight", "bias", "running_mean", "running_var")]


def unit(path: str, *, bias: bool = False) -> list[Span]:
    """What a convolution with a BatchNorm behind it makes, in an `nn.Sequential`."""
    return [*layer(f"{path}.0", bias=bias), *norm(f"{path}.1")]


def read(*paths: str, axis: int = 1, width: int = 1, offset: int = 0) -> list[Span]:
    return [Span(f"{path}.weight", axis, width, offset) for path in paths]


def stream(
    model: nn.Module, makers: Sequence[Span], readers: Sequence[Span], count: int | None = None, **traits: object
) -> Stream:
    """A stream as long as its first maker's axis, named after it."""
    first = makers[0]
    if count is None:
        count = tensors_of(model)[first.tensor].shape[first.axis] // first.width
    name = first.tensor.rpartition(".")[0]
    return Stream(name, count, tuple(makers), tuple(readers), **traits)  # type: ignore[arg-type]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name, not detached."""
    named = dict(model.named_buffers(remove_duplicate=False))
    return {**dict(model.named_parameters(remove_duplicate=False)), **named}


def fill(tensors: Mapping[str, Tensor], spans: Sequence[Span], channels: Sequence[int], noise: int | None) -> None:
    """Set what the spans hold of some channels to zero, or to noise between 0.5 and 1.5."""
    generator = torch.Generator().manual_seed(noise or 0)
    for span in spans:
        tensor, index = tensors[span.tensor].detach(), torch.tensor(span.all(channels))
        new = torch.zeros_like(tensor.index_select(span.axis, index))
        if noise is not None:
            new = 0.5 + torch.rand(new.shape, generator=generator, dtype=new.dtype)
        tensor.index_copy_(span.axis, index, new)


class kept:  # noqa: N801, a context like a function
    """Put back what is done to the tensors of some spans."""

    def __init__(self, tensors: Mapping[str, Tensor], spans: Sequence[Span]) -> None:
        self.before = [(tensors[name].detach(), tensors[name].detach().clone()) for name in {s.tensor for s in spans}]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for tensor, value in self.before:
            tensor.copy_(value)


def feels(model: nn.Module, inputs: tuple[Tensor, ...], one: Stream, channels: Sequence[int]) -> float:
    """How far the outputs move, at the most, relative to the largest, when channels that no reader reads are disturbed.

    0 up to rounding: nothing but the readers knows of the channels.
    """
    tensors = tensors_of(model)
    with kept(tensors, [*one.makers, *one.readers]), torch.no_grad():
        fill(tensors, one.readers, channels, None)
        silent = list(numbers(model(*inputs)))
        fill(tensors, one.makers, channels, 1)
        fill(tensors, one.readers, channels, None)  # a reader may be a maker as well, where it is tied
        disturbed = list(numbers(model(*inputs)))
    return max(
        float((a - b).abs().max() / a.abs().max().clamp(min=1e-300)) for a, b in zip(silent, disturbed, strict=True)
    )


def numbers(output: object) -> Iterator[Tensor]:
    """The tensors of an output, whatever holds them, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from numbers(list(output.values()))
    elif isinstance(output, list | tuple):
        for item in output:
            yield from numbers(item)
