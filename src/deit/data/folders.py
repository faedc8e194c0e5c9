"""Labelled images on disk: reads folders and lists as splits, and matches their classes with a model's by name."""

from __future__ import annotations

import csv
import difflib
import hashlib
import itertools
import json
import os
import stat
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from PIL import Image

from deit import host
from deit.data.draws import Stream, draws
from deit.image import packs
from deit.image.decode import image_suffixes

_COMMON = "*{.bmp,.gif,.jpeg,.jpg,.png,.tif,.tiff,.webp}"
"""The image files that messages name; `image_suffixes` has all that are read."""
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""Folder names that each split may have."""
LIST_SUFFIXES = (".csv", ".jsonl")


@dataclass(frozen=True)
class Split:
    """Labelled image files. The class of `files[i]` is `classes[labels[i]]`."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    source: str = field(default="", compare=False)
    """The list that names the images, if there is one."""

    def __len__(self) -> int:
        return len(self.files)

    def take(self, rows: Iterable[int]) -> Split:
        """The images with these numbers, in this order."""
        rows = list(rows)
        return replace(self, files=tuple(self.files[i] for i in rows), labels=tuple(self.labels[i] for i in rows))


def read_split(root: str | Path, split: str, classes: Sequence[str] | None = None) -> Split:
    """Reads the image files of `root/SPLIT/CLASS/**`, with classes sorted by name and files by path.

    `split` is train, val or test. `classes` fixes another order, such as that of a trained model; a folder of any other
    name is refused. Hidden files and folders don't count. Links to folders are followed. Files
    that are no images are passed over, and a warning counts them.

    Raises `FileNotFoundError` or `ValueError` that says what the folder should look like, and `OSError` if it can't be
    read.
    """
    root = Path(root)
    if packs.is_pack(root):
        if not (rows := [row for row in _pack_rows(root) if row.split == split]):
            raise FileNotFoundError(f"{root} has no {split} images; pack them too, or give another pack")
        found = _of_rows(rows)
        return found if classes is None else matched(found, classes)
    folder = _split_folder(root, split)
    if folder is None:
        raise FileNotFoundError(
            f"{root} has no folder {' or '.join(SPLITS[split])}; expected {root}/{split}/CLASS/"
            "IMAGE files, one folder for each class"
        )
    with _counting(folder) as passed:
        return _read_labelled(folder, passed, classes)


def read_data(root: str | Path, *, holdout: float, seed: int, labelled: bool = True) -> tuple[Split, Split]:
    """Reads the training and validation images of a folder, a pack or a list. Test images are never among them.

    In a folder they are `root/train/CLASS/**` and, if it exists, `root/val/CLASS/**` (or valid, validation). Without
    val, the share `holdout` (0 to 1) of each class's training images is held out, drawn with `seed`: at least one image
    of a class of two or more, and none of a class of one. With neither train nor val, `root/CLASS/**` are the training
    images.

    In a list (see `read_examples`), the column or key `split` says train, val or test. Without it, all are training
    images. Without val, images are held out in the same way. A pack gives the images of the folder or list that it was
    made of, in the same order.

    `labelled=False` is for masked-image runs: all images below `root/train` or `root`, at any depth, form one class. A
    list then needs no labels.

    Raises `FileNotFoundError` or `ValueError` that says what the folder should look like, and `OSError` if it can't be
    read.
    """
    root = Path(root)
    if packs.is_pack(root) or (root.suffix.lower() in LIST_SUFFIXES and root.is_file()):
        return _listed_data(root, holdout, seed, labelled)
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root} is not a folder; expected one with {root}/train/CLASS/IMAGE files, or a list of images "
            f"({' or '.join(LIST_SUFFIXES)})"
        )
    train, val = _split_folder(root, "train"), _split_folder(root, "val")
    read, apart = (_read_labelled if labelled else _read_unlabelled), () if train else SPLITS["test"]
    if train is None and (val is not None or not any(_listed(root, apart)[:2])):
        raise FileNotFoundError(
            f"{root} has {'a folder ' + val.name if val else 'no images'} and no folder train; "
            f"expected {root}/train/CLASS/IMAGE files"
        )
    if val is None:  # beside train, only val matters: a folder Test is left alone
        _refuse_misnamed(root, SPLITS["val"] if train else tuple(itertools.chain(*SPLITS.values())))
    with _counting(root) as passed:
        whole = read(train or root, passed, None, apart)
        if labelled and len(whole.classes) < 2:
            only = (train or root) / whole.classes[0]
            inside = f". If the classes are the folders in {only}, give that folder" if _listed(only, ())[0] else ""
            raise ValueError(
                f"{train or root} has one class, {whole.classes[0]!r}, and a classifier needs two; add a "
                f"folder for each other class{inside}"
            )
        return (whole, read(val, passed, whole.classes)) if val else _hold_out(whole, holdout, seed, train or root)


