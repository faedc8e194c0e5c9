"""Images on their way from a loader process to a model: 8 bits for each value, and what makes pixels of them.

B images, C channels. A loader process hands over a quarter of the bytes of the pixels, and a GPU computes the pixels
itself. The arithmetic is that of `Normalisation.apply`, with the same result to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deit.image.pixels import Normalisation

_IN_CACHE = 2**18
"""Number of pixels that a CPU computes together, few enough to stay in its cache from one operation to the next."""


class Box(NamedTuple):
    """A rectangle of an image whose pixels are given, not computed."""

    row: int
    """The image's place in the batch."""
    top: int
    left: int
    height: int
    width: int
    start: int
    """Place of its first pixel in `Levels.given`."""


@dataclass(frozen=True)
class Levels:
    """A batch of images before normalisation."""

    values: Tensor
    """(B, C, height, width) uint8; or (B, height, width, C), as the processor wants them."""
    scale: Tensor
    """float32, of a shape that fits one image. A pixel is level * scale + shift."""
    shift: Tensor
    boxes: tuple[Box, ...]
    given: Tensor
    """(pixels of all boxes,) float32: one box after another, each flattened. They are normalised already."""

    @classmethod
    def of(
        cls,
        values: np.ndarray,
        normalisation: Normalisation,
        given: Sequence[tuple[int, int, int, np.ndarray]] = (),
        *,
        channels_first: bool = True,
    ) -> Levels:
        """Joins the parts of a batch. `given` holds the row, top, left and pixels (C, height, width) of each box."""
        boxes: list[Box] = []
        start = 0
        for row, top, left, pixels in given:
            boxes.append(Box(row, top, left, pixels.shape[1], pixels.shape[2], start))
            start += pixels.size
        shape = (-1, 1, 1) if channels_first else (-1,)
        return cls(
            torch.from_numpy(values),
            torch.from_numpy(normalisation.scale.reshape(shape)),
            torch.from_numpy(normalisation.shift.reshape(shape)),
            tuple(boxes),
            torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *(pixels.ravel() for *_, pixels in given)])),
        )

    def pixels(self) -> Tensor:
        """The normalised images with the given boxes, float32 in the shape of `values`, on their device."""
        pixels = torch.empty(self.values.shape, dtype=torch.float32, device=self.values.device)
        size = max(1, _IN_CACHE // pixels[0].numel()) if pixels.device.type == "cpu" else len(pixels)
        for levels, some in zip(self.values.split(size), pixels.split(size), strict=True):
            some.copy_(levels).mul_(self.scale).add_(self.shift)
        for box in self.boxes:
            inside = pixels[box.row, :, box.top : box.top + box.height, box.left : box.left + box.width]
            inside.copy_(self.given[box.start : box.start + inside.numel()].view_as(inside))
        return pixels

    def changed(self, change: Callable[[Tensor], Tensor]) -> Levels:
        """A copy with each tensor changed, for another device or kind of memory."""
        return replace(
            self,
            values=change(self.values),
            scale=change(self.scale),
            shift=change(self.shift),
            given=change(self.given),
        )

    def at(self, rows: Sequence[slice]) -> Levels:
        """The images at some places of the batch. All of `given` stays, because boxes refer to it."""
        places = np.concatenate([np.arange(len(self.values))[some] for some in rows]).tolist()
        new = {row: place for place, row in enumerate(places)}
        return replace(
            self,
            values=torch.cat([self.values[some] for some in rows]),
            boxes=tuple(box._replace(row=new[box.row]) for box in self.boxes if box.row in new),
        )
