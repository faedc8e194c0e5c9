"""What the shells complete with the scripts of `deit completion`."""

import shutil
import subprocess
import sys

import pytest

from deit.cli import main
from deit.recipes import shipped

pytest.importorskip("shtab")

COMPLETE = """
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_shtab_deit 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def scripts(tmp_path, capsys):
    found = {}
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        found[shell] = tmp_path / f"deit.{shell}"
        found[shell].write_text(capsys.readouterr().out)
    return found


def with_start(start):
    return [name for name in shipped() if name.startswith(start)]


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("tra", ["train"]),
        ("train fine", with_start("fine")),
        ("train photos/a", ["photos/ant.csv"]),
        ("train finetune --data ph", ["photos"]),
        ("train --device c", ["cpu", "cuda"]),
        ("teach photos --recipe finetune_d", with_start("finetune_d")),
        ("export runs/1 --to op", ["openvino", "openvino-int8"]),
        ("predict ph", ["photos"]),
        ("predict photos --eng", ["--engine"]),
        ("completion ", ["bash", "zsh", "fish"]),
        ("train nothing-like-it", [""]),
    ],
)
def test_bash(scripts, tmp_path, words, expected):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "ant.csv").touch()
    command = ["bash", "--noprofile", "--norc", "-c", COMPLETE, "bash", scripts["bash"], "deit", *words.split(" ")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells(scripts, shell):
    text = scripts[shell].read_text()
    assert all(name in text for name in shipped())
    if shutil.which(shell):
        subprocess.run([shell, "-n", scripts[shell]], check=True)


def test_without_shtab(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert 'pip install "deit[completion]"' in capsys.readouterr().err
