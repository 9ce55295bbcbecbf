"""The exported graph of a model: its operations as calls with named arguments, its parameters known by identity."""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from tying.channels.silent import silent
from tying.errors import CompactError
from tying.evaluation import evaluating


@dataclass(frozen=True)
class Call:
    """One operation of the graph; `arguments` by the names of the operation's schema, nodes replaced by values."""

    node: fx.Node
    name: str
    """Without namespace and overload, and without the underscore of what works in place: "conv2d", "relu"."""
    pointwise: bool
    random: bool
    in_place: bool
    arguments: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules in whose forward it stands, from the inside out; "" is the model."""
        return modules_of(self.node)

    def __str__(self) -> str:
        module = self.modules[0]
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
    def is_chunk(self) -> bool:
        """Whether it cuts in equal parts, however long the axis: decomposed, `chunk` is a `split`."""
        origin = str((self.node.meta.get("torch_fn") or ("", ""))[1]).rpartition(".")[2]
        return "chunk" in (self.name, origin) and self.name != "slice"

    def run(self, swap: Callable[[Any], Any], /, **changed: Any) -> Any:
        """Run the operation with its arguments replaced: label tensors, masks or numbers in the place of values."""

        def swapped(item: Any) -> Any:
            if isinstance(item, list | tuple):
                return [swapped(each) for each in cast(list[Any], item)]
            return swap(item)

        arguments = {name: swapped(value) for name, value in {**self.arguments, **changed}.items()}
        if "device" in arguments:
            arguments["device"] = None
        if self.in_place:
            arguments["self"] = arguments["self"].clone()
        if self.name in ("view", "reshape"):  # strides may differ from those of the model's values
            return arguments["self"].reshape(self.shape)
        if self.name == "expand":
            return arguments["self"].expand(self.shape)
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
    unread: frozenset[str]
    """Tensors that feed a computation whose result is dropped, and which the graph does not show."""
    fixed: tuple[tuple[str, int, str], ...] = ()
    """Axes of tensors, by first name, whose length a forward checks without a trace in the graph, and how."""
    known: dict[str, Any] = field(default_factory=dict[str, Any], repr=False, compare=False)
    """What was found out about it, kept for who asks next."""

    def calls(self, values: dict[fx.Node, Any]) -> Iterator[Call]:
        """Go through the operations in order; the caller puts each one's value into `values`."""
        for node in self.nodes:
            if node.op == "call_function":
                yield _call(node, values)

    def outputs(self) -> tuple[fx.Node, ...]:
        """Return the nodes that leave the model."""
        return tuple(self.nodes[-1].all_input_nodes)

    def unused(self) -> list[str]:
        """Return the parameters that nothing in the graph reads: those of another mode or method, say."""
        named = [(self.sources[node.name], bool(node.users)) for node in self.nodes if node.op == "placeholder"]
        used = {source.name for source, is_used in named if is_used} - self.unread
        return [source.name for source, _ in named if source.kind == "parameter" and source.name not in used]


def modules_of(node: fx.Node) -> tuple[str, ...]:
    """Return the modules in whose forward a node stands, from the inside out; "" is the model."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    paths = (re.sub(r"@\d+", "", path) for path, _ in reversed(stack.values()))  # "@1": called again
    return tuple(dict.fromkeys([*paths, ""]))


def export(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...]) -> Graph:
    """Export the model in evaluation mode, without touching it.

    Raises:
        CompactError: If it is no model, or `torch.export` can't follow its forward, or a size in it depends on the
            numbers that come in, or an operation leaves outputs out, as gradients do; names the operation and its
            module.
    """
    from torch.export import export as torch_export

    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CompactError(f"model: expected a torch.nn.Module, got {type(model).__name__}; pass the network")
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    with evaluating(model), torch.enable_grad(), warnings.catch_warnings():  # without gradients, attention is fused
        warnings.simplefilter("ignore")
        try:
            with silent():
                whole = torch_export(model, inputs, strict=False)
            program = whole if _is_functional(whole.graph) else whole.run_decompositions({})
        except Exception as error:
            raise CompactError(
                f"{type(model).__name__}: expected a forward that torch.export can follow for the example inputs, got "
                f"{type(error).__name__}: {_first_line(error)}; take control flow that depends on the data out of "
                "forward, check the example inputs, or use tie_, which needs no graph"
            ) from error
    _refuse_missing_outputs(program.graph)
    _refuse_symbolic_sizes(program.graph)
    tensors, aliases = _tensors(model)
    first = {alias: name for name, others in aliases.items() for alias in (name, *others)}
    kinds = {"PARAMETER": "parameter", "BUFFER": "buffer", "USER_INPUT": "input"}
    sources: dict[str, Source] = {}
    for spec in program.graph_signature.input_specs:
        kind, target = kinds.get(spec.kind.name, "constant"), spec.target or ""
        placeholder = str(cast(Any, spec.arg).name)
        name = first.get(target, target or placeholder)
        tensor = tensors.get(name) if kind in ("parameter", "buffer") else program.constants.get(target)
        sources[placeholder] = Source(kind, name, tensor if isinstance(tensor, Tensor) else None)
    dropped = () if program is whole else _feeding_nothing(whole.graph)
    unread = frozenset(sources[name].name for name in dropped) & frozenset(tensors)
    fixed = tuple((first[name], axis, reason) for name, axis, reason in _checked(model) if name in first)
    return Graph(tuple(program.graph.nodes), sources, tensors, aliases, unread, fixed)


def _refuse_missing_outputs(graph: fx.Graph) -> None:
    """Raise where an operation gives None beside tensors: a gradient taken in forward, of some of its operands."""
    for node in graph.nodes:
        if node.op == "call_function":
            call = _call(node, {})
            if len(call.outputs) > 1 and any(made is None for made in call.outputs):
                raise CompactError(
                    f"{call}: expected a tensor in the place of every output, got None in one of {len(call.outputs)}; "
                    "write torch.autograd.grad in forward out as layers, or use tie_, which needs no graph"
                )


def _refuse_symbolic_sizes(graph: fx.Graph) -> None:
    """Raise where a size depends on the numbers that come in: channels could not be told from samples there."""
    for node in graph.nodes:
        if node.op == "call_function":
            call = _call(node, {})
            for made in call.outputs:
                if isinstance(made, Tensor) and not all(type(size) is int for size in made.shape):
                    raise CompactError(
                        f"{call}: expected sizes that the inputs' sizes fix, got {tuple(made.shape)}, where "
                        f"{', '.join(str(size) for size in made.shape if type(size) is not int)} depends on the "
                        "numbers that come in; mask them with torch.where instead of selecting some, or use tie_, "
                        "which needs no graph"
                    )


def _checked(model: nn.Module) -> Iterator[tuple[str, int, str]]:
    """The axes of parameters whose length the forward of one of PyTorch's modules checks, and how."""
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            for leaf in ("in_proj_weight", "q_proj_weight"):
                reason = f"nn.MultiheadAttention checks its embed_dim in {path!r}"
                yield (f"{path}.{leaf}" if path else leaf), 1, reason


