"""Dynamic batching. Threads decode the images of many requests, and one thread with the model computes them together.

```
submit ─┐                                  ┌─► batch of 1 to max_batch ─┐
        ├─► decoding (threads) ─► ready ───┤   (owner thread, in turn)  ├─► each request's future
explain ┘                                  └─► one explanation ─────────┘
```
"""

from __future__ import annotations

import io
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from deit.choices import Method
from deit.explain.explanation import Explanation, explain_pixels, explained_model
from deit.host import cores
from deit.image.decode import ImageError, reading, without_texts
from deit.machine import device_lost
from deit.predict.predictor import Answer, Predictor

FORMATS = {"JPEG": "JPEG", "MPO": "JPEG", "PNG": "PNG", "WEBP": "WebP", "GIF": "GIF", "TIFF": "TIFF", "BMP": "BMP"}
"""The formats that are decoded for strangers, from Pillow's name to the usual one. Pillow knows more formats, but one
of them (EPS) starts a program."""

_FIRST_BYTES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"GIF8", b"II*\x00", b"MM\x00*", b"BM")

_EXPLAINED = 4
"""Explanations get at most one of this many places in the queue. Each one costs the time of several images, and they
must not keep requests for labels out."""

_log = logging.getLogger("deit.serve")


class Full(Exception):
    """The queue has no room. It should have some in `seconds`."""

    def __init__(self, seconds: int):
        super().__init__(f"too many images wait already; try again in {seconds} s")
        self.seconds = seconds


class ModelFailed(RuntimeError):
    """The model raised an exception."""


class Why(NamedTuple):
    """The part of an answer to explain, and the method."""

    method: Method
    target: int | None
    """The class to explain; None explains each head's own decision."""


@dataclass(eq=False)
class _Job:
    data: bytes
    top_k: int = 0
    why: Why | None = None  # if set, the job asks for an explanation instead of labels
    answer: Future[Any] = field(default_factory=Future)
    pixels: np.ndarray | None = None  # (channels, height, width)
    ready: float = 0.0  # monotonic seconds


