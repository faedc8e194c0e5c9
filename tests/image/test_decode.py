"""Files and Pillow images decoded to upright RGB pictures."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps
from support.pictures import encode, exif, noise, smooth

from deit.image.decode import ImageError, load_image, to_rgb
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
