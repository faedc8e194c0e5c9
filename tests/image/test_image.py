"""Decoding and the image processor by value: against the Pillow backend of transformers, and against arithmetic."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor
from transformers.image_utils import ChannelDimension
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from deit.config import IMAGENET_MEAN, IMAGENET_STD
from deit.image.decode import ImageError, load_image, to_rgb
from deit.image.processor import DeiTFeatureExtractor, DeiTImageProcessor

PHOTOS = Path(__file__).parents[3] / "shared/data/imagenet_sample.tar"
SIZES = [(1, 1), (7, 300), (37, 53), (223, 225), (256, 256), (375, 500), (500, 375)]
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


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height, width):
    """A photo-like picture: slow waves of three colours, and a hard edge."""
    y, x = np.mgrid[0:height, 0:width] / 40.0
    waves = np.stack([np.sin(x), np.cos(y), np.sin(x + 2 * y)], axis=-1) * 100 + 128
    waves[: height // 3, : width // 2] *= 0.5
    return Image.fromarray(waves.astype(np.uint8))


def encode(image, form="JPEG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def worst(ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert ours.dtype == np.float32
    return np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max()


def compare(images, reference=DeiTImageProcessorPil, **options):
    """The largest difference on `images` between the two libraries under the same options."""
    ours = DeiTImageProcessor(**options)(images).pixel_values
    theirs = reference(**options)(images).pixel_values
    return max(worst(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- parity with transformers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": 224, "resample": 2, "do_center_crop": False},
        {"size": {"shortest_edge": 256}, "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD},
        {"size": {"shortest_edge": 100, "longest_edge": 120}, "crop_size": 97},
        {"size": {"height": 61, "width": 90}, "crop_size": {"height": 80, "width": 31}},
        {"do_resize": False, "crop_size": (101, 300)},
        {"do_resize": False, "do_center_crop": False},
        {"do_rescale": False, "image_mean": 120.0, "image_std": 60.0},
        {"do_normalize": False},
        {"do_normalize": False, "do_rescale": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
        *({"resample": filter_} for filter_ in (0, 1, 4, 5)),
    ],
)
def test_options_match(options):
    images = [Image.fromarray(noise(*size, seed=i)) for i, size in enumerate(SIZES)] + [smooth(180, 301)]
    assert compare(images, **options) <= 1e-5


def test_random_options_match():
    random = np.random.default_rng(5)
    for trial in range(60):
        sides = [int(n) for n in random.integers(1, 120, 4)]
        sizes = [
            {"height": sides[0], "width": sides[1]},
            {"shortest_edge": sides[0]},
            {"shortest_edge": sides[0], "longest_edge": max(sides[:2])},
        ]
        options = {
            "do_resize": bool(random.integers(4)),
            "size": sizes[random.integers(3)],
            "resample": int(random.integers(6)),
            "do_center_crop": bool(random.integers(2)),
            "crop_size": {"height": sides[2], "width": sides[3]},
            "do_rescale": bool(random.integers(4)),
            "rescale_factor": float(random.uniform(0.002, 0.01)),
            "do_normalize": bool(random.integers(4)),
            "image_mean": [float(n) for n in random.uniform(0, 1, 3)],
            "image_std": [float(n) for n in random.uniform(0.2, 1, 3)],
        }
        height, width = (int(n) for n in random.integers(20, 150, 2))
        array = noise(height, width, seed=trial)
        image = [array, array.transpose(2, 0, 1), Image.fromarray(array), torch.from_numpy(array)][trial % 4]
        largest = 255 * (1.0 if options["do_rescale"] else 5.0)  # unscaled pixels over a std of 0.2
        limit = 1e-5 if options["do_rescale"] else largest * 1e-6
        assert compare([image], **options) <= limit, options


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64", "uint16", "float32", "float64", "bool"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("do_resize", [True, False])
def test_whole_numbers_match(dtype, first, do_resize):
    array = noise(61, 83).astype(dtype)
    array = array.transpose(2, 0, 1) if first else array
    assert compare(array, do_resize=do_resize) <= 1e-5


@pytest.mark.filterwarnings("ignore:.*floats in 0..1")
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("do_rescale", [True, False])
@pytest.mark.parametrize("source", ["uniform", "n/255"])
def test_unit_floats_match(dtype, do_rescale, source):
    array = np.random.default_rng(1).random((61, 83, 3)) if source == "uniform" else noise(61, 83) / 255
    assert compare(array.astype(dtype), do_rescale=do_rescale) <= 1e-5
    float32 = array.astype("float32")  # transformers computes in float16 here, we in float32
    assert compare(float32, do_rescale=do_rescale, do_resize=False) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32, torch.float64])
def test_tensors_match(dtype):
    batch = torch.from_numpy(noise(4 * 50, 70)).reshape(4, 50, 70, 3).permute(0, 3, 1, 2).to(dtype)
    assert compare(batch) <= 1e-5
    assert compare(list(batch), input_data_format="channels_first") <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensor_types_agree(dtype):
    whole = torch.from_numpy(noise(50, 70))
    got = DeiTImageProcessor()(whole.to(dtype).requires_grad_(), "np").pixel_values
    assert worst(got, DeiTImageProcessor()(whole, "np").pixel_values) == 0


def test_four_and_one_channels_match():
    four = {"image_mean": [0.5] * 4, "image_std": [0.5] * 4}
    one = {"image_mean": [0.5], "image_std": [0.25]}
    assert compare(noise(60, 70, 4), **four) <= 1e-5
    assert compare(Image.fromarray(noise(60, 70, 4)), **four) <= 1e-5
    assert compare(Image.fromarray(noise(60, 70, 4), "CMYK"), **four) <= 1e-5
    assert compare(noise(60, 70, 1), **one) <= 1e-5
    assert compare(Image.fromarray(noise(60, 70, 1)[..., 0]), **one) <= 1e-5
    assert compare(noise(60, 70, 1), image_mean=0.3, image_std=0.2) <= 1e-5


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGB"])
def test_convert_rgb_matches(mode):
    image = smooth(90, 120).convert(mode)
    assert compare(image, do_convert_rgb=True) <= 1e-5


def test_grey_array_to_rgb_matches():
    assert compare(noise(60, 70, 1), do_convert_rgb=True) <= 1e-5
    assert compare(noise(60, 70, 3), do_convert_rgb=True) <= 1e-5


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_left_alone_matches(mode):
    options = {"do_convert_rgb": False, "image_mean": 0.5, "image_std": 0.5}
    assert compare(smooth(90, 120).convert(mode), **options) <= 1e-5


def test_vit_matches():
    vit = DeiTImageProcessor.from_dict({"image_processor_type": "ViTImageProcessor"})
    image = smooth(300, 211)
    assert worst(vit(image, "np").pixel_values, ViTImageProcessorPil()(image, return_tensors="np").pixel_values) <= 1e-5


def test_overrides_match():
    image = smooth(300, 211)
    calls = [
        {"size": 64, "crop_size": 48},
        {"do_center_crop": False},
        {"image_mean": [0.1, 0.2, 0.3]},
        {"do_resize": False, "do_normalize": False},
        {"resample": 0},
    ]
    for call in calls:
        theirs = DeiTImageProcessorPil()(image, return_tensors="np", **call).pixel_values
        assert worst(DeiTImageProcessor()(image, "np", **call).pixel_values, theirs) <= 1e-5
        assert worst(DeiTImageProcessor().preprocess(image, "np", **call).pixel_values, theirs) <= 1e-5


@pytest.mark.skipif(not PHOTOS.exists(), reason="the sample of ImageNet photos is not on this machine")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "size": {"shortest_edge": 256},
            "image_mean": list(IMAGENET_MEAN),
            "image_std": list(IMAGENET_STD),
            "do_convert_rgb": True,
        },
    ],
)
def test_photos_match(options):
    with tarfile.open(PHOTOS) as tar:
        files = [member for member in tar.getmembers() if member.name.endswith(".JPEG")][::5][:24]
        photos = [Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB") for member in files]
    assert len(photos) == 24
    assert compare(photos, **options) <= 1e-5


@pytest.mark.skipif(not PHOTOS.exists(), reason="the sample of ImageNet photos is not on this machine")
def test_photos_from_files():
    """What a scaled decode changes, mean over pixels (measured on 120 photos: 0.43/255, the worst photo 1.17/255)."""
    processor = DeiTImageProcessor.paper(64)
    with tarfile.open(PHOTOS) as tar:
        files = [tar.extractfile(member).read() for member in tar.getmembers() if member.name.endswith(".JPEG")][::10]
    full = processor([load_image(file) for file in files], "np", do_normalize=False).pixel_values
    scaled = processor(files, "np", do_normalize=False).pixel_values
    difference = np.abs(full - scaled).mean(axis=(1, 2, 3))
    assert 0 < difference.mean() < 0.6 / 255
    assert difference.max() < 1.5 / 255


# ---- inputs and outputs ------------------------------------------------------------------------------------------


def test_crop_pads_with_zeros():
    array = np.full((2, 3, 3), 7, np.uint8)
    out = DeiTImageProcessor(do_resize=False, crop_size=5, do_rescale=False, do_normalize=False)(array, "np")
    expected = np.zeros((3, 5, 5), np.float32)
    expected[:, 2:4, 1:4] = 7
    np.testing.assert_array_equal(out.pixel_values[0], expected)


def test_layouts():
    array = noise(64, 48)
    first = DeiTImageProcessor()(array, "np").pixel_values
    last = DeiTImageProcessor()(array, "np", data_format=ChannelDimension.LAST).pixel_values
    assert first.shape == (1, 3, 224, 224)
    assert last.shape == (1, 224, 224, 3)
    assert last[0].flags.c_contiguous
    np.testing.assert_array_equal(last.transpose(0, 3, 1, 2), first)


def test_input_layout():
    array = noise(3, 50)  # (3, 50, 3): either way
    plain = DeiTImageProcessor(do_resize=False, do_center_crop=False, do_normalize=False, do_rescale=False)
    with pytest.warns(UserWarning, match=r"taken as \(C, H, W\)"):
        assert plain(array, "np").pixel_values.shape == (1, 3, 50, 3)
    assert plain(array, "np", input_data_format="channels_last").pixel_values.shape == (1, 3, 3, 50)
    assert plain(noise(9, 9, 2), "np", input_data_format="channels_last").pixel_values.shape == (1, 2, 9, 9)


def test_batches(tmp_path):
    array = noise(40, 50)
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path)
    one = DeiTImageProcessor()(array, "np").pixel_values
    forms = [
        [array],
        (array,),
        array[None],
        [[array]],
        Image.fromarray(array),
        path,
        str(path),
        path.read_bytes(),
        io.BytesIO(path.read_bytes()),
        torch.from_numpy(array),
        bytearray(path.read_bytes()),
    ]
    for form in forms:
        np.testing.assert_array_equal(DeiTImageProcessor()(form, "np").pixel_values, one)
    mixed = DeiTImageProcessor()([path, [array, torch.from_numpy(array)], array[None]], "np").pixel_values
    np.testing.assert_array_equal(mixed, np.concatenate([one] * 4))


def test_result():
    out = DeiTImageProcessor()([noise(40, 50), noise(50, 40)])
    assert isinstance(out.pixel_values, list)
    assert [a.dtype for a in out["pixel_values"]] == [np.float32] * 2
    out = DeiTImageProcessor()(noise(40, 50), return_tensors="pt")
    assert list(out) == list(out.keys()) == ["pixel_values"]
    assert dict(**out)["pixel_values"] is out.pixel_values
    assert out.pixel_values.dtype == torch.float32
    assert out.to("cpu") is out
    assert out.to(torch.float16).pixel_values.dtype == torch.float16
    assert torch.equal(pickle.loads(pickle.dumps(out)).pixel_values, out.pixel_values)
    with pytest.raises(AttributeError, match="no entry 'labels'"):
        _ = out.labels
    with pytest.raises(ValueError, match='return_tensors="pt"'):
        DeiTImageProcessor()(noise(40, 50), "np").to("cpu")


def test_missing_frameworks(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ImportError, match=r'pip install "deit\[keras\]"'):
        DeiTImageProcessor()(noise(9, 9), "tf")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="pip install torch"):
        DeiTImageProcessor()(noise(9, 9), "pt")


def test_import_is_cheap():
    code = "import sys, deit.image; print([m for m in ('torch', 'torchvision', 'tensorflow') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_inputs_unchanged():
    array, image = noise(40, 50).astype(np.float32), smooth(40, 50).convert("P")
    before = array.copy(), image.tobytes()
    DeiTImageProcessor()([array, image])
    np.testing.assert_array_equal(array, before[0])
    assert (image.mode, image.tobytes()) == ("P", before[1])


def test_no_rotation_of_pillow_images(tmp_path):
    file = encode(smooth(60, 90), exif=exif(6))
    image = Image.open(io.BytesIO(file))
    theirs = DeiTImageProcessorPil()(image, return_tensors="np").pixel_values
    assert worst(DeiTImageProcessor()(image, "np").pixel_values, theirs) <= 1e-5
    upright = DeiTImageProcessor()(load_image(image), "np").pixel_values
    np.testing.assert_array_equal(DeiTImageProcessor()(file, "np").pixel_values, upright)
    assert np.abs(upright - theirs).max() > 0.5


REFUSED_IMAGES = [
    ([], "the list of images is empty"),
    (None, "image 0 is an object of type NoneType, expected a PIL image"),
    ([noise(9, 9), 5], "image 1 is an object of type int"),
    ({"a": 1}, "type dict"),
    (np.zeros((9, 9)), r"shape \(9, 9\), expected"),
    (np.zeros((1, 1, 9, 9, 3)), r"shape \(1, 1, 9, 9, 3\), expected"),
    (np.zeros((0, 9, 3)), "all above 0"),
    (np.zeros((9, 9, 5)), "pass input_data_format"),
    (np.zeros((9, 9, 4), np.uint8), "has 4 channels, image_mean has 3; pass do_convert_rgb=True"),
    (np.zeros((1, 9, 9), np.uint8), "has 1 channels, image_mean has 3"),
    (np.full((9, 9, 3), np.nan), "NaN or infinity"),
    (torch.full((3, 9, 9), float("inf")), "NaN or infinity"),
    (np.zeros((9, 9, 3), complex), "dtype complex128"),
    (np.zeros((9, 9, 3), object), "dtype object"),
    (np.full((9, 9, 3), 300), r"whole numbers in 300..300, expected 0..255"),
    (np.full((9, 9, 3), -1), "expected 0..255"),
    (np.full((9, 9, 3), 1.5), "floats in 1.5..1.5, expected 0..1"),
    (np.full((9, 9, 3), -0.5), "expected 0..1"),
]


@pytest.mark.parametrize(("images", "message"), REFUSED_IMAGES)
def test_refused_images(images, message):
    with pytest.raises(ValueError, match=message):
        DeiTImageProcessor()(images)


def test_refused_stacks():
    images = [noise(40, 50), noise(50, 40)]
    with pytest.raises(ValueError, match="different shapes"):
        DeiTImageProcessor(do_resize=False, do_center_crop=False)(images, "np")
    with pytest.raises(ValueError, match="return_tensors is 'jax'"):
        DeiTImageProcessor()(images, "jax")
    with pytest.raises(ValueError, match="at most 4 to resize"):
        DeiTImageProcessor()(noise(9, 9, 5), input_data_format="channels_last")
    with pytest.raises(ValueError, match="expected 1, 3 or 4 to convert to RGB"):
        DeiTImageProcessor(do_convert_rgb=True)(noise(9, 9, 2), input_data_format="channels_last")


def test_double_rescale_warns():
    with pytest.warns(UserWarning, match="pass do_rescale=False"):
        DeiTImageProcessor()(np.random.default_rng(0).random((9, 9, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DeiTImageProcessor()(np.random.default_rng(0).random((9, 9, 3)), do_rescale=False)
        DeiTImageProcessor()(np.zeros((9, 9, 3)))


# ---- options and files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"size": 200}, {"size": {"height": 200, "width": 200}}),
        ({"size": [200, 300]}, {"size": {"height": 200, "width": 300}}),
        ({"size": np.int64(9)}, {"size": {"height": 9, "width": 9}}),
        ({"size": {"shortest_edge": 9}}, {"size": {"shortest_edge": 9}}),
        ({"crop_size": (8, 9)}, {"crop_size": {"height": 8, "width": 9}}),
        ({"resample": "bicubic"}, {"resample": Image.Resampling.BICUBIC}),
        ({"resample": 2}, {"resample": Image.Resampling.BILINEAR}),
        ({"resample": Image.Resampling.BOX}, {"resample": 4}),
        ({"image_mean": [0, 1, 0.5]}, {"image_mean": (0.0, 1.0, 0.5)}),
        ({"image_std": np.array([1.0, 2.0, 3.0])}, {"image_std": (1.0, 2.0, 3.0)}),
        ({"image_mean": 1}, {"image_mean": 1.0}),
        ({"size": None, "do_resize": None}, {"size": {"height": 256, "width": 256}, "do_resize": True}),
        ({"data_format": ChannelDimension.LAST}, {"data_format": "channels_last"}),
    ],
)
def test_option_forms(given, shown):
    processor, assigned = DeiTImageProcessor(**given), DeiTImageProcessor()
    for name, value in given.items():
        if value is not None:
            setattr(assigned, name, value)
    for name, value in shown.items():
        assert getattr(processor, name) == value
    assert processor == assigned == DeiTImageProcessor.from_dict(processor.to_dict())


REFUSED_OPTIONS = [
    ({"sise": 4}, "unknown option sise; the options are do_resize, size"),
    ({"size": 0}, r"size\['height'\] holds 0"),
    ({"size": 2.5}, r"size is 2.5, expected an int, a pair \(height, width\) or a dict of height, width or shortest"),
    ({"size": "224"}, "size is '224'"),
    ({"size": True}, "holds True"),
    ({"size": (1, 2, 3)}, "expected an int, a pair"),
    ({"size": {"longest_edge": 5}}, "expected an int, a pair"),
    ({"size": {"height": 5}}, "expected an int, a pair"),
    ({"crop_size": {"shortest_edge": 5}}, r"a dict of height, width$"),
    ({"resample": 9}, r"expected one of 0 \(nearest\)"),
    ({"resample": "best"}, "resample is 'best'"),
    ({"do_resize": 1}, "do_resize is 1, expected True or False"),
    ({"do_convert_rgb": "yes"}, "expected True or False"),
    ({"rescale_factor": float("nan")}, "expected a finite number"),
    ({"image_mean": []}, "image_mean is empty"),
    ({"image_mean": "half"}, "image_mean is 'half'"),
    ({"image_std": [1, 0, 1]}, "expected numbers above 0"),
    ({"data_format": "hwc"}, 'expected "channels_first" or "channels_last"'),
    ({"input_data_format": "none"}, 'expected "channels_first"'),
    ({"do_pad": True}, "do_pad=True is not done"),
    ({"pad_size": 9}, "pad_size=9 is not done"),
    ({"device": "cuda"}, r"\.to\(device\)"),
    ({"disable_grouping": True}, "never grouped"),
    ({"default_to_square": False, "size": 256}, r'write size={"shortest_edge": 256}'),
]


@pytest.mark.parametrize(("options", "message"), REFUSED_OPTIONS)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        DeiTImageProcessor(**options)
    with pytest.raises(ValueError, match=message):
        DeiTImageProcessor()(noise(9, 9), **options)
    with pytest.raises(ValueError, match=message):
        DeiTImageProcessor.from_dict({}, **options)
    if len(options) == 1 and "sise" not in options:
        with pytest.raises(ValueError, match=message):
            DeiTImageProcessor.from_dict(options)


def test_attributes():
    processor = DeiTImageProcessor()
    processor.size = 100
    assert processor.size == {"height": 100, "width": 100}
    with pytest.raises(ValueError, match="holds 0"):
        processor.size = 0
    with pytest.raises(AttributeError, match="no option 'sise'"):
        processor.sise = 4
    processor.size["height"] = 0  # seen at the next call
    with pytest.raises(ValueError, match="holds 0"):
        processor(noise(9, 9))


def test_equality():
    assert DeiTImageProcessor() == DeiTImageProcessor(size=256)
    assert DeiTImageProcessor() != DeiTImageProcessor(size=255)
    assert DeiTImageProcessor() != "DeiTImageProcessor"
    processor = DeiTImageProcessor.from_dict({"note": [1]})
    for again in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert again == processor
    assert processor != DeiTImageProcessor()
    assert eval(repr(DeiTImageProcessor.paper())) == DeiTImageProcessor.paper()


def test_unknown_keys_survive(tmp_path):
    data = {"future": {"a": [1]}, "processor_class": "X", "do_pad": None, "do_flip": False, "size": 200}
    processor = DeiTImageProcessor.from_dict(data)
    data["future"]["a"].append(2)
    saved = json.loads(processor.save_pretrained(tmp_path / "new" / "folder").read_text())
    assert saved["future"] == {"a": [1]}
    assert saved["processor_class"] == "X"
    assert saved["do_pad"] is None
    assert saved["do_flip"] is False
    assert saved["image_processor_type"] == "DeiTImageProcessor"
    assert DeiTImageProcessor.from_dict(saved) == processor
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["preprocessor_config.json"]
    with pytest.raises(ValueError, match="do_flip=True is not done"):
        DeiTImageProcessor.from_dict({**saved, "do_flip": True})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": {"shortest_edge": 100}, "resample": 2, "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD},
        {"do_center_crop": False, "rescale_factor": 0.01},
        {"do_normalize": False, "do_convert_rgb": True},
    ],
)
def test_transformers_reads_ours(tmp_path, options):
    ours = DeiTImageProcessor(**options)
    ours.save_pretrained(tmp_path)
    image = smooth(210, 140)
    expected = ours(image, "np").pixel_values
    for theirs in (
        DeiTImageProcessorPil.from_pretrained(tmp_path),
        AutoImageProcessor.from_pretrained(tmp_path, backend="pil"),
    ):
        assert worst(expected, theirs(image, return_tensors="np").pixel_values) <= 1e-5


@pytest.mark.parametrize("reference", [DeiTImageProcessorPil, ViTImageProcessorPil])
@pytest.mark.parametrize("options", [{}, {"size": 100, "do_rescale": False}, {"resample": 0, "image_mean": 0.3}])
def test_ours_reads_transformers(tmp_path, reference, options):
    theirs = reference(**options)
    theirs.save_pretrained(tmp_path)
    image = smooth(210, 140)
    ours = DeiTImageProcessor.from_pretrained(tmp_path)
    assert worst(ours(image, "np").pixel_values, theirs(image, return_tensors="np").pixel_values) <= 1e-4


HISTORIC = [
    {
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "DeiTFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": 256,
        "crop_size": 224,
    },
    {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "ViTFeatureExtractor",
        "size": 384,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
    },
    {
        "feature_extractor_type": "ViTFeatureExtractor",
        "image_processor_type": "ViTFeatureExtractor",
        "size": {"height": 96, "width": 80},
    },
    {
        "image_processor_type": "ViTImageProcessorFast",
        "size": [60, 70],
        "device": None,
        "do_convert_rgb": None,
        "data_format": "channels_first",
        "default_to_square": True,
        "return_tensors": None,
    },
    *(
        {"image_processor_type": f"{family}ImageProcessor{kind}"}
        for family in ("DeiT", "ViT")
        for kind in ("", "Fast", "Pil")
    ),
    {"size": 200, "crop_size": {"height": 150, "width": 160}},
]


@pytest.mark.parametrize("data", HISTORIC)
def test_historic_files(tmp_path, data):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(data))
    kind = data.get("image_processor_type") or data.get("feature_extractor_type") or "DeiT"
    theirs = (ViTImageProcessorPil if kind.startswith("ViT") else DeiTImageProcessorPil).from_pretrained(tmp_path)
    ours = DeiTImageProcessor.from_pretrained(tmp_path)
    image = smooth(210, 140)
    expected = theirs(image, return_tensors="np").pixel_values
    assert worst(ours(image, "np").pixel_values, expected) <= 1e-5
    again = DeiTImageProcessor.from_dict(ours.to_dict())
    assert worst(again(image, "np").pixel_values, expected) <= 1e-5


def test_from_pretrained(tmp_path):
    DeiTImageProcessor(size=100).save_pretrained(tmp_path / "sub")
    processor = DeiTImageProcessor.from_pretrained(tmp_path, subfolder="sub", crop_size=90)
    assert processor == DeiTImageProcessor(size=100, crop_size=90)
    with pytest.raises(FileNotFoundError):
        DeiTImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unknown option sise"):
        DeiTImageProcessor.from_pretrained(tmp_path, subfolder="sub", sise=4)


def test_refused_files(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    for text, message in [
        ("{", "is not valid JSON"),
        ("[]", "should hold a JSON object, found list"),
        ('{"image_processor_type": "CLIPImageProcessor"}', "is for CLIPImageProcessor, which is not"),
        ('{"feature_extractor_type": "BeitFeatureExtractor"}', "is for BeitFeatureExtractor"),
        ('{"do_pad": true}', "do_pad=True is not done"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            DeiTImageProcessor.from_json_file(path)
    with pytest.raises(FileExistsError, match="is a file, expected a folder"):
        DeiTImageProcessor().save_pretrained(path)


def test_former_name():
    with pytest.warns(FutureWarning, match="use DeiTImageProcessor"):
        extractor = DeiTFeatureExtractor(size=100)
    assert extractor == DeiTImageProcessor(size=100)
    assert extractor.to_dict()["image_processor_type"] == "DeiTImageProcessor"


def test_paper():
    processor = DeiTImageProcessor.paper()
    assert processor.size == {"shortest_edge": 256}
    assert processor.crop_size == {"height": 224, "width": 224}
    assert (processor.image_mean, processor.image_std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert processor.resample == Image.Resampling.BICUBIC
    assert DeiTImageProcessor.paper(384).size == {"shortest_edge": 438}
    assert DeiTImageProcessor.paper((96, 192), 1.0).size == {"shortest_edge": 192}
    with pytest.raises(ValueError, match=r"crop_ratio is 1\.5"):
        DeiTImageProcessor.paper(224, 1.5)


TIMM = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bicubic"}


@pytest.mark.parametrize(
    ("size", "cfg"),
    [
        (224, {**TIMM, "crop_pct": 0.875}),
        (224, {**TIMM, "crop_pct": 0.9}),
        (384, {**TIMM, "crop_pct": 1.0}),
        (48, {**TIMM, "crop_pct": 0.95, "crop_mode": "squash", "interpolation": "bilinear"}),
        (64, {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}),
    ],
)
def test_timm(size, cfg):
    from timm.data import create_transform

    processor = DeiTImageProcessor.from_timm(cfg, size)
    said = processor.to_timm()
    assert DeiTImageProcessor.from_timm(said, size) == processor
    image = smooth(300, 400)  # sizes whose crops round alike in both
    for keys in (cfg, said):
        theirs = create_transform(input_size=(3, size, size), **{"crop_pct": 0.875, **keys})(image)
        assert worst(processor(image, "np").pixel_values[0], theirs) <= 1e-5


def test_timm_refused():
    with pytest.raises(ValueError, match="crop_mode is 'border'"):
        DeiTImageProcessor.from_timm({"crop_mode": "border"})
    for options in (
        {"do_normalize": False},
        {"rescale_factor": 1.0},
        {"size": {"shortest_edge": 50}, "crop_size": (30, 40)},
        {"size": {"shortest_edge": 50}, "do_center_crop": False},
    ):
        with pytest.raises(ValueError, match="timm's keys say"):
            DeiTImageProcessor(**options).to_timm()


# ---- decoding ----------------------------------------------------------------------------------------------------


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


# ---- the crop ratio ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 40), (30, 60), (60, 30)])
@pytest.mark.parametrize("ratio", [0.5, 0.8, 1.0])
def test_another_crop_ratio_is_the_papers_with_it(size, ratio):
    image = smooth(*size)
    for side in (16, (16, 24)):
        before = DeiTImageProcessor.paper(side)
        after = before.with_crop_ratio(ratio)
        assert after == DeiTImageProcessor.paper(side, ratio)
        assert before == DeiTImageProcessor.paper(side)
        different, changed = (made([image]).pixel_values[0] for made in (before, after))
        assert different.shape == changed.shape
        assert np.abs(different - changed).max() > 0.05
        assert after.crop_ratio == max(after.crop_size.values()) / after.size["shortest_edge"]


def test_a_squashed_image_stays_squashed():
    squashed = DeiTImageProcessor.from_timm({"crop_mode": "squash", "crop_pct": 0.875, "mean": (0.1,) * 3})
    assert squashed.crop_ratio == 0.875
    changed = squashed.with_crop_ratio(0.5)
    assert (changed.size, changed.crop_ratio) == ({"height": 448, "width": 448}, 0.5)
    assert changed.to_dict() == {**squashed.to_dict(), "size": {"height": 448, "width": 448}}


def test_without_crop_the_ratio_is_one_and_can_be_lowered():
    whole = DeiTImageProcessor(size=16, do_center_crop=False)
    assert whole.crop_ratio == 1.0
    changed = whole.with_crop_ratio(0.5)
    assert (changed.size, changed.crop_size) == ({"height": 32, "width": 32}, {"height": 16, "width": 16})
    image = smooth(40, 40)
    np.testing.assert_array_equal(whole.with_crop_ratio(1.0)([image]).pixel_values[0], whole([image]).pixel_values[0])


def test_crop_ratios_that_can_not_be():
    assert DeiTImageProcessor(do_resize=False).crop_ratio is None
    for options in ({"do_resize": False}, {"size": {"shortest_edge": 16}, "do_center_crop": False}):
        with pytest.raises(ValueError, match="needs images that are resized and cropped"):
            DeiTImageProcessor(**options).with_crop_ratio(0.9)
    for ratio in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="above 0, at most 1"):
            DeiTImageProcessor().with_crop_ratio(ratio)


@pytest.mark.parametrize("size", [(5000, 1), (1, 5000), (9000, 10), (11, 8999)])
@pytest.mark.parametrize("crop", [224, {"height": 100, "width": 300}])
def test_of_a_strip_only_what_the_crop_keeps_is_computed(size, crop, monkeypatch):
    """The pixels of the whole way without its memory: 1x5000 would become 256x1280000."""
    strip = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    processor = DeiTImageProcessor(size={"shortest_edge": 256}, crop_size=crop, image_mean=0.0, image_std=1.0)
    resized = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, *args, **options: resized.append(args[0]) or resize(self, *args, **options)
    )
    found = processor([strip]).pixel_values[0]
    assert max(map(max, resized)) <= 300
    monkeypatch.undo()
    if min(size) > 1:
        monkeypatch.setattr("deit.image.pixels._LARGE", float("inf"))
        assert np.abs(found - processor([strip]).pixel_values[0]).mean() < 1 / 255
