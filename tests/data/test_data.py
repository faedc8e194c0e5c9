"""Folders, the stream of training views and its independence of everything but (seed, place), and evaluation."""

import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from support.checks import assert_close, raises_saying
from support.pictures import erase
from support.runs import small_recipe
from torch.utils.data._utils import signal_handling

from deit.config import DeiTConfig
from deit.data import batches as data
from deit.data import loading
from deit.data.augment import augment, crop, patch_mask
from deit.data.batches import BadImages, Batch, EvaluationBatches, Faults, TrainingBatches, processor_for
from deit.data.draws import draws
from deit.data.folders import Split, read_split, write_digits
from deit.data.loading import LoaderDied
from deit.data.mixing import mix, mixing
from deit.image.decode import load_image
from deit.image.processor import DeiTImageProcessor
from deit.recipe import (
    Affine,
    Augment,
    Compute,
    Data,
    Erase,
    Jitter,
    MaskedImage,
    Mix,
    RandAugment,
    ResizedCrop,
    SimpleCrop,
    Supervised,
)
from deit.recipes.digits import digits

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
PAPER = Augment(crop=ResizedCrop(), flip=0.5, policy=RandAugment(std=0.5), erase=Erase(probability=0.7))


def recipe(batch=8, repeats=1, workers=0, seed=5, model=MODEL, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), **parts):
    data = Data(batch=batch, repeats=repeats, mean=mean, std=std)
    return small_recipe(**{"model": model, "seed": seed, "data": data, "compute": Compute(workers=workers), **parts})


def noise(folder, count, classes=3):
    """Noise of many sizes."""
    draw = np.random.default_rng(count)
    folder.mkdir(parents=True, exist_ok=True)
    files = tuple(folder / f"{i:03}.png" for i in range(count))
    for file in files:
        Image.fromarray(draw.integers(0, 256, (*draw.integers(10, 40, 2), 3), dtype=np.uint8)).save(file)
    return Split(files, tuple(i % classes for i in range(count)), tuple("abcdef"[:classes]))


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return noise(tmp_path_factory.mktemp("noise"), 29)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    assert write_digits(folder, seed=3) == {"train": 1293, "val": 144, "test": 360}
    return folder


def take(batches, count, step=0):
    stream = batches.from_step(step)
    found = list(islice(stream, count))
    stream.close()
    return found


def assert_same(found, expected):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        for name in ("pixels", "labels", "positions", "mask"):
            ours, theirs = getattr(one, name), getattr(other, name)
            assert (ours is None and theirs is None) or torch.equal(ours, theirs), name
        assert (one.step, one.faults) == (other.step, other.faults)


# -------------------------------------------------------------------------------------------------------------- digits


def test_digits_are_the_scans_split_once(root):
    """Every scan in one split only, its class as its folder's name; the pixels are scikit-learn's, enlarged."""
    scans = load_digits()
    found = {}
    for path in root.glob("*/*/*.png"):
        index = int(path.stem)
        assert index not in found
        found[index] = path.parts[-3]
        assert path.parts[-2] == str(scans.target[index])
    assert sorted(found) == list(range(1797))
    one = next(root.glob("test/*/*.png"))
    small = Image.fromarray((scans.images[int(one.stem)] * 255 / 16).round().astype(np.uint8))
    assert np.array_equal(np.asarray(Image.open(one)), np.asarray(small.resize((32, 32), Image.Resampling.BICUBIC)))
    counts = np.bincount([scans.target[index] for index, split in found.items() if split == "test"])
    assert counts.min() >= 34  # balanced: 360 over ten classes of nearly equal size
    assert counts.max() <= 38


def test_another_seed_splits_otherwise(root, tmp_path):
    write_digits(tmp_path, seed=4)
    names = [{path.name for path in folder.glob("test/*/*.png")} for folder in (root, tmp_path)]
    assert names[0] != names[1]


def test_without_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with raises_saying(ImportError, 'pip install "deit[quickstart]"'):
        write_digits(tmp_path)


# ---------------------------------------------------------------------------------------------------------- the stream


def unread(count):
    """A split whose order matters, and not its files."""
    return Split(tuple(map(str, range(count))), (0,) * count, ("a",))


