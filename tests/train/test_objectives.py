"""Objectives against their formulas, written again in NumPy from the logits of real, mixed batches."""

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, log_loss
from sklearn.utils.class_weight import compute_sample_weight
from support.checks import raises_saying
from support.models import small
from support.objectives import CPU, QUIET, B, C, case, cross_entropy, log_softmax, number, recipe_for, taught_by

from deit.data.batches import EvaluationBatches, TrainingBatches, processor_for
from deit.evaluate.models import evaluate
from deit.machine import Processes
from deit.recipe import Augment, Data, Distilled, MaskedImage, Supervised
from deit.train import objectives, stepping
from deit.train.labels import LabelCache, teach


def binary(x, targets):
    """Mean over images and classes of yes-or-no questions."""
    p = 1 / (1 + np.exp(-x))
    return -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).mean()


# ----------------------------------------------------------------------------------------------------------- supervised


def test_the_batch_is_what_the_others_assume(given):
    """Shares of two classes, some with the partner's larger, and blocks dropped and kept."""
    now = case(given, Supervised())
    labels, plain = now.batch.labels, next(now.batches.from_step(3)).labels
    assert labels.shape == (B, C)
    assert ((labels > 0).sum(1) == 2).sum() >= 2
    assert (labels.argmax(1) != plain).any()
    assert 0 < (now.rows < 0.5).float().mean() < 1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(given, smoothing):
    now = case(given, Supervised(smoothing=smoothing))
    logits = number(now.model(now.batch.pixels, depth_draws=now.rows).logits)
    assert now.loss()["loss"].item() == pytest.approx(
        cross_entropy(logits, number(now.batch.labels), smoothing), abs=1e-5
    )


def test_binary(given):
    """Of two mixed images both classes are a yes, however small the share."""
    now = case(given, Supervised(loss="binary"))
    logits = number(now.model(now.batch.pixels, depth_draws=now.rows).logits)
    expected = binary(logits, number(now.batch.labels > 0))
    assert now.loss()["loss"].item() == pytest.approx(expected, abs=1e-5)
    assert abs(expected - binary(logits, number(now.batch.labels))) > 1e-3


@pytest.mark.parametrize("loss", ["cross_entropy", "binary"])
def test_cosub_is_two_passes_of_their_own(given, loss):
    """The first B rows of the draws are one pass's, the others the other's; what one teaches has no gradient."""
    now = case(given, Supervised(loss=loss, cosub=True, smoothing=0.1 if loss == "cross_entropy" else 0.0))
    assert now.objective.passes == 2
    assert now.rows.shape == (2 * B, 3, 2)
    batch = now.batch
    tensors = [now.model(batch.pixels, depth_draws=rows).logits for rows in now.rows.split(B)]
    one, other = map(number, tensors)
    assert np.abs(one - other).max() > 1e-2
    if loss == "binary":
        total = sum(binary(x, number(batch.labels > 0)) for x in (one, other))
        total += sum(binary(x, 1 / (1 + np.exp(-y))) for x, y in ((one, other), (other, one)))
    else:
        total = sum(cross_entropy(x, number(batch.labels), 0.1) for x in (one, other))
        total += sum(cross_entropy(x, np.exp(log_softmax(y))) for x, y in ((one, other), (other, one)))
    found = now.loss()
    assert found["loss"].item() == pytest.approx(total / 4, abs=1e-5)
    decided = one.argmax(-1) == number(batch.labels).argmax(-1)
    assert found["accuracy"].item() == pytest.approx(decided.mean())


def test_accuracy_under_mixing_is_against_the_larger_part(given):
    """Labels that make each image's larger part the model's decision, though the image itself is another."""
    now = case(given, Supervised())
    batch = now.batch
    decided = now.model(batch.pixels, depth_draws=now.rows).logits.argmax(-1)
    labels = torch.full((B, C), 0.0).scatter(1, decided[:, None], 0.6)
    labels = labels.scatter(1, ((decided + 1) % C)[:, None], 0.4)
    assert now.objective(now.model, replace(batch, labels=labels), now.rows)["accuracy"] == 1
    assert now.objective(now.model, replace(batch, labels=labels.roll(1, 1)), now.rows)["accuracy"] == 0
    assert now.objective(now.model, replace(batch, labels=decided), now.rows)["accuracy"] == 1


