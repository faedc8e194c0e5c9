"""The DeiT family: `DeiTConfig`, which is written and read as Hugging Face's `config.json`, and `VARIANTS`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from functools import wraps
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from deit import files
from deit.choices import Scoring
from deit.config import foreign
from deit.config.values import (
    MAX_LABELS,
    NOT_WRITTEN,
    Labels,
    Pair,
    built_from_file,
    check_count,
    few,
    label_number,
    labels_in_order,
    pair,
    pair_or_int,
    scoring_of,
    unnamed,
)

ACTIVATIONS = (
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "quick_gelu",
    "relu",
    "silu",
    "swish",
    "tanh",
    "sigmoid",
    "linear",
)
"""Names accepted by `hidden_act` and `pooler_act`, as `transformers` spells them."""

IMAGENET_MEAN: tuple[float, ...] = (0.485, 0.456, 0.406)
IMAGENET_STD: tuple[float, ...] = (0.229, 0.224, 0.225)
"""Mean and deviation of red, green and blue over ImageNet's training images, with pixels from 0 to 1."""

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

_OF_LABELS = ("extra", "num_labels", "id2label", "label2id")

_LEFT_OUT_AT_DEFAULT = (
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
)
"""Fields that every config of `transformers` has, whatever its architecture."""

C = TypeVar("C", bound="DeiTConfig")


def _open(cls: type[C]) -> type[C]:
    """Lets a frozen config hold more than its fields: keywords that it does not know, and attributes that are set."""
    build: Any = cls.__init__
    names = frozenset(f.name for f in fields(cls))

    @wraps(build)
    def init(self: C, **values: Any) -> None:
        values = _of_its_type(values)
        unknown = {name: values.pop(name) for name in list(values) if name not in names}
        build(self, **{**values, "extra": {**(values.get("extra") or {}), **unknown}})

    cls.__init__ = init  # type: ignore[method-assign, assignment]
    cls.__setattr__ = _set_attribute  # type: ignore[assignment]
    cls.__delattr__ = _delete_attribute  # type: ignore[assignment]
    return cls


