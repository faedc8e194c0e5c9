"""Packs: many images in a few tar files, with an index beside them.

A pack is a folder with `deit-pack.json`, `index.safetensors` and shards, which are ordinary tar files. Its images are
opened by paths like those of files, `PACK/train/cat/a.jpg`, although there is no folder `PACK/train`: where no file is,
`find` looks whether a folder above is a pack. So paths in lists, reports and results stay readable, and whatever opens
images by their paths opens those of packs.

N images, in the order of the index.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from deit import files

ABOUT = "deit-pack.json"
INDEX = "index.safetensors"
FORMAT = 1
PARTS = ("", "train", "val", "test")
"""The parts that an image may belong to; empty if the pack has none."""
BLOCK = 512
"""Bytes of a tar header. Contents begin at multiples of it."""

ARRAYS = {
    "names": np.uint8,  # the paths in the pack, one after the other
    "ends": np.int64,  # (N,) where in `names` each of them ends
    "part": np.uint8,  # (N,) number in `PARTS`
    "label": np.int64,  # (N,) number of the class
    "shard": np.int64,  # (N,) number of the shard
    "offset": np.int64,  # (N,) where in the shard the image begins, in bytes
    "length": np.int64,  # (N,) its size in bytes
    "crc": np.uint32,  # (N,) CRC-32 of its bytes
}
_LONGEST = 4096
"""Most bytes of a path in a pack."""


class BadPack(ValueError):
    """A pack is damaged or is none. The message says what was found and what to do."""


@dataclass(frozen=True)
class Entry:
    """An image of a pack."""

    shard: Path
    shard_bytes: int
    offset: int
    length: int
    crc: int

    def read(self) -> bytes:
        """The bytes of the image. Each call opens the shard anew, so any number of processes and threads may read.

        Raises `OSError` if the shard can't be opened, and `BadPack` if it has changed since the pack was written.
        """
        with open(self.shard, "rb", buffering=0) as file:
            found = os.fstat(file.fileno()).st_size
            if found == self.shard_bytes:
                file.seek(self.offset)
                data = file.read(self.length)
                if zlib.crc32(data) == self.crc:
                    return data
        raise BadPack(
            f"{self.shard} has changed since its pack was written: "
            + (
                f"bytes {self.offset} to {self.offset + self.length} are others"
                if found == self.shard_bytes
                else f"expected {self.shard_bytes} bytes, found {found}"
            )
            + "; write the pack again"
        )


class Pack:
    """An opened pack, whose index has been checked.

    Args:
        root: its folder.
        about: what `deit-pack.json` says.
        arrays: the index, by the names of `ARRAYS`.
    """

    def __init__(self, root: Path, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]):
        self.root, self.arrays = root, arrays
        self.classes: tuple[str, ...] = tuple(about["classes"])
        self.of_folder: bool = about["of"] == "folder"
        """Whether the images were those of a folder, and not of a list."""
        self.shards = [(root / shard["name"], int(shard["bytes"])) for shard in about["shards"]]
        self._names: bytes = arrays["names"].tobytes()
        self._ends: list[int] | np.ndarray = np.concatenate([[0], arrays["ends"]])

    def __len__(self) -> int:
        return len(self.arrays["label"])

    def name(self, row: int) -> bytes:
        return self._names[self._ends[row] : self._ends[row + 1]]

    @cached_property
    def by_name(self) -> np.ndarray:
        """(N,) int64: the rows, sorted by name. No list of names is kept, because processes would copy it."""
        return np.array(sorted(range(len(self)), key=self.name), np.int64)

    def entry(self, name: bytes) -> Entry | None:
        """The image of this name."""
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            row = int(self.by_name[middle])
            if (found := self.name(row)) == name:
                shard, size = self.shards[self.arrays["shard"][row]]
                offset, length, crc = (int(self.arrays[key][row]) for key in ("offset", "length", "crc"))
                return Entry(shard, size, offset, length, crc)
            low, high = (middle + 1, high) if found < name else (low, middle)
        return None

    def paths(self) -> Iterator[str]:
        """The paths of all images, in the order of the index."""
        root = os.path.join(self.root, "")
        return (root + os.fsdecode(self.name(row)) for row in range(len(self)))

    def walked(self) -> list[str]:
        """The same paths as a walk through a folder gives them: by name, and files before folders."""

        def place(path: str) -> list[tuple[bool, str]]:
            *folders, file = path.split("/")
            return [*((True, name) for name in folders), (False, file)]

        return sorted(self.paths(), key=place) if self.of_folder else list(self.paths())


def is_pack(folder: str | os.PathLike[str]) -> bool:
    return os.path.isfile(os.path.join(folder, ABOUT))


_opened: dict[str, tuple[tuple[int, ...], Pack]] = {}
"""The packs that this process has opened, by their absolute paths, with the state of their `deit-pack.json` then."""


def open_pack(folder: str | os.PathLike[str]) -> Pack:
    """The pack in a folder. It is read once for each process, and again if it was written again.

    Raises `BadPack` for anything that is not whole, and `OSError` if it can't be read.
    """
    place = os.path.abspath(folder)
    status = os.stat(os.path.join(place, ABOUT))
    state = (status.st_ino, status.st_size, status.st_mtime_ns)
    if place not in _opened or _opened[place][0] != state:
        _opened[place] = state, _read(Path(place))
    found = _opened[place][1]
    named = copy.copy(found)  # its images are named as the folder was given
    named.root = Path(folder)
    return named


def find(path: str | os.PathLike[str]) -> Entry | None:
    """The image of a pack at a path that no file has; None if there is none.

    Raises as `open_pack`.
    """
    whole = os.path.abspath(os.fspath(path))
    place = os.path.dirname(whole)
    above = [place]
    while (place := os.path.dirname(place)) != above[-1]:
        above.append(place)
    root = next((each for each in above if each in _opened), None) or next(filter(is_pack, above), None)
    if root is None:
        return None
    pack = _opened[root][1] if root in _opened else open_pack(root)
    return pack.entry(os.fsencode(os.path.relpath(whole, root)).replace(os.fsencode(os.sep), b"/"))


def _read(root: Path) -> Pack:
    about_file, index_file = root / ABOUT, root / INDEX
    try:
        about = files.read_json(about_file)
    except files.CheckpointError as error:
        raise BadPack(f"{error}; write the pack again") from None
    _check_about(about_file, about)
    try:
        data = index_file.read_bytes()
    except FileNotFoundError:
        raise BadPack(f"{root} has {ABOUT} but no {INDEX}; write the pack again") from None
    if hashlib.sha256(data).hexdigest() != about["index_sha256"]:
        raise BadPack(f"{index_file} is not the index that {ABOUT} was written with; write the pack again")
    arrays = _arrays(index_file, data)
    pack = Pack(root, about, arrays)
    _check_rows(index_file, pack)
    _check_names(index_file, pack)
    for shard, size in pack.shards:
        if not shard.is_file():
            raise BadPack(f"{shard} is missing or no file, expected a shard of {size} bytes; write the pack again")
        if (found := shard.stat().st_size) != size:
            raise BadPack(f"{shard} has {found} bytes, expected {size}; copy it again, or write the pack again")
    return pack


_SHARD = re.compile(r"[a-z]+-[0-9]{6,}\.tar")


def _check_about(file: Path, about: Mapping[str, Any]) -> None:
    if about.get("format") != FORMAT:
        raise BadPack(
            f"{file} has format {about.get('format')!r}, expected {FORMAT}; write the pack again with this version"
        )
    classes, shards = about.get("classes"), about.get("shards")
    whole = (
        about.get("of") in ("folder", "list")
        and isinstance(about.get("index_sha256"), str)
        and isinstance(classes, list)
        and all(isinstance(name, str) and name for name in classes)
        and len(set(classes)) == len(classes) > 0
        and isinstance(shards, list)
        and all(
            isinstance(shard, dict)
            and isinstance(shard.get("name"), str)
            and _SHARD.fullmatch(shard["name"])
            and type(shard.get("bytes")) is int
            and 0 < shard["bytes"] < 2**63
            for shard in shards
        )
        and len({shard["name"] for shard in shards}) == len(shards) > 0
    )
    if not whole:
        raise BadPack(
            f"{file} does not describe a pack, expected of, index_sha256, the names of the classes, and the names "
            "(train-000000.tar) and bytes of the shards; write the pack again"
        )


def _arrays(file: Path, data: bytes) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BadPack(f"{file} can't be read ({error}); write the pack again") from None
    rows = arrays["ends"].shape if "ends" in arrays else ()
    for name, kind in ARRAYS.items():
        found = arrays.get(name)
        if found is None or found.dtype != kind or found.ndim != 1 or (name != "names" and found.shape != rows):
            has = "nothing" if found is None else f"{found.dtype} of the shape {found.shape}"
            raise BadPack(f"{file}: {name} is {has}, expected {np.dtype(kind)} for each image; write the pack again")
    if not rows[0]:
        raise BadPack(f"{file} lists no images; write the pack again")
    return arrays


def _check_rows(file: Path, pack: Pack) -> None:
    """Refuses numbers that lead outside."""
    arrays = pack.arrays
    sizes = np.array([size for _, size in pack.shards], np.int64)
    parts, labels, shards = arrays["part"], arrays["label"], arrays["shard"]
    offset, length = arrays["offset"], arrays["length"]
    for name, values, limit in (
        ("part", parts, len(PARTS)),
        ("label", labels, len(pack.classes)),
        ("shard", shards, len(sizes)),
    ):
        if (wrong := (values < 0) | (values >= limit)).any():
            row = int(wrong.argmax())
            raise BadPack(
                f"{file}: {name} of image {row} is {values[row]}, expected 0 to {limit - 1}; write the pack again"
            )
    if (parts == 0).any() and (parts > 0).any():
        raise BadPack(f"{file}: some images belong to a part and others to none; write the pack again")
    size = sizes[shards]
    outside = (offset < BLOCK) | (offset % BLOCK != 0) | (length < 1) | (length > size) | (offset > size - length)
    if outside.any():
        row = int(outside.argmax())
        raise BadPack(
            f"{file}: image {row} has {length[row]} bytes from byte {offset[row]} on, expected bytes within the "
            f"{size[row]} of {pack.shards[shards[row]][0].name}, after a header; write the pack again"
        )


def _check_names(file: Path, pack: Pack) -> None:
    """Refuses paths that lead out of the pack, that are there twice, or that files beside the shards have too."""
    ends = np.concatenate([[0], pack.arrays["ends"]])
    lengths = np.diff(ends)
    if (lengths < 1).any() or (lengths > _LONGEST).any() or ends[-1] != len(pack.arrays["names"]):
        raise BadPack(f"{file}: names and ends do not fit together; write the pack again")
    last, first = b"", set()
    for row in pack.by_name.tolist():
        name = pack.name(row)
        pieces = name.split(b"/")
        if {b"", b".", b".."} & set(pieces) or b"\0" in name:
            raise BadPack(
                f"{file} names an image {os.fsdecode(name)!r}, expected a path below the pack without . and ..; write "
                "the pack again"
            )
        if name == last:
            raise BadPack(f"{file} names {os.fsdecode(name)!r} twice; write the pack again")
        last = name
        first.add(pieces[0])
    for piece in first:
        if os.path.lexists(os.path.join(pack.root, os.fsdecode(piece))):
            raise BadPack(
                f"{pack.root} has a file or folder {os.fsdecode(piece)!r} where the pack has images of that name; take "
                "it away"
            )
