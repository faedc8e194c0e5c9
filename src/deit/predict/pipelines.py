"""`pipeline()` for this package's models, with the inputs and outputs of transformers' image pipelines.

B images, N tokens, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from deit.choices import Head, Runtime, Scoring
from deit.image.processor import DeiTImageProcessor
from deit.model.load import classifier_of
from deit.model.network import DeiTModel, PreTrained
from deit.predict.predictor import Predictor

Function = Literal["default", "softmax", "sigmoid", "none"]
Task = Literal["image-classification", "image-feature-extraction"]
Device = str | int | torch.device | None

MAX_DOWNLOAD = 32 * 2**20
"""Largest download of one image, in bytes."""


def pipeline(task: Task | None = None, model: str | Path | nn.Module | None = None, **options: Any) -> Any:
    """Returns a callable that turns images into answers, as `transformers.pipeline` does.

    Args:
        task: `image-classification` (`ImageClassificationPipeline`) or `image-feature-extraction`
            (`ImageFeatureExtractionPipeline`); None means classification.
        model: a trained folder, a hub name, or a model in memory together with its `image_processor`.
        options: the options of that class.

    Raises `ValueError` for another task, or if no model is given.
    """
    if model is None:
        raise ValueError(
            "pipeline needs a model, found None; give a trained folder, or a hub name like "
            "facebook/deit-tiny-distilled-patch16-224"
        )
    classes: dict[Any, Any] = {
        None: ImageClassificationPipeline,
        "image-classification": ImageClassificationPipeline,
        "image-feature-extraction": ImageFeatureExtractionPipeline,
    }
    if task not in classes:
        raise ValueError(f"there is no pipeline {task!r}; choose image-classification or image-feature-extraction")
    return classes[task](model, **options)


class ImageClassificationPipeline:
    """Turns each image into `[{"label": name, "score": number}, …]`, best first.

    Args:
        model: a trained folder, a hub name, or a model in memory.
        image_processor: replaces the folder's. A model in memory needs one.
        head: which of a distilled model's heads decides.
        top_k: number of labels for each image; if the model has fewer, all of them.
        function_to_apply: `softmax` gives the probabilities of `Predictor`, with its head and calibration. `sigmoid`
            and `none` use its logits. `default` is `none` for regression, `sigmoid` for models with a single label or
            with many labels for an image, and otherwise `softmax`.
        batch_size: number of images computed at once.
        device: `cpu`, `cuda`, the number of a GPU, or -1 or None for the CPU.
        engine: as for `Predictor`; `auto` is the fastest on a CPU.
        allow_urls: fetch images from `http://` and `https://` addresses. Without it they are refused.
        timeout: seconds to wait for such an address.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        image_processor: DeiTImageProcessor | None = None,
        head: Head = "fused",
        top_k: int = 5,
        function_to_apply: Function | None = None,
        batch_size: int = 1,
        device: Device = None,
        engine: Runtime | None = None,
        allow_urls: bool = False,
        timeout: float | None = 10.0,
    ):
        given = classifier_of(model, _needed(image_processor)) if isinstance(model, nn.Module) else model
        self.predictor = Predictor(given, head=head, device=_device(device), engine=engine)
        self.predictor.processor = image_processor or self.predictor.processor
        self.top_k, self.batch_size = top_k, batch_size
        self.function_to_apply, self.allow_urls, self.timeout = function_to_apply, allow_urls, timeout

    def __call__(
        self,
        inputs: Any,
        *,
        top_k: int | None = None,
        function_to_apply: Function | None = None,
        batch_size: int | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Answers one image or many.

        A path, an address, the bytes of a file, a Pillow image or an array (H, W, C) or (C, H, W) gives one list of
        labels. A list of these gives a list of such lists. Any other iterable gives an iterator, which reads an image
        only when its answer is asked for.

        The other arguments replace those of the constructor for this call. Raises `ImageError` for an image that can't
        be read.
        """
        score = self._score(function_to_apply or self.function_to_apply or "default")
        count = self.top_k if top_k is None else top_k
        if count < 1:
            raise ValueError(f"top_k must be at least 1, found {count}")

        def answer(images: list[Any]) -> list[Any]:
            rows = score(np.stack([self.predictor.prepared(image) for image in images]))  # (B, C)
            best = np.argsort(-rows, axis=1, kind="stable")[:, :count]
            return [
                [{"label": self.predictor.labels[i], "score": float(row[i])} for i in indices]
                for row, indices in zip(rows, best, strict=True)
            ]

        fetched = _fetching(self.allow_urls, self.timeout if timeout is None else timeout)
        return _like_the_input(inputs, fetched, answer, batch_size or self.batch_size)

    def _score(self, function: str) -> Callable[[np.ndarray], np.ndarray]:
        if function == "default":
            return self.predictor.scores
        if function in get_args(Scoring):
            return partial(self.predictor.scores, scoring=function)  # type: ignore[arg-type]
        raise ValueError(f"function_to_apply={function!r} is not known; choose default, softmax, sigmoid or none")


class ImageFeatureExtractionPipeline:
    """Turns each image into its tokens after the last block and the final LayerNorm, as nested lists (1, N, D).

    Args:
        model: a trained folder, a hub name, or a model in memory; its heads are left out.
        image_processor: as for classification.
        pool: return the output of the model's pooler (1, D) instead.
        return_tensors: return tensors instead of lists.
        batch_size, device, allow_urls, timeout: as for classification.

    Raises `ValueError` if `pool` is set and the model has no pooler.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        image_processor: DeiTImageProcessor | None = None,
        pool: bool = False,
        return_tensors: bool = False,
        batch_size: int = 1,
        device: Device = None,
        allow_urls: bool = False,
        timeout: float | None = 10.0,
    ):
        self.device = torch.device(_device(device))
        if isinstance(model, nn.Module):
            if not isinstance(model, PreTrained):
                raise ValueError(f"found a {type(model).__name__}, expected a model of the DeiT family")
            self.model: Any = model.eval().to(self.device).backbone
            self.processor = _needed(image_processor)
        else:
            self.model = DeiTModel.from_pretrained(model).to(self.device)
            self.processor = image_processor or DeiTImageProcessor.of_model(model, self.model.config)
        if pool and self.model.pooler is None:
            raise ValueError(f"pool=True needs a model with a pooler, found none in {model}; leave pool out")
        self.pool, self.return_tensors, self.batch_size = pool, return_tensors, batch_size
        self.allow_urls, self.timeout = allow_urls, timeout

    def __call__(self, inputs: Any, *, batch_size: int | None = None, timeout: float | None = None) -> Any:
        """Returns the features of one image or many, given in the same ways as to `ImageClassificationPipeline`."""
        fetched = _fetching(self.allow_urls, self.timeout if timeout is None else timeout)
        return _like_the_input(inputs, fetched, self._features, batch_size or self.batch_size)

    @torch.inference_mode()
    def _features(self, images: list[Any]) -> list[Any]:
        pixels = self.processor(images, return_tensors="pt").pixel_values.to(self.device)
        out = self.model(pixels)
        found: Tensor = out.pooler_output if self.pool else out.last_hidden_state
        return [each[None] if self.return_tensors else each[None].tolist() for each in found]


