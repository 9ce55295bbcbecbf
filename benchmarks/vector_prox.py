"""What the prox of one vector costs beside its peers, each called as its users do, from a float32 tensor to a tensor.

python -m benchmarks.vector_prox [--sizes 100 1000 …] [--step 0.3] [--seconds 20] [--out vector_prox.json]

One thread, in turn, in an order that changes, medians and quartiles; every answer is compared with pooling in long
double, or with skglm's in float64 from 20,000 numbers on, before it is timed. With step 0.3 six numbers of ten become
zero, as when something is to be selected; with 0.03 one of forty. Short vectors are taken from a set of 100,000
numbers, one after the other: a processor learns the branches of a single one by heart. sortedl1 has no prox to call:
its solution of least squares with the identity as design is one, and is timed up to n = 1000. torchsort comes as
source: its isotonic regression is timed in the tensor's own float32. Peers that are not installed are named as missing.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import tying
from benchmarks.record import command_of, record
from benchmarks.timing import spread, versus
from tying.penalties import Ramp

SIZES = (100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000)
OURS = ("tying", "tying, weights as an array")
SET = 100_000
SEQUENCE = Ramp(3.0)
STEP = 0.3
WRONG = 1e-3
"""Relative to the largest number: an answer further off is no answer."""

Prox = Callable[[Tensor, NDArray[np.float64], float], Tensor]


def measure(
    sizes: Iterable[int] = SIZES, *, step: float = STEP, seconds: float = 20.0, least_rounds: int = 5
) -> dict[str, Any]:
    """Time every prox at every size.

    Args:
        sizes: How many numbers a vector has.
        step: What the weights, `Ramp(3.0)`, are multiplied by.
        seconds: About how long to measure at each size.
        least_rounds: So often everybody has a turn, even if that takes longer.

    Returns:
        What was measured, for `record`: by size, seconds per call (median and quartiles) and error by name, the fastest
        peer, and our time ÷ its time, taken turn by turn.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = {str(n): _at(n, step, seconds, least_rounds) for n in sizes}
    finally:
        torch.set_num_threads(before)
    packages = {"skglm": "skglm", "scikit-learn": "scikit-learn", "sortedl1": "sortedl1", "torchsort": "torchsort"}
    return {
        "input": f"torch.randn(n), float32; weights {SEQUENCE}; step {step}",
        "threads": 1,
        "peers": {name: _version(package) for name, package in packages.items()},
        "sizes": found,
    }


