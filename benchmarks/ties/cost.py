"""What the guard costs at a forward: 100 ties, one thread, with and without in turn."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.timing import in_turn, spread
from tying.enforce.ties.guard import guards_of
from tying.enforce.ties.tie import tie_
from tying.groups import Groups
from tying.models import Models
from tying.plan import Member, Partition, Tie, TiePlan

TIES, WIDTH = 100, 8
MOST = 20e-6
"""Seconds at a forward for 100 ties."""


def _plan(pairs: list[tuple[str, str]], transposed: bool = False) -> TiePlan:
    groups = (Groups.outputs(), Groups.inputs()) if transposed else (Groups.whole(), Groups.whole())
    labels = [*range(WIDTH)] * 2 if transposed else [0, 0]
    return TiePlan([Tie((Member(a, groups[0]), Member(b, groups[1])), Partition(labels)) for a, b in pairs])


def _stack(layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))


class Block(nn.Module):
    """Eight layers two levels down, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("q", "k", "v", "o")})
        self.mlp = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("up", "gate", "down", "out")})

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        for layer in (*self.attention.values(), *self.mlp.values()):
            x = layer(x)
        return x


def cases() -> dict[str, tuple[nn.Sequential, Models, TiePlan]]:
    """The model that is called, what is tied, and how: always 100 ties."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Block() for _ in range(TIES // 4)))
    names = [name for name, parameter in blocks.named_parameters() if parameter.dim() == 2]
    halves = list(zip(names[:TIES], names[TIES:], strict=True))
    layers, transposed = _stack(2 * TIES), _stack(2 * TIES)
    a, b = _stack(2 * TIES), _stack(2 * TIES)
    within = [(f"{i}.weight", f"{i + TIES}.weight") for i in range(TIES)]
    across = [(f"a.{i}.weight", f"b.{i}.weight") for i in range(TIES)]
    return {
        "layers of a model of 200": (layers, layers, _plan(within)),
        "layers of a model of 200, transposed": (transposed, transposed, _plan(within, transposed=True)),
        "25 blocks of 8 layers, two levels deep": (blocks, blocks, _plan(halves)),
        "two models of 200 layers": (a, {"a": a, "b": b}, _plan(across)),
    }


def measure(rounds: int) -> dict[str, Any]:
    """Seconds of a forward with and without the guard, of what lies between, and of the hook by itself."""
    found: dict[str, Any] = {}
    x = torch.randn(1, WIDTH)
    for name, (model, models, plan) in cases().items():
        tie_(models, plan)
        bare = nn.Sequential(*model)  # the same layers, without a guard
        (guard,) = guards_of(model)
        with torch.no_grad():
            taken = in_turn({"guarded": lambda m=model: m(x), "bare": lambda m=bare: m(x)}, rounds, warm_up=20)
        found[name] = {
            "ties": TIES,
            "layers": sum(isinstance(module, nn.Linear) for module in model.modules()),
            "rounds": rounds,
            "guarded_seconds": spread(taken["guarded"]),
            "bare_seconds": spread(taken["bare"]),
            "difference_seconds": spread(taken["guarded"] - taken["bare"]),
            "hook_seconds": spread(_hook(guard, model, x, rounds)),
            "hook_after_forward_seconds": spread(_hook_after(bare, guard, model, x, rounds)),
            "most_seconds": MOST,
        }
    return found


def _hook(guard: Any, model: nn.Module, x: Tensor, rounds: int, calls: int = 10) -> np.ndarray:
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            guard(model, (x,))
        taken.append((time.perf_counter() - start) / calls)
    return np.array(taken)


def _hook_after(bare: nn.Module, guard: Any, model: nn.Module, x: Tensor, rounds: int) -> np.ndarray:
    """The hook alone, once after each forward: what it reads has left the cache."""
    taken = []
    for _ in range(rounds):
        with torch.no_grad():
            bare(x)
        start = time.perf_counter()
        guard(model, (x,))
        taken.append(time.perf_counter() - start)
    return np.array(taken)
