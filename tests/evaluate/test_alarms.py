"""What warns of a result: in a training, in `deit eval`, in `deit calibrate` and in the report."""

import io
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from support.models import trained_folder
from support.reports import ABOUT
from support.runs import photos, small_recipe

from deit.cli import main
from deit.data.folders import fingerprint, read_data
from deit.evaluate import alarms
from deit.evaluate.calibration import Calibration, fit
from deit.evaluate.scores import Accuracy
from deit.machine import Processes
from deit.recipe import Cosine, Distilled, steps
from deit.report import write
from deit.train import LabelCache, runs, teach
from deit.train.loop import train
from deit.train.records import About, Record

NAMES = ("ant", "bee", "cat")
QUIET = Console(quiet=True)


@pytest.mark.parametrize(
    ("accuracy", "images", "share"),
    [
        (6 / 10, (3, 6, 1), "0.600"),
        (0.0, (3, 6, 1), "0.600"),
        (7 / 10, (3, 6, 1), None),
        (1 / 3, (4, 4, 4), "0.333"),
        (0.0, (0, 9, 0), None),
        (0.0, (0, 0, 0), None),
    ],
)
def test_a_model_that_learnt_nothing(accuracy, images, share):
    found = alarms.learnt_nothing(accuracy, NAMES, images)
    assert len(found) == (share is not None)
    if share:
        name = NAMES[int(np.argmax(images))]
        assert f'the accuracy {accuracy:.3f} is not above {share}, the share of "{name}" among' in str(found[0])


@pytest.mark.parametrize(
    ("correct", "teacher", "said"),
    [(90, (90, 100), None), (91, (90, 100), None), (0, None, None), (89, (90, 100), ", which may be chance"),
     (50, (90, 100), "100 of them. Compare")],
)  # fmt: skip
def test_a_student_below_its_teacher(correct, teacher, said):
    found = alarms.below_teacher(correct / 100, teacher and Accuracy(*teacher))
    assert len(found) == (said is not None)
    if said:
        sentence = str(found[0])
        assert f"student is right on {correct / 100:.3f} of the validation images, its teacher on 0.900" in sentence
        assert said in sentence


def test_images_that_chose_or_trained_the_model_judge():
    told = {part: [str(each) for each in alarms.judged_by(part)] for part in ("val", "train", "test", None)}
    assert [sentence.startswith("warning: if these validation images chose") for sentence in told["val"]] == [True]
    assert [sentence.startswith("warning: if the model was trained on these") for sentence in told["train"]] == [True]
    assert told["test"] == told[None] == []


def test_training_images_that_judge(root):
    """Those of the same fingerprint, wherever they are, and all images of a place of which some were for training."""
    training, validation = (fingerprint(split) for split in read(root))
    about = replace(ABOUT, fingerprint=training)
    assert about.trained_on("elsewhere", None, training)
    assert about.trained_on("elsewhere", "val", training)
    assert about.trained_on(str(Path("photos").absolute()), None, validation)
    assert not about.trained_on("photos", "val", validation)
    assert not about.trained_on("photos/", "test", validation)
    assert not about.trained_on("elsewhere", None, validation)
    assert not about.trained_on("", None, validation)
    assert not replace(about, data="").trained_on("", None, validation)


def calibrated(wrong, sure):
    """The calibration of a model that gives the label the logit `sure` more than the other one, or, for `wrong` of its
    100 images, less."""
    logits = np.zeros((100, 2))
    logits[:, 0] = sure
    logits[:wrong, 0] = -sure

    def probabilities(temperature):
        powers = np.exp((logits - logits.max(1, keepdims=True)) / temperature)
        return powers / powers.sum(1, keepdims=True)

    head = fit(probabilities, np.zeros(100, int), 0.05)
    return Calibration(error_rate=0.05, images=100, data="", heads={"class": head}), head.temperature


def test_temperatures_at_their_limit():
    found, temperature = calibrated(0, 1.0)
    assert temperature == pytest.approx(0.05, rel=1e-3)
    [sentence] = map(str, found.alarms())
    assert "the least that is tried (0.05), because it is right on almost all of the 100 images" in sentence
    found, temperature = calibrated(60, 1.0)
    assert temperature == pytest.approx(20, rel=1e-3)
    [sentence] = map(str, found.alarms())
    assert "the greatest that is tried (20)" in sentence
    found, temperature = calibrated(20, 2.0)
    assert temperature == pytest.approx(2 / np.log(80 / 20), rel=1e-3)  # where the confidence is 0.8
    assert found.alarms() == []


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("alarms")
    photos(photos(root / "data"), split="val", count=6)
    for name in ("a", "b"):
        shutil.rmtree(root / "data" / "val" / name)
        shutil.copytree(root / "data" / "val" / "c", root / "data" / "val" / name)
    (root / "data" / "val" / "a" / "0.png").unlink()
    return root


TEACHER = """
import torch
from torch import nn

class Sees(nn.Module):
    '''Calls everything "c", which is right on 6 of 17 validation images.'''
    classes, mean, std, image_size = ["a", "b", "c"], [0.5] * 3, [0.5] * 3, 16

    def forward(self, pixels):
        return torch.tensor([[0.0, 0.0, 1.0]]).repeat(len(pixels), 1)

def sees():
    return Sees()
"""


def read(root):
    return read_data(root / "data", holdout=0.1, seed=0)


