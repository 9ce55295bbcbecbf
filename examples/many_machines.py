"""Stage one with the weights sharded over processes, and the plan at the end, which is the same for 1, 2 and 4.

Run it with plain `python`, or with `torchrun --nproc-per-node 2`. Takes seconds on a CPU.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

import tying
from tying import Groups, GrOWL

if "RANK" in os.environ:  # torchrun has set it
    dist.init_process_group("gloo")
else:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
rank, ranks = dist.get_rank(), dist.get_world_size()

digits = load_digits()
pixels, labels = torch.as_tensor(digits.data / 16).float(), torch.as_tensor(digits.target)


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))


model = build_model()
fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))  # from here on, every rank has its share of the weights
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

handle = tying.proximal(optimizer, model, {"0.weight": GrOWL(strength=2e-2)}, every="epoch")  # on every rank
for _ in range(20):
    for batch in torch.randperm(1792, generator=torch.Generator().manual_seed(0)).split(128):
        mine = batch[rank::ranks]  # as many on each rank, so that the mean of their losses is that of the batch
        optimizer.zero_grad()
        cross_entropy(model(pixels[mine]), labels[mine]).backward()
        optimizer.step()
    handle.epoch_end()  # sends 64 numbers: the squares of the norms of the pixels' weights
handle.remove()

state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    trained = build_model()
    trained.load_state_dict(state)
    plan = tying.discover(trained, {"0.weight": Groups.inputs()}, clusters=12)
    print(plan)
    for line in plan.ties[0].partition.labels.reshape(8, 8).tolist():
        print("   ", " ".join(f"{label:2}" if label >= 0 else " ·" for label in line))
dist.barrier()  # who leaves early may take the others' connections along
dist.destroy_process_group()
