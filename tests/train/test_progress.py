"""What a person sees of a run: before its first step, on the way in any terminal, and in a log file."""

import math
import os
import re
import signal
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from support.checks import raises_saying
from support.runs import photos, small_recipe
from support.terminals import Screen, in_terminal

from deit import files, machine
from deit.data.folders import read_data
from deit.recipe import Compute, Cosine, Data, epochs, steps
from deit.train import checkpoint, forecast, progress, runs, train
from deit.train.loop import Stopped
from deit.train.records import amount

QUIET = Console(quiet=True)
RECIPE = small_recipe(schedule=Cosine(total=steps(30)), evaluate=steps(10), ema=0.9)
CPU = machine.Processes(torch.device("cpu"))

SHOWN = """
import time, torch
from pathlib import Path
from rich.console import Console
from deit.machine import Processes
from deit.train.progress import Reporter
from support.runs import small_recipe
import tempfile

out = Path(tempfile.mkdtemp())
recipe = small_recipe(name="flowers [red]")
us = Processes(torch.device("cpu"))
with Reporter(out, recipe, us, None, done=0, total=300, written=0, every=100) as reporter:
    for step in range(1, 301):
        reporter.advance(step, {"loss": 1 - step / 1000, "accuracy": step / 1000}, 0.5, 0.1)
        if step % 100 == 0:
            reporter.judged(2.0)
            reporter.row({"step": step, "epoch": step / 100, "val_accuracy": step / 400})
            reporter.say(f"a sentence after step {step}")
            time.sleep(0.15)
"""


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_bar_fits_into_the_terminal(width):
    screen = Screen(width).feed(in_terminal(SHOWN, width, PYTHONPATH=os.pathsep.join(["src", "tests"])))
    said = [line for line in screen.lines if line.startswith("a sentence")]
    assert said == [f"a sentence after step {step}" for step in (100, 200, 300)]  # nothing overwrites them
    text = "\n".join(screen.lines)
    assert "300/300" in text
    assert "flowers [red] ━" in text
    assert "loss 0.700  accuracy 0.300  val 0.750" in text
    assert ("images/s  0." in text.splitlines()[-1]) == (width > 40)
    assert text.count("300/300") == 1  # what was shown before is gone
    assert screen.wrapped == {40: 2, 80: 1, 200: 0}[width]  # the sentence about the time, and nothing else
    on_the_way = {line.strip() for frame in screen.frames for line in frame if "100/300" in line}
    assert any("2 min left" in line for line in on_the_way), on_the_way  # 200 steps of 0.5 s, 2 evaluations of 2 s
    last = [line for line in screen.lines if line.strip()][-1]
    alone = width > 80
    assert ("300/300" in last) == alone  # in one line, or numbers below the bar


def test_a_file_holds_no_control_characters(tmp_path):
    with open(tmp_path / "log", "w") as file:
        console = Console(file=file)
        with progress.Reporter(tmp_path, RECIPE, CPU, console, done=0, total=40, written=0, every=10) as reporter:
            reporter.say("a name with \x1b[31m in it")
            for step in range(1, 41):
                reporter.advance(step, {"loss": 1.0, "accuracy": 0.5}, 60.0, 0.0)
                if step % 10 == 0:
                    reporter.judged(600.0)
                    reporter.row({"step": step, "epoch": 1.0, "val_accuracy": 0.5})
                elif step % 5 == 0:
                    reporter.row({"step": step, "epoch": 1.0})
    text = (tmp_path / "log").read_text()
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    lines = text.splitlines()
    assert lines[1].startswith("30 steps of 8 images to go: about 30 min at 0 images/s, evaluation not counted; ")
    assert lines[1].endswith(" GiB of memory so far")
    told = [line for line in lines if line.startswith("small: epoch 1, step ")]
    assert len(told) == 4  # a line for each evaluation, none for the other rows
    assert "step 10 of 40: loss 1.000  accuracy 0.500  val 0.500  " in told[0]
    assert [line.rpartition("about ")[2] for line in told[:3]] == ["60 min left", "40 min left", "20 min left"]
    assert "left" not in told[3]


def test_a_terminal_that_moves_no_cursor_gets_lines(tmp_path):
    with open(tmp_path / "log", "w") as file:
        console = Console(file=file, force_terminal=True, _environ={"TERM": "dumb"})
        with progress.Reporter(tmp_path, RECIPE, CPU, console, done=0, total=40, written=0) as reporter:
            reporter.row({"step": 10, "epoch": 1.0, "val_accuracy": 0.5})
    assert "step 10 of 40: val 0.500" in (tmp_path / "log").read_text()


def evaluations(total, every, step):
    """Counted one by one, as the loop does them."""
    return sum(1 for now in range(step + 1, total + 1) if now == total or int(now / every) > int((now - 1) / every))


@pytest.mark.parametrize(("total", "every"), [(30, 10), (31, 10), (29, 10), (7, 2.5), (5, 100), (10, 1), (9, math.inf)])
def test_the_time_left_counts_steps_and_evaluations(tmp_path, total, every):
    with progress.Reporter(tmp_path, RECIPE, CPU, QUIET, done=0, total=total, written=0, every=every) as reporter:
        reporter.rate = RECIPE.data.batch / 3.0  # 3 seconds for a step
        for step in range(total + 1):
            reporter.judging = None
            assert reporter.left(step) == pytest.approx(3.0 * (total - step))
            reporter.judged(100.0)
            assert reporter.left(step) == pytest.approx(3.0 * (total - step) + 100.0 * evaluations(total, every, step))
        reporter.until = time.perf_counter() + 1.0
        assert reporter.left(0) <= 1.0


