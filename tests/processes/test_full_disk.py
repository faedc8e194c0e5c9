"""A full disk ends every command with a sentence, and what was finished before stays."""

import errno
import os
import shutil
import subprocess

import pytest
from safetensors.torch import load_file
from support.checks import raises_saying
from support.runs import assert_same_end, finish, model_data_and_recipes, reached, start

from deit import files


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return model_data_and_recipes(tmp_path_factory.mktemp("full"))


@pytest.fixture
def disk(tmp_path):
    """A disk of 400 KiB, and a function that leaves so many KiB of it free."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "none", place], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("this machine mounts no small disk")

    def leave(free):
        (place / "fill").unlink(missing_ok=True)
        left = os.statvfs(place)
        with (place / "fill").open("wb") as fill:
            fill.write(bytes(max(0, left.f_bavail * left.f_frsize - free * 1024)))

    yield place, leave
    subprocess.run(["umount", place], check=True)


LATER = """
import shutil
from types import SimpleNamespace
shutil.disk_usage = lambda path: SimpleNamespace(free=2**40)
"""
"""A module `sitecustomize` that lets a disk seem empty, as it is if others fill it after a command has looked."""


@pytest.fixture
def fills_later(tmp_path):
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "sitecustomize.py").write_text(LATER)
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path / "later"), os.environ.get("PYTHONPATH")]))}


COMMANDS = {
    "train": "train RECIPES:student --data DATA --out OUT",
    "teach": "teach DATA --teacher MODEL --recipe RECIPES:taught --epochs 100 --out OUT",
    "predict": "predict MODEL DATA/train --json OUT.jsonl --engine torch",
    "csv": "predict MODEL DATA/train --csv OUT.csv --engine torch",
    "explain": "explain MODEL DATA/train/a/0.png --out OUT.png",
    "hf": "convert MODEL --to hf --out OUT",
    "timm": "convert MODEL --to timm --out OUT",
    "original": "convert MODEL --to original --out OUT",
    "torch": "export MODEL --to torch --out OUT",
    "onnx": "export MODEL --to onnx --out OUT",
    "openvino": "export MODEL --to openvino --out OUT",
}


@pytest.mark.slow
@pytest.mark.parametrize("free", [0, 8, 50])
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("later", [False, True], ids=["before", "later"])
def test_every_command_says_it(given, disk, fills_later, name, free, later):
    place, leave = disk
    if later and name not in ("train", "teach"):
        pytest.skip("looks at no disk before")
    command = COMMANDS[name]
    for key, value in {**given, "OUT": place / "out"}.items():
        command = command.replace(key, str(value))
    leave(free)
    process = start(*command.split(), **(fills_later if later else {}))
    output, _ = process.communicate(timeout=240)
    if process.returncode == 0:
        assert free
        return
    assert process.returncode == 1, output
    said = output.splitlines()[-1]
    assert said.startswith(f"deit {command.split()[0]}: {place}"), said
    assert "can't be written (No space left on device" in said
    assert "free space, then" in said
    assert "Traceback" not in output
    assert list(place.rglob(".*")) == []


@pytest.mark.slow
def test_a_run_goes_on_when_there_is_space_again(given, disk, fills_later, tmp_path, record_property):
    """Wherever the disk was full: at the first model, at a checkpoint, at a row of metrics."""
    place, leave = disk
    often = ("--set", "compute.save_minutes=0", "--resume")
    command = ("train", f"{given['RECIPES']}:student", "--data", given["DATA"], "--out")
    finish(start(*command, tmp_path / "whole", *often))
    reasons, steps = set(), []
    for free in (20, 90, 270, 290, 310):
        leave(free)
        output = finish(start(*command, place / "run", *often, **fills_later), 1)
        reasons.add(output.splitlines()[-1].partition(" can't be written")[0].rpartition("/")[2].partition("-")[0])
        steps.append(reached(place / "run"))
        assert load_file(place / "run/model/model.safetensors") if free > 90 else True
    record_property("attacks", len(steps))
    assert {"model.safetensors", "step"} <= reasons
    assert steps == sorted(steps)
    (place / "fill").unlink()
    shutil.move(place / "run", tmp_path / "run")
    finish(start(*command, tmp_path / "run", *often))
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_run_that_can_not_reach_its_end_is_refused(given, disk):
    """A checkpoint of the model takes about 270 KiB, the model 70."""
    place, leave = disk
    leave(200)
    command = ("train", f"{given['RECIPES']}:student", "--data", given["DATA"], "--out", place / "run")
    output = finish(start(*command), 1)
    assert "No space left on device: the run needs at least" in output.splitlines()[-1]
    assert not (place / "run" / "model").exists()
    (place / "fill").unlink()
    finish(start(*command))  # the same command again


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_the_file_of_before_stays(tmp_path, monkeypatch, number, call):
    files.write_text(tmp_path / "a", "before")

    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*(os, "fsync") if call == "fsync" else (type(tmp_path), "replace"), full)
    with raises_saying(files.DiskFull, f"{tmp_path / 'a'} can't be written ({os.strerror(number)})", "free space"):
        files.write_text(tmp_path / "a", "after")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "before")]
