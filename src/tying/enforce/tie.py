"""One stored copy of tied weights: a parametrization whose only parameter is the unique set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tying.errors import PlanError
from tying.groups import Groups
from tying.plan import Partition, Tie, TiePlan, qualified

Gradient = Literal["sum", "mean"]


def tie_(model: nn.Module, plan: TiePlan, *, gradient: Gradient = "sum") -> None:
    """Make the plan hold in `model`, hard: each tied weight is stored once, and every training step keeps it so.

    `model.fc.weight` becomes `expand(U)`, computed at every read; the parameter is `U`, found at
    `model.fc.parametrizations.weight.original`, of shape `(K, D)` and the weight's dtype: it starts as the mean of each
    label's groups. With both inputs and outputs of one weight tied, `U` is `(K of outputs, K of inputs · kernel)`.
    Make the optimizer afterwards: one made before holds state of the old shape. The inverse is `untie_`.

    This keeps the dense cost of every forward; `compact` is what makes the network smaller and faster.

    Args:
        model: Written to; each weight named in the plan belongs to one module.
        plan: Ties inside single parameters, over any `Groups`; one tie per parameter, or one over its inputs and one
            over its outputs.
        gradient: Of a value stored once, from the gradients of the weights it stands for: their "sum", which is the
            gradient of the loss, or their "mean", which moves each weight as far as an untied step would on average.

    Raises:
        PlanError: If the plan does not fit the model, a weight is shared or parametrized already, or several
            parameters are tied with each other. The model stays as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> plan = TiePlan([Tie.of("0.weight", Groups.inputs(), [0, 0, 1, -1])])
        >>> tie_(model, plan)
        >>> model[0].weight[:, 3]
        tensor([0., 0., 0.], grad_fn=<SelectBackward0>)
        >>> [tuple(p.shape) for p in unique_parameters(model)]
        [(3,), (2, 3)]
        >>> untie_(model)
        >>> type(model[0].weight).__name__
        'Parameter'
    """
    if gradient not in get_args(Gradient):
        raise PlanError(f"gradient: expected 'sum' or 'mean', got {gradient!r}; pass one of the two")
    built: list[tuple[nn.Module, str, _Tied]] = []
    for name, ties in _by_parameter(model, plan).items():
        module, leaf = _owner(model, name)
        built.append((module, leaf, _Tied(ties, getattr(module, leaf), gradient)))
    before = [getattr(module, leaf).detach().clone() for module, leaf, _ in built]
    done: list[tuple[nn.Module, str]] = []
    try:
        for module, leaf, parametrization in built:
            parametrize.register_parametrization(module, leaf, parametrization)
            done.append((module, leaf))
    except BaseException:
        for (module, leaf), value in zip(done, before, strict=False):
            parametrize.remove_parametrizations(module, leaf, leave_parametrized=True)
            with torch.no_grad():
                getattr(module, leaf).copy_(value)
        raise


def untie_(model: nn.Module) -> None:
    """Give every weight that `tie_` tied back as a plain parameter, with the tied values.

    Make the optimizer anew afterwards. Parametrizations that are not `tie_`'s are left alone.

    Args:
        model: Written to; a model without ties stays as it is.

    Raises:
        PlanError: If a weight got another parametrization on top of its tie. The model stays as it was.
    """
    tied = list(_tied(model))
    for path, module, leaf, _ in tied:
        if len(cast(Any, module).parametrizations[leaf]) > 1:
            raise PlanError(
                f"{qualified(path, leaf)}: expected the tie to be its only parametrization, got others on top of it; "
                "remove them first (torch.nn.utils.parametrize.remove_parametrizations takes all, the tie with them)"
            )
    for _, module, leaf, _ in tied:
        # A deep copy shares the class that holds the weight's property: deleting it there would break the original.
        shared: Any = type(module)
        module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
        parametrize.remove_parametrizations(module, leaf, leave_parametrized=True)


def plan_of(model: nn.Module) -> TiePlan:
    """Return the plan that `tie_` put in force on `model`; empty if there is none."""
    ties = [
        Tie.of(qualified(path, leaf), stage.groups, stage.labels.cpu().numpy())
        for path, _, leaf, tied in _tied(model)
        for stage in tied.each_stage()
    ]
    return TiePlan(ties, {"made by": "tie_"})


def gradients_of(model: nn.Module) -> dict[str, Gradient]:
    """Return how `tie_` combines the gradients of each weight it tied, by name: what `plan_of` does not say."""
    return {qualified(path, leaf): tied.each_stage()[0].gradient for path, _, leaf, tied in _tied(model)}


def unique_parameters(models: nn.Module | Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """Return the unique set: every parameter once, whatever the number of names, layers or models that share it.

    Hand it to the optimizer: two models' `parameters()` in a row would step a shared one twice.

    Args:
        models: A model, or several by name.

    Example:
        >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> b.weight = a.weight
        >>> len(unique_parameters({"a": a, "b": b}))
        3
    """
    each = [models] if isinstance(models, nn.Module) else list(models.values())
    return list({id(p): p for model in each for p in model.parameters()}.values())


class _Stage(nn.Module):
    """One partition of one reading of a tensor: `(K, D)` values to the tensor whose groups they are, and back."""

    labels: Tensor

    def __init__(self, tie: Tie, shape: tuple[int, ...], gradient: Gradient, device: torch.device) -> None:
        super().__init__()
        self.groups: Groups = tie.members[0].groups
        self.classes = tie.partition.classes
        self.shape = shape
        self.gradient: Gradient = gradient
        self.register_buffer("labels", torch.as_tensor(tie.partition.labels.copy(), device=device))

    @property
    def partition(self) -> Partition:
        return Partition(self.labels.cpu().numpy())

    def expand(self, values: Tensor) -> Tensor:
        index = self.labels.remainder(self.classes + 1)  # pruned groups read the zeros, which come last
        if self.gradient == "mean":
            ones = torch.ones(len(index), dtype=torch.float64, device=index.device)
            sizes = ones.new_zeros(self.classes + 1).index_add(0, index, ones)[:-1]
            values = cast(Tensor, _ScaledGradient.apply(values, (1 / sizes)[:, None].to(values.dtype)))
        padded = torch.cat([values, values.new_zeros(1, values.shape[1])])
        return self.groups.write(padded.index_select(0, index), self.shape)

    def mean(self, tensor: Tensor) -> Tensor:
        return self.partition.mean(self.groups.read(tensor))

    def extra_repr(self) -> str:
        return f"{self.groups}, {len(self.labels)} groups → {self.classes} values"


class _Tied(nn.Module):
    """The parametrization: the stages, inputs before outputs, undone in turn."""

    def __init__(self, ties: Sequence[Tie], weight: Tensor, gradient: Gradient) -> None:
        super().__init__()
        shape = tuple(weight.shape)
        stages: list[_Stage] = []
        for tie in ties:
            stages.append(_Stage(tie, shape, gradient, weight.device))
            # Only an inputs tie is followed by another: its unique set, read as a smaller weight.
            shape = (shape[0], tie.partition.classes, *shape[2:])
        self.stages = nn.ModuleList(stages)

    def each_stage(self) -> list[_Stage]:
        return [cast(_Stage, stage) for stage in self.stages]

    def forward(self, values: Tensor) -> Tensor:
        first, *rest = self.each_stage()
        for stage in reversed(rest):
            values = Groups.inputs().read(stage.expand(values))
        return first.expand(values)

    def right_inverse(self, weight: Tensor) -> Tensor:
        first, *rest = self.each_stage()
        values = first.mean(weight.double())
        for stage in rest:
            values = stage.mean(Groups.inputs().write(values, stage.shape))
        return values.to(weight.dtype)


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(scale)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (scale,) = ctx.saved_tensors
        return gradient * scale, None


def _tied(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, _Tied]]:
    """The weights that `tie_` tied: the module's path, the module, the attribute, the parametrization."""
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for leaf, chain in cast("nn.ModuleDict", module.parametrizations).items():
                if isinstance(chain[0], _Tied):  # pyright: ignore[reportIndexIssue]
                    yield path, module, leaf, chain[0]  # pyright: ignore[reportIndexIssue]


