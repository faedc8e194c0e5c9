"""From a file to an upright 8-bit Pillow image, or to one sentence that says why it can't be read.

Sizes are (height, width), except in calls to Pillow, which takes (width, height).
"""

from __future__ import annotations

import io
import math
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from deit.image import packs
from deit.image.jpeg import Jpeg

__all__ = [
    "Decoded",
    "ImageError",
    "convert",
    "decode",
    "image_suffixes",
    "is_encoded",
    "load_image",
    "name_of",
    "read",
    "reading",
    "stored_size",
    "to_rgb",
    "without_texts",
]

MAX_PIXELS = 178_956_970  # above it, Pillow with its default settings raises DecompressionBombError

_NO_PICTURES = {"BUFR", "EPS", "FLI", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}
"""Formats whose suffixes Pillow registers, but which are no pictures: data, video, and pages and drawings that another
program would have to draw. EPS runs Ghostscript."""
_ORIENTATION = 0x0112  # EXIF tag
_DRAFT_GAP = 2  # a scaled decode keeps twice the wanted sides, as Pillow's thumbnails do; it costs 0.4/255 on average

Sides = tuple[int, int] | int
"""(height, width), or one int for both."""


class ImageError(ValueError):
    """An image cannot be read. The message names the file, the reason and what to do."""


class Decoded(NamedTuple):
    image: Image.Image
    full: tuple[int, int]  # (height, width) of the file as it is displayed
    box: tuple[float, float, float, float] | None  # the part of `image` that the file covers; None: all of it


def image_suffixes() -> frozenset[str]:
    """The suffixes of image files, in lower case with the dot: those of every picture format that Pillow reads here."""
    Image.init()
    return frozenset(
        suffix
        for suffix, form in Image.registered_extensions().items()
        if (form in Image.OPEN or form == "MPO") and form not in _NO_PICTURES  # the JPEG plugin opens MPO
    )


