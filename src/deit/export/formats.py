"""The formats: the packages that each needs, how its files are written and checked, and their description."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from deit import files
from deit.choices import Format, Scoring
from deit.evaluate.calibration import FILE as CALIBRATION
from deit.evaluate.scores import Accuracy
from deit.export.checking import (
    LOSS,
    Agreement,
    Checked,
    Examples,
    TooInaccurate,
    accuracy_of,
    accurate_enough,
)
from deit.export.engines import DESCRIPTION, Engine, OpenVINOEngine, import_openvino, load_engine, needed, sha256
from deit.export.quantise import by_sensitivity, quantised_onnx, quantised_openvino
from deit.export.subject import Subject
from deit.export.web import VERSION, NodeEngine, Page, refuse_undone
from deit.image.processor import FILE_NAME
from deit.model.load import heads_of

TOLERANCE = 1e-4
"""Largest allowed difference between a probability of a float format and the PyTorch model's."""
BESIDE = {"config.json", FILE_NAME, CALIBRATION, DESCRIPTION}
"""Files of an export that its `files` does not list."""

_SHARES = (0.0, 1 / 8, 1 / 4, 1 / 2)
"""Shares of the layers that stay in float. They are tried in this order until int8 is accurate enough."""
_ONNX_BYTES = 2**31 - 2**24
"""Largest size of weights inside an ONNX file, which can't exceed 2 GiB. Larger weights go into a file beside it."""
_PACKAGES: dict[Format, tuple[str, ...]] = {
    "torch": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "web": ("onnx", "onnxscript"),
    "onnx-int8": ("onnx", "onnxscript", "onnxruntime", "nncf"),
    "openvino-int8": ("openvino", "nncf"),
}


def import_packages(to: Format) -> None:
    """Imports the packages that a format needs. Raises `ImportError` for the first one that is missing."""
    for package in _PACKAGES[to]:
        if package == "openvino":
            import_openvino()
        with needed(package):
            import_module(package)


def versions(to: Format) -> dict[str, str]:
    """The versions of the packages that write a format."""
    return {name: version(name) for name in ("deit", "torch", *_PACKAGES[to])}


@dataclass(frozen=True, kw_only=True)
class Description:
    """The content of `export.json`; docs/export.md explains its keys. Fields that don't apply are None and left out."""

    format: Format
    files: Mapping[str, str]
    input: Mapping[str, Any]
    outputs: Sequence[str]
    heads: Sequence[str]
    scoring: Scoring
    versions: Mapping[str, str]
    merge: int | None = None
    weights: str | None = None
    agreement: Mapping[str, Any] | None = None
    native: Mapping[str, Any] | None = None
    preprocessing: Mapping[str, Any] | None = None
    accuracy: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in found.items() if value is not None}


def _described(subject: Subject, to: Format, folder: Path) -> Description:
    """Describes files that are not checked yet, and saves that in the folder, because `load_engine` needs it there."""
    description = Description(
        format=to,
        files={path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name not in BESIDE},
        input={"name": "pixel_values", "shape": [None, *subject.shape], "type": "float32"},
        outputs=list(subject.logits.names),
        heads=list(heads_of(len(subject.logits.names) > 1, subject.scoring)),
        scoring=subject.scoring,
        versions=versions(to),
        merge=subject.merge or None,
    )
    files.write_json(folder / DESCRIPTION, description.to_dict())
    return description


def _checked_description(description: Description, agreement: Agreement, checked: Checked, folder: Path) -> Description:
    """Adds the agreement to a description, and for OpenVINO also the agreement in the precision of its own choice."""
    description = replace(description, agreement={**vars(agreement), "source": checked.source})
    if not description.format.startswith("openvino"):
        return description
    engine = load_engine(folder)
    assert isinstance(engine, OpenVINOEngine)
    found = {"precision": engine.inference_precision, **vars(checked.agreement(engine))}
    del found["undecided"]  # which nothing was compared for
    return replace(description, native=found)


# ------------------------------------------------------------------------------------------------------- float formats


