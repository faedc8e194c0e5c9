"""Speed of the training loader on one core, beside timm's: from JPEG files to the 8-bit views of the DeiT recipe.

    python -m bench.speed.reading [--rounds 7] [--case "photos"|"photos one view"|"packed photos"|...]

A step makes as many views as the case says, in one process with one thread: random crop to 224 pixels, flip and
RandAugment, with a bicubic kernel. A batch shows each image `repeats` times in a row, as the recipe's repeated
augmentation does with 3. No image is kept in memory from one batch to the next. We also draw the noise of erasing,
which timm leaves to the GPU. `deit Pillow` decodes without the extra `fast`.

In the cases with `packed`, `deit` reads what `deit pack --short-side 288` makes of the photos, `timm-packed` reads the
same JPEG files, and the others read the photos as they were.

In the cases `for a GPU`, `deit` makes what its loader processes make with `augment.on=device`: random crops, because
the device does RandAugment. timm has no such way, so it makes whole views.

In the cases `on the device`, nothing is compared with timm. `deit` makes whole views, `crops` is what loader processes
do with `augment.on=device`, and `changes` is the rest, for a batch of crops on the CPU.

The photos are ImageNet's if `shared/data/imagenet_sample.tar` is beside the repository, otherwise coarse random
pictures of 500x375 pixels. Photos of 12 megapixels are made of them: enlarged, with noise like a sensor's.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from bench.harness import Comparison, answer
from bench.speed import predict

CASES = (
    {
        f"{name}{' one view' if repeats == 1 else ''}": {"large": large, "repeats": repeats, "views": views}
        for name, large, views in (("photos", False, 360), ("12 megapixels", True, 24))
        for repeats in (3, 1)
    }
    | {
        f"packed {name}": {"large": large, "repeats": repeats, "views": views, "short_side": 288}
        for name, large, repeats, views in (
            ("photos", False, 3, 360),
            ("photos one view", False, 1, 360),
            ("12 megapixels", True, 3, 24),
        )
    }
    | {
        f"{name} for a GPU": {"large": large, "repeats": 3, "views": views, "on": "device"} | pack
        for name, large, views, pack in (
            ("photos", False, 360, {}),
            ("12 megapixels", True, 24, {}),
            ("packed photos", False, 360, {"short_side": 288}),
        )
    }
    | {
        f"photos{name} on the device": {"large": False, "repeats": repeats, "views": 360, "divided": True}
        for name, repeats in (("", 3), (" one view", 1))
    }
)
SIZE = 224


def files(large: bool, count: int, folder: Path) -> list[Path]:
    found = predict.photos(count, folder / "photos")
    if not large:
        return found
    sensor = np.random.default_rng(0)
    for i, file in enumerate(found):
        with Image.open(file) as photo:
            picture = photo.convert("RGB").resize((4000, 3000), Image.Resampling.BICUBIC)
        noise = sensor.normal(0, 4, (3000, 4000, 1)).astype(np.int16)
        levels = (np.asarray(picture, np.int16) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(levels).save(folder / f"{i}.jpg", quality=90)
    return sorted(folder.glob("*.jpg"))


def packed(images: Sequence[Path], short_side: int, folder: Path) -> list[Path]:
    """The images of a pack that is made of these files, each as often as among them."""
    from deit.data import read_examples
    from deit.data.packing import pack

    place = {file: number for number, file in enumerate(dict.fromkeys(images))}
    lines = (json.dumps({"path": str(file.absolute()), "label": "photo"}) for file in place)
    (folder / "list.jsonl").write_text("\n".join(lines))
    pack(folder / "list.jsonl", folder / "pack", short_side=short_side)
    found = read_examples(folder / "pack")[0].files
    return [found[place[file]] for file in images]


def unpacked(images: Sequence[Path], folder: Path) -> list[Path]:
    """The same images as files."""
    from deit.data.folders import contents

    place = {image: folder / f"{number}.jpg" for number, image in enumerate(dict.fromkeys(images))}
    for image, file in place.items():
        file.write_bytes(contents(image))
    return [place[image] for image in images]


def our_batches(images: Sequence[Path], repeats: int, on: Literal["loader", "device"] = "loader") -> Iterator[Any]:
    from deit.data.batches import TrainingBatches
    from deit.data.folders import Split
    from deit.recipe import Compute
    from deit.recipes.deit import deit_tiny

    recipe = deit_tiny()
    recipe = replace(
        recipe,
        data=replace(recipe.data, batch=repeats * len(images), repeats=repeats),
        augment=replace(recipe.augment, on=on),
        compute=Compute(workers=0),
    )
    batches = TrainingBatches(Split(tuple(images), (0,) * len(images), ("photo",)), recipe)
    batches.views.kept.room = 0
    return batches.from_step(0)


class _Photos(torch.utils.data.Dataset[Any]):
    """Images and a label, as timm's `ImageDataset` reads them."""

    def __init__(self, images: Sequence[Path], repeats: int):
        self.images = [file for file in images for _ in range(repeats)]
        self.transform: Callable[[Image.Image], Any] = lambda image: image

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with open(self.images[index], "rb") as file:
            return self.transform(Image.open(file).convert("RGB")), 0


