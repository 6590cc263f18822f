"""Line charts and interval charts as inline SVG, coloured by CSS variables so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 38  # margins, in SVG units (pixels at natural size)
LABEL = 18  # what the y axis's label takes above a chart
COLOURS = 8  # --c0 … --c7 of the style sheet


@dataclass(frozen=True)
class Series:
    """One line: its name, points, the interval around them (or none), and its number in the palette."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dots: bool = False


@dataclass(frozen=True)
class Interval:
    """One row of an interval chart: a value with its interval; `strong` for the row that others are compared with."""

    name: str
    value: float
    low: float
    high: float
    strong: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    span = max(high - low, 1e-12)
    magnitude = 10 ** math.floor(math.log10(span / count))
    step = min((factor * magnitude for factor in (1, 2, 5, 10)), key=lambda s: abs(span / s - count))
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Numbers 1, 2, 5, 10, … times a power of ten from the last at or below `low` to the first at or above `high`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    begin = max(place for place, at in enumerate(steps) if at <= low * (1 + 1e-9))
    end = min(place for place, at in enumerate(steps) if at >= high * (1 - 1e-9))
    return steps[begin : max(end, begin + 1) + 1]


def tick_names(places: Sequence[float]) -> list[str]:
    """Of `ticks`: with as many decimals as their distance has."""
    if len(places) < 2:
        return [number(at) for at in places]
    decimals = max(0, -math.floor(math.log10(places[1] - places[0]) + 1e-9))
    if decimals > 4:
        return [f"{at:.6g}" for at in places]
    return [f"{at:,.{decimals}f}".rstrip("0").rstrip(".") if decimals else f"{at:,.0f}" for at in places]


def number(value: float) -> str:
    """As short as it can be read: 0.25, 1200, 3e-04."""
    if value and abs(value) < 1e-3:
        return f"{value:.0e}"
    return f"{value:.3f}".rstrip("0").rstrip(".") if abs(value) < 100 else f"{value:,.0f}"


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred running mean over `window` values, fewer at the ends."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    half = window // 2
    spans = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str = "",
    y_range: tuple[float, float] | None = None,
    log: bool = False,
    x_names: Sequence[str] = (),
    references: Sequence[tuple[str, float]] = (),
    size: tuple[int, int] = (560, 300),
) -> str:
    """Lines over a common x.

    Args:
        series: at least one, with at least one point.
        title: read out by screen readers.
        x_label: below the axis.
        y_label: above the y axis.
        y_range: of the axis; default: that of the points and references.
        log: whether the y axis is logarithmic; then all y are above 0, and the axis ends at ticks.
        x_names: names of x = 0, 1, …, where x counts categories.
        references: dashed horizontal lines, as (name, y).
        size: width and height in SVG units.
    """
    width, height = size
    xs = [x for line in series for x in line.x]
    ys = [y for line in series for y in (*line.y, *line.low, *line.high)] + [at for _, at in references]
    low, high = y_range or (min(ys), max(ys) if max(ys) > min(ys) else min(ys) + 1)
    first, last = (-0.15, len(x_names) - 0.85) if x_names else (min(xs), max(*xs, min(xs) + 1))
    rows, columns = log_ticks(low, high) if log else ticks(low, high), ticks(min(xs), max(xs))
    low, high = (rows[0], rows[-1]) if log else (low, high)
    x = _scale(first, last, LEFT, width - RIGHT)
    y = (_log_scale if log else _scale)(low, high, height - BOTTOM, TOP + LABEL if y_label else TOP)
    parts = [_text("axis", 0, TOP, y_label, "start")] if y_label else []
    for at, name in zip(rows, map(number, rows) if log else tick_names(rows), strict=True):
        parts.append(_line("grid", LEFT, y(at), width - RIGHT, y(at)))
        parts.append(_text("tick", LEFT - 7, y(at) + 4, name, "end"))
    for at, name in enumerate(x_names) if x_names else zip(columns, tick_names(columns), strict=True):
        parts.append(_text("tick", x(at), height - BOTTOM + 16, name, "middle"))
    parts.append(_text("axis", (LEFT + width - RIGHT) / 2, height - 3, x_label, "middle"))
    parts += [_line("reference", LEFT, y(at), width - RIGHT, y(at)) for _, at in references]
    for line in (line for line in series if line.low):
        edge = [*zip(line.x, line.high, strict=True), *reversed(list(zip(line.x, line.low, strict=True)))]
        parts.append(f'<polygon class="band f{line.colour}" points="{_points(edge, x, y)}"/>')
    for line in series:
        points = list(zip(line.x, line.y, strict=True))
        named = f"<title>{escape(line.name)}</title>"
        parts.append(f'<polyline class="line s{line.colour}" points="{_points(points, x, y)}">{named}</polyline>')
        if line.dots or len(points) == 1:  # of one point nothing else is seen
            parts += [_dot(f"f{line.colour}", x(a), y(b), f"{line.name}: {b:.3f}") for a, b in points]
    parts += [_text("tick halo", width - RIGHT, y(at) - 5, name, "end") for name, at in references]
    return _svg(title, width, height, parts)


def interval_chart(
    rows: Sequence[Interval],
    *,
    title: str,
    x_label: str,
    chance: float | None,
    margin: float,
    colour: int,
    most: float | None = 1.0,
    size: tuple[int, int] = (420, 0),
) -> str:
    """Values with their intervals on one axis from 0.

    Args:
        rows: at least one.
        title: read out by screen readers.
        x_label: below the axis.
        chance: a dashed line, if any; shaded: `margin` around it.
        margin: see there.
        colour: of the strong row.
        most: end of the axis; None: the largest value.
        size: width and height in SVG units; height 0: as many rows need.
    """
    width, height = size[0], size[1] or TOP + BOTTOM + 24 * len(rows)
    left, bottom = 140, height - BOTTOM
    end = most or max(*(row.high for row in rows), chance or 0.0) or 1.0
    x = _scale(0, end, left, width - RIGHT)
    parts = []
    if chance is not None and margin:
        near, far = x(max(0, chance - margin)), x(chance + margin)
        parts.append(
            f'<rect class="margin" x="{near:.1f}" width="{far - near:.1f}" y="{TOP}" height="{bottom - TOP}"/>'
        )
    columns = ticks(0, end)
    for at, name in zip(columns, tick_names(columns), strict=True):
        parts.append(_line("grid", x(at), TOP, x(at), bottom))
        parts.append(_text("tick", x(at), bottom + 16, name, "middle"))
    parts.append(_text("axis", (left + width - RIGHT) / 2, height - 3, x_label, "middle"))
    if chance is not None:
        parts.append(_line("reference", x(chance), TOP, x(chance), bottom))
    for place, row in enumerate(rows):
        y, paint = TOP + 24 * place + 12, colour if row.strong else "n"
        parts.append(_text("strong" if row.strong else "tick", left - 10, y + 4, row.name, "end"))
        parts.append(_line(f"whisker s{paint}", x(row.low), y, x(row.high), y))
        parts.append(_dot(f"f{paint}", x(row.value), y, f"{row.name}: {row.value:.3f}"))
    return _svg(title, width, height, parts)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _log_scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    place = _scale(math.log10(low), math.log10(high), start, end)
    return lambda value: place(math.log10(value))


def _points(points: Sequence[tuple[float, float]], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    return " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(kind: str, x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _dot(kind: str, x: float, y: float, about: str) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{escape(about)}</title></circle>'


def _svg(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    label = escape(title, quote=True)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
