"""What a study came to: a table for the terminal, CSV files, and one HTML page."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from rich.table import Table
from rich.text import Text
from torch import Tensor

import churn_kernels
from churn_kernels.intervals import Estimate
from churn_trainer import study_figures as figures
from churn_trainer.formats import half, percent, probability, signed, value
from churn_trainer.output import MARKER, replaced
from churn_trainer.study import METRICS, Comparison, StudyResult
from churn_trainer.svg import PALETTE, SERIES
from churn_trainer.terminal import estimates_table

PAGE = "report.html"

_EXPLANATIONS = {
    "accuracy": "Share of the test rows predicted right.",
    "churn": "Share of the test rows on which two runs predict different classes.",
    "SChurn": "Half the mean L1 distance of two runs' probabilities, each divided by its largest.",
    "churn correct": "Churn among the rows the first run of the pair predicts right.",
    "churn incorrect": "Churn among the rows the first run of the pair predicts wrong.",
    "confidence": "Mean difference of the two largest probabilities.",
    "ECE": "Expected calibration error: distance of probability and accuracy, over 15 bins.",
}


def write_report(result: StudyResult, target: Path, command: str) -> Path:
    """Writes the whole report, or, where anything stops it, nothing.

    Args:
        result: what to report.
        target: the report's folder; an earlier report there is replaced.
        command: the command line, recorded in the report.
    Returns: the path of the HTML page.
    """
    settings = settings_of(result, command)
    with replaced(target) as folder:
        _write_csv(folder / MARKER, ("name", "value"), settings.items())
        _write_csv(folder / "summary.csv", _SUMMARY_COLUMNS, _summary_rows(result))
        _write_csv(folder / "splits.csv", ("method", "split", *METRICS), _split_rows(result))
        _write_csv(folder / "runs.csv", _RUN_COLUMNS, _run_rows(result))
        _write_csv(folder / "pairs.csv", _PAIR_COLUMNS, _pair_rows(result))
        _write_csv(folder / "curves.csv", _CURVE_COLUMNS, _curve_rows(result))
        (folder / PAGE).write_text(render_page(result, settings), encoding="utf-8")
    return target / PAGE


def terminal_table(result: StudyResult, *, narrow: bool = False) -> Table:
    """The study's table, in percent, with intervals; `narrow` puts those on lines of their own."""
    study = result.study
    table = estimates_table(
        f"{result.dataset.title}: {study.runs} runs x {study.splits} splits, %",
        f"± half of the {percent(study.level)} interval; change paired by split and seed",
        narrow=narrow,
    )
    separator = "\n" if narrow else " "
    table.add_column("method", no_wrap=not narrow, width=15 if narrow else None)
    for name in METRICS.values():
        heading = name.replace(" ", "\n").replace("confi", "confi-\n") if narrow else name
        table.add_column(heading, justify="right")
    table.add_column("change\nof churn" if narrow else "change of churn", justify="right")
    changes = {entry.method.name: entry for entry in result.comparisons}
    for entry in result.results:
        cells = [_styled(entry.summary[name], separator) for name in METRICS]
        comparison = changes.get(entry.method.name)
        table.add_row(
            entry.method.label,
            *cells,
            _styled(comparison.change["churn"], separator, change=True) if comparison else "",
        )
    return table


def verdicts(result: StudyResult) -> list[str]:
    """One sentence for each method: what its interval allows to be said about churn."""
    return [_verdict(entry) for entry in result.comparisons] + [
        f"{message}; it is not in the table." for message in result.diverged.values()
    ]


def settings_of(result: StudyResult, command: str) -> dict[str, Any]:
    """Everything the numbers depend on, by name: settings, versions, machine, duration."""
    study, optimisation = result.study, result.study.optimisation
    build = churn_kernels.build_info()
    return {
        "command": command,
        "dataset": study.data.name,
        "train_rows": study.data.train_rows,
        "test_rows": result.test_rows,
        "runs": study.runs,
        "splits": study.splits,
        "seed": study.seed,
        "hidden": " ".join(map(str, study.model.hidden)),
        "methods": " ".join(method.name for method in study.methods),
        "epochs": optimisation.epochs,
        "batch_rows": optimisation.batch_rows,
        "learning_rate": optimisation.learning_rate,
        "momentum": optimisation.momentum,
        "clip_norm": optimisation.clip_norm,
        "level": study.level,
        "backend": os.environ.get("CHURN_BACKEND") or churn_kernels.available_backends()[0],
        "cpu_isa": build.get("cpu_isa", ""),
        "build": build.get("git_commit", ""),
        "reduction_mode": churn_kernels.get_reduction_mode(),
        **{
            package: metadata.version(package)
            for package in ("churn-kernels", "torch", "numpy", "scikit-learn")
        },
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "seconds": round(result.seconds, 1),
    }


