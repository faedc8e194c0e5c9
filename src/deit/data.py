"""From folders to batches. B images of a batch, N training images.

Training is an endless stream of views. Update `step` takes the positions [step * B, (step + 1) * B) of it, and what
stands there is a function of the position: so batches depend neither on the number of processes or loaders nor on
where a run was stopped, no partial batch is ever dropped, and any N will do.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deit.augment import augment, crop, draws, erase, patch_mask
from deit.config import DeiTConfig
from deit.decode import ImageError, load_image
from deit.image import DeiTImageProcessor
from deit.mixing import mix, mixing
from deit.recipe import Data, MaskedImage, Recipe

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""Accepted folder names of each split, in any case."""
CACHE_BYTES = 2**30
"""Decoded images are kept in memory up to this size, by all loaders of a process together."""
CACHED_PIXELS = 512 * 512
"""Where a random part of an image is cut out, larger images are decoded each time, at the scale that the part needs."""
MOST_BAD = 0.01
"""Share of the images that may be unreadable."""

VIEWS, ORDER, MIXING, MASKS, HOLDOUT, STAND_INS = 0, 1, 2, 3, 8, 5
"""Streams of random numbers (`augment.draws`)."""


class BadImages(RuntimeError):
    """Too many images can't be read."""


class LoaderDied(RuntimeError):
    """A loader process ended by itself."""


# ------------------------------------------------------------------------------------------------------------- folders


@dataclass(frozen=True)
class Split:
    """Labelled image files; `labels[i]` is the index in `classes` of the class that `files[i]` shows."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def take(self, indices: Sequence[int]) -> Split:
        return Split(tuple(self.files[i] for i in indices), tuple(self.labels[i] for i in indices), self.classes)


def read_data(root: str | Path, *, holdout: float, seed: int, labelled: bool = True) -> tuple[Split, Split]:
    """Training and validation images of a folder.

    `root/train/CLASS/*` and `root/val/CLASS/*`; without `train`, `root/CLASS/*` are the training images. Without `val`,
    the share `holdout` of every class is held out of them, drawn with `seed`, at least one image of each class that has
    two. A folder `test` is never touched. With `labelled=False`, all images below `root/train` or `root` are of one
    class, `image`.

    Raises `FileNotFoundError` or `ValueError` with what the folder should look like.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}; give --data a folder with {root}/train/CLASS/IMAGE files")
    place = _folder_of(root, "train") or root
    val_place = _folder_of(root, "val")
    others = {name for names in SPLITS.values() for name in names} if place == root else set()
    if place == root and not [entry for entry in _entries(root) if entry.name.lower() not in others]:
        raise FileNotFoundError(f"{root} has neither a folder train nor folders of classes; expected "
                                f"{root}/train/CLASS/IMAGE files, one folder for each class")
    train = _read(place, None, labelled, others)
    if labelled and len(train.classes) < 2:
        raise ValueError(f"{place} has one class, {train.classes[0]!r}; a classifier needs two: add a folder for each")
    if val_place is not None:
        return train, _read(val_place, train.classes, labelled, set())
    kept, held = _hold_out(train, holdout, seed)
    if not held:
        raise ValueError(f"{place} has too few images to hold {holdout:.0%} of each class out for validation; add "
                         f"images, set data.holdout, or give a folder {root / 'val'}")
    return train.take(kept), train.take(held)


def read_split(root: str | Path, split: str, classes: Sequence[str] | None = None) -> Split:
    """The image files of `root/SPLIT/CLASS/*`, classes in the order of their names.

    `classes` fixes the order (that of a trained model); a folder of another name is refused. Raises
    `FileNotFoundError` or `ValueError` with what the folder should look like.
    """
    root = Path(root)
    folder = _folder_of(root, split)
    if folder is None:
        raise FileNotFoundError(f"{root} has no folder {' or '.join(SPLITS[split])}; expected {root}/{split}/CLASS/"
                                "IMAGE files, one folder for each class")
    return _read(folder, classes, True, set())


