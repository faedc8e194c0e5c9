"""Every kind of pixels, orientation and size is seen as an upright picture of eight-bit colours."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.folders import CONVNET, found_in
from torchvision.transforms import v2

from deit.data.batches import EvaluationBatches, TrainingBatches, processor_for
from deit.data.folders import Split
from deit.recipe import Augment, Data, ResizedCrop, SimpleCrop

GREY = replace(CONVNET, model=CONVNET.model.replace(num_channels=1), data=Data(batch=8, mean=(0.4,), std=(0.2,)))


def training_view(path, recipe=CONVNET, **augment):
    """(channels, height, width) of one image, normalised."""
    recipe = replace(recipe, data=replace(recipe.data, batch=1), augment=Augment(**augment))
    return next(TrainingBatches(Split((Path(path),), (0,), ("a",)), recipe).from_step(0)).pixels[0]


def evaluation_view(path, recipe=CONVNET):
    return next(iter(EvaluationBatches(Split((Path(path),), (0,), ("a",)), processor_for(recipe), 1))).pixels[0]


def by_torchvision(pixels):
    """What evaluation makes of (height, width, 3) uint8 pixels."""
    data = CONVNET.data
    resized = v2.Compose([v2.Resize(int(16 / 0.875), v2.InterpolationMode.BICUBIC), v2.CenterCrop(16)])
    image = v2.functional.pil_to_tensor(resized(Image.fromarray(np.asarray(pixels, np.uint8))))
    return v2.functional.normalize(image / 255, data.mean, data.std)


def levels(one, other):
    """Mean and largest difference of two normalised images, in grey levels of 255."""
    std = torch.tensor(CONVNET.data.std).view(3, 1, 1)
    difference = ((one - other) * std * 255).abs()
    return difference.mean().item(), difference.max().item()


RAMPS = (
    np.stack(
        np.broadcast_arrays(np.linspace(20, 235, 30)[:, None], np.linspace(220, 40, 48), np.linspace(60, 180, 48)),
        axis=-1,
    )
    .round()
    .astype(np.uint8)
)
"""(30, 48, 3), smooth, and without any symmetry."""
FOUR = np.array([[250, 10, 30], [20, 200, 90], [40, 60, 240], [128, 128, 128]], np.uint8)
AREAS = np.arange(30 * 48).reshape(30, 48) // 211 % 4


def with_alpha(path):
    alpha = np.full((30, 48, 1), 255, np.uint8)
    alpha[:10] = 0
    Image.fromarray(np.concatenate([RAMPS, alpha], axis=-1)).save(path.with_suffix(".png"))
    return path.with_suffix(".png"), RAMPS, 0


def with_palette(path, transparency):
    image = Image.fromarray(AREAS.astype(np.uint8), "L")
    image.putpalette(FOUR.tobytes())
    image.save(path.with_suffix(".png"), transparency=transparency)
    return path.with_suffix(".png"), FOUR[AREAS], 0


def in_cmyk(path):
    Image.fromarray(RAMPS).convert("CMYK").save(path.with_suffix(".jpg"), quality=98)
    return path.with_suffix(".jpg"), RAMPS, 4


def in_16_bits(path):
    values = np.linspace(0, 65535, 30 * 48).reshape(30, 48).astype(np.uint16)
    Image.fromarray(values).save(path.with_suffix(".png"))
    return path.with_suffix(".png"), np.stack([np.rint(values / 257)] * 3, -1), 0


def in_1_bit(path):
    Image.fromarray(AREAS > 1).save(path.with_suffix(".png"))
    return path.with_suffix(".png"), np.stack([255 * (AREAS > 1)] * 3, -1), 0


def animated(path):
    frames = [Image.fromarray(FOUR[(AREAS + i) % 4]).quantize(4, dither=Image.Dither.NONE) for i in range(3)]
    frames[0].save(path.with_suffix(".gif"), save_all=True, append_images=frames[1:])
    return path.with_suffix(".gif"), FOUR[AREAS], 0


KINDS = {
    "alpha": with_alpha,
    "palette": lambda path: with_palette(path, 2),
    "cmyk": in_cmyk,
    "16 bits": in_16_bits,
    "palette of alphas": lambda path: with_palette(path, b"\0\x80\xff\xff"),
    "1 bit": in_1_bit,
    "gif": animated,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pixels_is_seen_as_eight_bit_colours(kind, tmp_path):
    path, colours, noise = KINDS[kind](tmp_path / "image")
    expected = by_torchvision(colours)
    for found in (training_view(path), evaluation_view(path)):
        assert levels(found, expected)[1] <= noise + 1e-3
    plain = tmp_path / "plain.png"
    Image.fromarray(colours.astype(np.uint8)).save(plain)
    assert levels(training_view(path, crop=ResizedCrop()), training_view(plain, crop=ResizedCrop()))[1] <= noise + 1e-3


def test_a_folder_of_all_kinds_trains(tmp_path, command):
    root = tmp_path / "data"
    for split in ("train", "val"):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for i, make in enumerate(KINDS.values()):
                make(root / split / name / str(i))
    command.trains(root, "student", "schedule.total=steps(6)")
    assert command.rows[-1]["bad_images"] == 0
    assert len(found_in(root)[1]) == 2 * len(KINDS)


TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""EXIF orientation, and how the camera holds the upright photo in its file."""


