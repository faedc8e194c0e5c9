"""A teacher's answers, written once and used in many runs. B images of a batch, C classes.

Every view of a training image is a function of the recipe's seed and the step's number. So the answers to the views of
some epochs can replace the teacher in any run that sees the same views. The fields of the recipe that determine the
views are stored with the answers, and compared.

A cache is a folder. `cache.json` describes its content. Each `labels-00000.safetensors` is a part with the same number
of steps (the last one may have fewer), and a row of B answers for each step.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from deit import files, host, locks
from deit.config import DeiTConfig
from deit.data.batches import Batch, Faults, TrainingBatches
from deit.data.folders import Split, fingerprint
from deit.evaluate.scores import Accuracy
from deit.machine import Rows, resolve_device, resolve_precision
from deit.recipe import Distilled, Recipe, difference
from deit.terminal import shown
from deit.train import guidance
from deit.train.bar import Bar
from deit.train.records import amount, in_epochs, is_part, span
from deit.train.teacher import Teacher

VERSION = 1
"""Version of the files' layout."""
VIEWS_VERSION = 1
"""Version of the views. Raise it whenever the code of `data` or `augment` draws or computes other views than before, so
that older caches are refused."""
JPEG_VERSION = 1
"""The same for views that are crops of JPEG files. Caches that have none of them don't depend on it."""
PART_BYTES = 16 * 2**20
"""Largest size of a part in bytes. A single step that is larger has a part of its own."""
_FILE = re.compile(r"labels-(\d{5,})\.safetensors")
_HEADER = 1024
"""Bytes of a part that are planned for its description."""
_STARTING, _SETTLED = 2, 6
"""Number of first batches that start things, and the number after which it is said how long the others will take."""


