"""Only one process writes a thing at a time, and no dead one keeps the others out."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from rich.console import Console
from support.checks import raises_saying
from support.models import trained_folder
from support.runs import photos

from deit import files, locks
from deit.cli import main
from deit.evaluate.calibration import FILE
from deit.predict.calibrate import calibrate
from deit.report import document

QUIET = Console(quiet=True)
HOLD = """
import os, sys, time
from pathlib import Path
from deit import locks
locks._BEAT = 0.05
with locks.held(Path(sys.argv[1])):
    if len(sys.argv) > 2 and os.fork() == 0:  # as a loader process
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path):
    """Starts a process that has the lock of a folder."""
    started = []

    def start(*more):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, tmp_path, *more], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_another_process_is_refused_by_name(tmp_path, owner):
    process = owner()
    with (
        raises_saying(
            locks.InUse, f"{tmp_path} is being written by another process (process {process.pid} on", ", since 20"
        ),
        locks.held(tmp_path),
    ):
        pass


def test_another_thread_is_refused(tmp_path):
    with locks.held(tmp_path), raises_saying(locks.InUse, f"process {os.getpid()} on"), locks.held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_lets_go_at_once(tmp_path, owner):
    """Also if a process that it forked, as loaders are, lives on."""
    for more in ((), ("fork",)):
        process = owner(*more)
        process.kill()
        process.wait()
        began = time.monotonic()
        with locks.held(tmp_path):
            pass
        assert time.monotonic() - began < 2


def test_waiting_for_the_other(tmp_path):
    order = []

    def second():
        with locks.held(tmp_path, wait=True):
            order.append("second")

    with locks.held(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.5)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


@pytest.mark.parametrize("host", ["elsewhere", None])
def test_a_machine_that_the_system_does_not_know(tmp_path, owner, monkeypatch, host):
    """Another machine, or a file system without locks: the owner lives as long as it touches the file."""
    monkeypatch.setattr(locks, "_WATCHED", 1.0)
    monkeypatch.setattr(locks, "_flock", lambda descriptor: True if host else None)
    process = owner()
    if host:
        own = json.loads((tmp_path / ".lock").read_text())
        (tmp_path / ".lock").write_text(json.dumps({**own, "host": host}))
    with raises_saying(locks.InUse, f"process {process.pid} on {host or ''}"), locks.held(tmp_path):
        pass
    process.kill()
    process.wait()
    began = time.monotonic()
    with locks.held(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert 1 <= time.monotonic() - began < 5


@pytest.mark.parametrize("jump", [-(10**9), 10**9])
def test_clocks_that_jump(tmp_path, owner, monkeypatch, jump):
    """A lock's file from the past or the future is judged as any other, and so is the time of the asking process."""
    process = owner()
    os.utime(tmp_path / ".lock", (time.time() + jump,) * 2)
    with monkeypatch.context() as patched, raises_saying(locks.InUse, f"process {process.pid} on"):
        patched.setattr(time, "time", lambda: 0.0)
        with locks.held(tmp_path):
            pass
    process.kill()
    process.wait()
    os.utime(tmp_path / ".lock", (time.time() + jump,) * 2)
    with locks.held(tmp_path):
        pass


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux")
def test_a_system_that_flushes_no_file_that_is_open_for_reading_alone(tmp_path, monkeypatch):
    """Windows. A copy of a read-only file is flushed by systems that can."""
    import fcntl

    flushed, opened = [], os.open

    def flush(descriptor):
        access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & (os.O_RDWR | os.O_WRONLY)
        name = os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2]
        if not access and name != "fixed":
            raise OSError(errno.EBADF, "Bad file descriptor")
        flushed.append(name.rpartition(".")[0] or name)

    def refused(path, flags, *more, **options):
        if str(path).endswith("fixed") and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return opened(path, flags, *more, **options)

    monkeypatch.setattr(os, "fsync", flush)
    files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    with files.replacing_folder(tmp_path / "b", check=lambda _: None) as temporary:
        (temporary / "fixed").touch(0o444)
        monkeypatch.setattr(os, "open", refused)
    assert (tmp_path / "b" / "fixed").is_file()
    assert flushed == [".a", "fixed"]


