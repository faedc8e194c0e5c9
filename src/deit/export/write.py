"""A classifier written for a runtime, and run there before its folder is returned.

B images, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from deit import files
from deit.data.batches import Batch, EvaluationBatches
from deit.data.folders import SPLITS, Split, matched, read_examples
from deit.evaluate.calibration import FILE as CALIBRATION
from deit.evaluate.calibration import Calibration
from deit.evaluate.scores import Accuracy
from deit.export.engines import (
    RECORD,
    Engine,
    OpenVINOEngine,
    import_openvino,
    load_engine,
    needed,
    read_record,
    sha256,
)
from deit.export.quantise import by_sensitivity, quantised_onnx, quantised_openvino
from deit.export.web import VERSION, NodeEngine, Page, refuse_undone
from deit.image.decode import ImageError, load_image
from deit.image.processor import FILE_NAME, DeiTImageProcessor
from deit.model.convnet import ConvNet
from deit.model.load import load_model
from deit.model.network import DeiTForImageClassification, DeiTForImageClassificationWithTeacher, PreTrained

Format = Literal["torch", "onnx", "openvino", "web", "onnx-int8", "openvino-int8"]

TOLERANCE = 1e-4
"""Largest difference of a probability from the PyTorch model's that a float format may have."""
LOSS = 0.005
"""Largest loss of accuracy that int8 may have."""

_CHECKED = {"random": 16, "real": 64}
"""Images of the check."""
_SIZES = (1, 3)
"""Sizes of the batches that the check uses, in turn."""
_CALIBRATED = 300
"""Images that the ranges of int8 are taken from, at most."""
_SHARES = (0.0, 1 / 8, 1 / 4, 1 / 2)
"""Shares of the layers that stay in float, tried in this order until int8 is accurate enough."""
_JUDGED_BATCH = 16

_BESIDE = {"config.json", FILE_NAME, CALIBRATION, RECORD}
"""Files of an export that are not its `files`."""
_PACKAGES = {
    "torch": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "web": ("onnx", "onnxscript"),
    "onnx-int8": ("onnx", "onnxscript", "onnxruntime", "nncf"),
    "openvino-int8": ("openvino", "nncf"),
}


@dataclass(frozen=True)
class Exported:
    """What `export` wrote."""

    folder: Path
    record: dict[str, Any]
    """The content of its `export.json`, whose keys are in docs/export.md."""

    def __str__(self) -> str:
        """In one line: format, agreement, and of int8 the accuracies."""
        found, accuracy = self.record["agreement"], self.record.get("accuracy")
        said = (
            f"{self.folder}: {self.record['format']}, {round(found['labels'] * found['images'])} of "
            f"{found['images']} images labelled as by the PyTorch model, probabilities within "
            f"{found['difference']:.1e}"
        )
        if accuracy is None:
            return said
        said += f"; accuracy {accuracy['int8']['value']:.4f} after {accuracy['float']['value']:.4f}"
        kept = accuracy["float_layers"]
        return f"{said} on {accuracy['images']} images" + (f", in float: {', '.join(kept)}" if kept else "")


