"""How figures look: one palette, one style, and SVG text whose colours follow the page's theme."""

from __future__ import annotations

import io
import re
from typing import Any

from markupsafe import escape
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1c1f24", "#5d6570", "#dfe2e6"
SERIES = (
    *("#6b7280", "#b45309", "#be185d", "#0e7490"),
    *("#3f7d20", "#1d4ed8", "#7e22ce", "#111827"),
)
"""Colours of methods; the first is the baseline's. Past the last they begin again."""

HEAT = (
    *("#eff5fc", "#dbe8f7", "#bfd7f0", "#9cc1e6", "#74a7d9"),
    *("#4d8aca", "#2f6db5", "#1c5198", "#0d3670"),
)
"""Colours of a matrix, lowest first."""

PALETTE = {
    "ink": INK,
    "muted": MUTED,
    "grid": GRID,
    **{f"series-{index}": color for index, color in enumerate(SERIES)},
    **{f"heat-{index}": color for index, color in enumerate(HEAT)},
}
"""CSS variable -> its colour on a light page, which is also what PNG files have."""

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "churn",
    "text.parse_math": False,  # names of data and networks are text, whatever they hold
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def series_color(index: int) -> str:
    """The colour of the method at that place in its table."""
    return SERIES[index % len(SERIES)]


def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an <svg> element with ids of its own and colours from the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for variable, color in PALETTE.items():
        text = text.replace(color, f"var(--{variable})")
    # Several figures share a page, and ids must not clash.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    # As wide as makes its text as large as the page's.
    most = f"max-width: {97 * figure.get_figwidth():.0f}px"
    opening = f'<svg role="img" aria-label="{escape(description)}" style="{most}" '
    return re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2).replace("<svg ", opening, 1)
