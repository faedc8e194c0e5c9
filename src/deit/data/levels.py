"""Images on their way from a loader process to a model: 8 bits for each value, and what makes pixels of them.

B images, C channels, P given pixels. A loader process hands over a quarter of the bytes of the pixels, and a GPU
computes the pixels itself. The arithmetic is that of `Normalisation.apply`, with the same result to the bit. If the
recipe says `augment.on=device`, the levels have yet to be changed, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from deit.data.on_device import Changes
from deit.image.pixels import Normalisation

_IN_CACHE = 2**18
"""Number of pixels that a CPU computes together, few enough to stay in its cache from one operation to the next."""


@dataclass(frozen=True)
class Levels:
    """A batch of images before normalisation. Some pixels are not computed but given, such as the noise of erasing."""

    values: Tensor
    """(B, C, height, width) uint8; or (B, height, width, C), as the processor wants them. Before changes, C is 3."""
    scale: Tensor
    """float32, of a shape that fits one image. A pixel is level * scale + shift."""
    shift: Tensor
    places: Tensor
    """(P,) int32, or int64 in huge batches: places of the given pixels in the flattened batch, image by image."""
    given: Tensor
    """(P,) float32, as the model takes them."""
    counts: np.ndarray
    """(B,) int: number of given pixels of each image."""
    changes: Changes | None = None
    """What is done to the levels before they become pixels."""

    @classmethod
    def of(
        cls,
        values: np.ndarray,
        normalisation: Normalisation,
        given: Sequence[tuple[int, int, int, np.ndarray]] = (),
        *,
        channels_first: bool = True,
        changes: Changes | None = None,
    ) -> Levels:
        """Joins the parts of a batch.

        `given` holds the row, top, left and pixels (C, height, width) of each rectangle, at most one for an image, by
        rising row. A whole image has the layout of `values`, with the channels that `changes` leave.
        """
        _, rows, columns = values.shape[1:]
        size = values[0].size if changes is None else changes.channels * rows * columns
        places, counts = [np.zeros(0, np.int64)], np.zeros(len(values), np.int64)
        for row, top, left, pixels in given:
            depth, height, width = pixels.shape
            channel, y, x = np.ogrid[:depth, top : top + height, left : left + width]
            places.append((row * size + (channel * rows + y) * columns + x).ravel())
            counts[row] = pixels.size
        shape = (-1, 1, 1) if channels_first else (-1,)
        return cls(
            torch.from_numpy(values),
            torch.from_numpy(normalisation.scale.reshape(shape)),
            torch.from_numpy(normalisation.shift.reshape(shape)),
            torch.from_numpy(np.concatenate(places).astype(np.int32 if values.size < 2**31 else np.int64)),
            torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *(pixels.ravel() for *_, pixels in given)])),
            counts,
            changes,
        )

    def pixels(self) -> Tensor:
        """The changed, normalised images with the given pixels, float32 in the layout of `values`, on their device."""
        values = self.values if self.changes is None else self.changes.applied(self.values)
        pixels = torch.empty(values.shape, dtype=torch.float32, device=values.device)
        size = max(1, _IN_CACHE // pixels[0].numel()) if pixels.device.type == "cpu" else len(pixels)
        for levels, some in zip(values.split(size), pixels.split(size), strict=True):
            some.copy_(levels).mul_(self.scale).add_(self.shift)
        pixels.view(-1).scatter_(0, self.places.long(), self.given)
        return pixels

    def changed(self, change: Callable[[Tensor], Tensor]) -> Levels:
        """A copy with each tensor changed, for another device or kind of memory."""
        return replace(
            self,
            values=change(self.values),
            scale=change(self.scale),
            shift=change(self.shift),
            places=change(self.places),
            given=change(self.given),
            changes=None if self.changes is None else self.changes.changed(change),
        )

    def at(self, rows: Sequence[slice]) -> Levels:
        """The images of some ranges of rows, joined."""
        ends = np.concatenate([[0], self.counts.cumsum()]).tolist()
        channels = self.values.shape[1] if self.changes is None else self.changes.channels
        size = self.values[0].numel() // self.values.shape[1] * channels
        places, given, done = [], [], 0
        for some in rows:
            theirs = slice(ends[some.start], ends[some.stop])
            places.append(self.places[theirs] + (done - some.start) * size)
            given.append(self.given[theirs])
            done += some.stop - some.start
        return replace(
            self,
            values=torch.cat([self.values[some] for some in rows]),
            places=torch.cat(places),
            given=torch.cat(given),
            counts=np.concatenate([self.counts[some] for some in rows]),
            changes=None if self.changes is None else self.changes.at(rows),
        )