def _folder_of(root: Path, split: str) -> Path | None:
    if not root.is_dir():
        return None
    entries = [entry for entry in _entries(root) if entry.is_dir()]
    return next((entry for name in SPLITS[split] for entry in entries if entry.name.lower() == name), None)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise ValueError(f"{folder} can't be read ({error}); check its permissions") from None


def _images(folder: Path, above: tuple[str, ...] = ()) -> list[Path]:
    """All image files below a folder, sorted; hidden files and folders are passed over, links followed, but not back
    to a folder that the link lies in (`above`)."""
    above = (*above, os.path.realpath(folder))
    found = []
    for entry in _entries(folder):
        if entry.is_dir():
            found += _images(entry, above) if os.path.realpath(entry) not in above else []
        elif entry.suffix.lower() in IMAGE_SUFFIXES:
            found.append(entry)
    return found


def _read(folder: Path, classes: Sequence[str] | None, labelled: bool, others: set[str]) -> Split:
    """One split; `others` are folders that are no classes."""
    if not labelled:
        files = [path for path in _images(folder) if path.relative_to(folder).parts[0].lower() not in others]
        if not files:
            raise ValueError(f"{folder} has no images; expected {_pattern(folder, '')}")
        return Split(tuple(files), (0,) * len(files), ("image",))
    entries = _entries(folder)
    names = [entry.name for entry in entries if entry.is_dir() and entry.name.lower() not in others]
    order = tuple(names if classes is None else classes)
    if unknown := sorted(set(names) - set(order)):
        raise ValueError(f"{folder} has a class {unknown[0]!r} that the model does not know; it knows "
                         f"{', '.join(order[:10])}{' and others' if len(order) > 10 else ''}: rename or remove the "
                         "folder, or train with it")
    if loose := [entry.name for entry in entries if entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file()]:
        raise ValueError(f"{folder} holds images outside any class, {loose[0]} among {len(loose)}; move them into the "
                         "folders of their classes, or away")
    found = {name: _images(folder / name) for name in names}
    if not any(found.values()):
        raise ValueError(f"{folder} has no images; expected {_pattern(folder, 'CLASS/')}")
    if classes is None and (empty := [name for name in names if not found[name]]):
        raise ValueError(f"{folder / empty[0]} has no images, so its class can't be learnt; add some, or remove the "
                         "folder")
    pairs = [(path, order.index(name)) for name in names for path in found[name]]
    return Split(tuple(path for path, _ in pairs), tuple(label for _, label in pairs), order)


def _pattern(folder: Path, below: str) -> str:
    return f"{folder}/{below}*{{{','.join(IMAGE_SUFFIXES)}}}"


