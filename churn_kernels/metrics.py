"""Churn metrics, pairwise over the runs of one training recipe.

`churn_report` compares R runs on the same N examples; `expected_calibration_error` and
`prediction_confidence` are its per-run pieces. Per-row results come from one of two paths:

- Triton, one pass over the logits, in their precision but at least float32: `churn_report` of CUDA
  tensors that share a dtype and have contiguous columns.
- PyTorch, in float64 for every dtype of logits: everything else.

Sums over rows are int64 counts and float64 sums on both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from churn_kernels import _backend, _blocks, _checks, _dtensor
from churn_kernels.intervals import Estimate, jackknife_interval, leave_one_run_out, run_mean

CALIBRATION_BINS = 15
"""Equal-width bins of the expected calibration error."""

_BLOCK_ELEMENTS = 1 << 21
"""Numbers in a block's largest temporary: 16 MiB in float64, so that it stays near the cache."""


@dataclass(frozen=True, eq=False)  # == of tensors is not a bool
class ChurnReport:
    """Results of `churn_report` over R runs; float64 tensors on the runs' device.

    Entry [i, j] of an (R, R) tensor compares run i (row) with run j (column). Shares are in
    [0, 1]; SChurn may exceed 1. Fields that need labels are None without `target`.

    Attributes:
        accuracy: (R,) share of rows predicted correctly.
        confidence: (R,) mean difference of the two largest probabilities (Bhojanapalli et al.
            2021, Eq. 5).
        entropy: (R,) mean entropy of the prediction in nats, over the `top_k` largest
            probabilities if `top_k` is given.
        ece: (R,) expected calibration error, see `expected_calibration_error`.
        churn: (R, R) share of rows where the predicted classes differ (Eq. 3). Symmetric, 0 on the
            diagonal, at most the sum of the two error rates (Lemma 1).
        schurn: (R, R) 1/2 mean_n sum_c |(p_i / max p_i)^a - (p_j / max p_j)^a| (Eq. 4). Symmetric.
        churn_correct: (R, R) churn among the rows that run i predicts correctly; NaN if it has
            none.
        churn_incorrect: (R, R) churn among the rows that run i predicts incorrectly; NaN if it has
            none.
        negative_flips: (R, R) share of rows that run i predicts correctly and run j does not.
        certified_agreement: (R, R) share of rows where ||p_i - p_j||_1 < confidence_i +
            confidence_j, which rules disagreement out (Lemma 2). Symmetric, at most 1 - churn.
        rows: N.
    """

    accuracy: Tensor | None
    confidence: Tensor
    entropy: Tensor
    ece: Tensor | None
    churn: Tensor
    schurn: Tensor
    churn_correct: Tensor | None
    churn_incorrect: Tensor | None
    negative_flips: Tensor | None
    certified_agreement: Tensor
    rows: int

    def metrics(self) -> dict[str, Tensor]:
        """The measured tensors by name, in the order of the attributes, without None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def summary(self, level: float = 0.95) -> dict[str, Estimate]:
        """Each metric's mean over the runs, or over the ordered pairs i != j, with an interval.

        Pairs share runs, so the spread over pairs is not a standard error. The interval is a
        delete-one-run jackknife: se^2 = (R - 1)/R sum_r (m_(r) - mean m_(.))^2, m_(r) the mean
        without run r, times Student's t quantile with R - 1 degrees of freedom. Pairs without a
        value (NaN) are ignored. With two runs, a pairwise metric has a mean and a NaN interval.

        Args:
            level: the interval's coverage, in (0, 1).
        Returns: name -> Estimate, for every metric that is not None.
        Raises: ValueError if `level` is out of range.
        """
        return {
            name: jackknife_interval(run_mean(value), leave_one_run_out(value), level)
            for name, value in self.metrics().items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Nested lists under the attributes' names, ready for `json.dumps`; NaN becomes None."""
        values: dict[str, Any] = {
            name: _plain(value.tolist()) for name, value in self.metrics().items()
        }
        return {field.name: values.get(field.name) for field in fields(self)} | {"rows": self.rows}


