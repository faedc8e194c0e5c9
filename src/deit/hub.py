"""Checkpoints: a name, a folder or a file to tensors under our names, and back, and onto the hub.

Reading executes nothing: safetensors, or PyTorch's restricted unpickler for `.bin` and `.pth`.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deit import weights
from deit.config import DeiTConfig
from deit.files import CheckpointError, NotFetched, find_file, read_json, replacing, write_json, write_text

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                "pytorch_model.bin.index.json")
"""Looked for in this order."""


# ---------------------------------------------------------------------------------------------------------- finding


def _find_weights(name_or_folder: str | Path, **where: Any) -> list[Path]:
    """The weight file, or all shards of it."""
    if (place := Path(name_or_folder).expanduser()).is_file():
        return [place]
    reasons = []
    for filename in WEIGHT_FILES:
        try:
            path = find_file(name_or_folder, filename, **where)
        except FileNotFoundError as error:
            reasons.append(error)
            if isinstance(error, NotFetched):  # the client waits long for each file; the cache may hold another
                where["local_files_only"] = True
            continue
        if not filename.endswith(".index.json"):
            return [path]
        shards = read_json(path).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{path} has no weight_map, so its shards are unknown; fetch the checkpoint again")
        try:
            return [find_file(name_or_folder, shard, **where) for shard in sorted(set(shards.values()))]
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} lists a shard that is missing ({error}); fetch the checkpoint "
                                  "again") from None
    if place.is_dir():
        place = place / where.get("subfolder", "")
        loose = sorted(place.glob("*.pth"))
        if len(loose) == 1:
            return loose
        raise FileNotFoundError(f"{place} holds no weights; expected one of {', '.join(WEIGHT_FILES)} or one .pth file")
    raise reasons[0]


# ---------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Checkpoint:
    """A model read from files: what it is and its tensors under our names (`weights.manifest`)."""

    config: DeiTConfig
    tensors: dict[str, Tensor]
    file: str
    """The weight file (the first of the shards), for messages."""


def read_checkpoint(name_or_folder: str | Path, *, config: DeiTConfig | None = None, **where: Any) -> Checkpoint:
    """Reads a folder, a hub repository or a weight file, in any dialect; `where` as in `find_file`.

    Without `config` and without a `config.json`, the architecture is told from the tensors' shapes.
    """
    import torch

    if config is None:
        with suppress(FileNotFoundError):
            config = DeiTConfig.from_pretrained(name_or_folder, **where)
    paths = _find_weights(name_or_folder, **where)
    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors |= read_tensors(path)
    file = str(paths[0])
    ours = weights.to_ours(tensors, join=lambda parts: torch.cat(list(parts)), file=file)
    return Checkpoint(config or weights.infer_config(ours, file=file), ours, file)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one `.safetensors`, `.bin` or `.pth` file, on the CPU, under the file's own names."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is truncated or corrupt ({error}); fetch it again") from None
    return _read_pickle(path)


class _Refused:
    """Stands in for a pickled object that is not read: it takes any state and keeps none."""

    def __setstate__(self, state: object) -> None:
        pass


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """PyTorch's restricted unpickler. The original repository's files carry an `argparse.Namespace`: left unread."""
    import torch

    try:
        with torch.serialization.safe_globals([(_Refused, "argparse.Namespace")]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # on damaged bytes the unpickler raises nearly anything
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise CheckpointError(f"{path} holds more than tensors: a pickle that would run code when loaded. Nothing "
                                  f"was executed or loaded ({_culprit(str(error))}). Ask for a safetensors "
                                  "file") from None
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is truncated, corrupt or no PyTorch file ({reason}); fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a dictionary of tensors, found {type(content).__name__}")
    refused = [str(name) for name, value in content.items() if isinstance(value, _Refused | argparse.Namespace)]
    if refused:
        warnings.warn(f"{path}: {', '.join(refused)} is a pickled object and was not read; the weights are",
                      stacklevel=2)
    tensors = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)), content)
    if other := [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]:
        raise CheckpointError(f"{path}: {other[0]!r} is {type(tensors[other[0]]).__name__}, expected tensors only, or "
                              'a dictionary with them under "model"')
    return dict(tensors)


def _culprit(message: str) -> str:
    words = [word.strip("`.,'\"") for word in message.split()]
    after = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "GLOBAL" and "." in words[i + 1]]
    return f"it asks for {after[0]}" if after else "it asks for objects other than tensors"


# ---------------------------------------------------------------------------------------------------------- writing


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], *, max_shard_size: int | str = "5GB") -> None:
    """Writes `model.safetensors`, or numbered shards and their index where it would exceed `max_shard_size`."""
    from safetensors.torch import save_file

    shards = _shards(tensors, _bytes(max_shard_size))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        with replacing(folder / name) as temporary:
            save_file({key: value.contiguous() for key, value in shard.items()}, temporary, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if len(shards) > 1:
        content = {"metadata": {"total_size": sum(map(_size, tensors.values()))},
                   "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard}}
        write_json(index, content)
    else:
        index.unlink(missing_ok=True)
    for stale in folder.glob("model*.safetensors"):
        if stale.name not in names and _WEIGHT_FILE.fullmatch(stale.name):
            stale.unlink()


_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shards(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + _size(tensor) > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += _size(tensor)
    return shards


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    for unit, factor in sorted(units.items(), key=lambda item: -len(item[0])):
        if size.upper().endswith(unit) and size[:-len(unit)].strip().isdigit():
            return int(size[:-len(unit)]) * factor
    raise ValueError(f"max_shard_size={size!r} is not understood; give bytes, or a size like 500MB or 5GB")


def write_checkpoint(folder: Path, config: DeiTConfig, tensors: Mapping[str, Tensor], *,
                     max_shard_size: int | str = "5GB") -> None:
    """Writes `config.json` and weights as Hugging Face names them; `transformers` reads the folder."""
    kind = weights.kind_of(tensors)
    family = "ViT" if config.model_type == "vit" else "DeiT"
    prefix = "" if kind == "backbone" else f"{family.lower()}."
    named = weights.from_ours(tensors, "hf", prefix=prefix)
    architecture = {"backbone": "Model", "masked_image": "ForMaskedImageModeling",
                    "classification": "ForImageClassification",
                    "with_teacher": "ForImageClassificationWithTeacher"}[kind]
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    config = config.replace(extra={**config.extra, "architectures": [family + architecture], "dtype": dtype})
    write_tensors(folder, named, max_shard_size=max_shard_size)
    config.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------- sharing


def push_folder(folder: Path, repo_id: str, *, token: str | bool | None = None, private: bool | None = None,
                revision: str | None = None, commit_message: str = "Upload model") -> str:
    """Uploads a saved folder to the hub, making the repository where it is missing; returns the commit's address."""
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ImportError('pushing to the hub needs huggingface_hub: pip install "deit[hub]"') from None
    card = folder / "README.md"
    if not card.exists():
        write_text(card, model_card(DeiTConfig.from_pretrained(folder), repo_id))
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision,
                                 commit_message=commit_message))


