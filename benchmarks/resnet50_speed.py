"""How much faster ResNet-50 is with half of its channels zero and the inputs of its layers tied 2 to 1, batch 8.

One thread; the networks, and each layer beside the dense one that it replaces, are timed in turn, so that a busy
machine slows both. The ideal counts the multiply-adds of the products; norms, activations, pooling and the sums
themselves have none.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.channels.fixtures import ARCHITECTURES
from benchmarks.record import command_of, record
from benchmarks.timing import LAYOUTS, flops, in_turn, spread, versus
from tying.enforce import compact
from tying.enforce.compaction.fastest import choose_fastest_
from tying.groups import Groups
from tying.plan import Tie, TiePlan

BATCH, SIZE, ZERO, TIED = 8, 224, 0.5, 2


def networks(size: int) -> tuple[nn.Module, nn.Module]:
    """The dense network, and the one that `compact` makes of it; the values of the weights do not matter here."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    dense = ARCHITECTURES["resnet50"].build().eval()
    ties: list[Tie] = []
    for stream in ARCHITECTURES["resnet50"].streams(dense):
        kept = generator.permutation(stream.count)[: round(stream.count * (1 - ZERO))]
        for reader in stream.readers:
            labels = np.full(stream.count, -1)
            labels[generator.permutation(kept)] = np.arange(len(kept)) % (len(kept) // TIED)
            ties.append(Tie.of(reader.tensor, Groups.inputs(), labels))
    return dense, compact(dense, TiePlan(ties), torch.randn(2, 3, min(size, 64), min(size, 64))).eval()


def whole(models: Mapping[str, Callable[[], Tensor]], ideal: float, rounds: int) -> dict[str, Any]:
    """The networks in all layouts against each other."""
    seconds = in_turn(models, rounds, warm_up=1)
    results: dict[str, Any] = {name: {**spread(s), "least": float(s.min())} for name, s in seconds.items()}
    for layout in LAYOUTS:
        dense, small = seconds[f"dense {layout}"], seconds[f"compacted {layout}"]
        results[f"faster {layout}"] = {**versus(dense, small), "by_least": float(dense.min() / small.min())}
    best = [min((f"{kind} {name}" for name in LAYOUTS), key=lambda n: results[n]["least"]) for kind in KINDS]
    dense, small = (seconds[name] for name in best)
    results["faster best"] = {"of": best, **versus(dense, small), "by_least": float(dense.min() / small.min())}
    for layout in (*LAYOUTS, "best"):
        faster = results[f"faster {layout}"]
        print(
            f"{layout}: {faster['median']:.2f}× faster (by the least of each {faster['by_least']:.2f}), "
            f"{faster['median'] / ideal:.0%} of the ideal {ideal:.2f}",
            flush=True,
        )
    return results


KINDS = ("dense", "compacted")


def inputs_of(model: nn.Module, x: Tensor) -> dict[str, tuple[tuple[int, ...], bool]]:
    """By layer with a product: the shape of what it reads, and whether that is in channels_last."""
    found: dict[str, tuple[tuple[int, ...], bool]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, given: found.update({name: (tuple(given[0].shape), not given[0].is_contiguous())})

    handles = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() > 1
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return found


def each_layer(dense: nn.Module, small: nn.Module, x: Tensor, rounds: int) -> list[dict[str, Any]]:
    """Every layer beside the one that it replaces, on inputs of the shapes and layouts that they read."""
    results: list[dict[str, Any]] = []
    read = [inputs_of(model, x) for model in (dense, small)]
    for number, name in enumerate(read[1], 1):
        calls: dict[str, Callable[[], Tensor]] = {}
        for kind, model, found in zip(KINDS, (dense, small), read, strict=True):
            shape, last = found[name]
            given = torch.randn(shape)
            given = given.to(memory_format=torch.channels_last) if last else given
            layer = model.get_submodule(name)
            calls[kind] = lambda layer=layer, given=given: layer(given)
        seconds = in_turn(calls, rounds, warm_up=1)
        least = {kind: float(s.min()) for kind, s in seconds.items()}
        way = getattr(small.get_submodule(name), "way", "plain")
        faster = {**versus(seconds["dense"], seconds["compacted"]), "by_least": least["dense"] / least["compacted"]}
        results.append({"layer": name, "way": way, "least_seconds": least, "faster": faster})
        print(f"\rlayer {number} of {len(read[1])}", end="", flush=True)
    slowest = min(results, key=lambda r: r["faster"]["by_least"])
    print(f"\rslowest layer: {slowest['layer']}, {slowest['faster']['by_least']:.2f}× as fast as the dense one")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="few rounds, and no file unless --out names one")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else arguments.rounds
    torch.set_num_threads(1)
    dense, small = networks(SIZE)
    x = torch.randn(BATCH, 3, SIZE, SIZE)
    results: dict[str, Any] = {"network": {"batch": BATCH, "size": SIZE, "zero": ZERO, "tied": TIED}, "rounds": rounds}
    calls: dict[str, Callable[[], Tensor]] = {}
    pairs: dict[str, tuple[nn.Module, nn.Module, Tensor]] = {}
    with torch.inference_mode():
        counted = [flops(model, x) for model in (dense, small)]
        results |= {"flops": counted, "ideal": counted[0] / counted[1]}
        results["parameters"] = [sum(p.numel() for p in model.parameters()) for model in (dense, small)]
        for layout, memory in LAYOUTS.items():
            given = x.to(memory_format=memory)
            pair = tuple(copy.deepcopy(model).to(memory_format=memory) for model in (dense, small))
            choices = choose_fastest_(pair[1], given)
            ways = [choice.way for choice in choices]
            results[f"ways {layout}"] = {way: ways.count(way) for way in sorted(set(ways))}
            print(f"{layout}: {results[f'ways {layout}']}", flush=True)
            pairs[layout] = (*pair, given)
            for kind, model in zip(KINDS, pair, strict=True):
                calls[f"{kind} {layout}"] = lambda model=model, given=given: model(given)
        results["networks"] = whole(calls, results["ideal"], rounds)
        for layout, (*pair, given) in pairs.items():
            results[f"layers {layout}"] = each_layer(*pair, given, max(3, rounds))
    out = arguments.out or (None if arguments.quick else Path(__file__).parent / "results" / "resnet50_speed.json")
    if out:
        record(out, command_of("resnet50_speed", arguments), results)


if __name__ == "__main__":
    main()