def key_by_hand(place, images, repeats, seed):
    """One place of the stream, as the documentation says it."""
    cycle, within = divmod(place, images * repeats)
    order = np.random.Generator(np.random.Philox(key=[seed, 1], counter=[0, cycle, 0, 0])).permutation(images)
    return [place // images, order[within // repeats], place % repeats]


@pytest.mark.parametrize(
    ("images", "repeats", "batch"),
    [(29, 1, 8), (29, 3, 8), (3, 1, 8), (3, 3, 64), (1, 2, 5), (64, 3, 64), (300, 2, 1), (257, 3, 256)],
)
def test_every_image_is_seen_as_often(images, repeats, batch):
    """The keys are the formula's; in R epochs each image comes R times, as R different views, side by side."""
    split = unread(images)
    batches = TrainingBatches(split, recipe(batch, repeats, seed=9))
    assert batches.steps_per_epoch == images / batch
    cycles = 3
    steps = math.ceil(cycles * images * repeats / batch)
    keys = np.concatenate([batches.keys(step) for step in range(steps)])
    assert keys.dtype == np.int64
    assert keys.shape == (steps * batch, 3)
    assert keys.tolist() == [key_by_hand(place, images, repeats, 9) for place in range(steps * batch)]
    assert len(np.unique(keys, axis=0)) == len(keys)
    for cycle in range(cycles):
        part = keys[cycle * images * repeats : (cycle + 1) * images * repeats]
        assert np.bincount(part[:, 1]).tolist() == [repeats] * images
        assert (part[:, 1].reshape(-1, repeats) == part[::repeats, 1:2]).all()
        assert (part[:, 2].reshape(-1, repeats) == np.arange(repeats)).all()
    assert batches.keys(0).tolist() == keys[:batch].tolist()  # also after later ones


def test_every_cycle_and_every_seed_has_its_own_order():
    split = unread(500)
    orders = [
        TrainingBatches(split, recipe(500, seed=seed)).keys(step)[:, 1] for seed, step in ((0, 0), (0, 1), (1, 0))
    ]
    assert [sorted(order) for order in orders] == [list(range(500))] * 3
    assert all((one == other).mean() < 0.02 for one, other in ((orders[0], orders[1]), (orders[0], orders[2])))


def test_a_key_costs_little_for_many_images():
    """1.3 million images, 1024 a batch: a batch takes 0.1 ms, but for the first of each order."""
    batches = TrainingBatches(unread(1_300_000), recipe(1024, 3))
    batches.keys(0)
    times = []
    for step in range(1, 40):
        began = time.perf_counter()
        batches.keys(step)
        times.append(time.perf_counter() - began)
    assert sorted(times)[20] < 0.005


def levels_by_hand(split, given, key):
    """The 8-bit levels (height, width, channels) of one view before erasing, and its generator at that point."""
    rng = np.random.Generator(np.random.Philox(key=[given.seed, 0], counter=[0, *key]))
    file, size = split.files[key[1]], given.model.image_hw
    if given.augment.crop is None:
        [pixels] = processor_for(given)(
            [file], do_rescale=False, do_normalize=False, data_format="channels_last"
        ).pixel_values
        image = Image.fromarray(pixels.astype(np.uint8).squeeze()).convert("RGB")
    else:
        image = crop(file, size, given.augment.crop, rng)
    fill = tuple(round(255 * value) for value in given.data.mean)
    image = augment(image, given.augment, rng, fill * 3 if len(fill) == 1 else fill)
    image = image.convert("L") if given.model.num_channels == 1 else image
    return np.asarray(image).reshape(*size, -1), rng


def view_by_hand(split, given, key):
    """Pixels in 64 bits of one view before erasing, and its generator at that point."""
    levels, rng = levels_by_hand(split, given, key)
    return ((levels.astype(np.float64) / 255 - given.data.mean) / given.data.std).transpose(2, 0, 1), rng


GREY = {"model": MODEL.replace(num_channels=1), "mean": (0.3,), "std": (0.2,)}


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"augment": Augment(affine=Affine(rotate=20), flip=0.5)},
        {"augment": PAPER},
        {"augment": PAPER, **GREY},
        {"augment": Augment(crop=SimpleCrop(), jitter=Jitter(brightness=0.3))},
        GREY,
    ],
    ids=["evaluation", "affine", "paper", "paper_grey", "simple", "evaluation_grey"],
)
def test_any_batch_can_be_made_by_hand(split, parts):
    """From (seed, epoch, image, repeat) alone."""
    given = recipe(batch=5, repeats=2, **parts)
    found = take(TrainingBatches(split, given), 13)
    for step in (0, 12):
        assert found[step].step == step
        assert found[step].positions.tolist() == list(range(5))
        assert found[step].pixels.dtype == torch.float32
        for row in range(5):
            key = key_by_hand(step * 5 + row, 29, 2, 5)
            pixels, rng = view_by_hand(split, given, key)
            expected = pixels.astype(np.float32)
            if given.augment.erase:
                erase(expected, given.augment.erase, rng)
            np.testing.assert_allclose(found[step].pixels[row], expected, atol=2e-6, rtol=0)
            assert found[step].labels[row] == split.labels[key[1]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "parts",
    [
        {"augment": replace(PAPER, mix=Mix(mixup=0.8, cutmix=1.0, mode="element"))},
        {"augment": replace(PAPER, mix=Mix(mixup=0.8)), **GREY},
        {"augment": PAPER, "objective": Supervised(cosub=True), "model": MODEL.replace(drop_path_rate=0.1)},
        {"augment": Augment(crop=ResizedCrop()), "objective": MaskedImage(ratio=0.5, unit=8)},
        {},
        GREY,
    ],
    ids=["mixed", "mixed_grey", "cosub", "masked", "evaluation", "evaluation_grey"],
)
def test_pixels_are_those_of_float32_arithmetic_to_the_bit(split, parts, workers):
    """One product and one sum of each level, and the noise; however the batch is divided, and after it has moved."""
    given = recipe(batch=7, workers=workers, **parts)
    mean, std = np.array(given.data.mean), np.array(given.data.std)
    scale, shift = (1 / 255 / std).astype(np.float32), (-mean / std).astype(np.float32)
    batches = TrainingBatches(split, given)
    erasings = 0
    for batch in take(batches, 3, step=1):
        expected = []
        for row in range(7):
            levels, rng = levels_by_hand(split, given, key_by_hand(batch.step * 7 + row, 29, 1, 5))
            image = levels.transpose(2, 0, 1).astype(np.float32) * scale[:, None, None] + shift[:, None, None]
            if given.augment.erase:
                plain = image.copy()
                erase(image, given.augment.erase, rng)
                erasings += not np.array_equal(plain, image)
            expected.append(torch.from_numpy(image))
        expected = torch.stack(expected)
        assert batch.images.values.dtype == torch.uint8
        assert torch.equal(batch.pixels, expected)
        finished = batch.finished()
        assert torch.equal(finished.images, expected)
        assert finished.pixels is finished.images
        assert torch.equal(batch.to("cpu").pixels, expected)
        for part in (batch, *batch.parts(2), *batch.parts(3), *batch.parts(2)[1].parts(2)):
            rows = part.positions
            assert torch.equal(part.pixels, expected[rows])
            whole = replace(part, images=expected[rows])
            assert torch.equal(batches.mix(part).pixels, batches.mix(whole).pixels)
            assert torch.equal(batches.mix(part).labels, batches.mix(whole).labels)
    assert (erasings > 7) == (given.augment.erase is not None)


