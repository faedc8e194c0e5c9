"""Pairs of models with the same random weights: ours, and the class of `transformers` of the same name."""

import pytest
import torch
from support.models import build, images, mask_for, random_config

from deit import weights
from deit.config import DeiTConfig

transformers = pytest.importorskip("transformers")

CLASSES = {
    "DeiTModel": "backbone",
    "DeiTForMaskedImageModeling": "masked_image",
    "DeiTForImageClassification": "classification",
    "DeiTForImageClassificationWithTeacher": "with_teacher",
    "ViTModel": "backbone",
    "ViTForImageClassification": "classification",
    "ViTForMaskedImageModeling": "masked_image",
}
OURS_ONLY = {
    "distillation_token",
    "drop_path_rate",
    "drop_path_schedule",
    "layer_scale_init_value",
    "position_on_class_token",
    "model_type",
}


def family_of(name: str) -> str:
    return "ViT" if name.startswith("ViT") else "DeiT"


def config_for(name: str, seed: int, **changes) -> DeiTConfig:
    square = CLASSES[name] == "masked_image"
    return random_config(seed, square=square, distillation_token=family_of(name) == "DeiT", **changes)


def hf_prefix(name: str) -> str:
    return "" if name.endswith("Model") else f"{family_of(name).lower()}."


def pair(name: str, config: DeiTConfig, seed: int = 0, attn: str = "eager", **options):
    """Our model and theirs, with the same random weights."""
    ours = build(CLASSES[name], config, seed, **options)
    fields = {key: value for key, value in config.to_dict().items() if key not in OURS_ONLY}
    settings = getattr(transformers, f"{family_of(name)}Config")(**fields, attn_implementation=attn)
    theirs = getattr(transformers, name)(settings, **options).eval()
    state = weights.from_ours(ours._tensors(), "hf5", prefix=hf_prefix(name))
    theirs.load_state_dict(state, strict=True)
    return ours, theirs


def inputs_for(name: str, config: DeiTConfig, **options):
    given = {"pixel_values": images(config, 3)}
    if CLASSES[name] == "masked_image" or options.get("use_mask_token"):
        given["bool_masked_pos"] = mask_for(config, 3)
    if CLASSES[name] == "classification" and config.num_labels > 1:
        given["labels"] = torch.arange(3) % config.num_labels
    return given
