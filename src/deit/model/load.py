"""A trained model from its files, of the class they are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deit import files, weights
from deit.model.convnet import ConvNet
from deit.model.network import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTForMaskedImageModeling,
    DeiTModel,
    PreTrained,
)
from deit.weights import hub

_CLASS: dict[str, type[PreTrained]] = {
    "Model": DeiTModel,
    "ForMaskedImageModeling": DeiTForMaskedImageModeling,
    "ForImageClassification": DeiTForImageClassification,
    "ForImageClassificationWithTeacher": DeiTForImageClassificationWithTeacher,
}
_OF_KIND = {cls.kind: cls for cls in _CLASS.values()}


def load_model(name_or_folder: str | Path, **options: Any) -> Any:
    """A trained model in evaluation mode, of the class its files are of; `options` as for `from_pretrained`."""
    where = {
        key: options[key]
        for key in ("revision", "subfolder", "cache_dir", "local_files_only", "token")
        if key in options
    }
    try:
        config = files.read_json(files.find_file(name_or_folder, "config.json", **where))
    except FileNotFoundError:
        config = {}
    if config.get("model_type") == ConvNet.model_type:
        return ConvNet.from_pretrained(name_or_folder, **where)
    name = next(iter(config.get("architectures") or []), "").removeprefix("DeiT").removeprefix("ViT")
    if name in _CLASS:
        return _CLASS[name].from_pretrained(name_or_folder, **options)
    found = hub.read_checkpoint(name_or_folder, config=options.pop("config", None), **where)
    others = {key: value for key, value in options.items() if key not in where}
    return _OF_KIND[weights.kind_of(found.tensors)].from_checkpoint(found, **others)
