"""Line charts as inline SVG, for pages that stand alone."""

import math
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 40, 40
COLOURS = ("#0969da", "#bc4c00", "#1a7f37")
_NUM_TICKS = 5


class Series(NamedTuple):
    """A line."""

    name: str
    points: list[tuple[float, float]]
    """x and y, x ascending; points that are not finite are left out."""


def line_chart(title: str, series: list[Series]) -> str:
    """Draw lines over training steps.

    Args:
        title: above the chart.
        series: at most three lines.

    Returns:
        An SVG element; with a word in place of lines where there is no finite point.
    """
    lines = [Series(name, [point for point in points if all(map(math.isfinite, point))]) for name, points in series]
    points = [point for line in lines for point in line.points]
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="#57606a">',
        f'<text x="{LEFT}" y="16" font-size="14" font-weight="600" fill="#1b1f24">{escape(title)}</text>',
    ]
    if not points:
        return "".join([*parts, f'<text x="{LEFT}" y="{HEIGHT / 2}">no figures</text></svg>'])
    x_ticks, y_ticks = _ticks([x for x, _ in points]), _ticks([y for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eaeef2"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_label(tick)}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        anchor = "end" if tick == x_ticks[-1] else "middle"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}">{_label(tick)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    for number, (line, colour) in enumerate(zip(lines, COLOURS)):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line.points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        if len(line.points) == 1:
            x, y = place(*line.points[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        if len(lines) > 1:
            x = LEFT + 90 * number
            parts.append(f'<line x1="{x}" x2="{x + 16}" y1="29" y2="29" stroke="{colour}" stroke-width="3"/>')
            parts.append(f'<text x="{x + 21}" y="33">{escape(line.name)}</text>')
    return "".join([*parts, "</svg>"])


def _ticks(values: list[float]) -> list[float]:
    """Give round numbers, evenly apart, from at most the least value to at least the largest."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - abs(low) / 2 - 0.5, high + abs(high) / 2 + 0.5
    rough = (high - low) / _NUM_TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, last + 1)]


def _label(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
