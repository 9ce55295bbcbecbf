"""Ways in which the work on many machines could be wrong: a law that one of them does not break shows nothing."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from tying.penalties import GroupLasso
from tying.train import shards
from tying.train.proximal import ProximalHandle
from tying.train.sweep import Sweep


@contextmanager
def nothing_is_sent():
    with mock.patch.object(shards.dist, "all_reduce", return_value=None), unchecked():
        yield


@contextmanager
def replicas_count():
    make = shards.Message.__init__

    def broken(self, pieces):
        make(self, pieces)
        self._counts = [True] * len(pieces)

    with mock.patch.object(shards.Message, "__init__", broken), unchecked():
        yield


@contextmanager
def weights_are_gathered():
    send = shards.dist.all_reduce

    def broken(vector, group=None):
        send(torch.zeros(1000, dtype=vector.dtype), group=group)
        send(vector, group=group)

    with mock.patch.object(shards.dist, "all_reduce", broken):
        yield


@contextmanager
def unchecked():
    with mock.patch.object(shards.Message, "_check", return_value=None):
        yield


@contextmanager
def replicas_are_not_asked():
    call = shards.Message.__call__

    def broken(self, squares):
        own = zip(squares, self._counts, strict=True)
        return call(self, [part if part is None or counts else np.zeros_like(part) for part, counts in own])

    with mock.patch.object(shards.Message, "__call__", broken):
        yield


@contextmanager
def ranks_disagree():
    thresholds = GroupLasso.thresholds
    wrong = lambda self, count, step: thresholds(self, count, step) * (1 + dist.get_rank() * 1e-6)  # noqa: E731
    with mock.patch.object(GroupLasso, "thresholds", wrong):
        yield


@contextmanager
def a_message_is_sent():
    step = Sweep.step_

    def broken(self, steps):
        dist.all_reduce(torch.zeros(1))
        return step(self, steps)

    with mock.patch.object(Sweep, "step_", broken):
        yield


@contextmanager
def state_is_forgotten():
    with mock.patch.object(ProximalHandle, "load_state_dict", return_value=None):
        yield


@contextmanager
def pieces_are_cut_as_they_come():
    make = shards.Piece.__init__

    def broken(self, *args, **kwargs):
        make(self, *args, **kwargs)
        object.__setattr__(self, "positions", np.arange(len(self.positions)))

    with mock.patch.object(shards.Piece, "__init__", broken), unchecked():
        yield
