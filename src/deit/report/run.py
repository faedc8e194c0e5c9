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
    facts,
    folded,
    isolated,
    joined,
    named,
    plural,
    sentence,
    shortened,
    table,
)
from deit.train.records import Record, flat, is_number, span

_METRICS = 120
"""Maximum number of rows in the table behind the curves."""
_FAULTS = 200
"""Maximum number of unreadable images that are named."""
_NAMES = 60
"""Maximum number of characters that the names of classes take in the title. If they take more, they are counted."""
_CURVES = (
    ("loss", "Loss", ("loss", "val_loss"), (0.0, math.inf)),
    (
        "accuracy-curve",
        "Accuracy",
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
    ("rate", "Learning rate", ("lr",), (0.0, math.inf)),
)
_CALLED = {
    "loss": "training",
    "val_loss": "validation",
    "accuracy": "training views",
    "agreement": "agreement with the teacher",
    "val_accuracy": "validation, fused heads",
    "val_balanced_accuracy": "validation, balanced",
    "val_accuracy_class": "validation, class head",
    "val_accuracy_distillation": "validation, distillation head",
    "lr": "learning rate",
}


def title(record: Record) -> tuple[str, Sequence[str]]:
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
    return folder, [plural(len(about.classes), "class", "classes")] if long else about.classes


def alarms(record: Record | None, evaluation: Evaluation | None, more: Sequence[str] = ()) -> Section:
    """What to beware of: in the run, in the evaluation, in the model's calibration, and `more`. Empty if there is
    nothing."""
    found: list[str] = evaluation.alarms(isolated) if evaluation else []
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
    return Section("alarms", "Beware", joined(sentence(f"{told[0].upper()}{told[1:]}.") for told in found))


def unevaluated(record: Record, missing: str, unfinished: bool = False) -> Section:
    """The section about a model without an evaluation: what the metrics say about the model that was kept."""
    if not record.labelled:
        return Section(
            "accuracy",
            "Evaluation",
            sentence("The model learnt to paint hidden patches and has no classes to judge. Its loss is drawn below."),
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
                "Accuracy of the model that was kept, on the validation images after step "
                f"{best['step']:,.0f}. It was chosen by the first of these numbers, so they flatter it. Test images "
                "do not."
            )
        )
        whole = [(head, found) for head, found in rows if isinstance(found, Accuracy)]
        if len(whole) == len(rows):
            parts.append(beside(heads_drawn(whole), table("Accuracy of each head", *heads_table(whole), hidden=True)))
        else:
            parts.append(table("Accuracy of each head", ["head", "accuracy"], rows))
    else:
        parts.append(sentence("The run has no evaluation yet."))
    if unfinished:
        parts.append(sentence("Calibration, confusions, classes and single images follow when the run is finished."))
        return Section("accuracy", "Accuracy", joined(parts))
    parts.append(
        element(
            "p",
            missing,
            " " if missing else "",
            "Calibration, confusions, classes and single images appear here after ",
            element("code", shlex.join(["deit", "report", str(record.folder), "--data", "DATA"])),
            ".",
        )
    )
    return Section("accuracy", "Accuracy", joined(parts))


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
            "Training",
            joined(sentence(f"{gap}.") for gap in record.gaps if "metrics" in gap)
            or sentence("The run has not written any metrics."),
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
                called = "validation" if name == "val_accuracy" and not two else _CALLED[name]
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
                    drawing.curves(key, f"{title} over steps", lines, epoch=_per_epoch(record), within=within),
                    legend,
                )
            )
        elif key != "accuracy-curve" or record.labelled:
            figures.append(sentence(f"{title}: the metrics hold no number that could be drawn."))
    gaps = joined(sentence(f"{gap}.") for gap in record.gaps if "metrics" in gap)
    return Section(
        "training",
        "Training",
        joined(
            [gaps, element("div", *figures, class_="curves"), folded("The numbers of the curves", _metrics(record))]
        ),
    )


def _per_epoch(record: Record) -> float | None:
    """Steps in an epoch; None if the metrics don't say."""
    last = record.rows[-1]
    return last["step"] / last["epoch"] if is_number(last.get("epoch")) and last["epoch"] > 0 < last["step"] else None


def _metrics(record: Record) -> Html:
    rows = [row for row in record.rows if any(key.startswith("val_") for key in row)] or list(record.rows)
    every = math.ceil(len(rows) / _METRICS)
    kept = rows[::-1][::every][::-1]
    keys = [key for key in ("step", "epoch", *_CALLED) if any(key in row for row in kept)]
    note = (
        ""
        if len(kept) == len(record.rows)
        else (f"{len(kept):,} of {len(record.rows):,} rows; metrics.jsonl holds all.")
    )
    return joined(
        [
            sentence(note) if note else Html(),
            table(
                "Metrics",
                [key.replace("_", " ") for key in keys],
                ([_metric(key, row.get(key)) for key in keys] for row in kept),
            ),
        ]
    )


