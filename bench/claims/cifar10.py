"""CIFAR-10 in half an hour on a CPU: our three recipes, and the reference recipe for the same time.

    deit train cifar10_teacher --data CIFAR_DIR --out runs/cifar10_teacher     # then cifar10_coarse, then cifar10
    python -m bench.claims.cifar10 record runs CIFAR_DIR     # record their accuracy on the test images and their curves
    python -m bench.claims.cifar10 reference CIFAR_DIR --minutes 25
    python -m bench.claims.cifar10 draw                      # draw docs/pictures/cifar10.svg

The reference is timm's DeiT-Ti with patches of 4 pixels. Its settings are those of Touvron et al. 2020, table 9, and of
the original code, whose crop at 32 pixels is a random shift by 4. These are AdamW at 5e-4 x batch / 512 with a cosine
and a warm-up over 5/300 of the time, RandAugment, Mixup, CutMix, erasing, smoothing and stochastic depth. The batch is
128, with bfloat16 autocast if the hardware has it.

The reference's time does not include its evaluations and the decoding of the images at the start. Our time includes
both. The reference's last model is scored on the test images. Records are appended to cifar10.jsonl beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torchvision import transforms

from bench.claims.curves import PICTURES, curves
from bench.harness import machine
from deit.data.folders import Split, read_data, read_split
from deit.evaluate.models import examine_files
from deit.machine import resolve_precision

BATCH, SMOOTHING = 128, 0.1
PEAK, START, FLOOR, WARMUP = 5e-4 * BATCH / 512, 1e-6, 1e-5, 5 / 300
MEAN = STD = (0.5, 0.5, 0.5)
RANDAUGMENT = "rand-m9-mmax9-mstd0.5-inc1"  # above 9, timm 1.0.31 asks Pillow 13 to keep 0 bits, which it refuses
EVALUATIONS = 10
RUNS = ("cifar10_teacher", "cifar10_coarse", "cifar10")
RECORDS = Path(__file__).with_suffix(".jsonl")


def decoded(split: Split) -> tuple[list[Image.Image], np.ndarray]:
    """The images and labels of a split, in memory."""
    return [Image.open(file).convert("RGB") for file in split.files], np.array(split.labels)


def batches(images: list[Image.Image], labels: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields pixels (B, 3, 32, 32) and targets (B, 10) of the reference recipe, without end."""
    view = timm.data.create_transform(
        32,
        is_training=True,
        auto_augment=RANDAUGMENT,
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
    )
    view.transforms[0] = transforms.RandomCrop(32, padding=4)
    mix = timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=SMOOTHING, num_classes=10)
    while True:
        order = np.random.permutation(len(images))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            yield mix(torch.stack([view(images[row]) for row in rows]), torch.from_numpy(labels[rows]))


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: list[Image.Image], labels: np.ndarray, dtype: torch.dtype) -> float:
    """The share of the images that the model gets right. It leaves the model in training mode."""
    model.eval()
    correct = 0
    for start in range(0, len(images), 256):
        pixels = np.stack([np.asarray(image, np.float32) for image in images[start : start + 256]])
        x = torch.from_numpy((pixels / 255 - MEAN[0]) / STD[0]).permute(0, 3, 1, 2).contiguous()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            correct += int((model(x).argmax(-1).numpy() == labels[start : start + 256]).sum())
    model.train()
    return correct / len(images)


def rate(done: float) -> float:
    """The learning rate when the share `done` of the time, 0 to 1, is over."""
    if done < WARMUP:
        return START + (PEAK - START) * done / WARMUP
    return FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * min(1.0, (done - WARMUP) / (1 - WARMUP)))) / 2