def _like_the_input(
    inputs: Any, fetched: Callable[[Any], Any], answer: Callable[[list[Any]], list[Any]], batch_size: int
) -> Any:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")
    if isinstance(inputs, str | Path | bytes | Image.Image | np.ndarray | Tensor):
        return answer([fetched(inputs)])[0]
    if not isinstance(inputs, Iterable):
        raise ValueError(
            f"expected a path, bytes, a Pillow image or an array, found {type(inputs).__name__}; give one of these, a "
            "list of them, or an iterable"
        )

    def answers() -> Iterator[Any]:
        iterator = iter(inputs)
        while batch := list(islice(iterator, batch_size)):
            yield from answer([fetched(each) for each in batch])

    return list(answers()) if isinstance(inputs, list | tuple) else answers()


def _fetching(allowed: bool, timeout: float | None) -> Callable[[Any], Any]:
    def fetched(image: Any) -> Any:
        if not (isinstance(image, str) and image.lower().startswith(("http://", "https://"))):
            return image
        if not allowed:
            raise ValueError(f"{image} is an address, and fetching is not allowed; pass allow_urls=True to allow it")
        from urllib.error import HTTPError, URLError
        from urllib.request import FTPHandler, build_opener

        class NoFTP(FTPHandler):  # urllib follows redirects to http, https and ftp
            def ftp_open(self, req: Any) -> NoReturn:
                raise URLError(f"it leads to {req.full_url}, expected http or https")

        try:
            with build_opener(NoFTP).open(image, timeout=timeout) as response:
                content: bytes = response.read(MAX_DOWNLOAD + 1)
        except (URLError, TimeoutError, OSError) as error:
            if isinstance(error, HTTPError):
                error.close()
            raise ValueError(
                f"{image} can't be fetched ({error}); check the address, or save the image and pass its path"
            ) from None
        if len(content) > MAX_DOWNLOAD:
            raise ValueError(f"{image} is larger than {MAX_DOWNLOAD // 2**20} MiB; save it and pass its path")
        return content

    return fetched


def _needed(processor: DeiTImageProcessor | None) -> DeiTImageProcessor:
    if processor is None:
        raise ValueError("a model in memory says nothing about its images; pass image_processor too")
    return processor


def _device(device: Device) -> str | torch.device:
    if isinstance(device, int):
        return "cpu" if device < 0 else f"cuda:{device}"
    return "cpu" if device is None else device
