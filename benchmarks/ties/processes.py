"""Ties in two processes: DDP, FSDP2 and distributed checkpoints. `run` starts them; each writes what it found.

python -m torch.distributed.run --nproc-per-node 2 -m benchmarks.ties.processes FOLDER
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.ties import gradients as in_one_process
from benchmarks.ties.cases import (
    COLUMNS,
    KINDS,
    LAYERS,
    Column,
    Kind,
    Reference,
    Subject,
    apart,
    data,
    off,
    plan_of,
    tied,
    untied,
)
from benchmarks.ties.verdict import TOLERANCE, Cell, refused
from tying.enforce.ties.unique import shard_groups
from tying.plan import qualified

Spread = Callable[[Subject, Path], None]
TIMEOUT = 30
"""Seconds after which a message that never comes is given up."""


class Both(nn.Module):
    """Two models under one root that can be called."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleDict(models)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Call those models for which there is data."""
        return {key: self.models[key](each) for key, each in x.items()}


def ddp(subject: Subject, folder: Path) -> None:
    """Each model in a `DistributedDataParallel` of its own."""
    subject.run = {key: DistributedDataParallel(model) for key, model in subject.models.items()}


def ddp_together(subject: Subject, folder: Path) -> None:
    """All models under one root."""
    _run_together(subject, DistributedDataParallel(Both(_named(subject))))


def _named(subject: Subject) -> dict[str, nn.Module]:
    return {key or "only": model for key, model in subject.models.items()}


def _run_together(subject: Subject, root: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """One call of the root gives what all models make of their data."""

    def outputs() -> dict[str, Tensor]:
        x = {key or "only": data(key, subject.dtype)[0][subject.share] for key in subject.models}
        found = root(x)
        return {key: found[key or "only"] for key in subject.models}

    subject.together = outputs


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(name) for name in LAYERS[1:]]


def fsdp_per_block(subject: Subject, folder: Path) -> None:
    """`fully_shard` on the blocks, then on each model; ours by the groups that `shard_groups` gives."""
    roots = list(subject.models.values())
    blocks = [block for model in roots for block in _blocks(model)]
    if subject.ours:
        whole = roots[0] if len(roots) == 1 else Both(_named(subject))
        for group in shard_groups(whole, blocks):
            fully_shard(group)
        fully_shard(whole)
        if isinstance(whole, Both):
            _run_together(subject, whole)
        return
    fsdp_naively(subject, folder)


def fsdp_per_block_one_root(subject: Subject, folder: Path) -> None:
    """As `fsdp_per_block`, both models under one root; ours and plain differ in the groups alone."""
    whole = Both(_named(subject))
    blocks = [block for model in subject.models.values() for block in _blocks(model)]
    for group in shard_groups(whole, blocks) if subject.ours else [[block] for block in blocks]:
        fully_shard(group)
    fully_shard(whole)
    _run_together(subject, whole)


def fsdp_naively(subject: Subject, folder: Path) -> None:
    """`fully_shard` on every block by itself, then on each model, in all columns."""
    for model in subject.models.values():
        for block in _blocks(model):
            fully_shard(block)
        fully_shard(model)


def fsdp_root(subject: Subject, folder: Path) -> None:
    """`fully_shard` on each model alone: one group a model."""
    for model in subject.models.values():
        fully_shard(model)


def fsdp_one_root(subject: Subject, folder: Path) -> None:
    """`fully_shard` on one root of all models."""
    whole = Both(_named(subject))
    fully_shard(whole)
    _run_together(subject, whole)


def checkpointed(spread: Spread) -> Spread:
    """A distributed checkpoint of another case, spread alike and trained nowhere, loaded before the training."""

    def act(subject: Subject, folder: Path) -> None:
        other = tied(subject.kind, subject.column, 1)
        spread(other, folder)
        spread(subject, folder)
        for key, model in other.models.items():
            place = str(folder / f"{subject.kind}-{subject.column}-{spread.__name__}-{key}")
            dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=place)
            state = {"model": get_model_state_dict(subject.models[key])}
            dcp.load(state, checkpoint_id=place)
            set_model_state_dict(subject.models[key], state["model"])
        subject.seed = 1

    return act


