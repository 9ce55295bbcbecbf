"""What happens to tied models in daily use, one function each: what the issue names, and what was thought of beside."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.ties_cases import Subject, data, plan_of, share_by_hand, tied, untied
from benchmarks.ties_verdict import ChangedError, Expected, NotApplicableError, Operation
from tying.enforce.tie import tie_
from tying.plan import qualified


def dense(kind: Any, seed: int) -> dict[str, Tensor]:
    """The values of the untied networks of that seed, by name."""
    return {qualified(k, n): p.detach().clone() for k, m in untied(kind, seed).items() for n, p in m.named_parameters()}


# ---- moves, copies ----


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


def overwritten(subject: Subject) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        to(torch.float32)(subject)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def swapped(subject: Subject) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        to(torch.float32)(subject)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def through_meta(subject: Subject) -> None:
    """Everything to the meta device, empty memory, the weights from a checkpoint."""
    for model in subject.models.values():
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.to("meta")
        model.to_empty(device="cpu")
        model.load_state_dict(state)


def to_meta(subject: Subject) -> None:
    for model in subject.models.values():
        model.to("meta")


def from_meta(subject: Subject) -> Expected:
    states = {key: m.state_dict() for key, m in tied(subject.kind, subject.column, 1).models.items()}
    for key, model in subject.models.items():
        model.to_empty(device="cpu")
        model.load_state_dict(states[key])
    return Expected(dense(subject.kind, 1))


def from_meta_assigned(subject: Subject) -> Expected:
    states = {key: m.state_dict() for key, m in tied(subject.kind, subject.column, 1).models.items()}
    for key, model in subject.models.items():
        model.load_state_dict(states[key], assign=True)
    return Expected(dense(subject.kind, 1))


def emptied_and_reset(subject: Subject) -> Expected:
    """Each layer draws its own weights, as after a start on the meta device."""
    for model in subject.models.values():
        model.to_empty(device="cpu")
    return reset(subject)


def reset(subject: Subject) -> Expected:
    def draw(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    torch.manual_seed(3)
    was = subject.weights()
    for model in subject.models.values():
        model.apply(draw)
    now = subject.weights()
    for name in _both_ends(subject):
        if torch.equal(was[name], now[name]):
            raise ChangedError(f"{name}: reset_parameters changed nothing")
    return Expected(now)


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


# ---- state dicts ----


def _states(subject: Subject) -> dict[str, dict[str, Tensor]]:
    """The state of another case of the same kind, tied in the same way, as it comes from a file: every name its own."""
    other = tied(subject.kind, subject.column, 1).models
    return {key: {name: v.detach().clone() for name, v in m.state_dict().items()} for key, m in other.items()}


def _end_names(subject: Subject, which: int, states: dict[str, dict[str, Tensor]]) -> tuple[str, list[str]]:
    """The key of the model and the names in its state of what the end is made of (labels left out)."""
    key = next(k for k, m in subject.models.items() if m is subject.holder(which)[0])
    leaf = subject.holder(which)[1]
    names = [n for n, v in states[key].items() if n.startswith(f"{leaf}.") and v.is_floating_point()]
    return key, names


def loaded(assign: bool = False) -> Callable[[Subject], Expected]:
    def act(subject: Subject) -> Expected:
        for key, state in _states(subject).items():
            subject.models[key].load_state_dict(state, assign=assign)
        return Expected(dense(subject.kind, 1))

    return act


def loaded_different(assign: bool = False) -> Callable[[Subject], None]:
    """The two names of a tie hold different values; inside one parameter: groups that are to be equal differ."""

    def act(subject: Subject) -> None:
        if subject.kind == "inside":
            weight = dense("inside", 1)["encoder.weight"]
            weight[:, 0] += 1
            _load_plain(subject, {"": {**_plain_states(subject)[""], "encoder.weight": weight}}, assign=assign)
            return
        states = _states(subject)
        key, names = _end_names(subject, 1, states)
        for name in names:
            states[key][name] = states[key][name] + 1
        for key, state in states.items():
            subject.models[key].load_state_dict(state, assign=assign)

    return act


def loaded_without(which: int, assign: bool = False) -> Callable[[Subject], Expected]:
    """One of the two names is missing."""

    def act(subject: Subject) -> Expected:
        states = _states(subject)
        key, names = _end_names(subject, which, states)
        for name in names:
            del states[key][name]
        for key, state in states.items():
            subject.models[key].load_state_dict(state, strict=False, assign=assign)
        expected = dense(subject.kind, 1)
        if subject.kind == "inside":
            expected["encoder.weight"] = dense("inside", 0)["encoder.weight"]
        return Expected(expected)

    return act


def _plain_states(subject: Subject) -> dict[str, dict[str, Tensor]]:
    return {key: {n: v.clone() for n, v in m.state_dict().items()} for key, m in untied(subject.kind, 1).items()}


def _load_plain(subject: Subject, states: dict[str, dict[str, Tensor]], assign: bool = False) -> None:
    for key, state in states.items():
        subject.models[key].load_state_dict(state, assign=assign)


def loaded_from_untied(subject: Subject) -> Expected:
    """A checkpoint of the networks before they were tied, whose ends happen to be equal."""
    _load_plain(subject, _plain_states(subject))
    return Expected(dense(subject.kind, 1))


def loaded_into_untied(subject: Subject) -> None:
    """The tied networks' state in new networks, which are then tied."""
    fresh = untied(subject.kind, 1)
    for key, model in subject.models.items():
        fresh[key].load_state_dict(model.state_dict())
    subject.models = fresh
    tied_twice(subject)


