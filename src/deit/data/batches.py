"""From image files to batches. N images of a split, B images of a global batch, R views of an image in a cycle.

Training is one endless stream of views, and each view is a function of its place in the stream. Step `step` takes the
places step * B to (step + 1) * B. A cycle is R * N places with an order of its own, in which the R views of an image
stand side by side (repeated augmentation, Hoffer et al. 2020). So every image comes R times in R epochs, for any N and
B. Any number of processes share the same batches. The number `step` alone is the state of the stream.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from deit.config import DeiTConfig
from deit.data.augment import WHOLE_PIXELS, augment, crops, drawn, erased, patch_mask
from deit.data.draws import Stream, draws
from deit.data.folders import Split
from deit.data.kept import Kept
from deit.data.levels import Levels
from deit.data.loading import loaded, loader_processes, share_of_cores
from deit.data.mixing import mix, mixing
from deit.data.on_device import Changes
from deit.data.policies import Change
from deit.image import jpeg
from deit.image.decode import ImageError, name_of, read, reading, stored_size
from deit.image.jpeg import Jpeg, Pixels
from deit.image.pixels import Normalisation
from deit.image.processor import DeiTImageProcessor
from deit.recipe import MaskedImage, Recipe

CACHE_BYTES = 2**30
"""Limit of the memory that keeps a split's decoded images, for a training process with all its loader processes."""

_CPU = torch.device("cpu")
_STAND_IN_ATTEMPTS = 100
_COLOURS = 3


@dataclass(frozen=True)
class Batch:
    images: Tensor | Levels
    """The pixels, or 8-bit levels that they have yet to be made of, as loader processes hand them over. With
    `augment.on=device`, the levels are those of the crops."""
    labels: Tensor
    """(B,) int64 class indices; after mixing, (B, classes) float32 probabilities. In evaluation, -1 marks padding and
    images that can't be read."""
    step: int = 0
    """The step that the batch belongs to."""
    positions: Tensor | None = None
    """(B,) int64, on the CPU: places in the global batch. Row i and row B-1-i are mirror images there too."""
    mask: Tensor | None = None
    """(B, patches) bool, in masked-image runs: True for hidden."""
    faults: tuple[tuple[str, str], ...] = ()
    """(file, reason) of each image that can't be read. In training, another image stands in for it."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def pixels(self) -> Tensor:
        """(B, channels, height, width) float32, augmented, normalised and erased, on the device of the batch.

        They are computed each time, unless the batch is finished.
        """
        return self.images.pixels() if isinstance(self.images, Levels) else self.images

    def finished(self) -> Batch:
        """The batch with its pixels computed, which take four times the memory."""
        return replace(self, images=self.pixels)

    def to(self, device: torch.device | str) -> Batch:
        """A copy on another device. The positions stay on the CPU."""
        return self._changed(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """A copy in memory that a GPU can copy from while it computes. The loader calls this."""
        return self._changed(Tensor.pin_memory)

    def copied(self) -> Batch:
        """A copy in memory of this process alone."""
        return self._changed(Tensor.clone)

    def used_by(self, stream: torch.Stream) -> None:
        """Keeps the GPU memory of the batch until a stream is done with it, if another stream made the batch."""

        def record(tensor: Tensor) -> Tensor:
            if tensor.is_cuda:
                tensor.record_stream(stream)
            return tensor

        self._changed(record)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Batch:
        images = self.images.changed(change) if isinstance(self.images, Levels) else change(self.images)
        mask = None if self.mask is None else change(self.mask)
        return replace(self, images=images, labels=change(self.labels), mask=mask)

    def parts(self, count: int) -> list[Batch]:
        """Divides the batch into `count` nearly equal micro-batches, or into one per mirror pair if that is fewer.

        In each, row i and the i-th row from its end are mirror images. A single part is the batch itself. Several are
        copies on the device of the batch, and the faults stay with the whole batch.
        """
        if count < 1:
            raise ValueError(f"a batch is divided into at least 1 part, found {count}")
        count = min(count, (len(self) + 1) // 2)
        if count == 1:
            return [self]
        shares = [_mirrored_share(len(self), part, count) for part in range(count)]
        return [self._at(share) for share in shares]

    def pairs(self, count: int) -> Batch:
        """A copy of the first `count` pairs of mirror images."""
        return self._at((slice(0, count), slice(len(self) - count, len(self))))

    def _at(self, share: tuple[slice, slice]) -> Batch:
        def taken(tensor: Tensor) -> Tensor:  # no list of rows, which would have to be copied to the device
            return torch.cat([tensor[rows] for rows in share])

        return replace(
            self,
            images=self.images.at(share) if isinstance(self.images, Levels) else taken(self.images),
            labels=taken(self.labels),
            positions=None if self.positions is None else taken(self.positions),
            mask=None if self.mask is None else taken(self.mask),
            faults=(),
        )


def _mirrored_share(size: int, part: int, parts: int) -> tuple[slice, slice]:
    """Places of the `part`-th share of whole mirror pairs (j, size-1-j), in rising order.

    Row i and row -1-i of the share are mirror images again. The middle of an odd size is its own mirror image.
    """
    pairs = np.array_split(np.arange((size + 1) // 2), parts)[part].tolist()
    first, last = pairs[0], pairs[-1] + 1
    return slice(first, last), slice(max(last, size - last), size - first)


# --------------------------------------------------------------------------------------------------- unreadable images


class BadImages(RuntimeError):
    """Too many images can't be read."""


