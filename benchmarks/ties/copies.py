"""Tied models moved, copied and pickled."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ties.cases import Subject


def nothing(subject: Subject) -> None:
    pass


def to(dtype: torch.dtype) -> Callable[[Subject], None]:
    def act(subject: Subject) -> None:
        for model in subject.models.values():
            model.to(dtype)

    return act


def half(subject: Subject) -> None:
    for model in subject.models.values():
        model.half()


def converted_with(switch: Callable[[bool], None]) -> Callable[[Subject], None]:
    """`.to(dtype)` while one of PyTorch's ways to convert modules is on."""

    def act(subject: Subject) -> None:
        switch(True)
        try:
            to(torch.float32)(subject)
        finally:
            switch(False)

    return act


overwritten = converted_with(torch.__future__.set_overwrite_module_params_on_conversion)
swapped = converted_with(torch.__future__.set_swap_module_params_on_conversion)


def to_meta(subject: Subject) -> None:
    for model in subject.models.values():
        model.to("meta")


def deepcopied(subject: Subject) -> None:
    subject.models = copy.deepcopy(subject.models)


def deepcopied_apart(subject: Subject) -> None:
    subject.models = {key: copy.deepcopy(model) for key, model in subject.models.items()}


def deepcopied_with_memo(subject: Subject) -> None:
    memo: dict[int, Any] = {}
    subject.models = {key: copy.deepcopy(model, memo) for key, model in subject.models.items()}


def deepcopied_with_optimizer(subject: Subject) -> None:
    optimizer = subject.make(subject.parameters())
    subject.models, optimizer = copy.deepcopy((subject.models, optimizer))
    subject.optimizers = [optimizer]


def deepcopied_twice(subject: Subject) -> None:
    """A copy of a copy; the copy between is gone."""
    subject.models = copy.deepcopy(copy.deepcopy(subject.models))


def one_deepcopied(subject: Subject) -> None:
    subject.models["b"] = copy.deepcopy(subject.models["b"])


def shallow(subject: Subject) -> None:
    subject.models = {key: copy.copy(model) for key, model in subject.models.items()}


def pickled(subject: Subject) -> None:
    subject.models = pickle.loads(pickle.dumps(subject.models))


def pickled_apart(subject: Subject) -> None:
    subject.models = {key: pickle.loads(pickle.dumps(model)) for key, model in subject.models.items()}


def _torch_saved(thing: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def saved(subject: Subject) -> None:
    subject.models = _torch_saved(subject.models)


def saved_apart(subject: Subject) -> None:
    subject.models = {key: _torch_saved(model) for key, model in subject.models.items()}


def moved_into_another(subject: Subject) -> None:
    """The models become parts of a larger one, which is called in their place: the root is another."""
    root = nn.ModuleDict({key or "only": m for key, m in subject.models.items()})

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = root

        def forward(self, key: str, x: Tensor) -> Tensor:
            return self.parts[key or "only"](x)

    whole = Root()
    subject.run = {key: (lambda x, key=key: whole(key, x)) for key in subject.models}
    copied = copy.deepcopy(whole)
    subject.models = {key: copied.parts[key or "only"] for key in subject.models}
    subject.run = {key: (lambda x, key=key: copied(key, x)) for key in subject.models}
