"""Exported folders, run: one interface over PyTorch, ONNX Runtime and OpenVINO.

B images, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from deit import files, host

DESCRIPTION = "export.json"
"""What an exported folder says about itself; the keys are in docs/export.md."""
Hint = Literal["latency", "throughput"]
Precision = Literal["auto", "float32"]


class Engine(ABC):
    """An exported model in its runtime: pixels to logits. May be called from several threads.

    Args:
        folder: holds the model's files.
        description: the content of its `export.json`.
        hint: `latency`, all cores for one call; `throughput`, OpenVINO's streams, for calls from several threads. The
            other runtimes have no such choice.
        precision: `auto` is the runtime's own, for OpenVINO bfloat16 where the CPU has it; or `float32`.
    """

    name: ClassVar[str]
    """Name of the runtime."""

    def __init__(
        self, folder: Path, description: Mapping[str, Any], *, hint: Hint = "latency", precision: Precision = "auto"
    ):
        self.folder = folder
        self.input, self.outputs = str(description["input"]["name"]), tuple(map(str, description["outputs"]))
        self.shape: tuple[int, int, int] = tuple(description["input"]["shape"][1:])  # (C, H, W)
        self.hint, self.precision = hint, precision

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Logits (B, K) float32 by the name of the output, for (B, C, H, W) float32 pixels as the folder's
        `preprocessor_config.json` makes them; any B from 1 on.

        Raises `ValueError` for other pixels.
        """
        if pixels.ndim != 4 or pixels.shape[1:] != self.shape or not len(pixels) or pixels.dtype != np.float32:
            raise ValueError(
                f"pixels must be (images, {', '.join(map(str, self.shape))}) of float32, found "
                f"{pixels.shape} of {pixels.dtype}; the DeiTImageProcessor of {self.folder} makes them"
            )
        return dict(zip(self.outputs, self._run(np.ascontiguousarray(pixels)), strict=True))

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the same folder: no runtime's session can be sent."""
        return partial(load_engine, self.folder.absolute(), hint=self.hint, precision=self.precision), ()

    @abstractmethod
    def _run(self, pixels: np.ndarray) -> list[np.ndarray]:
        """The outputs in the order of `self.outputs`."""


class TorchEngine(Engine):
    name = "torch.export"

    def __init__(self, folder: Path, description: Mapping[str, Any], **options: Any):
        super().__init__(folder, description, **options)
        import torch

        self._torch = torch
        path = folder / "model.pt2"
        with _reading(path, self.name):
            self._model = torch.export.load(path).module()

    def _run(self, pixels: np.ndarray) -> list[np.ndarray]:
        with self._torch.inference_mode():
            found = self._model(self._torch.from_numpy(pixels))
        return [found[name].numpy() for name in self.outputs]


class OnnxEngine(Engine):
    name = "onnxruntime"

    def __init__(self, folder: Path, description: Mapping[str, Any], **options: Any):
        super().__init__(folder, description, **options)
        with needed("onnxruntime"):
            import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = host.cores()  # its own choice counts the machine's, not this process's
        settings.log_severity_level = 3
        path = folder / "model.onnx"
        with _reading(path, self.name):
            self._session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])

    def _run(self, pixels: np.ndarray) -> list[np.ndarray]:
        return self._session.run(list(self.outputs), {self.input: pixels})


class OpenVINOEngine(Engine):
    name = "openvino"

    def __init__(self, folder: Path, description: Mapping[str, Any], **options: Any):
        super().__init__(folder, description, **options)
        openvino = import_openvino()
        settings = {"PERFORMANCE_HINT": self.hint.upper(), "INFERENCE_NUM_THREADS": host.cores()}
        if self.precision == "float32":
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        path = folder / "model.xml"
        with _reading(path, self.name):
            self._model = openvino.Core().compile_model(path, "CPU", settings)
        self._requests = threading.local()  # a request answers one call at a time

    def __str__(self) -> str:
        return f"{self.name}, {self.inference_precision}"

    @property
    def inference_precision(self) -> str:
        """What the runtime computes in: f32, bf16 or f16."""
        return str(self._model.get_property("INFERENCE_PRECISION_HINT").to_string())

    def _run(self, pixels: np.ndarray) -> list[np.ndarray]:
        if not hasattr(self._requests, "own"):
            self._requests.own = self._model.create_infer_request()
        found = self._requests.own.infer({self.input: pixels})
        return [found[name] for name in self.outputs]


ENGINES: dict[str, type[Engine]] = {
    "torch": TorchEngine,
    "onnx": OnnxEngine,
    "onnx-int8": OnnxEngine,
    "openvino": OpenVINOEngine,
    "openvino-int8": OpenVINOEngine,
    "web": OnnxEngine,
}
"""By the `format` of a description."""


def load_engine(folder: str | Path, *, hint: Hint = "latency", precision: Precision = "auto") -> Engine:
    """The model of an exported folder, ready to run; the options are `Engine`'s.

    A folder of format `torch` is read by `torch.export.load`, which can execute what a file holds: take such from
    nobody whose code you would not run.

    Raises `FileNotFoundError` where there is no export, `CheckpointError` for damaged files, `ImportError` where the
    runtime is not installed.
    """
    folder = Path(folder)
    description = read_description(folder)
    for name, digest in description["files"].items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise files.CheckpointError(
                f"{folder / name} is not the file that was exported, by the SHA-256 in "
                f"{folder / DESCRIPTION}; copy or export it again"
            )
    return ENGINES[description["format"]](folder, description, hint=hint, precision=precision)


def read_description(folder: Path) -> dict[str, Any]:
    """`export.json` of an exported folder, with what `Engine` needs of it."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {DESCRIPTION}; give a folder that `deit export` wrote")
    description = files.read_json(path)
    if description.get("format") not in ENGINES:
        raise files.CheckpointError(
            f"{path} is of format {description.get('format')!r}, expected one of "
            f"{', '.join(ENGINES)}; export the model again with this version"
        )
    shape, kinds = (description.get("input") or {}).get("shape"), {"files": dict, "input": dict, "outputs": list}
    if (
        any(not isinstance(description.get(key), kind) for key, kind in kinds.items())
        or not (isinstance(shape, list) and len(shape) == 4)
        or "name" not in description["input"]
    ):
        raise files.CheckpointError(f"{path} lacks the files, the input or the outputs of the model; export it again")
    return description


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def import_openvino() -> Any:
    """OpenVINO without its telemetry, which unasked reports every import and conversion, NNCF's too. Both do without
    where that package is missing, as it is from here on."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    with needed("openvino"):
        import openvino
    return openvino


@contextmanager
def needed(package: str) -> Iterator[None]:
    """Imports of a package that may not be installed."""
    try:
        yield
    except ImportError as error:
        raise host.missing(f"{package} can't be imported ({error})", "export") from None


@contextmanager
def _reading(path: Path, runtime: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each runtime has classes of its own
        reason = " ".join(str(error).split())[:200]
        raise files.CheckpointError(
            f"{path} can't be read by {runtime} ({reason}); export it again, or install the "
            f"versions named in {path.parent / DESCRIPTION}"
        ) from None
