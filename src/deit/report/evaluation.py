"""The sections of a report about an evaluation. Each function returns a piece of the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from deit.evaluate.models import Evaluation, Examined
from deit.evaluate.scores import Accuracy, BalancedAccuracy, ClassScore, Report
from deit.image.decode import load_image
from deit.report import drawing
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
    phrase,
    pictured,
    scrolled,
    sentence,
    table,
)
from deit.words import Said, Text, listed, plural, quoted, said, series

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
_HEADS = {
    "fused": said("fused heads"),
    "softmax": said("softmax head"),
    "class": said("class head"),
    "distillation": said("distillation head"),
}
_KINDS = {"val": said("validation images"), "train": said("training images"), "test": said("test images")}


def accuracy(report: Report) -> Section:
    heads = [(head, report.accuracy(head)) for head in report.heads]
    columns, rows = heads_table(heads)
    if len(report.classes) > 5:
        columns += ["top-5", said("95 % interval")]
        rows = [[*row, *cells(report.accuracy(head, 5))] for head, row in zip(report.heads, rows, strict=True)]
    columns += [said("balanced"), said("95 % interval")]
    rows = [[*row, *cells(report.balanced(head))] for head, row in zip(report.heads, rows, strict=True)]
    told = said(
        "Balanced accuracy is the mean of the recalls of the classes that have images, so each class counts the same."
    )
    if absent := report.absent:
        told = series(
            " ", [told, said("No image shows {classes}.", classes=listed(quoted(isolated(name)) for name in absent))]
        )
    return Section(
        "accuracy",
        said("Accuracy"),
        beside(
            heads_drawn(heads),
            element("div", table(said("Accuracy of each head"), columns, rows, hidden=True), sentence(told)),
        ),
    )


def cells(found: Accuracy | BalancedAccuracy) -> tuple[float, Said]:
    """The value and its interval, as two cells of a table."""
    low, high = found.interval
    return found.value, said("{low:.3f} to {high:.3f}", low=low, high=high)


def heads_drawn(rows: Sequence[tuple[str, Accuracy]]) -> Html:
    return element(
        "figure",
        element("figcaption", said("Accuracy of each head, with 95 % intervals")),
        drawing.intervals("heads", said("Accuracy of each head with its 95 % interval"), rows),
    )


def heads_table(rows: Sequence[tuple[str, Accuracy]]) -> tuple[list[Text], list[list[object]]]:
    return [said("head"), "top-1", said("95 % interval"), said("correct")], [
        [head, *cells(found), found.correct] for head, found in rows
    ]


def sections(evaluation: Evaluation) -> Iterable[Section]:
    report = evaluation.main.report
    if evaluation.other is not None:
        yield comparison(evaluation.main, evaluation.other, evaluation)
    yield _calibration(report)
    yield Section("confusions", said("Confusions"), _confusions(report))
    yield Section("classes", said("Classes"), _classes(report))
    yield Section("images", said("Images"), _wrong_and_doubtful(evaluation))


def comparison(main: Examined, other: Examined, evaluation: Evaluation) -> Section:
    found = evaluation.comparison
    assert found is not None
    low, high = found.interval
    return Section(
        "comparison",
        said("Comparison"),
        joined(
            [
                sentence(
                    said(
                        "The {head} heads of two models, on the {count:,} images that both could read.",
                        head=main.report.head,
                        count=found.images,
                    )
                ),
                table(
                    said("Two models on the same images"),
                    [
                        said("model"),
                        "top-1",
                        said("95 % interval"),
                        said("correct"),
                        said("only this one correct"),
                    ],
                    [
                        [named(main.model), *cells(found.first), found.first.correct, found.only_first],
                        [named(other.model), *cells(found.second), found.second.correct, found.only_second],
                    ],
                ),
                sentence(
                    said(
                        "Difference {difference:+.4f}, 95 % interval {low:+.4f} to {high:+.4f} (Newcombe's, for "
                        "paired proportions). McNemar's exact test: p = {p:.3g}.",
                        difference=found.difference,
                        low=low,
                        high=high,
                        p=found.p_value,
                    )
                ),
            ]
        ),
    )


def _calibration(report: Report) -> Section:
    rows = [
        [said("{low:.2f} to {high:.2f}", low=each.low, high=each.high), each.count, each.confidence, each.accuracy]
        for each in report.bins
        if each.count
    ]
    figure = element(
        "figure",
        element(
            "figcaption",
            said("Accuracy over confidence, with 95 % intervals, and below it the images in each bin"),
        ),
        drawing.reliability("reliability", said("Accuracy over confidence, and the images in each bin"), report.bins),
    )
    told = sentence(
        said(
            "Confidence is the largest probability of the {heads}. On the dashed line, confidence equals accuracy. "
            "Above the line the model is not sure enough, and below the line it is too sure.",
            heads=deciding(report) or said("model"),
        )
    )
    scores = facts(
        [
            (said("expected calibration error"), f"{report.calibration_error:.4f}"),
            (said("Brier score"), f"{report.brier:.4f}"),
            (said("negative log likelihood"), f"{report.nll:.4f}"),
        ]
    )
    columns = [said("confidence"), said("images"), said("mean confidence"), said("accuracy")]
    numbers = folded(said("The numbers of the diagram"), table(said("Calibration"), columns, rows, hidden=True))
    return Section("calibration", said("Calibration"), beside(figure, element("div", told, scores, numbers)))


def deciding(report: Report) -> Said | None:
    """The head or heads that the answers are from; None if the model has only one."""
    return None if len(report.heads) == 1 else _HEADS[report.head]


def images_of(evaluation: Evaluation) -> Html | Said:
    kind = _KINDS.get(evaluation.split or "", said("images"))
    if not evaluation.data:
        return kind
    return phrase("{images} in {folder}", images=kind, folder=element("code", named(evaluation.data)))


def _confusions(report: Report) -> Html:
    cells = report.cells
    wrong = sorted((cell for cell in cells if cell[0] != cell[1]), key=lambda cell: -cell[2])
    if not wrong:
        return sentence(said("No image was taken for another class."))
    parts: list[Html] = []
    names: list[Text]
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
                said(
                    "The {count} classes with the most confusions, and the {rest:,} others together. If one of the "
                    "others was taken for another of them, it is shown as right.",
                    count=len(chosen),
                    rest=rest,
                )
            )
        )
        names = [*(report.classes[place] for place in chosen), said("{count:,} others", count=rest)]
    else:
        chosen, names = used, [report.classes[place] for place in used]
    if absent := len(report.classes) - len(used):
        parts.append(
            sentence(
                plural(
                    absent,
                    "{count:,} class of the model without images or answers is left out.",
                    "{count:,} classes of the model without images or answers are left out.",
                )
            )
        )
    parts += [
        beside(
            _matrix(names, _counts(cells, chosen, len(names))),
            table(
                said("Most common confusions"),
                [said("class"), said("taken for"), said("images"), said("share of the class")],
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


def _matrix(names: Sequence[Text], counts: np.ndarray) -> Html:
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
        element("th", said("true ↓ answered →"), scope="col"),
        *(element("th", element("span", named(name, 40)), scope="col") for name in names),
    )
    return scrolled(
        said("Confusion matrix"),
        element(
            "table",
            element("caption", said("Images by true class (rows) and answer (columns)")),
            element("thead", head),
            element("tbody", *rows),
            class_="matrix long" if max(len(str(name)) for name in names) > 4 else "matrix",
        ),
    )


def _classes(report: Report) -> Html:
    shown = [each for each in report.by_class if each.support or each.predicted]
    left_out = len(report.classes) - len(shown)
    note = (
        [
            sentence(
                plural(
                    left_out,
                    "{count:,} class without images or answers is left out.",
                    "{count:,} classes without images or answers are left out.",
                )
            )
        ]
        if left_out
        else []
    )
    if len(shown) <= _ROWS:
        return joined([*note, _class_table(said("Classes"), shown, hidden=True)])
    worst = sorted((each for each in shown if each.support), key=lambda each: (each.recall, each.f1))[:_FEW]
    return joined(
        [
            *note,
            _class_table(said("Worst classes"), worst),
            folded(
                said("All {count:,} classes", count=len(shown)), _class_table(said("All classes"), shown, hidden=True)
            ),
        ]
    )


def _class_table(title: Text, rows: Iterable[ClassScore], *, hidden: bool = False) -> Html:
    return table(
        title,
        [said("class"), said("images"), said("answered"), said("precision"), said("recall"), "F1"],
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
        return sentence(said("The files of the images are not known, so no image is shown."))
    wrong, doubtful = wrong_and_doubtful(report)
    parts = []
    for title, rows, none in (
        (said("Most wrong"), wrong, said("No answer is wrong.")),
        (said("Most doubtful"), doubtful, said("There are no other images.")),
    ):
        about = (
            said("Wrong answers of the highest confidence: hard images, or wrong labels.")
            if rows is wrong
            else said("Answers of the lowest confidence, right or wrong.")
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
            "figure",
            element("p", said("This image can't be read any more."), class_="gone"),
            element("figcaption", caption),
        )
    return picture(image, told(report, row), caption, _SIDE)


def told(report: Report, row: int) -> Said:
    """A sentence with an image's label and answer, for readers who don't see the image."""
    label, answer = (isolated(report.classes[int(each[row])]) for each in (report.labels, report.predicted))
    return said(
        "True label {label}; predicted {answer} with probability {probability:.2f}",
        label=label,
        answer=answer,
        probability=report.confidence[row],
    )


def answered(report: Report, row: int) -> Html:
    """The answer to an image, and the true class if the answer is wrong."""
    label, answer = int(report.labels[row]), int(report.predicted[row])
    found = joined(
        [
            element("span", said("answered "), class_="soft"),
            element("b", named(report.classes[answer], _NAME)),
            f" ({report.confidence[row]:.2f})",
        ]
    )
    return (
        element("p", found, said(", correct"))
        if label == answer
        else element("p", found)
        + element(
            "p",
            element("span", said("true "), class_="soft"),
            element("b", named(report.classes[label], _NAME)),
            f" ({report.probability[row]:.2f})",
        )
    )


def picture(image: Image.Image, alt: Text, caption: Html, side: int) -> Html:
    """A figure with its picture inside the document, as PNG if the picture is small, else as JPEG."""
    crisp = max(image.size) <= side / 2
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    if max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side), reducing_gap=3)
    return element("figure", pictured(image, alt, crisp=crisp), element("figcaption", caption))
