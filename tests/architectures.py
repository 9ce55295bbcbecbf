"""Eleven networks of the sizes that people use, for tests of compaction, with their channels written down by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from benchmarks.channels import weights
from torch import Tensor, nn
from torch.nn import functional as f

from families import Bottleneck, Inverted, conv_norm, resnet20_of
from llama import Llama
from networks import Net
from streams import Span, Stream, layer, norm, read, stream, unit


@dataclass(frozen=True)
class Architecture:
    build: Callable[[], nn.Module]
    streams: Callable[[nn.Module], list[Stream]]
    shape: tuple[int, ...]
    tokens: int = 0
    """The inputs are indices below this number."""
    trained: bool = False
    """The weights are real; otherwise they are drawn, and so are the statistics."""
    fixed: bool = False
    """It takes inputs of one size only."""

    def make(self, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The network, float64 and in evaluation mode, and inputs for it.

        Raises:
            DataUnavailableError: If a package or weights are neither here nor to be fetched.
        """
        torch.manual_seed(seed)
        model = self.build().double().eval()
        if not self.trained:
            lived_in(model)
        return model, self.inputs(seed)

    def inputs(self, seed: int, batch: int = 2, *, larger: bool = False) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        first = 0 if self.tokens else 1  # the channels of an image come before its positions
        grown = (size * 3 // 2 if larger and not self.fixed else size for size in self.shape[first:])
        shape = (batch, *self.shape[:first], *grown)
        if self.tokens:
            return (torch.randint(0, self.tokens, shape, generator=generator),)
        return (torch.randn(shape, generator=generator, dtype=torch.float64),)


def lived_in(model: nn.Module) -> None:
    """Move biases, scales and statistics away from 0 and 1, as training does; signals keep their size."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.7, 1.4)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.2 * torch.randn_like(tensor))


ARCHITECTURES: dict[str, Architecture] = {}


def architecture(
    *shape: int,
    streams: Callable[[nn.Module], list[Stream]],
    tokens: int = 0,
    trained: bool = False,
    fixed: bool = False,
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        ARCHITECTURES[build.__name__] = Architecture(build, streams, shape, tokens, trained, fixed)
        return build

    return register


# ---------------------------------------------------------------- chains


def chain(*links: tuple[list[Span], list[Span]]) -> Callable[[nn.Module], list[Stream]]:
    return lambda model: [stream(model, makers, readers) for makers, readers in links]


@architecture(784, fixed=True, streams=chain((layer("0"), read("2")), (layer("2"), read("4"))))
def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


@architecture(
    1,
    28,
    28,
    fixed=True,
    streams=chain((layer("0"), read("3")), (layer("3"), read("7", width=16)), (layer("7"), read("9"))),
)
def lenet5() -> nn.Module:
    """LeCun et al. 1998 as Caffe has it: 20-50-500-10."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


def vgg_streams(model: nn.Module) -> list[Stream]:
    weighty = [name for name, module in model.named_children() if isinstance(module, nn.Conv2d | nn.Linear)]
    return [stream(model, [*layer(a), *norm(str(int(a) + 1))], read(b)) for a, b in pairwise(weighty)]


@architecture(3, 32, 32, streams=vgg_streams, fixed=True)
def vgg16_bn() -> nn.Module:
    """Simonyan and Zisserman 2015 (arXiv 1409.1556) for images of 32 × 32: 13 convolutions, 512, 10."""
    layers: list[nn.Module] = []
    inputs = 3
    for stage in ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3):
        for outputs in stage:
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    head = [nn.Flatten(), nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers, *head)


# ---------------------------------------------------------------- residual streams


def residual(stem: list[Span], entry: str, exit_: str, last: list[Span]) -> Callable[[nn.Module], list[Stream]]:
    """Streams between the blocks: a block adds to the one that it reads, unless it starts another."""

    def streams(model: nn.Module) -> list[Stream]:
        found: list[Stream] = []
        makers, readers = list(stem), list[Span]()
        for name, block in model.get_submodule("blocks").named_children():
            path = f"blocks.{name}"
            readers += read(f"{path}.{entry}.0")
            shortcut = getattr(block, "shortcut", None)
            adds = block.residual if shortcut is None else isinstance(shortcut, nn.Identity)
            if adds:
                makers += unit(f"{path}.{exit_}")
                continue
            if shortcut is not None:
                readers += read(f"{path}.shortcut.0")
            found.append(stream(model, makers, readers))
            makers, readers = unit(f"{path}.{exit_}"), []
            if shortcut is not None:
                makers = unit(f"{path}.shortcut") + makers
        return [*found, stream(model, makers, [*readers, *last])]

    return streams


