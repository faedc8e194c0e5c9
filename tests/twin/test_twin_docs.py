"""docs/keras.md, run as it stands."""

import re
from pathlib import Path

import pytest
from PIL import Image
from support.models import saved, small
from twins import TWIN_OF, needs_tensorflow

import deit

PAGE = Path(__file__).parents[2] / "docs" / "keras.md"


@needs_tensorflow
def test_the_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/taught/model"
    saved(TWIN_OF["with_teacher"](small(id2label={0: "cat", 1: "dog"}, num_labels=2)), folder)
    Image.new("RGB", (40, 30), "orange").save("photo.jpg")
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert names["label"] in ("cat", "dog")
    assert names["by_head"].distillation_logits.shape == (1, 2)
    assert names["model"].config.drop_path_rate == 0.1
    assert names["model"]._distillation["kind"] == "soft"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.keras",
        "model.tflite",
        "photo.jpg",
        "runs",
        "saved_model",
    ]


@pytest.mark.parametrize("name", [name for name in dir(deit) if name.startswith("TF")])
def test_it_names_every_class(name):
    assert f"`{name}`" in PAGE.read_text()