def _hold_out(split: Split, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices that stay, and those held out: of each class the nearest number to its share, at least one of two."""
    labels = np.asarray(split.labels)
    held: list[int] = []
    for label in range(len(split.classes)):
        own = np.flatnonzero(labels == label)
        count = min(len(own) - 1, max(1, round(share * len(own)))) if share > 0 else 0
        if count > 0:
            held += draws(seed, label, 0, 0, HOLDOUT).permutation(own)[:count].tolist()
    return sorted(set(range(len(split))) - set(held)), sorted(held)


def fingerprint(split: Split) -> str:
    """A hash of classes, relative names, labels and sizes of all files, and of the contents of 256 of them, evenly
    spread. It does not depend on where the folder lies. What can't be opened counts as empty."""
    root = os.path.commonpath([path.parent for path in split.files])
    digest = hashlib.sha256(repr(split.classes).encode())
    for path, label in zip(split.files, split.labels, strict=True):
        size = path.stat().st_size if path.exists() else 0
        digest.update(os.fsencode(f"{os.path.relpath(path, root)}\0{label}\0{size}\n"))
    for i in np.unique(np.linspace(0, len(split) - 1, min(256, len(split))).astype(int)):
        with suppress(OSError):  # a dead link, a file of someone else: told where the image is wanted
            digest.update(hashlib.sha256(split.files[i].read_bytes()).digest())
    return digest.hexdigest()


def processor_for(recipe: Recipe) -> DeiTImageProcessor:
    """The preprocessing that evaluation and prediction use with a model trained by this recipe."""
    processor = DeiTImageProcessor.paper(recipe.model.image_size, crop_ratio=recipe.data.crop_ratio)
    processor.image_mean, processor.image_std = list(recipe.data.mean), list(recipe.data.std)
    return processor


# -------------------------------------------------------------------------------------------------------------- faults


class Faults:
    """Files that turned out to be unreadable, of `images` in all."""

    def __init__(self, images: int):
        self.images = images
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, faults: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Those that are new. Raises `BadImages` where they are too many by now."""
        new = [(file, reason) for file, reason in dict(faults).items() if file not in self.reasons]
        self.reasons |= dict(new)
        if len(self.reasons) > MOST_BAD * self.images:
            file, reason = next(iter(self.reasons.items()))
            raise BadImages(f"{len(self.reasons)} of {self.images} images can't be read, more than {MOST_BAD:.0%}: "
                            f"{', '.join(list(self.reasons)[:5])} ({file}: {reason}); replace or remove them")
        return new

    def state(self) -> dict[str, str]:
        return dict(self.reasons)

    def load_state(self, state: dict[str, str] | None) -> None:
        self.reasons = dict(state or {})


# ------------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    pixels: Tensor
    """(B, channels, height, width) float32, normalised."""
    labels: Tensor
    """(B,) int64 class indices, or (B, C) float32 shares of mixed images. -1: a row of an evaluation that does not
    count."""
    step: int = 0
    """Update that the batch belongs to."""
    positions: Tensor | None = None
    """(B,) int64, on the CPU: places in the global batch. Row i and row B-1-i are mirror images there."""
    mask: Tensor | None = None
    """(B, patches) bool, of masked-image runs: true where hidden."""
    faults: tuple[tuple[str, str], ...] = ()
    """File and reason of images that can't be read."""

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device | str) -> Batch:
        mask = None if self.mask is None else self.mask.to(device, non_blocking=True)
        return replace(self, pixels=self.pixels.to(device, non_blocking=True), mask=mask,
                       labels=self.labels.to(device, non_blocking=True))

    def parts(self, count: int) -> list[Batch]:
        """Nearly equal micro-batches, at most `count`; mirror images stay together."""
        if count == 1:
            return [self]
        return [self._rows(torch.from_numpy(rows)) for rows in _shares(len(self), count)]

    def _rows(self, rows: Tensor) -> Batch:
        there = rows.to(self.pixels.device)
        return replace(self, pixels=self.pixels[there], labels=self.labels[there], faults=(),
                       positions=None if self.positions is None else self.positions[rows],
                       mask=None if self.mask is None else self.mask[there])


