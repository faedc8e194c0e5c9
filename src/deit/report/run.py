"""The sections of a report about a run. If the run's record lacks something, a section says so in a sentence."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from deit import recipes
from deit.data.counts import remarks
from deit.evaluate.calibration import Calibration
from deit.evaluate.models import Evaluation
from deit.evaluate.scores import Accuracy
from deit.recipe import Recipe
from deit.report import drawing
from deit.report.drawing import Line
from deit.report.evaluation import heads_drawn, heads_table, images_of
from deit.report.markup import (
    Html,
    Section,
    beside,
    element,
    english,
    facts,
    folded,
    isolated,
    joined,
    named,
    phrase,
    sentence,
    shortened,
    table,
    told,
)
from deit.train.records import Record, flat, is_number, span
from deit.words import Text, plural, said

_METRICS = 120
"""Maximum number of rows in the table behind the curves."""
_FAULTS = 200
"""Maximum number of unreadable images that are named."""
_NAMES = 60
"""Maximum number of characters that the names of classes take in the title. If they take more, they are counted."""
_CURVES = (
    ("loss", said("Loss"), ("loss", "val_loss"), (0.0, math.inf)),
    (
        "accuracy-curve",
        said("Accuracy"),
        (
            "accuracy",
            "val_accuracy",
            "val_accuracy_class",
            "val_accuracy_distillation",
            "agreement",
            "val_balanced_accuracy",
        ),
        (0.0, 1.0),
    ),
    ("rate", said("Learning rate"), ("lr",), (0.0, math.inf)),
)
_CALLED = {
    "loss": said("training"),
    "val_loss": said("validation"),
    "accuracy": said("training views"),
    "agreement": said("agreement with the teacher"),
    "val_accuracy": said("validation, fused heads"),
    "val_balanced_accuracy": said("validation, balanced"),
    "val_accuracy_class": said("validation, class head"),
    "val_accuracy_distillation": said("validation, distillation head"),
    "lr": said("learning rate"),
}
"""The names of the lines."""
_COLUMNS = {
    "step": said("step"),
    "epoch": said("epoch"),
    "loss": said("loss"),
    "val_loss": said("val loss"),
    "accuracy": said("accuracy"),
    "agreement": said("agreement"),
    "val_accuracy": said("val accuracy"),
    "val_balanced_accuracy": said("val balanced accuracy"),
    "val_accuracy_class": said("val accuracy class"),
    "val_accuracy_distillation": said("val accuracy distillation"),
    "lr": said("lr"),
}
"""The columns of the table behind the curves."""


def title(record: Record) -> tuple[str, Sequence[Text]]:
    """The name of the folder that holds the run's data, and its classes, or their number if their names are long.

    If the data are not known, the name of the run's folder stands for them.
    """
    about = record.about
    if about is None or not about.data:
        return record.folder.absolute().name, ()
    folder = os.path.basename(os.path.abspath(about.data)) or about.data
    if not record.labelled:
        return folder, ()
    long = len(", ".join(about.classes)) > _NAMES
    return folder, [plural(len(about.classes), "{count:,} class", "{count:,} classes")] if long else about.classes


def alarms(record: Record | None, evaluation: Evaluation | None, more: Sequence[Text] = ()) -> Section:
    """What to beware of: in the run, in the evaluation, in the model's calibration, and `more`. Empty if there is
    nothing."""
    found: list[Text] = [*evaluation.alarms(isolated)] if evaluation else []
    best = record.best if record and record.labelled else None
    if record and record.about and best and is_number(best.get("val_accuracy")):
        found += [each for each in record.about.alarms(best["val_accuracy"], isolated) if each not in found]
    try:
        calibration = Calibration.of_model(evaluation.main.model) if evaluation else None
        found += calibration.alarms() if calibration else []
    except ValueError as error:
        found.append(shortened(error))
    except OSError:  # the model's name is none that a folder can have
        pass
    found += more
    return Section("alarms", said("Beware"), joined(map(told, found)))


def _gaps(record: Record, about: str) -> Html:
    return joined(element("p", f"{gap}.", lang="en") for gap in record.gaps if about in gap)


def unevaluated(record: Record, missing: Text, unfinished: bool = False) -> Section:
    """The section about a model without an evaluation: what the metrics say about the model that was kept."""
    if not record.labelled:
        return Section(
            "accuracy",
            said("Evaluation"),
            sentence(
                said("The model learnt to paint hidden patches and has no classes to judge. Its loss is drawn below.")
            ),
        )
    best, parts = record.best, []
    rows: list[tuple[str, Accuracy | float]] = []
    for key, head in (
        ("val_accuracy", "fused"),
        ("val_accuracy_class", "class"),
        ("val_accuracy_distillation", "distillation"),
    ):
        if best and is_number(best.get(key)):
            rows.append((head, counted(record, best[key]) or float(best[key])))
    if best and rows:
        parts.append(
            sentence(
                said(
                    "Accuracy of the model that was kept, on the validation images after step {step:,.0f}. It was "
                    "chosen by the first of these numbers, so they flatter it. Test images do not.",
                    step=best["step"],
                )
            )
        )
        whole = [(head, found) for head, found in rows if isinstance(found, Accuracy)]
        if len(whole) == len(rows):
            heads = table(said("Accuracy of each head"), *heads_table(whole), hidden=True)
            parts.append(beside(heads_drawn(whole), heads))
        else:
            parts.append(table(said("Accuracy of each head"), [said("head"), said("accuracy")], rows))
    else:
        parts.append(sentence(said("The run has no evaluation yet.")))
    if unfinished:
        parts.append(
            sentence(said("Calibration, confusions, classes and single images follow when the run is finished."))
        )
        return Section("accuracy", said("Accuracy"), joined(parts))
    follows = phrase(
        "Calibration, confusions, classes and single images appear here after {command}.",
        command=element("code", shlex.join(["deit", "report", str(record.folder), "--data", "DATA"])),
    )
    parts.append(element("p", joined([missing, follows] if missing else [follows], " ")))
    return Section("accuracy", said("Accuracy"), joined(parts))


def counted(record: Record, value: float) -> Accuracy | None:
    """The accuracy that gives this share of the validation images.

    None if no whole number of images gives it, for example because some can't be read.
    """
    total = sum(record.about.val) if record.about else 0
    correct = round(value * total)
    whole = total > 0 and 0 <= correct <= total and abs(correct - value * total) < 1e-6 * total
    return Accuracy(correct, total) if whole else None


def training(record: Record) -> Section:
    if not record.rows:
        return Section(
            "training",
            said("Training"),
            _gaps(record, "metrics") or sentence(said("The run has not written any metrics.")),
        )
    figures = []
    two = any("val_accuracy_class" in row for row in record.rows)
    for key, title, names, within in _CURVES:
        lines = []
        for style, name in enumerate(names):
            points = [
                (float(row["step"]), float(row[name]) if is_number(row[name]) else math.nan)
                for row in record.rows
                if name in row
            ]
            if any(math.isfinite(y) for _, y in points):
                called = said("validation") if name == "val_accuracy" and not two else _CALLED[name]
                lines.append(Line(called, points, style))
        if lines:
            legend = (
                element(
                    "ul", *(element("li", drawing.swatch(line.style), line.name) for line in lines), class_="legend"
                )
                if len(lines) > 1
                else Html()
            )
            figures.append(
                element(
                    "figure",
                    element("figcaption", title),
                    drawing.curves(
                        key, said("{title} over steps", title=title), lines, epoch=_per_epoch(record), within=within
                    ),
                    legend,
                )
            )
        elif key != "accuracy-curve" or record.labelled:
            figures.append(sentence(said("{title}: the metrics hold no number that could be drawn.", title=title)))
    numbers = folded(said("The numbers of the curves"), _metrics(record))
    drawn = element("div", *figures, class_="curves")
    return Section("training", said("Training"), joined([_gaps(record, "metrics"), drawn, numbers]))


def _per_epoch(record: Record) -> float | None:
    """Steps in an epoch; None if the metrics don't say."""
    last = record.rows[-1]
    return last["step"] / last["epoch"] if is_number(last.get("epoch")) and last["epoch"] > 0 < last["step"] else None


