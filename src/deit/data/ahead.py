"""Batches on a GPU, each of which is copied there while the GPU still computes with the one before."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Self

import torch

from deit.data.batches import Batch


class Ahead:
    """The batches of a generator, on a device.

    A GPU works through its queue while the host goes on. `fetch` uses this time. It takes the next batch from the
    loader processes and begins its copy on a second stream, which runs beside the computation if the memory is pinned.
    So call it after the last call that queues work, and before the first that waits for a result. It changes no value,
    and may be left out. If the device is the CPU, which has no queue, it does nothing.

    Args:
        backend: PyTorch's module of the device's streams, such as `torch.cuda`; None if it computes at once.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device, backend: Any = None):
        self.batches, self.device = batches, device
        self.backend = torch.cuda if backend is None and device.type == "cuda" else backend
        self.copying = None if self.backend is None else self.backend.Stream(device)
        self.fetched: Batch | Exception | None = None
        self.waited = 0.0
        """Seconds spent on waiting for the generator, all batches together."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch. An error of the loader processes is raised here, also if `fetch` met it."""
        if self.backend is None:
            return self._next().to(self.device)
        self.fetch()
        fetched, self.fetched = self.fetched, None
        if isinstance(fetched, Exception):
            raise fetched
        assert fetched is not None
        computing = self.backend.current_stream(self.device)
        computing.wait_stream(self.copying)
        fetched.used_by(computing)
        return fetched

    def fetch(self) -> None:
        """Fetches the next batch, unless it is fetched already, and begins to copy it."""
        if self.backend is None or self.fetched is not None:
            return
        try:
            batch = self._next()
        except Exception as error:  # a step is under way, which is to be finished
            self.fetched = error
            return
        with self.backend.stream(self.copying):
            self.fetched = batch.to(self.device)

    def _next(self) -> Batch:
        began = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.waited += time.perf_counter() - began

    def close(self) -> None:
        """Ends the loader processes."""
        self.fetched = None
        self.batches.close()  # type: ignore[attr-defined]
