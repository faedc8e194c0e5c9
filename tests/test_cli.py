"""The command as a person types it."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from support.models import trained_folder

from deit import __version__
from deit.cli import _parser, main
from deit.model.network import DeiTForImageClassificationWithTeacher
from deit.predict.predictor import Predictor
from deit.recipe import Recipe, override
from deit.recipes import find, shipped


@pytest.fixture
def folder(tmp_path):
    trained_folder(tmp_path / "m")
    for i in range(2):
        Image.new("RGB", (20, 20), (100 * i, 50, 0)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_predict(folder, capsys):
    images = [str(folder / f"{i}.png") for i in range(2)]
    assert (
        main(["predict", str(folder / "m"), *images, "--top-k", "2", "--batch", "1", "--head", "class", "--json"]) == 0
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    predictor = Predictor(folder / "m", head="class")
    assert rows == [{"image": image, "labels": predictor([image], top_k=2)[0]} for image in images]
    assert main(["predict", str(folder / "m"), images[0], "--top-k", "1"]) == 0
    best = Predictor(folder / "m")([images[0]], top_k=1)[0][0]
    assert capsys.readouterr().out == f"{images[0]}: {best['label']} {best['score']:.3f}\n"


def test_an_unreadable_image_is_named_and_the_others_are_predicted(folder, capsys):
    (folder / "bad.png").write_bytes(b"no image")
    assert main(["predict", str(folder / "m"), str(folder / "bad.png"), str(folder / "1.png")]) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{folder / '1.png'}: ")
    assert f"deit predict: {folder / 'bad.png'} is not an image" in shown.err


@pytest.mark.parametrize("to", ["hf", "timm", "original"])
def test_convert_keeps_the_answers(folder, capsys, to):
    assert main(["convert", str(folder / "m"), "--to", to, "--out", str(folder / "out")]) == 0
    written = capsys.readouterr().out.strip()
    pixels = torch.randn(2, 3, 16, 16)
    before = DeiTForImageClassificationWithTeacher.from_pretrained(folder / "m")
    after = DeiTForImageClassificationWithTeacher.from_pretrained(written, config=before.config)
    assert torch.equal(after(pixels).logits, before(pixels).logits)


def test_failures_are_one_sentence_and_status_1(folder, capsys):
    assert main(["predict", str(folder / "nothing"), str(folder / "0.png")]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"deit predict: {folder / 'nothing'} does not exist")
    assert "Traceback" not in shown
    with pytest.raises(FileNotFoundError):
        main(["--debug", "predict", str(folder / "nothing"), str(folder / "0.png")])


def test_usage_is_status_2_and_version_0():
    for arguments, status in [
        ([], 2),
        (["fly"], 2),
        (["convert", "x", "--to", "gif", "--out", "y"], 2),
        (["--version"], 0),
    ]:
        done = subprocess.run([sys.executable, "-m", "deit", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == status
    assert done.stdout == f"deit {__version__}\n"


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90s", 1.5), ("30m", 30.0), ("1.5h", 90.0), ("4m30s", 4.5), ("1h20m", 80.0), ("1h30s", 60.5), (".5h0.5m", 30.5)],
)
def test_spans_of_time(text, minutes):
    given = ["train", "digits", "--data", "d", "--out", "o", "--time", text]
    assert _parser().parse_args(given).time == pytest.approx(minutes)


@pytest.mark.parametrize(
    "text", ["30", "m", "0s", "nanh", "infh", "ten minutes", "", "1m1h", "1h 20m", "1m1m", "1h20", "²s"]
)
def test_spans_that_are_none(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "digits", "--data", "d", "--out", "o", "--time", text])
    assert f"expected a time like 90s, 30m, 1.5h or 1h20m, found {text!r}" in capsys.readouterr().err


def test_recipes_are_listed_and_printed(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped())
    assert any(line.startswith("deit_tiny ") and line.endswith("from scratch, labels only.") for line in lines)
    assert main(["recipes", "deit_tiny", "--set", "optim.lr=2e-3", "--set", "seed=7"]) == 0
    printed = Recipe.from_dict(json.loads(capsys.readouterr().out))
    assert printed == override(find("deit_tiny"), ["optim.lr=2e-3", "seed=7"])
    assert (printed.optim.lr, printed.seed) == (2e-3, 7)
    assert main(["recipes", "deit_tinny"]) == 1
    assert "deit recipes: there is no recipe 'deit_tinny'; did you mean deit_tiny" in capsys.readouterr().err


def test_the_options_of_train_do_not_grow():
    """A new knob is a field of the recipe: --set reaches it."""
    [verbs] = [action for action in _parser()._actions if action.dest == "verb"]
    options = {action.dest for action in verbs.choices["train"]._actions}
    assert options == {"help", "recipe", "data", "out", "settings", "device", "resume", "time"}
