"""Augmentation against timm: each operation under the same arguments, and whole pipelines under the same draws.

timm draws from global generators. Here they answer from one counted generator, so that both see the same numbers in
the same order, and have to make the same pixels of them.
"""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import erase
from timm.data import auto_augment, create_transform, random_erasing
from timm.data import mixup as timm_mixup
from timm.data.transforms import RandomResizedCropAndInterpolation

from deit.config import IMAGENET_MEAN, IMAGENET_STD
from deit.data.augment import augment, crop, crop_box
from deit.data.draws import draws
from deit.data.mixing import mix, mixing
from deit.data.policies import AUTO_AUGMENT, OPERATIONS, RAND_AUGMENT, RAND_AUGMENT_INCREASING
from deit.recipe import Augment, AutoAugment, Erase, Mix, RandAugment, ResizedCrop

FILL = tuple(round(255 * value) for value in IMAGENET_MEAN)
HPARAMS = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}


def photo(height, width, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def assert_same(ours, theirs):
    assert ours.mode == theirs.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.fixture
def answer(monkeypatch):
    """`answer(rng)` makes everything that timm and torchvision draw come from `rng`."""

    def from_(rng):
        monkeypatch.setattr(random, "random", rng.random)
        monkeypatch.setattr(random, "uniform", rng.uniform)
        monkeypatch.setattr(random, "gauss", rng.normal)
        monkeypatch.setattr(random, "randint", lambda low, high: int(rng.integers(high - low + 1)) + low)
        monkeypatch.setattr(random, "choice", lambda options: options[rng.integers(len(options))])
        monkeypatch.setattr(
            np.random,
            "choice",
            lambda options, count, replace, p: [options[at] for at in rng.integers(len(options), size=count)],
        )
        monkeypatch.setattr(torch, "rand", lambda _: torch.tensor([rng.random()], dtype=torch.float64))
        monkeypatch.setattr(
            random_erasing,
            "_get_pixels",
            lambda per_pixel, rand_color, patch_size, **_: torch.from_numpy(
                rng.standard_normal(patch_size, np.float32)
            ),
        )

    return from_


@pytest.fixture(autouse=True)
def _posterize_to_nothing(monkeypatch):
    """timm raises with Pillow 13 where no bits are kept; `test_posterize_to_black` shows it."""
    theirs = auto_augment.posterize
    black = dict.fromkeys(
        ["Posterize", "PosterizeIncreasing", "PosterizeOriginal"],
        lambda image, bits, **_: theirs(image, bits) if bits else Image.new("RGB", image.size),
    )
    for name, operation in black.items():
        monkeypatch.setitem(auto_augment.NAME_TO_OP, name, operation)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name, sign, monkeypatch):
    """Ten strengths, fractions and both ends included, on an image with few and one with many colours."""
    monkeypatch.setattr(random, "random", lambda: 0.25 if sign > 0 else 0.75)
    flat = Image.fromarray(np.asarray(photo(24, 36)) // 64 * 40)
    operation = OPERATIONS[name]
    for strength in (0, 0.3, 1, 2.5, 4.99, 5, 7, 8.6, 9, 10):
        theirs = auto_augment.AugmentOp(name, prob=1.0, magnitude=strength, hparams=HPARAMS)
        argument = operation.argument(sign * strength if operation.signed else strength)
        for image in (photo(40, 56), flat):
            assert_same(operation.apply(image, argument, FILL), theirs(image))


def test_signs(monkeypatch):
    """The operations that have a sign here are those whose arguments change with timm's."""

    def argument(name, chance):
        monkeypatch.setattr(random, "random", lambda: chance)
        to_argument = auto_augment.LEVEL_TO_ARG[name]
        return to_argument and to_argument(5, {})

    for name, operation in OPERATIONS.items():
        assert operation.signed == (argument(name, 0.25) != argument(name, 0.75)), name


def test_posterize_to_black(monkeypatch):
    monkeypatch.undo()
    image = photo(16, 16)
    for name, strength in (("PosterizeIncreasing", 10), ("Posterize", 2)):
        ours = OPERATIONS[name]
        assert ours.argument(strength) == 0
        assert np.asarray(ours.apply(image, 0, FILL)).max() == 0
        with pytest.raises(ValueError, match="bits"):
            auto_augment.AugmentOp(name, prob=1.0, magnitude=strength, hparams=HPARAMS)(image)


def test_lists():
    assert list(RAND_AUGMENT) == auto_augment._RAND_TRANSFORMS
    assert list(RAND_AUGMENT_INCREASING) == auto_augment._RAND_INCREASING_TRANSFORMS
    for name, policy in AUTO_AUGMENT.items():
        theirs = auto_augment.auto_augment_policy(name, HPARAMS)
        assert [[(op.name, op.prob, op.magnitude) for op in pair] for pair in theirs] == [list(p) for p in policy]
        assert len(policy) == 25


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        (RandAugment(magnitude=9, std=0.5), "rand-m9-mstd0.5-inc1"),
        (RandAugment(magnitude=9, std=3.0, layers=3, probability=0.8), "rand-m9-mstd3-n3-p0.8-inc1"),
        (RandAugment(magnitude=7, increasing=False), "rand-m7"),
        (RandAugment(magnitude=4, layers=4, probability=1.0), "rand-m4-n4-p1-inc1"),
        (AutoAugment(policy="original"), "original"),
        (AutoAugment(policy="original", std=0.5), "original-mstd0.5"),
        (AutoAugment(policy="v0"), "v0"),
        (AutoAugment(policy="v0", std=2.0), "v0-mstd2"),
    ],
)
def test_policy(recipe, text, answer):
    make = auto_augment.rand_augment_transform if text.startswith("rand") else auto_augment.auto_augment_transform
    theirs, image, changed = make(text, dict(HPARAMS)), photo(32, 48), 0
    for index in range(150):
        ours = augment(image, Augment(policy=recipe), draws(0, 0, index), FILL)
        answer(draws(0, 0, index))
        assert_same(ours, theirs(image))
        changed += ours is not image
    assert changed > 80


