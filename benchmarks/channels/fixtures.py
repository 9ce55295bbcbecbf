"""The networks of the tests, for benchmarks: made reachable, once and in one place."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = str(Path(__file__).parents[2] / "tests")
if TESTS not in sys.path:
    sys.path.append(TESTS)

from architectures import ARCHITECTURES, Architecture  # noqa: E402
from fuzzer import Drawn, fuzzed  # noqa: E402
from fuzzer_steps import WIDE  # noqa: E402
from streams import Span, Stream, feels, fill, kept, numbers, tensors_of  # noqa: E402

__all__ = [
    "ARCHITECTURES", "WIDE", "Architecture", "Drawn", "Span", "Stream", "feels", "fill", "fuzzed", "kept", "numbers",
    "tensors_of",
]  # fmt: skip