@pytest.fixture(scope="module")
def uneven(given):
    """Of the training images, 7 of `a`, 4 of `b` and 1 of `c`."""
    return given[0].take([*range(11), 20]), *given[1:]


WEIGHTS = 12 / (3 * np.array([7, 4, 1]))
STEP = 0
"""A step whose batch has images of every class."""


@pytest.mark.parametrize("loss", ["cross_entropy", "binary"])
def test_balanced_classes(uneven, loss):
    now = case(uneven, Supervised(loss=loss, class_weights="balanced"), step=STEP)
    logits, shares = number(now.model(now.batch.pixels, depth_draws=now.rows).logits), number(now.batch.labels)
    assert (shares > 0).any(0).all()
    assert ((shares > 0).sum(1) == 2).any()
    if loss == "binary":
        p = 1 / (1 + np.exp(-logits))
        each = -np.where(shares > 0, np.log(p), np.log(1 - p)).mean(1) * (shares * WEIGHTS).sum(1)
    else:
        each = -(shares * WEIGHTS * log_softmax(logits)).sum(1)
    assert now.loss()["loss"].item() == pytest.approx(each.mean(), abs=1e-5)
    assert abs(each.mean() - case(uneven, Supervised(loss=loss), step=STEP).loss()["loss"].item()) > 1e-2


def test_balanced_classes_beside_a_teacher(uneven):
    plain, balanced = (
        case(uneven, taught_by(uneven, class_weights=weights, smoothing=0.1), step=STEP)
        for weights in ("equal", "balanced")
    )
    logits, shares = (
        number(plain.model(plain.batch.pixels, depth_draws=plain.rows).cls_logits),
        number(plain.batch.labels),
    )
    weighted = (shares * WEIGHTS)[..., None] * (0.9 * np.eye(C) + 0.1 / C)  # (B, label, C)
    change = -(weighted.sum(1) * log_softmax(logits)).sum(1).mean() - cross_entropy(logits, shares, 0.1)
    found = balanced.loss()["loss"].item() - plain.loss()["loss"].item()
    assert found == pytest.approx(change / 2, abs=1e-5)
    assert abs(change) > 1e-2


def test_the_mean_loss_over_all_images_is_scikit_learns(uneven):
    """Each image once, in three batches, without mixing."""
    now = case(uneven, Supervised(class_weights="balanced"), augment=Augment(), data=Data(batch=4))
    total, logits, labels = 0.0, [], []
    for step in range(3):
        batch = next(now.batches.from_step(step))
        found = now.objective(now.model.eval(), batch, None)
        total += found["loss"].item() / 3
        logits.append(number(now.model(batch.pixels).logits))
        labels += batch.labels.tolist()
    assert Counter(labels) == {0: 7, 1: 4, 2: 1}
    scores = np.exp(log_softmax(np.concatenate(logits)))
    weights = compute_sample_weight("balanced", labels)
    assert total == pytest.approx(log_loss(labels, scores, sample_weight=weights), abs=1e-5)


def test_a_class_without_training_images_is_refused(given):
    with raises_saying(ValueError, 'found none of "c"', "objective.class_weights=equal"):
        case((given[0].take(range(14)), *given[1:]), Supervised(class_weights="balanced"))
    case((given[0].take(range(14)), *given[1:]), Supervised())


@pytest.mark.parametrize("teacher", [False, True])
def test_what_is_rare_is_said_first(uneven, teacher):
    now = case(uneven, taught_by(uneven) if teacher else Supervised())
    few, unseen, *others = now.objective.introduction(now.model, uneven[1].take([0, 1, 2]), Processes(CPU))
    assert few.startswith('2 classes have fewer than 5 training images, too few to learn from: "c" (1), "b" (4)')
    assert unseen.startswith("2 classes have no validation image")
    assert (len(others) > 0) == teacher


# -------------------------------------------------------------------------------------------------------- masked images


