"""A figure that is drawn when it is asked for, for a wide screen or a narrow one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from churn_trainer.svg import STYLE, svg

NARROW = 3.9
"""Inches that a narrow screen shows with text of a legible size."""


@dataclass(frozen=True)
class Drawing:
    """A figure with its words.

    Attributes:
        kind: what it shows, in a word: "changes", "confidence", "weights", "pairs", "curves" or
            "examples".
        name: of its files, without ending: the kind, and a number for each setting after the first.
        title: what it shows, of which setting.
        caption: what is seen in it.
        paper: the figure of Bhojanapalli et al. 2021 that shows the same, or nothing.
        draw: makes it, with True for a narrow screen.
    """

    kind: str
    name: str
    title: str
    caption: str
    paper: str
    draw: Callable[[bool], Figure]

    @cached_property
    def figure(self) -> Figure:
        """For PNG and SVG files."""
        with mpl.rc_context(STYLE):
            return self.draw(False)

    @cached_property
    def page(self) -> str:
        """The same as an <svg> element in the page's colours."""
        with mpl.rc_context(STYLE):
            return svg(self.figure, self.name, self.title)

    @cached_property
    def narrow(self) -> str:
        """That for a narrow screen."""
        with mpl.rc_context(STYLE):
            return svg(self.draw(True), f"{self.name}-narrow", self.title)


@dataclass(frozen=True)
class Place:
    """Where a drawing belongs: what follows the names of its files, and its setting's name."""

    suffix: str
    setting: str

    def drawing(
        self, kind: str, title: str, caption: str, draw: Callable[[bool], Figure], paper: str = ""
    ) -> Drawing:
        """The drawing of that kind here."""
        name, title = f"{kind}{self.suffix}", f"{title}: {self.setting}"
        return Drawing(kind, name, title, caption, paper, draw)


def make_panels(count: int, narrow: bool, height: float, lines: int = 1) -> tuple[Figure, Any]:
    """`count` panels side by side in each of `lines`, or all below each other."""
    size = (NARROW, 2.9 * count * lines) if narrow else (10.5, height * lines)
    figure = Figure(figsize=size, layout="constrained")
    grid = (count * lines, 1) if narrow else (lines, count)
    return figure, figure.subplots(*grid, squeeze=False).ravel()


def add_legend(figure: Figure, narrow: bool) -> None:
    """The methods below the panels."""
    figure.legend(loc="outside lower center", ncols=1 if narrow else 3)
