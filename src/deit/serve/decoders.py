"""Processes that decode, each of them one image at a time. They are ended and replaced when they take too much."""

from __future__ import annotations

import multiprocessing
import threading
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import numpy as np

from deit.image.confined import PIXELS, SENTENCE, Bounds, work
from deit.image.decode import ImageError
from deit.image.processor import DeiTImageProcessor

_SPAWN = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks, and the model

_STARTS = 60  # seconds for a process to start


class TooMuch(Exception):
    """An image took more time, work or memory than it may, or its process ended for another reason."""


class Decoders:
    """Decodes images in other processes. Any number of threads may call it; each call takes a process of its own.

    Processes start when they are needed, and stay.

    Args:
        processor: makes pixels of an image.
        bounds: what an image may take.
        patience: seconds until a process that does not answer is ended. `bounds.seconds` usually ends it earlier.
            A process that starts has a minute more.
    """

    def __init__(self, processor: DeiTImageProcessor, bounds: Bounds, patience: float):
        self.processor, self.bounds, self.patience = processor, bounds, patience
        self._lock = threading.Lock()
        self._idle: list[tuple[BaseProcess, Connection]] = []
        self._all: set[BaseProcess] = set()
        self._new: set[BaseProcess] = set()  # those that have not said yet that they are ready
        self._closed = False

    def __call__(self, data: bytes) -> np.ndarray:
        """The pixels (channels, height, width) of an image. Raises `ImageError` and `TooMuch`."""
        process, connection = self._taken()
        try:
            if process in self._new:
                if not connection.poll(_STARTS):
                    raise TimeoutError
                connection.recv_bytes(maxlength=1)
                self._new.discard(process)
            connection.send_bytes(data)
            if not connection.poll(self.patience):
                raise TimeoutError
            found = connection.recv_bytes(maxlength=max(2**16, 1 + 4 * int(np.prod(self.bounds.shape))))
        except (OSError, EOFError):  # TimeoutError is an OSError
            self._end(process, connection)
            raise TooMuch from None
        with self._lock:
            self._idle.append((process, connection))
        kind, content = found[:1], memoryview(found)[1:]
        if kind == SENTENCE:
            raise ImageError(str(content, "utf-8", "replace"))
        if kind != PIXELS:
            raise TooMuch
        return np.frombuffer(content, np.float32).reshape(self.bounds.shape).copy()  # its owner may write into it

    def start(self, count: int) -> None:
        """Starts processes now, until there are `count`. Raises `TooMuch` if they can't work."""
        taken = [self._taken() for _ in range(count)]
        for process, connection in taken:
            if process in self._new and not connection.poll(_STARTS):
                raise TooMuch
        with self._lock:
            self._idle += taken

    def _taken(self) -> tuple[BaseProcess, Connection]:
        with self._lock:
            if self._closed:
                raise TooMuch
            if self._idle:
                return self._idle.pop()
            ours, theirs = _SPAWN.Pipe()
            process = _SPAWN.Process(
                target=work, args=(theirs, self.processor, self.bounds), name="deit-decode", daemon=True
            )
            process.start()
            theirs.close()
            self._all.add(process)
            self._new.add(process)
            return process, ours

    def _end(self, process: BaseProcess, connection: Connection) -> None:
        connection.close()
        process.kill()
        process.join()
        with self._lock:
            self._all.discard(process)
            self._new.discard(process)

    def close(self) -> None:
        """Ends all processes at once. Calls that wait for one raise `TooMuch`."""
        with self._lock:
            self._closed = True
            for process in self._all:
                process.kill()
            for process in self._all:
                process.join()
