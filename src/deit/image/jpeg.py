"""JPEG files, decoded only as far as a crop needs: at a smaller scale, and without the rows below the crop.

`simplejpeg` decodes if it is installed (the extra `fast`), and Pillow if not. Both decode with libjpeg-turbo, and their
pixels are equal to the bit. Pillow has the last word on files that `simplejpeg` refuses.

Sizes are (height, width), except in calls to Pillow. A box is (top, left, height, width) in pixels of the upright file.
Orientations are EXIF's, 1 to 8.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import PIL
from PIL import Image

Box = tuple[int, int, int, int]

_END = b"\xff\xd9"
_LYING = (5, 6, 7, 8)
"""Orientations that exchange rows and columns."""
_FROM_BELOW, _FROM_RIGHT = (3, 4, 6, 7), (2, 3, 7, 8)
"""Orientations whose upright rows or columns (exchanged, if lying) run against those that are stored."""
_SMALLEST = 64
"""Least side of an image that `simplejpeg` may decode at a smaller scale, because it chooses the scale by the size."""


@cache
def _fast() -> Callable[..., np.ndarray] | None:
    """The decoder of `simplejpeg`; None if that is not installed."""
    try:
        from simplejpeg import decode_jpeg
    except ImportError:
        return None
    return decode_jpeg


def reader() -> str:
    """Name and version of the package that decodes JPEG files for training."""
    if _fast() is None:
        return f"Pillow {PIL.__version__}"
    import simplejpeg

    return f"simplejpeg {simplejpeg.__version__}"


@dataclass(frozen=True)
class Pixels:
    """The decoded pixels of a JPEG."""

    stored: np.ndarray
    """(rows, columns, 3) uint8, in the orientation of the file. The last rows may be missing."""
    size: tuple[int, int]
    """Size of all that is stored, the missing rows included."""
    scale: int
    """Pixels of the file for each of these, in rows and in columns."""
    full: tuple[int, int]
    """Size of the upright file."""
    orientation: int

    def cut(self, box: Box) -> tuple[np.ndarray, tuple[float, float, float, float]]:
        """The pixels that show a box, upright, (height, width, 3); and the box in them: left, top, right, bottom."""
        (top, bottom), (left, right) = _spans(box, self)
        outer = (math.floor(top), math.ceil(bottom), math.floor(left), math.ceil(right))
        pixels = self.stored[_stored(outer, self.size, self.orientation)]
        if self.orientation in _FROM_BELOW:
            pixels = pixels[::-1]
        if self.orientation in _FROM_RIGHT:
            pixels = pixels[:, ::-1]
        if self.orientation in _LYING:
            pixels = pixels.transpose(1, 0, 2)
        return pixels, (left - outer[2], top - outer[0], right - outer[2], bottom - outer[0])


class Jpeg:
    """A JPEG in colour or grey, of 8 bits, whose header is read.

    Args:
        name: the file's name in messages.
        data: the whole file.
        header: Pillow's image of it, not decoded.
        orientation: EXIF's.
    """

    def __init__(self, name: str, data: bytes, header: Image.Image, orientation: int):
        self.name, self.data, self.orientation, self.mode = name, data, orientation, header.mode
        self.stored_size = (header.height, header.width)

    @property
    def size(self) -> tuple[int, int]:
        """Size of the upright image."""
        rows, columns = self.stored_size
        return (columns, rows) if self.orientation in _LYING else (rows, columns)

    def decode(self, scale: int = 1, boxes: Sequence[Box] | None = None) -> Pixels:
        """Decodes what the boxes need, or everything, at 1/`scale`, which is 1, 1/2, 1/4 or 1/8.

        The pixels within the boxes are those of the whole image. Raises whatever Pillow raises on damaged bytes.
        """
        rows, columns = (-(-side // scale) for side in self.stored_size)
        kept, data = rows, self.data
        if boxes is not None and (cut := _Cut.of(self.data, self.stored_size[0])) is not None:
            whole = Pixels(np.empty((0, 0, 3), np.uint8), (rows, columns), scale, self.size, self.orientation)
            ends = []
            for box in boxes:
                (top, bottom), (left, right) = _spans(box, whole)
                outer = (math.floor(top), math.ceil(bottom), math.floor(left), math.ceil(right))
                ends.append(_stored(outer, whole.size, self.orientation)[0].stop)
            most = cut.rows(max(ends) * scale)
            if most < self.stored_size[0]:
                kept, data = most // scale, cut.cut(most)
        decoded = _decode_fast(data, scale, (kept, columns), damaged=data is not self.data)
        if decoded is None:
            decoded = _decode(data, self.mode, scale)
        return Pixels(decoded, (rows, columns), scale, self.size, self.orientation)


def _spans(box: Box, pixels: Pixels) -> tuple[tuple[float, float], tuple[float, float]]:
    """Top and bottom, left and right of a box in the upright pixels.

    If the scale does not divide a side, the file ends within the last stored pixel. To take that pixel as whole would
    shift the picture by up to half a pixel.
    """
    orientation = pixels.orientation
    below, right = orientation in _FROM_BELOW, orientation in _FROM_RIGHT
    size = pixels.size
    if orientation in _LYING:
        below, right, size = right, below, (size[1], size[0])
    spans = []
    for axis, reversed_ in ((0, below), (1, right)):
        start = size[axis] - pixels.full[axis] / pixels.scale if reversed_ else 0.0
        first = start + box[axis] / pixels.scale
        spans.append((first, min(start + (box[axis] + box[axis + 2]) / pixels.scale, float(size[axis]))))
    return spans[0], spans[1]


def _stored(outer: tuple[int, int, int, int], size: tuple[int, int], orientation: int) -> tuple[slice, slice]:
    """Rows and columns of the stored pixels of `size` that hold the upright rectangle (top, bottom, left, right)."""
    rows, columns = outer[:2], outer[2:]
    if orientation in _LYING:
        rows, columns = columns, rows
    if orientation in _FROM_BELOW:
        rows = (size[0] - rows[1], size[0] - rows[0])
    if orientation in _FROM_RIGHT:
        columns = (size[1] - columns[1], size[1] - columns[0])
    return slice(*rows), slice(*columns)


def _decode(data: bytes, mode: str, scale: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    if scale > 1:
        image.draft(mode, (image.width // scale, image.height // scale))
    return np.asarray(image.convert("RGB"))


def _decode_fast(data: bytes, scale: int, size: tuple[int, int], *, damaged: bool) -> np.ndarray | None:
    """The pixels, in (height, width, 3), if `simplejpeg` can decode them without a doubt.

    It refuses a file with the smallest fault, unless `damaged` says that rows were taken away. Such a file is complete.
    """
    decode = _fast()
    if decode is None or (scale > 1 and min(size) < _SMALLEST // scale):
        return None
    least: dict[str, Any] = {"min_height": size[0], "min_width": size[1]} if scale > 1 else {}
    try:
        found = decode(data, "RGB", strict=not damaged, **least)
    except ValueError:
        return None
    return found if found.shape == (*size, 3) else None


@dataclass(frozen=True)
class _Cut:
    """The place of the height in the header of a JPEG. If it says less, a decoder stops after so many rows."""

    data: bytes
    place: int
    block: int
    """Number of rows that are stored together."""

    @classmethod
    def of(cls, data: bytes, height: int) -> _Cut | None:
        """None if the header is unusual, or the file is cut short already."""
        place = 2
        while place + 10 <= len(data) and data[place] == 0xFF:
            kind = data[place + 1]
            if 0xC0 <= kind <= 0xC2:
                break
            if kind < 0xC0 or kind in _NO_LENGTH or kind == _SCAN:
                return None
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        else:
            return None
        samplings = data[place + 11 : place + 10 + 3 * data[place + 9] : 3]
        if int.from_bytes(data[place + 5 : place + 7], "big") != height or not samplings:
            return None
        if data.rfind(_END, place) < 0:
            return None
        return cls(data, place + 5, 8 * max(sampling & 15 for sampling in samplings))

    def rows(self, needed: int) -> int:
        """The least height that leaves the first `needed` rows as they are. Colours at half the size are smoothed with
        the rows below, so it has one more block."""
        return (-(-needed // self.block) + 1) * self.block

    def cut(self, rows: int) -> bytes:
        return self.data[: self.place] + rows.to_bytes(2, "big") + self.data[self.place + 2 :]


_SCAN = 0xDA
_NO_LENGTH = (*range(0xD0, 0xDA), 0xFF)
"""Markers that no length follows."""
