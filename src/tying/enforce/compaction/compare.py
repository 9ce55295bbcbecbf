"""Two networks on the same inputs: equal outputs, or the module to blame."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tying.enforce.compaction.probes import Case, probes
from tying.errors import CompactError
from tying.outputs import difference, random_like, same_random_numbers, tensors_in, tensors_inside

Inputs: TypeAlias = Tensor | tuple[Tensor, ...]
"""What a model takes: a tensor, or several."""
_REMEDY = (
    "a size written in a forward, as in view(-1, 256), must be taken from the input or the weights; "
    "otherwise tie the model with tie_ instead"
)


class Reference:
    """A network that others are compared with: what it gives, computed once however many are compared."""

    def __init__(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Run the network on the inputs.

        Args:
            network: Float64, in evaluation mode.
            inputs: What the network takes; floating-point ones are cast to float64.

        Raises:
            CompactError: Names the module that fails.
        """
        self.network = network
        self.inputs = as_double(inputs)
        self._expected = run(network, self.inputs)

    @cached_property
    def cases(self) -> tuple[Case, ...]:
        """Inputs and outputs: the given ones, then random ones of other batch sizes and other sizes (`probes`)."""
        try:
            others = list(probes(lambda other: _outputs(self.network, other), self.inputs))
        except Exception:
            run(self.network, tuple(random_like(self.inputs)))  # names the module
            raise
        return (self.inputs, self._expected), *others

    @cached_property
    def small_cases(self) -> tuple[Case, ...]:
        """The given inputs a thousandth and a millionth as large: there the eps of a norm counts."""
        scaled = [tuple(x * scale if x.is_floating_point() else x for x in self.inputs) for scale in (1e-3, 1e-6)]
        return tuple((inputs, run(self.network, inputs)) for inputs in scaled)


def check_equal(reference: Reference, small: nn.Module, tolerance: float, *, norms: bool = False) -> None:
    """Raise unless a network computes the same as the reference, on all of its cases.

    `tying.outputs.difference` says relative to what; NaN and infinite outputs must stand at the same places.

    Args:
        reference: What it is compared with.
        small: Float64, in evaluation mode.
        tolerance: Largest relative difference.
        norms: Compare on small inputs as well, as the eps of a norm changed.

    Raises:
        CompactError: Names the first module that fails or differs.
    """
    for inputs, expected in (*reference.cases, *(reference.small_cases if norms else ())):
        _check_same(reference, small, inputs, expected, tolerance)


def as_double(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the inputs, floating-point ones in float64."""
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the model's outputs, whatever holds them, as a flat list.

    Raises:
        CompactError: Names the module that fails.
    """
    entered: list[str] = []

    def leave(_: str, __: object) -> None:
        entered.pop()

    with _hooks(model, entered.append, leave):
        try:
            return _outputs(model, inputs)
        except Exception as error:
            name = entered[-1] if entered else ""
            raise CompactError(f"{name or 'model'}: expected a forward that runs, got {error}") from error


def _check_same(
    reference: Reference, small: nn.Module, inputs: tuple[Tensor, ...], expected: list[Tensor], tolerance: float
) -> None:
    resized = any(one.shape[1:] != other.shape[1:] for one, other in zip(inputs, reference.inputs, strict=True))
    once = f"once compacted{', on inputs of ' if resized else ''}"
    once += ", ".join(str(tuple(x.shape)) for x in inputs) if resized else ""
    try:
        got = run(small, inputs)
    except CompactError as error:
        raise CompactError(f"{error}, {once}; {_REMEDY}") from error
    worst = difference(expected, got)
    if not worst <= tolerance:
        found = "other shapes" if worst == float("inf") else f"{worst:.3g}"
        blamed = _first_to_differ(reference.network, small, inputs, tolerance)
        raise CompactError(
            f"{blamed or 'model'}: expected the outputs of the projected model to a relative difference of "
            f"{tolerance:g}, got {found}, {once}; {_REMEDY}"
        )


def _first_to_differ(reference: nn.Module, small: nn.Module, inputs: tuple[Tensor, ...], tolerance: float) -> str:
    """The first module whose output has the same shape in both networks and other values; "" if there is none."""
    trace: list[list[tuple[str, list[Tensor]]]] = [[], []]
    for model, steps in zip((reference, small), trace, strict=True):

        def note(name: str, output: object, steps: list[tuple[str, list[Tensor]]] = steps) -> None:
            steps.append((name, tensors_inside(output)))

        with _hooks(model, lambda _: None, note):
            _outputs(model, inputs)
    for (name, expected), (other, got) in zip(*trace, strict=False):
        alike = name == other and [x.shape for x in expected] == [x.shape for x in got]
        if alike and not difference(expected, got) <= tolerance:
            return name
    return ""


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    # A forward may draw random numbers: the same ones for both networks, and the user's generator stays as it is.
    with torch.no_grad(), same_random_numbers(model):
        return [output.detach().clone() for output in tensors_in(model(*(x.clone() for x in inputs)))]


@contextmanager
def _hooks(
    model: nn.Module, before: Callable[[str], None], after: Callable[[str, object], None]
) -> Generator[None, None, None]:
    """Call `before(name)` and `after(name, output)` around every module's forward."""
    handles: list[RemovableHandle] = []
    for name, module in model.named_modules():

        def enter(_: nn.Module, __: object, name: str = name) -> None:
            before(name)

        def leave(_: nn.Module, __: object, output: object, name: str = name) -> None:
            after(name, output)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