@pytest.mark.parametrize(
    ("full", "recipe"),
    [
        ((90, 120), ResizedCrop()),
        ((120, 90), ResizedCrop(scale=(0.6, 1.0), ratio=(0.9, 1.1))),
        ((20, 300), ResizedCrop(scale=(0.5, 1.0))),
        ((300, 20), ResizedCrop(scale=(0.5, 1.0))),  # nothing fits
    ],
)
def test_crop(full, recipe, answer):
    image = photo(*full)
    theirs = RandomResizedCropAndInterpolation((24, 32), recipe.scale, recipe.ratio, "bicubic")
    boxes = set()
    for index in range(60):
        ours = crop(image, (24, 32), recipe, draws(0, 0, index))
        answer(draws(0, 0, index))
        assert_same(ours, theirs(image))
        boxes.add(crop_box(full, recipe, draws(0, 0, index)))
    assert len(boxes) == 1 if 20 in full else len(boxes) > 50


@pytest.mark.parametrize(
    ("shape", "recipe"),
    [
        ((3, 32, 48), Erase()),
        ((1, 40, 40), Erase(probability=0.9, area=(0.1, 0.9), ratio=(0.2, 2.0))),
        ((3, 6, 60), Erase(probability=1.0, area=(0.15, 0.9))),  # often none of ten draws fits
    ],
)
def test_erase(shape, recipe, answer):
    pixels, erased = draws(1, 0, 0).standard_normal(shape, np.float32), 0
    for index in range(80):
        ours = pixels.copy()
        erase(ours, recipe, draws(0, 0, index))
        answer(draws(0, 0, index))
        theirs = random_erasing.RandomErasing(
            recipe.probability, *recipe.area, *recipe.ratio, mode="pixel", device="cpu"
        )(torch.from_numpy(pixels.copy()))
        np.testing.assert_array_equal(ours, theirs.numpy())
        erased += not np.array_equal(ours, pixels)
    assert erased > 5


