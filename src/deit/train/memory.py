"""The memory that a step needs, measured on a few images, so that a run knows before its first step whether it fits.

A system without enough memory kills the process, so there is no error that a run could survive. The bytes that tensors
take are followed through the step, once for one pair of images and once for two. Both go through the same operations,
and what an operation leaves in memory is linear in the number of images. So the course of a larger number follows, and
the need is its peak. Counted are tensors alone, not what libraries take for themselves meanwhile.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deit.data.batches import Batch

_MARGIN, _SPARE = 1.1, 2**29
"""Bytes that are planned for each byte of tensors, and bytes that are planned for libraries and gaps. On a CPU, steps
of DeiT-Ti with 64 images took 0.1 to 0.75 GiB more than their tensors."""
_PAIRS = (1, 2)
"""The numbers of pairs of images that are measured."""
_COST = 0.02
"""The largest part of a run's images that are computed for the measurement."""


@dataclass(frozen=True)
class Need:
    """The bytes that a step needs beyond those of the model."""

    images: tuple[int, int]
    """Two numbers of images."""
    courses: tuple[list[int], list[int]]
    """For each, the bytes in use after every operation."""

    def __call__(self, images: int) -> int:
        (few, more), (low, high) = self.images, self.courses
        steps = (images - few) / (more - few)
        # At the beginning, erasing and mixing take an operation for each box, so the courses are equal from their ends.
        pairs = [*zip(reversed(low), reversed(high), strict=False), (max(low), max(high))]
        return round(max(one + steps * (other - one) for one, other in pairs))


def worthwhile(images: int, pairs: int) -> bool:
    """Whether a run of so many images is long enough to measure, and a process' share of a batch large enough."""
    return pairs > max(_PAIRS) and 2 * sum(_PAIRS) <= _COST * images


def measured(compute: Callable[[Batch], object], batch: Batch) -> Need:
    """Measures `compute` on one pair of a batch and on two."""
    courses = []
    for pairs in _PAIRS:
        few = batch.pairs(pairs)
        with _Followed() as followed:
            compute(few)
        courses.append(followed.course)
    return Need((2 * _PAIRS[0], 2 * _PAIRS[1]), (courses[0], courses[1]))


class _Followed(TorchDispatchMode):
    """Follows the bytes of the tensors that are made within it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.used = 0
        self.course: list[int] = [0]
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for given in tree_leaves((args, kwargs)):
            self._meet(given, new=False)  # made before
        found = func(*args, **(kwargs or {}))
        for made in tree_leaves(found):
            self._meet(made, new=True)
        self.course.append(self.used)
        return found

    def _meet(self, value: Any, new: bool) -> None:
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if new else 0
        if key in self.known:
            return
        self.known.add(key)
        self.used += size
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.used -= size


@dataclass(frozen=True)
class Plan:
    """The number of parts in which a step's batch is computed."""

    parts: int
    whole: int
    """Bytes that the step needs without a further division."""
    need: int
    """Bytes that it needs in these parts."""
    room: int | None
    """Bytes that are free; None if it isn't known."""

    @property
    def fits(self) -> bool:
        return self.room is None or self.need <= self.room


def plan(need: Need, images: int, parts: int, divides: bool, room: int | None) -> Plan:
    """The smallest number of parts of a batch of `images`, doubled from `parts` on, that fits into the free bytes.

    If no number fits, it is the largest. Mirror images stay together. `divides`: whether there may be more parts.
    """
    pairs = (images + 1) // 2
    counts = [parts]
    while divides and counts[-1] < pairs:
        counts.append(2 * counts[-1])
    needs = [need(2 * -(-pairs // min(count, pairs))) for count in counts]
    for count, bytes_ in zip(counts, needs, strict=True):
        if room is None or _MARGIN * bytes_ + _SPARE <= room:
            return Plan(count, needs[0], bytes_, room)
    return Plan(counts[-1], needs[0], needs[-1], room)