def test_masked_images(given):
    """The mean absolute difference over the hidden pixels, of the batch's own masks."""
    now = case(given, MaskedImage(unit=8, ratio=0.5))
    batch = now.batch
    assert batch.mask.shape == (B, 16)
    assert batch.mask.sum(1).tolist() == [8] * B
    assert len(set(map(tuple, batch.mask.tolist()))) > 1
    painted = number(now.model(batch.pixels, batch.mask, depth_draws=now.rows).reconstruction)
    hidden = batch.mask.view(B, 1, 4, 4).numpy().repeat(4, 2).repeat(4, 3).repeat(3, 1)
    expected = np.abs(painted - number(batch.pixels))[hidden].mean()
    found = now.loss()
    assert found["loss"].item() == pytest.approx(expected, abs=1e-5)
    assert list(found) == ["loss"]


# ----------------------------------------------------------------------------------------------------- parts of a batch


EVERY = {
    "cross_entropy": Supervised(smoothing=0.1),
    "binary": Supervised(loss="binary"),
    "cosub": Supervised(cosub=True),
    "hard": Distilled(),
    "soft": Distilled(kind="soft"),
    "elements": Distilled(kind="soft", normalisation="elements"),
    "top_k": Distilled(kind="soft", top_k=2),
    "class_token": Distilled(token="class"),
    "balanced": Supervised(smoothing=0.1, class_weights="balanced"),
    "balanced_binary": Supervised(loss="binary", class_weights="balanced"),
    "balanced_cosub": Supervised(cosub=True, class_weights="balanced"),
    "balanced_soft": Distilled(kind="soft", class_weights="balanced"),
    "masked": MaskedImage(unit=8),
}


@pytest.mark.parametrize(
    ("name", "stored"),
    [(name, stored) for name in EVERY for stored in (False, True)[: 1 + isinstance(EVERY[name], Distilled)]],
)
def test_shares_of_a_batch_add_up_to_the_whole(uneven, name, stored, tmp_path):
    """Two processes with three micro-batches each: weighted by their images, losses, logged means and gradients are
    those of one process with the whole batch."""
    objective = EVERY[name]
    if isinstance(objective, Distilled):
        objective = replace(objective, teacher=uneven[2])
    if stored:
        teach(recipe_for(objective), uneven[0], tmp_path / "cache", epochs=2, device="cpu", console=QUIET)
        objective = replace(objective, teacher="", cache=str(tmp_path / "cache"))
    now = case(uneven, objective)
    whole = now.loss()
    whole["loss"].backward()
    expected = {key: p.grad.clone() for key, p in now.model.named_parameters() if p.grad is not None}
    now.model.zero_grad()
    depth = stepping.depth_draws(now.recipe, now.step, now.objective.passes)
    totals: Counter[str] = Counter()
    counted = 0
    for rank in range(2):
        batches = TrainingBatches(uneven[0], now.recipe, rank=rank, world=2, cycle=now.objective.cycle)
        for part in next(batches.from_step(now.step)).parts(3):
            found = now.objective(now.model, batches.mix(part), torch.cat([each[part.positions] for each in depth]))
            share = len(part) / B
            (found["loss"] * share).backward()
            totals.update({key: value.item() * share for key, value in found.items()})
            counted += 1
    assert counted == 4  # of eight images there are four pairs
    assert totals == pytest.approx({key: value.item() for key, value in whole.items()}, abs=1e-5)
    for key, p in now.model.named_parameters():
        if key in expected:
            torch.testing.assert_close(p.grad, expected[key], atol=1e-5, rtol=1e-4, msg=key)


# ------------------------------------------------------------------------------------------------------------- verdicts


def by_hand(now, split):
    """Logits (N, heads, C) of every image, seen as prediction sees them."""
    [batch] = list(EvaluationBatches(split, processor_for(now.recipe), 99))
    with torch.no_grad():
        out = now.model.eval()(batch.pixels)
    now.model.train()
    heads = [out.cls_logits, out.distillation_logits] if "cls_logits" in out else [out.logits]
    return np.stack([number(head) for head in heads], 1), np.array(split.labels)


