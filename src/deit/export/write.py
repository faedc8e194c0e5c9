"""A classifier written for a runtime, and run there before its folder is returned."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from deit import files
from deit.choices import Format
from deit.evaluate.calibration import Calibration
from deit.export.checking import Checked, Examples
from deit.export.engines import DESCRIPTION, read_description
from deit.export.formats import (
    BESIDE,
    import_packages,
    refuse_for_the_web,
    write_float,
    write_int8,
    write_web,
)
from deit.export.subject import Subject
from deit.export.web import Page
from deit.model.load import load_classifier


@dataclass(frozen=True)
class Exported:
    """What `export` wrote."""

    folder: Path
    description: dict[str, Any]
    """The content of its `export.json`, whose keys are in docs/export.md."""

    def __str__(self) -> str:
        """In one line: format, agreement, and of int8 the accuracies."""
        found, accuracy = self.description["agreement"], self.description.get("accuracy")
        said = (
            f"{self.folder}: {self.description['format']}, {round(found['labels'] * found['images'])} of "
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
    refuse_occupied(folder)
    import_packages(to)
    page = Page() if to == "web" else None
    subject = Subject(load_classifier(source, **where))
    if page is not None:
        refuse_for_the_web(subject)
    examples = None if calibrate is None else Examples(calibrate, subject)
    checked = Checked(subject, examples)
    with files.replacing_folder(folder, check=refuse_occupied) as temporary:
        files.write_json(temporary / "config.json", subject.model.config.to_dict())
        subject.processor.save_pretrained(temporary)
        if not to.endswith("int8") and (calibration := Calibration.of_model(source)) is not None:
            calibration.save(temporary)  # int8 answers differ by more: they want their own, of `deit calibrate DIR`
        if examples is not None and to.endswith("int8"):
            description = write_int8(subject, to, temporary, examples, checked)
        elif page is not None:
            description = write_web(subject, page, temporary, checked)
        else:
            description = write_float(subject, to, temporary, checked)
        files.write_json(temporary / DESCRIPTION, description.to_dict())
    return Exported(Path(out), description.to_dict())


def refuse_occupied(folder: Path) -> None:
    """Raises `FileExistsError` unless `folder` is absent, empty, or a former export and nothing else."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, expected a folder; give --out a new one")
    if found := {path.name for path in folder.iterdir()}:
        try:
            known = BESIDE | set(read_description(folder)["files"])
        except (OSError, ValueError):
            known = set()
        if others := sorted(found - known):
            raise FileExistsError(
                f"{folder} holds {', '.join(others[:3])}{' and more' if len(others) > 3 else ''}, "
                "which no export wrote; give --out a new folder"
            )
