"""From every start and both ways in to a served answer: training, the model's folder, the server."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from support.models import build, small, trained_folder
from support.runs import photos, small_recipe
from support.serving import ask, assert_labels, client

from deit import Predictor, weights
from deit.config import TimmConfig
from deit.data.folders import read_data
from deit.model import timm_classifier
from deit.recipe import Distilled, LinearProbe, LoRA
from deit.train.loop import train

huggingface_hub = pytest.importorskip("huggingface_hub")
timm = pytest.importorskip("timm")
CLASSES = ("a", "b", "c")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PLAIN = small(distillation_token=False, num_labels=None)
CONVNET = TimmConfig(architecture="test_resnet", image_size=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The same images as a folder and as a list."""
    root = tmp_path_factory.mktemp("data")
    folder = photos(photos(root / "photos"), split="val", count=3)
    with open(root / "photos.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split"])
        for image in sorted(folder.rglob("*.png")):
            rows.writerow([image.relative_to(root), image.parent.name, image.parent.parent.name])
    return {"folder": folder, "list": root / "photos.csv"}


@pytest.fixture
def recipe_from(tmp_path, monkeypatch):
    """The recipe that starts as its name says."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    torch.manual_seed(1)
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), tmp_path / "resnet.pth")
    monkeypatch.setattr(timm_classifier, "installed_weights", lambda name: tmp_path / "resnet.pth")
    teacher = trained_folder(tmp_path / "teacher", kind="plain", labels=CLASSES)

    def hub_name():
        snapshot = cache / "models--org--tiny" / "snapshots" / COMMIT
        trained_folder(snapshot, kind="plain", labels="xyz")
        (cache / "models--org--tiny" / "refs").mkdir()
        (cache / "models--org--tiny" / "refs" / "main").write_text(COMMIT)
        return "org/tiny"

    def file():
        folder = tmp_path / "file"
        PLAIN.replace(num_labels=5).save_pretrained(folder)
        torch.save(weights.from_ours(build("classification", PLAIN, seed=4)._tensors(), "timm"), folder / "vit.pth")
        return str(folder / "vit.pth")

    def recipe(name):
        folder = str(trained_folder(tmp_path / "folder", kind="plain", labels="xyz"))
        if name == "frozen":
            return small_recipe(LinearProbe(folds=2), model=PLAIN, start=folder, optim=None, schedule=None)
        if name == "lora":
            pytest.importorskip("peft")
            return small_recipe(model=PLAIN, start=folder, tuning=LoRA(rank=2))
        if name == "taught":
            return small_recipe(Distilled(teacher=str(teacher)))
        starts = {
            "hub": (PLAIN, hub_name),
            "file": (PLAIN, file),
            "installed": (CONVNET, lambda: "installed"),
            "scratch": (PLAIN, lambda: ""),
        }
        model, start = starts[name]
        return replace(small_recipe(model=model), start=start())

    return recipe


@pytest.mark.parametrize("way", ["folder", "list"])
@pytest.mark.parametrize("name", ["hub", "file", "installed", "frozen", "lora", "scratch", "taught"])
def test_every_start_ends_in_a_served_answer(name, way, recipe_from, data, tmp_path):
    if name == "frozen":
        pytest.importorskip("sklearn")
    splits = read_data(data[way], holdout=0.1, seed=0)
    assert (splits[0].classes, len(splits[0]), len(splits[1])) == (CLASSES, 21, 9)
    found = train(recipe_from(name), *splits, tmp_path / "run", device="cpu", console=Console(quiet=True))
    image = Path(splits[1].files[0])
    [expected] = Predictor(found.model)([image])
    with client(found.model) as web:
        answer = ask(web, image.read_bytes())
        assert answer.status_code == 200
        assert_labels(answer.json()["results"][0]["labels"], expected)
    assert {each["label"] for each in expected} == set(CLASSES)
    assert np.isclose(sum(each["score"] for each in expected), 1.0, atol=1e-5)