def test_training_and_evaluation_see_the_same_part_of_a_photo(tmp_path):
    """Without augmentation a training view is what evaluation sees: same resize, same crop, same normalisation."""
    file = tmp_path / "0.png"
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((140, 90), Image.Resampling.BICUBIC).save(file)
    for parts in ({}, GREY):
        given = recipe(batch=1, **parts)
        given = replace(given, data=replace(given.data, crop_ratio=0.8))
        [batch] = take(TrainingBatches(Split((file,), (0,), ("a",)), given), 1)
        expected = DeiTImageProcessor.paper((16, 12), crop_ratio=0.8)(
            file, image_mean=given.data.mean, image_std=given.data.std, return_tensors="pt"
        ).pixel_values
        torch.testing.assert_close(batch.pixels, expected, atol=1e-6, rtol=0)


def test_large_photos_are_decoded_at_the_scale_of_the_crop(tmp_path, monkeypatch):
    """A view is a function of file and draw: large JPEGs are always decoded for the crop, small images always whole,
    whatever is kept."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)).resize((700, 900))
    photo.save(tmp_path / "large.jpg")
    photo.crop((0, 0, 300, 300)).save(tmp_path / "small.jpg")
    pair = Split((tmp_path / "large.jpg", tmp_path / "small.jpg"), (0, 1), ("a", "b"))
    given = recipe(batch=2, augment=Augment(crop=ResizedCrop(scale=(0.8, 1.0))))
    found = take(TrainingBatches(pair, given), 4)
    differing = []
    for batch in found:
        for row in range(2):
            key = key_by_hand(2 * batch.step + row, 2, 1, 5)
            assert_close(batch.pixels[row], view_by_hand(pair, given, key)[0].astype(np.float32), 2e-6)
            whole = crop(load_image(pair.files[key[1]]), (16, 12), given.augment.crop, draws(5, *key))
            levels = batch.images.values[row].numpy().astype(int)
            differing.append((key[1], np.abs(np.asarray(whole, int).transpose(2, 0, 1) - levels).mean()))
    assert all(0.1 < difference < 1 for index, difference in differing if index == 0)  # scaled decoding changes views
    assert all(difference < 0.1 for index, difference in differing if index == 1)
    monkeypatch.setattr(data, "CACHE_BYTES", 0)
    assert_same(take(TrainingBatches(pair, given), 4), found)


@pytest.mark.parametrize("parts", [{}, {"augment": PAPER}], ids=["evaluation", "crop"])
def test_batches_do_not_depend_on_the_cache(split, monkeypatch, parts):
    opened = []
    given, expected = recipe(**parts), None
    for room in (2**30, 8000, 0):
        monkeypatch.setattr(data, "CACHE_BYTES", room)
        batches = TrainingBatches(split, given)
        found = take(batches, 8)
        expected = expected or found
        assert_same(found, expected)
        with monkeypatch.context() as patch:  # what is kept is not read again
            patch.setattr("deit.image.decode._read_bytes", lambda path, name: opened.append(name) or path.read_bytes())
            assert_same(take(batches, 8), expected)
        opened.append(None)
    counts = "".join("." if name is None else "x" for name in opened).split(".")
    assert [len(count) for count in (counts[0], counts[2])] == [0, 63]  # of 64 views, two of an image are neighbours
    assert 0 < len(counts[1]) < 63


def test_batches_do_not_depend_on_the_number_of_workers(split):
    given = recipe(batch=7, repeats=2, augment=replace(PAPER, mix=Mix(mixup=0.8, cutmix=1.0)))
    found = [
        take(TrainingBatches(split, replace(given, compute=Compute(workers=workers))), 12, step=3)
        for workers in (0, 1, 2)
    ]
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])
    assert not torch.equal(found[0][0].pixels, found[0][1].pixels)


def test_going_on_from_any_update_is_the_tail_of_the_stream(split):
    given = recipe(batch=7, repeats=3, augment=PAPER)
    whole = take(TrainingBatches(split, given), 20)
    for step in (1, 4, 13, 19):
        assert_same(take(TrainingBatches(split, given), 20 - step, step), whole[step:])


def test_the_randomness_of_others_is_untouched_and_does_not_matter(split):
    given, found = recipe(augment=PAPER, workers=1), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        found.append(take(TrainingBatches(split, given), 3))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])
        assert random.getstate() == before[2]
    assert_same(found[0], found[1])


def test_a_cycle_comes_again(split):
    """Cached labels belong to views and mixing that come again after so many steps."""
    given = recipe(batch=8, augment=replace(PAPER, mix=Mix(mixup=0.8, cutmix=1.0)))
    endless, batches = TrainingBatches(split, given), TrainingBatches(split, given, cycle=3)
    found, first = take(batches, 7), take(endless, 3)
    assert [batch.step for batch in found] == list(range(7))
    for batch in found:
        same = first[batch.step % 3]
        assert torch.equal(batch.pixels, same.pixels)
        assert torch.equal(batch.labels, same.labels)
        assert torch.equal(batches.mix(batch).pixels, endless.mix(same).pixels)
        assert torch.equal(batches.mix(batch).labels, endless.mix(same).labels)


# -------------------------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize(("batch", "world"), [(8, 1), (8, 2), (8, 3), (7, 2), (7, 3), (7, 4), (9, 3), (1, 1)])
def test_processes_share_the_global_batch(split, batch, world):
    """Each place is in one share, with the view it has for one process; mirror images are together, before and after
    each share is divided again."""
    given = recipe(batch=batch, repeats=2, augment=replace(PAPER, mix=Mix(mixup=0.8, cutmix=1.0, mode="element")))
    whole = TrainingBatches(split, given)
    ranks = [TrainingBatches(split, given, rank=rank, world=world) for rank in range(world)]
    shares = zip(*(take(one, 4, step=2) for one in ranks), strict=True)
    for expected, parts in zip(take(whole, 4, step=2), shares, strict=True):
        assert sorted(torch.cat([part.positions for part in parts]).tolist()) == list(range(batch))
        sizes = [len(part) for part in parts]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 3  # a pair, and the middle of an odd batch
        mixed = whole.mix(expected)
        for rank, part in enumerate(parts):
            for one in (part, *part.parts(2), *part.parts(100)):
                assert (one.positions + one.positions.flip(0) == batch - 1).all()
                assert torch.equal(one.pixels, expected.pixels[one.positions])
                assert torch.equal(one.labels, expected.labels[one.positions])
                alone = ranks[rank].mix(one)
                assert_close(alone.pixels, mixed.pixels[one.positions], 1e-6)
                assert_close(alone.labels, mixed.labels[one.positions], 1e-6)


def test_mixing_is_drawn_for_the_update(split):
    given = recipe(batch=6, augment=Augment(mix=Mix(mixup=0.8, cutmix=1.0, mode="element")))
    batches = TrainingBatches(split, given)
    for batch in take(batches, 3):
        found = batches.mix(batch)
        drawn = mixing(given.augment.mix, 6, (16, 12), draws(5, batch.step, 0, 0, 2))
        pixels, labels = mix(batch.pixels, batch.labels, 3, drawn)
        assert torch.equal(found.pixels, pixels)
        assert torch.equal(found.labels, labels)
        assert not torch.equal(found.pixels, batch.pixels)
    plain = TrainingBatches(split, recipe())
    [batch] = take(plain, 1)
    assert plain.mix(batch) is batch


def test_too_few_pairs_for_the_processes(split):
    for batch, world in ((2, 3), (3, 3), (4, 3)):
        with raises_saying(ValueError, f"a batch of {batch}", f"{world} processes", "data.batch"):
            TrainingBatches(split, recipe(batch=batch), rank=0, world=world)
    assert len(take(TrainingBatches(split, recipe(batch=5), rank=2, world=3), 1)[0]) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_parts_of_a_batch(size, count):
    batch = Batch(torch.randn(size, 3, 2, 2), torch.arange(size), 4, torch.arange(size), torch.rand(size, 5) > 0.5)
    parts = batch.parts(count)
    pairs = (size + 1) // 2
    assert len(parts) == min(count, pairs)
    assert min(map(len, parts)) >= 1
    assert max(map(len, parts)) <= 2 * math.ceil(pairs / len(parts))
    assert sorted(torch.cat([part.labels for part in parts]).tolist()) == list(range(size))
    for part in parts:
        assert part.step == 4
        assert (part.labels + part.labels.flip(0) == size - 1).all()
        assert torch.equal(part.labels, part.positions)
        for name in ("pixels", "mask"):
            assert torch.equal(getattr(part, name), getattr(batch, name)[part.labels])


def test_a_single_part_is_the_batch_itself():
    """Pinned memory would not stay pinned in a copy, and a copy of the pixels takes long."""
    batch = Batch(torch.randn(8, 3, 2, 2), torch.arange(8), 4, torch.arange(8))
    for count, size in ((1, 8), (1, 1), (5, 2)):
        part_of = replace(batch, images=batch.pixels[:size], labels=batch.labels[:size])
        [part] = part_of.parts(count)
        assert part.pixels.data_ptr() == batch.pixels.data_ptr()
        assert part is part_of


def test_a_batch_moves_with_all_but_its_positions():
    mask = torch.ones(2, 4, dtype=torch.bool)
    batch = Batch(torch.zeros(2, 1), torch.zeros(2), 3, torch.arange(2), mask, (("f", "r"),))
    moved = batch.to(torch.device("meta"))
    assert [moved.pixels.device.type, moved.labels.device.type, moved.mask.device.type] == ["meta"] * 3
    assert moved.positions.device.type == "cpu"
    assert (moved.step, moved.faults) == (3, (("f", "r"),))
    assert batch.to("cpu").mask.all()


def test_masks_are_drawn_for_each_view(split):
    given = recipe(batch=4, repeats=2, objective=MaskedImage(ratio=0.5, unit=8), augment=Augment(crop=ResizedCrop()))
    masks = set()
    for batch in take(TrainingBatches(split, given), 3):
        for row in range(4):
            key = key_by_hand(batch.step * 4 + row, 29, 2, 5)
            expected = patch_mask((4, 3), (2, 2), 0.5, draws(5, *key, stream=3))
            assert batch.mask[row].tolist() == expected.tolist()
            masks.add(expected.tobytes())
    assert len(masks) > 2
    assert take(TrainingBatches(split, recipe()), 1)[0].mask is None


# ---------------------------------------------------------------------------------------------------- loader processes


@pytest.fixture
def another_loader(monkeypatch):
    """Uses a `DataLoader` as if it were the first one of the program. It leaves PyTorch's handler for the end of a
    child process."""
    before = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)

    def use():
        assert list(torch.utils.data.DataLoader(range(2), num_workers=1)) == [0, 1]
        assert signal.getsignal(signal.SIGCHLD) is not before

    yield use
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("killed", [1, 2])
def test_a_dead_worker_is_told(split, killed, other, another_loader):
    """In `next` and nowhere else: the loop may be saving when it dies."""
    if other:
        another_loader()
    batches = TrainingBatches(split, recipe(workers=2))
    stream = batches.from_step(0)
    next(stream)
    for child in multiprocessing.active_children()[:killed]:
        os.kill(child.pid, signal.SIGKILL)
    time.sleep(0.2)
    with raises_saying(LoaderDied, "a loader process died", "memory", "compute.workers below 2"):
        list(islice(stream, 10))
    assert multiprocessing.active_children() == []


def test_closing_raises_nothing_if_there_was_another_loader(split, another_loader, monkeypatch):
    unraised = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: unraised.append(told.exc_value))
    another_loader()
    for _ in range(10):
        stream = TrainingBatches(split, recipe(workers=2)).from_step(0)
        next(stream)
        stream.close()
        time.sleep(0.01)
    assert unraised == []
    assert multiprocessing.active_children() == []


def test_a_loader_that_is_killed_with_a_lock_does_not_stop_the_end(split, monkeypatch):
    """A loader process looks at this event again and again, and may be killed while it does."""
    events = []
    monkeypatch.setattr(loading, "_unwatch", lambda batches: events.append(batches._workers_done_event))
    stream = TrainingBatches(split, recipe(workers=1)).from_step(0)
    next(stream)
    assert events[0]._cond.acquire(timeout=10)
    closing = threading.Thread(target=stream.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()
    assert multiprocessing.active_children() == []


def test_another_loader_is_watched_as_ever(split, another_loader):
    """After ours and beside it."""
    before = signal.getsignal(signal.SIGCHLD)
    take(TrainingBatches(split, recipe(workers=1)), 1)
    assert signal.getsignal(signal.SIGCHLD) is before
    another_loader()
    stream = TrainingBatches(split, recipe(workers=1)).from_step(0)
    next(stream)
    ours = multiprocessing.active_children()
    theirs = iter(torch.utils.data.DataLoader(range(100), num_workers=1))
    [child] = set(multiprocessing.active_children()) - set(ours)
    threading.Timer(0.2, os.kill, (child.pid, signal.SIGKILL)).start()
    with pytest.raises(RuntimeError, match=f"pid {child.pid}. is killed by signal"):
        time.sleep(30)  # the signal ends it
    stream.close()
    del theirs
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), LoaderDied),
        (EOFError(), LoaderDied),
        (ConnectionResetError("Caught ConnectionResetError in DataLoader worker process 0."), ConnectionResetError),
    ],
)
def test_a_worker_that_dies_while_it_hands_over_memory_is_told(split, error, raised, monkeypatch):
    batches = TrainingBatches(split, recipe(workers=1))
    stream = batches.from_step(0)
    next(stream)

    def broken(self):
        raise error

    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "__next__", broken)
    with pytest.raises(raised):
        next(stream)


def test_ctrl_c_is_left_to_the_parent_and_closing_ends_the_workers(split):
    batches = TrainingBatches(split, recipe(workers=2))
    stream = batches.from_step(0)
    found = [next(stream)]
    children = multiprocessing.active_children()
    assert len(children) == 2
    for child in children:
        os.kill(child.pid, signal.SIGINT)
    found += list(islice(stream, 9))
    assert_same(found, take(TrainingBatches(split, recipe()), 10))
    began = time.perf_counter()
    stream.close()
    assert time.perf_counter() - began < 3
    assert multiprocessing.active_children() == []


def test_a_parent_that_breaks_off_leaves_no_traceback():
    """A signal may reach the parent while it fetches a batch's memory from a thread of the loader process."""
    loader = """
import multiprocessing, os, time
from multiprocessing.connection import Client
from multiprocessing.resource_sharer import DupFd
from deit.data import loading
loading._begin_worker(0)
address, key = DupFd(os.dup(1))._id
for authkey in (multiprocessing.current_process().authkey, None):
    Client(address, authkey=authkey).close()
    time.sleep(0.2)
"""
    ended = subprocess.run([sys.executable, "-c", loader], check=False, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_number_of_workers(split, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))

    def chosen(workers=None, device="cpu", **parts):
        return TrainingBatches(split, recipe(workers=workers, **parts), device=torch.device(device)).workers

    assert [chosen(0), chosen(3), chosen(), chosen(augment=PAPER)] == [0, 3, 0, 0]  # all fit into memory
    assert [chosen(device="cuda"), chosen(0, device="cuda")] == [11, 0]  # a GPU would wait for a single process
    with monkeypatch.context() as patch:
        patch.setattr(data, "CACHE_BYTES", 1000)
        assert [chosen(), chosen(0), chosen(augment=PAPER)] == [8, 0, 8]
        assert [chosen(device="cuda:1"), chosen(3, device="cuda")] == [11, 3]  # all cores but one
        patch.setenv("LOCAL_WORLD_SIZE", "3")
        assert [chosen(), chosen(device="cuda")] == [4, 3]
        patch.setenv("LOCAL_WORLD_SIZE", "12")
        assert [chosen(), chosen(device="cuda")] == [1, 1]
        patch.setenv("LOCAL_WORLD_SIZE", "16")
        assert [chosen(), chosen(device="cuda")] == [1, 1]
        many = EvaluationBatches(split, processor_for(recipe()), 4, workers=None, device=torch.device("cuda"))
        assert many.workers == 1
    once = EvaluationBatches(split, processor_for(recipe()), 4, workers=None, device=torch.device("cuda"))
    assert once.workers == 0  # they are kept after the first time


