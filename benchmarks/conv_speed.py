"""How much faster a tied convolution is than the dense one: 256 channels at 28², half zero, the rest tied 3 to 1.

A 3×3 kernel, batch 16; and with half of the outputs pruned as well.

One thread; dense and compacted are timed in turn, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.record import command_of, record
from benchmarks.timing import LAYOUTS, flops, in_turn, spread, versus
from tying.enforce import compact
from tying.enforce.compaction.fastest import choose_fastest_
from tying.groups import Groups
from tying.plan import Tie, TiePlan

CHANNELS, SIZE, BATCH, KEPT, TIED = 256, 28, 16, 128, 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def layers(pruned: bool) -> tuple[nn.Module, nn.Module]:
    """The dense layer, and what `compact` makes of it; a pointwise layer behind it lets its outputs go."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    labels = np.full(CHANNELS, -1)
    labels[generator.permutation(CHANNELS)[:KEPT]] = np.arange(KEPT) % -(-KEPT // TIED)
    model = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU(), nn.Conv2d(CHANNELS, 4, 1))
    ties = [Tie.of("0.weight", Groups.inputs(), labels)]
    if pruned:
        nn.init.zeros_(model[0].bias)
        outputs = np.arange(CHANNELS)
        outputs[generator.permutation(CHANNELS)[: CHANNELS // 2]] = -1
        ties.append(Tie.of("0.weight", Groups.outputs(), outputs))
    small = compact(model, TiePlan(ties), torch.randn(2, CHANNELS, 8, 8))
    return model[0].eval(), small[0].eval()


def timings(rounds: int) -> Iterator[dict[str, object]]:
    for pruned in (False, True):
        for dtype in DTYPES:
            for layout in LAYOUTS:
                dense, tied = (layer.to(dtype=DTYPES[dtype], memory_format=LAYOUTS[layout]) for layer in layers(pruned))
                x = torch.randn(BATCH, CHANNELS, SIZE, SIZE, dtype=DTYPES[dtype]).to(memory_format=LAYOUTS[layout])
                ideal = flops(dense, x) / flops(tied, x)
                [choice] = choose_fastest_(nn.Sequential(tied), x)
                seconds = in_turn({"dense": lambda f=dense, x=x: f(x), "tied": lambda f=tied, x=x: f(x)}, rounds)
                yield {
                    "outputs_pruned": pruned,
                    "dtype": dtype,
                    "layout": layout,
                    "rounds": rounds,
                    "way": choice.way,
                    "ideal": ideal,
                    "dense_seconds": {**spread(seconds["dense"]), "least": float(seconds["dense"].min())},
                    "tied_seconds": {**spread(seconds["tied"]), "least": float(seconds["tied"].min())},
                    "faster": versus(seconds["dense"], seconds["tied"]),
                    "faster_by_least": float(seconds["dense"].min() / seconds["tied"].min()),
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--quick", action="store_true", help="few rounds, and no file unless --out names one")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, list[dict[str, object]]] = {"timings": []}
    cases = 2 * len(DTYPES) * len(LAYOUTS)
    with torch.inference_mode():
        for number, timing in enumerate(timings(5 if arguments.quick else arguments.rounds), 1):
            results["timings"].append(timing)
            low, middle, high = timing["faster"].values()
            print(
                f"{number} of {cases}: {timing['dtype']}, {timing['layout']}"
                f"{', half of the outputs pruned' if timing['outputs_pruned'] else ''}: {middle:.2f}× faster ("
                f"quartiles {low:.2f} to {high:.2f}; by the least of each {timing['faster_by_least']:.2f}; "
                f"ideal {timing['ideal']:.2f}; way: {timing['way']})",
                flush=True,
            )
    out = arguments.out or (None if arguments.quick else Path(__file__).parent / "results" / "conv_speed.json")
    if out:
        record(out, command_of("conv_speed", arguments), {"layer": describe(), **results})


def describe() -> dict[str, int]:
    return {
        "channels": CHANNELS,
        "size": SIZE,
        "batch": BATCH,
        "kernel": 3,
        "inputs_read": KEPT,
        "values": -(-KEPT // TIED),
    }


if __name__ == "__main__":
    main()