class Faults:
    """The unreadable ones of a run's `images` training images. The run ends if they are more than 1 %."""

    def __init__(self, images: int):
        self.images = images
        self.reasons: dict[str, str] = {}
        """The reason for each file."""

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, faults: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Adds (file, reason) pairs and returns the new ones. Raises `BadImages` if more than 1 % of images fail."""
        new = {file: reason for file, reason in faults if file not in self.reasons}
        self.reasons |= new
        if new and len(self) > 0.01 * self.images:
            first = "; ".join(f"{file} {reason}" for file, reason in itertools.islice(self.reasons.items(), 3))
            raise BadImages(
                f"{len(self)} of {self.images} images can't be read, more than 1 %: {first}"
                f"{' ...' if len(self) > 3 else ''}. Replace or remove such files, then resume or start again"
            )
        return list(new.items())

    def state(self) -> dict[str, str]:
        """The state that `load_state` takes, as JSON types."""
        return dict(self.reasons)

    def load_state(self, state: Mapping[str, str] | None) -> None:
        self.reasons = dict(state or {})


def fault(file: Path, error: ImageError) -> tuple[str, str]:
    return str(file), " ".join(str(error).removeprefix(f"{name_of(file)} ").split())


# ------------------------------------------------------------------------------------------------------------ training


def processor_for(recipe: Recipe) -> DeiTImageProcessor:
    """The preprocessing that evaluation and prediction use with a model trained by this recipe."""
    processor = DeiTImageProcessor.paper(recipe.model.image_size, crop_ratio=recipe.data.crop_ratio)
    processor.image_mean, processor.image_std = list(recipe.data.mean), list(recipe.data.std)
    return processor


class _Files:
    """Files and labels as two arrays.

    Lists of objects would be copied into each loader process, page by page, because their reference counts change (1.3
    million paths take 0.4 GB).
    """

    def __init__(self, split: Split):
        self.paths = np.array([os.fsencode(file) for file in split.files])
        self.labels = np.array(split.labels, np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Path:
        return Path(os.fsdecode(self.paths[index]))


class _Views(Dataset[Any]):
    """Training batches by (step, positions, keys). There is a row for each position, drawn from its key alone."""

    def __init__(self, split: Split, recipe: Recipe, loaders: int):
        self.files, self.recipe = _Files(split), recipe
        self.kept = Kept(len(split), CACHE_BYTES, loaders)
        self.processor = processor_for(recipe)
        self.normalisation = Normalisation(recipe.data.mean, recipe.data.std)
        fill = [round(255 * value) for value in recipe.data.mean]
        self.fill = tuple(fill if len(fill) == 3 else fill * 3)

    def __getitem__(self, wanted: tuple[int, np.ndarray, np.ndarray]) -> Batch | BadImages:
        """Returns an exception instead of raising it, because one raised in a loader process would arrive with its
        traceback as the message."""
        step, positions, keys = wanted
        recipe = self.recipe
        size, channels = recipe.model.image_hw, recipe.model.num_channels
        later = recipe.augment.on == "device"
        levels = np.empty((len(keys), _COLOURS if later else channels, *size), np.uint8)
        changes: list[list[Change]] = [[] for _ in keys]
        given: list[tuple[int, int, int, np.ndarray]] = []
        labels = np.empty(len(keys), np.int64)
        faults: list[tuple[str, str]] = []
        for first, index, found in self._pictures(keys, faults):
            if isinstance(found, BadImages):
                return found
            for row, (image, rng) in enumerate(found, first):
                if later:
                    changes[row] = drawn(recipe.augment, size, rng)
                else:
                    image = augment(image, recipe.augment, rng, self.fill)
                _write(image, levels[row])
                erase = recipe.augment.erase
                box = None if erase is None else erased((channels, *size), erase, rng)
                given += [] if box is None else [(row, *box)]
                labels[row] = self.files.labels[index]
        return Batch(
            Levels.of(
                levels,
                self.normalisation,
                given,
                changes=Changes.of(changes, size, self.fill, channels) if later else None,
            ),
            torch.from_numpy(labels),
            step,
            torch.from_numpy(positions),
            self._masks(keys),
            tuple(faults),
        )

    def _pictures(
        self, keys: np.ndarray, faults: list[tuple[str, str]]
    ) -> Iterator[tuple[int, int, list[tuple[Image.Image, np.random.Generator]] | BadImages]]:
        """Yields the images of all rows: the first row that shows an image, the image's number, and for this and the
        next rows the picture and the generator of the view. Adjacent views of an image are read together.

        Unreadable ones are added to `faults`, and others stand in for them.
        """
        row = 0
        for index, group in itertools.groupby(keys.tolist(), key=lambda key: key[1]):
            same = list(group)
            try:
                found = self._cropped(index, same)
            except ImageError as error:
                for number, key in enumerate(same, row):
                    faults.append(fault(self.files[index], error))
                    yield (number, *self._stand_in(key, faults))
            else:
                yield row, index, found
            row += len(same)

    def _stand_in(
        self, key: list[int], faults: list[tuple[str, str]]
    ) -> tuple[int, list[tuple[Image.Image, np.random.Generator]] | BadImages]:
        epoch, index, repeat = key
        others = draws(self.recipe.seed, epoch, index, repeat, Stream.STAND_INS)
        for _ in range(_STAND_IN_ATTEMPTS - 1):
            other = int(others.integers(len(self.files)))
            try:
                return other, self._cropped(other, [key])
            except ImageError as error:
                faults.append(fault(self.files[other], error))
        return index, BadImages(
            f"{_STAND_IN_ATTEMPTS} training images in a row can't be read, the last one: "
            f"{' '.join(faults[-1])}; check the folder"
        )

    def _cropped(self, index: int, keys: Iterable[list[int]]) -> list[tuple[Image.Image, np.random.Generator]]:
        """For each key, the picture of the model's size that its view begins with, and the generator of the rest."""
        rngs = [draws(self.recipe.seed, epoch, number, repeat) for epoch, number, repeat in keys]
        settings = self.recipe.augment.crop
        if settings is None:
            pictures = [self._resized(index)] * len(rngs)
        else:
            pictures = crops(self._source(index), self.recipe.model.image_hw, settings, rngs)
        return list(zip(pictures, rngs, strict=True))

    def _source(self, index: int) -> Jpeg | Pixels | Image.Image:
        """An image to crop. It is read only once if it is small and there is room for it."""
        if (kept := self.kept.get(index)) is not None:
            return kept
        found = read(self.files[index])
        height, width = found.size if isinstance(found, Jpeg) else (found.height, found.width)
        if height * width > WHOLE_PIXELS or not self.kept.fits(height, width):
            return found
        if isinstance(found, Jpeg):
            with reading(found.name):
                decoded: Pixels | Image.Image = found.decode()
        else:
            decoded = found
        self.kept.add(index, decoded)
        return decoded

    def _resized(self, index: int) -> Image.Image:
        """An image, resized and cropped as for evaluation. It is read only once if there is room for it."""
        if (kept := self.kept.get(index)) is not None:
            assert isinstance(kept, Image.Image)
            return kept
        levels = self.processor.levels(self.files[index])
        assert levels is not None  # the processor resizes, and that gives 8 bits
        array = levels.transpose(1, 2, 0)
        image = Image.fromarray(array if array.shape[-1] == 3 else array[..., 0]).convert("RGB")
        self.kept.add(index, image)
        return image

    def _masks(self, keys: np.ndarray) -> Tensor | None:
        if not isinstance(self.recipe.objective, MaskedImage):
            return None
        return torch.from_numpy(
            np.stack(
                [
                    hidden_patches(self.recipe, draws(self.recipe.seed, epoch, index, repeat, Stream.MASKS))
                    for epoch, index, repeat in keys.tolist()
                ]
            )
        )