def _by_parameter(model: nn.Module, plan: TiePlan) -> dict[str, list[Tie]]:
    """The ties of each parameter, inputs first.

    Raises:
        PlanError: If a tie has several members, the plan does not fit, or the ties of a parameter overlap.
    """
    result: dict[str, list[Tie]] = {}
    for tie in plan:
        if len(tie.members) != 1:
            raise PlanError(
                f"{tie}: expected a tie inside one parameter, got {len(tie.members)} members; make one tie for each, "
                "or let the modules share the parameter (a.weight = b.weight)"
            )
        result.setdefault(tie.members[0].parameter, []).append(tie)
    for name, ties in result.items():
        _check_not_parametrized(model, name)
        kinds = [tie.members[0].groups.kind for tie in ties]
        if len(ties) > 1 and sorted(kinds) != ["inputs", "outputs"]:
            raise PlanError(
                f"{name}: expected one tie, or one over inputs and one over outputs, got {kinds}; merge the labels"
            )
        ties.sort(key=lambda tie: tie.members[0].groups.kind)
    plan.check_fits(dict(model.named_parameters()))
    return result


def _check_not_parametrized(model: nn.Module, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    module = dict(model.named_modules()).get(path)
    if module is not None and parametrize.is_parametrized(module, leaf):
        raise PlanError(
            f"{name}: expected a plain parameter, got one with a parametrization; call untie_ first, or "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The one module that reads the parameter at every forward, and the attribute it reads.

    Raises:
        PlanError: If several modules hold it, or the module keeps references of its own to it.
    """
    parameter = dict(model.named_parameters())[name]
    holders = [
        (module, leaf, qualified(path, leaf))
        for path, module in model.named_modules()
        for leaf, held in module.named_parameters(recurse=False, remove_duplicate=False)
        if held is parameter
    ]
    module, leaf, _ = holders[0]
    if len(holders) > 1:
        raise PlanError(
            f"{name}: expected a parameter of one module, got one shared as {', '.join(n for _, _, n in holders)}; "
            "give each module its own before tying inside it"
        )
    if isinstance(module, nn.RNNBase):
        raise PlanError(
            f"{name}: expected a layer that reads its weight at every call, got {type(module).__name__}, which keeps a "
            "list of its weights; leave it out of the plan"
        )
    return module, leaf