def test_advice_for_a_run_that_waits(split, monkeypatch):
    """More loaders as long as there are cores, and the extra if it is missing; nothing if images are kept."""
    monkeypatch.setattr(loading, "cores", lambda: 4)
    for fast, workers, expected in (
        (True, 2, "set compute.workers above 2 (this process has 4 cores)"),
        (
            False,
            2,
            'compute.workers above 2 (this process has 4 cores) or decode JPEG files faster with pip install "de',
        ),
        (False, 4, 'decode JPEG files faster with pip install "deit[fast]"'),
        (True, 4, "store the images smaller, or train where there are more cores"),
        (False, None, ""),
    ):
        monkeypatch.setattr("deit.image.jpeg.is_fast", lambda fast=fast: fast)
        found = TrainingBatches(split, recipe(workers=workers)).advice()
        assert expected in found
        assert bool(expected) == bool(found)
    for on, expected in (("loader", "set augment.on=device, so that the GPU augments"), ("device", "decode JPEG")):
        given = recipe(workers=4)
        given = replace(given, augment=replace(given.augment, on=on))
        assert TrainingBatches(split, given, device=torch.device("cuda")).advice().startswith(expected)


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_memory_is_pinned_for_the_gpu_of_the_run(split, monkeypatch, device, kind):
    """A GPU that the run doesn't use is left alone: memory is pinned in the context of the present GPU."""
    present, pinned = [0], []

    @contextmanager
    def made_present(device):
        present.append(device.index)
        try:
            yield
        finally:
            present.pop()

    class Pinning(torch.utils.data.DataLoader):
        def __init__(self, *arguments, pin_memory, **options):
            self.pins = pin_memory
            super().__init__(*arguments, **options)

        def __iter__(self):
            for batch in super().__iter__():
                pinned.append((self.pins, present[-1]))
                yield batch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", made_present)
    monkeypatch.setattr(loading, "DataLoader", Pinning)
    if kind == "training":
        take(TrainingBatches(split, recipe(), device=torch.device(device)), 2)
    else:
        list(EvaluationBatches(split, processor_for(recipe()), 15, device=torch.device(device)))
    assert pinned == [(False, 0) if device == "cpu" else (True, 1)] * 2
    assert present == [0]


