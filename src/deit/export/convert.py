"""Converts a checkpoint of one project for another project."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deit import files, locks, weights
from deit.choices import Dialect
from deit.config import VARIANTS, DeiTConfig
from deit.image.processor import DeiTImageProcessor
from deit.weights import hub


def convert(source: str | Path, to: Dialect, out: str | Path, **where: Any) -> Path:
    """Reads any checkpoint, writes it for the project `to`, and returns the path of what was written.

    `hf` is a folder for this package and `transformers`. `timm` is a folder for
    `timm.create_model("local-dir:FOLDER", pretrained=True)`. `original` is one `.pth`, as facebookresearch/deit loads
    it. `keras` is `model.keras`, which `keras.saving.load_model` opens once `deit.model_keras` is imported.

    The image preprocessing is written too if the format has a place for it. Beside `model.keras` it is a separate file.

    Raises `ValueError` for another `to`, for an `out` that is the folder of `source`, for tensors that don't fit their
    config, and for a model that the project can't express. Raises `locks.InUse` if another process converts into `out`.
    """
    folder = Path(out)
    place = Path(source).parent if Path(source).is_file() else Path(source)
    if folder.resolve() == place.resolve():
        raise ValueError(f"writing to {folder} would replace the files of {source}; write to another folder")
    with locks.held(folder, lock=locks.beside(folder.absolute())):
        files.sweep(folder, "*.safetensors*", "config.json", "preprocessor_config.json", "*.pth", "model.keras")
        return _converted(source, to, folder, where)


def _converted(source: str | Path, to: Dialect, folder: Path, where: dict[str, Any]) -> Path:
    checkpoint = hub.read_checkpoint(source, arrays="numpy" if to == "keras" else "torch", **where)
    kind = weights.kind_of(checkpoint.tensors)
    options = checkpoint.options_for(kind)
    pooler, mask = (options.get(name, False) for name in ("add_pooling_layer", "use_mask_token"))
    config = checkpoint.config_for(kind, DeiTConfig, {})
    checkpoint.faults(weights.manifest(config, kind, pooler=pooler, mask_token=mask), False)
    processor = _processor_of(source, checkpoint.config, where)
    if to == "hf":
        hub.write_checkpoint(folder, checkpoint.config, checkpoint.tensors)
        processor.save_pretrained(folder)
        return folder
    if to == "keras":
        return _to_keras(checkpoint, processor, folder)
    if to not in ("timm", "original"):
        raise ValueError(f"there is no format {to!r}; choose hf, timm, original or keras")
    _check_expressible(checkpoint, to)
    named = weights.from_ours(checkpoint.tensors, to)
    if to == "timm":
        described = _timm_config(checkpoint.config, processor)
        hub.write_tensors(folder, named, max_shard_size=2**63)
        files.write_json(folder / "config.json", described)
        return folder
    import torch

    variant = nearest_variant(checkpoint.config)
    if variant in _TIMM_VITS:
        raise ValueError(
            f"{checkpoint.file} has LayerScale and a position for the class token, and no model of "
            "facebookresearch/deit has both; keep --to hf, or convert --to timm"
        )
    path = folder / f"{variant.replace('-', '_')}.pth"
    with files.replacing(path) as temporary:
        files.write_archive(
            temporary, lambda file: torch.save({"model": {n: t.clone() for n, t in named.items()}}, file)
        )
    return path


def _to_keras(checkpoint: hub.Checkpoint, processor: DeiTImageProcessor, folder: Path) -> Path:
    from deit.model_keras import network

    cls = {
        "backbone": network.TFDeiTModel,
        "masked_image": network.TFDeiTForMaskedImageModeling,
        "classification": network.TFDeiTForImageClassification,
        "with_teacher": network.TFDeiTForImageClassificationWithTeacher,
    }[weights.kind_of(checkpoint.tensors)]
    model, path = cls.from_checkpoint(checkpoint), folder / "model.keras"
    for left in folder.glob(f".{path.name}.*.keras"):  # by a process that was killed
        left.unlink()
    with files.replacing(path) as temporary:
        renamed = temporary.with_name(f"{temporary.name}.keras")  # Keras writes to no other suffix
        try:
            model.save(renamed)
            renamed.replace(temporary)
        finally:
            renamed.unlink(missing_ok=True)
    processor.save_pretrained(folder)
    return path


def _check_expressible(checkpoint: hub.Checkpoint, to: Dialect) -> None:
    config = checkpoint.config
    if (kind := weights.kind_of(checkpoint.tensors)) not in ("classification", "with_teacher"):
        raise ValueError(f"{checkpoint.file} is a {kind} model; {to} stores classifiers only, keep --to hf")
    if config.distillation_token and kind == "classification":
        raise ValueError(
            f"{checkpoint.file} has a distillation token and one head; {to}'s distilled models have two, keep --to hf"
        )
    if config.hidden_act != "gelu" or config.layer_norm_eps > 1e-6:
        raise ValueError(
            f"{to}'s models compute with gelu and a LayerNorm epsilon of 1e-6, but {checkpoint.file} has "
            f"{config.hidden_act} and {config.layer_norm_eps}, so it would answer differently; keep --to hf"
        )
    if config.merge:
        raise ValueError(
            f"{to}'s models merge no tokens, and the config.json of {checkpoint.file} has merge={config.merge}, so it "
            "would answer differently; keep --to hf, or set merge to 0 there"
        )


def nearest_variant(config: DeiTConfig) -> str:
    """The name of the published architecture that is most like `config`. Raises `ValueError` if none has its family."""

    def distance(name: str) -> tuple[int, int, int]:
        other = VARIANTS[name]
        return (
            abs(other.hidden_size - config.hidden_size),
            abs(other.num_hidden_layers - config.num_hidden_layers),
            abs(other.image_hw[0] - config.image_hw[0]),
        )

    family = (config.distillation_token, config.position_on_class_token, config.layer_scale_init_value is None)
    alike = [
        name
        for name, v in VARIANTS.items()
        if family == (v.distillation_token, v.position_on_class_token, v.layer_scale_init_value is None)
    ]
    if not alike:
        raise ValueError(
            "no published architecture combines this distillation token, LayerScale and positions; keep --to hf"
        )
    return min(alike, key=distance)


_TIMM_LACKS = {
    "deit3-medium-patch16-384": "deit3-medium-patch16-224",
    "deit3-huge-patch14-384": "deit3-huge-patch14-224",
}
_TIMM_VITS = {"dinov2-small": "vit_small_patch14_dinov2", "dinov2-base": "vit_base_patch14_dinov2"}
"""timm's names of those that it lists among its ViTs, with images of 518 pixels."""


