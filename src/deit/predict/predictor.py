"""From image files to labels: everything that uses a trained folder goes through `Predictor`."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image

from deit.choices import Head, Runtime, Scoring
from deit.config import ModelConfig, read_config
from deit.evaluate.calibration import Calibration
from deit.export.cache import cached_engine
from deit.export.engines import DESCRIPTION, Engine, load_engine, read_description
from deit.host import cores
from deit.image.decode import ImageError
from deit.image.processor import DeiTImageProcessor
from deit.machine import resolve_device
from deit.model.heads import head_scores
from deit.model.load import Classifier, load_classifier, refuse_head, refuse_not_finite, refuse_other_scoring
from deit.predict.backends import Backend, EngineBackend, TorchBackend
from deit.predict.fastest import fastest

Source = str | Path | bytes | Image.Image
"""A file's path or bytes, or a picture."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's labels for one image, or the reason why there are none."""

    source: Source
    labels: list[dict[str, Any]]
    """`{"label": name, "score": probability}`, best first."""
    sure: bool | None = None
    """Whether exactly one label is likely enough at the calibration's error rate; None if the model is not calibrated.
    """
    error: str | None = None
    """Why the image could not be read. There are no labels then."""

    def to_dict(self) -> dict[str, Any]:
        """A row of `deit predict --json`. Fields that are None are left out, and so is an image without a path."""
        named = {"image": str(self.source)} if isinstance(self.source, str | Path) else {}
        rest = {"labels": self.labels, "sure": self.sure, "error": self.error}
        return named | {key: value for key, value in rest.items() if value is not None}


class Predictor:
    """A classifier with its preprocessing, its labels and its calibration: the only way from files to labels.

    Args:
        name_or_folder: what `deit`, `transformers`, timm or `deit export` wrote, a hub name, or a `Classifier`.
        head: which of a distilled model's heads decides (`fuse_heads`).
        device: `cpu`, `cuda`, …; `auto` is the GPU if there is one and PyTorch computes.
        engine: the software that computes. None is PyTorch, or for an exported model its own runtime. `openvino` and
            `onnx` compute on the CPU; the first use exports the model for them, which takes some seconds
            (`cached_engine`). `auto` is the faster one of OpenVINO and PyTorch if the device is the CPU and OpenVINO
            is installed, otherwise PyTorch. It is measured once for a model and a machine.

    If the folder has a `calibration.json` (`deit calibrate`), its temperature is part of every probability.

    Raises `FileNotFoundError` if the files don't say how images are prepared. Raises `ValueError` for a model without
    classes, for a head that it doesn't have, and for an engine that can't compute it on this device.
    """

    model: Any
    """The PyTorch model, whatever the engine; None for an exported model."""
    engine: str
    """The software that computes: `torch`, or the name of a runtime and the precision that it has chosen."""

    def __init__(
        self,
        name_or_folder: str | Path | Classifier,
        *,
        head: Head = "fused",
        device: str | torch.device = "cpu",
        engine: Runtime | None = None,
    ):
        self.head = head
        if engine not in (None, *get_args(Runtime)):
            raise ValueError(f"engine is {engine!r}, expected one of {', '.join(get_args(Runtime))}")
        self.config: ModelConfig
        self.model: Any = None
        given = name_or_folder if isinstance(name_or_folder, Classifier) else None
        folder = Path() if isinstance(name_or_folder, Classifier) else Path(name_or_folder)
        exported = given is None and (folder / DESCRIPTION).is_file()
        if device == "auto" and (exported or engine in ("openvino", "onnx")):
            device = "cpu"
        if exported:
            self.device = torch.device(device)
            self.config = read_config(folder / "config.json")
            self.processor = DeiTImageProcessor.of_model(folder, self.config)
            self._backend: Backend = EngineBackend(_exported(folder, self.device, engine), self.config.scoring)
        else:
            if engine in ("openvino", "onnx") and torch.device(device).type != "cpu":
                raise ValueError(f"engine {engine} needs the device cpu, found {device}; leave one of them out")
            self.device = resolve_device(device)
            classifier = given or load_classifier(name_or_folder)  # type: ignore[arg-type]
            self.model, self.config, self.processor = classifier.model, classifier.model.config, classifier.processor
            self._backend = _backend_for(classifier, self.device, engine)
        refuse_head(head, self._backend.heads)
        self.engine = str(self._backend)
        self.calibration = None if given else Calibration.of_model(folder)
        if self.calibration is not None:
            refuse_other_scoring(folder, self.config.scoring, "its calibration.json")
        self.labels = list(self.config.id2label.values())  # type: ignore[union-attr]

    def __call__(self, images: Sequence[Source], top_k: int = 5) -> list[list[dict[str, Any]]]:
        """Returns the `top_k` most likely labels of each image: `{"label": name, "score": probability}`, best first.

        Raises `ImageError` naming the first image that can't be read.
        """
        if not images:
            return []
        return [answer.labels for answer in self.answers(images, np.stack([*map(self.prepared, images)]), top_k)]

    def stream(self, sources: Iterable[Source], *, top_k: int = 5, batch: int = 32) -> Iterator[Answer]:
        """Yields an answer for each image, in order. The answer for an unreadable image has an `error`.

        Threads read two batches ahead while one is computed, so any number of images takes the same memory.
        """
        with ThreadPoolExecutor(cores()) as pool:
            waiting: deque[list[tuple[Source, Future[np.ndarray]]]] = deque()
            try:
                for chunk in _batched(sources, batch):
                    waiting.append([(source, pool.submit(self.prepared, source)) for source in chunk])
                    if len(waiting) > _AHEAD:
                        yield from self._finished(waiting.popleft(), top_k)
                while waiting:
                    yield from self._finished(waiting.popleft(), top_k)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _finished(self, chunk: list[tuple[Source, Future[np.ndarray]]], top_k: int) -> Iterator[Answer]:
        errors = {i: future.exception() for i, (_, future) in enumerate(chunk)}
        for error in errors.values():
            if error is not None and not isinstance(error, ImageError):
                raise error
        read = [(source, future.result()) for i, (source, future) in enumerate(chunk) if errors[i] is None]
        answers = iter(
            self.answers([source for source, _ in read], np.stack([pixels for _, pixels in read]), top_k)
            if read
            else []
        )
        for i, (source, _) in enumerate(chunk):
            yield next(answers) if errors[i] is None else Answer(source=source, labels=[], error=str(errors[i]))

    def prepared(self, source: Source) -> np.ndarray:
        """One image as the model sees it: (channels, height, width) in float32. Raises `ImageError`."""
        return self.processor([source]).pixel_values[0]

    def answers(self, sources: Sequence[Source], pixels: np.ndarray, top_k: int) -> list[Answer]:
        """The answers for `prepared` images, whose pixels are (B, channels, height, width)."""
        scores = self.scores(pixels)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]  # (B, top_k)
        sure = [None] * len(sources) if self.calibration is None else self.calibration.sure(scores, self.head)
        return [
            Answer(
                source=source, sure=certain, labels=[{"label": self.labels[i], "score": float(row[i])} for i in indices]
            )
            for source, certain, row, indices in zip(sources, sure, scores, best, strict=True)
        ]

    def scores(self, pixels: np.ndarray, scoring: Scoring | None = None) -> np.ndarray:
        """The head's scores (B, C) for pixels (B, channels, height, width).

        The model's configuration decides what they are (`DeiTConfig.scoring`): probabilities of classes that exclude
        each other, a probability for each label, or the outputs of a regression. `scoring` asks for another kind. Only
        probabilities of classes that exclude each other are calibrated, if the model is.

        Raises `NotFinite` for answers that are not numbers, and `ValueError` for a head without logits if these are
        needed. The head `softmax` has none, because it fuses probabilities.
        """
        scoring = scoring or self.config.scoring
        temperature = 1.0
        if self.calibration is not None and scoring == "softmax":
            temperature = self.calibration.temperature(self.head)
        found = head_scores(self.logits(pixels), scoring, temperature)
        if self.head not in found:
            raise ValueError(
                f"head {self.head!r} has no logits of its own, so it has no score by {scoring}; choose the head "
                f"{' or '.join(found)}, or set function_to_apply to softmax"
            )
        return found[self.head].cpu().numpy()

    def logits(self, pixels: np.ndarray) -> Any:
        """The model's output for pixels (B, channels, height, width). Raises `NotFinite` if it is not finite."""
        output = self._backend(pixels)
        refuse_not_finite(output.values())
        if (found := output["logits"].shape[-1]) != len(self.labels):
            raise ValueError(
                f"the model gives {found} numbers for an image, and its config.json names {len(self.labels)} labels; "
                "take both files from one model"
            )
        return output