# --------------------------------------------------------------------------------------------------- unreadable images


def test_another_image_stands_in(tmp_path):
    """Drawn from the view's own counters, with its own label; what is not readable either is passed over."""
    many = noise(tmp_path, 12)
    for i in range(8):
        many.files[i].write_bytes(b"no image")
    given = recipe(batch=12, repeats=2, augment=PAPER)
    found = [take(TrainingBatches(many, replace(given, compute=Compute(workers=workers))), 2) for workers in (0, 1)]
    assert_same(found[1], found[0])
    for batch in found[0]:
        told = []
        for row in range(12):
            epoch, index, repeat = key_by_hand(batch.step * 12 + row, 12, 2, 5)
            others = draws(5, epoch, index, repeat, 5)
            shown = index
            while shown < 8:
                told.append(str(many.files[shown]))
                shown = int(others.integers(12))
            rng = draws(5, epoch, index, repeat)
            image = augment(crop(load_image(many.files[shown]), (16, 12), PAPER.crop, rng), PAPER, rng, (102, 128, 153))
            pixels = ((np.asarray(image, np.float64) / 255 - given.data.mean) / given.data.std).astype(np.float32)
            pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1))
            erase(pixels, PAPER.erase, rng)
            assert_close(batch.pixels[row], pixels, 2e-6)
            assert batch.labels[row] == many.labels[shown]
        assert [file for file, _ in batch.faults] == told
        assert len(told) > 8
        assert all("not an image" in reason for _, reason in batch.faults)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_image_to_stand_in(tmp_path, workers):
    many = noise(tmp_path, 3)
    for file in many.files:
        file.write_bytes(b"")
    with raises_saying(BadImages, "100", ".png", "empty"):
        take(TrainingBatches(many, recipe(workers=workers)), 1)


