"""Weights of classes against scikit-learn, and what numbers of images are said to make hard."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight
from support.checks import raises_saying

from deit.data.counts import balanced_weights, class_counts, remarks
from deit.data.folders import Split


def split(counts, classes="abcdef"):
    labels = tuple(np.repeat(np.arange(len(counts)), counts).tolist())
    return Split(tuple(Path(f"{i}.png") for i in range(len(labels))), labels, tuple(classes[: len(counts)]))


@pytest.mark.parametrize("counts", [(5, 5, 5), (900, 90, 10), (1, 2, 3, 4, 5, 6), (1, 1000)])
def test_weights_are_scikit_learns_and_their_mean_is_1(counts):
    given = split(counts)
    found = balanced_weights(given)
    expected = compute_class_weight("balanced", classes=np.arange(len(counts)), y=np.array(given.labels))
    np.testing.assert_allclose(found, expected, rtol=1e-15)
    assert np.mean([found[label] for label in given.labels]) == pytest.approx(1)


def test_a_class_without_images_has_no_weight():
    with raises_saying(ValueError, 'found none of "b"', "add some, leave such classes out", "class_weights=equal"):
        balanced_weights(split((3, 0, 2)))


def test_counts_include_classes_without_images():
    assert class_counts(split((3, 0, 2, 0))) == [3, 0, 2, 0]
    assert class_counts(split((3, 1)), 4) == [3, 1, 0, 0]


def said(train, val, balanced=False):
    return [*map(str, remarks("abcdefgh"[: len(train)], train, val, balanced=balanced))]


@pytest.mark.parametrize("ratio", [9, 10])
def test_the_large_classes_rule_from_ten_times_the_smallest_on(ratio):
    found = said((10 * ratio, 30, 10), (1, 1, 1))
    assert len(found) == (ratio == 10)
    for sentence in found:
        assert 'of 140 training images, "a" has 100 and "c" has 10' in sentence
        assert "--set objective.class_weights=balanced" in sentence
    assert said((10 * ratio, 30, 10), (1, 1, 1), balanced=True) == []


def test_small_classes_and_classes_that_nothing_judges():
    few, unseen = said((20, 4, 20, 2), (1, 0, 1, 1), balanced=True)
    assert few.startswith('2 classes have fewer than 5 training images, too few to learn from: "d" (2), "b" (4). Add')
    assert unseen.startswith('1 class has no validation image, so nothing tells how well the model knows it: "b". Add')
    [sentence] = said((9,) * 8, (0,) * 8)
    assert sentence.startswith("8 classes have no validation image")
    assert '"a", "b", "c" and 5 more' in sentence
    assert said((5, 5, 49), (1, 1, 1)) == []
