"""Drawings as <svg> elements whose colours are classes of the page's style."""

from collections.abc import Iterable
from html import escape as _escape

from churn_kernels._printable import printable


def escape(text: str) -> str:
    """Text as HTML and SVG hold it, with nothing in it that does not print."""
    return _escape(printable(text))


class Drawing:
    """An <svg> element in the making; everything written into it is escaped.

    Args:
        width, height: of its coordinates; the page scales it.
        description: for those who do not see it.
    """

    def __init__(self, width: float, height: float, description: str) -> None:
        self._size = width, height
        self._description = description
        self._parts: list[str] = []

    def line(self, points: Iterable[tuple[float, float]], kind: str) -> None:
        """A line through points, of a class."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(f'<polyline class="line {escape(kind)}" points="{path}"/>')

    def box(
        self, x: float, y: float, width: float, height: float, kind: str, title: str = ""
    ) -> None:
        """A filled rectangle; its title shows under the pointer."""
        self._parts.append(
            f'<rect class="{escape(kind)}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}">{f"<title>{escape(title)}</title>" if title else ""}</rect>'
        )

    def dot(self, x: float, y: float, kind: str) -> None:
        """A filled circle."""
        self._parts.append(f'<circle class="{escape(kind)}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')

    def text(self, x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> None:
        """Text at its baseline."""
        self._parts.append(
            f'<text class="{escape(kind)}" x="{x:.1f}" y="{y:.1f}" '
            f'text-anchor="{escape(anchor)}">{escape(text)}</text>'
        )

    def __str__(self) -> str:
        width, height = self._size
        return (
            f'<svg role="img" viewBox="0 0 {width:g} {height:g}" '
            f'aria-label="{escape(self._description)}">{"".join(self._parts)}</svg>'
        )
