"""Distillation as a person does it: a teacher trained, its labels stored, students trained with either."""

import json
import shutil
import signal
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from support.models import small
from support.runs import assert_same_end, finish, kill, photos, reached, start, wait_for

from deit.cli import main
from deit.data.folders import Split
from deit.machine import Processes
from deit.model.load import load_model
from deit.recipe import AdamW, Augment, Compute, Cosine, Data, Distilled, Recipe, Supervised, steps
from deit.train import objectives, runs, stepping
from deit.train.labels import teach
from deit.train.teacher import expand

RECIPES = '''
from deit.config import ConvNetConfig, DeiTConfig
from deit.recipe import *

COMPUTE = Compute(precision="float32", workers=0)
MODEL = DeiTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=16,
                   patch_size=4, encoder_stride=4, layer_norm_eps=1e-6, drop_path_rate=0.2, distillation_token=True)


def teacher():
    return Recipe(
        name="teacher", model=ConvNetConfig(widths=(8, 16), depth=1, image_size=16),
        data=Data(batch=8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)), objective=Supervised(),
        augment=Augment(flip=0.5), optim=SGD(lr=1e-2, per_images=8), schedule=Cosine(total=steps(20)),
        compute=COMPUTE, evaluate=steps(20))


def student():
    """Eight epochs of 21 images in batches of 8; everything random at once."""
    return Recipe(
        name="student", model=MODEL, data=Data(batch=8, repeats=2), objective=Distilled(smoothing=0.1),
        augment=Augment(crop=ResizedCrop(), flip=0.5, policy=RandAugment(std=0.5), erase=Erase(),
                        mix=Mix(mixup=0.8, cutmix=1.0)),
        optim=AdamW(lr=1e-2, per_images=8, clip=1.0), schedule=Cosine(total=steps(21), warmup=steps(5)), ema=0.9,
        compute=COMPUTE, evaluate=steps(7))
'''

SLOW_TEACHER = """
import os
import time
from deit.model.load import load_model


def make():
    model = load_model({folder!r})
    model.classes, model.mean, model.std = ["a", "b", "c"], (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    model.register_forward_pre_hook(lambda *_: time.sleep(float(os.environ.get("PAUSE", "0"))))
    return model
"""


@dataclass
class Place:
    """Where data, recipes and the trained teacher are."""

    root: Path

    @property
    def data(self):
        return self.root / "data"

    @property
    def recipes(self):
        return self.root / "recipes.py"

    @property
    def teacher(self):
        return self.root / "teacher" / "model"

    def train(self, out, *settings, more=()):
        """`deit train` of the student; its exit status."""
        given = [part for setting in settings for part in ("--set", setting)]
        return main(["train", f"{self.recipes}:student", "--data", str(self.data), "--out", str(out), *given, *more])

    def teach(self, out, *settings, epochs=8, teacher=None):
        given = [part for setting in settings for part in ("--set", setting)]
        return main(
            [
                "teach",
                str(self.data),
                "--teacher",
                str(teacher or self.teacher),
                "--recipe",
                f"{self.recipes}:student",
                "--epochs",
                str(epochs),
                "--out",
                str(out),
                *given,
            ]
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("distillation"))
    photos(photos(place.data), split="val", count=3)
    place.recipes.write_text(RECIPES)
    assert (
        main(["train", f"{place.recipes}:teacher", "--data", str(place.data), "--out", str(place.root / "teacher")])
        == 0
    )
    return place


@pytest.fixture(scope="module")
def stored(place):
    """Labels for the whole training, and a student that learnt from them."""
    assert place.teach(place.root / "labels") == 0
    assert place.train(place.root / "cached", f"objective.cache={place.root / 'labels'}") == 0
    return place.root / "labels", place.root / "cached"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@dataclass
class Lesson:
    """What a student was shown in one step, and what it was taught."""

    step: int
    pixels: torch.Tensor
    labels: torch.Tensor
    taught: torch.Tensor