@pytest.mark.parametrize(
    "objective", [Supervised(), Distilled(), Distilled(token="class")], ids=["plain", "two", "one"]
)
def test_judging_is_evaluation(given, uneven, objective):
    """Accuracies of fused heads and of each, in evaluation mode, and the mode as it was afterwards."""
    if isinstance(objective, Distilled):
        objective = replace(objective, teacher=given[2])
    now = case(given, objective)
    images = now.objective.validation(uneven[0], Processes(CPU))
    found = now.objective.judge(now.model, images, Processes(CPU), torch.float32)
    assert now.model.training
    logits, labels = by_hand(now, uneven[0])
    fused = logits.mean(1).argmax(-1)
    expected = {
        "val_accuracy": (fused == labels).mean(),
        "val_balanced_accuracy": balanced_accuracy_score(labels, fused),
    }
    if logits.shape[1] == 2:
        expected |= {
            f"val_accuracy_{name}": (logits[:, i].argmax(-1) == labels).mean()
            for i, name in enumerate(("class", "distillation"))
        }
        assert len(set(expected.values())) > 1
    assert found.numbers == pytest.approx(expected)
    assert found.score == found.numbers["val_accuracy"]
    heads = evaluate(now.model, images)
    assert found.score == heads["fused"].value
    assert heads["fused"].total == 12


@dataclass(frozen=True)
class Recorder(Processes):
    """One of two processes, that writes down what it would add up with the other."""

    told: list[torch.Tensor] = field(default_factory=list)

    def sum(self, values):
        self.told.append(values.clone())
        return values


@pytest.mark.parametrize("objective", [Supervised(), MaskedImage(unit=8)], ids=["accuracy", "masked"])
def test_two_processes_judge_every_image_once(given, objective):
    """21 images over two: their counts and sums add up to those of one, and the filled-up row does not count."""
    now = case(given, objective)
    alone = now.objective.judge(
        now.model, now.objective.validation(given[0], Processes(CPU)), Processes(CPU), torch.float32
    )
    told = []
    for rank in range(2):
        us = Recorder(CPU, rank, 2)
        now.objective.judge(now.model, now.objective.validation(given[0], us), us, torch.float32)
        [values] = us.told
        told.append(values)
    total = sum(told)
    assert [values[-1].sum().item() for values in told] == [11, 10]
    assert total[0].sum().item() / 21 * (-1 if isinstance(objective, MaskedImage) else 1) == pytest.approx(
        alone.score, 1e-6
    )


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_build_refuses(given, tmp_path):
    """A distilled model that nobody teaches, a store that is not there, and classes that the teacher or the store
    don't know. (facebookresearch/deit: without a teacher the distilled model's loss ignored its second head.)"""
    split, _, name = given

    def build(objective, data=split):
        return objectives.build(recipe_for(objective), data, CPU)

    with raises_saying(ValueError, "recipe x distils but names no teacher", "objective.teacher=timm:NAME"):
        build(Distilled())
    with raises_saying(FileNotFoundError, tmp_path / "none", "holds no cache.json", "deit teach"):
        build(Distilled(cache=str(tmp_path / "none")))
    with raises_saying(FileNotFoundError, "there is no file /nowhere.py"):
        build(Distilled(teacher="/nowhere.py:make"))
    other = replace(split, classes=("a", "b", "dog"))
    with raises_saying(ValueError, name, "does not know the data's class 'dog' (1 of 3 are missing)"):
        build(Distilled(teacher=name), other)
    teach(recipe_for(taught_by(given)), split, tmp_path / "cache", epochs=1, device="cpu", console=QUIET)
    with raises_saying(ValueError, "was taught with other data"):
        build(Distilled(cache=str(tmp_path / "cache")), other)
    assert isinstance(build(Distilled(cache=str(tmp_path / "cache"))).source, LabelCache)


def test_a_second_head_that_nobody_teaches_cannot_be(given):
    """facebookresearch/deit: a distilled model trained without teacher left its second head without gradient. A model
    for labels alone has one head, with or without the token; all its weights learn."""
    with raises_saying(ValueError, "needs a model that has one", "objective.token=class"):
        recipe_for(Distilled(), model=small(distillation_token=False))
    with raises_saying(ValueError, "the distillation token would learn nothing"):
        recipe_for(Distilled(token="class"), model=small(distillation_token=True))
    now = case(given, Supervised(), model=small(distillation_token=True, num_labels=None))
    now.loss()["loss"].backward()
    assert not any("distillation_classifier" in name for name, _ in now.model.named_parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in now.model.parameters())