@torch.no_grad()
def churn_report(
    runs: Iterable[Tensor] | Tensor,
    target: Tensor | None = None,
    *,
    schurn_alpha: float = 1.0,
    top_k: int | None = None,
    block_rows: int | None = None,
) -> ChurnReport:
    """Churn and its companions for every pair of R runs (Bhojanapalli et al. 2021, Sections 2, 4).

    Reads each run once, in blocks of rows: besides the logits only one block of the R softmaxes is
    in memory. On a GPU a Triton kernel computes each row's metrics directly from the logits, with
    no softmax in memory, in float32 unless they are float64. The means then have rounding errors of
    about 1e-6 relative, and a row may cross an edge of a calibration bin or of
    `certified_agreement`; the other counts equal those of the PyTorch path, which takes CPU
    tensors, runs of different dtypes and non-contiguous columns, in float64. A class at -inf has
    probability 0. The predicted class is that of the largest logit, ties broken by the lowest
    index.

    Args:
        runs: R >= 2 logit tensors (N, C) of one shape and device, or one (R, N, C) tensor; any
            floating dtype, dtypes may differ between runs. N >= 1 and C >= 1. In tensors (..., C)
            every (C,) is a row. DTensors, sharded by rows or replicated, need a DTensor target; the
            report covers all rows, in plain tensors, on every rank.
        target: (N,) or (...) int64 labels in [0, C) on the runs' device, or None: accuracy,
            ece, churn_correct, churn_incorrect and negative_flips are then None.
        schurn_alpha: exponent a > 0 of SChurn. As a grows, SChurn tends to churn.
        top_k: entropy of each row's `top_k` largest probabilities, renormalised to sum to 1
            (1 <= top_k <= C); None: of the whole softmax. The choice among equal probabilities
            does not affect the result.
        block_rows: rows per block; None: as many as keep a block near 16 MiB. Affects memory and
            the last bits of the floating-point means, but no count.
    Returns: a `ChurnReport`.
    Gradient: none; the metrics are detached.
    Raises: TypeError for arguments of the wrong kind or dtype; ValueError for shapes, devices or
        ranges, and for a row without probabilities (NaN, +inf, or -inf throughout); IndexError for
        a label out of range.
    """
    _reject_shards("churn_report")
    logits, batch = _checked_runs(runs)
    rows, classes = logits[0].shape[:-1].numel(), logits[0].shape[-1]
    if target is not None:
        target = _checks.target(target, logits[0], batch)
    named = [(f"runs[{index}]", run) for index, run in enumerate(logits)]
    logits, target, row_group = _dtensor.local_rows(named, batch, target)
    alpha = _checks.number("schurn_alpha", schurn_alpha)
    if alpha <= 0:
        raise ValueError(
            f"schurn_alpha must be > 0, got {alpha}; 1 is the value of the paper's tables"
        )
    k = _checks.option("top_k", top_k) or 0
    _checks.top_k_fits(k, classes)
    fused = _can_fuse(logits)
    here = logits[0].shape[0]
    block = _block_rows(block_rows, len(logits), max(k, CALIBRATION_BINS) if fused else classes)

    totals = _Totals(len(logits), logits[0].device)
    with row_group.agreement(logits[0].device):
        if target is not None:
            _check_classes(target, classes)
        for start in range(0, here, block):
            part = [run[start : start + block] for run in logits]  # R x (B, C)
            results = _fused_results(part, alpha) if fused else _row_results(part, alpha)
            _check_rows("runs[{run}]", results.probability, start)
            if k:
                entropy = torch.stack([_top_k_entropy(z, k) for z in part])
                results = results._replace(entropy=entropy)
            totals.add(results, None if target is None else target[start : start + block])
    totals.add_up(row_group.total)
    return totals.report(rows, labelled=target is not None)


