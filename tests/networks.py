"""Small networks, registered with what is known about their channels by hand; and a seeded fuzzer that draws more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as f


class Net(nn.Module):
    """Modules by name, and a forward given as a function of them."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self._forward = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self._forward(self, *inputs)


@dataclass(frozen=True)
class Network:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    free: int
    """How many channels can be removed, counted by hand."""
    blocked: tuple[str, ...] = ()
    """Words that occur in the reasons of blocked channels, inputs and outputs left out."""
    literal: bool = False
    """The forward holds sizes in numbers: cutting must fail, the rest holds."""

    def make(self, seed: int = 0) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(seed)
        return randomised(self.build()), torch.randn(self.shape, dtype=torch.float64)


def randomised(model: nn.Module) -> nn.Module:
    """Float64, evaluation mode, statistics and affine parameters away from 0 and 1."""
    model = model.double().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.normal_()
    return model


NETWORKS: dict[str, Network] = {}


def network(
    *shape: int, free: int, blocked: tuple[str, ...] = (), literal: bool = False
) -> Callable[[Callable[[], nn.Module]], None]:
    def register(build: Callable[[], nn.Module]) -> None:
        NETWORKS[build.__name__] = Network(build, shape, free, blocked, literal)

    return register


@network(2, 4, free=8)
def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2))


@network(2, 4, free=5)
def mlp_with_batchnorm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 2))


@network(2, 3, 4, free=5)
def tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2))


@network(2, 1, 12, 12, free=3 + 4 + 6)
def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2, padding=1), nn.ReLU(),
        nn.AvgPool2d(3), nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 2),
    )  # fmt: skip


@network(2, 2, 9, free=3 + 4)
def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.PReLU(3), nn.Conv1d(3, 4, 2), nn.AdaptiveAvgPool1d(2),
        nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip


@network(2, 1, 5, 5, 5, free=3)
def conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 3, 2), nn.BatchNorm3d(3), nn.LeakyReLU(), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(24, 2)
    )


@network(2, 3, 6, 6, free=4 + 5)
def residual() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = f.relu(m.stem(x))
        x = f.relu(x + m.second(f.relu(m.first(x))))
        return m.head(x.mean((2, 3)))

    conv = nn.Conv2d
    return Net(forward, stem=conv(3, 4, 3), first=conv(4, 5, 3, padding=1), second=conv(5, 4, 1), head=nn.Linear(4, 2))


@network(2, 3, 6, 6, free=4 + 2)
def concatenation() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        both = torch.cat([m.wide(x), f.silu(m.narrow(x))], 1)
        return m.head(f.adaptive_avg_pool2d(m.norm(both), 2).flatten(1))

    return Net(
        forward, wide=nn.Conv2d(3, 4, 3), narrow=nn.Conv2d(3, 2, 3), norm=nn.BatchNorm2d(6), head=nn.Linear(24, 2)
    )


@network(2, 4, free=5)
def two_readers() -> nn.Module:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = f.elu(m.body(x))
        return m.left(x), m.right(x) + 1

    return Net(forward, body=nn.Linear(4, 5), left=nn.Linear(5, 2), right=nn.Linear(5, 3))


@network(2, 1, 4, 5, free=3)
def permute_then_flatten() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.conv(x).permute(0, 2, 3, 1).flatten(1)), conv=nn.Conv2d(1, 3, 2), head=nn.Linear(36, 2)
    )


@network(2, 1, 4, 5, free=3 + 2)
def flatten_a_concatenation() -> nn.Module:
    return Net(
        lambda m, x: m.head(torch.cat([m.a(x).flatten(1), m.b(x).flatten(1)], 1)),
        a=nn.Conv2d(1, 3, 2), b=nn.Conv2d(1, 2, 3), head=nn.Linear(36 + 12, 2),
    )  # fmt: skip


@network(2, 4, free=4)
def called_twice() -> nn.Module:
    return Net(
        lambda m, x: m.head(torch.tanh(m.body(torch.tanh(m.body(m.first(x)))))),
        first=nn.Linear(4, 4), body=nn.Linear(4, 4), head=nn.Linear(4, 2),
    )  # fmt: skip