@contextmanager
def watched(monkeypatch):
    """Every lesson of the runs within."""
    lessons, kept = [], objectives.DistilledObjective.kept

    def watch(self, batch):
        found = kept(self, batch)
        lessons.append(Lesson(batch.step, batch.pixels, batch.labels, expand(found, len(self.split.classes))))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(objectives.DistilledObjective, "kept", watch)
        yield lessons


# ------------------------------------------------------------------------------------------------- stored is on the way


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("objective.kind=soft", "objective.top_k=2"),
        ("objective.kind=soft", "objective.weight=0.5"),
        ("objective.token=class", "model.distillation_token=False"),
    ],
    ids=["hard", "top_k", "soft", "class_token"],
)
def test_stored_labels_train_the_same_student(place, settings, tmp_path):
    """Weights, average, optimizer, the best model and the metrics, to the bit, over eight epochs."""
    assert place.teach(tmp_path / "labels", *settings) == 0
    assert place.train(tmp_path / "stored", *settings, f"objective.cache={tmp_path / 'labels'}") == 0
    assert place.train(tmp_path / "asked", *settings, f"objective.teacher={place.teacher}") == 0
    assert reached(tmp_path / "stored") == 21
    assert_same_end(tmp_path / "stored", tmp_path / "asked")
    assert json.loads((tmp_path / "labels" / "cache.json").read_text())["steps"] == 21


def test_the_student_learns_from_what_is_stored(place, stored, tmp_path):
    """Other labels, another student: the test above could not pass by ignoring them."""
    shutil.copytree(place.teacher, tmp_path / "other")
    model = load_model(tmp_path / "other")
    with torch.no_grad():
        model.classifier.weight.neg_()
        model.classifier.bias.neg_()
    model.save_pretrained(tmp_path / "other")
    assert place.teach(tmp_path / "labels", teacher=tmp_path / "other") == 0
    assert place.train(tmp_path / "run", f"objective.cache={tmp_path / 'labels'}") == 0
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "run", stored[1]))
    assert not torch.equal(one["distillation_classifier.weight"], other["distillation_classifier.weight"])


def test_fewer_epochs_of_labels_come_again_with_their_views(place, tmp_path, monkeypatch):
    """Two epochs are six steps: step s + 6 shows and teaches what step s did, and differs from all others."""
    assert place.teach(tmp_path / "labels", epochs=2) == 0
    with watched(monkeypatch) as lessons:
        assert place.train(tmp_path / "run", f"objective.cache={tmp_path / 'labels'}") == 0
    assert [lesson.step for lesson in lessons] == list(range(21))
    for one, again in zip(lessons, lessons[6:], strict=False):
        assert torch.equal(one.pixels, again.pixels)
        assert torch.equal(one.labels, again.labels)
        assert torch.equal(one.taught, again.taught)
    for i, one in enumerate(lessons[:6]):
        assert not any(torch.equal(one.pixels, other.pixels) for other in lessons[:i])
    with watched(monkeypatch) as lessons:
        assert place.train(tmp_path / "asked", f"objective.teacher={place.teacher}") == 0
    assert not any(torch.equal(one.pixels, again.pixels) for one, again in zip(lessons, lessons[6:], strict=False))


def test_a_killed_student_goes_on_with_stored_labels(place, stored, tmp_path):
    labels, whole = stored
    out = tmp_path / "run"
    process = start(
        "train",
        f"{place.recipes}:student",
        "--data",
        place.data,
        "--out",
        out,
        "--set",
        f"objective.cache={labels}",
        "--set",
        "compute.save_minutes=0",
    )
    assert wait_for(out, 5, process)
    kill(process, out)
    assert 5 <= reached(out) < 21
    assert place.train(out, f"objective.cache={labels}", more=["--resume"]) == 0
    assert_same_end(out, whole)