def _exported(folder: Path, device: torch.device, engine: Runtime | None) -> Engine:
    if device.type != "cpu":
        raise ValueError(
            f"{folder} is an exported model, which needs the device cpu, found {device}; leave the device out, or give "
            "the model that was exported"
        )
    own = read_description(folder)["format"]
    if engine not in (None, "auto", own.partition("-")[0]):
        raise ValueError(
            f"{folder} is exported for {own}, but engine is {engine}; leave the engine out, or give the model that was "
            "exported"
        )
    return load_engine(folder)


def auto_engine(device: torch.device) -> Literal["openvino", "torch"]:
    """The engine that `auto` tries on a device. On a CPU, PyTorch computes if it turns out to be faster."""
    return "openvino" if device.type == "cpu" and find_spec("openvino") is not None else "torch"


def _backend_for(classifier: Classifier, device: torch.device, engine: Runtime | None) -> Backend:
    """The back end that computes a trained model."""
    if engine is None or engine == "torch":
        return TorchBackend(classifier, device)
    if engine != "auto":
        return EngineBackend(cached_engine(classifier, engine), classifier.model.config.scoring)
    if auto_engine(device) == "openvino":
        try:
            exported = EngineBackend(cached_engine(classifier, "openvino"), classifier.model.config.scoring)
            return fastest(TorchBackend(classifier, device), exported)
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            warnings.warn(f"using PyTorch because OpenVINO can't be used: {error}", stacklevel=3)
    return TorchBackend(classifier, device)


_AHEAD = 2
"""Number of batches that are read while another one is computed."""


def _batched(items: Iterable[Source], size: int) -> Iterator[list[Source]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
