"""The command as a person types it."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from support.models import trained_folder

from deit import __version__
from deit.cli import main
from deit.cli.arguments import parser
from deit.cli.verbs import BY_NAME
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


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_threads_that_wait_sleep_soon(given, spins):
    """What OpenMP reads when PyTorch is loaded is set before, unless the user has decided."""
    code = (
        "import os, sys; from deit.cli import main; main(['recipes']); "
        "print(os.environ.get('GOMP_SPINCOUNT'), file=sys.stderr)"
    )
    rest = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=rest | given)
    assert done.stderr.split()[-1] == spins


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
    assert parser().parse_args(given).time == pytest.approx(minutes)


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


def test_every_verb_runs_something():
    [verbs] = [action for action in parser()._actions if action.dest == "verb"]
    assert set(verbs.choices) == set(BY_NAME)


def test_the_options_of_train_do_not_grow():
    """A new knob is a field of the recipe: --set reaches it."""
    [verbs] = [action for action in parser()._actions if action.dest == "verb"]
    options = {action.dest for action in verbs.choices["train"]._actions}
    assert options == {"help", "recipe", "data", "out", "settings", "device", "resume", "time"}


def run(*arguments, **options):
    """The command in a process of its own."""
    environment = {**os.environ, **options.pop("environment", {})}
    return subprocess.run(
        [sys.executable, "-m", "deit", *map(str, arguments)],
        capture_output=True,
        check=False,
        env=environment,
        **options,
    )


@pytest.mark.parametrize("form", [(), ("--csv",), ("--json",)])
def test_a_name_that_the_console_lacks_is_escaped(folder, form):
    for name in ("猫.png", "é.png", "z.png"):
        (folder / name).write_bytes((folder / "0.png").read_bytes())
    images = [folder / name for name in ("猫.png", "é.png", "z.png")]
    done = run("predict", folder / "m", *images, *form, environment={"PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode("cp1252").splitlines()[1 if form == ("--csv",) else 0 :]
    if form == ("--json",):
        assert [json.loads(line)["image"] for line in lines] == list(map(str, images))
    else:
        names = [re.split("[:,]", line)[0] for line in lines]
        assert names == [str(folder / name) for name in ("\\u732b.png", "é.png", "z.png")]


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of Windows report this otherwise")
@pytest.mark.parametrize("arguments", [("recipes",), ("predict", "--json")])
def test_a_reader_that_goes_away_is_no_error(folder, arguments):
    """As `head` does: before the first line, and after it."""
    command = [sys.executable, "-m", "deit", arguments[0]]
    if arguments[0] == "predict":
        command += [str(folder / "m"), *[str(folder / "0.png")] * 3000, "--engine", "torch", *arguments[1:]]
    for lines in (0, 1):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(lines):
            process.stdout.readline()
        process.stdout.close()
        assert process.wait() in ((141,) if lines == 0 or arguments[0] == "predict" else (0, 141))
        assert process.stderr.read() == b""
        process.stderr.close()


def test_other_broken_pipes_are_errors(folder, capsys, monkeypatch):
    def broken(*_, **__):
        raise BrokenPipeError(32, "Broken pipe", "elsewhere")

    monkeypatch.setattr("deit.export.convert.convert", broken)
    assert main(["convert", str(folder / "m"), "--to", "hf", "--out", str(folder / "out")]) == 1
    assert "deit convert: [Errno 32] Broken pipe: 'elsewhere'" in capsys.readouterr().err


def test_a_panorama_is_read_without_a_word(folder):
    Image.new("1", (18_000, 5_000)).save(folder / "wide.png")
    done = run("predict", folder / "m", folder / "wide.png")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().startswith(f"{folder / 'wide.png'}: ")
    done = run("predict", folder / "m", folder / "wide.png", environment={"PYTHONWARNINGS": "error"})
    assert done.returncode == 1
    assert b"is too large for Pillow" in done.stderr


@pytest.mark.parametrize("verb", ["eval", "calibrate", "export"])
def test_what_is_passed_over_is_one_line(folder, verb):
    data = folder / "data"
    for name in ("a/0.heic", "b/0.heic"):
        (data / name).parent.mkdir(parents=True)
        (data / name).write_bytes(b"-")
        (data / name).with_suffix(".png").write_bytes((folder / "0.png").read_bytes())
    options = {
        "eval": ["--data", data],
        "calibrate": ["--data", data, "--error-rate", "0.9"],
        "export": ["--to", "torch", "--calibrate", data, "--out", folder / "out"],
    }
    lines = run(verb, folder / "m", *options[verb]).stderr.decode().splitlines()
    assert [line for line in lines if "passed over" in line] == [
        f"deit {verb}: {data}: 2 files were passed over, because they are no images that Pillow reads: 2 .heic"
    ]
    assert not [line for line in lines if "warnings.warn" in line or "UserWarning" in line]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_named_pipe_in_a_folder_holds_nothing_up(folder):
    (folder / "photos").mkdir()
    (folder / "photos" / "a.png").write_bytes((folder / "0.png").read_bytes())
    os.mkfifo(folder / "photos" / "b.png")
    done = run("predict", folder / "m", folder / "photos", timeout=120)
    assert done.returncode == 1
    assert done.stdout.decode().startswith(f"{folder / 'photos' / 'a.png'}: ")
    assert (
        f"deit predict: {folder / 'photos' / 'b.png'} is a named pipe, expected a regular file" in done.stderr.decode()
    )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("./gone/model", "teacher ./gone/model: ./gone/model does not exist; give an existing folder, or a hub name"),
        ("timm:gone", "teacher timm:gone: 'gone' is neither a timm model nor a folder"),
        ("timm:resnet18:gone.pth", "teacher timm:resnet18:gone.pth: there is no file gone.pth"),
        ("gone.py:teacher", "teacher gone.py:teacher: there is no file gone.py"),
        ("gone/model", "teacher gone/model: model.safetensors of gone/model is not in the local cache"),
    ],
)
def test_a_teacher_that_is_not_there_is_noticed_first(tmp_path, capsys, name, sentence):
    """Before the images are looked for, which are not there either."""
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    out = ["--data", str(tmp_path / "no images"), "--out", str(tmp_path / "run")]
    assert main(["train", "digits", *out, "--set", f"objective.teacher={name}"]) == 1
    assert capsys.readouterr().err.startswith(f"deit train: {sentence}")
    assert main(["teach", out[1], "--teacher", name, "--recipe", "digits", "--epochs", "1", *out[2:]]) == 1
    assert capsys.readouterr().err.startswith(f"deit teach: {sentence}")
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_is_not_there_is_noticed_first(tmp_path, capsys):
    out = ["--data", str(tmp_path / "no images"), "--out", str(tmp_path / "run")]
    assert main(["train", "deit_base_384", *out]) == 1
    [sentence] = capsys.readouterr().err.splitlines()
    assert sentence.startswith("deit train: the recipe starts from facebook/deit-")
    assert sentence.endswith("set it with --set start=FOLDER, or train from scratch with --set start=none")
    assert list(tmp_path.iterdir()) == []


def test_lack_of_memory_is_a_sentence(monkeypatch, capsys):
    def failing(*_, **__):
        raise MemoryError

    monkeypatch.setattr("deit.recipes.shipped", failing)
    assert main(["recipes"]) == 1
    assert capsys.readouterr().err.startswith("deit recipes: expected more free memory than this process may have")