def _write(image: Image.Image, out: np.ndarray) -> None:
    """Writes an image into `out`, (channels, height, width) uint8."""
    image = image if len(out) == _COLOURS else image.convert("L")
    for channel, band in zip(out, image.split(), strict=True):  # half as long as to transpose an array
        channel[:] = np.frombuffer(band.tobytes(), np.uint8).reshape(channel.shape)


def hidden_patches(recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """The patches of one image that a masked-image recipe hides: (patches,) bool."""
    objective, model = recipe.objective, recipe.model
    assert isinstance(objective, MaskedImage)
    assert isinstance(model, DeiTConfig)
    unit = (objective.unit // model.patch_hw[0], objective.unit // model.patch_hw[1])
    return patch_mask(model.grid, unit, objective.ratio, rng)


def steps_per_epoch(split: Split, recipe: Recipe) -> float:
    """Number of steps, with a fraction, that take as many views as there are images."""
    return len(split) / recipe.data.batch


class TrainingBatches:
    """One process's share of the endless stream of training batches.

    A share holds whole pairs of mirror images (row i and row B-1-i), which mixing needs together.

    Args:
        rank, world: number of this process and number of all processes.
        cycle: number of steps after which views and mixing repeat, as cached teacher labels require.
        device: device that the batches will be copied to. They stay on the CPU, in pinned memory if it is a GPU.

    Raises `ValueError` if a process would have no pair.
    """

    def __init__(
        self,
        split: Split,
        recipe: Recipe,
        *,
        rank: int = 0,
        world: int = 1,
        cycle: int | None = None,
        device: torch.device = _CPU,
    ):
        batch, pairs = recipe.data.batch, (recipe.data.batch + 1) // 2
        if pairs < world:
            raise ValueError(
                f"a batch of {batch} has {pairs} pairs of mirror images, too few for {world} processes; "
                f"set data.batch to {2 * world} or more, or start fewer processes"
            )
        self.split, self.recipe, self.cycle, self.device = split, recipe, cycle, device
        self.positions = np.concatenate([np.arange(batch)[rows] for rows in _mirrored_share(batch, rank, world)])
        # even if each image is decoded only once, a GPU would wait for one process to augment them
        self.workers = loader_processes(recipe.compute.workers, lambda: device.type == "cpu" and self.keeps, device)
        self.views = _Views(split, recipe, self.workers)
        self._orders: dict[int, np.ndarray] = {}

    @cached_property
    def keeps(self) -> bool:
        """Whether all images are read only once, and then kept in memory."""
        return _fits(self.split, self.recipe)

    @property
    def steps_per_epoch(self) -> float:
        return steps_per_epoch(self.split, self.recipe)

    def reading_seconds(self, images: int = 64) -> float:
        """Measures how much longer an image takes the first time, in seconds, if it is kept afterwards."""
        views = _Views(self.split, self.recipe, 0)
        chosen = np.unique(np.linspace(0, len(self.split) - 1, images).round().astype(int))
        keys = np.stack([np.zeros_like(chosen), chosen, np.zeros_like(chosen)], axis=1)
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            views[0, np.arange(len(keys)), keys]
            seconds.append(time.perf_counter() - began)
        return max(0.0, seconds[0] - seconds[1]) / len(keys)

    def keys(self, step: int) -> np.ndarray:
        """(B, 3) int64: epoch, image and repeat of every place of the global batch. They determine its view."""
        batch, repeats, images = self.recipe.data.batch, self.recipe.data.repeats, len(self.split)
        places = self._drawn(step) * batch + np.arange(batch)
        cycles, within = np.divmod(places, images * repeats)
        first, last = int(cycles[0]), int(cycles[-1])
        self._orders = {
            cycle: self._orders[cycle]
            if cycle in self._orders
            else draws(self.recipe.seed, cycle, 0, 0, Stream.ORDER).permutation(images)
            for cycle in range(first, last + 1)
        }
        chosen = np.concatenate(
            [self._orders[cycle][within[cycles == cycle] // repeats] for cycle in range(first, last + 1)]
        )
        return np.stack([places // images, chosen, places % repeats], axis=1)

    def _drawn(self, step: int) -> int:
        return step % self.cycle if self.cycle else step

    def from_step(self, step: int, *, repeat: int | None = None) -> Iterator[Batch]:
        """Yields this process's share of every batch from `step` on, without end. `repeat` is for measurements: after
        so many steps, the same batches follow again.

        Closing the iterator ends the loader processes. Raises `LoaderDied` if one of them dies, and `BadImages` if no
        image can stand in for one that can't be read.
        """
        numbers = itertools.count(step) if repeat is None else itertools.cycle(range(step, step + repeat))
        wanted = ((number, self.positions, self.keys(number)[self.positions]) for number in numbers)
        return loaded(self.views, wanted, self.workers, self.device)

    def advice(self) -> str:
        """What to do if training waits for batches. Empty if they come faster after the first epoch anyway."""
        if not self.workers and self.recipe.compute.workers is None:  # images are kept
            return ""
        most = share_of_cores()
        steps = [f"set compute.workers above {self.workers} (this process has {most} cores)"] * (self.workers < most)
        if self.device.type == "cuda" and self.recipe.augment.on == "loader":
            steps.append("set augment.on=device, so that the GPU augments")
        if not jpeg.is_fast():
            steps.append('decode JPEG files faster with pip install "deit[fast]"')
        return " or ".join(steps) or "store the images smaller, or train where there are more cores"

    def mix(self, batch: Batch) -> Batch:
        """Applies Mixup and CutMix on the device of the batch, which is a share of a global batch or a part of one.

        If the recipe does not mix, the batch is returned as it is.
        """
        recipe = self.recipe.augment.mix
        if recipe is None:
            return batch
        assert batch.positions is not None
        drawn = mixing(
            recipe,
            self.recipe.data.batch,
            self.recipe.model.image_hw,
            draws(self.recipe.seed, self._drawn(batch.step), 0, 0, Stream.MIXING),
        )
        pixels, labels = mix(batch.pixels, batch.labels, len(self.split.classes), drawn.at(batch.positions.numpy()))
        return replace(batch, images=pixels, labels=labels)


def _fits(split: Split, recipe: Recipe) -> bool:
    """Whether all images can be kept in the cache, judged by the headers of a few."""
    if recipe.augment.crop is None:
        height, width = recipe.model.image_hw
        return len(split) * height * width * _COLOURS <= CACHE_BYTES
    files = [split.files[i] for i in np.unique(np.linspace(0, len(split) - 1, 16).round().astype(int))]
    sizes = [sides[0] * sides[1] for sides in map(stored_size, files) if sides is not None]
    expected = len(split) * _COLOURS * float(np.mean(sizes or [0]))
    return max(sizes, default=0) <= WHOLE_PIXELS and expected <= CACHE_BYTES


# ---------------------------------------------------------------------------------------------------------- evaluation


class EvaluationBatches:
    """Every image of a split once, in order, through the processor. Can be iterated again and again.

    Of `world` processes, `rank` has every `world`-th image. All processes give the same number of batches, because they
    meet in collective operations. Rows without an image, and rows whose image can't be read, are zero and labelled -1.
    If this process's images fit into `CACHE_BYTES` as 8-bit levels, they are decoded only once.

    Args:
        batch: number of rows of each batch; the last may have fewer.
        workers: number of loader processes; None chooses as for training.
        masks: function from an image's number in the split to its mask, (patches,) bool, for masked-image runs.
        keep: False for a single pass, which keeps nothing in memory.
        device: as for training.
    """

    def __init__(
        self,
        split: Split,
        processor: DeiTImageProcessor,
        batch: int,
        *,
        rank: int = 0,
        world: int = 1,
        workers: int | None = 0,
        masks: Callable[[int], np.ndarray] | None = None,
        keep: bool = True,
        device: torch.device = _CPU,
    ):
        self.split, self.device = split, device
        self.views = _EvaluationViews(split, processor, batch, rank, world, masks)
        self.keeps = keep and self.views.rows * int(np.prod(self.views.shape)) <= CACHE_BYTES
        self.workers = loader_processes(workers, lambda: self.keeps, device)
        self.kept: list[Batch] = []

    def __len__(self) -> int:
        return len(self.views)

    def __iter__(self) -> Iterator[Batch]:
        if len(self.kept) == len(self):
            yield from self.kept
            return
        kept: list[Batch] = []
        # What loader processes hand over lies in shared memory, of which containers have little, and each tensor in it
        # keeps a file open. What is pinned is a copy already.
        copies = self.workers > 0 and self.device.type != "cuda"
        for batch in loaded(self.views, range(len(self)), self.workers, self.device):
            if self.keeps:
                kept.append(batch.copied() if copies else batch)
            yield kept[-1] if self.keeps else batch
        self.kept = kept


class _EvaluationViews(Dataset[Batch]):
    """Evaluation batches of one process, by number."""

    def __init__(
        self,
        split: Split,
        processor: DeiTImageProcessor,
        batch: int,
        rank: int,
        world: int,
        masks: Callable[[int], np.ndarray] | None,
    ):
        self.files, self.processor, self.batch, self.masks = _Files(split), processor, batch, masks
        self.rank, self.world = rank, world
        self.rows = -(-len(split) // world)
        self.shape = processor([Image.new("RGB", (8, 8))]).pixel_values[0].shape

    def __len__(self) -> int:
        return math.ceil(self.rows / self.batch)

    def __getitem__(self, number: int) -> Batch:
        rows = range(number * self.batch, min((number + 1) * self.batch, self.rows))
        indices = [row * self.world + self.rank for row in rows]
        levels = np.zeros((len(rows), *self.shape), np.uint8)
        given = []
        labels = np.full(len(rows), -1)
        faults = []
        for row, index in enumerate(indices):
            found, pixels = None, np.zeros(self.shape, np.float32)
            if index < len(self.files):
                file = self.files[index]
                try:
                    found = self.processor.levels(file)
                    if found is None:
                        pixels[:] = self.processor([file]).pixel_values[0]
                    labels[row] = self.files.labels[index]
                except ImageError as error:
                    faults.append(fault(file, error))
            if found is None:
                given.append((row, 0, 0, pixels))
            else:
                levels[row] = found
        mask = (
            None
            if self.masks is None
            else torch.from_numpy(np.stack([self.masks(min(index, len(self.files) - 1)) for index in indices]))
        )
        first = self.processor.data_format == "channels_first"
        return Batch(
            Levels.of(levels, self.processor.normalisation, given, channels_first=first),
            torch.from_numpy(labels),
            mask=mask,
            faults=tuple(faults),
        )
