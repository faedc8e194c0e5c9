"""JPEG files for training, beside Pillow: the same pixels to the bit, whoever decodes, and the same faults."""

import io
import random
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image, ImageOps
from support.checks import raises_saying, run_python
from support.pictures import encode, exif, noise, smooth

from deit.image import jpeg
from deit.image.decode import ImageError, load_image, read, reading
from deit.image.jpeg import Jpeg

READERS = [
    "Pillow",
    pytest.param("simplejpeg", marks=pytest.mark.skipif(not find_spec("simplejpeg"), reason="without the extra fast")),
]


@pytest.fixture(params=READERS)
def reader(request, monkeypatch):
    if request.param == "Pillow":
        monkeypatch.setattr(jpeg, "_fast", lambda: None)
    assert jpeg.reader().startswith(request.param)
    return request.param


def kinds():
    """Files of all samplings of colour, sizes around the blocks' and ways to order the values."""
    for height, width in [(1, 1), (7, 9), (16, 16), (33, 17), (123, 257), (300, 8)]:
        picture = Image.fromarray(noise(-(-height // 4), -(-width // 4))).resize((width, height))
        for sampling in (0, 1, 2):
            for progressive in (False, True):
                yield picture, {"subsampling": sampling, "progressive": progressive, "quality": 80}
        yield picture.convert("L"), {"quality": 90}
        yield picture, {"restart_marker_rows": 1}
        yield picture, {"keep_rgb": True}


def test_the_pixels_are_those_of_pillow(reader):
    for picture, options in kinds():
        data = encode(picture, **options)
        found = read(data)
        assert isinstance(found, Jpeg)
        assert found.size == (picture.height, picture.width)
        for scale in (scale for scale in (1, 2, 4, 8) if scale <= min(picture.size)):
            theirs = Image.open(io.BytesIO(data))
            theirs.draft(theirs.mode, (picture.width // scale, picture.height // scale))
            np.testing.assert_array_equal(found.decode(scale).stored, np.asarray(theirs.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_is_upright(reader, orientation):
    """At full scale, its pixels are those of the upright picture. At a smaller one, it lies where it does in an upright
    picture of that scale, which the file covers from its own first pixel on."""
    data = encode(smooth(110, 150), quality=95, exif=exif(orientation))
    upright = np.asarray(load_image(data))
    found = read(data)
    assert found.size == upright.shape[:2]
    pixels, place = found.decode().cut((20, 30, 51, 43))
    np.testing.assert_array_equal(pixels, upright[20:71, 30:73])
    assert place == (0, 0, 43, 51)
    theirs = Image.open(io.BytesIO(data))
    theirs.draft("RGB", (150 // 4, 110 // 4))
    theirs = np.asarray(ImageOps.exif_transpose(theirs))
    pixels, (left, top, right, bottom) = found.decode(4).cut((20, 30, 51, 43))
    assert (right - left, bottom - top) == (43 / 4, 51 / 4)
    below, after = (110 / 4 - 28, 150 / 4 - 38) if orientation < 5 else (150 / 4 - 38, 110 / 4 - 28)
    origin = (
        -below if orientation in (3, 4, 7, 8) else 0,
        -after if orientation in (2, 3, 6, 7) else 0,
    )
    first = (int(origin[0] + 20 / 4), int(origin[1] + 30 / 4))
    assert (first[0] + top, first[1] + left) == (origin[0] + 20 / 4, origin[1] + 30 / 4)
    np.testing.assert_array_equal(
        pixels, theirs[first[0] : first[0] + pixels.shape[0], first[1] : first[1] + pixels.shape[1]]
    )


def damaged(count):
    """Small photos cut short, with other bytes, with markers in the midst of values, or with bytes missing."""
    draw = random.Random(0)
    photos = [
        encode(smooth(80, 96), quality=80, progressive=i % 3 == 0, subsampling=i % 3, optimize=i % 2 == 0)
        for i in range(6)
    ]
    for i in range(count):
        data = bytearray(photos[i % 6])
        place = draw.randrange(200, len(data) - 2)
        if i % 4 == 0:
            data = data[:place]
        elif i % 4 == 1:
            data[place] = draw.randrange(256)
        elif i % 4 == 2:
            data[place : place + 2] = bytes([255, draw.randrange(256)])
        else:
            del data[place : place + draw.randrange(1, 100)]
        yield bytes(data)


def decoded(data):
    found = read(data)
    with reading("<bytes>"):
        return found if isinstance(found, Image.Image) else found.decode().stored


def outcome(call, data):
    """The pixels, or why there are none."""
    try:
        return np.asarray(call(data))
    except ImageError as error:
        return str(error)


def test_damaged_files_are_what_they_are_to_pillow(reader):
    """Whether one is refused, and why; and the pixels of those that are not."""
    refused = taken = 0
    for data in damaged(400):
        theirs, ours = outcome(load_image, data), outcome(decoded, data)
        assert type(ours) is type(theirs)
        np.testing.assert_array_equal(ours, theirs)
        refused += isinstance(ours, str)
        taken += isinstance(ours, np.ndarray)
    assert refused > 100
    assert taken > 100


def test_limits_hold_before_anything_is_decoded(reader, tmp_path, monkeypatch):
    whole = bytearray(encode(smooth(8, 8)))
    place = whole.index(b"\xff\xc0") + 5
    whole[place : place + 4] = b"\xff\x00\xff\x00"  # 65,280 rows and columns
    monkeypatch.setattr(Jpeg, "decode", None)
    with raises_saying(ImageError, "too large"):
        read(bytes(whole))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "huge.jpg").write_bytes(whole)
    with raises_saying(ImageError, "huge.jpg", "65280x65280 pixels", "limit"):
        read(tmp_path / "huge.jpg")


def test_other_images_are_decoded_at_once(tmp_path):
    """CMYK too, whose colours Pillow alone knows."""
    picture = smooth(20, 30)
    for image, form in ((picture, "PNG"), (picture.convert("CMYK"), "JPEG"), (picture.convert("L"), "GIF")):
        data = encode(image, form)
        found = read(data)
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), np.asarray(load_image(data)))
    np.testing.assert_array_equal(
        np.asarray(read(picture.convert("P"))), np.asarray(picture.convert("P").convert("RGB"))
    )


def test_without_the_extra():
    """The package works, and says who reads."""
    code = (
        "import sys; sys.modules['simplejpeg'] = None\n"
        "from deit.image import jpeg; from deit.image.decode import read; import io; from PIL import Image\n"
        "file = io.BytesIO(); Image.new('RGB', (9, 7), 'red').save(file, 'JPEG')\n"
        "print(jpeg.reader().split()[0], jpeg.is_fast(), read(file.getvalue()).decode().stored.shape)"
    )
    assert run_python(code) == "Pillow False (7, 9, 3)"
