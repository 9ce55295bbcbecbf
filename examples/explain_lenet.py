"""What does the sharing in LeNet-5 save, who sees whom in it, and how far does it move along with its input?

The same as `tying explain examples/explain_lenet.py --out fields.png`: of this file, the command line takes `model` and
`example_inputs`. Runs in seconds on a CPU.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import interpolate

import tying


def model() -> nn.Module:
    """LeNet-5 with 20, 50 and 500 units, as Caffe has it."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 20, 5),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(800, 500),
            relu=nn.ReLU(),
            fc2=nn.Linear(500, 10),
        )
    )


def example_inputs() -> torch.Tensor:
    """Digits of 8 × 8 pixels, as large as those of MNIST."""
    images = torch.as_tensor(load_digits().images[:2] / 16).float()
    return interpolate(images[:, None], size=(28, 28), mode="bilinear")


if __name__ == "__main__":
    torch.manual_seed(0)
    explanation = tying.explain(model(), example_inputs())
    print(explanation)

    shared, local, dense = (getattr(explanation, way).values for way in ("shared", "local", "dense"))
    print(f"\nshared over positions, the two convolutions store {shared:,} numbers;")
    print(f"a kernel at every position would be {local / shared:.0f}×, a dense layer {dense / shared:.0f}× as many")
    try:
        print("picture:", explanation.draw(Path(tempfile.gettempdir(), "fields.png")))
    except tying.TyingError as error:  # without the extra `report` there is no matplotlib
        print("no picture:", error)
