"""The exported graph of a model: its operations as calls with named arguments, its parameters known by identity."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from tying.errors import CompactError


@dataclass(frozen=True)
class Call:
    """One operation of the graph; `arguments` by the names of the operation's schema, nodes replaced by values."""

    node: fx.Node
    name: str
    """Without namespace and overload: "conv2d"."""
    pointwise: bool
    random: bool
    arguments: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def __str__(self) -> str:
        stack: dict[str, tuple[str, Any]] = self.node.meta.get("nn_module_stack") or {}
        module = list(stack.values())[-1][0] if stack else ""
        return f"{self.name} in {module!r}" if module else f"{self.name} in the model's forward"

    @property
    def outputs(self) -> list[Any]:
        """What the operation gives on the example, as fake tensors (or numbers)."""
        value = self.node.meta.get("val")
        return list(cast(Any, value)) if isinstance(value, (tuple, list)) else [value]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first output."""
        return tuple(int(size) for size in self.outputs[0].shape)

    @property
    def origin(self) -> str:
        """The function of the user's forward that the operation comes from: `chunk` becomes a `split`."""
        return str((self.node.meta.get("torch_fn") or ("", ""))[1]).rpartition(".")[2]

    def run(self, swap: Callable[[Any], Any], /, **changed: Any) -> Any:
        """Run the operation with its arguments replaced: label tensors, masks or numbers in the place of values."""

        def swapped(item: Any) -> Any:
            if isinstance(item, list | tuple):
                return [swapped(each) for each in cast(list[Any], item)]
            return swap(item)

        arguments = {name: swapped(value) for name, value in {**self.arguments, **changed}.items()}
        if "device" in arguments:
            arguments["device"] = None
        if self.name in ("view", "_unsafe_view", "reshape"):  # strides may differ from those of the model's values
            return arguments["self"].reshape(self.shape)
        return cast(Any, self.node.target)(**arguments)


@dataclass(frozen=True)
class Source:
    """Where a placeholder comes from."""

    kind: str
    """ "parameter", "buffer", "constant" or "input"."""
    name: str
    tensor: Tensor | None


@dataclass(frozen=True)
class Graph:
    """The exported graph, and the model's tensors under all their names."""

    nodes: tuple[fx.Node, ...]
    sources: dict[str, Source]
    """By placeholder."""
    tensors: dict[str, Tensor]
    """Parameters and buffers by their first name, in the order of `state_dict`."""
    aliases: dict[str, tuple[str, ...]]
    """First name → all other names of the same tensor."""
    parameters: frozenset[str]

    def calls(self, values: dict[fx.Node, Any]) -> Iterator[Call]:
        """Go through the operations in order; the caller puts each one's value into `values`."""
        for node in self.nodes:
            if node.op == "call_function":
                yield _call(node, values)

    def outputs(self) -> tuple[fx.Node, ...]:
        """Return the nodes that leave the model."""
        return tuple(self.nodes[-1].all_input_nodes)


def export(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...]) -> Graph:
    """Export the model in evaluation mode, without touching it.

    Raises:
        CompactError: If `torch.export` can't follow the forward.
    """
    from torch.export import export as torch_export

    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    with _evaluating(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch_export(model, inputs, strict=False).run_decompositions({})
        except Exception as error:
            raise CompactError(
                f"{type(model).__name__}: expected a forward that torch.export can follow for the example inputs, got "
                f"{type(error).__name__}: {_first_line(error)}; take control flow that depends on the data out of "
                "forward, check the example inputs, or use tie_, which needs no graph"
            ) from error
    tensors, aliases, parameters = _tensors(model)
    first = {alias: name for name, others in aliases.items() for alias in (name, *others)}
    kinds = {"PARAMETER": "parameter", "BUFFER": "buffer", "USER_INPUT": "input"}
    sources: dict[str, Source] = {}
    for spec in program.graph_signature.input_specs:
        kind = kinds.get(spec.kind.name, "constant")
        name = first.get(spec.target or "", spec.target or cast(Any, spec.arg).name)
        tensor = tensors.get(name) if kind in ("parameter", "buffer") else program.constants.get(spec.target or "")
        sources[cast(Any, spec.arg).name] = Source(kind, name, tensor if isinstance(tensor, Tensor) else None)
    return Graph(tuple(program.graph.nodes), sources, tensors, aliases, parameters)


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None, None, None]:
    """Set the flags only: a `train` that the user wrote may do more."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]], frozenset[str]]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    every = {**parameters, **dict(model.named_buffers(remove_duplicate=False))}
    order = {name: rank for rank, name in enumerate(model.state_dict(keep_vars=True))}
    names: dict[int, list[str]] = {}
    for name in sorted(every, key=lambda name: order.get(name, len(order))):
        names.setdefault(id(every[name]), []).append(name)
    tensors = {first: every[first] for first, *_ in names.values()}
    aliases = {first: tuple(others) for first, *others in names.values()}
    return tensors, aliases, frozenset(first for first in tensors if first in parameters)


def _call(node: fx.Node, values: dict[fx.Node, Any]) -> Call:
    args = fx.map_arg(node.args, values.get)
    kwargs = fx.map_arg(node.kwargs, values.get)
    target = node.target
    if isinstance(target, torch._ops.OpOverload):  # pyright: ignore[reportPrivateUsage]
        schema = cast(Any, target)._schema
        arguments: dict[str, Any] = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        arguments.update(zip((a.name for a in schema.arguments), cast(Any, args), strict=False))
        arguments.update(cast(Any, kwargs))
        tags: list[Any] = list(target.tags)
        name = str(schema.name) if not str(schema.name).startswith("aten::") else str(schema.name)[len("aten::") :]
        return Call(node, name, torch.Tag.pointwise in tags, torch.Tag.nondeterministic_seeded in tags, arguments)
    name = "getitem" if target is operator.getitem else getattr(target, "__name__", str(target))
    return Call(node, name, False, False, {str(i): a for i, a in enumerate(cast(Any, args))})


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