@network(2, 4, free=3)
def tied_weights() -> nn.Module:
    model = Net(
        lambda m, x: m.join(f.relu(m.a(x)) * 0.5 + m.c(f.relu(m.b(x)))),
        a=nn.Linear(4, 3), b=nn.Linear(4, 3), c=nn.Linear(3, 3), join=nn.Linear(3, 2),
    )  # fmt: skip
    model.b.weight = model.a.weight
    model.c.bias = model.b.bias
    return model


@network(2, 4, free=3)
def transposed_tie() -> nn.Module:
    return Net(lambda m, x: f.linear(f.relu(m.encoder(x)), m.encoder.weight.t()), encoder=nn.Linear(4, 3))


@network(2, 3, 4, free=6, blocked=("layer_norm in 'norm'",))
def layernorm_residual() -> nn.Module:
    return Net(
        lambda m, x: m.head((h := m.embed(x)) + m.down(f.gelu(m.up(m.norm(h))))),
        embed=nn.Linear(4, 5), norm=nn.LayerNorm(5), up=nn.Linear(5, 6), down=nn.Linear(6, 5), head=nn.Linear(5, 2),
    )  # fmt: skip


@network(2, 4, free=0, blocked=("softmax",))
def softmax() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Softmax(-1), nn.Linear(5, 2))


@network(2, 3, 4, free=5)
def softmax_over_tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Softmax(1), nn.Linear(5, 2))


@network(2, 3, 5, 5, free=4 + 6)
def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 8, 3, groups=4), nn.Hardswish(), nn.Conv2d(8, 6, 1),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 2),
    )  # fmt: skip


@network(2, 4, 5, 5, free=2)
def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 3))


@network(2, 3, 4, 4, free=4 + 3)
def transposed_convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2, stride=2), nn.ReLU(), nn.Conv2d(3, 1, 1)
    )


@network(2, 3, 5, 5, free=4 + 2 + 3)
def squeeze_and_excite() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = f.silu(m.conv(x))
        gate = torch.sigmoid(m.excite(f.relu(m.squeeze(f.adaptive_avg_pool2d(x, 1)))))
        return m.head(m.last(x * gate).amax((2, 3)))

    conv = nn.Conv2d
    return Net(
        forward, conv=conv(3, 4, 3), squeeze=conv(4, 2, 1), excite=conv(2, 4, 1), last=conv(4, 3, 1),
        head=nn.Linear(3, 2),
    )  # fmt: skip


@network(2, 1, 6, 6, free=3, literal=True)
def literal_view() -> nn.Module:
    return Net(
        lambda m, x: m.head(f.max_pool2d(m.conv(x), 2).view(-1, 3 * 2 * 2)), conv=nn.Conv2d(1, 3, 3),
        head=nn.Linear(12, 2),
    )  # fmt: skip


@network(2, 4, free=3)
def gated() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        value, gate = m.up(x).chunk(2, -1)
        return m.down(value * torch.sigmoid(gate))

    return Net(forward, up=nn.Linear(4, 6), down=nn.Linear(3, 2))


@network(2, 4, free=5)
def gated_linear_unit() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 10), nn.GLU(), nn.Linear(5, 2))


@network(2, 1, 6, 6, free=3)
def batchnorm_without_statistics() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)
    )


@network(2, 4, free=5)
def casts() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.body(x).to(x).contiguous().type_as(x).double()),
        body=nn.Linear(4, 5),
        head=nn.Linear(5, 2),
    )


@network(2, 4, free=0, blocked=("slice",))
def sliced() -> nn.Module:
    return Net(lambda m, x: m.head(m.body(x)[:, 1:4]), body=nn.Linear(4, 5), head=nn.Linear(3, 2))


@network(2, 4, free=0, blocked=("split_with_sizes",))
def split_unevenly() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = torch.split(m.body(x), [2, 3], 1)
        return m.a(a) + m.b(b)

    return Net(forward, body=nn.Linear(4, 5), a=nn.Linear(2, 2), b=nn.Linear(3, 2))


@network(2, 3, 4, free=0, blocked=("scattered over several axes",))
def heads_cut_apart() -> nn.Module:
    return Net(
        lambda m, x: m.head(f.relu(m.body(x).unflatten(-1, (2, 3))).flatten(-2)),
        body=nn.Linear(4, 6), head=nn.Linear(6, 2),
    )  # fmt: skip