class Batcher:
    """Answers images as they come.

    Args:
        predictor: the predictor. One thread calls it, and several threads call its `prepared`.
        max_batch: largest number of images computed together.
        max_wait: seconds that a decoded image waits for others.
        queue_size: number of images that may be decoding or waiting; more are refused. A quarter of them may wait for
            explanations.
        max_pixels: largest image, in pixels. Larger ones are refused by their header.
        computed: called with the number of images in each batch.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        max_batch: int,
        max_wait: float,
        queue_size: int,
        max_pixels: int,
        computed: Callable[[int], object] = lambda images: None,
    ):
        self.predictor, self.max_batch, self.max_wait = predictor, max_batch, max_wait
        self.queue_size, self.max_pixels, self.computed = queue_size, max_pixels, computed
        height, width = predictor.config.image_hw
        self._shape = predictor.prepared(Image.new("RGB", (width, height))).shape  # (channels, height, width)
        self._lock = threading.Lock()
        self.lost = ""
        """Why no answer can come any more, until the process is started again; empty while answers can come."""
        self._waiting = 0
        self._unexplained = 0  # the part of them that waits for explanations
        self._seconds_per_image = self._seconds_per_explanation = 0.0
        self._ready: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        Image.init()  # now, because it is not safe in several threads at once
        self._decoders = ThreadPoolExecutor(cores(), thread_name_prefix="deit-decode")
        self._owner = threading.Thread(target=self._run, name="deit-model", daemon=True)
        self._owner.start()

    @property
    def waiting(self) -> int:
        """Number of images that are decoding, or decoded and not yet being computed."""
        return self._waiting

    @property
    def alive(self) -> bool:
        """Whether the thread that computes still runs."""
        return self._owner.is_alive()

    def submit(self, images: list[bytes], top_k: int) -> list[Future[Answer]]:
        """Returns a future for each image. If it is cancelled before its batch begins, the image is not computed.

        Futures raise `ImageError` for an image that can't be read, and `ModelFailed`. Raises `Full` if the queue has no
        room for all images.
        """
        return self._enter([_Job(data, top_k) for data in images])

    def explain(self, image: bytes, why: Why) -> Future[Explanation]:
        """Does the same as `submit` for an explanation of one image. `explained_model` must accept the predictor."""
        [found] = self._enter([_Job(image, why=why)])
        return found

    def _enter(self, jobs: list[_Job]) -> list[Future[Any]]:
        explanations = sum(job.why is not None for job in jobs)
        with self._lock:
            if self._waiting + len(jobs) > self.queue_size or self._unexplained + explanations > max(
                1, self.queue_size // _EXPLAINED
            ):
                raise Full(
                    max(
                        1,
                        math.ceil(
                            (self._waiting - self._unexplained) * self._seconds_per_image
                            + self._unexplained * self._seconds_per_explanation
                        ),
                    )
                )
            self._waiting += len(jobs)
            self._unexplained += explanations
        for job in jobs:
            job.answer.add_done_callback(partial(_forget, job))
            self._decoders.submit(self._decode, job)
        return [job.answer for job in jobs]

    def close(self) -> None:
        """Waits until everything that was submitted has its answer, and ends the threads."""
        self._decoders.shutdown()
        self._ready.put(None)
        self._owner.join()

    def _decode(self, job: _Job) -> None:
        data = job.data
        if job.answer.cancelled():
            self._leave(job)
            return
        try:
            check_header(data, self.max_pixels)
            job.pixels = self.predictor.prepared(data)
            if job.pixels.shape != self._shape:  # possible if nothing is resized; it would spoil its batch
                raise ImageError(f"the image gives pixels of {job.pixels.shape}, expected {self._shape}; resize it")
        except MemoryError:
            self._fail(job, ImageError("the image takes more memory to decode than is free; shrink it"))
        except (ImageError, ValueError) as error:
            self._fail(job, ImageError(str(error).replace("<bytes>", "the image")))
        except Exception as error:  # a lost job would keep its place in the queue for ever
            _log.exception("decoding failed")
            self._fail(job, ImageError(f"the image can't be decoded ({type(error).__name__}); convert it to PNG"))
        else:
            job.data, job.ready = b"", time.monotonic()
            self._ready.put(job)

    def _leave(self, job: _Job) -> bool:
        """Gives up a job's place in the queue. Returns whether someone still waits for its answer."""
        with self._lock:
            self._waiting -= 1
            self._unexplained -= job.why is not None
        return job.answer.set_running_or_notify_cancel()

    def _fail(self, job: _Job, error: ImageError) -> None:
        if self._leave(job):
            job.answer.set_exception(error)

    def _run(self) -> None:
        aside: deque[_Job] = deque()  # explanations; one of them follows each batch
        open_ = True
        while open_ or aside:
            if open_:
                collected, open_ = self._collected(aside)
                if batch := [job for job in collected if self._leave(job)]:
                    self._compute(batch)
            while aside:
                job = aside.popleft()
                if self._leave(job):
                    self._explain(job)
                    break

    def _collected(self, aside: deque[_Job]) -> tuple[list[_Job], bool]:
        """Returns images for one batch, and whether more may come.

        Explanations go to the end of `aside`. If nothing else waits, the batch is empty.
        """
        collected: list[_Job] = []
        while len(collected) < self.max_batch:
            try:
                if collected:
                    job = self._ready.get(timeout=max(0.0, collected[0].ready + self.max_wait - time.monotonic()))
                else:
                    job = self._ready.get(block=not aside)
            except queue.Empty:
                break
            if job is None:
                return collected, False
            if job.answer.cancelled():
                self._leave(job)
            elif job.why is not None:
                aside.append(job)
            else:
                collected.append(job)
        return collected, True

    def _compute(self, batch: list[_Job]) -> None:
        began = time.monotonic()
        try:
            pixels = np.stack([job.pixels for job in batch if job.pixels is not None])  # (B, channels, height, width)
            answers = self.predictor.answers([b""] * len(batch), pixels, max(job.top_k for job in batch))
        except Exception as error:
            _log.exception("the model failed on a batch of %d", len(batch))
            self._failed(batch, error)
            return
        self._seconds_per_image = _recent(self._seconds_per_image, (time.monotonic() - began) / len(batch))
        self.computed(len(batch))
        for job, answer in zip(batch, answers, strict=True):
            job.answer.set_result(Answer(source=b"", labels=answer.labels[: job.top_k], sure=answer.sure))

    def _failed(self, jobs: list[_Job], error: Exception) -> None:
        if device_lost(error):
            self.lost = f"the GPU failed ({_first_line(error)}); the server has to be started again"
        for job in jobs:
            job.answer.set_exception(ModelFailed(self.lost or f"the model failed ({type(error).__name__}); try again"))

    def _explain(self, job: _Job) -> None:
        began = time.monotonic()
        try:
            assert job.pixels is not None
            assert job.why is not None
            pixels = torch.from_numpy(job.pixels).unsqueeze(0).to(self.predictor.device)
            found = explain_pixels(
                explained_model(self.predictor),
                self.predictor.processor,
                pixels,
                methods=[job.why.method],
                target=job.why.target,
            )
        except Exception as error:
            _log.exception("the model failed on an explanation")
            self._failed([job], error)
            return
        self._seconds_per_explanation = _recent(self._seconds_per_explanation, time.monotonic() - began)
        job.answer.set_result(found)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _recent(mean: float, seconds: float) -> float:
    return 0.8 * (mean or seconds) + 0.2 * seconds


def _forget(job: _Job, _: Future[Answer]) -> None:
    """Frees the memory of a job that is done. A cancelled job may stay in the queue for long."""
    job.data, job.pixels = b"", None


def check_header(data: bytes, max_pixels: int) -> None:
    """Raises `ImageError` for a format outside `FORMATS` or more than `max_pixels`, before anything is decoded."""
    try:
        _check_header(data, max_pixels)
    except ImageError:
        if (bare := without_texts(data)) is None:
            raise
        _check_header(bare, max_pixels)


def _check_header(data: bytes, max_pixels: int) -> None:
    too_large = f"the image has more than the {max_pixels} pixels allowed here; shrink it"
    found = None
    if data.startswith(_FIRST_BYTES):
        with reading("the image", data):
            try:
                found = Image.open(io.BytesIO(data))
            except Image.DecompressionBombError:
                raise ImageError(too_large) from None
    if found is None or found.format not in FORMATS:
        *most, last = dict.fromkeys(FORMATS.values())
        raise ImageError(f"the image is not a {', '.join(most)} or {last} file; convert it to one of them")
    if found.width * found.height > max_pixels:
        raise ImageError(too_large)
