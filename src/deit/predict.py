"""From image files to labels: the one way in which a trained folder is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from deit import files, hub, weights
from deit.calibration import Calibration
from deit.config import ConvNetConfig, DeiTConfig
from deit.convnet import ConvNet
from deit.decode import ImageError
from deit.engines import RECORD, Engine, cores, load_engine
from deit.image import DeiTImageProcessor
from deit.model import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTForMaskedImageModeling,
    DeiTModel,
    Head,
    PreTrained,
    head_probabilities,
)
from deit.outputs import DeiTForImageClassificationWithTeacherOutput, ImageClassifierOutput, ModelOutput

Source = str | Path | bytes | Image.Image
"""A file's path or bytes, or a picture."""

_CLASS: dict[str, type[PreTrained]] = {
    "Model": DeiTModel, "ForMaskedImageModeling": DeiTForMaskedImageModeling,
    "ForImageClassification": DeiTForImageClassification,
    "ForImageClassificationWithTeacher": DeiTForImageClassificationWithTeacher,
}
_OF_KIND = {cls.kind: cls for cls in _CLASS.values()}


def load_model(name_or_folder: str | Path, **options: Any) -> Any:
    """A trained model in evaluation mode, of the class its files are of; `options` as for `from_pretrained`."""
    where = {key: options[key] for key in ("revision", "subfolder", "cache_dir", "local_files_only", "token")
             if key in options}
    try:
        config = files.read_json(files.find_file(name_or_folder, "config.json", **where))
    except FileNotFoundError:
        config = {}
    if config.get("model_type") == ConvNet.model_type:
        return ConvNet.from_pretrained(name_or_folder, **where)
    name = next(iter(config.get("architectures") or []), "").removeprefix("DeiT").removeprefix("ViT")
    if name in _CLASS:
        return _CLASS[name].from_pretrained(name_or_folder, **options)
    found = hub.read_checkpoint(name_or_folder, config=options.pop("config", None), **where)
    others = {key: value for key, value in options.items() if key not in where}
    return _OF_KIND[weights.kind_of(found.tensors)].from_checkpoint(found, **others)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model says of one image, or why it says nothing."""

    source: Source
    labels: list[dict[str, Any]]
    """`{"label": name, "score": probability}`, best first."""
    sure: bool | None = None
    """Of a calibrated model: whether the one best label can be told at the stated error rate. None: not calibrated."""
    error: str | None = None
    """Why the image could not be read; then there are no labels."""

    def to_dict(self) -> dict[str, Any]:
        """A row of `deit predict --json`; fields that are None are left out, and images that have no name."""
        named = {"image": str(self.source)} if isinstance(self.source, str | Path) else {}
        rest = {"labels": self.labels, "sure": self.sure, "error": self.error}
        return named | {key: value for key, value in rest.items() if value is not None}


class Predictor:
    """A classifier with its preprocessing, its labels and its calibration: the only way from files to labels.

    Args:
        name_or_folder: what `deit`, `transformers` or timm saved, a hub name, or what `deit export` wrote, which its
            own runtime computes.
        head: which of a distilled model's heads decides (`fuse_heads`).
        device: `cpu`, `cuda`, …

    A folder with a `calibration.json` (`deit calibrate`) has its temperature in every probability.

    Raises `FileNotFoundError` where the files do not say how images are prepared.
    """

    def __init__(self, name_or_folder: str | Path, *, head: Head = "fused", device: str | torch.device = "cpu"):
        self.head, self.device = head, torch.device(device)
        self.model: Any = None  # stays None for an exported one
        self._output: Callable[[np.ndarray], ModelOutput]
        self.config: DeiTConfig | ConvNetConfig
        if (Path(name_or_folder) / RECORD).is_file():
            if self.device.type != "cpu":
                raise ValueError(f"{name_or_folder} is an exported model, which runs on the CPU here, and device is "
                                 f"{device}; leave it out, or give the model itself")
            self.config, self._output = _config_of(Path(name_or_folder)), _exported(load_engine(name_or_folder))
        else:
            self.model = load_model(name_or_folder).to(device)
            self.config = self.model.config
            self._output = lambda pixels: self.model(torch.from_numpy(pixels).to(self.device))
        self.processor = DeiTImageProcessor.of_model(name_or_folder, self.config)  # type: ignore[arg-type]
        self.calibration = Calibration.of_model(name_or_folder)
        self.labels = list(self.config.id2label.values())  # type: ignore[union-attr]

    def __call__(self, images: Sequence[Source], top_k: int = 5) -> list[list[dict[str, Any]]]:
        """For each image its `top_k` most likely labels: `{"label": name, "score": probability}`, best first.

        Raises `ImageError` naming the first image that can't be read.
        """
        if not images:
            return []
        return [answer.labels for answer in self.answers(images, np.stack([*map(self.prepared, images)]), top_k)]

    def stream(self, sources: Iterable[Source], *, top_k: int = 5, batch: int = 32) -> Iterator[Answer]:
        """An answer for each image, in order; unreadable ones are answers with an `error`.

        Any number of images: two batches are read ahead, by threads, while one is computed.
        """
        with ThreadPoolExecutor(cores()) as pool:
            waiting: deque[list[tuple[Source, Future[np.ndarray]]]] = deque()
            for chunk in _batched(sources, batch):
                waiting.append([(source, pool.submit(self.prepared, source)) for source in chunk])
                if len(waiting) > _AHEAD:
                    yield from self._finished(waiting.popleft(), top_k)
            while waiting:
                yield from self._finished(waiting.popleft(), top_k)

    def _finished(self, chunk: list[tuple[Source, Future[np.ndarray]]], top_k: int) -> Iterator[Answer]:
        errors = {i: future.exception() for i, (_, future) in enumerate(chunk)}
        for error in errors.values():
            if error is not None and not isinstance(error, ImageError):
                raise error
        read = [(source, future.result()) for i, (source, future) in enumerate(chunk) if errors[i] is None]
        answers = iter(self.answers([source for source, _ in read], np.stack([pixels for _, pixels in read]), top_k)
                       if read else [])
        for i, (source, _) in enumerate(chunk):
            yield next(answers) if errors[i] is None else Answer(source=source, labels=[], error=str(errors[i]))

    def prepared(self, source: Source) -> np.ndarray:
        """One image as the model sees it, (channels, height, width), float32. Raises `ImageError`."""
        return self.processor([source]).pixel_values[0]

    def answers(self, sources: Sequence[Source], pixels: np.ndarray, top_k: int) -> list[Answer]:
        """Of images that are `prepared`: pixels (B, channels, height, width)."""
        probabilities = self.probabilities(pixels)
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]  # (B, top_k)
        sure = [None] * len(sources) if self.calibration is None else self.calibration.sure(probabilities, self.head)
        return [Answer(source=source, sure=certain, labels=[
            {"label": self.labels[i], "score": float(row[i])} for i in indices])
            for source, certain, row, indices in zip(sources, sure, probabilities, best, strict=True)]

    def probabilities(self, pixels: np.ndarray) -> np.ndarray:
        """Of every class (B, C), by the head, calibrated where the model is; pixels (B, channels, height, width)."""
        temperature = 1.0 if self.calibration is None else self.calibration.temperature(self.head)
        by_head = head_probabilities(self.logits(pixels), temperature)
        if self.head not in by_head:
            raise ValueError(f"this model has no head {self.head!r}; it has {', '.join(by_head)}")
        return by_head[self.head].cpu().numpy()

    def head_logits(self, pixels: np.ndarray) -> np.ndarray:
        """Of every class (B, C), by the head; `softmax`, which fuses probabilities, has none."""
        found = self.logits(pixels)
        name = {"fused": "logits", "class": "cls_logits" if "cls_logits" in found else "logits",
                "distillation": "distillation_logits"}.get(self.head)
        if name is None or name not in found:
            raise ValueError(f"head {self.head!r} has no logits of its own here; choose fused or class, or softmax as "
                             "function_to_apply")
        return found[name].float().cpu().numpy()

    @torch.inference_mode()
    def logits(self, pixels: np.ndarray) -> Any:
        """The model's output for pixels (B, channels, height, width)."""
        return self._output(pixels)


def _config_of(folder: Path) -> DeiTConfig | ConvNetConfig:
    values = files.read_json(folder / "config.json")
    return (ConvNetConfig if values.get("model_type") == ConvNet.model_type else DeiTConfig).from_dict(values)


def _exported(engine: Engine) -> Callable[[np.ndarray], ModelOutput]:
    kind = DeiTForImageClassificationWithTeacherOutput if "cls_logits" in engine.outputs else ImageClassifierOutput

    def output(pixels: np.ndarray) -> ModelOutput:
        logits: dict[str, Any] = {name: torch.from_numpy(value) for name, value in engine(pixels).items()}
        return kind(**logits)

    return output


_AHEAD = 2
"""Batches that are read while another one is computed."""


def _batched(items: Iterable[Source], size: int) -> Iterator[list[Source]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
