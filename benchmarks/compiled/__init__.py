"""Compiles every Triton kernel without a GPU and reports registers, spills, loads, occupancy.

`python -m benchmarks.compiled` writes benchmarks/results/compiled/, a page per target. With --lint
it searches the code of exact mode for forbidden instructions.
"""
