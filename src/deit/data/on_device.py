"""The changes of training images, made of a whole batch on the device that trains. `augment` defines what they are.

B images, N changes of all images together, G images that one operation changes at once. A loader process draws, crops
and resizes, and hands the images over with the numbers that describe their changes. The first changes of all images are
made together, then the second ones, each operation at once for all images that it is drawn for.

The arithmetic is Pillow's: levels of 8 bits between changes, and within a change whole numbers or float32 where Pillow
takes whole numbers or float32. Places of pixels are whole numbers too, with 36 bits after the point. There is no sum of
fractions over pixels and no function but the four basic ones, each rounded by itself, so an image's values depend
neither on the other images nor on the device. They are those of Pillow to the bit, except for maps, whose kernel Pillow
computes in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deit.data.policies import Change, Fill, Kind

_TOGETHER = {"cpu": 2**18, "cuda": 2**24}
"""Number of levels that are changed at once: on a CPU, few enough to stay in its cache, and on a GPU, few enough to
take no more than a gigabyte."""
_POINT = 36
"""Bits of a place after the point. 26 remain before it."""
_PART = 24
"""Bits of a fraction that float32 holds."""
_ONE_AXIS = len(Kind)
"""A `MAP` that moves each row along itself, by a distance of its own. `_ONE_AXIS + 1` does the same to columns."""
_LUMA = (19595, 38470, 7471)
"""Shares of red, green and blue in Pillow's grey, of 65,536."""


