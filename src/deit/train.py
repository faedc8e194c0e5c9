"""The training loop, top to bottom: one for every model and objective."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from deit import files, objectives, optim
from deit.config import ConvNetConfig
from deit.convnet import ConvNet
from deit.data import EvaluationBatches, Split, TrainingBatches, processor_for
from deit.evaluate import evaluate
from deit.model import DeiTForImageClassification, DeiTForImageClassificationWithTeacher
from deit.recipe import Distilled, Recipe


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    model: Path
    """Folder of the model with the best validation accuracy: weights, config, preprocessing."""
    accuracy: float
    """Its validation accuracy, 0 to 1 (fused heads)."""
    seconds: float


class Diverged(RuntimeError):
    """The loss is no longer a number."""


def build_model(recipe: Recipe, classes: tuple[str, ...]) -> nn.Module:
    """A freshly initialised model of the class that the recipe's objective trains, with the data's labels."""
    config = recipe.model.replace(id2label=dict(enumerate(classes)))
    torch.manual_seed(recipe.seed)
    if isinstance(config, ConvNetConfig):
        return ConvNet(config)
    if isinstance(recipe.objective, Distilled):
        return DeiTForImageClassificationWithTeacher(config)
    return DeiTForImageClassification(config)


def train(recipe: Recipe, train_split: Split, val_split: Split, out: str | Path, *, device: str = "auto",
          console: Console | None = None) -> Run:
    """Trains a recipe on images, and leaves in `out`: `recipe.json`, `metrics.jsonl` and the best model in `model/`.

    Args:
        device: `auto` is CUDA where there is one, else the CPU.
        console: where progress goes; standard error when not given.

    Raises:
        Diverged: the loss is not finite; the best model so far stays in `out/model`.
    """
    started = time.perf_counter()
    out = Path(out)
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    precision = resolve_precision(recipe.precision, place)

    model = build_model(recipe, train_split.classes).to(place)
    objective = objectives.build(recipe, train_split.classes, place)
    optimizer = optim.optimizer(model, recipe.optim)
    average = optim.EMA(model, recipe.ema) if recipe.ema else None
    shown = average.model if average else model
    batches = TrainingBatches(train_split, recipe)
    processor = processor_for(recipe)
    peak = optim.peak_lr(recipe.optim, recipe.data.batch)
    per_epoch = batches.steps_per_epoch
    last_epoch = math.ceil(recipe.schedule.total.in_steps(per_epoch) / per_epoch)

    files.write_json(out / "recipe.json", recipe.to_dict())
    metrics = open(out / "metrics.jsonl", "w", encoding="utf-8")  # noqa: SIM115
    best, step = -1.0, 0
    validation = EvaluationBatches(val_split, processor, recipe.data.batch)

    with metrics, _progress(console) as progress:
        bar = progress.add_task(recipe.name, total=last_epoch * per_epoch, note="")
        for epoch in range(last_epoch):
            model.train()
            seen: dict[str, float] = {}
            for batch in batches.epoch(epoch):
                batch = batch.to(place)
                lr = optim.learning_rate(recipe.schedule, peak, step, per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                with torch.autocast(place.type, torch.bfloat16, enabled=precision == torch.bfloat16):
                    loss, parts = objective(model, batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if average:
                    average.update(model)
                step += 1
                for name, value in {"loss": loss.detach(), **parts}.items():
                    seen[name] = seen.get(name, 0.0) + value.item() / per_epoch  # on CUDA this waits for the device
                progress.advance(bar)
            if not math.isfinite(seen["loss"]):
                raise Diverged(f"{recipe.name}: the loss is {seen['loss']} in epoch {epoch + 1}; lower optim.lr "
                               f"(now {recipe.optim.lr}) or lengthen schedule.warmup")

            accuracy = evaluate(shown, validation, place)["fused"].value
            if accuracy >= best:  # on a tie the later one: it has seen more and at a lower learning rate
                best = accuracy
                save_model(shown, processor, out / "model")
            record = {"epoch": epoch + 1, "step": step, "lr": lr, **seen, "val_accuracy": accuracy,
                      "seconds": time.perf_counter() - started}
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
            progress.update(bar, note=f"loss {seen['loss']:.3f}  val {accuracy:.3f}")
    return Run(out / "model", best, time.perf_counter() - started)


def save_model(model: Any, processor: Any, folder: Path) -> None:
    """A folder that predicts by itself: weights, config with labels, preprocessing."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware computes with it (CUDA since Ampere, CPUs with AVX512-BF16 or AMX)."""
    if precision == "auto":
        native = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda"
                  else torch.cpu.get_capabilities().get("avx512_bf16", False))
        return torch.bfloat16 if native else torch.float32
    return getattr(torch, precision)


def _progress(console: Console | None) -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                    TextColumn("{task.fields[note]}"), console=console or Console(stderr=True))


__all__ = ["Diverged", "Run", "build_model", "resolve_precision", "save_model", "train"]