ROWS: dict[str, tuple[Spread, tuple[Kind, ...], str]] = {
    "DDP": (ddp, KINDS, "each model by itself"),
    "DDP, one root": (ddp_together, ("models",), "both models in one"),
    "FSDP2 per block": (fsdp_per_block, KINDS, "ours: the groups of shard_groups, two models under one root"),
    "FSDP2 per block, one root": (fsdp_per_block_one_root, KINDS, "ours: the groups of shard_groups"),
    "FSDP2 per block, without shard_groups": (fsdp_naively, KINDS, "the same in all columns"),
    "FSDP2, each model a group": (fsdp_root, KINDS, ""),
    "FSDP2, one root": (fsdp_one_root, ("models",), ""),
    "torch.distributed.checkpoint, DDP": (checkpointed(ddp), KINDS, "into another tied case"),
    "torch.distributed.checkpoint, FSDP2": (checkpointed(fsdp_one_root), KINDS, "into another tied case"),
}


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered."""
    tensor = tensor.detach()
    return cast(Any, tensor).full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.clone()


def gathered(subject: Subject) -> dict[str, Tensor]:
    """The weights that the layers compute with, by name, on every rank whole."""
    found: dict[str, Tensor] = {}
    for key, model in subject.models.items():
        for layer in LAYERS:
            module = model.get_submodule(layer)
            for leaf, p in module.named_parameters(recurse=False):
                found[qualified(key, f"{layer}.{leaf}")] = full(p)
            if "weight" not in module._parameters:
                chain = cast(Any, module).parametrizations.weight
                found[qualified(key, f"{layer}.weight")] = chain[0](full(chain.original))
    return found


def judge_together(kind: Kind, column: Column, spread: Spread, folder: Path, steps: int = 2) -> Cell:
    """As `verdict.judge`, on all ranks at once, each with its share of the batch."""
    subject = Subject(kind, column, {})
    done = 0
    torch.manual_seed(0)
    try:
        subject = tied(kind, column)
        subject.at = "the operation"
        spread(subject, folder)
        start = {qualified(k, n): p for k, m in untied(kind, subject.seed).items() for n, p in m.named_parameters()}
        start = {name: p.detach().clone() for name, p in start.items()}
        subject.share = slice(dist.get_rank(), None, dist.get_world_size())
        reference = Reference(kind, start)
        for _ in range(steps):
            subject.step()
            reference.step()
            done += 1
        subject.at = "gathering"
        weights = gathered(subject)
    except Exception as error:
        if os.environ.get("TIES_TRACE"):
            traceback.print_exc()
        return refused(error, subject, done)
    gap, wrong = apart(plan_of(kind), weights), off(start, weights, reference.values)
    good = gap == 0 and wrong <= TOLERANCE[torch.float64]
    return Cell("kept" if good else "silent", apart=gap, off=wrong, said="" if _alike(weights) else "replicas differ")


def _alike(weights: dict[str, Tensor]) -> bool:
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, weights)
    return all(torch.equal(weights[name], other[name]) for other in everywhere for name in weights)


def _agreed(cell: Cell) -> Cell:
    """The worst verdict of all ranks."""
    cells: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(cells, cell)
    order = ["silent", "error", "repaired", "kept", "not applicable"]
    worst: Cell = min(cells, key=lambda each: order.index(each.verdict))
    if worst.said == "replicas differ":
        worst.verdict = "silent"
    return worst


def table(folder: Path, rows: list[str] | None = None, columns: tuple[Column, ...] = COLUMNS) -> dict[str, Any]:
    """All rows, by name, kind and column."""
    found: dict[str, Any] = {}
    for name, (spread, kinds, note) in ROWS.items():
        if rows is not None and name not in rows:
            continue
        cells: dict[str, Any] = {}
        for kind in KINDS:
            for column in columns:
                cell = judge_together(kind, column, spread, folder) if kind in kinds else Cell("not applicable")
                cells.setdefault(kind, {})[column] = _agreed(cell).as_json()
        found[name] = {"note": note, "listed": True, "cells": cells}
        print(name, flush=True)  # each at once: should one hang, it is the first that is missing
    return found


def gradients(folder: Path) -> dict[str, Any]:
    """The gradients of hard ties against the sums of untied ones; each rank has its share of the batch."""
    share = slice(dist.get_rank(), None, dist.get_world_size())
    return in_one_process.table({"DDP": ddp, "FSDP2": fsdp_per_block}, folder=folder, share=share, weights=gathered)


def run(module: str = "benchmarks.ties.processes", *, processes: int = 2, timeout: float = 600) -> dict[str, Any]:
    """Start the processes and return what they wrote."""
    with tempfile.TemporaryDirectory() as name:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", module]
        done = subprocess.run(
            [sys.executable, *command, name],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        written = Path(name, "table.json")
        if not written.exists():
            raise RuntimeError(f"the processes ended before their work did: {done.stdout[-500:]}{done.stderr[-4000:]}")
        return json.loads(written.read_text())


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    found = {"rows": table(folder, sys.argv[2:] or None), "gradients": gradients(folder)}
    if dist.get_rank() == 0:
        (folder / "table.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
