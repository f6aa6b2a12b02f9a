"""The figures of docs/trainer.md that need no run: losses of two classes.

python docs/figures/draw.py
"""

from pathlib import Path

import matplotlib as mpl
import torch
from churn_trainer.svg import STYLE, series_color
from matplotlib.figure import Figure

import churn_kernels as ck

LOGIT = torch.linspace(-6, 6, 300, dtype=torch.float64)
LOGITS = torch.stack([LOGIT, torch.zeros_like(LOGIT)], dim=1)
"""(N, 2): the true class is the first, whose probability is the sigmoid of `LOGIT`."""
TARGET = torch.zeros(len(LOGIT), dtype=torch.int64)


def entropy_loss() -> Figure:
    """(1 - alpha) cross entropy + alpha entropy, by the library."""
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, alpha in enumerate((0.0, 0.1, 0.2, 0.3, 0.4)):
        loss = ck.regularized_cross_entropy(LOGITS, TARGET, alpha=alpha, reduction="none")
        look = {"color": series_color(index), "label": f"alpha = {alpha:g}"}
        left.plot(LOGIT.sigmoid(), loss, **look)
        right.plot(LOGIT, loss, **look)
    left.set_xlabel("probability of the true class")
    right.set_xlabel("logit of the true class")
    right.legend()
    return figure


def temperature_loss() -> Figure:
    """Cross entropy of the logits divided by a temperature."""
    figure = Figure(figsize=(6.4, 3.9), layout="constrained")
    axes = figure.subplots()
    for index, temperature in enumerate((1.0, 2.0, 3.0, 4.0)):
        loss = torch.nn.functional.cross_entropy(LOGITS / temperature, TARGET, reduction="none")
        axes.plot(LOGIT, loss, color=series_color(index), label=f"T = {temperature:g}")
    axes.set_xlabel("logit of the true class")
    axes.legend()
    return figure


if __name__ == "__main__":
    with mpl.rc_context(STYLE):
        for draw in (entropy_loss, temperature_loss):
            figure = draw()
            for axes in figure.axes:
                axes.set_ylabel("loss, nats")
                axes.grid()
            name = draw.__name__.replace("_", "-")
            path = Path(__file__).with_name(f"{name}.svg")
            figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")
