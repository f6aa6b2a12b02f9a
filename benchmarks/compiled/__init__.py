"""What every Triton kernel compiles to, found without a GPU: registers, spills, loads, occupancy.

`python -m benchmarks.compiled` writes benchmarks/results/compiled/, one page a target. With --lint
it looks for what the code of exact mode must not hold.
"""
