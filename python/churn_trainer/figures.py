"""Figures 1, 2, 3, 5, 6 and 7 of Bhojanapalli et al. 2021, and three more, of the runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from torch import Tensor

from churn_kernels._files import printable
from churn_trainer.curves import Curves
from churn_trainer.data import digits, split_rows
from churn_trainer.outcomes import Comparison, Outcome, Split, baseline_of, by_setting
from churn_trainer.svg import GRID, HEAT, INK, MUTED, STYLE, series_color, svg
from churn_trainer.tables import setting_names

_PERCENT_TICKS = (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 30, 50, 70, 100)
_EXAMPLES = 8
_EXAMPLE_RUNS = 5


@dataclass(frozen=True)
class Drawing:
    """A figure with its words.

    Attributes:
        name: of its files, without ending.
        title: the paper's number and what it shows.
        caption: what is seen in it.
        figure: for PNG and SVG files.
        page: the same as an <svg> element in the page's colours.
    """

    name: str
    title: str
    caption: str
    figure: Figure
    page: str


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
    drawn: dict[str, list[Drawing]] = {"1": [], "2": [], "3": [], "5": [], "pairs": [], "along": []}
    changes = []
    with mpl.rc_context(STYLE):
        for number, (setting, methods) in enumerate(by_setting(outcomes)):
            place, name = f"-{number}" if number else "", names[str(setting)]
            compared = [one for one in comparisons if one.outcome in methods]
            if compared:
                changes.append(_changes(compared, f"changes{place}", name))
            paired = [one for one in methods if one.has_pair()]
            if paired:
                shown = baseline_of(paired) or paired[0]
                drawn["1"].append(_examples(shown, f"figure-1{place}", name))
                drawn["3"].append(_confidence(paired, f"figure-3{place}", name, level))
                drawn["pairs"].append(_matrices(paired, f"pairs{place}", name))
            along = [one for one in curves if one.outcome in methods and len(one.epoch) > 1]
            if along:
                drawn["along"].append(_along(along, f"curves{place}", name))
            families = _families(paired)
            if families:
                which = "5" if setting.data.name == "cifar100" else "2"
                base = baseline_of(paired)
                drawing = _ablation(families, base, which, f"figure-{which}{place}", name, level)
                drawn[which].append(drawing)
        analytic = [_entropy_loss(), _temperature_loss()]
    missing = [_MISSING[number] for number, made in drawn.items() if not made]
    return [*changes, *(one for made in drawn.values() for one in made), *analytic], missing


_MISSING = {
    "1": "Figure 1 (examples on which runs disagree) is missing: it needs two runs of one method "
    "on the same split with seeds of their own.",
    "2": "Figure 2 (regulariser and co-distillation weights) is missing: it needs runs of one "
    "method at two weights, such as --method-alpha 0.1 and 0.3, or --method-beta 1 and 3, "
    "two of each.",
    "3": "Figure 3 (confidence, and churn against error) is missing: it needs two runs of one "
    "method on the same split with seeds of their own.",
    "5": "Figure 5 (Figure 2 on CIFAR-100) is missing: it needs such runs with --data cifar100.",
    "pairs": "Churn between every two runs is missing: it needs what Figure 3 does.",
    "along": "Curves along the training are missing: they need runs measured more than once, see "
    "--curve-points.",
}


def _drawing(name: str, title: str, caption: str, figure: Figure) -> Drawing:
    return Drawing(name, title, caption, figure, svg(figure, name, title))


# From runs ----------------------------------------------------------------------------------------


def _changes(compared: list[Comparison], name: str, setting: str) -> Drawing:
    figure = Figure(figsize=(8.6, 0.9 + 0.42 * len(compared)), layout="constrained")
    axes = figure.subplots()
    for row, one in enumerate(compared):
        change, color = one.change["churn"], series_color(row + 1)
        axes.plot([100 * change.low, 100 * change.high], [row, row], color=color, linewidth=2.5)
        axes.plot(100 * change.mean, row, "o", color=color, markersize=8)
    axes.axvline(0, color=MUTED, linewidth=1.2)
    axes.set_yticks(range(len(compared)), [one.outcome.label for one in compared])
    axes.tick_params(axis="y", colors=INK, labelsize=10)
    axes.set_ylim(len(compared) - 0.5, -0.5)
    axes.set_xlabel("change of churn from the baseline, percentage points")
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    return _drawing(
        name,
        f"Change of churn: {setting}",
        "Dots are means, bars their intervals. Left of the line at zero is less churn than the "
        "baseline; a bar that crosses it shows no change. A dot without a bar has too few runs.",
        figure,
    )


def _examples(one: Outcome, name: str, setting: str) -> Drawing:
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
    figure = Figure(figsize=(2.4 + 1.15 * len(places), 0.7 + 0.6 * count), layout="constrained")
    axes = figure.subplots()
    for line, row in enumerate(rows):
        for run in range(len(places)):
            wrong = bool(predictions[run, row] != split.labels[row])
            axes.add_patch(
                mpl.patches.Rectangle(
                    (run - 0.46, line - 0.44), 0.92, 0.88, color=HEAT[3] if wrong else GRID
                )
            )
            text = f"class {int(predictions[run, row])}\n{float(confidence[run, row]):.2f}"
            axes.text(run, line, text, ha="center", va="center", fontsize=9)
        if pictures is not None:
            _picture(axes, pictures[line], line)
    axes.set_xlim(-1.6 if pictures is not None else -0.6, len(places) - 0.4)
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_xticks(range(len(places)), [f"run {number + 1}" for number in range(len(places))])
    labels = [f"test row {row}: class {int(split.labels[row])}" for row in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.tick_params(colors=INK)
    axes.spines[:].set_visible(False)
    if not rows:
        axes.text((len(places) - 1) / 2, 0, "no row on which they disagree", ha="center")
    share = float((distinct > 1).double().mean())
    return _drawing(
        name,
        f"Figure 1, examples of churn: {setting}, {one.label}",
        f"Test rows that {len(places)} trainings predict differently, with each prediction's "
        "confidence; blue cells are wrong. Chosen for the number of different classes, then for "
        f"confidence. {100 * share:.1f} % of the test rows are predicted differently by at least "
        "two of these trainings.",
        figure,
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


def _confidence(outcomes: list[Outcome], name: str, setting: str, level: float) -> Drawing:
    """Distribution of the confidence, and churn against error, one colour a method."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    shares, churn = figure.subplots(1, 2)
    for index, one in enumerate(outcomes):
        color = series_color(index)
        values = torch.cat([s.confidence[s.clusters()[0]].flatten() for s in one.splits.values()])
        levels = np.linspace(0, 1, 101)
        below = np.searchsorted(np.sort(values.numpy()), levels, side="right") / len(values)
        shares.plot(levels, 100 * below, color=color, linewidth=1.8)
        error, change = one.estimate("accuracy", level), one.estimate("churn", level)
        style = "o" if one.method.members == 1 else "s"
        churn.errorbar(
            100 * (1 - error.mean),
            100 * change.mean,
            xerr=_bar(50 * (error.high - error.low)),
            yerr=_bar(50 * (change.high - change.low)),
            fmt=style,
            color=color,
            elinewidth=1,
            label=one.label,
        )
    shares.set_xlabel("confidence: largest minus second probability")
    shares.set_ylabel("predictions of at most that confidence, %")
    shares.set_ylim(bottom=0)
    churn.set_xlabel("test error, %")
    churn.set_ylabel("churn, %")
    churn.set_ylim(bottom=0)
    for axes in (shares, churn):
        axes.grid()
    figure.legend(loc="outside lower center", ncols=3)
    return _drawing(
        name,
        f"Figure 3, confidence, and churn against error: {setting}",
        "Left: the lower a line, the more confident the predictions; confident ones rarely change. "
        "Right: lower is less churn, further left fewer errors; bars are intervals. Circles are "
        "models trained alone, squares members trained together.",
        figure,
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
    which: str,
    name: str,
    setting: str,
    level: float,
) -> Drawing:
    """Entropy, accuracy and churn against the weight; one line of panels a method."""
    size = (10.5, 0.4 + 2.6 * len(families))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(families), 3, squeeze=False)
    metrics = (
        ("entropy", 1, "entropy, nats"),
        ("accuracy", 100, "accuracy, %"),
        ("churn", 100, "churn, %"),
    )
    for line, (title, members) in enumerate(families):
        for axes, (metric, unit, words) in zip(panels[line], metrics, strict=True):
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
            axes.set_xlabel(printable(title, 60))
            axes.xaxis.set_major_locator(MaxNLocator(6))
            axes.grid()
    return _drawing(
        name,
        f"Figure {which}, weights of regulariser and co-distillation: {setting}",
        "Each line of panels is one method, its weight to the right; bars are intervals. Dashed: "
        "the baseline, which is weight zero.",
        figure,
    )