def test_whole_transform(answer):
    """The paper's training transform as timm builds it: crop, flip, RandAugment, normalisation, erasing."""
    theirs = create_transform(
        (3, 48, 48),
        is_training=True,
        color_jitter=None,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )
    recipe = Augment(crop=ResizedCrop(), flip=0.5, policy=RandAugment(magnitude=9, std=0.5), erase=Erase())
    image = photo(120, 160)
    mean, std = (np.array(value, np.float32)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
    for index in range(100):
        rng = draws(5, 0, index)
        view = augment(crop(image, (48, 48), recipe.crop, rng), recipe, rng, FILL)
        ours = (np.asarray(view, np.float32).transpose(2, 0, 1) / 255 - mean) / std
        erase(ours, recipe.erase, rng)
        answer(draws(5, 0, index))
        np.testing.assert_allclose(ours, theirs(image).numpy(), atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- mixing


@pytest.mark.parametrize("mode", ["batch", "pair", "element"])
@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize("alphas", [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])
def test_mixing(mode, batch, alphas, monkeypatch):
    """timm is told which rows to cut, their shares before correction and their boxes; everything else it works out."""
    mixup, cutmix = alphas
    recipe = Mix(mixup=mixup, cutmix=cutmix, probability=0.8, mode=mode)
    pixels, labels = torch.randn(batch, 3, 20, 12), torch.randint(0, 7, (batch,))
    theirs = timm_mixup.Mixup(
        mixup, cutmix, prob=0.8, mode={"element": "elem"}.get(mode, mode), label_smoothing=0.0, num_classes=7
    )
    seen = {"cut": 0, "blend": 0, "whole": 0}
    for index in range(40):
        drawn = mixing(recipe, batch, (20, 12), draws(0, 0, index))
        rows = {"batch": 1, "pair": batch // 2, "element": batch}[mode]
        boxes = iter([tuple(box) for box, cut in zip(drawn.box[:rows], drawn.cut[:rows], strict=True) if cut])
        # a share of its own would do for a cut row (timm replaces it), but 1 would skip the row
        share = np.where(drawn.cut, np.float32(0.5), drawn.share)[:rows]
        monkeypatch.setattr(timm_mixup, "rand_bbox", lambda *_, boxes=boxes, **__: next(boxes))
        monkeypatch.setattr(theirs, "_params_per_batch", lambda: (float(share[0]), bool(drawn.cut[0])))  # noqa: B023
        monkeypatch.setattr(theirs, "_params_per_elem", lambda _: (share.copy(), drawn.cut[:rows]))  # noqa: B023
        expected, targets = theirs(pixels.clone(), labels)
        found, ours = mix(pixels, labels, 7, drawn)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close(ours, targets, rtol=0, atol=1e-7)
        assert next(boxes, None) is None
        seen["cut"] += drawn.cut.any()
        seen["blend"] += (~drawn.cut & (drawn.share < 1)).any()
        seen["whole"] += (~drawn.cut & (drawn.share == 1)).any()
    assert (seen["cut"] > 0, seen["blend"] > 0) == (cutmix > 0, mixup > 0)
    assert seen["whole"] > 0


class Recorded:
    """A generator that remembers what it answered."""

    def __init__(self, rng):
        self.rng, self.betas, self.centres = rng, [], []

    def random(self, count):
        return self.rng.random(count)

    def beta(self, *alphas):
        self.betas.append(self.rng.beta(*alphas))
        return self.betas[-1]

    def integers(self, *limits):
        self.centres.append(self.rng.integers(*limits))
        return self.centres[-1]


@pytest.mark.parametrize("size", [(224, 224), (30, 77), (3, 2)])
def test_boxes(size, monkeypatch):
    """timm's boxes and corrected shares, given the same areas and centres."""
    rng = Recorded(draws(0, 0, 0))
    drawn = mixing(Mix(cutmix=1.0, mode="element"), 400, size, rng)
    for row, centre in enumerate(zip(*rng.centres, strict=True)):
        centres = iter(centre)
        monkeypatch.setattr(np.random, "randint", lambda *_, centres=centres, **__: next(centres))
        (top, bottom, left, right), share = timm_mixup.cutmix_bbox_and_lam((3, *size), rng.betas[0][row])
        assert drawn.box[row].tolist() == [top, bottom, left, right]
        assert drawn.share[row] == np.float32(share)