class _Attempt(NamedTuple):
    """One way of writing a format. If its answers differ from the model's, the next way is tried."""

    save: Callable[[Subject, Path], None]
    weights: str | None = None
    """Type of the weights, if the format has a choice."""


def _save_torch(subject: Subject, folder: Path) -> None:
    """Writes the program, and refuses it unless `torch.export.load` gives its answer, because others open it so."""
    path = folder / "model.pt2"
    files.write_archive(path, lambda file: torch.export.save(subject.program, file))
    pixels = torch.rand(3, *subject.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        read, own = torch.export.load(path).module()(pixels), subject.logits(pixels)
    if not all(torch.allclose(read[name], own[name], rtol=TOLERANCE, atol=TOLERANCE) for name in own):
        raise ValueError(
            f"torch was not kept: expected the PyTorch model's answers from torch.export.load, found others (torch "
            f"{torch.__version__}); take another format, and please report this"
        )


def _save_onnx(subject: Subject, folder: Path) -> None:
    """Writes ONNX with a batch axis called `batch` and with weights under the model's own names.

    The metadata hold labels, preprocessing and scoring for other tools; labels and preprocessing are JSON.
    """
    program = torch.onnx.export(
        subject.program,
        (),
        dynamo=True,
        verbose=False,
        input_names=["pixel_values"],
        output_names=list(subject.logits.names),
        dynamic_shapes={"pixel_values": {0: "batch"}},
    )
    assert program is not None
    # The exporter transposes the weights of matrix products and numbers them, so their values have to identify them.
    transposed = {
        weight.t().contiguous().numpy().tobytes(): f"{name}.T"
        for name, weight in subject.model.state_dict().items()
        if weight.dim() == 2
    }
    for value in list(program.model.graph.initializers.values()):
        assert value.name is not None
        content = value.const_value.tobytes() if value.const_value is not None and len(value.shape or ()) == 2 else b""
        value.name = transposed.get(content) or value.name.removeprefix("model.")
    program.model.metadata_props.update(
        labels=json.dumps(subject.classes),
        preprocessing=subject.processor.to_json_string(),
        scoring=subject.scoring,
    )
    program.save(folder / "model.onnx", external_data=subject.bytes > _ONNX_BYTES)


def _save_openvino_float16(subject: Subject, folder: Path) -> None:
    import_openvino().save_model(subject.openvino_model, folder / "model.xml", compress_to_fp16=True)


def _save_openvino_float32(subject: Subject, folder: Path) -> None:
    import_openvino().save_model(subject.openvino_model, folder / "model.xml", compress_to_fp16=False)


_ATTEMPTS: dict[str, tuple[_Attempt, ...]] = {
    "torch": (_Attempt(_save_torch),),
    "onnx": (_Attempt(_save_onnx),),
    "web": (_Attempt(_save_onnx),),
    "openvino": (_Attempt(_save_openvino_float16, "float16"), _Attempt(_save_openvino_float32, "float32")),
}


def write_float(
    subject: Subject,
    to: Format,
    folder: Path,
    checked: Checked,
    run: Callable[[Path, Mapping[str, Any]], AbstractContextManager[Engine]] | None = None,
) -> Description:
    """Writes and checks the model's files in a float format, and returns their description.

    `run` opens the folder in the runtime of the files, if this is not the one of `load_engine`.

    Raises `ValueError` if the answers of every attempt differ from the PyTorch model's.
    """
    run = run or (lambda folder, _: nullcontext(load_engine(folder, precision="float32")))
    for attempt in _ATTEMPTS[to]:
        attempt.save(subject, folder)
        description = _described(subject, to, folder)
        with run(folder, description.to_dict()) as engine:
            agreement = checked.agreement(engine, TOLERANCE)
        if agreement.labels == 1.0 and agreement.difference <= TOLERANCE:
            return _checked_description(replace(description, weights=attempt.weights), agreement, checked, folder)
    raise ValueError(
        f"{to} was not kept: expected the PyTorch model's labels for all {agreement.images} images ({checked.source}) "
        f"and probabilities that differ by at most {TOLERANCE:g}, found its labels for {agreement.labels:.1%} and a "
        f"difference of {agreement.difference:.2g}; take another format, and please report this"
    )


# ------------------------------------------------------------------------------------------------------------- the web


def refuse_for_the_web(subject: Subject) -> None:
    """Raises `ValueError` for preprocessing that the page can't do, and for weights that browsers can't load."""
    refuse_undone(subject.processor)
    if subject.bytes > _ONNX_BYTES:
        raise ValueError(
            f"the weights of {subject.name} take {subject.bytes / 2**30:.1f} GiB, more than the 2 GiB that browsers "
            "can load; take a smaller model"
        )


def write_web(subject: Subject, page: Page, folder: Path, checked: Checked) -> Description:
    """Writes the model and the page around it, checks both in Node, and returns their description."""
    page.write(folder)
    description = write_float(subject, "web", folder, checked, page.running)
    description = replace(description, versions={**description.versions, NodeEngine.name: VERSION})
    with page.running(folder, description.to_dict()) as engine:
        return replace(description, preprocessing=engine.check_pixels(checked.pictures(), subject.processor))


# --------------------------------------------------------------------------------------------------------------- int8


def write_int8(
    subject: Subject, to: Format, folder: Path, examples: Examples, checked: Checked, before: Accuracy
) -> Description:
    """Writes the model's files in int8, with as few layers in float as the accuracy allows, and describes them.

    Raises `TooInaccurate` if it loses more than `LOSS` of the accuracy `before` even with the largest share of layers
    in float.
    """
    batches, calibration = examples.batches(), examples.pixels(examples.calibration)
    quantise = {"onnx-int8": _quantise_onnx, "openvino-int8": _quantise_openvino}[to]
    order: list[str] = []
    for share in _SHARES:
        if share and not order:
            order = by_sensitivity(subject.logits, subject.layers(), calibration)
        kept = order[: math.ceil(share * len(order))]
        left = quantise(subject, folder, calibration, kept)
        description = _described(subject, to, folder)
        engine = load_engine(folder, precision="float32")
        after = accuracy_of(engine, batches)
        if accurate_enough(after, before):
            break
    else:
        raise TooInaccurate(
            f"{to} was not kept: on {before.total} images ({examples.source}) the accuracy falls from "
            f"{before.value:.4f} to {after.value:.4f}, by more than {LOSS:.1%}, even with {len(kept)} of {len(order)} "
            f"layers in float; the layers that 8 bits hurt most are {', '.join(order[:5])}; take "
            f"{to.removesuffix('-int8')}, or calibrate with more images"
        )
    weights = {name: layer.weight.numel() for name, layer in subject.layers().items()}
    quantised = 1 - sum(weights[name] for name in left) / sum(weights.values())
    accuracy = {
        "images": before.total,
        "source": examples.source,
        "float": before.to_dict(),
        "calibrated": len(calibration),
        "int8": after.to_dict(),
        "float_layers": left,
        "int8_weights": quantised,
    }
    return replace(_checked_description(description, checked.agreement(engine), checked, folder), accuracy=accuracy)


def _quantise_onnx(subject: Subject, folder: Path, calibration: Sequence[np.ndarray], kept: Sequence[str]) -> list[str]:
    """Writes the model, and returns the names of the layers that are in float."""
    import onnx

    with tempfile.TemporaryDirectory() as scratch:
        _save_onnx(subject, Path(scratch))
        model = onnx.load(Path(scratch) / "model.onnx")
    model, left = quantised_onnx(model, subject.layers(), calibration, kept, transformer=subject.transformer)
    onnx.save(model, folder / "model.onnx")
    return left


def _quantise_openvino(
    subject: Subject, folder: Path, calibration: Sequence[np.ndarray], kept: Sequence[str]
) -> list[str]:
    model, left = quantised_openvino(
        subject.openvino_model.clone(), subject.layers(), calibration, kept, transformer=subject.transformer
    )
    import_openvino().save_model(model, folder / "model.xml", compress_to_fp16=False)
    return left
