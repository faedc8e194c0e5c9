"""`deit report`, and the reports of `deit train` and `deit eval`."""

import json
import re
import shlex
import shutil
from dataclasses import replace

import pytest
import torch
from support.models import trained_folder
from support.reports import QUIET, checked
from support.runs import photos, small_recipe

from deit.cli import main
from deit.data.folders import fingerprint, read_data, read_split
from deit.evaluate import alarms
from deit.evaluate.models import examine_files
from deit.recipe import Cosine, Data, MaskedImage, steps
from deit.report import document
from deit.train.loop import train


def test_training_ends_with_a_report(trained, capsys):
    run = trained / "run"
    page = checked((run / document.FILE).read_text())
    training, validation = read_data(trained / "data", holdout=0.1, seed=0)
    about = json.loads((run / "about.json").read_text())
    assert (about["train"], about["val"], about["fingerprint"]) == ([11] * 3, [1] * 3, fingerprint(training))
    assert about["precision"] == "float32"
    page.sees(f"Judged by 3 validation images in {trained / 'data'}", "15 steps", fingerprint(validation))
    assert len(page.all("img")) == 3 + 2 * 3  # and of each of the three what its one token looked at
    page.sees("What answers rest on", "as far as it supports the answer of the model")
    before = (run / document.FILE).read_text()
    (run / document.FILE).unlink()
    assert main(["report", str(run), "--device", "cpu"]) == 0  # finds the held-out images again
    assert capsys.readouterr().out.splitlines()[-1] == str(run / document.FILE)
    undated = [re.sub("Written [^.]* by|写于 [^。]*", "", text) for text in (before, (run / document.FILE).read_text())]
    assert undated[0] == undated[1]


def test_the_report_of_a_run_on_a_list_finds_its_images(tmp_path):
    photos(photos(tmp_path), split="val", count=2)
    files = sorted((tmp_path / "train").rglob("*.png")) + sorted((tmp_path / "val").rglob("*.png"))
    names = [file.relative_to(tmp_path).parts for file in files]
    lines = ["path,split,label", *(f"{'/'.join(parts)},{parts[0]},{parts[1]}" for parts in names)]
    (tmp_path / "all.csv").write_text("\n".join(lines))
    recipe = small_recipe(schedule=Cosine(total=steps(2)))
    train(recipe, *read_data(tmp_path / "all.csv", holdout=0.1, seed=0), tmp_path / "run", console=QUIET)
    assert main(["report", str(tmp_path / "run"), "--device", "cpu"]) == 0
    page = checked((tmp_path / "run" / document.FILE).read_text())
    page.sees(f"Judged by 6 validation images in {tmp_path / 'all.csv'}")


def test_a_report_on_other_images(trained):
    assert main(["report", str(trained / "run"), "--data", str(trained / "data"), "--device", "cpu"]) == 0
    page = checked((trained / "run" / document.FILE).read_text())
    page.sees("Judged by 18 test images", f"deit report {trained / 'run'} --data {trained / 'data'}")
    numbers = examine_files(trained / "run" / "model", trained / "data", device="cpu").main.report
    assert page.table("Accuracy of each head")[1][1] == f"{numbers.accuracy().value:.3f}"


def test_eval_writes_one_with_the_record_of_the_run(trained, capsys, tmp_path):
    plain = ["eval", str(trained / "run" / "model"), "--data", str(trained / "data"), "--device", "cpu", "--json"]
    assert main([*plain, "--report", str(tmp_path / "new" / "page.html")]) == 0
    found = json.loads(capsys.readouterr().out)
    page = checked((tmp_path / "new" / "page.html").read_text())
    page.sees("15 steps", f"{found['nll']:.4f}", "Learning rate", "Judged by 18 test images")
    trained_folder(tmp_path / "model", "plain", "abc")
    other = ["eval", str(tmp_path / "model"), *plain[2:], "--head", "class", "--crop-ratio", "0.7"]
    assert main([*other, "--report", str(tmp_path / "alone.html")]) == 0
    alone = checked((tmp_path / "alone.html").read_text())
    assert "Training" not in [heading[2] for heading in alone.all("h2")]
    [[_, _, command]] = alone.all("pre")  # repeats it as it was
    capsys.readouterr()
    for words in (other, [*shlex.split(command)[1:], "--device", "cpu", "--json"]):
        assert main(words) == 0
    first, again = capsys.readouterr().out.splitlines()
    assert json.loads(first) == json.loads(again)


def test_images_that_trained_the_model_are_known_for_it(trained, capsys, tmp_path):
    """On the terminal and on the page: all images of a folder of which the run held some out, but no test images."""
    page = tmp_path / "page.html"
    evaluated = ["eval", str(trained / "run" / "model"), "--device", "cpu", "--report", str(page), "--data"]
    for data, told in ((trained / "data" / "train", True), (trained / "data", False)):
        assert main([*evaluated, str(data)]) == 0
        assert (f"{alarms.trained_on_these()}\n" in capsys.readouterr().out) == told
        assert ("Warning: the model was trained on these images" in page.read_text()) == told
    assert main([*evaluated, str(trained / "data"), "--split", "train"]) == 0
    shown = capsys.readouterr().out
    assert str(alarms.judged_by("train")[0]) in shown
    assert str(alarms.trained_on_these()) not in shown


