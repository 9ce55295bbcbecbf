"""What one file for two networks saves that share all but their heads: bytes on disk, and bytes in memory once read."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.networks import mlp, resnet20_bare_shortcuts, transformer
from benchmarks.record import command_of, record
from tying.enforce import tie_
from tying.find.match import match
from tying.store import load, save

Network = Callable[[], tuple[nn.Module, Tensor, Tensor]]
NETWORKS: dict[str, Network] = {
    "MLP 784-300-10": mlp,
    "ResNet-20": resnet20_bare_shortcuts,
    "transformer, 6 × 384": transformer,
}
CLASSES = {"a": 10, "b": 5}


def pair(network: Network) -> dict[str, nn.Module]:
    """Two networks of one body and heads of their own, not tied."""
    built: dict[str, nn.Module] = {}
    for name, classes in CLASSES.items():
        torch.manual_seed(classes)
        model = network()[0]
        head = model[-1]  # pyright: ignore[reportIndexIssue]
        model[-1] = nn.Linear(head.in_features, classes)  # pyright: ignore[reportIndexIssue]
        built[name] = model.eval()
    return built


def in_memory(models: Mapping[str, nn.Module]) -> int:
    """The bytes of all parameters and buffers, each piece of memory once."""
    tensors = [tensor for model in models.values() for tensor in model.state_dict().values()]
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


@torch.no_grad()
def measured(network: Network, folder: Path) -> dict[str, object]:
    """Tie the bodies, save, read back; compare sizes, and the outputs bit for bit."""
    x = network()[1]
    models = pair(network)
    plan = match(models)  # the heads differ in shape: they stay apart
    tie_(models, plan)
    save(models, folder / "bundle")
    for name, model in models.items():
        save(model, folder / name)
    together = load(folder / "bundle", pair(network))
    apart = {name: load(folder / name, model) for name, model in pair(network).items()}
    from_bundle = {name: load(folder / "bundle", model, name=name) for name, model in pair(network).items()}
    for name, model in models.items():
        expected = model(x)
        assert all(torch.equal(read[name](x), expected) for read in (together, apart, from_bundle))
    files = {
        "bundle": (folder / "bundle").stat().st_size,
        "apart": sum((folder / name).stat().st_size for name in models),
    }
    memory = {"bundle": in_memory(together), "apart": in_memory(apart)}
    return {
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "ties": len(plan),
        "file_bytes": {**files, "ratio": files["bundle"] / files["apart"]},
        "memory_bytes": {**memory, "ratio": memory["bundle"] / memory["apart"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bundle.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, object] = {}
    for name, network in NETWORKS.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = found = measured(network, Path(folder))
        for what in ("file_bytes", "memory_bytes"):
            sizes = found[what]
            assert isinstance(sizes, dict)
            print(f"{name:<22} {what:<13} {sizes['bundle']:>12,} ÷ {sizes['apart']:>12,} = {sizes['ratio']:.4f}")
    record(arguments.out, command_of("bundle", arguments), {"classes": CLASSES, "networks": results})


if __name__ == "__main__":
    main()
