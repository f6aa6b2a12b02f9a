"""What every Triton kernel compiles to, found without a GPU: registers, spills, loads, occupancy.

`python -m benchmarks.compiled` writes benchmarks/results/compiled/, one page a target.
"""
