"""Results kept as data, with the machine, the versions and the command that made them."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tying.files.atomic import write_atomically

PLACES = ("out", "runs", "jobs")
"""Options that say where files lie and how many processes work: results do not depend on them."""
PACKAGES = ("tying", "torch", "numpy", "scipy", "scikit-learn", "safetensors")


def record(path: str | Path, command: str, results: Mapping[str, Any]) -> None:
    """Write `{"command", "machine", "versions", "results"}` as JSON, whole or not at all; folders are made.

    Args:
        path: Of the file, as `benchmarks/results/mnist.json`.
        command: What repeats the run, as `command_of` has it.
        results: What JSON can hold; seeds and numbers of runs belong in it.
    """
    content = {"command": command, "machine": machine(), "versions": versions(), "results": results}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def command_of(module: str, options: argparse.Namespace) -> str:
    """Return what repeats a run: the module with all its options but `PLACES`, those not given as their defaults.

    An option's name is what it is parsed as; one of several values is of `nargs="+"`, not of `append`.

    Example:
        >>> command_of("lenet", argparse.Namespace(seeds=5, only=["a b", "c"], quick=True, smoke=False, out="x.json"))
        "python -m benchmarks.lenet --seeds 5 --only 'a b' c --quick"
    """
    words = ["python", "-m", f"benchmarks.{module}"]
    for name, value in vars(options).items():
        if name in PLACES or value is None or value is False or value == "":
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += map(str, value if isinstance(value, (list, tuple)) else [value])
    return shlex.join(words)


def machine() -> dict[str, Any]:
    """Return what timings depend on: processor, cores, threads, system, accelerator."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter."""
    return {"python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        for key, value in fields.items():
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or "unknown"
