"""Models over batches, against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from support.checks import raises_saying, run_python
from torch import nn

from deit.data.batches import Batch
from deit.evaluate.models import evaluate, examine
from deit.machine import Rows
from deit.model.outputs import DeiTForImageClassificationWithTeacherOutput, ImageClassifierOutput


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
            logits=(cls_logits + distillation_logits) / 2,
            cls_logits=cls_logits,
            distillation_logits=distillation_logits,
        )


def batches(count=37, classes=5, size=8):
    generator = torch.Generator().manual_seed(0)
    pixels = 3 * torch.randn(count, 1, 2, classes, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return pixels, labels, [Batch(pixels[i : i + size], labels[i : i + size]) for i in range(0, count, size)]


def test_each_head_on_every_image():
    pixels, labels, parts = batches()
    model = Lookup(heads=2).train()
    found = evaluate(model, parts)
    first, second = pixels[:, 0, 0], pixels[:, 0, 1]
    scores = {
        "class": first,
        "distillation": second,
        "fused": first + second,
        "softmax": first.softmax(-1) + second.softmax(-1),
    }
    assert {head: accuracy.value for head, accuracy in found.items()} == pytest.approx(
        {head: accuracy_score(labels, score.argmax(-1)) for head, score in scores.items()}
    )
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


def scores_of(pixels):
    first, second = pixels[:, 0, 0], pixels[:, 0, 1]
    return {
        "fused": ((first + second) / 2).softmax(-1),
        "class": first.softmax(-1),
        "distillation": second.softmax(-1),
        "softmax": (first.softmax(-1) + second.softmax(-1)) / 2,
    }


NAMES = tuple("abcdefghijk")


@pytest.mark.parametrize("head", ["fused", "class", "distillation", "softmax"])
def test_a_report_on_every_image(head):
    pixels, labels, parts = batches(classes=11)
    model = Lookup(heads=2).train()
    found = examine(model, parts, NAMES, head=head)
    assert model.training
    for name, scores in scores_of(pixels).items():
        for top in (1, 5):
            assert found.accuracy(name, top).value == pytest.approx(
                top_k_accuracy_score(labels, scores, k=top, labels=range(11))
            )
    chosen = scores_of(pixels)[head].double()
    chosen /= chosen.sum(1, keepdim=True)
    assert list(found.ranks) == list(scores_of(pixels))
    assert (found.head, found.classes, found.images) == (head, NAMES, 37)
    assert found.accuracy() == found.accuracy(head)
    assert found.nll == pytest.approx(log_loss(labels, chosen, labels=range(11)), rel=1e-6)
    truth = np.eye(11)[labels]
    assert found.brier == pytest.approx(((chosen.numpy() - truth) ** 2).sum(1).mean(), rel=1e-6)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.predicted, chosen.argmax(-1))
    np.testing.assert_allclose(found.confidence, chosen.amax(-1), rtol=1e-6)


def test_the_same_accuracy_as_in_training():
    _, _, parts = batches()
    thorough, quick = examine(Lookup(heads=2), parts, NAMES[:5]), evaluate(Lookup(heads=2), parts)
    assert {head: thorough.accuracy(head) for head in thorough.ranks} == quick


def test_of_equal_answers_the_first_counts_as_in_argmax():
    pixels = torch.zeros(4, 1, 2, 3)
    parts = [Batch(pixels, torch.tensor([0, 1, 2, 0]))]
    found = examine(Lookup(heads=1), parts, "abc")
    assert found.ranks["class"].tolist() == [0, 1, 2, 0]
    assert found.accuracy() == evaluate(Lookup(heads=1), parts)["fused"]


def test_one_head_has_no_others():
    _, _, parts = batches()
    assert list(examine(Lookup(heads=1), parts, NAMES[:5]).ranks) == ["fused", "class"]
    with raises_saying(ValueError, "no head 'distillation'", "it has fused, class"):
        examine(Lookup(heads=1), parts, NAMES[:5], head="distillation")


def test_images_that_can_not_be_read_keep_their_place_and_count_nowhere():
    pixels, labels, _ = batches(count=6)
    marked = labels.clone()
    marked[[1, 4]] = -1
    pixels[1] = float("nan")  # what stands in such a row must not matter
    parts = [
        Batch(pixels[:3], marked[:3], faults=(("1.png", "is empty"),)),
        Batch(pixels[3:], marked[3:], faults=(("4.png", "is damaged"),)),
    ]
    found = examine(Lookup(heads=1), parts, NAMES[:5])
    kept = [0, 2, 3, 5]
    assert found.images == 4
    assert found.read.tolist() == [True, False, True, True, False, True]
    assert found.unreadable == (("1.png", "is empty"), ("4.png", "is damaged"))
    alone = examine(Lookup(heads=1), [Batch(pixels[kept], labels[kept])], NAMES[:5])
    assert {**found.to_dict(), "unreadable": []} == alone.to_dict()


def test_nothing_left_is_refused_with_the_first_reason():
    fault = ("1.png", "is empty")
    with raises_saying(ValueError, "1 found, none can be read", "1.png is empty"):
        examine(Lookup(heads=1), [Batch(torch.zeros(1, 1, 2, 3), torch.tensor([-1]), faults=(fault,))], "abc")
    with raises_saying(ValueError, "no image to evaluate"):
        examine(Lookup(heads=1), [], "abc")


@pytest.mark.parametrize("heads", [1, 2])
def test_answers_that_are_no_numbers_are_refused(heads):
    pixels, labels, _ = batches(count=20)
    pixels[13, 0, heads - 1] = float("nan")
    parts = [Batch(pixels[i : i + 8], labels[i : i + 8]) for i in (0, 8, 16)]
    with raises_saying(ValueError, "answer to image 13", "another checkpoint"):
        examine(Lookup(heads), parts, NAMES[:5], head="class")


def test_names_for_another_number_of_classes_are_refused():
    with raises_saying(ValueError, "5 probabilities", "3 class names"):
        examine(Lookup(heads=1), batches()[2], "abc")


class Narrow(Lookup):
    """A model on a machine whose memory holds three images."""

    def forward(self, pixels):
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(pixels)


def test_lack_of_memory_changes_no_value():
    """Batches of 8 become parts of 4 and 2. The report and the accuracies are those of a large machine."""
    parts = batches()[2]
    with pytest.warns(UserWarning, match="out of memory") as said:
        found = evaluate(Narrow(heads=2), parts)
    assert [str(each.message).partition(";")[0] for each in said] == [
        f"out of memory: {now} images are now computed at once instead of {before}" for now, before in ((4, 8), (2, 4))
    ]
    assert found == evaluate(Lookup(heads=2), parts)
    rows = Rows(lambda _: None)
    report, expected = examine(Narrow(heads=2), parts, NAMES[:5], rows=rows), examine(Lookup(2), parts, NAMES[:5])
    assert rows.most == 2
    assert report.to_dict() == expected.to_dict()


MEMORY = """
import torch
from deit.machine import peak_memory
from deit.data.batches import Batch
from deit.evaluate.models import examine
from deit.model.outputs import ImageClassifierOutput

class Model(torch.nn.Module):
    def forward(self, pixels):
        return ImageClassifierOutput(logits=pixels.flatten(1))

def peak(batches):
    examine(Model(), (Batch(torch.randn(64, 1, 1, 1000), torch.randint(0, 1000, (64,))) for _ in range(batches)),
            tuple(map(str, range(1000))))
    return peak_memory(torch.device("cpu"))

before = peak(20)
print((peak(320) - before) / 2**20)
"""


def test_memory_does_not_grow_with_the_images():
    """MiB from 1,280 to 20,480 images of 1000 classes, whose probabilities alone would take 73."""
    pytest.importorskip("resource")
    assert float(run_python(MEMORY, OMP_NUM_THREADS="1")) < 25
