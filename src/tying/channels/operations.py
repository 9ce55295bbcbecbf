"""Which operations of the exported graph are of one kind, by the names that `Call.name` has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


IDENTITIES = _names(
    "clone alias detach contiguous lift_fresh_copy to _to_copy dropout feature_dropout alpha_dropout "
    "feature_alpha_dropout"
)
MOVES = _names(
    "view reshape flatten unflatten permute transpose t numpy_T mT adjoint movedim moveaxis swapaxes swapdims "
    "unsqueeze squeeze cat concat stack hstack vstack flip repeat repeat_interleave channel_shuffle pixel_shuffle "
    "pixel_unshuffle"
)
CUTS = _names("slice select split split_with_sizes unbind chunk narrow unsafe_split")
"""Data movement at literal positions: channels lying along the cut axis would move to other positions."""
COUNTERS = _names("arange range linspace logspace eye tril_indices triu_indices")
"""Numbers that count on with the sizes of the input."""
ELEMENTWISE = _names("hardswish hardsigmoid hardtanh relu6 relu gelu silu logsigmoid")
"""Pointwise, though PyTorch does not tag all of them so."""
CONVOLUTIONS = re.compile(r"conv(_transpose)?([123])d")
WINDOWS = re.compile(
    r"(?:(?:adaptive_)?(?:avg|max)_pool|_?upsample_(?:nearest|nearest_exact|linear|bilinear|trilinear|bicubic))"
    r"([123])d(?:_with_indices)?"
)
PRODUCTS = {"matmul": ("self", "other"), "mm": ("self", "mat2"), "bmm": ("self", "mat2"), "addmm": ("mat1", "mat2")}
"""The names of the two factors."""
REDUCTIONS = _names("mean sum amax amin max min std var prod linalg_vector_norm logsumexp all any")
COUPLED = _names("softmax log_softmax _softmax _log_softmax cumsum cumprod logcumsumexp")
ADDING_UP = COUPLED | _names("sum prod linalg_vector_norm logsumexp std var")
"""What depends on how many numbers there are, though all are constant."""
FILLERS = _names("zeros ones full empty scalar_tensor zeros_like ones_like full_like new_zeros new_ones new_full")
"""One number everywhere, however many there are."""
BATCH_NORMS = _names("batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training")
CHANNELWISE_NORMS = BATCH_NORMS | _names("instance_norm")
AFFINE_NORMS = _names("layer_norm group_norm instance_norm")
COUPLED_NORMS = _names("layer_norm group_norm rms_norm")
"""Normalisation: channel by channel, in groups that go as a whole, or of all channels together."""


def meets_border(name: str, padding: Any, kernel: Sequence[int]) -> bool:
    """Whether a convolution reads what stands beside its operand: zeros. A transposed one gives less at the border."""
    if "transpose" in name:
        return True
    if isinstance(padding, str):
        return padding != "valid" and any(n > 1 for n in kernel)
    return any(padding) if isinstance(padding, list | tuple) else bool(padding)
