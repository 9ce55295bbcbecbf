"""Every example, and the loop of the README, runs as it stands: without a warning, and says something."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

AROUND_THE_LOOP = """
from collections import OrderedDict

import torch
from torch import nn

torch.manual_seed(0)
x = torch.rand(256, 784)
y = x[:, :20].mean(1).gt(0.5).long()


def build_model():
    return nn.Sequential(OrderedDict(fc1=nn.Linear(784, 300), relu=nn.ReLU(), fc2=nn.Linear(300, 10)))


def train_one_epoch(model, optimizer):
    for batch in torch.arange(256).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


def train(model):
    train_one_epoch(model, torch.optim.Adam(model.parameters()))


model, example_inputs = build_model(), x[:2]
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
"""


BEFORE_SEVERAL = """
model_a, model_b = build_model(), build_model()
batches = [(x[batch], y[batch]) for batch in torch.arange(256).split(64)]


def loss_of(model, inputs, labels):
    return nn.functional.cross_entropy(model(inputs), labels)
"""


def law_runs(script: str, folder: Path) -> str:
    """Return what it prints, without a network: the same code everywhere."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TYING_DATA": str(folder), "PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example: Path, tmp_path: Path) -> None:
    law_runs(example.read_text(encoding="utf-8"), tmp_path)


def test_the_blocks_of_the_readme_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    loop, channels, several = blocks
    back = 'print(torch.equal(tying.load("small.safetensors", build_model())(x), small(x)))'
    smaller = "print(small.fc1.out_features < model.fc1.out_features)"
    apart = "print(model_a.fc1.weight is model_b.fc1.weight)"
    said = law_runs(
        "\n".join([AROUND_THE_LOOP, loop, back, channels, smaller, BEFORE_SEVERAL, several, apart]), tmp_path
    )
    assert "unique non-zero values" in said
    assert said.endswith("True\nTrue\n4 of 4 ties hold\nFalse\n")


@pytest.mark.parametrize("broken", ["1 / 0", "import warnings; warnings.warn('old'); print('new')", "quiet = True"])
def test_what_does_not_run_fails_the_law(broken: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        law_runs(broken, tmp_path)
