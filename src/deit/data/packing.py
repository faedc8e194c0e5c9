"""Writes packs: the images of a folder or list in a few tar files, which the commands read as they read the folder."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import tarfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from deit import files, host, locks
from deit.data.batches import Faults, fault
from deit.data.folders import SPLITS, contents, has_split, read_parts
from deit.image import packs
from deit.image.decode import ImageError, convert, decode, reading
from deit.image.pixels import shrunk

SHARD_BYTES = 2**28
"""Size from which a shard is full, in bytes."""
QUALITY = 90
"""Quality of the JPEG files that images are resized into, if nobody says another."""


class _Image(NamedTuple):
    """An image to pack."""

    file: Path
    part: str
    label: int


class _Packed(NamedTuple):
    """The bytes of an image, and the suffix of their format if they were written anew."""

    data: bytes
    suffix: str


def pack(
    data: str | Path,
    out: str | Path,
    *,
    short_side: int | None = None,
    quality: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Writes all labelled images of a folder or list as a pack (see `deit.image.packs`). Returns sentences about it.

    Each image lies in a shard as `NUMBER.SUFFIX` beside `NUMBER.cls`, its class as a number, as WebDataset expects it.
    Images that can't be read are left out.

    Args:
        data: a folder or a list, as for `read_data`, or another pack.
        out: a folder that doesn't exist yet. It appears when it is whole.
        short_side: images whose short side is longer are resized to it, in pixels, and become JPEG files. The bytes of
            all others are copied unchanged.
        quality: of these JPEG files, 1 to 100; None is `QUALITY`.
        progress: called after each image, with the number of images in the pack so far and of all images.

    Raises `ValueError` or an `OSError` that says what is expected, and `BadImages` if more than 1 % can't be read.
    """
    data, out = Path(data), Path(out)
    quality = _quality(short_side, quality)
    _refuse_place(data, out)
    parts = read_parts(data)
    classes = sorted({part.classes[label] for part in parts.values() for label in part.labels})
    number_of = {name: number for number, name in enumerate(classes)}
    named = len(parts) > 1 or has_split(data, "train")
    images = [
        _Image(file, name, number_of[part.classes[label]])
        for name in SPLITS
        if (part := parts.get(name)) is not None
        for file, label in zip(part.files, part.labels, strict=True)
    ]
    faults = Faults(len(images))
    with locks.held(out, lock=locks.beside(out)):
        files.sweep(out.parent, out.name)
        _refuse_existing(out)  # because another process may just have finished it
        with files.replacing_folder(out, check=_refuse_existing) as folder:
            rows = _Rows(data, images, classes)
            with closing(_Shards(folder)) as shards:
                for image, packed in _prepared(images, short_side, quality, faults):
                    shard, offset = shards.add(image, packed)
                    rows.add(image, packed, shard, offset, named)
                    if progress is not None:
                        progress(len(rows.numbers), len(images))
            _refuse_lost(images, classes, faults)
            rows.write(folder, shards.sizes(), short_side, quality)
    return _said(out, rows, images, shards, faults, short_side)


def _quality(short_side: int | None, quality: int | None) -> int:
    if short_side is not None and short_side < 1:
        raise ValueError(f"--short-side is a number of pixels, at least 1, found {short_side}")
    if quality is not None and short_side is None:
        raise ValueError("--quality is for images that are resized; give --short-side too, or leave --quality out")
    if quality is not None and not 1 <= quality <= 100:
        raise ValueError(f"--quality goes from 1 to 100, found {quality}")
    return QUALITY if quality is None else quality


def _refuse_place(data: Path, out: Path) -> None:
    _refuse_existing(out)
    if data.is_dir() and out.resolve().is_relative_to(data.resolve()):
        raise ValueError(f"--out {out} lies in {data}, where it would count as images; choose another --out")


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists already, and a run may rely on it; remove it, or choose another --out")


def _refuse_lost(images: Iterable[_Image], classes: list[str], faults: Faults) -> None:
    """Refuses a pack that lacks a class, because a model trained on it would have other classes."""
    read: dict[tuple[str, int], bool] = {}
    for image in images:
        read[image.part, image.label] = read.get((image.part, image.label)) or str(image.file) not in faults.reasons
    if lost := [key for key, found in read.items() if not found]:
        part, label = lost[0]
        reasons = "; ".join(map(" ".join, faults.reasons.items()))
        raise ValueError(
            f"none of the {part} images of {classes[label]!r} can be read: {reasons}. Replace such files, or leave the "
            "class out"
        )


def _prepared(
    images: Iterable[_Image], short_side: int | None, quality: int, faults: Faults
) -> Iterator[tuple[_Image, _Packed]]:
    """Yields the images that can be read, in order. Threads prepare them, a few ahead of what is taken."""
    threads = host.cores()
    remaining = iter(images)
    with ThreadPoolExecutor(threads) as pool:
        ahead = deque(
            (image, pool.submit(_packed, image.file, short_side, quality))
            for image in itertools.islice(remaining, 2 * threads)
        )
        try:
            while ahead:
                image, future = ahead.popleft()
                try:
                    packed = future.result()
                except ImageError as error:
                    faults.add([fault(image.file, error)])
                else:
                    yield image, packed
                ahead += (
                    (following, pool.submit(_packed, following.file, short_side, quality))
                    for following in itertools.islice(remaining, 1)
                )
        finally:
            pool.shutdown(cancel_futures=True)


