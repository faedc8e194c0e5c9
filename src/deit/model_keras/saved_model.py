"""Writes a Keras model for TensorFlow's runtimes, and runs it there before its path is returned."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import keras
import numpy as np

from deit.config import DeiTConfig

ExportFormat = Literal["tf_saved_model", "litert"]
Runtime = Callable[[np.ndarray], Mapping[str, np.ndarray]]

_CHECKED_BATCHES = (1, 3)
"""Batch sizes of the check. More than one, because the file must take any."""


class Exportable(Protocol):
    """A Keras model that takes images, with the config that gives their size."""

    config: DeiTConfig

    def __call__(self, pixel_values: Any, *, training: bool) -> Any: ...


def export(model: Exportable, path: Path, format: ExportFormat, tolerance: float, batch: int | None) -> Path:
    """Does the work of `PreTrainedKeras.export`."""
    if format not in get_args(ExportFormat):
        raise ValueError(f"format={format!r} is not written from Keras; choose {' or '.join(get_args(ExportFormat))}")
    backend = keras.backend.backend()
    if backend not in ("tensorflow", "jax") or (format == "litert" and backend != "tensorflow"):
        raise ValueError(
            f"{format} can't be written with Keras on {backend}; start Python with "
            "KERAS_BACKEND=tensorflow and load the model there"
        )
    if format == "litert" and path.suffix != ".tflite":
        raise ValueError(f"a LiteRT model is a .tflite file, found {path}; give a name that ends in .tflite")
    if path.exists():
        raise FileExistsError(f"{path} is there already; remove it, or export under another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        saved = Path(folder) / "saved_model"
        _write_saved_model(model, saved, batch)
        written, runtime = saved, _saved_model
        if format == "litert":
            written, runtime = Path(folder) / path.name, _litert
            written.write_bytes(_converted(saved))
        difference = _largest_difference(model, runtime(written), (batch,) if batch else _CHECKED_BATCHES)
        if not difference <= tolerance:
            raise ValueError(
                f"{path} was not kept: on random images its outputs differ from the model's by {difference:.2g}, "
                f"more than tolerance={tolerance:.2g}; raise the tolerance if the model computes in half precision, "
                "otherwise please report it"
            )
        shutil.move(written, path)
    return path


def _write_saved_model(model: Exportable, path: Path, batch: int | None) -> None:
    config = model.config
    shape = (batch, config.num_channels, *config.image_hw)
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint(
        "serve",
        lambda pixel_values: dict(model(pixel_values, training=False).items()),
        input_signature=[keras.InputSpec(shape=shape, dtype="float32", name="pixel_values")],
    )
    archive.write_out(str(path), verbose=False)


def _converted(saved: Path) -> bytes:
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(str(saved))
    return bytes(converter.convert())


def _saved_model(path: Path) -> Runtime:
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    return lambda pixels: {name: value.numpy() for name, value in loaded.serve(tf.constant(pixels)).items()}


def _litert(path: Path) -> Runtime:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:  # TensorFlow brings the same interpreter, but warns that the package should be installed
        import tensorflow as tf

        Interpreter = tf.lite.Interpreter

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*tf.lite.Interpreter is deprecated")
        runner = Interpreter(str(path)).get_signature_runner()
    (name,) = runner.get_input_details()
    return lambda pixels: runner(**{name: pixels})


def _largest_difference(model: Exportable, runtime: Runtime, batches: tuple[int, ...]) -> float:
    random = np.random.default_rng(0)
    differences = []
    for batch in batches:
        pixels = random.standard_normal((batch, model.config.num_channels, *model.config.image_hw)).astype("float32")
        expected, found = model(pixels, training=False), runtime(pixels)
        if sorted(expected.keys()) != sorted(found):
            raise ValueError(
                f"the exported model answers {', '.join(sorted(found))}, expected {', '.join(sorted(expected.keys()))}"
            )
        for name, value in expected.items():
            difference = found[name].astype("float32") - keras.ops.convert_to_numpy(value).astype("float32")
            differences.append(np.abs(difference).max())
    return float(np.max(differences))
