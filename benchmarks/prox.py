"""What the prox costs: of a vector, against peers; of the layers of a network, against a plain loop; of training steps.

python -m benchmarks.prox [--only vector layers training] [--out benchmarks/results/prox.json]

One thread; what is compared runs in turn. Parts that are not asked for are kept from the last run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

import tying
from benchmarks import networks, vector_prox
from benchmarks.record import record
from benchmarks.timing import in_turn, spread, versus
from tying import Groups, GrOWL
from tying.penalties import Ramp
from tying.train import here
from tying.train.rules import Target, resolve
from tying.train.sweep import Sweep

OUT = Path(__file__).parent / "results" / "prox.json"
STEP = 1e-4
STEPS_OF_VECTORS = (0.3, 0.03)
"""Of 60 % and of 3 % zeros."""
NETWORKS: dict[str, Callable[[], dict[str, tuple[int, ...]]]] = {
    "ResNet-50": networks.resnet50,
    "ViT-S": networks.vit_small,
    "GPT-2": networks.gpt2,
    "50 layers of 64": lambda: networks.small_layers(64),
    "50 layers of 128": lambda: networks.small_layers(128),
    "50 layers of 256": lambda: networks.small_layers(256),
}
TRAINED = {
    "MLP 784-300-10, batch 128": networks.mlp,
    "ResNet-20, batch 128": networks.resnet20_bare_shortcuts,
    "transformer, 6 layers of 384": networks.transformer,
}


def plain_loop(weights: list[Tensor], axis: int) -> None:
    """Group lasso as one writes it: every norm lowered by the step."""
    for weight in weights:
        others = [other for other in range(weight.dim()) if other != axis]
        norms = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
        weight.mul_((1 - STEP / norms).clamp_(min=0))


def traffic(weights: list[Tensor]) -> None:
    """Read every weight once, then read and write it once: what two passes over memory cost at least."""
    for weight in weights:
        weight.sum()
    for weight in weights:
        weight.mul_(1.0)


def layers(name: str, kind: str) -> dict[str, Any]:
    """Time GrOWL over all layers of a network against the plain loop, always from the same weights."""
    model, targets = prepared(name, kind)
    weights = [parameter.detach() for parameter in model.values()]
    sweep = Sweep(targets, tell_zeros=False)
    axis = {"outputs": 0, "inputs": 1}[kind]
    functions = {
        "plain loop": lambda: plain_loop(weights, axis),
        "tying": lambda: step(sweep, targets),
        "memory traffic": lambda: traffic(weights),
    }
    first = [weight.clone() for weight in weights]
    rounds = 200 if name.startswith("50") else 15
    seconds = in_turn(functions, rounds, before=lambda: torch._foreach_copy_(weights, first))
    return {
        "network": name,
        "groups": kind,
        "parameters": sum(weight.numel() for weight in weights),
        "groups_in_all": sum(target.count for target in targets),
        "seconds": {key: spread(taken) for key, taken in seconds.items()},
        "ratio": versus(seconds["tying"], seconds["plain loop"]),
        "ratio_to_memory_traffic": versus(seconds["tying"], seconds["memory traffic"]),
        "share": shares(targets),
        "extra_memory": extra_memory(name, kind),
    }


def shares(targets: list[Target]) -> dict[str, float]:
    """Return where the time of a step goes: reading the weights, solving for the factors, scaling the weights."""
    spent = dict.fromkeys(("read", "solve", "scale"), 0.0)
    sweep = Sweep(targets, tell_zeros=False)
    parts = [(here.GroupsHere, "squares", "read"), (here, "factors", "solve"), (here.GroupsHere, "multiply_", "scale")]
    with contextlib.ExitStack() as stack:
        for owner, function, part in parts:
            stack.enter_context(mock.patch.object(owner, function, timed(getattr(owner, function), spent, part)))
        for _ in range(5):
            step(sweep, targets)
    return {part: seconds / sum(spent.values()) for part, seconds in spent.items()}


def timed(function: Callable[..., Any], spent: dict[str, float], part: str) -> Callable[..., Any]:
    def wrapped(*args: Any) -> Any:
        start = time.perf_counter()
        result = function(*args)
        spent[part] += time.perf_counter() - start
        return result

    return wrapped


def step(sweep: Sweep, targets: list[Target]) -> None:
    """Apply the proxes."""
    sweep.step_({target.key: STEP for target in targets})


def extra_memory(name: str, kind: str) -> float:
    """Return the most bytes that preparing and taking a first step holds at a time ÷ those of the weights.

    NumPy's and PyTorch's, in a process of its own, so that what is kept for later steps is in it.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(most_memory, (name, kind))