def _packed(file: Path, short_side: int | None, quality: int) -> _Packed:
    """The bytes of an image as the pack holds them. All of it is decoded, because a fault may be anywhere in it."""
    decoded = decode(file, short_side)
    name = str(file)
    with reading(name):
        image = convert(decoded.image, "L" if decoded.image.mode == "L" else "RGB", name)
        if short_side is None or min(decoded.full) <= short_side:
            return _Packed(contents(file), "")
        written = io.BytesIO()
        shrunk(decoded._replace(image=image), short_side).save(written, "JPEG", quality=quality)
    return _Packed(written.getvalue(), ".jpg")


class _Shards:
    """Writes images into tar files, a set of them for each part."""

    def __init__(self, folder: Path):
        self.folder, self.names, self.part, self.images = folder, list[str](), "", 0
        self.file: IO[bytes] | None = None
        self.tar: tarfile.TarFile | None = None

    def add(self, image: _Image, packed: _Packed) -> tuple[int, int]:
        """Returns the number of the shard, and where in it the image begins."""
        if self.file is None or image.part != self.part or self.file.tell() >= SHARD_BYTES:
            self._begin(image.part)
        assert self.file is not None
        suffix = packed.suffix or image.file.suffix.lower()
        suffix = ".jpg" if suffix in (".jpeg", ".jpe", ".jfif") else suffix
        offset = self.file.tell() + packs.BLOCK
        self._write(f"{self.images:09}{suffix}", packed.data)
        self._write(f"{self.images:09}.cls", str(image.label).encode())
        self.images += 1
        return len(self.names) - 1, offset

    def _begin(self, part: str) -> None:
        self.close()
        number = sum(name.startswith(f"{part}-") for name in self.names)
        self.names.append(f"{part}-{number:06}.tar")
        self.part = part
        self.file = open(self.folder / self.names[-1], "wb")  # noqa: SIM115 (closed by `close`)
        self.tar = tarfile.TarFile(fileobj=self.file, mode="w", format=tarfile.USTAR_FORMAT)

    def _write(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        assert self.tar is not None
        self.tar.addfile(member, io.BytesIO(data))

    def close(self) -> None:
        if self.tar is not None and self.file is not None:
            self.tar.close()
            self.file.close()
            self.tar = self.file = None

    def sizes(self) -> dict[str, int]:
        return {name: (self.folder / name).stat().st_size for name in self.names}


class _Rows:
    """The index, as it grows."""

    def __init__(self, data: Path, images: list[_Image], classes: list[str]):
        self.classes = classes
        self.of_folder = packs.open_pack(data).of_folder if packs.is_pack(data) else data.is_dir()
        base = data if data.is_dir() else os.path.commonpath({os.path.dirname(image.file) for image in images})
        self.base = os.path.abspath(base)
        self.files = {self._name(image) for image in images}
        self.names: dict[bytes, None] = {}
        self.numbers: list[tuple[int, int, int, int, int, int]] = []
        self.resized = 0

    def _name(self, image: _Image) -> bytes:
        return os.fsencode(os.path.relpath(os.path.abspath(image.file), self.base).replace(os.sep, "/"))

    def add(self, image: _Image, packed: _Packed, shard: int, offset: int, named: bool) -> None:
        name = self._name(image)
        self.resized += bool(packed.suffix)
        if packed.suffix and not name.lower().endswith((b".jpg", b".jpeg")):
            name += packed.suffix.encode()
            while name in self.files or name in self.names:  # a.png is a JPEG file now, and there is an a.png.jpg
                name += packed.suffix.encode()
        self.names[name] = None
        part = packs.PARTS.index(image.part) if named else 0
        self.numbers.append((part, image.label, shard, offset, len(packed.data), zlib.crc32(packed.data)))

    def write(self, folder: Path, shards: dict[str, int], short_side: int | None, quality: int) -> None:
        from safetensors.numpy import save

        columns = np.array(self.numbers, np.int64).T
        index = save(
            {
                "names": np.frombuffer(b"".join(self.names), np.uint8),
                "ends": np.cumsum([len(name) for name in self.names], dtype=np.int64),
                **{
                    name: np.ascontiguousarray(column, packs.ARRAYS[name])
                    for name, column in zip(("part", "label", "shard", "offset", "length", "crc"), columns, strict=True)
                },
            }
        )
        (folder / packs.INDEX).write_bytes(index)
        files.write_json(
            folder / packs.ABOUT,
            {
                "format": packs.FORMAT,
                "deit": host.VERSION,
                "of": "folder" if self.of_folder else "list",
                "images": len(self.numbers),
                "resized": self.resized,
                "short_side": short_side,
                "quality": None if short_side is None else quality,
                "classes": self.classes,
                "shards": [{"name": name, "bytes": size} for name, size in shards.items()],
                "index_sha256": hashlib.sha256(index).hexdigest(),
            },
        )


def _said(
    out: Path, rows: _Rows, images: list[_Image], shards: _Shards, faults: Faults, short_side: int | None
) -> list[str]:
    counts = Counter(image.part for image in images if str(image.file) not in faults.reasons)
    found = [
        f"{out}: " + ", ".join(f"{counts[name]:,} {name}" for name in SPLITS if counts[name]) + " images in "
        f"{len(shards.names):,} {'shard' if len(shards.names) == 1 else 'shards'}"
    ]
    if short_side is not None:
        found.append(f"{rows.resized:,} images were resized to a short side of {short_side} pixels")
    found += [f"left out: {file} {reason}" for file, reason in faults.reasons.items()]
    return found