def test_more_than_one_in_a_hundred_is_too_many():
    faults = Faults(300)
    assert faults.add([("a", "torn"), ("b", "empty"), ("a", "torn")]) == [("a", "torn"), ("b", "empty")]
    assert faults.add([("a", "torn"), ("c", "gone")]) == [("c", "gone")]
    assert len(faults) == 3
    later = Faults(300)
    later.load_state(faults.state())
    assert later.add([("b", "empty")]) == []
    for one in (faults, later):
        with raises_saying(BadImages, "4 of 300 images", "more than 1", "a", "torn", "eplace or remove"):
            one.add([("d", "torn")])
    with raises_saying(BadImages, "1 of 99 images"):
        Faults(99).add([("a", "torn")])
    empty = Faults(10)
    empty.load_state(None)
    assert empty.add([]) == []
    assert len(empty) == 0


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_sees_every_image_once_through_the_processor(root, monkeypatch):
    split = read_split(root, "test")
    processor = processor_for(digits())
    source = EvaluationBatches(split, processor, 100)
    batches = list(source)
    assert [len(batch.labels) for batch in batches] == [100, 100, 100, 60]
    assert len(source) == 4
    assert tuple(torch.cat([batch.labels for batch in batches]).tolist()) == split.labels
    expected = processor(list(split.files), return_tensors="pt").pixel_values
    assert torch.equal(torch.cat([batch.pixels for batch in batches]), expected)
    again = list(source)
    assert all(one is other for one, other in zip(batches, again, strict=True))
    monkeypatch.setattr(data, "CACHE_BYTES", 360 * 3 * 32 * 32 - 1)
    large = EvaluationBatches(split, processor, 100, workers=1)
    for _ in range(2):
        assert all(torch.equal(one.pixels, other.pixels) for one, other in zip(large, batches, strict=True))
    assert not large.kept


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux")
def test_kept_images_leave_shared_memory(split):
    """It is small in containers, and each tensor there keeps a file open."""
    processor = processor_for(recipe())
    expected = list(EvaluationBatches(split, processor, 2))
    source = EvaluationBatches(split, processor, 2, workers=1)

    def shared():
        names = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        return {name for name in names if "/torch_" in name}

    before = shared()  # what other tests left
    first = list(source)
    assert [*map(len, first)] == [*map(len, expected)]
    assert shared() <= before
    for batches in (first, list(source)):
        for one, other in zip(batches, expected, strict=True):
            assert torch.equal(one.pixels, other.pixels)
            assert torch.equal(one.labels, other.labels)