def test_a_page_that_can_not_be_written_costs_no_evaluation(trained, capsys, tmp_path, monkeypatch):
    command = ["eval", str(trained / "run" / "model"), "--data", str(trained / "data"), "--device", "cpu", "--json"]
    monkeypatch.setattr("deit.report.document.write", lambda *_, **__: (_ for _ in ()).throw(OSError("no space left")))
    assert main([*command, "--report", str(tmp_path / "page.html")]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["images"] == 18
    assert shown.err.splitlines()[-1] == "deit eval: no space left"
    monkeypatch.setattr("deit.evaluate.models.examine_files", lambda *_, **__: pytest.fail("evaluated"))
    assert main([*command, "--report", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"expected a file after --report, found the folder {tmp_path}; give a name in it, like {tmp_path}" in said


def test_training_without_test_images_ends_with_the_way_to_some(trained, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = f"{trained / 'recipes.py'}:short"
    photos(tmp_path / "my photos", count=12)
    assert main(["train", recipe, "--data", "my photos", "--out", "one", "--device", "cpu"]) == 0
    said = capsys.readouterr().err
    assert "my photos has no test images. The validation images chose the model" in said
    [command] = re.findall(r"`deit (split [^`]*)`", said)
    assert main(shlex.split(command)) == 0
    [data] = re.findall(r"train again with --data ('[^']*')", said)
    [data] = shlex.split(data)
    assert data == "my photos.csv"
    assert main(["train", recipe, "--data", data, "--out", "two", "--device", "cpu"]) == 0
    assert "no test images" not in capsys.readouterr().err
    assert main(["eval", "two/model", "--data", data, "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["data"]["split"]) == (3, "test")


def test_a_report_that_fails_is_a_warning(trained, capsys, monkeypatch):
    monkeypatch.setattr("deit.report.document.write", lambda *_, **__: (_ for _ in ()).throw(OSError("no space left")))
    out = trained / "again"
    assert (
        main(
            [
                "train",
                f"{trained / 'recipes.py'}:short",
                "--data",
                str(trained / "data"),
                "--out",
                str(out),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    shown = capsys.readouterr()
    assert f"{out / 'model'}: accuracy" in shown.out
    assert f"its report is not written (no space left); run `deit report {out}`" in shown.err


def test_images_that_are_gone_or_cost_too_much(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "run", tmp_path / "run")
    about = json.loads((tmp_path / "run" / "about.json").read_text())
    (tmp_path / "run" / "about.json").write_text(json.dumps({**about, "data": str(tmp_path / "gone")}))
    assert main(["report", str(tmp_path / "run"), "--device", "cpu"]) == 0
    checked((tmp_path / "run" / document.FILE).read_text()).sees("images were not evaluated", "is not a folder")
    (tmp_path / "run" / "about.json").write_text(json.dumps({**about, "val": [2, 1, 1]}))
    assert main(["report", str(tmp_path / "run"), "--device", "cpu"]) == 0
    checked((tmp_path / "run" / document.FILE).read_text()).sees("are not those of the run any more")
    shutil.copytree(trained / "data" / "train", tmp_path / "bad" / "val")
    for file in (tmp_path / "bad").rglob("*.png"):
        file.write_bytes(b"no image")
    split = replace(read_split(tmp_path / "bad", "val"), files=(file,), labels=(0,))
    checked(document.of_training(tmp_path / "run", split).read_text()).sees("1 found, none can be read")
    monkeypatch.setattr("deit.report.document.examine_split", lambda *_, **__: pytest.fail("evaluated"))
    split = read_split(trained / "data", "train")
    checked(document.of_training(tmp_path / "run", split).read_text()).sees("was not evaluated again")


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "holds no run (neither recipe.json nor metrics.jsonl)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "recipe.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 1
    assert f"give one of the runs in it: {tmp_path / 'teacher'}" in capsys.readouterr().err


def test_masked_images_show_their_reconstruction(tmp_path):
    photos(tmp_path / "data", count=4)
    recipe = small_recipe(MaskedImage(unit=8), data=Data(batch=4), schedule=Cosine(total=steps(2)))
    splits = read_data(tmp_path / "data", holdout=0.3, seed=0, labelled=False)
    train(recipe, *splits, tmp_path / "run", device="cpu", console=QUIET)
    page = checked(document.of_training(tmp_path / "run", splits[1], device="cpu").read_text())
    page.sees("has no classes to judge", "loss on validation images")
    [image] = page.all("img")
    assert "update-000000002.png" in image[1]["alt"]


def test_resuming_keeps_the_date(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    about = json.loads((tmp_path / "run" / "about.json").read_text())
    (tmp_path / "run" / "about.json").write_text(json.dumps({**about, "began": "2020-01-01T00:00:00+00:00"}))
    assert (
        main(
            [
                "train",
                f"{trained / 'recipes.py'}:short",
                "--data",
                str(trained / "data"),
                "--out",
                str(tmp_path / "run"),
                "--device",
                "cpu",
                "--resume",
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "run" / "about.json").read_text())["began"] == "2020-01-01T00:00:00+00:00"
    assert torch.__version__ in (tmp_path / "run" / document.FILE).read_text()
