"""What a person sees of an evaluation: the worst first, names as they are."""

import io
import re

import numpy as np
from rich.console import Console

from deit.evaluate.models import Evaluation, Examined
from deit.evaluate.scores import Report
from deit.evaluate.tables import show

NAMES = ("[red]", "[/b]", *"cdefghijkl", "unseen")
"""The first two would be markup to rich."""


def shown(matrix):
    """The text for a confusion matrix."""
    labels, predicted = (np.repeat(side.ravel(), matrix.ravel()) for side in np.indices(matrix.shape))
    half = np.full(len(labels), 0.5)
    report = Report(
        classes=NAMES,
        head="class",
        labels=labels,
        predicted=predicted,
        confidence=half,
        squares=half,
        ranks={"class": (labels != predicted).astype(int)},
        probability=half,
    )
    console = Console(file=io.StringIO(), width=120)
    show(Evaluation("photos", None, "", Examined("model", (16, 16), None, report)), console)
    return console.file.getvalue()


def rows(text, title):
    [table] = re.findall(rf"^{title} *\n(.*?)└", text, re.MULTILINE | re.DOTALL)
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in table.splitlines() if line[0] == "│"]


def test_the_worst_ten_classes_and_confusions():
    """Class i is taken for the next one i + 1 times in 20; one class is not shown."""
    matrix = np.zeros((13, 13), int)
    for i in range(12):
        matrix[i, i], matrix[i, (i + 1) % 12] = 19 - i, i + 1
    text = shown(matrix)
    assert "240 images, 12 of the model's 13 classes" in text
    assert 'No image shows "unseen", so nothing here is about it' in text
    [balanced] = rows(text, "Balanced accuracy: [^\n]*")
    assert balanced == ["class", f"{sum(19 - i for i in range(12)) / 240:.3f}", balanced[2], "12"]
    assert [row[0] for row in rows(text, "Worst classes")] == [NAMES[i] for i in range(11, 1, -1)]
    assert rows(text, "Worst classes")[0] == ["l", "20", "0.400", f"{8 / 19:.3f}", f"{16 / 39:.3f}"]
    assert rows(text, "Most common confusions")[:2] == [["l", "[red]", "12", "0.600"], ["k", "l", "11", "0.550"]]
    assert len(rows(text, "Most common confusions")) == 10


def test_few_classes_are_all_shown_and_no_confusions_no_table():
    matrix = np.zeros((13, 13), int)
    matrix[0, 0], matrix[1, 1] = 3, 4
    text = shown(matrix)
    assert [row[:2] for row in rows(text, "Classes")] == [["[red]", "3"], ["[/b]", "4"]]
    assert "confusions" not in text
