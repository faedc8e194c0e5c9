"""Diagrams as SVG. Their colours, dashes and fonts come from the classes in the page's style sheet (`report.css`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deit.evaluate.scores import Accuracy, Bin
from deit.report.markup import Html, element, joined, shortened
from deit.words import Text, said, series

_WIDTH, _HEIGHT = 480, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 30, 40
_POINTS = 600
"""Maximum number of points in a line, because no screen shows more of them apart."""
_MARKS = 16
"""Maximum number of shapes along a line."""


@dataclass(frozen=True)
class Line:
    """A series of points with rising x. A y that is not finite interrupts the line."""

    name: Text
    points: Sequence[tuple[float, float]]
    style: int
    """Number of its colour, dashes and shape, 0 to 5."""


def curves(
    key: str,
    title: Text,
    lines: Sequence[Line],
    *,
    epoch: float | None = None,
    within: tuple[float, float] = (-math.inf, math.inf),
) -> Html:
    """Draws lines over steps. If `epoch` is given, the number of steps in an epoch, there is an axis of epochs too.

    `within` limits the axis of values to the range that they can have. Raises `ValueError` if no point is finite.
    """
    finite = [(x, y) for line in lines for x, y in line.points if math.isfinite(y)]
    if not finite:
        raise ValueError("there is nothing to draw; give at least one line with a finite point")
    ys, right = [y for _, y in finite], max([1.0, *(x for x, _ in finite)])
    step = _step(max(ys) - min(ys))
    low = max(math.floor(min(ys) / step + 1e-9) * step, within[0])
    high = min(max(low + step, math.ceil(max(ys) / step - 1e-9) * step), within[1])
    if high <= low:  # a flat line at the limit of the range
        low = high - step
    across = _Axis(0, right, _LEFT, _WIDTH - _RIGHT)
    up = _Axis(low, high, _HEIGHT - _BOTTOM, _TOP)
    parts = [
        _grid(up, _LEFT, _WIDTH - _RIGHT),
        joined(_label(across(x), _HEIGHT - _BOTTOM + 17, f"{x:,.6g}", "middle") for x in across.ticks()),
        _label((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, said("steps"), "middle", "soft"),
    ]
    if epoch:
        epochs = _Axis(0, right / epoch, _LEFT, _WIDTH - _RIGHT)
        parts += [
            joined(
                joined([_tick(epochs(x), _TOP), _label(epochs(x), _TOP - 8, f"{x:,.6g}", "middle", "soft")])
                for x in epochs.ticks()
                if x
            ),
            _label(_LEFT, _TOP - 8, said("epochs"), "start", "soft"),
        ]
    parts += [_drawn(line, across, up) for line in lines]
    ends = (
        said("{name} from {first:.4g} to {last:.4g}", name=line.name, first=known[0], last=known[-1])
        for line in lines
        if (known := [y for _, y in line.points if math.isfinite(y)])
    )
    told = said("{lines}, over {steps:,.6g} steps", lines=series("; ", ends), steps=right)
    return _figure(key, title, told, _HEIGHT, parts)


def swatch(style: int) -> Html:
    """Draws a piece of a line for a legend."""
    line = Line("", [(0, 0), (1, 0), (2, 0)], style)
    return element(
        "svg",
        _path(line.points, _Axis(0, 2, 1, 31), _Axis(0, 1, 6, 0), style),
        _mark(16, 6, style),
        viewBox="0 0 32 12",
        class_="swatch",
        aria_hidden="true",
    )


def intervals(key: str, title: Text, rows: Sequence[tuple[str, Accuracy]]) -> Html:
    """Draws each accuracy as a dot and its interval as a whisker."""
    low = min(accuracy.interval[0] for _, accuracy in rows)
    step = _step(max(1 - low, 0.01))
    across = _Axis(max(0.0, math.floor(low / step + 1e-9) * step), 1.0, 112, _WIDTH - 18)
    bottom = 10 + 30 * len(rows)
    parts = [
        joined(
            joined(
                [
                    element("path", d=f"M{across(x)} 6V{bottom}", class_="grid"),
                    _label(across(x), bottom + 17, f"{x:.6g}", "middle"),
                ]
            )
            for x in across.ticks()
        )
    ]
    for i, (name, accuracy) in enumerate(rows):
        y = 24 + 30 * i
        left, right = map(across, accuracy.interval)
        parts += [
            _label(102, y + 4, shortened(name, 16), "end"),
            element("path", d=f"M{left} {y}H{right}M{left} {y - 5}v10M{right} {y - 5}v10", class_=f"whisker s{i % 6}"),
            _mark(across(accuracy.value), y, i),
        ]
    told = series("; ", (_told(name, accuracy) for name, accuracy in rows))
    return _figure(key, title, told, bottom + 26, parts)


def _told(name: str, accuracy: Accuracy) -> Text:
    low, high = accuracy.interval
    return said(
        "{name} {value:.3f}, 95 % interval {low:.3f} to {high:.3f}", name=name, value=accuracy.value, low=low, high=high
    )


def reliability(key: str, title: Text, bins: Sequence[Bin]) -> Html:
    """Draws accuracy over confidence with 95 % intervals, the line of perfect calibration, and the number of images in
    each bin."""
    top, bottom, floor, height = 12, 232, 322, 60
    across, up = _Axis(0, 1, _LEFT, _WIDTH - _RIGHT), _Axis(0, 1, bottom, top)
    most = max(each.count for each in bins)
    parts = [
        _grid(up, _LEFT, _WIDTH - _RIGHT),
        element("path", d=f"M{across(0)} {up(0)}L{across(1)} {up(1)}", class_="ideal"),
    ]
    found: list[tuple[float, float]] = []
    for each in bins:
        left, right = across(each.low) + 1, across(each.high) - 1
        tall = round(height * each.count / most, 1)
        if each.count:
            parts += [
                element(
                    "rect",
                    x=left,
                    y=floor - max(tall, 1),
                    width=round(right - left, 1),
                    height=max(tall, 1),
                    class_="bar",
                ),
                _label((left + right) / 2, floor - max(tall, 1) - 4, _short(each.count), "middle", "small"),
            ]
        if each.confidence is not None and each.accuracy is not None:
            low, high = Accuracy(round(each.accuracy * each.count), each.count).interval
            x = across(each.confidence)
            parts.append(element("path", d=f"M{x} {up(low)}V{up(high)}", class_="whisker s0"))
            found.append((each.confidence, each.accuracy))
    parts += [
        _path(found, across, up, 0),
        joined(_mark(across(x), up(y), 0) for x, y in found),
        element("path", d=f"M{_LEFT} {floor}H{_WIDTH - _RIGHT}", class_="grid"),
        joined(_label(across(x), floor + 17, f"{x:.6g}", "middle") for x in across.ticks()),
        _label((_LEFT + _WIDTH - _RIGHT) / 2, floor + 34, said("confidence"), "middle", "soft"),
        _turned(12, (top + bottom) / 2, said("accuracy")),
        _turned(12, floor - height / 2, said("images")),
    ]
    told = series("; ", (said("confidence {x:.2f}, accuracy {y:.2f}", x=x, y=y) for x, y in found))
    return _figure(key, title, told, floor + 40, parts)


def bar(share: float) -> Html:
    """Draws a small bar for a table, beside the number that it shows."""
    return element(
        "svg",
        element("rect", x=0, y=0, width=40, height=6, class_="track"),
        element("rect", x=0, y=0, width=round(40 * share, 1), height=6, class_="bar"),
        viewBox="0 0 40 6",
        class_="share",
        aria_hidden="true",
    )


# --------------------------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True)
class _Axis:
    """Turns values into places: `low` lies at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        step = _step(self.high - self.low)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _figure(key: str, title: Text, description: Text, height: float, parts: Sequence[Html]) -> Html:
    return element(
        "svg",
        element("title", title, id=f"{key}-title"),
        element("desc", description, id=f"{key}-desc"),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_WIDTH} {height:g}",
        role="img",
        aria_labelledby=f"{key}-title {key}-desc",
        class_="diagram",
    )