def timm_batches(images: Sequence[Path], repeats: int) -> Iterator[Any]:
    """What timm's loader hands to its `PrefetchLoader`, which normalises and erases on the device."""
    from timm.data import auto_augment, create_loader

    posterize: Callable[..., Image.Image] = auto_augment.posterize

    def or_black(image: Image.Image, bits: int, **options: Any) -> Image.Image:
        """timm raises with Pillow 13 if no bit is kept."""
        return posterize(image, bits, **options) if bits else Image.new(image.mode, image.size)

    photos: Any = _Photos(images, repeats)
    no_jitter: Any = None

    auto_augment.NAME_TO_OP.update(dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), or_black))
    loader = create_loader(
        photos,
        (3, SIZE, SIZE),
        batch_size=repeats * len(images),
        is_training=True,
        color_jitter=no_jitter,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    return itertools.chain.from_iterable(itertools.repeat(loader.loader))


@contextmanager
def without_simplejpeg() -> Iterator[None]:
    from deit.image import jpeg

    fast, jpeg._fast = jpeg._fast, lambda: None  # type: ignore[assignment]
    try:
        yield
    finally:
        jpeg._fast = fast


def work(
    contender: str,
    large: bool,
    repeats: int,
    views: int,
    short_side: int = 0,
    divided: bool = False,
    on: Literal["loader", "device"] = "loader",
) -> None:
    """Makes batches, as many as it is asked to."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        images = files(large, views // repeats, Path(folder))
        if short_side and contender in ("deit", "timm-packed"):
            images = packed(images, short_side, Path(folder))
        if contender == "timm-packed":
            images = unpacked(images, Path(folder))
        if divided and contender != "deit":
            batches = our_batches(images, repeats, on="device")
            if contender == "crops":
                answer(batches.__next__)
            else:
                crops = next(batches).images
                answer(lambda: crops.changes.applied(crops.values))
        elif contender.startswith("timm"):
            answer(timm_batches(images, repeats).__next__)
        elif contender in ("deit", "deit originals"):
            answer(our_batches(images, repeats, on).__next__)
        else:
            with without_simplejpeg():
                answer(our_batches(images, repeats).__next__)


COMPARISON = Comparison(
    module="bench.speed.reading",
    description=__doc__,
    records=Path(__file__).with_suffix(".jsonl"),
    cases=CASES,
    contenders=lambda case: (
        ("deit", "deit originals", "timm", "timm-packed")
        if "short_side" in case
        else ("deit", "crops", "changes")
        if "divided" in case
        else ("deit", "timm")
        if "on" in case
        else ("deit", "deit Pillow", "timm")
    ),
    work=work,
    step="batch",
    images="views",
    packages=("torch", "timm", "PIL", "simplejpeg"),
    circumstances={"photos": predict.PHOTOS.is_file()},
)

if __name__ == "__main__":
    COMPARISON.main()
