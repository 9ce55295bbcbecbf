"""The kernel without a look at the numbers: tensor operations alone, on any device, so that nothing waits for the host.

The isotonic regression is merged from halves. All segments lie in one array, each in a slot of a power of two, the
longest first, so that on every level the pairs of halves still to be merged are the front of the array, in rows. Two
neighbouring halves, each solved, are out of order only around the middle. What is pooled there gets the one mean m at
which the numbers of the left half above m and those of the right half below it balance:

    B(t) = Σ_{x > t} (x − t) − Σ_{y < t} (t − y)     falls with t, and is 0 at m.

So x is pooled where B(x) < 0 and y where B(y) > 0, and B at all numbers takes two searches and two running sums. The
number of levels is log2 of the longest segment, rounded up, whatever the numbers are. (Splitting at the argmax of S −
mean · m, S the running sums, takes as many launches a level, and up to log2(n) + 5 levels for 1e-13.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, constant_pad_nd


def shrink_segmented(magnitudes: Tensor, thresholds: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the prox of the sorted-L1 norm, segment by segment: `shrink_sorted`, for tensors that nobody waits for.

    The same up to 1e-13 of a segment's largest number. Equal magnitudes of a segment come out equal bit for bit. On the
    CPU the same input gives the same bits again; CUDA adds up in an order that changes. Nothing is checked here: that
    is the caller's part.

    Args:
        magnitudes: `(n,)` float64, finite, ≥ 0, in any order, on any device.
        thresholds: `(n,)` float64 there: finite, ≥ 0, non-increasing inside each segment.
        lengths: The sizes of consecutive segments, 0 allowed, together n.

    Returns:
        The new magnitudes, `(n,)` float64, ≥ 0, each where its magnitude was.

    Example:
        >>> magnitudes, thresholds = torch.tensor([4.0, 1.0, 3.5]).double(), torch.tensor([1.0, 1.0, 0.5]).double()
        >>> shrink_segmented(magnitudes, thresholds, lengths=[1, 2])
        tensor([3.0000, 0.5000, 2.5000], dtype=torch.float64)
    """
    # What stands in for tensors, in FakeTensorMode say, must meet its own kind, and must not be kept for others.
    find = _plan if type(magnitudes) is Tensor else _Plan
    plan = find(tuple(lengths), magnitudes.device)
    if not magnitudes.numel():
        return magnitudes.clone()
    by_size = magnitudes.argsort()
    order = by_size[plan.labels[by_size].argsort(stable=True)]
    ordered = magnitudes[order]
    slots = magnitudes.new_full((plan.total,), torch.inf)  # what fills up a slot stays last and is never pooled
    slots[plan.slots] = ordered - thresholds[plan.mirrored]
    for half, front in plan.levels:
        _merge_(slots[:front].view(-1, 2, half))
    fit = slots[plan.slots].clamp(min=0.0)
    result = torch.empty_like(magnitudes)
    result[order] = fit[_firsts(ordered, plan)]
    return result


def _merge_(pairs: Tensor) -> None:
    """Make rows of two non-decreasing halves, `(R, 2, h)`, non-decreasing, in place."""
    left, right = pairs[:, 0], pairs[:, 1]
    half = pairs.shape[2]
    middle = left[:, -1:]
    # Sums run outward from the middle and of differences to it, so that rounding grows with what is pooled only.
    above = constant_pad_nd((left - middle).flip(1).cumsum(1), (1, 0))  # of the k last
    below = constant_pad_nd((right - middle).cumsum(1), (1, 0))  # of the k first
    ranks = torch.arange(half, device=pairs.device)
    smaller = torch.searchsorted(right.contiguous(), left.contiguous())  # numbers of the right half
    larger = half - torch.searchsorted(left.contiguous(), right.contiguous(), right=True)
    over, under = left - middle, right - middle
    after = half - 1 - ranks
    at_left = (above[:, :-1].flip(1) - after * over) - (smaller * over - below.gather(1, smaller))
    at_right = (above.gather(1, larger) - larger * under) - (ranks * under - below[:, :-1])
    broken = middle > right[:, :1]
    pooled = torch.stack([broken & (at_left < 0), broken & (at_right > 0)], dim=1)
    differences = torch.where(pooled, torch.stack([over, under], dim=1), 0.0)
    count = pooled.sum(dim=(1, 2), keepdim=True)
    mean = differences.sum(dim=(1, 2), keepdim=True) / count + middle[:, None]
    pairs.copy_(torch.where(pooled, mean, pairs))


def _firsts(ordered: Tensor, plan: _Plan) -> Tensor:
    """Return for every place the first one of the same segment with the same magnitude, `(n,)`."""
    places = torch.arange(len(ordered), device=ordered.device)
    new = constant_pad_nd(ordered[1:] != ordered[:-1], (1, 0), True) | plan.starts
    return torch.where(new, places, 0).cummax(0).values


class _Plan:
    """Where the numbers of segments of some lengths lie while they are merged: known beforehand."""

    def __init__(self, lengths: tuple[int, ...], device: torch.device) -> None:
        sizes = np.array(lengths, dtype=np.int64)
        starts = np.cumsum(sizes) - sizes
        room = np.array([1 << max(int(size) - 1, 0).bit_length() if size else 0 for size in lengths], dtype=np.int64)
        longest_first = np.argsort(-room, kind="stable")
        corner = np.empty_like(sizes)
        corner[longest_first] = np.cumsum(room[longest_first]) - room[longest_first]
        within = np.arange(sizes.sum()) - np.repeat(starts, sizes)
        self.total = int(room.sum())
        halves = [1 << level for level in range(int(room.max(initial=1)).bit_length() - 1)]
        self.levels = [(half, int(room[room > half].sum())) for half in halves]
        self.labels = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).to(device)
        self.slots = torch.from_numpy(np.repeat(corner, sizes) + within).to(device)
        self.mirrored = torch.from_numpy(np.repeat(starts + sizes - 1, sizes) - within).to(device)
        self.starts = torch.from_numpy(within == 0).to(device)


@lru_cache(maxsize=4)  # one holds 25 bytes a number
def _plan(lengths: tuple[int, ...], device: torch.device) -> _Plan:
    with torch.inference_mode(False):  # its tensors would be of no use outside
        return _Plan(lengths, device)
