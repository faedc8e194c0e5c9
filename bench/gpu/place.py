"""What the stages share: where they run, the photos and recipes they are given, and `deit` commands.

A stage is a function `stage(place)` that yields what it finds, a mapping at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Found = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    run: Callable[[Place], Iterator[Found]]
    limit: float
    """Seconds after which it is stopped."""
    alone: bool
    """Whether nothing else may run meanwhile, because it measures speed."""
    needs: tuple[str, ...]
    """Packages without which it is left out."""


class Place:
    """Where a stage runs: the device, a folder for its files, and whether it is only tried at toy size."""

    def __init__(self, device: str, folder: Path):
        from deit.machine import resolve_device

        self.device = resolve_device(device)
        self.folder = folder
        self.toy = self.device.type == "cpu"

    def size(self, real: int, toy: int) -> int:
        return toy if self.toy else real

    def wait(self) -> None:
        """Waits until the device has done all that it was given."""
        if not self.toy:
            torch.cuda.synchronize()


STAGES: dict[str, Stage] = {}


def stage(limit: float, *, alone: bool = False, needs: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Makes a function a stage of at most `limit` seconds."""

    def add(run: Callable[[Place], Iterator[Found]]) -> Callable[[Place], Iterator[Found]]:
        STAGES[run.__name__] = Stage(run, limit, alone, needs)
        return run

    return add


def write_photos(folder: Path, count: int, side: int, classes: int = 4) -> Path:
    """Writes JPEGs of blurred noise, `count` for training and an eighth of that for validation and for testing."""
    from PIL import Image, ImageFilter

    def write(job: tuple[Path, int]) -> None:
        path, seed = job
        rng = np.random.default_rng(seed)
        small = rng.integers(0, 256, (side // 8, side * 4 // 3 // 8, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((side * 4 // 3, side), Image.Resampling.BICUBIC)
        image.filter(ImageFilter.UnsharpMask()).save(path, quality=90)

    jobs: list[tuple[Path, int]] = []
    for split, number in (("train", count), ("val", count // 8), ("test", count // 8)):
        for name in range(classes):
            (folder / split / f"class{name}").mkdir(parents=True)
        jobs += [(folder / split / f"class{i % classes}" / f"{i:06}.jpg", len(jobs) + i) for i in range(number)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(write, jobs))
    return folder


def prepared(recipe: Any, data: Path, place: Place) -> tuple[Any, Any]:
    """The parts and the state of a new run of a recipe on these images."""
    from deit.data.folders import read_split
    from deit.machine import Processes
    from deit.train import runs

    train_split = read_split(data, "train")
    val_split = read_split(data, "val", train_split.classes)
    return runs.prepare(recipe, train_split, val_split, Processes(place.device), None)


def first_batch(work: Any) -> Any:
    stream = work.batches.from_step(0)
    try:
        return next(stream)
    finally:
        stream.close()


def stepper(work: Any, state: Any, batches: Iterator[Any]) -> Callable[[], Any]:
    """What takes a step of the training loop itself, with each batch fetched as the loop does it."""
    from deit.data.ahead import Ahead
    from deit.train import stepping

    stream = Ahead(batches, work.us.device)
    return lambda: stepping.take(work, state, next(stream), (False, False, False), _tell, stream.fetch)


def take_step(work: Any, state: Any, batch: Any) -> dict[str, float]:
    """The numbers of a step of the training loop."""
    from deit.train import stepping

    numbers, _ = stepping.take(work, state, batch, (False, False, False), _tell)
    left = stepping.settle(work, state, _tell)
    return left[0] if left else numbers


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def tiny_recipe(place: Place, **changes: Any) -> Any:
    """A recipe whose model is small enough to train on a CPU in seconds."""
    from deit.config import DeiTConfig
    from deit.recipe import AdamW, Augment, Cosine, Data, Recipe, ResizedCrop, Supervised, epochs

    config = DeiTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128, image_size=32, patch_size=8,
        encoder_stride=8, layer_norm_eps=1e-6, drop_path_rate=0.1, distillation_token=False,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "name": "gpu_check",
        "model": config,
        "data": Data(batch=32),
        "augment": Augment(crop=ResizedCrop(), flip=0.5),
        "objective": Supervised(smoothing=0.1),
        "optim": AdamW(lr=1e-3, per_images=32),
        "schedule": Cosine(total=epochs(2)),
    }
    return Recipe(**(settings | changes))


def saved_recipe(place: Place, recipe: Any, name: str) -> tuple[Any, ...]:
    """Arguments for a recipe that is data, and for its output folder."""
    path = place.folder / f"{name}.json"
    path.write_text(json.dumps(recipe.to_dict()))
    return (path, "--out", place.folder / name)


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


def command(*arguments: Any, env: dict[str, str] | None = None, launcher: tuple[str, ...] = ()) -> tuple[str, float]:
    """The standard output and the seconds of a `deit` command. Raises `RuntimeError` with its messages if it fails."""
    began = time.perf_counter()
    run = subprocess.run(
        [sys.executable, *(launcher or ("-m", "deit")), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | (env or {}),
    )
    if run.returncode:
        raise RuntimeError(f"status {run.returncode}: {' '.join(map(str, arguments))}\n{run.stderr[-9000:]}")
    return run.stdout, time.perf_counter() - began


def rows(run: Path) -> list[Found]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check(name: str, value: float, limit: float, **more: Any) -> Found:
    """A value and whether it is within its limit."""
    return {"check": name, "value": value, "limit": limit, "ok": bool(value <= limit), **more}


@contextmanager
def exact_products() -> Iterator[None]:
    """Float32 products without TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
