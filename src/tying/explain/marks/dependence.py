"""Who sees whom in a network, exactly: marks pushed through the exported graph, from the input on or back to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from tying.channels.graph import Call, Graph, export
from tying.channels.operations import IDENTITIES
from tying.errors import CompactError, TyingError
from tying.evaluation import evaluating
from tying.explain.marks.marks import Known, Rule, Several, names, ones
from tying.explain.marks.spreads import rule

Mark: TypeAlias = "Tensor | list[Tensor]"
"""Of an operation, or of one with several outputs: 1 where an element is marked, 0 elsewhere."""

_CONSTANT = names(
    "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty"
)
"""What takes only the shape and type of its operand."""


@dataclass(frozen=True)
class Step:
    """One operation between values that vary with the input."""

    node: fx.Node
    call: Call
    operands: tuple[fx.Node, ...]
    known: tuple[Known | Several, ...]
    rule: Rule

    def forward(self, marks: Sequence[Mark]) -> Mark:
        """Spread the marks of the operands."""
        with torch.no_grad():
            return _binary(self.rule.spread(self._given(marks)))

    def backward(self, marks: Sequence[Mark], wanted: Mark) -> list[Mark]:
        """Return what of the operands the marked elements of the output depend on; `marks` give their shapes."""
        given = [torch.zeros_like(each).requires_grad_() for each in _flat(marks)]
        with torch.enable_grad():
            made = _flat([self.rule.spread(self._given(_nested(given, marks)))])
        pairs = [(m, w) for m, w in zip(made, _flat([wanted]), strict=True) if m.requires_grad]
        if not pairs:
            return [_map(torch.zeros_like, each) for each in marks]
        outputs, seeds = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, given, seeds, allow_unused=True, materialize_grads=True)
        return [_binary(each) for each in _nested(found, marks)]

    def _given(self, marks: Sequence[Mark]) -> Any:
        return {id(known): mark for known, mark in zip(self.known, marks, strict=True)}


@dataclass(frozen=True)
class Dependence:
    """Which units of a network see which, for one sample and its first input; other inputs are held as they are.

    A unit depends on another one where the layers connect them, whatever the values are: only weights that are zero
    connect nothing.
    """

    source: fx.Node
    steps: tuple[Step, ...]
    varies: Mapping[fx.Node, Mark]
    """Which elements depend on the input at all, of the input and of every step."""
    modules: Mapping[str, tuple[tuple[fx.Node, ...], ...]]
    """By the name of a module, the nodes of each of its calls."""

    def calls_of(self, name: str) -> list[list[fx.Node]]:
        """Return the nodes of each call of a module that vary with the input."""
        return [[node for node in call if node in self.varies] for call in self.modules.get(name, ())]

    def first_call(self, name: str) -> list[fx.Node]:
        """Return the nodes of the first call of a module that vary with the input; none if there is no call."""
        return next(iter(self.calls_of(name)), [])

    @property
    def inexact(self) -> tuple[str, ...]:
        """Operations that have no rule, and were taken to mix everything that they read."""
        return tuple(dict.fromkeys(str(step.call) for step in self.steps if not step.rule.exact))

    def forward(
        self, marks: Mapping[fx.Node, Mark], *, edges: bool = False, until: fx.Node | None = None
    ) -> dict[fx.Node, Mark]:
        """Return what the marked elements reach, in every step.

        Args:
            marks: By node, 1 where it is marked.
            edges: Whether elements that read padding are marked as well.
            until: The last node that is asked for.
        """
        reached: dict[fx.Node, Mark] = dict(marks)
        for step in self.steps:
            if step.node not in marks:
                given = [reached.get(node) for node in step.operands]
                if all(each is None for each in given):
                    continue
                filled = [
                    _map(torch.zeros_like, self.varies[node]) if each is None else each
                    for node, each in zip(step.operands, given, strict=True)
                ]
                made = step.forward(filled)
                if edges and step.rule.edge is not None:
                    edge = step.rule.edge
                    made = _map(lambda mark: torch.maximum(mark, edge.expand(mark.shape)), made)  # noqa: B023
                reached[step.node] = made
            if step.node is until:
                break
        return reached

    def backward(self, marks: Mapping[fx.Node, Mark]) -> dict[fx.Node, Mark]:
        """Return what the marked elements depend on: of the input, and of every step on the way."""
        needed: dict[fx.Node, Mark] = dict(marks)
        for step in reversed(self.steps):
            if (wanted := needed.get(step.node)) is None:
                continue
            found = step.backward([self.varies[node] for node in step.operands], wanted)
            for node, mark in zip(step.operands, found, strict=True):
                needed[node] = mark if node not in needed else _maximum(needed[node], mark)
        return needed


def find_dependence(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...]) -> Dependence:
    """Trace a model once, on one sample, and find the rule of every operation.

    Args:
        model: In evaluation mode while it is traced, then as it was.
        example_inputs: As `model(*example_inputs)` takes them, a batch of one sample.

    Raises:
        TyingError: If `torch.export` can't follow the forward.

    Example:
        >>> seen = find_dependence(nn.Sequential(nn.Conv1d(1, 1, 3, padding=1)), torch.zeros(1, 1, 6))
        >>> last = seen.steps[-1].node
        >>> seen.backward({last: torch.tensor([[[0, 0, 1.0, 0, 0, 0]]])})[seen.source].tolist()
        [[[0.0, 1.0, 1.0, 1.0, 0.0, 0.0]]]
    """
    given = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    inputs = tuple(x.detach().clone() for x in given)
    try:
        graph = export(model, inputs)
    except CompactError as error:
        raise TyingError(str(error).removesuffix(", or use tie_, which needs no graph")) from error
    with evaluating(model):
        return _trace(graph, tree_leaves(inputs))


def _trace(graph: Graph, inputs: Sequence[Any]) -> Dependence:
    values: dict[fx.Node, Any] = {}
    varies: dict[fx.Node, Mark] = {}
    steps: list[Step] = []
    waiting = iter(inputs)
    source: fx.Node | None = None
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        origin = graph.sources[node.name]
        value = next(waiting) if origin.kind == "input" else origin.tensor
        values[node] = value.detach().cpu() if isinstance(value, Tensor) else value
        if origin.kind == "input" and source is None and isinstance(value, Tensor):
            source, everything = node, ones(*value.shape)
            varies[node], values[node] = everything, Known(values[node], everything.bool())
    if source is None:
        raise TyingError("example_inputs: expected a tensor first, got none; pass a batch as the model takes it")
    with torch.no_grad():
        for call in graph.calls(values):
            if call.name.startswith("_assert"):
                continue
            step = _step(call, values, varies)
            if step is not None:
                steps.append(step)
    return Dependence(source, tuple(steps), varies, _modules(graph))


def _step(call: Call, values: dict[fx.Node, Any], varies: dict[fx.Node, Mark]) -> Step | None:
    """Compute the call on the example; return what it does to marks, if anything that varies goes in."""
    operands = tuple(node for node in call.node.all_input_nodes if node in varies)
    result = _compute(call)
    if not operands or call.name in _CONSTANT:
        values[call.node] = result
        return None
    step = Step(call.node, call, operands, tuple(values[node] for node in operands), rule(call))
    made = step.forward([varies[node] for node in operands])
    varies[call.node] = made
    if not isinstance(made, Tensor):
        parts = zip(cast("list[Tensor]", list(result)), made, strict=True)
        values[call.node] = Several(tuple(Known(value, mark.bool()) for value, mark in parts))
    else:
        values[call.node] = Known(result, made.bool())
    return step


def _compute(call: Call) -> Any:
    def value(item: Any) -> Any:
        if isinstance(item, Several):
            return [part.value for part in item.parts]
        return item.value if isinstance(item, Known) else item

    if call.name == "getitem":
        return value(call["0"])[call["1"]]
    if call.name in IDENTITIES:
        same = value(next(item for item in call.arguments.values() if isinstance(item, Known | Tensor)))
        return same if call["dtype"] is None else same.to(call["dtype"])
    return call.run(value)


def _modules(graph: Graph) -> dict[str, tuple[tuple[fx.Node, ...], ...]]:
    """By module, the nodes of each of its calls, one after the other in the graph."""
    found: dict[str, list[list[fx.Node]]] = {}
    last: dict[str, Any] = {}
    for node in graph.nodes:
        stack = cast("dict[str, tuple[str, Any]]", node.meta.get("nn_module_stack") or {})
        inside = {path: key for key, (path, _) in stack.items()} if node.op == "call_function" else {}
        for path, key in inside.items():
            name = path.partition("@")[0]
            calls = found.setdefault(name, [])
            if last.get(name) != key:
                calls.append([])
            calls[-1].append(node)
        if node.op == "call_function":
            last = {path.partition("@")[0]: key for path, key in inside.items()}
    return {name: tuple(map(tuple, calls)) for name, calls in found.items()}


def _map(change: Callable[[Tensor], Tensor], mark: Mark) -> Mark:
    return [change(each) for each in mark] if isinstance(mark, list) else change(mark)


def _binary(mark: Mark) -> Mark:
    return _map(lambda each: (each > 0).float(), mark)


def _maximum(one: Mark, other: Mark) -> Mark:
    if isinstance(one, list) and isinstance(other, list):
        return [torch.maximum(a, b) for a, b in zip(one, other, strict=True)]
    return torch.maximum(cast(Tensor, one), cast(Tensor, other))


def _flat(marks: Sequence[Mark]) -> list[Tensor]:
    return [each for mark in marks for each in (mark if isinstance(mark, list) else [mark])]


def _nested(flat: Sequence[Tensor], like: Sequence[Mark]) -> list[Mark]:
    waiting = iter(flat)
    return [[next(waiting) for _ in mark] if isinstance(mark, list) else next(waiting) for mark in like]