def trained(root, out, **parts):
    said = io.StringIO()
    recipe = small_recipe(schedule=Cosine(total=steps(2)), evaluate=steps(1), **parts)
    console = Console(file=said, width=10_000)
    run = train(recipe, *read(root), root / out, device="cpu", console=console)
    return run, said.getvalue(), json.loads((root / out / "about.json").read_text())


def taught_by(root):
    return Distilled(teacher=f"{root / 'teachers.py'}:sees")


@pytest.fixture(scope="module")
def taught(root):
    (root / "teachers.py").write_text(TEACHER)
    return trained(root, "taught", objective=taught_by(root))


def test_a_training_tells_what_its_student_and_teacher_are_worth(root, taught):
    run, said, about = taught
    assert about["teacher"] == [6, 17]
    expected = [*alarms.learnt_nothing(run.score, "abc", (5, 6, 6)), *alarms.below_teacher(run.score, Accuracy(6, 17))]
    assert expected  # because all three classes look the same in validation
    assert all(str(sentence) in said.splitlines() for sentence in expected)
    _, _, about = trained(root, "plain")
    assert about["teacher"] is None


def test_what_a_run_remembers_of_its_teacher(root, taught, tmp_path):
    about = About.from_dict(taught[2])
    assert about.teacher == (6, 17)
    (tmp_path / "about.json").write_text(json.dumps(taught[2]))
    again = (Processes(torch.device("cpu")), torch.float32, about.fingerprint, *read(root), tmp_path)
    assert runs.write_about(*again, resumed=True) == about
    assert runs.write_about(*again).teacher is None
    values = json.loads(json.dumps(about.to_dict()))
    del values["teacher"]
    assert About.from_dict(values) == replace(about, teacher=None)
    for wrong in ([1], [3, 2], [0, 0], ["a", "b"], "ab", [True, 1]):
        with pytest.raises(ValueError, match="teacher"):
            About.from_dict({**values, "teacher": wrong})


def test_a_student_of_stored_labels_is_compared_with_their_teacher(root, taught):
    recipe, (training, validation) = small_recipe(taught_by(root)), read(root)
    teach(recipe, training, root / "labels", epochs=1, validation=validation, device="cpu", console=QUIET)
    objective = replace(recipe.objective, cache=str(root / "labels"))
    run, said, about = trained(root, "stored", objective=objective)
    assert about["teacher"] == [6, 17]
    assert f"sees gave, from {root / 'labels'}; it was right on 0.353 of 17 validation images" in said
    expected = [*alarms.learnt_nothing(run.score, "abc", (5, 6, 6)), *alarms.below_teacher(run.score, Accuracy(6, 17))]
    assert all(str(sentence) in said.splitlines() for sentence in expected)
    other = validation.take(range(5, 17))
    cache = LabelCache.open(root / "labels", training, recipe)
    [sentence] = cache.introduction(other)
    assert cache.judged is None
    assert "is not stored, and the same deit teach adds it" in sentence


def test_training_ends_with_the_command_for_test_images(root, tmp_path, capsys):
    data = shutil.copytree(root / "data", tmp_path / "my data")
    photos(data, split="test", count=2)
    (tmp_path / "recipe.json").write_text(json.dumps(small_recipe(schedule=Cosine(total=steps(2))).to_dict()))
    command = ["train", tmp_path / "recipe.json", "--data", data, "--device", "cpu", "--out", tmp_path / "run"]
    assert main([*map(str, command)]) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("warning: the validation images chose this model, so their accuracy flatters it. ")
    words = shlex.split(last.partition("do not: ")[2])
    assert words[0] == "deit"
    assert main([*words[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["split"] == "test"


def test_eval_and_report_warn(root, capsys):
    model = trained_folder(root / "m", "plain", "abc")
    assert main(["eval", str(model), "--data", str(root / "data"), "--json", "--report", str(root / "e.html")]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    accuracy = found["heads"]["fused"]["top1"]["value"]
    expected = [*alarms.learnt_nothing(accuracy, "abc", (5, 6, 6)), *alarms.judged_by("val")]
    assert len(expected) == 2
    assert all(str(sentence) in shown.err.splitlines() for sentence in expected)
    assert "Warning: if these validation images chose the model" in (root / "e.html").read_text()
    assert "Warning: the accuracy" in (root / "e.html").read_text()
    assert main(["eval", str(model), "--data", str(root / "data"), "--split", "train"]) == 0
    assert "if these validation images" not in capsys.readouterr().err


def test_calibrate_and_report_warn_of_a_temperature(root, capsys):
    calibration, _ = calibrated(0, 1.0)
    model = trained_folder(root / "calibrated", "plain", "abc")
    calibration.save(model)
    assert main(["eval", str(model), "--data", str(root / "data"), "--report", str(root / "c.html")]) == 0
    assert "is the least that is tried (0.05)" in (root / "c.html").read_text()
    capsys.readouterr()


def test_the_report_of_a_run_warns(root, taught):
    shutil.copytree(root / "taught", root / "copy")
    rows = [json.loads(line) for line in (root / "copy" / "metrics.jsonl").read_text().splitlines()]
    (root / "copy" / "metrics.jsonl").write_text(json.dumps({**rows[-1], "val_accuracy": 5 / 17}))
    write(root / "r.html", Record.read(root / "copy"), None)
    page = (root / "r.html").read_text()
    assert "the student is right on 0.294 of the validation images, its teacher on 0.353 of 17 of them" in page
    (root / "copy" / "metrics.jsonl").write_text(json.dumps({**rows[-1], "val_accuracy": 7 / 17}))
    write(root / "r.html", Record.read(root / "copy"), None)
    assert "Beware" not in (root / "r.html").read_text()
