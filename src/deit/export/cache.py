"""Runs a classifier in another runtime. The first use exports it into this user's cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch

from deit import files, locks
from deit.export.checking import Checked
from deit.export.engines import DESCRIPTION, Engine, load_engine
from deit.export.formats import import_packages, versions, write_float
from deit.export.subject import Subject
from deit.export.write import refuse_occupied
from deit.model.load import Classifier

_log = logging.getLogger("deit.export")
_NAMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}


def cached_engine(classifier: Classifier, to: Literal["onnx", "openvino"]) -> Engine:
    """Returns a trained classifier in another runtime, in the precision that the runtime chooses.

    The first use writes and checks it as `export` does. If many processes begin at once, one does it and the others
    wait. The folder lies in this user's cache, and its name is a hash of the model's content. A folder that another
    user could have written is made anew. The first use also removes folders that were not used for a month.

    Raises the errors of `export`, and `files.CacheUnused`.
    """
    import_packages(to)
    folder = files.cache_folder("engines") / f"{to}-{_digest(classifier.model, to)}"
    if os.path.lexists(folder) and not (folder.is_dir() and files.only_mine(folder)):
        files.remove(folder)  # another user could have written it
    with suppress(FileNotFoundError, files.CheckpointError):
        return _used(folder)
    # Others that need the same engine wait for it, because exporting takes the memory of a model several times.
    with locks.held(folder, lock=locks.beside(folder), wait=True):
        files.restore_folder(folder)
        try:
            return _used(folder)
        except FileNotFoundError:
            pass
        except files.CheckpointError:
            shutil.rmtree(folder)
        return _written(classifier, to, folder)


def _used(folder: Path) -> Engine:
    engine = load_engine(folder)
    with suppress(OSError):  # the folder is read-only
        os.utime(folder)
    return engine


def _written(classifier: Classifier, to: Literal["onnx", "openvino"], folder: Path) -> Engine:
    _log.info("exporting the model for %s and checking it, once; this can take a minute", _NAMES[to])
    subject = Subject(classifier)
    written: Engine | None = None
    try:
        with files.replacing_folder(folder, check=refuse_occupied) as temporary:
            files.write_json(temporary / "config.json", classifier.model.config.to_dict())
            classifier.processor.save_pretrained(temporary)
            files.write_json(
                temporary / DESCRIPTION, write_float(subject, to, temporary, Checked(subject, None)).to_dict()
            )
            written = load_engine(temporary)
    except OSError:
        if written is None:
            raise  # otherwise another process moved its folder into place first, and the engine is loaded already
    files.forget_unused(folder.parent)
    assert written is not None
    written.folder = folder
    return written


def _digest(model: Any, to: Literal["onnx", "openvino"]) -> str:
    """A hash of everything that decides the content of the exported file."""
    found = hashlib.sha256(json.dumps([versions(to), model.config.to_dict()], sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]
