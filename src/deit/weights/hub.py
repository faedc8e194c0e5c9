"""Checkpoints: reads tensors under our names from a hub name, a folder or a file, writes them, and shares them.

Reading executes no code: it takes safetensors, HDF5, and `.bin` and `.pth` files through PyTorch's restricted
unpickler. Tensors are PyTorch's or NumPy's, as the caller's framework needs them. The other framework need not be
installed.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deit import host
from deit.config import DeiTConfig
from deit.files import CheckpointError, NotFetched, find_file, read_json, replacing, upload, write_json, write_text
from deit.weights import names as weights
from deit.weights.card import NOTHING_KNOWN, Facts, model_card

Arrays = Literal["torch", "numpy"]

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
)
"""The names of weight files, in the order in which they are looked for."""


# ---------------------------------------------------------------------------------------------------------- finding


def _named(filename: str, variant: str | None) -> str:
    """The name that `transformers` gives the file of a variant: `model.fp16.safetensors`."""
    stem, _, ending = filename.rpartition(".")
    return filename if variant is None else f"{stem}.{variant}.{ending}"


def find_weights(
    name_or_folder: str | Path, variant: str | None = None, use_safetensors: bool | None = None, **where: Any
) -> list[Path]:
    """The weight file, or all shards of it."""
    if (place := Path(name_or_folder).expanduser()).is_file():
        if place.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"):
            raise CheckpointError(f"{place} is an image, expected a model; give the model's folder there")
        if use_safetensors is not None and use_safetensors != (place.suffix == ".safetensors"):
            raise ValueError(f"use_safetensors={use_safetensors} contradicts the file {place}; leave it out")
        return [place]
    reasons = []
    names = [
        _named(name, variant)
        for name in WEIGHT_FILES
        if use_safetensors is None or use_safetensors == name.startswith("model.safetensors")
    ]
    for filename in names:
        try:
            path = find_file(name_or_folder, filename, **where)
        except FileNotFoundError as error:
            reasons.append(error)
            if isinstance(error, NotFetched):  # each try waits long for the hub; the cache may still hold another file
                where["local_files_only"] = True
            continue
        if ".index." not in filename:
            return [path]
        shards = read_json(path).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{path} has no weight_map, so its shards are unknown; fetch the checkpoint again")
        if other := [shard for shard in shards.values() if not _is_file_name(shard)]:
            raise CheckpointError(
                f"{path} lists the shard {other[0]!r:.80}, expected the name of a file beside it; fetch the checkpoint "
                "again"
            )
        try:
            return [find_file(name_or_folder, shard, **where) for shard in sorted(set(shards.values()))]
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{path} lists a shard that is missing ({error}); fetch the checkpoint again"
            ) from None
    if place.is_dir():
        place = place / where.get("subfolder", "")
        loose = sorted(place.glob("*.pth")) if variant is None and use_safetensors is not True else []
        if len(loose) == 1:
            return loose
        asked = "" if variant is None else f" of variant {variant!r}"
        asked += "" if use_safetensors is None else f" with use_safetensors={use_safetensors}"
        also = "" if variant is not None or use_safetensors else " or one .pth file"
        if (place / "model").is_dir():
            raise FileNotFoundError(f"{place} holds no weights{asked}; the model of a run is in {place / 'model'}")
        if (place / "export.json").is_file():
            raise FileNotFoundError(
                f"{place} holds an exported model and no weights{asked}; deit predict, serve and calibrate take it, "
                "and everything else takes the folder of the model that was exported"
            )
        raise FileNotFoundError(f"{place} holds no weights{asked}; expected one of {', '.join(names)}{also}")
    raise reasons[0]


def _is_file_name(name: object) -> bool:
    """Whether a name can't lead out of a folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0:")


