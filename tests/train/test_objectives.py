"""Objectives against their formulas, written again in NumPy from the logits of real, mixed batches."""

import json
import math
import random
import shutil
import signal
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from support.checks import raises_saying
from support.models import scramble, small
from support.runs import photos

from deit.config import ConvNetConfig
from deit.data import policies
from deit.data.batches import EvaluationBatches, TrainingBatches, processor_for
from deit.data.folders import read_data
from deit.evaluate.models import evaluate
from deit.machine import Processes
from deit.recipe import (
    SGD,
    AdamW,
    Augment,
    Compute,
    Cosine,
    Data,
    Distilled,
    Erase,
    MaskedImage,
    Mix,
    RandAugment,
    Recipe,
    ResizedCrop,
    Supervised,
    steps,
)
from deit.train import checkpoint, loop, objectives
from deit.train.build import build_model
from deit.train.labels import LabelCache, teach
from deit.train.loop import train

CPU = torch.device("cpu")
QUIET = Console(quiet=True)
CLASSES = ("a", "b", "c")
B, C = 8, 3
MIXED = Augment(crop=ResizedCrop(), flip=0.5, erase=Erase(), mix=Mix(mixup=0.8, cutmix=1.0, mode="element"))
TEACHER = '''
import torch
from torch import nn


def make():
    """What training mode would change: running statistics and dropout."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
                          nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
    model[1].running_mean.normal_()
    model[6].weight.data *= 6
    model[6].weight.data -= model[6].weight.data.mean(1, keepdim=True)
    model.classes, model.mean, model.std = ("c", "x", "b", "a"), (0.4, 0.5, 0.6), (0.3, 0.2, 0.1)
    return model
'''


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Training images, validation images, and the name of a teacher."""
    root = tmp_path_factory.mktemp("given")
    (root / "teacher.py").write_text(TEACHER)
    splits = read_data(photos(photos(root / "data"), split="val", count=3), holdout=0.1, seed=0)
    return *splits, f"{root / 'teacher.py'}:make"


def recipe_for(objective, **changes):
    token = isinstance(objective, Distilled) and objective.token == "distillation"
    masked = isinstance(objective, MaskedImage)
    parts = {
        "model": small(distillation_token=token, num_labels=None, drop_path_rate=0.5),
        "augment": Augment(crop=ResizedCrop()) if masked else MIXED,
        "data": Data(batch=B, repeats=2),
        "optim": AdamW(lr=1e-3, per_images=B),
        "schedule": Cosine(total=steps(6)),
        "evaluate": steps(6),
        "compute": Compute(precision="float32", workers=0),
    }
    return Recipe(name="x", objective=objective, **{**parts, **changes})


@dataclass
class Case:
    """A recipe's parts at one step: what the loop gives its objective."""

    recipe: Recipe
    objective: objectives.Objective
    model: torch.nn.Module
    batches: TrainingBatches
    step: int
    rows: torch.Tensor | None

    @property
    def batch(self):
        return self.batches.mix(next(self.batches.from_step(self.step)))

    def loss(self):
        return self.objective(self.model, self.batch, self.rows)


def case(given, objective, *, step=3, seed=1, **changes):
    recipe = recipe_for(objective, **changes)
    found = objectives.build(recipe, given[0], CPU)
    model = scramble(build_model(recipe, CLASSES), seed).train()
    depth = loop._depth_draws(recipe, step, found.passes)
    return Case(
        recipe,
        found,
        model,
        TrainingBatches(given[0], recipe, cycle=found.cycle),
        step,
        None if depth is None else depth.flatten(0, 1),
    )


def taught_by(given, **settings):
    return Distilled(teacher=given[2], **settings)


# ----------------------------------------------------------------------------------------------- the formulas, in NumPy


def number(tensor):
    return tensor.detach().double().numpy()


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def cross_entropy(x, shares, smoothing=0.0):
    """Mean over images; `shares` (B, C) are distributions."""
    return -(((1 - smoothing) * shares + smoothing / C) * log_softmax(x)).sum(-1).mean()


def binary(x, targets):
    """Mean over images and classes of yes-or-no questions."""
    p = 1 / (1 + np.exp(-x))
    return -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).mean()


