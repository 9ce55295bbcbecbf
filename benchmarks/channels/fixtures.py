"""The networks of the tests, for benchmarks: made reachable, once and in one place."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = str(Path(__file__).parents[2] / "tests")
if TESTS not in sys.path:
    sys.path.append(TESTS)

from architectures import ARCHITECTURES, Architecture  # noqa: E402
from fuzzer import fuzzed  # noqa: E402
from fuzzer_steps import WIDE  # noqa: E402
from streams import Span, Stream, feels, fill, numbers, tensors_of  # noqa: E402

__all__ = [
    "ARCHITECTURES", "TESTS", "WIDE", "Architecture", "Span", "Stream", "feels", "fill", "fuzzed", "numbers",
    "tensors_of",
]  # fmt: skip
