"""Changes to training images. Every choice is a function of (seed, epoch, image, repeat), not of what came before.

So a batch depends neither on the number of loader processes nor on where a run was stopped. Sizes are (height,
width), except in calls to Pillow, which takes (width, height).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from deit.data.policies import MIRROR, Change, Kind, Matrix, Operation, drawn_jitter, drawn_policy, moved
from deit.image.decode import read, reading
from deit.image.jpeg import Box, Jpeg, Pixels
from deit.recipe import Affine, Augment, Erase, ResizedCrop, SimpleCrop

Source = Image.Image | Jpeg | str | Path | bytes

WHOLE_PIXELS = 512 * 512
"""Pixels of the largest JPEG that is always decoded whole, so that it can be kept for all crops."""
_GAP = 2
"""How many times the pixels that it needs a JPEG keeps, along each side, if it is decoded at a smaller scale."""

_BICUBIC = Image.Resampling.BICUBIC
_ATTEMPTS = 10  # as in timm and torchvision, for crops and for erasing


# --------------------------------------------------------------------------------------------------------------- crops


def crop(
    source: Source, size: tuple[int, int], settings: ResizedCrop | SimpleCrop, rng: np.random.Generator
) -> Image.Image:
    """A random crop of an image, as an RGB image of `size`. See `crops`."""
    return crops(source, size, settings, [rng])[0]


def crops(
    source: Source | Pixels,
    size: tuple[int, int],
    settings: ResizedCrop | SimpleCrop,
    rngs: Sequence[np.random.Generator],
) -> list[Image.Image]:
    """Random crops of an image, one for each generator, as RGB images of `size`. The image is decoded once for all.

    A crop does not depend on the others. A JPEG of more pixels than `WHOLE_PIXELS` is decoded at 1/2, 1/4 or 1/8 scale
    as long as the crop keeps twice the pixels of `size` on each side, which changes the result by 0.6/255 on average.
    PyTorch resizes a JPEG that is decoded whole, four times as fast as Pillow, which changes the result by 0.03/255 on
    average. Pillow resizes everything else.

    Raises `ImageError` if the image can't be read.
    """
    found = source if isinstance(source, Jpeg | Pixels) else read(source)
    if isinstance(settings, SimpleCrop):
        return _simple_crops(found, size, settings, rngs)
    full = _size(found)
    boxes = [crop_box(full, settings, rng) for rng in rngs]
    # the smallest size of the whole image at which the box has the pixels of `size`
    needed = [
        (math.ceil(size[0] * full[0] / height), math.ceil(size[1] * full[1] / width)) for _, _, height, width in boxes
    ]
    return [Image.fromarray(pixels) for pixels in _resized(found, boxes, needed, size)]


def _size(found: Jpeg | Pixels | Image.Image) -> tuple[int, int]:
    return (found.height, found.width) if isinstance(found, Image.Image) else found.size


def _resized(
    found: Jpeg | Pixels | Image.Image, boxes: Sequence[Box], needed: Sequence[tuple[int, int]], size: tuple[int, int]
) -> list[np.ndarray]:
    """The boxes of an image, each resized to `size`, (height, width, 3).

    `needed` is, for each box, the size of the whole image that it needs.
    """
    if isinstance(found, Image.Image):
        return [
            np.asarray(found.crop((left, top, left + width, top + height)).resize(size[::-1], _BICUBIC))
            for top, left, height, width in boxes
        ]
    scales = [_scale(found, each) for each in needed]
    if isinstance(found, Pixels):
        decoded = {1: found}
    else:
        with reading(found.name):
            decoded = {scale: found.decode(scale) for scale in set(scales)}
    return [_resize(*decoded[scale].cut(box), size) for box, scale in zip(boxes, scales, strict=True)]


def _scale(found: Jpeg | Pixels, needed: tuple[int, int]) -> int:
    """How many times smaller an image is decoded if it needs the size `needed`."""
    full = _size(found)
    if isinstance(found, Pixels) or full[0] * full[1] <= WHOLE_PIXELS:
        return 1
    most = min(full[0] // (_GAP * needed[0]), full[1] // (_GAP * needed[1]))
    return next(scale for scale in (8, 4, 2, 1) if scale <= max(1, most))


def _resize(pixels: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """A box (left, top, right, bottom) of pixels (height, width, 3), resized. What is outside of it has no part."""
    if box != (0, 0, pixels.shape[1], pixels.shape[0]):  # PyTorch takes no box
        return np.asarray(Image.fromarray(pixels).resize(size[::-1], _BICUBIC, box=box))
    if pixels.shape[:2] == size:
        return pixels
    if not pixels.flags.writeable or min(pixels.strides) < 0:  # which PyTorch does not take
        pixels = pixels.copy()
    levels = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # channels last, of which no copy is made
    return F.interpolate(levels, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def crop_box(full: tuple[int, int], settings: ResizedCrop, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width, in pixels, of a random rectangle in an image of size `full`.

    The area is drawn uniformly, and width divided by height uniformly in the logarithm. If none of ten draws fits the
    image, the result is the largest central rectangle with an allowed ratio (Szegedy et al. 2014, section 6;
    torchvision's limits).
    """
    rows, columns = full
    narrowest, widest = settings.ratio
    for _ in range(_ATTEMPTS):
        area = rng.uniform(*settings.scale) * rows * columns
        ratio = math.exp(rng.uniform(math.log(narrowest), math.log(widest)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= columns and 0 < height <= rows:
            return int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1)), height, width
    height = min(rows, max(1, round(columns / narrowest)))
    width = min(columns, max(1, round(rows * widest)))
    return (rows - height) // 2, (columns - width) // 2, height, width


