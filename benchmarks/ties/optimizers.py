"""Optimizers over tied models: one, two, made too early, scaled, clipping."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from benchmarks.ties.cases import Subject, data
from benchmarks.ties.verdict import Expected, NotApplicableError


def _halves(subject: Subject) -> list[list[nn.Parameter]]:
    if subject.kind == "inside":
        raise NotApplicableError("there is one name")
    if subject.kind == "models":
        return [list(model.parameters()) for model in subject.models.values()]
    model = subject.models[""]
    layers = [("enter", "encoder"), ("decoder", "head")]
    return [[p for layer in half for p in model.get_submodule(layer).parameters()] for half in layers]


def two_optimizers(subject: Subject) -> None:
    subject.optimizers = [subject.make(half) for half in _halves(subject)]


def two_optimizers_clipped(subject: Subject) -> None:
    """Each model's gradients are clipped just before its own optimizer's step."""

    class Clipped:
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            self.parameters, self.optimizer = parameters, subject.make(parameters)
            self.zero_grad = self.optimizer.zero_grad

        def step(self) -> None:
            nn.utils.clip_grad_norm_(self.parameters, 1e6)
            self.optimizer.step()

    subject.optimizers = [cast(torch.optim.Optimizer, Clipped(half)) for half in _halves(subject)]


def two_optimizers_scaled(subject: Subject) -> None:
    """As under mixed precision: one GradScaler, two optimizers that each unscale and step."""
    two_optimizers(subject)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    subject.backward = lambda loss: scaler.scale(loss).backward()
    for optimizer in subject.optimizers:
        optimizer.step = _scaled_step(scaler, optimizer)  # pyright: ignore[reportAttributeAccessIssue]
    subject.after_step.append(scaler.update)


def one_optimizer_scaled(subject: Subject) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    subject.backward = lambda loss: scaler.scale(loss).backward()
    subject.optimizers = [subject.make(subject.parameters())]
    subject.optimizers[0].step = _scaled_step(scaler, subject.optimizers[0])
    subject.after_step.append(scaler.update)


def _scaled_step(scaler: Any, optimizer: torch.optim.Optimizer) -> Any:
    plain, bound = type(optimizer).step, {}

    def step() -> None:
        bound["mine"] = optimizer.__dict__.pop("step")
        try:
            assert plain is type(optimizer).step
            scaler.step(optimizer)
        finally:
            optimizer.step = bound["mine"]

    return step


def made_before(subject: Subject) -> None:
    """Called before the tie."""
    subject.optimizers = [subject.make([p for m in subject.models.values() for p in m.parameters()])]


def one_list(subject: Subject) -> None:
    subject.optimizers = [subject.make([p for m in subject.models.values() for p in m.parameters()])]


def in_turn(subject: Subject) -> Expected:
    """Two optimizers, each after its own model's loss: no gradient is stepped twice, and nothing is to be refused."""
    optimizers = [subject.make(half) for half in _halves(subject)]
    subject.make, keys = subject.make, list(subject.models)

    class InTurn(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            for key, optimizer in zip(keys, optimizers, strict=True):
                optimizer.zero_grad()
                x, y = data(key)
                (subject.models[key](x) - y).square().mean().backward()
                optimizer.step()

    subject.optimizers = [InTurn([nn.Parameter(torch.zeros(1))], {})]
    return Expected(trained_alike=False)


def decayed(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, weight_decay=0.5)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def adamw_fused(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.5, fused=True)


def reloaded_optimizer(subject: Subject) -> None:
    """The optimizer's state dict into a new optimizer, as when training is resumed."""
    optimizer = subject.make(subject.parameters())
    fresh = subject.make(subject.parameters())
    fresh.load_state_dict(optimizer.state_dict())
    subject.optimizers = [fresh]