def _matrices(outcomes: list[Outcome], name: str, setting: str) -> Drawing:
    """Churn between every two runs of a split, one small matrix a method, one colour scale."""
    matrices = [_matrix(one) for one in outcomes]
    low = min(np.nanmin(matrix) for matrix in matrices)
    high = max(np.nanmax(matrix) for matrix in matrices)
    edges = MaxNLocator(len(HEAT) - 1).tick_values(low, max(high, low + 0.1))
    steps = np.linspace(0, len(HEAT) - 1, len(edges) - 1).round().astype(int)
    columns = min(4, len(matrices) + 1)
    lines = -(-len(matrices) // columns)
    figure = Figure(figsize=(2.75 * columns, 2.3 * lines + 0.3), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for cell in panels[len(matrices) :]:
        cell.set_axis_off()
    for axes, matrix, one in zip(panels, matrices, outcomes, strict=False):
        mesh = axes.pcolormesh(
            np.ma.masked_invalid(matrix),
            cmap=ListedColormap([HEAT[step] for step in steps]),
            norm=BoundaryNorm(edges, len(steps), clip=True),
            edgecolor="none",
        )
        axes.set_aspect("equal")
        axes.invert_yaxis()
        axes.set_title(one.label)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=panels[: len(matrices)], aspect=30)
    bar.outline.set_visible(False)
    bar.set_label("churn between two runs, %", color=MUTED)
    return _drawing(
        name,
        f"Churn between every two runs: {setting}",
        "Rows and columns are the runs of one split, a cell the share of test rows on which the "
        "two disagree. A dark row is a run that went its own way.",
        figure,
    )


def _matrix(one: Outcome) -> np.ndarray:
    """(R, R) churn in percent of the independent runs of the largest split; NaN on the diagonal."""
    split = max(one.splits.values(), key=lambda split: len(split.clusters()[0]))
    places = split.clusters()[0]
    matrix = 100 * split.report.churn[places][:, places].double()
    return matrix.fill_diagonal_(torch.nan).numpy()


def _along(curves: list[Curves], name: str, setting: str) -> Drawing:
    """Training cross entropy, test error and test churn along the training, a colour a method."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    loss, error, churn = figure.subplots(1, 3)
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
    figure.legend(loc="outside lower center", ncols=3)
    return _drawing(
        name,
        f"Along the training: {setting}",
        "Means over splits and runs, both scales logarithmic. Dashed: single models other than the "
        "first.",
        figure,
    )


# From formulas ------------------------------------------------------------------------------------

_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4)
_TEMPERATURES = (1.0, 2.0, 3.0, 4.0)


def regularised_log_loss(probability: np.ndarray, alpha: float) -> np.ndarray:
    """(1 - alpha) (-log p) + alpha H(p), H the binary entropy in nats (Eq. 6 for two classes).

    Args:
        probability: of the true class, in (0, 1); any shape.
        alpha: weight of the entropy, in [0, 1).
    """
    entropy = -probability * np.log(probability) - (1 - probability) * np.log1p(-probability)
    return -(1 - alpha) * np.log(probability) + alpha * entropy


def _entropy_loss() -> Drawing:
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    probability, logit = np.linspace(0.005, 0.995, 300), np.linspace(-6, 6, 300)
    for index, alpha in enumerate(_WEIGHTS):
        color, label = series_color(index), f"alpha = {alpha:g}"
        left.plot(probability, regularised_log_loss(probability, alpha), color=color)
        sigmoid = 1 / (1 + np.exp(-logit))
        right.plot(logit, regularised_log_loss(sigmoid, alpha), color=color, label=label)
    left.set_xlabel("probability of the true class")
    right.set_xlabel("logit of the true class")
    for axes in (left, right):
        axes.set_ylabel("loss, nats")
        axes.grid()
    figure.legend(loc="outside lower center", ncols=len(_WEIGHTS))
    return _drawing(
        "figure-6",
        "Figure 6, the entropy-regularised loss of two classes",
        "From the formula, no run is needed: (1 - alpha) log-loss + alpha entropy. The larger "
        "alpha, the less a confident wrong prediction costs; at one half all cost log 2.",
        figure,
    )


def _temperature_loss() -> Drawing:
    figure = Figure(figsize=(6.4, 3.9), layout="constrained")
    axes, logit = figure.subplots(), np.linspace(-6, 6, 300)
    for index, temperature in enumerate(_TEMPERATURES):
        loss = np.logaddexp(0, -logit / temperature)
        axes.plot(logit, loss, color=series_color(index), label=f"T = {temperature:g}")
    axes.set_xlabel("logit of the true class")
    axes.set_ylabel("loss, nats")
    axes.grid()
    axes.legend()
    return _drawing(
        "figure-7",
        "Figure 7, the logistic loss with a temperature",
        "From the formula, no run is needed: log(1 + exp(-z / T)). A higher temperature lowers the "
        "loss of confident wrong predictions and raises that of confident right ones.",
        figure,
    )