def test_what_killed_processes_left_is_swept(tmp_path):
    with files.replacing(tmp_path / "a.json") as temporary:
        name = temporary.name
        temporary.with_name(name + "0").write_text("kept")
    (tmp_path / name).write_text("half")
    (tmp_path / ".b.json.0123abcd").write_text("half")
    files.sweep(tmp_path, "a.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name + "0", ".b.json.0123abcd", "a.json"])


def test_a_folder_whose_replacement_was_killed_comes_back(tmp_path, monkeypatch):
    """Between the two renames: the former folder is there again, and the half-written one is gone."""
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "model").write_text("former")
    rename = type(folder).rename

    def killed(self, target):
        if target == folder:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(type(folder), "rename", killed)
        patched.setattr(files.shutil, "rmtree", lambda *_, **__: None)
        with (
            pytest.raises(KeyboardInterrupt),
            files.replacing_folder(folder, check=lambda _: None) as temporary,
        ):
            (temporary / "model").write_text("new")
    assert not folder.exists()
    files.restore_folder(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert (folder / "model").read_text() == "former"


def test_one_process_calibrates_a_model_and_none_that_still_trains(tmp_path):
    """A training could replace the model meanwhile. What a killed process left is removed."""
    data, run = photos(tmp_path / "data", split="val", count=8), tmp_path / "run"
    model = trained_folder(run / "model", labels="abc")
    (model / f".{FILE}.0123abcd").write_text("half")
    (run / "recipe.json").write_text("{}")
    for busy in (model, run):
        with locks.held(busy), raises_saying(locks.InUse, f"{busy} is being written by another process"):
            calibrate(model, data, error_rate=0.5, console=QUIET)
    assert not (model / FILE).exists()
    calibrate(model, data, error_rate=0.5, console=QUIET)
    assert json.loads((model / FILE).read_text())["images"] == 24
    assert list(run.rglob(".*")) == []


def test_what_killed_commands_left_is_removed_by_the_same_command(tmp_path):
    model = trained_folder(tmp_path / "model", labels="abc")
    data, out = photos(tmp_path / "data", split="test", count=1), tmp_path / "out"
    out.mkdir()
    for command, left in (
        (["convert", model, "--to", "hf", "--out", out], ("model.safetensors", "config.json", "deit.pth")),
        (["explain", model, data / "test/a/0.png", "--method", "rollout", "--out", out / "why.png"], ("why.png",)),
        (["eval", model, "--data", data, "--report", out / "page.html"], ("page.html",)),
    ):
        for name in left:
            (out / f".{name}.0123abcd").write_text("half")
        assert main([*map(str, command), *(["--device", "cpu"] if command[0] != "convert" else [])]) == 0
        assert list(out.glob(".*")) == []


def test_reports_of_a_run_wait_for_each_other(tmp_path, monkeypatch):
    """So the report at the end of a training stays, if another one was begun before it."""
    order, inside, go_on = [], threading.Event(), threading.Event()

    class Reads:
        @staticmethod
        def read(run):
            return run

    def slow(run, *_):
        inside.set()
        assert go_on.wait(20)
        order.append("of a run")

    monkeypatch.setattr(document, "Record", Reads)
    monkeypatch.setattr(document, "_of_run", slow)
    monkeypatch.setattr(document, "_of_training", lambda *_: order.append("of its training"))
    (tmp_path / ".report.html.0123abcd").write_text("half")
    first = threading.Thread(target=document.of_run, args=(tmp_path,))
    first.start()
    assert inside.wait(20)
    second = threading.Thread(target=document.of_training, args=(tmp_path, None))
    second.start()
    time.sleep(0.5)
    assert order == []
    go_on.set()
    for each in (first, second):
        each.join(20)
    assert order == ["of a run", "of its training"]
    assert list(tmp_path.iterdir()) == []
