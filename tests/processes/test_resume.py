"""Stopped anywhere, a run goes on to the same end, bit by bit."""

import json
import os
import random
import signal
import time

import pytest
from support.runs import (
    assert_same_end,
    data_and_recipes,
    finish,
    kill,
    metrics,
    reached,
    start,
    wait_for,
)

OFTEN = ("--set", "compute.save_minutes=0", "--resume")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Data, the file of recipes, and a run that nothing stopped."""
    root = tmp_path_factory.mktemp("resume")
    data, recipes = data_and_recipes(root)
    finish(start("train", f"{recipes}:student", "--data", data, "--out", root / "whole"))
    assert reached(root / "whole") == 96
    return data, recipes, root / "whole"


def command(given, out, *more):
    return ("train", f"{given[1]}:student", "--data", given[0], "--out", out, *OFTEN, *more)


def test_killed_again_and_again(given, tmp_path):
    """SIGKILL ten times at random moments, each time with another number of loader processes than before."""
    draw = random.Random(0)
    out = tmp_path / "run"
    kills = 0
    while True:
        workers = ("--set", f"compute.workers={(0, 2, 1)[kills % 3]}")
        process = start(*command(given, out, *workers))
        if kills == 10 or not wait_for(out, reached(out) + draw.randint(1, 3), process):
            break
        time.sleep(draw.random() * 0.05)
        kill(process, out)
        kills += 1
    finish(process)
    assert kills == 10
    assert_same_end(out, given[2])


def test_a_pack_goes_on_where_its_folder_was_killed(given, tmp_path):
    """The bytes, their order and the fingerprint are those of the folder."""
    finish(start("pack", given[0], "--out", tmp_path / "pack"))
    process = start(*command(given, tmp_path / "run"))
    assert wait_for(tmp_path / "run", 20, process)
    kill(process, tmp_path / "run")
    finish(start(*command((tmp_path / "pack", *given[1:]), tmp_path / "run", "--set", "compute.workers=2")))
    assert_same_end(tmp_path / "run", given[2])


def test_augmentation_on_the_device_goes_on(given, tmp_path):
    """With other loader processes than before."""
    here, out = ("--set", "augment.on=device"), tmp_path / "run"
    finish(start(*command(given, tmp_path / "whole", *here)))
    process = start(*command(given, out, *here, "--set", "compute.workers=2"))
    assert wait_for(out, 20, process)
    kill(process, out)
    finish(start(*command(given, out, *here, "--set", "compute.workers=1")))
    assert_same_end(out, tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends(given, tmp_path, number, code):
    """Between two checkpoints: what is saved is the moment of the signal."""
    out = tmp_path / "run"
    process = start(
        "train",
        f"{given[1]}:student",
        "--data",
        given[0],
        "--out",
        out,
        "--set",
        "compute.workers=1",
        "--set",
        "compute.save_minutes=100",
    )
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(number)
    output = finish(process, code)
    step = reached(out)
    assert 15 <= step < 96
    assert f"stopped by {signal.Signals(number).name} after step {step} of 96; the state is saved" in output
    assert "Traceback" not in output
    finish(start(*command(given, out)))
    assert_same_end(out, given[2])


def test_two_processes_do_not_share_a_run(given, tmp_path):
    """The second one is refused, resumed or not, alone or many; the first one ends as it would."""
    out = tmp_path / "run"
    process = start(*command(given, out, "--set", "compute.workers=1"))
    assert wait_for(out, 2, process)
    os.kill(process.pid, signal.SIGSTOP)  # or it might end meanwhile
    said = f"{out} is being written by another process (process {process.pid} on"
    assert said in finish(start(*command(given, out)), 1)
    assert said in finish(start(*command(given, out)[:6]), 1)
    assert said in finish(start(*command(given, out), processes=2), 1)
    os.kill(process.pid, signal.SIGCONT)
    finish(process)
    assert_same_end(out, given[2])
    assert not (out / ".lock").exists()


def test_what_a_killed_run_left_is_removed(given, tmp_path):
    out = tmp_path / "run"
    left = [out / name for name in ("checkpoints/.step-000000001.safetensors.0123abcd", "model/.config.json.0123abcd")]
    for path in left:
        path.parent.mkdir(parents=True)
        path.write_text("half")
    finish(start(*command(given, out)))
    assert not any(path.exists() for path in left)


def test_a_damaged_checkpoint_costs_its_steps_only(given, tmp_path):
    out = tmp_path / "run"
    process = start(*command(given, out))
    assert wait_for(out, 20, process)
    kill(process, out)
    newest = sorted((out / "checkpoints").glob("step-*"))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    output = finish(start(*command(given, out)))
    assert f"{newest} is damaged" in output
    assert "resuming from an earlier one" in output
    assert_same_end(out, given[2])


def test_what_is_refused(given, tmp_path):
    """Another run's folder, another recipe, other images; and a finished run has nothing left to do."""
    whole = given[2]
    before = metrics(whole)
    plain = ("train", f"{given[1]}:student", "--data", given[0], "--out", whole)
    assert f"{whole} already holds a run; continue it with --resume" in finish(start(*plain), 1)
    changed = finish(start(*plain, "--resume", "--set", "optim.lr=0.5"), 1)
    assert "optim.lr is 0.01 there and 0.5 here" in changed
    other, _ = data_and_recipes(tmp_path)
    (other / "train" / "a" / "6.png").unlink()
    assert "not those that the run began with" in finish(
        start("train", f"{given[1]}:student", "--data", other, "--out", whole, "--resume"), 1
    )
    finish(start("train", whole / "recipe.json", "--data", given[0], "--out", whole, "--resume"))
    assert metrics(whole) == before


def test_the_record_trains_again(given, tmp_path):
    """RUN/recipe.json is the run: trained from, it gives the same weights."""
    finish(start("train", given[2] / "recipe.json", "--data", given[0], "--out", tmp_path / "again"))
    assert json.loads((tmp_path / "again" / "recipe.json").read_text()) == json.loads(
        (given[2] / "recipe.json").read_text()
    )
    assert_same_end(tmp_path / "again", given[2])
