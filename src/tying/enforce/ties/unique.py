"""The unique set: every parameter once, for the optimizer, for clipping, and for what is sharded together."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from tying.errors import PlanError
from tying.models import Models, parameters_of


def unique_parameters(models: Models) -> list[nn.Parameter]:
    """Return the unique set: every parameter once, whatever the number of names, layers or models that share it.

    Hand it to the optimizer and to `torch.nn.utils.clip_grad_norm_`: of two models' `parameters()` in a row a shared
    one would be stepped, decayed and counted twice.

    Args:
        models: A model, or several by name.

    Example:
        >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> b.weight = a.weight
        >>> len(unique_parameters({"a": a, "b": b}))
        3
    """
    return list({id(p): p for p in parameters_of(models).values()}.values())


def shard_groups(model: nn.Module, blocks: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """Return which blocks `torch.distributed.fsdp.fully_shard` has to take together, as it refuses others.

    A parameter may be sharded by one group only. Blocks that share one are put into one group; a block that shares one
    with a part of the model that is in no block is left out: the call for the model itself takes both.

        for group in tying.enforce.shard_groups(model, model.blocks):
            fully_shard(group)
        fully_shard(model)

    Args:
        model: The root, before it is sharded; a `torch.nn.ModuleDict` of several models is one, too.
        blocks: Modules of the model that do not lie inside each other.

    Raises:
        PlanError: If a block is not in the model, or lies inside another.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model[2].weight = model[0].weight
        >>> [[list(model).index(module) for module in group] for group in shard_groups(model, model)]
        [[0, 2], [1]]
    """
    listed = list(blocks)
    known = {id(module) for module in model.modules()}
    inside = [{id(module) for module in block.modules()} for block in listed]
    for i, block in enumerate(listed):
        if id(block) not in known:
            raise PlanError(f"blocks: expected modules of the model, got a {type(block).__name__} that is not in it")
        if any(id(block) in modules for j, modules in enumerate(inside) if j != i):
            raise PlanError(f"blocks: expected modules beside each other, got a {type(block).__name__} inside another")
    root: object = "root"
    within = {module: i for i, modules in enumerate(inside) for module in modules}
    leader: dict[object, object] = {root: root, **{i: i for i in range(len(listed))}}

    def find(block: object) -> object:
        while leader[block] != block:
            block = leader[block]
        return block

    first: dict[int, object] = {}
    for module in model.modules():
        block: object = within.get(id(module), root)
        for parameter in module.parameters(recurse=False):
            one, other = find(first.setdefault(id(parameter), block)), find(block)
            if one != other:
                one, other = (one, other) if one == root else (other, one)
                leader[other] = one
    groups: dict[object, list[nn.Module]] = {}
    for i, block in enumerate(listed):
        groups.setdefault(find(i), []).append(block)
    groups.pop(find(root), None)
    return list(groups.values())
