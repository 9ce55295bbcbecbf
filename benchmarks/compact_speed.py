"""How much faster a compacted layer is than the dense one: 4096 × 4096, 80 % of the inputs zero, the rest tied 3 to 1.

One thread; dense and compacted are timed in turn, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.benchmark import Timer

from benchmarks.record import command_of, record
from benchmarks.timing import spread, versus
from tying.enforce import compact
from tying.groups import Groups
from tying.plan import Tie, TiePlan

SIZE, KEPT, TIED = 4096, 819, 3
BATCHES = (1, 256)
SECONDS = 0.2


def networks() -> tuple[nn.Module, nn.Module]:
    """The dense network, and the one that `compact` makes of it."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    labels = np.full(SIZE, -1)
    labels[generator.permutation(SIZE)[:KEPT]] = np.arange(KEPT) % (KEPT // TIED)
    dense = nn.Sequential(nn.Linear(SIZE, SIZE))
    plan = TiePlan([Tie.of("0.weight", Groups.inputs(), labels)])
    return dense, compact(dense, plan, torch.randn(2, SIZE))


def time_in_turn(dense: nn.Module, small: nn.Module, batch: int, rounds: int) -> dict[str, object]:
    x = torch.randn(batch, SIZE)
    timers = [Timer("module(x)", globals={"module": m, "x": x}, num_threads=1) for m in (dense, small)]
    calls = [max(1, round(SECONDS / timer.timeit(2).mean)) for timer in timers]
    seconds = np.array([[t.timeit(n).mean for t, n in zip(timers, calls, strict=True)] for _ in range(rounds)])
    return {
        "batch": batch,
        "rounds": rounds,
        "dense_seconds": spread(seconds[:, 0]),
        "compacted_seconds": spread(seconds[:, 1]),
        "faster": versus(seconds[:, 0], seconds[:, 1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compact_speed.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dense, small = networks()
    numbers = [sum(p.numel() for p in m.parameters()) for m in (dense, small)]
    print(small)
    results = {
        "layer": {"size": SIZE, "inputs_read": KEPT, "values": KEPT // TIED, "parameters": numbers},
        "ideal": numbers[0] / numbers[1],
        "timings": [],
    }
    with torch.inference_mode():
        for batch in BATCHES:
            timing = time_in_turn(dense, small, batch, arguments.rounds)
            results["timings"].append(timing)
            low, middle, high = timing["faster"].values()
            print(f"batch {batch}: {middle:.1f}× faster (quartiles {low:.1f} to {high:.1f})")
    record(arguments.out, command_of("compact_speed", arguments), results)


if __name__ == "__main__":
    main()
