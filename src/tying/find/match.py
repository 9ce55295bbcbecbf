"""A plan over several models: what corresponds to what, by name, by a map, or because it is equal already."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tying.equal import equal_ties
from tying.errors import PlanError
from tying.find.pairs import Pairs, Parameters, Unpaired, by_map, by_name_and_shape, unpaired_of
from tying.find.units import Aligned, By, align_units
from tying.groups import Groups
from tying.models import Models, by_name
from tying.plan import Member, Tie, TiePlan

Inputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Pair:
    """How well the groups that a tie pairs agree, each beside the first group with its label.

    With x all these groups end to end and y their firsts: `cosine` = x·y ÷ (‖x‖ ‖y‖) and `distance` =
    ‖x − y‖ ÷ max(‖x‖, ‖y‖), in float64. Equal groups have cosine 1 and distance 0, also where all are zero;
    tensors without values, on the meta device, have NaN.
    """

    members: tuple[Member, ...]
    groups: tuple[int, ...]
    """How many groups each member has."""
    paired: tuple[int, ...]
    """How many groups of each member share their label with another group."""
    cosine: float
    distance: float

    def __str__(self) -> str:
        return " ~ ".join(map(_named, self.members))


@dataclass(frozen=True, eq=False)
class Match(TiePlan):
    """A plan over several models that also tells how well the pairs agree. Equal to the plan of the same ties."""

    pairs: tuple[Pair, ...] = field(default=(), compare=False)
    """One per tie."""
    unpaired: tuple[Unpaired, ...] = field(default=(), compare=False)
    """The parameters that no tie has."""
    aligned: tuple[Aligned, ...] = field(default=(), compare=False)
    """The units of all models but the first, where these were asked to be aligned."""

    def __eq__(self, other: object) -> bool:
        return self.ties == other.ties if isinstance(other, TiePlan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.ties)

    def __reduce__(self) -> Any:
        return Match, (self.ties, dict(self.provenance), self.pairs, self.unpaired, self.aligned)

    def __str__(self) -> str:
        source = ", ".join(f"{key}: {value}" for key, value in self.provenance.items())
        rows = [("pairs", "groups", "cosine", "distance")]
        rows += [(str(p), _counts(p), f"{p.cosine:.4f}", f"{p.distance:.4f}") for p in self.pairs]
        moved = [("aligned units", "moved", "")]
        moved += [(f"{a.model}: {a.units}", f"{a.moved} of {a.count}", a.reason or "") for a in self.aligned]
        left = [("unpaired", "shape", "reason"), *((u.name, str(u.shape), u.reason) for u in self.unpaired)]
        tables = [_table(table) for table in (rows, moved, left) if len(table) > 1]
        return "\n".join([f"Match ({source})", *(f"  {line}" for lines in tables for line in lines)])


def match(
    models: Models,
    *,
    pairs: Pairs | None = None,
    align: bool = False,
    example_inputs: Inputs | Mapping[str, Inputs] | None = None,
    by: By = "weights",
    equal: bool = False,
) -> Match:
    """Find which parameters of several models correspond. The models are only read, but with `align`.

    Without more, parameters of the same name and shape in several models are paired, all of them in one tie over
    `Groups.whole()`. Parameters that are one object in a model are one.

    With `pairs`, what it says is paired: name or pattern → name, pattern, or several. What a `*` stands for on the
    left is put in on the right: `{"a.encoder.*.weight": "b.net.*.weight"}`. With Groups, as
    `("a.encoder.weight", Groups.outputs()): ("b.decoder.weight", Groups.inputs())`, groups are paired one by one, of
    equal length D; where one has more, its first min(G) groups are, and the others have labels of their own. A `range`
    or `slice` as third element says which: `("b.fc1.weight", Groups.outputs(), range(8, 16))`. Groups that are counted
    along several axes, `filters()` (outputs × inputs) and `elements()`, are paired by position along every axis: of
    layers narrower in both directions the leading block; a range chooses the same positions of each axis.

    With `equal`, what is the same already, bit for bit: see `tying.equal.equal_ties`.

    **With `align`, all models but the first are written to, in place; it is the only case.** Their hidden units change
    places, in weights, biases, BatchNorm statistics, in everything that makes or reads them and in gradients that are
    there, so that corresponding units face those of the first model, or of an earlier one. What each model computes in
    evaluation mode stays: that is compared on float64 copies, on the example inputs and on random ones, to 1e-9 of
    every output (`tying.outputs.difference`), before anything is written, and everything is written or nothing. The
    copies run often, and forward hooks with them. An optimizer made before has its momentum in the old places: make it
    anew. A model with parameters that its forward does not use is refused: they may read units in another mode.

    Units can move where `find_channels` says that they can be removed one by one: that is proven by the graph. Where
    it says that they can't (the stream of a transformer, behind LayerNorm), they move if trials show that it changes
    nothing: on the examples and on random inputs, with the model's weights and with others, every unit making a
    difference. **That rests on samples**: give example inputs as varied as those to come. Attention heads stay, and
    units inside a group of a grouped convolution; so do those of `nn.LSTM` and its like, and of layers under
    `weight_norm`, which are not followed.

    Args:
        models: Modules by name, at least two; one is enough with `pairs` or `equal`.
        pairs: An explicit map, in place of the names.
        align: Whether to permute the units of all models but the first.
        example_inputs: For `align`: as `model(*example_inputs)` takes them, or by model's name where they differ.
        by: For `align`: "weights", the largest Σ ⟨weights, paired weights⟩ that coordinate descent over linear
            assignments finds, never less than before (`tying.find.align.by_weights`); or "activations", the largest
            correlation of the units over the example inputs, of which hundreds are needed
            (`tying.find.align.by_activations`).
        equal: Whether to find what is equal, in place of the names.

    Returns:
        A plan, with `pairs` (agreement in float64, after aligning), `unpaired` with reasons (buffers are not listed)
        and `aligned`; `print` shows all of it.

    Raises:
        PlanError: One model where two are needed, a pattern without a match, parameters or groups that don't compare,
            a group that is paired twice, `by` or `example_inputs` without `align`; a model that can't be followed,
            copied or run in float64, that gives NaN or infinity, has parameters that its forward does not use, or
            whose function would change. Nothing is changed then.

    Source: Ainsworth, Hayase, Srinivasa, *Git Re-Basin*, ICLR 2023 (arXiv 2209.04836); Li et al., *Convergent
    Learning*, 2015 (arXiv 1511.07543).

    Example:
        >>> import copy, torch
        >>> a = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> b = copy.deepcopy(a)
        >>> order = torch.tensor([2, 0, 1])
        >>> for tensor, axis in [(b[0].weight, 0), (b[0].bias, 0), (b[2].weight, 1)]:
        ...     tensor.data = tensor.data.index_select(axis, order)
        >>> print(match({"a": a, "b": b}, align=True, example_inputs=torch.randn(2, 4)))
        Match (match: by name and shape, aligned: by weights)
          pairs                    groups  cosine  distance
          a.0.weight ~ b.0.weight  whole   1.0000  0.0000
          a.0.bias ~ b.0.bias      whole   1.0000  0.0000
          a.2.weight ~ b.2.weight  whole   1.0000  0.0000
          a.2.bias ~ b.2.bias      whole   1.0000  0.0000
          aligned units        moved
          b: 0.weight[axis 0]  3 of 3
        >>> torch.equal(a[0].weight, b[0].weight)
        True
    """
    prefixed = by_name(models)
    _check_arguments(prefixed, pairs, align, example_inputs, by, equal)
    parameters = Parameters.of(models)
    plan, unpaired = _plan(parameters, pairs, equal)
    aligned: list[Aligned] = []
    if align:
        plan = replace(plan, provenance={**plan.provenance, "aligned": f"by {by}"})
        aligned = align_units(prefixed, plan, _by_model(prefixed, example_inputs), by)
    agreement = [_agreement(tie, parameters.named) for tie in plan]
    return Match(plan.ties, plan.provenance, tuple(agreement), tuple(unpaired), tuple(aligned))


def _plan(parameters: Parameters, pairs: Pairs | None, equal: bool) -> tuple[TiePlan, list[Unpaired]]:
    """Return what corresponds, and the parameters that have no partner."""
    if equal:
        ties = equal_ties(parameters.named)
        how, unpaired = "what is equal", unpaired_of(parameters, ties, {}, "equal to no other")
    elif pairs is None:
        how, (ties, unpaired) = "by name and shape", by_name_and_shape(parameters)
    else:
        how, (ties, unpaired) = "by a map", by_map(parameters, pairs)
    plan = TiePlan(ties, {"match": how})
    plan.check_fits(parameters.named)
    return plan, unpaired


def _check_arguments(
    models: Mapping[str, nn.Module], pairs: object, align: bool, example_inputs: object, by: str, equal: bool
) -> None:
    if len(models) < 2 and (align or not (equal or pairs is not None)):
        raise PlanError(
            f"models: expected at least two by name, got {len(models)}; write "
            '{"a": model_a, "b": model_b}, or give pairs inside the one'
        )
    if equal and (pairs is not None or align):
        raise PlanError("equal: expected it alone, got pairs or align with it; call match once for each")
    if by not in ("weights", "activations"):
        raise PlanError(f"by: expected 'weights' or 'activations', got {by!r}; choose one of them")
    if not align and (by != "weights" or example_inputs is not None):
        given = "by" if by != "weights" else "example_inputs"
        raise PlanError(f"{given}: expected it with align=True, got it without; add align=True, or leave it out")
    if align and example_inputs is None:
        raise PlanError("example_inputs: expected what the models take, for align=True, got None; pass a small batch")


def _by_model(
    models: Mapping[str, nn.Module], given: Inputs | Mapping[str, Inputs] | None
) -> dict[str, tuple[Tensor, ...]]:
    inputs: Mapping[str, object] = given if isinstance(given, Mapping) else dict.fromkeys(models, given)
    if set(inputs) != set(models):
        raise PlanError(
            f"example_inputs: expected inputs for {sorted(models)}, got them for {sorted(inputs)}; name every model"
        )
    result = {name: x if isinstance(x, tuple) else (x,) for name, x in inputs.items()}
    for name, each in result.items():
        if not all(isinstance(x, Tensor) for x in each):
            raise PlanError(
                f"example_inputs: expected tensors for {name!r}, got {each!r:.80}; pass what the model takes"
            )
    return cast("dict[str, tuple[Tensor, ...]]", result)


def _agreement(tie: Tie, parameters: Mapping[str, Tensor]) -> Pair:
    counts = [member.shape(parameters)[0] for member in tie.members]
    labels = tie.partition.labels
    sizes = np.append(tie.partition.sizes, 0)  # a group that is pruned faces none
    faces = sizes[labels] > 1
    paired = [int(part.sum()) for part in np.split(faces, np.cumsum(counts)[:-1])]
    first = np.unique(labels, return_index=True)
    firsts = first[1][np.searchsorted(first[0], labels)]
    later = np.flatnonzero(faces & (firsts != np.arange(len(labels))))
    if any(parameters[member.parameter].is_meta for member in tie.members):
        return Pair(tie.members, tuple(counts), tuple(paired), math.nan, math.nan)
    with torch.no_grad():
        matrix = torch.cat([_real(m.groups.read(parameters[m.parameter])) for m in tie.members])
        x, y = (matrix[torch.as_tensor(chosen)] for chosen in (later, firsts[later]))
        lengths = float(x.norm()), float(y.norm())
        distance = float((x - y).norm()) / max(*lengths, 1e-300)
        cosine = float((x * y).sum()) / (lengths[0] * lengths[1]) if all(lengths) else float(lengths[0] == lengths[1])
    return Pair(tie.members, tuple(counts), tuple(paired), cosine, distance)


def _real(matrix: Tensor) -> Tensor:
    """Return groups in float64 on the CPU, `(G, D)`; complex numbers as two real ones, `(G, 2 D)`."""
    wide = torch.view_as_real(matrix.resolve_conj()).flatten(1) if matrix.is_complex() else matrix
    return wide.cpu().double()


def _named(member: Member) -> str:
    return member.parameter if member.groups == Groups.whole() else str(member)


def _counts(pair: Pair) -> str:
    if all(member.groups == Groups.whole() for member in pair.members):
        return "whole"
    return ", ".join(f"{paired} of {count}" for paired, count in zip(pair.paired, pair.groups, strict=True))


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
