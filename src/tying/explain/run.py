"""Explain a network: what its sharing saves, who sees whom, and how far it moves along with its input."""

from __future__ import annotations

from numbers import Integral
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tying.errors import TyingError
from tying.evaluation import evaluating
from tying.explain.calls import check_finite, observe
from tying.explain.equivariance import Equivariance, measure_equivariance
from tying.explain.fields import Fields, find_fields, input_places, source_shape
from tying.explain.layers import find_layers
from tying.explain.marks.dependence import find_dependence
from tying.explain.result import Explanation
from tying.explain.sample import first_sample, taking
from tying.usable import check_usable, copy_of


def explain(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...], *, shifts: int = 4) -> Explanation:
    """Say what the sharing inside a network saves, who sees whom in it, and how far it is equivariant to translation.

    *What sharing saves.* Each layer that uses its values several times (at every position of an image or a sequence,
    in several calls, under several names, for several inputs) stands beside the same connections not shared, a locally
    connected layer, and beside the dense layer of the same map: values stored, multiply-adds, operations, bytes, in
    closed form and for one sample. Source: Goodfellow, Bengio, Courville, *Deep Learning*, 9.2.

    *Who sees whom*, for the whole network and exactly: from above, which inputs the place in the middle of a layer
    depends on, the receptive field of its units; from below, which of its places the input in the middle reaches. Found
    in the exported graph: what is connected counts, whatever the values; weights that are zero connect nothing.

    *Equivariance*, measured: noise (as bright as the example) is shifted by 1 … `shifts` places, and each spatial
    layer's output is compared with its shifted output, in the interior and where units see padding.

    Args:
        model: The network; a copy of it is used, in evaluation mode and without hooks of your own.
        example_inputs: As `model(*example_inputs)` takes them, the batch first; a copy of the first sample is used.
            Other inputs that are no batch, a mask for all samples, say, stay whole.
        shifts: The farthest shift; 0 measures none.

    Returns:
        The figures: `print` them, `.to_json()` them, `.draw(path)` the picture.

    Raises:
        TyingError: If the model does not take the inputs, is not initialised or can't be copied, the first sample
            can't be taken out of the batch, or something is not finite. A forward that `torch.export` can't follow is
            no error: the layers' costs are there, and `untraced` says why the rest is not.

    Example:
        The edge kernel of two pixels on an image of 320 × 280:

        >>> edge = nn.Conv2d(1, 1, (1, 2), bias=False)
        >>> (layer,) = explain(edge, torch.rand(1, 1, 280, 320), shifts=0).layers
        >>> layer.shared.values, layer.local.values, layer.dense.values
        (2, 178640, 8003072000)
        >>> layer.shared.operations, layer.dense.operations
        (267960, 16006054680)
    """
    inputs = _checked(model, example_inputs, shifts)
    with torch.inference_mode(False):  # which keeps no gradients, and they say who sees whom
        return _explained(_copied(model), inputs, shifts)


def _explained(model: nn.Module, batch: tuple[Tensor, ...], shifts: int) -> Explanation:
    devices = _gpus(model, batch)
    eager = torch.compiler.set_stance("force_eager")  # Dynamo would trace the hooks that watch
    with evaluating(model), torch.random.fork_rng(devices=devices), eager:
        inputs = first_sample(model, batch)
        layers, uncounted = find_layers(model, taking(inputs, lambda: observe(model, inputs)))
        fields: Fields | None = None
        equivariance: tuple[Equivariance, ...] = ()
        untraced, image = None, None
        try:
            dependence = find_dependence(model, inputs)
        except TyingError as error:
            untraced = str(error)
        else:
            if dependence.steps:
                fields = find_fields(model, dependence)
                image = _image(inputs[0], len(input_places(model, dependence)), source_shape(dependence))
            if shifts and dependence.steps and inputs[0].is_floating_point():
                noise = (_noise_like(inputs[0]), *inputs[1:])
                equivariance = measure_equivariance(model, dependence, noise, shifts)
    return Explanation(
        model=type(model).__name__,
        inputs=tuple(inputs[0].shape[1:]),
        layers=layers,
        fields=fields,
        equivariance=equivariance,
        uncounted=uncounted,
        untraced=untraced,
        image=image,
    )