# ------------------------------------------------------------------------------------------------------------- teaching


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_teaching_goes_on_to_the_same_bytes(place, number, tmp_path):
    """Whole parts stay, and what was begun is made anew."""
    (tmp_path / "slow.py").write_text(SLOW_TEACHER.format(folder=str(place.teacher)))
    teacher = f"{tmp_path / 'slow.py'}:make"
    process = start(
        "teach",
        place.data,
        "--teacher",
        teacher,
        "--recipe",
        f"{place.recipes}:student",
        "--epochs",
        16,
        "--out",
        tmp_path / "labels",
        PAUSE="0.02",
    )
    while len(list((tmp_path / "labels").glob("labels-*"))) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(number)
    output = finish(process, 143 if number == signal.SIGTERM else -number)
    assert "Traceback" not in output
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "labels").glob("labels-*")}
    assert 3 <= len(times) < 21  # of 42 steps, two in a part
    assert place.teach(tmp_path / "labels", epochs=16, teacher=teacher) == 0
    assert place.teach(tmp_path / "whole", epochs=16, teacher=teacher) == 0
    assert contents(tmp_path / "labels") == contents(tmp_path / "whole")
    assert len(contents(tmp_path / "whole")) == 22
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("seed=1",), "other views: seed is 0 there and 1 here; set it back"),
        (("augment.flip=0.4",), "other views: augment.flip is 0.5 there and 0.4 here"),
        (("augment.mix=None",), "other views: augment.mix is"),
        (("data.batch=6",), "other views: data.batch is 8 there and 6 here"),
        (("data.repeats=1",), "other views: data.repeats is 2 there and 1 here"),
        (("model.image_size=20",), "other views: model.image_size is [16, 16] there and [20, 20] here"),
        (("objective.kind=soft",), "other views: objective.kind is 'hard' there and 'soft' here"),
    ],
    ids=str,
)
def test_labels_for_other_views_are_refused(place, stored, settings, reason, tmp_path, capsys):
    labels = stored[0]
    capsys.readouterr()
    assert place.train(tmp_path / "run", f"objective.cache={labels}", *settings) == 1
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert said.startswith(f"deit train: {labels} was taught with {reason}")
    assert said.endswith("or run deit teach into another folder")
    assert place.teach(labels, *settings) == 1
    assert f"was taught with {reason}" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["changed", "fewer", "renamed"])
def test_labels_of_other_images_are_refused(place, stored, change, tmp_path, capsys):
    other = Place(tmp_path)
    shutil.copytree(place.data, other.data)
    shutil.copy(place.recipes, other.recipes)
    settings = f"objective.cache={stored[0]}", "schedule.total=steps(2)"
    assert other.train(tmp_path / "same", *settings) == 0  # elsewhere, but the same
    capsys.readouterr()
    image = other.data / "train" / "b" / "3.png"
    if change == "changed":
        pixels = np.array(Image.open(image))
        pixels[0, 0] ^= 1
        Image.fromarray(pixels).save(image)
    elif change == "fewer":
        image.unlink()
    else:
        image.rename(image.with_name("9.png"))
    assert other.train(tmp_path / "run", *settings) == 1
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert (
        f"{stored[0]} was taught with other data: "
        + ("21 images there, 20 here" if change == "fewer" else "names, classes or contents of its files differ")
        in said
    )


def test_no_labels_and_no_teacher_are_refused(place, tmp_path, capsys):
    assert place.train(tmp_path / "run") == 1
    assert "distils but names no teacher; use --set objective.teacher=" in capsys.readouterr().err
    assert place.train(tmp_path / "other", f"objective.cache={tmp_path / 'none'}") == 1
    assert f"{tmp_path / 'none'} holds no cache.json" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- teachers unlike it


def test_a_teacher_of_classes_in_another_order(place, stored, tmp_path):
    """Its outputs turned round, and their names with them: the same labels."""
    model = load_model(place.teacher)
    order = [2, 0, 1]
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight[order].clone())
        model.classifier.bias.copy_(model.classifier.bias[order].clone())
    shutil.copytree(place.teacher, tmp_path / "turned")
    model.config = model.config.replace(id2label=dict(enumerate("cab")))
    model.save_pretrained(tmp_path / "turned")
    assert place.teach(tmp_path / "labels", teacher=tmp_path / "turned") == 0
    for path in sorted(stored[0].glob("labels-*")):
        found, expected = load_file(tmp_path / "labels" / path.name), load_file(path)
        assert torch.equal(found["hard"], expected["hard"])
    assert place.train(tmp_path / "run", f"objective.teacher={tmp_path / 'turned'}") == 0
    assert_same_end(tmp_path / "run", stored[1])