def _shares(batch: int, count: int) -> list[np.ndarray]:
    """The positions of a batch in `count` shares, or as many as there are pairs (j, batch - 1 - j): each takes
    neighbouring pairs, the fronts first and their mirrors, turned round, last."""
    pairs = -(-batch // 2)
    shares = []
    for part in np.array_split(np.arange(pairs), min(count, pairs)):
        mirrors = batch - 1 - part[::-1]
        shares.append(np.concatenate([part, mirrors[mirrors >= pairs]]))
    return shares


class TrainingBatches:
    """The stream of training batches; of each, the share of one process.

    Args:
        rank, world: this process among those that share every batch.
        cycle: updates after which the batches come again; None: never.
    """

    def __init__(self, split: Split, recipe: Recipe, *, rank: int = 0, world: int = 1, cycle: int | None = None):
        batch = recipe.data.batch
        shares = _shares(batch, world)
        if len(shares) < world:
            raise ValueError(f"a batch of {batch} images can't be shared by {world} processes, a pair of images each "
                             "at least; raise data.batch, or start fewer")
        self.split, self.recipe, self.cycle = split, recipe, cycle
        self.share = shares[rank]
        self.steps_per_epoch = len(split) / batch
        self.workers = loaders(split, recipe, world)
        self.views = _Views(split, recipe, self.workers)
        seed, images = recipe.seed, len(split)
        self._permutation = lru_cache(2)(lambda cycle: draws(seed, cycle, 0, 0, ORDER).permutation(images))

    def keys(self, step: int) -> np.ndarray:
        """(B, 3) int64: epoch, image and repeat of every position of update `step`'s global batch.

        Each image is seen `repeats` times in `repeats` epochs, next to each other, before the order is drawn anew.
        """
        step = step if self.cycle is None else step % self.cycle
        images, repeats, batch = len(self.split), self.recipe.data.repeats, self.recipe.data.batch
        at = np.arange(step * batch, (step + 1) * batch)
        cycle, within = np.divmod(at, images * repeats)
        order = [self._permutation(int(c)) for c in range(cycle[0], cycle[-1] + 1)]
        index = np.concatenate([order[c - cycle[0]][within[cycle == c] // repeats] for c in np.unique(cycle)])
        return np.stack([at // images, index, within % repeats], axis=1)

    def from_step(self, step: int) -> Iterator[Batch]:
        """This process's share of every batch from `step` on, without end. Raises `LoaderDied`, `BadImages`."""
        loader = DataLoader(self.views, batch_sampler=_Steps(self, step), num_workers=self.workers,
                            collate_fn=self.views.collate, generator=torch.Generator(),
                            pin_memory=torch.cuda.is_available(), worker_init_fn=_begin_worker)
        batches = iter(loader)
        try:
            while True:
                try:
                    batch = next(batches)
                except RuntimeError as error:
                    if "exited unexpectedly" not in str(error):
                        raise
                    raise LoaderDied(f"a loader process died ({str(error).splitlines()[0]}), probably killed for lack "
                                     f"of memory; set compute.workers below {self.workers}, and go on with "
                                     "--resume") from error
                yield replace(batch, step=step, positions=torch.from_numpy(self.share))
                step += 1
        finally:
            if hasattr(batches, "_shutdown_workers"):
                batches._shutdown_workers()

    def mix(self, batch: Batch) -> Batch:
        """Mixup and CutMix of any mirror-symmetric rows of a global batch, on their device."""
        recipe = self.recipe.augment.mix
        if recipe is None:
            return batch
        assert batch.positions is not None
        drawn = self._mixing(batch.step).at(batch.positions.numpy())
        pixels, targets = mix(batch.pixels, batch.labels, len(self.split.classes), drawn)
        return replace(batch, pixels=pixels, labels=targets)

    def _mixing(self, step: int) -> Any:
        recipe = self.recipe
        step = step if self.cycle is None else step % self.cycle
        assert recipe.augment.mix is not None
        return mixing(recipe.augment.mix, recipe.data.batch, recipe.model.image_hw,
                      draws(recipe.seed, step, 0, 0, MIXING))


class _Steps:
    """Keys of this process's views for every update from one on: a batch sampler without end."""

    def __init__(self, batches: TrainingBatches, step: int):
        self.batches, self.step = batches, step

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        step = self.step
        while True:
            yield [tuple(key) for key in self.batches.keys(step)[self.batches.share].tolist()]
            step += 1


def loaders(split: Split, recipe: Recipe, world: int = 1) -> int:
    """Loader processes for a training process: as the recipe says, or as `Compute.workers` describes."""
    if recipe.compute.workers is not None:
        return recipe.compute.workers
    sizes = [recipe.model.image_hw]
    if recipe.augment.crop is not None:
        for path in split.files[::max(1, len(split) // 8)]:
            try:
                with Image.open(path) as image:
                    sizes.append(image.size)
            except Exception:  # it is told when it comes
                continue
    if len(split) * 3 * max(rows * columns for rows, columns in sizes) <= CACHE_BYTES:
        return 0
    return _cores()


def _cores() -> int:
    """Of this process, up to 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _begin_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the training process acts on it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


@dataclass(frozen=True)
class _View:
    pixels: np.ndarray
    """(channels, height, width) float32, normalised."""
    label: int
    mask: np.ndarray | None
    faults: tuple[tuple[str, str], ...]


class _Views(Dataset[_View]):
    """Training views by (epoch, image, repeat)."""

    def __init__(self, split: Split, recipe: Recipe, workers: int):
        self.split, self.recipe = split, recipe
        self.processor = processor_for(recipe)
        self.processor.image_mean = [0.5] * 3
        self.processor.image_std = [0.5] * 3
        self.fill = tuple(round(255 * value) for value in (recipe.data.mean * 3)[:3])
        self.room = CACHE_BYTES // max(1, workers)
        self.kept: dict[int, Image.Image] = {}

    def __getitem__(self, key: tuple[int, int, int]) -> _View:
        epoch, index, repeat = key
        seed = self.recipe.seed
        faults: list[tuple[str, str]] = []
        stand_ins = draws(seed, epoch, index, repeat, STAND_INS)
        for _ in range(100):
            try:
                pixels = self._view(index, draws(seed, *key, stream=VIEWS))
                return _View(pixels, self.split.labels[index], self._mask(draws(seed, *key, stream=MASKS)),
                             tuple(faults))
            except ImageError as error:
                faults.append((str(self.split.files[index]), str(error)))
                index = int(stand_ins.integers(len(self.split)))
        raise BadImages(f"no readable image was found in 100 tries, {faults[0][0]} the first: {faults[0][1]}; check "
                        "the folder")

    def _view(self, index: int, rng: np.random.Generator) -> np.ndarray:
        given, data = self.recipe.augment, self.recipe.data
        if given.crop is None:
            image = self._cached(index, self._processed)
        else:
            image = crop(self._small(index) or self.split.files[index], self.recipe.model.image_hw, given.crop, rng)
        image = augment(image, given, rng, self.fill)
        if self.recipe.model.num_channels == 1:
            image = image.convert("L")
        pixels = np.asarray(image).reshape(image.height, image.width, -1).transpose(2, 0, 1)
        pixels = normalise(pixels, data)
        if given.erase is not None:
            erase(pixels, given.erase, rng)
        return pixels

    def _processed(self, index: int) -> Image.Image:
        """Resized and cropped as for evaluation."""
        [pixels] = self.processor([self.split.files[index]], do_rescale=False, do_normalize=False,
                                  do_convert_rgb=True, data_format="channels_last").pixel_values
        return Image.fromarray(pixels.astype(np.uint8))

    def _small(self, index: int) -> Image.Image | None:
        """The whole image, where it is so small that it is always decoded whole; so a view does not depend on what is
        kept."""
        if index in self.kept:
            return self.kept[index]
        try:
            with Image.open(self.split.files[index]) as header:
                small = header.width * header.height <= CACHED_PIXELS
        except Exception:  # `crop` says what is wrong
            return None
        return self._cached(index, lambda i: load_image(self.split.files[i])) if small else None

    def _cached(self, index: int, make: Callable[[int], Image.Image]) -> Image.Image:
        if index not in self.kept:
            image = make(index)
            size = 3 * image.width * image.height
            if size > self.room:
                return image
            self.room -= size
            self.kept[index] = image
        return self.kept[index]

    def _mask(self, rng: np.random.Generator) -> np.ndarray | None:
        return mask_of(self.recipe, rng) if isinstance(self.recipe.objective, MaskedImage) else None

    def collate(self, views: list[_View]) -> Batch:
        masks = [view.mask for view in views if view.mask is not None]
        return Batch(torch.from_numpy(np.stack([view.pixels for view in views])),
                     torch.tensor([view.label for view in views]),
                     mask=torch.from_numpy(np.stack(masks)) if masks else None,
                     faults=tuple(fault for view in views for fault in view.faults))


def mask_of(recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """(patches,) bool: what a masked-image recipe hides of one image."""
    model, objective = recipe.model, recipe.objective
    assert isinstance(model, DeiTConfig)
    assert isinstance(objective, MaskedImage)
    rows, columns = model.patch_hw
    return patch_mask(model.grid, (objective.unit // rows, objective.unit // columns), objective.ratio, rng)


def normalise(pixels: np.ndarray, data: Data) -> np.ndarray:
    """uint8 (channels, height, width) to float32 with the recipe's mean and deviation."""
    mean, std = (np.asarray(values, np.float64).reshape(-1, 1, 1) for values in (data.mean, data.std))
    return pixels * (1 / (255 * std)).astype(np.float32) - (mean / std).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------- evaluation


class EvaluationBatches:
    """Every image of a split once, in order, through the processor; the last batch may be smaller.

    Can be iterated again and again; kept in memory where all fit into `CACHE_BYTES`. Images that can't be read have
    label -1 and are among the batch's faults.

    Args:
        rank, world: this process takes every `world`-th image from `rank` on. All processes have the same number of
            batches, filled up with rows labelled -1.
        workers: loader processes; None: one for each core, up to 8, or 0 where all images fit into memory.
        masks: what is hidden of an image, by its index (masked-image runs).
    """

    def __init__(self, split: Split, processor: DeiTImageProcessor, batch: int, *, rank: int = 0, world: int = 1,
                 workers: int | None = 0, masks: Callable[[int], np.ndarray] | None = None):
        self.split, self.processor, self.batch, self.masks = split, processor, batch, masks
        size = processor.crop_size
        self.keeps = len(split) * len(processor.image_mean) * size["height"] * size["width"] * 4 <= CACHE_BYTES
        self.workers = workers if workers is not None else 0 if self.keeps else _cores()
        own, most = list(range(rank, len(split), world)), -(-len(split) // world)
        self.chunks = [own[start:start + batch] or [-1] for start in range(0, most, batch)]
        self.kept: list[Batch] = []

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[Batch]:
        if len(self.kept) == len(self.chunks):
            yield from self.kept
            return
        loader = DataLoader(_Chunks(self), batch_size=None, num_workers=self.workers, generator=torch.Generator(),
                            worker_init_fn=_begin_worker)
        kept: list[Batch] = []
        for batch in loader:
            if self.keeps:
                kept.append(batch)
            yield batch
        self.kept = kept


class _Chunks(Dataset[Batch]):
    def __init__(self, source: EvaluationBatches):
        self.source = source

    def __len__(self) -> int:
        return len(self.source.chunks)

    def __getitem__(self, number: int) -> Batch:
        if number >= len(self):
            raise IndexError(number)
        source, split = self.source, self.source.split
        pixels, labels, faults = [], [], []
        for index in source.chunks[number]:
            found = None
            if index >= 0:
                try:
                    found = source.processor(split.files[index], return_tensors="pt").pixel_values[0]
                except ImageError as error:
                    faults.append((str(split.files[index]), str(error)))
            pixels.append(found)
            labels.append(-1 if found is None else split.labels[index])
        size = source.processor.crop_size
        blank = torch.zeros(len(source.processor.image_mean), size["height"], size["width"])
        masks = None if source.masks is None else torch.from_numpy(np.stack(
            [source.masks(max(0, index)) for index in source.chunks[number]]))
        return Batch(torch.stack([blank if found is None else found for found in pixels]), torch.tensor(labels),
                     mask=masks, faults=tuple(faults))


# -------------------------------------------------------------------------------------------------------------- digits


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
