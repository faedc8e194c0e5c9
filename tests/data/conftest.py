"""`deit train` on folders of images as people have them."""

import json

import numpy as np
import pytest
from support.runs import RECIPES, photos

from deit.cli import main
from deit.model.load import load_model

MORE_RECIPES = (
    "from dataclasses import replace\n"
    + RECIPES
    + """

def grey():
    return replace(convnet(), model=convnet().model.replace(num_channels=1),
                   data=Data(batch=8, mean=(0.4,), std=(0.2,)))


def masked():
    return replace(student(), objective=MaskedImage(unit=8), augment=Augment(crop=ResizedCrop()), schedule=Cosine(
        total=steps(4)))
"""
)


class Command:
    """`deit train` in a run folder of its own; what it printed and wrote."""

    def __init__(self, folder, capfd):  # capfd writes names that are no UTF-8, as a terminal does
        self.folder, self.capfd, self.runs = folder, capfd, 0
        folder.mkdir()
        (folder / "recipes.py").write_text(MORE_RECIPES)

    def __call__(self, data, recipe="convnet", *settings):
        self.runs += 1
        self.out = self.folder / f"run{self.runs}"
        status = main(
            [
                "train",
                f"{self.folder / 'recipes.py'}:{recipe}",
                "--data",
                str(data),
                "--out",
                str(self.out),
                "--device",
                "cpu",
                *[part for setting in settings for part in ("--set", setting)],
            ]
        )
        self.shown = self.capfd.readouterr()
        return status

    def trains(self, *given):
        assert self(*given) == 0, self.shown.err
        self.rows = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        assert all(np.isfinite(row["loss"]) for row in self.rows)
        assert (self.out / "model" / "model.safetensors").exists()
        return load_model(self.out / "model")

    def assert_refused(self, *given, saying):
        assert self(*given) == 1
        *before, sentence = self.shown.err.splitlines()  # what a run says of itself, and then the error
        assert sentence.startswith("deit train: ")
        assert not any(line.startswith("deit train: ") for line in before)
        assert [str(part) for part in saying if str(part) not in sentence] == [], sentence
        assert self.shown.out == ""


@pytest.fixture
def command(tmp_path, capfd):
    return Command(tmp_path / "command", capfd)


@pytest.fixture
def data(tmp_path):
    """21 training and 9 validation images of three classes."""
    return photos(photos(tmp_path / "data"), split="val", count=3)