# ---- other ways to compute ----


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


# ---- averages, clipping, freezing ----


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


def _both_ends(subject: Subject) -> tuple[str, ...]:
    return tuple(m.parameter for tie in plan_of(subject.kind) for m in tie.members)


def frozen_parameter(subject: Subject) -> Expected:
    cast(Tensor, subject.end(1).weight).requires_grad_(False)
    return Expected(frozen=_both_ends(subject))


def frozen_module(subject: Subject) -> Expected:
    subject.end(1).requires_grad_(False)
    return Expected(frozen=_both_ends(subject))


# ---- layers rewritten ----


def pruned(subject: Subject) -> None:
    prune.l1_unstructured(subject.end(1), "weight", 0.3)


def pruned_for_good(subject: Subject) -> Expected:
    """The mask is written into the weight, the reparametrization goes; training goes on."""
    prune.l1_unstructured(subject.end(1), "weight", 0.3)
    prune.remove(subject.end(1), "weight")
    return Expected(trained_alike=False)


def weight_normed(subject: Subject) -> Expected:
    nn.utils.parametrizations.weight_norm(subject.end(1))
    return Expected(trained_alike=False)


def old_weight_normed(subject: Subject) -> Expected:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(subject.end(1))
    return Expected(trained_alike=False)


class Doubled(nn.Module):
    """Twice the weight: a parametrization that changes the value."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return it doubled."""
        return 2 * weight


def parametrized(subject: Subject) -> Expected:
    parametrize.register_parametrization(subject.end(1), "weight", Doubled())
    return Expected(trained_alike=False)


def parametrized_both(subject: Subject) -> Expected:
    """Both ends get the same parametrization: what they compute with stays equal."""
    for which in (0, 1) if subject.kind != "inside" else (0,):
        parametrize.register_parametrization(subject.end(which), "weight", Doubled())
    return Expected(trained_alike=False)


def _replace(subject: Subject, new: nn.Module) -> None:
    model, leaf = subject.holder(1)
    setattr(model, leaf, new)


def replaced(subject: Subject) -> Expected:
    old = cast(Any, subject.end(1))
    torch.manual_seed(5)
    _replace(subject, nn.Linear(old.in_features, old.out_features, bias=False).double())
    return Expected(trained_alike=False)


def replaced_by_copy(subject: Subject) -> None:
    _replace(subject, copy.deepcopy(subject.end(1)))


def replaced_by_equal(subject: Subject) -> None:
    old = cast(Any, subject.end(1))
    new = nn.Linear(old.in_features, old.out_features, bias=False).double()
    with torch.no_grad():
        new.weight.copy_(old.weight)
    _replace(subject, new)


def exchanged(subject: Subject) -> Expected:
    """Each model gets the other one's module: what stands there is the same."""
    (a, leaf), (b, _) = subject.holder(0), subject.holder(1)
    one, other = a.get_submodule(leaf), b.get_submodule(leaf)
    setattr(a, leaf, other)
    setattr(b, leaf, one)
    return Expected()


def module_shared(subject: Subject) -> None:
    _replace(subject, subject.end(0))


def wrapped(subject: Subject) -> Expected:
    """The same module, one level deeper, as wrappers for checkpointing or adapters do."""
    layer = cast(Any, subject.end(1))
    around: Any = nn.Sequential(layer)
    around.in_features = layer.in_features
    _replace(subject, around)
    return Expected()


def new_parameter(subject: Subject) -> Expected:
    """A new Parameter under one of the names."""
    subject.end(1).weight = nn.Parameter(cast(Tensor, subject.end(1).weight).detach() + 0.5)
    return Expected(subject.weights(), trained_alike=False)


def new_data(subject: Subject) -> Expected:
    """`p.data = …` at one of the names."""
    weight = cast(Tensor, subject.end(1).weight)
    weight.data = weight.detach().clone() + 0.5
    return _written(subject)


def written_in_place(subject: Subject) -> Expected:
    """A value written to one of the names under `no_grad`, as every `nn.init` function does."""
    with torch.no_grad():
        weight = cast(Tensor, subject.end(1).weight)
        weight.copy_(weight.detach() + 0.5)
    return _written(subject)


