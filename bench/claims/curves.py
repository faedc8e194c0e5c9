"""Draws curves as an SVG that is readable on light and on dark pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
"""The folder for the pictures of docs."""
_COLOURS = (
    "#3b82f6",
    "#f59e0b",
    "#10b981",
    "#ef4444",
    "#8b5cf6",
    "#14b8a6",
    "#ec4899",
    "#84cc16",
    "#f97316",
    "#6366f1",
    "#a8a29e",
)
"""Colours of medium lightness, which stand out from white and from black."""
_WIDTH, _HEIGHT = 760, 420
_LEFT, _TOP, _RIGHT, _BOTTOM = 60, 40, 230, 50


def curves(title: str, lines: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str) -> str:
    """Draws a line through the (x, y) points of each name, and a legend.

    `across` and `up` label the axes. The axis across begins at 0. Raises `ValueError` if there is no point.
    """
    points = [point for line in lines.values() for point in line]
    if not points:
        raise ValueError("there is nothing to draw; give at least one line with a point")
    x_step, y_step = _step(max(x for x, _ in points)), _step(max(y for _, y in points) - min(y for _, y in points))
    right = max(x for x, _ in points)
    low = math.floor(min(y for _, y in points) / y_step) * y_step
    high = max(low + y_step, math.ceil(max(y for _, y in points) / y_step) * y_step)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            round(_LEFT + x / right * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}" font-family="sans-serif" font-size="12">',
        "<style>text { fill: #444 } .axis { stroke: #999; stroke-opacity: .4 } "
        "@media (prefers-color-scheme: dark) { text { fill: #ccc } }</style>",
        f'<text x="{_LEFT}" y="22" font-size="15">{escape(title)}</text>',
    ]
    for i in range(round((high - low) / y_step) + 1):
        x, y = place(0, low + i * y_step)
        parts += [
            f'<path class="axis" d="M{x} {y}H{_WIDTH - _RIGHT}"/>',
            f'<text x="{x - 8}" y="{y + 4}" text-anchor="end">{low + i * y_step:g}</text>',
        ]
    for i in range(int(right / x_step) + 1):
        x, y = place(i * x_step, low)
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{i * x_step:,.6g}</text>')
    parts += [
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 10}" text-anchor="middle">{escape(across)}</text>',
        f'<text transform="translate(16 {(_TOP + _HEIGHT - _BOTTOM) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(up)}</text>',
    ]
    for i, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        path = " ".join(",".join(map(str, place(x, y))) for x, y in line)
        top = _TOP + 10 + 20 * i
        parts += [
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<path d="M{_WIDTH - _RIGHT + 14} {top}h18" stroke="{colour}" stroke-width="3"/>',
            f'<text x="{_WIDTH - _RIGHT + 38}" y="{top + 4}">{escape(name)}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _step(span: float) -> float:
    """The distance between ticks: 1, 2 or 5 times a power of ten, so that there are about five ticks."""
    if span <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= span / 5)
