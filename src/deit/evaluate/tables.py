"""Prints an evaluation as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deit.evaluate.models import Evaluation, Examined
from deit.evaluate.scores import Comparison, Report
from deit.terminal import shown
from deit.words import listed, quoted

_LINES = 10
"""Number of worst classes and of confusions to show."""


def show(evaluation: Evaluation, console: Console) -> None:
    """Prints heads, calibration, worst classes, most common confusions, and the comparison with the other model."""
    main, report = evaluation.main, evaluation.main.report

    def say(sentence: str) -> None:
        console.print(shown(sentence), markup=False, highlight=False, soft_wrap=True)

    where = evaluation.data + (f", {evaluation.split} images" if evaluation.split else "")
    say(_described(main))
    say(
        f"{where}: {report.images} images, "
        f"{sum(each.support > 0 for each in report.by_class)} of the model's {len(report.classes)} classes"
    )
    if absent := report.absent:
        it = "it" if len(absent) == 1 else "them"
        say(f"No image shows {listed(map(quoted, absent))}, so nothing here is about {it}")
    if report.unreadable:
        say(f"{len(report.unreadable)} more can't be read and are left out")
    console.print(
        _table(
            "Accuracy",
            ["head", "top-1", "95 % interval", "top-5", "95 % interval"],
            ([head, *report.accuracy(head).cells(), *report.accuracy(head, 5).cells()] for head in report.heads),
        )
    )
    console.print(
        _table(
            "Balanced accuracy: the mean of the recalls",
            ["head", "balanced", "95 % interval", "classes"],
            ([head, *report.balanced(head).cells(), report.balanced(head).classes] for head in report.heads),
        )
    )
    console.print()
    say(
        f"The {report.head} head: negative log likelihood {report.nll:.4f}, Brier score {report.brier:.4f}, "
        f"calibration error {report.calibration_error:.4f}"
    )
    console.print(
        _table(
            "Calibration",
            ["confidence", "images", "mean confidence", "accuracy"],
            (
                [f"{each.low:.2f} to {each.high:.2f}", each.count, each.confidence, each.accuracy]
                for each in report.bins
                if each.count
            ),
        )
    )
    console.print(_worst(report))
    if confusions := sorted((cell for cell in report.cells if cell[0] != cell[1]), key=lambda cell: -cell[2]):
        console.print(
            _table(
                "Most common confusions",
                ["class", "answer", "images", "of the class"],
                (
                    [report.classes[label], report.classes[answer], count, count / report.by_class[label].support]
                    for label, answer, count in confusions[:_LINES]
                ),
            )
        )
    for sentence in evaluation.alarms():
        say(str(sentence))
    if evaluation.other is not None and (comparison := evaluation.comparison):
        _compare(main, evaluation.other, comparison, console, say)


def _described(examined: Examined) -> str:
    height, width = examined.image_size
    ratio = "" if examined.crop_ratio is None else f", crop ratio {examined.crop_ratio:.4g}"
    return f"{examined.model}: {height}x{width} pixels{ratio}"


def _worst(report: Report) -> Table:
    shown = [each for each in report.by_class if each.support]
    shown.sort(key=lambda each: (each.recall, each.f1))
    title = "Worst classes" if len(shown) > _LINES else "Classes"
    return _table(
        title,
        ["class", "images", "recall", "precision", "F1"],
        ([each.name, each.support, each.recall, each.precision, each.f1] for each in shown[:_LINES]),
    )


def _compare(main: Examined, other: Examined, found: Comparison, console: Console, say: Any) -> None:
    console.print()
    say(f"Compared with {_described(other)}, on {found.images} images that both models could read")
    console.print(
        _table(
            f"The {main.report.head} heads",
            ["model", "top-1", "95 % interval", "right alone"],
            [
                [main.model, *found.first.cells(), found.only_first],
                [other.model, *found.second.cells(), found.only_second],
            ],
        )
    )
    low, high = found.interval
    say(
        f"Difference {found.difference:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}; McNemar's exact test: "
        f"p = {found.p_value:.3g}"
    )


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table with plain text, fractions with three digits, and - for None. A name may contain rich's markup."""
    table = Table(title=Text(title), title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(
            *(Text("-" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else shown(cell)) for cell in row)
        )
    return table
