"""The report's figures as SVG text whose colours are CSS variables, for light and dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from churn_trainer.study import HISTOGRAM_BINS, MethodResult, StudyResult
from churn_trainer.svg import HEAT, INK, MUTED, STYLE, churn_changes, series_color, svg

_PERCENT_TICKS = (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 30, 50, 70, 100)


def changes(result: StudyResult) -> str:
    """The paired change of churn of every method, with its interval, around a line at zero."""
    compared = result.comparisons
    with mpl.rc_context(STYLE):
        figure = churn_changes([(one.method.label, one.change["churn"]) for one in compared])
        return svg(figure, "changes", "Paired change of churn per method with its interval")


def churn_matrices(result: StudyResult) -> str:
    """Churn between every two runs of the first split, one small matrix a method, one scale."""
    matrices = [100 * entry.reports[0].churn.numpy() for entry in result.results]
    runs = result.study.runs
    low, high = (
        min(m[~np.eye(runs, dtype=bool)].min() for m in matrices),
        max(map(np.max, matrices)),
    )
    edges = MaxNLocator(len(HEAT) - 1).tick_values(low, max(high, low + 0.1))
    steps = np.linspace(0, len(HEAT) - 1, len(edges) - 1).round().astype(int)
    colors = ListedColormap([HEAT[step] for step in steps])
    norm = BoundaryNorm(edges, len(steps), clip=True)
    with mpl.rc_context(STYLE):
        figure, panels, spare = _panels(len(matrices), 2.3)
        for axes, matrix, entry in zip(panels, matrices, result.results, strict=True):
            shown = np.ma.masked_array(matrix, np.eye(runs, dtype=bool))
            mesh = axes.pcolormesh(shown, cmap=colors, norm=norm, edgecolor="none")
            axes.set_aspect("equal")
            axes.invert_yaxis()
            axes.set_title(entry.method.label)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        place: dict[str, Any]
        if spare:
            place = {"cax": spare.inset_axes((0.05, 0.05, 0.09, 0.9))}
        else:
            place = {"ax": panels, "aspect": 30}
        bar = figure.colorbar(mesh, **place)
        bar.outline.set_visible(False)
        bar.set_label("churn between two runs, %", color=MUTED)
        return svg(figure, "matrices", "Churn between every two runs of the first split")


def confidence_histograms(result: StudyResult) -> str:
    """How confident the test predictions are, one panel a method, the baseline outlined in each."""
    edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    baseline = 100 * result.results[0].histogram.numpy()
    with mpl.rc_context(STYLE):
        figure, panels, spare = _panels(len(result.results), 1.9, share_axes=True)
        for index, (axes, entry) in enumerate(zip(panels, result.results, strict=True)):
            axes.stairs(
                100 * entry.histogram.numpy(),
                edges,
                fill=True,
                color=series_color(index),
                alpha=0.75,
            )
            axes.stairs(baseline, edges, color=INK, linewidth=1.2)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_title(entry.method.label)
            axes.grid(axis="y")
        if spare:
            spare.text(0, 0.72, "bars: the method\nline: the baseline", color=MUTED, fontsize=9.5)
        figure.supxlabel("confidence: largest minus second probability", color=MUTED, fontsize=9.5)
        figure.supylabel("share of predictions, %", color=MUTED, fontsize=9.5)
        return svg(figure, "confidence", "Histogram of prediction confidence per method")


def training_curves(result: StudyResult) -> str:
    """Training cross entropy, test error and test churn along the training, all methods."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        loss, error, churn = figure.subplots(1, 3)
        for index, entry in enumerate(result.results):
            curves = entry.curves
            _curve(loss, entry, index, curves.cross_entropy)
            _curve(error, entry, index, 100 * (1 - np.asarray(curves.accuracy)))
            _curve(churn, entry, index, 100 * np.asarray(curves.churn))
        loss.set_title("training cross entropy, nats")
        error.set_title("test error, %")
        churn.set_title("churn between runs, test rows, %")
        for axes in (loss, error, churn):
            axes.set_yscale("log")
            if axes is not loss:
                axes.yaxis.set_major_locator(FixedLocator(_PERCENT_TICKS))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            axes.grid(axis="y")
        return svg(figure, "curves", "Training cross entropy, test error and churn by epoch")


def _curve(axes: Axes, entry: MethodResult, index: int, values: Any) -> None:
    style = "-" if entry.method.method.members > 1 or index == 0 else (0, (4, 2))
    marker = "o" if len(values) == 1 else None
    axes.plot(
        entry.curves.epoch,
        values,
        linestyle=style,
        marker=marker,
        color=series_color(index),
        linewidth=1.8,
    )


def _panels(
    count: int, height: float, *, share_axes: bool = False
) -> tuple[Figure, Sequence[Axes], Axes | None]:
    """A grid four wide of `count` panels, and the empty cell after the last, if any."""
    columns = min(4, count + 1)
    rows = -(-count // columns)
    figure = Figure(figsize=(2.75 * columns, height * rows + 0.3), layout="constrained")
    cells = figure.subplots(
        rows, columns, sharex=share_axes, sharey=share_axes, squeeze=False
    ).ravel()
    for cell in cells[count:]:
        cell.set_axis_off()
    return figure, list(cells[:count]), cells[count] if count < len(cells) else None