def _metric(key: str, value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, int | float):
        return "no number"
    return f"{value:,.0f}" if key == "step" and is_number(value) else f"{value:.4g}"


def recipe(record: Record) -> Section:
    if not record.recipe:
        return Section("recipe", "Recipe", joined(sentence(f"{gap}.") for gap in record.gaps if "recipe" in gap))
    ours = flat(_completed(record.recipe))
    parts = []
    shipped = recipes.shipped().get(record.name)
    if shipped is None:
        parts.append(sentence("No shipped recipe has this name, so there is none to compare with."))
    else:
        theirs = flat(shipped().to_dict())
        changed = [
            [element("code", key), named(_setting(theirs.get(key))), named(_setting(ours.get(key)))]
            for key in {**theirs, **ours}
            if theirs.get(key) != ours.get(key)
        ]
        parts.append(
            table("Changed from the shipped recipe of this name", ["field", "shipped", "here"], changed)
            if changed
            else sentence("The shipped recipe of this name, unchanged.")
        )
    groups: dict[str, list[list[object]]] = {}
    for key, value in ours.items():
        group, _, field = key.partition(".")
        name, shown = (group, field) if field else ("run", group)
        groups.setdefault(name, []).append([element("code", shown), named(_setting(value))])
    blocks = (
        element("div", element("h3", name), table(f"Recipe: {name}", ["field", "value"], rows, hidden=True))
        for name, rows in groups.items()
    )
    parts.append(folded("The whole recipe", element("div", *blocks, class_="groups")))
    return Section("recipe", "Recipe", joined(parts))


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
    known: list[tuple[str, object]] = []
    parts: list[Html] = []
    about = record.about if record else None
    if record and about:
        known += [
            ("folder", element("code", named(about.data)) if about.data else "the images have no common folder"),
            ("training images", f"{sum(about.train):,}"),
            ("validation images", f"{sum(about.val):,}"),
            *([("classes", f"{len(about.classes):,}")] if record.labelled else []),
            ("fingerprint of the training images", element("code", about.fingerprint)),
        ]
    elif record:
        parts += [
            sentence(f"The images that the run was trained on are not known: {gap}.")
            for gap in record.gaps
            if "about" in gap
        ]
    if evaluation:
        known += [
            ("evaluated", f"{evaluation.main.report.images:,} " + images_of(evaluation)),
            ("fingerprint of the evaluated images", element("code", evaluation.fingerprint)),
        ]
    if known:
        parts.append(facts(known))
    if record and about and record.labelled:
        objective = record.recipe.get("objective")
        balanced = not isinstance(objective, dict) or objective.get("class_weights", "balanced") == "balanced"
        names = [isolated(name) for name in about.classes]
        parts += [
            sentence(f"{told[0].upper()}{told[1:]}.")
            for told in remarks(names, about.train, about.val, balanced=balanced)
        ]
        smallest, largest = min(about.train, default=0), max(about.train, default=0)
        parts.append(
            folded(
                f"Images of each class: {smallest:,} to {largest:,} in training",
                table(
                    "Images of each class",
                    ["class", "training", "validation"],
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
                plural(len(faults), "image that can't be read", "images that can't be read"),
                table(
                    "Images that can't be read",
                    ["file", "reason"],
                    [[named(file), shortened(reason)] for file, reason in faults[:_FAULTS]],
                    hidden=True,
                ),
            )
        )
    return Section("data", "Data", joined(parts))


def machine(record: Record) -> Section:
    known: list[tuple[str, object]] = []
    if about := record.about:
        known += [
            ("device", about.device),
            ("processes", about.processes),
            ("precision", about.precision),
            *((name, version) for name, version in about.versions.items()),
        ]
    for key, name, form in (
        ("images_per_second", "rate of recent steps", "{:,.1f} images/s"),
        ("waiting", "share of the time spent on waiting for images", "{:.0%}"),
        ("images", "views shown", "{:,.0f}"),
    ):
        if (value := record.last(key)) is not None:
            known.append((name, form.format(value)))
    if (seconds := record.last("seconds")) is not None:
        known.append(("training time", span(seconds)))
    if memory := record.last("memory"):
        known.append(("largest memory", f"{memory / 2**30:.2f} GiB"))
    return Section(
        "machine",
        "Speed and machine",
        facts(known)
        if known
        else sentence("Neither the metrics nor about.json say how fast the run was, or on which machine."),
    )
