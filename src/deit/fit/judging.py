"""Compares the models of a fit on the same images, chooses one, and says why."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from deit.choices import Prefer
from deit.data.folders import Split
from deit.evaluate.models import Evaluation, examine_split
from deit.evaluate.scores import Accuracy, Comparison, Report, compare
from deit.predict.predictor import Predictor
from deit.report.evaluation import cells
from deit.report.markup import Section, joined, table, told
from deit.words import Said, Text, said, series

_TIMED = 32
"""Number of images that a model's speed is measured on."""
_SURE = 0.05
"""The p-value below which two models count as different."""
_NAMES = {"frozen": said("frozen baseline"), "teacher": said("teacher"), "student": said("student")}


@dataclass(frozen=True)
class Candidate:
    """A model that a fit trained, and what it is worth."""

    name: str
    """The step that trained it."""
    folder: Path
    validation: Evaluation
    judged: Evaluation
    """On the test images, or on the validation images if there are no others."""
    size: int
    """Bytes of its weights."""
    images_per_second: float
    """From files to labels, on this machine, with PyTorch."""

    @property
    def report(self) -> Report:
        return self.judged.main.report

    @property
    def heads(self) -> dict[str, Accuracy]:
        return {head: self.report.accuracy(head) for head in self.report.heads}

    @property
    def accuracy(self) -> Accuracy:
        return self.report.accuracy()


