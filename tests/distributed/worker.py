"""What `torchrun` starts: holds the laws on all ranks, and the broken twins to them; writes each verdict as JSON."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distributed import laws, tie_laws, twins
from distributed.cases import SPREADS, Spread


def checks(world: int, folder: Path) -> dict[str, Callable[[], None]]:
    """What is to hold on so many ranks, by name; a name that begins with "broken" is to fail."""
    spreads = {spread.name: spread for spread in SPREADS[world]}
    found: dict[str, Callable[[], None]] = {}
    for name, spread in spreads.items():
        found[f"squares: {name}"] = partial(laws.law_squares, spread)
        found[f"training: {name}"] = partial(laws.law_training, spread)
        found[f"messages: {name}"] = partial(laws.law_messages, spread)
        if spread.together:
            found[f"refusal: {name}"] = partial(laws.law_refusal, spread)
    if world > 2:
        return found
    for name in (
        "fully_shard (2)",
        "fully_shard, replicas x shards (2, 1)",
        "tensor x fully_shard (1, 2)",
        "tensor (2)",
    ):
        spread = spreads[name]
        found[f"joined: {name}"] = partial(laws.law_training, spread, laws.JOINED)
        found[f"frozen: {name}"] = partial(laws.law_frozen, spread)
        found[f"bits of float32: {name}"] = partial(laws.law_bits, spread, torch.float32)
        found[f"bits of bfloat16: {name}"] = partial(laws.law_bits, spread, torch.bfloat16)
        found[f"plan: {name}"] = partial(laws.law_plan, spread)
    found["state"] = partial(laws.law_state, spreads["fully_shard (2)"], folder)
    found["replicas"] = laws.law_replicas
    found["shared states"] = laws.law_shared_states
    found["named"] = laws.law_named
    for name, twin, law in broken(spreads, folder):
        found[f"broken: {name}"] = partial(under, twin, law)
    found.update(tie_laws.checks(folder))
    return found


def broken(spreads: dict[str, Spread], folder: Path) -> Iterator[tuple[str, Callable[[], Any], Callable[[], None]]]:
    """Yield what is wrong, and a law that must notice."""
    shards = spreads["fully_shard (2)"]
    replicas = spreads["fully_shard, replicas x shards (2, 1)"]
    nested = spreads["tensor x fully_shard (1, 2)"]
    yield "squares, nothing is sent", twins.nothing_is_sent, partial(laws.law_squares, shards)
    yield "squares, replicas count", twins.replicas_count, partial(laws.law_squares, replicas)
    yield "squares, replicas on other meshes count", twins.replicas_count, partial(laws.law_squares, nested)
    yield "squares, weights are gathered", twins.weights_are_gathered, partial(laws.law_squares, shards)
    yield "training, nothing is sent", twins.nothing_is_sent, partial(laws.law_training, shards)
    yield "training, replicas count", twins.replicas_count, partial(laws.law_training, replicas)
    yield "training, the order is forgotten", twins.pieces_are_cut_as_they_come, partial(laws.law_training, shards)
    yield "joined, nothing is sent", twins.nothing_is_sent, partial(laws.law_training, shards, laws.JOINED)
    yield "messages, weights are gathered", twins.weights_are_gathered, partial(laws.law_messages, shards)
    yield "refusal, nothing is sent", twins.nothing_is_sent, partial(laws.law_refusal, shards)
    yield "refusal, replicas are not asked", twins.replicas_are_not_asked, partial(laws.law_refusal, replicas)
    yield "frozen, nothing is sent", twins.nothing_is_sent, partial(laws.law_frozen, shards)
    yield "bits, nothing is sent", twins.nothing_is_sent, partial(laws.law_bits, shards, torch.float32)
    yield "plan, nothing is sent", twins.nothing_is_sent, partial(laws.law_plan, shards)
    yield "state, forgotten", twins.state_is_forgotten, partial(laws.law_state, shards, folder / "broken")
    yield "replicas, ranks disagree", twins.ranks_disagree, laws.law_replicas
    yield "replicas, a message is sent", twins.a_message_is_sent, laws.law_replicas
    yield "shared states, ranks disagree", twins.ranks_disagree, laws.law_shared_states


def under(twin: Callable[[], Any], law: Callable[[], None]) -> None:
    with twin():
        law()


def verdict(check: Callable[[], None]) -> str:
    """Return what came of a check: "held", "failed: …" or "raised …"."""
    try:
        check()
    except laws.LawError as error:
        return f"failed: {error}"
    except Exception:
        traceback.print_exc()  # at once: the other ranks may wait for this one
        return f"raised {traceback.format_exc()}"
    return "held"


def main(folder: Path) -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")  # no_dist=True
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    results: dict[str, list[str]] = {}
    for name, check in checks(dist.get_world_size(), folder).items():
        said: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(said, verdict(check))
        results[name] = said
        if dist.get_rank() == 0:  # each at once: should one hang, it is the first that is missing
            (folder / "verdicts.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