def read_examples(place: str | Path, split: str | None = None) -> tuple[Split, str | None]:
    """Reads labelled images that judge a model. Returns them and the name of the split that was read.

    The images keep their own classes, sorted by name; `matched` brings the labels into a model's order.

    `place` is a folder, a pack or a list. If it has splits, `split` (train, val or test) is read; None takes test, or
    val if there is no test. If it has none, all of `place/CLASS/**`, of the pack or of the list is read, and the name
    of the split is None.

    A list is a UTF-8 file of paths and class names, one image per line. Relative paths start from the list's folder.
    A `.csv` file has commas and a header that names the columns `path` and `label`. A `.jsonl` file has an object with
    the strings `path` and `label` in every line. Spaces around a label don't count. The column or key `split` may say
    train, val or test; others are ignored.

    Raises `FileNotFoundError` or `ValueError` that says what is expected and, for a list, in which line.
    """
    place = Path(place)
    if place.is_dir() and not packs.is_pack(place):
        found = split or next((name for name in ("test", "val") if _split_folder(place, name)), None)
        if found:
            return read_split(place, found), found
        if _split_folder(place, "train"):
            raise ValueError(
                f"{place} has a folder train, but neither test nor val; add one of them, or use --split train to "
                "evaluate on the training images"
            )
        _refuse_misnamed(place, tuple(itertools.chain(*SPLITS.values())))
        with _counting(place) as passed:
            return _read_labelled(place, passed), None
    if packs.is_pack(place):
        return _examples(place, _pack_rows(place), split)
    if place.exists() and not place.is_file():
        raise ValueError(
            f"{place} is neither a folder nor a regular file, expected a folder of images, or a list of them "
            f"({' or '.join(LIST_SUFFIXES)}); save what it gives in a file, and give that"
        )
    if not place.is_file():
        raise FileNotFoundError(
            f"{place} does not exist; expected a folder of images, or a list of them ({' or '.join(LIST_SUFFIXES)})"
        )
    if place.suffix.lower() not in LIST_SUFFIXES:
        raise ValueError(
            f"{place} is neither a folder of images nor a list of them ({' or '.join(LIST_SUFFIXES)}); "
            "give one of the two"
        )
    return _examples(place, _read_list(place), split)


def _examples(place: Path, rows: Sequence[_Row], split: str | None) -> tuple[Split, str | None]:
    there = {row.split for row in rows}
    if there == {""}:
        if split:
            kind, move = ("pack", "pack images") if place.is_dir() else ("list", "add the column")
            without = "without parts" if place.is_dir() else "without a column split"
            raise ValueError(f"{place} is a {kind} {without}, found --split {split}; leave it out, or {move}")
        return _of_rows(rows), None
    found = split or next((name for name in ("test", "val") if name in there), None)
    if found is None:
        raise ValueError(
            f"{place} has images of the split train, but neither test nor val; add some, or use --split train to "
            "evaluate on the training images"
        )
    if found not in there:
        raise ValueError(f"{place} has no image of the split {found}; it has {', '.join(sorted(there))}")
    return _of_rows([row for row in rows if row.split == found]), found


