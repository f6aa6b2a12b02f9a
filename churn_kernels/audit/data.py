"""Audits as plain data, for JSON: the schema of `FORMAT` stays as it is."""

import json
import math
from typing import Any

from churn_kernels.audit.amplify import Amplification
from churn_kernels.audit.attribute import Attribution
from churn_kernels.audit.compare import Comparison
from churn_kernels.audit.examine import Axis, Examination
from churn_kernels.audit.log import Operation
from churn_kernels.audit.manifest import manifest_hash
from churn_kernels.audit.operators import Finding
from churn_kernels.audit.pairs import Pair
from churn_kernels.audit.replay import Replayed
from churn_kernels.intervals import Estimate, rule_of_three

FORMAT = 1


def as_json(data: dict[str, Any]) -> str:
    """JSON text in printable ASCII; numbers that are not finite become null."""
    return json.dumps(_finite(data), indent=2, allow_nan=False).replace("\x7f", "\\u007f")


def of_comparison(found: Comparison) -> dict[str, Any]:
    """What `churn-audit diff` found."""
    difference = found.difference
    return {
        "kind": "churn-audit diff",
        "format": FORMAT,
        "same": difference is None,
        "steps_compared": found.steps,
        "step": difference and difference.step,
        "first": difference and difference.first,
        "also": difference.also if difference else [],
        "same_in_step": difference.same if difference else [],
        "values": difference and difference.values and list(difference.values),
        "then": found.then and {"step": found.then.step, "first": found.then.first},
        "generators": {one.name: one.drawn for one in found.generators},
        "ran_on": {name: list(pair) for name, pair in found.settings.items()},
        "traces": [
            {
                "path": str(trace.path),
                "steps": trace.steps[-1].number,
                "damage": trace.damage,
                "manifest_hash": trace.header["manifest_hash"],
            }
            for trace in (found.a, found.b)
        ],
    }


def of_replayed(replayed: Replayed) -> dict[str, Any]:
    """What replays of the step that differs showed."""
    return {
        "step": replayed.step,
        "devices": list(replayed.devices),
        "as_recorded": replayed.as_recorded,
        **of_finding(replayed.finding),
    }


def of_finding(found: Finding) -> dict[str, Any]:
    """What replays showed: see `Finding`."""
    return {
        "verdict": found.verdict,
        "replays": found.replays,
        "bound": found.bound if found.verdict == "none" else None,
        "operations": len(found.log),
        "index": found.index,
        "outside": list(found.outside),
        "operation": found.operation and _operation(found.operation),
        "other": found.other and _operation(found.other),
        "outputs": [
            one
            and {
                "share": one.share,
                "positions": [list(place) for place in one.positions],
                "ulps": {str(least): count for least, count in one.ulps.items()},
                "largest_ulps": one.largest_ulps,
                "largest": one.largest,
            }
            for one in found.outputs
        ],
    }


def of_examination(found: Examination, target: str, status: int) -> dict[str, Any]:
    """What `churn-audit run` found.

    Args:
        target: as the command line named it.
        status: the exit status.
    """
    differing = [pair for pair in found.pairs if pair.step is not None]
    return {
        "kind": "churn-audit run",
        "format": FORMAT,
        "verdict": found.verdict,
        "exit_status": status,
        "target": target,
        "device": found.device,
        "pairs": {**_pairs(found.pairs), "parts": sorted({pair.what for pair in differing})},
        "step": found.step,
        "replays": of_finding(found.finding),
        "operators": found.operators,
        "stress": [_axis(axis) for axis in found.axes],
        "attribution": found.attribution and _attribution(found.attribution),
        "amplification": found.amplification and _amplification(found.amplification),
        "stopped": found.stopped,
        "manifest_hash": manifest_hash(found.manifest),
        "manifest": found.manifest,
    }


def _operation(one: Operation) -> dict[str, str]:
    return {
        "name": one.name,
        "module": one.module,
        "phase": one.phase,
        "source": one.source,
        "tensors": one.tensors,
    }


def _pairs(pairs: list[Pair]) -> dict[str, Any]:
    steps = [pair.step for pair in pairs if pair.step is not None]
    return {
        "count": len(pairs),
        "steps": len(pairs[0].distances) - 1,
        "differing": len(steps),
        "first_step": min(steps, default=None),
        "bound": None if steps else rule_of_three(len(pairs)),
        "distances": [pair.distances for pair in pairs],
        "churn": [pair.churn for pair in pairs],
    }


def _axis(axis: Axis) -> dict[str, Any]:
    return {
        "axis": axis.name,
        "shows": axis.shows,
        "skipped": axis.skipped,
        "finding": axis.finding and of_finding(axis.finding),
        "distance": axis.pair and axis.pair.distances[-1],
    }


def _attribution(found: Attribution) -> dict[str, Any]:
    return {
        "steps": found.steps,
        "apart": list(found.apart),
        "distance": _estimate(found.distance),
        "pairs": len(found.pairs),
        "shares": [
            {
                "suspect": share.suspect,
                "share": _estimate(share.share),
                "too_few": share.too_few,
                "certain": share.certain,
                "slowdown": found.slowdown(share),
                "pairs": len(share.pairs),
                "differing": share.differing,
                "bound": None if share.differing else share.bound,
            }
            for share in found.shares
        ],
        "skipped": found.skipped,
    }


def _amplification(found: Amplification) -> dict[str, Any]:
    return {
        "inject_at": found.inject_at,
        "absorbed": found.absorbed,
        "growth_per_step": _estimate(found.growth),
        "first_flips": found.first_flips,
        "churn_at_the_end": found.churn and _estimate(found.churn),
        **_pairs(found.pairs),
    }


def _estimate(found: Estimate) -> dict[str, float]:
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
