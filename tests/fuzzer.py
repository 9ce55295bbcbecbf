"""Random networks drawn, by seed, from the operations that channels have rules for, and a few that block."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as f

from networks import randomised

Step = Callable[["Drawn", list[Tensor]], Tensor]
ACTIVATIONS = (f.relu, f.gelu, f.silu, torch.tanh, f.hardswish, f.leaky_relu, torch.sigmoid, f.softplus, torch.abs)


class Drawn(nn.Module):
    """A program of steps; each reads values by number and appends one."""

    def __init__(self, seed: int, steps: Sequence[Callable[[Drawn, int], int]] | None = None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.draw = random.Random(seed)
        self.parts = nn.ModuleList()
        self.steps: list[Step] = []
        self.names: list[str] = []
        self.values = [torch.randn(2, self.draw.choice((2, 3)), 6, 6)]
        self.shape = tuple(self.values[0].shape)
        self.eval()
        for _ in range(self.draw.randint(3, 7)):
            self.draw.choice(steps or MAPS)(self, self.draw.randrange(max(0, len(self.values) - 3), len(self.values)))
        head(self, len(self.values) - 1)
        del self.values

    def part(self, module: nn.Module) -> int:
        self.parts.append(module.eval())
        return len(self.parts) - 1

    def add(self, step: Step, name: str) -> int:
        with torch.no_grad():
            self.values.append(step(self, self.values))
        self.steps.append(step)
        self.names.append(name)
        return len(self.values) - 1

    def module(self, module: nn.Module, at: int) -> int:
        index = self.part(module)
        return self.add(lambda m, v: m.parts[index](v[at]), type(module).__name__)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            values.append(step(self, values))
        return values[-1]


def channels(net: Drawn, at: int) -> int:
    return net.values[at].shape[1]


def size(net: Drawn, at: int) -> int:
    return min(net.values[at].shape[2:])


def convolve(net: Drawn, at: int) -> int:
    kernel, bias = net.draw.choice((1, 2, 3)), net.draw.random() < 0.7
    padding = net.draw.choice((0, 1)) if size(net, at) >= kernel else 1
    mode = net.draw.choice(("zeros", "zeros", "circular")) if padding else "zeros"
    out, stride = net.draw.randint(2, 5), net.draw.choice((1, 1, 2))
    return net.module(nn.Conv2d(channels(net, at), out, kernel, stride, padding, bias=bias, padding_mode=mode), at)


def normalise(net: Drawn, at: int) -> int:
    c = channels(net, at)
    kinds: list[nn.Module] = [nn.BatchNorm2d(c), nn.BatchNorm2d(c), nn.PReLU(c), nn.PReLU(), nn.Dropout2d()]
    return net.module(net.draw.choice(kinds), at)


def activate(net: Drawn, at: int) -> int:
    function = net.draw.choice(ACTIVATIONS)
    return net.add(lambda m, v: function(v[at]), function.__name__)


def pool(net: Drawn, at: int) -> int:
    if size(net, at) < 2:
        return activate(net, at)
    return net.module(net.draw.choice((nn.MaxPool2d(2), nn.AvgPool2d(2, 1), nn.AdaptiveAvgPool2d(2))), at)


def residual(net: Drawn, at: int) -> int:
    inside = activate(net, net.module(nn.Conv2d(channels(net, at), net.draw.randint(2, 4), 3, padding=1), at))
    back = net.module(nn.Conv2d(channels(net, inside), channels(net, at), 1), inside)
    return net.add(lambda m, v: v[at] + v[back], "add")


def join(net: Drawn, at: int) -> int:
    other = net.module(nn.Conv2d(channels(net, at), net.draw.randint(1, 3), 1), at)
    return net.add(lambda m, v: torch.cat([v[at], v[other], v[at]], 1), "cat")


def excite(net: Drawn, at: int) -> int:
    c = channels(net, at)
    squeeze = net.add(lambda m, v: v[at].mean((2, 3), keepdim=True), "mean")
    inside = activate(net, net.module(nn.Conv2d(c, 2, 1), squeeze))
    gate = net.module(nn.Conv2d(2, net.draw.choice((c, 1)), 1), inside)
    return net.add(lambda m, v: v[at] * torch.sigmoid(v[gate]), "gate")


def group(net: Drawn, at: int) -> int:
    c = channels(net, at)
    groups = net.draw.choice([g for g in (1, 2, c) if c % g == 0])
    return net.module(nn.Conv2d(c, groups * net.draw.choice((1, 2)), 3, padding=1, groups=groups), at)


def enlarge(net: Drawn, at: int) -> int:
    if size(net, at) > 4:
        return pool(net, at)
    if net.draw.random() < 0.5:
        return net.module(nn.Upsample(scale_factor=2, mode=net.draw.choice(("nearest", "bilinear"))), at)
    return net.module(nn.ConvTranspose2d(channels(net, at), 3, 2, stride=2), at)


def twice(net: Drawn, at: int) -> int:
    index = net.part(nn.Conv2d(channels(net, at), channels(net, at), 1))
    return net.add(lambda m, v: m.parts[index](torch.tanh(m.parts[index](v[at]))), "twice")


def gate(net: Drawn, at: int) -> int:
    wide = net.module(nn.Conv2d(channels(net, at), 6, 1), at)
    return net.add(lambda m, v: torch.mul(*v[wide].chunk(2, 1)), "chunk")


def shuffle(net: Drawn, at: int) -> int:
    steps: list[tuple[Step, str]] = [
        (lambda m, v: v[at].flip(1), "flip"),
        (lambda m, v: v[at].permute(0, 2, 3, 1).flatten(1, 2).transpose(1, 2).unsqueeze(-1), "as one long image"),
        (lambda m, v: v[at].repeat(1, 2, 1, 1), "repeat"),
        (lambda m, v: torch.stack([v[at], -v[at]], 2).flatten(1, 2), "interleave"),
        (lambda m, v: f.pad(v[at], (1, 0, 0, 1)), "pad"),
        (lambda m, v: v[at][:, :, :1] * 2, "one line"),
    ]
    return net.add(*net.draw.choice(steps))


def tokens(net: Drawn, at: int) -> int:
    """A position-wise perceptron, or attention, over the positions of the map."""
    c, size = channels(net, at), net.values[at].shape[2:]
    up, down = net.part(nn.Linear(c, 5)), net.part(nn.Linear(5, c))
    steps: list[tuple[Step, str]] = [
        (lambda m, v: m.parts[down](torch.relu(m.parts[up](v[at].flatten(2).mT))).mT.unflatten(2, size), "tokens"),
        (lambda m, v: v[at] + m.parts[down](m.parts[up](v[at].movedim(1, -1)).softmax(1)).movedim(-1, 1), "mixed"),
        (lambda m, v: attend(m.parts[up](v[at].flatten(2).mT), m.parts[down]).mT.unflatten(2, size), "attend"),
    ]
    return net.add(*net.draw.choice(steps))


def attend(x: Tensor, out: nn.Module) -> Tensor:
    return out((x @ x.mT).softmax(-1) @ x)


def in_place(net: Drawn, at: int) -> int:
    def aliased(m: Drawn, v: list[Tensor]) -> Tensor:
        x = v[at] * 1
        same = x.flatten(2)
        x.relu_()
        return x + same.view_as(x)

    steps: list[tuple[Step, str]] = [
        (lambda m, v: f.relu_(v[at] * 2).add_(v[at]), "in place"),
        (lambda m, v: f.hardtanh_(v[at] * 2), "in place"),
        (aliased, "in place, aliased"),
    ]
    return net.add(*net.draw.choice(steps))


def line(net: Drawn, at: int) -> int:
    index = net.part(nn.Conv1d(channels(net, at), 3, 1))
    return net.add(lambda m, v: m.parts[index](v[at].flatten(2)).unsqueeze(-1), "as a line")


def block(net: Drawn, at: int) -> int:
    c = channels(net, at)
    steps: list[tuple[Step, str]] = [
        (lambda m, v: v[at].softmax(1), "softmax"),
        (lambda m, v: v[at][:, 1:] if c > 1 else v[at], "slice"),
        (lambda m, v: v[at] - v[at].mean(1, keepdim=True), "centre"),
        (lambda m, v: f.group_norm(v[at], 1), "group_norm"),
        (lambda m, v: v[at].cumsum(1), "cumsum"),
        (lambda m, v: f.normalize(v[at], dim=1), "normalise"),
        (lambda m, v: v[at].roll(1, 1), "roll"),
        (lambda m, v: f.pad(v[at], (0, 0, 0, 0, 1, 1)), "pad channels"),
    ]
    return net.add(*net.draw.choice(steps))


def head(net: Drawn, at: int) -> int:
    ways: list[tuple[Step, str]] = [
        (lambda m, v: v[at].flatten(1), "flatten"),
        (lambda m, v: v[at].permute(0, 2, 3, 1).flatten(1), "permute, flatten"),
        (lambda m, v: v[at].transpose(1, 3).reshape(v[at].shape[0], -1), "transpose, reshape"),
        (lambda m, v: v[at].amax((2, 3)), "amax"),
        (lambda m, v: torch.cat([v[at].flatten(1), v[at].mean((2, 3))], 1), "flatten, cat"),
    ]
    flat = net.add(*net.draw.choice(ways))
    hidden = net.draw.randint(2, 5)
    body = net.module(nn.Linear(channels(net, flat), hidden), flat)
    if net.draw.random() < 0.5:
        body = net.module(net.draw.choice((nn.BatchNorm1d(hidden), nn.LayerNorm(hidden))), body)
    return net.module(nn.Linear(hidden, 2), activate(net, body))


MAPS = (
    *(convolve, convolve, convolve, normalise, normalise, activate, activate, pool, residual, join),
    *(excite, group, enlarge, twice, gate, shuffle, shuffle, tokens, in_place, line, block),
)


def fuzzed(seed: int, steps: Sequence[Callable[[Drawn, int], int]] | None = None) -> tuple[nn.Module, Tensor]:
    """Return a network, of these steps if given, and inputs for it, float64."""
    model = Drawn(seed, steps)
    return randomised(model), torch.randn(model.shape, dtype=torch.float64)
