"""Writes what the version before the package had rooms wrote; `tests/test_written_before.py` still opens it.

Run with that version on the path, in this folder: `python write.py`, then
`KERAS_BACKEND=tensorflow python write.py keras`.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

DEIT = [sys.executable, "-m", "deit"]


def deit(*arguments: object) -> None:
    subprocess.run([*DEIT, *map(str, arguments)], check=True)


def photos() -> None:
    random = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 4)):
        for i, name in enumerate("abc"):
            Path("data", split, name).mkdir(parents=True, exist_ok=True)
            for j in range(count):
                pixels = 64 + random.integers(0, 64, (10, 10, 3))
                pixels[..., i] += 96
                Image.fromarray(pixels.astype(np.uint8)).save(f"data/{split}/{name}/{j}.png")


def stopped(out: Path) -> None:
    """A run that is killed once it has saved step 6."""
    process = subprocess.Popen(
        [
            *DEIT,
            "train",
            "recipes.py:student",
            "--data",
            "data",
            "--out",
            str(out),
            "--set",
            "compute.save_minutes=0",
            "--set",
            "objective.cache=labels",
        ]
    )
    while not list(out.glob("checkpoints/step-*06.safetensors")):
        time.sleep(0.001)
    process.kill()
    process.wait()


def torch_side() -> None:
    photos()
    deit("train", "recipes.py:teacher", "--data", "data", "--out", "teacher")
    deit(
        "teach",
        "--teacher",
        "teacher/model",
        "--recipe",
        "recipes.py:student",
        "--epochs",
        8,
        "--out",
        "labels",
        "data",
    )
    train = ("train", "recipes.py:student", "--data", "data", "--set", "objective.cache=labels")
    deit(*train, "--out", "student")
    stopped(Path("stopped"))
    deit("calibrate", "student/model", "--data", "data", "--error-rate", 0.2)
    for to in ("torch", "onnx", "openvino"):
        deit("export", "student/model", "--to", to, "--out", to)
    files = sorted(map(str, Path("data/val").rglob("*.png")))
    answers = subprocess.run([*DEIT, "predict", "student/model", *files, "--json"], check=True, stdout=subprocess.PIPE)
    Path("answers.jsonl").write_bytes(answers.stdout)
    for path in (
        "teacher/checkpoints",
        "student/checkpoints",
        "teacher/report.html",
        "student/report.html",
        "stopped/checkpoints/step-000000005.safetensors",
        "stopped/model",
    ):
        shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink(missing_ok=True)


def keras_side() -> None:
    from deit import TFDeiTForImageClassificationWithTeacher

    model = TFDeiTForImageClassificationWithTeacher.from_pretrained("student/model")
    pixels = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype("float32")
    model.save("student.keras")
    np.savez("keras.npz", pixels=pixels, logits=np.asarray(model(pixels, training=False).logits))


keras_side() if "keras" in sys.argv else torch_side()
