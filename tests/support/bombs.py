"""Images that are small to send and large to decode."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name, content=b""):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def scans(count, side=7071):
    """A progressive JPEG whose last scan is there many times. Each walks over all pixels."""
    whole = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True, quality=10)
    return whole[:-2] + whole[whole.rindex(b"\xff\xda") : -2] * count + b"\xff\xd9"


def grown(kind, size):
    """A small picture with so many bytes of parts that say nothing."""
    image = Image.new("P", (32, 32))
    if kind in ("markers", "fill"):
        part = {"markers": b"\xff\xe0\x00\x02", "fill": b"\xff"}[kind]
        return b"\xff\xd8" + part * (size // len(part)) + encoded(image.convert("L"), "JPEG")[2:]
    if kind == "blocks":
        whole = encoded(image, "GIF")
        start = whole.index(b"\x2c")
        return whole[:start] + b"\x21\xfe\x01a\x00" * (size // 5) + whole[start:]
    whole = encoded(image, "PNG")
    return whole[:33] + chunk({"chunks": b"abCd", "data": b"IDAT"}[kind]) * (size // 12) + whole[33:]


def blank(size, mode="L", kind="PNG"):
    """A picture of one colour, (width, height): a few bytes for each thousand pixels."""
    return encoded(Image.new(mode, size), kind)


def deep(side):
    """A PNG of 16 bits for each value."""
    return encoded(Image.fromarray(np.full((side, side), 40_000, np.uint16)), "PNG")
