"""Dynamic batching. Processes decode the images of many requests, and one thread with the model computes them together.

```
submit ─┐                                    ┌─► batch of 1 to max_batch ─┐
        ├─► decoding (processes) ─► ready ───┤   (owner thread, in turn)  ├─► each request's future
explain ┘                                    └─► one explanation ─────────┘
```

Images that take more than a little to decode, `_QUICK`, have processes of their own, half as many as cores and at most
`_MOST_LARGE`. So a crowd of them does not keep usual images waiting.
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
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from deit.choices import Method
from deit.explain.explanation import Explanation, explain_pixels, explained_model
from deit.host import cores
from deit.image.confined import Bounds
from deit.image.decode import ImageError
from deit.machine import device_lost
from deit.predict.predictor import Answer, Predictor
from deit.serve.decoders import Decoders, TooMuch

_EXPLAINED = 4
"""Explanations get at most one of this many places in the queue. Each one costs the time of several images, and they
must not keep requests for labels out."""

_QUICK = 16_000_000
"""Most pixels that an image of the quick processes has to decode: a photograph of 64 megapixels in a usual JPEG, or a
screen of 5300 by 3000 in a PNG. Those processes have one second for each image."""
_MOST_LARGE = 4
_AT_FIRST = 4  # quick processes that start with the server
_AT_REST = 128 * 2**20
_BYTES_PER_PIXEL = 10
"""What decoding may take beyond what a process takes at rest. An RGBA picture that is made RGB takes 8 bytes for each
pixel; 16 bits for each value take 27, so only two fifths of the pixels."""

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


class _Lane:
    """Images that wait for some decoders, and the number of threads that bring them there."""

    def __init__(self, decoders: Decoders, threads: int):
        self.decoders, self.threads = decoders, threads
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()


def _memory(pixels: int) -> int:
    return _AT_REST + _BYTES_PER_PIXEL * pixels


class Batcher:
    """Answers images as they come.

    Args:
        predictor: the predictor. One thread calls it.
        max_batch: largest number of images computed together.
        max_wait: seconds that a decoded image waits for others.
        queue_size: number of images that may be decoding or waiting; more are refused. A quarter of them may wait for
            explanations.
        max_pixels: largest image, in pixels. Larger ones are refused by their header.
        seconds: most time that an image may take to decode, in seconds of the processor.
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
        seconds: float,
        computed: Callable[[int], object] = lambda images: None,
    ):
        self.predictor, self.max_batch, self.max_wait = predictor, max_batch, max_wait
        self.queue_size, self.computed = queue_size, computed
        self._lock = threading.Lock()
        self.lost = ""
        """Why no answer can come any more, until the process is started again; empty while answers can come."""
        self._closing = False
        self._waiting = 0
        self._unexplained = 0  # the part of them that waits for explanations
        self._seconds_per_image = self._seconds_per_explanation = 0.0
        self._ready: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        height, width = predictor.config.image_hw
        blank = Image.new("RGB", (width, height))
        file = io.BytesIO()
        blank.save(file, "PNG")
        self._blank = file.getvalue()
        shape = predictor.prepared(blank).shape  # (channels, height, width)
        quick, patience = min(_QUICK, max_pixels), 3 * seconds
        self._quick = self._lane(Bounds(max_pixels, quick, min(1.0, seconds), _memory(quick), shape), patience, cores())
        self._large = self._lane(
            Bounds(max_pixels, max_pixels, seconds, _memory(max_pixels), shape),
            patience,
            min(_MOST_LARGE, max(1, cores() // 2)),
        )
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
            self._quick.jobs.put(job)
        return [job.answer for job in jobs]

    def start(self) -> None:
        """Starts some quick processes. They would otherwise start when they are needed, as the others do.

        Raises `RuntimeError` if they can't work.
        """
        try:
            self._quick.decoders.start(min(_AT_FIRST, cores()))
            self._quick.decoders(self._blank)
        except TooMuch:
            raise RuntimeError(
                "the processes that decode end at once; let this user start processes, and give them memory"
            ) from None

    def close(self, seconds: float) -> None:
        """Waits until everything that was submitted has its answer, and ends the threads and processes.

        After `seconds`, it waits no more: what is being decoded is ended, and the thread with the model is left alone.
        """
        until = time.monotonic() + seconds
        while self._waiting and time.monotonic() < until:
            time.sleep(0.01)
        self._closing = True
        for lane in (self._quick, self._large):
            lane.decoders.close()
            for _ in range(lane.threads):
                lane.jobs.put(None)
        self._ready.put(None)
        self._owner.join(max(0.0, until - time.monotonic()))

    def _lane(self, bounds: Bounds, patience: float, threads: int) -> _Lane:
        lane = _Lane(Decoders(self.predictor.processor, bounds, patience), threads)
        for _ in range(threads):
            threading.Thread(target=self._decode, args=(lane,), name="deit-decode", daemon=True).start()
        return lane

    def _decode(self, lane: _Lane) -> None:
        while (job := lane.jobs.get()) is not None:
            if job.answer.cancelled():
                self._leave(job)
                continue
            try:
                job.pixels = lane.decoders(job.data)
            except TooMuch:
                if lane is self._quick and not self._closing:
                    self._large.jobs.put(job)
                    continue
                bounds = lane.decoders.bounds
                self._fail(
                    job,
                    ImageError(
                        f"the image takes more than the {bounds.seconds:g} s or the {bounds.memory / 1e6:.0f} MB to "
                        "decode that are allowed here; shrink it, or save it again as JPEG or PNG"
                    ),
                )
            except ImageError as error:
                self._fail(job, error)
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
