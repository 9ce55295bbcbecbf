"""What training holds at most: resident memory in a fresh process, above what is there before there is a network.

Linux only: the high-water mark of resident memory is read, and set back, under /proc/self. Kernels count pages for each
processor and add them up now and then: on two cores it is right to about a quarter of a megabyte.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW

Make = Callable[[], nn.Module]
Batch = tuple[Tensor, Tensor]
AT_ONCE = "16384"
"""Bytes from which glibc gives every tensor pages of its own, back to the system when it goes: what is resident is then
what is held, to a page, and not what was held once."""


def peak_of_training(make: Make, batch: Batch, *, steps: int = 4, processes: int = 3) -> dict[str, Any]:
    """Return what training holds above a process that has PyTorch and the batch, as the median of fresh processes.

    Args:
        make: Builds the network; importable (a function of a module, or a `partial` of one).
        batch: Images and labels, as the network takes them.
        steps: Of AdamW; from the second on gradients and the optimizer's state are there.
        processes: How many, one after the other.

    Returns:
        `peak_bytes`, and `peaks` by process; counted beside it `state_bytes` (parameters, their gradients, the
        optimizer's state), `buffer_bytes`, and `kept_bytes`, what the forward pass keeps for the backward pass.
    """
    found = [_in_a_fresh_process(_measure, make, batch, steps) for _ in range(processes)]
    peaks = [each.pop("peak_bytes") for each in found]
    return {"peak_bytes": statistics.median(peaks), "peaks": peaks, **found[0]}


def _in_a_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    before = os.environ.get("MALLOC_MMAP_THRESHOLD_")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = AT_ONCE  # read once, when a process starts
    try:
        with ProcessPoolExecutor(1, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        if before is None:
            del os.environ["MALLOC_MMAP_THRESHOLD_"]
        else:
            os.environ["MALLOC_MMAP_THRESHOLD_"] = before


def _measure(make: Make, batch: Batch, steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    counted = _train(make, batch, steps)  # loads what is loaded at first use, and counts
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    before = _resident("VmRSS")
    _train(make, batch, steps)
    return {"peak_bytes": _resident("VmHWM") - before, **counted}


def _resident(field: str) -> int:
    """Return a field of the process's status in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, field
    return 1024 * int(found[1])


def _train(make: Make, batch: Batch, steps: int) -> dict[str, int]:
    """Take the steps; return what can be counted."""
    model = make().train()
    optimizer = AdamW(model.parameters(), lr=1e-3, fused=True)
    images, targets = batch
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), images, targets)}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for step in range(steps):
        if step == 0:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = functional.cross_entropy(model(images), targets)
        else:
            loss = functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    parameters = [p for p in model.parameters() if p.requires_grad]
    moments = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return {
        "state_bytes": sum(
            t.nbytes for t in (*parameters, *(p.grad for p in parameters if p.grad is not None), *moments)
        ),
        "buffer_bytes": sum(t.nbytes for t in model.buffers()),
        "kept_bytes": sum(kept.values()),
    }
