"""Networks and plans of ties across layers and models, for the tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tying.groups import Groups
from tying.models import Models
from tying.plan import Member, Partition, Tie, TiePlan

WHOLE, INPUTS, OUTPUTS, FILTERS = Groups.whole(), Groups.inputs(), Groups.outputs(), Groups.filters()


class Autoencoder(nn.Module):
    def __init__(self, units: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder, self.decoder = nn.Linear(5, units), nn.Linear(units, 5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x)))


def seeded(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for layer in layers:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.reset_parameters()
    return nn.Sequential(*layers).double()


def pair() -> dict[str, nn.Module]:
    return {"a": Autoencoder(3, 1), "b": Autoencoder(3, 2)}


def tie(labels: list[int], *members: tuple[str, Groups]) -> Tie:
    return Tie(tuple(Member(*member) for member in members), Partition(labels))


CASES: dict[str, tuple[Callable[[], Models], TiePlan]] = {
    "whole, two layers": (
        lambda: seeded(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)),
        TiePlan([tie([0, 0], ("0.weight", WHOLE), ("2.weight", WHOLE))]),
    ),
    "transposed": (
        Autoencoder,
        TiePlan([tie([0, 1, 2, 0, 1, 2], ("encoder.weight", OUTPUTS), ("decoder.weight", INPUTS))]),
    ),
    "transposed, in another order": (
        Autoencoder,
        TiePlan([tie([0, 1, 2, 2, 0, 1], ("encoder.weight", OUTPUTS), ("decoder.weight", INPUTS))]),
    ),
    "groups of two layers, some pruned": (
        Autoencoder,
        TiePlan([tie([0, 0, -1, 1, -1, 0], ("encoder.weight", OUTPUTS), ("decoder.weight", INPUTS))]),
    ),
    "two models, all": (
        pair,
        TiePlan(
            [
                tie([0, 0], (f"a.{name}", WHOLE), (f"b.{name}", WHOLE))
                for name in ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
            ]
        ),
    ),
    "three models": (
        lambda: {**pair(), "c": Autoencoder(3, 3)},
        TiePlan([tie([0, 0, 0], *((f"{m}.encoder.weight", WHOLE) for m in "abc"))]),
    ),
    "two models, transposed": (
        pair,
        TiePlan([tie([0, 1, 2, 0, 1, 2], ("b.decoder.weight", INPUTS), ("a.encoder.weight", OUTPUTS))]),
    ),
    "the first units of a wider layer": (
        lambda: {"a": Autoencoder(2, 1), "b": Autoencoder(4, 2)},
        TiePlan(
            [
                tie([0, 1, 0, 1, 2, 3], ("a.encoder.weight", OUTPUTS), ("b.encoder.weight", OUTPUTS)),
                tie([0, 1, 0, 1, 2, 3], ("a.decoder.weight", INPUTS), ("b.decoder.weight", INPUTS)),
            ]
        ),
    ),
    "some units of each": (
        pair,
        TiePlan([tie([0, 1, 2, 3, 1, 4], ("a.encoder.bias", OUTPUTS), ("b.encoder.bias", OUTPUTS))]),
    ),
    "kernels of convolutions": (
        lambda: seeded(nn.Conv2d(5, 2, 1), nn.Conv2d(2, 5, 1)),
        TiePlan([tie([*range(10), *reversed(range(10))], ("0.weight", FILTERS), ("1.weight", FILTERS))]),
    ),
    "inside one weight, in two models": (
        pair,
        TiePlan([tie([0, 1, 0], ("a.encoder.weight", OUTPUTS)), tie([0, 0, 1], ("b.encoder.weight", OUTPUTS))]),
    ),
}

ENCODERS = tie([0, 0], ("a.encoder.weight", WHOLE), ("b.encoder.weight", WHOLE))
