"""Who sees whom in a network, as `explain` finds it, against disturbed inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f

from explain_laws import matrix, positive
from networks import NETWORKS, Net
from tying.explain.marks.dependence import Dependence, find_dependence
from tying.nn import LocallyConnected2d, TiedConv2d


def end_of(dependence: Dependence) -> Any:
    return next(step.node for step in dependence.steps if any(user.op == "output" for user in step.node.users))


def found(dependence: Dependence, *, backwards: bool) -> Tensor:
    """Which outputs depend on which inputs, (outputs, inputs): one mark at a time."""
    end = end_of(dependence)
    one, other = (end, dependence.source) if backwards else (dependence.source, end)
    like, target = dependence.varies[one], dependence.varies[other]
    ask = dependence.backward if backwards else dependence.forward
    lines: list[Tensor] = []
    for i in range(like.numel()):
        mark = torch.zeros(like.numel())
        mark[i] = 1
        lines.append(ask({one: mark.reshape(like.shape)}).get(other, torch.zeros(target.shape)).flatten() > 0)
    return torch.stack(lines, 0 if backwards else 1)


def disturbed(model: nn.Module, x: Tensor, draws: int = 12) -> Tensor:
    """Which outputs change with which inputs, (outputs, inputs), by disturbing each of them, several times."""
    changes: Tensor | None = None
    with torch.no_grad():
        for seed in range(draws):
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn((2, *x.shape), generator=generator, dtype=x.dtype) * (1 + seed)
            before = _first(model(noise[0])).flatten()
            columns = []
            for i in range(x.numel()):
                other = noise[0].clone().flatten()
                other[i] = noise[1].flatten()[i]
                columns.append(_first(model(other.reshape(x.shape))).flatten() != before)
            now = torch.stack(columns, 1)
            changes = now if changes is None else changes | now
    assert changes is not None
    return changes


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def law_dependence(model: nn.Module, x: Tensor, dependence: Dependence, *, exact: bool = True) -> None:
    """What changes is found, from above and from below alike; and nothing else, where it is exact."""
    truth, above, below = (
        disturbed(model, x, 12 if exact else 3),
        found(dependence, backwards=True),
        found(dependence, backwards=False),
    )
    assert torch.equal(above, below)
    assert truth.shape == above.shape, "another number of outputs"
    assert not (truth & ~above).any()
    if exact:
        assert torch.equal(truth, above)


def relu_free(model: nn.Module) -> nn.Module:
    """Softplus for ReLU: a unit that is dead for all draws would hide whom it sees."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus())
    return model


TAKEN = [n for n in NETWORKS if n not in ("attention", "embedding_and_head", "tokens_tied")]
LOOSE = {
    "convolved_without_batch",
    "transposed_convolution",
    "products",
    "unknown_operation",
    "residual",
    "resampled_and_padded",
}
"""Units that are dead for all draws, no rule, or slow: there only that nothing is missed."""


@pytest.mark.parametrize("name", TAKEN)
def test_who_sees_whom_in_small_networks(name: str) -> None:
    model, x = NETWORKS[name].make()
    if not isinstance(x, Tensor) or not x.is_floating_point():
        pytest.skip("no numbers to disturb")
    model, x = relu_free(model), x[:1]
    law_dependence(model, x, find_dependence(model, x), exact=name not in LOOSE)


def causal_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, -1)
    return f.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_hand(mask: float) -> Callable[[Any, Tensor], Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).chunk(3, -1)
        later = torch.full((x.shape[1], x.shape[1]), mask, dtype=x.dtype).triu(1)
        return torch.softmax(q @ k.transpose(1, 2) + later, -1) @ v

    return forward


def filled_in(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, -1)
    earlier = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return torch.softmax((q @ k.transpose(1, 2)).masked_fill(~earlier, -1e9), -1) @ v


def filled_in_logarithm(m: Any, x: Tensor) -> Tensor:
    return f.log_softmax(m.linear(x).masked_fill(torch.tensor([False, True, False]), -1e9), -1)


def sliding(m: Any, x: Tensor) -> Tensor:
    return f.max_pool1d(f.pad(m.conv(x), (2, 0)), 3, 2, 1, ceil_mode=True)[..., :3] + f.avg_pool1d(
        f.interpolate(x, scale_factor=2), 4
    )


