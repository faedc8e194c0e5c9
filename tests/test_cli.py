"""The command as a person types it."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import build, small
from PIL import Image

from deit import __version__
from deit.cli import main
from deit.image import DeiTImageProcessor
from deit.model import DeiTForImageClassificationWithTeacher
from deit.predict import Predictor


@pytest.fixture
def folder(tmp_path):
    build("with_teacher", small(id2label=dict(enumerate("abcde")), num_labels=None)).save_pretrained(tmp_path / "m")
    DeiTImageProcessor.paper(16).save_pretrained(tmp_path / "m")
    for i in range(2):
        Image.new("RGB", (20, 20), (100 * i, 50, 0)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_predict(folder, capsys):
    images = [str(folder / f"{i}.png") for i in range(2)]
    assert main(["predict", str(folder / "m"), *images, "--top-k", "2", "--json", "--head", "class"]) == 0
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
    for arguments, status in [([], 2), (["fly"], 2), (["convert", "x", "--to", "gif", "--out", "y"], 2),
                              (["--version"], 0)]:
        done = subprocess.run([sys.executable, "-m", "deit", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == status
    assert done.stdout == f"deit {__version__}\n"
