"""Runs trained classifiers over images: a quick accuracy during training, a thorough examination of a finished model.

B images of a batch, N images in all, C classes.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from deit.choices import Head
from deit.data.batches import Batch, EvaluationBatches
from deit.data.folders import Split, fingerprint, matched, read_examples
from deit.evaluate import alarms
from deit.evaluate.scores import Accuracy, BalancedAccuracy, Comparison, Report, compare
from deit.machine import Processes, Rows, full_float32, resolve_device
from deit.model.heads import head_probabilities
from deit.model.load import load_classifier, refuse_head, refuse_not_finite, refuse_other_scoring
from deit.terminal import shown
from deit.words import Said

_BATCH = 64
_MANY = 512
"""Number of images from which on loader processes are worth starting."""


def _answered(
    model: nn.Module, batches: Iterable[Batch], device: torch.device, precision: torch.dtype, rows: Rows
) -> Iterator[tuple[Batch, Tensor, dict[Head, Tensor]]]:
    """Yields each batch, its labels on the device, and the probabilities (B, C) of every head.

    The model is in evaluation mode meanwhile. Its own mode is restored.
    """

    def computed(pixels: Tensor) -> dict[Head, Tensor]:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            return head_probabilities(model(pixels))

    training = model.training
    model.eval()
    try:
        for batch in batches:
            there = batch.to(device)
            by_head = rows(computed, there.pixels)
            yield batch, there.labels, by_head
    finally:
        model.train(training)


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    us: Processes | None = None,
    precision: torch.dtype = torch.float32,
    rows: Rows | None = None,
) -> dict[Head, Accuracy]:
    """Accuracy of each head, as `evaluate_by_class` computes it."""
    return {head: found.plain for head, found in evaluate_by_class(model, batches, us, precision, rows).items()}


@torch.inference_mode()
def evaluate_by_class(
    model: nn.Module,
    batches: Iterable[Batch],
    us: Processes | None = None,
    precision: torch.dtype = torch.float32,
    rows: Rows | None = None,
) -> dict[Head, BalancedAccuracy]:
    """Correct decisions of each head for each class over all batches, in evaluation mode. The model's mode is restored.

    With many processes, each gives its share of the batches, and all get the result on all of them. Rows labelled -1
    (padding and unreadable images) do not count. `rows` decides how many images are computed at once, and remembers it.
    Without it, a warning says when memory runs out. Raises `ValueError` if no row counts.
    """
    us = us or Processes(torch.device("cpu"))
    rows = rows or Rows(warnings.warn)
    heads: list[Head] = []
    counts = torch.zeros(0, dtype=torch.int64, device=us.device)  # (heads + 1, C): correct ones, and at last all images
    for _, labels, by_head in _answered(model, batches, us.device, precision, rows):
        answers = list(by_head.values())
        if not heads:
            heads, counts = list(by_head), counts.new_zeros(len(answers) + 1, answers[0].shape[1])
        counted = torch.stack([*(probabilities.argmax(-1) == labels for probabilities in answers), labels >= 0])
        counts.index_add_(1, labels.clamp(min=0), counted.long())
    *correct, support = map(tuple, us.sum(counts).tolist()) if heads else [()]
    if not sum(support):
        raise ValueError("there is no image to evaluate on")
    return {head: BalancedAccuracy(found, support) for head, found in zip(heads, correct, strict=True)}


@torch.inference_mode()
def examine(
    model: nn.Module,
    batches: Iterable[Batch],
    classes: Sequence[str],
    *,
    head: Head = "fused",
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
    rows: Rows | None = None,
) -> Report:
    """Computes a full report on a model's answers, in evaluation mode. The model's mode is restored.

    A few numbers are kept for each image, not its C probabilities. Rows labelled -1 do not count.

    Args:
        batches: batches of `EvaluationBatches`, with labels in the model's order.
        classes: names of the model's C classes.
        head: head for calibration, classes and confusions. The accuracy is that of every head.
        rows: as for `evaluate`.

    Raises `ValueError` if no row counts, if the model lacks the head, or if answers are not finite.
    """
    rows = rows or Rows(warnings.warn)
    columns: defaultdict[str, _Column] = defaultdict(_Column)
    ranks: defaultdict[str, _Column] = defaultdict(_Column)
    faults: list[tuple[str, str]] = []
    done = 0
    with full_float32():
        for batch, labels, by_head in _answered(model, batches, torch.device(device), precision, rows):
            _check(by_head, labels, head, classes, done)
            chosen = by_head[head]
            true = labels.clamp(min=0).unsqueeze(1)  # (B, 1)
            for each, probabilities in by_head.items():
                ranks[each].extend(_ranks(probabilities, true))
            predicted = chosen.argmax(-1)
            for name, values in (
                ("labels", labels),
                ("predicted", predicted),
                ("confidence", chosen.gather(1, predicted.unsqueeze(1)).squeeze(1)),
                ("probability", chosen.gather(1, true).squeeze(1)),
                ("squares", chosen.square().sum(-1)),
            ):
                columns[name].extend(values)
            faults += batch.faults
            done += len(batch)
    if not done:
        raise ValueError("there is no image to evaluate on")
    return Report(
        classes=tuple(classes),
        head=head,
        unreadable=tuple(faults),
        ranks={name: column.whole() for name, column in ranks.items()},
        **{name: column.whole() for name, column in columns.items()},
    )


class _Column:
    """A growing array.

    If each batch's small arrays were kept instead, they would lie in memory between large ones that are freed, and
    nothing would fit the gaps. That takes 12 KB more memory for every image.
    """

    def __init__(self) -> None:
        self.values: np.ndarray = np.empty(0)
        self.used = 0

    def extend(self, values: Tensor) -> None:
        """Adds (B,) integers as int64, or numbers as float64."""
        if self.used + len(values) > len(self.values):
            kind = np.float64 if values.is_floating_point() else np.int64
            grown = np.empty(2 * (self.used + len(values)), kind)
            grown[: self.used] = self.values[: self.used]
            self.values = grown
        self.values[self.used : self.used + len(values)] = values.cpu().numpy()
        self.used += len(values)

    def whole(self) -> np.ndarray:
        return self.values[: self.used].copy()


def _ranks(probabilities: Tensor, true: Tensor) -> Tensor:
    """(B,) number of the C classes that come before the true one, (B, 1): those with a larger probability, or with an
    equal one and a lower number."""
    own = probabilities.gather(1, true)
    earlier = torch.arange(probabilities.shape[1], device=true.device) < true  # (B, C)
    return ((probabilities > own) | ((probabilities == own) & earlier)).sum(-1)


def _check(by_head: dict[Head, Tensor], labels: Tensor, head: Head, classes: Sequence[str], done: int) -> None:
    """Refuses answers that can't be scored. `done` images came before them."""
    refuse_head(head, tuple(by_head))
    if (outputs := by_head[head].shape[1]) != len(classes):
        raise ValueError(
            f"the model gives {outputs} probabilities for {len(classes)} class names; name each of its classes"
        )
    sums = torch.stack([probabilities.sum(-1) for probabilities in by_head.values()])  # (heads, B)
    broken = (~sums.isfinite().all(0) & (labels >= 0)).nonzero().flatten().tolist()
    if broken:
        refuse_not_finite([sums[:, broken[0]]], f" to image {done + broken[0]} of the data")