def inside(*parts: tuple[tuple[str, ...], str]) -> Callable[[nn.Module], list[Stream]]:
    """Streams inside of each block: what units make, and which convolution reads it."""

    def streams(model: nn.Module) -> list[Stream]:
        paths = [f"blocks.{name}" for name, _ in model.get_submodule("blocks").named_children()]
        return [
            stream(model, [span for maker in makers for span in unit(f"{path}.{maker}")], read(f"{path}.{reader}.0"))
            for path in paths
            for makers, reader in parts
        ]

    return streams


def both(*parts: Callable[[nn.Module], list[Stream]]) -> Callable[[nn.Module], list[Stream]]:
    return lambda model: [one for part in parts for one in part(model)]


@architecture(3, 32, 32, streams=both(residual(unit("stem.0"), "a", "b", read("head")), inside((("a",), "b"))))
def resnet20() -> nn.Module:
    return resnet20_of()


@architecture(
    3, 64, 64,
    streams=both(residual(unit("stem"), "a", "c", read("head")), inside((("a",), "b"), (("b",), "c"))),
)  # fmt: skip
def resnet50() -> nn.Module:
    """He et al. 2016 (arXiv 1512.03385), table 1."""
    stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    blocks, inputs = list[nn.Module](), 64
    for stage, (width, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for i in range(count):
            blocks.append(Bottleneck(inputs, width, 4 * width, 2 if stage and not i else 1))
            inputs = 4 * width
    return Net(
        lambda m, x: m.head(torch.flatten(f.adaptive_avg_pool2d(m.blocks(m.stem(x)), 1), 1)),
        stem=stem, blocks=nn.Sequential(*blocks), head=nn.Linear(2048, 1000),
    )  # fmt: skip


@architecture(
    3, 64, 64,
    streams=both(
        residual(unit("stem"), "up", "down", read("last.0")),
        inside((("up", "depth"), "down")),
        chain((unit("last"), read("head"))),
    ),
)  # fmt: skip
def mobilenet_v2() -> nn.Module:
    """Sandler et al. 2018 (arXiv 1801.04381), table 2."""
    blocks, inputs = list[nn.Module](), 32
    for expansion, outputs, count, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)
    ):  # fmt: skip
        for i in range(count):
            blocks.append(Inverted(inputs, outputs, stride if i == 0 else 1, expansion))
            inputs = outputs
    return Net(
        lambda m, x: m.head(f.relu6(m.last(m.blocks(f.relu6(m.stem(x))))).mean((2, 3))),
        stem=conv_norm(3, 32, 3, 2), blocks=nn.Sequential(*blocks), last=conv_norm(320, 1280, 1),
        head=nn.Linear(1280, 1000),
    )  # fmt: skip


def lite_streams(model: nn.Module) -> list[Stream]:
    found: list[Stream] = []
    makers = [*layer("_conv_stem", bias=False), *norm("_bn0")]
    readers: list[Span] = []
    for name, block in model.get_submodule("_blocks").named_children():
        path = f"_blocks.{name}"
        depth = [*layer(f"{path}._depthwise_conv", bias=False), *norm(f"{path}._bn1")]
        out = [*layer(f"{path}._project_conv", bias=False), *norm(f"{path}._bn2")]
        project = read(f"{path}._project_conv")
        if not hasattr(block, "_expand_conv"):
            found.append(stream(model, [*makers, *depth], project))
            makers = out
            continue
        wide = [*layer(f"{path}._expand_conv", bias=False), *norm(f"{path}._bn0"), *depth]
        found.append(stream(model, wide, project))
        readers += read(f"{path}._expand_conv")
        shapes = {key: tensor.shape for key, tensor in block.named_parameters()}
        stride = block.get_submodule("_depthwise_conv").stride[0]
        if stride == 1 and shapes["_expand_conv.weight"][1] == shapes["_project_conv.weight"][0]:
            makers = [*makers, *out]
        else:
            found.append(stream(model, makers, readers))
            makers, readers = out, []
    last = [*layer("_conv_head", bias=False), *norm("_bn1")]
    return [*found, stream(model, makers, [*readers, *read("_conv_head")]), stream(model, last, read("_fc"))]


@architecture(3, 64, 64, streams=lite_streams, trained=True)
def efficientnet_lite0() -> nn.Module:
    return weights.efficientnet_lite0()


# ---------------------------------------------------------------- skips


