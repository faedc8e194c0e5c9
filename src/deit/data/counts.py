"""Numbers of images in each class: what they say about a training, and the weights that make up for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from deit.data.folders import Split

RULES = 10
"""From this ratio of the largest class's images to the smallest's on, a remark says that the large classes rule."""
FEW = 5
"""A class with fewer training images than this has a remark."""
NAMED = 3
"""Largest number of classes that a sentence names."""


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
            f"{listed(missing)}; add some, leave such classes out, or set objective.class_weights=equal"
        )
    return [len(split) / (len(counts) * count) for count in counts]


def remarks(classes: Sequence[str], train: Sequence[int], val: Sequence[int], *, balanced: bool) -> list[str]:
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
                f'the classes differ much in size: of {sum(train):,} training images, "{classes[most]}" has '
                f'{train[most]:,} and "{classes[least]}" has {train[least]:,}. So the model learns mostly the large '
                "classes, and a high accuracy may hide that it misses the small ones. To let each class count the "
                "same, use --set objective.class_weights=balanced (for deit fit, set it in the recipes beside its "
                "plan.json), and look at the balanced accuracy"
            )
    if few := sorted((count, place) for place, count in enumerate(train) if count < FEW):
        counted = [f'"{classes[place]}" ({count})' for count, place in few]
        found.append(
            f"{_classes(len(few))} fewer than {FEW} training images, too few to learn from: "
            f"{_first(counted)}. Add images, or leave "
            "such classes out"
        )
    if unseen := [classes[place] for place, count in enumerate(val) if not count]:
        found.append(
            f"{_classes(len(unseen))} no validation image, so nothing tells how well the model knows "
            f"{'it' if len(unseen) == 1 else 'them'}: {listed(unseen)}. Add such images"
        )
    return found


def listed(names: Iterable[str]) -> str:
    """The first names in quotes, and how many more there are."""
    return _first(f'"{name}"' for name in names)


def _first(texts: Iterable[str]) -> str:
    texts = list(texts)
    more = len(texts) - NAMED
    return ", ".join(texts[:NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _classes(count: int) -> str:
    return "1 class has" if count == 1 else f"{count:,} classes have"
