"""Each format: what it needs, how its files are written, and their description with how they were checked."""

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
from deit.export.checking import Agreement, Checked, Examples, accuracy_of
from deit.export.engines import DESCRIPTION, Engine, OpenVINOEngine, import_openvino, load_engine, needed, sha256
from deit.export.quantise import by_sensitivity, quantised_onnx, quantised_openvino
from deit.export.subject import Subject
from deit.export.web import VERSION, NodeEngine, Page, refuse_undone
from deit.image.processor import FILE_NAME
from deit.model.load import heads_of

TOLERANCE = 1e-4
"""Largest difference of a probability from the PyTorch model's that a float format may have."""
LOSS = 0.005
"""Largest loss of accuracy that int8 may have."""
BESIDE = {"config.json", FILE_NAME, CALIBRATION, DESCRIPTION}
"""Files of an export that are not its `files`."""

_SHARES = (0.0, 1 / 8, 1 / 4, 1 / 2)
"""Shares of the layers that stay in float, tried in this order until int8 is accurate enough."""
_ONNX_BYTES = 2**31 - 2**24
"""An ONNX file can't be larger than 2 GiB, so the weights of a larger model lie in a file beside it."""
_PACKAGES: dict[Format, tuple[str, ...]] = {
    "torch": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "web": ("onnx", "onnxscript"),
    "onnx-int8": ("onnx", "onnxscript", "onnxruntime", "nncf"),
    "openvino-int8": ("openvino", "nncf"),
}


def import_packages(to: Format) -> None:
    """Raises `ImportError` for the first package that a format needs and that is missing."""
    for package in _PACKAGES[to]:
        if package == "openvino":
            import_openvino()
        with needed(package):
            import_module(package)


def versions(to: Format) -> dict[str, str]:
    """The version of everything that writes a format."""
    return {name: version(name) for name in ("deit", "torch", *_PACKAGES[to])}


@dataclass(frozen=True, kw_only=True)
class Description:
    """The content of `export.json`, whose keys are in docs/export.md; what does not apply is None, and left out."""

    format: Format
    files: Mapping[str, str]
    input: Mapping[str, Any]
    outputs: Sequence[str]
    heads: Sequence[str]
    scoring: Scoring
    versions: Mapping[str, str]
    weights: str | None = None
    agreement: Mapping[str, Any] | None = None
    native: Mapping[str, Any] | None = None
    preprocessing: Mapping[str, Any] | None = None
    accuracy: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in found.items() if value is not None}


def _described(subject: Subject, to: Format, folder: Path) -> Description:
    """The description of files that are written but not checked yet; `load_engine` needs it in the folder, so it is."""
    description = Description(
        format=to,
        files={path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name not in BESIDE},
        input={"name": "pixel_values", "shape": [None, *subject.shape], "type": "float32"},
        outputs=list(subject.logits.names),
        heads=list(heads_of(len(subject.logits.names) > 1, subject.scoring)),
        scoring=subject.scoring,
        versions=versions(to),
    )
    files.write_json(folder / DESCRIPTION, description.to_dict())
    return description


def _checked_description(description: Description, agreement: Agreement, checked: Checked, folder: Path) -> Description:
    """The description with the agreement in float32, and for OpenVINO with that in the precision it chooses itself."""
    description = replace(description, agreement={**vars(agreement), "source": checked.source})
    if not description.format.startswith("openvino"):
        return description
    engine = load_engine(folder)
    assert isinstance(engine, OpenVINOEngine)
    return replace(description, native={"precision": engine.inference_precision, **vars(checked.agreement(engine))})


# ------------------------------------------------------------------------------------------------------- float formats


class _Attempt(NamedTuple):
    """One way of writing a format; the next one is taken where its answers differ."""

    save: Callable[[Subject, Path], None]
    weights: str | None = None
    """Type of the weights, where a format has a choice."""


def _save_torch(subject: Subject, folder: Path) -> None:
    torch.export.save(subject.program, folder / "model.pt2")


