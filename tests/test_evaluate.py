"""Accuracies and intervals against scikit-learn and SciPy."""

import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score
from torch import nn

from deit.data import Batch
from deit.evaluate import Accuracy, evaluate
from deit.outputs import DeiTForImageClassificationWithTeacherOutput, ImageClassifierOutput


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (353, 360), (1, 2), (500, 10_000)])
def test_interval_is_wilsons(correct, total):
    reference = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert Accuracy(correct, total).interval == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert Accuracy(correct, total).value == correct / total


class Lookup(nn.Module):
    """Answers with the pixels as logits: first row for the class head, second for the distillation head."""

    def __init__(self, heads):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(0.5)

    def forward(self, pixels):
        cls_logits, distillation_logits = self.dropout(pixels[:, 0, 0]), pixels[:, 0, 1]
        if self.heads == 1:
            return ImageClassifierOutput(logits=cls_logits)
        return DeiTForImageClassificationWithTeacherOutput(
            logits=(cls_logits + distillation_logits) / 2, cls_logits=cls_logits,
            distillation_logits=distillation_logits)


def batches(count=37, classes=5, size=8):
    generator = torch.Generator().manual_seed(0)
    pixels = 3 * torch.randn(count, 1, 2, classes, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return pixels, labels, [Batch(pixels[i:i + size], labels[i:i + size]) for i in range(0, count, size)]


def test_each_head_on_every_image():
    pixels, labels, parts = batches()
    model = Lookup(heads=2).train()
    found = evaluate(model, parts)
    first, second = pixels[:, 0, 0], pixels[:, 0, 1]
    scores = {"class": first, "distillation": second, "fused": first + second,
              "softmax": first.softmax(-1) + second.softmax(-1)}
    assert {head: accuracy.value for head, accuracy in found.items()} == pytest.approx(
        {head: accuracy_score(labels, score.argmax(-1)) for head, score in scores.items()})
    assert all(accuracy.total == 37 for accuracy in found.values())
    assert model.training  # dropout was off in between, or the accuracies above would differ


def test_one_head_counts_as_class_and_as_fused():
    pixels, labels, parts = batches()
    found = evaluate(Lookup(heads=1), parts)
    expected = accuracy_score(labels, pixels[:, 0, 0].argmax(-1))
    assert {head: accuracy.value for head, accuracy in found.items()} == {"fused": expected, "class": expected}


def test_no_image_is_refused():
    with pytest.raises(ValueError, match="no image to evaluate"):
        evaluate(Lookup(heads=1), [])
