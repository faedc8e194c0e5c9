"""Chooses the faster one of two back ends by measuring them, once for a model and a machine."""

from __future__ import annotations

import statistics
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from deit import files, host
from deit.machine import described
from deit.predict.backends import Backend, EngineBackend, TorchBackend

FILE = "speed.json"
"""File beside the exported model that keeps what was measured."""
_IMAGES = 8
_ROUNDS = 3
_SECONDS = 5.0
"""Time after which no further round is begun."""


def fastest(torch_backend: TorchBackend, engine: EngineBackend) -> Backend:
    """The back end that computes more images a second here. What is measured is kept in the engine's folder.

    Measuring takes some seconds at most, for a small model a fraction of one.
    """
    machine = {"deit": host.VERSION, "torch": torch.__version__, "processor": described(torch.device("cpu"))}
    place = engine.engine.folder / FILE
    rates = _kept(place, machine)
    if rates is None:
        rates = measured({"torch": torch_backend, "engine": engine}, engine.engine.shape)
        with suppress(OSError):  # if the folder is read-only, it is measured each time
            files.write_json(place, {"machine": machine, "images_per_second": rates})
    return engine if rates["engine"] >= rates["torch"] else torch_backend


def measured(backends: dict[str, Backend], shape: tuple[int, int, int]) -> dict[str, float]:
    """Images a second of each back end on noise of this `shape`, the median of a few rounds in turn."""
    pixels = np.random.default_rng(0).standard_normal((_IMAGES, *shape), dtype=np.float32)
    for backend in backends.values():
        backend(pixels)  # the first call also starts threads and takes memory
    times: dict[str, list[float]] = {name: [] for name in backends}
    began = time.perf_counter()
    while len(times["torch"]) < _ROUNDS and not (times["torch"] and time.perf_counter() - began > _SECONDS):
        for name, backend in backends.items():
            started = time.perf_counter()
            backend(pixels)
            times[name].append(time.perf_counter() - started)
    return {name: _IMAGES / statistics.median(each) for name, each in times.items()}


def _kept(place: Path, machine: dict[str, str]) -> dict[str, float] | None:
    """The rates in a file that was written on this machine; None if there is none, or a damaged one."""
    try:
        found = files.read_json(place)
        rates = {name: float(found["images_per_second"][name]) for name in ("torch", "engine")}
        return rates if found["machine"] == machine and min(rates.values()) > 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
