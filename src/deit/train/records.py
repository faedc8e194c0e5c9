"""Reads what a run's folder says about it, without a framework."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from deit import files
from deit.evaluate.alarms import below_teacher, learnt_nothing
from deit.evaluate.scores import Accuracy
from deit.words import Said

ABOUT, RECIPE, METRICS, MODEL, ADAPTER = "about.json", "recipe.json", "metrics.jsonl", "model", "adapter"


@dataclass(frozen=True, kw_only=True)
class About:
    """The part of a run that its recipe doesn't say: its images and its machine. The content of `RUN/about.json`."""

    began: str
    """Date and time in UTC, ISO 8601."""
    data: str
    """The folder that holds the training and validation images; empty if they share none."""
    fingerprint: str
    """`folders.fingerprint` of the training images."""
    classes: tuple[str, ...]
    train: tuple[int, ...]
    """Number of training images of each class."""
    val: tuple[int, ...]
    """Number of validation images of each class."""
    device: str
    """Name of the device, in words."""
    processes: int
    precision: str
    """Number format of the forward and backward pass."""
    versions: Mapping[str, str]
    teacher: tuple[int, int] | None = None
    """Number of validation images that the teacher was right on before the first step, and of how many. None without a
    teacher, or if it was not tried."""

    def alarms(self, accuracy: float, named: Callable[[str], str] = str) -> list[Said]:
        """What to beware of in a model with this accuracy on the validation images, each with the next move. `named`
        shows the name of a class."""
        return [
            *learnt_nothing(accuracy, [*map(named, self.classes)], self.val),
            *below_teacher(accuracy, None if self.teacher is None else Accuracy(*self.teacher)),
        ]

    def trained_on(self, data: str, split: str | None, fingerprint: str) -> bool:
        """Whether the run was trained on some of these images: they have the fingerprint of its training images, or are
        all that lie where those do. The arguments are those of an `Evaluation`."""
        places = [os.path.abspath(place) for place in (self.data, data) if place]
        return fingerprint == self.fingerprint or (split is None and len(places) == 2 and places[0] == places[1])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> About:
        """The inverse of `to_dict`. Ignores unknown keys; raises `ValueError` for values that it doesn't write."""
        kinds: dict[str, Any] = {"classes": str, "train": int, "val": int}
        found: dict[str, Any] = {}
        for each in fields(cls):
            value = values.get(each.name)
            if each.name in kinds:
                right = isinstance(value, list) and all(isinstance(one, kinds[each.name]) for one in value)
                value = tuple(value) if right and value is not None else value
            elif each.name == "versions":
                right = isinstance(value, dict)
            elif each.name == "teacher":  # runs of earlier versions don't say
                right = value is None or is_part(value)
                value = tuple(value) if right and value is not None else value
            else:
                right = isinstance(value, int if each.name == "processes" else str)
            if not right:
                raise ValueError(f"{each.name} is {value!r:.80}")
            found[each.name] = value
        about = cls(**found)
        if not len(about.classes) == len(about.train) == len(about.val):
            raise ValueError("classes, train and val differ in length")
        return about


