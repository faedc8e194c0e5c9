"""Runs as a person starts them: small recipes, one or a file of them, `deit train` in processes of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.models import small, trained_folder

from deit.recipe import AdamW, Compute, Cosine, Data, Distilled, Objective, Recipe, Supervised, epochs
from deit.train import checkpoint

RECIPES = '''
from deit.config import ConvNetConfig, DeiTConfig
from deit.recipe import *

MODEL = DeiTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=16,
                   patch_size=4, encoder_stride=4, layer_norm_eps=1e-6, drop_path_rate=0.2, distillation_token=False)


def student():
    """Everything random at once: views, repeats, mixing, erasing, stochastic depth."""
    return Recipe(
        name="student", model=MODEL, data=Data(batch=8, repeats=2), objective=Supervised(smoothing=0.1),
        augment=Augment(crop=ResizedCrop(), flip=0.5, policy=RandAugment(std=0.5), erase=Erase(),
                        mix=Mix(mixup=0.8, cutmix=1.0)),
        optim=AdamW(lr=1e-2, per_images=8, clip=1.0), schedule=Cosine(total=steps(96), warmup=steps(5)), ema=0.9,
        compute=Compute(precision="float32", workers=0), evaluate=steps(15))


def convnet():
    """A model with running statistics."""
    return Recipe(
        name="convnet", model=ConvNetConfig(widths=(8, 16), depth=1, image_size=16), data=Data(batch=8),
        objective=Supervised(), augment=Augment(flip=0.5), optim=SGD(lr=1e-2, per_images=8),
        schedule=Cosine(total=steps(20)), compute=Compute(precision="float32", workers=0), evaluate=steps(10))


def taught():
    """What `deit teach` makes labels for."""
    from dataclasses import replace
    return replace(student(), objective=Distilled(token="class"))
'''

TIMES = {"seconds", "images_per_second", "waiting", "memory"}
"""Keys of metrics.jsonl that no two runs have alike."""


def small_recipe(objective: Objective | None = None, **parts: Any) -> Recipe:
    """An epoch of a small model in batches of 8, plain and supervised unless `objective` and `parts` say otherwise."""
    objective = objective or Supervised()
    token = isinstance(objective, Distilled) and objective.token == "distillation"
    return Recipe(
        **{
            "name": "small",
            "model": small(distillation_token=token, num_labels=None),
            "data": Data(batch=8),
            "objective": objective,
            "optim": AdamW(lr=1e-3, per_images=8),
            "schedule": Cosine(total=epochs(1)),
            "compute": Compute(precision="float32", workers=0),
            **parts,
        }
    )


def photos(root: Path, *, count: int = 7, classes: str = "abc", split: str = "train", size: int = 24) -> Path:
    """Noisy colour fields, one colour for each class: learnt at once."""
    generator = np.random.default_rng(len(split))
    for i, name in enumerate(classes):
        (root / split / name).mkdir(parents=True, exist_ok=True)
        for j in range(count):
            pixels = np.full((size, size, 3), 64) + generator.integers(0, 64, (size, size, 3))
            pixels[..., i % 3] += 96
            Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{j}.png")
    return root


def data_and_recipes(root: Path) -> tuple[Path, Path]:
    """A data folder of 21 training and 9 validation images, and a file of recipes."""
    photos(photos(root / "data"), split="val", count=3)
    (root / "recipes.py").write_text(RECIPES)
    return root / "data", root / "recipes.py"


def model_data_and_recipes(root: Path) -> dict[str, Path]:
    """By the words that stand for them in the commands of a table."""
    data, recipes = data_and_recipes(root)
    return {"MODEL": trained_folder(root / "model", labels="abc"), "DATA": data, "RECIPES": recipes}


def start(*arguments: object, processes: int = 0, restarts: int = 0, **environment: str) -> subprocess.Popen[str]:
    """`deit ARGUMENTS`, or the same through torchrun, in a process group of its own."""
    launcher = (
        [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            f"--max-restarts={restarts}",
            "-m",
        ]
        if processes
        else ["-m"]
    )
    return subprocess.Popen(
        [sys.executable, *launcher, "deit", *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What it printed, once it ended with this exit status."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def reached(out: Path) -> int:
    """The last checkpoint's step; 0 for none."""
    found = checkpoint.saved(out / "checkpoints")
    return int(found[-1].stem.removeprefix("step-")) if found else 0


def wait_for(out: Path, step: int, process: subprocess.Popen[str]) -> bool:
    """Whether the run got to `step` before it ended."""
    while reached(out) < step:
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def running(text: object) -> dict[int, int]:
    """Processes with `text` on their command line, by number, and each one's parent."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(text).encode() in (place / "cmdline").read_bytes():
                found[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def kill(process: subprocess.Popen[str], out: Path) -> None:
    """The process and all that work on the same run, at once: torchrun puts them into sessions of their own."""
    while found := running(out):
        for number in found:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.poll()
    process.communicate()


@contextmanager
def stopped_at(call: int, owner: type, name: str = "__call__") -> Iterator[None]:
    """Asserts that the run within is stopped, because this process gets SIGTERM at a call of a method."""
    calls: list[int] = []

    def signalled(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(*given)

    honest = getattr(owner, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, signalled)
        with pytest.raises(SystemExit, match="143"):
            yield


def metrics(out: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def assert_same_end(one: Path, other: Path, atol: float | None = None) -> None:
    """Asserts that weights, average and optimizer of two finished runs are equal: to the bit, or within `atol`."""
    found, expected = (load_file(checkpoint.saved(out / "checkpoints")[-1]) for out in (one, other))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if atol is None:
            assert torch.equal(found[name], value), name
        else:
            torch.testing.assert_close(found[name].float(), value.float(), atol=atol, rtol=0, msg=name)
    if atol is None:
        best = [load_file(out / "model" / "model.safetensors") for out in (one, other)]
        assert all(torch.equal(best[0][name], best[1][name]) for name in best[1])
        assert metrics(one) == metrics(other)
