"""Small inputs that once got a wrong answer, kept beside the repository. They go through the command as people type it.

Each is also a test elsewhere that makes its own input. Without the folder, these are skipped.
"""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import trained_folder

from deit import files

CASES = Path(__file__).parents[2] / "shared" / "cases"
NAMES = sorted(path.name for path in CASES.iterdir() if path.is_dir()) if CASES.is_dir() else []


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A classifier of digits, whose answers differ for all images that differ."""
    return trained_folder(tmp_path_factory.mktemp("m"), labels="0123456789")


def deit(*arguments, status=0, **options):
    """What the command writes to standard output, and to standard error."""
    source = str(Path(files.__file__).parents[1])  # the command runs elsewhere
    environment = {**os.environ, "PYTHONPATH": source, "PYTHONIOENCODING": "utf-8", **options.pop("environment", {})}
    done = subprocess.run(
        [sys.executable, "-m", "deit", *map(str, arguments)],
        capture_output=True,
        check=False,
        cwd=CASES.parent,
        env=environment,
        **options,
    )
    assert done.returncode == status, done.stderr.decode()
    return done.stdout.decode(environment["PYTHONIOENCODING"]), done.stderr.decode()


def predicted(model, *images, status=0, **options):
    """Rows of `deit predict --json`, and standard error."""
    out, err = deit("predict", model, *images, "--top-k", 12, "--engine", "torch", "--json", status=status, **options)
    return [json.loads(line) for line in out.splitlines()], err


def assert_same(row, other):
    """Equal but for the rounding of sums in another batch."""
    scores = [{each["label"]: each["score"] for each in found["labels"]} for found in (row, other)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def crlf_list(model, folder, _):
    [expected], _ = predicted(model, "cases/crlf_list/a.png")
    for name in ("list.txt", "bom.txt"):
        with open(folder / name, "rb") as listed:
            rows, _ = predicted(model, "-", stdin=listed)
        assert [row["image"] for row in rows] == ["cases/crlf_list/a.png"]
        assert_same(rows[0], expected)


def jfif_avif_skipped(_, folder, tmp_path):
    out = tmp_path / "run"
    deit("train", "digits_teacher", "--data", folder / "photos", "--out", out, "--set", "schedule.total=steps(2)")
    about = json.loads((out / "about.json").read_text())
    assert sum(about["train"]) + sum(about["val"]) == 66


def mode_I_8bit(model, folder, _):
    [base], _ = predicted(model, folder / "base.png")
    rows, err = predicted(model, *(folder / name for name in ("i32.tif", "f01.tif", "f65535.tif")), status=1)
    assert_same(rows[0], base)
    for row, name, held in zip(rows[1:], ("f01.tif", "f65535.tif"), ("0..1", "0..65535"), strict=True):
        assert row["labels"] == []
        assert row["error"].startswith(f"{folder / name} is a float image (mode F) that holds {held}, expected 0..255")
        assert f"deit predict: {row['error']}" in err


def multi_label(_, folder, tmp_path):
    from transformers import ViTForImageClassification, ViTImageProcessor

    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    [row], _ = predicted(folder / "model", tmp_path / "a.png")
    theirs = ViTForImageClassification.from_pretrained(folder / "model").eval()
    pixels = ViTImageProcessor.from_pretrained(folder / "model")(picture, return_tensors="pt").pixel_values
    with torch.no_grad():
        scores = theirs(pixels).logits.sigmoid()[0].tolist()
    expected = {theirs.config.id2label[i]: score for i, score in enumerate(scores)}
    assert {each["label"]: each["score"] for each in row["labels"]} == pytest.approx(expected, abs=1e-5)


def png_metadata(model, folder, tmp_path):
    paths = sorted(folder.glob("*.png"))
    assert len(paths) == 4
    rows, _ = predicted(model, *paths)
    for path, row in zip(paths, rows, strict=True):
        Image.fromarray(pixels_of(path)).save(tmp_path / "bare.png")
        [bare], _ = predicted(model, tmp_path / "bare.png")
        assert_same(row, bare)


def pixels_of(path):
    """Without Pillow's limits on texts."""
    code = (
        "import sys; from PIL import Image, PngImagePlugin as png; png.MAX_TEXT_CHUNK = png.MAX_TEXT_MEMORY = 2**40\n"
        "Image.open(sys.argv[1]).convert('RGB').save(sys.stdout.buffer, 'PPM')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=True)
    return np.asarray(Image.open(io.BytesIO(done.stdout)))


def sorted_config_convnet(_, folder, __):
    rows = [predicted(folder / name, folder / "0.png")[0][0] for name in ("model", "sorted")]
    assert_same(*rows)
    assert [each["label"] for each in rows[0]["labels"]][:3] == ["c3", "c5", "c12"]


def stdout_encoding(model, folder, _):
    out, _ = deit("predict", model, folder, "--csv", environment={"PYTHONIOENCODING": "cp1252"})
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [Path(row["image"].replace("\\u732b", "猫")).name for row in rows] == ["a.png", "猫.png"]
    assert rows[0]["label_1"] == rows[1]["label_1"]
    assert float(rows[0]["score_1"]) == pytest.approx(float(rows[1]["score_1"]), abs=1e-6)


def win_paths(model, folder, tmp_path):
    _, err = deit("eval", model, "--data", folder / "win.csv", status=1)
    assert "write its path with / instead of \\" in err
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "win.csv").write_bytes((folder / "win.csv").read_bytes())
    for path in ("ds7/7/0081.png", "ds7/1/0021.png"):
        (tmp_path / path).parent.mkdir(parents=True)
        Image.new("L", (20, 20)).save(tmp_path / path)
    out, _ = deit("eval", model, "--data", tmp_path / "lists" / "win.csv", "--json")
    found = json.loads(out)
    assert (found["images"], found["unreadable"]) == (2, [])


CHECKS = {
    check.__name__: check
    for check in (
        crlf_list,
        jfif_avif_skipped,
        mode_I_8bit,
        multi_label,
        png_metadata,
        sorted_config_convnet,
        stdout_encoding,
        win_paths,
    )
}


@pytest.mark.skipif(not NAMES, reason="the folder of cases is not there")
@pytest.mark.parametrize("name", NAMES)
def test_case(name, model, tmp_path):
    assert name in CHECKS, f"{CASES / name} has no check here; write what its what.txt expects"
    CHECKS[name](model, CASES / name, tmp_path)
