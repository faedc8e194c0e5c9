"""Files and Pillow images decoded to upright RGB pictures."""

import io
import os
import re
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, features
from PIL.PngImagePlugin import PngInfo
from support.pictures import encode, exif, noise, smooth

from deit.image.decode import ImageError, image_suffixes, load_image, to_rgb
from deit.image.processor import DeiTImageProcessor

MODES = [
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
    "I",
    "I;16",
    "F",
]


@pytest.mark.parametrize("mode", MODES)
def test_to_rgb(mode):
    """Every mode of Pillow gives the colours it stands for, grey for the deep ones."""
    picture = smooth(40, 60)
    if mode == "PA":
        image = picture.convert("P").convert("PA")
    elif mode in ("La", "RGBa"):
        image = picture.convert(mode.upper()).convert(mode)
    elif mode == "LAB":
        image = Image.new("LAB", (60, 40), (255, 128, 128))
        picture = Image.new("RGB", (60, 40), "white")
    elif mode in ("I", "I;16"):
        image = Image.fromarray(np.asarray(picture.convert("L")).astype(np.int32) * 257)
        image = image if mode == "I" else Image.fromarray(np.asarray(image).astype(np.uint16))
    else:
        image = picture.convert(mode)
    assert image.mode == mode
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = to_rgb(image)
    assert got.mode == "RGB"
    grey = mode in ("1", "L", "LA", "La", "I", "I;16", "F")
    expected = np.asarray(picture.convert("L").convert("RGB") if grey else picture).astype(int)
    tolerance = {"1": 255, "P": 60, "PA": 60, "YCbCr": 4, "HSV": 12, "LAB": 2, "F": 1}.get(mode, 0)
    assert np.abs(np.asarray(got).astype(int) - expected).max() <= tolerance
    if mode == "1":
        np.testing.assert_array_equal(got, np.asarray(image)[..., None].repeat(3, 2) * 255)


def test_alpha_is_dropped():
    pixels = noise(9, 9, 4)
    np.testing.assert_array_equal(to_rgb(Image.fromarray(pixels)), pixels[..., :3])
    palette = smooth(30, 30).convert("P")
    for transparency in (3, bytes([0, 255, 128])):
        file = encode(palette, "PNG", transparency=transparency)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(load_image(file), palette.convert("RGB"))


@pytest.mark.parametrize("dtype", ["uint16", ">u2", "int32"])
def test_deep_images(dtype):
    values = np.array([[0, 1, 128, 129, 257, 32768, 65278, 65535]])
    image = (
        Image.frombytes("I;16B", (8, 1), values.astype(">u2").tobytes())
        if dtype == ">u2"
        else Image.fromarray(values.astype(dtype))
    )
    expected = np.round(values / 257)
    for mode in ("RGB", "L"):
        got = np.asarray(load_image(image, mode=mode)).reshape(1, 8, -1)[..., 0]
        np.testing.assert_array_equal(got, expected)
    file = encode(Image.fromarray(values.astype(np.uint16)), "PNG")
    np.testing.assert_array_equal(np.asarray(load_image(file))[..., 0], expected)


def test_float_images():
    image = Image.fromarray(np.array([[-3.0, 0.4, 0.6, 127.6, 254.9, 900.0]], np.float32))
    assert np.asarray(to_rgb(image))[0, :, 1].tolist() == [0, 0, 1, 128, 255, 255]
    for value, message in ((np.nan, "NaN"), (np.inf, "infinity"), (0.7, "multiply it by 255")):
        with pytest.raises(ImageError, match=message):
            to_rgb(Image.fromarray(np.full((2, 2), value, np.float32)))
    with pytest.raises(ImageError, match=r"holds 70000..70000, expected 0..65535"):
        to_rgb(Image.fromarray(np.full((2, 2), 70000, np.int32)))