def initialised(subject: Subject) -> Expected:
    """`nn.init` on one of the names."""
    was = subject.weights()
    nn.init.constant_(cast(Tensor, subject.end(1).weight), 0.25)
    return _written(subject, {n: torch.full_like(was[n], 0.25) for n in _both_ends(subject)})


def _written(subject: Subject, new: dict[str, Tensor] | None = None) -> Expected:
    """All ends have the value that was written."""
    values = dense(subject.kind, 0)
    values.update(new or {name: values[name] + 0.5 for name in _both_ends(subject)})
    return Expected(values)


# ---- optimizers ----


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


def as_vector(subject: Subject) -> Expected:
    """All parameters as one vector and back, half as long."""
    for model in subject.models.values():
        vector = nn.utils.parameters_to_vector(model.parameters())
        nn.utils.vector_to_parameters(vector.detach() / 2, model.parameters())
    values = dense(subject.kind, 0)
    if subject.kind == "models":  # halved through each model
        both = _both_ends(subject)
        return Expected({name: v / (4 if name in both else 2) for name, v in values.items()})
    return Expected({name: v / 2 for name, v in values.items()})


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


def tied_twice(subject: Subject) -> None:
    if subject.ours:
        tie_(subject.handed, plan_of(subject.kind))
    else:
        share_by_hand(subject.kind, subject.models)


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


def reloaded_optimizer(subject: Subject) -> None:
    """The optimizer's state dict into a new optimizer, as when training is resumed."""
    optimizer = subject.make(subject.parameters())
    fresh = subject.make(subject.parameters())
    fresh.load_state_dict(optimizer.state_dict())
    subject.optimizers = [fresh]


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


def called_inside(subject: Subject) -> Expected:
    """The layers are called without the model they belong to; one end was replaced before."""
    replaced(subject)

    def run(model: Any, x: Tensor) -> Tensor:
        x = model.encoder(model.enter(x).tanh()).tanh()
        return model.head(model.decoder(x).tanh())

    subject.run = {key: (lambda x, model=model: run(model, x)) for key, model in subject.models.items()}
    return Expected(trained_alike=False)


MODELS_ONLY = ("models",)
BEFORE: Any = {"optimizer": "before"}

