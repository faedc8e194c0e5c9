"""Files and folders of a stranger who wants code to run, memory to fill or other files to be read."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from deit.cli import main
from deit.export.engines import DESCRIPTION, sha256


class Runs:
    """Makes a file when it is unpickled: code ran."""

    def __init__(self, trace: Path):
        self.trace = str(trace)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.trace,)


def pickled(trace: Path) -> bytes:
    """What `torch.save` writes of an object that runs code when it is loaded."""
    buffer = io.BytesIO()
    torch.save(Runs(trace), buffer)
    return buffer.getvalue()


def plainly_pickled(trace: Path) -> bytes:
    return pickle.dumps(Runs(trace))


def images(folder: Path, labels: str = "abcde") -> Path:
    """A labelled folder of one picture of noise for each label, three times."""
    draw = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in labels:
            (folder / part / label).mkdir(parents=True)
            for i in range(3):
                picture = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8))
                picture.save(folder / part / label / f"{i}.png")
    return folder


def commands(model: Path, data: Path, out: Path) -> dict[str, list[str]]:
    """Each command that reads a model's folder."""
    image = str(next(data.rglob("*.png")))
    named = {"--data": str(data), "--out": str(out)}
    return {
        "predict": ["predict", str(model), image],
        "calibrate": ["calibrate", str(model), "--data", str(data)],
        "serve": ["serve", str(model), "--port", "0"],
        "eval": ["eval", str(model), "--data", str(data)],
        "explain": ["explain", str(model), image, "--out", str(out / "map.png")],
        "export": ["export", str(model), "--to", "torch", "--out", str(out / "export")],
        "convert": ["convert", str(model), "--to", "hf", "--out", str(out / "converted")],
        "train": ["train", "digits_hard", "--set", f"start={model}", *(one for pair in named.items() for one in pair)],
        "teach": [
            *("teach", str(data), "--teacher", str(model), "--recipe", "digits_distilled"),
            *("--epochs", "1", "--out", str(out / "labels")),
        ],
    }


def refused(command: list[str], capsys: Any) -> str:
    """What a command says on standard error, where it has to fail with one sentence."""
    capsys.readouterr()
    assert main(command) == 1, command
    [*_, said] = capsys.readouterr().err.strip().splitlines()
    assert said.startswith(f"deit {command[0]}: "), said
    return said


def rewritten(folder: Path, change: Any) -> None:
    """Rewrites the archive of an exported program: `change` gets its parts by name. The description fits it again."""
    path = folder / "model.pt2"
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    change(parts)
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, content in parts.items():
        if not name.endswith(("/byteorder", "/.data/serialization_id", "/.data/version", "/version")):
            writer.write_record(name.partition("/")[2], content, len(content))
    writer.write_end_of_file()
    described(folder)


def described(folder: Path) -> None:
    """Makes `export.json` name the files that are there."""
    description = json.loads((folder / DESCRIPTION).read_text())
    description["files"] = {name: sha256(folder / name) for name in description["files"]}
    (folder / DESCRIPTION).write_text(json.dumps(description))
