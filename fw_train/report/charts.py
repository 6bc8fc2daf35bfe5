"""Line charts as SVG text: no scripts, colours from the page's style."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 30
TICKS = 4


class Series(NamedTuple):
    """Values by step; `style` is a class of the page's style: train, valid or constant."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    style: str


class Span(NamedTuple):
    low: float
    high: float

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


def line_chart(title: str, series: Sequence[Series], steps: int) -> str:
    """A titled figure; what is not finite leaves a gap, a series of one point is a dot."""
    finite = [value for one in series for value in one.values if math.isfinite(value)]
    if not finite:
        return ""
    across, up = Span(0, max(steps, 1)), _span(finite)
    grid = "".join(_rule(up, value) for value in _ticks(up)) + "".join(
        f'<text class="tick" x="{_x(across, step):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{step:g}</text>'
        for step in _ticks(across)
    )
    lines = "".join(_line(one, across, up) for one in series)
    keys = "".join(f'<span class="key {one.style}">{escape(one.name)}</span>' for one in series)
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b>{keys}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by step">{grid}{lines}</svg></figure>'
    )


def _span(values: Sequence[float]) -> Span:
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return Span(max(0.0, low - room) if low >= 0 else low - room, high + room)


def _ticks(span: Span) -> list[float]:
    """Round numbers inside the span."""
    wanted = (span.high - span.low) / TICKS
    power = 10 ** math.floor(math.log10(wanted))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted)
    return [n * step for n in range(math.ceil(span.low / step), math.floor(span.high / step) + 1)]


def _rule(up: Span, value: float) -> str:
    y = _y(up, value)
    return (
        f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{value:.4g}</text>'
    )


def _line(series: Series, across: Span, up: Span) -> str:
    points = [
        (_x(across, step), _y(up, value)) if math.isfinite(value) else None
        for step, value in zip(series.steps, series.values, strict=True)
    ]
    path, drawing = "", False
    for point in points:
        if point:
            path += f"{'L' if drawing else 'M'}{point[0]:.1f} {point[1]:.1f}"
        drawing = point is not None
    dots = ""
    if series.style == "valid" or len(points) == 1:
        dots = "".join(f'<circle cx="{p[0]:.1f}" cy="{p[1]:.1f}" r="3"/>' for p in points if p)
    return f'<g class="{series.style}"><path d="{path}"/>{dots}</g>'


def _x(across: Span, step: float) -> float:
    return LEFT + across.share(step) * (WIDTH - LEFT - RIGHT)


def _y(up: Span, value: float) -> float:
    return HEIGHT - BOTTOM - up.share(value) * (HEIGHT - TOP - BOTTOM)
