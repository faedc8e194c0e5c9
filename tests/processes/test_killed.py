"""Killed at random moments, work goes on to the same end."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from support.models import trained_folder
from support.runs import assert_same_end, data_and_recipes, finish, photos, reached, running, start


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    data, recipes = data_and_recipes(root)
    photos(root / "many", count=1500, size=64)
    return trained_folder(root / "model", labels="abc"), data, recipes, root / "many/train"


def commands(given, out):
    model, data, recipes, many = given
    often = ("--set", "compute.save_minutes=0", "--set", "compute.workers=1", "--set", "schedule.total=steps(1200)")
    return {
        "train": ("train", f"{recipes}:student", "--data", data, "--out", out / "run", *often, "--resume"),
        "predict": ("predict", model, many, "--json", out / "rows.jsonl", "--engine", "torch"),
        "export": ("export", model, "--to", "torch", "--out", out / "export"),
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "kills"), [("train", 20), ("predict", 15), ("export", 15)])
def test_killed_at_any_moment(given, tmp_path, name, kills, record_property):
    """By SIGKILL, anywhere between its first import and its end. Nothing half done is left at the end."""
    draw = random.Random(name)
    began = time.monotonic()
    finish(start(*commands(given, tmp_path / "whole")[name]))
    took = min(5.0, time.monotonic() - began)
    command = commands(given, tmp_path / "killed")[name]
    killed = done = 0
    while killed < kills:
        process = start(*command)
        try:
            process.communicate(timeout=took * draw.uniform(0.3, 1.0))
            done += 1
            if name == "train":
                break
            if name == "predict":
                (tmp_path / "killed/rows.jsonl").unlink(missing_ok=True)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            killed += 1
    if not (name == "predict" and (tmp_path / "killed/rows.jsonl").exists()):
        finish(start(*command))
    record_property("attacks", killed)
    record_property("said", f"`deit {name}` killed {killed} times, ended {done} times by itself")
    whole, out = tmp_path / "whole", tmp_path / "killed"
    if name == "train":
        assert_same_end(out / "run", whole / "run")
    elif name == "predict":
        assert (out / "rows.jsonl").read_bytes() == (whole / "rows.jsonl").read_bytes()
    else:
        ours, theirs = (json.loads((place / "export/export.json").read_text()) for place in (out, whole))
        assert ours["agreement"] == theirs["agreement"]
        assert {path.name for path in (out / "export").iterdir()} == {
            path.name for path in (whole / "export").iterdir()
        }
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert list(out.rglob(".*")) == []


def test_a_killed_loader_costs_nothing(given, tmp_path):
    """The run says it, saves the state before the lost batch, and goes on from there to the same end."""
    _, data, recipes, _ = given
    command = ("train", f"{recipes}:student", "--data", data, "--out")
    finish(start(*command, tmp_path / "whole"))
    loaders = ("--set", "compute.workers=2", "--set", "compute.save_minutes=100")
    process = start(*command, tmp_path / "run", *loaders)
    while not (tmp_path / "run/metrics.jsonl").exists() or not (tmp_path / "run/metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    for number, parent in running(tmp_path / "run").items():
        if parent == process.pid:
            os.kill(number, signal.SIGKILL)
            break
    output = finish(process, 1)
    step = reached(tmp_path / "run")
    assert step >= 15
    assert "deit train: a loader process died" in output
    assert f"the state after step {step} is saved, continue with --resume" in output
    assert "Traceback" not in output
    finish(start(*command, tmp_path / "run", *loaders, "--resume"))
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["predict", "export"])
def test_a_limit_of_memory_is_a_sentence(given, tmp_path, name):
    """Too little for the work, and enough to start."""
    limit = 6 * 2**20
    script = (
        "import resource, sys, threading\n"
        "from deit.predict.predictor import Predictor\n"
        "import deit.cli.command, deit.predict.bulk, deit.export.write, torch, torch.export\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (used + {limit},) * 2)\n"
        "sys.exit(deit.cli.main(sys.argv[1:]))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, *map(str, commands(given, tmp_path)[name])],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
        check=False,
    )
    assert process.returncode == 1, process.stderr
    assert process.stderr.splitlines()[-1].startswith(f"deit {name}: "), process.stderr
    assert "Traceback" not in process.stderr
