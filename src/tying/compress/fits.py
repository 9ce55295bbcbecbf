"""Fits of a task, each under a seed of its own, kept in a folder so that what is done is not done again."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as encode
from torch import nn
from torch.optim import Optimizer

from tying.compress.progress import Progress
from tying.compress.randomness import reseed
from tying.compress.task import Stage, Task, takes_stage
from tying.errors import FileError, TaskError
from tying.evaluation import evaluating
from tying.files.atomic import write_atomically
from tying.groups import Groups
from tying.plan import TiePlan
from tying.train.proximal import ProximalHandle, proximal
from tying.train.rules import GroupRules

FOLDER = "fits"


@dataclass(frozen=True)
class Fit:
    """A trained network, its accuracy on the validation split, and how it came about."""

    model: nn.Module
    accuracy: float
    history: tuple[float, ...]
    """The accuracy after each epoch."""
    distance: Mapping[str, float]
    """Parameter name → sum of its learning rates over all steps: how far a prox of strength 1 would have gone. 0 for
    what is frozen."""


class Fits:
    """Trains networks for one task and seed; a fit that the folder holds is read, not run."""

    def __init__(self, task: Task, *, seed: int, epochs: int, folder: Path | None, progress: Progress) -> None:
        self.task, self.seed, self.epochs, self.folder, self.progress = task, seed, epochs, folder, progress
        self._given: nn.Module | None = None

    def initial(self) -> nn.Module:
        """Return the untrained network of this seed."""
        self._reseed("model")
        model = self.task.model()
        if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TaskError(f"model(): expected an nn.Module, got {type(model).__name__}; return the network")
        if model is self._given:
            raise TaskError("model(): expected a new network at every call, got the same one again; build it anew")
        self._given = model
        return model

    def fit(
        self, name: str, model: nn.Module, *, stage: Stage, rules: GroupRules | None = None, plan: TiePlan | None = None
    ) -> Fit:
        """Train the model in place, with the penalties of `rules` on it, or read the same fit from the folder.

        Args:
            name: Of the fit. The random numbers depend on it.
            model: Trained in place.
            stage: What the task is told.
            rules: For stage one.
            plan: What the model is compacted by: two plans can give networks of one name and size.
        """
        file = self._file(name, plan)
        done = self._read(file, name, model)
        if done is None:
            done = self._run(name, model, stage, rules or {})
            if file is not None:
                self._write(file, done)
        self.progress.line(f"{name:<28} validation {done.accuracy:7.2%}{'' if plan is None else _ties(plan)}")
        return done

    def accuracy(self, model: nn.Module, split: str = "validation") -> float:
        """Return the task's accuracy on a split; mode and random state of the model's training are kept."""
        with evaluating(model), torch.random.fork_rng(devices=[]):
            answer = self.task.evaluate(model, split)  # pyright: ignore[reportArgumentType]
        try:
            value = float(answer)
        except (TypeError, ValueError) as error:
            raise TaskError(f"evaluate(): expected a number, got {answer!r}; return the accuracy") from error
        if not 0 <= value <= 1:
            raise TaskError(f"evaluate(): expected an accuracy in [0, 1], got {value}; return a share, not per cent")
        return value

    def _run(self, name: str, model: nn.Module, stage: Stage, rules: GroupRules) -> Fit:
        self._reseed(name)
        self.progress.begin(name, self.epochs)
        history: list[float] = []
        rates = _Rates(model)
        handles: dict[ProximalHandle, int] = {}

        def on_step(optimizer: Optimizer) -> None:
            rates.add(optimizer)
            if rules and not handles:
                handles[proximal(optimizer, model, rules, every="epoch")] = rates.steps

        def on_epoch(epoch: int) -> None:
            for handle, since in handles.items():
                if rates.steps > since:  # an epoch of one step, at whose end the handle was made
                    handle.epoch_end()
            history.append(self.accuracy(model))
            self.progress.epoch(name, f"epoch {epoch + 1}/{self.epochs}  {history[-1]:.2%}{_left(model, rules)}")

        options = {"stage": stage} if takes_stage(self.task) else {}
        self.task.fit(model, epochs=self.epochs, on_step=on_step, on_epoch=on_epoch, **options)
        for handle in handles:
            handle.remove()
        if not history:
            raise TaskError("fit(): expected on_epoch(epoch) after every epoch, got no call; call it")
        if not rates.steps:
            raise TaskError("fit(): expected on_step(optimizer) after every optimizer.step(), got no call; call it")
        if broken := [key for key, value in model.named_parameters() if not bool(value.isfinite().all())]:
            raise TaskError(
                f"fit(): expected finite weights after '{name}', got NaN or infinite ones in {', '.join(broken)}; "
                "lower the learning rate, or clip the gradients"
            )
        return Fit(model, history[-1], tuple(history), rates.sums)

    def _reseed(self, name: str) -> None:
        value = zlib.crc32(f"{self.seed}/{name}".encode())
        reseed(value)
        seed: Callable[[int], None] | None = getattr(self.task, "seed", None)
        if callable(seed):
            seed(value)

    def _file(self, name: str, plan: TiePlan | None) -> Path | None:
        if self.folder is None:
            return None
        said = "" if plan is None else f"-{zlib.crc32(repr(tuple(plan)).encode()):08x}"
        return self.folder / FOLDER / f"{name.replace(',', '').replace(' ', '-')}{said}.safetensors"

    def _write(self, file: Path, fit: Fit) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Under safetensors' rules a tensor has one name: a tied one is written once for each.
        tensors = {key: value.detach().clone().contiguous() for key, value in fit.model.state_dict().items()}
        figures = {"history": fit.history, "distance": dict(fit.distance)}
        write_atomically(file, encode(tensors, {"fit": json.dumps(figures)}))

    def _read(self, file: Path | None, name: str, model: nn.Module) -> Fit | None:
        if file is None or not file.is_file():
            return None
        try:
            with safe_open(str(file), framework="pt") as opened:  # pyright: ignore[reportUnknownVariableType]
                figures = json.loads(opened.metadata()["fit"])
                state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  not a mapping
            model.load_state_dict(state)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FileError(
                f"{file}: expected the fit '{name}' of this task, got {error!r}; delete the folder or choose another"
            ) from error
        self.progress.read(name, self.epochs)
        return Fit(model, figures["history"][-1], tuple(figures["history"]), figures["distance"])


class _Rates:
    def __init__(self, model: nn.Module) -> None:
        self._names = {id(p): name for name, p in model.named_parameters()}
        self.sums: dict[str, float] = dict.fromkeys(self._names.values(), 0.0)
        self.steps = 0

    def add(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TaskError(
                f"on_step(): expected the optimizer, got {type(optimizer).__name__}; call on_step(optimizer)"
            )
        self.steps += 1
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = self._names.get(id(parameter))
                if name is not None and parameter.requires_grad:
                    self.sums[name] += float(group["lr"])


def _left(model: nn.Module, rules: GroupRules) -> str:
    """Say how many groups of the ruled parameters are not zero yet."""
    parameters = dict(model.named_parameters())
    counts = [
        (int((norms := groups.norms(parameters[name])).count_nonzero()), len(norms))
        for name, groups in (rule if isinstance(rule, tuple) else (rule, Groups.inputs()) for rule in rules)
    ]
    return f"  groups {sum(c for c, _ in counts)}/{sum(n for _, n in counts)}" if counts else ""


def _ties(plan: TiePlan) -> str:
    """Say how many groups the plan leaves, and how many values several of them share."""
    partitions = [tie.partition for tie in plan]
    left, total = sum(len(p) - p.pruned for p in partitions), sum(map(len, partitions))
    return f"  groups {left}/{total}  ties {sum(int((p.sizes > 1).sum()) for p in partitions)}"
