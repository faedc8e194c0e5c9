"""Models beside the DeiT family: the small built-in ConvNet, and any classifier of timm."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from deit.choices import Scoring
from deit.config.deit import DeiTConfig
from deit.config.values import (
    MAX_LABELS,
    NOT_WRITTEN,
    Pair,
    built_from_file,
    check_count,
    labels_in_order,
    pair,
    pair_or_int,
    scoring_of,
    unnamed,
)

_NOT_OF_A_MODEL = ("checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit", "features_only")
"""Arguments of `timm.create_model` itself."""


class _Labelled:
    """What these configs have in common."""

    id2label: dict[int, str]
    image_size: Pair

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @property
    def scoring(self) -> Scoring:
        """What turns logits into scores: softmax, or sigmoid for a single output."""
        return scoring_of(None, self.num_labels)

    @property
    def image_hw(self) -> tuple[int, int]:
        return pair(self.image_size)

    def replace(self, **changes: Any) -> Self:
        return replace(self, **changes)  # type: ignore[type-var]


@dataclass(frozen=True, kw_only=True)
class ConvNetConfig(_Labelled):
    """The small built-in ConvNet (`model.convnet.ConvNet`): stages of 3x3 convolutions, with the image halved between.

    Immutable, like `DeiTConfig`.
    """

    widths: tuple[int, ...] = (32, 64, 128)
    """Channels of each stage."""
    depth: int = 2
    """Convolutions in each stage."""
    image_size: Pair = 32
    num_channels: int = 3
    id2label: dict[int, str] = field(default_factory=lambda: unnamed(2))
    extra: dict[str, Any] = field(default_factory=dict)
    """Unknown keys of a `config.json`, written back."""

    model_type = "deit_convnet"

    def __post_init__(self) -> None:
        if not isinstance(self.widths, list | tuple) or not self.widths:
            raise ValueError(f"widths must be a list of channels, found {self.widths!r:.80}")
        check_count("depth", self.depth)
        for name, value in [("num_channels", self.num_channels), *(("each of widths", width) for width in self.widths)]:
            check_count(name, value, most=2**20)
        object.__setattr__(self, "widths", tuple(self.widths))
        object.__setattr__(self, "image_size", pair_or_int("image_size", self.image_size))
        object.__setattr__(self, "id2label", labels_in_order(self.id2label))

    def to_dict(self) -> dict[str, Any]:
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in NOT_WRITTEN}
        known["id2label"] = {str(i): label for i, label in self.id2label.items()}
        return {**self.extra, **known, "model_type": self.model_type}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        names = {f.name for f in fields(cls)} - set(NOT_WRITTEN)
        extra = {name: value for name, value in values.items() if name not in names and name != "model_type"}
        return cls(**{name: value for name, value in values.items() if name in names}, extra=extra)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Reads a `config.json`. Raises `ValueError` that names the file."""
        found: Self = built_from_file(cls.from_dict, path)
        return found


@dataclass(frozen=True, kw_only=True)
class TimmConfig(_Labelled):
    """An image classifier of timm, by its name there (`model.timm_classifier.TimmClassifier`).

    Its `config.json` is timm's own, so timm and transformers load the folder too. Immutable, like `DeiTConfig`.
    """

    architecture: str
    """timm's name, without the tag of published weights, e.g. "tf_efficientnet_lite0"."""
    image_size: Pair = 224
    num_channels: int = 3
    model_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm's constructor, e.g. {"drop_path_rate": 0.1}."""
    id2label: dict[int, str] = field(default_factory=lambda: unnamed(2))
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    """timm's description of the preprocessing: mean, std, interpolation, crop_pct, crop_mode."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Unknown keys of a `config.json`, written back."""

    model_type = "timm"

    def __post_init__(self) -> None:
        if not isinstance(self.architecture, str) or not re.fullmatch(r"\w+", self.architecture):
            raise ValueError(f"architecture must be a name of timm without a tag, found {self.architecture!r:.80}")
        if not isinstance(self.model_args, Mapping):
            raise ValueError(f"model_args must be a dictionary, found {self.model_args!r:.80}")
        if refused := [name for name in self.model_args if name.startswith("pretrained") or name in _NOT_OF_A_MODEL]:
            raise ValueError(  # timm would read another file, and unpickle it
                f"model_args hold {refused[0]!r:.80}, which is no argument of a model; leave it out"
            )
        check_count("num_channels", self.num_channels, most=2**20)
        object.__setattr__(self, "image_size", pair_or_int("image_size", self.image_size))
        object.__setattr__(self, "id2label", labels_in_order(self.id2label))

    def to_dict(self) -> dict[str, Any]:
        """timm's `config.json`."""
        labels = list(self.id2label.values())
        cfg = {**self.pretrained_cfg, "num_classes": len(labels), "input_size": [self.num_channels, *self.image_hw]}
        return {
            **self.extra,
            "architecture": self.architecture,
            "num_classes": len(labels),
            "model_args": self.model_args,
            "label_names": labels,
            "pretrained_cfg": cfg,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config in timm's `config.json`. Outputs without names are called LABEL_0 and so on."""
        cfg = dict(values.get("pretrained_cfg") or {})
        channels, *size = cfg.pop("input_size", None) or (3, 224, 224)
        count = cfg.pop("num_classes", 1000)
        names = cfg.pop("label_names", None)
        count = values.get("num_classes", count)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_LABELS:
            raise ValueError(f"num_classes must be a whole number up to {MAX_LABELS}, found {count!r:.80}")
        names = values.get("label_names") or names or unnamed(count)
        known = ("architecture", "num_classes", "model_args", "label_names", "pretrained_cfg")
        return cls(
            architecture=str(values["architecture"]).partition(".")[0],
            image_size=tuple(size),
            num_channels=channels,
            model_args=dict(values.get("model_args") or {}),
            id2label=dict(enumerate(names)) if isinstance(names, list) else names,
            pretrained_cfg=cfg,
            extra={name: value for name, value in values.items() if name not in known},
        )


ModelConfig = DeiTConfig | ConvNetConfig | TimmConfig
"""The configs of all models that this package trains."""


def config_of(values: Mapping[str, Any]) -> ModelConfig:
    """The config in a `config.json`. timm's architectures outside of this family are `TimmConfig`.

    Raises `ValueError` if no model of this package has such a config.
    """
    if values.get("model_type") == ConvNetConfig.model_type:
        return ConvNetConfig.from_dict(values)
    try:
        return DeiTConfig.from_dict(values)
    except ValueError:
        if "architecture" not in values:
            raise
        return TimmConfig.from_dict(values)


def read_config(path: Path) -> ModelConfig:
    """`config_of` a `config.json`. Raises `ValueError` that names the file."""
    found: ModelConfig = built_from_file(config_of, path)
    return found