# --------------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Examined:
    """A model, how its images were prepared, and its report."""

    model: str
    """Folder or hub name of the model."""
    image_size: tuple[int, int]
    """(height, width) of the pixels that the model saw."""
    crop_ratio: float | None
    """Side of the crop divided by that of the resized image; None if nothing is resized."""
    report: Report
    crop_asked: float | None = None
    """The crop ratio that was asked for; None for the model's own. `crop_ratio` may differ: sizes are whole pixels."""

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "image_size": list(self.image_size), "crop_ratio": self.crop_ratio}


@dataclass(frozen=True)
class Evaluation:
    """The result of `deit eval`, and the images that it is for."""

    data: str
    """The folder or list."""
    split: str | None
    """train, val or test; None if the data has no splits."""
    fingerprint: str
    """`data.fingerprint` of the images under their own class names, so it is the same for every model."""
    main: Examined
    other: Examined | None = None
    files: tuple[Path, ...] = ()
    """The file of every image, in the order of the reports' rows."""

    @property
    def comparison(self) -> Comparison | None:
        return None if self.other is None else compare(self.main.report, self.other.report)

    def alarms(self, named: Callable[[str], str] = str) -> list[Said]:
        """What to beware of in these numbers, each with the next move. `named` shows the name of a class."""
        report = self.main.report
        images = [each.support for each in report.by_class]
        return [
            *alarms.learnt_nothing(report.accuracy().value, [*map(named, report.classes)], images),
            *alarms.judged_by(self.split),
        ]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; the keys are in docs/evaluation.md. `comparison` is only there if two models were compared."""
        found = {
            **self.main.to_dict(),
            "data": {"path": self.data, "split": self.split, "fingerprint": self.fingerprint},
            **self.main.report.to_dict(),
        }
        if self.other is not None and (comparison := self.comparison):
            found["comparison"] = {**self.other.to_dict(), **comparison.to_dict()}
        return found


def examine_files(
    model: str | Path,
    data: str | Path,
    *,
    split: str | None = None,
    head: Head = "fused",
    crop_ratio: float | None = None,
    other: str | Path | None = None,
    device: str = "auto",
    console: Console | None = None,
) -> Evaluation:
    """Examines a model on labelled images.

    It computes in float32, so that the result does not depend on the number format that a machine is fast with.

    Args:
        model: a model as for `load_model`. It has its own preprocessing.
        data, split: as for `read_examples`. The data's classes are found in the model by name.
        crop_ratio: replaces the crop ratio of the model's preprocessing (`DeiTImageProcessor.with_crop_ratio`).
        other: a second model for the same images, with its own preprocessing throughout.
        console: where progress and unreadable images are shown; standard error if it is None.

    Raises `ValueError` or `FileNotFoundError` if model, preprocessing, head and data don't fit together. That is before
    any image is evaluated.
    """
    examples, found = read_examples(data, split)
    return examine_split(
        model, examples, str(data), found, head=head, crop_ratio=crop_ratio, other=other, device=device, console=console
    )


def examine_split(
    model: str | Path,
    examples: Split,
    data: str,
    split: str | None,
    *,
    head: Head = "fused",
    crop_ratio: float | None = None,
    other: str | Path | None = None,
    device: str = "auto",
    console: Console | None = None,
) -> Evaluation:
    """Like `examine_files`, for a split that was already read. `data` and `split` only name it."""
    place = resolve_device(device)
    console = console or Console(stderr=True)
    subjects = [_Subject(model, examples, head, crop_ratio, place)]
    if other is not None:
        subjects.append(_Subject(other, examples, head, None, place))
    identity = fingerprint(examples)
    main, *others = (subject.examine(console, tell=subject is subjects[0]) for subject in subjects)
    return Evaluation(data, split, identity, main, others[0] if others else None, examples.files)


class _Subject:
    """A model that is about to be examined. Everything that could be wrong with it is already checked."""

    def __init__(self, name: str | Path, examples: Split, head: Head, crop_ratio: float | None, device: torch.device):
        self.name, self.head, self.device, self.crop_asked = str(name), head, device, crop_ratio
        classifier = load_classifier(name)
        refuse_other_scoring(name, classifier.model.config.scoring, "an evaluation")
        refuse_head(head, classifier.heads)
        self.model, processor, self.classes = classifier.model.to(device), classifier.processor, classifier.labels
        self.processor = processor if crop_ratio is None else processor.with_crop_ratio(crop_ratio)
        self.split = matched(examples, self.classes)
        blank = self.processor([Image.new("RGB", (8, 8))], return_tensors="pt").pixel_values
        self.image_size = (blank.shape[2], blank.shape[3])
        with torch.inference_mode():
            self.model(blank.to(device))  # fails before any image is read if pixels and model don't fit

    def examine(self, console: Console, tell: bool) -> Examined:
        batches = EvaluationBatches(
            self.split,
            self.processor,
            _BATCH,
            keep=False,
            workers=None if len(self.split) >= _MANY else 0,
            device=self.device,
        )
        shown = track(batches, self.name, console=console, disable=not console.is_terminal)
        report = examine(
            self.model,
            _telling(shown, console) if tell else shown,
            self.classes,
            head=self.head,
            device=self.device,
            rows=Rows(partial(console.print, markup=False, highlight=False, soft_wrap=True)),
        )
        return Examined(self.name, self.image_size, self.processor.crop_ratio, report, self.crop_asked)


def _telling(batches: Iterable[Batch], console: Console) -> Iterator[Batch]:
    for batch in batches:
        for file, reason in batch.faults:
            console.print(
                shown(f"{file} {reason}. The evaluation leaves it out"), markup=False, highlight=False, soft_wrap=True
            )
        yield batch
