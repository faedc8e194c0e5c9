"""Scores against scikit-learn, SciPy, published values, and formulas written again."""

import json
import math

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import (
    balanced_accuracy_score,
    brier_score_loss,
    confusion_matrix,
    log_loss,
    precision_recall_fscore_support,
)
from support.checks import raises_saying

from deit.evaluate.scores import Accuracy, BalancedAccuracy, Comparison, Report, compare, mcnemar


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (353, 360), (1, 2), (500, 10_000)])
def test_interval_is_wilsons(correct, total):
    reference = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert Accuracy(correct, total).interval == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert Accuracy(correct, total).value == correct / total


def balanced(*counts):
    """(correct, images) of each class."""
    return BalancedAccuracy(*zip(*counts, strict=True))


@pytest.mark.parametrize("counts", [((353, 360),), ((0, 10),), ((7, 7), (0, 0))])
def test_the_balanced_interval_of_one_class_is_wilsons(counts):
    correct, total = counts[0]
    assert balanced(*counts).value == Accuracy(correct, total).value
    assert balanced(*counts).interval == pytest.approx(Accuracy(correct, total).interval, abs=1e-12)
    assert balanced(*counts).classes == 1


def test_the_balanced_interval_by_its_definition():
    """SciPy's Wilson interval takes whole numbers, so the counts are chosen to give an effective number of 150."""
    found = balanced((49, 98), (49, 98))  # recalls of 50/100 in the variance, and 0.5 in all
    assert found.interval == pytest.approx(Accuracy(98, 196).interval, abs=1e-12)
    found = balanced((79, 98), (3, 4), (0, 1), (0, 0))
    recalls, images = np.array([80 / 100, 4 / 6, 1 / 3]), np.array([98, 4, 1])
    variance = (recalls * (1 - recalls) / images).sum() / 9
    n = recalls.mean() * (1 - recalls.mean()) / variance
    assert 4 < n < 10  # the class of one image makes it small
    for end in found.interval:  # where the score test is at its limit
        assert abs(found.value - end) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / n), rel=1e-9)


@pytest.mark.parametrize(
    ("images", "recalls"),
    [((1000, 10), (0.99, 0.9)), ((36,) * 10, (0.99,) * 10), ((5,) * 100, (0.98,) * 100), ((1,) * 100, (0.9,) * 100)],
)
def test_the_balanced_interval_covers(images, recalls):
    """For these counts, the interval of the normal distribution covers 0 to 93 %."""
    draws = np.random.default_rng(0).binomial(images, recalls, (1500, len(images))).tolist()
    true = float(np.mean(recalls))
    covered = [low <= true <= high for low, high in (BalancedAccuracy(each, images).interval for each in draws)]
    assert 0.92 < np.mean(covered) < 0.99


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")  # classes without images
@pytest.mark.parametrize("never", [(), (5,), (0, 2, 5)])
def test_balanced_accuracy_is_scikit_learns(never):
    scores, labels = answers(never=never)
    found = report(scores, labels).balanced()
    assert found.value == pytest.approx(balanced_accuracy_score(labels, scores.argmax(1)), rel=1e-12)
    assert (found.classes, found.plain) == (6 - len(never), report(scores, labels).accuracy())
    assert report(scores, labels).absent == [name for i, name in enumerate("abcdef") if i in never]
    assert found.interval[0] < found.value < found.interval[1]


