"""Folders, the stream of views, and its independence of everything but the position in it."""

import math
import os
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import raises_saying, small
from PIL import Image
from sklearn.datasets import load_digits

from deit import data
from deit.augment import augment, crop, draws, erase
from deit.data import (
    BadImages,
    Batch,
    EvaluationBatches,
    Faults,
    LoaderDied,
    Split,
    TrainingBatches,
    fingerprint,
    normalise,
    processor_for,
    read_data,
    read_split,
    write_digits,
)
from deit.image import DeiTImageProcessor
from deit.mixing import mix, mixing
from deit.recipe import (
    AdamW,
    Augment,
    Compute,
    Cosine,
    Data,
    Erase,
    MaskedImage,
    Mix,
    Recipe,
    ResizedCrop,
    Supervised,
    epochs,
)
from deit.recipes.digits import digits


def recipe_for(batch=8, *, repeats=1, seed=0, workers=0, augment=None, objective=None):
    return Recipe(name="x", model=small(distillation_token=False), data=Data(batch=batch, repeats=repeats), seed=seed,
                  objective=objective or Supervised(), optim=AdamW(lr=1e-3, per_images=8),
                  compute=Compute(workers=workers), schedule=Cosine(total=epochs(1)),
                  augment=augment or Augment(crop=ResizedCrop()))


def pretended(count, classes=3):
    """A split of files that are not there: enough for keys."""
    return Split(tuple(f"{i}.png" for i in range(count)), tuple(i % classes for i in range(count)),
                 tuple("abcdefg"[:classes]))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    assert write_digits(folder, seed=3) == {"train": 1293, "val": 144, "test": 360}
    return folder


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


def folder_of(root, split="train", classes=("b", "a"), count=3, size=(8, 8)):
    for i, name in enumerate(classes):
        (root / split / name).mkdir(parents=True)
        for j in range(count):
            Image.effect_noise(size, 30 + 10 * i + j).convert("RGB").save(root / split / name / f"{j}.png")
    return root


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_reading_a_folder(tmp_path, name):
    folder_of(tmp_path, name)
    (tmp_path / name / "a" / "notes.txt").write_text("no image")
    (tmp_path / name / "a" / ".hidden.png").write_bytes(b"")
    (tmp_path / name / ".cache").mkdir()
    split = read_split(tmp_path, "val")
    assert split.classes == ("a", "b")
    assert split.labels == (0, 0, 0, 1, 1, 1)
    assert [path.parts[-2:] for path in split.files] == [(c, f"{i}.png") for c in "ab" for i in range(3)]
    assert read_split(tmp_path, "val", classes=["b", "x", "a"]).labels == (2, 2, 2, 0, 0, 0)


def test_refused_folders(tmp_path):
    with raises_saying(FileNotFoundError, tmp_path, "no folder train", "CLASS"):
        read_split(tmp_path, "train")
    (tmp_path / "train" / "a").mkdir(parents=True)
    with raises_saying(ValueError, tmp_path / "train", "has no images"):
        read_split(tmp_path, "train")
    folder_of(tmp_path / "more")
    with raises_saying(ValueError, "class 'b' that the model does not know", "it knows a, c"):
        read_split(tmp_path / "more", "train", classes=["a", "c"])


def test_a_share_of_every_class_is_held_out_where_there_is_no_val(tmp_path):
    folder_of(tmp_path, count=20)
    train, val = read_data(tmp_path, holdout=0.2, seed=1)
    assert train.classes == val.classes == ("a", "b")
    assert (Counter(train.labels), Counter(val.labels)) == (Counter({0: 16, 1: 16}), Counter({0: 4, 1: 4}))
    assert not set(train.files) & set(val.files)
    assert len(set(train.files) | set(val.files)) == 40
    assert read_data(tmp_path, holdout=0.2, seed=1)[1].files == val.files
    assert read_data(tmp_path, holdout=0.2, seed=2)[1].files != val.files
    folder_of(tmp_path, "validation", count=1)
    train, val = read_data(tmp_path, holdout=0.2, seed=1)
    assert (len(train), len(val)) == (40, 2)