def has_split(place: str | Path, split: str) -> bool:
    """Whether a folder has a separate folder, or a list or pack has images, of this split (train, val or test)."""
    place = Path(place)
    if packs.is_pack(place):
        return any(row.split == split for row in _pack_rows(place))
    if place.is_file() and place.suffix.lower() in LIST_SUFFIXES:
        return any(row.split == split for row in _read_list(place))
    return place.is_dir() and _split_folder(place, split) is not None


def matched(split: Split, classes: Sequence[str]) -> Split:
    """The same images, labelled in the order of a model's `classes`. Classes are found by name, however the accents are
    written.

    Raises `ValueError` if a class is not among `classes`, or if its name occurs there twice: the published names of
    ImageNet call two classes "crane".
    """
    first = {label: file for file, label in zip(reversed(split.files), reversed(split.labels), strict=True)}
    names = {label: split.classes[label] for label in sorted(first)}
    known = [nfc(name) for name in classes]
    places = {name: number for number, name in enumerate(known)}
    names = {label: nfc(name) for label, name in names.items()}
    if unknown := [label for label, name in names.items() if name not in places]:
        name, more = names[unknown[0]], len(unknown) - 1
        raise ValueError(
            f"the model knows no class {name!r}, which is the class of {first[unknown[0]]}"
            f"{f' ({more} more are unknown)' if more else ''}; {near(name, classes)}; rename the class, "
            "or leave its images out"
        )
    if repeated := [name for name in names.values() if known.count(name) > 1]:
        raise ValueError(
            f"the model calls {known.count(repeated[0])} of its classes {repeated[0]!r}, so it is not clear "
            "which of them the images of that name show; make the names in id2label of the model's "
            "config.json differ, or leave these images out"
        )
    return replace(split, labels=tuple(places[names[label]] for label in split.labels), classes=tuple(classes))


def near(name: str, classes: Sequence[str]) -> str:
    """Says which of `classes` may be meant by `name`."""
    folded = {one.casefold(): one for one in classes}
    close = [folded[one] for one in difflib.get_close_matches(name.casefold(), folded, n=3)]
    close += [one for key, one in folded.items() if name.casefold() in key and one not in close]
    if close:
        others = ", among others" if len(classes) > len(close[:3]) else ""
        return f"it knows {' and '.join(map(repr, close[:3]))}{others}"
    return f"it knows {', '.join(map(repr, classes[:5]))}{' and others' if len(classes) > 5 else ''}"


def _refuse_misnamed(root: Path, meant: Sequence[str]) -> None:
    """Refuses folders such as Train or VAL, because they would count as classes."""
    if misnamed := [name for name in _listed(root, meant)[0] if name.lower() in meant]:
        raise ValueError(
            f"{root / misnamed[0]} would not be read as a split; rename it to {misnamed[0].lower()} if it "
            "is one, or to something else if it is not"
        )


def _split_folder(root: Path, split: str) -> Path | None:
    return next((root / name for name in SPLITS[split] if (root / name).is_dir()), None)


def nfc(name: str) -> str:
    """A class name with each accent in one character with its letter. macOS often writes two (NFD)."""
    return unicodedata.normalize("NFC", name)


@contextmanager
def _counting(place: str | Path) -> Iterator[Counter[str]]:
    """Counts files by suffix that are passed over because they are no images; at the end, one warning has them all."""
    passed: Counter[str] = Counter()
    yield passed
    if passed and os.environ.get("RANK", "0") == "0":  # of the processes that share a run, one speaks
        warnings.warn(
            f"{place}: {passed_over(passed)}",
            stacklevel=4,
        )


def passed_over(passed: Counter[str]) -> str:
    """How many files that are no images were passed over, with the suffixes."""
    listed = sorted(passed.items(), key=lambda item: (-item[1], item[0]))
    counts = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in listed[:10])
    counted = (
        "1 file was passed over, because it is no image"
        if passed.total() == 1
        else (f"{passed.total()} files were passed over, because they are no images")
    )
    return f"{counted} that Pillow reads: {counts}{', and others' if len(passed) > 10 else ''}"