@network(2, 4, 5, 5, free=2)
def groupnorm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 2, 3))


@network(2, 4, 5, 5, free=4)
def instancenorm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4, affine=True), nn.ReLU(), nn.Conv2d(4, 2, 3))


@network(2, 4, free=0, blocked=("sort", "made by sort"))
def unknown_operation() -> nn.Module:
    return Net(lambda m, x: m.head(m.body(x).sort(-1)[0]), body=nn.Linear(4, 5), head=nn.Linear(5, 2))


@network(2, 4, free=0, blocked=("mean",))
def mean_of_channels() -> nn.Module:
    return Net(
        lambda m, x: m.head((h := m.body(x)) * h.mean(1, keepdim=True)), body=nn.Linear(4, 5), head=nn.Linear(5, 2)
    )


@network(2, 4, free=0, blocked=("the buffer 'mask'",))
def buffer_mask() -> nn.Module:
    model = Net(lambda m, x: m.head(m.body(x) * m.mask), body=nn.Linear(4, 5), head=nn.Linear(5, 2))
    model.register_buffer("mask", torch.rand(5))
    return model


@network(2, 3, 4, free=5)
def scales_and_positions() -> nn.Module:
    model = Net(lambda m, x: m.head((m.body(x) + m.position) * m.scale), body=nn.Linear(4, 5), head=nn.Linear(5, 2))
    model.position = nn.Parameter(torch.randn(1, 3, 5))
    model.scale = nn.Parameter(torch.rand(5))
    return model


@network(2, 3, 4, free=0, blocked=("along another axis", "made by linear in 'mix'"))
def mixed_over_tokens() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.mix(m.body(x).transpose(1, 2)).transpose(1, 2)),
        body=nn.Linear(4, 5), mix=nn.Linear(3, 3), head=nn.Linear(5, 2),
    )  # fmt: skip


@network(2, 3, 6, 6, free=4 + 4)
def resampled_and_padded() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Upsample(scale_factor=2), nn.ZeroPad2d(1),
        nn.Conv2d(4, 4, 3), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 2, 3, padding="same"),
    )  # fmt: skip


@network(2, 3, 6, 6, free=3 + 4)
def in_place() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        x += 1
        kept = f.relu_(x).flatten(2)
        y = m.second(x).relu_()
        y.view(-1).mul_(2)
        return m.head(y.sum((2, 3))) + m.side(kept.mean(2))

    return Net(forward, first=nn.Conv2d(3, 3, 3), second=nn.Conv2d(3, 4, 3), head=nn.Linear(4, 2), side=nn.Linear(3, 2))


@network(2, 4, free=5, blocked=("amax",))
def dropped_result() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.relu_(m.body(x))
        m.side(h).amax(1)
        return m.head(h)

    return Net(forward, body=nn.Linear(4, 5), side=nn.Linear(5, 3), head=nn.Linear(5, 2))


@network(2, 4, free=0, blocked=("whose result forward drops", "made by slice_scatter"))
def dropped_after_decomposition() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.body(x)
        h[:, :2] *= 2
        m.side(h).amax(1)
        return m.head(h)

    return Net(forward, body=nn.Linear(4, 5), side=nn.Linear(5, 3), head=nn.Linear(5, 2))


@network(2, 3, 4, free=6 + 2, literal=True)
def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    return nn.Sequential(layer, nn.Linear(4, 2))


@network(2, 3, 5, free=4)
def convolved_without_batch() -> nn.Module:
    return Net(
        lambda m, x: m.second(f.max_pool1d(f.relu(m.first(x[0])), 2)),
        first=nn.Conv1d(3, 4, 2),
        second=nn.Conv1d(4, 2, 1),
    )


@network(2, 4, free=5 + 3)
def products() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.addmm(m.bias, x, m.first).tanh()
        h = torch.matmul(m.second, h.t()).t().relu()
        return h @ m.third

    model = Net(forward)
    for name, shape in (("first", (4, 5)), ("bias", (5,)), ("second", (3, 5)), ("third", (3, 2))):
        model.register_parameter(name, nn.Parameter(torch.randn(shape)))
    return model
