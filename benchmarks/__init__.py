"""Runnable benchmarks; results are kept as data under `benchmarks/results/`."""
