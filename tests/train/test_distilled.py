"""Distillation as an objective, against its formulas, written again in NumPy."""

import math
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from support.objectives import CLASSES, QUIET, TEACHER, B, C, case, cross_entropy, log_softmax, number, taught_by

from deit.recipe import Distilled
from deit.train.labels import teach
from deit.train.teacher import expand


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


def labels(now, batch):
    return expand(now.objective.kept(batch), len(now.objective.split.classes))


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
            assert torch.equal(labels(cached, one), labels(now, other))
            found, expected = (
                each.objective(now.model, mixed, now.rows) for each, mixed in ((cached, one), (now, other))
            )
            assert found == expected
