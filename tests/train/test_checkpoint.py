"""The state on disk: complete, checked, and never half-written over."""

import errno
import subprocess
import sys

import pytest
import torch
from support.checks import raises_saying

from deit import files
from deit.train import checkpoint

STATE = {"step": 7, "sums": {"loss": 0.1 + 0.2}, "best": None, "note": "\u00e9"}


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(5, 3, generator=generator),
        "half": torch.randn(4, generator=generator).bfloat16(),
        "count": torch.tensor(3),
        "nothing": torch.zeros(0, 2),
        "turned": torch.randn(3, 4, generator=generator).T,
    }


def test_everything_comes_back_to_the_bit(tmp_path):
    written = tensors()
    path = checkpoint.save(tmp_path, 7, written, STATE)
    assert path.name == "step-000000007.safetensors"
    found, state, problems = checkpoint.restore(tmp_path)
    assert state == STATE
    assert problems == []
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_files_are_for_whom_the_umask_says(tmp_path):
    """safetensors' own are for their owner alone, and a server under another user's name could not read them."""
    path = checkpoint.save(tmp_path, 7, tensors(), STATE)
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_two_newest_are_kept(tmp_path):
    for step in (5, 10, 200):
        checkpoint.save(tmp_path, step, tensors(step), {"step": step})
    assert [path.name for path in checkpoint.saved(tmp_path)] == [
        "step-000000010.safetensors",
        "step-000000200.safetensors",
    ]
    assert checkpoint.restore(tmp_path)[1] == {"step": 200}


def test_no_checkpoint(tmp_path):
    assert checkpoint.restore(tmp_path / "none") is None
    (tmp_path / ".step-000000001.safetensors.ab12").write_bytes(b"half")  # a killed write
    assert checkpoint.restore(tmp_path) is None


@pytest.mark.parametrize("damage", ["truncated", "tensor", "state", "empty"])
def test_a_damaged_one_is_told_and_the_one_before_is_taken(tmp_path, damage):
    checkpoint.save(tmp_path, 1, tensors(), {"step": 1})
    path = checkpoint.save(tmp_path, 2, tensors(), {"step": 22222})
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[:-9]
    elif damage == "tensor":
        content[-3] ^= 1
    elif damage == "state":
        at = content.index(b"22222")
        content[at] = ord("3")
    else:
        content = bytearray()
    path.write_bytes(content)
    _, state, [problem] = checkpoint.restore(tmp_path)
    assert state == {"step": 1}
    assert f"{path} is damaged" in problem
    checkpoint.saved(tmp_path)[0].write_bytes(b"")
    with raises_saying(files.CheckpointError, "step-000000001", "step-000000002", "no good checkpoint is left"):
        checkpoint.restore(tmp_path)


def test_a_full_disk_leaves_the_one_before(tmp_path):
    """The limit on a file's size stands in for the disk: the write fails half-way."""
    checkpoint.save(tmp_path, 1, tensors(), STATE)
    code = f"""
import resource, signal, torch
from pathlib import Path
from deit.train import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save(Path({str(tmp_path)!r}), 2, {{"large": torch.zeros(1_000_000)}}, {{}})
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "step-000000002.safetensors can't be written" in done.stdout
    assert (
        "step-000000001.safetensors is untouched; free space, then give the same command again (deit train with "
        "--resume)" in done.stdout
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001.safetensors"]
    assert checkpoint.restore(tmp_path)[1] == STATE


def test_an_error_while_writing_removes_nothing(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, tensors(), STATE)

    def fails(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fails)
    with raises_saying(OSError, "No space left on device", "free space"):
        checkpoint.save(tmp_path, 2, tensors(), STATE)
    assert checkpoint.restore(tmp_path)[1] == STATE