def _read_labelled(
    folder: Path, passed: Counter[str], classes: Sequence[str] | None = None, apart: Sequence[str] = ()
) -> Split:
    """Reads `folder/CLASS/**`. Folders named in `apart` are not classes. `passed` counts what is passed over."""
    folders, stray, others = _listed(folder, apart)
    passed += others
    if stray:
        more = f" and {len(stray) - 1} more images are" if len(stray) > 1 else " is"
        above = "" if folders else f". If {folder} is the folder of a class, give the one above it"
        raise ValueError(
            f"{folder / stray[0]}{more} in no class folder, so the class is not known; move such images to "
            f"{folder}/CLASS/, or remove them{above}"
        )
    if not folders:
        raise ValueError(f"{folder} has no images; expected {folder}/CLASS/{_COMMON}")
    places: dict[str, list[Path]] = {}
    for name in folders:
        places.setdefault(nfc(name), []).append(folder / name)
    if twice := [name for name in places if len(places[name]) > 1]:
        warnings.warn(
            f"{folder} has {len(places[twice[0]])} folders {twice[0]!r}, whose names differ only in how accents are "
            "written (NFC, NFD); their images are taken as one class",
            stacklevel=4,
        )
    order = tuple(sorted(places) if classes is None else classes)
    label_of = {nfc(name): label for label, name in enumerate(order)}
    if unknown := sorted(set(places) - set(label_of)):
        raise ValueError(
            f"{folder} has a class {unknown[0]!r} that the model does not know; it knows "
            f"{', '.join(order[:10])}{' and others' if len(order) > 10 else ''}; rename or remove the "
            "folder"
        )
    files: list[Path] = []
    labels: list[int] = []
    for name in sorted(places):
        for place in places[name]:
            within: Counter[str] = Counter()
            found = _images(place, within)
            if not found:
                left = f" ({passed_over(within)})" if within else ""
                raise ValueError(
                    f"{place} has no images{left}; expected files {_COMMON} there; add some, or remove the folder"
                )
            passed += within
            files += found
            labels += [label_of[name]] * len(found)
    return Split(tuple(files), tuple(labels), order)


def _read_unlabelled(
    folder: Path, passed: Counter[str], classes: Sequence[str] | None = None, apart: Sequence[str] = ()
) -> Split:
    names, files, others = _listed(folder, apart)
    passed += others
    found = sorted(
        [folder / file for file in files] + [path for name in names for path in _images(folder / name, passed)], key=str
    )
    if not found:
        left = f" ({passed_over(passed)})" if passed else ""
        raise ValueError(f"{folder} has no images{left}; expected files {_COMMON} in it, at any depth")
    return Split(tuple(found), (0,) * len(found), ("image",))


def _listed(folder: Path, apart: Sequence[str]) -> tuple[list[str], list[str], Counter[str]]:
    """Sorted names of the folders and of the image files in a folder, without hidden ones and the folders `apart`; and
    the count of what is passed over."""
    _, folders, files = next(os.walk(folder, onerror=_refuse))
    passed: Counter[str] = Counter()
    images = sorted(_only_images(files, passed))
    return sorted(name for name in folders if not name.startswith(".") and name not in apart), images, passed


def _images(folder: Path, passed: Counter[str]) -> list[Path]:
    """The image files at any depth, sorted by path. Hidden ones don't count."""
    return [Path(path) for path in sorted(walk_images(folder, passed))]


def walk_images(folder: str | Path, passed: Counter[str]) -> Iterator[str]:
    """Yields the image files at any depth, in an order that depends only on their names. Hidden ones don't count.

    `passed` counts the other files by suffix as they are passed over.
    """
    visited: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in visited:  # a link to a folder above
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(place, name) for name in sorted(_only_images(names, passed)))


def _only_images(names: Iterable[str], passed: Counter[str]) -> Iterator[str]:
    suffixes = image_suffixes()
    for name in names:
        if not name.startswith("."):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in suffixes:
                yield name
            else:
                passed[suffix] += 1