@pytest.mark.parametrize(("world", "batch"), [(1, 10), (2, 10), (3, 5), (3, 29), (4, 1), (29, 4), (30, 4)])
def test_processes_share_an_evaluation(split, world, batch):
    """Each image once over all, the same number of batches for each; what fills up is zero and labelled -1."""
    processor = processor_for(recipe())
    expected = processor(list(split.files), return_tensors="pt").pixel_values
    numbered = replace(split, labels=tuple(range(29)), classes=tuple(map(str, range(29))))
    seen, lengths = [], set()
    for rank in range(world):
        source = EvaluationBatches(
            numbered, processor, batch, rank=rank, world=world, masks=lambda index: np.arange(12) < index
        )
        batches = list(source)
        lengths.add(len(batches))
        assert len(source) == len(batches)
        assert all(1 <= len(one) <= batch for one in batches)
        for one in batches:
            for pixels, label, mask in zip(one.pixels, one.labels.tolist(), one.mask, strict=True):
                assert torch.equal(pixels, expected[label] if label >= 0 else torch.zeros(3, 16, 12))
                assert label < 0 or mask.sum() == min(label, 12)
                seen.append(label)
    assert lengths == {math.ceil(math.ceil(29 / world) / batch)}
    assert sorted(label for label in seen if label >= 0) == list(range(29))