def divergence(teacher, student):
    """Kullback-Leibler, for each image, of log-probabilities (B, C)."""
    return (np.exp(teacher) * (teacher - student)).sum(-1)


def teachers_logits(given, recipe, pixels):
    """By hand: undo the student's normalisation, apply the teacher's, put its outputs into the data's order."""
    space: dict[str, Any] = {}
    exec(TEACHER, space)
    model = space["make"]().eval()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (recipe.data.mean, recipe.data.std))
    own_mean, own_std = (torch.tensor(values).view(-1, 1, 1) for values in (model.mean, model.std))
    with torch.no_grad():
        logits = model(((pixels * std + mean) - own_mean) / own_std)
    return number(logits[:, [model.classes.index(name) for name in CLASSES]])


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


# ------------------------------------------------------------------------------------------------------------ distilled


KINDS = {
    "hard": ({}, 0.5, None),
    "hard_weighted": ({"weight": 0.8, "smoothing": 0.1}, 0.8, None),
    "soft": ({"kind": "soft"}, 0.1, 3.0),
    "soft_weighted": ({"kind": "soft", "weight": 0.7, "temperature": 1.5, "smoothing": 0.1}, 0.7, 1.5),
    "elements": ({"kind": "soft", "normalisation": "elements"}, 0.1, 3.0),
    "top_k": ({"kind": "soft", "top_k": 1, "weight": 0.5}, 0.5, 3.0),
}
"""Settings; the weight and temperature that they mean."""


def distilled_by_hand(settings, weight, temperature, class_logits, student, labels, teacher):
    truth = cross_entropy(class_logits, labels, settings.get("smoothing", 0.0))
    if temperature is None:
        return (1 - weight) * truth + weight * cross_entropy(student, np.eye(C)[teacher.argmax(-1)])
    if settings.get("top_k"):
        p = np.exp(log_softmax(teacher))
        best = p.argmax(-1)
        kept = p.max(-1, keepdims=True).astype(np.float16).astype(float)
        teacher = np.log(np.where(np.arange(C) == best[:, None], kept, np.maximum(1 - kept, 2**-24) / (C - 1)))
    kl = divergence(log_softmax(teacher / temperature), log_softmax(student / temperature))
    mean = kl.mean() / (C if settings.get("normalisation") == "elements" else 1)
    return (1 - weight) * truth + weight * temperature**2 * mean


@pytest.mark.parametrize("token", ["distillation", "class"])
@pytest.mark.parametrize("kind", KINDS)
def test_distillation(given, kind, token):
    """Equations 2 and 3 of the paper, its weights where none are set; the teacher sees what the student sees."""
    settings, weight, temperature = KINDS[kind]
    now = case(given, taught_by(given, token=token, **settings))
    batch, teacher = now.batch, teachers_logits(given, now.recipe, now.batch.pixels)
    assert len(set(teacher.argmax(-1))) > 1
    out = now.model(batch.pixels, depth_draws=now.rows)
    own, student = (out.logits,) * 2 if token == "class" else (out.cls_logits, out.distillation_logits)
    expected = distilled_by_hand(
        settings, weight, temperature, number(own), number(student), number(batch.labels), teacher
    )
    found = now.loss()
    assert found["loss"].item() == pytest.approx(expected, abs=1e-5)
    fused = (number(own) + number(student)) / 2
    larger, decided = number(batch.labels).argmax(-1), teacher.argmax(-1)
    assert found["accuracy"].item() == pytest.approx((fused.argmax(-1) == larger).mean())
    assert found["agreement"].item() == pytest.approx((number(student).argmax(-1) == decided).mean())