def _refuse(error: OSError) -> NoReturn:
    raise OSError(f"the folder {error.filename} can't be read ({error.strerror}); check its permissions") from None


def _hold_out(whole: Split, holdout: float, seed: int, folder: Path) -> tuple[Split, Split]:
    held = drawn(whole, [holdout], seed) == 1
    if not held.any():
        reason = f"no class of {folder} has two images" if holdout > 0 else f"data.holdout is {holdout:g}"
        raise ValueError(
            f"there is nothing to validate on: there is no folder val beside the training images, and {reason}, so "
            "none can be held out; add a folder val" + ("" if holdout > 0 else ", or set data.holdout above 0")
        )
    return whole.take(np.flatnonzero(~held)), whole.take(np.flatnonzero(held))


def drawn(whole: Split, shares: Sequence[float], seed: int, copies: Sequence[int] | None = None) -> np.ndarray:
    """(N,) int: the part of each image. Part 1 gets the first of `shares` (each 0 to 1) of every class, and so on. The
    rest is part 0.

    Of every class, each part with a share gets at least one image and part 0 keeps at least one, as long as there are
    enough. Images with the same number in `copies` stay together, all in part 0 if their classes differ or if they are
    more than a part needs.
    """
    parts = np.zeros(len(whole), np.int64)
    labels = np.array(whole.labels)
    counts = np.bincount(labels, minlength=len(whole.classes))
    group_of: dict[int, list[int]] = {}
    for row, number in enumerate(copies or ()):
        group_of.setdefault(number, []).append(row)
    for label, members in enumerate(np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])):
        order = draws(seed, 0, label, 0, Stream.HOLDOUT).permutation(members).tolist()
        left = len(order)
        for part, share in enumerate(shares, 1):
            needed = min(max(1, round(share * len(order))), left - 1) if share > 0 else 0
            for row in order:
                if not needed:
                    break
                group = group_of[copies[row]] if copies else [row]
                if parts[row] or len(group) > needed or any(labels[each] != label for each in group):
                    continue
                parts[group] = part
                needed, left = needed - len(group), left - len(group)
    return parts


def read_parts(place: str | Path) -> dict[str, Split]:
    """Reads all images of a folder, pack or list by their part: train, and val and test if they are there.

    The training images are those that `read_data` would take if nothing was held out.
    """
    place = Path(place)
    parts = {name: read_examples(place, name)[0] for name in SPLITS if has_split(place, name)}
    if not parts:
        return {"train": read_examples(place)[0]}
    if "train" in parts:
        return parts
    if place.is_dir() and "val" not in parts and any(_listed(place, SPLITS["test"])[:2]):
        with _counting(place) as passed:
            return {"train": _read_labelled(place, passed, None, SPLITS["test"]), **parts}
    raise ValueError(
        f"{place} has {' and '.join(parts)} images but no training images, so there is nothing to divide; add them as "
        f"{f'{place}/train/CLASS/IMAGE files' if place.is_dir() else 'lines with the split train'}"
    )


class _Row(NamedTuple):
    """An image of a list or of a pack."""

    line: int
    """Its line in the list."""
    path: str
    label: str
    split: str
    """train, val or test; empty if the list has no splits."""


def _listed_data(file: Path, holdout: float, seed: int, labelled: bool) -> tuple[Split, Split]:
    packed = packs.is_pack(file)
    rows = _pack_rows(file, labelled) if packed else _read_list(file, labelled)
    train = [row for row in rows if row.split in ("train", "")]
    val = [row for row in rows if row.split == "val"]
    if not train:
        move = "pack training images too" if packed else "name the training images so in the column split"
        raise ValueError(f"{file} has no image of the split train; {move}")
    whole = replace(_of_rows(train), source=str(file))
    if labelled and len(whole.classes) < 2:
        raise ValueError(
            f"{file} has training images of one class, {whole.classes[0]!r}, and a classifier needs two; add images of "
            "another class"
        )
    if unknown := next((row for row in val if row.label not in whole.classes), None):
        where = unknown.path if packed else f"{file}, line {unknown.line}"
        raise ValueError(
            f"{where}: the class {unknown.label!r} of this validation image has no training image; "
            f"{near(unknown.label, whole.classes)}; correct the label, or add training images"
        )
    return (whole, _of_rows(val, whole.classes)) if val else _hold_out(whole, holdout, seed, file)


