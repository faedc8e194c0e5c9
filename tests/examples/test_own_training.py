"""The examples that train: another library's teacher, a plain loop, recipes of one's own."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from support.examples import EXAMPLES
from support.models import trained_folder
from support.runs import photos, small_recipe

from deit import Predictor
from deit.data import read_data
from deit.recipe import Data, Distilled, Recipe
from deit.recipes import find
from deit.train import Record, Teacher


@pytest.fixture
def data(tmp_path):
    return photos(photos(tmp_path / "data"), split="val", count=3)


def accuracy(folder, split):
    best = [labels[0]["label"] for labels in Predictor(folder)(split.files, top_k=1)]
    return np.mean([name == split.classes[label] for name, label in zip(best, split.labels, strict=True)])


def test_a_classifier_of_scikit_learn_teaches(examples, data, tmp_path, capsys):
    examples.run("distill_any_teacher", "--data", data, "--out", tmp_path / "out", "--epochs", "3", "--kind", "soft")
    said = capsys.readouterr()
    record = Record.read(tmp_path / "out")
    assert record.last("agreement") is not None
    objective = Recipe.from_dict(record.recipe).objective
    assert (objective.kind, objective.teacher) == ("soft", f"{EXAMPLES / 'distill_any_teacher.py'}:teacher")
    assert "images of 16 x 16 pixels, mean 0, 0, 0, std 1, 1, 1" in said.err
    assert "assumed" not in said.err
    _, val = read_data(data, holdout=0.1, seed=0)
    assert said.out.startswith(f"{accuracy(tmp_path / 'out/model', val):.3f} of the validation images are right")


def test_its_answers_are_those_of_scikit_learn(examples, data, monkeypatch):
    """For a student of its image size, so that nothing is resized twice."""
    monkeypatch.setenv("TEACHER_DATA", str(data))
    train, val = read_data(data, holdout=0.1, seed=0)

    def pixels(files):
        pictures = (Image.open(file).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC) for file in files)
        return np.stack([np.asarray(picture, np.float32).transpose(2, 0, 1) / 255 for picture in pictures])

    machine = KNeighborsClassifier(5, weights="distance").fit(pixels(train.files).reshape(21, -1), train.labels)
    expected = machine.predict_proba(pixels(val.files).reshape(9, -1))
    recipe = replace(small_recipe(Distilled()), data=Data(batch=8, mean=(0.4,) * 3, std=(0.3,) * 3))
    teacher = Teacher.load(f"{EXAMPLES / 'distill_any_teacher.py'}:teacher", train.classes, recipe)
    found = teacher(torch.from_numpy((pixels(val.files) - 0.4) / 0.3)).softmax(-1)
    assert found.numpy() == pytest.approx(expected, abs=1e-3)


def test_a_loop_of_ones_own(examples, data, tmp_path, capsys):
    teacher = trained_folder(tmp_path / "teacher", "convnet", labels="abc")
    given = ["--data", data, "--out", tmp_path / "student", "--epochs", "2", "--batch", "8", "--device", "cpu"]
    examples.run("own_loop", *given, "--teacher", teacher)
    epochs = re.findall(
        r"epoch (\d): loss ([\d.]+)  class [\d.]+  distillation [\d.]+  fused ([\d.]+)", capsys.readouterr().out
    )
    assert [number for number, _, _ in epochs] == ["1", "2"]
    _, val = read_data(data, holdout=0.1, seed=0)
    assert float(epochs[-1][2]) == pytest.approx(accuracy(tmp_path / "student", val), abs=5e-4)
    with pytest.raises(SystemExit, match="expected a teacher of the classes"):
        examples.run("own_loop", *given, "--teacher", trained_folder(tmp_path / "other", "convnet"))


def test_recipes_of_ones_own(examples, data, tmp_path, capsys):
    small, soft = (find(f"{EXAMPLES / 'custom_recipe.py'}:{name}") for name in ("small", "small_soft"))
    assert replace(soft, name="small", model=small.model, objective=small.objective) == small
    assert isinstance(soft.objective, Distilled)
    shorter = ["schedule.total=steps(2)", "model.num_hidden_layers=1", "data.batch=8", "data.holdout=0.3", "seed=1"]
    given = ["--data", data / "train", "--out", tmp_path / "out", *(word for one in shorter for word in ("--set", one))]
    examples.run("custom_recipe", *given)
    records = [Record.read(tmp_path / "out" / name) for name in ("mixed", "plain")]
    recipes = [record.recipe for record in records]
    assert recipes[0]["augment"].pop("mix")
    assert recipes[1]["augment"].pop("mix") is None
    assert recipes[0] == recipes[1]
    _, val = read_data(data / "train", holdout=0.3, seed=1)
    assert [record.about.val for record in records] == [tuple(np.bincount(val.labels))] * 2 == [(2, 2, 2)] * 2
    mixed, plain = (accuracy(tmp_path / "out" / name / "model", val) for name in ("mixed", "plain"))
    assert f"mixed {mixed:.3f}, plain {plain:.3f}: p = " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="mixed already holds a run"):
        examples.run("custom_recipe", *given)
    with pytest.raises(SystemExit, match=r"schedule.warmup: expected epochs\(NUMBER\) or steps"):
        examples.run("custom_recipe", *given, "--set", "schedule.warmup=0")