def render_page(result: StudyResult, settings: dict[str, Any]) -> str:
    """The HTML page: one file, no external resource, no script."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("churn_trainer"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(value=value, half=half, signed=signed, probability=probability)
    changes = {entry.method.name: entry for entry in result.comparisons}
    return environment.get_template("study_report.html.j2").render(
        result=result,
        study=result.study,
        level=percent(result.study.level),
        rows=[(entry, changes.get(entry.method.name)) for entry in result.results],
        metrics=METRICS,
        explanations=_EXPLANATIONS,
        verdicts=verdicts(result),
        settings=settings,
        figures={
            name: Markup(draw(result))
            for name, draw in {
                "changes": figures.changes,
                "matrices": figures.churn_matrices,
                "confidence": figures.confidence_histograms,
                "curves": figures.training_curves,
            }.items()
            if name != "changes" or result.comparisons
        },
        series=len(SERIES),
        palette=PALETTE,
    )


def _verdict(entry: Comparison) -> str:
    change = entry.change["churn"]
    if change.high < 0:
        says = "lowers churn by"
    elif change.low > 0:
        says = "raises churn by"
    else:
        return f"{entry.method.label} shows no change of churn ({signed(change)} {half(change)})."
    return f"{entry.method.label} {says} {value(abs(change.mean))} {half(change)} points."


# Numbers ------------------------------------------------------------------------------------------


def _styled(number: Estimate, separator: str, *, change: bool = False) -> Text:
    text = Text(signed(number) if change else value(number), no_wrap=True)
    return text.append(separator).append(half(number), style="dim")


# CSV ----------------------------------------------------------------------------------------------

_SUMMARY_COLUMNS = (
    *("method", "metric", "mean", "low", "high"),
    *("change", "change_low", "change_high", "p_value", "p_holm"),
)
_RUN_METRICS = ("accuracy", "confidence", "entropy", "ece")
_PAIR_METRICS = (
    *("churn", "schurn", "churn_correct", "churn_incorrect"),
    *("negative_flips", "certified_agreement"),
)
_CURVE_METRICS = ("cross_entropy", "accuracy", "churn", "confidence")
_RUN_COLUMNS = ("method", "split", "run", *_RUN_METRICS)
_PAIR_COLUMNS = ("method", "split", "run", "other_run", *_PAIR_METRICS)
_CURVE_COLUMNS = ("method", "epoch", *_CURVE_METRICS)


def _summary_rows(result: StudyResult) -> Iterable[Sequence[Any]]:
    changes = {entry.method.name: entry for entry in result.comparisons}
    for entry in result.results:
        comparison = changes.get(entry.method.name)
        for metric in METRICS:
            row = [entry.method.name, metric, *entry.summary[metric][:3]]
            if comparison:
                row += comparison.change[metric][:3]
                if metric == "churn":
                    row += [comparison.p_value, comparison.p_holm]
            yield row + [""] * (len(_SUMMARY_COLUMNS) - len(row))


def _split_rows(result: StudyResult) -> Iterable[Sequence[Any]]:
    for entry in result.results:
        for split, report in enumerate(entry.reports):
            summary = report.summary()
            yield entry.method.name, split, *(summary[metric].mean for metric in METRICS)


def _run_rows(result: StudyResult) -> Iterable[Sequence[Any]]:
    for entry in result.results:
        for split, report in enumerate(entry.reports):
            columns = [_column(report, metric) for metric in _RUN_METRICS]
            for run, values in enumerate(zip(*columns, strict=True)):
                yield entry.method.name, split, run, *values


def _pair_rows(result: StudyResult) -> Iterable[Sequence[Any]]:
    for entry in result.results:
        for split, report in enumerate(entry.reports):
            matrices = [_column(report, metric) for metric in _PAIR_METRICS]
            for run in range(result.study.runs):
                for other in range(result.study.runs):
                    if run != other:
                        values = (matrix[run][other] for matrix in matrices)
                        yield entry.method.name, split, run, other, *values


def _curve_rows(result: StudyResult) -> Iterable[Sequence[Any]]:
    for entry in result.results:
        columns = [getattr(entry.curves, name) for name in ("epoch", *_CURVE_METRICS)]
        for values in zip(*columns, strict=True):
            yield entry.method.name, *values


def _column(report: Any, metric: str) -> list[Any]:
    values: Tensor = getattr(report, metric)
    return values.tolist()


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