@dataclass(frozen=True)
class Changes:
    """The changes of a batch of RGB images, in the order of the images, and for each image in their own order."""

    kinds: np.ndarray
    """(N,) int."""
    counts: np.ndarray
    """(B,) int: number of changes of each image."""
    numbers: Tensor
    """(N, 9) int64. Of a map: its matrix, and the colour of uncovered pixels. Of a blur: the weights of a pixel and of
    its neighbours at distances 1 and 2."""
    factors: Tensor
    """(N,) float32, of enhancements."""
    tables: Tensor
    """(N, 256) uint8: what takes the place of each level."""
    channels: int
    """1 for grey results, 3 for RGB."""

    @classmethod
    def of(cls, drawn: Sequence[Sequence[Change]], size: tuple[int, int], fill: Fill, channels: int) -> Changes:
        """Joins the changes of images of `size` (height, width). `fill` is the colour that maps take."""
        described = [_described(change, size, fill) for changes in drawn for change in changes]
        count = len(described)
        kinds, numbers = np.zeros(count, np.int64), np.zeros((count, 9), np.int64)
        factors, tables = np.zeros(count, np.float32), np.zeros((count, 256), np.uint8)
        for at, found in enumerate(described):
            kinds[at], factors[at] = found.kind, found.factor
            numbers[at, : len(found.numbers)] = found.numbers
            tables[at, : len(found.table)] = found.table
        return cls(
            kinds,
            np.array([len(changes) for changes in drawn], np.int64),
            torch.from_numpy(numbers),
            torch.from_numpy(factors),
            torch.from_numpy(tables),
            channels,
        )

    def changed(self, change: Callable[[Tensor], Tensor]) -> Changes:
        """A copy with each tensor changed, for another device or kind of memory."""
        return replace(self, numbers=change(self.numbers), factors=change(self.factors), tables=change(self.tables))

    def at(self, rows: Sequence[slice]) -> Changes:
        """The changes of some ranges of images, joined."""
        ends = np.concatenate([[0], self.counts.cumsum()]).tolist()
        theirs = [slice(ends[some.start], ends[some.stop]) for some in rows]
        return replace(
            self,
            kinds=np.concatenate([self.kinds[some] for some in theirs]),
            counts=np.concatenate([self.counts[some] for some in rows]),
            numbers=torch.cat([self.numbers[some] for some in theirs]),
            factors=torch.cat([self.factors[some] for some in theirs]),
            tables=torch.cat([self.tables[some] for some in theirs]),
        )

    def applied(self, levels: Tensor) -> Tensor:
        """The changed images, (B, channels, height, width) uint8, of `levels` (B, 3, height, width) uint8.

        Computed on the device of `levels` without waiting for it.
        """
        groups = list(self._groups())
        if groups:
            levels = levels.clone()
            rows, places = (
                torch.from_numpy(np.concatenate(each)).to(levels.device, non_blocking=True)
                for each in zip(*((rows, places) for _, rows, places in groups), strict=True)
            )
            size = max(1, _TOGETHER[levels.device.type] // levels[0].numel())
            start = 0
            for kind, images, _ in groups:
                end = start + len(images)
                for row, place in zip(rows[start:end].split(size), places[start:end].split(size), strict=True):
                    given = _Given(self.numbers[place], self.factors[place], self.tables[place])
                    levels.index_copy_(0, row, _COMPUTED[kind](levels[row], given))
                start = end
        return levels if self.channels == 3 else _grey(levels)

    def _groups(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """The kind, the images and the places among the changes of each group, in the order of computation."""
        first = self.counts.cumsum() - self.counts
        for turn in range(int(self.counts.max(initial=0))):
            images = np.flatnonzero(self.counts > turn)
            places = first[images] + turn
            kinds = self.kinds[places]
            for kind in np.unique(kinds).tolist():
                yield kind, images[kinds == kind], places[kinds == kind]


class _Description(NamedTuple):
    kind: int
    numbers: tuple[int, ...] = ()
    factor: float = 0.0
    table: Sequence[int] = ()


def _described(change: Change, size: tuple[int, int], fill: Fill) -> _Description:
    operation, argument = change
    kind = operation.kind
    if kind == Kind.TABLE:
        return _Description(kind, table=[min(max(level, 0), 255) for level in operation.table(argument)])
    if kind == Kind.BLUR:
        return _Description(kind, _blur_weights(argument))
    if kind != Kind.MAP:
        return _Description(kind, factor=argument)
    a, b, c, d, e, f = operation.matrix(argument, size[1], size[0])
    # Those of a coordinate are multiplied by 2 x + 1, because the middle of pixel x is at x + 1/2. What is a
    # little outside of the left or upper border stays outside, and what is a little inside of the others does not stay
    # inside, because float64 is finer than the numbers here at 0 and coarser at the width.
    slopes = [round(float(each) * 2 ** (_POINT - 1)) for each in (a, b, d, e)]
    shifts = [(math.floor if each < 0 else round)(float(each) * 2**_POINT) for each in (c, f)]
    one = 2 ** (_POINT - 1)
    along_x = slopes[0] == one and slopes[2:] == [0, one] and shifts[1] == 0
    along_y = slopes[:2] == [one, 0] and slopes[3] == one and shifts[0] == 0
    numbers = (*slopes[:2], shifts[0], *slopes[2:], shifts[1], *((0, 0, 0) if operation.black else fill))
    return _Description(_ONE_AXIS if along_x else _ONE_AXIS + 1 if along_y else kind, numbers)


def _blur_weights(radius: float) -> tuple[int, int, int]:
    """The weights of a box blur, of 2 ** 24, of which three make Pillow's Gaussian blur of a radius up to 2.

    Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box filtering", in the float32 of
    Pillow.
    """
    variance = np.float32(radius) * np.float32(radius) / np.float32(3)
    length = np.float32(math.sqrt(12.0 * float(variance) + 1.0))
    whole = np.float32(math.floor((float(length) - 1.0) / 2.0))
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    reach = whole + part / (6 * (variance - (whole + 1) * (whole + 1)))
    assert 0 <= reach < 2, f"a radius up to 2 was expected, found {radius}"
    inner = int(np.float32(2**24) / (reach * 2 + 1))
    if reach < 1:
        return inner, (2**24 - inner) // 2, 0
    return inner, inner, (2**24 - 3 * inner) // 2


class _Given(NamedTuple):
    """What describes the changes of a group, as in `Changes`."""

    numbers: Tensor
    factors: Tensor
    tables: Tensor


# Each function below computes G images, (G, 3, height, width) uint8, and returns their changed levels.


def _mirrored(images: Tensor, _: _Given) -> Tensor:
    return images.flip(3)


# -------------------------------------------------------------------------------------------------------------- tables


def _looked_up(images: Tensor, tables: Tensor) -> Tensor:
    """Replaces the levels by their entries in `tables`, (G, 1 or 3, 256)."""
    return tables.expand(-1, 3, -1).gather(2, images.flatten(2).long()).view_as(images)


def _tabled(images: Tensor, given: _Given) -> Tensor:
    return _looked_up(images, given.tables[:, None])


def _auto_contrasted(images: Tensor, _: _Given) -> Tensor:
    """Stretches the levels of each channel to 0 to 255, by a table that Pillow computes in float64."""
    lowest, highest = (each.double()[..., None] for each in images.flatten(2).aminmax(dim=2))  # (G, 3, 1)
    level = torch.arange(256, dtype=torch.float64, device=images.device)
    span = highest - lowest
    scale = torch.full_like(span, 255.0) / span.clamp(min=1)
    table = (level * scale + -lowest * scale).clamp(0, 255)
    return _looked_up(images, torch.where(span > 0, table, level).to(torch.uint8))


def _equalized(images: Tensor, _: _Given) -> Tensor:
    levels = images.flatten(2)
    counts = torch.zeros(*levels.shape[:2], 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, levels.long(), torch.ones((), dtype=torch.int64, device=images.device).expand(levels.shape))
    highest = levels.amax(2, keepdim=True).long()
    step = (levels.shape[2] - counts.gather(2, highest)).div(255, rounding_mode="floor")  # (G, 3, 1)
    below = counts.cumsum(2) - counts
    divided = (step.div(2, rounding_mode="floor") + below).div(step.clamp(min=1), rounding_mode="floor").clamp(max=255)
    same = torch.arange(256, device=images.device)
    return _looked_up(images, torch.where(step > 0, divided, same).to(torch.uint8))


# -------------------------------------------------------------------------------------------------------- enhancements


def _blended(first: Tensor | float, images: Tensor, factors: Tensor) -> Tensor:
    """The levels at `factors` of the way from `first` to the images, or beyond them. Fractions are cut off."""
    found = images.float().sub_(first).mul_(factors[:, None, None, None]).add_(first)
    return found.clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """(G, 1, height, width) uint8."""
    red, green, blue = images.int().split(1, dim=1)
    return ((red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2] + 2**15) >> 16).to(torch.uint8)


def _greyed(images: Tensor, _: _Given) -> Tensor:
    return _grey(images).expand_as(images)


def _brightened(images: Tensor, given: _Given) -> Tensor:
    return _blended(0.0, images, given.factors)


def _contrasted(images: Tensor, given: _Given) -> Tensor:
    grey = _grey(images).flatten(1)
    doubled = 2 * grey.sum(1, dtype=torch.int64) + grey.shape[1]  # of the mean, and a half to round it
    mean = doubled.div(2 * grey.shape[1], rounding_mode="floor")
    return _blended(mean.float()[:, None, None, None], images, given.factors)


def _coloured(images: Tensor, given: _Given) -> Tensor:
    return _blended(_grey(images).float(), images, given.factors)


def _sharpened(images: Tensor, given: _Given) -> Tensor:
    """Away from the mean of the neighbours, in which the pixel itself weighs five times. The edges stay."""
    smooth = images.float()
    if min(images.shape[2:]) >= 3:
        levels = images.short()
        rows = levels[:, :, :-2] + levels[:, :, 1:-1] + levels[:, :, 2:]
        total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * levels[:, :, 1:-1, 1:-1]
        # the sum divided by 13, rounded; there are no ties, and no result is nearer to one than 1/26
        smooth[:, :, 1:-1, 1:-1] = ((2 * total + 13).float() / 26).floor()
    return _blended(smooth, images, given.factors)


def _blurred(images: Tensor, given: _Given) -> Tensor:
    """Three box blurs along rows and three along columns, with weights of 24 bits. Levels are centred, so that the sums
    stay within 32 bits."""
    weights = given.numbers[:, :3].int()[:, :, None, None, None]  # (G, 3, 1, 1, 1)
    own, near, far = weights.unbind(1)
    missing = 2**24 - own - 2 * (near + far)  # 0 or 1, because Pillow cuts off fractions
    levels = images.int() - 128
    for axis in (3, 3, 3, 2, 2, 2):
        length = levels.shape[axis]
        ends = levels.narrow(axis, 0, 1), levels.narrow(axis, length - 1, 1)
        wide = torch.cat([ends[0], ends[0], levels, ends[1], ends[1]], axis)
        at = [wide.narrow(axis, start, length) for start in range(5)]
        total = levels * own + (at[1] + at[3]) * near + (at[0] + at[4]) * far
        levels = (total + (2**23 - 128 * missing)) >> 24
    return (levels + 128).to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------- maps


def _cubic(values: Sequence[Tensor], part: Tensor) -> Tensor:
    """Keys' kernel with a = -1 at `part` of the way from the second of four values to the third, in Horner's form, as
    Pillow has it. If all four are equal, so is the result."""
    v1, v2, v3, v4 = values
    slope = v1 - v2
    third = 2 * slope + v3 - v4
    return v2 + part * (v3 - v1 + part * (third + part * (slope - third)))


def _fraction(place: Tensor) -> Tensor:
    """float32, at least 0 and below 1."""
    return ((place >> (_POINT - _PART)) & (2**_PART - 1)).float() * 2.0**-_PART


def _painted(found: Tensor, inside: Tensor, colour: Tensor) -> Tensor:
    """Levels with fractions cut off, and `colour` (G, 3) where they come from outside of the image."""
    levels = found.clamp_(0, 255).to(torch.uint8)
    return torch.where(inside[:, None], levels, colour.to(torch.uint8)[:, :, None, None])


def _slid(images: Tensor, slope: Tensor, shift: Tensor, colour: Tensor) -> Tensor:
    """Moves each row along itself. Its distance is `slope` times its own place, plus `shift`; both are (G,)."""
    rows, columns = images.shape[2:]
    middle = 2 * torch.arange(rows, device=images.device) + 1
    by = (slope[:, None] * middle + shift[:, None])[..., None]  # (G, rows, 1)
    # the four neighbours of all pixels of a row begin one pixel to the left of it, and end two to the right
    reach = torch.arange(-1, columns + 2, device=images.device)
    at = (reach + (by >> _POINT)).clamp_(0, columns - 1)[:, None].expand(-1, 3, -1, -1)
    taps = images.gather(3, at).float()  # (G, 3, rows, columns + 3)
    found = _cubic([taps[..., start : start + columns] for start in range(4)], _fraction(by)[:, None])
    place = reach[1:-2] + ((by + 2 ** (_POINT - 1)) >> _POINT)
    return _painted(found, (place >= 0) & (place < columns), colour)


def _slid_rows(images: Tensor, given: _Given) -> Tensor:
    return _slid(images, given.numbers[:, 1], given.numbers[:, 2], given.numbers[:, 6:])


def _slid_columns(images: Tensor, given: _Given) -> Tensor:
    turned = images.transpose(2, 3).contiguous()
    return _slid(turned, given.numbers[:, 3], given.numbers[:, 5], given.numbers[:, 6:]).transpose(2, 3)


def _mapped(images: Tensor, given: _Given) -> Tensor:
    rows, columns = images.shape[2:]
    half, slope = 2 ** (_POINT - 1), given.numbers[:, :6, None, None].unbind(1)  # each (G, 1, 1)
    across = 2 * torch.arange(columns, device=images.device) + 1
    down = 2 * torch.arange(rows, device=images.device)[:, None] + 1
    x, y = (slope[k] * across + (slope[k + 1] * down + slope[k + 2]) for k in (0, 3))  # (G, rows, columns)
    inside = (x >= 0) & (x < columns << _POINT) & (y >= 0) & (y < rows << _POINT)
    x, y = x.sub_(half), y.sub_(half)
    left, top = (x >> _POINT).clamp_(-1, columns - 1), y >> _POINT
    # Four neighbours in a row are one number of 32 bits, which is fetched at once: `fours` holds them for each first
    # neighbour from -2 on.
    reach = torch.arange(-2, columns + 2, device=images.device).clamp_(0, columns - 1)
    fours = images[..., reach].unfold(3, 4, 1).contiguous().view(torch.int32).flatten(2)  # (G, 3, rows * (columns + 1))
    part, lines = _fraction(x)[:, None], []
    for line in range(-1, 3):
        at = (top + line).clamp_(0, rows - 1).mul_(columns + 1).add_(left).add_(1).flatten(1)
        taps = fours.gather(2, at[:, None].expand(-1, 3, -1)).view(torch.uint8).view(*images.shape, 4)
        lines.append(_cubic([each.float() for each in taps.unbind(-1)], part))
    return _painted(_cubic(lines, _fraction(y)[:, None]), inside, given.numbers[:, 6:])


_COMPUTED: dict[int, Callable[[Tensor, _Given], Tensor]] = {
    Kind.MIRROR: _mirrored,
    Kind.TABLE: _tabled,
    Kind.MAP: _mapped,
    Kind.AUTO_CONTRAST: _auto_contrasted,
    Kind.EQUALIZE: _equalized,
    Kind.BRIGHTNESS: _brightened,
    Kind.CONTRAST: _contrasted,
    Kind.COLOR: _coloured,
    Kind.SHARPNESS: _sharpened,
    Kind.GREY: _greyed,
    Kind.BLUR: _blurred,
    _ONE_AXIS: _slid_rows,
    _ONE_AXIS + 1: _slid_columns,
}