# ---------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Checkpoint:
    """A model that was read from files: its config, and its tensors under our names (`weights.manifest`)."""

    config: DeiTConfig
    tensors: dict[str, Any]
    file: str
    """The weight file (the first of the shards), for messages."""

    def config_for(
        self, kind: weights.Kind, config_class: type[DeiTConfig], overrides: Mapping[str, Any]
    ) -> DeiTConfig:
        """The config of a model of this kind that takes these tensors."""
        config = config_class.from_dict(self.config.to_dict(), **overrides)
        if kind == "masked_image" and "encoder_stride" not in overrides:
            config = config.replace(encoder_stride=config.patch_size)
        blocks = {name.split(".")[2] for name in self.tensors if name.startswith(f"{weights.BASE}blocks.")}
        if config.num_hidden_layers > len(blocks):  # said here, because naming each missing tensor could take forever
            raise CheckpointError(
                f"{self.file} holds {len(blocks)} blocks, and this model's config asks for {config.num_hidden_layers}; "
                "the file is incomplete, or the config is another model's"
            )
        return config

    def options_for(self, kind: weights.Kind) -> dict[str, bool]:
        """Which optional parts of a backbone these tensors hold."""
        return (
            {
                "add_pooling_layer": any(name.startswith("deit.pooler.") for name in self.tensors),
                "use_mask_token": "deit.mask_token" in self.tensors,
            }
            if kind == "backbone"
            else {}
        )

    def fit(self, expected: Mapping[str, tuple[int, ...]], ignore_mismatched_sizes: bool) -> Fitted:
        """The tensors for a model that expects these names and shapes.

        Warns of tensors that start from fresh values, and of the transformer's tensors that the model has no place for.
        Raises `CheckpointError` as `faults` does.
        """
        given, missing, mismatched = self.faults(expected, ignore_mismatched_sizes)
        if fresh := [*missing, *mismatched]:
            warnings.warn(
                f"{self.file} does not give {', '.join(fresh)}: initialised anew, train before use", stacklevel=5
            )
        unused = sorted(self.tensors.keys() - expected.keys())
        if left := [name for name in unused if not name.startswith(_MAY_BE_MISSING)]:
            warnings.warn(
                f"{self.file} holds {left[0]}{_others(left)}, which this model's config does not ask for: left out, so "
                "the model is not the one that was trained; check the config",
                stacklevel=5,
            )
        return Fitted(
            {name: given[name] for name in given if name not in mismatched},
            fresh,
            {
                "missing_keys": missing,
                "mismatched_keys": mismatched,
                "error_msgs": [],
                "unexpected_keys": unused,
            },
        )

    def faults(
        self, expected: Mapping[str, tuple[int, ...]], ignore_mismatched_sizes: bool
    ) -> tuple[dict[str, Any], list[str], list[str]]:
        """The tensors that a model expects, and the names of the missing ones and of those in another shape.

        Raises `CheckpointError` if a tensor has another shape or holds whole numbers, or if one is missing that a file
        may not lack (it may lack heads, the pooler and the mask token), or is too large to be made up.
        """
        given = {name: tensor for name, tensor in self.tensors.items() if name in expected}
        if whole := [name for name, tensor in given.items() if "float" not in str(tensor.dtype)]:
            raise CheckpointError(
                f"{self.file}: {whole[0]} holds {given[whole[0]].dtype}{_others(whole)}, expected floating-point "
                "numbers; ask for the model as it was before it was quantised"
            )
        mismatched = [name for name in expected if name in given and tuple(given[name].shape) != expected[name]]
        wide = "classifier.weight" in mismatched and _reads_the_mean(given["classifier.weight"], expected)
        if wide:  # its bias would fit, but it belongs to weights that don't
            mismatched += [name for name in ("classifier.bias",) if name in given and name not in mismatched]
        if wide and not ignore_mismatched_sizes:
            raise CheckpointError(
                f"{self.file}: the classifier reads the class token and the mean of the patches "
                f"({given['classifier.weight'].shape[1]} inputs), and this package's reads the class token alone "
                f"({expected['classifier.weight'][1]}); load the backbone with DeiTModel, or pass "
                "ignore_mismatched_sizes=True to train a fresh classifier"
            )
        if mismatched and not ignore_mismatched_sizes:
            name = mismatched[0]
            raise CheckpointError(
                f"{self.file}: {name} has shape {tuple(given[name].shape)}, this model expects {expected[name]}"
                f"{_others(mismatched)}; pass a config that fits the file, or ignore_mismatched_sizes=True to "
                "initialise such tensors anew"
            )
        missing = [name for name in expected if name not in given]
        broken = [name for name in missing if not name.startswith(_MAY_BE_MISSING)]
        if broken:
            raise CheckpointError(
                f"{self.file} lacks {broken[0]}{_others(broken)}, which this model's config asks "
                "for; the file is incomplete, or the config is another model's"
            )
        if (made := sum(math.prod(expected[name]) for name in (*missing, *mismatched))) > _MOST_FRESH:
            raise CheckpointError(
                f"{self.file} does not give {(missing or mismatched)[0]}{_others([*missing, *mismatched])}, and this "
                f"model's config asks for {made} numbers there; the config is another model's"
            )
        return given, missing, mismatched


