"""Four kinds of tie on small networks, as `tying` makes them and as people write them, beside an explicit reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tying.enforce.ties.tie import tie_
from tying.enforce.ties.unique import unique_parameters
from tying.groups import Groups
from tying.models import Models
from tying.plan import Member, Partition, Tie, TiePlan, qualified

Kind = Literal["inside", "layers", "transposed", "models"]
Column = Literal["ours", "plain", "plain, each once"]
KINDS: tuple[Kind, ...] = get_args(Kind)
COLUMNS: tuple[Column, ...] = get_args(Column)
"""Who ties, and which parameters the optimizer and the clipping get: `tie_` and `unique_parameters(models)`; sharing by
hand and `list(a.parameters()) + list(b.parameters())`; the same, each parameter object once."""

IN, WIDTH, HIDDEN, OUT, BATCH = 5, 6, 4, 3, 8


class Net(nn.Module):
    """An autoencoder between two other layers; what is tied has no bias, so that what it computes shows its weight."""

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.enter = nn.Linear(IN, WIDTH)
        self.encoder = nn.Linear(WIDTH, hidden, bias=False)
        self.decoder = nn.Linear(hidden, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, OUT)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(batch, OUT)`."""
        x = self.encoder(self.enter(x).tanh()).tanh()
        return self.head(self.decoder(x).tanh())


LAYERS = ("enter", "encoder", "decoder", "head")
ENDS: dict[Kind, tuple[str, str]] = {
    "inside": ("encoder", "encoder"),
    "layers": ("encoder", "decoder"),
    "transposed": ("encoder", "decoder"),
    "models": ("a.encoder", "b.encoder"),
}
"""The two modules whose weights are tied; inside one parameter, the same."""


def plan_of(kind: Kind) -> TiePlan:
    """The plan: six inputs of which two pairs are equal; all of two weights; two weights, one transposed."""
    if kind == "inside":
        return TiePlan([Tie.of("encoder.weight", Groups.inputs(), [0, 0, 1, 1, 2, 3])])
    first, second = (f"{path}.weight" for path in ENDS[kind])
    if kind == "transposed":
        members = Member(first, Groups.outputs()), Member(second, Groups.inputs())
        return TiePlan([Tie(members, Partition([*range(HIDDEN)] * 2))])
    return TiePlan([Tie((Member(first, Groups.whole()), Member(second, Groups.whole())), Partition([0, 0]))])


def untied(kind: Kind, seed: int = 0) -> dict[str, nn.Module]:
    """The networks of a case in float64: nothing is shared yet, but the values that are to be tied are equal."""
    torch.manual_seed(seed)
    names = ("a", "b") if kind == "models" else ("",)
    models = {name: cast(nn.Module, Net(WIDTH if kind == "layers" else HIDDEN).double()) for name in names}
    values = {name: p for key, m in models.items() for name, p in _named(key, m)}
    with torch.no_grad():
        for name, value in plan_of(kind).project(values).items():
            values[name].copy_(value)
    return models


