"""The sections of a report about an evaluation. Each function returns a piece of the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from deit.data.counts import listed
from deit.evaluate.models import Evaluation, Examined
from deit.evaluate.scores import Accuracy, ClassScore, Report
from deit.image.decode import load_image
from deit.report import drawing
from deit.report.markup import (
    Html,
    Section,
    beside,
    element,
    escaped,
    facts,
    folded,
    isolated,
    joined,
    named,
    pictured,
    plural,
    scrolled,
    sentence,
    table,
)

_ROWS = 30
"""Largest number of classes in a confusion matrix, and in a table of classes that is shown unfolded."""
_FEW = 10
"""Number of worst classes that are shown, and of most common confusions."""
_PICTURES = 12
"""Number of most wrong images that are shown, and of most doubtful ones."""
_NAME = 60
"""Maximum number of characters of a class in a table or a caption."""
_SIDE = 128
"""Longer side of a thumbnail, in pixels."""


def accuracy(report: Report) -> Section:
    heads = [(head, report.accuracy(head)) for head in report.heads]
    columns, rows = heads_table(heads)
    if len(report.classes) > 5:
        columns += ["top-5", "95 % interval"]
        rows = [[*row, *report.accuracy(head, 5).cells()] for head, row in zip(report.heads, rows, strict=True)]
    columns += ["balanced", "95 % interval"]
    rows = [[*row, *report.balanced(head).cells()] for head, row in zip(report.heads, rows, strict=True)]
    told = (
        "Balanced accuracy is the mean of the recalls of the classes that have images, so each class counts the same."
    )
    if absent := report.absent:
        told += f" No image shows {listed(map(isolated, absent))}."
    return Section(
        "accuracy",
        "Accuracy",
        beside(
            heads_drawn(heads),
            element("div", table("Accuracy of each head", columns, rows, hidden=True), sentence(told)),
        ),
    )


def heads_drawn(rows: Sequence[tuple[str, Accuracy]]) -> Html:
    return element(
        "figure",
        element("figcaption", "Accuracy of each head, with 95 % intervals"),
        drawing.intervals("heads", "Accuracy of each head with its 95 % interval", rows),
    )


def heads_table(rows: Sequence[tuple[str, Accuracy]]) -> tuple[list[str], list[list[object]]]:
    return ["head", "top-1", "95 % interval", "correct"], [
        [head, *found.cells(), found.correct] for head, found in rows
    ]


def sections(evaluation: Evaluation) -> Iterable[Section]:
    report = evaluation.main.report
    if evaluation.other is not None:
        yield comparison(evaluation.main, evaluation.other, evaluation)
    yield _calibration(report)
    yield Section("confusions", "Confusions", _confusions(report))
    yield Section("classes", "Classes", _classes(report))
    yield Section("images", "Images", _wrong_and_doubtful(evaluation))


def comparison(main: Examined, other: Examined, evaluation: Evaluation) -> Section:
    found = evaluation.comparison
    assert found is not None
    low, high = found.interval
    return Section(
        "comparison",
        "Comparison",
        joined(
            [
                sentence(
                    f"The {main.report.head} heads of two models, on the {found.images:,} images that both could read."
                ),
                table(
                    "Two models on the same images",
                    ["model", "top-1", "95 % interval", "correct", "only this one correct"],
                    [
                        [named(main.model), *found.first.cells(), found.first.correct, found.only_first],
                        [named(other.model), *found.second.cells(), found.second.correct, found.only_second],
                    ],
                ),
                sentence(
                    f"Difference {found.difference:+.4f}, 95 % interval {low:+.4f} to {high:+.4f} (Newcombe's, for "
                    f"paired proportions). McNemar's exact test: p = {found.p_value:.3g}."
                ),
            ]
        ),
    )


def _calibration(report: Report) -> Section:
    rows = [
        [f"{each.low:.2f} to {each.high:.2f}", each.count, each.confidence, each.accuracy]
        for each in report.bins
        if each.count
    ]
    figure = element(
        "figure",
        element("figcaption", "Accuracy over confidence, with 95 % intervals, and below it the images in each bin"),
        drawing.reliability("reliability", "Accuracy over confidence, and the images in each bin", report.bins),
    )
    told = sentence(
        f"Confidence is the largest probability of the {deciding(report)}. On the dashed line, confidence equals "
        "accuracy. Above the line the model is not sure enough, and below the line it is too sure."
    )
    scores = facts(
        [
            ("expected calibration error", f"{report.calibration_error:.4f}"),
            ("Brier score", f"{report.brier:.4f}"),
            ("negative log likelihood", f"{report.nll:.4f}"),
        ]
    )
    numbers = folded(
        "The numbers of the diagram",
        table("Calibration", ["confidence", "images", "mean confidence", "accuracy"], rows, hidden=True),
    )
    return Section("calibration", "Calibration", beside(figure, element("div", told, scores, numbers)))


def deciding(report: Report) -> str:
    return "model" if len(report.heads) == 1 else "fused heads" if report.head == "fused" else f"{report.head} head"


def images_of(evaluation: Evaluation) -> Html:
    kind = {"val": "validation images", "train": "training images", "test": "test images"}.get(
        evaluation.split or "", "images"
    )
    return joined([kind, " in ", element("code", named(evaluation.data))]) if evaluation.data else escaped(kind)


def _confusions(report: Report) -> Html:
    cells = report.cells
    wrong = sorted((cell for cell in cells if cell[0] != cell[1]), key=lambda cell: -cell[2])
    if not wrong:
        return sentence("No image was taken for another class.")
    parts = []
    used = sorted({place for label, answer, _ in cells for place in (label, answer)})
    if len(used) > _ROWS:
        weight: dict[int, int] = {}
        for label, answer, count in wrong:
            weight[label] = weight.get(label, 0) + count
            weight[answer] = weight.get(answer, 0) + count
        chosen = sorted(sorted(used, key=lambda place: -weight.get(place, 0))[: _ROWS - 1])
        rest = len(used) - len(chosen)
        parts.append(
            sentence(
                f"The {len(chosen)} classes with the most confusions, and the {rest:,} others together. If one of the "
                "others was taken for another of them, it is shown as right."
            )
        )
        names = [report.classes[place] for place in chosen] + [f"{rest:,} others"]
    else:
        chosen, names = used, [report.classes[place] for place in used]
    if absent := len(report.classes) - len(used):
        parts.append(
            sentence(
                f"{plural(absent, 'class', 'classes')} of the model without images or answers "
                f"{'is' if absent == 1 else 'are'} left out."
            )
        )
    parts += [
        beside(
            _matrix(names, _counts(cells, chosen, len(names))),
            table(
                "Most common confusions",
                ["class", "taken for", "images", "share of the class"],
                [
                    [
                        named(report.classes[label], _NAME),
                        named(report.classes[answer], _NAME),
                        count,
                        count / report.by_class[label].support,
                    ]
                    for label, answer, count in wrong[:_FEW]
                ],
            ),
        )
    ]
    return joined(parts)


def _counts(cells: Iterable[tuple[int, int, int]], chosen: Sequence[int], side: int) -> np.ndarray:
    """Numbers of images (side, side) by true class and answer. All classes outside `chosen` share the last row and
    column."""
    place_of, found = {label: place for place, label in enumerate(chosen)}, np.zeros((side, side), np.int64)
    for label, answer, count in cells:
        found[place_of.get(label, side - 1), place_of.get(answer, side - 1)] += count
    return found


def _matrix(names: Sequence[str], counts: np.ndarray) -> Html:
    """A table whose cells are shaded by their share of the row: right ones in one colour, wrong ones in another."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    rows = []
    for i, name in enumerate(names):
        row = []
        for j, count in enumerate(counts[i].tolist()):
            level = min(8, math.ceil(8 * shares[i, j]))
            kind = f"{'right' if i == j else 'wrong'} l{level}"
            row.append(element("td", f"{count:,}", class_=kind) if count else element("td"))
        rows.append(element("tr", element("th", named(name, 40), scope="row"), *row))
    head = element(
        "tr",
        element("th", "true ↓ answered →", scope="col"),
        *(element("th", element("span", named(name, 40)), scope="col") for name in names),
    )
    return scrolled(
        "Confusion matrix",
        element(
            "table",
            element("caption", "Images by true class (rows) and answer (columns)"),
            element("thead", head),
            element("tbody", *rows),
            class_="matrix long" if max(map(len, names)) > 4 else "matrix",
        ),
    )