@dataclass(frozen=True)
class _Layout:
    """The layout of a cache and its parts."""

    steps: int
    """Number of steps in all parts together."""
    steps_per_part: int
    batch: int
    classes: int
    kind: str
    top_k: int | None
    """Number of classes that soft labels keep; None keeps all."""
    patches: int = 0
    """Number of the student's patches, if it is guided."""
    channels: tuple[int, ...] = ()
    """Number of channels of each of the teacher's maps."""

    @property
    def parts(self) -> int:
        return -(-self.steps // self.steps_per_part)

    def steps_of(self, part: int) -> range:
        first = part * self.steps_per_part
        return range(first, min(first + self.steps_per_part, self.steps))

    def tensors(self, steps: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Type and shape of each tensor of a part with so many steps. Classes have the narrowest integers that fit."""
        rows = (steps, self.batch)
        index = np.dtype(
            next((kind for kind in (np.uint8, np.uint16) if self.classes <= np.iinfo(kind).max + 1), np.int32)
        )
        kept: dict[str, tuple[np.dtype[Any], tuple[int, ...]]]
        if self.kind == "hard":
            kept = {"hard": (index, rows)}
        elif self.top_k is None:
            kept = {"log_probability": (np.dtype(np.float32), (*rows, self.classes))}
        else:
            kept = {"index": (index, (*rows, self.top_k)), "probability": (np.dtype(np.float16), (*rows, self.top_k))}
        maps = guidance.shapes(self.channels, self.patches)
        return kept | {name: (np.dtype(np.int8), (*rows, *shape)) for name, shape in maps.items()}

    def size(self, steps: int) -> int:
        """Size of the tensors of so many steps, in bytes."""
        return sum(kind.itemsize * math.prod(shape) for kind, shape in self.tensors(steps).values())


def _layout(recipe: Recipe, split: Split, steps: int, channels: tuple[int, ...] = ()) -> _Layout:
    objective = recipe.objective
    assert isinstance(objective, Distilled)
    classes = len(split.classes)
    top_k = objective.top_k if objective.top_k is not None and objective.top_k < classes else None
    patches = math.prod(recipe.model.grid) if channels and isinstance(recipe.model, DeiTConfig) else 0
    one = _Layout(steps, 1, recipe.data.batch, classes, objective.kind, top_k, patches, channels)
    most = min(PART_BYTES // one.size(1), len(split) // recipe.data.batch)
    return replace(one, steps_per_part=max(1, most))


def teach(
    recipe: Recipe,
    split: Split,
    out: str | Path,
    *,
    epochs: float,
    validation: Split | None = None,
    device: str = "auto",
    console: Console | None = None,
    rank: int = 0,
    world: int = 1,
) -> Path:
    """Writes the teacher's answers to the views of `epochs` epochs into the folder `out`.

    Training with `objective.cache` set to this folder sees these views, and then the same views again. If the work was
    stopped, the same call resumes it: complete parts stay, and damaged ones are made again. More `epochs` than before
    extend the cache.

    Args:
        validation: validation images. The teacher is tried on up to 512 of them, and its accuracy is stored too, so
            that a student can be compared with it.
        rank, world: number of this process and number of all. Each process writes every `world`-th part, independently
            of the others.

    Raises:
        ValueError: the recipe has no teacher, `out` holds something else, or its answers come from other data, other
            views or another teacher.
        locks.InUse: a process of the same rank is writing into `out`.
        files.DiskFull: the disk has no room for the answers.
        data.BadImages: too many images can't be read.
    """
    out, place = Path(out), resolve_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)  # or else every process would also open the first GPU
    objective = recipe.objective
    if not isinstance(objective, Distilled) or not objective.teacher:
        raise ValueError(
            f"recipe {recipe.name} names no teacher; use --set objective.teacher=timm:NAME, a trained model's "
            "folder or FILE.py:FUNCTION"
        )
    if not epochs > 0:
        raise ValueError(f"epochs must be positive, found {epochs}")
    teacher = Teacher.load(objective.teacher, split.classes, recipe).to(place)
    if objective.guidance:
        teacher.read_maps(recipe, split, place)
    channels = teacher.maps.channels if teacher.maps else ()
    layout = _layout(recipe, split, math.ceil(epochs * len(split) / recipe.data.batch), channels)
    prints = {"data": fingerprint(split), "views": _hash(views(recipe, split)), "teacher": teacher.fingerprint()}
    console = Console(quiet=True) if rank else console or Console(stderr=True)
    with locks.held(out, lock=out / f".rank-{rank}.lock"):
        layout = _claim(out, recipe, split, layout, prints)
        todo = []
        for part in range(rank, layout.parts, world):
            if _is_whole(out, layout, part):
                try:
                    _read(out, layout, part, prints)
                    continue
                except files.CheckpointError as error:
                    _say(console, str(error))
            files.sweep(out, _path(out, part).name)
            todo.append(part)
        _foretell(out, layout, todo, split, console)
        if not rank:
            _introduce(teacher, recipe, split, validation, out, bool(todo), place, console)
        if todo:
            rows = Rows(lambda sentence: _say(console, sentence))
            _write_parts(_Work(recipe, split, teacher, layout, place, rows), out, todo, prints, console)
    return out


def _foretell(out: Path, layout: _Layout, todo: list[int], split: Split, console: Console) -> None:
    """Says how many answers are missing and how many bytes they take. Raises `DiskFull` if there is no room."""
    missing = {*todo, *(part for part in range(layout.parts) if not _is_whole(out, layout, part))}
    if not missing:
        return
    steps = sum(len(layout.steps_of(part)) for part in missing)
    needed, free = sum(layout.size(len(layout.steps_of(part))) + _HEADER for part in missing), files.free_bytes(out)
    files.refuse_full(out, f"the labels need {amount(needed)} there", needed, free)
    views, images = steps * layout.batch, len(split)
    left = "" if free is None else f" of the {amount(free)} that are free on the disk"
    _say(
        console,
        f"{views:,} views to answer, {in_epochs(views, images)} of {images:,} images; the labels take "
        f"{amount(needed)}{left}",
    )


def _introduce(
    teacher: Teacher,
    recipe: Recipe,
    split: Split,
    validation: Split | None,
    out: Path,
    works: bool,
    place: torch.device,
    console: Console,
) -> None:
    """Introduces the teacher, if it `works` or is not tried yet, and stores its accuracy on the validation images."""
    description = _description(out)
    known = None if validation is None else _judged(description, validation)
    if known is not None:
        if works:
            _say(console, str(teacher))
        return
    if works or validation is not None:
        tried = (split, "training") if validation is None else (validation, "validation")
        for sentence in teacher.introduction(recipe, *tried, place):
            _say(console, sentence)
    if validation is not None and (judged := teacher.judged) is not None:
        found = {"data": fingerprint(validation), "correct": judged.correct, "total": judged.total}
        files.write_json(out / "cache.json", {**_description(out), "judged": found})


def _judged(description: Mapping[str, Any], validation: Split) -> Accuracy | None:
    """The teacher's accuracy on these validation images; None if it was not tried on them."""
    found = description.get("judged")
    if not isinstance(found, dict) or found.get("data") != fingerprint(validation):
        return None
    part: list[Any] = [found.get("correct"), found.get("total")]
    return Accuracy(*part) if is_part(part) else None


@dataclass(frozen=True)
class _Work:
    recipe: Recipe
    split: Split
    teacher: Teacher
    layout: _Layout
    place: torch.device
    rows: Rows
    """Decides how many views the teacher answers at once."""

    def answers(self, batch: Batch, batches: TrainingBatches) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yields positions and what is kept of the answers to them, in training's micro-batches and precision."""
        compute, objective = self.recipe.compute, self.recipe.objective
        assert isinstance(objective, Distilled)
        precision = resolve_precision(compute.precision, self.place)
        for part in batch.to(self.place).parts(compute.accumulate):
            assert part.positions is not None
            pixels = batches.mix(part).pixels
            with torch.autocast(self.place.type, precision, enabled=precision != torch.float32):
                kept = self.rows(lambda given: self.teacher.kept(given, objective), pixels)
            yield part.positions.to(self.place, non_blocking=True), kept


def _write_parts(work: _Work, out: Path, todo: list[int], prints: Mapping[str, str], console: Console) -> None:
    layout = work.layout
    batches = TrainingBatches(work.split, work.recipe, cycle=layout.steps, device=work.place)
    faults = Faults(len(work.split))
    total = layout.batch * sum(len(layout.steps_of(part)) for part in todo)
    done, began, rate = 0, time.perf_counter(), 0.0
    kept: dict[str, Tensor] = {}  # of one part, on the device, so that it is fetched only once
    with Bar(console, work.teacher.name, total=total) as bar:
        for part, row, batch in _rows(batches, layout, todo):
            for file, reason in faults.add(batch.faults):
                _say(console, f"{file} {reason}. Another image stands in for it")
            rows = len(layout.steps_of(part))
            for positions, found in work.answers(batch, batches):
                for name, value in found.items():
                    if row == 0 and (name not in kept or len(kept[name]) != rows):
                        kind = torch.int32 if value.dtype == torch.int64 else value.dtype
                        kept[name] = torch.zeros(rows, layout.batch, *value.shape[1:], dtype=kind, device=work.place)
                    kept[name][row, positions] = value.to(kept[name].dtype)
            done += layout.batch
            started = _STARTING * layout.batch
            if done == started:
                began = time.perf_counter()
            else:
                rate = (done - started * (done > started)) / (time.perf_counter() - began)
            left = (total - done) / rate if rate else None
            bar.move(done, left)
            bar.say([f"{rate:.0f} images/s"])
            if done == _SETTLED * layout.batch and total > 2 * done and left is not None:
                _say(console, f"{total - done:,} views to go: about {span(left)} at {rate:.0f} images/s")
            if row == rows - 1:
                _write(out, layout, part, prints, kept)
                if not bar.moves:
                    told = "" if left is None else f", {span(left)} left"
                    _say(console, f"part {part + 1} of {layout.parts}: {rate:.0f} images/s{told}")


def _rows(batches: TrainingBatches, layout: _Layout, parts: list[int]) -> Iterator[tuple[int, int, Batch]]:
    """Yields part, row in the part, and batch. Consecutive parts are read in one stream."""
    stream: Iterator[Batch] = iter(())
    at = -1
    for part in parts:
        steps = layout.steps_of(part)
        if at != steps.start:
            stream = batches.from_step(steps.start)
        for row, batch in enumerate(islice(stream, len(steps))):
            yield part, row, batch
        at = steps.stop


def _say(console: Console, sentence: str) -> None:
    console.print(shown(sentence), markup=False, highlight=False, soft_wrap=True)


class LabelCache:
    """The teacher's answers from a folder that `teach` wrote. They cover `steps` steps and then repeat."""

    def __init__(self, folder: Path, layout: _Layout, description: Mapping[str, Any]):
        self.folder, self.layout, self.steps, self.description = folder, layout, layout.steps, description
        self.prints, self.teacher = dict(description["fingerprints"]), str(description["teacher"])
        self.judged: Accuracy | None = None
        """The teacher's accuracy on the images that it was introduced with; None if it was not tried on them."""
        self.part, self.part_kept = -1, dict[str, np.ndarray]()
        self.verified: set[int] = set()

    @classmethod
    def open(cls, folder: str | Path, split: Split, recipe: Recipe) -> LabelCache:
        """Opens a cache for this recipe.

        Raises `FileNotFoundError` if there is no cache, and `ValueError` if it is not complete, or if it has other
        images or other views than this recipe.
        """
        folder = Path(folder)
        description = _description(folder)
        _compare(folder, description, recipe, split, {"data": fingerprint(split), "views": _hash(views(recipe, split))})
        channels = tuple(description.get("channels", ()))
        layout = _layout(recipe, split, description["steps"], channels)
        layout = replace(layout, steps_per_part=description["steps_per_part"])
        whole = sum(_is_whole(folder, layout, part) for part in range(layout.parts))
        if whole < layout.parts:
            raise ValueError(
                f"{folder} holds {whole} of {layout.parts} parts; run the same deit teach again, which makes the "
                "missing ones"
            )
        return cls(folder, layout, description)

    def introduction(self, validation: Split) -> Iterator[str]:
        """Where the labels come from, and what their teacher was worth on these validation images."""
        told = f"the labels that {self.teacher} gave, from {self.folder}"
        self.judged = _judged(self.description, validation)
        if self.judged is None:
            yield f"{told}; its accuracy on these validation images is not stored, and the same deit teach adds it"
            return
        value, interval = self.judged.cells()
        yield f"{told}; it was right on {value:.3f} of {self.judged.total:,} validation images ({interval} at 95 %)"

    def kept(self, step: int, positions: Tensor) -> dict[str, Tensor]:
        """The result of `Teacher.kept` for `positions` (B,) of the global batch of step `step`, on the CPU.

        Raises `CheckpointError` if the part is damaged.
        """
        part, row = divmod(step % self.steps, self.layout.steps_per_part)
        if part != self.part:  # a part is read whole, because its checksum needs every byte
            self.part_kept = _read(self.folder, self.layout, part, self.prints, verify=part not in self.verified)
            self.part = part
            self.verified.add(part)
        rows = positions.numpy()
        return {
            name: torch.from_numpy(array[row][rows].astype(np.int64 if name in ("hard", "index") else array.dtype))
            for name, array in self.part_kept.items()
        }


# -------------------------------------------------------------------------------------------------------- descriptions


def views(recipe: Recipe, split: Split) -> dict[str, Any]:
    """What determines the teacher's views, beside the images, and what is kept of its answers, as JSON types."""
    description = recipe.to_dict()
    chosen = {"data": ("batch", "repeats", "crop_ratio", "mean", "std"), "objective": ("kind", "top_k", "resolution")}
    return {
        "version": VIEWS_VERSION,
        **({"jpeg_version": JPEG_VERSION} if _crops_jpeg(recipe, split) else {}),
        "seed": recipe.seed,
        "augment": {name: value for name, value in description["augment"].items() if (name, value) != _USUAL},
        "model": {"image_size": list(recipe.model.image_hw), "num_channels": recipe.model.num_channels},
        **{part: {name: description[part][name] for name in names} for part, names in chosen.items()},
        **_guided(recipe),
    }


_USUAL = ("on", "loader")
"""A setting that descriptions leave out, because the caches of earlier versions don't have it."""


def _guided(recipe: Recipe) -> dict[str, Any]:
    """What determines the teacher's maps, if they are kept."""
    objective, model = recipe.objective, recipe.model
    if not isinstance(objective, Distilled) or not objective.guidance or not isinstance(model, DeiTConfig):
        return {}
    return {"maps": {"version": guidance.VERSION, "grid": list(model.grid), "width": model.hidden_size}}


def _crops_jpeg(recipe: Recipe, split: Split) -> bool:
    """Whether a view may be a crop of a JPEG file, judged by the files' names."""
    return recipe.augment.crop is not None and not all(
        os.fspath(file).lower().endswith(_NO_JPEG) for file in split.files
    )


_NO_JPEG = (".bmp", ".gif", ".png", ".ppm", ".tif", ".tiff", ".webp")


def _version(views: Mapping[str, Any]) -> str:
    return f"{views.get('version')}" + (f".{views['jpeg_version']}" if "jpeg_version" in views else "")


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


_KEYS = ("fingerprints", "teacher", "steps", "steps_per_part", "images", "views", "deit")
"""Keys of cache.json that are needed to use or extend a cache."""


def _description(folder: Path) -> dict[str, Any]:
    path = folder / "cache.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no cache.json; expected a folder that deit teach wrote, or set objective.cache to nothing "
            "(--set objective.cache=), and the teacher answers during training"
        )
    description = files.read_json(path)
    if description.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {description.get('version')!r}, but this package reads {VERSION}; run deit teach "
            "into another folder"
        )
    if missing := [name for name in _KEYS if name not in description]:
        raise files.CheckpointError(f"{path} is damaged, it lacks {missing[0]!r}; run deit teach into another folder")
    return description


