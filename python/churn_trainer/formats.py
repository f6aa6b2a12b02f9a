"""Numbers and texts as tables and sentences show them: percent with half of the interval."""

from __future__ import annotations

from churn_kernels.intervals import Estimate

NOTHING = "\N{EN DASH}"
"""Where there is no number."""


def percent(share: float) -> str:
    """0.95 as "95 %"."""
    return f"{100 * share:g} %"


def value(number: Estimate | float) -> str:
    """A share, or an estimate's mean, in percent without the sign; a dash for NaN."""
    mean = number.mean if isinstance(number, Estimate) else number
    return f"{100 * mean:.2f}" if mean == mean else NOTHING


def signed(number: Estimate) -> str:
    """The mean of a change in percentage points, with its sign; a dash for NaN."""
    mean = number.mean
    return f"{100 * mean:+.2f}".replace("-", "\N{MINUS SIGN}") if mean == mean else NOTHING


def half(number: Estimate) -> str:
    """Half the interval, or nothing where there is none (NaN)."""
    width = 50 * (number.high - number.low)
    return f"± {width:.2f}" if width == width else ""


def probability(number: float) -> str:
    """A p value."""
    return f"{number:.3f}" if number >= 0.001 else "< 0.001"
