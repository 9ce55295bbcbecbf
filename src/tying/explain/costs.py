"""What a map costs with its sharing, with the same connections not shared, and dense: closed forms.

The locally connected layer has the connections of the shared one, each with a value of its own; the dense layer
connects every output with every input. Source: Goodfellow, Bengio, Courville, *Deep Learning*, 9.2 and figure 9.6.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tying.wiring.windows import Windows


@dataclass(frozen=True)
class Cost:
    """What one way to compute a map takes, for one sample."""

    values: int
    """Numbers stored, biases too."""
    multiply_adds: int
    """Products as the layer forms them, those with zero padding too; a lookup in a table forms none."""
    operations: int
    """Multiplications and additions: a sum of r products takes 2r − 1 of them, 2r with a bias."""
    bytes: int
    """Of the values."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.values + other.values,
            self.multiply_adds + other.multiply_adds,
            self.operations + other.operations,
            self.bytes + other.bytes,
        )


NOTHING = Cost(0, 0, 0, 0)


@dataclass(frozen=True)
class Costs:
    """The three ways to compute one map."""

    connections: int
    """Pairs of an output unit and an input unit that it reads: the entries of the sparse matrix of the map."""
    shared: Cost
    local: Cost
    dense: Cost

    def __add__(self, other: Costs) -> Costs:
        return Costs(
            self.connections + other.connections,
            self.shared + other.shared,
            self.local + other.local,
            self.dense + other.dense,
        )


@dataclass(frozen=True)
class TiedInputs:
    """What `tying.nn` sums before the small product: of `read` input channels, `classes` distinct ones."""

    read: int
    classes: int


def convolution(
    windows: Windows,
    inputs: int,
    outputs: int,
    *,
    groups: int = 1,
    bias: bool = True,
    width: int = 4,
    tied: TiedInputs | None = None,
) -> Costs:
    """Return the costs of a convolution.

    With U output units, r = (inputs ÷ groups) · kernel taps: r weights for each output channel are stored, U · r
    products formed; the locally connected layer stores U · r weights and U biases, the dense one U · (input units).

    Args:
        windows: The kernel on an input of the size at hand.
        inputs: Input channels.
        outputs: Output channels.
        groups: As `nn.Conv2d` takes them.
        bias: Whether there is one.
        width: Bytes of a number.
        tied: Whether some input channels share their kernels.

    Example:
        The edge kernel of two pixels on an image of 320 × 280:

        >>> costs = convolution(Windows.of((280, 320), (1, 2), dimensions=2), 1, 1, bias=False)
        >>> costs.shared.values, costs.shared.operations
        (2, 267960)
        >>> costs.local.values, costs.dense.values, costs.dense.operations
        (178640, 8003072000, 16006054680)
    """
    kernel, before, after = windows.taps, windows.inputs, windows.positions
    tied = tied or TiedInputs(inputs // groups, inputs // groups)
    units = outputs * after
    shared = _summed(units, tied.classes * kernel, outputs * tied.classes * kernel, outputs, bias, width)
    summing = (tied.read - tied.classes) * before * groups
    return Costs(
        connections=outputs * tied.read * _pairs(windows)[0],
        shared=shared + Cost(0, 0, summing, 0),
        local=_summed(units, tied.read * kernel, units * tied.read * kernel, units, bias, width),
        dense=_summed(units, inputs * before, units * inputs * before, units, bias, width),
    )


def transposed(
    windows: Windows, inputs: int, outputs: int, *, groups: int = 1, bias: bool = True, width: int = 4
) -> Costs:
    """Return the costs of a transposed convolution, given the windows of the convolution that it transposes.

    Every input unit spreads over the outputs; products that fall outside of these (`padding`) are formed too.

    Example:
        >>> transposed(Windows.of(8, 2, stride=2, dimensions=1), 3, 1, bias=False).connections
        24
    """
    after, before = windows.inputs, windows.positions
    each = outputs // groups * windows.taps
    pairs, read = _pairs(windows)
    products, units = inputs * before * each, outputs * after
    filled = outputs * read
    additions = products - filled + (filled if bias else 0)

    def cost(values: int, biases: int) -> Cost:
        values += biases if bias else 0
        return Cost(values, products, products + additions, values * width)

    return Costs(
        connections=inputs * (outputs // groups) * pairs,
        shared=cost(inputs * each, outputs),
        local=cost(products, units),
        dense=_summed(units, inputs * before, units * inputs * before, units, bias, width),
    )


def linear(
    positions: int, inputs: int, outputs: int, *, bias: bool = True, width: int = 4, tied: TiedInputs | None = None
) -> Costs:
    """Return the costs of a linear layer that is used at so many positions of a sequence: a convolution of kernel 1.

    Example:
        >>> costs = linear(10, 4, 3, bias=False)
        >>> costs.shared.values, costs.local.values, costs.dense.values
        (12, 120, 1200)
    """
    return convolution(Windows.of(positions, 1, dimensions=1), inputs, outputs, bias=bias, width=width, tied=tied)


def embedding(positions: int, entries: int, size: int, *, width: int = 4) -> Costs:
    """Return the costs of a table that is used at so many positions: not shared, each position has its own table.

    The dense layer reads, for every position, which entry stands at every position (one of `entries` inputs is 1).

    Example:
        >>> costs = embedding(10, 100, 8)
        >>> costs.shared.values, costs.local.values, costs.dense.values, costs.shared.multiply_adds
        (800, 8000, 80000, 0)
    """
    units, table = positions * size, entries * size
    return Costs(
        connections=positions * table,
        shared=Cost(table, 0, 0, table * width),
        local=Cost(positions * table, 0, 0, positions * table * width),
        dense=_summed(units, positions * entries, units * positions * entries, units, False, width),
    )


def _pairs(windows: Windows) -> tuple[int, int]:
    """Return how many distinct pairs of a position and a number that it reads there are, and how many are read at all.

    Dimension by dimension: what a tap reads along one does not depend on the others.
    """
    pairs, read = 1, 1
    for axis in range(windows.dimensions):
        line = Windows(
            (windows.input_size[axis],),
            (windows.kernel_size[axis],),
            (windows.stride[axis],),
            (windows.dilation[axis],),
            (windows.padding[axis],),
            windows.padding_mode,
        )
        reads = line.reads()
        at = np.arange(line.positions)[:, None] * line.inputs + reads
        pairs *= len(np.unique(at[reads >= 0]))
        read *= len(np.unique(reads[reads >= 0]))
    return pairs, read


def _summed(units: int, terms: int, weights: int, biases: int, bias: bool, width: int) -> Cost:
    """Every one of the units sums so many products."""
    values = weights + (biases if bias else 0)
    return Cost(values, units * terms, units * (2 * terms - (0 if bias else 1)), values * width)
