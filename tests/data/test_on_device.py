"""Changes of whole batches against those of single images by Pillow, level by level."""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from support.checks import raises_saying
from support.pictures import noise, photo, smooth
from support.runs import small_recipe

from deit.config import DeiTConfig
from deit.data.augment import augment, drawn
from deit.data.batches import TrainingBatches
from deit.data.draws import draws
from deit.data.folders import Split
from deit.data.on_device import Changes
from deit.data.policies import MIRROR, OPERATIONS, Change, Kind, Operation, moved
from deit.recipe import (
    Affine,
    Augment,
    AutoAugment,
    Compute,
    Data,
    Erase,
    Jitter,
    MaskedImage,
    Mix,
    RandAugment,
    Recipe,
    ResizedCrop,
    SimpleCrop,
    ThreeAugment,
)

FILL = (124, 116, 104)
MAPS = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
EXACT = [name for name in OPERATIONS if name not in MAPS]
LARGEST, OFTEN, OFTEN_IF_ROUND = 1, 1e-4, 5e-3
"""A map gives levels that differ by at most 1 from Pillow's, and so many of all levels differ: of drawn arguments, and
of round ones, where sums are often whole numbers, and float64 and float32 cut them off differently."""


def pictures(height, width):
    """Photos, noise, gradients, few colours, hardly any contrast, one colour, and hard edges."""
    y, x = np.mgrid[:height, :width]
    gradient = np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x + 2 * y) % 256], -1)
    found = [np.asarray(photo(height, width, seed)) if min(height, width) > 7 else noise(height, width, 3, seed)
             for seed in range(3)]  # fmt: skip
    found += [
        noise(height, width, 3, 3),
        gradient,
        noise(height, width, 3, 4) // 64 * 40,
        noise(height, width) // 50 + 99,
    ]
    found += [np.full((height, width, 3), (7, 200, 0)), (x + y)[..., None].repeat(3, 2) // 5 % 2 * 255]
    found += [np.asarray(smooth(height, width)), np.zeros((height, width, 3))]
    return [Image.fromarray(np.ascontiguousarray(each, dtype=np.uint8)) for each in found]


def batch_of(images):
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def changed(images, changes, channels=3):
    """The levels that a batch of these images has after the changes of each, (B, channels, height, width)."""
    levels = batch_of(images)
    kept = levels.clone()
    found = Changes.of(changes, (images[0].height, images[0].width), FILL, channels).applied(levels)
    assert found.dtype == torch.uint8
    assert torch.equal(levels, kept)
    return found


def by_pillow(images, changes):
    done = []
    for image, theirs in zip(images, changes, strict=True):
        for change in theirs:
            image = change.apply(image, FILL)
        done.append(image)
    return batch_of(done)


def difference(images, changes):
    """How far each level is from Pillow's."""
    return (changed(images, changes).int() - by_pillow(images, changes).int()).abs()


def arguments(name):
    operation = OPERATIONS[name]
    signs = (1, -1) if operation.signed else (1,)
    return [
        Change(operation, operation.argument(sign * strength))
        for strength in (0, 0.3, 1, 2.5, 4.99, 5, 7, 8.6, 9, 10)
        for sign in signs
    ]


def all_with_all(images, changes):
    """Every image with every change alone, as two lists."""
    return [image for image in images for _ in changes], [[change] for _ in images for change in changes]


# ---------------------------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize("size", [(40, 56), (1, 1), (2, 31), (31, 2), (3, 3)])
@pytest.mark.parametrize("name", EXACT)
def test_levels_are_those_of_pillow(name, size):
    images, changes = all_with_all(pictures(*size), arguments(name))
    assert torch.equal(changed(images, changes), by_pillow(images, changes))


def one_of_three(kind):
    """The operation of 3-Augment."""
    views = (drawn(Augment(policy=ThreeAugment()), (9, 9), draws(0, 0, index)) for index in range(20))
    return next(change.operation for view in views for change in view if change.operation.kind == kind)


def test_flip_grey_and_blur_are_those_of_pillow():
    radii = [0.1, 0.5, 1.0, 1.2247, 1.4142, 1.4143, 1.9, 2.0, *np.random.default_rng(0).uniform(0.1, 2.0, 40).tolist()]
    blurs = [Change(one_of_three(Kind.BLUR), radius) for radius in radii]
    for size in ((40, 56), (1, 1), (2, 31), (31, 2)):
        images, changes = all_with_all(pictures(*size), [Change(MIRROR), Change(one_of_three(Kind.GREY)), *blurs])
        assert torch.equal(changed(images, changes), by_pillow(images, changes))


def test_extreme_levels_survive_the_blur():
    """Black and white are the ends of the sums of 32 bits."""
    for level in (0, 1, 127, 128, 254, 255):
        image = Image.new("RGB", (6, 5), (level, level, 255 - level))
        for radius in np.linspace(0.1, 2.0, 97).tolist():
            assert torch.equal(changed([image], [[Change(one_of_three(Kind.BLUR), radius)]]), batch_of([image]))


@pytest.mark.parametrize("size", [(40, 56), (96, 96), (1, 1), (2, 31), (31, 2)])
@pytest.mark.parametrize("name", MAPS)
def test_maps_are_pillows_up_to_rounding(name, size):
    operation, images = OPERATIONS[name], pictures(*size)
    found = difference(*all_with_all(images, arguments(name)))
    assert found.max() <= LARGEST
    assert (found > 0).double().mean() <= OFTEN_IF_ROUND
    strengths = np.random.default_rng(0).uniform(-10, 10, 20).tolist()
    found = difference(*all_with_all(images, [Change(operation, operation.argument(each)) for each in strengths]))
    assert found.max() <= LARGEST
    assert (found > 0).double().mean() <= OFTEN


def test_affine_maps_are_pillows_up_to_rounding():
    images = pictures(60, 44)
    recipe = Augment(affine=Affine(rotate=170, shear=30, scale=(0.3, 4.0), shift=0.4))
    drawn_ones = [drawn(recipe, (60, 44), draws(0, 0, index))[0] for index in range(60)]
    found = difference(*all_with_all(images, drawn_ones))
    assert found.max() <= LARGEST
    assert (found > 0).double().mean() <= OFTEN


def map_by(matrix):
    return Change(Operation(lambda image, *_: moved(image, matrix, FILL), Kind.MAP, matrix=lambda *_: matrix))


def test_whole_pixels_are_moved_as_they_are():
    """To any side, by any number, turned by right angles, and out of the image."""
    rng = np.random.default_rng(0)
    changes = [map_by((1, 0, *by[:1], 0, 1, *by[1:])) for by in rng.integers(-45, 45, (30, 2)).tolist()]
    changes += [map_by((1, 0, by, 0, 1, 0)) for by in (-60, -56, -55, -1, 0, 1, 55, 56)]
    changes += [map_by((1, 0, 0, 0, 1, by)) for by in (-40, -39, -1, 1, 39, 40)]
    changes += [map_by((0, 1, 0, -1, 0, 40)), map_by((-1, 0, 56, 0, -1, 40)), map_by((-1, 0, 56, 0, 1, 0))]
    assert not difference(*all_with_all(pictures(40, 56), changes)).any()


def test_a_plain_area_stays_plain_under_any_map():
    """Each level, between pixels as well as on them."""
    maps = [change for name in MAPS for change in arguments(name)]
    images = [Image.new("RGB", (23, 19), (level, 255 - level, 128)) for level in range(0, 256, 15)]
    assert not difference(*all_with_all(images, maps)).any()


def test_a_place_on_the_border_is_inside_or_not_as_for_pillow():
    """Shifts by halves move the middles of pixels onto the border of the image."""
    images, near = pictures(20, 20)[:4], []
    for half in np.arange(-4, 4.5, 0.5):
        for by in (half, np.nextafter(half, -9), np.nextafter(half, 9)):
            near += [map_by((1, 0, by, 0, 1, 0)), map_by((1, 0, 0, 0, 1, by)), map_by((1, 0, by, 0, 1, by))]
    assert difference(*all_with_all(images, near)).max() <= LARGEST


# --------------------------------------------------------------------------------------------------------- whole views


POLICIES = [
    RandAugment(magnitude=9, std=0.5),
    RandAugment(magnitude=10, layers=4, probability=1.0),
    RandAugment(increasing=False, probability=1.0),
    AutoAugment(policy="original"),
    AutoAugment(policy="v0", std=0.5),
    ThreeAugment(),
]
WHOLE = [
    *(Augment(flip=0.5, policy=policy) for policy in POLICIES),
    Augment(flip=0.5, jitter=Jitter(brightness=0.3, contrast=0.4, saturation=0.5)),
    Augment(affine=Affine(rotate=20, shift=0.1), policy=RandAugment(std=0.5), jitter=Jitter(brightness=0.9)),
]


@pytest.mark.parametrize("settings", WHOLE, ids=str)
def test_whole_views_are_those_of_augment(settings):
    """The same draws, and the same levels where no map was drawn. A level that a map rounds the other way may be moved
    further by what follows, and only a few are."""
    images = [image for _ in range(30) for image in pictures(32, 48)]
    changes = [drawn(settings, (32, 48), draws(3, 0, index)) for index in range(len(images))]
    expected = batch_of([augment(image, settings, draws(3, 0, index), FILL) for index, image in enumerate(images)])
    found = (changed(images, changes).int() - expected.int()).abs()
    mapped = torch.tensor([any(change.operation.kind == Kind.MAP for change in each) for each in changes])
    assert not found[~mapped].any()
    assert (found > 0).double().mean() < 3e-3
    assert found.double().mean() < 5e-3
    assert not torch.equal(batch_of(images), expected)


def test_the_draws_are_those_of_augment():
    """Afterwards, both generators give the same numbers."""
    for settings in WHOLE:
        for index in range(30):
            ours, theirs = draws(0, 1, index), draws(0, 1, index)
            drawn(settings, (24, 24), ours)
            augment(photo(24, 24), settings, theirs, FILL)
            assert ours.random() == theirs.random()


@pytest.mark.parametrize("settings", WHOLE, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_does_not_depend_on_the_others(settings, channels, monkeypatch):
    """Alone, in a part, and in groups that are divided: the same bits."""
    images = pictures(37, 29) * 4
    changes = [drawn(settings, (37, 29), draws(1, 0, index)) for index in range(len(images))]
    whole = changed(images, changes, channels)
    assert whole.shape == (44, channels, 37, 29)
    for row in range(len(images)):
        assert torch.equal(changed(images[row : row + 1], changes[row : row + 1], channels)[0], whole[row])
    given, rows = Changes.of(changes, (37, 29), FILL, channels), (slice(3, 8), slice(8, 8), slice(30, 41))
    some = batch_of(images[3:8] + images[30:41])
    assert torch.equal(given.at(rows).applied(some), torch.cat([whole[each] for each in rows]))
    for together in (1, 2 * 3 * 37 * 29, 2**30):
        monkeypatch.setattr("deit.data.on_device._TOGETHER", {"cpu": together})
        assert torch.equal(changed(images, changes, channels), whole)


def test_grey_results_are_pillows():
    images = pictures(20, 30)
    expected = torch.stack([torch.from_numpy(np.array(image.convert("L")))[None] for image in images])
    assert torch.equal(changed(images, [[] for _ in images], channels=1), expected)
    assert torch.equal(changed(images, [[] for _ in images]), batch_of(images))


# ------------------------------------------------------------------------------------------------------------- batches


MODEL = DeiTConfig(
    hidden_size=24,
    num_hidden_layers=1,
    num_attention_heads=3,
    intermediate_size=48,
    image_size=(16, 12),
    patch_size=4,
    encoder_stride=4,
    distillation_token=False,
)
GREY = {"model": MODEL.replace(num_channels=1), "data": Data(batch=7, mean=(0.4,), std=(0.2,))}
PAPER = Augment(crop=ResizedCrop(), flip=0.5, policy=RandAugment(std=0.5), erase=Erase(probability=0.7))


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    files = tuple(folder / f"{index:02}.png" for index in range(23))
    for index, file in enumerate(files):
        photo(40 + index, 60 - index, index).save(file)
    return Split(files, tuple(index % 3 for index in range(23)), ("a", "b", "c"))


def recipe(on, workers=0, augment=PAPER, **parts):
    given = {"model": MODEL, "data": Data(batch=7, repeats=2), "compute": Compute(workers=workers), "seed": 5, **parts}
    return small_recipe(augment=replace(augment, on=on), **given)


def take(batches, count, step=0):
    stream = batches.from_step(step)
    found = list(islice(stream, count))
    stream.close()
    return found


@pytest.mark.parametrize(
    "parts",
    [
        {},
        GREY,
        {"augment": Augment(crop=SimpleCrop(), policy=ThreeAugment(), jitter=Jitter(brightness=0.3))},
        {"augment": Augment(flip=0.5, affine=Affine(rotate=20), policy=AutoAugment())},
        {"augment": Augment(crop=ResizedCrop(), flip=0.5), "objective": MaskedImage(ratio=0.5, unit=8)},
        {"augment": Augment()},
    ],
    ids=["paper", "grey", "three", "affine", "masked", "nothing"],
)
def test_batches_are_those_of_the_loader(split, parts):
    """Labels, masks and erased pixels to the bit, and levels but for a few of maps; mixed or not."""
    here, there = (TrainingBatches(split, recipe(on, **parts)) for on in ("device", "loader"))
    levels, erased, total = 0, 0, 0
    for ours, theirs in zip(take(here, 12), take(there, 12), strict=True):
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.positions, theirs.positions)
        assert (ours.mask is None) == (theirs.mask is None)
        assert ours.mask is None or torch.equal(ours.mask, theirs.mask)
        assert torch.equal(ours.images.given, theirs.images.given)
        assert torch.equal(ours.images.places, theirs.images.places)
        assert ours.pixels.shape == theirs.pixels.shape
        assert ours.pixels.dtype == torch.float32
        given = ours.images.places.long()
        assert torch.equal(ours.pixels.flatten()[given], theirs.pixels.flatten()[given])
        levels += int((ours.pixels != theirs.pixels).sum())
        erased += len(given)
        total += ours.pixels.numel()
    assert levels <= 1e-3 * total
    assert (erased > 0) == (here.recipe.augment.erase is not None)


def test_crops_travel_as_they_are(split):
    """A loader process leaves the rest to the device: what it hands over are the crops, and a few numbers."""
    [batch] = take(TrainingBatches(split, recipe("device")), 1)
    [crops] = take(TrainingBatches(split, recipe("loader", augment=Augment(crop=ResizedCrop()))), 1)
    assert torch.equal(batch.images.values, crops.images.values)
    assert not torch.equal(batch.images.changes.applied(batch.images.values), batch.images.values)
    assert len(batch.images.changes.kinds) == batch.images.changes.counts.sum() > 0


@pytest.mark.parametrize("parts", [{}, GREY], ids=["rgb", "grey"])
def test_neither_loaders_nor_parts_nor_places_matter(split, parts):
    given = {**parts, "augment": replace(PAPER, mix=Mix(mixup=0.8, cutmix=1.0, mode="element"))}
    found = [take(TrainingBatches(split, recipe("device", workers, **given)), 6) for workers in (0, 1, 2)]
    batches = TrainingBatches(split, recipe("device", **given))
    later = take(batches, 3, step=3)
    for step, batch in enumerate(found[0]):
        for other in (found[1][step], found[2][step], *([later[step - 3]] if step >= 3 else [])):
            assert torch.equal(other.pixels, batch.pixels)
        mixed = batches.mix(batch)
        for part in (*batch.parts(2), *batch.parts(3), *batch.parts(2)[1].parts(2), batch.pairs(2)):
            assert torch.equal(part.pixels, batch.pixels[part.positions])
            assert torch.equal(part.finished().pixels, batch.pixels[part.positions])
            assert torch.equal(batches.mix(part.finished()).pixels, mixed.pixels[part.positions])
        assert torch.equal(batch.to("cpu").finished().images, batch.pixels)


def test_processes_share_the_batch(split):
    [whole] = take(TrainingBatches(split, recipe("device")), 1, step=4)
    for rank in range(2):
        [share] = take(TrainingBatches(split, recipe("device"), rank=rank, world=2), 1, step=4)
        assert torch.equal(share.pixels, whole.pixels[share.positions])


# ------------------------------------------------------------------------------------------------------------- recipes


def test_the_setting_in_recipes(tmp_path):
    given = recipe("device")
    written = json.loads(json.dumps(given.to_dict()))
    assert written["augment"]["on"] == "device"
    assert Recipe.from_dict(written) == given
    del written["augment"]["on"]  # as earlier versions wrote it
    assert Recipe.from_dict(written) == recipe("loader")
    with raises_saying(ValueError, "augment.on", "loader or device", "'gpu'"):
        Recipe.from_dict({**written, "augment": {**written["augment"], "on": "gpu"}})