def _metrics(record: Record) -> Html:
    rows = [row for row in record.rows if any(key.startswith("val_") for key in row)] or list(record.rows)
    every = math.ceil(len(rows) / _METRICS)
    kept = rows[::-1][::every][::-1]
    keys = [key for key in _COLUMNS if any(key in row for row in kept)]
    cells = ([_metric(key, row.get(key)) for key in keys] for row in kept)
    numbers = table(said("Metrics"), [_COLUMNS[key] for key in keys], cells)
    if len(kept) == len(record.rows):
        return numbers
    note = said("{kept:,} of {all:,} rows; metrics.jsonl holds all.", kept=len(kept), all=len(record.rows))
    return joined([sentence(note), numbers])


def _metric(key: str, value: object) -> Text | None:
    if value is None:
        return None
    if not isinstance(value, int | float):
        return said("no number")
    return f"{value:,.0f}" if key == "step" and is_number(value) else f"{value:.4g}"


def recipe(record: Record) -> Section:
    if not record.recipe:
        return Section("recipe", said("Recipe"), _gaps(record, "recipe"))
    ours = flat(_completed(record.recipe))
    parts = []
    shipped = recipes.shipped().get(record.name)
    if shipped is None:
        parts.append(sentence(said("No shipped recipe has this name, so there is none to compare with.")))
    else:
        theirs = flat(shipped().to_dict())
        changed = [
            [element("code", key), named(_setting(theirs.get(key))), named(_setting(ours.get(key)))]
            for key in {**theirs, **ours}
            if theirs.get(key) != ours.get(key)
        ]
        parts.append(
            table(
                said("Changed from the shipped recipe of this name"),
                [said("field"), said("shipped"), said("here")],
                changed,
            )
            if changed
            else sentence(said("The shipped recipe of this name, unchanged."))
        )
    groups: dict[str, list[list[object]]] = {}
    for key, value in ours.items():
        group, _, field = key.partition(".")
        name, shown = (group, field) if field else ("run", group)
        groups.setdefault(name, []).append([element("code", shown), named(_setting(value))])
    blocks = (
        element(
            "div",
            element("h3", name, lang="en"),
            table(said("Recipe: {part}", part=name), [said("field"), said("value")], rows, hidden=True),
        )
        for name, rows in groups.items()
    )
    parts.append(folded(said("The whole recipe"), element("div", *blocks, class_="groups")))
    return Section("recipe", said("Recipe"), joined(parts))