# ------------------------------------------------------------------------------------------------ before the first step


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return read_data(photos(photos(tmp_path_factory.mktemp("d")), split="val", count=3), holdout=0.1, seed=0)


def said_by(tmp_path, splits, recipe, **options):
    with open(tmp_path / "said", "w") as file:
        run = train(recipe, *splits, tmp_path / "run", device="cpu", console=Console(file=file, width=1000), **options)
    return run, (tmp_path / "said").read_text().splitlines()


def test_a_stop_says_how_a_program_goes_on(splits, tmp_path):
    """It has no --resume."""

    class Stopping:
        def begin(self, out, recipe, step):
            pass

        def row(self, numbers):
            os.kill(os.getpid(), signal.SIGTERM)

        def close(self, finished):
            pass

    with pytest.raises(Stopped):
        said_by(tmp_path, splits, RECIPE, receivers=[Stopping()])
    said = (tmp_path / "said").read_text()
    assert "stopped by SIGTERM after step " in said
    assert "; the state is saved, resume=True continues it" in said
    assert "--resume" not in said


def test_a_run_says_first_what_it_will_take(splits, tmp_path):
    _, lines = said_by(tmp_path, splits, replace(RECIPE, data=Data(batch=7)))
    assert lines[0] == "small: 30 steps of 7 images, 10 epochs of 21 images, and 3 evaluations on 9 others"
    saved = checkpoint.saved(tmp_path / "run" / "checkpoints")[-1].stat().st_size
    model = (tmp_path / "run" / "model" / "model.safetensors").stat().st_size
    told = lines[1].replace("a checkpoint takes ", "").replace("the model ", "").partition(";")[0].split(", ")
    for text, written in zip(told, (saved, model), strict=True):
        number, unit = text.split()
        assert unit == "KiB"
        assert float(number) * 1024 == pytest.approx(written, rel=0.1)  # a file has a header too
    assert "that are free on the disk" in lines[1]
    _, lines = said_by(tmp_path, splits, replace(RECIPE, data=Data(batch=7)), resume=True)
    assert lines[1].startswith("goes on after step 30, which took ")
    (tmp_path / "one").mkdir()
    _, lines = said_by(tmp_path / "one", splits, replace(RECIPE, data=Data(batch=7), schedule=Cosine(total=epochs(1))))
    assert lines[0].startswith("small: 3 steps of 7 images, 1 epoch of 21 images, and 1 evaluation on ")


def test_under_a_budget_it_says_what_was_assumed(splits, tmp_path):
    _, lines = said_by(tmp_path, splits, replace(RECIPE, schedule=Cosine(total=steps(20_000))), minutes=6 / 60)
    assert lines[0].startswith("a step takes about ")
    assert " s and an evaluation " in lines[0]
    assert re.search(r"of the recipe's 20000 steps fit into 6 s; all of them would take about \d+ (s|min)$", lines[0])
    assert (
        lines[1].split(" steps of 8 images, ")[0].replace(",", "") == "small: " + lines[0].split(", so ")[1].split()[0]
    )


def work_of(recipe, splits):
    return runs.prepare(recipe, *splits, CPU, None)[0]


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_the_room_that_a_run_needs(splits, tmp_path, monkeypatch, average):
    """Weights, AdamW's two moments and its count for each tensor, and the average."""
    work = work_of(replace(RECIPE, ema=average), splits)
    model = sum(value.numel() * 4 for value in work.model.state_dict().values())
    trained = [value for value in work.model.parameters() if value.requires_grad]
    state = model + sum(2 * 4 * value.numel() + 4 for value in trained)
    state += sum(4 * value.numel() for value in trained) if average else 0
    monkeypatch.setattr(files, "free_bytes", lambda _: 10 * state)
    room = forecast.Room.of(work, tmp_path)
    assert (room.model, room.state) == (model, state)
    assert (room.least, room.most) == (state + model, 3 * state + 2 * model)
    (tmp_path / "checkpoints").mkdir()
    for step in range(2):
        (tmp_path / "checkpoints" / f"step-{step:09}.safetensors").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").touch()
    room = forecast.Room.of(work, tmp_path)
    assert (room.least, room.most) == (state, state + model)
    assert str(room).endswith(f"at most {amount(room.most)} of the {amount(10 * state)} that are free on the disk")
    monkeypatch.setattr(files, "free_bytes", lambda _: room.most - 2048)
    assert "warning: " in str(forecast.Room.of(work, tmp_path))
    assert "Free 2 KiB more" in str(forecast.Room.of(work, tmp_path))


def test_a_run_that_the_disk_can_not_hold_is_refused_before_it_begins(splits, tmp_path, monkeypatch):
    room = forecast.Room.of(work_of(RECIPE, splits), tmp_path)
    monkeypatch.setattr(files, "free_bytes", lambda _: room.least - 1)
    with raises_saying(
        OSError, tmp_path / "run", "can't be written (No space left on device: the run needs at least",
        amount(room.least), "are free", "free space, then give the same command again",
    ):  # fmt: skip
        said_by(tmp_path, splits, RECIPE)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    monkeypatch.setattr(files, "free_bytes", lambda _: room.least)
    _, lines = said_by(tmp_path, splits, RECIPE)  # the same command again
    assert lines[1].startswith("warning: a checkpoint takes")


def test_a_short_run_has_no_estimate(splits, tmp_path):
    _, lines = said_by(tmp_path, splits, replace(RECIPE, schedule=Cosine(total=epochs(1)), compute=Compute(workers=0)))
    assert not [line for line in lines if "to go" in line]
