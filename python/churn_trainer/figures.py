"""The figures of a report, each for a wide screen or paper and for a narrow screen."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from torch import Tensor

from churn_kernels._printable import excerpt
from churn_kernels.intervals import Estimate
from churn_trainer.curves import Curves
from churn_trainer.data import digits, split_rows
from churn_trainer.drawing import NARROW, Drawing, Place, add_legend, make_panels
from churn_trainer.outcomes import Comparison, Outcome, Setting, Split, baseline_of, by_setting
from churn_trainer.svg import GRID, HEAT, INK, MUTED, series_color
from churn_trainer.tables import setting_names

_PERCENT_TICKS = (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 30, 50, 70, 100)
_EXAMPLES = 8
_EXAMPLE_RUNS = 5


def make_figures(
    outcomes: Sequence[Outcome],
    comparisons: Sequence[Comparison],
    curves: Sequence[Curves],
    level: float,
) -> tuple[list[Drawing], list[str]]:
    """Every figure that the runs allow, and a sentence for each that they do not.

    Args:
        outcomes: what was measured.
        comparisons: of these, with their baselines.
        curves: of these, along their training.
        level: coverage of the intervals, in (0, 1).
    """
    names = setting_names(outcomes)
    drawn: list[Drawing] = []
    for number, (setting, methods) in enumerate(by_setting(outcomes)):
        place = Place(f"-{number}" if number else "", names[str(setting)])
        compared = [one for one in comparisons if one.outcome in methods]
        if compared:
            drawn.append(_changes(compared, place))
        paired = [one for one in methods if one.has_pair()]
        if paired:
            drawn.append(_confidence(paired, compared, place, level))
            drawn.append(_matrices(paired, place))
            drawn.append(_examples(baseline_of(paired) or paired[0], place))
        along = [one for one in curves if one.outcome in methods and len(one.epoch) > 1]
        if along:
            drawn.append(_along(along, place))
        families = _families(paired)
        if families:
            drawn.append(_ablation(families, baseline_of(paired), setting, place, level))
    made = {one.kind for one in drawn}
    return drawn, [sentence for kind, sentence in _MISSING.items() if kind not in made]


_MISSING = {
    "confidence": "Confidence and error, churn between every two runs, and examples need two runs "
    "of one method on the same split with seeds of their own.",
    "weights": "Weights of regulariser and co-distillation need runs of one method at two weights, "
    "such as --method-alpha 0.1 and 0.3, or --method-beta 1 and 3, two of each.",
    "curves": "Curves along the training need runs measured more than once, see --curve-points.",
}


def _changes(compared: list[Comparison], place: Place) -> Drawing:
    def draw(narrow: bool) -> Figure:
        size = (NARROW, 0.7 + 0.55 * len(compared)) if narrow else (8.6, 0.9 + 0.42 * len(compared))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for row, one in enumerate(compared):
            change, color = one.change["churn"], series_color(row + 1)
            axes.plot([100 * change.low, 100 * change.high], [row, row], color=color, linewidth=2.5)
            axes.plot(100 * change.mean, row, "o", color=color, markersize=8)
            if narrow:
                where = axes.get_yaxis_transform()
                axes.text(0, row - 0.3, one.outcome.label, fontsize=9, transform=where)
        axes.axvline(0, color=MUTED, linewidth=1.2)
        labels = [] if narrow else [one.outcome.label for one in compared]
        axes.set_yticks(range(len(labels)), labels)
        axes.tick_params(axis="y", colors=INK, labelsize=10)
        axes.set_ylim(len(compared) - 0.5, -0.7)
        axes.set_xlabel("change of churn, percentage points")
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        return figure

    return place.drawing(
        "changes",
        "Change of churn from the baseline",
        "Dots are means, bars their intervals. Left of the line at zero is less churn than the "
        "baseline; a bar that crosses it shows no change. A dot without a bar has too few runs.",
        draw,
    )


def _examples(one: Outcome, place: Place) -> Drawing:
    """The rows on which most runs disagree, one column a run."""
    split = max(one.splits.values(), key=lambda split: len(split.clusters()[0]))
    places = split.clusters()[0][:_EXAMPLE_RUNS]
    predictions, confidence = split.predictions[places], split.confidence[places]
    distinct = torch.tensor([len(set(column)) for column in predictions.T.tolist()])
    # Most different classes first, and of those the ones of which the runs are surest.
    score = distinct + confidence.mean(dim=0) / 2
    best = torch.argsort(score, descending=True, stable=True)[:_EXAMPLES]
    rows = best[distinct[best] > 1].tolist()
    pictures = _pictures(split, rows)
    count = max(len(rows), 1)

    def draw(narrow: bool) -> Figure:
        size = (
            (NARROW, 0.4 + 0.5 * count) if narrow else (2.4 + 1.15 * len(places), 0.7 + 0.6 * count)
        )
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for line, row in enumerate(rows):
            for run in range(len(places)):
                wrong = bool(predictions[run, row] != split.labels[row])
                color = HEAT[3] if wrong else GRID
                corner = (run - 0.46, line - 0.44)
                axes.add_patch(mpl.patches.Rectangle(corner, 0.92, 0.88, color=color))
                shown = f"{'' if narrow else 'class '}{int(predictions[run, row])}"
                text = f"{shown}\n{float(confidence[run, row]):.2f}"
                axes.text(run, line, text, ha="center", va="center", fontsize=9)
            if pictures is not None:
                _picture(axes, pictures[line], line)
        axes.set_xlim(-1.6 if pictures is not None else -0.6, len(places) - 0.4)
        axes.set_ylim(count - 0.5, -0.5)
        numbers = [f"{'' if narrow else 'run '}{number + 1}" for number in range(len(places))]
        axes.set_xticks(range(len(places)), numbers)
        if narrow:
            axes.set_xlabel("run")
        between = "\n" if narrow else ": "
        labels = [f"row {row}{between}class {int(split.labels[row])}" for row in rows]
        axes.set_yticks(range(len(rows)), labels)
        axes.tick_params(colors=INK)
        axes.spines[:].set_visible(False)
        if not rows:
            axes.text((len(places) - 1) / 2, 0, "no row on which they disagree", ha="center")
        return figure

    share = float((distinct > 1).double().mean())
    return place.drawing(
        "examples",
        f"Examples of churn, {one.label}",
        f"Rows of the test set ({split.name}) that {len(places)} trainings predict differently, "
        "with each prediction's class and confidence; blue cells are wrong. Chosen for the number "
        f"of different classes, then for confidence. {100 * share:.1f} % of the test rows are "
        "predicted differently by at least two of these trainings.",
        draw,
        "Figure 1",
    )


def _pictures(split: Split, rows: Sequence[int]) -> Tensor | None:
    """The pictures of test rows where the data set is in the package; others are not fetched."""
    run = split.runs[0]
    if run.data.name != "digits" or not rows:
        return None
    dataset = digits()
    try:
        _, test = split_rows(dataset, run.data, run.seeds.split)
    except ValueError:  # settings that nobody trained with
        return None
    if not torch.equal(dataset.labels[test], split.labels):
        return None
    return dataset.fetch(test[list(rows)])[:, 0]


def _picture(axes: Axes, picture: Tensor, line: int) -> None:
    height, width = picture.shape
    axes.pcolormesh(
        np.linspace(-1.45, -0.75, width + 1),
        np.linspace(line - 0.44, line + 0.44, height + 1),
        picture.numpy(),
        cmap=mpl.colors.ListedColormap(list(HEAT)),
        edgecolor="none",
    )


def _confidence(
    outcomes: list[Outcome], compared: list[Comparison], place: Place, level: float
) -> Drawing:
    """Distribution of the confidence, and churn against error, one colour a method."""
    changes = {id(one.outcome): one.change for one in compared}
    relative = bool(changes)

    def point(one: Outcome) -> tuple[Estimate, Estimate] | None:
        """Accuracy and churn: changes from the baseline, as these are paired, if there is one."""
        if not relative:
            return one.estimate("accuracy", level), one.estimate("churn", level)
        change = changes.get(id(one))
        return (change["accuracy"], change["churn"]) if change else None

    def draw(narrow: bool) -> Figure:
        figure, (shares, churn) = make_panels(2, narrow, 4.2)
        for index, one in enumerate(outcomes):
            color = series_color(index)
            chosen = [split.confidence[split.clusters()[0]] for split in one.splits.values()]
            values = torch.cat([values.flatten() for values in chosen])
            levels = np.linspace(0, 1, 101)
            below = np.searchsorted(np.sort(values.numpy()), levels, side="right") / len(values)
            below = np.where(below > 0, below, np.nan)  # no place on a logarithmic axis
            shares.plot(levels, 100 * below, color=color, linewidth=1.8, label=one.label)
            found = point(one)
            if found is None:
                continue
            accuracy, change = found
            churn.errorbar(
                100 * ((0 if relative else 1) - accuracy.mean),
                100 * change.mean,
                xerr=_bar(50 * (accuracy.high - accuracy.low)),
                yerr=_bar(50 * (change.high - change.low)),
                fmt="o" if one.method.members == 1 else "s",
                color=color,
                elinewidth=1,
            )
        shares.set_yscale("log")
        shares.yaxis.set_major_formatter("{x:g}")
        shares.set_xlim(0, 1)
        shares.set_xlabel("confidence: largest minus second probability")
        shares.set_ylabel("predictions of at most that, %")
        if relative:
            churn.axhline(0, color=series_color(0), linewidth=1.2)
            churn.axvline(0, color=series_color(0), linewidth=1.2)
        what = ("change of test error, points", "change of churn, points")
        churn.set_xlabel(what[0] if relative else "test error, %")
        churn.set_ylabel(what[1] if relative else "churn, %")
        for axes in (shares, churn):
            axes.grid()
        add_legend(figure, narrow)
        return figure

    against = "change of churn against that of error, from the baseline where the lines cross"
    return place.drawing(
        "confidence",
        "Confidence, and churn against error",
        "The distribution of the confidence: the lower a line, the more confident the predictions; "
        f"confident ones rarely change. And {against if relative else 'churn against error'}: "
        "lower is less churn, further left fewer errors; bars are intervals. Circles are models "
        "trained alone, squares members trained together.",
        draw,
        "Figure 3",
    )


def _bar(half: float) -> float:
    return half if half == half else 0.0


def _families(outcomes: Iterable[Outcome]) -> list[tuple[str, list[tuple[float, Outcome]]]]:
    """Methods that differ in one weight, alpha or beta, with two values of it or more."""
    families: dict[str, tuple[str, list[tuple[float, Outcome]]]] = {}
    for one in outcomes:
        method = one.method
        if bool(method.alpha) == bool(method.beta):
            continue  # none, or both at once
        weight, symbol = (method.alpha, "alpha") if method.alpha else (method.beta, "beta")
        plain = dataclasses.replace(method, alpha=0.0, beta=0.0)
        title = f"{method.name}, {symbol}"
        families.setdefault(f"{plain} {symbol}", (title, []))[1].append((weight, one))
    return [
        (title, sorted(members, key=lambda member: member[0]))
        for title, members in families.values()
        if len({weight for weight, _ in members}) > 1
    ]


def _ablation(
    families: list[tuple[str, list[tuple[float, Outcome]]]],
    baseline: Outcome | None,
    setting: Setting,
    place: Place,
    level: float,
) -> Drawing:
    """Entropy, accuracy and churn against the weight; one line of panels a method."""
    metrics = (
        ("entropy", 1, "entropy, nats"),
        ("accuracy", 100, "accuracy, %"),
        ("churn", 100, "churn, %"),
    )

    def draw(narrow: bool) -> Figure:
        figure, panels = make_panels(3, narrow, 2.8, len(families))
        for axes, (line, (metric, unit, words)) in zip(
            panels, itertools.product(range(len(families)), metrics), strict=True
        ):
            title, members = families[line]
            values = [one.estimate(metric, level) for _, one in members]
            axes.errorbar(
                [weight for weight, _ in members],
                [unit * value.mean for value in values],
                yerr=[_bar(unit * (value.high - value.low) / 2) for value in values],
                fmt="o-",
                color=series_color(line + 1),
                linewidth=1.8,
                elinewidth=1,
            )
            if baseline is not None:
                mean = unit * baseline.estimate(metric, level).mean
                axes.axhline(mean, color=series_color(0), linestyle="--", linewidth=1.4)
            axes.set_title(words)
            axes.set_xlabel(excerpt(title, 60))
            axes.xaxis.set_major_locator(MaxNLocator(6))
            axes.grid()
        return figure

    return place.drawing(
        "weights",
        "Weights of regulariser and co-distillation",
        "Each line of panels is one method, its weight to the right; bars are intervals. Dashed: "
        "the baseline, which is weight zero.",
        draw,
        "Figure 5" if setting.data.name == "cifar100" else "Figure 2",
    )


def _matrices(outcomes: list[Outcome], place: Place) -> Drawing:
    """Churn between every two runs of a split, one small matrix a method, one colour scale."""
    splits = _largest_splits(outcomes)
    shared = len({split.name for split in splits}) == 1
    matrices = [_matrix(split) for split in splits]
    low = min(np.nanmin(matrix) for matrix in matrices)
    high = max(np.nanmax(matrix) for matrix in matrices)
    edges = MaxNLocator(len(HEAT) - 1).tick_values(low, max(high, low + 0.1))
    steps = np.linspace(0, len(HEAT) - 1, len(edges) - 1).round().astype(int)

    def draw(narrow: bool) -> Figure:
        columns = min(2 if narrow else 4, len(matrices) + 1)
        lines = -(-len(matrices) // columns)
        size = (NARROW, 2.1 * lines + 0.7) if narrow else (2.6 * columns, 2.6 * lines + 0.3)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for cell in panels[len(matrices) :]:
            cell.set_axis_off()
        for axes, matrix, one, split in zip(panels, matrices, outcomes, splits, strict=False):
            cells = np.arange(len(matrix) + 1) + 0.5
            mesh = axes.pcolormesh(
                *(cells, cells, np.ma.masked_invalid(matrix)),
                cmap=ListedColormap([HEAT[step] for step in steps]),
                norm=BoundaryNorm(edges, len(steps), clip=True),
                edgecolor="none",
            )
            axes.set_aspect("equal")
            axes.invert_yaxis()
            axes.set_title(
                "\n".join([one.label] if shared else [one.label, split.name]), fontsize=9
            )
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
                axis.set_label_text("run")
            axes.spines[:].set_visible(False)
        bar = figure.colorbar(
            mesh,
            ax=panels if narrow else panels[: len(matrices)],
            location="bottom" if narrow else "right",
            aspect=30,
        )
        bar.outline.set_visible(False)
        bar.set_label("churn between two runs, %", color=MUTED)
        return figure

    where = f"of {splits[0].name}" if shared else "of the split that its title names"
    return place.drawing(
        "pairs",
        "Churn between every two runs",
        f"Rows and columns are the runs {where}, in the order of runs.csv; a cell is the share of "
        "test rows on which the two disagree. A row unlike the "
        "others is a run that went its own way.",
        draw,
    )


def _largest_splits(outcomes: list[Outcome]) -> list[Split]:
    """One split that has two runs of every method, or of each method that with most runs."""

    def count(split: Split) -> int:
        return len(split.clusters()[0])

    common = [
        [one.splits[key] for one in outcomes]
        for key in outcomes[0].splits
        if all(key in one.splits and count(one.splits[key]) > 1 for one in outcomes)
    ]
    if common:
        return max(common, key=lambda splits: sum(map(count, splits)))
    return [max(one.splits.values(), key=count) for one in outcomes]


def _matrix(split: Split) -> np.ndarray:
    """(R, R) churn in percent of the split's independent runs; NaN on the diagonal."""
    places = split.clusters()[0]
    matrix = 100 * split.report.churn[places][:, places].double()
    return matrix.fill_diagonal_(torch.nan).numpy()


def _along(curves: list[Curves], place: Place) -> Drawing:
    """Training cross entropy, test error and test churn along the training, a colour a method."""

    def draw(narrow: bool) -> Figure:
        figure, (loss, error, churn) = make_panels(3, narrow, 4.2)
        for index, one in enumerate(curves):
            style = "-" if one.outcome.method.members > 1 or index == 0 else (0, (4, 2))
            look = {"color": series_color(index), "linestyle": style, "linewidth": 1.8}
            loss.plot(one.epoch, one.cross_entropy, label=one.outcome.label, **look)
            error.plot(one.epoch, 100 * (1 - one.accuracy), **look)
            churn.plot(one.epoch, 100 * one.churn, **look)
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
        add_legend(figure, narrow)
        return figure

    return place.drawing(
        "curves",
        "Along the training",
        "Means over splits and runs, the vertical scales logarithmic. Dashed: single models other "
        "than the first.",
        draw,
    )
