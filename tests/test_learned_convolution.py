"""How close a locally connected layer comes to a convolution by itself, and what `discover` finds in it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import tying
from tying.errors import PlanError
from tying.find.convolution import hardwired, how_close
from tying.groups import Groups
from tying.nn import LocallyConnected2d
from tying.plan import Partition, Tie, TiePlan

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def test_how_close_of_a_convolution_and_of_noise() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding=1)
    local = LocallyConnected2d.from_conv(conv, 8)
    with torch.no_grad():
        local.weight[0, :, :, 0, 0] = 100.0  # read with a padded zero: of no account
    assert how_close(local).explained == pytest.approx(1.0, abs=1e-9)
    noise = [how_close(LocallyConnected2d(2, 3, 8, 3, padding=1)) for _ in range(40)]
    assert np.mean([each.explained for each in noise]) == pytest.approx(noise[0].by_chance, rel=0.1)
    assert noise[0].kernels == 64
    assert noise[0].with_kernels == pytest.approx(1.0)
    assert "one kernel explains" in str(noise[0])


def test_discover_finds_the_kernels_of_a_locally_connected_layer() -> None:
    torch.manual_seed(0)
    one, two = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(1, 2, 3, padding=1)
    local = LocallyConnected2d.from_conv(one, 6)
    other = LocallyConnected2d.from_conv(two, 6)
    with torch.no_grad():
        local.weight[24:] = other.weight[24:]
        local.weight += 1e-3 * torch.randn_like(local.weight)
        local.weight[0] = 0.0
    plan = tying.discover(local, {"weight": Groups.positions()}, clusters=2)
    assert plan.ties[0].partition == Partition([-1] + [0] * 23 + [1] * 12)
    close = how_close(local, plan)
    assert close.kernels == 2
    assert close.largest == pytest.approx(23 / 36)
    assert close.explained < 0.9 < 0.999 < close.with_kernels
    by_share = tying.discover(local, {"weight": Groups.positions()}, distortion=0.01)
    assert by_share.ties[0].partition.classes == 2


def test_how_close_refuses_by_name() -> None:
    local = LocallyConnected2d(1, 1, 5, 3)
    with pytest.raises(PlanError, match=r"weight: expected a tie over its positions"):
        how_close(local, TiePlan())
    with pytest.raises(PlanError, match=r"fc.weight: expected 9 labels, got 3"):
        how_close(local, TiePlan([Tie.of("fc.weight", Groups.positions(), [0, 0, 0])]), name="fc")
    with torch.no_grad():
        local.weight.zero_()
    with pytest.raises(PlanError, match="weight: expected finite weights, not all zero"):
        how_close(local)


def test_a_penalty_over_positions_makes_a_convolution() -> None:
    """GrOWL and the soft tie take `Groups.positions()`; drawn with all strength, the layer is a convolution."""
    torch.manual_seed(0)
    local = LocallyConnected2d(1, 2, 6, 3)
    tying.SoftTie(hardwired(local), strength=math.inf, to="centre").prox_(local, step=1.0)
    assert how_close(local).explained == pytest.approx(1.0)
    local.to_conv(tolerance=1e-6)
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
    handle = tying.proximal(optimizer, local, {("weight", Groups.positions()): tying.GrOWL(strength=1e-2)})
    local(torch.randn(2, 1, 6, 6)).square().mean().backward()
    optimizer.step()
    handle.remove()
    for groups in (Groups.inputs(), Groups.outputs()):
        with pytest.raises(tying.errors.PenaltyError, match=r"use Groups.positions\(\)"):
            tying.proximal(optimizer, local, {("weight", groups): tying.GrOWL(strength=1e-2)})
    linear = nn.Linear(3, 3)
    with pytest.raises(tying.errors.PenaltyError, match="has no positions"):
        tying.proximal(
            torch.optim.SGD(linear.parameters(), lr=0.1), linear, {("weight", Groups.positions()): tying.GrOWL(1e-2)}
        )