def test_channels_follow_the_mean():
    picture = smooth(50, 50)
    grey = {"image_mean": [0.5], "image_std": [0.5]}
    rgb = DeiTImageProcessor()(picture.convert("L"), "np").pixel_values
    np.testing.assert_array_equal(rgb, DeiTImageProcessor()(picture.convert("L").convert("RGB"), "np").pixel_values)
    assert DeiTImageProcessor(image_mean=0.5)(picture.convert("L"), "np").pixel_values.shape == (1, 3, 224, 224)
    one = DeiTImageProcessor(**grey)(picture.convert("L"), "np").pixel_values
    np.testing.assert_array_equal(DeiTImageProcessor(**grey)(picture, "np").pixel_values, one)
    np.testing.assert_array_equal(one[:, 0], rgb[:, 0])
    with pytest.raises(ValueError, match="has 3 channels, image_mean has 1"):
        DeiTImageProcessor(**grey, do_convert_rgb=True)(picture)
    with pytest.raises(ValueError, match="has 4 channels, image_mean has 3"):
        DeiTImageProcessor(do_convert_rgb=False)(picture.convert("RGBA"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_orientation(orientation, form):
    file = encode(smooth(34, 50), form, exif=exif(orientation))
    turned = np.asarray(Image.open(io.BytesIO(file)) if form == "JPEG" else smooth(34, 50))
    if orientation >= 5:
        turned = turned.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    got = load_image(file)
    np.testing.assert_array_equal(got, turned)
    np.testing.assert_array_equal(load_image(got), turned)  # once is enough
    opened = Image.open(io.BytesIO(file))
    np.testing.assert_array_equal(load_image(opened), turned)
    assert opened.size == Image.open(io.BytesIO(file)).size


def test_damaged_exif_is_ignored():
    file = bytearray(encode(smooth(34, 50), exif=exif(6)))
    at = file.index(b"Exif\0\0") + 6
    file[at : at + 8] = b"\xff" * 8
    assert load_image(bytes(file)).size == (50, 34)
    assert load_image(encode(smooth(34, 50), exif=exif(77)), min_side=8).size == (25, 17)


@pytest.mark.parametrize(
    ("side", "size"),
    [
        (None, (1203, 901)),
        (500, (1203, 901)),
        (226, (1203, 901)),
        (225, (602, 451)),
        ((225, 300), (602, 451)),
        ((100, 301), (1203, 901)),
        (112, (301, 226)),
        (50, (151, 113)),
        (1, (151, 113)),
    ],
)
def test_scaled_decoding(side, size):
    """As small as twice the wanted sides allow, also for a photo that lies on its side in the file."""
    picture = smooth(901, 1203)
    assert load_image(encode(picture), min_side=side).size == size
    lying = encode(picture.transpose(Image.Transpose.ROTATE_90), exif=exif(6))
    assert load_image(lying, min_side=side).size == size
    assert load_image(encode(picture, "PNG", compress_level=1), min_side=side).size == (1203, 901)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_scaled_decoding_values(orientation):
    """Sides that 8 does not divide, any orientation: measured 0.15/255 on average, 2.8/255 if the box were whole."""
    file = encode(smooth(1021, 1307), quality=95, exif=exif(orientation))
    for processor in (DeiTImageProcessor.paper(56), DeiTImageProcessor(size=(64, 70), crop_size=56)):
        full = processor(load_image(file), "np", do_normalize=False).pixel_values
        scaled = processor(file, "np", do_normalize=False).pixel_values
        assert load_image(file, min_side=64).width in (327, 256)
        assert np.abs(full - scaled).mean() < 0.3 / 255


def test_no_scaling_without_resize():
    out = DeiTImageProcessor(do_resize=False, do_center_crop=False)(encode(smooth(901, 1203)), "np")
    assert out.pixel_values.shape == (1, 3, 901, 1203)


def test_first_frame():
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    for form in ("GIF", "TIFF", "PNG", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        file = encode(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert Image.open(io.BytesIO(file)).n_frames == 2
        assert load_image(file).getpixel((3, 3)) == (255, 0, 0)


def test_modes():
    file = encode(smooth(20, 30).convert("P"), "PNG")
    assert load_image(file).mode == "RGB"
    assert load_image(file, mode=None).mode == "P"
    assert load_image(file, mode="L").mode == "L"
    with pytest.raises(ValueError, match="mode is 'CMYK'"):
        load_image(file, mode="CMYK")
    cmyk = smooth(20, 30).convert("CMYK")
    np.testing.assert_array_equal(load_image(encode(cmyk, "TIFF")), cmyk.convert("RGB"))


def test_pixel_limit(monkeypatch):
    file = encode(Image.new("1", (300, 200)), "PNG")
    with pytest.raises(ImageError, match=r"<bytes> has 300x200 pixels, more than the limit of 59999"):
        load_image(file, max_pixels=59_999)
    with pytest.raises(ImageError, match="more than the limit of 5;"):
        load_image(Image.new("L", (3, 2)), max_pixels=5)
    assert load_image(file, max_pixels=60_000).size == (300, 200)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="too large for Pillow"):
        load_image(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="too large for Pillow"):
            load_image(file)


def test_pixel_limit_is_checked_first():
    """The pixels that a header promises are counted before they are looked for."""
    file = bytearray(encode(Image.new("L", (8, 8)), "BMP"))
    file[18:26] = np.array([8_000, 9_000], "<i4").tobytes()
    with pytest.raises(ImageError, match="8000x9000 pixels"):
        load_image(bytes(file), max_pixels=70_000_000)
    file[18:26] = np.array([80_000, 90_000], "<i4").tobytes()
    with pytest.raises(ImageError, match="too large for Pillow"):
        load_image(bytes(file))


def test_unreadable(tmp_path):
    jpeg, png = encode(smooth(60, 80)), encode(smooth(60, 80), "PNG")
    cases = {
        "empty.jpg": (b"", "is empty"),
        "text.jpg": (b"hello, this is not a photo\n" * 9, "not an image that Pillow can read"),
        "a.svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "is an SVG drawing"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "damaged or cut short"),
        "half.png": (png[: len(png) // 2], "damaged or cut short"),
        "head.png": (png[:20], "damaged or cut short|not an image"),
        "corrupt.png": (png[:60] + bytes(60) + png[120:], "damaged or cut short"),
    }
    for name, (data, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        for source, shown in ((path, name), (str(path), name), (data, "<bytes>")):
            for read in (load_image, DeiTImageProcessor()):
                with pytest.raises(ImageError, match=message) as caught:
                    read(source)
                assert shown in str(caught.value)
                assert "\n" not in str(caught.value)
    with path.open("rb") as file, pytest.raises(ImageError, match=r"corrupt\.png is damaged"):
        load_image(file)


def test_no_file(tmp_path):
    for source, message in [
        (tmp_path, "is a folder"),
        (tmp_path / "none.jpg", "none.jpg does not exist"),
        ("", "is a folder"),
        ("http://example.org/a.jpg", "download it first"),
        ("HTTPS://example.org/a.jpg", "is a URL"),
        ("a\0b", "cannot be opened"),
        ("x" * 5000, r"xxx\.\.\. cannot be opened"),
        (5, "found an object of type int"),
        (None, "found an object of type NoneType"),
        (io.StringIO("text"), 'open the file with mode "rb"'),
    ]:
        with pytest.raises(ImageError, match=message):
            load_image(source)


def test_lazy_pillow_image(tmp_path):
    data = encode(Image.fromarray(noise(60, 80)))
    (tmp_path / "half.jpg").write_bytes(data[: len(data) // 2])
    for read in (load_image, DeiTImageProcessor()):
        with Image.open(tmp_path / "half.jpg") as image, pytest.raises(ImageError, match=r"half\.jpg is damaged"):
            read(image)


def test_exif_matches_pillow():
    file = encode(smooth(60, 80), exif=exif(5))
    np.testing.assert_array_equal(load_image(file), ImageOps.exif_transpose(Image.open(io.BytesIO(file))))


def tiff(values, **options):
    return encode(Image.fromarray(values), "TIFF", **options)


def grey_of(file):
    image = np.asarray(load_image(file))
    np.testing.assert_array_equal(image[..., 0], image[..., 2])
    return image[..., 0]


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
@pytest.mark.parametrize(("low", "high"), [(0, 4095), (100, 1123), (0, 65535)])
def test_deep_greys_are_scaled_from_the_range_that_the_file_states(dtype, low, high):
    grey = np.asarray(smooth(20, 30).convert("L"))
    values = (low + grey * ((high - low) / 255)).round().astype(dtype)
    kinds = (340, 341) if dtype == "float32" else (280, 281)
    bounds = (float(low), float(high)) if dtype == "float32" else (low, high)
    file = tiff(values, tiffinfo=dict(zip(kinds, bounds, strict=True)))
    np.testing.assert_array_equal(grey_of(file), grey)
    with pytest.raises(ImageError, match=r"<bytes> is an? .* image .* states 0..200"):
        load_image(tiff(values, tiffinfo=dict(zip(kinds, (type(bounds[0])(0), type(bounds[0])(200)), strict=True))))


def test_eight_bits_in_wide_integers_are_what_they_were():
    grey = smooth(20, 30).convert("L")
    np.testing.assert_array_equal(grey_of(encode(grey.convert("I"), "TIFF")), grey)
    np.testing.assert_array_equal(to_rgb(grey.convert("I")), grey.convert("RGB"))
    np.testing.assert_array_equal(to_rgb(grey.convert("F")), grey.convert("RGB"))


def test_twelve_bits_are_twelve_bits():
    """Pillow reads such a TIFF file as 16 bits, of which four stay empty; it can't write one."""
    values = np.arange(0, 4096, 273, np.uint16).reshape(4, 4)
    file = bytearray(tiff(values))
    entry = file.index(np.array([258, 3], "<u2").tobytes() + np.array([1, 16], "<u4").tobytes())
    file[entry + 8 : entry + 10] = np.array([12], "<u2").tobytes()
    bits = "".join(f"{value:012b}" for value in values.ravel())
    packed = int(bits, 2).to_bytes(24, "big")
    start = file.index(values.tobytes())
    file[start : start + 24] = packed
    np.testing.assert_array_equal(grey_of(bytes(file)), np.arange(0, 256, 17).reshape(4, 4))


def test_white_may_be_zero():
    grey = np.asarray(smooth(20, 30).convert("L"))
    file = tiff(255 * 257 - grey.astype(np.uint16) * 257, tiffinfo={262: 0})
    np.testing.assert_array_equal(grey_of(file), grey)


@pytest.mark.parametrize(
    ("dtype", "top", "message"),
    [
        ("uint16", 255, "is an integer image (mode I;16) that holds 0..255, which is nearly black where 0..65535"),
        ("uint16", 4095, "which is nearly black where 0..65535 is expected; scale it first, or state MinSampleValue"),
        ("int32", 1000, "is an integer image (mode I) that holds 0..1000, which is nearly black where 0..65535"),
        ("int32", 15, "which is nearly black where 0..255"),
        ("int32", 70_000, "holds 0..70000, expected 0..65535"),
        ("float32", 1, "is a float image (mode F) that holds 0..1, expected 0..255; multiply it by 255"),
        ("float32", 15, "which is nearly black where 0..255"),
        ("float32", 65535, "holds 0..65535, expected 0..255; scale it first"),
        ("float32", 900, "holds 0..900, expected 0..255; scale it first"),
        ("float32", np.nan, "holds NaN or infinity"),
    ],
)
def test_deep_greys_of_unknown_range_are_refused_by_name(tmp_path, dtype, top, message):
    values = (np.linspace(0, 1, 600).reshape(20, 30) ** 0.5 * top).astype(dtype)
    path = tmp_path / "deep.tif"
    path.write_bytes(tiff(values))
    for read in (load_image, DeiTImageProcessor()):
        with pytest.raises(ImageError, match=f"^{re.escape(f'{path} ')}.*{re.escape(message)}"):
            read(path)


def with_bits(file, bits):
    """The PNG file with an sBIT chunk, after its header."""
    chunk = b"sBIT" + bytes([bits])
    return file[:33] + (1).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + file[33:]


def deep_png(values):
    return encode(Image.fromarray(values.astype(np.uint16)), "PNG")


@pytest.mark.parametrize("top", [15, 255, 4095])
def test_a_dark_png_is_dark(tmp_path, top):
    """As its specification says; the warning is for 12 bits that nobody scaled."""
    values = (np.linspace(0, 1, 600).reshape(20, 30) * top).round()
    path = tmp_path / "dark.png"
    path.write_bytes(deep_png(values))
    for read in (grey_of, lambda file: grey_of(Image.open(file))):
        with pytest.warns(UserWarning, match=rf"dark.png .* holds 0\.\.{top}, so it is nearly black"):
            np.testing.assert_array_equal(read(path), np.rint(values / 257))
    np.testing.assert_array_equal(grey_of(with_bits(deep_png(values), 16)), np.rint(values / 257))


@pytest.mark.parametrize("bits", [1, 8, 9, 10, 12, 14, 15])
@pytest.mark.parametrize("writer", ["shift", "replicate", "scale"])
@pytest.mark.parametrize("share", [1.0, 0.05])
def test_the_significant_bits_of_a_png_that_is_scaled(bits, writer, share):
    """In any of the ways that the specification knows, light or dark."""
    code = np.unique((np.linspace(0, share, 256) * (2**bits - 1)).astype(int))[None]
    values = {
        "shift": code << (16 - bits),
        "replicate": sum((code << (16 - bits)) >> (bits * i) for i in range(16 // bits + 1)),
        "scale": np.rint(code * (65535 / (2**bits - 1))),
    }[writer]
    np.testing.assert_array_equal(grey_of(with_bits(deep_png(values), bits)), np.rint(values / 257))


@pytest.mark.parametrize("bits", [8, 9, 10, 12, 14])
def test_the_significant_bits_of_a_png_that_is_not_scaled(bits):
    values = np.rint(np.linspace(0, 2**bits - 1, 200))[None]
    expected = np.rint(values * (255 / (2**bits - 1)))
    np.testing.assert_array_equal(grey_of(with_bits(deep_png(values), bits)), expected)
    values[0, 0] = 2**bits  # more than the bits hold, so they were scaled
    np.testing.assert_array_equal(grey_of(with_bits(deep_png(values), bits)), np.rint(values / 257))


def test_black_is_black():
    assert not grey_of(with_bits(deep_png(np.zeros((4, 4))), 12)).any()
    assert not grey_of(deep_png(np.zeros((4, 4)))).any()
    for dtype in ("uint16", "int32", "float32"):
        assert not grey_of(tiff(np.zeros((4, 4), dtype))).any()


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP", "many"])
def test_large_texts_and_profiles_cost_no_pixel(kind):
    picture, texts, options = smooth(20, 30), PngInfo(), {}
    if kind == "iCCP":
        options["icc_profile"] = bytes(3 * 2**20)
    elif kind == "many":
        for i in range(70):
            texts.add_text(f"key {i}", "x" * 2**20, zip=True)
    else:
        (texts.add_text if kind == "zTXt" else texts.add_itxt)("key", "x" * (3 * 2**20), zip=True)
    file = encode(picture, "PNG", pnginfo=texts, exif=exif(6), **options)
    with pytest.raises(ValueError), Image.open(io.BytesIO(file)) as opened:  # Pillow's own answer
        opened.load()
    np.testing.assert_array_equal(load_image(file), np.rot90(picture, -1))
    with pytest.raises(ImageError, match="<bytes> is damaged or cut short"):
        load_image(file[: file.index(b"IDAT") + 100])


def test_every_picture_format_counts_and_nothing_that_runs_programs():
    suffixes = image_suffixes()
    assert {".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".mpo", ".jp2", ".webp", ".tif", ".bmp", ".ppm"} <= suffixes
    assert (".avif" in suffixes) == features.check("avif")
    assert not {".eps", ".ps", ".pdf", ".mpg", ".mpeg", ".flc", ".h5", ".hdf", ".grib", ".wmf", ".emf"} & suffixes
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in suffixes)
    with pytest.raises(ImageError, match="<bytes> is an EPS file, expected a picture; render it to PNG first"):
        load_image(encode(smooth(20, 30), "EPS"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_only_regular_files_are_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for name, kind in (("pipe.png", "a named pipe"), ("device.png", "a device")):
        for read in (load_image, DeiTImageProcessor()):
            with pytest.raises(ImageError, match=rf"{name} is {kind}, expected a regular file; take it away"):
                read(tmp_path / name)
    reading, writing = os.pipe()
    try:
        os.write(writing, encode(smooth(20, 30), "PNG", compress_level=9))
        os.close(writing)
        np.testing.assert_array_equal(load_image(f"/dev/fd/{reading}"), smooth(20, 30))  # as of a shell's <(command)
    finally:
        os.close(reading)
