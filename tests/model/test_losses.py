import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight, compute_sample_weight
from support.checks import assert_close, raises_saying
from support.models import build, images, small

from deit.model import losses
from deit.model.heads import fuse_heads
from deit.recipe import Supervised

B, C = 6, 5


@pytest.fixture
def logits():
    return [torch.randn(B, C, requires_grad=True) for _ in range(2)] + [torch.randn(B, C) * 2]


def log_softmax(x):
    x = np.asarray(x, dtype=np.float64)
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


def cross_entropy(x, targets):
    """Mean over images of minus the log-probability of each image's target distribution."""
    targets = np.asarray(targets)
    if targets.ndim == 1:
        targets = np.eye(C)[targets]
    return -(targets * log_softmax(x)).sum(-1).mean()


def numbers(*tensors):
    return [t.detach().double().numpy() for t in tensors]


# --------------------------------------------------------------------------------------------------- classification


LABELS = {
    "whole": torch.tensor([0, 1, 2, 3, 4, 0]),
    "int32": torch.tensor([0, 1, 2, 3, 4, 0], dtype=torch.int32),
    "floats": torch.rand(B, C),
    "one float": torch.rand(B),
    "column": torch.rand(B, 1),
    "probabilities": torch.rand(B, C).softmax(-1),
    "multi-hot": (torch.arange(B * C).reshape(B, C) % 3 == 0).float(),
}


@pytest.mark.parametrize(
    ("problem", "count", "labels"),
    [
        (None, C, "whole"),
        (None, C, "floats"),
        (None, 1, "one float"),
        (None, 1, "column"),
        (None, C, "multi-hot"),
        ("regression", C, "floats"),
        ("regression", 1, "column"),
        ("regression", 1, "one float"),
        ("single_label_classification", C, "whole"),
        ("multi_label_classification", C, "multi-hot"),
        ("multi_label_classification", C, "floats"),
    ],
)
def test_equals_transformers(problem, count, labels, quiet_transformers):
    from transformers.loss.loss_utils import LOSS_MAPPING

    ours = small(num_labels=count, problem_type=problem)
    theirs = quiet_transformers.DeiTConfig(num_labels=count, problem_type=problem)
    x = torch.randn(B, count, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    found = losses.classification_loss(x, LABELS[labels], ours)
    expected = LOSS_MAPPING["ForImageClassification"](LABELS[labels], y, theirs)
    assert_close(found, expected, 1e-6)
    found.backward()
    expected.backward()
    assert_close(x.grad, y.grad, 1e-6)


def test_whole_numbers_of_every_width_are_classes():
    x = torch.randn(B, C)
    expected = losses.classification_loss(x, LABELS["whole"], small(num_labels=C))
    assert expected.item() == pytest.approx(cross_entropy(x, LABELS["whole"]))
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        assert_close(losses.classification_loss(x, LABELS["whole"].to(dtype), small(num_labels=C)), expected, 0)


def test_booleans_are_several_labels():
    x = torch.randn(B, C)
    truth = LABELS["multi-hot"].bool()
    expected = -np.where(truth, *(np.log(1 / (1 + np.exp(-s * x.double().numpy()))) for s in (1, -1))).mean()
    assert losses.classification_loss(x, truth, small(num_labels=C)).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("problem", "labels", "sentence"),
    [
        (
            None,
            torch.zeros(B, C + 1),
            f"multi label classification needs labels of shape ({B}, {C}), found ({B}, {C + 1})",
        ),
        ("regression", torch.zeros(B), f"regression needs labels of shape ({B}, {C}), found ({B},)"),
        ("single_label_classification", torch.zeros(B), "needs whole numbers, found torch.float32; pass indices"),
        ("single_label_classification", torch.zeros(B - 1).long(), f"needs labels of shape ({B},), found ({B - 1},)"),
    ],
)
def test_refused_labels(problem, labels, sentence):
    with raises_saying(ValueError, sentence, "set config.problem_type"):
        losses.classification_loss(torch.zeros(B, C), labels, small(num_labels=C, problem_type=problem))


# ------------------------------------------------------------------------------------------------------ distillation


