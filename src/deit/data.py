"""From folders to batches. B images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deit.augment import augment, draws
from deit.image import DeiTImageProcessor
from deit.recipe import Data, Recipe

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""Accepted folder names of each split."""
CACHE_BYTES = 2**30
"""A split's decoded images are kept in memory up to this size, in each process that loads them."""


@dataclass(frozen=True)
class Split:
    """Labelled image files; `labels[i]` is the index in `classes` of the class that `files[i]` shows."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True)
class Batch:
    pixels: Tensor
    """(B, channels, height, width), normalised."""
    labels: Tensor
    """(B,), class indices."""

    def to(self, device: torch.device) -> Batch:
        return Batch(self.pixels.to(device, non_blocking=True), self.labels.to(device, non_blocking=True))


def read_split(root: str | Path, split: str, classes: Sequence[str] | None = None) -> Split:
    """The image files of `root/SPLIT/CLASS/*`, classes in the order of their names.

    `classes` fixes the order (that of a trained model); a folder of another name is refused. Raises
    `FileNotFoundError` or `ValueError` with what the folder should look like.
    """
    root = Path(root)
    folder = next((root / name for name in SPLITS[split] if (root / name).is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"{root} has no folder {' or '.join(SPLITS[split])}; expected {root}/{split}/CLASS/"
                                "IMAGE files, one folder for each class")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    order = tuple(names if classes is None else classes)
    if unknown := sorted(set(names) - set(order)):
        raise ValueError(f"{folder} has a class {unknown[0]!r} that the model does not know; it knows "
                         f"{', '.join(order)}")
    found = [(path, order.index(name)) for name in names for path in sorted((folder / name).iterdir())
             if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")]
    if not found:
        raise ValueError(f"{folder} has no images; expected {folder}/CLASS/*{{{','.join(IMAGE_SUFFIXES)}}}")
    return Split(tuple(path for path, _ in found), tuple(label for _, label in found), order)


def processor_for(recipe: Recipe) -> DeiTImageProcessor:
    """The preprocessing that evaluation and prediction use with a model trained by this recipe."""
    processor = DeiTImageProcessor.paper(recipe.model.image_size, crop_ratio=recipe.data.crop_ratio)
    processor.image_mean, processor.image_std = list(recipe.data.mean), list(recipe.data.std)
    return processor


class _TrainingViews(Dataset[tuple[np.ndarray, int]]):
    """Augmented views by (epoch, image): uint8 (height, width, 3) and the label."""

    def __init__(self, split: Split, recipe: Recipe):
        self.split, self.recipe = split, recipe
        self.processor = processor_for(recipe)
        height, width = recipe.model.image_hw
        self.keeps = len(split) * height * width * 3 <= CACHE_BYTES
        self.decoded: dict[int, Image.Image] = {}

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, int]:
        epoch, index = key
        view = augment(self._image(index), self.recipe.augment, draws(self.recipe.seed, epoch, index))
        return np.asarray(view), self.split.labels[index]

    def _image(self, index: int) -> Image.Image:
        """Resized and cropped as for evaluation; decoded once where all images fit into `CACHE_BYTES`."""
        if index in self.decoded:
            return self.decoded[index]
        [pixels] = self.processor([self.split.files[index]], do_rescale=False, do_normalize=False,
                                  data_format="channels_last").pixel_values
        image = Image.fromarray(pixels.astype(np.uint8))
        if self.keeps:
            self.decoded[index] = image
        return image


class TrainingBatches:
    """Training batches by epoch: each has a new order and new views, the same for any number of workers."""

    def __init__(self, split: Split, recipe: Recipe):
        if len(split) < recipe.data.batch:
            raise ValueError(f"{len(split)} training images do not fill a batch of {recipe.data.batch}; lower "
                             "data.batch")
        self.split, self.recipe = split, recipe
        self.views = _TrainingViews(split, recipe)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.split) // self.recipe.data.batch

    def order(self, epoch: int) -> np.ndarray:
        """The images of an epoch, in order."""
        return np.random.Generator(np.random.Philox(key=[self.recipe.seed, 1], counter=[0, epoch, 0, 0])).permutation(
            len(self.split))

    def epoch(self, epoch: int) -> Iterator[Batch]:
        batch = self.recipe.data.batch
        order = self.order(epoch)[:self.steps_per_epoch * batch]
        keys = [[(epoch, int(i)) for i in chunk] for chunk in order.reshape(-1, batch)]
        loader = DataLoader(self.views, batch_sampler=keys, num_workers=self.recipe.data.workers,
                            collate_fn=self._collate)
        yield from loader

    def _collate(self, views: list[tuple[np.ndarray, int]]) -> Batch:
        pixels = torch.from_numpy(np.stack([view for view, _ in views])).permute(0, 3, 1, 2)
        return Batch(normalise(pixels, self.recipe.data), torch.tensor([label for _, label in views]))


def normalise(pixels: Tensor, data: Data) -> Tensor:
    """uint8 (B, channels, height, width) to float32 with the recipe's mean and deviation."""
    mean = torch.tensor(data.mean).view(-1, 1, 1)
    std = torch.tensor(data.std).view(-1, 1, 1)
    return torch.addcdiv(-mean / std, pixels.float(), 255 * std)


class EvaluationBatches:
    """Every image of a split once, in order, through the processor; the last batch may be smaller.

    Can be iterated again and again; decoded once where all images fit into `CACHE_BYTES`.
    """

    def __init__(self, split: Split, processor: DeiTImageProcessor, batch: int):
        self.split, self.processor, self.batch = split, processor, batch
        self.kept: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        starts = range(0, len(self.split), self.batch)
        if len(self.kept) == len(starts):
            yield from self.kept
            return
        kept: list[Batch] = []
        for start in starts:
            chunk = slice(start, start + self.batch)
            pixels = self.processor(list(self.split.files[chunk]), return_tensors="pt").pixel_values
            batch = Batch(pixels, torch.tensor(self.split.labels[chunk]))
            if pixels[0].numel() * 4 * len(self.split) <= CACHE_BYTES:
                kept.append(batch)
            yield batch
        self.kept = kept


def write_digits(root: Path, *, seed: int = 0, side: int = 32) -> dict[str, int]:
    """Writes scikit-learn's 1,797 scanned digits as `root/{train,val,test}/CLASS/*.png`; returns the splits' sizes.

    360 images go to `test` and 144 to `val`, drawn with `seed` and balanced over the classes. The 8x8 scans (UCI
    Optical Recognition of Handwritten Digits, 1998) are enlarged to `side` pixels.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise ImportError('the digits come with scikit-learn: pip install "deit[quickstart]"') from None

    scans = load_digits()
    rest, test = train_test_split(np.arange(len(scans.target)), test_size=360, random_state=seed,
                                  stratify=scans.target)
    train, val = train_test_split(rest, test_size=144, random_state=seed, stratify=scans.target[rest])
    splits = {"train": train, "val": val, "test": test}
    for split, indices in splits.items():
        for index in indices:
            folder = root / split / str(scans.target[index])
            folder.mkdir(parents=True, exist_ok=True)
            scan = Image.fromarray((scans.images[index] * (255 / 16)).round().astype(np.uint8))  # grey levels 0 to 16
            scan.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{index:04}.png")
    return {split: len(indices) for split, indices in splits.items()}