@dataclass(frozen=True)
class Fitted:
    """The result of a fit."""

    model: Path
    """Folder of the recommended model."""
    recommended: str
    """The step that trained it: frozen, teacher or student."""
    reason: Said
    """Why this one, in a sentence."""
    candidates: tuple[Candidate, ...]
    seconds: float
    """Time of everything, in all sessions together."""
    split: str
    """The images that the accuracies are on: test or val."""
    report: Path | None = None

    def __getitem__(self, name: str) -> Candidate:
        return next(each for each in self.candidates if each.name == name)

    @property
    def pairs(self) -> dict[tuple[str, str], Comparison]:
        """Every two models, compared on the images that both could read."""
        return {
            (one.name, other.name): compare(one.report, other.report)
            for one, other in itertools.combinations(self.candidates, 2)
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; the keys are in docs/fit.md."""
        return {
            "model": str(self.model),
            "recommended": self.recommended,
            "reason": str(self.reason),
            "seconds": round(self.seconds, 1),
            "split": self.split,
            "images": self.candidates[0].report.images,
            "models": {
                each.name: {
                    "folder": str(each.folder),
                    "heads": {head: accuracy.to_dict() for head, accuracy in each.heads.items()},
                    "val_accuracy": each.validation.main.report.accuracy().value,
                    "bytes": each.size,
                    "images_per_second": round(each.images_per_second, 1),
                }
                for each in self.candidates
            },
            "pairs": [{"first": one, "second": other, **found.to_dict()} for (one, other), found in self.pairs.items()],
            "report": None if self.report is None else str(self.report),
        }


def judge(
    folders: Mapping[str, Path], data: str, val: Split, test: Split | None, *, device: str, console: Console
) -> tuple[Candidate, ...]:
    """Examines the models of these folders, by the names of their steps."""
    found = []
    for name, folder in folders.items():
        validation = examine_split(folder, val, data, "val", device=device, console=console)
        judged = validation
        if test is not None:
            judged = examine_split(folder, test, data, "test", device=device, console=console)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        found.append(Candidate(name, folder, validation, judged, size, _speed(folder, validation, device)))
    return tuple(found)


def _speed(folder: Path, evaluation: Evaluation, device: str) -> float:
    predictor = Predictor(folder, device=device, engine="torch")
    readable = [file for file, read in zip(evaluation.files, evaluation.main.report.read, strict=True) if read]
    files = readable[:: max(1, len(readable) // _TIMED)][:_TIMED]
    predictor(files[:2])
    began = time.perf_counter()
    predictor(files)
    return len(files) / (time.perf_counter() - began)


def recommend(candidates: Sequence[Candidate], prefer: Prefer) -> tuple[Candidate, Said]:
    """The model to take, and why. Validation images decide, so that test images judge a choice that they did not make.

    `accuracy` takes the model that is right most often, and of equal ones that which gives the true classes the higher
    probabilities (log likelihood). `speed` takes the fastest of those that are not surely worse than that one
    (McNemar's test, p below 0.05).
    """
    reports = {each.name: each.validation.main.report for each in candidates}
    right = {name: report.accuracy() for name, report in reports.items()}
    best = max(candidates, key=lambda each: (right[each.name].value, -reports[each.name].nll))
    if len(candidates) == 1:
        return best, said("the {name} is the only model", name=_NAMES[best.name])
    as_good = [
        each for each in candidates if each is best or compare(reports[best.name], reports[each.name]).p_value >= _SURE
    ]
    chosen = max(as_good, key=lambda each: each.images_per_second) if prefer == "speed" else best
    rest = [
        said("the {name} on {correct}", name=_NAMES[each.name], correct=right[each.name].correct)
        for each in candidates
        if each is not chosen
    ]
    reasons = [
        said(
            "the {name} is right on {correct} of {total} validation images, {rest}",
            name=_NAMES[chosen.name],
            correct=right[chosen.name].correct,
            total=right[chosen.name].total,
            rest=series(" and ", rest),
        )
    ]
    if chosen is not best:
        reasons.append(
            said("it is the fastest of those that are not surely worse than the {name}", name=_NAMES[best.name])
        )
        return chosen, series("; ", reasons)
    equal = [_NAMES[each.name] for each in candidates if each is not best and right[each.name] == right[best.name]]
    if equal:
        names = series(" and the ", equal)
        reasons.append(said("it gives the true classes higher probabilities than the {names}", names=names))
    ties = [_NAMES[each.name] for each in as_good if each is not best]
    if ties:
        reasons.append(said("the difference to the {names} may be chance", names=series(" and the ", ties)))
    return chosen, series("; ", reasons)


_COLUMNS = (said("model"), said("head"), said("accuracy"), said("95 % interval"), said("val"), "MB", said("images/s"))


def _rows(fitted: Fitted, marked: Callable[[str], Text]) -> list[tuple[Text, ...]]:
    """The cells of the table of all models and heads. `marked` makes the name of the recommended one."""
    found: list[tuple[Text, ...]] = []
    for each in fitted.candidates:
        name: Text = marked(each.name) if each.name == fitted.recommended else each.name
        speed = (f"{each.size / 1e6:.1f}", f"{each.images_per_second:.0f}")
        for head, accuracy in each.heads.items():
            value, interval = cells(accuracy)
            validation = each.validation.main.report.accuracy(head).value
            found.append((name, head, f"{value:.3f}", interval, f"{validation:.3f}", *speed))
            name, speed = "", ("", "")
    return found


def show(fitted: Fitted, console: Console) -> None:
    """Prints the table, the paired tests and the recommendation."""
    images = fitted.candidates[0].report.images
    kind = "test" if fitted.split == "test" else "validation"
    title = f"On the {images:,} {kind} images"
    shown = Table(title=title, title_justify="left", box=SIMPLE, collapse_padding=True, pad_edge=False)
    for place, column in enumerate(_COLUMNS):
        shown.add_column(str(column), justify="left" if place < 2 else "right", no_wrap=True)
    for row in _rows(fitted, "{} *".format):
        shown.add_row(*map(str, row))
    console.print(shown)
    for (one, other), found in fitted.pairs.items():
        low, high = found.interval
        _say(
            console,
            f"{_NAMES[one]} minus {_NAMES[other]}: {found.difference:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, "
            f"McNemar's exact test p = {found.p_value:.3g}",
        )
    _say(console, f"Recommended: {fitted.reason}.")
    _say(console, f"{fitted.model}")


def section(fitted: Fitted) -> Section:
    """The recommendation and the table for a report."""
    title = said("The models that were compared")
    rows = _rows(fitted, lambda name: said("{name} (recommended)", name=name))
    return Section("fit", title, joined([told(fitted.reason), table(title, _COLUMNS, rows, hidden=True)]))


def _say(console: Console, sentence: str) -> None:
    console.print(sentence, markup=False, highlight=False, soft_wrap=True)