@pytest.mark.parametrize("labels", ["whole", "probabilities"])
@pytest.mark.parametrize("weight", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_hard(labels, weight, smoothing, logits):
    cls, distillation, teacher = logits
    found = losses.distillation_loss(cls, distillation, LABELS[labels], teacher, weight=weight, smoothing=smoothing)
    x, y, z = numbers(*logits)
    truth = np.eye(C)[LABELS[labels]] if labels == "whole" else LABELS[labels].double().numpy()
    w = 0.5 if weight is None else weight
    expected = (1 - w) * cross_entropy(x, truth * (1 - smoothing) + smoothing / C) + w * cross_entropy(y, z.argmax(-1))
    assert found.item() == pytest.approx(expected, abs=1e-6)
    decided = losses.distillation_loss(
        cls, distillation, LABELS[labels], teacher.argmax(-1), weight=weight, smoothing=smoothing
    )
    assert_close(decided, found, 0)


@pytest.mark.parametrize("labels", ["whole", "probabilities"])
@pytest.mark.parametrize(("weight", "temperature"), [(None, None), (0.0, 2.0), (0.7, 1.0), (1.0, 5.0)])
def test_soft(labels, weight, temperature, logits):
    cls, distillation, teacher = logits
    found = losses.distillation_loss(
        cls, distillation, LABELS[labels], teacher, kind="soft", weight=weight, temperature=temperature
    )
    x, y, z = numbers(*logits)
    w, tau = 0.1 if weight is None else weight, temperature or 3.0
    divergence = (
        sum(math.exp(p) * (p - q) for p, q in zip(log_softmax(z / tau).flat, log_softmax(y / tau).flat, strict=True))
        / B
    )
    expected = (1 - w) * cross_entropy(x, LABELS[labels]) + w * tau**2 * divergence
    assert found.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("count", [3, 700])
def test_soft_with_the_original_normalisation(count):
    """facebookresearch/deit divides by images times classes: the teacher weighs `count` times less than in eq. 2."""
    student, teacher = torch.randn(B, count), torch.randn(B, count)
    labels = torch.arange(B) % count
    options = {"kind": "soft", "weight": 0.5, "temperature": 2.0}
    found = [
        losses.distillation_loss(student, student, labels, teacher, **options, normalisation=name).item()
        for name in ("images", "elements")
    ]
    p, q = (log_softmax(x.numpy() / 2.0) for x in (teacher, student))
    divergence = (np.exp(p) * (p - q)).sum() * 2.0**2
    truth = 0.5 * -log_softmax(student.numpy())[np.arange(B), labels.numpy()].mean()
    np.testing.assert_allclose(found, [truth + 0.5 * divergence / B, truth + 0.5 * divergence / (B * count)], rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ DeiT III


def binary(x, targets):
    x, targets = np.asarray(x, np.float64), np.asarray(targets, np.float64)
    return (np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0) - x * targets).mean()


def test_binary_cross_entropy(logits):
    """Classes as indices are one yes and C - 1 noes; of two mixed images both classes are a yes, in full."""
    x = logits[0]
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    [n] = numbers(x)
    assert losses.binary_cross_entropy(x, labels).item() == pytest.approx(binary(n, np.eye(C)[labels]), rel=1e-6)
    mixed = 0.9 * torch.eye(C)[labels] + 0.1 * torch.eye(C)[labels.flip(0)]
    expected = binary(n, (mixed.numpy() > 0).astype(float))
    assert losses.binary_cross_entropy(x, mixed).item() == pytest.approx(expected, rel=1e-6)


def test_smoothing_and_the_binary_loss_exclude_each_other():
    """Smoothed labels give every class a share, and the original's threshold at 0 makes each of them a yes."""
    smoothed = 0.9 * torch.eye(C) + 0.1 / C
    assert losses.binary_cross_entropy(torch.zeros(C, C), smoothed).item() == pytest.approx(
        binary(np.zeros((C, C)), np.ones((C, C)))
    )
    with raises_saying(ValueError, "smoothing makes every class a yes", "smoothing=0.1"):
        Supervised(loss="binary", smoothing=0.1)


@pytest.mark.parametrize("is_binary", [True, False])
def test_cosub(is_binary, logits):
    """A quarter each: both submodels against the labels, and each against the other, which gets no gradient."""
    one, other, _ = logits
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    found = losses.cosub_loss(one, other, labels, binary=is_binary, smoothing=0.0)
    a, b = numbers(one, other)
    if is_binary:
        sigmoid = [1 / (1 + np.exp(-x)) for x in (a, b)]
        expected = (
            binary(a, np.eye(C)[labels]) + binary(b, np.eye(C)[labels]) + binary(a, sigmoid[1]) + binary(b, sigmoid[0])
        ) / 4
        gradient = ((sigmoid[0] - np.eye(C)[labels]) + (sigmoid[0] - sigmoid[1])) / (4 * B * C)
    else:
        soft = [np.exp(log_softmax(x)) for x in (a, b)]
        expected = (
            cross_entropy(a, labels) + cross_entropy(b, labels) + cross_entropy(a, soft[1]) + cross_entropy(b, soft[0])
        ) / 4
        gradient = ((soft[0] - np.eye(C)[labels]) + (soft[0] - soft[1])) / (4 * B)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.backward()
    np.testing.assert_allclose(one.grad.numpy(), gradient, atol=1e-6)


# --------------------------------------------------------------------------------------------------- weights of classes


COUNTS = (8, 4, 2, 5, 1)
"""Of the images of each class, so that the last is rare."""
EVERY = np.repeat(np.arange(C), COUNTS)
WEIGHTS = torch.tensor(compute_class_weight("balanced", classes=np.arange(C), y=EVERY), dtype=torch.float64)
MIXES = torch.tensor(
    [[0.3, 0.7, 0, 0, 0], [0, 0, 0, 0.1, 0.9], [0, 1, 0, 0, 0], [0.5, 0, 0, 0, 0.5]], dtype=torch.float64
)


def test_weighted_cross_entropy_is_pytorchs_and_scikit_learns_over_all_images():
    x = torch.randn(len(EVERY), C).double()
    labels = torch.tensor(EVERY)
    found = losses.cross_entropy(x, labels, class_weights=WEIGHTS).item()
    assert found == pytest.approx(torch.nn.CrossEntropyLoss(weight=WEIGHTS)(x, labels).item(), rel=1e-12)
    by_image = compute_sample_weight("balanced", EVERY)
    assert found == pytest.approx(log_loss(EVERY, x.softmax(-1), sample_weight=by_image), rel=1e-12)
    assert abs(found - losses.cross_entropy(x, labels).item()) > 1e-2
    smoothed = losses.cross_entropy(x, labels, 0.1, WEIGHTS).item()
    [n] = numbers(x)
    ours = [
        WEIGHTS[y].item() * cross_entropy(row[None], (0.9 * np.eye(C)[y] + 0.1 / C)[None])
        for row, y in zip(n, EVERY, strict=True)
    ]
    assert smoothed == pytest.approx(np.mean(ours), rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_each_label_of_a_mixed_image_has_its_own_weight(smoothing):
    x = torch.randn(len(MIXES), C).double()
    found = losses.cross_entropy(x, MIXES, smoothing, WEIGHTS).item()
    [n] = numbers(x)
    total = 0.0
    for row, shares in zip(n, MIXES.numpy(), strict=True):
        for label, share in enumerate(shares):
            target = (1 - smoothing) * np.eye(C)[label] + smoothing / C
            total += share * WEIGHTS[label].item() * cross_entropy(row[None], target[None])
    assert found == pytest.approx(total / len(MIXES), rel=1e-12)
    if not smoothing:  # PyTorch divides by the number of images if the targets are shares
        assert found == pytest.approx(torch.nn.CrossEntropyLoss(weight=WEIGHTS)(x, MIXES).item(), rel=1e-12)
    swapped = losses.cross_entropy(x, torch.eye(C).double()[:4], smoothing, WEIGHTS)
    assert swapped.item() == pytest.approx(losses.cross_entropy(x, torch.arange(4), smoothing, WEIGHTS).item())


@pytest.mark.parametrize("mixed", [False, True])
def test_weighted_binary_loss(mixed):
    """The loss of each image times the mean of its labels' weights by their shares."""
    x = torch.randn(4, C).double()
    shares = MIXES if mixed else torch.eye(C).double()[[0, 4, 4, 2]]
    targets = shares if mixed else torch.tensor([0, 4, 4, 2])
    found = losses.binary_cross_entropy(x, targets, WEIGHTS).item()
    [n] = numbers(x)
    each = [
        binary(row[None], (y > 0)[None]) * (y * WEIGHTS.numpy()).sum() for row, y in zip(n, shares.numpy(), strict=True)
    ]
    assert found == pytest.approx(np.mean(each), rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("targets", [torch.tensor([0, 4, 4, 2]), MIXES])
def test_weights_of_1_change_nothing(targets, smoothing):
    x, ones = torch.randn(4, C).double(), torch.ones(C).double()
    for weighted, plain in (
        (losses.cross_entropy(x, targets, smoothing, ones), losses.cross_entropy(x, targets, smoothing)),
        (losses.binary_cross_entropy(x, targets, ones), losses.binary_cross_entropy(x, targets)),
    ):
        torch.testing.assert_close(weighted, plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_weights_act_on_the_labels_and_not_on_the_teacher(kind, logits):
    cls, distillation, teacher = (each.detach().double() for each in logits)
    labels = torch.tensor([0, 4, 4, 2, 1, 0])
    options = {"kind": kind, "weight": 0.3, "smoothing": 0.1}
    found = losses.distillation_loss(cls, distillation, labels, teacher, **options, class_weights=WEIGHTS)
    plain = losses.distillation_loss(cls, distillation, labels, teacher, **options)
    change = losses.cross_entropy(cls, labels, 0.1, WEIGHTS) - losses.cross_entropy(cls, labels, 0.1)
    assert abs(change) > 1e-2
    torch.testing.assert_close(found - plain, 0.7 * change, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("is_binary", [True, False])
def test_weights_act_on_the_labels_and_not_on_the_other_submodel(is_binary, logits):
    one, other = (each.detach().double() for each in logits[:2])
    labels = torch.tensor([0, 4, 4, 2, 1, 0])
    found = losses.cosub_loss(one, other, labels, binary=is_binary, class_weights=WEIGHTS)
    plain = losses.cosub_loss(one, other, labels, binary=is_binary)
    loss = losses.binary_cross_entropy if is_binary else losses.cross_entropy
    change = sum(loss(x, labels, class_weights=WEIGHTS) - loss(x, labels) for x in (one, other))
    assert abs(change) > 1e-2
    torch.testing.assert_close(found - plain, change / 4, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_gradients_reach_both_heads(kind, logits):
    cls, distillation, teacher = logits
    losses.distillation_loss(cls, distillation, LABELS["whole"], teacher, kind=kind).backward()
    x, y, z = (np.exp(log_softmax(t)) for t in numbers(*logits))
    truth = np.eye(C)[LABELS["whole"]]
    if kind == "hard":
        assert_close(cls.grad, torch.tensor(0.5 * (x - truth) / B).float(), 1e-6)
        assert_close(distillation.grad, torch.tensor(0.5 * (y - np.eye(C)[z.argmax(-1)]) / B).float(), 1e-6)
    else:
        soft_y, soft_z = (np.exp(log_softmax(t / 3)) for t in numbers(distillation, teacher))
        assert_close(cls.grad, torch.tensor(0.9 * (x - truth) / B).float(), 1e-6)
        assert_close(distillation.grad, torch.tensor(0.1 * 3 * (soft_y - soft_z) / B).float(), 1e-6)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kind": "firm"}, "distillation kind 'firm' is not known; choose hard or soft"),
        ({"weight": 1.5}, "distillation weight must be from 0 to 1, found 1.5"),
        ({"temperature": 2.0}, "hard distillation has no temperature; leave it out, or choose kind='soft'"),
        (
            {"kind": "soft", "teacher": torch.zeros(B)},
            f"soft distillation needs teacher logits of shape ({B}, {C}), found",
        ),
    ],
)
def test_refusals(options, sentence, logits):
    given = {"teacher": logits[2], **options}
    with raises_saying(ValueError, sentence):
        losses.distillation_loss(*logits[:2], LABELS["whole"], **given)


# ------------------------------------------------------------------------------------------------- in the model


@pytest.mark.parametrize(("options", "kind"), [({}, "hard"), ({"distillation": "soft", "temperature": 2.0}, "soft")])
def test_model_distils(options, kind):
    model = build("with_teacher", small()).train()
    x, labels, teacher = images(model.config, B), LABELS["whole"], torch.randn(B, C)
    out = model(x, labels=labels, teacher_logits=teacher, **options)
    expected = losses.distillation_loss(
        out.cls_logits, out.distillation_logits, labels, teacher, kind=kind, temperature=options.get("temperature")
    )
    assert_close(out.loss, expected, 0)
    out.loss.backward()
    for name in ("cls_classifier", "distillation_classifier"):
        assert getattr(model, name).weight.grad.norm() > 1e-3
    assert model.deit.distillation_token.grad.norm() > 1e-4


def test_labels_without_teacher():
    model = build("with_teacher", small())
    x, labels = images(model.config, B), LABELS["whole"]
    out = model(x, labels=labels)
    assert out.loss.item() == pytest.approx(cross_entropy(out.logits.detach(), labels), abs=1e-5)
    for given, found in (({"labels": labels}, "only labels"), ({"teacher_logits": torch.zeros(B, C)}, "only teacher")):
        with raises_saying(ValueError, f"labels and teacher_logits together, found {found}", "; pass both, or tr"):
            model.train()(x, **given)


def test_teacher_without_labels_in_evaluation():
    model = build("with_teacher", small())
    with raises_saying(ValueError, "found only teacher_logits"):
        model(images(model.config), teacher_logits=torch.zeros(2, C))


def test_fuse_heads(logits):
    cls, distillation, _ = (t.detach() for t in logits)
    x, y = numbers(cls, distillation)
    p, q = np.exp(log_softmax(x)), np.exp(log_softmax(y))
    expected = {"fused": np.exp(log_softmax((x + y) / 2)), "softmax": (p + q) / 2, "class": p, "distillation": q}
    for head, probabilities in expected.items():
        assert_close(fuse_heads(cls, distillation, head), torch.tensor(probabilities).float(), 1e-6)
    assert not np.allclose(expected["fused"], expected["softmax"], atol=1e-3)
    with raises_saying(ValueError, "head='both' is not known; choose fused, class, distillation or softmax"):
        fuse_heads(cls, distillation, "both")


# --------------------------------------------------------------------------------------------------- masked image


@pytest.mark.parametrize(("grid", "patch", "border"), [((2, 3), (4, 2), (0, 0)), ((3, 1), (1, 5), (2, 3))])
def test_masked_image_loss(grid, patch, border):
    (rows, columns), (height, width) = grid, patch
    pixels = torch.randn(2, 3, rows * height + border[0], columns * width + border[1])
    painted = torch.randn(2, 3, rows * height, columns * width)
    mask = torch.rand(2, rows, columns) < 0.5
    mask[0, 0, 0] = True
    differences = [
        abs(float(pixels[b, c, i, j] - painted[b, c, i, j]))
        for b in range(2)
        for c in range(3)
        for i in range(rows * height)
        for j in range(columns * width)
        if mask[b, i // height, j // width]
    ]
    assert losses.masked_image_loss(pixels, painted, mask).item() == pytest.approx(np.mean(differences), abs=1e-5)
    assert losses.masked_image_loss(pixels, painted, torch.zeros_like(mask)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masked_image_loss_of_more_pixels_than_half_precision_counts(dtype):
    pixels, painted = torch.zeros(4, 1, 160, 160), torch.full((4, 1, 160, 160), 0.5, dtype=dtype)
    found = losses.masked_image_loss(pixels, painted, torch.ones(4, 10, 10))
    assert found.item() == pytest.approx(0.5, rel=1e-6)
