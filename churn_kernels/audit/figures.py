"""The figures of an audit's page, each for a wide screen or a narrow one, in CSS pixels of it."""

import math
from itertools import groupby

from churn_kernels.audit.attribute import Share
from churn_kernels.audit.operators import Differences, Finding
from churn_kernels.audit.pairs import Pair
from churn_kernels.audit.svg import Drawing
from churn_kernels.audit.text import bucket, mean_share

WIDE, NARROW = 900, 350
LEFT, RIGHT, TOP, BOTTOM = 78, 20, 26, 40
MOST_POINTS = 600
LANES = {"forward": "forward", "backward": "backward", "": "other"}


def amplification(flipped: list[Pair], plain: list[Pair], width: int = WIDE) -> str:
    """Parameter distance against the step, of pairs with a flip and of pairs as they are."""
    drawing = Drawing(width, 340, "Distance of the parameters against the step")
    curves = [pair.distances for pair in (*flipped, *plain)]
    seen = [d for curve in curves for d in curve if 0 < d < math.inf]
    low = math.floor(math.log10(min(seen, default=1e-8)))
    high = max(math.ceil(math.log10(max(seen, default=1.0))), low + 1)
    last = max(map(len, curves)) - 1
    bottom, right = 340 - BOTTOM, width - RIGHT

    def x(step: float) -> float:
        return LEFT + step / last * (right - LEFT)

    def y(power: float) -> float:
        return bottom - (power - low) / (high - low) * (bottom - TOP)

    for power in range(low, high + 1, max(1, (high - low) // 6)):
        drawing.line([(LEFT, y(power)), (right, y(power))], "grid")
        drawing.text(LEFT - 8, y(power) + 4, f"1e{power}", "end", "muted")
    between = _round_step(last * 90 / width)
    for step in range(0, last + 1, between):
        drawing.text(x(step), bottom + 18, str(step), "middle", "muted")
    drawing.text(right, bottom + 35, "step", "end", "muted")
    drawing.text(LEFT, TOP - 12, "distance of the parameters, L2", "start", "muted")
    for pairs, kind in ((plain, "plain"), (flipped, "accent")):
        for pair in pairs:
            points = [
                (x(n), y(math.log10(d))) if 0 < d < math.inf else None for n, d in _thin(pair)
            ]
            _curve(drawing, points, kind)
    flips = [pair.first_flip for pair in flipped if pair.first_flip is not None]
    if flips:
        first = min(flips)
        drawing.line([(x(first), TOP), (x(first), bottom)], "mark")
        side = "end" if first > last / 2 else "start"
        space = -6 if side == "end" else 6
        drawing.text(x(first) + space, bottom - 10, f"first prediction flips: step {first}", side)
    return str(drawing)


def ulps(found: Differences, width: int = WIDE) -> str:
    """How many elements differ by how many units in the last place."""
    drawing = Drawing(width, 200, "Elements by the units in the last place that they differ by")
    first, last = (bound.bit_length() - 1 for bound in (min(found.ulps), max(found.ulps)))
    buckets = [1 << power for power in range(first, last + 1)]
    most, bottom = max(found.ulps.values()), 200 - BOTTOM
    column = min(90.0, (width - LEFT - RIGHT) / len(buckets))
    labelled = math.ceil(60 / column)
    for place, least in enumerate(buckets):
        count = found.ulps.get(least, 0)
        height = count / most * (bottom - TOP)
        left = LEFT + place * column
        label = bucket(least) if least < 1024 else f"2^{least.bit_length() - 1}"
        drawing.box(
            left + 3, bottom - height, column - 6, height, "accent", f"{bucket(least)} ulp: {count}"
        )
        drawing.text(left + column / 2, bottom - height - 6, str(count) if count else "", "middle")
        if place % labelled == 0:
            drawing.text(left + column / 2, bottom + 18, label, "middle", "muted")
    drawing.line([(LEFT, bottom), (LEFT + column * len(buckets), bottom)], "axis")
    drawing.text(LEFT, bottom + 35, "units in the last place", "start", "muted")
    return str(drawing)


def timeline(found: Finding, width: int = WIDE) -> str:
    """The operations of a step in their order, by phase: the same, the first, those after it."""
    drawing = Drawing(width, 196, "Operations of the step in the order of execution")
    every = max(1, math.ceil(len(found.log) / MOST_POINTS))  # operations in a column
    pitch = (width - LEFT - RIGHT) / max(1, len(found.log))
    for row, (phase, name) in enumerate(LANES.items()):
        y = TOP + 14 + 42 * row
        drawing.text(LEFT - 8, y + 20, name, "end", "muted")
        columns = enumerate(_columns(found, phase, every))
        for state, several in groupby(columns, lambda column: column[1]):
            first, *rest = (column * every for column, _ in several)
            end = min((rest or [first])[-1] + every, len(found.log))
            if state:
                title = f"operations {first + 1} to {end}, from {found.log[first].name}"
                gap = 0.6 if pitch > 2 else 0
                left, wide = LEFT + pitch * first, pitch * (end - first) - gap
                drawing.box(left, y, wide, 30, state, title)
    if found.operation:
        x = LEFT + pitch * (found.index + 0.5)
        drawing.line([(x, TOP), (x, 160)], "mark")
        side = "end" if x > width / 2 else "start"
        name = _cut(found.operation.name, max(x, width - x) - 10)
        drawing.text(x + (-6 if side == "end" else 6), TOP + 6, name, side)
    drawing.text(LEFT, 184, "1", "start", "muted")
    drawing.text(width - RIGHT, 184, f"operation {len(found.log)}", "end", "muted")
    return str(drawing)


def shares(found: list[Share], width: int = WIDE) -> str:
    """What each twin removes of the divergence, with its interval.

    Solid where the interval leaves out 0, else hollow; nothing where pairs are too few.
    """
    beside = width >= WIDE  # names beside the rows, or above them
    left, right, row = (300, width - 110, 34) if beside else (26, width - 32, 54)
    height = 46 + row * len(found)
    drawing = Drawing(width, height, "Share of the divergence that a twin of each suspect removes")
    lowest = min((one.share.low for one in found if math.isfinite(one.share.low)), default=0.0)
    low = min(0.0, max(-1.0, math.floor(lowest * 4) / 4))

    def x(share: float) -> float:
        return left + (min(1.0, max(low, share)) - low) / (1 - low) * (right - left)

    for quarter in range(round(low * 4), 5, 1 if beside else 2):
        share = quarter / 4
        drawing.line([(x(share), 8), (x(share), height - 32)], "axis" if quarter == 0 else "grid")
        drawing.text(x(share), height - 14, f"{share:.0%}", "middle", "muted")
    for place, one in enumerate(found):
        y = (26 if beside else 40) + row * place
        said = mean_share(one)
        if beside:
            drawing.text(left - 14, y + 4, _cut(one.suspect, left - 20), "end")
            drawing.text(right + 14, y + 4, said, "start")
        else:
            drawing.text(4, y - 16, f"{_cut(one.suspect, width - 130)}: {said}")
        if one.too_few:
            continue
        kind = "" if one.certain else " chance"
        if not math.isnan(one.share.low):
            drawing.line([(x(one.share.low), y), (x(one.share.high), y)], f"interval{kind}")
        if one.share.mean >= low:
            drawing.dot(x(one.share.mean), y, f"accent{kind}")
    return str(drawing)


def _cut(name: str, room: float) -> str:
    """A name, or as much of its end as fits into so many pixels."""
    most = max(8, int(room / 7.2))
    return name if len(name) <= most else f"\N{HORIZONTAL ELLIPSIS}{name[1 - most :]}"


def _curve(drawing: Drawing, points: list[tuple[float, float] | None], kind: str) -> None:
    """Lines between points, with gaps where there are none."""
    for there, part in groupby(points, lambda point: point is not None):
        if there:
            drawing.line([point for point in part if point], kind)


def _thin(pair: Pair) -> list[tuple[int, float]]:
    """Not more points than a line can show."""
    every = max(1, len(pair.distances) // MOST_POINTS)
    return [(n, pair.distances[n]) for n in range(0, len(pair.distances), every)]


def _round_step(least: float) -> int:
    """1, 2 or 5 times a power of ten, from `least` on."""
    power = 10 ** max(0, math.floor(math.log10(max(1.0, least))))
    return next(power * n for n in (1, 2, 5, 10) if power * n >= least)


def _columns(found: Finding, phase: str, every: int) -> list[str]:
    """The gravest state among every so many operations; "" where none is of the phase."""
    columns = []
    for start in range(0, len(found.log), every):
        places = range(start, min(start + every, len(found.log)))
        states = {_state(found, place) for place in places if found.log[place].phase == phase}
        columns.append(next((state for state in ("first", "after", "same") if state in states), ""))
    return columns


def _state(found: Finding, place: int) -> str:
    if place == found.index:
        return "first"
    if found.index < 0 or place < found.index or place >= len(found.other_log):
        return "same"
    return "same" if found.log[place].outputs == found.other_log[place].outputs else "after"
