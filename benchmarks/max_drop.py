"""Does `compress(max_drop=0.003)` keep its word on the test split? Digits and MNIST, several seeds.

python -m benchmarks.max_drop [--seeds 5] [--jobs 2] [--out benchmarks/results/max_drop.json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

import tying
from benchmarks.data import CACHE
from benchmarks.record import command_of, record
from tying.compress import load_task

MAX_DROP = 0.003
TASKS = {"digits": None, "mnist": Path(__file__).parent / "mnist_task.py"}


def run(task: str, seed: int, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    begun = time.perf_counter()
    result = tying.compress(
        load_task(TASKS[task]),
        max_drop=MAX_DROP,
        seed=seed,
        out=folder / f"{task}-{seed}",
        progress=False,
    )
    dense, small = result.data.dense, result.data.small
    return {
        "task": task,
        "seed": seed,
        "dense_test": dense.accuracy,
        "small_test": small.accuracy,
        "drop_test": dense.accuracy - small.accuracy,
        "drop_validation": dense.validation - small.validation,
        "kept": result.kept,
        "unique": result.report.unique,
        "stored": result.report.stored,
        "file": result.report.file,
        "seconds": time.perf_counter() - begun,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", default="benchmarks/results/max_drop.json")
    parser.add_argument("--runs", type=Path, default=CACHE / "max-drop-runs", help="finished fits, to go on from")
    options = parser.parse_args()
    jobs = [(task, seed) for task in TASKS for seed in range(options.seeds)]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.jobs, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run, *job, options.runs) for job in jobs]):
            rows.append(future.result())
            print(f"{len(rows)}/{len(jobs)} done: {rows[-1]['task']}, seed {rows[-1]['seed']}", file=sys.stderr)
    rows.sort(key=lambda row: (row["task"], row["seed"]))
    means = {}
    for task in TASKS:
        mine = [row for row in rows if row["task"] == task]
        drops = [100 * row["drop_test"] for row in mine]
        means[task] = {
            "promised_points": 100 * MAX_DROP,
            "drop_test_points_mean": statistics.mean(drops),
            "drop_test_points_spread": statistics.stdev(drops) if len(drops) > 1 else None,
            "unique_mean": statistics.mean(row["unique"] for row in mine),
            "stored_mean": statistics.mean(row["stored"] for row in mine),
            "file_mean": statistics.mean(row["file"] for row in mine),
        }
        print(f"{task}: " + ", ".join(f"{key} {value:.3g}" for key, value in means[task].items() if value is not None))
    record(options.out, command_of("max_drop", options), {"means": means, "runs": rows})


if __name__ == "__main__":
    main()
