"""Other ways to compute with tied models: compiled, exported, functional, averaged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.ties.cases import Subject, data, dense, tied
from benchmarks.ties.copies import to
from benchmarks.ties.verdict import ChangedError, Expected
from tying.plan import qualified


def compiled(backend: str) -> Callable[[Subject], None]:
    def act(subject: Subject) -> None:
        torch.compiler.reset()
        subject.run = {key: torch.compile(m, backend=backend) for key, m in subject.models.items()}

    return act


def compiled_whole(subject: Subject) -> None:
    """One graph: what can't be traced is an error."""
    torch.compiler.reset()
    subject.run = {key: torch.compile(m, backend="eager", fullgraph=True) for key, m in subject.models.items()}


def compiled_before(subject: Subject) -> None:
    """Called before the tie: the models are compiled and have run."""
    compiled("eager")(subject)
    subject.outputs()


def compiled_in_place(subject: Subject) -> None:
    torch.compiler.reset()
    for model in subject.models.values():
        model.compile(backend="eager")


def compiled_then(act: Callable[[Subject], Any], backend: str = "eager") -> Callable[[Subject], Any]:
    """The models are compiled and have run before it happens."""

    def both(subject: Subject) -> Any:
        compiled(backend)(subject)
        subject.outputs()
        return act(subject)

    return both


def exported(subject: Subject) -> Expected:
    """The exported programs are trained; the models they come from are left."""
    subject.models = {key: _exported(key, model) for key, model in subject.models.items()}
    return Expected(opaque=True)


def exported_for_inference(subject: Subject) -> Expected:
    """Exported programs compute what the models did."""
    models = subject.models
    return Expected(judged=lambda: {key: _exported(key, model) for key, model in models.items()}, opaque=True)


def _exported(key: str, model: nn.Module) -> nn.Module:
    return cast(nn.Module, torch.export.export(model, (data(key)[0],)).module())


def traced(subject: Subject) -> None:
    subject.run = {key: torch.jit.trace(m, (data(key)[0],)) for key, m in subject.models.items()}


def functional(subject: Subject) -> Expected:
    """Each model a function of its own dictionary of parameters, which descends along its gradient."""
    values = {
        key: {name: p.detach().clone().requires_grad_() for name, p in m.named_parameters()}
        for key, m in subject.models.items()
    }
    models = subject.models

    class Descends(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            for group in values.values():
                for name, value in group.items():
                    group[name] = (value - 0.05 * value.grad).detach().requires_grad_()

    subject.run = {key: (lambda x, key=key: functional_call(models[key], values[key], (x,))) for key in models}
    subject.optimizers = [Descends(subject.parameters(), {})]

    def written() -> dict[str, nn.Module]:
        for key, model in models.items():
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(values[key][name])
        return models

    return Expected(judged=written)


def functional_one_name(subject: Subject) -> Expected:
    """New values, to be learnt, for the first end alone, by its name: the other follows, or it is to be said."""
    model, leaf = subject.holder(0)
    name = next(n for n, _ in model.named_parameters() if n.startswith(f"{leaf}."))
    new = (dict(model.named_parameters())[name].detach() + 0.5).requires_grad_()
    other = tied(subject.kind, "plain, each once")
    for which in (0, 1):
        _shift(other, which, dense(subject.kind, 0))
    for key, called in subject.models.items():
        x = data(key)[0]
        found = functional_call(called, {name: new}, (x,)) if called is model else called(x)
        if not torch.allclose(found, other.models[key](x)):
            raise ChangedError("functional_call with one name: the other end kept its old value")
    return Expected()


def _shift(other: Subject, which: int, start: dict[str, Tensor]) -> None:
    """Both ends as they are when 0.5 is added to the stored value."""
    end = other.end(which)
    path = {0: "encoder", 1: "decoder"}[which] if other.kind != "models" else "encoder"
    prefix = ("a", "b")[which] if other.kind == "models" else ""
    name = qualified(prefix, f"{path}.weight")
    if other.kind == "inside" and which == 1:
        return
    end.weight = nn.Parameter(start[name] + 0.5)


def averaged(use_buffers: bool = False, decay: float | None = None) -> Callable[[Subject], Expected]:
    def act(subject: Subject) -> Expected:
        rule = {"multi_avg_fn": get_ema_multi_avg_fn(decay)} if decay else {}
        averages = {k: AveragedModel(m, use_buffers=use_buffers, **rule) for k, m in subject.models.items()}

        def update() -> None:
            for key, average in averages.items():
                average.update_parameters(subject.models[key])

        def mean(trajectory: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            found = trajectory[0]
            for count, values in enumerate(trajectory[1:], 2):
                share = 1 - decay if decay else 1 / count
                found = {name: v + (values[name] - v) * share for name, v in found.items()}
            return found

        subject.after_step.append(update)
        return Expected(trajectory=mean, judged=lambda: {k: a.module for k, a in averages.items()})

    return act


def checkpointed(subject: Subject) -> None:
    from torch.utils.checkpoint import checkpoint

    subject.forward = lambda call, x: checkpoint(call, x, use_reentrant=False)


def autocast(subject: Subject) -> Expected:
    def forward(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return call(x).double()

    to(torch.float32)(subject)
    subject.forward = forward
    return Expected(trained_alike=False)


def parametrize_cached(subject: Subject) -> None:
    def forward(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with parametrize.cached():
            return call(x)

    subject.forward = forward


def stacked(subject: Subject) -> Expected:
    """`stack_module_state` of two copies of each model, run with `vmap`: outputs as the models'."""
    from torch.func import stack_module_state, vmap

    for key, model in subject.models.items():
        parameters, buffers = stack_module_state(cast(Any, [model, copy.deepcopy(model)]))
        x = data(key)[0]
        with torch.no_grad():
            found = vmap(lambda p, b, m=model, x=x: functional_call(m, (p, b), (x,)))(parameters, buffers)
            if not torch.allclose(found[1], model(x)):
                raise ChangedError("stack_module_state: outputs differ from the model's")
    return Expected()


def in_threads(subject: Subject) -> None:
    """Forward passes from several threads at once."""
    from concurrent.futures import ThreadPoolExecutor

    def forward(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda _: call(x), range(4)))[-1]

    subject.forward = forward