def test_the_fingerprint_is_of_names_labels_sizes_and_contents(tmp_path):
    folder_of(tmp_path / "one")
    first = fingerprint(read_split(tmp_path / "one", "train"))
    shutil.copytree(tmp_path / "one", tmp_path / "elsewhere" / "deeper")
    assert fingerprint(read_split(tmp_path / "elsewhere" / "deeper", "train")) == first
    split = read_split(tmp_path / "one", "train")
    assert fingerprint(replace(split, classes=("a", "c"))) != first
    assert fingerprint(replace(split, labels=split.labels[::-1])) != first
    changed = split.files[2]
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1  # same size
    changed.write_bytes(content)
    assert fingerprint(split) != first
    changed.rename(changed.with_name("9.png"))
    assert fingerprint(read_split(tmp_path / "one", "train")) != fingerprint


# ---------------------------------------------------------------------------------------------------------- the stream


@pytest.mark.parametrize(("images", "repeats", "batch"), [(10, 1, 4), (3, 1, 8), (7, 3, 5), (256, 3, 16), (100, 2, 7),
                                                          (1, 4, 3), (300, 3, 300)])
def test_every_image_comes_as_often_as_any_other(images, repeats, batch):
    """In `repeats` epochs each image is seen `repeats` times, whatever the numbers, and no view is dropped. The
    original sampler rounds to 256 images and gives none below that (facebookresearch/deit samplers.py)."""
    stream = TrainingBatches(pretended(images), recipe_for(batch, repeats=repeats))
    updates = -(-3 * images * repeats // batch)
    keys = np.concatenate([stream.keys(step) for step in range(updates)])
    assert len(keys) == updates * batch
    assert len({tuple(key) for key in keys}) == len(keys)  # every view is another
    for cycle in range(3):
        part = keys[cycle * images * repeats:(cycle + 1) * images * repeats]
        assert Counter(part[:, 1]) == Counter(dict.fromkeys(range(images), repeats))
        assert (part[:, 2].reshape(images, repeats) == np.arange(repeats)).all()
        assert (part[:, 1].reshape(images, repeats) == part[::repeats, 1][:, None]).all()  # side by side
    assert (keys[:, 0] == np.arange(len(keys)) // images).all()


def test_the_order_is_drawn_by_seed_and_anew_for_each_pass():
    split = pretended(500)
    orders = [TrainingBatches(split, recipe_for(500, seed=seed)).keys(step)[:, 1] for seed, step in
              [(0, 0), (0, 1), (1, 0)]]
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert (orders[i] == orders[j]).mean() < 0.02
    assert np.array_equal(orders[0], draws(0, 0, 0, 0, 1).permutation(500))


def test_the_stream_in_a_cycle():
    split, recipe = pretended(10), recipe_for(4)
    free, turning = TrainingBatches(split, recipe), TrainingBatches(split, recipe, cycle=3)
    for step in range(9):
        assert np.array_equal(turning.keys(step), free.keys(step % 3))


@pytest.mark.parametrize(("batch", "world"), [(8, 1), (8, 2), (9, 2), (10, 3), (7, 3), (16, 5), (5, 3)])
def test_processes_share_a_batch_in_mirror_images(batch, world):
    shares = [TrainingBatches(pretended(20), recipe_for(batch), rank=rank, world=world).share for rank in range(world)]
    assert sorted(np.concatenate(shares)) == list(range(batch))
    for share in shares:
        mirrored = batch - 1 - share[::-1]
        assert np.array_equal(share, mirrored)
        assert abs(len(share) - batch / world) <= 2


def test_a_batch_too_small_to_share():
    with raises_saying(ValueError, "a batch of 4 images can't be shared by 3 processes", "raise data.batch"):
        TrainingBatches(pretended(9), recipe_for(4), world=3)


@pytest.mark.parametrize(("size", "count"), [(8, 1), (8, 2), (7, 2), (9, 4), (3, 8), (1, 2)])
def test_micro_batches_keep_mirror_images_together(size, count):
    batch = Batch(torch.arange(size).float().view(-1, 1, 1, 1), torch.arange(size), positions=torch.arange(size),
                  mask=torch.arange(size).view(-1, 1) > 2, faults=(("x", "y"),))
    parts = batch.parts(count)
    assert len(parts) == min(count, -(-size // 2))
    assert sorted(torch.cat([part.labels for part in parts]).tolist()) == list(range(size))
    for part in parts:
        assert torch.equal(part.positions, size - 1 - part.positions.flip(0))
        assert torch.equal(part.pixels.flatten().long(), part.labels)
        assert torch.equal(part.positions, part.labels)
        assert torch.equal(part.mask.squeeze(1), part.labels > 2)
    assert max(map(len, parts)) - min(map(len, parts)) <= 3


# ------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_augmented_views_of_the_keys(root, workers):
    """Any batch can be made by hand from (seed, epoch, image, repeat), whatever the number of loader processes."""
    split = read_split(root, "train")
    recipe = replace(digits("t"), seed=5, compute=Compute(workers=workers))
    batches = TrainingBatches(split, recipe)
    stream = batches.from_step(30)
    for step in (30, 31):
        batch, keys = next(stream), batches.keys(step)
        assert batch.step == step
        for i in (0, 63):
            epoch, index, repeat = map(int, keys[i])
            assert epoch == (step * 64 + i) // 1293
            image = Image.open(split.files[index]).convert("RGB")
            view = augment(image, recipe.augment, draws(5, epoch, index, repeat))
            pixels = (np.asarray(view, np.float64) / 255 - 0.5) / 0.5
            np.testing.assert_allclose(batch.pixels[i], pixels.transpose(2, 0, 1), atol=1e-6)
            assert batch.labels[i] == split.labels[index]
    stream.close()


def test_a_whole_view_by_hand(tmp_path):
    """Crop, flip, normalisation and erasing, in this order and from one generator; the mask from another."""
    split = read_split(folder_of(tmp_path, size=(40, 30)), "train")
    given = Augment(crop=ResizedCrop(), flip=0.5, erase=Erase(probability=1.0))
    recipe = recipe_for(6, augment=given)
    batches = TrainingBatches(split, recipe)
    batch = next(batches.from_step(0))
    for i, key in enumerate(batches.keys(0).tolist()):
        rng = draws(0, *key)
        view = augment(crop(split.files[key[1]], (16, 16), given.crop, rng), given, rng)
        pixels = normalise(np.asarray(view).transpose(2, 0, 1), recipe.data)
        erase(pixels, given.erase, rng)
        assert np.array_equal(batch.pixels[i], pixels)
    masked = replace(recipe, objective=MaskedImage(unit=8, ratio=0.5), augment=Augment(crop=ResizedCrop()))
    batches = TrainingBatches(split, masked)
    batch = next(batches.from_step(0))
    for i, key in enumerate(batches.keys(0).tolist()):
        hidden = np.zeros(4, bool)
        hidden[draws(0, *key, stream=3).permutation(4)[:2]] = True
        expected = hidden.reshape(2, 2).repeat(2, 0).repeat(2, 1).reshape(-1)
        assert np.array_equal(batch.mask[i], expected)


def test_the_stream_goes_on_from_any_update(root):
    batches = TrainingBatches(read_split(root, "val"), replace(digits("t"), compute=Compute(workers=0)))
    whole = [batch for batch, _ in zip(batches.from_step(0), range(5), strict=False)]
    for batch, expected in zip(batches.from_step(3), whole[3:], strict=False):
        assert batch.step == expected.step
        assert torch.equal(batch.pixels, expected.pixels)


@pytest.mark.parametrize("mode", ["batch", "pair", "element"])
def test_processes_together_make_the_batch_of_one_to_the_bit(tmp_path, mode):
    """Views, mixing and positions: three processes, each in two parts, against one."""
    split = read_split(folder_of(tmp_path, count=6), "train")
    recipe = recipe_for(15, augment=Augment(crop=ResizedCrop(), mix=Mix(mixup=0.8, cutmix=1.0, mode=mode)))
    one = TrainingBatches(split, recipe)
    for step in range(3):
        whole = one.mix(next(one.from_step(step)))
        for rank in range(3):
            stream = TrainingBatches(split, recipe, rank=rank, world=3)
            for part in next(stream.from_step(step)).parts(2):
                part = stream.mix(part)
                assert torch.equal(part.pixels, whole.pixels[part.positions])
                assert torch.equal(part.labels, whole.labels[part.positions])


def test_mixing_by_hand(tmp_path):
    split = read_split(folder_of(tmp_path, count=6), "train")
    recipe = recipe_for(8, augment=Augment(mix=Mix(mixup=0.8, cutmix=1.0)))
    batches = TrainingBatches(split, recipe, cycle=5)
    batch = next(batches.from_step(7))
    found = batches.mix(batch)
    pixels, labels = mix(batch.pixels, batch.labels, 2, mixing(recipe.augment.mix, 8, (16, 16), draws(0, 2, 0, 0, 2)))
    assert torch.equal(found.pixels, pixels)
    assert torch.equal(found.labels, labels)
    plain = TrainingBatches(split, recipe_for(8))
    assert plain.mix(batch) is batch


def test_batches_do_not_depend_on_what_is_kept_in_memory(root, tmp_path, monkeypatch):
    small_images, photo = read_split(root, "test"), read_split(folder_of(tmp_path, size=(600, 500)), "train")
    for split, recipe in [(small_images, digits("t")), (small_images, recipe_for(64)), (photo, recipe_for(4))]:
        batches = TrainingBatches(split, replace(recipe, compute=Compute(workers=0)))
        stream = batches.from_step(0)
        cached = [next(stream) for _ in range(4)]
        assert bool(batches.views.kept) == (split is small_images)
        with monkeypatch.context() as patch:
            patch.setattr(data, "CACHE_BYTES", 5 * 32 * 32 * 3)
            fresh = TrainingBatches(split, replace(recipe, compute=Compute(workers=0)))
            for ours, theirs in zip(fresh.from_step(0), cached, strict=False):
                assert torch.equal(ours.pixels, theirs.pixels)
            assert len(fresh.views.kept) <= 5


def test_loader_processes_where_images_do_not_fit_into_memory(root, monkeypatch):
    split, recipe = read_split(root, "train"), replace(digits("t"), compute=Compute())
    assert data.loaders(split, recipe) == 0
    assert data.loaders(split, replace(recipe, compute=Compute(workers=3))) == 3
    monkeypatch.setattr(data, "CACHE_BYTES", 2**20)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    assert data.loaders(split, recipe) == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert data.loaders(split, recipe) == 2


def test_a_dead_loader_is_reported(root):
    batches = TrainingBatches(read_split(root, "val"), replace(digits("t"), compute=Compute(workers=1)))
    stream = batches.from_step(0)
    next(stream)
    [worker] = torch.multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with raises_saying(LoaderDied, "a loader process died", "compute.workers below 1", "--resume"):
        for _ in range(50):
            next(stream)
            time.sleep(0.05)


def test_closing_the_stream_ends_the_loaders(root):
    batches = TrainingBatches(read_split(root, "val"), replace(digits("t"), compute=Compute(workers=2)))
    stream = batches.from_step(0)
    next(stream)
    workers = torch.multiprocessing.active_children()
    assert len(workers) == 2
    stream.close()
    assert not torch.multiprocessing.active_children()


def test_the_global_generator_is_left_alone(root):
    torch.manual_seed(1)
    expected = torch.rand(1)
    for workers in (0, 1):
        torch.manual_seed(1)
        recipe = replace(digits("t"), compute=Compute(workers=workers))
        stream = TrainingBatches(read_split(root, "val"), recipe).from_step(0)
        next(stream)
        stream.close()
        assert torch.equal(torch.rand(1), expected)


# -------------------------------------------------------------------------------------------------------------- faults


def test_another_image_stands_in_for_one_that_cannot_be_read(tmp_path):
    """The one that the view's own counters draw, with its label; whoever loads it."""
    split = read_split(folder_of(tmp_path, count=6), "train")
    bad = split.files[3]
    bad.write_bytes(bad.read_bytes()[:30])
    for workers in (0, 2):
        batches = TrainingBatches(split, recipe_for(12, workers=workers))
        batch = next(batches.from_step(0))
        [at] = np.flatnonzero(batches.keys(0)[:, 1] == 3)
        epoch, index, repeat = batches.keys(0)[at].tolist()
        other = int(draws(0, epoch, index, repeat, 5).integers(12))
        assert batch.labels[at] == split.labels[other]
        view = crop(split.files[other], (16, 16), ResizedCrop(), draws(0, epoch, index, repeat))
        assert np.array_equal(batch.pixels[at], normalise(np.asarray(view).transpose(2, 0, 1), Data(batch=1)))
        [(file, reason)] = batch.faults
        assert file == str(bad)
        assert f"{bad} is not an image" in reason


def test_nothing_readable(tmp_path):
    split = read_split(folder_of(tmp_path), "train")
    for file in split.files:
        file.write_text("no image")
    with raises_saying(BadImages, "no readable image was found in 100 tries", split.files[0].parent.parent):
        next(TrainingBatches(split, recipe_for(4)).from_step(0))


def test_faults_are_counted_once_and_bounded():
    faults = Faults(200)
    assert faults.add([("a", "x"), ("b", "y"), ("a", "x")]) == [("a", "x"), ("b", "y")]
    assert faults.add([("a", "x")]) == []
    assert len(faults) == 2
    again = Faults(200)
    again.load_state(faults.state())
    assert again.add([("b", "y")]) == []
    with raises_saying(BadImages, "3 of 200 images can't be read, more than 1%", "a, b, c (a: x)", "replace or remove"):
        again.add([("c", "z")])
    Faults(100).add([("a", "x")])
    with raises_saying(BadImages, "1 of 99 images"):
        Faults(99).add([("a", "x")])


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_normalisation_is_the_formula():
    recipe = Data(batch=1, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)
    expected = (pixels / 255 - np.reshape(recipe.mean, (3, 1, 1))) / np.reshape(recipe.std, (3, 1, 1))
    found = normalise(pixels, recipe)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_evaluation_sees_every_image_once_through_the_processor(root, monkeypatch):
    split = read_split(root, "test")
    processor = processor_for(digits("t"))
    source = EvaluationBatches(split, processor, 100)
    batches = list(source)
    assert [len(batch.labels) for batch in batches] == [100, 100, 100, 60]
    assert len(source) == 4
    assert tuple(torch.cat([batch.labels for batch in batches]).tolist()) == split.labels
    last = processor(split.files[-1], return_tensors="pt").pixel_values[0]
    assert torch.equal(batches[-1].pixels[-1], last)
    again = list(source)
    assert all(one is other for one, other in zip(batches, again, strict=True))
    monkeypatch.setattr(data, "CACHE_BYTES", 360 * 3 * 32 * 32 * 4 - 1)
    large = EvaluationBatches(split, processor, 100, workers=1)
    for _ in range(2):
        assert all(torch.equal(one.pixels, other.pixels) for one, other in zip(large, batches, strict=True))
    assert not large.kept


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_processes_evaluate_every_image_once(tmp_path, world):
    """None twice, none lost, and in the same number of batches; masks are those of the image."""
    split = read_split(folder_of(tmp_path, count=4), "train")
    masks = {i: np.arange(16) == i for i in range(8)}
    found = []
    for rank in range(world):
        batches = list(EvaluationBatches(split, processor_for(recipe_for()), 2, rank=rank, world=world,
                                         masks=masks.__getitem__))
        assert len(batches) == math.ceil(math.ceil(8 / world) / 2)
        for batch in batches:
            rows = zip(batch.labels, batch.mask, strict=True)
            found += [(int(label), int(mask.int().argmax())) for label, mask in rows if label >= 0]
    assert sorted(index for _, index in found) == list(range(8))
    assert all(label == split.labels[index] for label, index in found)


def test_an_unreadable_image_of_an_evaluation_does_not_count(tmp_path):
    split = read_split(folder_of(tmp_path), "train")
    split.files[1].write_bytes(b"")
    [batch] = EvaluationBatches(split, processor_for(recipe_for()), 10)
    assert batch.labels.tolist() == [0, -1, 0, 1, 1, 1]
    assert not batch.pixels[1].any()
    [(file, reason)] = batch.faults
    assert file == str(split.files[1])
    assert "empty" in reason


def test_training_and_evaluation_see_the_same_part_of_a_photo(tmp_path):
    """Without augmentation a training view is what evaluation sees: same resize, same crop."""
    (tmp_path / "train" / "a").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((140, 90), Image.Resampling.BICUBIC).save(tmp_path / "train" / "a" / "0.png")
    recipe = digits("t")
    recipe = replace(recipe, data=replace(recipe.data, batch=1, crop_ratio=0.8), augment=Augment())
    split = read_split(tmp_path, "train")
    batch = next(TrainingBatches(split, recipe).from_step(0))
    expected = DeiTImageProcessor.paper(32, crop_ratio=0.8)(split.files, image_mean=0.5, image_std=0.5,
                                                            return_tensors="pt").pixel_values
    torch.testing.assert_close(batch.pixels, expected, atol=1e-6, rtol=0)