def _is_functional(graph: fx.Graph) -> bool:
    """Whether the graph can be read as it is: what works in place is pointwise, on memory with no other use later.

    It is then closer to the user's forward than after decomposition: computations whose results are dropped are there,
    and a `chunk` is a `chunk`.
    """
    seen: dict[int, list[fx.Node]] = {}
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op == "get_attr":
            return False
        if node.op == "call_function" and node.target is not operator.getitem:
            if not isinstance(node.target, OpOverload):
                return False
            schema = cast(Any, node.target)._schema
            if schema.is_mutable:
                memory = _memory(node)
                alone = all(
                    other.op != "placeholder" and max(map(order.__getitem__, other.users), default=0) <= order[node]
                    for other in seen.get(memory or 0, [])
                )
                if torch.Tag.pointwise not in node.target.tags or not schema.name.endswith("_") or not alone:
                    return False
        if (memory := _memory(node)) is not None:
            seen.setdefault(memory, []).append(node)
    return True


def _memory(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return cast(Any, value.untyped_storage())._cdata if isinstance(value, Tensor) else None


def _feeding_nothing(graph: fx.Graph) -> set[str]:
    """Return the placeholders behind computations whose result is dropped."""
    waiting = [node for node in graph.nodes if _is_dropped(node)]
    visited: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in visited:
            visited.add(node)
            waiting.extend(node.all_input_nodes)
    return {node.name for node in visited if node.op == "placeholder"}


def _is_dropped(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is operator.getitem or str(node.target).startswith("aten._assert"):
        return False
    changes = isinstance(node.target, OpOverload) and cast(Any, node.target)._schema.is_mutable
    return not changes and not any(user.users or user.target is not operator.getitem for user in node.users)


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    every: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    every.update(model.named_buffers(remove_duplicate=False))
    order = {name: rank for rank, name in enumerate(model.state_dict(keep_vars=True))}
    names: dict[int, list[str]] = {}
    for name in sorted(every, key=lambda name: order.get(name, len(order))):
        names.setdefault(id(every[name]), []).append(name)
    tensors = {first: every[first] for first, *_ in names.values()}
    aliases = {first: tuple(others) for first, *others in names.values()}
    return tensors, aliases


AS = {"expand_as": "expand", "view_as": "view", "reshape_as": "reshape", "type_as": "to", "_unsafe_view": "view"}
"""What takes no more than the shape or type of its second operand, which therefore isn't one."""


def _call(node: fx.Node, values: dict[fx.Node, Any]) -> Call:
    args = cast(Any, fx.map_arg(node.args, values.get))
    kwargs = cast(Any, fx.map_arg(node.kwargs, values.get))
    target = node.target
    if not isinstance(target, OpOverload):
        name = "getitem" if target is operator.getitem else getattr(target, "__name__", str(target))
        return Call(node, name, False, False, False, {str(i): a for i, a in enumerate(args)} | kwargs)
    schema = cast(Any, target)._schema
    arguments: dict[str, Any] = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    arguments.update(zip((a.name for a in schema.arguments), args, strict=False))
    arguments.update(kwargs)
    name = str(schema.name).removeprefix("aten::")
    name = name.rstrip("_") if schema.is_mutable else name
    if name in AS:
        name = AS[name]
        arguments.pop("other", None)
    pointwise, random = torch.Tag.pointwise in target.tags, torch.Tag.nondeterministic_seeded in target.tags
    return Call(node, name, pointwise, random, bool(schema.is_mutable), arguments)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
