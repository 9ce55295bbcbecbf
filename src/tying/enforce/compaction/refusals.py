"""What `compact` does not take: other arguments, and models and plans that it can't follow; refused by name."""

from __future__ import annotations

import inspect
import math
from numbers import Real

from torch import Tensor, nn

from tying.channels.memory import overlapping
from tying.enforce.compaction.compare import Inputs, run
from tying.enforce.compaction.convolutions import Convolutions, convolutions_in
from tying.enforce.compaction.surgery import refuse_parametrized
from tying.enforce.ties.guard import bonds_of
from tying.errors import CompactError, PlanError
from tying.plan import Tie, TiePlan
from tying.usable import check_usable


def check_model(model: nn.Module) -> None:
    """Raise unless the model is usable (`tying.usable`), and has real numbers as parameters.

    Raises:
        CompactError: Names the module or the tensor.
    """
    check_usable(model, CompactError)
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            raise CompactError(
                f"{name}: expected real numbers, got {parameter.dtype}: networks are compared in float64; enforce the "
                "plan with tie_ instead"
            )


def check_plan(plan: TiePlan) -> None:
    """Raise `PlanError` if the plan is something else."""
    if not isinstance(plan, TiePlan):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError(
            f"plan: expected a TiePlan, got {type(plan).__name__}; build one of ties: TiePlan([Tie.of(...)])"
        )


def check_compactable(model: nn.Module, plan: TiePlan) -> Convolutions:
    """Raise unless `compact` knows what to do with the plan and the model; return what becomes a convolution.

    Raises:
        CompactError: Names the tie or the parameter, and points to `tie_`.
        PlanError: If the plan does not fit the model.
    """
    for name, module in model.named_modules():
        refuse_parametrized(name or "model", module)
    parameters = dict(model.named_parameters())
    plan.check_fits(parameters)
    found = convolutions_in(model, plan)
    for tie in found.others:
        if reason := _not_compactable(model, tie):
            raise CompactError(f"{tie}: expected {reason}; enforce it with tie_ instead")
    for name, parameter in parameters.items():
        if not bool(parameter.isfinite().all()):
            raise CompactError(f"{name}: expected finite weights, got NaN or infinite ones; train the model again")
    _check_memory(parameters)
    return found


def check_by_itself(model: nn.Module) -> None:
    """Raise `CompactError` if the model is tied with another: a copy would not be."""
    for bonds in bonds_of(model):
        for bond in bonds.bonds:
            ends = {place.prefix: place.name for place in bonds.present(bond)}
            if len(ends) > 1:
                raise CompactError(
                    f"{' ~ '.join(ends.values())}: expected a model by itself, got one that is tied with another; "
                    "compact a copy that you have untied: copy.deepcopy, then untie_"
                )


def _not_compactable(model: nn.Module, tie: Tie) -> str | None:
    """What a tie should have been, and what it is; None if it compacts."""
    member, *others = tie.members
    if others:
        return f"one member, got {len(tie.members)}"
    path, _, leaf = member.parameter.rpartition(".")
    module = model.get_submodule(path)
    if member.groups.kind == "outputs":
        shared = tie.partition.classes + tie.partition.pruned < len(tie.partition)
        return "outputs that are pruned or alone, got some that are tied with each other" if shared else None
    if member.groups.kind != "inputs":
        return f"groups of inputs or outputs, got {member.groups}"
    if leaf != "weight" or not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return f"inputs of the weight of a linear or convolution layer, got {leaf!r} of {type(module).__name__}"
    return None


def _check_memory(parameters: dict[str, nn.Parameter]) -> None:
    """Refuse parameters that share memory without being the same object: a copy would untie them in silence.

    Raises:
        CompactError: Names both.
    """
    for one, other in overlapping(parameters).items():
        raise CompactError(
            f"{one}: expected parameters with memory of their own, got one that shares it with {other} (a view of "
            "it?); share the parameter itself (a.weight = b.weight), or give each its own"
        )


def checked_tolerance(tolerance: float) -> float:
    """Return the tolerance, or raise `CompactError`."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, Real) or not 0 <= tolerance < math.inf:
        raise CompactError(f"tolerance: expected a finite number ≥ 0, got {tolerance!r}; 1e-9 leaves room for rounding")
    return tolerance


def checked_inputs(example_inputs: Inputs) -> tuple[Tensor, ...]:
    """Return the inputs as a tuple, or raise `CompactError`."""
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):  # pyright: ignore[reportUnnecessaryIsInstance]
        kinds = ", ".join(type(x).__name__ for x in inputs)
        raise CompactError(
            f"example_inputs: expected a tensor or a tuple of tensors, got ({kinds}); pass what the model takes"
        )
    if not all(x.numel() for x in inputs):
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise CompactError(f"example_inputs: expected at least one sample, got shapes {shapes}; pass a batch of two")
    return inputs


def why_not_run(model: nn.Module, inputs: tuple[Tensor, ...], error: CompactError) -> CompactError:
    """Return what to say of a run in float64 that failed: the model as it is on the inputs as they are tells more.

    Args:
        model: A copy, in its own dtype; set to evaluation mode.
        inputs: As the caller gave them.
        error: That of the run in float64.
    """
    finished: list[nn.Module] = []

    def note(module: nn.Module, _: object, __: object) -> None:
        finished.append(module)

    handle = model.eval().register_forward_hook(note)
    try:
        run(model, inputs)
    except CompactError as as_it_is:
        return as_it_is if finished else CompactError(f"{as_it_is}; {_how_to_pass(model)}")
    finally:
        handle.remove()
    return CompactError(
        f"{error}, in float64, though it runs as it is; networks are compared in float64: let forward keep to the "
        "dtype of its inputs (no x.float()), and hold layers in nn.ModuleList, not in a list"
    )


def _how_to_pass(model: nn.Module) -> str:
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if named:
        return f"compact takes inputs by position: wrap the model in a module whose forward passes {', '.join(named)}"
    return "pass example_inputs as the model takes them"