def answers(count=500, classes=6, seed=0, never=(5,)):
    """Probabilities (N, C) and labels; classes in `never` are not shown."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(count, classes))
    labels = rng.choice([label for label in range(classes) if label not in never], count)
    logits[np.arange(count), labels] += 1.5
    logits[:, 4] -= 15  # never answered
    scores = np.exp(logits)
    return scores / scores.sum(1, keepdims=True), labels


def report(scores, labels, **changes):
    rows = np.arange(len(labels))
    own = scores[rows, np.maximum(labels, 0)]
    return Report(
        **{
            "classes": tuple("abcdefghij"[: scores.shape[1]]),
            "head": "class",
            "labels": labels,
            "ranks": {"class": (scores > own[:, None]).sum(1)},
            "predicted": scores.argmax(1),
            "confidence": scores.max(1),
            "probability": own,
            "squares": (scores**2).sum(1),
            **changes,
        }
    )


def test_likelihood_and_brier_score():
    scores, labels = answers()
    found = report(scores, labels)
    assert found.nll == pytest.approx(log_loss(labels, scores, labels=range(6)), rel=1e-12)
    assert found.brier == pytest.approx(brier_score_loss(labels, scores, labels=range(6), scale_by_half=False))


def test_a_probability_of_zero_keeps_the_likelihood_finite():
    found = report(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([1, 1]))
    assert found.nll == pytest.approx(-math.log(np.finfo(np.float32).tiny) / 2)


def test_calibration_error_by_its_definition():
    """Guo et al. 2017, equation 3, image by image."""
    scores, labels = answers()
    found = report(scores, labels)
    total, counts = 0.0, []
    for m in range(15):
        inside = [i for i in range(500) if m / 15 < scores[i].max() <= (m + 1) / 15]
        counts.append(len(inside))
        if inside:
            right = sum(scores[i].argmax() == labels[i] for i in inside) / len(inside)
            sure = sum(scores[i].max() for i in inside) / len(inside)
            total += len(inside) / 500 * abs(right - sure)
            assert found.bins[m].accuracy == pytest.approx(right)
            assert found.bins[m].confidence == pytest.approx(sure)
        else:
            assert (found.bins[m].accuracy, found.bins[m].confidence) == (None, None)
    assert found.calibration_error == pytest.approx(total)
    assert total > 0.01
    assert [each.count for each in found.bins] == counts
    assert [(each.low, each.high) for each in found.bins] == [(m / 15, (m + 1) / 15) for m in range(15)]


def test_certainty_falls_into_the_last_bin_and_an_edge_into_the_lower():
    scores = np.array([[1.0, 0.0], [0.6, 0.4]])  # 0.6 = 9/15
    found = report(scores, np.array([0, 0]))
    assert [m for m, each in enumerate(found.bins) if each.count] == [8, 14]


def test_classes_and_confusions():
    scores, labels = answers()
    found = report(scores, labels)
    predicted = scores.argmax(1)
    np.testing.assert_array_equal(found.confusion(), confusion_matrix(labels, predicted, labels=range(6)))
    columns = precision_recall_fscore_support(labels, predicted, labels=range(6), zero_division=np.nan)
    for place, each in enumerate(found.by_class):
        for value, reference in zip((each.precision, each.recall, each.f1, each.support), columns, strict=True):
            assert (value is None) == bool(np.isnan(reference[place])), each
            assert value is None or value == pytest.approx(reference[place])
    assert (found.by_class[4].precision, found.by_class[5].recall) == (None, None)  # never answered, never shown
    assert [each.name for each in found.by_class] == list("abcdef")


def test_what_is_left_out_counts_nowhere():
    scores, labels = answers()
    marked = np.where(np.arange(500) % 7 == 0, -1, labels)
    kept = marked >= 0
    assert report(scores, marked).to_dict() == report(scores[kept], labels[kept]).to_dict()


def test_a_report_as_json_and_back():
    scores, labels = answers()
    found = report(scores, labels, unreadable=(("a.png", "is empty"),)).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    matrix = np.zeros((6, 6), int)
    for label, answer, count in found["confusion"]:
        matrix[label, answer] = count
    np.testing.assert_array_equal(matrix, confusion_matrix(labels, scores.argmax(1), labels=range(6)))
    assert found["unreadable"] == [{"file": "a.png", "reason": "is empty"}]
    assert found["heads"]["class"]["top1"]["correct"] == (scores.argmax(1) == labels).sum()


# ---------------------------------------------------------------------------------------------------------- comparison


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (0, 5), (3, 9), (9, 3), (7, 7), (60, 100), (500, 700)])
def test_mcnemar_is_the_binomial_test(counts):
    expected = binomtest(min(counts), sum(counts)).pvalue if sum(counts) else 1.0
    assert mcnemar(*counts) == pytest.approx(expected, rel=1e-10)


def test_mcnemar_of_counts_too_large_for_floats():
    assert mcnemar(4000, 4200) == pytest.approx(binomtest(4000, 8200).pvalue, rel=1e-8)
    assert 0.5**8200 == 0.0
    assert mcnemar(500_000, 501_000) == pytest.approx(binomtest(500_000, 1_001_000).pvalue, rel=1e-6)
    assert mcnemar(0, 100_000) == 0.0


@pytest.mark.parametrize(
    ("counts", "published"),
    [
        ((36, 12, 2, 0), (0.0569, 0.3404)),  # Newcombe 1998
        ((59, 6, 16, 80), (-0.1186, -0.0046)),  # Fagerland, Lydersen and Laake 2017, chapter 8 (R: contingencytables)
        ((14, 5, 0, 22), (0.0115, 0.2265)),  # Altman et al. 2000, table 6.2: 0.01 to 0.23
    ],
)
def test_interval_of_the_difference_is_newcombes(counts, published):
    found = Comparison(*counts)
    assert found.interval == pytest.approx(published, abs=5e-5)
    assert found.difference == pytest.approx((counts[1] - counts[2]) / sum(counts))
    both, first, second, neither = counts
    low, high = found.interval
    assert Comparison(both, second, first, neither).interval == pytest.approx((-high, -low))


def test_of_many_images_the_interval_is_walds():
    """The normal distribution's, to which it tends."""
    counts = np.array([700_000, 60_000, 50_000, 190_000])
    n, (_, b, c, _) = counts.sum(), counts
    error = 1.959964 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    assert Comparison(*counts.tolist()).interval == pytest.approx(((b - c) / n - error, (b - c) / n + error), abs=2e-6)