def _completed(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recipe with the defaults of fields that it doesn't name, because they are newer than the run."""
    try:
        return Recipe.from_dict(recipe).to_dict()
    except (ValueError, TypeError, AttributeError):
        return recipe


def _setting(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(_setting, value)) or "none"
    text = "none" if value is None else "yes" if value is True else "no" if value is False else str(value)
    return shortened(text) or "empty"


def data(record: Record | None, evaluation: Evaluation | None) -> Section:
    known: list[tuple[Text, object]] = []
    parts: list[Html] = []
    about = record.about if record else None
    if record and about:
        folder = element("code", named(about.data)) if about.data else said("the images have no common folder")
        known += [
            (said("folder"), folder),
            (said("training images"), f"{sum(about.train):,}"),
            (said("validation images"), f"{sum(about.val):,}"),
            *([(said("classes"), f"{len(about.classes):,}")] if record.labelled else []),
            (said("fingerprint of the training images"), element("code", about.fingerprint)),
        ]
    elif record:
        parts += [
            element("p", phrase("The images that the run was trained on are not known: {gap}.", gap=english(gap)))
            for gap in record.gaps
            if "about" in gap
        ]
    if evaluation:
        count = evaluation.main.report.images
        known += [
            (said("evaluated"), phrase("{count:,} {images}", count=count, images=images_of(evaluation))),
            (said("fingerprint of the evaluated images"), element("code", evaluation.fingerprint)),
        ]
    if known:
        parts.append(facts(known))
    if record and about and record.labelled:
        objective = record.recipe.get("objective")
        balanced = not isinstance(objective, dict) or objective.get("class_weights", "balanced") == "balanced"
        names = [isolated(name) for name in about.classes]
        parts += map(told, remarks(names, about.train, about.val, balanced=balanced))
        smallest, largest = min(about.train, default=0), max(about.train, default=0)
        parts.append(
            folded(
                said("Images of each class: {low:,} to {high:,} in training", low=smallest, high=largest),
                table(
                    said("Images of each class"),
                    [said("class"), said("training"), said("validation")],
                    (
                        [named(name, 60), train, val]
                        for name, train, val in zip(about.classes, about.train, about.val, strict=True)
                    ),
                    hidden=True,
                ),
            )
        )
    if evaluation and (faults := evaluation.main.report.unreadable):
        parts.append(
            folded(
                plural(len(faults), "{count:,} image that can't be read", "{count:,} images that can't be read"),
                table(
                    said("Images that can't be read"),
                    [said("file"), said("reason")],
                    [[named(file), english(shortened(reason))] for file, reason in faults[:_FAULTS]],
                    hidden=True,
                ),
            )
        )
    return Section("data", said("Data"), joined(parts))


def machine(record: Record) -> Section:
    known: list[tuple[Text, object]] = []
    if about := record.about:
        known += [
            (said("device"), english(about.device)),
            (said("processes"), about.processes),
            (said("numeric precision"), about.precision),
            *about.versions.items(),
        ]
    if (rate := record.last("images_per_second")) is not None:
        known.append((said("rate of recent steps"), said("{rate:,.1f} images/s", rate=rate)))
    if (waiting := record.last("waiting")) is not None:
        known.append((said("share of the time spent on waiting for images"), f"{waiting:.0%}"))
    if (views := record.last("images")) is not None:
        known.append((said("views shown"), f"{views:,.0f}"))
    if (seconds := record.last("seconds")) is not None:
        known.append((said("training time"), span(seconds)))
    if memory := record.last("memory"):
        known.append((said("largest memory"), f"{memory / 2**30:.2f} GiB"))
    return Section(
        "machine",
        said("Speed and machine"),
        facts(known)
        if known
        else sentence(said("Neither the metrics nor about.json say how fast the run was, or on which machine.")),
    )