@pytest.mark.parametrize("resolution", ["teacher", "student"])
def test_a_student_of_another_resolution_than_its_teacher(place, resolution, tmp_path, monkeypatch):
    """24 pixels under a teacher of 16: it sees the student's batch with its own normalisation, resized or as it is,
    and so do those who ask for stored labels."""
    settings = ("model.image_size=24", f"objective.resolution={resolution}", "objective.kind=soft")
    with watched(monkeypatch) as lessons:
        assert place.train(tmp_path / "asked", *settings, f"objective.teacher={place.teacher}") == 0
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    own_mean, own_std = (torch.tensor(values).view(-1, 1, 1) for values in ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))
    model = load_model(place.teacher)
    for lesson in islice(lessons, 4):
        assert lesson.pixels.shape == (8, 3, 24, 24)
        pixels = (lesson.pixels * std + mean - own_mean) / own_std
        if resolution == "teacher":
            pixels = F.interpolate(pixels, (16, 16), mode="bicubic", antialias=True)
        with torch.no_grad():
            expected = model(pixels).logits.log_softmax(-1)
        torch.testing.assert_close(lesson.taught, expected, atol=1e-4, rtol=0)
    assert place.teach(tmp_path / "labels", *settings) == 0
    assert place.train(tmp_path / "stored", *settings, f"objective.cache={tmp_path / 'labels'}") == 0
    assert_same_end(tmp_path / "stored", tmp_path / "asked")


# ------------------------------------------------------------------------------------------------------- what it costs


@pytest.mark.slow
def test_stored_labels_cost_no_more_than_none(tmp_path):
    """An epoch of a tiny model at 32 pixels: with stored hard labels at most 1.05 times that of the same transformer
    that learns from labels alone. Step by step in turn, seven epochs, the median of their ratios."""
    draw = np.random.default_rng(0)
    paths = tuple(tmp_path / f"{i:03}.png" for i in range(512))
    for path in paths:
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    classes = tuple(map(str, range(10)))
    split = Split(paths, tuple(i % 10 for i in range(512)), classes)
    (tmp_path / "teacher.py").write_text(
        "from torch import nn\n\n\ndef make():\n    model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), "
        f"nn.Linear(48, 10))\n    model.classes = {classes}\n    return model\n"
    )
    tiny = small(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=32,
        patch_size=4,
        num_labels=None,
    )
    distilled = Recipe(
        name="distilled",
        model=tiny,
        data=Data(batch=128),
        augment=Augment(flip=0.5),
        objective=Distilled(teacher=f"{tmp_path / 'teacher.py'}:make"),
        optim=AdamW(lr=1e-4, per_images=128),
        schedule=Cosine(total=steps(1000)),
        compute=Compute(workers=0),
    )
    teach(distilled, split, tmp_path / "labels", epochs=2, device="cpu", console=Console(quiet=True))
    recipes = {
        "labels": replace(distilled, objective=Supervised()),
        "stored": replace(distilled, objective=Distilled(cache=str(tmp_path / "labels"))),
    }
    works = {
        name: runs.prepare(recipe, split, split, Processes(torch.device("cpu")), None)
        for name, recipe in recipes.items()
    }
    streams = {name: work.batches.from_step(0) for name, (work, _) in works.items()}

    def update(name):
        (work, state), batch = works[name], next(streams[name])
        began = time.perf_counter()
        stepping.take(work, state, batch, (False,), lambda _: None)
        return time.perf_counter() - began

    ratios = []
    for epoch in range(8):
        times = dict.fromkeys(recipes, 0.0)
        for i in range(4):
            for name in list(recipes)[:: -1 if i % 2 else 1]:
                times[name] += update(name)
        if epoch:  # the first warms up
            ratios.append(times["stored"] / times["labels"])
    assert len(ratios) == 7
    print(f"stored / labels: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    assert statistics.median(ratios) <= 1.05, ratios
