"""Times a few steps in a row, as CUDA graphs if they can be captured."""

import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import NamedTuple

import torch
from torch import Tensor

Step = Callable[[], Tensor]

WARM_UP = 3
MIN_REPEATS, MAX_REPEATS = 10, 200


class Timing(NamedTuple):
    """Milliseconds per step: the median over the repeats, and the quartiles."""

    ms: float
    low: float
    high: float
    repeats: int


class Pass:
    """Every step once, in order; `run` returns what each returned."""

    graph = False

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps

    def run(self) -> list[Tensor]:
        return [step().detach() for step in self._steps]


class CapturedPass(Pass):
    """The same as one CUDA graph: replaying it costs the host one call, so kernels follow closely.

    Raises: RuntimeError if a step does what cannot be captured, such as waiting for the GPU.
    """

    graph = True

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__(steps)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):  # nothing is compiled, tuned or loaded during the capture
                super().run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._results = super().run()

    def run(self) -> list[Tensor]:
        self._graph.replay()
        return self._results


def make_pass(steps: Sequence[Step], device: str, capturable: bool) -> Pass:
    """A captured pass if possible, else a plain one."""
    if device == "cpu" or not capturable:
        return Pass(steps)
    try:
        return CapturedPass(steps)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        print(f"not captured: {str(error).splitlines()[0]}", flush=True)
        torch.cuda.synchronize()
        return Pass(steps)


def _on_host(run: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _on_device(run: Callable[[], object], repeats: int) -> list[float]:
    """Times between events. The host does not wait in between, so it stays ahead of the GPU."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def timed(run: Callable[[], object], steps: int, device: str, seconds: float) -> Timing:
    """Time `run`, a pass of `steps` steps, for about `seconds`."""
    clock = _on_host if device == "cpu" else _on_device
    estimate = median(clock(run, WARM_UP))
    repeats = round(min(MAX_REPEATS, max(MIN_REPEATS, 1e3 * seconds / max(estimate, 1e-6))))
    times = [ms / steps for ms in clock(run, repeats)]
    low, middle, high = quantiles(times, n=4)
    return Timing(middle, low, high, repeats)


def wall_time(
    run: Callable[[], object], device: str, calls: int, repeats: int = MIN_REPEATS
) -> Timing:
    """Time per call on host and device together, from batches of calls."""

    def many() -> None:
        for _ in range(calls):
            run()
        if device != "cpu":
            torch.cuda.synchronize()

    many()
    times = [ms / calls for ms in _on_host(many, repeats)]
    low, middle, high = quantiles(times, n=4)
    return Timing(middle, low, high, repeats)
