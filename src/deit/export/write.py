"""Exports a classifier for a runtime, and runs it there before its folder appears."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from deit import files, locks
from deit.choices import Format
from deit.evaluate.calibration import Calibration
from deit.evaluate.scores import Accuracy
from deit.export.checking import Checked, Examples, TooInaccurate, accuracy_of
from deit.export.engines import DESCRIPTION, read_description
from deit.export.formats import (
    BESIDE,
    Description,
    import_packages,
    refuse_for_the_web,
    write_float,
    write_int8,
    write_web,
)
from deit.export.merged import Merge, attempts, refuse_unmergeable
from deit.export.subject import Subject
from deit.export.web import Page
from deit.model.load import load_classifier, refuse_other_scoring


@dataclass(frozen=True)
class Exported:
    """The result of `export`."""

    folder: Path
    description: dict[str, Any]
    """The content of its `export.json`; docs/export.md explains the keys."""

    def __str__(self) -> str:
        """One line with the format, the agreement, and for int8 and merging the accuracies."""
        found, accuracy = self.description["agreement"], self.description.get("accuracy")
        said = (
            f"{self.folder}: {self.description['format']}, {round(found['labels'] * found['images'])} of "
            f"{found['images']} images labelled as by the PyTorch model, probabilities within "
            f"{found['difference']:.1e}"
        )
        if merge := self.description.get("merge"):
            said += f", merge={merge}"
        if accuracy is None:
            return said
        after = accuracy.get("int8") or accuracy["merged"]
        said += (
            f"; accuracy {after['value']:.4f} after {accuracy['float']['value']:.4f} on {accuracy['images']} images "
            f"(95 % interval {after['low']:.4f} to {after['high']:.4f})"
        )
        kept = accuracy.get("float_layers")
        return said + (f", in float: {', '.join(kept)}" if kept else "")


def export(
    source: str | Path,
    to: Format,
    out: str | Path,
    *,
    calibrate: str | Path | None = None,
    merge: Merge = None,
    **where: Any,
) -> Exported:
    """Writes a classifier for a runtime into the folder `out`.

    The exported model takes images of the model's size, in batches of any number. Beside its file, the folder holds
    `config.json` with the labels, `preprocessor_config.json`, `export.json` (see docs/export.md), and in a float format
    the model's `calibration.json` if there is one. The model's file depends on the format:

    - `torch`: `model.pt2`, a program of `torch.export`.
    - `onnx`: `model.onnx`.
    - `openvino`: `model.xml` and `model.bin`, with weights in float16 if that keeps the agreement.
    - `web`: a page that labels images in the browser: `model.onnx`, the page's files, and onnxruntime-web, which npm
      fetches the first time.
    - `onnx-int8` and `openvino-int8`: the same files as without int8, quantised by NNCF.

    The folder appears only after the file has passed a check in its runtime. A float format must give the PyTorch
    model's labels, with probabilities within `TOLERANCE`. int8 and merging together may lose at most `LOSS` of the
    accuracy. An earlier export in `out` is replaced only then. If the export fails, the earlier one stays and nothing
    else is left.

    Args:
        source: a model, as for `load_model`; `where` as for `from_pretrained`.
        calibrate: labelled images, as for `read_examples`. A float format is checked on some of them; without them, on
            random pictures. int8 is calibrated on the images of `train` and judged on those of `test` or `val`. If
            there is no such pair, the images go alternately to both. Merging is judged on the same images.
        merge: number of patch tokens that each block merges (`DeiTConfig.merge`), `auto` for the largest that keeps the
            accuracy, or None for the model's own. Without labelled images, a number is not judged.

    Raises:
        ValueError: `source` is no classifier, the images don't fit it, an answer differs, or int8 costs accuracy.
        FileExistsError: `out` holds anything but an earlier export.
        locks.InUse: another process exports to `out`.
        ImportError: a package is missing.
        FileNotFoundError: for `web`, Node is missing, or onnxruntime-web is not cached and can't be fetched.
    """
    if to not in get_args(Format):
        raise ValueError(f"there is no format {to!r}; choose {', '.join(get_args(Format))}")
    if to.endswith("int8") and calibrate is None:
        raise ValueError(
            f"{to} needs images to calibrate its ranges and to judge its accuracy; give labelled images with "
            "--calibrate DATA"
        )
    refuse_unmergeable(merge, calibrate is not None)
    folder = Path(out).absolute()
    refuse_occupied(folder)
    import_packages(to)
    with locks.held(folder, lock=locks.beside(folder)):
        files.restore_folder(folder)
        return _written(source, to, Path(out), calibrate, merge, where)


def _written(
    source: str | Path, to: Format, out: Path, calibrate: str | Path | None, merge: Merge, where: dict[str, Any]
) -> Exported:
    page = Page() if to == "web" else None
    subject = Subject(load_classifier(source, **where))
    judged = to.endswith("int8") or (merge is not None and calibrate is not None)
    if judged:
        refuse_other_scoring(source, subject.scoring, to if to.endswith("int8") else "merging")
    if page is not None:
        refuse_for_the_web(subject)
    examples = None if calibrate is None else Examples(calibrate, subject)
    before = accuracy_of(subject, examples.batches()) if examples is not None and judged else None
    with files.replacing_folder(out.absolute(), check=refuse_occupied) as temporary:
        for lighter, accuracy in attempts(subject, merge, examples, before):
            try:
                description = _filled(temporary, lighter, to, page, examples, before)
            except TooInaccurate:
                if merge != "auto" or lighter is subject:
                    raise
                continue  # with less merging
            if before is not None and accuracy is not None and examples is not None:
                known = {"images": before.total, "source": examples.source, "float": before.to_dict()}
                description = replace(
                    description, accuracy={**known, "merged": accuracy.to_dict(), **(description.accuracy or {})}
                )
            break
        if (
            lighter.merge == subject.merge
            and not to.endswith("int8")
            and (own := Calibration.of_model(source)) is not None
        ):
            own.save(temporary)  # what changes the answers needs its own by `deit calibrate DIR`
        files.write_json(temporary / DESCRIPTION, description.to_dict())
    return Exported(out, description.to_dict())


def _filled(
    folder: Path, subject: Subject, to: Format, page: Page | None, examples: Examples | None, before: Accuracy | None
) -> Description:
    """Writes config, preprocessing and the checked files of a format."""
    files.write_json(folder / "config.json", subject.model.config.to_dict())
    subject.processor.save_pretrained(folder)
    checked = Checked(subject, examples)
    if to.endswith("int8"):
        assert examples is not None
        assert before is not None
        return write_int8(subject, to, folder, examples, checked, before)
    if page is not None:
        return write_web(subject, page, folder, checked)
    return write_float(subject, to, folder, checked)


def refuse_occupied(folder: Path) -> None:
    """Raises `FileExistsError` unless `folder` is missing, empty, or an earlier export and nothing else."""
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
