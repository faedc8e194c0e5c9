"""Runs exported folders: one interface over PyTorch, ONNX Runtime and OpenVINO.

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
"""File that describes an exported folder; docs/export.md lists its keys."""
Hint = Literal["latency", "throughput"]
Precision = Literal["auto", "float32"]


class Engine(ABC):
    """An exported model in its runtime, from pixels to logits. Several threads may call it.

    Args:
        folder: the folder with the model's files.
        description: the content of its `export.json`.
        hint: `latency` gives all cores to one call. `throughput` is for calls from several threads and uses OpenVINO's
            streams. The other runtimes ignore it.
        precision: `float32`, or `auto` for the runtime's own choice; OpenVINO's is bfloat16 if the CPU has it.
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
        """Returns float32 logits (B, K) by the name of the output.

        `pixels` are (B, C, H, W) in float32, as the folder's `preprocessor_config.json` makes them; B is at least 1.
        Raises `ValueError` for another shape or type.
        """
        if pixels.ndim != 4 or pixels.shape[1:] != self.shape or not len(pixels) or pixels.dtype != np.float32:
            raise ValueError(
                f"pixels must be (images, {', '.join(map(str, self.shape))}) of float32, found "
                f"{pixels.shape} of {pixels.dtype}; make them with the DeiTImageProcessor of {self.folder}"
            )
        try:
            found = self._run(np.ascontiguousarray(pixels))
        except Exception as error:  # each runtime has its own exception classes
            reason = " ".join(str(error).split())[:200]
            raise files.CheckpointError(
                f"the model in {self.folder} can't be computed by {self.name} ({reason}); export it again"
            ) from error
        return dict(zip(self.outputs, found, strict=True))

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Any, ...]:
        """Makes another process open the same folder, because a runtime's session can't be sent."""
        return partial(load_engine, self.folder.absolute(), hint=self.hint, precision=self.precision), ()

    def _check_names(self, inputs: set[str], outputs: set[str]) -> None:
        """Raises `CheckpointError` if the model's file lacks the names that its description gives."""
        if self.input not in inputs or not outputs.issuperset(self.outputs):
            raise files.CheckpointError(
                f"the model in {self.folder} has the inputs {sorted(inputs)} and the outputs {sorted(outputs)}, and "
                f"its {DESCRIPTION} names {self.input!r} and {', '.join(self.outputs)}; export the model again"
            )

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
            from deit.export.program import Program  # which loads PyTorch

            self._model = Program(path)
        self._check_names({self._model.input}, set(self._model.outputs))

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
        settings.intra_op_num_threads = host.cores()  # by default it counts the machine's cores, not this process's
        settings.log_severity_level = 3
        path = folder / "model.onnx"
        with _reading(path, self.name):
            self._session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        self._check_names(
            *({value.name for value in part} for part in (self._session.get_inputs(), self._session.get_outputs()))
        )

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
            core = openvino.Core()
            core.set_property({"ENABLE_MMAP": False})  # a mapped file that changes would end the process
            self._model = core.compile_model(path, "CPU", settings)
        self._check_names(
            *({name for value in part for name in value.names} for part in (self._model.inputs, self._model.outputs))
        )
        self._requests = threading.local()  # a request answers one call at a time

    def __str__(self) -> str:
        return f"{self.name}, {self.inference_precision}"

    @property
    def inference_precision(self) -> str:
        """The precision that the runtime computes in: f32, bf16 or f16."""
        return str(self._model.get_property("INFERENCE_PRECISION_HINT").to_string())

    def _run(self, pixels: np.ndarray) -> list[np.ndarray]:
        if not hasattr(self._requests, "own"):
            self._requests.own = self._model.create_infer_request()
        found = self._requests.own.infer({self.input: pixels})
        return [found[name] for name in self.outputs]


_OUTPUTS = (["logits"], ["logits", "cls_logits", "distillation_logits"])
"""The outputs that a classifier can have, in their order."""
_LARGEST_SIDE = 2**16

ENGINES: dict[str, type[Engine]] = {
    "torch": TorchEngine,
    "onnx": OnnxEngine,
    "onnx-int8": OnnxEngine,
    "openvino": OpenVINOEngine,
    "openvino-int8": OpenVINOEngine,
    "web": OnnxEngine,
}
"""The engine for each `format` in a description."""


def load_engine(folder: str | Path, *, hint: Hint = "latency", precision: Precision = "auto") -> Engine:
    """Returns the model of an exported folder, ready to run. The options are those of `Engine`.

    Nothing that a file holds is executed but the operations of a network: a `.pt2` file is run by `Program`, and an
    ONNX or OpenVINO file by a runtime that gets no other library and no file outside the folder.

    Raises `FileNotFoundError` if the folder holds no export, `CheckpointError` for damaged files, and `ImportError` if
    the runtime is not installed.
    """
    folder = Path(folder)
    description = read_description(folder)
    for name, digest in description["files"].items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise files.CheckpointError(
                f"{folder / name} is not the file that was exported, by the SHA-256 in {folder / DESCRIPTION}; copy or "
                "export it again"
            )
    return ENGINES[description["format"]](folder, description, hint=hint, precision=precision)


def read_description(folder: Path) -> dict[str, Any]:
    """Reads `export.json` of an exported folder, and checks that it has what `Engine` needs.

    Raises `FileNotFoundError` if there is none, and `CheckpointError` for a damaged one.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {DESCRIPTION}; give a folder that `deit export` wrote")
    description = files.read_json(path)
    if (to := description.get("format")) not in [*ENGINES]:
        raise files.CheckpointError(
            f"{path} is of format {to!r:.80}, expected one of {', '.join(ENGINES)}; export the model again with this "
            "version"
        )
    taken, outputs, named = (description.get(key) for key in ("input", "outputs", "files"))
    shape = taken.get("shape") if isinstance(taken, dict) else None
    if not (
        isinstance(taken, dict)
        and isinstance(taken.get("name"), str)
        and isinstance(shape, list)
        and len(shape) == 4
        and all(isinstance(side, int) and 0 < side <= _LARGEST_SIDE for side in shape[1:])
        and outputs in _OUTPUTS
        and isinstance(named, dict)
        and all(isinstance(digest, str) and Path(name).name == name for name, digest in named.items())
    ):
        raise files.CheckpointError(
            f"{path} lacks the files, the input or the outputs of the model; export the model again"
        )
    return description


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def import_openvino() -> Any:
    """Imports OpenVINO without telemetry.

    OpenVINO and NNCF report every import and conversion without asking, but not if the package `openvino_telemetry` is
    missing. From here on this process can't import that package.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    with needed("openvino"):
        import openvino
    return openvino


@contextmanager
def needed(package: str) -> Iterator[None]:
    """Turns a failed import of a package into an error that says how to install it."""
    try:
        yield
    except ImportError as error:
        raise host.missing(f"{package} can't be imported ({error})", "export") from None


@contextmanager
def _reading(path: Path, runtime: str) -> Iterator[None]:
    try:
        yield
    except files.CheckpointError:
        raise
    except Exception as error:  # each runtime has its own exception classes
        reason = " ".join(str(error).split())[:200]
        raise files.CheckpointError(
            f"{path} can't be read by {runtime} ({reason}); export it again, or install the "
            f"versions named in {path.parent / DESCRIPTION}"
        ) from None
