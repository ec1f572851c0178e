"""Bar charts as SVG text: no plotting package, and a diff that a person can read."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT, TOP = 760, 190, 40, 64
BAR, GAP, AXIS = 12, 12, 30
COLOURS = ("#4c8bb5", "#a9d3e6", "#c8c8c8", "#d9a441", "#6b4c8a")
TICK = "#111111"


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar from 0 to ``value`` with a whisker from ``low`` to ``high``."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Group:
    """Bars under one label, None for a bar that is not there; ``mark`` is a line across them all."""

    label: str
    bars: Sequence[Bar | None]
    mark: float | None = None


def bar_chart(title: str, series: Sequence[str], groups: Sequence[Group], most: float, mark: str = "") -> str:
    """Horizontal bars on an axis from 0 to ``most``; ``series`` names the bars of each group, ``mark`` the lines."""
    height = TOP + sum(len(group.bars) * BAR + GAP for group in groups) + AXIS
    bottom = height - AXIS
    scale = (WIDTH - LEFT - RIGHT) / most

    def x(value: float) -> str:
        return f"{LEFT + scale * min(max(value, 0.0), most):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="22" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    for step in range(6):
        value = most * step / 5
        parts.append(f'<path d="M{x(value)} {TOP - 6}V{bottom}" stroke="#dddddd"/>')
        parts.append(f'<text x="{x(value)}" y="{bottom + 16}" text-anchor="middle">{value:.3g}</text>')
    at = LEFT
    for name, colour in zip(series, COLOURS, strict=False):
        parts.append(f'<rect x="{at}" y="36" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{at + 17}" y="46">{escape(name)}</text>')
        at += 30 + 7 * len(name)
    if mark:
        parts.append(f'<path d="M{at + 4} 34V50" stroke="{TICK}" stroke-width="2"/>')
        parts.append(f'<text x="{at + 12}" y="46">{escape(mark)}</text>')
    y = TOP
    for group in groups:
        middle = y + len(group.bars) * BAR / 2
        parts.append(f'<text x="{LEFT - 10}" y="{middle + 4:.1f}" text-anchor="end">{escape(group.label)}</text>')
        for row, (bar, colour) in enumerate(zip(group.bars, COLOURS, strict=False)):
            if bar is not None:
                top, centre = y + row * BAR, y + row * BAR + BAR / 2
                width = float(x(bar.value)) - LEFT
                parts.append(f'<rect x="{LEFT}" y="{top}" width="{width:.1f}" height="{BAR - 2}" fill="{colour}"/>')
                parts.append(
                    f'<path d="M{x(bar.low)} {centre - 1:.1f}H{x(bar.high)}" stroke="{TICK}" stroke-width="1.5"/>'
                )
        if group.mark is not None:
            line = f'<path d="M{x(group.mark)} {y - 2}V{y + len(group.bars) * BAR}" stroke="{TICK}" stroke-width="2"/>'
            parts.append(line)
        y += len(group.bars) * BAR + GAP
    return "\n".join([*parts, f'<path d="M{LEFT} {TOP - 6}V{bottom}" stroke="{TICK}"/>', "</svg>"]) + "\n"