@torch.no_grad()
def prediction_confidence(logits: Tensor) -> Tensor:
    """Difference of the two largest softmax probabilities (Bhojanapalli et al. 2021, Eq. 5).

    Args:
        logits: (..., C), C >= 1, floating dtype.
    Returns: float64 (...) in [0, 1]; with a single class, the second probability is 0.
    Gradient: none.
    Raises: ValueError if there is no class; TypeError for a sparse or nested tensor.
    """
    _reject_shards("prediction_confidence")
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"logits must be a tensor, got {type(logits).__name__}; pass torch.tensor(logits)"
        )
    _checks.dense("logits", logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(
            f"logits must have shape (..., C) with C >= 1, got {tuple(logits.shape)}; "
            "pass one logit per class in the last dimension"
        )
    return _dtensor.map_rows(
        "logits", logits, lambda z: _confidence(torch.softmax(z.to(torch.float64), dim=-1))
    )


@torch.no_grad()
def expected_calibration_error(
    logits: Tensor, target: Tensor, *, bins: int = CALIBRATION_BINS
) -> Tensor:
    """Expected calibration error: sum over bins of (rows / N) |accuracy - mean probability|.

    Rows fall into `bins` equal-width bins [b/bins, (b+1)/bins) of the predicted class's
    probability, the last one closed (Guo et al. 2017).

    Args:
        logits: (N, C) or (..., C) of one run, N >= 1, floating dtype.
        target: (N,) or (...) int64 labels in [0, C), on the logits' device.
        bins: number of bins, at least 1.
    Returns: float64 scalar in [0, 1].
    Gradient: none.
    Raises: TypeError, ValueError and IndexError as `churn_report`.
    """
    _reject_shards("expected_calibration_error")
    if _checks.integer("bins", bins) < 1:
        raise ValueError(f"bins must be at least 1, got {bins}; {CALIBRATION_BINS} is customary")
    _check_run("logits", logits, logits)
    classes = logits.shape[-1]
    rows, batch = _checks.rows(logits)
    target = _checks.target(target, rows[0], batch)
    (logits,), target, row_group = _dtensor.local_rows([("logits", rows[0])], batch, target)
    with row_group.agreement(logits.device):
        _check_classes(target, classes)
        probability, predicted = torch.softmax(logits.to(torch.float64), dim=-1).max(dim=-1)
        _check_rows("logits", probability[None], 0)
    sums = _calibration_sums_in_blocks(probability, predicted == target, bins)
    return _calibration_error(*map(row_group.total, sums))[0]


class _RowResults(NamedTuple):
    """Per-row inputs of the metrics, for a block of rows."""

    predicted: Tensor  # (R, B) int64
    probability: Tensor  # (R, B) of the predicted class; not finite if the row has no softmax
    confidence: Tensor  # (R, B)
    entropy: Tensor  # (R, B)
    distance: Tensor  # (R, R, B): sum over the classes of |p_i - p_j|
    scaled_distance: Tensor  # (R, R, B): the same of (p / max p)^a


def _reject_shards(function: str) -> None:
    if _blocks.choices().class_exchange is not None:
        raise ValueError(
            f"{function} takes whole rows, got a class_parallel block; call it outside the block"
        )


def _can_fuse(logits: list[Tensor]) -> bool:
    """Whether the Triton kernel takes these runs."""
    first = logits[0]
    return _backend.uses_triton(first) and all(
        run.dtype == first.dtype and (run.stride(1) == 1 or run.shape[1] == 1) for run in logits
    )


def _fused_results(logits: list[Tensor], schurn_alpha: float) -> _RowResults:
    """Row results of R runs (B, C) from one kernel."""
    kernel = import_module("churn_kernels.triton.report")
    return _RowResults(*kernel.row_results(logits, schurn_alpha))


def _row_results(logits: list[Tensor], schurn_alpha: float) -> _RowResults:
    """Row results of R runs (B, C), in float64."""
    stacked = torch.stack([run.to(torch.float64) for run in logits])  # (R, B, C)
    largest, predicted = stacked.max(dim=-1, keepdim=True)  # (R, B, 1)
    probabilities = torch.softmax(stacked, dim=-1)  # (R, B, C)
    scaled = torch.exp(schurn_alpha * (stacked - largest))
    return _RowResults(
        predicted.squeeze(-1),
        probabilities.amax(dim=-1),
        _confidence(probabilities),
        _entropy(probabilities),
        _pairwise_l1(probabilities),
        _pairwise_l1(scaled),
    )


class _Totals:
    """Sums over the rows seen so far: int64 counts and float64 sums, per run and per pair."""

    def __init__(self, runs: int, device: torch.device):
        def counts(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        def sums(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.right = counts(runs)
        self.differ = counts(runs, runs)
        self.right_differ = counts(runs, runs)
        self.flips = counts(runs, runs)
        self.certified = counts(runs, runs)
        self.confidence = sums(runs)
        self.entropy = sums(runs)
        self.scaled_distance = sums(runs, runs)
        self.bin_rows = counts(runs, CALIBRATION_BINS)
        self.bin_right = counts(runs, CALIBRATION_BINS)
        self.bin_mass = sums(runs, CALIBRATION_BINS)

    def add(self, rows: _RowResults, target: Tensor | None) -> None:
        """Add a block of rows with target (B,) or None."""
        predicted, confidence = rows.predicted, rows.confidence
        self.confidence += confidence.sum(dim=1, dtype=torch.float64)
        self.entropy += rows.entropy.sum(dim=1, dtype=torch.float64)

        differ = predicted[:, None] != predicted[None, :]  # (R, R, B)
        self.differ += differ.sum(dim=-1)
        # Lemma 2 says nothing exactly at the bound, where every disagreement lies if there are two
        # classes: rounding must not certify one.
        close = rows.distance < confidence[:, None] + confidence[None, :]
        self.certified += (close & ~differ).sum(dim=-1)
        self.scaled_distance += rows.scaled_distance.sum(dim=-1, dtype=torch.float64)

        if target is None:
            return
        right = predicted == target  # (R, B)
        self.right += right.sum(dim=1)
        self.right_differ += (differ & right[:, None]).sum(dim=-1)
        self.flips += (right[:, None] & ~right[None, :]).sum(dim=-1)
        inside, hits, mass = _calibration_sums(rows.probability, right, CALIBRATION_BINS)
        self.bin_rows += inside
        self.bin_right += hits
        self.bin_mass += mass

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add the sums of other ranks' rows."""
        for name, value in vars(self).items():
            setattr(self, name, total(value))

    def report(self, rows: int, *, labelled: bool) -> ChurnReport:
        wrong = rows - self.right
        # The two triangles were summed over different strides; their mean is bitwise symmetric.
        scaled_distance = (self.scaled_distance + self.scaled_distance.T) / 2
        return ChurnReport(
            accuracy=self.right.double() / rows if labelled else None,
            confidence=self.confidence / rows,
            entropy=self.entropy / rows,
            ece=_calibration_error(self.bin_rows, self.bin_right, self.bin_mass)
            if labelled
            else None,
            churn=self.differ.double() / rows,
            schurn=scaled_distance / (2 * rows),
            churn_correct=self.right_differ.double() / self.right[:, None] if labelled else None,
            churn_incorrect=(self.differ - self.right_differ).double() / wrong[:, None]
            if labelled
            else None,
            negative_flips=self.flips.double() / rows if labelled else None,
            certified_agreement=self.certified.double() / rows,
            rows=rows,
        )


def _confidence(probabilities: Tensor) -> Tensor:
    if probabilities.shape[-1] == 1:
        return probabilities[..., 0]
    two = probabilities.topk(2, dim=-1).values
    return two[..., 0] - two[..., 1]


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(dim=-1)


def _top_k_entropy(logits: Tensor, k: int) -> Tensor:
    """(B, C) -> (B,): entropy of the k largest probabilities, renormalised."""
    return _entropy(torch.softmax(logits.topk(k, dim=-1).values.to(torch.float64), dim=-1))


def _pairwise_l1(values: Tensor) -> Tensor:
    """(R, B, C) -> (R, R, B): sum over classes of |values_i - values_j|, never (R, R, B, C)."""
    rows_first = values.transpose(0, 1).contiguous()
    return torch.cdist(rows_first, rows_first, p=1.0).permute(1, 2, 0)


def _calibration_sums(
    probability: Tensor, right: Tensor, bins: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(R, B) -> (R, bins): rows, correctly predicted rows (int64), summed probability (float64)."""
    probability = probability.to(torch.float64)
    index = (probability * bins).long().clamp_(max=bins - 1)
    inside = index[..., None] == torch.arange(bins, device=probability.device)  # (R, B, bins)
    mass = torch.where(inside, probability[..., None], 0.0).sum(dim=1)
    return inside.sum(dim=1), (inside & right[..., None]).sum(dim=1), mass


def _calibration_sums_in_blocks(probability: Tensor, right: Tensor, bins: int) -> list[Tensor]:
    """`_calibration_sums` of one run, (B,) -> (1, bins), in memory that does not grow with B."""
    block = _block_rows(None, 1, bins)
    parts = zip(probability.split(block), right.split(block), strict=True)
    sums: list[Tensor] = []
    for p, hit in parts:
        found = _calibration_sums(p[None], hit[None], bins)
        sums = list(map(torch.add, sums, found)) if sums else list(found)
    return sums


def _calibration_error(rows: Tensor, right: Tensor, mass: Tensor) -> Tensor:
    return (right - mass).abs().sum(dim=-1) / rows.sum(dim=-1)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if math.isnan(value) else value


def _block_rows(asked: int | None, runs: int, width: int) -> int:
    """Rows of a block whose largest temporary has `runs` or `width` numbers per run and row."""
    if asked is None:
        return max(1, _BLOCK_ELEMENTS // (runs * max(runs, width)))
    if _checks.integer("block_rows", asked) < 1:
        raise ValueError(f"block_rows must be at least 1, got {asked}; pass None for the default")
    return asked


def _checked_runs(runs: Iterable[Tensor] | Tensor) -> tuple[list[Tensor], torch.Size | None]:
    """The runs' logits (N, C), and the original shape of the rows, if not (N,)."""
    wanted = "runs must be a sequence of logit tensors (N, C) or one tensor (R, N, C)"
    if isinstance(runs, Tensor):
        _checks.dense("runs", runs)
        if runs.ndim != 3:
            raise ValueError(
                f"{wanted}, got a tensor of shape {tuple(runs.shape)}; "
                "stack the runs' logits with torch.stack"
            )
        logits = _dtensor.unstack("runs", runs)
    elif isinstance(runs, Iterable) and not isinstance(runs, str | bytes | dict):
        logits = list(runs)
    else:
        raise TypeError(f"{wanted}, got {type(runs).__name__}; pass a list of the runs' logits")
    if len(logits) < 2:
        raise ValueError(
            f"runs must hold at least 2 runs, got {len(logits)}; "
            "churn compares runs, so add the logits of another run"
        )
    for index, run in enumerate(logits):
        _check_run(f"runs[{index}]", run, logits[0])
    return _checks.rows(*logits)


def _check_run(name: str, run: Any, first: Any) -> None:
    _checks.one_model(name, run)
    if run.shape[:-1].numel() == 0:
        raise ValueError(
            f"{name} must have at least one row, got shape {tuple(run.shape)}; "
            "the metrics of no rows are undefined"
        )
    if run.shape != first.shape:
        raise ValueError(
            f"{name} must have the shape of the first run, {tuple(first.shape)}, got "
            f"{tuple(run.shape)}; evaluate every run on the same examples"
        )
    if run.device != first.device:
        raise ValueError(
            f"{name} must be on the first run's device, {first.device}, got {run.device}; "
            f"pass {name}.to({first.device!s})"
        )
    _checks.has_values(name, run)


def _check_classes(target: Tensor, classes: int) -> None:
    outside = (target < 0) | (target >= classes)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise _checks.TargetError(
            f"target must hold class indices in [0, {classes}), got {int(target[row])} at row "
            f"{row}; leave rows without a label out of target and of every run"
        )


def _check_rows(name: str, probability: Tensor, start: int) -> None:
    """Raise for the first row without a softmax; `name` holds {run}, probability is (R, B)."""
    bad = ~probability.isfinite()
    if bool(bad.any()):
        run, row = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name.format(run=run)} must have probabilities in every row, got NaN, +inf or only "
            f"-inf at row {start + row}; leave the row out of every run, or drop a diverged run"
        )
