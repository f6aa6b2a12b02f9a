"""Cost of exact mode on this machine: a Markdown table of forward + backward times of a pair.

`python -m benchmarks.modes [REPEATS]`. The modes alternate; medians. "In shards" is the computation
of `class_parallel` in a single process that has all classes, without communication.
"""

import sys
from contextlib import ExitStack
from statistics import geometric_mean, median
from time import perf_counter

import torch.distributed as dist

import churn_kernels as ck
from benchmarks.peers import SHAPES, batch, fused, shape_name, step

WAYS = ("fast", "exact", "in shards")


def main(repeats: int = 15) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print("| rows x classes | fast, ms | exact, ms | exact / fast | in shards, ms | / exact |")
    print("|---|---:|---:|---:|---:|---:|")
    ratios = []
    for shape in SHAPES:
        run = step(fused, *batch(shape))
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(repeats):
            for way, found in times.items():
                with ExitStack() as stack:
                    if way == "in shards":
                        stack.enter_context(ck.distributed.class_parallel())
                    else:
                        stack.enter_context(ck.reduction_mode(way))
                    start = perf_counter()
                    run()
                    found.append(1e3 * (perf_counter() - start))
        fast, exact, shards = map(median, times.values())
        ratios.append((exact / fast, shards / exact))
        print(
            f"| {shape_name(shape)} | {fast:.2f} | {exact:.2f} | {exact / fast:.2f} "
            f"| {shards:.2f} | {shards / exact:.2f} |"
        )
    of_exact, of_shards = map(geometric_mean, zip(*ratios, strict=True))
    print(f"| geometric mean | | | {of_exact:.2f} | | {of_shards:.2f} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
