"""`deit explain` and the Python of its guide."""

import json
import re
from pathlib import Path

import numpy as np
from PIL import Image
from support.models import build, saved, small, trained_folder

from deit.cli import main
from deit.explain.explanation import explain_file
from deit.explain.picture import figure

PAGE = Path(__file__).parents[2] / "docs" / "explain.md"


def run(capsys, *arguments, status=0):
    assert main(["explain", *map(str, arguments)]) == status
    return capsys.readouterr()


def keys_of(value, path=""):
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from keys_of(inner, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from keys_of(inner, f"{path}[]")
    else:
        yield path


def test_the_command(folder, capsys):
    out = folder / "new" / "figure.png"
    shown = run(capsys, folder / "m", folder / "photo.png", "--out", out, "--json", "--device", "cpu").out
    found = json.loads(shown)
    expected = explain_file(folder / "m", folder / "photo.png")
    assert found == json.loads(json.dumps({**expected.to_dict(), "figure": str(out)}))
    assert found["image_size"] == [16, 16]
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(figure(expected)))
    assert [path.name for path in out.parent.iterdir()] == ["figure.png"]
    documented = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text().split("## The JSON")[1], re.MULTILINE)
    assert sorted(set(keys_of(found))) == sorted(documented)


def test_the_table_of_the_command(folder, capsys):
    shown = run(
        capsys, folder / "m", folder / "photo.png", "--out", folder / "f.PNG", "--method", "rollout", "--target", "bee"
    ).out
    found = explain_file(folder / "m", folder / "photo.png", methods=["rollout"], target="bee")
    rows = [line.split() for line in shown.splitlines()]
    for answer_ in found.answers:
        for each in (each for each in found.maps if each.token == answer_.token):
            assert [answer_.token, each.method, *(f"{score:.3f}" for score in each.score)] in rows
        assert [answer_.token, "random", "order", *(f"{score:.3f}" for score in answer_.chance)] in rows
        said = f"{answer_.token} token: {answer_.label} {answer_.probability:.3f}"
        said += "" if answer_.label == "bee" else f"; explained: bee {answer_.target_probability:.3f}"
        assert said in shown.splitlines()
    assert {answer_.label == "bee" for answer_ in found.answers} == {True, False}
    assert shown.splitlines()[-1] == str(folder / "f.PNG")


def test_what_the_command_refuses(folder, capsys):
    photo, out = folder / "photo.png", folder / "figure.png"
    out.write_bytes(b"as it was")
    (folder / "bad.png").write_bytes(b"no image")
    trained_folder(folder / "cranes", labels=("crane", "crane", "tench"))
    broken = build("with_teacher", small())
    broken.cls_classifier.bias.data[0] = float("nan")
    saved(broken, folder / "nan")
    for arguments, said in [
        (
            ("m", photo, "--target", "Ant"),
            "the model knows no class 'Ant'; it knows 'ant' and 'cat', among others; give",
        ),
        (("cranes", photo, "--target", "crane"), "the model calls 2 of its classes 'crane'"),
        (("convnet", photo), "a ConvNet can't be explained"),
        (("backbone", photo), "holds a DeiTModel without classes; expected a classifier"),
        (("m", folder / "bad.png"), f"{folder / 'bad.png'} is not an image"),
        (("m", folder / "none.png"), "none.png"),
        (("nothing", photo), "does not exist"),
        (("nan", photo), "not a number"),
        (("m", photo, "--device", "abacus"), "abacus"),
    ]:
        shown = run(capsys, folder / arguments[0], *arguments[1:], "--out", out, status=1)
        assert shown.err.startswith("deit explain: ")
        assert said in shown.err
        assert shown.out == ""
        assert out.read_bytes() == b"as it was"
    assert "ends in .png" in run(capsys, folder / "m", photo, "--out", folder / "x.jpg", status=1).err
    before = photo.read_bytes()
    assert "is the image itself" in run(capsys, folder / "m", photo, "--out", photo, status=1).err
    assert photo.read_bytes() == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_the_python_of_the_guide(folder, monkeypatch):
    monkeypatch.chdir(folder)
    [block] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {}
    exec(block.replace("runs/taught/model", "m").replace("photo.jpg", "photo.png"), names)
    assert names["maps"].keys() == names["drops"].keys() == names["scores"].keys() == {"class", "distillation"}
    assert names["better"].shape == (1,)
