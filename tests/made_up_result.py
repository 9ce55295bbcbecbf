"""Results that nothing computed, for the tests of what shows them."""

from __future__ import annotations

import numpy as np

from tying.report.data import (
    Budget,
    Epoch,
    Latency,
    Layer,
    Measures,
    Point,
    ReportData,
    Stayed,
    similarities,
)

TITLE = "digits <b>&amp; more</b>"
"""Markup in a name is text."""


def example(seed: int = 0) -> ReportData:
    """A made-up result with everything that a page can show: 8×8 inputs, tied in pairs of lines, edges pruned."""
    generator = np.random.default_rng(seed)
    labels = np.full((8, 8), -1)
    labels[1:6] = np.arange(40).reshape(5, 8) // 3
    flat = labels.flatten()
    groups = generator.normal(size=(64, 6)) * 0.1 + generator.normal(size=(64, 6))[flat]
    groups[flat < 0] *= 0.01
    matrix, matrix_labels = similarities(groups, flat)
    inputs = Layer(
        "fc1.weight",
        "inputs",
        labels=tuple(flat.tolist()),
        grid=(8, 8),
        norms=tuple(np.linalg.norm(groups, axis=1).tolist()),
        weights=tuple(np.linspace(0.016, 0.004, 64).tolist()),
        threshold=0.2,
        similarity=matrix,
        similarity_labels=matrix_labels,
        penalty="GrOWL, strength 0.004, ramp of ratio 3",
    )
    outputs = Layer("fc1.weight", "outputs", labels=tuple(k // 2 if k % 2 else -1 for k in range(40)))
    return ReportData(
        title=TITLE,
        dense=Measures(
            parameters=10_410,
            unique=10_410,
            stored_bytes=41_640,
            file_bytes=41_900,
            operations=20_000,
            latency=(Latency(1, 3e-5, 2e-5, 4e-5),),
            accuracy=0.98,
            validation=0.97,
        ),
        small=Measures(
            parameters=1_041,
            unique=1_040,
            stored_bytes=4_164,
            file_bytes=4_500,
            unique_ratio=10.0,
            stored_ratio=10.0,
            file_ratio=9.3,
            operations=2_100,
            latency=(Latency(1, 2e-5, 1e-5, 3e-5), Latency(256, 4.1e-4, 4e-4, 4.4e-4)),
            accuracy=0.975,
            validation=0.966,
        ),
        budget=Budget("max_drop", asked=0.01, got=0.004, kept=True),
        layers=(inputs, outputs),
        curve=(
            Point("dense", "dense", 10_410, 0.98),
            Point("tied", "ours", 1_041, 0.975, 0.97, 0.98),
            Point("tied", "ours", 500, 0.96, 0.95, 0.97),
            Point("pruned only", "control", 1_041, 0.93),
        ),
        history=tuple(Epoch(stage, k, 0.9 + 0.01 * k) for stage in ("dense", "stage one") for k in range(1, 6)),
        stayed=(Stayed("fc2.weight[outputs]", "an output of the model"),),
        notes=("one seed only",),
        provenance={"command": "tying compress --seed 0"},
    )


BARE = ReportData("bare", Measures(parameters=10), Measures(parameters=5))
