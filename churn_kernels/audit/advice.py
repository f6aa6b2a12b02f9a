"""What to do about an audit, in sentences: which switch or flag, and what it costs."""

import math

from churn_kernels.audit.attribute import EVERYTHING, FEWEST_PAIRS, Attribution, Share
from churn_kernels.audit.blame import seen_from_here
from churn_kernels.audit.examine import Examination

SWITCHES = {
    "threads": "torch.set_num_threads(1), or OMP_NUM_THREADS=1",
    "onednn": "torch.backends.mkldnn.set_flags(False)",
    "batch": "the same batch size and the same split of the batch in every run",
    "deterministic algorithms": "torch.use_deterministic_algorithms(True)",
    "exact mode": 'churn_kernels.set_reduction_mode("exact"), or CHURN_REDUCTION_MODE=exact',
    "cudnn": "torch.backends.cudnn.deterministic = True and torch.backends.cudnn.benchmark = False",
    "cublas workspace": "CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment",
}
"""How a training takes on the twin of a suspect."""

_KEEP = {
    "threads": "the number of threads (torch.set_num_threads, OMP_NUM_THREADS)",
    "onednn": "oneDNN on or off (torch.backends.mkldnn)",
    "batch": "the batch size and its split over processes",
    "device": "the kind of device",
    "allocator": "the addresses of tensors: the operator reads memory that it should not",
    "contention": "the load of the machine: the operator's sums follow the timing of its threads",
}

GLOSSARY = {
    "replay": "The same step run again from the same state: parameters, optimizer, random states.",
    "pair": "Two runs of the training side by side, built and seeded alike. It parts in the first "
    "step after which a bit of their states differs.",
    "race": "An operator whose result depends on which thread comes first, so that equal inputs "
    "give other bits.",
    "ulp": "Unit in the last place: the step from one floating-point number to the next, the "
    "smallest difference that two numbers can have. Of a float32 near 1 it is 1.2e-7.",
    "twin": "A deterministic stand-in for a suspect: one thread, PyTorch's deterministic "
    "algorithms, or, of an operator, the outputs that it had on the other side (pinned).",
    "share": "How much of the mean squared distance of the parameters is gone with the twin. It is "
    "drawn solid where its 97 % interval leaves out 0; of suspects that cause nothing, 97 in 100 "
    "have one that holds 0.",
}
"""The words of an audit."""


def advice(found: Examination) -> list[str]:
    """What to do now, the most telling first; plain text."""
    said = [*_of_shares(found), *_of_finding(found), *_of_axes(found)]
    nothing = "Nothing has to be done: replays have the same bits, with and without stress."
    return [*(said or [nothing]), *_of_numbers(found)]


def _of_shares(found: Examination) -> list[str]:
    """The switches that make a difference for certain."""
    attribution = found.attribution
    if attribution is None:
        return []
    certain = [
        one
        for one in attribution.shares
        if one.suspect in SWITCHES and one.certain and one.share.mean > 0
    ]
    return [
        f"Set {SWITCHES[one.suspect]}: {_removes(one)}.{_cost_of(attribution, one.suspect)}"
        for one in certain
    ]


def _removes(one: Share) -> str:
    if math.isnan(one.share.low):
        return f"with it none of {len(one.pairs)} pairs parts any more"
    return f"it removes {one.share.mean:.0%} of the divergence, {one.share.low:.0%} at least"


def _cost_of(attribution: Attribution | None, suspect: str) -> str:
    """How much longer steps took with a suspect's twin."""
    for one in attribution.shares if attribution else ():
        if attribution and one.suspect == suspect and (times := attribution.slowdown(one)) > 0:
            longer = f"took {times:.2g} times as long" if times > 1.05 else "took no longer"
            return f" Steps {longer} with it here."
    return ""


def _of_finding(found: Examination) -> list[str]:
    """What to change in the training."""
    if found.operators:
        one = found.finding.operation
        place = f" (the first at {seen_from_here(one.source)})" if one and one.source else ""
        switch = "deterministic algorithms"
        return [
            f"Replace {', '.join(found.operators)}{place}. An operator of PyTorch: "
            f"{SWITCHES[switch]} takes one that repeats its bits, or raises where there is none."
            f"{_cost_of(found.attribution, switch)} A kernel of your own: give its sum a fixed "
            f"order, or take churn_kernels.exact_sum. A loss of this library: mode='run_to_run'."
        ]
    return {
        "input": [
            "Look at where the data come from: the operator is given other inputs than before, and "
            "no operator made them. Seed the loader (generator=, worker_init_fn=), try "
            "num_workers=0, and look for a generator of its own in a transform."
        ],
        "sequence": [
            "Look for a branch that depends on time, on the order of a set, or on a generator that "
            "no seed fixes: the replays call different operators at the place shown."
        ],
        "memory": [
            "Fill what torch.empty made before it is read: the operator reads memory that nothing "
            "has written, whose bits are chance."
        ],
        "unexplained": [
            "Raise --replays: the operators are hashed one by one in a replay, which takes the "
            "time from a race. It costs one logged step for each."
        ],
    }.get(found.verdict, [])


def _of_axes(found: Examination) -> list[str]:
    if found.operators:
        return []
    shown = [_KEEP.get(axis.name, axis.name) for axis in found.axes if axis.shows]
    return [f"Hold fixed between runs that are to be equal: {'; '.join(shown)}."] if shown else []


def _of_numbers(found: Examination) -> list[str]:
    """What a longer audit would tell, and what it would cost."""
    said = []
    attribution = found.attribution
    if attribution and any(one.too_few for one in attribution.shares):
        runs = 2 * attribution.steps * (len(attribution.shares) + 1)
        now, wanted = len(attribution.pairs), 8
        enough = f"--pairs {wanted}" if now < wanted else f"more than --pairs {now}"
        said.append(
            f"Run with {enough} for shares: fewer than {FEWEST_PAIRS} pairs, or pairs of which few "
            f"part, tell none.{_time_of(found, runs)}"
        )
    elif attribution and not any(
        one.certain for one in attribution.shares if one.suspect != EVERYTHING
    ):
        runs = 2 * attribution.steps * (len(attribution.shares) + 1)
        said.append(
            f"Run with --pairs {2 * len(attribution.pairs)} for narrower intervals: no suspect can "
            f"be told from chance.{_time_of(found, runs)}"
        )
    finding = found.finding
    if found.verdict == "none" and finding.bound > 0.05:
        said.append(
            f"Run with --replays 61 to see a race that shows in one of 20 steps: "
            f"{finding.replays} replays miss it too often. Each costs one logged step."
        )
    if found.amplification and found.amplification.churn and not found.amplification.first_flips:
        steps = found.amplification.steps
        said.append(
            f"Run with --amplify-steps {10 * steps} to see when a prediction flips: in "
            f"{steps} steps none did.{_time_of(found, 2 * 10 * steps, 'pair')}"
        )
    return said


def _time_of(found: Examination, runs: int, what: str = "pair of each suspect") -> str:
    """What so many steps take, by those that were run."""
    steps = sum(2 * (len(pair.distances) - 1) for pair in found.pairs)
    seconds = sum(pair.seconds for pair in found.pairs)
    if not seconds or not steps:
        return ""
    return f" A {what} takes about {_duration(runs * seconds / steps)}."


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "a second"
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