OPERATIONS: list[Operation] = [
    Operation("training", nothing, listed=False),
    Operation("training with Adam", nothing, make=adam, listed=False),
    Operation(".to(dtype)", to(torch.float32)),
    Operation(".half()", half),
    Operation(".to(dtype), then optimizer made before", to(torch.float32), **BEFORE, listed=False),
    Operation(".to(dtype), parameters overwritten", overwritten, listed=False),
    Operation(".to(dtype), parameters swapped", swapped, listed=False),
    Operation(".to(meta), to_empty, load_state_dict", through_meta),
    Operation("tied on meta, to_empty, load_state_dict", from_meta, prepare=to_meta),
    Operation("tied on meta, load_state_dict(assign=True)", from_meta_assigned, prepare=to_meta),
    Operation("to_empty, reset_parameters", emptied_and_reset, note="each layer draws its own weights"),
    Operation("deepcopy of the root", deepcopied),
    Operation("deepcopy of each model apart", deepcopied_apart, kinds=MODELS_ONLY),
    Operation("deepcopy of one of the models", one_deepcopied, kinds=MODELS_ONLY, listed=False),
    Operation("deepcopy of each model, one memo", deepcopied_with_memo, kinds=MODELS_ONLY, listed=False),
    Operation("deepcopy of the models and the optimizer", deepcopied_with_optimizer, listed=False),
    Operation("deepcopy of a deepcopy", deepcopied_twice, listed=False),
    Operation("copy.copy", shallow, listed=False),
    Operation("pickle", pickled),
    Operation("pickle of each model apart", pickled_apart, kinds=MODELS_ONLY),
    Operation("torch.save, torch.load", saved),
    Operation("torch.save, torch.load of each model apart", saved_apart, kinds=MODELS_ONLY),
    Operation("load_state_dict", loaded(), **BEFORE),
    Operation("load_state_dict(assign=True)", loaded(assign=True)),
    Operation("load_state_dict(assign=True), optimizer made before", loaded(assign=True), **BEFORE),
    Operation(
        "load_state_dict, the two names differ",
        loaded_different(),
        **BEFORE,
        must_refuse="one of the values was dropped",
    ),
    Operation(
        "load_state_dict(assign=True), the two names differ",
        loaded_different(assign=True),
        must_refuse="one of the values was dropped",
    ),
    Operation("load_state_dict(strict=False), second name missing", loaded_without(1), **BEFORE),
    Operation("load_state_dict(strict=False), first name missing", loaded_without(0), **BEFORE),
    Operation("load_state_dict(strict=False, assign=True), second name missing", loaded_without(1, assign=True)),
    Operation("load_state_dict(strict=False, assign=True), first name missing", loaded_without(0, assign=True)),
    Operation("load_state_dict of an untied network's", loaded_from_untied, **BEFORE, listed=False),
    Operation("load_state_dict into an untied network", loaded_into_untied, listed=False),
    Operation("torch.compile, eager", compiled("eager")),
    Operation("torch.compile, fullgraph", compiled_whole, listed=False),
    Operation("model.compile()", compiled_in_place, listed=False),
    Operation("torch.compile before the tie", nothing, prepare=compiled_before, listed=False),
    Operation("torch.compile, inductor", compiled("inductor"), slow=True),
    Operation("torch.compile, then assign=True", compiled_then(loaded(assign=True)), listed=False),
    Operation("torch.compile, then a module replaced", compiled_then(replaced), listed=False),
    Operation("torch.export, trained", exported),
    Operation("torch.export, after training", exported_for_inference),
    Operation("torch.jit.trace", traced, listed=False),
    Operation("functional_call, trained", functional, make=lambda p: torch.optim.SGD(p, lr=0.05)),
    Operation("functional_call, one name given", functional_one_name),
    Operation("AveragedModel", averaged(), steps=3),
    Operation("AveragedModel, moving average", averaged(decay=0.9), steps=3),
    Operation("AveragedModel with buffers", averaged(use_buffers=True), steps=3, listed=False),
    Operation("clip_grad_norm_", nothing, clip=0.1),
    Operation("weight decay", nothing, make=decayed),
    Operation("weight decay, AdamW fused", nothing, make=adamw_fused, listed=False),
    Operation("weight.requires_grad_(False) at one name", frozen_parameter),
    Operation("layer.requires_grad_(False) at one end", frozen_module),
    Operation("prune.l1_unstructured at one end", pruned),
    Operation("prune.l1_unstructured, prune.remove", pruned_for_good),
    Operation("parametrize at one end", parametrized),
    Operation("parametrize at both ends", parametrized_both, listed=False),
    Operation("weight_norm at one end", weight_normed),
    Operation("weight_norm at one end, the old one", old_weight_normed, listed=False),
    Operation("a module replaced", replaced),
    Operation("a module replaced by its deepcopy", replaced_by_copy, **BEFORE),
    Operation("a module replaced by its deepcopy, then an optimizer", replaced_by_copy, listed=False),
    Operation("a module replaced by one with equal weights", replaced_by_equal, **BEFORE),
    Operation("a module replaced, inference", replaced, steps=0, listed=False),
    Operation("deepcopy of each model apart, inference", deepcopied_apart, kinds=MODELS_ONLY, steps=0, listed=False),
    Operation("modules of the models exchanged", exchanged, kinds=MODELS_ONLY, **BEFORE, listed=False),
    Operation("a module shared by both models", module_shared, kinds=MODELS_ONLY, **BEFORE, listed=False),
    Operation("an end wrapped by nn.Sequential", wrapped, **BEFORE, listed=False),
    Operation("a new Parameter at one name", new_parameter, listed=False),
    Operation("weight.data = … at one name", new_data, **BEFORE, listed=False),
    Operation("weight.copy_(…) at one name", written_in_place, **BEFORE, listed=False),
    Operation("nn.init at one name", initialised, **BEFORE, listed=False),
    Operation("model.apply(reset_parameters)", reset, listed=False),
    Operation("two optimizers", two_optimizers, note="each given one of the models, or one half of it"),
    Operation("two optimizers, each clips before its step", two_optimizers_clipped, listed=False),
    Operation("two optimizers and a GradScaler", two_optimizers_scaled, listed=False),
    Operation("one optimizer and a GradScaler", one_optimizer_scaled, listed=False),
    Operation("two optimizers in turn", in_turn, kinds=MODELS_ONLY, listed=False, note="each after its own loss"),
    Operation("an optimizer made before the tie", nothing, prepare=made_before),
    Operation("one optimizer over list(a.parameters()) + list(b.parameters())", one_list, listed=False),
    Operation("an optimizer's state loaded into a new one", reloaded_optimizer, listed=False),
    Operation("parameters_to_vector, vector_to_parameters", as_vector, listed=False),
    Operation("gradient checkpointing", checkpointed, listed=False),
    Operation("autocast", autocast, listed=False),
    Operation("parametrize.cached()", parametrize_cached, listed=False),
    Operation("tied twice", tied_twice, listed=False),
    Operation("stack_module_state, vmap", stacked, listed=False),
    Operation("forwards in threads", in_threads, listed=False),
    Operation("deepcopy within a larger model", moved_into_another, listed=False),
    Operation("layers called without their model", called_inside, listed=False),
]
