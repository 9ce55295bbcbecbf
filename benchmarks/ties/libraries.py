"""Operations of files and of other people's packages on tied models; what is not installed says so."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from benchmarks.ties.cases import HIDDEN, Subject, data, dense, tied
from benchmarks.ties.verdict import ChangedError, Expected, Operation


def safetensors_model(subject: Subject) -> Expected:
    """`save_model` of another tied case, `load_model` into this one, each model its own file."""
    from safetensors.torch import load_model, save_model

    other = tied(subject.kind, subject.column, 1).models
    with tempfile.TemporaryDirectory() as folder:
        for key, model in other.items():
            save_model(model, str(Path(folder, f"{key}.safetensors")))
            load_model(subject.models[key], str(Path(folder, f"{key}.safetensors")))
    return Expected(dense(subject.kind, 1))


def safetensors_file(subject: Subject) -> Expected:
    """`save_file` of the state dict."""
    from safetensors.torch import load_file, save_file

    other = tied(subject.kind, subject.column, 1).models
    with tempfile.TemporaryDirectory() as folder:
        for key, model in other.items():
            save_file(model.state_dict(), str(Path(folder, f"{key}.safetensors")))
            subject.models[key].load_state_dict(load_file(str(Path(folder, f"{key}.safetensors"))))
    return Expected(dense(subject.kind, 1))


def distributed_checkpoint(subject: Subject) -> Expected:
    """`torch.distributed.checkpoint` in one process, into another tied case."""
    import torch.distributed.checkpoint as dcp

    other = tied(subject.kind, subject.column, 1).models
    with tempfile.TemporaryDirectory() as folder:
        for key, model in other.items():
            place = str(Path(folder, key or "model"))
            dcp.save({"model": model.state_dict()}, checkpoint_id=place, no_dist=True)
            state = {"model": subject.models[key].state_dict()}
            dcp.load(state, checkpoint_id=place, no_dist=True)
            subject.models[key].load_state_dict(state["model"])
    return Expected(dense(subject.kind, 1))


def structural_pruning(subject: Subject) -> Expected:
    """torch-pruning takes one hidden unit out, with all that depends on it."""
    import torch_pruning as tp

    model = subject.holder(0)[0]
    key = next(k for k, m in subject.models.items() if m is model)
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=data(key)[0])
    layer = cast(Any, model).encoder
    group = graph.get_pruning_group(layer, tp.prune_linear_out_channels, idxs=[1])
    if not graph.check_pruning_group(group):
        raise ChangedError("torch-pruning refused the group")
    group.prune()
    return Expected(trained_alike=False)


def lora_merged(subject: Subject) -> Expected:
    """An adapter on one end, trained, merged into the weight: the function is to stay what the adapter made it."""
    from peft import LoraConfig, get_peft_model

    model, leaf = subject.holder(0)
    key = next(k for k, m in subject.models.items() if m is model)
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=[leaf], init_lora_weights=False))  # pyright: ignore[reportArgumentType]
    adapted = cast(nn.Module, wrapped).double()
    x, y = data(key)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        (adapted(x) - y).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        others = {k: m(data(k)[0]) for k, m in subject.models.items() if k != key}
        before = adapted(x)
    merged = cast(Any, wrapped).merge_and_unload()
    subject.models[key] = merged
    with torch.no_grad():
        after = merged(x)
        moved = [k for k, out in others.items() if not torch.allclose(subject.models[k](data(k)[0]), out)]
    if not torch.allclose(before, after):
        raise ChangedError("the merged model computes another function than the adapted one")
    if moved:
        raise ChangedError(f"merging an adapter of model {key!r} changed what model {moved[0]!r} computes")
    for p in merged.parameters():
        p.requires_grad_(True)
    return Expected(trained_alike=False)


def lora_trained(subject: Subject) -> Expected:
    """An adapter on one end, not merged: the ends compute with different weights."""
    from peft import LoraConfig, inject_adapter_in_model

    model, leaf = subject.holder(0)
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=[leaf], init_lora_weights=False), model)  # pyright: ignore[reportArgumentType]
    model.double()
    for p in model.parameters():
        p.requires_grad_(True)
    return Expected(trained_alike=False)


def quantized(subject: Subject) -> Expected:
    """Weights in eight bits, by PyTorch's own dynamic quantisation, in copies: for inference."""
    copies = {key: copy.deepcopy(model).float() for key, model in subject.models.items()}
    for key, model in copies.items():
        found = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        with torch.no_grad():
            x = data(key)[0].float()
            if not torch.allclose(found(x), subject.models[key](x.double()).float(), atol=0.1):
                raise ChangedError("the quantised copy computes something else")
    return Expected()


LIBRARIES: list[Operation] = [
    Operation("safetensors save_model, load_model", safetensors_model, optimizer="before"),
    Operation("safetensors save_file, load_file", safetensors_file, optimizer="before", listed=False),
    Operation("torch.distributed.checkpoint, one process", distributed_checkpoint, optimizer="before"),
    Operation("torch-pruning: a hidden unit removed", structural_pruning, note=f"one of {HIDDEN} units, one of 6"),
    Operation(
        "PEFT: LoRA at one end, merged", lora_merged, note="the merged model must compute what the adapted one did"
    ),
    Operation("PEFT: LoRA at one end, trained", lora_trained, listed=False),
    Operation("dynamic quantisation of a copy", quantized, listed=False),
]
