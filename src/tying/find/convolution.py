"""The plan that a convolution hard-wires: the equalities and zeros that make a convolution of a layer without them.

    dense layer ── most numbers zero ──▶ locally connected layer ── equal at all positions ──▶ convolution

`hardwired` says both steps as a `TiePlan`, for a dense layer, or the second, for a locally connected one; `how_close`
says how far a trained locally connected layer came by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from tying.errors import PlanError
from tying.groups import Groups
from tying.nn import LocallyConnected1d, LocallyConnected2d
from tying.plan import Tie, TiePlan, qualified
from tying.wiring.windows import Size
from tying.wiring.wiring import PlainConv, Wiring

Local: TypeAlias = LocallyConnected1d | LocallyConnected2d


def hardwired(layer: PlainConv | Local, input_size: Size | None = None, *, name: str = "") -> TiePlan:
    """Return the plan that makes a convolution of a dense layer, or of a locally connected one.

    Of a convolution: the ties over `Groups.elements()` of the weight `(O·P, C·S)` of the dense layer of the same map
    on flattened inputs, as `dense_of` builds it; a number for which the convolution has no connection is pruned, all
    others are labelled with their place in the kernel. Of a locally connected layer: one label for all
    `Groups.positions()`. The bias likewise, where there is one. Once `tie_` holds the plan, layer and convolution are
    equal, forward and gradient; `compact` puts the convolution in the layer's place.

    Args:
        layer: `nn.Conv1d` or `nn.Conv2d`: any stride, padding, dilation and groups, padding by zeros or circular; its
            weights are not read. Or `LocallyConnected1d/2d`, any padding mode.
        input_size: Of one channel; for a convolution only.
        name: Of the layer to tie, in the model that `tie_` will be given.

    Raises:
        PlanError: If the convolution has a forward of its own; if the input size is missing or too small, or two taps
            of the convolution read one input at one position (reflected and repeated borders): their weights add up in
            the dense layer.

    Source: Goodfellow, Bengio, Courville, *Deep Learning*, section 9.2: a convolution is a dense layer with an
        infinitely strong prior on its weights.

    Example:
        >>> conv = nn.Conv1d(1, 1, 2)
        >>> plan = hardwired(conv, 4)
        >>> print(plan.ties[0])
        weight[elements]: 12 groups → 2 values, 6 pruned
        >>> from tying.enforce.ties.tie import tie_
        >>> dense = nn.Linear(4, 3)
        >>> tie_(dense, plan)
        >>> sum(p.numel() for p in dense.parameters())
        3
    """
    weight, bias = qualified(name, "weight"), qualified(name, "bias")
    if isinstance(layer, (LocallyConnected1d, LocallyConnected2d)):
        if input_size is not None:
            raise PlanError(f"input_size: expected none for {type(layer).__name__}, got {input_size}; it has its own")
        same = [0] * layer.windows.positions
        ties = [Tie.of(weight, Groups.positions(), same)]
        ties += [Tie.of(bias, Groups.positions(), same)] if layer.bias is not None else []
        return TiePlan(ties, {"made by": "hardwired"})
    wiring = _wiring(layer, input_size)
    ties = [Tie.of(weight, Groups.elements(), wiring.weight_labels())]
    if layer.bias is not None:
        ties.append(Tie.of(bias, Groups.elements(), wiring.bias_labels()))
    return TiePlan(ties, {"made by": "hardwired", f"convolution of {name or 'the layer'}": wiring.to_text()})


def dense_of(conv: PlainConv, input_size: Size) -> nn.Linear:
    """Return the dense layer of a convolution's map: with `Flatten` before it, it computes what `Conv`, `Flatten` do.

    Args:
        conv: `nn.Conv1d` or `nn.Conv2d`, any padding mode.
        input_size: Of one channel.

    Returns:
        `nn.Linear(C·S, O·P)` with the convolution's dtype, device, mode and `requires_grad`; nothing is tied yet.

    Raises:
        PlanError: If it is another kind of layer, has a forward of its own, or the kernel does not fit into the input.

    Example:
        >>> conv = nn.Conv2d(1, 2, 3)
        >>> x = torch.randn(5, 1, 6, 6)
        >>> torch.allclose(dense_of(conv, 6)(x.flatten(1)), conv(x).flatten(1), atol=1e-6)
        True
    """
    wiring = _wiring(conv, input_size)
    weight, bias = conv.weight, cast("nn.Parameter | None", conv.bias)
    dense = nn.Linear(
        wiring.in_features, wiring.out_features, bias is not None, device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        dense.weight.copy_(wiring.dense(weight))
        if bias is not None:
            dense.bias.copy_(bias.repeat_interleave(wiring.windows.positions))
            dense.bias.requires_grad_(bias.requires_grad)
    dense.weight.requires_grad_(weight.requires_grad)
    return dense.train(conv.training)


def _wiring(conv: PlainConv, input_size: Size | None) -> Wiring:
    if input_size is None:
        raise PlanError("input_size: expected the size of one channel, got none; pass 28, or (height, width)")
    return Wiring.of_conv(conv, input_size)


@dataclass(frozen=True)
class Closeness:
    """How close the kernels of a locally connected layer are to being one.

    Shares are of the energy, ‖·‖² of all weights at taps that read an input (what a padded zero is multiplied with
    does not count). No permutation of channels is looked for: positions that compute the same in another order differ.

    Attributes:
        explained: Of the mean kernel: 1 for a convolution.
        by_chance: What it is on average for independent weights of mean zero: kernels ÷ weights.
        kernels: How many kernels the plan leaves; without a plan, one per position.
        largest: The share of the positions that have the most common kernel of the plan.
        with_kernels: The share explained when each of the plan's kernels is the mean of its positions.
    """

    explained: float
    by_chance: float
    kernels: int
    largest: float
    with_kernels: float

    def __str__(self) -> str:
        return (
            f"one kernel explains {self.explained:.1%} of the energy ({self.by_chance:.1%} by chance); "
            f"{self.kernels} kernels explain {self.with_kernels:.1%}, the most common at {self.largest:.0%} of the "
            "positions"
        )


def how_close(layer: Local, plan: TiePlan | None = None, *, name: str = "") -> Closeness:
    """Return how close a locally connected layer came to a convolution.

    `explained = Σ_j n_j · w̄_j² ÷ Σ_j Σ_p m_pj · w_pj²`, in float64, over the numbers j of a kernel and the positions p:
    `m_pj` is 1 where tap j reads an input at p, else 0, `n_j = Σ_p m_pj`, and `w̄_j = Σ_p m_pj · w_pj ÷ n_j`.
    `with_kernels` is the same with one mean for each label of the plan, pruned positions counting as zero.

    Args:
        layer: Trained, with a tying penalty over its positions or without; not written to.
        plan: Of `discover` over `Groups.positions()` of the layer's weight.
        name: Of the layer in the model that the plan is for.

    Raises:
        PlanError: If it is another kind of layer, or on the meta device; if the plan has no tie over the positions of
            this layer, or another number of them; if the weights are zero or not finite.

    Example:
        >>> layer = LocallyConnected2d.from_conv(nn.Conv2d(1, 2, 3), 6)
        >>> round(how_close(layer).explained, 9)
        1.0
    """
    if not isinstance(layer, (LocallyConnected1d, LocallyConnected2d)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError(f"layer: expected LocallyConnected1d or LocallyConnected2d, got {layer!r}; pass one")
    if not (plan is None or isinstance(plan, TiePlan)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError(f"plan: expected a TiePlan or None, got {type(plan).__name__}; discover one")
    if layer.weight.is_meta:
        raise PlanError(
            f"{qualified(name, 'weight')}: expected values to compare, got a layer on the meta device; load it first"
        )
    weight = layer.weight.detach().double().flatten(1)
    connected = torch.as_tensor(layer.windows.reads() >= 0, device=weight.device).double()
    counts = connected.repeat(1, weight.shape[1] // connected.shape[1])
    total = float((weight**2 * counts).sum())
    if not 0 < total < float("inf"):
        raise PlanError(f"{qualified(name, 'weight')}: expected finite weights, not all zero, got energy {total}")
    labels = np.arange(len(weight)) if plan is None else _labels(plan, qualified(name, "weight"), len(weight))
    kept = labels[labels >= 0]
    return Closeness(
        _explained(weight, counts, np.zeros(len(weight), dtype=np.int64)) / total,
        int((counts.sum(0) > 0).sum()) / int(counts.sum()),
        len(np.unique(kept)),
        int(np.bincount(kept).max(initial=0)) / len(labels),
        _explained(weight, counts, labels) / total,
    )


def _explained(weight: Tensor, counts: Tensor, labels: np.ndarray) -> float:
    """‖PW‖², each label's positions replaced by their mean over the taps that count, pruned ones by zero."""
    kept = torch.as_tensor(np.flatnonzero(labels >= 0), device=weight.device)
    at = torch.as_tensor(labels[labels >= 0], device=weight.device)
    zeros = weight.new_zeros(int(labels.max(initial=-1)) + 1, weight.shape[1])
    number = zeros.index_add(0, at, counts[kept])
    summed = zeros.index_add(0, at, (weight * counts)[kept])
    return float((summed**2 / number.clamp(min=1)).sum())


def _labels(plan: TiePlan, weight: str, positions: int) -> np.ndarray:
    for tie in plan:
        if [(m.parameter, m.groups) for m in tie.members] == [(weight, Groups.positions())]:
            if len(tie.partition) != positions:
                raise PlanError(f"{weight}: expected {positions} labels, got {len(tie.partition)}; make the plan anew")
            return tie.partition.labels
    raise PlanError(f"{weight}: expected a tie over its positions, got {plan}; discover with Groups.positions()")
