"""What an epoch of stage one costs with the prox, against without: 784-300-10 on MNIST, one thread, in turn.

python -m benchmarks.stage_one_cost [--rounds 15] [--out benchmarks/results/stage_one_cost.json]
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch.optim import SGD

import tying
from benchmarks.mnist import Network, data, rules, train
from benchmarks.record import command_of, record
from tying import Groups

RATE = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", default="benchmarks/results/stage_one_cost.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data()
    networks = {name: Network() for name in ("without", "per epoch", "per step")}
    optimizers = {name: SGD(model.parameters(), lr=RATE, momentum=0.9) for name, model in networks.items()}
    growl = rules("growl", 1e-3)
    handles = {
        "without": None,
        "per epoch": tying.proximal(optimizers["per epoch"], networks["per epoch"], growl, every="epoch"),
        "per step": tying.proximal(optimizers["per step"], networks["per step"], growl, every="step"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(-1, options.rounds):  # the first round warms up and is not counted
        for name, model in networks.items():
            handle = handles[name] if name == "per epoch" else None
            for group in optimizers[name].param_groups:
                group["lr"] = RATE  # the schedule of the last round ended at 0, where no prox is due
            taken = train(model, optimizers[name], 1, turn + 1, handle)
            if turn >= 0:
                seconds[name].append(taken)
    zero = {name: int((Groups.inputs().norms(model.fc1.weight) == 0).sum()) for name, model in networks.items()}
    base = seconds.pop("without")
    ratios = {name: [a / b for a, b in zip(taken, base, strict=True)] for name, taken in seconds.items()}
    results = {
        "rounds": options.rounds,
        "zero_inputs": zero,
        "epoch_seconds": {"without": statistics.median(base), **{n: statistics.median(s) for n, s in seconds.items()}},
        "ratio": {
            name: {"median": statistics.median(r), "quartiles": statistics.quantiles(r, n=4)[::2]}
            for name, r in ratios.items()
        },
    }
    record(options.out, command_of("stage_one_cost", options), results)
    for name, ratio in results["ratio"].items():
        print(f"prox {name}: {ratio['median']:.3f} × an epoch without, quartiles {ratio['quartiles']}")


if __name__ == "__main__":
    main()