def test_the_two_heads_logs_differ(given):
    """What the test above tells apart: accuracy is of the fused heads, agreement of the distillation head alone."""
    now = case(given, taught_by(given))
    batch = now.batch
    out = now.model(batch.pixels, depth_draws=now.rows)
    decided = teachers_logits(given, now.recipe, batch.pixels).argmax(-1)
    heads = [number(x).argmax(-1) for x in (out.logits, out.cls_logits, out.distillation_logits)]
    assert len({float((head == batch.labels.argmax(-1).numpy()).mean()) for head in heads}) > 1
    assert len({float((head == decided).mean()) for head in heads}) > 1


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_gradients_of_both_heads_are_the_formulas(given, kind):
    """The class head learns from the labels alone and the distillation head from the teacher alone; both tokens and
    every other weight learn."""
    now = case(given, taught_by(given, kind=kind, weight=0.3))
    batch = now.batch
    out = now.model(batch.pixels, depth_draws=now.rows)
    own, student = number(out.cls_logits), number(out.distillation_logits)
    teacher = teachers_logits(given, now.recipe, batch.pixels)
    now.loss()["loss"].backward()
    expected = 0.7 * (np.exp(log_softmax(own)) - number(batch.labels)).mean(0)
    np.testing.assert_allclose(now.model.cls_classifier.bias.grad, expected, atol=1e-6)
    if kind == "hard":
        expected = 0.3 * (np.exp(log_softmax(student)) - np.eye(C)[teacher.argmax(-1)]).mean(0)
    else:
        expected = 0.3 * 3 * (np.exp(log_softmax(student / 3)) - np.exp(log_softmax(teacher / 3))).mean(0)
    np.testing.assert_allclose(now.model.distillation_classifier.bias.grad, expected, atol=1e-6)
    still = [name for name, p in now.model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


@pytest.mark.parametrize(("weight", "idle"), [(0.0, "distillation_classifier"), (1.0, "cls_classifier")])
def test_a_head_without_weight_learns_nothing(given, weight, idle):
    now = case(given, taught_by(given, weight=weight))
    now.loss()["loss"].backward()
    for head in ("cls_classifier", "distillation_classifier"):
        gradient = getattr(now.model, head).weight.grad
        assert (gradient is None or not gradient.any()) == (head == idle)


def test_the_teacher_stays_in_evaluation_mode_while_the_student_trains(given):
    """timm: the task's train() would switch the teacher to training mode too. Here it is no part of the model."""
    now = case(given, taught_by(given))
    teacher = now.objective.source.model
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    grad_modes = []
    teacher.register_forward_hook(lambda module, *_: grad_modes.append((torch.is_grad_enabled(), module.training)))
    optimizer = torch.optim.SGD(now.model.parameters(), lr=0.1)
    for _ in range(2):
        now.model.train()
        now.loss()["loss"].backward()
        optimizer.step()
    assert grad_modes == [(False, False)] * 2
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    own = {id(p) for p in now.model.parameters()} | {id(module) for module in now.model.modules()}
    assert not own & ({id(p) for p in teacher.parameters()} | {id(module) for module in teacher.modules()})


@pytest.mark.parametrize("settings", [{}, {"kind": "soft"}, {"kind": "soft", "top_k": 2}], ids=str)
def test_stored_labels_are_the_teachers_wherever_the_stream_begins(given, settings, tmp_path):
    """TinyViT: a store depended on the epoch that training started at. Here step s has its labels whether the run
    began at 0, in the middle, or beyond the store, which then begins anew."""
    now = case(given, taught_by(given, **settings))
    teach(now.recipe, given[0], tmp_path / "cache", epochs=2, device="cpu", console=QUIET)
    cached = case(given, Distilled(cache=str(tmp_path / "cache"), **settings))
    cycle = cached.objective.cycle
    assert cycle == math.ceil(2 * 21 / B) == 6
    assert now.objective.cycle is None
    for first in (0, 4, 15):
        for step, batch in enumerate(islice(cached.batches.from_step(first), 3), first):
            there = next(now.batches.from_step(step % cycle))
            assert torch.equal(batch.pixels, there.pixels)
            one, other = cached.batches.mix(batch), now.batches.mix(there)
            assert torch.equal(one.labels, other.labels)
            assert torch.equal(cached.objective.taught(one), now.objective.taught(other))
            found, expected = (
                each.objective(now.model, mixed, now.rows) for each, mixed in ((cached, one), (now, other))
            )
            assert found == expected


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
    "masked": MaskedImage(unit=8),
}


