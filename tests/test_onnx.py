"""Compacted networks in ONNX: onnxruntime computes the same, and every stored tensor is there once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tying.enforce import compact
from tying.enforce.compaction.surgery import set_ways_
from tying.groups import Groups
from tying.plan import Tie, TiePlan

onnx = pytest.importorskip("onnx", reason="needs onnx, onnxscript and onnxruntime")
pytest.importorskip("onnxscript", reason="needs onnx, onnxscript and onnxruntime")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnx, onnxscript and onnxruntime")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's and onnxscript's own
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
]


class TiedHead(nn.Module):
    """The head has the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.mix = nn.Linear(12, 12)
        self.head = nn.Linear(12, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.mix(self.embed(tokens))))


def convolutions() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 9, 5),
    )  # fmt: skip
    plan = TiePlan(
        [
            Tie.of("3.weight", Groups.inputs(), [i % 4 if i % 3 else -1 for i in range(16)]),
            Tie.of("6.weight", Groups.inputs(), [i % 18 for i in range(72)]),
        ]
    )
    x = torch.randn(2, 3, 8, 8)
    return compact(model.eval(), plan, x), x


def tied_head() -> tuple[nn.Module, Tensor]:
    tokens = torch.randint(50, (2, 7))
    plan = TiePlan([Tie.of("mix.weight", Groups.inputs(), [i % 4 for i in range(12)])])
    return compact(TiedHead().eval(), plan, tokens), tokens


def exported(model: nn.Module, x: Tensor, path: Path) -> Path:
    # The exporter's optimizer would store the transpose of the head's weight beside the embedding's.
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(model, (x,), path, dynamo=True, optimize=False, dynamic_shapes=({0: batch},), verbose=False)
    return path


def law_same_outputs(path: Path, model: nn.Module, x: Tensor) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [name] = [given.name for given in session.get_inputs()]
    for given in (x, torch.cat([x, x.flip(0)])):
        [got] = session.run(None, {name: given.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(given).detach(), rtol=1e-4, atol=1e-5)


def law_one_initializer_per_tensor(path: Path, model: nn.Module) -> None:
    """Floating-point initializers are the parameters and statistics (BatchNorm may be folded), each once."""
    kept = [math.prod(i.dims) for i in onnx.load(path).graph.initializer if i.data_type == onnx.TensorProto.FLOAT]
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    assert sum(kept) <= sum(tensor.numel() for tensor in tensors)
    large = [tensor.numel() for tensor in model.parameters() if tensor.dim() > 1]
    assert sorted(size for size in kept if size in large) == sorted(large)


CASES = {
    "convolutions": (convolutions, "sum"),
    "convolutions that read as the dense ones": (convolutions, "dense"),
    "embedding and head": (tied_head, "sum"),
}


@pytest.mark.parametrize(("make", "way"), CASES.values(), ids=CASES)
def test_onnxruntime_computes_the_same_and_each_tensor_is_stored_once(make, way, tmp_path):
    torch.manual_seed(0)
    model, x = make()
    set_ways_(model, dict.fromkeys([name for name, _ in model.named_modules()], way))
    path = exported(model, x, tmp_path / "model.onnx")
    law_same_outputs(path, model, x)
    law_one_initializer_per_tensor(path, model)


def test_the_laws_fail_for_another_network_and_for_weights_stored_twice(tmp_path):
    torch.manual_seed(0)
    model, x = tied_head()
    path = exported(model, x, tmp_path / "model.onnx")
    model.head.weight = nn.Parameter(model.head.weight * 1.1)
    with pytest.raises(AssertionError):
        law_same_outputs(path, model, x)
    untied = tmp_path / "untied.onnx"
    graph = onnx.load(path)
    graph.graph.initializer.append(next(i for i in graph.graph.initializer if math.prod(i.dims) == 600))
    onnx.save(graph, untied)
    model.head.weight = model.embed.weight
    with pytest.raises(AssertionError):
        law_one_initializer_per_tensor(untied, model)
