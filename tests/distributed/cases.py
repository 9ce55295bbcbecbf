"""Networks spread over processes in the ways PyTorch has, each beside the plain network that it equals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module


class Net(nn.Module):
    """No size of it can be halved, and the last layer is empty on all ranks but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 2)
        self.first = nn.Linear(3 * 3, 7)
        self.second = nn.Linear(7, 5)
        self.last = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.reshape(-1, 1, 2, 4)).tanh().flatten(1)
        return self.last(self.second(self.first(x).tanh()).tanh())


def plain(dtype: torch.dtype = torch.float64) -> Net:
    """A network with groups of all sizes: a penalty makes some zero within a few steps, and not all."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() > 1):
            for axis in (0, 1):
                scale = torch.linspace(0.1, 3.0, weight.shape[axis]) if weight.shape[axis] > 1 else torch.ones(1)
                weight.mul_(scale.reshape([-1 if a == axis else 1 for a in range(weight.dim())]))
    return model


X = torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = X[:, :2].sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class Spread:
    """A way to spread a network."""

    name: str
    spread: Callable[[nn.Module], tuple[nn.Module, int, int]]
    """Gives the network, which share of every batch this rank learns from, and of how many shares."""
    together: bool = True
    """Whether all ranks train one network."""


def _data_parallel(shape: tuple[int, ...]) -> Callable[[nn.Module], tuple[nn.Module, int, int]]:
    def spread(model: nn.Module) -> tuple[nn.Module, int, int]:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for child in model.children():
            fully_shard(child, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, dist.get_rank(), mesh.size()

    return spread


def _halves() -> dict[str, ParallelStyle]:
    # As plain tensors, outputs can't be divided unevenly.
    return {"first": ColwiseParallel(use_local_output=False), "second": RowwiseParallel()}


def _two_dimensional(shape: tuple[int, int]) -> Callable[[nn.Module], tuple[nn.Module, int, int]]:
    """Tensor parallelism on two layers, the others replicas along its dimension; all sharded along the other one."""

    def spread(model: nn.Module) -> tuple[nn.Module, int, int]:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], _halves())
        fully_shard(model, mesh=mesh["data"])
        return model, mesh.get_local_rank("data"), mesh["data"].size()

    return spread


def _tensor_parallel(size: int) -> Callable[[nn.Module], tuple[nn.Module, int, int]]:
    """Two layers sharded, the others plain."""

    def spread(model: nn.Module) -> tuple[nn.Module, int, int]:
        mesh: DeviceMesh = init_device_mesh("cpu", (size,))
        return parallelize_module(model, mesh, _halves()), 0, 1

    return spread


def _stages(model: nn.Module) -> tuple[nn.Module, int, int]:
    """Two groups of two ranks, of which none knows of the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "data"))["data"]
    fully_shard(model, mesh=mesh)
    return model, mesh.get_local_rank(), 2


SPREADS = {
    2: [
        Spread("fully_shard (2)", _data_parallel((2,))),
        Spread("fully_shard, replicas x shards (1, 2)", _data_parallel((1, 2))),
        Spread("fully_shard, replicas x shards (2, 1)", _data_parallel((2, 1))),
        Spread("tensor x fully_shard (1, 2)", _two_dimensional((1, 2))),
        Spread("tensor x fully_shard (2, 1)", _two_dimensional((2, 1))),
        Spread("tensor (2)", _tensor_parallel(2)),
    ],
    4: [
        Spread("fully_shard, replicas x shards (2, 2)", _data_parallel((2, 2))),
        Spread("tensor x fully_shard (2, 2)", _two_dimensional((2, 2))),
        Spread("fully_shard (2), twice", _stages, together=False),
    ],
}


def pair(spread: Spread, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, int, int]:
    """The plain network, the spread one, this rank's share of a batch and the number of shares."""
    whole = plain(dtype)
    return whole, *spread.spread(copy.deepcopy(whole))


def full(parameter: Tensor) -> Tensor:
    """The whole parameter, gathered: for the laws, never for what they judge."""
    parameter = parameter.detach()
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).clone()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, share: int = 0, shares: int = 1) -> None:
    """Steps on the full batch, of which this rank sees its share."""
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        x, y = X[share::shares].to(dtype), Y[share::shares].to(dtype)
        (model(x) - y).square().mean().backward()
        optimizer.step()