@pytest.mark.parametrize("size", [(48, 30), (960, 600)], ids=["small", "large"])
@pytest.mark.parametrize("orientation", TURNED)
def test_a_photo_turned_by_its_exif_entry_is_seen_upright(orientation, size, tmp_path):
    """The small photo is kept in memory whole; of the large one, a part is decoded at a smaller scale."""
    upright = Image.fromarray(RAMPS).resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.save(tmp_path / "upright.jpg", quality=95)
    upright.transpose(TURNED[orientation]).save(tmp_path / "turned.jpg", quality=95, exif=exif)
    upright.transpose(TURNED[orientation]).save(tmp_path / "ignored.jpg", quality=95)
    for crop in (None, ResizedCrop(scale=(0.3, 1.0)), SimpleCrop()):
        expected, found, wrong = (
            training_view(tmp_path / f"{name}.jpg", crop=crop) for name in ("upright", "turned", "ignored")
        )
        mean, most = levels(found, expected)
        assert mean < 1
        assert most < 6
        assert levels(wrong, expected)[0] > 5
    assert levels(evaluation_view(tmp_path / "turned.jpg"), by_torchvision(upright))[1] < 6


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000)])
def test_extreme_sizes(size, tmp_path, command):
    """Of the long ones, which grow brighter along the way, evaluation sees the middle."""
    ramp = np.linspace(0, 255, max(size)).round() if max(size) > 1 else np.array([127.0])
    pixels = np.stack([ramp, ramp * 0 + 50, 255 - ramp], -1).astype(np.uint8).reshape(size[1], size[0], 3)
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / "data" / split / name / "0.png")
    path = tmp_path / "data" / "train" / "a" / "0.png"
    middle = v2.functional.normalize(
        torch.tensor([127.5, 50, 127.5]).view(3, 1, 1).expand(3, 16, 16) / 255, CONVNET.data.mean, CONVNET.data.std
    )
    for found in (training_view(path), evaluation_view(path)):
        assert levels(found, middle)[1] <= 1.5
    for crop in ("None", "ResizedCrop()", "SimpleCrop()"):
        command.trains(tmp_path / "data", "convnet", f"augment.crop={crop}", "schedule.total=steps(2)")
        assert command.rows[-1]["bad_images"] == 0


def test_a_grey_recipe_on_colour_photos(data, command, tmp_path):
    path = tmp_path / "ramps.png"
    Image.fromarray(RAMPS).save(path)
    grey = (RAMPS @ np.array([0.299, 0.587, 0.114])).round()  # ITU-R BT.601, as Pillow's mode L
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (CONVNET.data.std, CONVNET.data.mean))
    expected = ((by_torchvision(np.stack([grey] * 3, -1)) * std + mean)[:1] - 0.4) / 0.2
    for found in (training_view(path, GREY), evaluation_view(path, GREY)):
        assert found.shape == (1, 16, 16)
        torch.testing.assert_close(found, expected, atol=2 / 255 / 0.2, rtol=0)
    coloured, found = (training_view(path, recipe, crop=ResizedCrop()) for recipe in (CONVNET, GREY))
    expected = torch.einsum("chw,c->hw", coloured * std + mean, torch.tensor([0.299, 0.587, 0.114]))
    torch.testing.assert_close(found[0], (expected - 0.4) / 0.2, atol=1 / 255 / 0.2, rtol=0)
    model = command.trains(data, "grey")
    assert model.features[0].weight.shape[1] == 1
    command.trains(data, "grey", "augment=Augment(crop=ResizedCrop(),policy=RandAugment(),erase=Erase())")
