"""Two networks on the same inputs: equal outputs, or the module to blame."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tying.errors import CompactError
from tying.outputs import difference, random_like, same_random_numbers, tensors_in, tensors_inside

_REMEDY = (
    "a size written in a forward, as in view(-1, 256), must be taken from the input or the weights; "
    "otherwise tie the model with tie_ instead"
)


def check_equal(reference: nn.Module, small: nn.Module, inputs: tuple[Tensor, ...], tolerance: float) -> None:
    """Raise unless both networks compute the same on the inputs and on random ones of another batch size.

    `tying.outputs.difference` says relative to what; NaN and infinite outputs must stand at the same places.

    Args:
        reference: Float64, in evaluation mode.
        small: Likewise.
        inputs: What the model takes; floating-point ones are cast to float64.
        tolerance: Largest relative difference.

    Raises:
        CompactError: Names the first module that fails or differs.
    """
    given = as_double(inputs)
    expected = run(reference, given)
    _check_same(reference, small, given, expected, tolerance)
    other = tuple(random_like(given, len(given[0]) + 1 if given[0].dim() else 0))
    try:
        expected = _outputs(reference, other)
    except Exception:
        other = tuple(random_like(given))  # the model takes one batch size only
        expected = run(reference, other)
    _check_same(reference, small, other, expected, tolerance)


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
    reference: nn.Module, small: nn.Module, inputs: tuple[Tensor, ...], expected: list[Tensor], tolerance: float
) -> None:
    try:
        got = run(small, inputs)
    except CompactError as error:
        raise CompactError(f"{error}, once compacted; {_REMEDY}") from error
    worst = difference(expected, got)
    if not worst <= tolerance:
        found = "other shapes" if worst == float("inf") else f"{worst:.3g}"
        blamed = _first_to_differ(reference, small, inputs, tolerance)
        raise CompactError(
            f"{blamed or 'model'}: expected the outputs of the projected model to a relative difference of "
            f"{tolerance:g}, got {found}, once compacted; {_REMEDY}"
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
        return [output.detach().clone() for output in tensors_in(model(*inputs))]


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