def _compare(
    folder: Path, description: Mapping[str, Any], recipe: Recipe, split: Split, prints: Mapping[str, str]
) -> None:
    """Refuses a cache of other data, views or teacher, and says which differs."""
    differing = [name for name in prints if description["fingerprints"].get(name) != prints[name]]
    if not differing:
        return
    name = differing[0]
    if name == "data":
        reason = (
            f"{description['images']} images there, {len(split)} here"
            if description["images"] != len(split)
            else "names, classes or contents of its files differ"
        )
    elif name == "views":
        then, now = description["views"], views(recipe, split)
        versions = ("version", "jpeg_version")
        theirs, ours = (
            {name: value for name, value in each.items() if name not in versions}
            | {"augment": dict([_USUAL]) | each["augment"]}
            for each in (then, now)
        )
        reason = (
            difference(theirs, ours)
            or f"the code of augmentation has changed since (version {_version(then)} there, {_version(now)} here)"
        )
    else:
        reason = f"its weights, classes or preprocessing differ from those that {description['teacher']} had then"
    moves = {"data": "restore that data", "views": "set it back", "teacher": "use that teacher"}
    raise ValueError(
        f"{folder} was taught with other {name}: {reason}; {moves[name]}, or run deit teach into another folder"
    )


def _claim(out: Path, recipe: Recipe, split: Split, layout: _Layout, prints: Mapping[str, str]) -> _Layout:
    """Makes `out` the cache of these answers, or extends it in its own layout. Refuses a folder of anything else."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    names = {
        name for name in names if not re.match(r"\.(rank-\d+\.lock$|cache\.json\.|labels-\d+\.safetensors\.)", name)
    }  # half written
    if foreign := sorted(name for name in names if name != "cache.json" and not _FILE.fullmatch(name)):
        raise ValueError(f"{out} holds {foreign[0]}, which is not part of a label cache; choose an empty or new folder")
    objective = recipe.objective
    assert isinstance(objective, Distilled)
    description = {
        "version": VERSION,
        "fingerprints": dict(prints),
        "teacher": objective.teacher,
        "kind": layout.kind,
        "top_k": layout.top_k,
        "classes": layout.classes,
        "channels": list(layout.channels),
        "batch": layout.batch,
        "steps": layout.steps,
        "steps_per_part": layout.steps_per_part,
        "images": len(split),
        "views": views(recipe, split),
        "deit": host.VERSION,
    }
    found: dict[str, Any] = {}
    if "cache.json" in names:
        found = _description(out)
        _compare(out, found, recipe, split, prints)
        if found["steps"] > layout.steps:
            raise ValueError(
                f"{out} is a cache of {found['steps']} steps, but {layout.steps} are asked for; ask for at least as "
                "many epochs, or choose another folder"
            )
        layout = replace(layout, steps_per_part=found["steps_per_part"])
        kept: dict[str, Any] = {name: found[name] for name in ("deit", "judged") if name in found}
        description |= {"steps_per_part": layout.steps_per_part, **kept}
    elif names:
        raise ValueError(f"{out} holds {min(names)} but no cache.json that describes it; choose an empty or new folder")
    if found != json.loads(json.dumps(description)):
        files.write_json(out / "cache.json", description)
    return layout


# --------------------------------------------------------------------------------------------------------------- parts


def _path(folder: Path, part: int) -> Path:
    return folder / f"labels-{part:05}.safetensors"


def _is_whole(folder: Path, layout: _Layout, part: int) -> bool:
    """Whether a part exists and has the right length. Its checksum is compared when it is read."""
    try:
        with open(_path(folder, part), "rb") as file:
            header = int.from_bytes(file.read(8), "little")
            return file.seek(0, 2) == 8 + header + layout.size(len(layout.steps_of(part)))
    except FileNotFoundError:
        return False


def _checksum(arrays: Mapping[str, np.ndarray], part: int, prints: Mapping[str, str]) -> str:
    """Hash of a part's content, its number and its cache, so that exchanged parts are noticed."""
    digest = hashlib.sha256(json.dumps([part, prints], sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _write(folder: Path, layout: _Layout, part: int, prints: Mapping[str, str], kept: Mapping[str, Tensor]) -> None:
    expected = layout.tensors(len(layout.steps_of(part)))
    arrays = {name: value.cpu().numpy().astype(expected[name][0]) for name, value in kept.items()}
    assert {name: (array.dtype, array.shape) for name, array in arrays.items()} == expected
    with _undisturbed(), files.replacing(_path(folder, part)) as temporary:
        save_file(arrays, temporary, {"sha256": _checksum(arrays, part, prints)})


def _read(
    folder: Path, layout: _Layout, part: int, prints: Mapping[str, str], *, verify: bool = True
) -> dict[str, np.ndarray]:
    path, expected = _path(folder, part), layout.tensors(len(layout.steps_of(part)))
    try:
        with safe_open(path, "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
            checksum = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        raise files.CheckpointError(
            f"{path} is truncated or corrupt ({error}); the same deit teach replaces it"
        ) from None
    found = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    if found != expected or (verify and checksum != _checksum(arrays, part, prints)):
        raise files.CheckpointError(
            f"{path} is damaged, or a part of another cache (its checksum or shapes are "
            "wrong); the same deit teach replaces it"
        )
    return arrays


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Makes SIGTERM and Ctrl-C wait until the block ends, so that a finished part is written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: caught.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])