def _grid(up: _Axis, left: float, right: float) -> Html:
    return joined(
        joined(
            [
                element("path", d=f"M{left} {up(y)}H{right}", class_="grid"),
                _label(left - 8, up(y) + 4, f"{y:.6g}", "end"),
            ]
        )
        for y in up.ticks()
    )


def _tick(x: float, y: float) -> Html:
    return element("path", d=f"M{x} {y}v-4", class_="grid")


def _label(x: float, y: float, text: Text, anchor: str, kind: str | None = None) -> Html:
    return element("text", text, x=round(x, 1), y=round(y, 1), text_anchor=anchor, class_=kind)


def _turned(x: float, y: float, text: Text) -> Html:
    return element("text", text, transform=f"translate({x:g} {y:g}) rotate(-90)", text_anchor="middle", class_="soft")


def _drawn(line: Line, across: _Axis, up: _Axis) -> Html:
    points = line.points[:: math.ceil(len(line.points) / _POINTS)] if line.points else []
    if points and points[-1] != line.points[-1]:
        points = [*points, line.points[-1]]
    finite = [point for point in points if math.isfinite(point[1])]
    every = math.ceil(len(finite) / _MARKS) or 1
    marks = () if line.style == 0 and len(finite) > 1 else finite[::-1][::every]
    return joined([_path(points, across, up, line.style), *(_mark(across(x), up(y), line.style) for x, y in marks)])


def _path(points: Sequence[tuple[float, float]], across: _Axis, up: _Axis, style: int) -> Html:
    pieces, drawing = [], False
    for x, y in points:
        if math.isfinite(y):
            pieces.append(f"{'L' if drawing else 'M'}{across(x)} {up(y)}")
        drawing = math.isfinite(y)
    return element("path", d="".join(pieces), class_=f"line s{style % 6}")


def _mark(x: float, y: float, style: int) -> Html:
    """Draws a circle, square, triangle, diamond, cross or ring. The shape says the same as the colour."""
    shape = (
        "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
        "M-3.6-3.6h7.2v7.2h-7.2z",
        "M0-4.6L4.4 3.4H-4.4z",
        "M0-5L5 0L0 5L-5 0z",
        "M-4-4L4 4M4-4L-4 4",
        "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    )[style % 6]
    return element("path", d=shape, transform=f"translate({round(x, 1)} {round(y, 1)})", class_=f"mark s{style % 6}")


def _step(span: float) -> float:
    """The distance between ticks: 1, 2 or 5 times a power of ten, so that there are about five ticks."""
    if not span > 0 or not math.isfinite(span):
        return 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    return next((step * power for step in (1, 2, 5) if step * power >= span / 5), 10 * power)


def _short(count: int) -> str:
    """A count in at most four characters."""
    return str(count) if count < 10_000 else f"{count / 1000:.0f}k" if count < 1_000_000 else f"{count / 1e6:.1f}M"