def _save_onnx(subject: Subject, folder: Path) -> None:
    """With a batch axis called `batch`, weights under the model's own names, and what other tools want in the metadata:
    labels, preprocessing and scoring, as JSON."""
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
    # The exporter stores the weights of matrix products transposed, and numbers them: they are known by their values.
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
    """Writes the model's files in a float format.

    `run` opens the folder in the runtime that the files are for, where that is not the one of `load_engine`.

    Raises `ValueError` if every attempt answers otherwise than the PyTorch model.
    """
    run = run or (lambda folder, _: nullcontext(load_engine(folder, precision="float32")))
    for attempt in _ATTEMPTS[to]:
        attempt.save(subject, folder)
        description = _described(subject, to, folder)
        with run(folder, description.to_dict()) as engine:
            agreement = checked.agreement(engine)
        if agreement.labels == 1.0 and agreement.difference <= TOLERANCE:
            return _checked_description(replace(description, weights=attempt.weights), agreement, checked, folder)
    raise ValueError(
        f"{to} was not kept: of {agreement.images} images ({checked.source}) "
        f"{agreement.labels:.1%} are labelled as by the PyTorch model, and a probability differs by "
        f"{agreement.difference:.2g}, where all and at most {TOLERANCE:g} are allowed; please report "
        "it, and take another format"
    )


# ------------------------------------------------------------------------------------------------------------- the web


def refuse_for_the_web(subject: Subject) -> None:
    """Raises `ValueError` for preprocessing that the page can't do, and for weights that no browser loads."""
    refuse_undone(subject.processor)
    if subject.bytes > _ONNX_BYTES:
        raise ValueError(
            f"the weights of {subject.name} take {subject.bytes / 2**30:.1f} GiB, more than the 2 "
            "GiB that a file for a browser can have; take a smaller model"
        )


def write_web(subject: Subject, page: Page, folder: Path, checked: Checked) -> Description:
    """Writes the model and the page around it, and runs both in Node."""
    page.write(folder)
    description = write_float(subject, "web", folder, checked, page.running)
    description = replace(description, versions={**description.versions, NodeEngine.name: VERSION})
    with page.running(folder, description.to_dict()) as engine:
        return replace(description, preprocessing=engine.check_pixels(checked.pictures(), subject.processor))


# --------------------------------------------------------------------------------------------------------------- int8


def write_int8(subject: Subject, to: Format, folder: Path, examples: Examples, checked: Checked) -> Description:
    """Writes the model's files with as few layers in float as the accuracy allows.

    Raises `ValueError` if the accuracy falls by more than `LOSS` even with the largest share of layers in float.
    """
    batches, calibration = examples.batches(), examples.pixels(examples.calibration)
    before = accuracy_of(subject, batches)
    quantise = {"onnx-int8": _quantise_onnx, "openvino-int8": _quantise_openvino}[to]
    order: list[str] = []
    for share in _SHARES:
        if share and not order:
            order = by_sensitivity(subject.logits, subject.layers(), calibration)
        kept = order[: math.ceil(share * len(order))]
        quantise(subject, folder, calibration, kept)
        description = _described(subject, to, folder)
        engine = load_engine(folder, precision="float32")
        after = accuracy_of(engine, batches)
        if before.correct - after.correct <= LOSS * before.total:
            break
    else:
        raise ValueError(
            f"{to} was not kept: on {before.total} images ({examples.source}) the accuracy is "
            f"{after.value:.4f} after {before.value:.4f}, more than {LOSS:.1%} lower, even with "
            f"{len(kept)} of {len(order)} layers in float; the ones that 8 bits hurt most are "
            f"{', '.join(order[:5])}; take {to.removesuffix('-int8')}, or calibrate with more images"
        )
    weights = {name: layer.weight.numel() for name, layer in subject.layers().items()}
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
    return replace(_checked_description(description, checked.agreement(engine), checked, folder), accuracy=accuracy)


def _quantise_onnx(subject: Subject, folder: Path, calibration: Sequence[np.ndarray], kept: Sequence[str]) -> None:
    import onnx

    with tempfile.TemporaryDirectory() as scratch:
        _save_onnx(subject, Path(scratch))
        model = onnx.load(Path(scratch) / "model.onnx")
    onnx.save(
        quantised_onnx(model, subject.layers(), calibration, kept, transformer=subject.transformer),
        folder / "model.onnx",
    )


def _quantise_openvino(subject: Subject, folder: Path, calibration: Sequence[np.ndarray], kept: Sequence[str]) -> None:
    model = quantised_openvino(
        subject.openvino_model.clone(), subject.layers(), calibration, kept, transformer=subject.transformer
    )
    import_openvino().save_model(model, folder / "model.xml", compress_to_fp16=False)
