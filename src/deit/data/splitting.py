"""Divides labelled images into parts for training, validation and test, as a list. No file is copied or moved."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from deit import files
from deit.data.folders import LIST_SUFFIXES, SPLITS, Split, contents, drawn, read_parts, size_of
from deit.image.packs import BadPack
from deit.words import listed, quoted

SHARE = 0.1
"""Share of the training images that becomes validation or test images if nobody says another."""


def split(
    data: str | Path, out: str | Path, *, val: float | None = None, test: float | None = None, seed: int = 0
) -> list[str]:
    """Writes a list of all images with the columns or keys path, label and split. Returns sentences about it.

    Parts that `data` has already stay as they are. The others are drawn from its training images, the same share of
    every class. Files with the same content never come into two parts, if they are drawn here. Images that only look
    alike, such as frames of one film, may.

    Args:
        data: a folder or a list, as for `read_data`.
        out: a .csv or .jsonl file that doesn't exist yet. Images below its folder get relative paths.
        val, test: shares of the training images, 0 to below 1. None is `SHARE`, or nothing if `data` has that part. The
            same seed and share give the validation images that `deit train` would hold out, if no test images are drawn
            and no two files have the same content.

    Raises `ValueError` or an `OSError` that says what is expected.
    """
    out, found = Path(out), []
    if out.suffix.lower() not in LIST_SUFFIXES:
        raise ValueError(f"expected a {' or '.join(LIST_SUFFIXES)} file after --out, found {out}; give such a name")
    if out.exists():
        raise FileExistsError(f"{out} exists already, and a run may rely on it; remove it, or choose another --out")
    if seed < 0:
        raise ValueError(f"--seed can't be negative, found {seed}")
    parts = read_parts(data)
    shares = _shares(str(data), parts, {"test": test, "val": val})
    train = parts["train"]
    copies = _same_content([file for part in parts.values() for file in part.files])
    numbers = drawn(train, list(shares.values()), seed, copies[: len(train)])
    rows = [
        (file, train.classes[label], ("train", *shares)[number])
        for file, label, number in zip(train.files, train.labels, numbers.tolist(), strict=True)
    ]
    for name, part in parts.items():
        if name != "train":
            rows += [(file, part.classes[label], name) for file, label in zip(part.files, part.labels, strict=True)]
    files.write_text(out, _written(out, rows))
    counts = Counter(row[2] for row in rows)
    found.append(f"{out}: " + ", ".join(f"{counts[name]:,} {name}" for name in SPLITS if counts[name]) + " images")
    for name in shares:
        there = {label for _, label, part in rows if part == name}
        if missing := [label for label in train.classes if label not in there]:
            found.append(
                f"no {name} image of {listed(map(quoted, missing))}: too few images, or too many copies of the same one"
            )
    return found + _doubts(rows, copies)


def without_test_images(data: Path) -> str:
    """What the accuracy on validation images lacks after a training, and the commands that give an honest one."""
    split, file = _splitting(data)
    return (
        f"{data} has no test images. The validation images chose the model, so their accuracy flatters it. For an "
        f"accuracy that does not, run `{split}`, train again with {shlex.join(['--data', file])}, and give that to "
        "deit eval"
    )


def fit_without_test_images(data: Path) -> str:
    """The same before a fit."""
    split, file = _splitting(data)
    return (
        f"{data} has no test images. The validation images choose the model, so their accuracy flatters it. For an "
        f"accuracy that does not, run `{split}`, and then `{shlex.join(['deit', 'fit', file])}` with another --out"
    )


def _splitting(data: Path) -> tuple[str, str]:
    """The command that sets test images aside, and the list that it writes."""
    if data.is_file():
        file = str(data.with_name(f"{data.stem}-parts{data.suffix}"))
    else:
        file = "parts.csv" if data.name in ("", "..") else f"{data}.csv"
    return shlex.join(["deit", "split", str(data), "--out", file]), file


def _shares(data: str, parts: dict[str, Split], asked: dict[str, float | None]) -> dict[str, float]:
    """The share of each part that is to be drawn."""
    shares = {}
    for name, share in asked.items():
        if share is not None and not 0 <= share < 1:
            raise ValueError(f"--{name} is a share of the training images, from 0 to below 1, found {share:g}")
        if name in parts and share:
            raise ValueError(f"{data} has {name} images already, and they stay as they are; leave --{name} out")
        shares[name] = 0.0 if name in parts else SHARE if share is None else share
    shares = {name: share for name, share in shares.items() if share}
    if not shares:
        lacking = [f"--{name}" for name in asked if name not in parts]
        move = (
            f"{' or '.join(lacking)} above 0 for a part that it lacks" if lacking else f"{data} itself to the commands"
        )
        raise ValueError(
            f"there is nothing to draw: {data} has the parts {', '.join(parts)}, and no other part is asked for; give "
            f"{move}"
        )
    if sum(shares.values()) >= 1:
        raise ValueError(f"--val and --test leave nothing to train on, found {sum(shares.values()):g} together")
    return shares


def _same_content(paths: Sequence[Path]) -> list[int]:
    """A number for each file, the same for files with the same content. Only files of the same size are read."""
    sizes = [size_of(path) for path in paths]
    count = Counter(sizes)
    numbers: dict[object, int] = {}
    found = []
    for place, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        key: object = place
        if size > 0 and count[size] > 1:
            try:
                key = (size, hashlib.sha256(contents(path)).digest())
            except (OSError, BadPack):  # it counts as an unreadable image later
                key = place
        found.append(numbers.setdefault(key, len(numbers)))
    return found


def _doubts(rows: Sequence[tuple[Path, str, str]], copies: Sequence[int]) -> list[str]:
    """Sentences about files with the same content whose labels differ, or that lie in two parts of the data."""
    groups: dict[int, list[tuple[Path, str, str]]] = {}
    for row, number in zip(rows, copies, strict=True):
        groups.setdefault(number, []).append(row)
    found = []
    for place, reason, move in (
        (1, "have different labels", "correct the labels"),
        (2, "are in different parts", "remove the copies, because they make the scores too good"),
    ):
        doubtful = [group for group in groups.values() if len({row[place] for row in group}) > 1]
        if doubtful:
            one, other = doubtful[0][0], next(row for row in doubtful[0] if row[place] != doubtful[0][0][place])
            found.append(
                f"{sum(map(len, doubtful)):,} files with the same content as another {reason}, for example {one[0]} "
                f"({one[place]}) and {other[0]} ({other[place]}); {move}"
            )
    return found


def _written(out: Path, rows: Sequence[tuple[Path, str, str]]) -> str:
    """The text of the list."""
    folder = os.path.abspath(out.parent)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    if out.suffix.lower() == ".csv":
        table.writerow(("path", "label", "split"))
    for file, label, part in rows:
        path = os.path.abspath(file)
        path = os.path.relpath(path, folder) if path.startswith(os.path.join(folder, "")) else path
        try:
            f"{path}{label}".encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"a list is text in UTF-8, but the name of {file} is not; rename the file or its folder"
            ) from None
        if out.suffix.lower() == ".csv":
            table.writerow((path, label, part))
        else:
            text.write(json.dumps({"path": path, "label": label, "split": part}, ensure_ascii=False) + "\n")
    return text.getvalue()
