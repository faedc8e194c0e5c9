"""Sentences that warn of a result, each with the next move. Each function returns a list, which is mostly empty."""

from __future__ import annotations

from collections.abc import Sequence

from deit.evaluate.scores import Accuracy
from deit.words import Said, said


def learnt_nothing(accuracy: float, classes: Sequence[str], images: Sequence[int]) -> list[Said]:
    """Warns if a model is no better than the answer that never looks: the commonest class.

    Args:
        accuracy: of the model on the images, 0 to 1.
        images: number of images of each class.
    """
    total, most = sum(images), max(images, default=0)
    if total == most or accuracy > most / total:  # images of a single class tell nothing
        return []
    return [
        said(
            'warning: the accuracy {accuracy:.3f} is not above {share:.3f}, the share of "{commonest}" among these '
            "images, so the model is no better than this one answer. Check that the labels and the preprocessing are "
            "right, train longer, or lower the learning rate",
            accuracy=accuracy,
            share=most / total,
            commonest=classes[images.index(most)],
        )
    ]


def below_teacher(accuracy: float, teacher: Accuracy | None) -> list[Said]:
    """Warns if a student is right on fewer validation images than its teacher was before the training."""
    if teacher is None or accuracy >= teacher.value:
        return []
    chance = said(", which may be chance") if accuracy > teacher.interval[0] else ""
    return [
        said(
            "warning: the student is right on {accuracy:.3f} of the validation images, its teacher on {teacher:.3f} of "
            "{total:,} of them{chance}. Compare both on test images (deit eval --compare), train longer, or take the "
            "teacher itself",
            accuracy=accuracy,
            teacher=teacher.value,
            total=teacher.total,
            chance=chance,
        )
    ]


def judged_by(part: str | None) -> list[Said]:
    """Warns if a model is judged by images that may have chosen or trained it. `part` is the part of the data: val,
    train, …"""
    if part == "val":
        return [
            said(
                "warning: if these validation images chose the model in its training, their accuracy flatters it. Test "
                "images do not: take the test part of the data, or set one aside with `deit split` and train again"
            )
        ]
    if part == "train":
        return [
            said(
                "warning: if the model was trained on these images, their accuracy says how well it remembers them, "
                "and not how often it is right on others. Take validation or test images, or set some aside with "
                "`deit split` and train again"
            )
        ]
    return []


def trained_on_these() -> Said:
    """Says that the images which judge a model are, or hold, those that it was trained on."""
    return said(
        "warning: the model was trained on these images, or on some of them, so their accuracy says how well it "
        "remembers them, and not how often it is right on others. Take validation or test images, or set some aside "
        "with `deit split` and train again"
    )


def chosen_by_validation(command: str) -> str:
    """Says after a training that its accuracy flatters the model. `command` judges it by test images."""
    return (
        "warning: the validation images chose this model, so their accuracy flatters it. The test images do not: "
        f"{command}"
    )