def _at(n: int, step: float, seconds: float, least_rounds: int) -> dict[str, Any]:
    vectors = list(torch.randn(max(1, SET // n), n, generator=torch.Generator().manual_seed(n)))
    weights = np.ascontiguousarray(SEQUENCE(n))
    calls, errors = {}, {}
    answer = _reference(vectors[0].numpy().astype(np.float64), step * weights)
    for name, prox in _contestants(n).items():
        found = prox(vectors[0], weights, step)
        errors[name] = float(np.abs(found.double().numpy() - answer).max() / float(vectors[0].abs().max()))
        if errors[name] <= WRONG:
            calls[name] = partial(_run, prox, cycle(vectors), weights, step)
    turns = _take_turns(calls, seconds, least_rounds)
    fastest = min((name for name in turns if name not in OURS), key=lambda name: statistics.median(turns[name]))
    return {
        "rounds": len(turns[fastest]),
        "zeros": float((answer == 0).mean()),
        "seconds": {name: spread(np.array(taken)) for name, taken in turns.items()},
        "error": errors,
        "fastest_peer": fastest,
        "ratio": {name: versus(np.array(turns[name]), np.array(turns[fastest])) for name in OURS},
    }


def _run(prox: Prox, vectors: Iterator[Tensor], weights: NDArray[np.float64], step: float, often: int) -> float:
    """Return the seconds per call of so many calls."""
    some = list(islice(vectors, often))
    start = time.perf_counter()
    for v in some:
        prox(v, weights, step)
    return (time.perf_counter() - start) / often


def _contestants(n: int) -> Mapping[str, Prox]:
    found: dict[str, Prox] = {
        OURS[0]: lambda v, weights, step: tying.penalties.prox_owl(v, SEQUENCE, step),
        OURS[1]: lambda v, weights, step: tying.penalties.prox_owl(v, weights, step),
    }
    makers = {"skglm": _skglm, "scikit-learn": _scikit_learn, "torchsort": _torchsort}
    for name, make in {**makers, "sortedl1": _sortedl1}.items():
        if n <= 1000 or name in makers:
            with contextlib.suppress(ImportError):
                found[name] = make()
    return found


def _skglm() -> Prox:
    from skglm.penalties import SLOPE

    return lambda v, weights, step: torch.from_numpy(SLOPE(weights).prox_vec(v.numpy(), step))


def _scikit_learn() -> Prox:
    from sklearn.isotonic import isotonic_regression

    def prox(v: Tensor, weights: NDArray[np.float64], step: float) -> Tensor:
        values = v.numpy()
        magnitudes = np.abs(values)
        order = np.argsort(magnitudes)[::-1]
        result = np.empty_like(magnitudes)
        result[order] = np.maximum(isotonic_regression(magnitudes[order] - step * weights, increasing=False), 0)
        return torch.from_numpy(np.copysign(result, values))

    return prox


def _torchsort() -> Prox:
    from torchsort.isotonic_cpu import isotonic_l2

    def prox(v: Tensor, weights: NDArray[np.float64], step: float) -> Tensor:
        magnitudes, order = v.abs().sort(descending=True)
        thresholds = step * torch.from_numpy(weights).to(v.dtype)
        result = torch.empty_like(v)
        result[order] = isotonic_l2((magnitudes - thresholds)[None])[0].clamp(min=0)
        return result.copysign(v)

    return prox


def _sortedl1() -> Prox:
    from scipy.sparse import identity
    from sortedl1 import Slope

    def prox(v: Tensor, weights: NDArray[np.float64], step: float) -> Tensor:
        n = len(v)
        model = Slope(lam=weights, alpha=step / n, fit_intercept=False, tol=1e-7)
        fitted = model.fit(identity(n, format="csc"), v.double().numpy())
        return torch.from_numpy(np.asarray(fitted.coef_).ravel()).to(v.dtype)

    return prox


def _take_turns(calls: Mapping[str, Callable[[int], float]], seconds: float, least: int) -> dict[str, list[float]]:
    """Return the seconds per call of every turn; a turn is about 5 ms of calls, and at least one."""
    often = {name: max(1, min(500, int(0.005 / min(call(1), call(1))))) for name, call in calls.items()}
    turns: dict[str, list[float]] = {name: [] for name in calls}
    begun, order = time.perf_counter(), random.Random(0)
    while len(next(iter(turns.values()))) < least or time.perf_counter() - begun < seconds:
        for name in order.sample(list(calls), len(calls)):  # who comes next finds the memory that the last one left
            turns[name].append(calls[name](often[name]))
    return turns


def _reference(v: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
    if len(v) > 20_000:
        from skglm.penalties import SLOPE

        return SLOPE(thresholds).prox_vec(v, 1.0)
    order = np.argsort(-np.abs(v))
    lowered = np.abs(v)[order].astype(np.longdouble) - thresholds
    sums: list[np.longdouble] = []
    sizes: list[int] = []
    for total in lowered:
        size = 1
        while sums and sums[-1] * size <= total * sizes[-1]:
            total, size = total + sums.pop(), size + sizes.pop()
        sums.append(total)
        sizes.append(size)
    x = np.empty_like(v)
    x[order] = np.repeat(np.maximum(np.array(sums) / np.array(sizes), 0).astype(np.float64), sizes)
    return np.copysign(x, v)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--step", type=float, default=STEP)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out")
    options = parser.parse_args()
    results = measure(options.sizes, step=options.step, seconds=options.seconds)
    print(results["peers"])
    for n, found in results["sizes"].items():
        times = {name: f"{1e6 * taken['median']:.1f} µs" for name, taken in found["seconds"].items()}
        ratios = {name: round(taken["median"], 2) for name, taken in found["ratio"].items()}
        print(f"n = {n}: {ratios} × {found['fastest_peer']}; {times}; errors {found['error']}")
    if options.out:
        record(options.out, command_of("vector_prox", options), results)


if __name__ == "__main__":
    main()
