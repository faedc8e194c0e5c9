"""Scores of answers and their uncertainty. NumPy only, so that a report needs no model. N images, C classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

BINS = 15
"""Number of bins of the calibration error, as in Guo et al. 2017."""
LEAST = float(np.finfo(np.float32).tiny)
"""1.2e-38, which replaces probabilities that float32 rounds to 0. So one image adds at most 87.3 to the sum of logs."""
_Z = 1.959963984540054  # two-sided 95 % of the normal distribution


@dataclass(frozen=True)
class Accuracy:
    """The share of correct decisions, and its 95 % interval (Wilson 1927)."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        return _wilson(self.value, self.total)

    def cells(self) -> tuple[float, str]:
        """The value and its interval, as two cells of a table."""
        return _cells(self.value, self.interval)

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high, "correct": self.correct}


@dataclass(frozen=True)
class BalancedAccuracy:
    """The mean of the recalls of the classes that have images, and its 95 % interval.

    Classes without images don't count, as in scikit-learn's `balanced_accuracy_score`.
    """

    correct: tuple[int, ...]
    """Number of correct decisions for the images of each class."""
    support: tuple[int, ...]
    """Number of images of each class."""

    @property
    def plain(self) -> Accuracy:
        """The accuracy, in which each image counts the same."""
        return Accuracy(sum(self.correct), sum(self.support))

    @property
    def classes(self) -> int:
        """Number of classes that have images."""
        return sum(count > 0 for count in self.support)

    @property
    def value(self) -> float:
        return math.fsum(c / n for c, n in zip(self.correct, self.support, strict=True) if n) / self.classes

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval for the effective number of images.

        That is the number of images for which a plain accuracy would be as uncertain. It follows from the binomial
        variance of each recall, as surveys with strata compute it. The variances take (correct + 1) / (images + 2) for
        a recall, because a class whose few images are all right is not certain. If there is one class, the interval is
        Wilson's. docs/log.md has its coverage, and that of the methods that were not taken.
        """
        recalls = [((c + 1) / (n + 2), n) for c, n in zip(self.correct, self.support, strict=True) if n]
        variance = math.fsum(p * (1 - p) / n for p, n in recalls) / self.classes**2
        mean = math.fsum(p for p, _ in recalls) / self.classes
        return _wilson(self.value, mean * (1 - mean) / variance)

    def cells(self) -> tuple[float, str]:
        """The value and its interval, as two cells of a table."""
        return _cells(self.value, self.interval)

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high, "classes": self.classes}


def _wilson(p: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share `p` of `n` images."""
    centre = (p + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
    half = _Z / (1 + _Z * _Z / n) * math.sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _cells(value: float, interval: tuple[float, float]) -> tuple[float, str]:
    low, high = interval
    return value, f"{low:.3f} to {high:.3f}"


@dataclass(frozen=True)
class Bin:
    """Images whose confidence, the largest probability, is above `low` and at most `high`."""

    low: float
    high: float
    count: int
    confidence: float | None
    """Mean over the images; None if there are none."""
    accuracy: float | None
    """Share of correct answers; None if there are no images."""


@dataclass(frozen=True)
class ClassScore:
    """The scores of one class.

    A score that would be 0 / 0 is None: precision if the class is never the answer, recall if no image shows it.
    """

    name: str
    support: int
    """Number of images of this class."""
    predicted: int
    """Number of images for which this class is the answer."""
    correct: int

    @property
    def precision(self) -> float | None:
        return self.correct / self.predicted if self.predicted else None

    @property
    def recall(self) -> float | None:
        return self.correct / self.support if self.support else None

    @property
    def f1(self) -> float | None:
        """2 correct / (support + predicted): the harmonic mean of precision and recall."""
        return 2 * self.correct / (self.support + self.predicted) if self.support + self.predicted else None


@dataclass(frozen=True, eq=False)
class Report:
    """A classifier's answers on N images, in the data's order, and the scores that follow from them.

    The arrays have a row for every image. An image that could not be read is labelled -1 and never counts.
    """

    classes: tuple[str, ...]
    """Names of the model's classes."""
    head: str
    """The head that `predicted`, `confidence`, `probability` and `squares` belong to."""
    labels: np.ndarray
    """(N,) int64: the true class."""
    ranks: Mapping[str, np.ndarray]
    """By head, (N,) int64: how many classes come before the true one. If probabilities are equal, the lower number of a
    class comes first, as in argmax."""
    predicted: np.ndarray
    """(N,) int64: the class of the largest probability."""
    confidence: np.ndarray
    """(N,) float64, 0 to 1: the largest probability."""
    probability: np.ndarray
    """(N,) float64, 0 to 1: the probability of the true class."""
    squares: np.ndarray
    """(N,) float64, 1/C to 1: the sum over classes of squared probabilities."""
    unreadable: tuple[tuple[str, str], ...] = ()
    """(file, reason) of each image that is left out."""

    @property
    def heads(self) -> list[str]:
        """The heads worth a row each. A model with one head has only `class`: its `fused` is the same."""
        return ["class"] if set(self.ranks) == {"fused", "class"} else list(self.ranks)

    def __post_init__(self) -> None:
        if not self.read.any():
            first = "; the first: " + " ".join(self.unreadable[0]) if self.unreadable else ""
            raise ValueError(f"there is no image to evaluate on: {len(self.unreadable)} found, none can be read{first}")

    @cached_property
    def read(self) -> np.ndarray:
        """(N,) bool: the images that count."""
        return self.labels >= 0

    @property
    def images(self) -> int:
        """Number of images that count."""
        return int(self.read.sum())

    def accuracy(self, head: str | None = None, top: int = 1) -> Accuracy:
        """Share of images whose true class is among the `top` first answers of a head, by default `self.head`."""
        return Accuracy(int((self.ranks[head or self.head][self.read] < top).sum()), self.images)

    def balanced(self, head: str | None = None) -> BalancedAccuracy:
        """Mean recall of the classes that have images, of a head, by default `self.head`."""
        labels, right = self.labels[self.read], (self.ranks[head or self.head] == 0)[self.read]
        correct, support = (
            tuple(np.bincount(which, minlength=len(self.classes)).tolist()) for which in (labels[right], labels)
        )
        return BalancedAccuracy(correct, support)

    @property
    def absent(self) -> list[str]:
        """Names of the classes without images."""
        return [each.name for each in self.by_class if not each.support]

    @property
    def nll(self) -> float:
        """Mean negative log likelihood of the true class, in nats. Probabilities below `LEAST` count as `LEAST`."""
        return float(-np.log(np.maximum(self.probability[self.read], LEAST)).mean())

    @property
    def brier(self) -> float:
        """Mean over images of the squared distance between probabilities and truth, summed over classes: 0 to 2
        (Brier 1950)."""
        return float((self.squares - 2 * self.probability + 1)[self.read].mean())

    @cached_property
    def bins(self) -> tuple[Bin, ...]:
        """The reliability diagram: `BINS` bins of equal width over confidence."""
        edges = np.arange(BINS + 1) / BINS
        confidence, correct = self.confidence[self.read], (self.predicted == self.labels)[self.read]
        places = np.digitize(confidence, edges[1:-1], right=True)
        found = []
        for place in range(BINS):
            inside = places == place
            means = (float(confidence[inside].mean()), float(correct[inside].mean())) if inside.any() else (None, None)
            found.append(Bin(float(edges[place]), float(edges[place + 1]), int(inside.sum()), *means))
        return tuple(found)

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: mean over images of `|accuracy - confidence|` of their bin (Guo et al. 2017)."""
        return (
            sum(
                each.count * abs(each.accuracy - each.confidence)
                for each in self.bins
                if each.accuracy is not None and each.confidence is not None
            )
            / self.images
        )

    @cached_property
    def cells(self) -> tuple[tuple[int, int, int], ...]:
        """The confusion matrix without its zeros: (true class, answer, images), by class and answer."""
        pairs, counts = np.unique(np.stack([self.labels, self.predicted])[:, self.read], axis=1, return_counts=True)
        return tuple(zip(*pairs.tolist(), counts.tolist(), strict=True))

    def confusion(self) -> np.ndarray:
        """The confusion matrix, (C, C) int64. Rows are true classes, columns are answers. 8 MB for 1000 classes."""
        matrix = np.zeros((len(self.classes),) * 2, np.int64)
        for label, answer, count in self.cells:
            matrix[label, answer] = count
        return matrix

    @cached_property
    def by_class(self) -> tuple[ClassScore, ...]:
        """The scores of every class, in the model's order. Classes without images are included."""
        count = len(self.classes)
        labels, predicted = self.labels[self.read], self.predicted[self.read]
        columns = [
            np.bincount(which, minlength=count).tolist() for which in (labels, predicted, labels[labels == predicted])
        ]
        return tuple(ClassScore(*each) for each in zip(self.classes, *columns, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; the keys are in docs/evaluation.md."""
        return {
            "images": self.images,
            "unreadable": [{"file": file, "reason": reason} for file, reason in self.unreadable],
            "heads": {
                head: {f"top{top}": self.accuracy(head, top).to_dict() for top in (1, 5)}
                | {"balanced": self.balanced(head).to_dict()}
                for head in self.ranks
            },
            "head": self.head,
            "nll": self.nll,
            "brier": self.brier,
            "calibration": {"error": self.calibration_error, "bins": [vars(each) for each in self.bins]},
            "classes": [
                {
                    "name": each.name,
                    "support": each.support,
                    "predicted": each.predicted,
                    "precision": each.precision,
                    "recall": each.recall,
                    "f1": each.f1,
                }
                for each in self.by_class
            ],
            "confusion": [list(cell) for cell in self.cells],
        }


@dataclass(frozen=True)
class Comparison:
    """Two classifiers on the same images: how many images both, one or neither of them got right."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def images(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def first(self) -> Accuracy:
        return Accuracy(self.both + self.only_first, self.images)

    @property
    def second(self) -> Accuracy:
        return Accuracy(self.both + self.only_second, self.images)

    @property
    def difference(self) -> float:
        """Accuracy of the first minus that of the second, -1 to 1."""
        return (self.only_first - self.only_second) / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference: method 10 of Newcombe 1998 (Statistics in Medicine 17, 2635).

        It combines the Wilson intervals of both accuracies with their correlation. It also holds for few images and for
        accuracies near 1, for which the interval of the normal distribution is too short.
        """
        first, second, n = self.first, self.second, self.images
        (low1, high1), (low2, high2) = first.interval, second.interval
        down1, up1, down2, up2 = (first.value - low1, high1 - first.value, second.value - low2, high2 - second.value)
        margins = first.correct * (n - first.correct) * second.correct * (n - second.correct)
        surplus = float(self.both * self.neither - self.only_first * self.only_second)
        if surplus > 0:  # only a positive correlation is corrected for continuity
            surplus = max(surplus - n / 2, 0.0)
        phi = surplus / math.sqrt(margins) if margins else 0.0
        down = math.sqrt(max(0.0, down1**2 - 2 * phi * down1 * up2 + up2**2))
        up = math.sqrt(max(0.0, up1**2 - 2 * phi * up1 * down2 + down2**2))
        return max(-1.0, self.difference - down), min(1.0, self.difference + up)

    @property
    def p_value(self) -> float:
        """Two-sided p-value of McNemar's exact test. It is the probability of a split of the discordant images at least
        this uneven if each image falls to either side with equal probability."""
        return mcnemar(self.only_first, self.only_second)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; the keys are in docs/evaluation.md."""
        low, high = self.interval
        return {
            "images": self.images,
            "accuracy": self.first.to_dict(),
            "other_accuracy": self.second.to_dict(),
            "both": self.both,
            "only_model": self.only_first,
            "only_other": self.only_second,
            "neither": self.neither,
            "difference": self.difference,
            "low": low,
            "high": high,
            "p_value": self.p_value,
        }


def compare(first: Report, second: Report) -> Comparison:
    """Compares two reports on the same images in the same order. Images that both could read count.

    Raises `ValueError` if the numbers of images differ, or if no image was read by both.
    """
    if len(first.labels) != len(second.labels):
        raise ValueError(
            f"only reports on the same images can be compared, found {len(first.labels)} and "
            f"{len(second.labels)} images; evaluate both models on the same data"
        )
    read = first.read & second.read
    if not read.any():
        raise ValueError("no image could be read by both models, so there is nothing to compare; check the images")
    one, other = (report.ranks[report.head][read] == 0 for report in (first, second))
    return Comparison(*(int(found.sum()) for found in (one & other, one & ~other, ~one & other, ~one & ~other)))


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of two discordant counts (McNemar 1947).

    It is twice the tail of a binomial distribution with probability 1/2, and at most 1. It is computed in logarithms,
    because 0.5**n is 0 in float64 for n above 1074.
    """
    n, least = only_first + only_second, min(only_first, only_second)
    if only_first == only_second:
        return 1.0
    tail = term = 1.0  # in units of its largest term, P(X = least)
    for k in range(least, 0, -1):
        term *= k / (n - k + 1)
        tail += term
        if term < 1e-17 * tail:
            break
    largest = math.lgamma(n + 1) - math.lgamma(least + 1) - math.lgamma(n - least + 1) - n * math.log(2)
    return min(1.0, math.exp(largest + math.log(2 * tail)))
