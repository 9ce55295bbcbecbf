"""One checkpoint, or several beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias, overload

from torch import Tensor

from tying.errors import FileError, PlanError
from tying.inspect.one import Inspection, look
from tying.inspect.several import Sharing, compare
from tying.store.checkpoint import Entry, entry_of, read_tensors

Source: TypeAlias = str | Path | Mapping[str, Tensor]


@overload
def inspect(source: Source, *, support: float = 0.05, tolerance: float = 0.05) -> Inspection: ...
@overload
def inspect(
    source: Source, other: Source, /, *others: Source, support: float = 0.05, tolerance: float = 0.05
) -> Sharing: ...
def inspect(source: Source, *others: Source, support: float = 0.05, tolerance: float = 0.05) -> Inspection | Sharing:
    """Look into a checkpoint for what is zero or nearly equal; or into several, for what they share.

    In one: a group is zero if its l2 norm is at most `support` times the largest of its weight. Two inputs a, b with
    ‖a‖ ≥ ‖b‖ are alike if ‖a − b‖ ≤ `tolerance` · ‖a‖; going down the norms, each input joins the first one it is
    like, or stands for itself.

    In several: what is equal bit for bit, under whatever names (see `tying.equal.equal_ties`): whole tensors,
    transposed ones, outputs or inputs that occur more than once; for tensors of one name and shape that are not
    equal their distance ‖a − b‖ ÷ max(‖a‖, ‖b‖), the largest over all pairs, alike if at most `tolerance` (none where
    groups of them are equal to those of tensors of other names); and the bytes that a bundle spares, in which what is
    equal is stored once. Of a file that `tying.save` wrote, the networks' own tensors are looked at, and what the file
    stores once already is counted once.

    Args:
        source: A `.safetensors` file, a file that `tying.save` wrote, a state dict saved by `torch.save` (loaded with
            `weights_only=True`), or a state dict. Weights are read as `nn.Linear` and `nn.ConvNd` lay them out:
            outputs first, then inputs.
        *others: More of these: they are compared with each other, all in memory at once.
        support: Relative norm, in [0, 1), as for `discover`. Not used for several.
        tolerance: Relative distance, in [0, 1).

    Raises:
        FileError: If a file is not there, truncated, foreign, would run code, or holds no weight.
        PlanError: If `support` or `tolerance` is out of range.

    Example:
        >>> import torch
        >>> print(inspect({"fc.weight": torch.tensor([[1.0, 1.0, 0.0, 3.0], [2.0, 2.0, 0.0, 4.0]])}))
        state dict
        weight     shape  inputs  zero  alike  outputs  zero  values  left  smaller
        fc.weight  2×4         4     1      1        2     0       8     4    1.88×
        total                                                      8     4    1.88×
        zero: norm ≤ 0.05 of the weight's largest.
        alike: distance to another input ≤ 0.05 of that one's norm.
        smaller: in bytes, labels counted. Nothing was trained or removed: compact, then measure the accuracy.
        >>> body, head = torch.arange(6.0).reshape(2, 3), torch.arange(4.0).reshape(2, 2)
        >>> print(inspect({"body": body, "head": head}, {"body": body, "head": head * 1.02}))
        1: state dict
        2: state dict
        weight  in   shape  how    distance  bytes  in a bundle
        body    1 2  2×3    equal               48           24
        head    1 2  2×2    alike      0.02     32           32
        total                                   80           56
        A bundle spares 24 bytes (30.0 %), labels counted, once what is equal is tied.
        equal, transposed, groups → values: bit for bit. alike: distance ≤ 0.05.
        distance: ‖a − b‖ ÷ max(‖a‖, ‖b‖).
    """
    for name, value in (("support", support), ("tolerance", tolerance)):
        if not 0 <= value < 1:
            raise PlanError(f"{name}: expected a number in [0, 1), got {value}; 0.05 is 5 %")
    if not others:
        return look(*_opened(source), support, tolerance)
    opened = [_opened(each) for each in (source, *others)]
    return compare(_labelled([label for label, _ in opened]), [tensors for _, tensors in opened], tolerance)


def _opened(source: Source) -> tuple[str, Iterable[Entry]]:
    if isinstance(source, str | Path):
        return str(source), read_tensors(source)
    if not isinstance(source, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise FileError(
            f"source: expected a path or a state dict, got {type(source).__name__}; pass model.state_dict()"
        )
    # a module's extra state may be anything
    return "state dict", [entry_of(name, value) for name, value in source.items() if isinstance(value, Tensor)]  # pyright: ignore[reportUnnecessaryIsInstance]


def _labelled(sources: list[str]) -> dict[str, str]:
    """The sources by short names that differ: files without folder and ending, or numbers."""
    short = [Path(source).stem for source in sources]
    if len(set(short)) < len(short) or "state dict" in short:
        short = [str(i) for i in range(1, len(sources) + 1)]
    return dict(zip(short, sources, strict=True))
