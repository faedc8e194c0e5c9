"""The loop on a small slice of the digits: it learns, repeats itself bit by bit, and says what went wrong."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import raises_saying
from rich.console import Console
from safetensors.torch import load_file

from deit import train as loop
from deit.convnet import ConvNet
from deit.data import EvaluationBatches, Split, processor_for, read_split, write_digits
from deit.evaluate import Accuracy, evaluate
from deit.image import DeiTImageProcessor
from deit.model import DeiTForImageClassification, DeiTForImageClassificationWithTeacher
from deit.optim import learning_rate
from deit.predict import load_model
from deit.recipe import Supervised, epochs
from deit.recipes.digits import digits, digits_teacher
from deit.train import Diverged, build_model, resolve_precision, train

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    write_digits(root)
    full = read_split(root, "train")
    keep = range(0, len(full), 6)
    few = Split(tuple(full.files[i] for i in keep), tuple(full.labels[i] for i in keep), full.classes)
    return few, read_split(root, "val", full.classes)


def short(recipe, **changes):
    return replace(recipe, precision="float32", schedule=replace(recipe.schedule, total=epochs(3), warmup=epochs(1)),
                   **changes)


@pytest.fixture(scope="module")
def teacher(splits, tmp_path_factory):
    return train(short(digits_teacher()), *splits, tmp_path_factory.mktemp("teacher"), device="cpu", console=QUIET)


def student(teacher, **changes):
    recipe = short(digits(teacher=teacher.model), **changes)
    return replace(recipe, model=recipe.model.replace(num_hidden_layers=2, drop_path_rate=0.1))


def test_a_run_leaves_a_model_that_scores_as_recorded(splits, teacher):
    model = load_model(teacher.model)
    assert isinstance(model, ConvNet)
    assert list(model.config.id2label.values()) == list(splits[0].classes)
    processor = DeiTImageProcessor.from_pretrained(teacher.model)
    assert processor == processor_for(digits_teacher())
    found = evaluate(model, EvaluationBatches(splits[1], processor, 50))["fused"].value
    rows = [json.loads(line) for line in (teacher.model.parent / "metrics.jsonl").read_text().splitlines()]
    assert found == teacher.accuracy == max(row["val_accuracy"] for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert [row["epoch"] for row in rows] == [1, 2, 3]


def test_the_record_and_the_schedule(splits, teacher):
    recipe = short(digits_teacher())
    rows = [json.loads(line) for line in (teacher.model.parent / "metrics.jsonl").read_text().splitlines()]
    per_epoch = len(splits[0]) // 64
    for row in rows:
        assert row["step"] == row["epoch"] * per_epoch
        assert row["lr"] == learning_rate(recipe.schedule, recipe.optim.lr, row["step"] - 1, per_epoch)
    assert json.loads((teacher.model.parent / "recipe.json").read_text()) == json.loads(json.dumps(recipe.to_dict()))


def test_the_same_run_twice_is_bit_identical(splits, teacher, tmp_path):
    """Two loader processes instead of none change nothing: batches depend on seed, epoch and image only."""
    weights = []
    for name, workers in [("a", 0), ("b", 2)]:
        recipe = student(teacher)
        recipe = replace(recipe, data=replace(recipe.data, workers=workers))
        run = train(recipe, *splits, tmp_path / name, device="cpu", console=QUIET)
        weights.append(load_file(run.model / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_both_heads_and_the_tokens_are_trained(splits, teacher, tmp_path):
    recipe = student(teacher)
    fresh = build_model(recipe, splits[0].classes)
    run = train(recipe, *splits, tmp_path, device="cpu", console=QUIET)
    trained = load_model(run.model)
    assert isinstance(trained, DeiTForImageClassificationWithTeacher)
    for name, before in fresh.named_parameters():
        assert not torch.equal(before, dict(trained.named_parameters())[name]), name


def test_every_step_follows_the_formula(splits, tmp_path, monkeypatch):
    """Replays the loop by hand: objective, backward, AdamW at the scheduled rate, nothing else."""
    recipe = short(digits_teacher())
    monkeypatch.setattr(loop, "evaluate", lambda *_: {"fused": Accuracy(1, 1)})  # keep the last
    run = train(recipe, *splits, tmp_path, device="cpu", console=QUIET)
    model = build_model(recipe, splits[0].classes).train()
    batches = loop.TrainingBatches(splits[0], recipe)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    free = [p for p in model.parameters() if p.ndim <= 1]
    reference = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": free, "weight_decay": 0.0}],
                                  betas=recipe.optim.betas, fused=True)
    step = 0
    for epoch in range(3):
        for batch in batches.epoch(epoch):
            for group in reference.param_groups:
                group["lr"] = learning_rate(recipe.schedule, recipe.optim.lr, step, batches.steps_per_epoch)
            loss = torch.nn.functional.cross_entropy(model(batch.pixels).logits, batch.labels, label_smoothing=0.1)
            reference.zero_grad()
            loss.backward()
            reference.step()
            step += 1
    found = load_file(run.model / "model.safetensors")
    for name, expected in model.state_dict().items():
        assert torch.equal(found[name], expected), name


def test_the_average_is_evaluated_and_saved(splits, tmp_path, monkeypatch):
    recipe = short(digits_teacher(), ema=0.9)
    trained, averages = [], []
    monkeypatch.setattr(loop, "build_model", lambda *given: trained.append(build_model(*given)) or trained[-1])
    monkeypatch.setattr(loop, "evaluate", lambda model, *_: averages.append(model) or {"fused": Accuracy(1, 1)})
    run = train(recipe, *splits, tmp_path, device="cpu", console=QUIET)
    saved, weights = load_file(run.model / "model.safetensors"), trained[0].state_dict()
    assert averages[0] is not trained[0]
    for name, value in averages[0].state_dict().items():
        assert torch.equal(saved[name], value), name
    assert not torch.equal(saved["classifier.weight"], weights["classifier.weight"])
    distance = (saved["classifier.weight"] - weights["classifier.weight"]).norm() / weights["classifier.weight"].norm()
    assert distance < 0.2


def test_the_class_of_the_model_follows_the_objective():
    recipe = digits()
    assert isinstance(build_model(recipe, tuple("0123456789")), DeiTForImageClassificationWithTeacher)
    plain = replace(recipe, objective=Supervised())
    model = build_model(plain, ("a", "b", "c"))
    assert isinstance(model, DeiTForImageClassification)
    assert model.classifier.out_features == 3
    assert model.config.label2id == {"a": 0, "b": 1, "c": 2}
    again = build_model(plain, ("a", "b", "c"))
    assert torch.equal(again.deit.position, model.deit.position)
    other = build_model(replace(plain, seed=1), ("a", "b", "c"))
    assert not torch.equal(other.deit.position, model.deit.position)


def test_a_loss_that_is_no_number_stops_the_run(splits, tmp_path):
    recipe = short(digits_teacher())
    recipe = replace(recipe, optim=replace(recipe.optim, lr=1e30))
    with raises_saying(Diverged, "digits_teacher: the loss is", "lower optim.lr"):
        train(recipe, *splits, tmp_path, device="cpu", console=QUIET)


def test_precision(monkeypatch):
    cpu = torch.device("cpu")
    assert resolve_precision("float32", cpu) == torch.float32
    assert resolve_precision("bfloat16", cpu) == torch.bfloat16
    for native, expected in [(True, torch.bfloat16), (False, torch.float32)]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx512_bf16": native})
        assert resolve_precision("auto", cpu) == expected
