"""JPEG files for training: the header first, then the pixels, at a smaller scale if a crop needs no more.

`simplejpeg` decodes if it is installed (the extra `fast`), and Pillow if not. Both decode with libjpeg-turbo, and their
pixels are equal to the bit. Pillow has the last word on every file that `simplejpeg` finds the least fault with.

Sizes are (height, width), except in calls to Pillow. A box is (top, left, height, width) in pixels of the upright file.
Orientations are EXIF's, 1 to 8.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import PIL
from PIL import Image

Box = tuple[int, int, int, int]

_LYING = (5, 6, 7, 8)
"""Orientations that exchange rows and columns."""
_FROM_BELOW, _FROM_RIGHT = (3, 4, 6, 7), (2, 3, 7, 8)
"""Orientations that show the stored rows or the stored columns in reverse."""
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


def is_fast() -> bool:
    """Whether the extra `fast` is installed."""
    return _fast() is not None


def reader() -> str:
    """Name and version of the package that decodes JPEG files for training."""
    if not is_fast():
        return f"Pillow {PIL.__version__}"
    import simplejpeg

    return f"simplejpeg {simplejpeg.__version__}"


class Jpeg:
    """A JPEG in colour or grey, of 8 bits, whose header is read.

    Args:
        name: the file's name in messages.
        data: the whole file.
        header: Pillow's image of it, not decoded.
        orientation: EXIF's.
    """

    def __init__(self, name: str, data: bytes, header: Image.Image, orientation: int):
        self.name, self.data, self.header, self.orientation = name, data, header, orientation

    @property
    def size(self) -> tuple[int, int]:
        """Size of the upright image."""
        columns, rows = self.header.size
        return (columns, rows) if self.orientation in _LYING else (rows, columns)

    def decode(self, scale: int = 1) -> Pixels:
        """All pixels at 1/`scale`: 1, 2, 4 or 8, and no more than the pixels of a side.

        Raises whatever Pillow raises on damaged bytes.
        """
        stored = _decoded_fast(self.data, scale, self.header.size)
        return Pixels(_decoded(self.data, scale) if stored is None else stored, scale, self.size, self.orientation)


@dataclass(frozen=True)
class Pixels:
    """The decoded pixels of a JPEG."""

    stored: np.ndarray
    """(rows, columns, 3) uint8, in the orientation of the file."""
    scale: int
    """Pixels of the file for each of these, in rows and in columns."""
    size: tuple[int, int]
    """Size of the upright file."""
    orientation: int

    @classmethod
    def whole(cls, stored: np.ndarray, orientation: int) -> Pixels:
        """All pixels of a file, (rows, columns, 3) uint8 in the orientation of the file."""
        rows, columns = stored.shape[:2]
        return cls(stored, 1, (columns, rows) if orientation in _LYING else (rows, columns), orientation)

    def cut(self, box: Box) -> tuple[np.ndarray, tuple[float, float, float, float]]:
        """The pixels that show a box, upright, (height, width, 3); and the box in them: left, top, right, bottom."""
        upright = self.stored
        if self.orientation in _FROM_BELOW:
            upright = upright[::-1]
        if self.orientation in _FROM_RIGHT:
            upright = upright[:, ::-1]
        below, right = self.orientation in _FROM_BELOW, self.orientation in _FROM_RIGHT
        if self.orientation in _LYING:
            upright, below, right = upright.transpose(1, 0, 2), right, below
        top, bottom = self._span(0, upright.shape[0], below, box)
        left, right_ = self._span(1, upright.shape[1], right, box)
        first, start = math.floor(top), math.floor(left)
        pixels = upright[first : math.ceil(bottom), start : math.ceil(right_)]
        return pixels, (left - start, top - first, right_ - start, bottom - first)

    def _span(self, axis: int, length: int, reversed_: bool, box: Box) -> tuple[float, float]:
        """Beginning and end of a box along an axis of the upright pixels.

        If the scale does not divide a side, the file ends within the last stored pixel, which is the first one in
        reverse. To take that pixel as whole would shift the picture by up to half a pixel.
        """
        origin = length - self.size[axis] / self.scale if reversed_ else 0.0
        end = origin + (box[axis] + box[axis + 2]) / self.scale
        return origin + box[axis] / self.scale, min(end, float(length))


def _decoded(data: bytes, scale: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    if scale > 1:
        image.draft(image.mode, (image.width // scale, image.height // scale))
    return np.asarray(image.convert("RGB"))


def _decoded_fast(data: bytes, scale: int, full: tuple[int, int]) -> np.ndarray | None:
    """The same pixels from `simplejpeg`; None without it, and for a file with the smallest fault. `full` is (width,
    height)."""
    decode = _fast()
    if decode is None or (scale > 1 and min(full) < _SMALLEST):
        return None
    columns, rows = (-(-side // scale) for side in full)
    try:
        found = decode(data, "RGB", **({"min_height": rows, "min_width": columns} if scale > 1 else {}))
    except ValueError:
        return None
    return found if found.shape == (rows, columns, 3) else None