@dataclass(frozen=True)
class Record:
    """A run as its folder describes it. Missing and damaged parts are empty here and named in `gaps`."""

    folder: Path
    recipe: Mapping[str, Any]
    """`recipe.json`, as JSON types."""
    rows: tuple[Mapping[str, Any], ...]
    """Rows of `metrics.jsonl`; keys and units are in docs/evaluation.md."""
    about: About | None
    gaps: tuple[str, ...]
    """What is missing or damaged, in words."""

    @classmethod
    def read(cls, folder: str | Path) -> Record:
        """Reads the folder of a run. Raises `FileNotFoundError` if it holds no run at all."""
        folder = Path(folder)
        if not any((folder / name).exists() for name in (RECIPE, METRICS)):
            steps = sorted(str(place.parent) for place in folder.glob(f"*/{RECIPE}"))
            move = f"give one of the runs in it: {', '.join(steps)}" if steps else ""
            raise FileNotFoundError(
                f"{folder} holds no run (neither {RECIPE} nor {METRICS}); "
                + (move or "give the folder that `deit train --out` wrote")
            )
        gaps: list[str] = []
        recipe = _object(folder / RECIPE, gaps)
        about = None
        if values := _object(folder / ABOUT, gaps):
            try:
                about = About.from_dict(values)
            except ValueError as error:
                gaps.append(f"{ABOUT} can't be used ({error})")
        return cls(folder, recipe, _rows(folder / METRICS, gaps), about, tuple(gaps))

    @property
    def name(self) -> str:
        return str(self.recipe.get("name") or self.folder.name)

    @property
    def labelled(self) -> bool:
        objective = self.recipe.get("objective")
        return not (isinstance(objective, dict) and objective.get("kind_of") == "MaskedImage")

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The row of the model that was kept, which has the highest accuracy or the lowest loss on validation images.
        Of equal rows, the last one counts."""
        scored = [
            (-row["val_loss"] if "val_loss" in row else row["val_accuracy"], place)
            for place, row in enumerate(self.rows)
            if is_number(row.get("val_loss", row.get("val_accuracy")))
        ]
        return self.rows[max(scored)[1]] if scored else None

    def last(self, key: str) -> float | None:
        """The latest number under a key of the metrics; None if there is none."""
        return next((row[key] for row in reversed(self.rows) if is_number(row.get(key))), None)


def is_part(value: object) -> bool:
    """Whether a value is a list of two whole numbers: a part, and the whole that it belongs to."""
    whole = isinstance(value, list) and len(value) == 2 and all(type(one) is int for one in value)
    return whole and 0 <= value[0] <= value[1] and value[1] > 0  # type: ignore[index]


def is_number(value: object) -> bool:
    """Whether a value is a finite number: not missing, not text, and neither infinite nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def flat(recipe: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The fields of a `recipe.json` by their dotted names. A duration is one value."""
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        name = f"{path}{key}"
        if isinstance(value, dict) and {"amount", "unit"} <= value.keys():
            amount = value["amount"]
            found[name] = f"{f'{amount:g}' if isinstance(amount, float) else amount} {value['unit']}"
        elif isinstance(value, dict) and value:
            found |= flat(value, f"{name}.")
        else:
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def _object(path: Path, gaps: list[str]) -> dict[str, Any]:
    if not path.exists():
        gaps.append(f"{path.name} is missing")
        return {}
    try:
        return files.read_json(path)
    except (files.CheckpointError, OSError) as error:
        gaps.append(f"{path.name} can't be read ({error})")
        return {}


def _rows(path: Path, gaps: list[str]) -> tuple[dict[str, Any], ...]:
    """Rows with a number of steps. Every row that was written whole has one."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        gaps.append(
            f"{path.name} {'is missing' if isinstance(error, FileNotFoundError) else f'could not be read ({error})'}"
        )
        return ()
    rows, damaged = [], 0
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and is_number(row.get("step")):
            rows.append(row)
        else:
            damaged += 1
    if damaged:
        gaps.append(
            f"{damaged} of the {len(lines)} lines of {path.name} can't be read and "
            f"{'is' if damaged == 1 else 'are'} left out"
        )
    return tuple(rows)


def span(seconds: float) -> str:
    """A duration for people: `45 s`, `12 min` or `1.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def in_epochs(views: int, images: int) -> str:
    """How often so many views show each image, for people: `1 epoch` or `2.5 epochs`."""
    number = f"{views / images:.4g}"
    return f"{number} epoch{'s' * (number != '1')}"


def amount(count: int) -> str:
    """A number of bytes for people: `45 KiB`, `12 MiB` or `1.5 GiB`."""
    if count < 2**20:
        return f"{count / 2**10:.0f} KiB"
    return f"{count / 2**30:.2g} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