def _simple_crops(
    found: Jpeg | Pixels | Image.Image,
    size: tuple[int, int],
    settings: SimpleCrop,
    rngs: Sequence[np.random.Generator],
) -> list[Image.Image]:
    full = _size(found)
    if size[0] * full[1] >= size[1] * full[0]:  # the smallest size that covers `size` and has the image's shape
        covering = size[0], int(size[0] * full[1] / full[0])
    else:
        covering = int(size[1] * full[0] / full[1]), size[1]
    [whole] = _resized(found, [(0, 0, *full)], [covering], covering)
    views = []
    for rng in rngs:
        pixels = whole
        for axis in (0, 1):
            start = rng.integers(pixels.shape[axis] + 2 * settings.padding - size[axis] + 1) - settings.padding
            pixels = pixels.take(_reflected(np.arange(start, start + size[axis]), pixels.shape[axis]), axis)
        views.append(Image.fromarray(pixels))
    return views


def _reflected(places: np.ndarray, length: int) -> np.ndarray:
    """Folds places outside 0 to `length` - 1 back at the outermost pixels, which are not repeated."""
    last = length - 1
    return last - np.abs(last - places % (2 * last)) if last else np.zeros_like(places)


# ------------------------------------------------------------------------------------------- images of the model's size


def augment(
    image: Image.Image, settings: Augment, rng: np.random.Generator, fill: tuple[int, ...] = (128, 128, 128)
) -> Image.Image:
    """Makes one training view of an image that already has the model's size: flip, affine, policy, jitter.

    `image` is RGB or grey (mode L) and keeps its size and mode. `fill`, one entry (0 to 255) for each channel, is the
    colour of the pixels that a policy's rotations and shifts uncover. Cropping comes before (`crop`), erasing after
    (`erased`), and mixing last (`deit.data.mixing`).
    """
    if settings.policy is not None and len(fill) != len(image.getbands()):
        raise ValueError(
            f"fill needs one value for each channel of an image in mode {image.mode}, found {fill}; "
            "give the mean colour, 0 to 255"
        )
    for change in drawn(settings, (image.height, image.width), rng):
        image = change.apply(image, fill)
    return image


