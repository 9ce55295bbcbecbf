"""Constants that depend on how many positions or samples there are, and rules that take them for constants."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f

from networks import Net
from tying.channels import constants, lengths, operations
from tying.channels.constants import MASKS
from tying.enforce.compaction import compare
from tying.enforce.compaction.compact import compact
from tying.enforce.compaction.probes import Case, probes
from tying.groups import Groups
from tying.outputs import difference
from tying.plan import Tie, TiePlan

PLAN = TiePlan([Tie.of("a.weight", Groups.outputs(), [-1, -1, 0, 1, 2, 3, 4, 5])])
Between = Callable[[Tensor], Tensor]

SEQUENCES: dict[str, tuple[Between, int]] = {
    "sum": (lambda h: h.sum(1), 8),
    "sum of samples": (lambda h: h.sum(0), 8),
    "cumsum": (lambda h: h.cumsum(1), 8),
    "softmax": (lambda h: h.softmax(1), 8),
    "logsumexp": (lambda h: h.logsumexp(1), 8),
    "normalize": (lambda h: f.normalize(h, dim=1), 8),
    "norm": (lambda h: torch.linalg.vector_norm(h, dim=1), 8),
    "ones": (lambda h: h.mT @ torch.ones(h.shape[1], dtype=h.dtype), 8),
    "matrix of ones": (lambda h: h + torch.ones(h.shape[1], h.shape[1], dtype=h.dtype) @ h, 8),
    "divided": (lambda h: h / h.shape[1], 8),
    "kernel": (
        lambda h: f.conv1d(h.mT, torch.ones(8, 1, h.shape[1], dtype=h.dtype), groups=8).flatten(1),
        8,
    ),
    "padded": (lambda h: f.pad(h, (0, 0, 0, h.shape[1] % 8 // 4)).amin(1), 8),
    "std": (lambda h: h.std(1), 6),
    "mean": (lambda h: h.mean(1), 6),
    "amax": (lambda h: h.amax(1), 6),
    "centred": (lambda h: h - h.mean(0), 6),
}
"""What stands between two layers, and how many outputs of the first are left, once two are constant."""
IMAGES: dict[str, tuple[Between, int]] = {
    "sum": (lambda h: h.sum((2, 3)), 8),
    "norm": (lambda h: h.norm(dim=(2, 3)), 8),
    "ones": (lambda h: h.flatten(2) @ torch.ones(h.shape[2] * h.shape[3], dtype=h.dtype), 8),
    "divided": (lambda h: (h / h.shape[-1]).mean((2, 3)), 8),
    "windows as large": (lambda h: f.avg_pool2d(h, h.shape[2:], divisor_override=1).flatten(1), 8),
    "windows over the border": (
        lambda h: f.avg_pool2d(h, 4, ceil_mode=True, divisor_override=2).mean((2, 3)),
        8,
    ),
    "mean": (lambda h: h.mean((2, 3)), 6),
    "amax": (lambda h: h.amax((2, 3)), 6),
}
KINDS = {"sequence": (SEQUENCES, nn.Linear), "image": (IMAGES, nn.Conv2d)}
CASES = [(kind, name) for kind, (cases, _) in KINDS.items() for name in cases]


def between(kind: str, name: str, divisor: int) -> tuple[nn.Module, Tensor]:
    """A network that takes multiples of one length only: nearer ones are refused by itself."""
    made = KINDS[kind][0][name][0]

    def forward(m: Net, x: Tensor) -> Tensor:
        assert (x.shape[1] if x.ndim == 3 else x.shape[2] + x.shape[3]) % divisor == 0
        return m.o(made(m.a(x)))

    torch.manual_seed(0)
    layer = nn.Linear(3, 8) if kind == "sequence" else nn.Conv2d(3, 8, 1)
    return Net(forward, a=layer, o=nn.Linear(8, 4)).double().eval(), example(kind, 2, 8)


def example(kind: str, batch: int, length: int) -> Tensor:
    shape = (batch, length, 3) if kind == "sequence" else (batch, 3, length, length)
    return torch.randn(shape, dtype=torch.float64)


def law_the_same_at_every_length(kind: str, name: str, divisor: int = 4) -> int:
    """Compacted, a network computes the same on longer and on more samples. Returns how many outputs are left."""
    model, x = between(kind, name, divisor)
    small = compact(model, PLAN, x)
    with torch.no_grad():
        model.a.weight[:2] = 0
    for batch, length in ((2, 8), (3, 8), (2, 4), (2, 12), (5, 32 if divisor > 1 else 33)):
        other = example(kind, batch, length)
        with torch.no_grad():
            assert difference([model(other)], [small(other)]) <= 1e-9, (kind, name, batch, length)
    return len(small.a.weight)


@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.parametrize("divisor", [4, 1])
def test_what_depends_on_the_length_stays_and_the_rest_goes(kind: str, name: str, divisor: int) -> None:
    assert law_the_same_at_every_length(kind, name, divisor) == KINDS[kind][0][name][1]


def nothing_seen(runs: object, inputs: object) -> list[Case]:
    return []


BROKEN: dict[str, tuple[tuple[str, ...], Callable[[pytest.MonkeyPatch], None]]] = {
    "what adds up": (
        ("sum", "softmax", "logsumexp", "normalize", "norm"),
        lambda patch: patch.setattr(operations, "ADDING_UP", frozenset()),
    ),
    "a length": (("divided",), lambda patch: patch.setattr(constants, "lengths_of", lambda inputs: frozenset())),
    "a padding of nothing": (("padded",), lambda patch: patch.setitem(MASKS, "pad", constants._moved)),  # pyright: ignore[reportPrivateUsage]
    "sizes": (
        ("ones", "matrix of ones", "kernel", "sum"),
        lambda patch: patch.setattr(constants, "depends", lambda *_: False),
    ),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_without_a_rule_the_law_fails(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "probes", nothing_seen)
    names, break_ = BROKEN[rule]
    break_(monkeypatch)
    for name in names:
        with pytest.raises(AssertionError):
            law_the_same_at_every_length("sequence", name)


def test_taking_windows_over_the_border_for_others_fails_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "probes", nothing_seen)
    monkeypatch.setattr(constants, "reaches_over", lambda call: False)
    with pytest.raises(AssertionError):
        law_the_same_at_every_length("image", "windows over the border", 1)


def test_lengths_that_a_network_takes_are_found_though_it_takes_none_nearby() -> None:
    def multiple(given: tuple[Tensor, ...]) -> list[Tensor]:
        assert given[0].shape[1] % 4 == 0
        return [given[0].sum(1) @ torch.ones(3, 1)]

    assert [tuple(x.shape) for (x,), _ in probes(multiple, (torch.randn(3, 8, 3),))] == [(4, 8, 3), (2, 12, 3)]
    assert lengths.lengths_of([torch.zeros(2, 3, 8)]) == {8.0, 1 / 8, 24.0, 1 / 24}
