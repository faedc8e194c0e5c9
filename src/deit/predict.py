"""From image files to labels: the one way in which a trained folder is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from deit import files, hub, weights
from deit.convnet import ConvNet
from deit.image import DeiTImageProcessor
from deit.model import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTForMaskedImageModeling,
    DeiTModel,
    Head,
    PreTrained,
    head_probabilities,
)

_CLASS: dict[str, type[PreTrained]] = {
    "Model": DeiTModel, "ForMaskedImageModeling": DeiTForMaskedImageModeling,
    "ForImageClassification": DeiTForImageClassification,
    "ForImageClassificationWithTeacher": DeiTForImageClassificationWithTeacher,
}
_OF_KIND = {cls.kind: cls for cls in _CLASS.values()}


def load_model(name_or_folder: str | Path, **options: Any) -> Any:
    """A trained model in evaluation mode, of the class its files are of; `options` as for `from_pretrained`."""
    where = {key: options[key] for key in ("revision", "subfolder", "cache_dir", "local_files_only", "token")
             if key in options}
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


class Predictor:
    """A classifier with its preprocessing and its labels.

    Args:
        name_or_folder: what `deit`, `transformers` or timm saved, or a hub name.
        head: which of a distilled model's heads decides (`fuse_heads`).
        device: `cpu`, `cuda`, …

    Raises `FileNotFoundError` where the files do not say how images are prepared.
    """

    def __init__(self, name_or_folder: str | Path, *, head: Head = "fused", device: str | torch.device = "cpu"):
        self.model = load_model(name_or_folder).to(device)
        self.processor = DeiTImageProcessor.of_model(name_or_folder, self.model.config)
        self.head, self.device = head, torch.device(device)
        self.labels = list(self.model.config.id2label.values())

    @torch.inference_mode()
    def __call__(self, images: Sequence[str | Path | bytes | Image.Image],
                 top_k: int = 5) -> list[list[dict[str, Any]]]:
        """For each image its `top_k` most likely labels: `{"label": name, "score": probability}`, best first.

        Raises `ImageError` naming the first image that can't be read.
        """
        if not images:
            return []
        pixels = self.processor(list(images), return_tensors="pt").pixel_values.to(self.device)
        by_head = head_probabilities(self.model(pixels))
        if self.head not in by_head:
            raise ValueError(f"this model has no head {self.head!r}; it has {', '.join(by_head)}")
        best = by_head[self.head].topk(min(top_k, len(self.labels)))
        return [[{"label": self.labels[i], "score": score} for i, score in zip(indices, scores, strict=True)]
                for indices, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
