"""Draws maps: one map over its image, and the figure of a whole explanation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from deit.explain.explanation import Explanation, Score

_VIRIDIS = np.array(
    [
        [0x44, 0x01, 0x54],
        [0x48, 0x25, 0x76],
        [0x41, 0x44, 0x87],
        [0x35, 0x60, 0x8D],
        [0x2A, 0x78, 0x8E],
        [0x21, 0x90, 0x8C],
        [0x22, 0xA8, 0x84],
        [0x43, 0xBF, 0x71],
        [0x7A, 0xD1, 0x51],
        [0xBB, 0xDF, 0x27],
        [0xFD, 0xE7, 0x25],
    ]
)
"""Viridis (Smith & van der Walt 2015, CC0) at 0, 0.1, …, 1. Its lightness rises evenly, with any colour vision and in
grey."""
_TITLES = {
    "rollout": "attention rollout",
    "relevance": "gradient-weighted relevance",
    "attention": "attention of the last block",
    "occlusion": "occlusion, as a check",
}
_PANEL, _GAP, _LINE = 280, 24, 20  # pixels: longer side of a picture, space between cells, height of a line of text
_INK, _PALE = (20, 20, 20), (95, 95, 95)


def colours(values: np.ndarray) -> np.ndarray:
    """Turns values (…,) from 0 to 1 into viridis colours (…, 3) from 0 to 255."""
    places = np.linspace(0, 1, len(_VIRIDIS))
    return np.stack([np.interp(values, places, channel) for channel in _VIRIDIS.T], axis=-1).round().astype(np.uint8)


def overlay(picture: Image.Image, values: np.ndarray) -> Image.Image:
    """Draws a map (R, S) over its picture, which turns grey.

    Yellow is the map's largest value. Violet is its smallest value, or 0 if that is larger.
    """
    low, high = max(float(values.min()), 0.0), float(values.max())
    scaled = np.clip((values - low) / (high - low if high > low else 1.0), 0.0, 1.0)
    # Bicubic interpolation overshoots, so values are clipped to 0 and 1 below.
    smooth = np.asarray(Image.fromarray(scaled.astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC))
    grey = ImageOps.grayscale(picture).convert("RGB")
    return Image.blend(grey, Image.fromarray(colours(smooth.clip(0, 1))), 0.7)


def fitted(picture: Image.Image, side: int) -> Image.Image:
    """Resizes a picture for people to look at: its longer side is at most `side` pixels.

    A small picture is enlarged by a whole factor, so each of its pixels becomes a square.
    """
    times = side // max(picture.size)
    if times:
        return picture.resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST)
    smaller = picture.copy()
    smaller.thumbnail((side, side))
    return smaller


def figure(explanation: Explanation) -> Image.Image:
    """Draws a row for each token: the image as the model saw it, with the head's answer, then each map over it."""
    scale = _PANEL / max(explanation.seen.size)
    width, height = (max(1, round(side * scale)) for side in explanation.seen.size)
    picture = explanation.seen.resize((width, height), Image.Resampling.BICUBIC)
    rows = [(answer, explanation.of(answer.token)) for answer in explanation.answers]
    down, across = height + 4 * _LINE + _GAP, _PANEL + _GAP
    top = _GAP + _LINE + _GAP // 2
    canvas = Image.new("RGB", (_GAP + across * (1 + len(rows[0][1])), top + down * len(rows) + _LINE + _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    named = f"{Path(explanation.image).name}, " if explanation.image else ""
    _write(draw, (_GAP, _GAP), f"{named}seen by {explanation.model}", canvas.width - 2 * _GAP)
    for row, (answer, maps) in enumerate(rows):
        y = top + row * down
        said = [f"{answer.label} {answer.probability:.3f}"]
        if answer.target != answer.label:
            said.append(f"explained: {answer.target} {answer.target_probability:.3f}")
        if answer.chance:
            said.append(f"random order: {_told(answer.chance)}")
        cells = [(picture, f"{answer.token} token", said)]
        cells += [
            (
                overlay(picture, each.values),
                _TITLES[each.method],
                [
                    *([_told(each.score)] if each.score else []),
                    f"values {each.values.min():.3g} to {each.values.max():.3g}",
                ],
            )
            for each in maps
        ]
        for column, (image, title, lines) in enumerate(cells):
            x = _GAP + column * across
            _write(draw, (x, y), title, _PANEL, size=16)
            canvas.paste(image, (x, y + _LINE + 4))
            for line, text in enumerate(lines, start=1):
                _write(draw, (x, y + height + line * _LINE + 8), text, _PANEL, size=13, ink=_PALE)
    _legend(canvas, draw, top + down * len(rows), scored=any(answer.chance for answer, _ in rows))
    return canvas


def _told(score: Score) -> str:
    return f"deletion {score.deletion:.3f}, insertion {score.insertion:.3f}"


def _legend(canvas: Image.Image, draw: ImageDraw.ImageDraw, y: int, *, scored: bool) -> None:
    bar = np.broadcast_to(np.linspace(0, 1, _PANEL // 2), (_LINE - 6, _PANEL // 2))
    canvas.paste(Image.fromarray(colours(bar)), (_GAP, y))
    told = "least to most, of each map's own values."
    told += " Deletion: lower is better. Insertion: higher is better." if scored else ""
    _write(draw, (_GAP + _PANEL // 2 + 8, y), told, canvas.width - 2 * _GAP - _PANEL // 2 - 8, size=13, ink=_PALE)


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    width: int,
    *,
    size: int = 14,
    ink: tuple[int, int, int] = _INK,
) -> None:
    """Writes text in one line, shortened to `width` pixels."""
    font = ImageFont.load_default(size)
    text = " ".join(text.split())
    if font.getlength(text) > width:
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        text += "…"
    draw.text(place, text, ink, font)
