"""Training views against torchvision's and formulas, and randomness that depends on nothing but its counters.

The operations themselves are compared with timm's in parity/test_timm_augment.py.
"""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter
from support.checks import raises_saying
from support.pictures import erase, photo
from torchvision.transforms import RandomCrop, Resize
from torchvision.transforms import functional as reference

from deit.data.augment import augment, crop, crop_box, crops, patch_mask, random_affine
from deit.data.draws import draws
from deit.data.mixing import Mixing, mix, mixing
from deit.image.decode import ImageError, load_image, read
from deit.image.jpeg import Jpeg
from deit.recipe import (
    Affine,
    Augment,
    AutoAugment,
    Erase,
    Jitter,
    Mix,
    RandAugment,
    ResizedCrop,
    SimpleCrop,
    ThreeAugment,
)


class Fixed:
    """A generator that answers with the values given, in order."""

    def __init__(self, *values):
        self.values = list(values)

    def next(self, *_):
        return self.values.pop(0)

    uniform = integers = permutation = random = next


@pytest.fixture
def picture():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (20, 28, 3), dtype=np.uint8)).resize((56, 40), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("angle", "scale", "shift"), [(30.0, 1.0, (0, 0)), (-75.0, 0.8, (5, -3)), (0.0, 1.3, (0, 7))])
def test_affine_equals_torchvision(picture, angle, scale, shift):
    ours = random_affine(
        picture, Affine(rotate=1.0), Fixed(np.array([angle, 0, 0]), scale, np.array(shift) / picture.size)
    )
    theirs = reference.affine(picture, angle, shift, scale, [0.0, 0.0], reference.InterpolationMode.BICUBIC)
    np.testing.assert_allclose(np.asarray(ours, int), np.asarray(theirs, int), atol=1)


def test_shear_moves_rows_by_its_tangent():
    """A vertical line through the centre leans by tan(shear) pixels a row."""
    pixels = np.zeros((41, 41), np.uint8)
    pixels[:, 20] = 255
    leaning = random_affine(Image.fromarray(pixels), Affine(shear=1.0), Fixed(np.array([0, 20.0, 0]), 1.0, np.zeros(2)))
    rows = np.asarray(leaning, float)
    centre = (rows * np.arange(41)).sum(1) / rows.sum(1)
    np.testing.assert_allclose(np.diff(centre[10:31]).mean(), np.tan(np.radians(20)), atol=0.02)


def test_nothing_asked_nothing_done(picture):
    assert augment(picture, Augment(), draws(0, 0, 0)) is picture
    still = random_affine(picture, Affine(), draws(0, 0, 0))
    assert np.array_equal(np.asarray(still), np.asarray(picture))


def test_draws_stay_within_the_recipe():
    """The corners of a white square tell the map that was drawn; over many draws none leaves its range."""
    recipe = Affine(rotate=12, scale=(0.9, 1.1), shift=0.1)
    white = Image.new("L", (100, 100), 255)
    areas = [(np.asarray(random_affine(white, recipe, draws(0, 0, i))) > 127).sum() for i in range(200)]
    assert min(areas) > 0.9**2 * 100**2 * 0.8**2
    assert len(set(areas)) > 100


def test_draws_are_a_function_of_their_counters():
    first = draws(1, 2, 3, 4).random(8)
    assert np.array_equal(first, draws(1, 2, 3, 4).random(8))
    others = [draws(*key).random(8) for key in [(0, 2, 3, 4), (1, 1, 3, 4), (1, 2, 2, 4), (1, 2, 3, 3), (1, 3, 2, 4)]]
    for other in others:
        assert not np.intersect1d(first, other).size


def test_streams_do_not_overlap():
    """Long draws of neighbouring images share no value: the counter that runs is not the one that names."""
    long = [draws(0, 0, index).random(1000) for index in range(3)]
    assert len(np.unique(np.concatenate(long))) == 3000


