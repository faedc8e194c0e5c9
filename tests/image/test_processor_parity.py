"""The image processor against the Pillow backend of transformers, by value."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import noise, smooth, worst
from transformers import AutoImageProcessor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from deit.config import IMAGENET_MEAN, IMAGENET_STD
from deit.image.decode import load_image
from deit.image.processor import DeiTImageProcessor

PHOTOS = Path(__file__).parents[3] / "shared/data/imagenet_sample.tar"
SIZES = [(1, 1), (7, 300), (37, 53), (223, 225), (256, 256), (375, 500), (500, 375)]


def compare(images, reference=DeiTImageProcessorPil, **options):
    """The largest difference on `images` between the two libraries under the same options."""
    ours = DeiTImageProcessor(**options)(images).pixel_values
    theirs = reference(**options)(images).pixel_values
    return max(worst(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- pixels ------------------------------------------------------------------------------------------------------


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


# ---- files -------------------------------------------------------------------------------------------------------


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
    {"image_processor_type": "BitImageProcessor"},
    {"image_processor_type": "BitImageProcessorFast", "size": 90, "crop_size": 80},
]
PEERS = {"DeiT": DeiTImageProcessorPil, "ViT": ViTImageProcessorPil, "Bit": BitImageProcessorPil}


@pytest.mark.parametrize("data", HISTORIC)
def test_historic_files(tmp_path, data):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(data))
    kind = data.get("image_processor_type") or data.get("feature_extractor_type") or "DeiT"
    [theirs] = [peer.from_pretrained(tmp_path) for name, peer in PEERS.items() if kind.startswith(name)]
    ours = DeiTImageProcessor.from_pretrained(tmp_path)
    image = smooth(210, 140)
    expected = theirs(image, return_tensors="np").pixel_values
    assert worst(ours(image, "np").pixel_values, expected) <= 1e-5
    again = DeiTImageProcessor.from_dict(ours.to_dict())
    assert worst(again(image, "np").pixel_values, expected) <= 1e-5