def _classes(report: Report) -> Html:
    shown = [each for each in report.by_class if each.support or each.predicted]
    left_out = len(report.classes) - len(shown)
    note = (
        [
            sentence(
                f"{plural(left_out, 'class', 'classes')} without images or answers "
                f"{'is' if left_out == 1 else 'are'} left out."
            )
        ]
        if left_out
        else []
    )
    if len(shown) <= _ROWS:
        return joined([*note, _class_table("Classes", shown, hidden=True)])
    worst = sorted((each for each in shown if each.support), key=lambda each: (each.recall, each.f1))[:_FEW]
    return joined(
        [
            *note,
            _class_table("Worst classes", worst),
            folded(f"All {len(shown):,} classes", _class_table("All classes", shown, hidden=True)),
        ]
    )


def _class_table(title: str, rows: Iterable[ClassScore], *, hidden: bool = False) -> Html:
    return table(
        title,
        ["class", "images", "answered", "precision", "recall", "F1"],
        (
            [
                named(each.name, _NAME),
                each.support,
                each.predicted,
                each.precision,
                None if each.recall is None else joined([drawing.bar(each.recall), f" {each.recall:.3f}"]),
                each.f1,
            ]
            for each in rows
        ),
        hidden=hidden,
    )


def wrong_and_doubtful(report: Report) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the images that are worth a look: the wrong answers of the highest confidence, the highest first, and
    of the other images the answers of the lowest confidence, the lowest first."""
    wrong = np.flatnonzero(report.read & (report.labels != report.predicted))
    wrong = wrong[np.argsort(-report.confidence[wrong], kind="stable")][:_PICTURES]
    doubtful = np.setdiff1d(np.flatnonzero(report.read), wrong)
    return wrong, doubtful[np.argsort(report.confidence[doubtful], kind="stable")][:_PICTURES]


def _wrong_and_doubtful(evaluation: Evaluation) -> Html:
    report = evaluation.main.report
    if len(evaluation.files) != len(report.labels):
        return sentence("The files of the images are not known, so no image is shown.")
    wrong, doubtful = wrong_and_doubtful(report)
    parts = []
    for title, rows, none in (
        ("Most wrong", wrong, "No answer is wrong."),
        ("Most doubtful", doubtful, "There are no other images."),
    ):
        about = (
            "Wrong answers of the highest confidence: hard images, or wrong labels."
            if rows is wrong
            else "Answers of the lowest confidence, right or wrong."
        )
        parts += [
            element("h3", title),
            sentence(about) + element("div", *(_example(evaluation, int(row)) for row in rows), class_="gallery")
            if len(rows)
            else sentence(none),
        ]
    return joined(parts)


def _example(evaluation: Evaluation, row: int) -> Html:
    report, file = evaluation.main.report, evaluation.files[row]
    caption = answered(report, row) + element("p", named(file.name, 48), class_="file")
    try:
        image = load_image(file, min_side=_SIDE)
    except (ValueError, OSError, MemoryError):
        return element(
            "figure", element("p", "This image can't be read any more.", class_="gone"), element("figcaption", caption)
        )
    return picture(image, told(report, row), caption, _SIDE)


def told(report: Report, row: int) -> str:
    """A sentence with an image's label and answer, for readers who don't see the image."""
    label, answer = (report.classes[int(each[row])] for each in (report.labels, report.predicted))
    return f"True label {isolated(label)}; predicted {isolated(answer)} with probability {report.confidence[row]:.2f}"


def answered(report: Report, row: int) -> Html:
    """The answer to an image, and the true class if the answer is wrong."""
    label, answer = int(report.labels[row]), int(report.predicted[row])
    found = joined(
        [
            element("span", "answered ", class_="soft"),
            element("b", named(report.classes[answer], _NAME)),
            f" ({report.confidence[row]:.2f})",
        ]
    )
    return (
        element("p", found, ", correct")
        if label == answer
        else element("p", found)
        + element(
            "p",
            element("span", "true ", class_="soft"),
            element("b", named(report.classes[label], _NAME)),
            f" ({report.probability[row]:.2f})",
        )
    )


def picture(image: Image.Image, alt: str, caption: Html, side: int) -> Html:
    """A figure with its picture inside the document, as PNG if the picture is small, else as JPEG."""
    crisp = max(image.size) <= side / 2
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    if max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side), reducing_gap=3)
    return element("figure", pictured(image, alt, crisp=crisp), element("figcaption", caption))