def export(
    source: str | Path, to: Format, out: str | Path, *, calibrate: str | Path | None = None, **where: Any
) -> Exported:
    """Writes a classifier for a runtime into the folder `out`, for images of the model's size in batches of any number:
    the model's file, `config.json` with the labels, `preprocessor_config.json`, in a float format the model's
    `calibration.json` where it has one, and `export.json` (see docs/export.md).

    `torch`: `model.pt2`, of `torch.export`. `onnx`: `model.onnx`. `openvino`: `model.xml` and `model.bin`, the weights
    in float16 where that keeps the agreement. `web`: a page that labels images in the browser: `model.onnx`, the page's
    files, and onnxruntime-web, which npm fetches the first time. `onnx-int8`, `openvino-int8`: quantised by NNCF.

    The folder appears only after the file has answered in its runtime as the PyTorch model does: in a float format the
    same labels, and probabilities within `TOLERANCE`; in int8 an accuracy at most `LOSS` lower. A former export in
    `out` is replaced then; on failure it stays, and nothing else is left.

    Args:
        source: what `load_model` takes; `where` as for `from_pretrained`.
        calibrate: labelled images, as `read_examples` takes them. A float format is checked on some of them, else on
            random pictures; int8 is calibrated on those of `train` and judged on those of `test` or `val`, or on every
            other image where there is no such pair.

    Raises:
        ValueError: no classifier; images that don't fit it; an answer that differs, or int8 that costs accuracy.
        FileExistsError: `out` holds anything but a former export.
        ImportError: a package is missing.
        FileNotFoundError: `web` without Node, or without npm or its registry where onnxruntime-web isn't cached.
    """
    if to not in get_args(Format):
        raise ValueError(f"there is no format {to!r}; choose {', '.join(get_args(Format))}")
    if to.endswith("int8") and calibrate is None:
        raise ValueError(
            f"{to} needs images to take the ranges of its numbers from, and to be judged by; give "
            "labelled ones with --calibrate DATA"
        )
    folder = Path(out).absolute()
    _refuse_occupied(folder)
    _import_packages(to)
    page = Page() if to == "web" else None
    classifier = _Classifier.of(source, **where)
    if page is not None:
        _refuse_for_the_web(classifier)
    examples = None if calibrate is None else _Examples(calibrate, classifier)
    checked = _Checked(classifier, examples)
    with files.replacing_folder(folder, check=_refuse_occupied) as temporary:
        files.write_json(temporary / "config.json", classifier.model.config.to_dict())
        classifier.processor.save_pretrained(temporary)
        if not to.endswith("int8") and (calibration := Calibration.of_model(source)) is not None:
            calibration.save(temporary)  # int8 answers differ by more: they want their own, of `deit calibrate DIR`
        if examples is not None and to.endswith("int8"):
            record = _write_int8(classifier, to, temporary, examples, checked)
        elif page is not None:
            record = _write_web(classifier, page, temporary, checked)
        else:
            record = _write_float(classifier, to, temporary, checked)
        files.write_json(temporary / RECORD, record)
    return Exported(Path(out), record)


def cached_engine(model: Any, processor: DeiTImageProcessor, to: Literal["onnx", "openvino"], name: str) -> Engine:
    """A trained classifier in another runtime, in the precision that is the runtime's own.

    The first time it is written and checked as by `export`, into this user's cache, by what the model holds; folders
    there that were not used for a month are removed then.

    Args:
        model, processor: of a trained folder, `load_model` and `DeiTImageProcessor.of_model`.
        name: how messages call the model.

    Raises as `export` does.
    """
    _import_packages(to)
    folder = files.cache_folder("engines") / f"{to}-{_digest(model, to)}"
    try:
        engine = load_engine(folder)
    except FileNotFoundError:
        pass
    except files.CheckpointError:
        shutil.rmtree(folder)
    else:
        with suppress(OSError):  # another user's, or read-only
            os.utime(folder)
        return engine
    classifier = _Classifier(model, processor, name)
    written: Engine | None = None
    try:
        with files.replacing_folder(folder, check=_refuse_occupied) as temporary:
            files.write_json(temporary / "config.json", model.config.to_dict())
            processor.save_pretrained(temporary)
            files.write_json(temporary / RECORD, _write_float(classifier, to, temporary, _Checked(classifier, None)))
            written = load_engine(temporary)
    except OSError:
        if written is None:
            raise  # otherwise another process was quicker, and this one has what it needs
    for other in folder.parent.iterdir():
        if time.time() - other.stat().st_mtime > _KEPT:
            shutil.rmtree(other, ignore_errors=True)
    assert written is not None
    written.folder = folder
    return written


_KEPT = 30 * 24 * 60 * 60
"""Seconds."""