def twice(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(conv_norm(inputs, outputs), nn.ReLU(), conv_norm(outputs, outputs), nn.ReLU())


class UNet(nn.Module):
    """Ronneberger et al. 2015 (arXiv 1505.04597) at half its width, padded, with BatchNorm."""

    def __init__(self, width: int = 32, depth: int = 4, classes: int = 2) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(depth + 1)]
        self.down = nn.ModuleList(twice(a, b) for a, b in pairwise([3, *widths]))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in widths[:-1])
        self.join = nn.ModuleList(twice(2 * w, w) for w in widths[:-1])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for i, down in enumerate(self.down):
            x = down(f.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for i in reversed(range(len(self.up))):
            x = self.join[i](torch.cat([skips[i], self.up[i](x)], 1))
        return self.head(x)


def unet_streams(model: UNet) -> list[Stream]:
    found: list[Stream] = []
    depth = len(model.up)
    for i in range(depth + 1):
        found.append(stream(model, unit(f"down.{i}.0"), read(f"down.{i}.2.0")))
        later = read(f"down.{i + 1}.0.0", f"join.{i}.0.0") if i < depth else read(f"up.{i - 1}", axis=0)
        found.append(stream(model, unit(f"down.{i}.2"), later))
    for i, up in enumerate(model.up):
        width = up.weight.shape[1]
        found.append(stream(model, layer(f"up.{i}", 1), read(f"join.{i}.0.0", offset=width)))
        found.append(stream(model, unit(f"join.{i}.0"), read(f"join.{i}.2.0")))
        found.append(stream(model, unit(f"join.{i}.2"), read(f"up.{i - 1}", axis=0) if i else read("head")))
    return found


@architecture(3, 32, 32, streams=unet_streams)
def unet() -> nn.Module:
    return UNet()


# ---------------------------------------------------------------- transformers


def bert_streams(model: nn.Module) -> list[Stream]:
    """Heads, perceptrons, and the one stream that all LayerNorms take part in, which leaves the model."""
    found: list[Stream] = []
    tables = [f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")]
    makers = [*(Span(name, 1) for name in tables), *layer("embeddings.LayerNorm")]
    readers = read("pooler.dense")
    for name, block in model.get_submodule("encoder.layer").named_children():
        path = f"encoder.layer.{name}"
        own, out = f"{path}.attention.self", f"{path}.attention.output"
        width = block.get_submodule("attention.self").attention_head_size
        heads = [span for part in ("query", "key", "value") for span in layer(f"{own}.{part}", width=width)]
        found.append(stream(model, heads, read(f"{out}.dense", width=width), head=True))
        found.append(stream(model, layer(f"{path}.intermediate.dense"), read(f"{path}.output.dense")))
        for end in (out, f"{path}.output"):
            makers += [*layer(f"{end}.dense"), *layer(f"{end}.LayerNorm")]
        readers += read(*(f"{own}.{part}" for part in ("query", "key", "value")), f"{path}.intermediate.dense")
    return [*found, stream(model, makers, readers, norm="layer", leaves=True)]


@architecture(12, streams=bert_streams, tokens=30522)
def bert_small() -> nn.Module:
    return weights.bert_small()


@architecture(12, streams=bert_streams, tokens=30522, trained=True)
def minilm() -> nn.Module:
    return weights.minilm()


def llama_streams(model: Llama) -> list[Stream]:
    found: list[Stream] = []
    makers, readers = [Span("embed_tokens.weight", 1)], read("lm_head")
    for i, block in enumerate(model.layers):
        path, size = f"layers.{i}", block.head_dim
        wide = size * (block.num_heads // block.num_key_value_heads)
        heads = [Span(f"{path}.{part}_proj.weight", 0, n) for part, n in (("k", size), ("v", size), ("q", wide))]
        found.append(stream(model, heads, read(f"{path}.o_proj", width=wide), head=True))
        gated = [Span(f"{path}.{part}_proj.weight", 0) for part in ("up", "gate")]
        found.append(stream(model, gated, read(f"{path}.down_proj")))
        makers += [Span(f"{path}.{leaf}.weight", 0) for leaf in ("o_proj", "down_proj", "norm1", "norm2")]
        readers += read(*(f"{path}.{part}_proj" for part in ("q", "k", "v", "gate", "up")))
    makers.append(Span("norm.weight", 0))
    return [*found, stream(model, makers, readers, norm="rms")]


@architecture(12, streams=llama_streams, tokens=32000)
def llama_like() -> nn.Module:
    return Llama()
