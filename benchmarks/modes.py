"""What exact mode costs on this machine: a Markdown table of forward + backward times of a pair.

`python -m benchmarks.modes [REPEATS]`. The two modes take turns; medians.
"""

import sys
from statistics import geometric_mean, median
from time import perf_counter

import churn_kernels as ck
from benchmarks.peers import SHAPES, batch, fused, shape_name, step


def main(repeats: int = 15) -> None:
    print("| rows x classes | fast, ms | exact, ms | exact / fast |")
    print("|---|---:|---:|---:|")
    ratios = []
    for shape in SHAPES:
        run = step(fused, *batch(shape))
        times: dict[str, list[float]] = {"fast": [], "exact": []}
        for _ in range(repeats):
            for mode, found in times.items():
                with ck.reduction_mode(mode):
                    start = perf_counter()
                    run()
                    found.append(1e3 * (perf_counter() - start))
        fast, exact = map(median, times.values())
        ratios.append(exact / fast)
        print(f"| {shape_name(shape)} | {fast:.2f} | {exact:.2f} | {exact / fast:.2f} |")
    print(f"| geometric mean | | | {geometric_mean(ratios):.2f} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