def test_second_stream_has_its_own_numbers():
    """Stream 0 is what it was before there were others: Philox itself, keyed by the seed."""
    old = np.random.Generator(np.random.Philox(key=[7, 0], counter=[0, 1, 2, 3])).random(1000)
    assert np.array_equal(draws(7, 1, 2, 3).random(1000), old)
    streams = [draws(7, 1, 2, 3, stream=stream).random(1000) for stream in range(3)]
    assert len(np.unique(np.concatenate(streams))) == 3000


# --------------------------------------------------------------------------------------------------------------- crops


def jpeg(image, orientation=1):
    tags, file = Image.Exif(), io.BytesIO()
    tags[0x0112] = orientation
    image.save(file, "JPEG", quality=92, exif=tags)
    return file.getvalue()


LARGE = photo(1021, 1307)
SMALL = photo(90, 130)


@pytest.mark.parametrize("size", [(24, 24), (30, 50), (200, 200)])
def test_resized_crop_equals_torchvision(size):
    """Bicubic resize of the integer box alone; pixels beyond it have no part."""
    for index in range(20):
        ours = crop(SMALL, size, ResizedCrop(), draws(0, 0, index))
        box = crop_box((90, 130), ResizedCrop(), draws(0, 0, index))
        theirs = reference.resized_crop(SMALL, *box, list(size), reference.InterpolationMode.BICUBIC)
        assert ours.size == size[::-1]
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_boxes_follow_the_recipe():
    """Area uniform, ratio uniform in the logarithm, place uniform; rejections are rare in these limits."""
    recipe = ResizedCrop(scale=(0.1, 0.4), ratio=(0.5, 2.0))
    boxes = np.array([crop_box((1000, 1000), recipe, draws(0, 0, index)) for index in range(2000)])
    top, left, height, width = boxes.T
    assert (boxes >= 0).all()
    assert (top + height).max() <= 1000
    assert (left + width).max() <= 1000
    for drawn, low, high in (
        (height * width / 1e6, 0.1, 0.4),
        (np.log2(width / height), -1, 1),
        (top / (1000 - height), 0, 1),
        (left / (1000 - width), 0, 1),
    ):
        drawn = (drawn - low) / (high - low)
        assert -0.01 < drawn.min() < 0.01
        assert 0.99 < drawn.max() < 1.01
        np.testing.assert_allclose(np.quantile(drawn, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.035)


@pytest.mark.parametrize(
    ("full", "box"),
    [
        ((100, 1000), (0, 433, 100, 133)),
        ((1000, 100), (433, 0, 133, 100)),
        ((1, 1), (0, 0, 1, 1)),
        ((1, 50), (0, 24, 1, 1)),
        ((50, 1), (24, 0, 1, 1)),
    ],
)
def test_box_where_none_fits(full, box):
    """The largest central one of the widest or narrowest ratio."""
    found = crop_box(full, ResizedCrop(scale=(0.9, 1.0)), draws(0, 0, 0))
    assert found == box
    assert crop(Image.new("RGB", full[::-1]), (8, 8), ResizedCrop(scale=(0.9, 1.0)), draws(0, 0, 0)).size == (8, 8)


@pytest.mark.parametrize("recipe", [ResizedCrop(), ResizedCrop(scale=(0.4, 1.0)), SimpleCrop(padding=4)])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_scaled_decoding(recipe, orientation):
    """Measured: 0.3 to 0.6 on average; 1.3 to 3.3 if what the scaled decode shows were half a pixel off or whole."""
    file = jpeg(LARGE, orientation)
    whole = load_image(file)
    differences = []
    for index in range(8):
        ours = crop(file, (64, 80), recipe, draws(0, 0, index))
        slow = crop(whole, (64, 80), recipe, draws(0, 0, index))
        differences.append(np.abs(np.asarray(ours, int) - np.asarray(slow, int)).mean())
    assert 0 < np.mean(differences) < 0.8


def test_scale_of_decoding(monkeypatch):
    """The smallest scale at which the drawn box still has twice the pixels of the view."""
    decoded, decode = [], Jpeg.decode

    def spied(*args):
        decoded.append(decode(*args))
        return decoded[-1]

    monkeypatch.setattr(Jpeg, "decode", spied)
    file, scales = jpeg(LARGE, orientation=6), set()  # 1307 rows and 1021 columns when upright
    for index, (rows, columns) in enumerate([(30, 45), (120, 60), (60, 90), (180, 120)] * 6):
        crop(file, (rows, columns), ResizedCrop(), draws(0, 0, index))
        _, _, height, width = crop_box((1307, 1021), ResizedCrop(), draws(0, 0, index))
        assert decoded[-1].size == (1307, 1021)
        scale = round(1021 / decoded[-1].stored.shape[0])
        assert decoded[-1].scale == scale
        assert scale == 1 or (height / scale >= 2 * rows and width / scale >= 2 * columns)
        assert scale == 8 or height / (2 * scale) < 2 * rows + 2 or width / (2 * scale) < 2 * columns + 2  # or rounding
        scales.add(scale)
    assert scales == {1, 2, 4, 8}


@pytest.mark.parametrize("recipe", [ResizedCrop(), SimpleCrop(padding=4)])
@pytest.mark.parametrize(
    ("height", "width", "size"), [(375, 500, (224, 224)), (300, 200, (64, 48)), (40, 30, (64, 64))]
)
def test_a_photo_is_resized_within_a_level(recipe, height, width, size):
    """PyTorch and Pillow weigh the same pixels, but round between rows and columns, and may begin with others.

    Measured on these: 0.0 to 0.3 on average, and above 1 for fewer than 1 value in 1,000.
    """
    file = jpeg(photo(height, width))
    whole = load_image(file)
    for index in range(6):
        ours = np.asarray(crop(file, size, recipe, draws(0, 0, index)), int)
        theirs = np.asarray(crop(whole, size, recipe, draws(0, 0, index)), int)
        assert ours.shape == (*size, 3)
        assert np.abs(ours - theirs).mean() < 0.4
        assert (np.abs(ours - theirs) > 1).mean() < 0.005


@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_crops_of_an_image_are_those_of_each_alone(orientation, monkeypatch):
    """The image is decoded once for each scale, and what is kept of a small one serves as well as its file."""
    decoded, decode = [], Jpeg.decode
    monkeypatch.setattr(Jpeg, "decode", lambda self, scale=1: decoded.append(scale) or decode(self, scale))
    for picture, scales in ((LARGE, {1, 2, 4, 8}), (SMALL, {1})):
        file = jpeg(picture, orientation)
        for recipe in (ResizedCrop(), SimpleCrop()):
            alone = [crop(file, (40, 60), recipe, draws(0, 0, index)) for index in range(8)]
            decoded.clear()
            together = crops(file, (40, 60), recipe, [draws(0, 0, index) for index in range(8)])
            assert len(decoded) == len(set(decoded))
            assert set(decoded) <= scales
            kept = crops(decode(read(file)), (40, 60), recipe, [draws(0, 0, index) for index in range(8)])
            for index in range(8):
                np.testing.assert_array_equal(np.asarray(together[index]), np.asarray(alone[index]))
                if picture is SMALL:
                    np.testing.assert_array_equal(np.asarray(kept[index]), np.asarray(alone[index]))


def test_crop_reads_any_source(tmp_path):
    """A path, its bytes and the image in memory give the same view, and whatever was read before does not matter."""
    file = io.BytesIO()
    SMALL.save(file, "PNG")
    (tmp_path / "photo.png").write_bytes(file.getvalue())
    (tmp_path / "photo.jpg").write_bytes(jpeg(LARGE))
    for recipe in (ResizedCrop(), SimpleCrop()):
        views = [
            np.asarray(crop(source, (32, 32), recipe, draws(0, 0, 1)))
            for source in (SMALL, file.getvalue(), tmp_path / "photo.png", str(tmp_path / "photo.png"))
        ]
        assert all(np.array_equal(views[0], view) for view in views)
        views = [
            np.asarray(crop(source, (32, 32), recipe, draws(0, 0, 1)))
            for source in (tmp_path / "photo.jpg", jpeg(LARGE))
        ]
        assert np.array_equal(*views)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK", "I;16"])
def test_crop_gives_rgb(mode):
    image = (
        Image.fromarray(np.asarray(SMALL.convert("L")).astype(np.uint16) * 257)
        if mode == "I;16"
        else (SMALL.convert(mode))
    )
    for recipe in (ResizedCrop(), SimpleCrop()):
        view = crop(image, (16, 24), recipe, draws(0, 0, 0))
        assert (view.mode, view.size) == ("RGB", (24, 16))
        expected = crop(load_image(image), (16, 24), recipe, draws(0, 0, 0))
        assert np.array_equal(np.asarray(view), np.asarray(expected))


def test_crop_of_damaged_file(tmp_path):
    (tmp_path / "half.jpg").write_bytes(jpeg(SMALL)[:900])
    for recipe in (ResizedCrop(), SimpleCrop()):
        with raises_saying(ImageError, "half.jpg", "damaged"):
            crop(tmp_path / "half.jpg", (8, 8), recipe, draws(0, 0, 0))


@pytest.mark.parametrize(
    ("image", "padding"),
    [(SMALL, 4), (SMALL.rotate(90, expand=True), 4), (SMALL, 0), (Image.fromarray(np.asarray(SMALL)[:5, :3]), 60)],
)
def test_simple_crop_equals_torchvision(image, padding, monkeypatch):
    """torchvision's Resize and RandomCrop with reflection, at the same place of the padded image."""
    resized = Resize(40, reference.InterpolationMode.BICUBIC)(image)
    theirs = RandomCrop(40, padding, padding_mode="reflect")
    free = (resized.height + 2 * padding - 40, resized.width + 2 * padding - 40)
    for place in itertools.product(*({0, extent // 3, extent} for extent in free)):
        monkeypatch.setattr(RandomCrop, "get_params", lambda *_, place=place: (*place, 40, 40))
        ours = crop(image, (40, 40), SimpleCrop(padding=padding), Fixed(*place))
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs(resized)))


def test_simple_crop_covers():
    """A view of another shape than the image: the side that fits has no room, the other shows every place."""
    image = Image.fromarray(np.arange(120, dtype=np.uint8)[None, :, None].repeat(60, 0).repeat(3, 2))
    first = [np.asarray(crop(image, (60, 60), SimpleCrop(padding=0), draws(0, 0, i)))[0, 0, 0] for i in range(600)]
    assert set(first) == set(range(61))
    assert crop(image, (10, 100), SimpleCrop(), draws(0, 0, 0)).size == (100, 10)
    assert crop(image, (100, 10), SimpleCrop(), draws(0, 0, 0)).size == (10, 100)
    assert crop(Image.new("RGB", (1, 1)), (8, 4), SimpleCrop(), draws(0, 0, 0)).size == (4, 8)


# ------------------------------------------------------------------------------------------- images of the model's size


POLICIES = [
    RandAugment(magnitude=9, std=0.5),
    RandAugment(magnitude=10, layers=4, probability=1.0),
    RandAugment(increasing=False, probability=1.0),
    AutoAugment(policy="original"),
    AutoAugment(policy="v0"),
    ThreeAugment(),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (2, 31), (40, 24)])
def test_policies_keep_size_and_mode(policy, size):
    recipe = Augment(flip=0.5, affine=Affine(rotate=10), policy=policy, jitter=Jitter(brightness=0.3, saturation=0.3))
    for mode, fill in (("RGB", (1, 2, 3)), ("L", (7,))):
        image = photo(40, 40).resize(size[::-1]).convert(mode)
        before = np.asarray(image).copy()
        for index in range(40):
            view = augment(image, recipe, draws(0, 0, index), fill)
            assert (view.mode, view.size) == (mode, image.size)
            assert np.array_equal(np.asarray(augment(image, recipe, draws(0, 0, index), fill)), np.asarray(view))
        assert np.array_equal(np.asarray(image), before)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_views_differ(policy):
    views = {augment(SMALL, Augment(policy=policy), draws(0, 0, index)).tobytes() for index in range(40)}
    assert len(views) > 10


def test_no_draw_without_a_setting():
    """What is off takes no numbers, so switching it on elsewhere leaves the rest as it was."""
    rng = draws(0, 0, 0)
    augment(SMALL, Augment(), rng)
    assert rng.random() == draws(0, 0, 0).random()
    for policy in (RandAugment(probability=0.0), RandAugment(layers=0)):
        assert augment(SMALL, Augment(policy=policy), rng) is SMALL
    assert augment(SMALL, Augment(jitter=Jitter()), rng) is SMALL
    pixels = np.zeros((3, 8, 8), np.float32)
    erase(pixels, Erase(probability=0.0), rng)
    assert not pixels.any()


def test_fill_is_per_channel(picture):
    with raises_saying(ValueError, "mode L", "(128, 128, 128)", "give the mean colour"):
        augment(picture.convert("L"), Augment(policy=RandAugment()), draws(0, 0, 0))


def test_fill_is_what_is_uncovered():
    """Half of a black image, shifted by up to 45 %, shows the fill and nothing else."""
    recipe = Augment(policy=RandAugment(magnitude=10, layers=1, probability=1.0))
    shown = set()
    for index in range(60):
        view = augment(Image.new("RGB", (20, 20)), recipe, draws(0, 0, index), (10, 20, 30))
        shown |= {colour for count, colour in view.getcolors() if count >= 100}
    assert (10, 20, 30) in shown
    assert (128, 128, 128) not in shown


def test_flip():
    flipped = [
        np.array_equal(np.asarray(augment(SMALL, Augment(flip=0.3), draws(0, 0, index))), np.asarray(SMALL)[:, ::-1])
        for index in range(600)
    ]
    assert abs(np.mean(flipped) - 0.3) < 0.06
    still = augment(SMALL, Augment(flip=0.3), draws(0, 0, flipped.index(False)))
    assert still is SMALL


def test_flip_comes_before_the_affine_map():
    """A flip first, then a turn: not the same as the other way round."""
    recipe = Augment(flip=1.0, affine=Affine(rotate=30))
    rng = draws(0, 0, 3)
    rng.random()
    expected = random_affine(SMALL.transpose(Image.Transpose.FLIP_LEFT_RIGHT), recipe.affine, rng)
    assert np.array_equal(np.asarray(augment(SMALL, recipe, draws(0, 0, 3))), np.asarray(expected))


def test_three_augment():
    """One of three, always: grey by the luma weights of Rec. 601, values from 128 on inverted, or a blur."""
    pixels = np.asarray(SMALL, int)
    luma = (pixels @ [0.299, 0.587, 0.114])[..., None].repeat(3, 2)
    found = {"grey": 0, "solarise": 0, "blur": 0}
    for index in range(300):
        view = np.asarray(augment(SMALL, Augment(policy=ThreeAugment()), draws(0, 0, index)), int)
        if np.abs(view - luma).max() <= 1:
            assert (view == view[..., :1]).all()
            found["grey"] += 1
        elif np.array_equal(view, np.where(pixels < 128, pixels, 255 - pixels)):
            found["solarise"] += 1
        else:
            assert (
                np.abs(view - pixels).mean()
                < np.abs(np.asarray(SMALL.filter(ImageFilter.GaussianBlur(2.05)), int) - pixels).mean()
            )
            found["blur"] += 1
    assert min(found.values()) > 75
    blurred = augment(SMALL, Augment(policy=ThreeAugment()), Fixed(2, 1.3))
    assert blurred.tobytes() == SMALL.filter(ImageFilter.GaussianBlur(1.3)).tobytes()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_jitter_equals_torchvision(order):
    recipe = Jitter(brightness=0.3, contrast=0.5, saturation=0.8)
    for factors in ([-1.0, 1.0, 0.2], [0.6, -0.4, -0.9], [0.0, 0.0, 1.0]):
        theirs, change = SMALL, (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation)
        for at in order:
            theirs = change[at](theirs, 1 + (0.3, 0.5, 0.8)[at] * factors[at])
        ours = augment(SMALL, Augment(jitter=recipe), Fixed(np.array(order), np.array(factors)))
        assert ours.tobytes() == theirs.tobytes()


def test_jitter_draws():
    """A grey level of 100 tells the brightness that was drawn: uniform from 70 to 130."""
    recipe, grey = Augment(jitter=Jitter(brightness=0.3)), Image.new("RGB", (1, 1), (100, 100, 100))
    levels = np.array([augment(grey, recipe, draws(0, 0, index)).getpixel((0, 0))[0] for index in range(2000)])
    assert (levels.min(), levels.max()) == (70, 129)  # Pillow cuts fractions off
    np.testing.assert_allclose(np.quantile(levels, [0.25, 0.5, 0.75]), [85, 100, 115], atol=2)
    once = ImageEnhance.Brightness(grey).enhance(0.7).getpixel((0, 0))[0]
    assert once == 70


def test_erase():
    """Everything outside one rectangle stays; inside is noise of variance 1, of its own for each channel."""
    recipe = Erase(probability=1.0, area=(0.1, 0.3), ratio=(0.5, 2.0))
    areas, ratios, noise = [], [], []
    for index in range(1000):
        pixels = np.full((3, 60, 90), np.nan, np.float32)
        erase(pixels, recipe, draws(0, 0, index))
        changed = ~np.isnan(pixels)
        rows, columns = (np.flatnonzero(changed[0].any(axis)) for axis in (1, 0))
        box = (slice(None), slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        assert changed[box].all()
        assert changed.sum() == pixels[box].size
        areas.append(len(rows) * len(columns) / 5400)
        ratios.append(np.log2(len(rows) / len(columns)))
        noise.append(pixels[box].reshape(3, -1))
    noise = np.concatenate(noise, axis=1)
    np.testing.assert_allclose(np.cov(noise), np.eye(3), atol=0.01)
    np.testing.assert_allclose(noise.mean(1), 0, atol=0.01)
    np.testing.assert_allclose(np.quantile(areas, [0, 0.5, 1]), [0.1, 0.2, 0.3], atol=0.012)
    np.testing.assert_allclose(np.quantile(ratios, [0, 0.5, 1]), [-1, 0, 1], atol=0.1)


def test_erase_probability():
    erased = 0
    for index in range(1000):
        pixels = np.zeros((1, 30, 30), np.float32)
        erase(pixels, Erase(probability=0.25), draws(0, 0, index))
        erased += pixels.any()
    assert 0.21 < erased / 1000 < 0.29


# --------------------------------------------------------------------------------------------------------------- mixing


BOTH = {mode: Mix(mixup=0.8, cutmix=1.0, mode=mode) for mode in ("batch", "pair", "element")}


@pytest.mark.parametrize("recipe", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_mixing_shares_draws(recipe, batch):
    """As many different draws as the mode says; a pair is a row and its mirror."""
    drawn = mixing(recipe, batch, (224, 224), draws(0, 0, 0))
    assert (drawn.share.dtype, drawn.cut.dtype) == (np.float32, bool)
    assert (drawn.share.shape, drawn.cut.shape, drawn.box.shape) == ((batch,), (batch,), (batch, 4))
    rows = {
        (float(share), bool(cut), *box.tolist())
        for share, cut, box in zip(drawn.share, drawn.cut, drawn.box, strict=True)
    }
    assert len(rows) == {"batch": 1, "pair": (batch + 1) // 2, "element": batch}[recipe.mode]
    if recipe.mode == "pair":
        for values in (drawn.share, drawn.cut, drawn.box):
            assert np.array_equal(values, values[::-1])
    again = mixing(recipe, batch, (224, 224), draws(0, 0, 0))
    assert np.array_equal(drawn.share, again.share)
    assert np.array_equal(drawn.box, again.box)


def test_mixing_draws():
    """Probability, switch and the Beta distributions: var of Beta(a, a) is 1 / (4 (2 a + 1))."""
    drawn = mixing(
        Mix(mixup=0.4, cutmix=1.0, probability=0.8, switch=0.25, mode="element"), 20_000, (64, 96), draws(0, 0, 0)
    )
    whole = ~drawn.cut & (drawn.share == 1)
    assert abs(drawn.cut.mean() - 0.8 * 0.25) < 0.01
    assert abs(whole.mean() - 0.2) < 0.01
    blended = drawn.share[~drawn.cut & ~whole]
    assert abs(blended.mean() - 0.5) < 0.01
    assert abs(blended.var() - 1 / (4 * 1.8)) < 0.005
    top, bottom, left, right = drawn.box.T
    assert not drawn.box[~drawn.cut].any()
    np.testing.assert_allclose(
        drawn.share[drawn.cut], 1 - ((bottom - top) * (right - left))[drawn.cut] / (64 * 96), atol=1e-7
    )
    inner = drawn.cut & (top > 0) & (bottom < 64) & (left > 0) & (right < 96)
    assert (np.abs((right - left) - 1.5 * (bottom - top))[inner] <= 1.5).all()  # the image's shape, up to rounding
    halves = mixing(Mix(mixup=0.4, cutmix=1e6, mode="element"), 500, (64, 96), draws(0, 0, 0))  # of the area, always
    sides = {
        (bottom - top, right - left)
        for top, bottom, left, right in halves.box[halves.cut].tolist()
        if top > 0 and bottom < 64 and left > 0 and right < 96
    }
    assert sides <= {(rows, columns) for rows in (45, 46) for columns in (67, 68)}
    assert sides
    assert halves.share[~halves.cut].std() > 0.3
    for only, cut in ((Mix(mixup=0.8), False), (Mix(cutmix=1.0), True)):
        assert (mixing(only, 16, (8, 8), draws(0, 0, 0)).cut == cut).all()


@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_mix_by_its_definition(mode, batch):
    """Row by row, pixel by pixel, in plain loops."""
    pixels = torch.randn(batch, 2, 5, 7)
    labels = torch.arange(batch) % 4
    kept = pixels.clone(), labels.clone()
    cut = 0
    for index in range(12):
        drawn = mixing(BOTH[mode], batch, (5, 7), draws(0, 0, index))
        mixed, targets = mix(pixels, labels, 4, drawn)
        expected, expected_targets = pixels.clone(), torch.zeros(batch, 4)
        for row in range(batch):
            partner, share = batch - 1 - row, float(drawn.share[row])
            top, bottom, left, right = drawn.box[row]
            if drawn.cut[row]:
                expected[row, :, top:bottom, left:right] = pixels[partner, :, top:bottom, left:right]
            else:
                expected[row] = share * pixels[row] + (1 - share) * pixels[partner]
            expected_targets[row, labels[row]] += share
            expected_targets[row, labels[partner]] += 1 - share
        torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(targets, expected_targets, rtol=0, atol=1e-6)
        assert targets.dtype == torch.float32
        assert torch.equal(pixels, kept[0])
        assert torch.equal(labels, kept[1])
        cut += drawn.cut.sum()
    assert 0 < cut < 12 * batch


@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize("batch", [8, 13])
def test_parts_of_a_batch_equal_the_whole(mode, batch):
    """Two processes with mirrored halves of the batch compute, to the bit, what one would."""
    pixels, labels = torch.randn(batch, 3, 9, 11), torch.randint(0, 5, (batch,))
    for index in range(10):
        drawn = mixing(BOTH[mode], batch, (9, 11), draws(0, 0, index))
        mixed, targets = mix(pixels, labels, 5, drawn)
        near = np.array([0, 2, 3, batch - 4, batch - 3, batch - 1])
        for part in (near, np.setdiff1d(np.arange(batch), near)):
            some, theirs = mix(pixels[part], labels[part], 5, drawn.at(part))
            assert torch.equal(some, mixed[part])
            assert torch.equal(theirs, targets[part])


def test_mix_keeps_the_type():
    drawn = mixing(BOTH["element"], 6, (4, 4), draws(0, 0, 0))
    pixels = torch.randn(6, 3, 4, 4)
    for dtype in (torch.bfloat16, torch.float64):
        mixed, targets = mix(pixels.to(dtype), torch.zeros(6, dtype=torch.int64), 2, drawn)
        assert (mixed.dtype, targets.dtype) == (dtype, torch.float32)
        torch.testing.assert_close(
            mixed.float(), mix(pixels, torch.zeros(6, dtype=torch.int64), 2, drawn)[0], rtol=0, atol=0.05
        )


def test_mix_of_nothing_drawn():
    """Probability 0 leaves images and labels alone, to the bit."""
    drawn = mixing(Mix(mixup=0.8, cutmix=1.0, probability=0.0, mode="element"), 6, (4, 4), draws(0, 0, 0))
    pixels, labels = torch.randn(6, 3, 4, 4), torch.arange(6)
    mixed, targets = mix(pixels, labels, 6, drawn)
    assert torch.equal(mixed, pixels)
    assert torch.equal(targets, torch.eye(6))


def test_mix_refuses_other_draws():
    drawn = Mixing(np.ones(4, np.float32), np.zeros(4, bool), np.zeros((4, 4), int))
    with raises_saying(ValueError, "2 images", "4 draws", "drawn.at(positions)"):
        mix(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), 2, drawn)


# ------------------------------------------------------------------------------------------------------------- patches


@pytest.mark.parametrize(
    ("grid", "unit", "ratio", "hidden"),
    [
        ((14, 14), (2, 2), 0.6, 30),
        ((14, 14), (1, 1), 0.5, 98),
        ((8, 8), (4, 2), 0.3, 3),
        ((4, 5), (1, 1), 0.55, 11),
        ((10, 10), (1, 1), 0.07, 7),
        ((4, 4), (4, 4), 0.01, 1),
    ],
)
def test_patch_mask(grid, unit, ratio, hidden):
    """Whole units, as many as ceil(ratio * units) in exact arithmetic (0.07 * 100 is more than 7 in floats)."""
    mask = patch_mask(grid, unit, ratio, draws(0, 0, 0))
    assert (mask.shape, mask.dtype) == ((grid[0] * grid[1],), bool)
    units = mask.reshape(grid[0] // unit[0], unit[0], grid[1] // unit[1], unit[1])
    assert (units == units[:, :1, :, :1]).all()
    assert units[:, 0, :, 0].sum() == hidden


def test_patch_mask_partial_units():
    """5 x 7 patches in units of 2 x 3: 3 x 3 units, and those of the last row and column are cut off."""
    units = np.arange(9).reshape(3, 3).repeat(2, 0).repeat(3, 1)[:5, :7].reshape(-1)
    counts = np.zeros(9)
    for index in range(900):
        mask = patch_mask((5, 7), (2, 3), 0.4, draws(0, 0, index))
        hidden = np.unique(units[mask])
        assert len(hidden) == 4
        assert np.array_equal(mask, np.isin(units, hidden))
        counts[hidden] += 1
    np.testing.assert_allclose(counts / 900, 4 / 9, atol=0.06)
