"""What the image processor takes and gives back, what it refuses, and its crop ratio."""

import io
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from support.checks import raises_saying
from support.pictures import encode, exif, noise, smooth, worst
from transformers.image_utils import ChannelDimension
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil

from deit.image.decode import load_image
from deit.image.processor import DeiTImageProcessor

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


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize(
    "options", [{}, {"do_normalize": False}, {"do_rescale": False}, {"image_mean": (0.4,), "image_std": (0.3,)}]
)
def test_levels_are_what_normalisation_makes_the_result_of(layout, options):
    processor = DeiTImageProcessor(size=12, crop_size=16, data_format=layout, **options)
    image = Image.fromarray(noise(30, 40))
    levels = processor.levels(image)
    [expected] = processor([image]).pixel_values
    assert levels.dtype == np.uint8
    assert levels.shape == expected.shape
    shape = (-1, 1, 1) if layout == "channels_first" else (-1,)
    scale, shift = processor.normalisation.scale.reshape(shape), processor.normalisation.shift.reshape(shape)
    assert np.array_equal(levels.astype(np.float32) * scale + shift, expected)


def test_levels_have_8_bits_or_there_are_none():
    processor = DeiTImageProcessor(do_resize=False, do_center_crop=False, do_rescale=False)
    values = noise(6, 5)
    assert np.array_equal(processor.levels(values), values.transpose(2, 0, 1))
    for other in (values.astype(np.int16), values / 300):
        assert processor.levels(other) is None
    processor.do_resize = True
    assert processor.levels(values.astype(np.int16)).dtype == np.uint8  # a resize gives 8 bits
    assert processor.levels(values / 300) is None  # these stand for levels / 255
    with raises_saying(ValueError, "1 channels", "image_mean has 3"):
        DeiTImageProcessor(do_convert_rgb=False, image_mean=(0.4, 0.5, 0.6)).levels(Image.fromarray(values[..., 0]))


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