def load_image(
    source: str | os.PathLike[str] | bytes | Any,
    *,
    min_side: tuple[int, int] | int | None = None,
    mode: str | None = "RGB",
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Decodes one image, upright and in 8 bits.

    Args:
        source: a path, the bytes of a file, a binary file object, or a Pillow image, which is never changed. The EXIF
            orientation is applied. A file with many frames gives its first.
        min_side: the (height, width) that will be needed, or one int for both. A JPEG is then decoded at 1/2, 1/4 or
            1/8 scale, as long as each side keeps twice the needed pixels.
        mode: "RGB" (see `to_rgb`), "L" (grey) or None (as stored).
        max_pixels: an image with more pixels is refused by its header, before it is decoded.

    Raises `ImageError` for an image that cannot be read, and for URLs.
    """
    if mode not in ("RGB", "L", None):
        raise ValueError(f'mode is {mode!r}, expected "RGB", "L" or None; convert the returned image yourself')
    decoded = decode(source, min_side, max_pixels).image
    with reading(name_of(source)):
        return convert(decoded, mode, name_of(source))


def stored_size(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Width and height of an image as it is stored, from its header. None if that can't be read; decoding will say
    why."""
    try:
        if os.path.isfile(path):  # a named pipe would wait for somebody to write
            with Image.open(path) as image:
                return image.size
        entry = packs.find(path)
        return None if entry is None else Image.open(io.BytesIO(entry.read())).size
    except Exception:  # Pillow's plugins raise nearly anything on damaged bytes
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as "RGB", with 8 bits a channel. An RGB image is returned as it is.

    Alpha and transparent colours are dropped, not blended, like `Image.convert("RGB")` in the published evaluation
    code and in timm.

    Greys of more than 8 bits are scaled from the range that their TIFF file states to 0..255 (Pillow's own `convert`
    clips them). Where none is stated, I;16 and I;16B hold 0..65535. Mode I holds 0..65535 too, or 0..255 where no value
    is larger. Mode F holds 0..255, as Pillow's conversions write it; it is rounded and clipped.

    A 16-bit PNG holds 0..65535, because its specification says so, as 8 bits hold 0..255 and as every browser shows
    it. So a dark one is dark. Its `sBIT` chunk may state fewer significant bits. Writers that follow the specification
    scale such samples to 0..65535. Others leave them as they were measured, 12 bits as 0..4095; the bits that should be
    empty then tell, and the range is that of the stated bits. Without `sBIT`, nothing tells a dark picture from 12 bits
    that were not scaled, so one that is nearly black is taken with a warning.

    Raises `ImageError` for values outside those ranges, NaN included, for an F image in 0..1, and for values that take
    so little of their range that the picture would be nearly black, from anything but a PNG.
    """
    return convert(image, "RGB")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("La", "RGBa"):  # premultiplied: Pillow only converts them to their plain forms
        image = image.convert(image.mode.upper())
    elif isinstance(image.info.get("transparency"), bytes):  # same colours, but the direct conversion makes Pillow warn
        image = image.convert("RGBA")
    return image.convert("RGB")


def decode(
    source: Any, min_side: Sides | Callable[[tuple[int, int]], Sides] | None, max_pixels: int = MAX_PIXELS
) -> Decoded:
    """Like `load_image`, but in the file's own mode, and with the full size and the covered part of a scaled decode.

    `min_side` may also be a function of the full (height, width). It is called only for a JPEG, before decoding.
    """
    name = name_of(source)
    if isinstance(source, Image.Image):
        _check_pixels(source, name, max_pixels)
        with reading(name):
            source.load()
            upright = source if _orientation(source) == 1 else ImageOps.exif_transpose(source)
        return Decoded(upright, (upright.height, upright.width), None)

    return _decode_bare(_read_bytes(source, name), name, min_side, max_pixels)


def read(source: Any) -> Jpeg | Image.Image:
    """A JPEG of which the header alone is read, or any other image, upright and in RGB.

    For `source` and errors, see `load_image`. A JPEG in CMYK counts as another image.
    """
    name = name_of(source)
    if not isinstance(source, Image.Image):
        data = _read_bytes(source, name)
        if data.startswith(b"\xff\xd8"):
            header = _opened(data, name, MAX_PIXELS)
            if header.format in ("JPEG", "MPO") and header.mode in ("RGB", "L"):
                return Jpeg(name, data, header, _orientation(header))
        image = _decode_bare(data, name, None, MAX_PIXELS).image
    else:
        image = decode(source, None).image
    with reading(name):
        return convert(image, "RGB", name)


def _decode_bare(
    data: bytes, name: str, min_side: Sides | Callable[[tuple[int, int]], Sides] | None, max_pixels: int
) -> Decoded:
    """Decodes the bytes of a file, or what is left of them without texts that Pillow refuses."""
    try:
        return _decode(data, name, min_side, max_pixels)
    except ImageError:
        if (bare := without_texts(data)) is None:
            raise
    return _decode(bare, name, min_side, max_pixels)


def _decode(
    data: bytes, name: str, min_side: Sides | Callable[[tuple[int, int]], Sides] | None, max_pixels: int
) -> Decoded:
    image = _opened(data, name, max_pixels)
    if image.format == "PNG" and (bits := _significant_bits(data)):
        image.info[_SBIT] = bits
    with reading(name):
        full, drafted = image.size, None
        if min_side is not None and image.format in ("JPEG", "MPO"):
            lying = _orientation(image) >= 5  # stored on its side
            sides = min_side(full if lying else full[::-1]) if callable(min_side) else min_side
            rows, columns = (sides, sides) if isinstance(sides, int) else sides
            if lying:
                rows, columns = columns, rows
            drafted = image.draft(image.mode, (_DRAFT_GAP * columns, _DRAFT_GAP * rows))
        image.load()
        orientation = _orientation(image)
        if orientation != 1:
            ImageOps.exif_transpose(image, in_place=True)
    if drafted is None:
        return Decoded(image, (image.height, image.width), None)
    return Decoded(image, full if orientation >= 5 else full[::-1], _draft_box(image, drafted[1], orientation))


def _opened(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """The image with its header read and checked."""
    with reading(name, data):
        image = Image.open(io.BytesIO(data))
    if image.format in _NO_PICTURES:
        raise ImageError(f"{name} is an {image.format} file, expected a picture; render it to PNG first")
    _check_pixels(image, name, max_pixels)
    return image


_PNG = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def _significant_bits(data: bytes) -> int:
    """The number of significant bits of the first channel that a PNG file states; 0 if it states none."""
    place = len(_PNG)
    while place + 12 <= len(data) and (kind := data[place + 4 : place + 8]) != b"IDAT":
        if kind == b"sBIT":
            return data[place + 8]
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    return 0


def without_texts(data: bytes) -> bytes | None:
    """A PNG file without its texts and its colour profile; None for a file that has none.

    Pillow refuses a whole file where these take more than a megabyte, and none of them changes a pixel.
    """
    if not data.startswith(_PNG):
        return None
    kept, place = [_PNG], len(_PNG)
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] not in _TEXTS:
            kept.append(data[place:end])
        place = end
    bare = b"".join(kept)
    return bare if len(bare) < len(data) else None


def _draft_box(
    image: Image.Image, stored: tuple[float, float, float, float], orientation: int
) -> tuple[float, float, float, float]:
    """The part of the upright, scaled `image` that the file covers.

    If the scale does not divide a side, the file ends within a pixel, at the right and bottom edges of the stored
    image. To take that pixel as whole would shift the picture by up to half a pixel: 2.8/255 instead of 0.15/255 on
    average in the test.
    """
    width, height = (stored[3], stored[2]) if orientation >= 5 else (stored[2], stored[3])
    left = image.width - width if orientation in (2, 3, 6, 7) else 0.0
    top = image.height - height if orientation in (3, 4, 7, 8) else 0.0
    return (left, top, left + width, top + height)


def name_of(source: Any) -> str:
    """The name of a source in messages."""
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        return text if len(text) <= 200 else f"{text[:80]}..."
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or "<image>")
    return "<bytes>" if _is_bytes(source) else str(getattr(source, "name", "<file>"))


def _is_bytes(source: Any) -> bool:
    return isinstance(source, (bytes, bytearray, memoryview))


def is_encoded(source: Any) -> bool:
    """Whether `source` is an image file in some form: a path, bytes or a file object."""
    return _is_bytes(source) or isinstance(source, (str, os.PathLike)) or callable(getattr(source, "read", None))


def _read_bytes(source: Any, name: str) -> bytes:
    if not is_encoded(source):
        raise ImageError(
            "expected an image as a path, bytes, a binary file or a PIL image, found an object of type "
            f"{type(source).__name__}; convert it first"
        )
    if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        raise ImageError(f"{name} is a URL, expected a local file; download it first and give its path or bytes")
    if isinstance(source, (str, os.PathLike)):
        data = _read_path(source, name)
    else:
        data = bytes(source) if _is_bytes(source) else source.read()
    if not isinstance(data, bytes):
        raise ImageError(
            f'{name} gives an object of type {type(data).__name__}, expected bytes; open the file with mode "rb"'
        )
    if not data:
        raise ImageError(f"{name} is empty (0 bytes), expected an image; copy or download it again")
    return data


_NO_FILES = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
"""What may wait for ever, or never end, by the type that `stat` gives."""


def _read_path(path: str | os.PathLike[str], name: str) -> bytes:
    try:
        kind = stat.S_IFMT(os.stat(Path(path)).st_mode)
        if kind in _NO_FILES and not name.startswith(("/dev/stdin", "/dev/fd/")):  # a shell's <(command) is asked for
            raise ImageError(
                f"{name} is {_NO_FILES[kind]}, expected a regular file; take it away, or save what it gives"
            )
        return Path(path).read_bytes()
    except ImageError:
        raise
    except FileNotFoundError:
        if (packed := _read_packed(path, name)) is not None:
            return packed
        slashes = "write its path with / instead of \\" if "\\" in name and os.sep == "/" else "check the path"
        raise ImageError(f"{name} does not exist; {slashes}") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a folder, expected one image file; give the files in it one by one") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise ImageError(f"{name} cannot be opened ({error}); check the path and its permissions") from error


def _read_packed(path: str | os.PathLike[str], name: str) -> bytes | None:
    """The bytes of an image in a pack; None if there is none at this path."""
    try:
        entry = packs.find(path)
        return None if entry is None else entry.read()
    except (OSError, ValueError) as error:
        raise ImageError(f"{name} can't be read from its pack: {error}") from None


@contextmanager
def reading(name: str, data: bytes = b"") -> Iterator[None]:
    """Turns any error of Pillow into an `ImageError`. Pillow's plugins raise nearly anything on damaged bytes."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name} is too large for Pillow ({error}); shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from error
    except Exception as error:
        if b"<svg" in data[:1024].lower():
            raise ImageError(f"{name} is an SVG drawing, expected pixels; render it to PNG first") from error
        if isinstance(error, Image.UnidentifiedImageError):
            raise ImageError(f"{name} is not an image that Pillow can read; convert it to JPEG or PNG") from error
        raise ImageError(f"{name} is damaged or cut short ({error}); replace the file") from error


def _check_pixels(image: Image.Image, name: str, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"{name} has {image.width}x{image.height} pixels, more than the limit of {max_pixels}; "
            f"shrink it, or call load_image(..., max_pixels=...) if you trust it"
        )


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8. It is 1 (upright) without an EXIF block, and with a damaged one.

    A damaged EXIF block is no reason to refuse the pixels.
    """
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
    return value if value in range(1, 9) else 1


def convert(image: Image.Image, mode: str | None, name: str | None = None) -> Image.Image:
    """The image in a mode: "RGB" (see `to_rgb`), "L" (grey), or None to keep its own. Messages call it `name`."""
    if mode is None or image.mode == mode:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        grey = _deep_to_grey(image, name or name_of(image))
        return grey if mode == "L" else grey.convert(mode)
    if mode == "RGB":
        return _to_rgb(image)
    return (image if image.mode in ("1", "LA") else _to_rgb(image)).convert("L")


def _deep_to_grey(image: Image.Image, name: str) -> Image.Image:
    """Scales a grey image of more than 8 bits to 8 bits: from the range that its file states, or from its mode's."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    kind = "a float image" if image.mode == "F" else "an integer image"
    held = f"{name} is {kind} (mode {image.mode}) that holds"
    if not math.isfinite(low) or not math.isfinite(high):
        raise ImageError(f"{held} NaN or infinity, expected finite values; replace those pixels")
    held += f" {low:g}..{high:g}" if image.mode == "F" else f" {low}..{high}"
    stated = _stated_range(image)
    if stated is not None:
        start, end = stated
        if low < start or high > end:
            raise ImageError(f"{held}, but states {start:g}..{end:g} (MinSampleValue, MaxSampleValue); correct these")
    elif image.mode == "F":
        if low >= 0 and 0 < high <= 1:
            raise ImageError(f"{held}, expected 0..255; multiply it by 255")
        if max(-low, high) > _OVERSHOOT * 255 or ((values < 0) | (values > 255)).mean() > 0.5:
            raise ImageError(f"{held}, expected 0..255; scale it first, or state MinSampleValue and MaxSampleValue")
        start, end = 0, 255
    else:
        if low < 0 or high > 65535:
            raise ImageError(f"{held}, expected 0..65535; scale it first, or state MinSampleValue and MaxSampleValue")
        start, end = 0, 255 if image.mode == "I" and high <= 255 and image.format != "PNG" else 65535
    if stated is None and 0 < high < (end + 1) / _DARK:
        if image.format == "PNG":
            if _SBIT not in image.info:
                warnings.warn(
                    f"{held}, so it is nearly black, because a 16-bit PNG holds 0..65535; if that is wrong, scale it, "
                    "or state its bits in sBIT",
                    stacklevel=2,
                )
        else:
            raise ImageError(
                f"{held}, which is nearly black where 0..{end} is expected; scale it first, or state MinSampleValue "
                "and MaxSampleValue"
            )
    levels = (values.astype(np.float64) - start) * (255 / (end - start))
    return Image.fromarray(np.clip(_inverted(image, np.rint(levels)), 0, 255).astype(np.uint8))


_OVERSHOOT = 4
"""Values of a float image up to so many times 255 are what a filter left, and are clipped."""
_DARK = 16
"""An image whose largest value is below this part of its range was measured on another scale."""
_SBIT = "significant_bits"
"""The key of `info` under which `decode` keeps what a PNG's `sBIT` chunk states. Pillow skips that chunk."""
_BITS, _PHOTOMETRIC = 258, 262  # TIFF tags
_RANGES = ((340, 341), (280, 281))  # SMinSampleValue and SMaxSampleValue, MinSampleValue and MaxSampleValue


def _stated_range(image: Image.Image) -> tuple[float, float] | None:
    """The lowest and the highest value that a TIFF or PNG file says its pixels may have."""
    bits = image.info.get(_SBIT, 16)
    if image.format == "PNG" and image.mode.startswith("I") and 0 < bits < 16:
        # Samples that were scaled to 16 bits have nothing in the others, apart from rounding.
        values = np.asarray(image)
        scaled = values.max() >= 2**bits or not ((values & (2 ** (16 - bits) - 1)) > 1).any()
        return None if scaled else (0, 2**bits - 1)
    tags = getattr(image, "tag_v2", {})
    for lowest, highest in _RANGES:
        with suppress(TypeError, ValueError, IndexError):  # damaged tags state nothing
            start, end = (
                float(np.ravel(tags[tag])[0]) if tag in tags else low
                for tag, low in ((lowest, 0.0), (highest, math.nan))
            )
            if math.isfinite(start) and math.isfinite(end) and start < end:
                return start, end
    bits = tags.get(_BITS, (0,))
    if image.mode.startswith("I;16") and len(bits) == 1 and 8 < bits[0] < 16:
        return 0, 2 ** bits[0] - 1
    return None


def _inverted(image: Image.Image, levels: np.ndarray) -> np.ndarray:
    """Light and dark exchanged where a TIFF file says that 0 is white, which Pillow heeds in 8 bits alone."""
    return 255 - levels if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0 else levels