MIXES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "causal attention": (lambda: Net(causal_attention, qkv=nn.Linear(2, 6)), (1, 4, 2)),
    "causal attention by hand": (lambda: Net(by_hand(float("-inf")), qkv=nn.Linear(2, 6)), (1, 4, 2)),
    "attention, lowest number": (lambda: Net(by_hand(torch.finfo(torch.float64).min), qkv=nn.Linear(2, 6)), (1, 3, 2)),
    "attention, a number filled in": (lambda: Net(filled_in, qkv=nn.Linear(2, 6)), (1, 4, 2)),
    "logarithm, a number filled in": (lambda: Net(filled_in_logarithm, linear=nn.Linear(2, 3)), (1, 2, 2)),
    "pools and resampling": (lambda: Net(sliding, conv=nn.Conv1d(2, 2, 2, bias=False)), (1, 2, 6)),
    "strided and dilated": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3, 2, 2, 2), nn.Tanh(), nn.Conv2d(2, 2, 2, groups=2)), (1, 1, 5, 6)
    ),
    "circular": (lambda: nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular"), (1, 1, 5)),
    "reflect": (lambda: nn.Conv1d(1, 1, 3, padding=2, padding_mode="reflect"), (1, 1, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(2, 4, 3, 2, 1, groups=2), (1, 2, 4)),
    "local": (
        lambda: nn.Sequential(LocallyConnected2d(1, 2, (4, 4), 3, padding=1), LocallyConnected2d(2, 1, (4, 4), 2)),
        (1, 1, 4, 4),
    ),
    "tied": (lambda: TiedConv2d([0, -1, 0, 1], 2, 2), (1, 4, 3, 3)),
    "normalised": (
        lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.GroupNorm(2, 4), nn.Conv1d(4, 2, 1, groups=2)), (1, 4, 3)
    ),
    "recurrent": (lambda: Net(lambda m, x: m.cell(x)[0], cell=nn.GRU(2, 2, batch_first=True)), (1, 3, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXES)
def test_who_sees_whom_where_places_mix(name: str) -> None:
    build, shape = MIXES[name]
    torch.manual_seed(0)
    model, x = build().double().eval(), torch.randn(shape, dtype=torch.float64)
    dependence = find_dependence(model, x)
    law_dependence(model, x, dependence, exact=name != "recurrent")
    assert bool(dependence.inexact) == (name == "recurrent")


WRONG: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "mask": (MIXES["causal attention"][0], lambda: Net(by_hand(0.0), qkv=nn.Linear(2, 6)), (1, 4, 2)),
    "a number filled in, no mask": (
        lambda: Net(filled_in, qkv=nn.Linear(2, 6)), lambda: Net(by_hand(0.0), qkv=nn.Linear(2, 6)), (1, 4, 2)
    ),
    "no mask": (lambda: Net(by_hand(0.0), qkv=nn.Linear(2, 6)), MIXES["causal attention"][0], (1, 4, 2)),
    "dilation": (
        lambda: nn.Conv1d(1, 1, 3, padding=2, dilation=2), lambda: nn.Conv1d(1, 1, 3, padding=1), (1, 1, 7)
    ),
    "padding on the other side": (
        lambda: nn.Sequential(nn.ZeroPad1d((1, 0)), nn.Conv1d(1, 1, 2)),
        lambda: nn.Sequential(nn.ZeroPad1d((0, 1)), nn.Conv1d(1, 1, 2)), (1, 1, 5),
    ),
    "groups": (lambda: nn.Conv1d(2, 2, 1, groups=2), lambda: nn.Conv1d(2, 2, 1), (1, 2, 3)),
    "ceiling": (lambda: nn.MaxPool1d(2, 1), lambda: nn.MaxPool1d(1, 1), (1, 1, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_dependence_fails_the_law(name: str) -> None:
    right, wrong, shape = WRONG[name]
    torch.manual_seed(0)
    model, x = right().double().eval(), torch.randn(shape, dtype=torch.float64)
    dependence = find_dependence(wrong().double().eval(), x)
    with pytest.raises(AssertionError):
        law_dependence(model, x, dependence)


def test_weights_that_are_zero_connect_nothing() -> None:
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        model.weight[0, 1] = 0
    dependence = find_dependence(model, torch.zeros(1, 3, dtype=torch.float64))
    assert found(dependence, backwards=True).tolist() == [[True, False, True], [True, True, True]]


def test_a_constant_that_the_example_outweighs_is_no_mask() -> None:
    model = Net(lambda _, x: torch.softmax(torch.cat([torch.zeros_like(x), 1e4 * x], 1), 1))
    law_dependence(model, torch.ones(1, 1), find_dependence(model, torch.ones(1, 1)))


def test_the_dense_layer_that_a_convolution_hard_wires_sees_what_the_convolution_sees() -> None:
    conv = positive(nn.Conv2d(1, 2, 3, stride=2, padding=1))
    x = torch.randn(1, 1, 5, 6, dtype=torch.float64)
    dense = matrix(conv, (1, 5, 6))
    linear = nn.Linear(dense.shape[1], dense.shape[0]).double()
    with torch.no_grad():
        linear.weight.copy_(dense)
    ways = (find_dependence(conv, x), find_dependence(linear, x.reshape(1, -1)))
    above, below = (found(way, backwards=True) for way in ways)
    assert torch.equal(above, below)