def drawn(settings: Augment, size: tuple[int, int], rng: np.random.Generator) -> list[Change]:
    """What `augment` does to an image of `size` (height, width), in this order."""
    changes = [Change(MIRROR)] if settings.flip > 0 and rng.random() < settings.flip else []
    if settings.affine is not None:
        changes.append(_by_matrix(_affine_matrix(size, settings.affine, rng)))
    if settings.policy is not None:
        changes += drawn_policy(settings.policy, rng)
    if settings.jitter is not None:
        changes += drawn_jitter(settings.jitter, rng)
    return changes


def random_affine(image: Image.Image, settings: Affine, rng: np.random.Generator) -> Image.Image:
    return moved(image, _affine_matrix((image.height, image.width), settings, rng), None)


def _by_matrix(matrix: Matrix) -> Change:
    return Change(
        Operation(lambda image, *_: moved(image, matrix, None), Kind.MAP, matrix=lambda *_: matrix, black=True)
    )


def _affine_matrix(size: tuple[int, int], settings: Affine, rng: np.random.Generator) -> Matrix:
    height, width = size
    rotate, shear_x, shear_y = np.radians(rng.uniform(-1, 1, 3) * (settings.rotate, settings.shear, settings.shear))
    scale = rng.uniform(*settings.scale)
    shift = rng.uniform(-settings.shift, settings.shift, 2) * (width, height)
    turn = np.array([[math.cos(rotate), -math.sin(rotate)], [math.sin(rotate), math.cos(rotate)]])
    forward = scale * turn @ np.array([[1.0, math.tan(shear_x)], [math.tan(shear_y), 1.0]])
    back = np.linalg.inv(forward)  # Pillow asks, for each output pixel, where it comes from
    centre = np.array([width / 2, height / 2])
    offset = centre - back @ (centre + shift)
    return *back[0], offset[0], *back[1], offset[1]


def erased(shape: tuple[int, ...], settings: Erase, rng: np.random.Generator) -> tuple[int, int, np.ndarray] | None:
    """The random rectangle of an image (channels, height, width) that is filled with standard normal noise.

    Returns its top, its left and the noise, (channels, its height, its width) float32, which takes the place of
    normalised pixels. None if the image stays whole, as it does if none of ten draws fits it (Zhong et al. 2017,
    algorithm 1; timm's mode `pixel`).
    """
    if rng.random() >= settings.probability:
        return None
    channels, rows, columns = shape
    for _ in range(_ATTEMPTS):
        area = rng.uniform(*settings.area) * rows * columns
        ratio = math.exp(rng.uniform(math.log(settings.ratio[0]), math.log(settings.ratio[1])))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height < rows and width < columns:
            top, left = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
            return top, left, rng.standard_normal((channels, height, width), np.float32)
    return None


# ------------------------------------------------------------------------------------------------------------- patches


def patch_mask(grid: tuple[int, int], unit: tuple[int, int], ratio: float, rng: np.random.Generator) -> np.ndarray:
    """The patches that a masked-image model must guess: (rows * columns,) bool, True for hidden.

    `grid` is the size of the image and `unit` that of the squares that are hidden as a whole, both in (rows, columns)
    of patches. The share `ratio`, 0 to 1, of the squares is hidden, rounded up, and all choices are equally likely
    (SimMIM, Xie et al. 2021, section 3.2). If the squares do not divide the grid, those at the right and bottom edges
    are cut off.
    """
    rows, columns = (math.ceil(grid[axis] / unit[axis]) for axis in (0, 1))
    hidden = np.zeros(rows * columns, bool)
    hidden[rng.permutation(rows * columns)[: math.ceil(ratio * rows * columns - 1e-9)]] = True  # so 0.55 * 20 is 11
    patches = hidden.reshape(rows, columns).repeat(unit[0], 0).repeat(unit[1], 1)
    return patches[: grid[0], : grid[1]].reshape(-1)
