"""Mixup (Zhang et al. 2017) and CutMix (Yun et al. 2019) of each image with the one at the mirrored place of the batch.

B images of a batch. The partner of row i is row B-1-i. The middle row of an odd batch is its own partner.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deit.recipe import Mix


@dataclass(frozen=True)
class Mixing:
    """The draws for each row of a batch."""

    share: np.ndarray
    """(B,) float32, 0 to 1: the image's own share of its label, and for Mixup of each pixel. For CutMix, the share of
    its pixels that lie outside the box."""
    cut: np.ndarray
    """(B,) bool: whether a box of the partner is pasted in instead of blending the two images."""
    box: np.ndarray
    """(B, 4) int: top, bottom, left and right of the pasted box, in pixels; zeros if nothing is pasted."""

    def at(self, positions: np.ndarray) -> Mixing:
        """The draws at the given places of the batch, (N,) int."""
        return Mixing(self.share[positions], self.cut[positions], self.box[positions])


def mixing(settings: Mix, batch: int, size: tuple[int, int], rng: np.random.Generator) -> Mixing:
    """Draws for a whole global batch of images of `size` (height, width), which all processes share."""
    count = {"batch": 1, "pair": (batch + 1) // 2, "element": batch}[settings.mode]
    mixed = rng.random(count) < settings.probability
    cut = np.full(count, settings.cutmix > 0)
    if settings.mixup > 0 and settings.cutmix > 0:
        cut = rng.random(count) < settings.switch
    alpha = np.where(cut, settings.cutmix, settings.mixup)
    share = np.where(mixed, rng.beta(alpha, alpha), 1.0)
    cut &= mixed
    box = np.where(cut[:, None], _boxes(share, size, rng), 0)
    top, bottom, left, right = box.T
    share = np.where(cut, 1 - (bottom - top) * (right - left) / (size[0] * size[1]), share).astype(np.float32)

    row = np.arange(batch)
    at = {"batch": 0 * row, "pair": np.minimum(row, batch - 1 - row), "element": row}[settings.mode]
    return Mixing(share, cut, box).at(at)


def _boxes(share: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(N, 4) int: boxes with 1 - share of the image's area around a random pixel, cut off at the borders."""
    sides = []
    for length in size:
        extent = (length * np.sqrt(1 - share)).astype(np.int64)
        centre = rng.integers(0, length, len(share))
        sides += [np.clip(centre - extent // 2, 0, length), np.clip(centre + (extent + 1) // 2, 0, length)]
    return np.stack(sides, axis=1)


def mix(pixels: Tensor, labels: Tensor, classes: int, drawn: Mixing) -> tuple[Tensor, Tensor]:
    """Mixed images and their targets, computed on the device of `pixels` without waiting for it.

    `pixels` is (B, channels, height, width) floating point, `labels` is (B,) int64 from 0 to `classes` - 1, and `drawn`
    has B rows. Returns new pixels of the same shape and type, and targets (B, classes) float32, in which each row is a
    distribution. Some rows of a larger batch give the same values as in that batch, to the bit, as long as row i and
    row B-1-i are still partners.
    """
    if not len(pixels) == len(labels) == len(drawn.share):
        raise ValueError(
            f"mixing needs one label and one draw for each image, found {len(pixels)} images, "
            f"{len(labels)} labels and {len(drawn.share)} draws; select the images' draws with drawn.at(positions)"
        )

    def moved(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(pixels.device, non_blocking=True)

    share, mixed = moved(drawn.share)[:, None], pixels
    if not drawn.cut.all():
        # two products and a sum, because the rounding of a fused form would depend on where a row lies in the batch
        own = moved(np.where(drawn.cut, np.float32(1), drawn.share))[:, None, None, None]
        mixed = pixels * own.to(pixels.dtype) + pixels.flip(0) * (1 - own).to(pixels.dtype)
    if drawn.cut.any():
        top, bottom, left, right = moved(drawn.box.T[..., None])  # each (B, 1)
        row, column = (torch.arange(length, device=pixels.device) for length in pixels.shape[2:])
        down, across = (row >= top) & (row < bottom), (column >= left) & (column < right)  # (B, height), (B, width)
        inside = (down[:, :, None] & across[:, None, :])[:, None]  # (B, 1, height, width)
        mixed = torch.where(inside, pixels.flip(0), mixed)
    one_hot = torch.zeros(len(labels), classes, device=pixels.device).scatter_(1, labels[:, None], 1.0)
    return mixed, one_hot * share + one_hot.flip(0) * (1 - share)
