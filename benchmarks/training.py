"""Training of image networks on the CPU: bfloat16 in autocast, channels last, one schedule; runs kept and summed up."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from tying.files.atomic import write_atomically

Split = tuple[Tensor, Tensor]
BATCH = 128


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    split: Split,
    *,
    epochs: int,
    seed: int,
    prepare: Callable[[Tensor, torch.Generator], Tensor],
    handle: Any = None,
    name: str = "",
) -> nn.Module:
    """Train by cross-entropy while the learning rate goes up to the optimizer's and down to zero."""
    images, labels = split
    steps = len(images) // BATCH
    peak = [group["lr"] for group in optimizer.param_groups]
    schedule = OneCycleLR(optimizer, peak, epochs * steps, pct_start=0.2, cycle_momentum=False)
    generator = torch.Generator().manual_seed(seed)
    model.to(memory_format=torch.channels_last).train()  # pyright: ignore
    begun = time.perf_counter()
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(images), generator=generator)
        for step in range(steps):
            batch = order[step * BATCH : (step + 1) * BATCH]
            x = prepare(images[batch], generator).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(x)
            loss = functional.cross_entropy(logits.float(), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if handle is not None:
            handle.epoch_end()
        left = (time.perf_counter() - begun) / epoch * (epochs - epoch)
        print(f"{name}: epoch {epoch} of {epochs}, about {left:.0f} s left", file=sys.stderr, flush=True)
    return model.eval()


def cropped_and_flipped(images: Tensor, margin: int, generator: torch.Generator) -> Tensor:
    """Pad `(n, c, h, w)` by `margin` with zeros, then crop to the size they had and flip, each image at random."""
    (n, _, height, width), device = images.shape, images.device
    padded = functional.pad(images, (margin,) * 4)
    down, right = torch.randint(2 * margin + 1, (2, n), generator=generator).to(device)
    mirrored = (torch.rand(n, 1, generator=generator) < 0.5).to(device)
    across = torch.arange(width, device=device)
    columns = right[:, None] + torch.where(mirrored, across.flip(0), across)
    rows = down[:, None] + torch.arange(height, device=device)
    each = torch.arange(n, device=device)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split, prepare: Callable[[Tensor], Tensor]) -> float:
    """Return the percentage of images that the network names rightly, in evaluation mode and float32."""
    images, labels = split
    model.eval()
    right = [
        (model(prepare(x).contiguous(memory_format=torch.channels_last)).argmax(1) == y).sum().item()
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    ]
    return 100 * sum(right) / len(labels)


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what an earlier call left in the file, or make it and leave it there."""
    if not path.is_file():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(made).encode())
    return json.loads(path.read_text(encoding="utf-8"))


def trained_once(path: Path, model: nn.Module, train: Callable[[], Any]) -> None:
    """Train the model, or give it what an earlier call left in the file."""
    if not path.is_file():
        train()
        scratch = path.with_suffix(f".{os.getpid()}")
        torch.save(model.state_dict(), scratch)
        scratch.replace(path)
    model.load_state_dict(torch.load(path))


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Return a short name for settings: runs of other ones lie in another folder."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def wait(futures: list[Future[Any]], what: str) -> list[Any]:
    """Wait for all, saying how long it will take; the results come in the order of the futures."""
    begun = time.perf_counter()
    try:
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            left = (time.perf_counter() - begun) / done * (len(futures) - done) / 60
            print(f"{what}: {done} of {len(futures)} done, about {left:.0f} min left", file=sys.stderr, flush=True)
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    return [future.result() for future in futures]


def summarise(
    rows: Sequence[Mapping[str, Any]],
    by: Sequence[str],
    parameters: int,
    more: Callable[[list[Mapping[str, Any]]], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Return one line for the runs that have the same values under `by`, in the order of the rows.

    Args:
        rows: Each with `seed`, `values`, `test`, `validation` and `file_bytes`.
        by: What tells lines apart, and is in them.
        parameters: Of the network that the values are held against.
        more: What else is in a line, from its runs.
    """
    lines: list[dict[str, Any]] = []
    for key in dict.fromkeys(tuple(row[name] for name in by) for row in rows):
        mine = [row for row in rows if tuple(row[name] for name in by) == key]
        line = {
            "seeds": [row["seed"] for row in mine],
            "ratio": parameters / statistics.mean(row["values"] for row in mine),
            **tested([row["test"] for row in mine]),
            "validation_mean": statistics.mean(row["validation"] for row in mine),
            "file_bytes": [row["file_bytes"] for row in mine],
        }
        lines.append({**dict(zip(by, key, strict=True)), **line, **more(mine)})
    return lines


def tested(test: list[float]) -> dict[str, Any]:
    """Return test accuracies by seed, their mean and their standard deviation: None of a single one."""
    spread = statistics.stdev(test) if len(test) > 1 else None
    return {"test": test, "test_mean": statistics.mean(test), "test_spread": spread}


def said(line: Mapping[str, Any]) -> str:
    """Return the test accuracy of a line in words."""
    spread = "" if line["test_spread"] is None else f" ± {line['test_spread']:.2f}"
    return f"test {line['test_mean']:.2f}{spread}"