def model_card(config: DeiTConfig, name: str) -> str:
    """The README.md of a hub repository: metadata that the hub indexes, what the model is, and how to load it.

    `config` is one that was read from a saved model: it names the architecture.
    """
    architecture = config.extra["architectures"][0]
    task = {"Model": "image-feature-extraction", "ForMaskedImageModeling": "image-feature-extraction"}.get(
        architecture.removeprefix("DeiT").removeprefix("ViT"), "image-classification")
    labels: Sequence[str] = list((config.id2label or {}).values())
    shown = ", ".join(labels[:20]) + (f" and {len(labels) - 20} more" if len(labels) > 20 else "")
    classes = f"\nClasses: {shown}.\n" if task == "image-classification" else ""
    kind = "with" if config.distillation_token else "without"
    return f"""---
library_name: deit
pipeline_tag: {task}
tags:
- {config.model_type}
---
# {name.rsplit("/", maxsplit=1)[-1]}

A vision transformer {kind} distillation token: width {config.hidden_size}, {config.num_hidden_layers} blocks,
{config.num_attention_heads} heads, patches of {config.patch_hw[0]}x{config.patch_hw[1]} pixels, images of
{config.image_hw[0]}x{config.image_hw[1]}.
{classes}
```python
import deit

model = deit.load_model("{name}")
```
"""
