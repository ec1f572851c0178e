"""Plots as SVG text."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from kinetok.errors import UserError

COLOURS = ("#4c8bb5", "#d9a441", "#6b4c8a", "#4f9a5b", "#b5534c", "#777777", "#2f5d50", "#c77fa8", "#8a6d3b")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 380, 70, 20, 40, 96

Points = Sequence[tuple[float, float]]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers on an axis of powers of ten: 1, 2 and 5 times each."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**e for e in exponents for m in (1, 2, 5) if low <= m * 10.0**e <= high]


def line_plot(title: str, x_name: str, y_name: str, series: Mapping[str, Points], *, marks: bool = True) -> str:
    """Lines over two logarithmic axes as SVG text; a series of one point is a dot."""
    points = [point for values in series.values() for point in values]
    if not points or min(min(point) for point in points) <= 0:
        raise UserError(f"{title}: expected points above zero")

    def limits(values: list[float]) -> tuple[float, float]:
        low, high = min(values), max(values)
        return (low / 1.3, high * 1.3)

    x_low, x_high = limits([x for x, _ in points])
    y_low, y_high = limits([y for _, y in points])

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(value / x_low) / math.log(x_high / x_low)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log(value / y_low) / math.log(y_high / y_low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
    ]
    for tick in _ticks(x_low, x_high):
        parts.append(
            f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#e4e4e4"/>'
            f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>'
        )
    for tick in _ticks(y_low, y_high):
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#e4e4e4"/>'
            f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - BOTTOM + 34}" text-anchor="middle">{escape(x_name)}</text>')
    parts.append(
        f'<text x="16" y="{HEIGHT / 2 - 20}" text-anchor="middle" '
        f'transform="rotate(-90 16 {HEIGHT / 2 - 20})">{escape(y_name)}</text>'
    )
    for at, (name, values) in enumerate(series.items()):
        colour = COLOURS[at % len(COLOURS)]
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in values)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if marks or len(values) == 1:
            parts += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5" fill="{colour}"/>' for a, b in values]
        across, down = at % 3, at // 3
        left, top = LEFT + across * 215, HEIGHT - 44 + down * 16
        parts.append(
            f'<rect x="{left}" y="{top - 9}" width="10" height="10" fill="{colour}"/>'
            f'<text x="{left + 15}" y="{top}">{escape(name)}</text>'
        )
    return "\n".join((*parts, "</svg>")) + "\n"
