"""Benchmarks: `make bench`, or `pytest benchmarks --benchmark-only`; see docs/benchmarks.md."""
