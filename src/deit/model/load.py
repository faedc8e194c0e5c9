"""Loads a trained model from its files: alone, or as a classifier with its preprocessing and its labels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from torch import Tensor

from deit import files, weights
from deit.choices import Head, Scoring
from deit.config import ConvNetConfig, TimmConfig, read_config
from deit.image.processor import DeiTImageProcessor
from deit.model.convnet import ConvNet
from deit.model.network import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTForMaskedImageModeling,
    DeiTModel,
    PreTrained,
)
from deit.model.timm_classifier import TimmClassifier
from deit.weights import hub

_CLASS: dict[str, type[PreTrained]] = {
    "Model": DeiTModel,
    "ForMaskedImageModeling": DeiTForMaskedImageModeling,
    "ForImageClassification": DeiTForImageClassification,
    "ForImageClassificationWithTeacher": DeiTForImageClassificationWithTeacher,
}
_OF_KIND = {cls.kind: cls for cls in _CLASS.values()}


def load_model(name_or_folder: str | Path, **options: Any) -> Any:
    """A trained model in evaluation mode, of the class that its files need. `options` are as for `from_pretrained`.

    Raises `ValueError` for options that the class can't honour: a ConvNet and a model of timm take only those that say
    where the files are.
    """
    where = {key: options[key] for key in files.WHERE if key in options}
    try:
        path = files.find_file(name_or_folder, "config.json", **where)
        config = files.read_json(path)
    except FileNotFoundError:
        config = {}
    kind = (
        type(read_config(path)) if config.get("model_type") == ConvNet.model_type or "architecture" in config else None
    )
    if kind in (ConvNetConfig, TimmConfig):
        if refused := options.keys() - where.keys():
            raise ValueError(
                f"{name_or_folder} holds a {'ConvNet' if kind is ConvNetConfig else 'model of timm'}, which is loaded "
                f"as it is; leave out {', '.join(sorted(refused))}, and change the loaded model"
            )
        if kind is ConvNetConfig:
            return ConvNet.from_pretrained(name_or_folder, **where)
        return TimmClassifier.from_pretrained(name_or_folder, **where)
    named = config.get("architectures") or [""]
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise files.CheckpointError(
            f"the config.json of {name_or_folder} has architectures={named!r:.80}, expected a list with the name of a "
            "class; correct it, or leave it out"
        )
    name = named[0].removeprefix("DeiT").removeprefix("ViT")
    if name in _CLASS:
        return _CLASS[name].from_pretrained(name_or_folder, **options)
    reading = where | {key: options[key] for key in ("config", "variant", "use_safetensors") if key in options}
    found = hub.read_checkpoint(name_or_folder, **reading)
    others = {key: value for key, value in options.items() if key not in reading}
    loaded = _OF_KIND[weights.kind_of(found.tensors)].from_checkpoint(found, **others)
    model: PreTrained = loaded[0] if others.get("output_loading_info") else loaded
    model._came_from(name_or_folder, where)
    return loaded


@dataclass(frozen=True)
class Classifier:
    """A trained classifier, as its files describe it."""

    name: str
    """The name or folder that it was loaded from."""
    model: Any
    """The model in evaluation mode, on the CPU."""
    processor: DeiTImageProcessor
    labels: tuple[str, ...]

    @property
    def heads(self) -> tuple[Head, ...]:
        """The heads that can decide: all of a distilled model's; a model with a single head is `fused` and `class`."""
        return heads_of(isinstance(self.model, DeiTForImageClassificationWithTeacher), self.model.config.scoring)


def load_classifier(name_or_folder: str | Path, **where: Any) -> Classifier:
    """A classifier with its preprocessing and its labels. `where` is as for `from_pretrained`.

    Raises `ValueError` for a model without classes, and `FileNotFoundError` if the files don't say how images are
    prepared.
    """
    model = load_model(name_or_folder, **where)
    _refuse_no_classifier(model, f"{name_or_folder} holds")
    return classifier_of(model, DeiTImageProcessor.of_model(name_or_folder, model.config, **where), str(name_or_folder))


def classifier_of(model: Any, processor: DeiTImageProcessor, name: str = "") -> Classifier:
    """A classifier that is in memory already, which it puts into evaluation mode. `name` is what messages call it.

    Raises `ValueError` for a model without classes.
    """
    _refuse_no_classifier(model, "found")
    return Classifier(name or type(model).__name__, model.eval(), processor, tuple(model.config.id2label.values()))


def _refuse_no_classifier(model: Any, found: str) -> None:
    kinds = (DeiTForImageClassification, DeiTForImageClassificationWithTeacher, ConvNet, TimmClassifier)
    if not isinstance(model, kinds) or not model.config.num_labels:
        raise ValueError(
            f"{found} a {type(model).__name__} without classes; expected a classifier. To make one of it, train it on "
            "labels with deit train and --set start=FOLDER"
        )


def heads_of(distilled: bool, scoring: Scoring) -> tuple[Head, ...]:
    """The heads that can decide; `softmax` is a mean of two softmaxes, which other scores don't have."""
    if not distilled:
        return "fused", "class"
    return tuple(head for head in get_args(Head) if head != "softmax" or scoring == "softmax")


class NotFinite(ValueError):
    """A model's answer that is not a number."""


def refuse_not_finite(answers: Iterable[Tensor | np.ndarray], where: str = "") -> None:
    """Raises `NotFinite` if an answer holds NaN or infinity. `where` completes "the model's answer"."""
    if not all(np.isfinite(each).all() if isinstance(each, np.ndarray) else each.isfinite().all() for each in answers):
        raise NotFinite(
            f"the model's answer{where} is not a number; its weights are damaged, or its training diverged: take "
            "another checkpoint"
        )


def refuse_other_scoring(name: str | Path, scoring: Scoring, what: str) -> None:
    """Raises `ValueError` for a model whose classes don't exclude each other, because `what` needs them to."""
    if scoring != "softmax":
        kind = "a regression" if scoring == "none" else "a score for each label by itself"
        raise ValueError(
            f"{name} gives {kind}, and {what} needs one class for each image; use a model of two classes or "
            "more whose problem_type is single_label_classification"
        )


def refuse_head(head: str, heads: tuple[str, ...]) -> None:
    """Raises `ValueError` if `head` is not among a model's `heads`."""
    if head not in heads:
        raise ValueError(f"this model has no head {head!r}; it has {', '.join(heads)}")