def test_the_interval_of_equal_and_of_opposite_models():
    assert Comparison(10, 0, 0, 0).interval == pytest.approx((-0.27753, 0.27753), abs=1e-5)  # 10 of 10: 0.72247 to 1
    assert Comparison(0, 10, 0, 0).interval == pytest.approx((1 - math.sqrt(2) * 0.27753, 1.0), abs=1e-5)


def test_models_are_compared_on_images_that_both_read():
    scores, labels = answers(never=())
    other, _ = answers(seed=1, never=())
    one = np.where(np.arange(500) < 20, -1, labels)
    two = np.where(np.arange(500) > 470, -1, (labels + 1) % 6)  # its classes are in another order
    found = compare(report(scores, one), report(np.roll(other, 1, axis=1), two))
    right, wrong = scores.argmax(1) == labels, other.argmax(1) != labels
    both = slice(20, 471)
    assert (found.images, found.only_first) == (451, (right & wrong)[both].sum())
    assert (found.both, found.neither) == ((right & ~wrong)[both].sum(), (~right & wrong)[both].sum())
    assert found.only_second == (~right & ~wrong)[both].sum()
    assert found.first.correct == right[both].sum()
    assert found.second.correct == (~wrong)[both].sum()
    assert found.p_value == mcnemar(found.only_first, found.only_second)


def test_a_comparison_of_other_images_is_refused():
    scores, labels = answers(count=10)
    with raises_saying(ValueError, "same images", "10 and 9"):
        compare(report(scores, labels), report(scores[:9], labels[:9]))
    one, two = labels.copy(), labels.copy()
    one[:5], two[5:] = -1, -1
    with raises_saying(ValueError, "no image could be read by both"):
        compare(report(scores, one), report(scores, two))