@pytest.mark.parametrize(
    ("name", "stored"),
    [(name, stored) for name in EVERY for stored in (False, True)[: 1 + isinstance(EVERY[name], Distilled)]],
)
def test_shares_of_a_batch_add_up_to_the_whole(given, name, stored, tmp_path):
    """Two processes with three micro-batches each: weighted by their images, losses, logged means and gradients are
    those of one process with the whole batch."""
    objective = EVERY[name]
    if isinstance(objective, Distilled):
        objective = replace(objective, teacher=given[2])
    if stored:
        teach(recipe_for(objective), given[0], tmp_path / "cache", epochs=2, device="cpu", console=QUIET)
        objective = replace(objective, teacher="", cache=str(tmp_path / "cache"))
    now = case(given, objective)
    whole = now.loss()
    whole["loss"].backward()
    expected = {key: p.grad.clone() for key, p in now.model.named_parameters() if p.grad is not None}
    now.model.zero_grad()
    depth = loop._depth_draws(now.recipe, now.step, now.objective.passes)
    totals: Counter[str] = Counter()
    counted = 0
    for rank in range(2):
        batches = TrainingBatches(given[0], now.recipe, rank=rank, world=2, cycle=now.objective.cycle)
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
def test_judging_is_evaluation(given, objective):
    """Accuracies of fused heads and of each, in evaluation mode, and the mode as it was afterwards."""
    if isinstance(objective, Distilled):
        objective = replace(objective, teacher=given[2])
    now = case(given, objective)
    images = now.objective.validation(given[0], Processes(CPU))
    found = now.objective.judge(now.model, images, Processes(CPU), torch.float32)
    assert now.model.training
    logits, labels = by_hand(now, given[0])
    expected = {"val_accuracy": (logits.mean(1).argmax(-1) == labels).mean()}
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
    assert heads["fused"].total == 21


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
    assert [values[-1].item() for values in told] == [11, 10]
    assert total[0].item() / 21 * (-1 if isinstance(objective, MaskedImage) else 1) == pytest.approx(alone.score, 1e-6)


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


# ------------------------------------------------------------------------------------------- traps of other projects


def test_repeated_augmentation_of_few_images_in_one_process(given):
    """facebookresearch/deit: the sampler rounds down to 256 images, so fewer are none, and one process repeats
    nothing. Here 21 images, three views each: in three epochs all of them three times, and none is dropped."""
    batches = TrainingBatches(given[0], recipe_for(Supervised(), data=Data(batch=9, repeats=3)))
    assert batches.steps_per_epoch == 21 / 9
    keys = np.concatenate([batches.keys(step) for step in range(7)])
    assert len(keys) == 63 == 3 * 21
    assert set(Counter(keys[:, 1]).values()) == {3}
    assert len(set(map(tuple, keys[:, 1:]))) == 63
    assert len(set(keys[:21, 1])) == 7  # an epoch is as many views as images: a third of these
    pixels = next(batches.from_step(0)).pixels
    assert keys[0, 1] == keys[1, 1]
    assert not torch.equal(pixels[0], pixels[1])