@dataclass(frozen=True)
class Fitted:
    """What a model takes from a checkpoint."""

    given: dict[str, Any]
    fresh: list[str]
    """Tensors that the file lacks, or has in another shape."""
    info: dict[str, list[str]]
    """The loading info that `transformers` returns."""


_MOST_FRESH = 2**28
"""Largest count of numbers that are initialised because a file lacks them: a gigabyte."""
_MAY_BE_MISSING = (
    "classifier.",
    "cls_classifier.",
    "distillation_classifier.",
    "decoder.",
    "deit.pooler.",
    "deit.mask_token",
)
"""What the names of the parts begin with that a file may lack, or have for another class."""


def _reads_the_mean(classifier: Any, expected: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a head takes twice the width: DINOv2's in transformers, which also reads the mean of the patches."""
    return len(classifier.shape) == 2 and classifier.shape[1] == 2 * expected["classifier.weight"][1]


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def read_checkpoint(
    name_or_folder: str | Path,
    *,
    config: DeiTConfig | str | Path | None = None,
    arrays: Arrays = "torch",
    variant: str | None = None,
    use_safetensors: bool | None = None,
    **where: Any,
) -> Checkpoint:
    """Reads a folder, a hub repository or a weight file, in any dialect. `where` is as in `find_file`.

    If there is neither a `config` nor a `config.json`, the shapes of the tensors tell the architecture. A `config` that
    is a name or a folder stands for the config that is there. `variant` reads files like `model.fp16.safetensors`.
    `use_safetensors` allows such files alone, or none.
    """
    if isinstance(config, str | Path):
        config = DeiTConfig.from_pretrained(config, **where)
    elif config is None:
        try:
            config = DeiTConfig.from_pretrained(name_or_folder, **where)
        except NotFetched:
            where["local_files_only"] = True
        except FileNotFoundError:
            pass
    paths = find_weights(name_or_folder, variant, use_safetensors, **where)
    tensors: dict[str, Any] = {}
    for path in paths:
        tensors |= read_tensors(path, arrays)
    return of_tensors(tensors, config, str(paths[0]))


def of_tensors(
    tensors: Mapping[str, Any], config: DeiTConfig | None = None, file: str = "the state_dict"
) -> Checkpoint:
    """A checkpoint of tensors in memory, under the names of any dialect; `file` is what messages call it."""
    ours = weights.to_ours(tensors, join=_concatenate, file=file)
    return Checkpoint(config or weights.infer_config(ours, file=file), ours, file)


def _concatenate(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    import torch

    return torch.cat(list(parts))


def read_tensors(path: Path, arrays: Arrays = "torch") -> dict[str, Any]:
    """The tensors of one `.safetensors`, `.bin`, `.pth` or `.h5` file, on the CPU, under the file's own names.

    Tensors that TensorFlow stored get the names and the layout of Hugging Face's PyTorch files.
    """
    if path.suffix in _UNREAD_FORMATS:
        raise CheckpointError(f"{path} is {_UNREAD_FORMATS[path.suffix]}")
    if path.suffix == ".h5":
        return _as(arrays, weights.from_tensorflow(_read_h5(path), file=str(path)))
    if path.suffix != ".safetensors":
        return _as(arrays, _read_pickle(path))
    from safetensors import SafetensorError

    try:
        # "pread" maps no file: a mapped one that changes under a process would end it, or change its model
        if arrays == "numpy":
            from safetensors.numpy import load_file as load_arrays

            tensors: dict[str, Any] = load_arrays(path, backend="pread")
        else:
            from safetensors.torch import load_file

            tensors = load_file(path, backend="pread")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt ({error}); fetch it again") from None
    if any(name.endswith(":0") for name in tensors):
        return _as(arrays, weights.from_tensorflow(_as("numpy", tensors), file=str(path)))
    return tensors


_UNREAD_FORMATS = {
    ".msgpack": "a file of Flax, expected safetensors, .bin, .pth or .h5; load its folder with from_flax=True in "
    "transformers 4, and save it with save_pretrained",
    ".npz": "a file of NumPy, as Google's ViTs have, expected safetensors, .bin, .pth or .h5; load it with timm's "
    "create_model(NAME, checkpoint_path=FILE), and save its state_dict()",
    ".keras": "a whole model of Keras, expected safetensors, .bin, .pth or .h5; import deit.model_keras, load it with "
    "keras.saving.load_model, and save it with save_pretrained",
}
"""Files that people take for weights to read, and how they get such weights from them."""


def _as(arrays: Arrays, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The same values as tensors of that framework. NumPy gets bfloat16 from ml_dtypes, which every back end brings."""
    if arrays == "numpy":
        return {name: value if isinstance(value, np.ndarray) else _to_numpy(value) for name, value in tensors.items()}
    import torch

    return {
        name: torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
        for name, value in tensors.items()
    }


def _to_numpy(tensor: Any) -> np.ndarray:
    import torch

    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    import ml_dtypes

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _read_h5(path: Path) -> dict[str, np.ndarray]:
    """All datasets of an HDF5 file by their paths. `transformers` 4 wrote such files, named `tf_model.h5`."""
    try:
        import h5py
    except ImportError:
        raise host.missing(f"reading {path} needs h5py", "keras") from None
    tensors: dict[str, np.ndarray] = {}
    found: list[tuple[str, Any]] = []
    try:
        with h5py.File(path) as file:
            file.visititems(lambda name, node: found.append((name, node)) if isinstance(node, h5py.Dataset) else None)
            for name, node in found:
                if node.external or node.is_virtual:
                    raise CheckpointError(
                        f"{path}: {name} lies in another file, expected the numbers themselves; ask for a safetensors "
                        "file"
                    )
                if node.dtype.kind not in "fiu" or node.nbytes > _MOST_PACKED * node.id.get_storage_size():
                    raise CheckpointError(
                        f"{path}: {name} is {node.shape} of {node.dtype}, expected as many numbers as the file holds; "
                        "ask for a safetensors file"
                    )
                tensors[name] = node[()]
    except CheckpointError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is truncated, corrupt or no HDF5 file ({error}); fetch it again") from None
    return tensors


_MOST_PACKED = 20
"""How many times larger than in the file a compressed array may be."""


class _Refused:
    """Stands in for a pickled object that is not read. It accepts any arguments and state, and keeps none."""

    def __init__(self, *_: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


_UNREAD = (
    "argparse.Namespace",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.{name}" for name in ("dtype", "ndarray", "bool_", "float32", "float64", "int32", "int64")),
    *(
        f"{module}.{pure}{system}Path"
        for module in ("pathlib", "pathlib._local")
        for pure in ("", "Pure")
        for system in ("", "Posix", "Windows")
    ),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
)
"""What training scripts keep beside the weights: settings, scores, paths and times."""


def _refused(value: object) -> bool:
    """Whether a value is, or holds, what is not read."""
    if isinstance(value, Mapping):
        return any(map(_refused, (*value, *value.values())))
    if isinstance(value, list | tuple | set):
        return any(map(_refused, value))
    return isinstance(value, _Refused | argparse.Namespace) or value is _Refused


def _refuse_packed(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if sum(part.file_size for part in archive.infolist()) > 2 * path.stat().st_size:
            raise CheckpointError(
                f"{path} unpacks to more than it holds, expected parts that are not compressed, as torch.save writes "
                "them; ask for a safetensors file"
            )


def _read_pickle(path: Path) -> dict[str, Any]:
    """Reads with PyTorch's restricted unpickler. Skips the objects in `_UNREAD`."""
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"{path} is a PyTorch file, and reading it needs PyTorch: pip install torch, or ask for a safetensors file"
        ) from None
    try:
        if zipfile.is_zipfile(path):
            _refuse_packed(path)
        with torch.serialization.safe_globals([(_Refused, name) for name in _UNREAD]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, CheckpointError):
        raise
    except Exception as error:  # the unpickler raises nearly anything on damaged bytes
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise CheckpointError(
                f"{path} holds more than tensors: a pickle that would run code when loaded. Nothing "
                f"was executed or loaded ({_culprit(str(error))}). Ask for a safetensors "
                "file"
            ) from None
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is truncated, corrupt or no PyTorch file ({reason}); fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a dictionary of tensors, found {type(content).__name__}")
    held = [key for key in _WEIGHT_KEYS if isinstance(content.get(key), dict)]
    tensors = content[held[0]] if held else content
    if len(held) > 1:
        warnings.warn(f"{path} holds {' and '.join(held)}; the weights are taken from {held[0]}", stacklevel=2)
    if other := [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]:
        kind = "a pickled object" if _refused(tensors[other[0]]) else type(tensors[other[0]]).__name__
        raise CheckpointError(
            f'{path}: {other[0]!r} is {kind}, expected tensors only, or a dictionary with them under "model"'
        )
    whole = all(tensor.layout == torch.strided and not tensor.is_meta for tensor in tensors.values())
    if not whole or sum(tensor.nbytes for tensor in tensors.values()) > 4 * path.stat().st_size:
        raise CheckpointError(
            f"{path} names more numbers than it holds, expected whole tensors; ask for a safetensors file"
        )
    if refused := [str(name) for name, value in content.items() if _refused(value)]:
        many = len(refused) > 1
        warnings.warn(
            f"{path}: {', '.join(refused)} {'are pickled objects and were' if many else 'is a pickled object and was'} "
            "not read; the weights are",
            stacklevel=2,
        )
    return _apart({name: tensor.detach() for name, tensor in tensors.items()})


_WEIGHT_KEYS = ("state_dict_ema", "model_ema", "model", "state_dict", "model_state_dict", "module")
"""Where training scripts keep the weights in a `.pth` file. The first counts: averages before raw ones, as in timm."""


def _culprit(message: str) -> str:
    words = [word.strip("`.,'\"") for word in message.split()]
    after = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "GLOBAL" and "." in words[i + 1]]
    return f"it asks for {after[0]}" if after else "it asks for objects other than tensors"


# ---------------------------------------------------------------------------------------------------------- writing


def write_tensors(
    folder: Path, tensors: Mapping[str, Any], *, max_shard_size: int | str = "5GB", variant: str | None = None
) -> None:
    """Writes `model.safetensors`, or numbered shards and their index if the file would exceed `max_shard_size`.

    With a variant, e.g. "fp16", the files are named as `transformers` names them: `model.fp16.safetensors`.
    """
    if variant is not None and not re.fullmatch(r"\w+", variant):
        raise ValueError(f"variant={variant!r} is part of a file's name; use letters, digits and _, e.g. fp16")
    shards = _shards(tensors, _bytes(max_shard_size))
    whole = _named("model.safetensors", variant)
    stem = whole.removesuffix(".safetensors")
    names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [whole]
    for name, shard in zip(names, shards, strict=True):
        with replacing(folder / name) as temporary:
            _save_file(shard, temporary)
    index = folder / _named("model.safetensors.index.json", variant)
    if len(shards) > 1:
        content = {
            "metadata": {"total_size": sum(value.nbytes for value in tensors.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        write_json(index, content)
    else:
        index.unlink(missing_ok=True)
    stale = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors")
    for path in folder.glob("model*.safetensors"):
        if path.name not in names and stale.fullmatch(path.name):
            path.unlink()


def _save_file(tensors: Mapping[str, Any], path: Path) -> None:
    metadata = {"format": "pt"}  # names the layout; `transformers` requires it
    if all(isinstance(value, np.ndarray) for value in tensors.values()):
        from safetensors.numpy import save_file as save_arrays

        save_arrays({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path, metadata=metadata)
    else:
        from safetensors.torch import save_file

        save_file(_apart({key: value.contiguous() for key, value in tensors.items()}), path, metadata=metadata)


def _apart(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """PyTorch's tensors, each in memory of its own: tied ones are copied."""
    held: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.clone() if tensor.data_ptr() in held else tensor
        held.add(tensor.data_ptr())
    return found


def _shards(tensors: Mapping[str, Any], limit: int) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    for unit, factor in sorted(units.items(), key=lambda item: -len(item[0])):
        if size.upper().endswith(unit) and size[: -len(unit)].strip().isdigit():
            return int(size[: -len(unit)]) * factor
    raise ValueError(f"max_shard_size={size!r} is not understood; give bytes, or a size like 500MB or 5GB")


def write_checkpoint(
    folder: Path,
    config: DeiTConfig,
    tensors: Mapping[str, Any],
    *,
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
) -> None:
    """Writes `config.json` and the weights under Hugging Face's names. `transformers` can read the folder."""
    kind = weights.kind_of(tensors)
    family = "ViT" if config.model_type == "vit" else "DeiT"
    prefix = "" if kind == "backbone" else f"{family.lower()}."
    named = weights.from_ours(tensors, "hf", prefix=prefix)
    architecture = {
        "backbone": "Model",
        "masked_image": "ForMaskedImageModeling",
        "classification": "ForImageClassification",
        "with_teacher": "ForImageClassificationWithTeacher",
    }[kind]
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    config = config.replace(extra={**config.extra, "architectures": [family + architecture], "dtype": dtype})
    write_tensors(folder, named, max_shard_size=max_shard_size, variant=variant)
    config.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------- sharing


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    facts: Facts = NOTHING_KNOWN,
) -> str:
    """Uploads a saved folder to the hub, and creates the repository if it is missing. Returns the commit's address.

    A README.md is written if there is none; `facts` are what it says beyond the files.
    """

    def describe(name: str) -> None:
        card = folder / "README.md"
        if not card.exists():
            write_text(card, model_card(DeiTConfig.from_pretrained(folder), name, facts))

    return upload(
        folder,
        repo_id,
        token=token,
        private=private,
        revision=revision,
        commit_message=commit_message,
        describe=describe,
    )


def push_saved(save: Callable[[Path], object], repo_id: str, **options: Any) -> str:
    """Saves into a temporary folder with `save`, and uploads that folder with `push_folder`."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        return push_folder(Path(folder), repo_id, **options)