def _checked(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...], shifts: int) -> tuple[Tensor, ...]:
    check_usable(model, TyingError)
    inputs = _checked_inputs(example_inputs)
    if isinstance(shifts, bool) or not isinstance(shifts, Integral) or shifts < 0:  # pyright: ignore
        raise TyingError(f"shifts: expected an integer ≥ 0, got {shifts!r}; 0 measures no shift")
    return inputs


def _checked_inputs(given: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    inputs = given if isinstance(given, tuple) else (given,)
    wrong = next((i for i, x in enumerate(inputs) if not isinstance(x, Tensor)), None)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not inputs or (wrong is not None and not isinstance(given, tuple)):
        raise TyingError(
            "example_inputs: expected a tensor or a tuple of tensors, the batch first, got "
            f"{type(given).__name__ if inputs else 'an empty tuple'}; pass a batch as the model takes it"
        )
    if wrong is not None:
        raise TyingError(
            f"example_inputs[{wrong}]: expected a tensor, got {inputs[wrong]!r:.60}; leave out what has a default, or "
            "wrap the model in one that gives it"
        )
    if not inputs[0].ndim or not len(inputs[0]):
        got = "an empty batch" if inputs[0].ndim else "a number without dimensions"
        raise TyingError(f"example_inputs: expected at least one sample, the batch first, got {got}; pass a batch")
    for x in inputs:
        if x.is_meta:
            raise TyingError("example_inputs: expected values, got none on the meta device; pass a tensor with values")
        if x.layout is not torch.strided:
            raise TyingError(f"example_inputs: expected dense tensors, got one of {x.layout}; pass its to_dense()")
        if not x.numel():
            raise TyingError(
                f"example_inputs: expected tensors with elements, got one of shape {tuple(x.shape)}; pass a sample "
                "with something in it"
            )
        check_finite("example_inputs", x, "in them; pass others")
    return inputs


def _copied(model: nn.Module) -> nn.Module:
    """A copy to run, in Python and without the hooks of others."""
    copied = _uncompiled(copy_of(model, TyingError))
    for module in copied.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            hooks: dict[int, Any] = getattr(module, name)
            for handle in [key for key, hook in hooks.items() if not _computes(hook)]:
                del hooks[handle]
    return copied


def _uncompiled(model: nn.Module) -> nn.Module:
    """The model with what `torch.compile` wrapped in the place of its wrappers, so that names are as in the network."""
    inner = _unwrapped(model)
    for module in inner.modules():  # which goes on with what has been put in place
        parts = _parts(module)
        parts.update({name: _unwrapped(part) for name, part in parts.items() if part is not None})
    return inner


def _unwrapped(module: nn.Module) -> nn.Module:
    inner = _parts(module).get("_orig_mod")
    return module if inner is None else _unwrapped(inner)


def _parts(module: nn.Module) -> dict[str, nn.Module | None]:
    return module._modules  # pyright: ignore[reportPrivateUsage]


def _computes(hook: object) -> bool:
    """Whether a hook is part of the network: a guard of ties, or what computes a weight in torch."""
    return any(kind.__module__.startswith(("tying.", "torch.nn.utils.")) for kind in type(hook).__mro__)


def _gpus(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[int]:
    """The CUDA devices whose random numbers a forward may draw."""
    tensors = [*model.parameters(), *model.buffers(), *inputs]
    return sorted({x.device.index or 0 for x in tensors if x.device.type == "cuda"})


def _noise_like(x: Tensor) -> Tensor:
    """Noise with the mean and the spread of the example: nothing in it is equal by chance, as black borders are."""
    generator = torch.Generator().manual_seed(0)
    spread = float(x.double().std()) if x.numel() > 1 else 0.0
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return (float(x.double().mean()) + (spread or 1.0) * noise).to(x.device, x.dtype)


def _image(x: Tensor, dimensions: int, shape: tuple[int, ...]) -> NDArray[np.float64] | None:
    """The example as a grey picture, its channels averaged; None where it is none."""
    if dimensions != 2 or len(shape) < 3 or not x.is_floating_point():
        return None
    grey = x.detach().cpu().double().reshape(-1, *shape[-2:]).mean(0)
    return cast("NDArray[np.float64]", grey.numpy())