def _digest(model: Any, to: Format) -> str:
    """Hash of everything that decides what the exported file holds."""
    found = hashlib.sha256(json.dumps([_versions(to), model.config.to_dict()], sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def _import_packages(to: Format) -> None:
    for package in _PACKAGES[to]:
        if package == "openvino":
            import_openvino()
        with needed(package):
            import_module(package)


def _versions(to: Format) -> dict[str, str]:
    return {name: version(name) for name in ("deit", "torch", *_PACKAGES[to])}


# ---------------------------------------------------------------------------------------------------------- the model


class _Logits(nn.Module):
    """A classifier that returns nothing but its logits, by name."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        both = isinstance(model, DeiTForImageClassificationWithTeacher)
        self.names = ("logits", "cls_logits", "distillation_logits") if both else ("logits",)
        self.options: dict[str, bool] = (
            {}
            if isinstance(model, ConvNet)
            else {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
        )

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        out = self.model(pixel_values, **self.options)
        return {name: out[name] for name in self.names}


class _Classifier:
    """What is exported, with its preprocessing, all that could be wrong with them already checked."""

    def __init__(self, model: Any, processor: DeiTImageProcessor, name: str):
        self.model, self.processor, self.name = model, processor, name
        config, kinds = model.config, (DeiTForImageClassification, DeiTForImageClassificationWithTeacher, ConvNet)
        if not isinstance(model, kinds) or not config.num_labels:
            raise ValueError(
                f"{name} holds a {type(model).__name__} without classes; expected a classifier, the only "
                "kind of model that is exported"
            )
        self.transformer = isinstance(model, PreTrained)
        if self.transformer:
            self.model.set_attn_implementation("sdpa")  # one operation in the graph, which runtimes know as attention
        self.logits = _Logits(self.model).eval()
        self.shape = (config.num_channels, *config.image_hw)
        self.classes = tuple(config.id2label.values())
        [made] = self.processor([Image.new("RGB", (8, 8))]).pixel_values
        if made.shape != self.shape:
            raise ValueError(
                f"the {FILE_NAME} of {name} makes pixels of {made.shape}, the model takes "
                f"{self.shape}; correct size, crop_size or data_format there"
            )

    @classmethod
    def of(cls, source: str | Path, **where: Any) -> _Classifier:
        model = load_model(source, **where)
        return cls(model, DeiTImageProcessor.of_model(source, model.config, **where), str(source))

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Logits (B, K) by name."""
        return {name: value.numpy() for name, value in self.logits(torch.from_numpy(pixels)).items()}

    @property
    def bytes(self) -> int:
        """Size of the weights, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.logits.state_dict().values())

    def layers(self) -> dict[str, nn.Linear | nn.Conv2d]:
        """What multiplies with weights, by name."""
        return {name: layer for name, layer in self.model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """For batches of any number."""
        batch = torch.export.Dim("batch", min=1)
        with torch.no_grad():
            return torch.export.export(
                self.logits, (torch.zeros(2, *self.shape),), dynamic_shapes={"pixel_values": {0: batch}}
            )

    @cached_property
    def openvino_model(self) -> Any:
        model = import_openvino().convert_model(self.program)
        model.inputs[0].get_tensor().set_names({"pixel_values"})
        for output, name in zip(model.outputs, self.logits.names, strict=True):
            output.get_tensor().set_names({name})
        return model


# ---------------------------------------------------------------------------------------------------------- the images


class _Examples:
    """Labelled images: some for the ranges of int8, the others to be judged by."""

    def __init__(self, data: str | Path, classifier: _Classifier):
        self.data, self.processor = data, classifier.processor
        present = {split for split, names in SPLITS.items() if any((Path(data) / name).is_dir() for name in names)}
        split = "train" if present == {"train"} else None
        examples, found = read_examples(data, split)
        whole = matched(examples, classifier.classes)
        if "train" in present and split is None:
            self.judged, calibration = whole, matched(read_examples(data, "train")[0], classifier.classes)
            self.source = f"{data}, {found}"
        else:
            calibration, self.judged = (whole.take(range(first, len(whole), 2)) for first in (0, 1))
            self.source = f"{data}, every other image" + (f" of {found}" if found else "")
        if not len(self.judged):
            raise ValueError(f"{data} has a single image; give at least two, better some hundreds")
        self.calibration = _spread(calibration, _CALIBRATED)

    def pixels(self, split: Split) -> list[np.ndarray]:
        """(1, C, H, W) of each image that can be read."""
        return [
            batch.pixels.numpy()
            for batch in EvaluationBatches(split, self.processor, 1, keep=False)
            if batch.labels[0] >= 0
        ]

    def batches(self) -> EvaluationBatches:
        """Batches of the images that judge int8; they can be iterated any number of times."""
        return EvaluationBatches(self.judged, self.processor, _JUDGED_BATCH)


def _spread(split: Split, count: int) -> Split:
    """At most `count` images, evenly spread."""
    return split.take(np.unique(np.linspace(0, len(split) - 1, count).round().astype(int)).tolist())


def _pictures(count: int) -> list[Image.Image]:
    """Random colours, coarse enough to survive the resize, in frames of several shapes."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        rows, columns, height, width = (int(n) for n in random.integers((2, 2, 48, 48), (17, 17, 321, 321)))
        colours = random.integers(0, 256, (rows, columns, 3)).astype(np.uint8)
        found.append(Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC))
    return found


# ----------------------------------------------------------------------------------------------------------- the check


@dataclass(frozen=True)
class _Agreement:
    images: int
    labels: float
    """Share of the images to which every output gives the same class."""
    difference: float
    """Largest of a probability."""


class _Checked:
    """Images with the PyTorch model's answers, which a runtime's are held to."""

    def __init__(self, classifier: _Classifier, examples: _Examples | None):
        if examples is None:
            self.source = "random pictures"
            pixels = list(classifier.processor(_pictures(_CHECKED["random"])).pixel_values)
        else:
            self.source = examples.source
            pixels = [one[0] for one in examples.pixels(_spread(examples.judged, _CHECKED["real"]))]
            if not pixels:
                raise ValueError(f"none of the images of {examples.source} can be read, so nothing can be checked")
        self.images = len(pixels)
        self.batches: list[np.ndarray] = []
        while pixels:
            size = _SIZES[len(self.batches) % len(_SIZES)]
            self.batches.append(np.stack(pixels[:size]))
            pixels = pixels[size:]
        self.expected = [_probabilities(classifier(batch)) for batch in self.batches]
        self._files = () if examples is None else _spread(examples.judged, _CHECKED["random"]).files

    def pictures(self) -> Iterator[Image.Image]:
        """Random ones, each also enlarged, so that a resize makes it smaller; and some of the real ones, if any."""
        for picture in _pictures(_CHECKED["random"]):
            yield from (picture, picture.resize((3 * picture.width, 4 * picture.height)))
        for path in self._files:
            with suppress(ImageError):
                yield load_image(path)

    def agreement(self, engine: Engine) -> _Agreement:
        alike, difference = 0, 0.0
        for batch, expected in zip(self.batches, self.expected, strict=True):
            found = _probabilities(engine(batch))
            same = np.ones(len(batch), bool)
            for name, reference in expected.items():
                if found[name].shape != reference.shape:
                    raise ValueError(
                        f"{engine.name} answers {len(batch)} images with {name} of {found[name].shape}, "
                        f"expected {reference.shape}; nothing was kept"
                    )
                same &= found[name].argmax(-1) == reference.argmax(-1)
                difference = float(np.maximum(difference, np.abs(found[name] - reference).max()))  # NaN stays
            alike += int(same.sum())
        return _Agreement(self.images, alike / self.images, difference)


def _probabilities(logits: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """(B, K) float64 by the name of the output."""
    found = {}
    for name, values in logits.items():
        powers = np.exp(values.astype(np.float64) - values.max(-1, keepdims=True))
        found[name] = powers / powers.sum(-1, keepdims=True)
    return found


def _accuracy(answer: Callable[[np.ndarray], Mapping[str, np.ndarray]], batches: Iterable[Batch]) -> Accuracy:
    """Accuracy of the fused heads."""
    correct = total = 0
    for batch in batches:
        known = batch.labels.numpy() >= 0
        correct += int((answer(batch.pixels.numpy())["logits"].argmax(-1) == batch.labels.numpy())[known].sum())
        total += int(known.sum())
    return Accuracy(correct, total)


# ------------------------------------------------------------------------------------------------------- float formats


def _write_float(
    classifier: _Classifier,
    to: Format,
    folder: Path,
    checked: _Checked,
    run: Callable[[Path, Mapping[str, Any]], AbstractContextManager[Engine]] | None = None,
) -> dict[str, Any]:
    """Writes the model's files; returns the record. `run` opens the folder in the runtime that it is for, where that is
    not the one of `load_engine`."""
    run = run or (lambda folder, _: nullcontext(load_engine(folder, precision="float32")))
    for halved in (True, False) if to == "openvino" else (False,):
        if to == "torch":
            torch.export.save(classifier.program, folder / "model.pt2")
        elif to in ("onnx", "web"):
            _save_onnx(classifier, folder / "model.onnx")
        else:
            _save_openvino(classifier.openvino_model, folder / "model.xml", halved=halved)
        record = _describe(classifier, to, folder)
        with run(folder, record) as engine:
            agreement = checked.agreement(engine)
        if agreement.labels == 1.0 and agreement.difference <= TOLERANCE:
            break
    else:
        raise ValueError(
            f"{to} was not kept: of {agreement.images} images ({checked.source}) "
            f"{agreement.labels:.1%} are labelled as by the PyTorch model, and a probability differs by "
            f"{agreement.difference:.2g}, where all and at most {TOLERANCE:g} are allowed; please report "
            "it, and take another format"
        )
    if to == "openvino":
        record["weights"] = "float16" if halved else "float32"
    return record | _checks(agreement, checked, to, folder)


def _describe(classifier: _Classifier, to: Format, folder: Path) -> dict[str, Any]:
    """Writes what `load_engine` needs, and returns it."""
    heads = ["fused", "class", *(["distillation", "softmax"] if len(classifier.logits.names) > 1 else [])]
    record = {
        "format": to,
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name not in _BESIDE},
        "input": {"name": "pixel_values", "shape": [None, *classifier.shape], "type": "float32"},
        "outputs": list(classifier.logits.names),
        "heads": heads,
        "versions": _versions(to),
    }
    files.write_json(folder / RECORD, record)
    return record


def _checks(agreement: _Agreement, checked: _Checked, to: Format, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"agreement": {**vars(agreement), "source": checked.source}}
    if to.startswith("openvino"):
        engine = load_engine(folder)
        assert isinstance(engine, OpenVINOEngine)
        found["native"] = {"precision": engine.inference_precision, **vars(checked.agreement(engine))}
    return found


def _save_onnx(classifier: _Classifier, path: Path) -> None:
    torch.onnx.export(
        classifier.program,
        (),
        path,
        dynamo=True,
        verbose=False,
        input_names=["pixel_values"],
        output_names=list(classifier.logits.names),
        external_data=classifier.bytes > _ONNX_BYTES,
    )


_ONNX_BYTES = 2**31 - 2**24
"""An ONNX file can't be larger than 2 GiB; weights beyond lie in a file beside it."""


def _save_openvino(model: Any, path: Path, *, halved: bool) -> None:
    import_openvino().save_model(model, path, compress_to_fp16=halved)


# ------------------------------------------------------------------------------------------------------------- the web


def _refuse_for_the_web(classifier: _Classifier) -> None:
    refuse_undone(classifier.processor)
    if classifier.bytes > _ONNX_BYTES:
        raise ValueError(
            f"the weights of {classifier.name} take {classifier.bytes / 2**30:.1f} GiB, more than the 2 "
            "GiB that a file for a browser can have; take a smaller model"
        )


def _write_web(classifier: _Classifier, page: Page, folder: Path, checked: _Checked) -> dict[str, Any]:
    page.write(folder)
    record = _write_float(classifier, "web", folder, checked, page.running)
    record["versions"][NodeEngine.name] = VERSION
    with page.running(folder, record) as engine:
        return record | {"preprocessing": engine.check_pixels(checked.pictures(), classifier.processor)}


# --------------------------------------------------------------------------------------------------------------- int8


def _write_int8(
    classifier: _Classifier, to: Format, folder: Path, examples: _Examples, checked: _Checked
) -> dict[str, Any]:
    """Writes the model's files with as few layers in float as the accuracy allows; returns the record."""
    batches, calibration = examples.batches(), examples.pixels(examples.calibration)
    before = _accuracy(classifier, batches)
    quantise = _quantised_onnx if to == "onnx-int8" else _quantised_openvino
    order: list[str] = []
    for share in _SHARES:
        if share and not order:
            order = by_sensitivity(classifier.logits, classifier.layers(), calibration)
        kept = order[: math.ceil(share * len(order))]
        quantise(classifier, folder, calibration, kept)
        record = _describe(classifier, to, folder)
        engine = load_engine(folder, precision="float32")
        after = _accuracy(engine, batches)
        if before.correct - after.correct <= LOSS * before.total:
            break
    else:
        raise ValueError(
            f"{to} was not kept: on {before.total} images ({examples.source}) the accuracy is "
            f"{after.value:.4f} after {before.value:.4f}, more than {LOSS:.1%} lower, even with "
            f"{len(kept)} of {len(order)} layers in float; the ones that 8 bits hurt most are "
            f"{', '.join(order[:5])}; take {to.removesuffix('-int8')}, or calibrate with more images"
        )
    weights = {name: layer.weight.numel() for name, layer in classifier.layers().items()}
    quantised = 1 - sum(weights[name] for name in kept) / sum(weights.values())
    accuracy = {
        "images": before.total,
        "source": examples.source,
        "calibrated": len(calibration),
        "float": before.to_dict(),
        "int8": after.to_dict(),
        "float_layers": kept,
        "int8_weights": quantised,
    }
    return record | _checks(checked.agreement(engine), checked, to, folder) | {"accuracy": accuracy}


def _quantised_onnx(
    classifier: _Classifier, folder: Path, calibration: Sequence[np.ndarray], kept: Sequence[str]
) -> None:
    import onnx

    with tempfile.TemporaryDirectory() as scratch:
        _save_onnx(classifier, Path(scratch) / "model.onnx")
        model = onnx.load(Path(scratch) / "model.onnx")
    onnx.save(
        quantised_onnx(model, classifier.layers(), calibration, kept, transformer=classifier.transformer),
        folder / "model.onnx",
    )


def _quantised_openvino(
    classifier: _Classifier, folder: Path, calibration: Sequence[np.ndarray], kept: Sequence[str]
) -> None:
    model = quantised_openvino(
        classifier.openvino_model.clone(), classifier.layers(), calibration, kept, transformer=classifier.transformer
    )
    _save_openvino(model, folder / "model.xml", halved=False)


# ---------------------------------------------------------------------------------------------------------- the folder


def _refuse_occupied(folder: Path) -> None:
    """Unless `folder` is absent, empty, or a former export and nothing else."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, expected a folder; give --out a new one")
    if found := {path.name for path in folder.iterdir()}:
        try:
            known = _BESIDE | set(read_record(folder)["files"])
        except (OSError, ValueError):
            known = set()
        if others := sorted(found - known):
            raise FileExistsError(
                f"{folder} holds {', '.join(others[:3])}{' and more' if len(others) > 3 else ''}, "
                "which no export wrote; give --out a new folder"
            )
