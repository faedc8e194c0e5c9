"""Numbers of images in each class: what they say about a training, and the weights that make up for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deit.data.folders import Split
from deit.words import Said, listed, plural, quoted, said

RULES = 10
"""From this ratio of the largest class's images to the smallest's on, a remark says that the large classes rule."""
FEW = 5
"""A class with fewer training images than this has a remark."""


def class_counts(split: Split, classes: int | None = None) -> list[int]:
    """Number of images of each class."""
    return np.bincount(split.labels, minlength=classes or len(split.classes)).tolist()


def balanced_weights(split: Split) -> list[float]:
    """The weight of each class that makes all classes count the same: n / (classes * images of the class).

    The formula is that of scikit-learn's `class_weight="balanced"`. The mean over the n images is 1.

    Raises `ValueError` if a class has no image.
    """
    counts = class_counts(split)
    if missing := [name for name, count in zip(split.classes, counts, strict=True) if not count]:
        raise ValueError(
            f"objective.class_weights=balanced needs a training image of each class, found none of "
            f"{listed(map(quoted, missing))}; add some, leave such classes out, or set objective.class_weights=equal"
        )
    return [len(split) / (len(counts) * count) for count in counts]


def remarks(classes: Sequence[str], train: Sequence[int], val: Sequence[int], *, balanced: bool) -> list[Said]:
    """Sentences about what the numbers of images make hard to learn or to judge, each with the next move.

    Args:
        train, val: number of training and of validation images of each class.
        balanced: whether the classes are weighed already.
    """
    found = []
    present = [place for place, count in enumerate(train) if count]
    if present:
        most, least = max(present, key=train.__getitem__), min(present, key=train.__getitem__)
        if train[most] >= RULES * train[least] and not balanced:
            found.append(
                said(
                    'the classes differ much in size: of {total:,} training images, "{largest}" has {most:,} and '
                    '"{smallest}" has {least:,}. So the model learns mostly the large classes, and a high accuracy may '
                    "hide that it misses the small ones. To let each class count the same, use --set "
                    "objective.class_weights=balanced (for deit fit, set it in the recipes beside its plan.json), and "
                    "look at the balanced accuracy",
                    total=sum(train),
                    largest=classes[most],
                    most=train[most],
                    smallest=classes[least],
                    least=train[least],
                )
            )
    if few := sorted((count, place) for place, count in enumerate(train) if count < FEW):
        found.append(
            plural(
                len(few),
                "{count:,} class has fewer than {least} training images, too few to learn from: {classes}. Add images, "
                "or leave such classes out",
                "{count:,} classes have fewer than {least} training images, too few to learn from: {classes}. Add "
                "images, or leave such classes out",
                least=FEW,
                classes=listed(
                    said('"{name}" ({images:,})', name=classes[place], images=count) for count, place in few
                ),
            )
        )
    if unseen := [classes[place] for place, count in enumerate(val) if not count]:
        found.append(
            plural(
                len(unseen),
                "{count:,} class has no validation image, so nothing tells how well the model knows it: {classes}. Add "
                "such images",
                "{count:,} classes have no validation image, so nothing tells how well the model knows them: {classes}."
                " Add such images",
                classes=listed(map(quoted, unseen)),
            )
        )
    return found
