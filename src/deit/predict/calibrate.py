"""Calibrates a model with labelled images that it was not trained on."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from deit import files, locks
from deit.data.batches import EvaluationBatches
from deit.data.folders import Split, fingerprint, has_split, matched, read_examples
from deit.evaluate.calibration import FILE, Calibration, HeadCalibration, fit
from deit.model.heads import head_probabilities
from deit.model.load import refuse_other_scoring
from deit.model.outputs import ImageClassifierOutput, ModelOutput
from deit.predict.predictor import Predictor
from deit.train.records import ABOUT, RECIPE, About

_BATCH = 64


def calibrate(
    folder: str | Path,
    data: str | Path,
    *,
    split: str | None = None,
    error_rate: float = 0.05,
    device: str = "auto",
    console: Console | None = None,
) -> Calibration:
    """Fits every head's temperature and threshold and stores them as `calibration.json` in the model's folder.

    Args:
        folder: the folder of a trained model, on this machine.
        data, split: as for `read_examples`, except that `split` is `val` by default if the data has such a split.
            Classes are matched to the model's by name.
        error_rate: share of new images that may get a label that is sure and wrong; above 0 and below 1.

    Raises `FileNotFoundError` if there is no such folder, and `ValueError` if the images don't fit the model or are too
    few. Nothing is stored then. Warns if the model was trained on the images, as far as its run says it.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder on this machine, and the calibration is stored in the model's folder; check the "
            "path, or save a model of the hub into a folder first"
        )
    if split is None and has_split(data, "val"):
        split = "val"
    examples, part = read_examples(data, split)
    found = calibrate_split(folder, examples, str(data), error_rate=error_rate, device=device, console=console)
    if part == "train" or _trained_on(folder, str(data), part, found.data):
        warnings.warn(
            "if the model was trained on these images, or on some of them, it is surer of them than of others, and "
            f"more than {error_rate:.3g} of new images may get one label that is sure and wrong; calibrate with "
            "validation images",
            stacklevel=2,
        )
    return found


def _trained_on(folder: str | Path, data: str, part: str | None, fingerprint: str) -> bool:
    """Whether the model's run says that it was trained on these images. False if there is no run that says anything."""
    try:
        about = About.from_dict(files.read_json(Path(os.path.abspath(folder)).parent / ABOUT))
    except (OSError, ValueError):
        return False
    return about.trained_on(data, part, fingerprint)


@torch.inference_mode()
def calibrate_split(
    folder: str | Path,
    examples: Split,
    data: str,
    *,
    error_rate: float = 0.05,
    device: str = "auto",
    console: Console | None = None,
) -> Calibration:
    """Like `calibrate`, for images that were already read. `data` only names them.

    Raises `locks.InUse` if another process calibrates the model, or if the run that it belongs to is still training.
    """
    run = Path(os.path.abspath(folder)).parent
    with ExitStack() as held:
        if (run / RECIPE).exists():  # a better model may replace the one that is calibrated
            held.enter_context(locks.held(run))
        held.enter_context(locks.held(Path(folder)))
        files.sweep(Path(folder), FILE)
        return _calibrated(folder, examples, data, error_rate, device, console or Console(stderr=True))


def _calibrated(
    folder: str | Path, examples: Split, data: str, error_rate: float, device: str, console: Console
) -> Calibration:
    predictor = Predictor(folder, device=device)
    refuse_other_scoring(folder, predictor.config.scoring, "calibration")
    batches = EvaluationBatches(matched(examples, tuple(predictor.labels)), predictor.processor, _BATCH, keep=False)
    kind: type[ModelOutput] = ImageClassifierOutput
    parts: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
    labels = []
    for batch in track(batches, str(folder), console=console, disable=not console.is_terminal):
        read = batch.labels >= 0
        if not read.any():
            continue
        found = predictor.logits(batch.pixels[read].numpy())
        kind = type(found)
        for name, value in found.items():
            parts[name].append(value.float().cpu())
        labels.append(batch.labels[read].numpy())
    if not labels:
        raise ValueError(f"none of the images in {data} can be read; give other images")
    output = kind(**{name: torch.cat(values) for name, values in parts.items()})
    truth = np.concatenate(labels)
    heads: dict[str, HeadCalibration] = {
        head: fit(lambda t, head=head: head_probabilities(output, t)[head].numpy(), truth, error_rate)
        for head in head_probabilities(output)
    }
    calibration = Calibration(error_rate=error_rate, images=len(truth), data=fingerprint(examples), heads=heads)
    calibration.save(Path(folder))
    return calibration
