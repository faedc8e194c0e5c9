"""Decoded images in memory, which all loader processes of a training process share.

Each view of an image needs its pixels. If small images are decoded once, a view costs half as much. Loader processes
take the images in any order, so each of them would sooner or later decode every image for itself, and would keep a copy
of its own.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from deit.image.jpeg import Pixels

_CHANNELS = 3
_PICTURE = 0
"""What stands for the orientation of an image that is no JPEG. EXIF's orientations are 1 to 8."""
_ROW = np.dtype([(name, np.int64) for name in ("there", "start", "rows", "columns", "orientation")])
"""Where an image is: whether it is there, its first byte, its size as stored, its orientation."""


class Kept:
    """RGB images by number, as long as there is room for them.

    Args:
        images: how many numbers there are.
        room: bytes of all pixels together.
        processes: how many loader processes will share them. They must be forks of this process. In any other process
            a copy begins empty, with its part of the room.
    """

    def __init__(self, images: int, room: int, processes: int):
        self.images, self.room, self.processes = images, room, processes
        self.own: dict[int, Pixels | Image.Image] = {}
        self.spent = 0
        """Bytes of the images in `own`."""
        self.shared = _Shared(images, room) if processes and _forks() else None

    def __getstate__(self) -> dict[str, Any]:
        return {"images": self.images, "room": self.room // max(1, self.processes)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state, processes=0)  # type: ignore[misc]

    def get(self, index: int) -> Pixels | Image.Image | None:
        """The image of this number; None if it isn't kept."""
        return self.own.get(index) if self.shared is None else self.shared.get(index)

    def fits(self, height: int, width: int) -> bool:
        """Whether there is room for one more image of this size."""
        spent = self.spent if self.shared is None else self.shared.spent
        return spent + height * width * _CHANNELS <= self.room

    def add(self, index: int, found: Pixels | Image.Image) -> None:
        """Keeps an image, if there is room. `Pixels` are those of the whole file, not of a scaled one."""
        stored = found.stored if isinstance(found, Pixels) else np.asarray(found)
        assert stored.ndim == _CHANNELS, "an RGB image was expected"
        if self.shared is not None:
            self.shared.add(index, stored, found.orientation if isinstance(found, Pixels) else _PICTURE)
        elif self.spent + stored.size <= self.room:
            self.own[index] = found
            self.spent += stored.size


def _forks() -> bool:
    """Whether new processes are forks of this one. To ask without `allow_none` would settle the question for good."""
    chosen = multiprocessing.get_start_method(allow_none=True)
    return (chosen or multiprocessing.get_all_start_methods()[0]) == "fork"


class _Shared:
    """Images in memory that forks of a process share. The system gives a page of it when it is first written to."""

    def __init__(self, images: int, room: int):
        self.pixels = np.frombuffer(mmap.mmap(-1, max(1, room)), np.uint8)
        table = mmap.mmap(-1, max(1, images) * _ROW.itemsize)
        self.table = np.frombuffer(table, _ROW)
        self.end = np.frombuffer(mmap.mmap(-1, np.dtype(np.int64).itemsize), np.int64)
        self.file, name = tempfile.mkstemp()
        os.unlink(name)
        weakref.finalize(self, os.close, self.file)
        self.seen = np.zeros(images, bool)
        """Images that this process knows to be there completely."""

    @property
    def spent(self) -> int:
        return int(self.end[0])

    def get(self, index: int) -> Pixels | Image.Image | None:
        if not self.table[index]["there"]:
            return None
        if not self.seen[index]:
            with self._locked():  # so that this process sees what another one wrote before it said that it is there
                self.seen[index] = True
        _, start, rows, columns, orientation = self.table[index].item()
        stored = self.pixels[start : start + rows * columns * _CHANNELS].reshape(rows, columns, _CHANNELS)
        return Image.fromarray(stored) if orientation == _PICTURE else Pixels.whole(stored, orientation)

    def add(self, index: int, stored: np.ndarray, orientation: int) -> None:
        with self._locked():
            start, row = self.spent, self.table[index]
            if row["there"] or start + stored.size > len(self.pixels):
                return
            self.end[0] = start + stored.size
            self.pixels[start : start + stored.size] = stored.ravel()
            self.table[index] = (0, start, *stored.shape[:2], orientation)
            self.table[index]["there"] = 1  # last, because the process may be killed at any point

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps other processes waiting. The system unlocks the file if this one is killed."""
        import fcntl  # only where processes are forks

        fcntl.lockf(self.file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self.file, fcntl.LOCK_UN)