def _named(prefix: str, model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return ((qualified(prefix, name), p) for name, p in model.named_parameters())


def data(key: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A batch for the model of that name: each pulls its end of a tie elsewhere."""
    generator = torch.Generator().manual_seed(sum(map(ord, key)))
    x, y = (torch.randn(BATCH, size, dtype=torch.float64, generator=generator) for size in (IN, OUT))
    return x.to(dtype), 3 * y.to(dtype)


OptimizerMaker = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


@dataclass
class Subject:
    """Models that are tied, and how they are trained; an operation may change anything of it."""

    kind: Kind
    column: Column
    models: dict[str, nn.Module]
    make: OptimizerMaker = sgd
    clip: float | None = None
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list[torch.optim.Optimizer])
    run: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict[str, Callable[[Tensor], Tensor]])
    """What is called in place of a model, by name: a compiled one, an exported one."""
    after_step: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    backward: Callable[[Tensor], None] = torch.Tensor.backward
    forward: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] = lambda call, x: call(x)
    """How a model is called: under autocast, under checkpointing."""
    share: slice = field(default_factory=lambda: slice(None))
    """Of each batch: what this process learns from."""
    together: Callable[[], dict[str, Tensor]] | None = None
    """Calls all models at once, in place of one by one."""
    seed: int = 0
    """Of the values that are trained."""
    at: str = "the tie"
    """What is going on: where an error came."""

    @property
    def ours(self) -> bool:
        """Whether `tie_` ties."""
        return self.column == "ours"

    @property
    def handed(self) -> Models:
        """What the verbs take: the model, or the models by name."""
        return self.models.get("", self.models)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(next(iter(self.models.values())).parameters()).dtype

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer and the clipping get, by the idiom of the column."""
        if self.ours:
            return unique_parameters(self.handed)
        listed = [p for model in self.models.values() for p in model.parameters()]
        return listed if self.column == "plain" else list({id(p): p for p in listed}.values())

    def module(self, path: str) -> nn.Module:
        """Return the module of that full name."""
        key, _, rest = path.rpartition(".")
        return self.models[key].get_submodule(rest)

    def end(self, which: int) -> nn.Module:
        """Return the module at the first or the second end."""
        return self.module(ENDS[self.kind][which])

    def holder(self, which: int) -> tuple[nn.Module, str]:
        """Return the model that has the end, and the attribute."""
        key, _, leaf = ENDS[self.kind][which].rpartition(".")
        return self.models[key], leaf

    def outputs(self) -> dict[str, Tensor]:
        """Call every model on its data."""
        if self.together is not None:
            return self.together()
        found = {}
        for key, model in self.models.items():
            x = data(key, self.dtype)[0][self.share]
            found[key] = self.forward(self.run.get(key, model), x)
        return found

    def step(self) -> None:
        """One step of training; `at` says how far it came."""
        self.at = "forward"
        if not self.optimizers:
            self.optimizers = [self.make(self.parameters())]
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = sum((out - data(key, out.dtype)[1][self.share]).square().mean() for key, out in self.outputs().items())
        self.at = "backward"
        self.backward(cast(Tensor, loss))
        self.at = "clipping"
        if self.clip:
            nn.utils.clip_grad_norm_(self.parameters(), self.clip)
        self.at = "the optimizer's step"
        for optimizer in self.optimizers:
            optimizer.step()
        for call in self.after_step:
            call()

    def weights(self) -> dict[str, Tensor]:
        """The weights that the layers compute with, by name, found by calling them: exact where there is no bias."""
        found: dict[str, Tensor] = {}
        for key, model in self.models.items():
            for layer in LAYERS:
                found.update(_computed(qualified(key, layer), model.get_submodule(layer)))
        return found

    def stored(self) -> int:
        """The number of parameter objects."""
        return len({id(p) for model in self.models.values() for p in model.parameters()})


def _computed(name: str, layer: nn.Module) -> dict[str, Tensor]:
    size, dtype = cast(int, layer.in_features), next(layer.parameters()).dtype
    with torch.no_grad():
        bias = layer(torch.zeros(1, size, dtype=dtype))[0]
        weight = (layer(torch.eye(size, dtype=dtype)) - bias).T.contiguous()
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def share_by_hand(kind: Kind, models: dict[str, nn.Module]) -> None:
    """What people write: a shared parameter, or one that shares its storage; inside a parameter PyTorch has no tie."""
    if kind == "inside":
        return
    first, second = (models[path.rpartition(".")[0]].get_submodule(path.rpartition(".")[2]) for path in ENDS[kind])
    weight = cast(nn.Parameter, first.weight)
    second.weight = nn.Parameter(weight.t()) if kind == "transposed" else weight


def tied(kind: Kind, column: Column, seed: int = 0, prepare: Callable[[Subject], None] | None = None) -> Subject:
    """The case, tied; `prepare` sees it before."""
    subject = Subject(kind, column, untied(kind, seed))
    if prepare is not None:
        prepare(subject)
    if subject.ours:
        tie_(subject.handed, plan_of(kind))
    else:
        share_by_hand(kind, subject.models)
    return subject


class Reference:
    """Training as it should be, written out: untied networks; tied gradients are summed, each value counted once."""

    def __init__(self, kind: Kind, start: dict[str, Tensor], make: OptimizerMaker = sgd) -> None:
        self.plan, self.networks = plan_of(kind), untied(kind)
        self.names = {qualified(key, name) for key, m in self.networks.items() for name, _ in m.named_parameters()}
        self.values = {name: nn.Parameter(start[name].clone()) for name in sorted(self.names)}
        self.frozen: set[str] = set()
        self.optimizer = make(list(self.values.values()))

    def gradients(self) -> dict[str, Tensor]:
        """The untied gradient of every name."""
        loss = torch.zeros((), dtype=torch.float64)
        for key, network in self.networks.items():
            own = {name: self.values[qualified(key, name)] for name, _ in network.named_parameters()}
            x, y = data(key, next(iter(own.values())).dtype)
            loss = loss + (functional_call(network.to(x.dtype), own, (x,)) - y).square().mean()
        found = torch.autograd.grad(loss, list(self.values.values()))
        return dict(zip(self.values, found, strict=True))

    def step(self, clip: float | None = None) -> None:
        """Make one step, of the sums of the tied gradients; clipped by the norm of the unique ones."""
        gradients = self.gradients()
        squares = {name: g.square().sum() for name, g in gradients.items()}
        for tie in self.plan:
            unique = tie.partition.reduce(tie.matrix(gradients))
            for member in tie.members:
                squares.pop(member.parameter)
            squares[tie.members[0].parameter] = unique.square().sum()
            gradients.update(tie.split(tie.partition.expand(unique), gradients))
        norm = torch.stack([s for name, s in squares.items() if name not in self.frozen]).sum().sqrt()
        scale = min(1.0, clip / (float(norm) + 1e-6)) if clip else 1.0
        for name, value in self.values.items():
            value.grad = None if name in self.frozen else gradients[name] * scale
        self.optimizer.step()


def apart(plan: TiePlan, weights: dict[str, Tensor]) -> float:
    """How far the ends of the ties are apart, at most: 0 only where they are equal bit for bit."""
    gaps = [0.0]
    for tie in plan:
        shapes = [member.shape(weights) for member in tie.members]
        if sum(count for count, _ in shapes) != len(tie.partition) or len({size for _, size in shapes}) > 1:
            return float("inf")  # an end has another shape now
        matrix = tie.matrix(weights)
        first = {label: i for i, label in reversed(list(enumerate(tie.partition.labels.tolist())))}
        held = matrix[[first[label] for label in tie.partition.labels.tolist()]]
        gaps.append(float((matrix - held).abs().max()))
    return max(gaps)


def off(start: dict[str, Tensor], found: dict[str, Tensor], expected: dict[str, nn.Parameter]) -> float:
    """How far the training is from the reference's: ‖difference‖ ÷ ‖the reference's update‖, the worst parameter's."""
    worst = 0.0
    for name, value in expected.items():
        if found[name].shape != value.shape:
            return float("inf")
        update = (value.detach() - start[name]).double()
        difference = (found[name].to(value.dtype) - value.detach()).double()
        worst = max(worst, float(difference.norm() / update.norm().clamp(min=1e-3)))
    return worst


def dense(kind: Kind, seed: int) -> dict[str, Tensor]:
    """The values of the untied networks of that seed, by name."""
    return {qualified(k, n): p.detach().clone() for k, m in untied(kind, seed).items() for n, p in m.named_parameters()}


def both_ends(subject: Subject) -> tuple[str, ...]:
    """The names of the weights that are tied."""
    return tuple(m.parameter for tie in plan_of(subject.kind) for m in tie.members)
