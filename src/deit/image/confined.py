"""Decodes images of strangers, in a process of its own that ends if it takes too much time or memory.

`work` is that process. It reads one image after the other from a pipe and answers each with its pixels or a sentence.
Nothing that it sends back is unpickled, so even a decoder that a stranger took over can send nothing but pixels.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
from PIL import Image

from deit.image.decode import ImageError, reading, without_texts
from deit.image.processor import DeiTImageProcessor

FORMATS = {"JPEG": "JPEG", "MPO": "JPEG", "PNG": "PNG", "WEBP": "WebP", "GIF": "GIF", "TIFF": "TIFF", "BMP": "BMP"}
"""The formats that are decoded for strangers, from Pillow's name to the usual one. Pillow knows more formats, but one
of them (EPS) starts a program."""

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_SCAN = b"\xff\xda"
"""What a scan of a JPEG begins with."""
_FIRST_BYTES = (_JPEG, _PNG, b"RIFF", b"GIF8", b"II*\x00", b"MM\x00*", b"BM")

_SCANS = 100
"""Most scans of a JPEG. Encoders write about ten. Each one walks over all pixels, however few bytes it has."""
_SEGMENTS = 2_000
"""Most segments before the first scan of a JPEG. The longest colour profile takes 255 of them, and 20 MB of metadata
take 320."""
_CHUNKS = 20_000
"""Most chunks of a PNG. 20 MB in the 8 KB that the usual library writes are 2,500."""

_LIGHT = 4
"""A JPEG with one scan counts a quarter of its pixels, because it is decoded at a smaller scale."""

READY = b"R"
"""What the process says when it has started."""
PIXELS, SENTENCE, TOO_MUCH = b"P", b"S", b"M"
"""The first byte of an answer: float32 pixels follow, or a sentence in UTF-8, or nothing."""


class Bounds(NamedTuple):
    """What one image may take."""

    pixels: int
    """Most pixels of an image. Others are refused."""
    work: int
    """Most pixels that have to be decoded in this process. Others are answered `TOO_MUCH`."""
    seconds: float
    """Seconds of the processor. The process ends if an image takes more."""
    memory: int
    """Bytes beyond what the process takes at rest. An image that needs more is answered `TOO_MUCH`."""
    shape: tuple[int, ...]
    """Shape that the pixels must have, (channels, height, width)."""


def work(connection: Connection, processor: DeiTImageProcessor, bounds: Bounds) -> None:
    """Answers images until the other end closes the connection."""
    Image.init()
    _confine(bounds)
    connection.send_bytes(READY)
    while True:
        try:
            data = connection.recv_bytes()
        except EOFError:
            return
        _allow(bounds.seconds)
        found = answer(data, processor, bounds)
        _allow(0)
        connection.send_bytes(found)


def _confine(bounds: Bounds) -> None:
    warnings.simplefilter("ignore")
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C in a terminal is for the server alone, which still answers what came
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders in C write what they think of a file there
    if sys.platform == "linux":
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + bounds.memory,) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _allow(seconds: float) -> None:
    """Ends the process after so many seconds of the processor; 0 takes the limit away."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def answer(data: bytes, processor: DeiTImageProcessor, bounds: Bounds) -> bytes:
    """The answer to one image."""
    try:
        if check_header(data, bounds.pixels) > bounds.work:
            return TOO_MUCH
        pixels = processor([data]).pixel_values[0]
        if pixels.shape != bounds.shape:  # possible if nothing is resized; it would spoil its batch
            raise ImageError(f"the image gives pixels of {pixels.shape}, expected {bounds.shape}; resize it")
    except MemoryError:
        return TOO_MUCH
    except (ImageError, ValueError) as error:
        return SENTENCE + str(error).replace("<bytes>", "the image").encode("utf-8", "replace")
    except Exception as error:
        return SENTENCE + f"the image can't be decoded ({type(error).__name__}); convert it to PNG".encode()
    return PIXELS + np.ascontiguousarray(pixels, np.float32).tobytes()


def check_header(data: bytes, max_pixels: int) -> int:
    """The number of pixels that have to be decoded.

    Raises `ImageError` for a format outside `FORMATS`, for more than `max_pixels`, and for a file of countless parts,
    before anything is decoded.
    """
    _refuse_countless(data)
    try:
        return _check_header(data, max_pixels)
    except ImageError:
        if (bare := without_texts(data)) is None:
            raise
        return _check_header(bare, max_pixels)


def _check_header(data: bytes, max_pixels: int) -> int:
    too_large = f"the image has more than the {max_pixels} pixels allowed here; shrink it"
    found = None
    if data.startswith(_FIRST_BYTES):
        with reading("the image", data):
            try:
                found = Image.open(io.BytesIO(data))
            except Image.DecompressionBombError:
                raise ImageError(too_large) from None
    if found is None or found.format not in FORMATS:
        *most, last = dict.fromkeys(FORMATS.values())
        raise ImageError(f"the image is not a {', '.join(most)} or {last} file; convert it to one of them")
    pixels = found.width * found.height
    if pixels > max_pixels:
        raise ImageError(too_large)
    # Pillow has read up to the pixels of the first scan, and not counted that of a camera's preview before it.
    once = found.format == "JPEG" and found.fp is not None and data.find(_SCAN, found.fp.tell()) < 0
    return pixels // _LIGHT if once else pixels


def _refuse_countless(data: bytes) -> None:
    """Raises `ImageError` for more parts than any program writes: Pillow takes microseconds for each one, and a scan of
    a JPEG takes as long as a whole picture."""
    if data.startswith(_PNG):
        place, parts = len(_PNG), 0
        while place + 12 <= len(data) and parts <= _CHUNKS:
            place += 12 + int.from_bytes(data[place : place + 4], "big")
            parts += 1
        _refuse(parts > _CHUNKS, f"{_CHUNKS} chunks")
    elif data.startswith(_JPEG):
        _refuse(data.count(_SCAN) > _SCANS, f"{_SCANS} scans")
        place, parts = 2, 0
        while place + 4 <= len(data) and parts <= _SEGMENTS and data[place + 1] != 0xDA:
            whole = data[place] == 0xFF and data[place + 1] not in (0, 0xFF)
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big") if whole else 1
            parts += 1
        _refuse(parts > _SEGMENTS, f"{_SEGMENTS} segments")


def _refuse(countless: bool, most: str) -> None:
    if countless:
        raise ImageError(f"the image has more than {most}; save it again with another program")
