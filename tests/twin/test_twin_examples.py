"""The example for Keras, run as a person runs it."""

import re

import numpy as np
import pytest
from support.examples import Examples
from support.models import trained_folder
from support.runs import photos

from deit import Predictor
from deit.data import read_data


def test_keras_fit_leaves_a_folder_that_pytorch_reads(monkeypatch, tmp_path, capsys):
    data = photos(photos(tmp_path / "data"), split="val", count=3)
    teacher = trained_folder(tmp_path / "teacher", "convnet", labels="abc")
    examples = Examples(monkeypatch, tmp_path)
    given = ["--data", data, "--out", tmp_path / "student", "--epochs", "2", "--batch", "21"]
    examples.run("keras_fit", *given, "--teacher", teacher)
    said = capsys.readouterr().out
    [*_, score] = re.findall(r"val_accuracy: ([\d.]+)", said)
    assert f"the student is in {tmp_path / 'student'}" in said

    _, val = read_data(data, holdout=0.1, seed=0)
    best = [labels[0]["label"] for labels in Predictor(tmp_path / "student")(val.files, top_k=1)]
    right = [name == val.classes[label] for name, label in zip(best, val.labels, strict=True)]
    assert float(score) == pytest.approx(np.mean(right), abs=1e-3)
    with pytest.raises(SystemExit, match="expected a teacher of the classes"):
        examples.run("keras_fit", *given, "--teacher", trained_folder(tmp_path / "other", "convnet"))