def _of_rows(rows: Sequence[_Row], classes: tuple[str, ...] | None = None) -> Split:
    classes = classes or tuple(sorted({row.label for row in rows}))
    label_of = {name: label for label, name in enumerate(classes)}
    return Split(tuple(Path(row.path) for row in rows), tuple(label_of[row.label] for row in rows), classes)


def _pack_rows(root: Path, labelled: bool = True) -> list[_Row]:
    """The images of a pack, in the order in which the folder or list would give them that it was made of."""
    pack = packs.open_pack(root)
    numbers = zip(pack.paths(), pack.arrays["label"].tolist(), pack.arrays["part"].tolist(), strict=True)
    rows = [
        _Row(0, path, pack.classes[label] if labelled else "image", packs.PARTS[part]) for path, label, part in numbers
    ]
    return rows if labelled or not pack.of_folder else sorted(rows, key=lambda row: row.path)


def _read_list(file: Path, labelled: bool = True) -> list[_Row]:
    root = os.path.abspath(file.parent)
    rows: dict[str, _Row] = {}
    read = _csv_rows if file.suffix.lower() == ".csv" else _jsonl_rows
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            for number, row in read(file, lines, ("path", "label") if labelled else ("path",)):
                path, label = row["path"], row["label"] if labelled else "image"
                for key, value in (("path", path), ("label", label)):
                    if not isinstance(value, str) or not value.strip():
                        raise ValueError(
                            f"{file}, line {number}: {key} is {json.dumps(value)}, expected "
                            f"{'a path' if key == 'path' else 'the name of a class'} as text"
                        )
                path, label = os.path.normpath(os.path.join(root, native(path, root))), nfc(label.strip())
                if path in rows:
                    raise ValueError(
                        f"{file}, line {number}: {path} is already listed in line {rows[path].line}, and each image "
                        "counts once; remove one of the two lines"
                    )
                rows[path] = _Row(number, path, label, _split_named(file, number, row.get("split")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{file} can't be read as {file.suffix[1:].upper()} in UTF-8 ({error}); save it again in that format"
        ) from None
    if not rows:
        raise ValueError(f"{file} lists no images; expected a line with a path and a label for each image")
    named = [row for row in rows.values() if row.split]
    if named and len(named) < len(rows):
        bare = next(row for row in rows.values() if not row.split)
        raise ValueError(f"{file}, line {bare.line}: the split is empty, but other images have one; fill it in")
    return list(rows.values())


def _split_named(file: Path, line: int, value: Any) -> str:
    """The split that a list names, by one of its names: train, val, test. Empty if it names none."""
    if value is None or value == "":
        return ""
    name = next((split for split, names in SPLITS.items() if isinstance(value, str) and value.strip() in names), None)
    if name is None:
        raise ValueError(f"{file}, line {line}: split is {json.dumps(value)}, expected train, val or test")
    return name


def native(path: str, root: str = "") -> str:
    """A path as it is, or, if only that is there, with / for the backslashes that Windows writes."""
    if "\\" in path and os.sep == "/" and not os.path.lexists(os.path.join(root, path)):
        forward = path.replace("\\", "/")
        return forward if os.path.lexists(os.path.join(root, forward)) else path
    return path


def _csv_rows(file: Path, lines: Iterable[str], needed: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(lines, strict=True)
    header = [name.strip() for name in next(reader, [])]
    for name in (*needed, *({"split"} & set(header))):
        if header.count(name) != 1:
            raise ValueError(
                f"{file}, line 1: expected a header with one column {name!r}, found "
                f"{', '.join(map(repr, header)) or 'nothing'}; name the columns {' and '.join(needed)}"
            )
    for row in reader:
        if not row:
            continue
        if len(row) != len(header):
            raise ValueError(
                f"{file}, line {reader.line_num}: expected {len(header)} fields as in the header, found "
                f'{len(row)}; put a name with a comma in quotes: "tench, Tinca tinca"'
            )
        yield reader.line_num, dict(zip(header, row, strict=True))


def _jsonl_rows(file: Path, lines: Iterable[str], needed: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{file}, line {number}: not valid JSON ({error.msg}); expected an object like "
                '{"path": "a.jpg", "label": "cat"}'
            ) from None
        if not isinstance(row, dict) or not set(needed) <= row.keys():
            keys = " and ".join(f'"{name}"' for name in needed)
            raise ValueError(
                f"{file}, line {number}: expected an object with the keys {keys}, found "
                f"{', '.join(map(repr, row)) if isinstance(row, dict) else type(row).__name__}"
            )
        yield number, row


_READ_WHOLE = 2**28
"""Bytes of images that are read whole for a fingerprint. Larger sets would take minutes."""


def fingerprint(split: Split) -> str:
    """A SHA-256 in hexadecimal that identifies the images, wherever their folder lies.

    It covers the classes, and the label, size and path of every file. Paths start from the folder that holds all the
    files. It covers every file's content if all together have at most `_READ_WHOLE` bytes, and otherwise the content of
    256 files, evenly spread.
    """
    files = [os.fspath(file) for file in split.files]
    root = os.path.commonpath([os.path.dirname(min(files)), os.path.dirname(max(files))])
    digest = hashlib.sha256(repr(split.classes).encode())
    sizes = [size_of(file) for file in files]
    for file, label, size in zip(files, split.labels, sizes, strict=True):
        digest.update(f"{os.path.relpath(file, root)!r} {label} {size}\n".encode())
    some = np.unique(np.linspace(0, len(files) - 1, 256).round().astype(int)).tolist()
    for i in range(len(files)) if sum(sizes) <= _READ_WHOLE else some:
        if sizes[i] >= 0:
            with suppress(OSError, packs.BadPack):  # without permission, it counts as an unreadable image
                digest.update(hashlib.sha256(contents(files[i])).digest())
    return digest.hexdigest()


def size_of(file: str | os.PathLike[str]) -> int:
    """Size in bytes; -1 if it is not a file, such as a broken link, which then counts as an unreadable image."""
    try:
        status = os.stat(file)
        return status.st_size if stat.S_ISREG(status.st_mode) else -1
    except FileNotFoundError:
        entry = packs.find(file)
        return -1 if entry is None else entry.length
    except OSError:
        return -1


def contents(file: str | os.PathLike[str]) -> bytes:
    """The bytes of a file or of an image in a pack."""
    try:
        return Path(file).read_bytes()
    except FileNotFoundError:
        if (entry := packs.find(file)) is None:
            raise
        return entry.read()


# -------------------------------------------------------------------------------------------------------------- digits


def write_digits(root: Path, *, seed: int = 0, side: int = 32) -> dict[str, int]:
    """Writes scikit-learn's 1,797 scanned digits as `root/{train,val,test}/CLASS/*.png`; returns the splits' sizes.

    360 images go to `test` and 144 to `val`, drawn with `seed` and balanced over the classes. The 8x8 scans (UCI
    Optical Recognition of Handwritten Digits, 1998) are enlarged to `side` pixels.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise host.missing("the digits come from scikit-learn", "quickstart") from None

    scans = load_digits()
    rest, test = train_test_split(np.arange(len(scans.target)), test_size=360, random_state=seed, stratify=scans.target)
    train, val = train_test_split(rest, test_size=144, random_state=seed, stratify=scans.target[rest])
    splits = {"train": train, "val": val, "test": test}
    for split, indices in splits.items():
        for index in indices:
            folder = root / split / str(scans.target[index])
            folder.mkdir(parents=True, exist_ok=True)
            scan = Image.fromarray((scans.images[index] * (255 / 16)).round().astype(np.uint8))  # grey levels 0 to 16
            scan.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{index:04}.png")
    return {split: len(indices) for split, indices in splits.items()}
