"""SIGTERM and Ctrl-C end every command soon, also while it waits for a file that never comes."""

import os
import select
import signal
import subprocess
import sys
import time

import pytest
from support.runs import model_data_and_recipes, reached

WAITING = """
import ctypes, os, sys, time
from pathlib import Path
from deit.image import decode

read = decode._read_path


def wait(path, name):
    '''Reads some images, and then waits: until a signal comes, or, as for a server that is gone, whatever comes.'''
    with open(os.environ["READ"], "ab", buffering=0) as file:  # loader processes share the images that one has read
        file.write(b".")
        if file.tell() <= int(os.environ["IMAGES"]):
            return read(path, name)
    os.write(1, b"waiting")
    if os.environ["FOR"] == "ever":
        libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
    time.sleep(1000)


decode._read_path = wait
from deit.cli import main
sys.exit(main(sys.argv[1:]))
"""
COMMANDS = {
    "predict": (3, ["predict", "MODEL", "DATA/train", "--json", "OUT.jsonl", "--batch", "2", "--engine", "torch"]),
    "eval": (3, ["eval", "MODEL", "--data", "DATA"]),
    "calibrate": (3, ["calibrate", "MODEL", "--data", "DATA"]),
    "explain": (0, ["explain", "MODEL", "DATA/train/a/0.png", "--out", "OUT.png"]),
    "export": (3, ["export", "MODEL", "--to", "torch", "--calibrate", "DATA", "--out", "OUT"]),
    "teach": (
        3,
        ["teach", "DATA", "--teacher", "MODEL", "--recipe", "RECIPES:taught", "--epochs", "1", "--out", "OUT"],
    ),
    "train": (14, ["train", "RECIPES:student", "--data", "DATA", "--out", "OUT"]),
    "loaders": (20, ["train", "RECIPES:student", "--data", "DATA", "--out", "OUT", "--set", "compute.workers=2"]),
    "validation": (21, ["train", "RECIPES:student", "--data", "DATA", "--out", "OUT", "--set", "evaluate=steps(1)"]),
    "planning": (3, ["train", "RECIPES:student", "--data", "DATA", "--out", "OUT", "--time", "10m"]),
}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return model_data_and_recipes(tmp_path_factory.mktemp("signals"))


AGAIN = """
import os, signal, sys, time
from deit import signals
try:
    with signals.ending():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
            time.sleep(0.1)
            print("tidied up")
except signals.Interrupted as error:
    sys.exit(error.status)
"""


def test_signals_that_come_again_let_a_command_tidy_up():
    """Or a second Ctrl-C would leave half a file under its temporary name."""
    found = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, timeout=20, check=False)
    assert (found.stdout, found.stderr, found.returncode) == ("tidied up\n", "", 130)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("number", "waits"),
    [
        (signal.SIGTERM, "a signal"),
        pytest.param(signal.SIGINT, "a signal", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "ever", marks=pytest.mark.slow),
    ],
    ids=["SIGTERM", "SIGINT", "stuck"],
)
def test_a_wait_ends(given, tmp_path, name, number, waits):
    images, command = COMMANDS[name]
    if waits == "ever" and name in ("train", "validation", "planning"):
        pytest.skip("where training itself reads, it ends when the system gives the file")
    for key, value in {**given, "OUT": tmp_path / "out"}.items():
        command = [word.replace(key, str(value)) for word in command]
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "IMAGES": str(images), "READ": str(tmp_path / "read"), "FOR": waits},
    )
    output, until = b"", time.monotonic() + 120
    while b"waiting" not in output:
        assert select.select([process.stdout], [], [], max(0, until - time.monotonic()))[0], output
        more = os.read(process.stdout.fileno(), 4096)
        assert more, output
        output += more
    time.sleep(0.5)
    process.send_signal(number)
    began = time.monotonic()
    rest, _ = process.communicate(timeout=20)
    output = (output + rest).decode()
    assert time.monotonic() - began < 5, output
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    assert "Exception ignored" not in output
    if name in ("train", "loaders", "validation"):
        assert f"stopped by {signal.Signals(number).name} after step {reached(tmp_path / 'out')} of 96" in output
    elif waits != "ever" and name != "predict":  # whose threads wait whatever comes
        left = list(tmp_path.rglob(".*"))
        assert left == []