def reference(data: Path, minutes: float) -> dict[str, Any]:
    """Trains with the reference recipe for `minutes`, and returns its part of the record."""
    torch.manual_seed(0)
    np.random.seed(0)  # timm's RandAugment and Mixup draw from it
    train, val = map(decoded, read_data(data, holdout=0.1, seed=0))
    test = decoded(read_split(data, "test"))
    dtype = resolve_precision("auto", torch.device("cpu"))
    model = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=192, depth=12, num_heads=3, num_classes=10, drop_path_rate=0.1
    )
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.05, model.no_weight_decay()), lr=PEAK, fused=True)
    budget, spent, updates = 60 * minutes, 0.0, 0
    curve: list[tuple[float, float]] = []
    stream = batches(*train)
    while spent < budget:
        began = time.perf_counter()
        pixels, targets = next(stream)
        for group in optimizer.param_groups:
            group["lr"] = rate(spent / budget)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(pixels)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
        spent += time.perf_counter() - began
        if spent >= budget * (len(curve) + 1) / EVALUATIONS:
            curve.append((round(spent, 1), accuracy(model, *val, dtype)))
            print(f"{spent:.0f} s, {updates * BATCH} images: val {curve[-1][1]:.4f}", flush=True)
    return {
        "what": "reference recipe, timm",
        "test": {"class": accuracy(model, *test, dtype)},
        "seconds": round(spent),
        "images": updates * BATCH,
        "threads": torch.get_num_threads(),
        "curves": {"reference recipe, timm": curve},
    }


def ours(runs: Path, data: Path) -> dict[str, Any]:
    """Returns the part of the record about our three runs.

    The time also counts what happened between the runs, such as imports and the reading of files, because each run
    began when the one before it ended.
    """
    curves_found, images, began = {}, 0, 0.0
    folders = [runs / name for name in RUNS]
    for folder in folders:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        began = began or (folder / "recipe.json").stat().st_mtime
        offset = (folder / "metrics.jsonl").stat().st_mtime - rows[-1]["seconds"] - began
        curves_found[folder.name] = [
            (round(offset + row["seconds"], 1), row["val_accuracy"]) for row in rows if "val_accuracy" in row
        ]
        images += rows[-1]["images"] if folder.name != RUNS[0] else 0
    heads = examine_files(folders[-1] / "model", data, split="test").main.report.to_dict()["heads"]
    return {
        "what": "cifar10",
        "test": {name: head["top1"]["value"] for name, head in heads.items()},
        "seconds": round(offset + rows[-1]["seconds"]),
        "images": images,
        "threads": torch.get_num_threads(),
        "curves": curves_found,
    }


def draw() -> None:
    """Draws validation accuracy over time multiplied by cores, from the last record of each kind."""
    records = {record["what"]: record for line in RECORDS.read_text().splitlines() for record in [json.loads(line)]}
    lines = {
        name: [(seconds / 60 * record["threads"], 100 * value) for seconds, value in curve]
        for record in records.values()
        for name, curve in record["curves"].items()
    }
    picture = curves("CIFAR-10 on CPU cores", lines, "minutes of one core", "validation accuracy, %")
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / "cifar10.svg").write_text(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("record", help="record the test accuracy and the curves of our three runs")
    verb.add_argument("runs", type=Path, metavar="RUNS")
    verb.add_argument("data", type=Path, metavar="CIFAR_DIR")
    verb = verbs.add_parser("reference", help="train and record the reference recipe")
    verb.add_argument("data", type=Path, metavar="CIFAR_DIR")
    verb.add_argument("--minutes", type=float, required=True)
    verbs.add_parser("draw", help="draw docs/pictures/cifar10.svg from the records")
    options = parser.parse_args()
    if options.verb == "draw":
        return draw()
    found = ours(options.runs, options.data) if options.verb == "record" else reference(options.data, options.minutes)
    with RECORDS.open("a") as file:
        print(json.dumps({**found, **machine("torch", "timm", "transformers")}), file=file)
    print(f"{found['what']}: {found['images']} images in {found['seconds']} s, test accuracy {found['test']}")
    return None


if __name__ == "__main__":
    main()