def test_unreadable_images_do_not_count_in_an_evaluation(tmp_path):
    many = noise(tmp_path, 5)
    many.files[3].write_bytes(b"")
    processor = processor_for(recipe())
    first, second = EvaluationBatches(many, processor, 3)
    assert first.labels.tolist() == [0, 1, 2]
    assert second.labels.tolist() == [-1, 1]
    assert second.pixels[0].abs().max() == 0
    assert torch.equal(second.pixels[1], processor(many.files[4], return_tensors="pt").pixel_values[0])
    [(file, reason)] = second.faults
    assert file == str(many.files[3])
    assert "empty" in reason
    assert first.faults == ()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_an_evaluation_of_images_of_more_than_8_bits(tmp_path, layout, workers):
    """A processor that neither resizes nor converts keeps their values, beside those of 8 bits and unreadable files."""
    draw = np.random.default_rng(0)
    arrays = [
        draw.integers(0, 256, (8, 8, 3), dtype=np.uint8),
        draw.integers(0, 65536, (8, 8), dtype=np.uint16),
        None,
        draw.integers(0, 256, (8, 8), dtype=np.uint8),
        draw.normal(size=(8, 8)).astype(np.float32),
    ]
    files = tuple(tmp_path / f"{i}.tif" for i in range(5))
    for file, array in zip(files, arrays, strict=True):
        file.write_bytes(b"") if array is None else Image.fromarray(array).save(file)
    options = {"do_resize": False, "do_center_crop": False, "do_convert_rgb": False, "data_format": layout}
    processor = DeiTImageProcessor(**options, image_mean=0.4, image_std=0.2)
    source = EvaluationBatches(Split(files, (0, 1, 2, 3, 4), tuple("abcde")), processor, 3, workers=workers)
    found = torch.cat([batch.pixels for batch in source])
    for pixels, file, array in zip(found, files, arrays, strict=True):
        expected = torch.zeros(3, 8, 8)
        if array is not None:
            values = (array.reshape(8, 8, -1) / 255 - 0.4) / 0.2
            expected = torch.from_numpy(values.transpose(2, 0, 1)).float().expand(3, 8, 8)
            exact = processor([file], return_tensors="pt").pixel_values[0]
            assert torch.equal(pixels, exact.expand_as(pixels))
        assert_close(pixels if layout == "channels_first" else pixels.permute(2, 0, 1), expected, 2e-4)


def test_an_evaluation_of_grey_images_without_any(tmp_path):
    many = noise(tmp_path, 1)
    many.files[0].write_bytes(b"")
    [batch] = EvaluationBatches(many, processor_for(recipe(**GREY)), 3)
    assert torch.equal(batch.pixels, torch.zeros(1, 1, 16, 12))
