"""Folders, batches and their independence of everything but (seed, epoch, image)."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import raises_saying
from PIL import Image
from sklearn.datasets import load_digits

from deit import data
from deit.augment import augment, draws
from deit.data import EvaluationBatches, TrainingBatches, normalise, processor_for, read_split, write_digits
from deit.image import DeiTImageProcessor
from deit.recipe import Data
from deit.recipes.digits import digits


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


def folder_of(root, split="train", classes=("b", "a"), count=3):
    for i, name in enumerate(classes):
        (root / split / name).mkdir(parents=True)
        for j in range(count):
            Image.new("RGB", (8, 8), (i, j, 0)).save(root / split / name / f"{j}.png")
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
    with raises_saying(ValueError, "6 training images do not fill a batch of 64", "data.batch"):
        TrainingBatches(read_split(tmp_path / "more", "train"), digits())


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_augmented_views_in_a_counted_order(root, workers):
    """Any batch can be made by hand from (seed, epoch, image), whatever the number of loader processes."""
    split = read_split(root, "train")
    recipe = replace(digits(), seed=5)
    batches = TrainingBatches(split, replace(recipe, data=replace(recipe.data, workers=workers)))
    found = list(batches.epoch(7))
    assert len(found) == batches.steps_per_epoch == 1293 // 64
    order = batches.order(7)
    for j in (0, 13):
        for i in (0, 63):
            index = order[j * 64 + i]
            view = augment(Image.open(split.files[index]).convert("RGB"), recipe.augment, draws(5, 7, int(index)))
            pixels = (np.asarray(view, np.float64) / 255 - 0.5) / 0.5
            np.testing.assert_allclose(found[j].pixels[i], pixels.transpose(2, 0, 1), atol=1e-6)
            assert found[j].labels[i] == split.labels[index]


def test_batches_do_not_depend_on_the_cache(root, monkeypatch):
    split = read_split(root, "test")
    kept = TrainingBatches(split, digits())
    cached = list(kept.epoch(0))
    assert len(kept.views.decoded) == 320
    monkeypatch.setattr(data, "CACHE_BYTES", len(split) * 32 * 32 * 3 - 1)
    batches = TrainingBatches(split, digits())
    for ours, theirs in zip(batches.epoch(0), cached, strict=True):
        assert torch.equal(ours.pixels, theirs.pixels)
    assert not batches.views.decoded


def test_every_epoch_has_its_own_order(root):
    batches = TrainingBatches(read_split(root, "train"), digits())
    first, second = batches.order(0), batches.order(1)
    assert sorted(first) == sorted(second) == list(range(1293))
    assert (first == second).mean() < 0.01
    other = TrainingBatches(read_split(root, "train"), replace(digits(), seed=1))
    assert (other.order(0) == first).mean() < 0.01


def test_normalisation_is_the_formula():
    recipe = Data(batch=1, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    pixels = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    expected = (pixels.double() / 255 - torch.tensor(recipe.mean).double().view(3, 1, 1)) / torch.tensor(
        recipe.std).double().view(3, 1, 1)
    torch.testing.assert_close(normalise(pixels, recipe).double(), expected, atol=1e-6, rtol=0)


def test_evaluation_sees_every_image_once_through_the_processor(root, monkeypatch):
    split = read_split(root, "test")
    processor = processor_for(digits())
    source = EvaluationBatches(split, processor, 100)
    batches = list(source)
    assert [len(batch.labels) for batch in batches] == [100, 100, 100, 60]
    assert tuple(torch.cat([batch.labels for batch in batches]).tolist()) == split.labels
    last = processor(split.files[-1], return_tensors="pt").pixel_values[0]
    assert torch.equal(batches[-1].pixels[-1], last)
    again = list(source)
    assert all(one is other for one, other in zip(batches, again, strict=True))
    monkeypatch.setattr(data, "CACHE_BYTES", 360 * 3 * 32 * 32 * 4 - 1)
    large = EvaluationBatches(split, processor, 100)
    for _ in range(2):
        assert all(torch.equal(one.pixels, other.pixels) for one, other in zip(large, batches, strict=True))
    assert not large.kept


def test_training_and_evaluation_see_the_same_part_of_a_photo(tmp_path):
    """Without augmentation a training view is what evaluation sees: same resize, same crop."""
    (tmp_path / "train" / "a").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((140, 90), Image.Resampling.BICUBIC).save(tmp_path / "train" / "a" / "0.png")
    recipe = digits()
    recipe = replace(recipe, data=replace(recipe.data, batch=1, crop_ratio=0.8), augment=replace(recipe.augment,
                                                                                                 affine=None))
    split = read_split(tmp_path, "train")
    [batch] = TrainingBatches(split, recipe).epoch(0)
    expected = DeiTImageProcessor.paper(32, crop_ratio=0.8)(split.files, image_mean=0.5, image_std=0.5,
                                                            return_tensors="pt").pixel_values
    torch.testing.assert_close(batch.pixels, expected, atol=1e-6, rtol=0)