def _of_its_type(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without `model_type`, which says which family they describe."""
    values = dict(values)
    model_type = values.pop("model_type", None)
    if model_type is None:
        return values
    if not isinstance(model_type, str):
        raise ValueError(f"model_type is {model_type!r:.80}, expected text")
    if model_type == "dinov2":
        return foreign.from_dinov2(values)
    if model_type not in ("deit", "vit", "deit3"):
        why = foreign.REFUSED_TYPES.get(model_type, "this package reads deit, vit, deit3 and dinov2")
        raise ValueError(f"model_type is {model_type!r}; {why}")
    return {"distillation_token": model_type == "deit", **values}


def _known_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields of a `config.json`, which may be timm's: it names an architecture and no `model_type`."""
    if "architecture" not in values or "model_type" in values:
        return _of_its_type(values)
    published = {
        name: {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _OF_LABELS}
        for name, config in VARIANTS.items()
    }
    return foreign.from_timm(values, published)


def _set_attribute(self: DeiTConfig, name: str, value: Any) -> None:
    if name in (f.name for f in fields(self)) or hasattr(type(self), name):
        raise FrozenInstanceError(
            f"{type(self).__name__} does not change its {name}; use config.replace({name}=...), and give the changed "
            "copy to the model when it is built or loaded"
        )
    if name.startswith("_"):
        self.__dict__[name] = value
    else:
        self.extra[name] = value


def _delete_attribute(self: DeiTConfig, name: str) -> None:
    if name in self.extra:
        del self.extra[name]
    elif name.startswith("_") and name in self.__dict__:
        del self.__dict__[name]
    else:
        raise FrozenInstanceError(f"{type(self).__name__} keeps its {name}; attributes that were set can be deleted")


@_open
@dataclass(frozen=True, kw_only=True, eq=False)
class DeiTConfig:
    """Architecture and labels of a DeiT or ViT model.

    Fields do not change: `config.replace(...)` gives a changed copy. Other attributes can be set, and are kept with the
    unknown keys of a file; those that begin with an underscore are not written.

    Fields and defaults are those of `transformers` 5's `DeiTConfig`, so that a `config.json` means the same in both
    (LayerNorm's epsilon of 1e-12 included; the published sizes in `VARIANTS` have the paper's 1e-6). The fields from
    `distillation_token` on are ours.

    Raises `ValueError` if a value is out of range or two fields contradict each other.
    """

    hidden_size: int = 768
    """Width D of every token."""
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    """Heads H; must divide `hidden_size`."""
    intermediate_size: int = 3072
    """Width of the MLP's hidden layer."""
    hidden_act: str = "gelu"
    """One of `ACTIVATIONS`; "gelu" is the exact one (erf)."""
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    """Standard deviation of the truncated normal that tokens, positions and linear weights start from."""
    layer_norm_eps: float = 1e-12
    image_size: Pair = 224
    """Pixels: one number for a square, or (height, width)."""
    patch_size: Pair = 16
    """Pixels: one number for a square, or (height, width). The model ignores pixels beyond the last whole patch."""
    num_channels: int = 3
    qkv_bias: bool = True
    encoder_stride: Pair = 16
    """Upsampling factor of the masked-image decoder. A model with that decoder needs it to equal `patch_size`."""
    pooler_output_size: int | None = None
    """Width of the pooler's output; None means `hidden_size`."""
    pooler_act: str = "tanh"

    num_labels: int | None = None
    """Number of classes or regression targets; 0 for no head. None: the number of names in `id2label`, or else 2."""
    id2label: dict[int, str] | None = None
    """Class names by index; None: LABEL_0, LABEL_1, …"""
    label2id: dict[str, int] | None = None
    """The inverse of `id2label`; None: derived from it. If only this one is given, it defines the labels."""
    problem_type: str | None = None
    """One of `PROBLEM_TYPES`; None: each loss decides by `num_labels` and the dtype of the labels."""

    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True

    distillation_token: bool = True
    """Whether a distillation token follows the class token (DeiT, section 4). Without it the model is a plain ViT."""
    drop_path_rate: float = 0.0
    """Stochastic depth: probability (0 to below 1) that an image skips a residual branch of the last block."""
    drop_path_schedule: Literal["linear", "constant"] = "linear"
    """`linear` grows the rate from 0 at the first block (DeiT); `constant` uses it in all (DeiT III)."""
    layer_scale_init_value: float | None = None
    """Start value of LayerScale's gains on both residual branches (DeiT III); None: no LayerScale."""
    position_on_class_token: bool = True
    """False (DeiT III): position embeddings cover the patches only, not the class and distillation tokens."""
    merge: int = 0
    """Number of patch tokens that each block merges with similar ones, for speed (Bolya et al. 2023, "Token Merging").
    A block merges at most half of its patch tokens. 0 merges nothing and is not written to files."""

    extra: dict[str, Any] = field(default_factory=dict)
    """Unknown keys of a `config.json`. They are kept, can be read as attributes, and are written back."""

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "encoder_stride"):
            object.__setattr__(self, name, pair_or_int(name, getattr(self, name)))
        self._settle_labels()
        self._check()

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, f.name) == getattr(other, f.name) for f in fields(self))

    def __hash__(self) -> int:
        """The hash of the fields alone, because attributes may be set while a config is a key."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in NOT_WRITTEN}
        return hash(tuple(tuple(value.items()) if isinstance(value, dict) else value for value in values.values()))

    def _settle_labels(self) -> None:
        names = self.id2label
        for name in ("id2label", "label2id"):
            if not isinstance(value := getattr(self, name), Mapping | None):
                raise ValueError(f"{name} must be a dictionary, found {value!r}")
        if not isinstance(self.num_labels, int | None) or isinstance(self.num_labels, bool):
            raise ValueError(f"num_labels must be a whole number, found {self.num_labels!r}")
        # transformers' example scripts write the numbers of label2id as strings.
        given = (
            None
            if self.label2id is None
            else {str(label): label_number(i, "label2id", "value") for label, i in self.label2id.items()}
        )
        if names is None and given is not None:
            names = {i: label for label, i in given.items()}
        if names is not None:
            names = labels_in_order(names)
        count = self.num_labels if self.num_labels is not None else (2 if names is None else len(names))
        if count < 0:
            raise ValueError(f"num_labels must be 0 or more, found {count}")
        if count > MAX_LABELS:
            raise ValueError(f"num_labels must be at most {MAX_LABELS}, found {count}")
        if names is None or (names == unnamed(len(names)) and len(names) != count):
            names = unnamed(count)
        if len(names) != count:
            raise ValueError(
                f"num_labels={count} contradicts id2label, which names {len(names)} classes; give one of "
                "the two, or use config.replace(num_labels=...) to drop the names"
            )
        # Names may repeat: ImageNet's published names call two classes "crane". label2id may then give either number.
        inverse = {label: i for i, label in names.items()}
        if given is None or given == {label: i for i, label in unnamed(len(given)).items()}:
            given = inverse
        if given.keys() != inverse.keys() or any(names.get(i) != label for label, i in given.items()):
            raise ValueError(
                "label2id is not the inverse of id2label; give one of the two, or use config.replace(id2label=...)"
            )
        object.__setattr__(self, "num_labels", count)
        object.__setattr__(self, "id2label", Labels(names))
        object.__setattr__(self, "label2id", Labels(given))

    def _check(self) -> None:
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels"):
            check_count(name, getattr(self, name))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} cannot be divided among num_attention_heads="
                f"{self.num_attention_heads}; choose a multiple"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            if not isinstance(value := getattr(self, name), int | float) or not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be at least 0 and below 1, found {value!r}")
        for name in ("initializer_range", "layer_norm_eps"):
            if not isinstance(value := getattr(self, name), int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, found {value!r}")
        for name in (
            "qkv_bias",
            "distillation_token",
            "position_on_class_token",
            "output_hidden_states",
            "output_attentions",
            "return_dict",
        ):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, found {value!r}")
        if not isinstance(self.merge, int) or isinstance(self.merge, bool) or self.merge < 0:
            raise ValueError(f"merge must be a whole number of at least 0, found {self.merge!r:.80}")
        if not isinstance(self.pooler_output_size, int | None) or (self.pooler_output_size or 1) < 1:
            raise ValueError(f"pooler_output_size must be a whole number or None, found {self.pooler_output_size!r}")
        if not isinstance(self.layer_scale_init_value, int | float | None):
            raise ValueError(f"layer_scale_init_value must be a number or None, found {self.layer_scale_init_value!r}")
        for name in ("hidden_act", "pooler_act"):
            if getattr(self, name) not in ACTIVATIONS:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {', '.join(ACTIVATIONS)}")
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(
                f"problem_type={self.problem_type!r} is not known; choose one of "
                f"{', '.join(PROBLEM_TYPES)}, or None to decide from the labels"
            )
        if self.drop_path_schedule not in ("linear", "constant"):
            raise ValueError(f"drop_path_schedule={self.drop_path_schedule!r} is not known; choose linear or constant")
        if 0 in self.grid:
            raise ValueError(
                f"image_size={self.image_size} is smaller than patch_size={self.patch_size}; "
                "an image must hold at least one patch"
            )

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return pair(self.image_size)

    @property
    def patch_hw(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        return pair(self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.grid_of(*self.image_hw)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image of `height` x `width` pixels."""
        return height // self.patch_hw[0], width // self.patch_hw[1]

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: the class token, and the distillation token if there is one."""
        return 2 if self.distillation_token else 1

    @property
    def num_prefix_positions(self) -> int:
        """Position embeddings before those of the patches."""
        return self.num_prefix_tokens if self.position_on_class_token else 0

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def pooler_width(self) -> int:
        return self.pooler_output_size or self.hidden_size

    @property
    def drop_path_rates(self) -> list[float]:
        """Rate of stochastic depth of each block, first to last."""
        last = self.num_hidden_layers - 1
        if self.drop_path_schedule == "constant" or last == 0:
            return [self.drop_path_rate] * self.num_hidden_layers
        return [self.drop_path_rate * i / last for i in range(self.num_hidden_layers)]

    @property
    def scoring(self) -> Scoring:
        """What turns logits into scores, as in the pipelines of `transformers`."""
        return scoring_of(self.problem_type, self.num_labels or 0)

    @property
    def model_type(self) -> str:
        """`deit` with a distillation token, `vit` without one, `deit3` for models that `transformers` can't compute.

        `transformers` knows neither LayerScale nor patch-only positions. Under the name `vit` it would load such a
        file without them, and its answers would be wrong.
        """
        if self.layer_scale_init_value is not None or not self.position_on_class_token:
            return "deit3"
        return "deit" if self.distillation_token else "vit"

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") and name != "extra" and name in self.extra:
            return self.extra[name]
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed. A new number of labels, or new names, replaces all of the old labels."""
        if not changes.keys().isdisjoint({"num_labels", "id2label", "label2id"}):
            changes = {"num_labels": None, "id2label": None, "label2id": None, **changes}
        return replace(self, **{"extra": dict(self.extra), **changes})

    def update(self, values: Mapping[str, Any]) -> None:
        """Sets attributes that are not fields. Fields may be among `values` if that leaves them as they are.

        Raises `FrozenInstanceError`, and sets nothing, if a field would change.
        """
        names = {f.name for f in fields(self)}
        given = {name: value for name, value in values.items() if name in names - {"extra"}}
        wanted = self.replace(**given)
        changed = [name for name in given if getattr(wanted, name) != getattr(self, name)]
        if values.get("model_type", self.model_type) != self.model_type:
            changed.append("model_type")
        if changed:
            raise FrozenInstanceError(
                f"{type(self).__name__} does not change its {', '.join(changed)}; use config.replace(...), and give "
                "the changed copy to the model when it is built or loaded"
            )
        for name, value in {**values, **values.get("extra", {})}.items():
            if name not in names and name != "model_type":
                setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`: all fields, the unknown keys that were read, and `model_type`."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in NOT_WRITTEN}
        known = {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}
        known["id2label"] = {str(i): label for i, label in self.id2label.items()}  # type: ignore[union-attr]
        known["label2id"] = dict(self.label2id)  # type: ignore[arg-type]
        del known["num_labels"]  # derived from id2label, as in `transformers`
        if not self.merge:
            del known["merge"]  # so that a plain model's file is that of other libraries
        return {**self.extra, **known, "model_type": self.model_type}

    def to_diff_dict(self) -> dict[str, Any]:
        """`to_dict` without what says nothing about the architecture and is at its default: labels, `problem_type`,
        `output_hidden_states`, `output_attentions` and `return_dict`. It reads back as the same config."""
        default = type(self)(num_labels=2).to_dict()
        return {
            name: value
            for name, value in self.to_dict().items()
            if name not in _LEFT_OUT_AT_DEFAULT or value != default[name]
        }

    def to_json_string(self, use_diff: bool = False) -> str:
        """`to_dict` as text, or `to_diff_dict` with `use_diff`; keys sorted, ending in a newline."""
        values = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = False) -> None:
        """Writes `to_json_string` into a file."""
        files.write_text(Path(json_file_path), self.to_json_string(use_diff))

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> Self:
        """Reads one file in the format of `config.json`."""
        found: Self = built_from_file(cls.from_dict, Path(json_file))
        return found

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **overrides: Any) -> Self:
        """Builds a config from the content of a `config.json`: timm's, or Hugging Face's of a known family.

        Those are `deit`, `vit`, `deit3` and `dinov2`. `overrides` replace fields; unknown ones are refused. Unknown
        keys in `config_dict` are kept in `extra`.
        """
        values = _known_fields(config_dict)
        names = {f.name for f in fields(cls)} - set(NOT_WRITTEN)
        if unknown := overrides.keys() - names:
            raise ValueError(f"{cls.__name__} has no field {few(sorted(unknown))}; it has {', '.join(sorted(names))}")
        extra = {name: value for name, value in values.items() if name not in {*names, "model_type"}}
        known = {name: value for name, value in values.items() if name not in extra}
        config = cls(**known, extra=extra)
        return config.replace(**overrides) if overrides else config

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        subfolder: str = "",
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        force_download: bool = False,
        **overrides: Any,
    ) -> Self:
        """Reads `config.json` from a folder, or from a repository on the Hugging Face hub."""
        path = files.find_file(
            pretrained_model_name_or_path,
            "config.json",
            revision=revision,
            subfolder=subfolder,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            force_download=force_download,
        )
        found: Self = built_from_file(cls.from_dict, path, **overrides)
        return found

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | Path, **options: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The content of `config.json` as it is written, and those `options` that don't say where it lies."""
        where = {name: options.pop(name) for name in files.WHERE if name in options}
        return files.read_json(files.find_file(pretrained_model_name_or_path, "config.json", **where)), options

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> None:
        """Writes `config.json` into `save_directory`, and makes the folder if it is missing.

        The options from `repo_id` on are for `push_to_hub`, and refused without it.
        """
        push = files.push_options(
            push_to_hub,
            save_directory,
            repo_id=repo_id,
            token=token,
            private=private,
            revision=revision,
            commit_message=commit_message,
        )
        files.write_text(Path(save_directory) / "config.json", self.to_json_string())
        if push_to_hub:
            self.push_to_hub(**push)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads `config.json` (`token`, `private`, `revision`, `commit_message`); returns the commit's address."""
        return files.upload_saved(self.save_pretrained, repo_id, **{"commit_message": "Upload config", **options})


@_open
@dataclass(frozen=True, kw_only=True, eq=False)
class ViTConfig(DeiTConfig):
    """`DeiTConfig` for a model without a distillation token (`model_type: vit`)."""

    distillation_token: bool = False

    def _check(self) -> None:
        super()._check()
        if self.distillation_token:
            raise ValueError(
                "ViTConfig describes a model without a distillation token, found distillation_token=True; use "
                "DeiTConfig"
            )


def _variants() -> dict[str, DeiTConfig]:
    def size(width: int, depth: int, heads: int) -> DeiTConfig:
        return DeiTConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            layer_norm_eps=1e-6,
            num_labels=1000,
        )

    tiny, small, medium = size(192, 12, 3), size(384, 12, 6), size(512, 12, 8)
    base, large, huge = size(768, 12, 12), size(1024, 24, 16), size(1280, 32, 16)
    found = {}
    for name, config in {"tiny": tiny, "small": small, "base": base}.items():  # Touvron et al. 2020, table 1
        for pixels in (224, 384) if name == "base" else (224,):
            sized = config.replace(image_size=pixels)
            found[f"deit-{name}-patch16-{pixels}"] = sized.replace(distillation_token=False)
            found[f"deit-{name}-distilled-patch16-{pixels}"] = sized
    # Touvron et al. 2022, "DeiT III". Medium and huge were published at 224 only; at 384 huge sees 27x27 patches.
    for name, config in {"small": small, "medium": medium, "base": base, "large": large, "huge": huge}.items():
        patch = 14 if name == "huge" else 16
        for pixels in (224, 384):
            found[f"deit3-{name}-patch{patch}-{pixels}"] = config.replace(
                image_size=pixels,
                patch_size=patch,
                encoder_stride=patch,
                distillation_token=False,
                position_on_class_token=False,
                layer_scale_init_value=1e-4,
                drop_path_schedule="constant",
            )
    # Oquab et al. 2023, "DINOv2", to be fine-tuned at 224. The files have positions for 518 pixels, and no classifier.
    for name, config in {"small": small, "base": base}.items():
        found[f"dinov2-{name}"] = config.replace(
            image_size=224,
            patch_size=14,
            encoder_stride=14,
            distillation_token=False,
            layer_scale_init_value=1e-5,
            drop_path_schedule="constant",
        )
    return found


VARIANTS: dict[str, DeiTConfig] = _variants()
"""The published architectures by the names of their checkpoints, e.g. `deit-tiny-distilled-patch16-224`."""