def run(recipe, splits, out, **options):
    train(recipe, *splits, out, device="cpu", console=QUIET, **options)
    tensors = load_file(checkpoint.saved(out / "checkpoints")[-1])
    return tensors, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_bits(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("layout", ["val", "held_out"])
def test_the_best_model_is_not_chosen_on_the_test_set(tmp_path, layout):
    """facebookresearch/deit: the best checkpoint was that of the test set. Here a folder test full of rubbish, with a
    class and a file that no split may have, changes nothing, to the bit."""
    root = photos(tmp_path / "data", count=5)
    if layout == "val":
        photos(root, split="val", count=2)
    else:
        for folder in list((root / "train").iterdir()):
            shutil.move(folder, root / folder.name)
        (root / "train").rmdir()
    recipe = recipe_for(Supervised(), model=ConvNetConfig(widths=(4,), depth=1, image_size=16), evaluate=steps(2))
    splits = read_data(root, holdout=0.2, seed=0)
    expected = run(recipe, splits, tmp_path / "one")
    (root / "test" / "unknown").mkdir(parents=True)
    (root / "test" / "a").mkdir()
    for place in ("unknown/0.png", "a/0.png", "loose.png"):
        (root / "test" / place).write_bytes(b"rubbish")
    assert read_data(root, holdout=0.2, seed=0) == splits
    assert not any((root / "test") in path.parents for split in splits for path in split.files)
    found = run(recipe, read_data(root, holdout=0.2, seed=0), tmp_path / "other")
    assert same_bits(found[0], expected[0])
    assert [row["val_accuracy"] for row in found[1]] == [row["val_accuracy"] for row in expected[1]]
    assert [row["bad_images"] for row in found[1]] == [0, 0, 0]


def test_everything_random_comes_from_the_recipes_seed(given, tmp_path):
    """facebookresearch/deit: RandAugment drew from generators that nobody seeded. Here no global generator matters."""
    recipe = recipe_for(
        Supervised(),
        model=small(distillation_token=False, num_labels=None, drop_path_rate=0.3, hidden_dropout_prob=0.1),
        augment=replace(MIXED, policy=RandAugment(std=0.5)),
    )
    found = []
    for i, seed in enumerate((0, 0, 1)):
        random.seed(i)
        np.random.seed(i)
        torch.manual_seed(i)
        found.append(run(replace(recipe, seed=seed), given[:2], tmp_path / str(i))[0])
    assert same_bits(found[0], found[1])
    assert not same_bits(found[0], found[2])


def test_the_learning_rate_moves_with_every_update_of_the_first_epochs(given, tmp_path, monkeypatch):
    """facebookresearch/deit: the rate was set by epoch, and after it: epochs 0 and 1 both ran at 1e-6. Here 2.625
    steps are an epoch, two epochs warm up, and a resumed run takes the next rate."""
    used: list[float] = []
    update = loop._update

    def watched(work, *rest):
        used.extend({group["lr"] for group in work.optimizers.optimizers[0].param_groups})
        return update(work, *rest)

    monkeypatch.setattr(loop, "_update", watched)
    recipe = recipe_for(
        Supervised(),
        optim=SGD(lr=0.5, per_images=B),
        compute=Compute(precision="float32", workers=0, save_minutes=0),
        schedule=Cosine(total=steps(8), warmup=steps(5), floor=0.1),
    )
    run(recipe, given[:2], tmp_path)
    rise = [1e-6 + (0.5 - 1e-6) * step / 5 for step in range(5)]
    fall = [0.1 + 0.4 * (1 + math.cos(math.pi * step / 3)) / 2 for step in range(3)]
    assert used == pytest.approx(rise + fall)
    whole = used.copy()
    used.clear()
    checkpoint.saved(tmp_path / "checkpoints")[-1].unlink()
    run(recipe, given[:2], tmp_path, resume=True)
    assert used == whole[-len(used) :]
    assert used


def test_the_average_is_what_is_scored_and_it_is_resumed(given, tmp_path, monkeypatch):
    """facebookresearch/deit: the average of the weights was saved and never evaluated, and silently not resumed."""
    scored = []
    judge = objectives.SupervisedObjective.judge

    def watched(self, model, *rest):
        scored.append(model.classifier.weight.detach().clone())
        return judge(self, model, *rest)

    monkeypatch.setattr(objectives.SupervisedObjective, "judge", watched)
    recipe = recipe_for(Supervised(), ema=0.8, evaluate=steps(3))
    tensors, _ = run(recipe, given[:2], tmp_path / "whole")
    assert torch.equal(scored[-1], tensors["ema.classifier.weight"])
    assert not torch.equal(scored[-1], tensors["model.classifier.weight"])

    update = loop._update

    def disturbed(work, state, *rest):
        if state.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return update(work, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_update", disturbed)
        with pytest.raises(loop.Stopped):
            run(recipe, given[:2], tmp_path / "parts")
    [saved] = checkpoint.saved(tmp_path / "parts" / "checkpoints")
    assert 3 < load_file(saved)["ema.updates"] < 6
    again, _ = run(recipe, given[:2], tmp_path / "parts", resume=True)
    assert again["ema.updates"] == 6
    assert same_bits(again, tensors)


@pytest.mark.parametrize(("bits", "kept"), [(0, 0b0), (1, 0b1000_0000), (4, 0b1111_0000), (8, 0b1111_1111)])
def test_posterize_down_to_no_bits(bits, kept):
    """timm: `rand-m9-mstd0.5-inc1` asks for 0 bits where a strength reaches 10, which Pillow refuses."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([levels, levels.T, 255 - levels], -1))
    found = np.asarray(policies._posterize(image, bits, (0, 0, 0)))
    assert np.array_equal(found, np.asarray(image) & kept)
    strongest = policies.OPERATIONS["PosterizeIncreasing"]
    assert int(strongest.argument(10)) == 0