def most_memory(name: str, kind: str) -> float:
    torch.set_num_threads(1)
    model, targets = prepared(name, kind)
    tying.penalties.prox_owl(torch.arange(1000.0), Ramp(1.0))  # loads SciPy
    tracemalloc.start()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(Sweep(targets, tell_zeros=False), targets)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (most + held_by_torch(profile)) / sum(4 * parameter.numel() for parameter in model.parameters())


def prepared(name: str, kind: str) -> tuple[nn.ParameterDict, list[Target]]:
    """Return the weights of a network and its targets, GrOWL on all."""
    torch.manual_seed(0)
    model = networks.weights(NETWORKS[name]())
    return model, resolve({("*", Groups(kind)): GrOWL(1.0)}, model, SGD(model.parameters(), lr=STEP))


def held_by_torch(profile: torch.profiler.profile) -> int:
    """Return the most bytes that were allocated at a time."""
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def training(name: str) -> dict[str, Any]:
    """Time a training step with a prox after it against one without, on the same model and batch."""
    torch.manual_seed(0)
    model, x, y = TRAINED[name]()
    matrices = {key: GrOWL(1e-6) for key, parameter in model.named_parameters() if parameter.dim() > 1}
    plain, regularised = (SGD(model.parameters(), lr=1e-3, momentum=0.9) for _ in range(2))
    tying.proximal(regularised, model, matrices, every="step")
    functions = {"without": lambda: train(model, plain, x, y), "with": lambda: train(model, regularised, x, y)}
    seconds = in_turn(functions, rounds=600 if name.startswith("MLP") else 40)
    return {
        "network": name,
        "regularised": list(matrices),
        "seconds": {key: spread(taken) for key, taken in seconds.items()},
        "ratio": versus(seconds["with"], seconds["without"]),
    }


def train(model: nn.Module, optimizer: SGD, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("vector", "layers", "training"))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = options.only or ("vector", "layers", "training")
    results = json.loads(options.out.read_text())["results"] if options.only and options.out.exists() else {}
    if "layers" in wanted:
        cases = [(name, kind) for name in NETWORKS for kind in ("outputs", "inputs")]
        results["layers"] = [layers(*case) for case in track(cases, description="layers")]
    if "training" in wanted:
        results["training"] = [training(name) for name in track(TRAINED, description="training steps")]
    if "vector" in wanted:
        results["vector"] = [vector_prox.measure(step=each, seconds=12) for each in STEPS_OF_VECTORS]
    record(options.out, "python -m benchmarks.prox", results)
    show(results)


def show(results: dict[str, Any]) -> None:
    for case in results.get("layers", []):
        print(
            f"{case['network']}, {case['groups']}: {case['ratio']['median']:.2f} × the plain loop, "
            f"{case['ratio_to_memory_traffic']['median']:.2f} × memory traffic, extra memory {case['extra_memory']:.2%}"
        )
    for steps in results.get("vector", []):
        for n, case in steps["sizes"].items():
            ratio = case["ratio"]["tying"]["median"]
            print(f"n = {n}, {case['zeros']:.0%} zeros: {ratio:.2f} × {case['fastest_peer']}")
    for case in results.get("training", []):
        print(f"{case['network']}: a step takes {case['ratio']['median']:.3f} × one without")


if __name__ == "__main__":
    main()
