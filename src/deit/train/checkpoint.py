"""A run's state on disk. It is written whole or not at all, and checked when it is read.

`RUN/checkpoints/step-000001234.safetensors` holds every tensor of the run. Its header holds the rest of the state as
JSON and a checksum of both. The two newest are kept, because the run can resume from the other if one is damaged.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deit import files

KEPT = 2
_NAME = re.compile(r"step-(\d{9})\.safetensors")


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*.safetensors") if _NAME.fullmatch(path.name))


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Writes the state after step `step`, and removes all but the newest checkpoints.

    Raises `OSError` if it can't be written. The older checkpoints are then untouched.
    """
    path = folder / f"step-{step:09}.safetensors"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = json.dumps(state)
    try:
        with files.replacing(path) as temporary:
            save_file(tensors, temporary, {"state": header, "crc32": str(_checksum(tensors, header))})
    except (SafetensorError, OSError) as error:
        left = saved(folder)
        raise OSError(
            f"{path} can't be written ({getattr(error, 'reason', error)}); "
            + (f"{left[-1].name} is untouched; " if left else "")
            + "free space, then give the same command again (deit train with --resume)"
        ) from None
    for old in saved(folder)[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def restore(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]] | None:
    """Reads the newest good checkpoint. None if there is no checkpoint at all.

    Returns its tensors, its state, and a sentence for each newer checkpoint that is damaged. Raises `CheckpointError`
    if all are damaged.
    """
    problems: list[str] = []
    for path in reversed(saved(folder)):
        try:
            return *_read(path), problems
        except files.CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise files.CheckpointError(
            f"{'; '.join(problems)}; no good checkpoint is left, start a new run in another folder"
        )
    return None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        state = json.loads(header["state"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise files.CheckpointError(f"{path} is damaged ({error})") from None
    if str(_checksum(tensors, header["state"])) != header.get("crc32"):
        raise files.CheckpointError(f"{path} is damaged (its checksum differs from what was written)")
    return tensors, state


def _checksum(tensors: Mapping[str, Tensor], header: str) -> int:
    total = zlib.crc32(header.encode())
    for name in sorted(tensors):
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, total)
    return total
