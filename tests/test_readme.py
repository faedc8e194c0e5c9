"""The README's Python, run as it stands on models of the quickstart's shape."""

import re
from pathlib import Path

import pytest
from PIL import Image

from deit.data.batches import processor_for
from deit.recipes.digits import digits, digits_teacher
from deit.train.build import build_model

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for recipe, part in [(digits(), "student"), (digits_teacher(), "teacher")]:
        folder = tmp_path / "deit-quickstart" / part / "model"
        build_model(recipe, tuple("0123456789")).save_pretrained(folder)
        processor_for(recipe).save_pretrained(folder)
    picture = tmp_path / "deit-quickstart/data/test/7/1728.png"
    picture.parent.mkdir(parents=True)
    Image.new("L", (32, 32), 99).save(picture)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README.with_name(page).read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert names["label"] in set("0123456789")
    assert names["model"].config.drop_path_rate == 0.1
    assert names["model"].distillation_classifier.weight.grad.abs().sum() > 0