def _timm_config(config: DeiTConfig, processor: DeiTImageProcessor) -> dict[str, Any]:
    """timm's `config.json`. It names one of timm's architectures, and `model_args` holds the differences from it."""
    name = nearest_variant(config)
    name = _TIMM_LACKS.get(name, name)
    near = VARIANTS[name]
    if name in _TIMM_VITS:
        near = near.replace(image_size=518)
    fields = {
        "img_size": "image_hw",
        "patch_size": "patch_hw",
        "in_chans": "num_channels",
        "embed_dim": "hidden_size",
        "depth": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "qkv_bias": "qkv_bias",
    }
    arguments = {
        theirs: getattr(config, ours) for theirs, ours in fields.items() if getattr(config, ours) != getattr(near, ours)
    }
    arguments = {
        key: value[0] if isinstance(value, tuple) and value[0] == value[1] else value
        for key, value in arguments.items()
    }
    if config.intermediate_size != 4 * config.hidden_size:
        # timm rounds width x ratio down. Half a unit more keeps rounding errors of the ratio from losing a unit.
        arguments["mlp_ratio"] = (config.intermediate_size + 0.5) / config.hidden_size
    cfg = {
        "num_classes": config.num_labels,
        "input_size": [config.num_channels, *config.image_hw],
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        **processor.to_timm(),
        "classifier": ["head", "head_dist"] if config.distillation_token else "head",
        "label_names": list(config.id2label.values()),  # type: ignore[union-attr]
    }
    return {
        "architecture": _TIMM_VITS.get(name, name.replace("-", "_")),
        "num_classes": config.num_labels,
        "num_features": config.hidden_size,
        "model_args": arguments,
        "pretrained_cfg": cfg,
    }


def _processor_of(source: str | Path, config: DeiTConfig, where: Mapping[str, Any]) -> DeiTImageProcessor:
    try:
        return DeiTImageProcessor.of_model(source, config, **where)
    except FileNotFoundError:
        return DeiTImageProcessor.paper(config.image_size)
